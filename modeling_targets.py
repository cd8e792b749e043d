"""What methods predict, and how it is compared.

Top-down: the targets, which have one contract; the losses of pixels and visual tokens; then what
makes targets: blur, histograms of oriented gradients, tokenizers, teachers.

Shapes in comments: B images, T = 1 + N tokens (class token first), C channels of the tower, D of
what it gives; M masked patches, P numbers of a patch, G channels of the tokenizer's first layer.
"""

import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modeling_backbones import enlarged, family_of
from modeling_finetune import VisionTransformer, check_choice, patchify, take, unpatchify
from unimim.checkpoint.files import load_checkpoint, load_metadata, load_module_state
from unimim.checkpoint.loading import unwrapped
from unimim.checkpoint.names import StateDict
from unimim.checkpoint.resizing import interpolate_pos_embed
from unimim.errors import OptionError, refused
from unimim.flag import Flag
from unimim.sizes import Pair
from unimim.tokenizer.clusters import PatchClusters
from unimim.tokenizer.files import TokenizerInfo

TEACHERS = ("dino", "clip")
PREDICTED_FEATURES = ("none", "inference", "ema", *TEACHERS)
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGET_PRECISIONS = tuple(DTYPES)
Batch = dict[str, Tensor]
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
OWN_MEAN_STD: dict[str, MeanStd] = {  # of the images that the teachers were trained on
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


# --------------------------------------------------------------------------------------------------
# Targets: one contract


TARGET_PRECISION = Flag(
    "target_precision",
    choices=TARGET_PRECISIONS,
    help="precision of the frozen target model; auto: --precision",
)
NORM_PIX_LOSS = Flag(
    "norm_pix_loss",
    off="no_norm_pix_loss",
    help="predict each patch normalized by its own mean and std",
)
T_MOMENTUM = Flag(
    "t_momentum", type=float, group="ema that is a target or guides masks",
    help="momentum of the ema at the first step; 1 at the last",
)  # fmt: skip
FEATURE_LOSSES = ("cosine", "smooth_l1")
FEATURE_LOSS = Flag(
    "feature_loss", choices=FEATURE_LOSSES, group="features as target",
    help="squared distance of normalized features, or smooth L1 of features in layer norm",
)  # fmt: skip
PIXEL_LOSSES = ("L1", "L2")


class Shape(NamedTuple):
    """What a target must know of an encoder: its grid of patches, their (height, width) in pixels,
    and how many channels its own features and its images have."""

    grid: Pair
    patch: Pair
    width: int
    channels: int = 3


class Target:
    """What is predicted of each patch. It is no submodule of a method: no engine wraps, saves or
    trains it, and copies of a method share it.

    A subclass sets `width`, how many numbers it is of a patch, and says in `of_all`, or `of`, what
    the target of a batch is and in `loss_map`, or `score`, how far a prediction is from it. Options
    of its constructor are options of every method that can have it as target.

    flags: command-line flags of these options. views: keys of a batch that it reads besides
    "image". raw_views: those of them whose images it normalizes itself. head_name: the method's
    attribute that holds the head. uses_ema: it is made by the method's ema. sees_all: its head
    wants every token of the encoder, not those of the predicted patches only. frozen: a network
    that makes it, whose blocks may be compiled.
    """

    flags: tuple[Flag, ...] = ()
    views: tuple[str, ...] = ()
    raw_views: tuple[str, ...] = ()
    head_name = "target_head"
    uses_ema = False
    sees_all = False
    frozen: nn.Module | None = None
    width: int

    def __init__(self, shape: Shape):
        self.shape = shape

    def __deepcopy__(self, memo: dict) -> "Target":
        """Return itself: the copies of a method share its target."""
        return self

    def load(self) -> None:
        """Read the files that the target needs, after the method's weights are made."""

    def head(self, dim: int) -> nn.Module:
        """Build what predicts the target from tokens [B, M, dim]."""
        return nn.Linear(dim, self.width)

    def of(self, batch: Batch, positions: Tensor | None = None, method: Any = None) -> Tensor:
        """Return the target [B, M, D] of the patches at positions int64 [B, M], of all patches in
        row-major order without them; `method` has the `teacher` of a target that `uses_ema`."""
        target = self.of_all(batch, method)
        return target if positions is None else self.at(target, positions)

    def of_all(self, batch: Batch, method: Any = None) -> Tensor:
        """Return the target [B, N, D] of all patches in row-major order."""
        raise NotImplementedError

    def at(self, target: Tensor, positions: Tensor) -> Tensor:
        """Return a target of all patches [B, N, D] at positions [B, M]."""
        return take(target, positions)

    def loss_map(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each patch [B, M], in float32, of two tensors [B, M, D]."""
        raise NotImplementedError

    def mean_loss(self, predicted: Tensor, target: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the mean of `loss_map` where `counts` is True, of all patches without it."""
        return mean_where(self.loss_map(predicted, target), counts)

    def score(
        self,
        head: nn.Module,
        tokens: Tensor,
        target: Tensor,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss and metrics of tokens [B, M, C] against the target of their patches;
        those count where `counts` bool [B, M] is True."""
        return {"loss": self.mean_loss(head(tokens), target, counts)}


def mean_where(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return the mean of values [B, M] where `counts` is True, of all without it."""
    if counts is None:
        return values.mean()
    return (values * counts).sum() / counts.sum().clamp(min=1)


class Pixels(Target):
    """The pixels of a patch in the order row, column, color.

    norm_pix_loss: normalize each patch by its own mean and std. gaussian_kernel_size,
    gaussian_sigma: blur of the images; None is without. loss_type: "L1" or "L2". mean_by_patch: a
    mean of the patches' means, as SemAIM's code has it, which differs by rounding. fft_weight: of
    A2MIM's loss of spectra, of the error in the units of the target, 0 where nothing is predicted.
    """

    flags = (
        NORM_PIX_LOSS,
        Flag("gaussian_kernel_size", type=int, help="side of the blur of the target pixels"),
        Flag("gaussian_sigma", type=float, help="std of the blur of the target pixels"),
        Flag("loss_type", choices=PIXEL_LOSSES, help="loss of the pixels"),
        Flag("fft_weight", type=float, help="weight of A2MIM's loss of spectra; 0: none"),
    )
    head_name = "pixel_head"

    def __init__(
        self,
        shape: Shape,
        *,
        norm_pix_loss: bool = False,
        gaussian_kernel_size: int | None = None,
        gaussian_sigma: float | None = None,
        loss_type: str = "L2",
        mean_by_patch: bool = False,
        fft_weight: float = 0.0,
    ):
        super().__init__(shape)
        check_choice("loss_type", loss_type, PIXEL_LOSSES)
        self.norm_pix_loss = norm_pix_loss
        self.blur = build_blur(gaussian_kernel_size, gaussian_sigma, shape.channels)
        self.loss_type = loss_type
        self.mean_by_patch = mean_by_patch
        self.fft_weight = fft_weight
        self.spectra = ReconstructionLoss()
        self.width = shape.channels * math.prod(shape.patch)

    @property
    def is_plain(self) -> bool:
        """Whether these are the images' pixels as they are, under the L1 loss."""
        return not self.norm_pix_loss and self.blur is None and self.loss_type == "L1"

    def of(self, batch: Batch, positions: Tensor | None = None, method: Any = None) -> Tensor:
        return self.normalized(self.patches(batch["image"], positions, batch.get("patches")))

    def patches(
        self, images: Tensor, positions: Tensor | None = None, cut: Tensor | None = None
    ) -> Tensor:
        """Return the patches [B, M, P] of the blurred images in float32; `cut` [B, N, P] are those
        of the images as they are, where the method has them already."""
        if self.blur is not None:
            cut = None
            with torch.autocast(images.device.type, enabled=False):
                images = self.blur.to(images.device)(images.float())
        patches = patchify(images, self.shape.patch) if cut is None else cut
        return (patches if positions is None else take(patches, positions)).float()

    def normalized(self, patches: Tensor) -> Tensor:
        """Return patches [B, M, P] as they are predicted."""
        if not self.norm_pix_loss:
            return patches
        mean, std = pixel_statistics(patches)
        return (patches - mean) / std

    def restored(self, predicted: Tensor, patches: Tensor) -> Tensor:
        """Return predictions [B, M, P] as pixels, those of normalized ones with the mean and std of
        the true patches [B, M, P]."""
        if not self.norm_pix_loss:
            return predicted
        mean, std = pixel_statistics(patches)
        return predicted * std + mean

    def loss_map(self, predicted: Tensor, target: Tensor) -> Tensor:
        error = predicted.float() - target.float()
        return (error.square() if self.loss_type == "L2" else error.abs()).mean(-1)

    def mean_loss(self, predicted: Tensor, target: Tensor, counts: Tensor | None = None) -> Tensor:
        if counts is not None or self.mean_by_patch:
            return super().mean_loss(predicted, target, counts)
        # one kernel in each direction
        mean_error = F.mse_loss if self.loss_type == "L2" else F.l1_loss
        return mean_error(predicted.float(), target)

    def score(
        self,
        head: nn.Module,
        tokens: Tensor,
        target: Tensor,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        predicted = head(tokens)
        loss = self.mean_loss(predicted, target, counts)
        if not self.fft_weight:
            return {"loss": loss}
        spectra = self.spectral_loss(predicted.float() - target, positions, counts)
        loss = loss + self.fft_weight * spectra
        return {"loss": loss, "loss_freq": spectra.detach()}

    def spectral_loss(
        self, error: Tensor, positions: Tensor | None, counts: Tensor | None
    ) -> Tensor:
        """Return the loss of the spectra of the image of errors [B, M, P], 0 where none count."""
        if counts is not None:
            error = error * counts.unsqueeze(-1)
        if positions is not None:
            blank = error.new_zeros(len(error), math.prod(self.shape.grid), self.width)
            error = put(blank, positions, error)
        with torch.autocast(error.device.type, enabled=False):
            return self.spectra.frequency_loss(unpatchify(error, self.shape.grid, self.shape.patch))


def pixel_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std (of the unbiased variance + 1e-6) of each patch [B, M, P]: two tensors
    [B, M, 1]."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def put(canvas: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Return a copy of canvas [B, N, D] with tokens [B, M, D] at positions [B, M]: the inverse of
    `take`."""
    return canvas.scatter(1, positions.unsqueeze(-1).expand_as(tokens), tokens)


class Histograms(Target):
    """MaskFeat's histograms of oriented gradients, with cells of half a patch and a window of a
    whole one unless their sides are given."""

    head_name = "hog_head"

    def __init__(
        self,
        shape: Shape,
        *,
        hog_nbins: int = 9,
        hog_pool: int | None = None,
        hog_window: int | None = None,
    ):
        super().__init__(shape)
        side = shape.patch[0]
        pool = max(side // 2, 1) if hog_pool is None else hog_pool
        window = side if hog_window is None else hog_window
        self.hog = HOG(shape.grid, shape.patch, hog_nbins, pool, window, shape.channels)
        self.width = self.hog.width

    def of_all(self, batch: Batch, method: Any = None) -> Tensor:
        return self.hog(batch["image"])

    def loss_map(self, predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted.float() - target).square().mean(-1)

    def mean_loss(self, predicted: Tensor, target: Tensor, counts: Tensor | None = None) -> Tensor:
        if counts is not None:
            return super().mean_loss(predicted, target, counts)
        return F.mse_loss(predicted.float(), target)


class VisualTokenHead(nn.Linear):
    """Predicts visual tokens and returns loss and accuracy."""

    def forward(
        self, tokens: Tensor, targets: Tensor, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean loss and accuracy of tokens [B, M, C] against targets int64 [B, M]; those
        count where `counts` bool [B, M] is True."""
        counts = torch.ones_like(targets, dtype=torch.float32) if counts is None else counts.float()
        loss, hits = VisualTokenLoss.apply(
            tokens.flatten(0, 1), self.weight, self.bias, targets.flatten(), counts.flatten()
        )
        total = counts.sum().clamp(min=1)
        return loss / total, hits / total


class VisualTokens(Target):
    """The visual tokens of the patches.

    They come from the tokenizer in `discrete_vae_weight_path`, which sees the same crop as
    "image_second", or without one with the batch, as "target_ids" [B, N].
    """

    flags = (
        Flag(
            "discrete_vae_weight_path", metavar="FILE", optional=True,
            help="the tokenizer, which gives the visual tokens: what run_tokenizer.py writes, or "
            "DALL-E's encoder as OpenAI's encoder.pkl or OpenMMLab's dalle_encoder.pth",
        ),
        TARGET_PRECISION,
    )  # fmt: skip
    head_name = "lm_head"
    raw_views = ("image_second",)
    tokenizer: "VisualTokenizer | ClusterTokenizer | None" = None

    def __init__(
        self,
        shape: Shape,
        *,
        vocab_size: int = 8192,
        discrete_vae_weight_path: str | None = None,
        target_precision: str = "auto",
    ):
        super().__init__(shape)
        self.vocab_size = vocab_size
        self.path = discrete_vae_weight_path
        self.precision = target_precision
        self.views = ("target_ids" if self.path is None else "image_second",)
        self.width = vocab_size

    def head(self, dim: int) -> nn.Module:
        return VisualTokenHead(dim, self.vocab_size)

    @property
    def frozen(self) -> nn.Module | None:
        return None if self.tokenizer is None else self.tokenizer.encoder

    @property
    def second_size(self) -> Pair:
        """(height, width) of the tokenizer's images, which give one visual token for each patch."""
        pairs = zip(self.tokenizer.patch, self.shape.grid, strict=True)
        return tuple(side * count for side, count in pairs)

    def load(self) -> None:
        if self.path is None:
            return
        self.tokenizer = load_tokenizer(self.path, self.precision)
        grid = tuple(self.shape.grid)
        if self.tokenizer.grid not in (None, grid):
            there = self.tokenizer.grid
            raise OptionError(
                "discrete_vae_weight_path", self.path,
                f"was trained for {there[0]} x {there[1]} visual tokens of an image, the model has "
                f"{grid[0]} x {grid[1]} patches; train one for as many with run_tokenizer.py, or "
                "change input_size or patch_size",
                "input_size", "patch_size",
            )  # fmt: skip
        if self.tokenizer.vocab_size != self.vocab_size:
            count = self.tokenizer.vocab_size
            raise OptionError(
                "discrete_vae_weight_path", self.path,
                f"has {count} visual tokens, the model {self.vocab_size}; use vocab_size={count}",
                "vocab_size",
            )  # fmt: skip

    def of(self, batch: Batch, positions: Tensor | None = None, method: Any = None) -> Tensor:
        """Return visual tokens int64 [B, M]."""
        if "target_ids" not in batch:
            return self.tokenizer(batch["image_second"], positions)
        ids = batch["target_ids"].flatten(1)
        return ids if positions is None else self.at(ids, positions)

    def at(self, target: Tensor, positions: Tensor) -> Tensor:
        return target.gather(1, positions)

    def score(
        self,
        head: nn.Module,
        tokens: Tensor,
        target: Tensor,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        loss, hits = head(tokens, target, counts)
        return {"loss": loss, "mlm_acc": hits}


class Features(Target):
    """Features [B, N, D] of unmasked images; a subclass says whose."""

    flags = (FEATURE_LOSS,)
    head_name = "feature_head"

    def __init__(self, shape: Shape, *, feature_loss: str = "cosine"):
        super().__init__(shape)
        check_choice("feature_loss", feature_loss, FEATURE_LOSSES)
        self.feature_loss = feature_loss

    def loss_map(self, predicted: Tensor, target: Tensor) -> Tensor:
        predicted, target = predicted.float(), target.float()
        if self.feature_loss == "smooth_l1":
            target = F.layer_norm(target, target.shape[-1:])
            return F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
        predicted = F.normalize(predicted, dim=-1)
        return (predicted - F.normalize(target, dim=-1)).square().sum(-1)


class OwnFeatures(Features):
    """Features of the method's ema."""

    flags = (FEATURE_LOSS, T_MOMENTUM)
    uses_ema = True

    def __init__(self, shape: Shape, *, t_momentum: float = 0.996, **features):
        super().__init__(shape, **features)
        self.t_momentum = t_momentum
        self.width = shape.width

    def of_all(self, batch: Batch, method: Any = None) -> Tensor:
        return method.teacher.whole(batch["image"])[:, -math.prod(self.shape.grid) :]


class TeacherTokens(Features):
    """Features of a frozen network.

    target_model: a file, or timm's name of the network; without it a batch brings "target_tokens"
    [B, T, out_dim]. target_precision: its dtype; "auto" leaves it to autocast. image_mean_std: what
    images are normalized by; with it that network gets them normalized by its own mean and std,
    without it as they are, which is as published for SemAIM.
    """

    flags = (
        FEATURE_LOSS,
        Flag("target_model", metavar="PATH", help="DINO or CLIP model: a file or its name in timm"),
        TARGET_PRECISION,
        Flag(
            "target_mean_std", "image_mean_std", choices=("images", "own"), default="images",
            convert=lambda choice, run: run.mean_std if choice == "own" else None,
            help="normalize that model's images as all images, which is as published, or by its "
            "own mean and std",
        ),
    )  # fmt: skip
    kind: str

    def __init__(
        self,
        shape: Shape,
        *,
        target_model: str | None = None,
        target_precision: str = "auto",
        image_mean_std: MeanStd | None = None,
        out_dim: int | None = None,
        **features,
    ):
        super().__init__(shape, **features)
        self.teacher = None
        self.width = out_dim
        if target_model is not None:
            check_rgb(shape.channels, "target_model")
            self.teacher = load_teacher(
                self.kind, target_model, shape.grid, target_precision, image_mean_std
            )
            self.width = self.teacher.width
        elif out_dim is None:
            problem = "needs target_model: a file or timm's name"
            raise OptionError("target", self.kind, problem, "target_model")

    def tokens(self, batch: Batch) -> Tensor:
        """Return the network's tokens [B, T, D]."""
        return batch["target_tokens"] if self.teacher is None else self.teacher(batch["image"])

    def of_all(self, batch: Batch, method: Any = None) -> Tensor:
        return self.tokens(batch)[:, -math.prod(self.shape.grid) :]


def check_rgb(channels: int, option: str) -> None:
    """Raise an OptionError if images of so many channels cannot be given to a frozen network."""
    if channels != 3:
        problem = f"is too few for {option}, a network of RGB images; use 3"
        raise OptionError("in_chans", channels, problem, option)


class ClipTokens(TeacherTokens):
    """Features of CLIP's visual tower."""

    kind = "clip"


class DinoTokens(TeacherTokens):
    """Features of DINO, or by its name of any network of timm."""

    kind = "dino"


PROJECTOR_LAYERS = 8  # of `projector`


class Contrast(Target):
    """ConMIM's denoising contrast: each patch must pick its own feature among those that the
    method's ema gives all patches of the same image, strongly augmented.

    Only predicted rows enter the similarity; it and the softmax are in float32.
    """

    flags = (
        Flag("temp", "temperature", type=float, help="temperature of the contrast"),
        T_MOMENTUM,
    )
    views = ("image_strong",)
    head_name = "projectors"
    uses_ema = True
    sees_all = True

    def __init__(
        self,
        shape: Shape,
        *,
        projector_hidden_dim: int = 4096,
        projector_out_dim: int = 256,
        temperature: float = 0.1,
        t_momentum: float = 0.996,
    ):
        super().__init__(shape)
        self.hidden_dim = projector_hidden_dim
        self.width = projector_out_dim
        self.temperature = temperature
        self.t_momentum = t_momentum

    def head(self, dim: int) -> nn.Module:
        """Build the projector of the encoder's features, after a layer where tokens [B, M, dim]
        are not as wide as these."""
        layers = projector(self.shape.width, self.hidden_dim, self.width)
        if dim == self.shape.width:
            return layers
        return nn.Sequential(nn.Linear(dim, self.shape.width, bias=False), *layers)

    def project(self, head: nn.Module, tokens: Tensor) -> Tensor:
        """Return projected tokens [B, T, D]. Class tokens count in the batch statistics."""
        return head(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)

    @torch.no_grad()
    def of_all(self, batch: Batch, method: Any = None) -> Tensor:
        """Return the features [B, N, D] that the ema's projector makes of the strong view."""
        teacher = method.teacher
        layers = teacher.head_of_target
        if len(layers) > PROJECTOR_LAYERS:  # the first fits the width of other tokens
            layers = layers[-PROJECTOR_LAYERS:]
        keys = self.project(layers, teacher.whole(batch["image_strong"]))
        return keys[:, -math.prod(self.shape.grid) :]

    def at(self, target: Tensor, positions: Tensor) -> Tensor:
        """Return all of them: a patch is compared with every patch of its image."""
        return target

    def score(
        self,
        head: nn.Module,
        tokens: Tensor,
        target: Tensor,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        queries = self.project(head, tokens)
        if positions is None:
            positions = torch.arange(target.shape[1], device=target.device).expand(len(target), -1)
        if tokens.shape[1] != positions.shape[1]:  # every token of the encoder
            queries = take(queries[:, -target.shape[1] :], positions)
        counts = torch.ones_like(positions, dtype=torch.bool) if counts is None else counts
        return self.contrast(self.similarity(queries, target), positions, counts)

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the cosine similarity over temperature [B, M, N] within each image, of [B, M, D]
        and [B, N, D]."""
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = (F.normalize(x.float(), dim=-1) for x in (queries, keys))
            return queries @ keys.transpose(1, 2) / self.temperature

    def contrast(self, logits: Tensor, positions: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Return the cross entropy over the patches of the image, averaged over all masked patches
        of the batch."""
        total = counts.sum().clamp(min=1)
        losses = F.cross_entropy(logits.flatten(0, 1), positions.flatten(), reduction="none")
        hits = (logits.detach().argmax(-1) == positions) & counts
        return {
            "loss": (losses * counts.flatten()).sum() / total,
            "contrast_acc": hits.sum() / total,
        }


def projector(dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Build three bias-free linear layers, each with batch normalization, the last without affine
    (docs/methods/conmim.md#projector)."""
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


# by the words of --target
TARGETS: dict[str, type[Target]] = {
    "pixels": Pixels,
    "hog": Histograms,
    "tokens": VisualTokens,
    "clip": ClipTokens,
    "dino": DinoTokens,
    "ema": OwnFeatures,
    "contrast": Contrast,
}


# --------------------------------------------------------------------------------------------------
# Losses
#
# Of pixels, spatial and among frequencies, and of visual tokens. Shapes: c colors, H x W pixels;
# h x w a mask's elements; V = W // 2 + 1 columns of the half spectrum that a real image has, of
# which the other columns are mirror images.


REPLACEMENTS = ("target", "prediction", "mean", "mixed")


@dataclass(frozen=True)
class Regression:
    """Element-wise loss of a distance: the distance itself ("l1"), or weighted up where it is large
    ("focal_l1").

    The weight is tanh(alpha * d / 2) or tanh(alpha * d), for `activate` "sigmoid" and "tanh", to
    the power `gamma`; it is part of what is differentiated. `residual` adds the distance itself.
    The options are those of the published `RegressionLoss`.
    """

    mode: str = "l1"
    activate: str = "sigmoid"
    alpha: float = 0.2
    gamma: float = 1.0
    residual: bool = False

    def __post_init__(self):
        check_choice("pixel_loss", self.mode, ("l1", "focal_l1"))
        check_choice("focal_activate", self.activate, ("sigmoid", "tanh"))

    def __call__(self, distance: Tensor) -> Tensor:
        """Return the losses of distances, none negative, in their shape."""
        if self.mode == "l1":
            return distance
        # 2 sigmoid(z) - 1 = tanh(z / 2)
        steepness = self.alpha / 2 if self.activate == "sigmoid" else self.alpha
        loss = distance * torch.tanh(steepness * distance) ** self.gamma
        return loss + distance if self.residual else loss


def spatial_loss(
    predicted: Tensor,
    target: Tensor,
    mask: Tensor,
    regression: Regression,
    unmask_weight: float = 0.0,
) -> Tensor:
    """Return the loss of masked pixels, and by `unmask_weight` of the others; one mean over the
    whole batch.

    predicted, target [B, c, H, W]; mask [B, H, W], 1 = masked.
    """
    weight = (mask + (1 - mask) * unmask_weight).unsqueeze(1)
    loss = regression((predicted - target).abs())
    return (loss * weight).sum() / (weight.sum() + 1e-5) / predicted.shape[1]


# Frequencies


def half_spectrum(images: Tensor) -> Tensor:
    """Return the orthonormal spectrum of real images [..., H, W]: complex [..., H, V]."""
    return torch.fft.rfft2(images, norm="ortho")


def whole_mean(values: Tensor, width: int) -> Tensor:
    """Return the mean over the whole spectrum, W columns wide, of values [..., H, V] that are
    equal for mirrored frequencies.

    Every column stands for two, but for the first and, where the width is even, the last, which
    mirror themselves.
    """
    alone = values[..., 0].sum() + (values[..., -1].sum() if width % 2 == 0 else 0)
    return (2 * values.sum() - alone) / (values[..., 0].numel() * width)


def half_of_weights(weights: Tensor) -> Tensor:
    """Return weights of all frequencies [..., H, W] as those of the half spectrum [..., H, V] that
    give the same sum."""
    mirrored = weights.flip((-2, -1)).roll((1, 1), (-2, -1))
    return (0.5 * (weights + mirrored))[..., : weights.shape[-1] // 2 + 1]


@dataclass(frozen=True, eq=False)
class FocalFrequencyLoss:
    """Squared distance of two spectra, frequencies weighted by how far apart they are
    (docs/methods/simmim_a2mim.md#spectra).

    ave_spectrum: of the mean images of the batch on this device. The gradient is then nearly the
    same for every image, and its size depends on the images a device and micro-step. log_matrix:
    the logarithm of the weights. batch_matrix: weights are divided by the largest of all, else by
    the largest of their image and color, where the published code crashes. matrix: weights [...,
    H, W] in [0, 1] of all frequencies, which take the place of the distances'; they need not be
    symmetric, and no gradient goes through them.
    """

    alpha: float = 1.0
    ave_spectrum: bool = True
    log_matrix: bool = True
    batch_matrix: bool = True
    matrix: Tensor | None = None

    def __post_init__(self):
        if self.matrix is not None and not ((self.matrix >= 0) & (self.matrix <= 1)).all():
            raise ValueError(
                "matrix has values outside [0, 1]; use weights within, as matrix / matrix.max()"
            )

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the loss of the difference [B, c, H, W] of two images: a transform is linear, so
        that one does for both."""
        if self.ave_spectrum:
            difference = difference.mean(0, keepdim=True)
        distance = half_spectrum(difference)
        square = distance.real.square() + distance.imag.square()
        weights = (
            self.weights(square.detach()) if self.matrix is None else self.given_weights(difference)
        )
        return whole_mean(weights * square, difference.shape[-1])

    def given_weights(self, images: Tensor) -> Tensor:
        """Return the matrix as weights [..., H, V] of the half spectrum of images [B, c, H, W]."""
        if self.matrix.shape[-2:] != images.shape[-2:]:
            theirs, ours = (tuple(x.shape[-2:]) for x in (images, self.matrix))
            raise ValueError(
                f"matrix is of {ours} frequencies; use one of the images' size {theirs}"
            )
        return half_of_weights(self.matrix.detach().to(images))

    def weights(self, square: Tensor) -> Tensor:
        """Return the weights of squared spectral distances [B, c, H, V]."""
        weights = square ** (self.alpha / 2)
        if self.log_matrix:
            weights = weights.log1p()
        largest = weights.max() if self.batch_matrix else weights.amax((-2, -1), keepdim=True)
        return (weights / largest).nan_to_num(nan=0.0).clamp(0, 1)


@dataclass(frozen=True)
class ReconstructionLoss:
    """A2MIM's loss; with `fft_weight` 0 and "l1" it is SimMIM's.

    fft_unmask_weight: what a visible pixel of the prediction counts for among the frequencies; the
    rest of it is replaced by fft_unmask_replace: the target, the prediction itself without its
    gradient, the target's mean color, or half of each of the first two ("mixed"); None is the
    target. fft_focal: the loss above, else the regression on the distance of spectra; fft_reweight:
    which then weighs itself.
    """

    regression: Regression = Regression()
    unmask_weight: float = 0.0
    fft_weight: float = 0.0
    fft_focal: bool = True
    fft_unmask_weight: float = 0.0
    fft_unmask_replace: str | None = "mixed"
    fft_reweight: bool = False
    focal: FocalFrequencyLoss = FocalFrequencyLoss()

    def __post_init__(self):
        if self.fft_unmask_replace is not None:
            check_choice("fft_unmask_replace", self.fft_unmask_replace, REPLACEMENTS)

    def __call__(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return {"loss", "loss_spatial"[, "loss_freq"]} of predicted, target [B, c, H, W] under
        mask [B, h, w], 1 = masked."""
        with torch.autocast(predicted.device.type, enabled=False):
            predicted, target = predicted.float(), target.float()
            mask = enlarged(mask, target.shape[-2:]).float()
            spatial = spatial_loss(predicted, target, mask, self.regression, self.unmask_weight)
            if not self.fft_weight:
                return {"loss": spatial, "loss_spatial": spatial.detach()}
            frequency = self.frequency_loss(
                self.seen(predicted, target, mask.unsqueeze(1)) - target
            )
            loss = spatial + self.fft_weight * frequency
            return {"loss": loss, "loss_spatial": spatial.detach(), "loss_freq": frequency.detach()}

    def seen(self, predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the prediction with most of its visible pixels replaced, [B, c, H, W]; mask [B, 1,
        H, W]."""
        if self.fft_unmask_weight >= 1:
            return predicted
        ratio = mask + (1 - mask) * self.fft_unmask_weight
        return predicted * ratio + self.replacement(predicted.detach(), target) * (1 - ratio)

    def replacement(self, predicted: Tensor, target: Tensor) -> Tensor:
        match self.fft_unmask_replace:
            case "prediction":
                return predicted
            case "mean":
                return target.mean((2, 3), keepdim=True)
            case "mixed":
                return 0.5 * predicted + 0.5 * target
            case _:
                return target

    def frequency_loss(self, difference: Tensor) -> Tensor:
        """Return the loss of the difference [B, c, H, W] of two images, before `fft_weight`."""
        if self.fft_focal:
            return self.focal(difference)
        loss = self.regression(half_spectrum(difference).abs())
        return whole_mean(loss.detach() * loss if self.fft_reweight else loss, difference.shape[-1])


# Visual tokens


class VisualTokenLoss(torch.autograd.Function):
    """Sum of the cross entropies of linear(x), and how many tokens are hit, without the logits of
    all rows at once.

    x [R, C], weight [K, C], bias [K], targets int64 [R], counts float32 [R]: 0 leaves a row out.
    The gradients are made with the logits of a few rows at a time, which costs no more products
    than keeping the logits.
    """

    rows = 4096

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, hits = counts.new_zeros(()), counts.new_zeros(())
        wanted = any(ctx.needs_input_grad)
        grads = [
            torch.empty_like(x),
            *(torch.zeros_like(p, dtype=torch.float32) for p in (weight, bias)),
        ]
        for start in range(0, len(x), VisualTokenLoss.rows):
            # logits [rows, vocabulary] of a few rows: those of a whole batch would not fit
            few = slice(start, start + VisualTokenLoss.rows)
            logits = F.linear(x[few], weight, bias)
            dtype = logits.dtype
            target = targets[few, None]
            count = counts[few, None]
            hits += ((logits.argmax(-1, keepdim=True) == target) * count).sum()

            # cross-entropy
            slope = logits.float().log_softmax(-1)
            del logits
            total -= (slope.gather(1, target) * count).sum()

            # its gradient is softmax - one_hot, made in place while the logits are here
            if wanted:
                slope = (
                    slope.exp_()
                    .scatter_add_(1, target, torch.full_like(count, -1.0))
                    .mul_(count)
                    .to(dtype)
                )
                grads[0][few] = slope @ weight.to(dtype)
                grads[1] += slope.T @ x[few].to(dtype)
                grads[2] += slope.sum(0)
        ctx.save_for_backward(*(grads if wanted else ()))
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        return (
            *(
                g * grad if n else None
                for g, n in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
            ),
            None,
            None,
        )


# --------------------------------------------------------------------------------------------------
# Blur


class GaussianBlur(nn.Module):
    """Blurs images [B, 3, H, W] with zeros around them (docs/methods/semaim.md#blur)."""

    def __init__(self, kernel_size: int, sigma: float, channels: int = 3):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1 or sigma <= 0:
            raise OptionError(
                "gaussian_kernel_size",
                kernel_size,
                f"must be odd, and gaussian_sigma {sigma} positive",
                "gaussian_sigma",
            )
        offsets = torch.arange(kernel_size) - kernel_size // 2
        row = torch.exp(-offsets.square() / (2 * sigma**2))
        kernel = torch.outer(row, row)
        kernels = (kernel / kernel.sum()).expand(channels, 1, -1, -1)
        self.register_buffer("weight", kernels.clone())

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight.to(images.dtype)
        return F.conv2d(images, weight, padding=weight.shape[-1] // 2, groups=len(weight))


def build_blur(
    kernel_size: int | None, sigma: float | None, channels: int = 3
) -> GaussianBlur | None:
    """Return the blur of these options, None without.

    Raises:
        ValueError: only one of the two is given, or a value that cannot be.
    """
    if (kernel_size is None) != (sigma is None):
        raise OptionError(
            "gaussian_kernel_size",
            None,
            "give it together with gaussian_sigma, or neither",
            "gaussian_sigma",
        )
    return None if kernel_size is None else GaussianBlur(kernel_size, sigma, channels)


# --------------------------------------------------------------------------------------------------
# Histograms of oriented gradients


class HOG:
    """MaskFeat's target: how much gradient each cell has in each direction, by color
    (docs/methods/beit_maskfeat_semanticmim.md#hog).

    A cell is `pool` x `pool` pixels; each of its pixels counts by the size of its gradient, under a
    Gaussian `window` (0: none) that is repeated over the image. Directions are unsigned. Given
    normalized images the result is that of the published code, given uint8 ones it is the same but
    where the horizontal gradient is exactly 0: there the rounding of normalized images decides
    between the first and the last bin, the raw ones always take the first.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        patch: tuple[int, int],
        nbins: int = 9,
        pool: int = 8,
        window: int = 16,
        channels: int = 3,
    ):
        if nbins < 1 or pool < 1 or any(side % pool for side in patch):
            raise OptionError(
                "hog_pool",
                pool,
                f"must divide patches of {patch[0]} x {patch[1]} pixels, and hog_nbins={nbins} "
                "must be 1 or more",
            )
        if window and any(count * side % window for count, side in zip(grid, patch, strict=True)):
            raise OptionError(
                "hog_window", window, f"does not divide images of {grid} patches of {patch} pixels"
            )
        self.grid, self.cells = grid, (patch[0] // pool, patch[1] // pool)
        self.nbins, self.pool, self.window = nbins, pool, window
        self.channels = channels

    @property
    def width(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.nbins * math.prod(self.cells)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the histograms of images [B, 3, H, W], float32 [B, N, width], in the order color,
        bin, cell row, cell column."""
        cut = (
            self.histograms(images)
            .unflatten(4, (-1, self.cells[1]))
            .unflatten(3, (-1, self.cells[0]))
        )
        return cut.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def histograms(self, images: Tensor) -> Tensor:
        """Return the normalized histograms of the cells, float32 [B, 3, nbins, H / pool, W / pool].

        On a CPU a few images at a time: what they need while they are at work is a small multiple
        of the result. A GPU takes all at once, as small kernels would leave it idle.
        """
        window = gaussian_window(self.window, images.device) if self.window else None
        with torch.autocast(images.device.type, enabled=False):
            if images.device.type != "cpu":
                return self._histograms(images, window)
            return torch.cat(
                [self._histograms(few, window) for few in images.split(max(1, len(images) // 32))]
            )

    def _histograms(self, images: Tensor, window: Tensor | None) -> Tensor:
        magnitude, bins = oriented_gradients(images.float(), self.nbins)
        if window is not None:
            tiled = magnitude.unflatten(3, (-1, self.window)).unflatten(2, (-1, self.window))
            tiled.mul_(window[:, None])  # writes to `magnitude`
        rows, columns = images.shape[2] // self.pool, images.shape[3] // self.pool
        y, x = (torch.arange(side, device=images.device) // self.pool for side in images.shape[2:])
        place = bins.mul_(rows * columns).add_(y[:, None] * columns + x)
        found = magnitude.new_zeros(*images.shape[:2], self.nbins * rows * columns)
        found.scatter_add_(2, place.flatten(2), magnitude.flatten(2))
        return F.normalize(found.view(*images.shape[:2], self.nbins, rows, columns), dim=2)


def oriented_gradients(images: Tensor, nbins: int) -> tuple[Tensor, Tensor]:
    """Return size, float32, and direction, int64 below `nbins`, of the gradient at each pixel: two
    tensors [B, 3, H, W].

    Plain sums in place of convolutions, which a GPU would compute in TF32 or half precision.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    across, down = padded[..., :-2] - padded[..., 2:], padded[..., :-2, :] - padded[..., 2:, :]
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    bins = (torch.atan2(gx, gy) / math.pi * nbins).floor_().remainder_(nbins).long()
    return torch.hypot(gx, gy), bins


def gaussian_window(side: int, device: torch.device) -> Tensor:
    """Return a Gaussian [side, side] that adds up to 1."""
    offsets = torch.arange(side, device=device) - (side - 1) / 2
    row = torch.exp(-0.5 * (offsets / (side // 2)).square())
    window = torch.outer(row, row)
    return window / window.sum()


# --------------------------------------------------------------------------------------------------
# Tokenizers


class EncoderBlock(nn.Module):
    """Residual block of DALL-E's encoder: [B, dim_in, h, w] to [B, dim_out, h, w]."""

    def __init__(self, dim_in: int, dim_out: int, gain: float):
        super().__init__()
        hidden = dim_out // 4
        self.gain = gain
        self.id_path = nn.Identity() if dim_in == dim_out else nn.Conv2d(dim_in, dim_out, 1)
        self.res_path = nn.ModuleDict({
            "conv_1": nn.Conv2d(dim_in, hidden, 3, padding=1),
            "conv_2": nn.Conv2d(hidden, hidden, 3, padding=1),
            "conv_3": nn.Conv2d(hidden, hidden, 3, padding=1),
            "conv_4": nn.Conv2d(hidden, dim_out, 1),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.id_path(x)
        for conv in self.res_path.values():
            x = conv(F.relu(x))
        return shortcut + self.gain * x


class DalleEncoder(nn.Module):
    """DALL-E's encoder of images to visual tokens: groups of blocks with pooling in between
    (docs/methods/beit_maskfeat_semanticmim.md#visual-tokens)."""

    def __init__(
        self, n_hid: int = 256, blocks_per_group: int = 2, vocab_size: int = 8192, groups: int = 4
    ):
        super().__init__()
        self.stride = 2 ** (groups - 1)
        gain = (groups * blocks_per_group) ** -2
        widths = [n_hid] + [n_hid * 2**group for group in range(groups)]
        self.blocks = nn.ModuleDict({"input": nn.Conv2d(3, n_hid, 7, padding=3)})
        for group, (dim_in, dim_out) in enumerate(pairwise(widths), 1):
            self.blocks[f"group_{group}"] = nn.ModuleDict({
                f"block_{block}": EncoderBlock(dim_in if block == 1 else dim_out, dim_out, gain)
                for block in range(1, blocks_per_group + 1)
            })  # fmt: skip
        self.blocks["output"] = nn.ModuleDict({"conv": nn.Conv2d(widths[-1], vocab_size, 1)})

    def forward(self, images: Tensor) -> Tensor:
        """Return what the last convolution sees, [B, 8 G, H / stride, W / stride], of images in
        [0.1, 0.9], [B, 3, H, W]."""
        x = self.blocks["input"](images)
        groups = [group for name, group in self.blocks.items() if name.startswith("group_")]
        for number, group in enumerate(groups):
            x = F.max_pool2d(x, 2) if number else x
            for block in group.values():
                x = block(x)
        return F.relu(x)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of the tokens [..., vocab_size] of features [..., 8 G] of single
        positions, channels last."""
        output = self.blocks["output"]["conv"]
        return F.linear(features, output.weight.flatten(1), output.bias)


class VisualTokenizer:
    """The frozen encoder and what it needs around it. It is no submodule: no engine wraps, saves or
    trains it.

    precision "auto" leaves float32 weights to the autocast around a call; else the encoder runs in
    that dtype. `grid` is what it was trained for, None where nothing is known of that.
    """

    rows = 4096  # positions whose logits are held at once
    grid: Pair | None = None

    def __init__(self, encoder: DalleEncoder, precision: str = "auto"):
        check_choice("target_precision", precision, TARGET_PRECISIONS)
        self.dtype = DTYPES[precision]
        self.encoder = (
            encoder.to(self.dtype)
            .to(memory_format=torch.channels_last)
            .eval()
            .requires_grad_(False)
        )

    @property
    def vocab_size(self) -> int:
        return self.encoder.blocks["output"]["conv"].out_channels

    @property
    def patch(self) -> Pair:
        """Pixels (height, width) of an image that a token stands for."""
        return self.encoder.stride, self.encoder.stride

    @torch.no_grad()
    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the ids int64 of uint8 images [B, 3, H, W], or of floats that `dalle_pixels` has
        mapped: [B, M] at `positions` int64 [B, M], of all without them."""
        if self.encoder.blocks["input"].weight.device != images.device:
            self.encoder.to(images.device)
        if not images.is_floating_point():
            images = dalle_pixels(images)
        if self.dtype is None:
            features = self.encoder(images)
            return self.choose(features, positions)
        with torch.autocast(images.device.type, enabled=False):
            return self.choose(self.encoder(images.to(self.dtype)), positions)

    def choose(self, features: Tensor, positions: Tensor | None) -> Tensor:
        """Return the ids [B, M] of features [B, 8 G, h, w] at positions [B, M], of all without
        them."""
        # only the listed positions need logits, a few thousand of them at a time
        rows = features.flatten(2).transpose(1, 2)
        rows = rows if positions is None else take(rows, positions)
        ids = [self.encoder.logits(few).argmax(-1) for few in rows.flatten(0, 1).split(self.rows)]
        return torch.cat(ids).view(rows.shape[:2])


class ClusterTokenizer:
    """Centers of patches, from k-means, and what they need around them; for a method it is what a
    `VisualTokenizer` is."""

    def __init__(self, clusters: PatchClusters, mean_std: MeanStd, grid: Pair | None = None):
        self.encoder = clusters.eval().requires_grad_(False)
        self.mean_std = mean_std
        self.grid = grid

    @property
    def vocab_size(self) -> int:
        return len(self.encoder.centers)

    @property
    def patch(self) -> Pair:
        """Pixels (height, width) of an image that a token stands for."""
        return self.encoder.patch

    @torch.no_grad()
    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the ids int64 of uint8 images [B, 3, H, W]: [B, M] at `positions` int64 [B, M], of
        all patches without them."""
        if self.encoder.centers.device != images.device:
            self.encoder.to(images.device)
        mean, std = (images.new_tensor(v, dtype=torch.float32) for v in self.mean_std)
        pixels = images.float().div(255).sub(mean.view(3, 1, 1)).div(std.view(3, 1, 1))
        return self.encoder(pixels, positions)


def dalle_pixels(images: Tensor) -> Tensor:
    """Return uint8 images in the encoder's range, [0.1, 0.9]."""
    return 0.8 / 255 * images.float() + 0.1


def load_tokenizer(source: str, precision: str = "auto") -> VisualTokenizer | ClusterTokenizer:
    """Return the tokenizer in a file: OpenAI's encoder.pkl, whose pickle is read and not executed,
    OpenMMLab's state dict, or safetensors, under any prefix; or either kind that run_tokenizer.py
    writes. `precision` is that of a network; clusters are always compared in float32.

    Raises:
        ValueError: no such file, or no tokenizer in it.
    """
    found = load_module_state(source)
    with refused(OptionError("discrete_vae_weight_path", source, "is no tokenizer")):
        info = TokenizerInfo.from_metadata(load_metadata(source))
    if info is not None and info.kind == "kmeans":
        return clusters_of(found, info, source)
    tokenizer = VisualTokenizer(encoder_of(found, source), precision)
    tokenizer.grid = None if info is None else info.grid
    return tokenizer


def clusters_of(found: StateDict, info: TokenizerInfo, source: str) -> ClusterTokenizer:
    """Return the tokenizer of a file's centers."""
    centers = found.get("centers", torch.empty(0))
    features = None
    if info.teacher:
        problem = "needs the network whose features it clusters"
        with refused(OptionError("discrete_vae_weight_path", source, problem)):
            features = teacher_features(info.teacher, info.grid)
    width = centers.shape[-1] if info.teacher else 3 * math.prod(info.patch_size)
    expected = info.vocab_size, width
    if tuple(centers.shape) != expected:
        raise OptionError(
            "discrete_vae_weight_path",
            source,
            f"is not whole: its centers have the shape {tuple(centers.shape)}, not {expected}",
        )
    clusters = PatchClusters(centers.float(), info.patch_size, features)
    return ClusterTokenizer(clusters, (info.mean, info.std), info.grid)


def encoder_of(found: StateDict, source: str) -> DalleEncoder:
    """Return DALL-E's encoder whose tensors a file holds, in OpenAI's names under any prefix."""
    prefix = next(
        (name.removesuffix("blocks.input.w") for name in found if name.endswith("blocks.input.w")),
        None,
    )
    if prefix is None:
        raise OptionError(
            "discrete_vae_weight_path",
            source,
            "holds no encoder of DALL-E: blocks.input.w is missing; use OpenAI's encoder.pkl or "
            "the tokenizer.safetensors that run_tokenizer.py writes",
        )
    names = {
        name: name.removeprefix(prefix) for name in found if name.startswith(f"{prefix}blocks.")
    }
    weights = {
        re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", ours)): found[name]
        for name, ours in names.items()
    }
    encoder = DalleEncoder(
        n_hid=len(weights["blocks.input.weight"]),
        blocks_per_group=len(
            {name for name in weights if re.fullmatch(r"blocks\.group_1\..*conv_1\.weight", name)}
        ),
        vocab_size=len(weights.get("blocks.output.conv.weight", ())),
        groups=len({name.split(".")[1] for name in weights if ".group_" in name}),
    )
    try:
        encoder.load_state_dict({name: value.float() for name, value in weights.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise OptionError("discrete_vae_weight_path", source, f"is not whole: {reason}") from error
    return encoder


# --------------------------------------------------------------------------------------------------
# Teachers


class VisualTower(VisionTransformer):
    """The vision transformer of DINO, or that of CLIP with its norm before the blocks and its
    projection.

    CLIP's differs in the norms' epsilon, and OpenAI's in an activation that comes near GELU
    (docs/methods/semaim.md#clips-teacher).
    """

    def __init__(self, *, is_clip: bool = False, quick_gelu: bool = False, **vit):
        super().__init__(**vit, pos_embed="learned", k_bias=True, global_pool="token")
        self.norm_pre = nn.LayerNorm(self.embed_dim) if is_clip else nn.Identity()
        for module in self.modules() if is_clip else ():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        for block in self.blocks if quick_gelu else ():
            block.mlp.fc2.act = near_gelu

    def forward(self, images: Tensor) -> Tensor:
        """Return normed tokens, of CLIP projected ones, with the class token: [B, T, D]."""
        x = self.norm_pre(self.embed(self.patch_embed(images), self.pos_embed))
        return self.head(self.norm(self.run_blocks(x)))


def near_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class TeacherFeatures(NamedTuple):
    """What a teacher sees: tokens after the final norm, and the last block's class attention.

    cls [B, C], patches [B, N, C], and how much the class token attends to each patch, [B, h, N].
    """

    cls: Tensor
    patches: Tensor
    attention: Tensor


class Teacher:
    """A frozen vision transformer, this repository's or timm's. It is no submodule of what it
    teaches, so that no engine wraps, saves or trains it.

    precision "auto" leaves float32 weights to the autocast around a call; else the tower runs in
    that dtype. mean_std: what the images that it is given are normalized by, and what it wants;
    None leaves them as they are.
    """

    def __init__(
        self,
        tower: nn.Module,
        precision: str = "auto",
        mean_std: tuple[MeanStd, MeanStd] | None = None,
    ):
        check_choice("target_precision", precision, TARGET_PRECISIONS)
        self.dtype = DTYPES[precision]
        self.tower = tower.to(self.dtype).eval().requires_grad_(False)
        self.mean_std = None if mean_std is None else torch.tensor(mean_std).view(2, 2, 3, 1, 1)

    def __deepcopy__(self, memo: dict) -> "Teacher":
        """Return itself: the copies of a method share its frozen teacher."""
        return self

    @property
    def width(self) -> int:
        """D, numbers of a token."""
        head = self.tower.head
        return head.out_features if isinstance(head, nn.Linear) else self.tower.embed_dim

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return tuple(self.tower.patch_embed.grid_size)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images that it sees; None: as they are."""
        return tuple(self.tower.patch_embed.img_size)

    @property
    def num_heads(self) -> int:
        return self.tower.blocks[-1].attn.num_heads

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the tokens float32 [B, T, D] of images [B, 3, H, W], which are brought to the size
        that gives T."""
        if next(self.tower.parameters()).device != images.device:
            self.tower.to(images.device)
        if self.mean_std is not None:
            if self.mean_std.device != images.device:
                self.mean_std = self.mean_std.to(images.device)
            (mean, std), (own_mean, own_std) = self.mean_std
            images = (images * std + mean - own_mean) / own_std
        size = self.image_size
        if size is not None and images.shape[-2:] != size:
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        if self.dtype is None:
            return self._tokens(images).float()
        with torch.autocast(images.device.type, enabled=False):
            return self._tokens(images.to(self.dtype)).float()

    def _tokens(self, images: Tensor) -> Tensor:
        if isinstance(self.tower, VisualTower):
            return self.tower(images)
        tokens = self.tower.forward_features(images)
        # timm's has applied the norm
        return self.tower.norm(tokens) if isinstance(self.tower, VisionTransformer) else tokens

    @torch.no_grad()
    def look(self, images: Tensor) -> TeacherFeatures:
        """Return the tokens of images [B, 3, H, W] and the class token's attention.

        Fused kernels show no probabilities, so they are computed again from the last block's input.
        """
        kept: list[Tensor] = []
        attention = self.tower.blocks[-1].attn
        hook = attention.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            tokens = self(images)
        finally:
            hook.remove()
        prefix = self.tower.num_prefix_tokens
        seen = self._class_attention(kept[0])[..., prefix:]
        return TeacherFeatures(tokens[:, 0], tokens[:, prefix:], seen)

    def _class_attention(self, x: Tensor) -> Tensor:
        """Return softmax(q k / sqrt(d) + bias) of the last block for the class token: [B, h, T]."""
        attn = self.tower.blocks[-1].attn
        if isinstance(self.tower, VisionTransformer):
            q, k, _ = attn.project(x)
            bias = attn.position_bias(None)
            bias = None if bias is None else bias[:, :1]
            return attn.probabilities(q[:, :, :1], k, bias)[:, :, 0].float()
        # [B, T, 3 * C] to [3, B, h, T, d]
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(qkv[0, :, :, :1]), attn.k_norm(qkv[1])
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)[:, :, 0].float()


class MapTeacher(Teacher):
    """A frozen network of timm that ends in a map, such as a CNN: a patch has the map's features at
    its place, [B, N, D], and there is no class token."""

    image_size = None

    def __init__(
        self,
        tower: nn.Module,
        grid: tuple[int, int],
        precision: str = "auto",
        mean_std: tuple[MeanStd, MeanStd] | None = None,
    ):
        super().__init__(tower, precision, mean_std)
        self.own_grid = grid

    @property
    def width(self) -> int:
        return self.tower.num_features

    @property
    def grid(self) -> tuple[int, int]:
        return self.own_grid

    def _tokens(self, images: Tensor) -> Tensor:
        features = family_of(self.tower).feature_map(self.tower, images)
        resized = F.interpolate(features.float(), self.grid, mode="bilinear")
        return resized.flatten(2).transpose(1, 2)

    def look(self, images: Tensor) -> TeacherFeatures:
        problem = "has no class token whose attention masks could follow; use a vision transformer"
        raise OptionError("mask_teacher", None, problem)


def load_teacher(
    kind: str | None,
    source: str,
    grid: tuple[int, int],
    precision: str = "auto",
    image_mean_std: MeanStd | None = None,
    option: str = "target_model",
) -> Teacher:
    """Return the teacher of a `kind` ("clip" or "dino", None for either) in a file, or under timm's
    name, for images of `grid` patches.

    Files: OpenAI's archives and state dicts of CLIP, whole or the visual tower alone; DINO's
    checkpoints; the weights of timm's models of either. Positions are resized to the grid. In
    timm's names the activation does not show: files and models tagged "openai" get OpenAI's. Any
    other network of timm by its name, such as a CNN, is a `MapTeacher`. Given the images' mean and
    std, they get the teacher's own. Errors name `option`.

    Raises:
        ValueError: no such file and no such name, or weights of another kind.
    """
    weights = visual_weights(read_weights(source, option))
    openai = "conv1.weight" in weights
    is_name = not Path(source).is_file()
    quick = openai or not is_name or "openai" in source or "quickgelu" in source
    weights = {
        key: value.float() for key, value in (from_openai(weights) if openai else weights).items()
    }
    if "pos_embed" not in weights or "blocks.0.attn.qkv.weight" not in weights:
        if is_name and kind != "clip":
            mean_std = None if image_mean_std is None else (image_mean_std, OWN_MEAN_STD["dino"])
            tower = timm.create_model(source, pretrained=True, num_classes=0)
            return MapTeacher(tower, grid, precision, mean_std)
        raise OptionError(
            option, source, "holds no vision transformer in names of OpenAI, DINO or timm"
        )
    found = "clip" if "norm_pre.weight" in weights else "dino"
    kind = kind or found
    if kind != found:
        problem = f"is not of the kind that target {kind} needs; use target {found}"
        raise OptionError(option, source, problem, "target")
    mean_std = None if image_mean_std is None else (image_mean_std, OWN_MEAN_STD[kind])
    return Teacher(
        build_tower(weights, grid, quick_gelu=quick and kind == "clip"), precision, mean_std
    )


def teacher_features(source: str, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Return the function that gives images [B, 3, H, W] the features [B, N, D] of a frozen
    network for their patches, each of length 1."""
    teacher = load_teacher(None, source, grid, "fp32", option="kmeans_teacher")

    def features(images: Tensor) -> Tensor:
        return F.normalize(teacher(images)[:, -math.prod(grid) :], dim=-1)

    return features


def vit_options(weights: StateDict) -> dict[str, Any]:
    """Return the options of the vision transformer whose tensors these are, in native names.

    Heads have 64 channels, 80 in the huge sizes, unless a bias table tells their number.
    """
    width, _, *patch = weights["patch_embed.proj.weight"].shape
    tables = [value for name, value in weights.items() if name.endswith("position_bias_table")]
    return {
        "patch_size": tuple(patch),
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": tables[0].shape[-1] if tables else width // (80 if width == 1280 else 64),
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }


def build_tower(
    weights: StateDict, grid: tuple[int, int], *, quick_gelu: bool, num_heads: int | None = None
) -> VisualTower:
    """Return the tower of these weights, in native names. Heads have 64 channels unless their
    number is given."""
    is_clip = "norm_pre.weight" in weights
    shape = vit_options(weights)
    patch = shape["patch_size"]
    projection = weights.get("head.weight") if is_clip else None
    tower = VisualTower(
        input_size=(grid[0] * patch[0], grid[1] * patch[1]),
        **shape | ({} if num_heads is None else {"num_heads": num_heads}),
        num_classes=0 if projection is None else len(projection),
        is_clip=is_clip,
        quick_gelu=quick_gelu,
    )
    own = tower.state_dict()
    absent = {
        name: torch.zeros_like(own[name])
        for name in ("patch_embed.proj.bias", "head.bias")
        if name in own
    }
    weights = absent | weights | {"pos_embed": interpolate_pos_embed(weights["pos_embed"], grid, 1)}
    tower.load_state_dict({name: weights[name] for name in own})
    return tower


def read_weights(source: str, option: str) -> dict[str, Any]:
    """Return what a file holds, or the weights of timm's model of that name; errors name
    `option`."""
    if Path(source).is_file() or str(source).startswith("https://"):
        return (
            torch.jit.load(source, "cpu").state_dict()
            if is_archive(source)
            else load_checkpoint(source)
        )
    if not timm.is_model(source.split(".")[0]):
        raise OptionError(option, source, "is neither a file nor the name of a model of timm")
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except Exception as error:  # whatever the hub, the network or the cache raise
        problem = f"has no weights at timm that can be read here ({error})"
        raise OptionError(option, source, problem) from error


def is_archive(path: str) -> bool:
    """Return whether a file is TorchScript, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def visual_weights(found: dict[str, Any]) -> StateDict:
    """Return the tensors of the visual tower, without the names around them."""
    prefixes = ("module.", "visual.", "trunk.", "backbone.")
    return unwrapped(found, ("state_dict", "teacher", "model"), prefixes)


_OPENAI_NAMES = (
    (r"^transformer\.resblocks\.", "blocks."), (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."), (r"\.ln_(\d)\.", r".norm\1."), (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."), (r"^ln_pre\.", "norm_pre."), (r"^ln_post\.", "norm."),
    (r"^conv1\.", "patch_embed.proj."), (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"), (r"^proj$", "head.weight"),
)  # fmt: skip


def from_openai(weights: StateDict) -> StateDict:
    """Return CLIP's visual tower in native names and shapes, given OpenAI's."""
    native = {}
    for name, value in weights.items():
        for pattern, replacement in _OPENAI_NAMES:
            name = re.sub(pattern, replacement, name)
        native[name] = value
    width = native["cls_token"].numel()
    return native | {
        "cls_token": native["cls_token"].view(1, 1, width),
        "pos_embed": native["pos_embed"].view(1, -1, width),
        "head.weight": native["head.weight"].T,
    }
