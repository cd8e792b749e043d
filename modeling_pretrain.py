"""Every pre-training method of the repository: mask, encode, (decode,) loss, top-down on one screen each.

A method is a `MaskedImageModel`: it names the batch keys it reads (`views`), computes a loss from a batch, and may move
a teacher after each optimizer step. It knows nothing of flags, data sets, optimizers, devices and engines.
Shapes in comments: B images, N patches, T = 1 + N tokens, C channels, M masked patches an image, D projected width.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ema import MovingAverage
from modeling_finetune import VIT_SIZES, VisionTransformer, register


class MaskedImageModel(VisionTransformer):
    """A ViT with a mask token, and what the engine asks of every method.

    `views`: the batch keys that `forward` reads. `teacher`: an average of the network that is no submodule, so that
    neither DDP nor DeepSpeed wraps, casts or optimizes it; None without one.
    """

    views: tuple[str, ...] = ("image", "mask")
    not_exported = ("mask_token",)

    def __init__(self, **vit):
        super().__init__(**{**vit, "num_classes": 0, "global_pool": "token"})
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self._init_token(self.mask_token)
        self.average: MovingAverage | None = None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns {"loss": scalar, ...}; further entries are detached figures for the log."""
        raise NotImplementedError

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Called after each optimizer step with the share of the run that lay before it, in [0, 1)."""

    @property
    def teacher(self) -> "MaskedImageModel | None":
        return None if self.average is None else self.average.module

    def encode_masked(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Images [B, 3, H, W], with the mask token where mask [B, gh, gw] is True, to normed tokens [B, T, C]."""
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask.flatten(1).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return self.norm(self.run_blocks(self.embed(x)))

    def encoder_state_dict(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The clean encoder in `weights`, by default in what the published recipe fine-tunes: the teacher, if any."""
        if weights is None:
            weights = (self if self.teacher is None else self.teacher).state_dict()
        return {k: v for k, v in weights.items() if not k.startswith(self.not_exported)}

    # Pre-training cuts the normal distribution at one standard deviation, and the convolution follows it too.

    def _init_module(self, module: nn.Module) -> None:
        super()._init_module(module)
        if isinstance(module, nn.Conv2d):
            self._init_token(module.weight)
            nn.init.zeros_(module.bias)

    def _init_token(self, weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)


def masked_positions(mask: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Where mask [B, N] is True: positions int64 [B, M] in row-major order and which of them count, bool [B, M].

    M is `count`, the largest number of masked patches in the batch; when it is not given it is read from the mask,
    which on a GPU waits for the device. Images with fewer are filled up with positions that do not count.
    """
    count = int(mask.sum(1).max()) if count is None else count
    positions = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    return positions, mask.gather(1, positions)


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """Rows of tokens [B, N, D] at positions [B, M]: [B, M, D]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# ConMIM


class ConMIM(MaskedImageModel):
    """Masked image modelling with denoising contrast (ICLR 2023, arXiv 2205.09616; specs/conmim.md 2).

    The student sees a weakly augmented image with masked patches, the teacher a strongly augmented one in full; each
    masked patch must pick its own teacher feature among all patches of the same image.
    Differences from the published code: no unused `lm_head`; the teacher's dropout and stochastic depth are off; only
    masked rows enter the similarity (same loss); the similarity and softmax are in float32; any grid.
    """

    views = ("image", "image_strong", "mask")
    not_exported = ("mask_token", "projectors.")

    def __init__(
        self,
        *,
        projector_hidden_dim: int = 4096,
        projector_out_dim: int = 256,
        temperature: float = 0.1,
        t_momentum: float = 0.996,
        **vit,
    ):
        super().__init__(**vit)
        self.temperature, self.t_momentum = temperature, t_momentum
        self.projectors = projector(self.embed_dim, projector_hidden_dim, projector_out_dim)
        self.projectors.apply(self._init_module)
        self.average = MovingAverage(self)
        without_dropout(self.teacher)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["mask"].flatten(1)  # [B, N]
        with torch.no_grad():
            keys = self.teacher.project(batch["image_strong"], None)  # [B, N, D]
        queries = self.project(batch["image"], mask)  # [B, N, D]
        positions, counts = masked_positions(mask, batch.get("max_masked"))
        logits = self.similarity(take(queries, positions), keys)  # [B, M, N]
        return self.contrast(logits, positions, counts)

    def project(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Projected patch tokens [B, N, D]. The class token passes through too: it counts in the batch statistics."""
        tokens = self.encode_masked(images, mask)
        return self.projectors(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)[:, self.num_prefix_tokens :]

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cosine similarity over temperature, within each image: [B, M, D], [B, N, D] to [B, M, N]."""
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = (F.normalize(x.float(), dim=-1) for x in (queries, keys))
            return queries @ keys.transpose(1, 2) / self.temperature

    def contrast(self, logits: Tensor, positions: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Cross entropy over the patches of the image, averaged over all masked patches of the batch."""
        total = counts.sum().clamp(min=1)
        losses = F.cross_entropy(logits.flatten(0, 1), positions.flatten(), reduction="none")
        hits = (logits.detach().argmax(-1) == positions) & counts
        return {"loss": (losses * counts.flatten()).sum() / total, "contrast_acc": hits.sum() / total}

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Teacher momentum: cosine from `t_momentum` to 1 over the run (specs/conmim.md 5.4)."""
        momentum = 1.0 + 0.5 * (self.t_momentum - 1.0) * (1.0 + math.cos(math.pi * progress))
        self.average.update(momentum, applied)


def projector(dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Three bias-free linear layers, each with batch normalisation, the last without affine (specs/conmim.md 1.2)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=False),
        nn.BatchNorm1d(out_dim, affine=False),
    )


def without_dropout(module: nn.Module) -> None:
    """Switches dropout and stochastic depth off and leaves the training mode, with its batch statistics, on."""
    for part in module.modules():
        for rate in ("p", "drop_prob", "attn_drop"):
            if isinstance(getattr(part, rate, None), float):
                setattr(part, rate, 0.0)


def _conmim(size: str, **kwargs) -> ConMIM:
    return ConMIM(**{**VIT_SIZES[size], "rel_pos_bias": "shared", "init_values": 0.1, **kwargs})


for _size in VIT_SIZES:
    register(f"conmim_{_size}_patch16_224", partial(_conmim, _size))
