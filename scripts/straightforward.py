"""The published computations written plainly: what `benchmark.py` measures against and tests compare numbers with.

They live here and not in the product. `make_straightforward` turns an object of the product's class into one.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import ReconstructionLoss, enlarged, spatial_loss
from masking_generator import num_visible
from modeling_finetune import ActivatedLinear, patchify, take
from modeling_pretrain import A2MIM, MAE, ConMIM, PretrainMethod, SemAIM, similarity


class StraightforwardConMIM(ConMIM):
    """Explicit attention, all N x N logits, then a choice of rows; the teacher moves parameter by parameter."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["mask"].flatten(1)
        with torch.no_grad():
            keys = self.teacher.project(batch["image_strong"], None)
        queries = self.project(batch["image"], mask)
        logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).transpose(1, 2) / self.temperature
        labels = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return {"loss": F.cross_entropy(logits[mask].float(), labels[mask])}

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """One multiplication and one addition for each parameter, with the names matched anew at each step."""
        teacher, student = dict(self.teacher.named_parameters()), dict(self.named_parameters())
        with torch.no_grad():
            for name in teacher.keys() & student.keys():
                teacher[name].mul_(self.t_momentum).add_(student[name], alpha=1 - self.t_momentum)


class StraightforwardMAE(MAE):
    """Every patch is projected, tokens are put back in place, and every one is predicted (specs/semmae.md A.4)."""

    def forward(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> dict[str, Tensor]:
        images, noise = batch["image"], self.draws(batch) if noise is None else noise
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
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = torch.ones_like(noise).scatter_(1, keep, 0.0)
        return {"loss": ((predicted - target).square().mean(-1) * mask).sum() / mask.sum()}


class StraightforwardSemAIM(SemAIM):
    """Made with `attn` "eager", so with dense masks; every map is made, from a last block that is attended in twice."""

    def unmasked(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
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
        return tokens if self.has_features else None, maps[self.attention_type]


def whole_spectra(criterion: ReconstructionLoss, predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The focal loss of pictures [B, c, H, W] under a mask [B, 1, H, W]: complex spectra of both in full, averaged over
    the batch only afterwards (specs/a2mim.md 3.5).
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
                loss = loss + self.loss.fft_weight * whole_spectra(self.loss, predicted, images, hidden.unsqueeze(1))
        return {"loss": loss}


def semantic_mask_of_one(
    ids: Tensor, ratio: float, weight: float, tokens: Tensor, parts: Tensor
) -> tuple[list, list, list]:
    """SemMAE's mask of one image, token by token (specs/semmae.md B.1).

    From part ids [L] and noise for tokens [L] and parts [K]: counts, visible tokens as the encoder takes them, masked
    ones.
    """
    order, part_order = tokens.argsort().tolist(), parts.argsort().tolist()
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
    """Turns a method made with `attn` "eager" into its plain form, whose blocks keep what they computed.

    ValueError for a method whose plain form is not written here.
    """
    forms = {
        ConMIM: StraightforwardConMIM, MAE: StraightforwardMAE, SemAIM: StraightforwardSemAIM,
        A2MIM: StraightforwardA2MIM,
    }  # fmt: skip
    if type(method) not in forms:
        raise ValueError(f"{type(method).__name__} has no straightforward form to be measured against")
    method.__class__ = forms[type(method)]
    if isinstance(method, A2MIM):
        next(method.backbone.children())._forward_pre_hooks.clear()  # which puts the channels last
    for layer in method.modules():
        if isinstance(layer, ActivatedLinear):
            layer.act = partial(F.gelu)  # not the function itself, which is computed again
