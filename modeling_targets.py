"""What methods predict, as far as it is more than cutting an image into patches: blurred pixels,
histograms of oriented gradients, the ids of a tokenizer, teachers' features.

Shapes in comments: B images, T = 1 + N tokens (class token first), C channels of the tower, D of
what it gives; M masked patches, G channels of the tokenizer's first layer.
"""

import math
import re
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_finetune import VisionTransformer, check_choice, take
from unimim.checkpoint.files import load_checkpoint, load_metadata, load_module_state
from unimim.checkpoint.loading import unwrapped
from unimim.checkpoint.names import StateDict
from unimim.checkpoint.resizing import interpolate_pos_embed
from unimim.errors import OptionError, refused
from unimim.sizes import Pair
from unimim.tokenizer.clusters import PatchClusters
from unimim.tokenizer.files import TokenizerInfo

TEACHERS = ("dino", "clip")
PREDICTED_FEATURES = ("none", "inference", "ema", *TEACHERS)
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGET_PRECISIONS = tuple(DTYPES)
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
OWN_MEAN_STD: dict[str, MeanStd] = {  # of the images that the teachers were trained on
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


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
    """None without a blur.

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
                f"must divide patches of {patch[0]} x {patch[1]} pixels, and hog_nbins={nbins} must "
                "be 1 or more",
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
        """Images [B, 3, H, W] to float32 [B, N, width], in the order color, bin, cell row, cell
        column."""
        cut = (
            self.histograms(images)
            .unflatten(4, (-1, self.cells[1]))
            .unflatten(3, (-1, self.cells[0]))
        )
        return cut.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def histograms(self, images: Tensor) -> Tensor:
        """Normalized histograms of the cells, float32 [B, 3, nbins, H / pool, W / pool].

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
    """Size, float32, and direction, int64 below `nbins`, of the gradient at each pixel; all [B, 3,
    H, W].

    Plain sums in place of convolutions, which a GPU would compute in TF32 or half precision.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    across, down = padded[..., :-2] - padded[..., 2:], padded[..., :-2, :] - padded[..., 2:, :]
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    bins = (torch.atan2(gx, gy) / math.pi * nbins).floor_().remainder_(nbins).long()
    return torch.hypot(gx, gy), bins


def gaussian_window(side: int, device: torch.device) -> Tensor:
    """[side, side], adds up to 1."""
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
        """Images in [0.1, 0.9], [B, 3, H, W], to what the last convolution sees: [B, 8 G, H /
        stride, W / stride]."""
        x = self.blocks["input"](images)
        groups = [group for name, group in self.blocks.items() if name.startswith("group_")]
        for number, group in enumerate(groups):
            x = F.max_pool2d(x, 2) if number else x
            for block in group.values():
                x = block(x)
        return F.relu(x)

    def logits(self, features: Tensor) -> Tensor:
        """Features [..., 8 G] of single positions, channels last, to the logits of the tokens [...,
        vocab_size]."""
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
        """Ids int64 of uint8 images [B, 3, H, W], or of floats that `dalle_pixels` has mapped:
        [B, M] at `positions` int64 [B, M], of all without them."""
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
        """Of features [B, 8 G, h, w] only the listed positions need logits, a few thousand of them
        at a time."""
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
        """Ids int64 of uint8 images [B, 3, H, W]: [B, M] at `positions` int64 [B, M], of all
        patches without them."""
        if self.encoder.centers.device != images.device:
            self.encoder.to(images.device)
        mean, std = (images.new_tensor(v, dtype=torch.float32) for v in self.mean_std)
        pixels = images.float().div(255).sub(mean.view(3, 1, 1)).div(std.view(3, 1, 1))
        return self.encoder(pixels, positions)


def dalle_pixels(images: Tensor) -> Tensor:
    """uint8 to the encoder's range: [0.1, 0.9]."""
    return 0.8 / 255 * images.float() + 0.1


def load_tokenizer(source: str, precision: str = "auto") -> VisualTokenizer | ClusterTokenizer:
    """The tokenizer in a file: OpenAI's encoder.pkl, whose pickle is read and not executed,
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
    """The tokenizer of a file's centers."""
    centers = found.get("centers", torch.empty(0))
    expected = info.vocab_size, 3 * math.prod(info.patch_size)
    if tuple(centers.shape) != expected:
        raise OptionError(
            "discrete_vae_weight_path",
            source,
            f"is not whole: its centers have the shape {tuple(centers.shape)}, not {expected}",
        )
    clusters = PatchClusters(centers.float(), info.patch_size)
    return ClusterTokenizer(clusters, (info.mean, info.std), info.grid)


def encoder_of(found: StateDict, source: str) -> DalleEncoder:
    """DALL-E's encoder whose tensors a file holds, in OpenAI's names under any prefix."""
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
        """Normed tokens, of CLIP projected ones, with the class token: [B, T, D]."""
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
    def num_heads(self) -> int:
        return self.tower.blocks[-1].attn.num_heads

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Tokens float32 [B, T, D] of images [B, 3, H, W], which are brought to the size that gives
        T."""
        if next(self.tower.parameters()).device != images.device:
            self.tower.to(images.device)
        if self.mean_std is not None:
            if self.mean_std.device != images.device:
                self.mean_std = self.mean_std.to(images.device)
            (mean, std), (own_mean, own_std) = self.mean_std
            images = (images * std + mean - own_mean) / own_std
        size = tuple(self.tower.patch_embed.img_size)
        if images.shape[-2:] != size:
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


def load_teacher(
    kind: str,
    source: str,
    grid: tuple[int, int],
    precision: str = "auto",
    image_mean_std: MeanStd | None = None,
) -> Teacher:
    """The `kind` ("clip" or "dino") of teacher in a file, or under timm's name, for images of
    `grid` patches.

    Files: OpenAI's archives and state dicts of CLIP, whole or the visual tower alone; DINO's
    checkpoints; the weights of timm's models of either. Positions are resized to the grid. In
    timm's names the activation does not show: files and models tagged "openai" get OpenAI's. Given
    the images' mean and std, they get the teacher's own.

    Raises:
        ValueError: no such file and no such name, or weights of another kind.
    """
    weights = visual_weights(read_weights(source))
    openai = "conv1.weight" in weights
    is_name = not Path(source).is_file()
    quick = openai or not is_name or "openai" in source or "quickgelu" in source
    weights = {
        key: value.float() for key, value in (from_openai(weights) if openai else weights).items()
    }
    if "pos_embed" not in weights or "blocks.0.attn.qkv.weight" not in weights:
        raise OptionError(
            "target_model", source, "holds no vision transformer in names of OpenAI, DINO or timm"
        )
    if ("norm_pre.weight" in weights) != (kind == "clip"):
        raise OptionError(
            "target_model",
            source,
            f"is not of the kind that predict_feature {kind} needs",
            "predict_feature",
        )
    mean_std = None if image_mean_std is None else (image_mean_std, OWN_MEAN_STD[kind])
    return Teacher(
        build_tower(weights, grid, quick_gelu=quick and kind == "clip"), precision, mean_std
    )


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
    """The tower that these weights, in native names, are of. Heads have 64 channels unless their
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


def read_weights(source: str) -> dict[str, Any]:
    """What a file holds, or the weights of timm's model of that name."""
    if Path(source).is_file() or str(source).startswith("https://"):
        return (
            torch.jit.load(source, "cpu").state_dict()
            if is_archive(source)
            else load_checkpoint(source)
        )
    if not timm.is_model(source.split(".")[0]):
        raise OptionError(
            "target_model", source, "is neither a file nor the name of a model of timm"
        )
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except Exception as error:  # whatever the hub, the network or the cache raise
        raise OptionError(
            "target_model", source, f"has no weights at timm that can be read here ({error})"
        ) from error


def is_archive(path: str) -> bool:
    """Whether a file is TorchScript, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def visual_weights(found: dict[str, Any]) -> StateDict:
    """The tensors of the visual tower, without the names around them."""
    prefixes = ("module.", "visual.", "trunk.", "backbone.")
    return unwrapped(found, ("state_dict", "teacher", "model"), prefixes)


_OPENAI_NAMES = (
    (r"^transformer\.resblocks\.", "blocks."), (r"\.in_proj_", ".qkv."), (r"\.out_proj\.", ".proj."),
    (r"\.ln_(\d)\.", r".norm\1."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."), (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."), (r"^conv1\.", "patch_embed.proj."), (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"), (r"^proj$", "head.weight"),
)  # fmt: skip


def from_openai(weights: StateDict) -> StateDict:
    """CLIP's visual tower from OpenAI's names and shapes to native ones."""
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
