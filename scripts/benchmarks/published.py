"""Write the published computations plainly, for `benchmark.py` and tests to compare with.

`make_straightforward` turns a method into its plain variant. The plain variants are not part of the
product.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from masking_generator import num_visible
from modeling_backbones import enlarged
from modeling_finetune import ActivatedLinear, Block, patchify, take
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
from modeling_targets import ReconstructionLoss, gaussian_window, spatial_loss


class StraightforwardConMIM(ConMIM):
    """ConMIM with all N x N logits, of which rows are selected, and an EMA per parameter."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["mask"].flatten(1)
        with torch.no_grad():
            keys = self.teacher.project(batch["image_strong"], None)
        queries = self.project(batch["image"], mask)
        queries = F.normalize(queries, dim=-1)
        keys = F.normalize(keys, dim=-1)
        logits = queries @ keys.transpose(1, 2) / self.target.temperature
        labels = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return {"loss": F.cross_entropy(logits[mask].float(), labels[mask])}

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Update each parameter of the teacher separately, matching names at every step."""
        teacher = dict(self.teacher.named_parameters())
        student = dict(self.named_parameters())
        with torch.no_grad():
            for name in teacher.keys() & student.keys():
                teacher[name].mul_(self.t_momentum).add_(student[name], alpha=1 - self.t_momentum)


class StraightforwardMAE(MAE):
    """MAE that projects every patch, restores the order of all tokens, and predicts every patch."""

    def forward(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> dict[str, Tensor]:
        images = batch["image"]
        noise = self.noise_of(batch) if noise is None else noise
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
        if self.target.norm_pix_loss:
            std = (target.var(-1, keepdim=True) + 1e-6).sqrt()
            target = (target - target.mean(-1, keepdim=True)) / std
        mask = torch.ones_like(noise).scatter_(1, keep, 0.0)
        return {"loss": ((predicted - target).square().mean(-1) * mask).sum() / mask.sum()}


class StraightforwardSemAIM(SemAIM):
    """SemAIM that computes every map, and the last block's attention twice.

    Make it with `attn` "eager", which uses dense masks.
    """

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
    """Return A2MIM's focal frequency loss of images [B, c, H, W] under a mask [B, 1, H, W].

    Full complex spectra of both are computed and averaged over the batch only afterwards
    (docs/methods/simmim_a2mim.md#spectra).
    """
    spectra = []
    for images in (criterion.seen(predicted, target, mask), target):
        mean = torch.fft.fft2(images, norm="ortho").mean(0, keepdim=True)
        spectra.append(torch.stack((mean.real, mean.imag), -1))
    square = (spectra[0] - spectra[1]).square().sum(-1)
    weights = square.sqrt().log1p()
    return ((weights / weights.max()).nan_to_num(0).clamp(0, 1).detach() * square).mean()


class StraightforwardA2MIM(A2MIM):
    """A2MIM with full spectra of every image, and channels-first feature maps."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, mask = batch["image"], batch["mask"]
        predicted = self.predict(self.features(images, mask), images)
        with torch.autocast(images.device.type, enabled=False):
            predicted = predicted.float()
            hidden = enlarged(mask, images.shape[-2:]).float()
            loss = spatial_loss(predicted, images, hidden, self.loss.regression)
            if self.loss.fft_weight:
                spectra = whole_spectra(self.loss, predicted, images, hidden.unsqueeze(1))
                loss = loss + self.loss.fft_weight * spectra
        return {"loss": loss}


class StraightforwardSemanticMIM(SemanticMIM):
    """SemanticMIM with a mask token at every position, of which the masked ones are selected.

    Every patch is projected, every mask token passes all blocks and is predicted. The last encoder
    block computes all tokens, and class tokens are normalized once for each of the two inputs of a
    mask block.
    """

    def encode(self, images: Tensor, visible: Tensor, predicted: Tensor) -> Tensor:
        num_cls = self.num_prefix_tokens
        patches = self.patch_embed(images)
        if self.mask_blocks is None:  # the baseline: mask tokens replace the hidden patches
            seen = torch.zeros(patches.shape[:2], dtype=torch.bool, device=images.device)
            seen = seen.scatter_(1, visible, True)
            patches = torch.where(seen[..., None], patches, self.mask_token.to(patches.dtype))
            return self.norm(self.run_blocks(self.embed(patches, self.pos_embed)))[:, num_cls:]
        tokens = self.embed(patches, self.pos_embed)
        x = torch.cat((tokens[:, :num_cls], take(tokens[:, num_cls:], visible)), 1)
        masked = (self.mask_token + self.pos_embed[:, num_cls:]).expand(len(images), -1, -1)
        for block, mask_block in zip(self.blocks, self.mask_blocks, strict=True):
            x = block(x)
            others = torch.cat((x[:, :num_cls], masked), 1)
            masked = self.cross_attend(mask_block, masked, others, predicted)
        return self.norm(masked)

    def cross_attend(
        self, block: Block, queries: Tensor, others: Tensor, predicted: Tensor
    ) -> Tensor:
        """Run a block whose queries [B, N, C] attend to class tokens and masked positions."""
        attention = block.attn
        num_cls = self.num_prefix_tokens
        bias = attention.qkv.bias
        biases = (attention.q_bias, None, attention.v_bias) if bias is None else bias.chunk(3)
        keys = block.norm1(others)
        inputs = (block.norm1(queries), keys, keys)
        projected = []
        for x, weight, b in zip(inputs, attention.qkv.weight.chunk(3), biases, strict=True):
            projected.append(attention.split_heads(F.linear(x, weight, b)))
        q, k, v = projected
        # additive mask: 0 for the class tokens and the masked positions
        mask = q.new_full(others.shape[:2], -math.inf)
        mask[:, :num_cls] = 0
        mask.scatter_(1, predicted + num_cls, 0)
        return block.add(queries, attention.attend(q, k, v, mask[:, None, None]))


class StraightforwardMaskFeat(StraightforwardSemanticMIM, MaskFeat):
    """MaskFeat that predicts every position and then selects the masked ones."""

    def compare(
        self, tokens: Tensor, batch: dict[str, Tensor], positions: Tensor
    ) -> dict[str, Tensor]:
        hog = self.target.hog
        target = one_hot_histograms(batch["image"], hog.nbins, hog.pool, hog.window)
        (rows, columns), (height, width) = hog.grid, hog.cells
        target = target.view(len(target), 3 * hog.nbins, rows, height, columns, width)
        target = target.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        predicted = take(self.hog_head(tokens).float(), positions)
        return {"loss": F.mse_loss(predicted, take(target, positions).float())}


class StraightforwardSemanticBEiT(StraightforwardSemanticMIM, SemanticBEiT):
    """BEiT that computes the logits of every position and then selects the masked ones."""

    def compare(
        self, tokens: Tensor, batch: dict[str, Tensor], positions: Tensor
    ) -> dict[str, Tensor]:
        logits = take(F.linear(tokens, self.lm_head.weight, self.lm_head.bias), positions)
        target = self.target.of(batch, positions).flatten()
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), target)}


def one_hot_histograms(images: Tensor, nbins: int, pool: int, window: int) -> Tensor:
    """Return HOG as published, from a map per bin: [B, 3, nbins, H / pool, W / pool]."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).to(images)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx, gy = (F.conv2d(padded, k.expand(3, 1, 3, 3), groups=3) for k in (kernel, kernel.T))
    magnitude = torch.stack((gx, gy)).norm(dim=0)
    bins = (torch.atan2(gx, gy) / math.pi * nbins).floor().long() % nbins
    if window:
        repeats = images.shape[2] // window, images.shape[3] // window
        magnitude = magnitude * gaussian_window(window, images.device).to(images).repeat(repeats)
    maps = torch.zeros(len(images), 3, nbins, *images.shape[2:]).to(images)
    maps.scatter_(2, bins.unsqueeze(2), magnitude.unsqueeze(2))
    histograms = maps.unfold(3, pool, pool).unfold(4, pool, pool).sum((5, 6))
    return F.normalize(histograms, dim=2)


def semantic_mask_of_one(
    ids: Tensor, ratio: float, weight: float, tokens: Tensor, parts: Tensor
) -> tuple[list, list, list]:
    """Return SemMAE's mask of one image, made token by token.

    `ids` holds part ids [L]; `tokens` [L] and `parts` [K] are noise. Returns the counts, the
    visible tokens in the encoder's order, and the masked ones
    (docs/methods/mae_semmae.md#masks-from-parts).
    """
    order = tokens.argsort(stable=True).tolist()
    part_order = parts.argsort(stable=True).tolist()
    sizes = torch.bincount(ids, minlength=len(parts)).float()
    budget = torch.tensor(len(ids) * ratio, dtype=torch.float32)
    inter = torch.zeros(len(parts))
    for part in part_order:
        inter[part] = min(float(sizes[part]), max(0.0, math.trunc(float(budget))))
        budget = budget - sizes[part]
    counts = torch.round(weight * torch.round(sizes * ratio) + (1 - weight) * inter)
    left = counts.clone()
    selected = []
    for token in order:
        if left[ids[token]] > 0:
            left[ids[token]] -= 1
            selected.append(token)
    line = [token for token in order if token not in selected] + selected
    visible = int(len(ids) * (1 - ratio))
    return counts.tolist(), line[:visible], line[visible:]


def make_straightforward(method: PretrainMethod) -> None:
    """Turn a method made with `attn` "eager" into its plain variant, in place.

    Raises:
        ValueError: the method has no plain variant.
    """
    variants = {
        ConMIM: StraightforwardConMIM,
        MAE: StraightforwardMAE,
        SemAIM: StraightforwardSemAIM,
        A2MIM: StraightforwardA2MIM,
        MaskFeat: StraightforwardMaskFeat,
        SemanticBEiT: StraightforwardSemanticBEiT,
    }
    if type(method) not in variants:
        raise ValueError(
            f"{type(method).__name__} has no straightforward variant to be measured against"
        )
    method.__class__ = variants[type(method)]
    if isinstance(method, A2MIM):
        next(method.backbone.children())._forward_pre_hooks.clear()  # it puts the channels last
    for layer in method.modules():
        if isinstance(layer, ActivatedLinear):
            layer.act = partial(F.gelu)  # F.gelu itself would be recomputed in backward
