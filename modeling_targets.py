"""What methods predict, as far as it is more than cutting an image into patches: blurred pixels, teachers' features.

Shapes in comments: B images, T = 1 + N tokens (class token first), C channels of the tower, D of what it gives.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import StateDict, interpolate_pos_embed, load_checkpoint
from modeling_finetune import VisionTransformer, check_choice

TEACHERS = ("dino", "clip")
PREDICTED_FEATURES = ("none", "inference", "ema", *TEACHERS)
TARGET_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
OWN_MEAN_STD: dict[str, MeanStd] = {  # of the images that the teachers were trained on
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class GaussianBlur(nn.Module):
    """Blurs images [B, 3, H, W] with zeros around them (specs/semaim.md 5.1)."""

    def __init__(self, kernel_size: int, sigma: float):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1 or sigma <= 0:
            raise ValueError(f"--gaussian_kernel_size {kernel_size} must be odd and --gaussian_sigma {sigma} positive")
        offsets = torch.arange(kernel_size) - kernel_size // 2
        row = torch.exp(-offsets.square() / (2 * sigma**2))
        kernel = torch.outer(row, row)
        self.register_buffer("weight", (kernel / kernel.sum()).expand(3, 1, -1, -1).clone())

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight.to(images.dtype)
        return F.conv2d(images, weight, padding=weight.shape[-1] // 2, groups=len(weight))


def build_blur(kernel_size: int | None, sigma: float | None) -> GaussianBlur | None:
    """None without a blur.

    Raises:
        ValueError: only one of the two is given, or a value that cannot be.
    """
    if (kernel_size is None) != (sigma is None):
        raise ValueError("--gaussian_kernel_size and --gaussian_sigma are given together or not at all")
    return None if kernel_size is None else GaussianBlur(kernel_size, sigma)


# ---------------------------------------------------------------------------------------------------------------------
# Teachers


class VisualTower(VisionTransformer):
    """The vision transformer of DINO, or that of CLIP with its norm before the blocks and its projection.

    CLIP's differs in the norms' epsilon, and OpenAI's in an activation that comes near GELU (specs/semaim.md 5.3).
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


class Teacher:
    """A frozen tower. It is no submodule of what it teaches, so that no engine wraps, saves or trains it.

    precision "auto" leaves float32 weights to the autocast around a call; else the tower runs in that dtype.
    mean_std: what the images that it is given are normalised by, and what it wants; None leaves them as they are.
    """

    def __init__(self, tower: VisualTower, precision: str = "auto", mean_std: tuple[MeanStd, MeanStd] | None = None):
        check_choice("target_precision", precision, TARGET_PRECISIONS)
        self.dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.tower = tower.to(self.dtype).eval().requires_grad_(False)
        self.mean_std = None if mean_std is None else torch.tensor(mean_std).view(2, 2, 3, 1, 1)

    @property
    def width(self) -> int:
        """D, numbers of a token."""
        head = self.tower.head
        return head.out_features if isinstance(head, nn.Linear) else self.tower.embed_dim

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Tokens float32 [B, T, D] of images [B, 3, H, W], which are brought to the size that gives T."""
        if self.tower.cls_token.device != images.device:
            self.tower.to(images.device)
        if self.mean_std is not None:
            (mean, std), (own_mean, own_std) = self.mean_std.to(images.device)
            images = (images * std + mean - own_mean) / own_std
        size = self.tower.patch_embed.img_size
        if images.shape[-2:] != size:
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        if self.dtype is None:
            return self.tower(images).float()
        with torch.autocast(images.device.type, enabled=False):
            return self.tower(images.to(self.dtype)).float()


def load_teacher(
    kind: str, source: str, grid: tuple[int, int], precision: str = "auto", image_mean_std: MeanStd | None = None
) -> Teacher:
    """The `kind` ("clip" or "dino") of teacher in a file, or under timm's name, for images of `grid` patches.

    Files: OpenAI's archives and state dicts of CLIP, whole or the visual tower alone; DINO's checkpoints; the weights
    of timm's models of either. Positions are resized to the grid. In timm's names the activation does not show: files
    and models tagged "openai" get OpenAI's. Given the images' mean and deviation, they get the teacher's own.

    Raises:
        ValueError: no such file and no such name, or weights of another kind.
    """
    weights = visual_weights(read_weights(source))
    openai = "conv1.weight" in weights
    is_name = not Path(source).is_file()
    quick = openai or not is_name or "openai" in source or "quickgelu" in source
    weights = {key: value.float() for key, value in (from_openai(weights) if openai else weights).items()}
    if "pos_embed" not in weights or "blocks.0.attn.qkv.weight" not in weights:
        raise ValueError(f"--target_model {source} holds no vision transformer in names of OpenAI, DINO or timm")
    if ("norm_pre.weight" in weights) != (kind == "clip"):
        raise ValueError(f"--target_model {source} is not of the kind that --predict_feature {kind} needs")
    mean_std = None if image_mean_std is None else (image_mean_std, OWN_MEAN_STD[kind])
    return Teacher(build_tower(weights, grid, quick_gelu=quick and kind == "clip"), precision, mean_std)


def build_tower(
    weights: StateDict, grid: tuple[int, int], *, quick_gelu: bool, num_heads: int | None = None
) -> VisualTower:
    """The tower that these weights, in native names, are of. Heads have 64 channels unless their number is given."""
    is_clip = "norm_pre.weight" in weights
    width, _, *patch = weights["patch_embed.proj.weight"].shape
    projection = weights.get("head.weight") if is_clip else None
    tower = VisualTower(
        input_size=(grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=tuple(patch),
        embed_dim=width,
        depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        num_heads=num_heads or width // 64,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        num_classes=0 if projection is None else len(projection),
        is_clip=is_clip,
        quick_gelu=quick_gelu,
    )
    own = tower.state_dict()
    absent = {name: torch.zeros_like(own[name]) for name in ("patch_embed.proj.bias", "head.bias") if name in own}
    weights = absent | weights | {"pos_embed": interpolate_pos_embed(weights["pos_embed"], grid, 1)}
    tower.load_state_dict({name: weights[name] for name in own})
    return tower


def read_weights(source: str) -> dict[str, Any]:
    """What a file holds, or the weights of timm's model of that name."""
    if Path(source).is_file() or str(source).startswith("https://"):
        return torch.jit.load(source, "cpu").state_dict() if is_archive(source) else load_checkpoint(source)
    if not timm.is_model(source.split(".")[0]):
        raise ValueError(f"--target_model {source} is neither a file nor the name of a model of timm")
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except Exception as error:  # whatever the hub, the network or the cache raise
        raise ValueError(f"--target_model {source}: timm has no weights for it here ({error})") from error


def is_archive(path: str) -> bool:
    """Whether a file is TorchScript, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def visual_weights(found: dict[str, Any]) -> StateDict:
    """The tensors of the visual tower, without the names around them."""
    for key in ("state_dict", "teacher", "model"):
        found = found[key] if isinstance(found.get(key), dict) else found
    for prefix in ("module.", "visual.", "trunk.", "backbone."):
        inside = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        found = inside or found
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


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
