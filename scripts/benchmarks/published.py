"""The published computations written plainly: what `benchmark.py` measures against and tests
compare numbers with.

They live here and not in the product. `make_straightforward` turns an object of the product's class
into one.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from masking_generator import num_visible
from modeling_finetune import ActivatedLinear, Block, patchify, take
from modeling_losses import ReconstructionLoss, enlarged, spatial_loss
from modeling_pretrain import (
    A2MIM,
    MAE,
    ConMIM,
    MaskFeat,
    PretrainMethod,
    SemAIM,
    SemanticBEiT,
    SemanticMIM,
    similarity,
)
from modeling_targets import gaussian_window


class StraightforwardConMIM(ConMIM):
    """Explicit attention, all N x N logits, then a choice of rows; the teacher moves parameter by
    parameter."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["mask"].flatten(1)
        with torch.no_grad():
            keys = self.teacher.project(batch["image_strong"], None)
        queries = self.project(batch["image"], mask)
        logits = (
            F.normalize(queries, dim=-1)
            @ F.normalize(keys, dim=-1).transpose(1, 2)
            / self.temperature
        )
        labels = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return {"loss": F.cross_entropy(logits[mask].float(), labels[mask])}

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """One multiplication and one addition for each parameter, with the names matched anew at
        each step."""
        teacher, student = dict(self.teacher.named_parameters()), dict(self.named_parameters())
        with torch.no_grad():
            for name in teacher.keys() & student.keys():
                teacher[name].mul_(self.t_momentum).add_(student[name], alpha=1 - self.t_momentum)


class StraightforwardMAE(MAE):
    """Every patch is projected, tokens are put back in place, and every one is predicted
    (specs/semmae.md A.4)."""

    def forward(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> dict[str, Tensor]:
        images, noise = batch["image"], self.noise_of(batch) if noise is None else noise
        tokens = self.patch_embed(images) + self.pos_embed[:, 1:]
        shuffle = noise.argsort(1)
        keep = shuffle[:, : num_visible(noise.shape[1], self.mask_ratio)]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = self.norm(self.run_blocks(torch.cat((cls_token, take(tokens, keep)), 1)))
        x = self.decoder_embed(x)
        masked = self.mask_token.expand(len(images), noise.shape[1] - keep.shape[1], -1)
        restored = take(torch.cat((x[:, 1:], masked.to(x.dtype)), 1), shuffle.argsort(1))
        x = torch.cat((x[:, :1], restored), 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        predicted = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = patchify(images, self.patch_embed.patch_size)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (
                target.var(-1, keepdim=True) + 1e-6
            ).sqrt()
        mask = torch.ones_like(noise).scatter_(1, keep, 0.0)
        return {"loss": ((predicted - target).square().mean(-1) * mask).sum() / mask.sum()}


class StraightforwardSemAIM(SemAIM):
    """Made with `attn` "eager", so with dense masks; every map is made, from a last block that is
    attended in twice."""

    def own_attention(self, images: Tensor) -> Tensor:
        x = self.embed(self.patch_embed(images), self.pos_embed)
        *blocks, last_block = self.blocks
        for block in blocks:
            x = block(x)
        q, k, _ = last_block.attn.project(last_block.norm1(x))
        maps = {"self": last_block.attn.probabilities(q, k, None)[:, :, 0, 1:].mean(1)}
        tokens = self.norm(last_block(x))
        patches = tokens[:, 1:]
        maps["cls"] = similarity(tokens[:, :1], patches).softmax(-1)
        maps["gap"] = similarity(patches.mean(1, keepdim=True), patches).softmax(-1)
        return maps[self.attention_type]


def whole_spectra(
    criterion: ReconstructionLoss, predicted: Tensor, target: Tensor, mask: Tensor
) -> Tensor:
    """The focal loss of pictures [B, c, H, W] under a mask [B, 1, H, W]: complex spectra of both in
    full, averaged over the batch only afterwards (specs/a2mim.md 3.5).
    """
    pictures = criterion.seen(predicted, target, mask), target
    ours, theirs = (torch.fft.fft2(x, norm="ortho").mean(0, keepdim=True) for x in pictures)
    ours, theirs = (torch.stack((x.real, x.imag), -1) for x in (ours, theirs))
    square = (ours - theirs).square().sum(-1)
    weights = square.sqrt().log1p()
    return ((weights / weights.max()).nan_to_num(0).clamp(0, 1).detach() * square).mean()


class StraightforwardA2MIM(A2MIM):
    """Whole spectra of every image, and maps with the channels in front."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, mask = batch["image"], batch["mask"]
        predicted = self.predict(self.features(images, mask), images)
        with torch.autocast(images.device.type, enabled=False):
            predicted, hidden = predicted.float(), enlarged(mask, images.shape[-2:]).float()
            loss = spatial_loss(predicted, images, hidden, self.loss.regression)
            if self.loss.fft_weight:
                loss = loss + self.loss.fft_weight * whole_spectra(
                    self.loss, predicted, images, hidden.unsqueeze(1)
                )
        return {"loss": loss}


class StraightforwardSemanticMIM(SemanticMIM):
    """Every patch is projected; every position is a mask token that passes all blocks and is
    predicted, and then the hidden ones are chosen. The last encoder block computes all tokens, and
    class tokens are normed once for each of the two inputs of a mask block."""

    def encode(self, images: Tensor, visible: Tensor, predicted: Tensor) -> Tensor:
        num_cls, patches = self.num_prefix_tokens, self.patch_embed(images)
        if (
            self.mask_blocks is None
        ):  # the baseline: mask tokens in the places of the patches that are hidden
            seen = torch.zeros(patches.shape[:2], dtype=torch.bool, device=images.device).scatter_(
                1, visible, True
            )
            patches = torch.where(seen[..., None], patches, self.mask_token.to(patches.dtype))
            return self.norm(self.run_blocks(self.embed(patches, self.pos_embed)))[:, num_cls:]
        tokens = self.embed(patches, self.pos_embed)
        x = torch.cat((tokens[:, :num_cls], take(tokens[:, num_cls:], visible)), 1)
        masked = (self.mask_token + self.pos_embed[:, num_cls:]).expand(len(images), -1, -1)
        for block, mask_block in zip(self.blocks, self.mask_blocks, strict=True):
            x = block(x)
            masked = self.look(
                mask_block, masked, torch.cat((x[:, :num_cls], masked), 1), predicted
            )
        return self.norm(masked)

    def look(self, block: Block, queries: Tensor, others: Tensor, predicted: Tensor) -> Tensor:
        """A block whose queries [B, N, C] see the class tokens and the mask tokens among `others`
        that are hidden."""
        own, num_cls = block.attn, self.num_prefix_tokens
        weights, bias = own.qkv.weight.chunk(3), own.qkv.bias
        biases = (own.q_bias, None, own.v_bias) if bias is None else bias.chunk(3)
        inputs = block.norm1(queries), *[block.norm1(others)] * 2
        q, k, v = (
            own.split_heads(F.linear(*of)) for of in zip(inputs, weights, biases, strict=True)
        )
        hidden = q.new_full(others.shape[:2], -math.inf)
        hidden[:, :num_cls] = 0
        hidden.scatter_(1, predicted + num_cls, 0)
        return block.add(queries, own.attend(q, k, v, hidden[:, None, None]))


class StraightforwardMaskFeat(StraightforwardSemanticMIM, MaskFeat):
    def compare(
        self, tokens: Tensor, batch: dict[str, Tensor], positions: Tensor
    ) -> dict[str, Tensor]:
        target = one_hot_histograms(batch["image"], self.hog.nbins, self.hog.pool, self.hog.window)
        (rows, columns), (height, width) = self.hog.grid, self.hog.cells
        target = target.view(len(target), 3 * self.hog.nbins, rows, height, columns, width)
        target = target.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return {
            "loss": F.mse_loss(
                take(self.hog_head(tokens).float(), positions), take(target, positions).float()
            )
        }


class StraightforwardSemanticBEiT(StraightforwardSemanticMIM, SemanticBEiT):
    def compare(
        self, tokens: Tensor, batch: dict[str, Tensor], positions: Tensor
    ) -> dict[str, Tensor]:
        logits = take(F.linear(tokens, self.lm_head.weight, self.lm_head.bias), positions)
        return {
            "loss": F.cross_entropy(
                logits.flatten(0, 1).float(), self.visual_tokens_at(batch, positions).flatten()
            )
        }


def one_hot_histograms(images: Tensor, nbins: int, pool: int, window: int) -> Tensor:
    """HOG as published, with a map of the whole image for each bin: [B, 3, nbins, H / pool, W /
    pool]."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).to(images)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx, gy = (F.conv2d(padded, k.expand(3, 1, 3, 3), groups=3) for k in (kernel, kernel.T))
    magnitude = torch.stack((gx, gy)).norm(dim=0)
    bins = (torch.atan2(gx, gy) / math.pi * nbins).floor().long() % nbins
    if window:
        repeats = images.shape[2] // window, images.shape[3] // window
        magnitude = magnitude * gaussian_window(window, images.device).to(images).repeat(repeats)
    blown_up = torch.zeros(len(images), 3, nbins, *images.shape[2:]).to(images)
    blown_up.scatter_(2, bins.unsqueeze(2), magnitude.unsqueeze(2))
    cells = blown_up.unfold(3, pool, pool).unfold(4, pool, pool).sum((5, 6))
    return F.normalize(cells, dim=2)


def semantic_mask_of_one(
    ids: Tensor, ratio: float, weight: float, tokens: Tensor, parts: Tensor
) -> tuple[list, list, list]:
    """SemMAE's mask of one image, token by token (specs/semmae.md B.1).

    From part ids [L] and noise for tokens [L] and parts [K]: counts, visible tokens as the encoder
    takes them, masked ones.
    """
    order, part_order = (noise.argsort(stable=True).tolist() for noise in (tokens, parts))
    sizes = torch.bincount(ids, minlength=len(parts)).float()
    budget, inter = torch.tensor(len(ids) * ratio, dtype=torch.float32), torch.zeros(len(parts))
    for part in part_order:
        inter[part] = min(float(sizes[part]), max(0.0, math.trunc(float(budget))))
        budget = budget - sizes[part]
    counts = torch.round(weight * torch.round(sizes * ratio) + (1 - weight) * inter)
    left, selected = counts.clone(), []
    for token in order:
        if left[ids[token]] > 0:
            left[ids[token]] -= 1
            selected.append(token)
    line = [token for token in order if token not in selected] + selected
    visible = int(len(ids) * (1 - ratio))
    return counts.tolist(), line[:visible], line[visible:]


def make_straightforward(method: PretrainMethod) -> None:
    """Turns a method made with `attn` "eager" into its plain form, whose blocks keep what they
    computed.

    ValueError for a method whose plain form is not written here.
    """
    forms = {
        ConMIM: StraightforwardConMIM, MAE: StraightforwardMAE, SemAIM: StraightforwardSemAIM,
        A2MIM: StraightforwardA2MIM,
        MaskFeat: StraightforwardMaskFeat, SemanticBEiT: StraightforwardSemanticBEiT,
    }  # fmt: skip
    if type(method) not in forms:
        raise ValueError(
            f"{type(method).__name__} has no straightforward form to be measured against"
        )
    method.__class__ = forms[type(method)]
    if isinstance(method, A2MIM):
        next(method.backbone.children())._forward_pre_hooks.clear()  # which puts the channels last
    for layer in method.modules():
        if isinstance(layer, ActivatedLinear):
            layer.act = partial(F.gelu)  # not the function itself, which is computed again
