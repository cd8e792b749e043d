"""SemMAE's first stage: a frozen ViT's features become a few semantic parts of each image.

The class token is embedded into part tokens, each patch goes to the part it resembles, and the
parts have to suffice a small decoder to paint the image again. What the paper leaves open is this
project's own choice (docs/methods/mae_semmae.md#first-stage), as are the baselines below: attention
heads, k-means and random parts. Shapes in comments: B images, N = H * W patches, C channels, K
parts (background among them), h heads.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_finetune import VisionTransformer
from modeling_targets import Teacher, TeacherFeatures, vit_options
from unimim.checkpoint.files import load_checkpoint
from unimim.checkpoint.loading import load_pretrained, unwrapped
from unimim.data.part_maps import Grid
from unimim.engine.distributed import reduce_sum
from unimim.engine.task import Task

BACKGROUNDS = ("token", "attention", "none")
RECONSTRUCTIONS = {"mse": F.mse_loss, "l1": F.l1_loss}
PART_SOURCES = ("learned", "attention_heads", "kmeans", "random")

ANNEALED = 0.7  # fraction of training over which the temperature falls
SIMILAR = 0.1  # cosine of two maps from which on the diversity loss parts them
LEAST_FRACTION = 0.03  # of all patches, below which a part counts as dying out
FOREGROUND_MASS = 0.6  # of the class token's attention

# --- the teacher ----------------------------------------------------------------------------------


def load_teacher(
    name_or_path: str,
    *,
    image_size: int,
    checkpoint: str = "",
    allow_random: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> Teacher:
    """Return the teacher that --teacher names, for square images of `image_size` pixels.

    Positions are resized to its grid.

    A file gives the model by its tensors' shapes; timm's, DINO's, iBOT's and this repository's
    naming are understood. A timm name takes its weights from the file `checkpoint`, else from
    timm's hub; `allow_random` leaves them random. `model_kwargs` are further options of the
    constructor, such as num_heads, which no tensor tells.

    Raises:
        ValueError: no such model or file, weights that do not fit, or a hub that cannot be reached.
    """
    if Path(name_or_path).is_file():
        vit = vit_of(
            teacher_state(name_or_path), name_or_path, input_size=image_size, **(model_kwargs or {})
        )
    elif timm.is_model(name_or_path):
        options = {"img_size": image_size, "num_classes": 0, **(model_kwargs or {})}
        vit = _timm_vit(name_or_path, options, checkpoint, allow_random)
    else:
        raise ValueError(f"--teacher {name_or_path} is neither a file nor a model that timm knows")
    if not hasattr(vit, "blocks") or not hasattr(vit.blocks[-1].attn, "qkv"):
        raise ValueError(
            "--teacher must be a vision transformer with a joint qkv projection, as DINO's and "
            "iBOT's"
        )
    return Teacher(vit)


def _timm_vit(name: str, options: dict[str, Any], checkpoint: str, allow_random: bool) -> nn.Module:
    try:
        vit = timm.create_model(name, pretrained=not (checkpoint or allow_random), **options)
    except (OSError, RuntimeError) as error:  # the hub's errors are OSErrors
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--teacher {name} cannot be downloaded ({reason}): give --teacher_checkpoint FILE, "
            "or --allow_random_teacher to do without its weights"
        ) from error
    except TypeError as error:
        raise ValueError(
            f"--teacher {name} does not take one of {sorted(options)}: {error}"
        ) from error
    if checkpoint:
        load_strictly(vit, teacher_state(checkpoint), checkpoint)
    return vit


_CONTAINERS = ("teacher", "state_dict", "model", "student", "module")
_WRAPPERS = ("module.", "_orig_mod.", "backbone.")
_BACKBONE = (
    "cls_token",
    "pos_embed",
    "reg_token",
    "patch_embed.",
    "norm_pre.",
    "rel_pos_bias.",
    "blocks.",
    "norm.",
)


def teacher_state(path: str) -> dict[str, Tensor]:
    """Return the backbone's tensors of a checkpoint, without heads, decoders and mask tokens.

    The state dict may be bare or lie under teacher, state_dict, model, student or module, in this
    order; its names may begin with module., _orig_mod. and backbone.
    """
    tensors = unwrapped(load_checkpoint(path), _CONTAINERS, _WRAPPERS)
    kept = {
        k: v
        for k, v in tensors.items()
        if k.startswith(_BACKBONE) and not k.endswith("relative_position_index")
    }
    if "cls_token" not in kept or "patch_embed.proj.weight" not in kept:
        raise ValueError(
            f"{path} holds no ViT with a class token; its tensors are "
            f"{', '.join(list(tensors)[:4])}, ..."
        )
    return kept


def vit_of(state: dict[str, Tensor], path: str, **options: Any) -> VisionTransformer:
    """Return the ViT whose tensors these are.

    Heads have 64 channels (80 in MAE's huge) unless a bias table tells their number.
    """
    names = " ".join(state)
    shape = vit_options(state) | {
        "qkv_bias": "attn.qkv.bias" in names or "attn.q_bias" in names,
        "k_bias": "attn.qkv.bias" in names,
        "init_values": 1.0 if "gamma" in names else None,
        "pos_embed": "learned" if "pos_embed" in state else "none",
        "rel_pos_bias": "per_block" if "relative_position_bias_table" in names else "none",
    }
    try:
        vit = VisionTransformer(**{**shape, **options, "num_classes": 0, "global_pool": "token"})
    except TypeError as error:
        raise ValueError(f"--teacher_kwargs: {error}") from error
    load_strictly(vit, state, path)
    return vit


def load_strictly(vit: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load every tensor; ValueError if one is left over on either side."""
    report = load_pretrained(vit, state, min_matched=0.0)
    wrong = [f"{name} is missing" for name in report.missing] + [
        f"{name} has no place" for name in report.ignored
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit --teacher: {'; '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}"
        )


# --- the learner ----------------------------------------------------------------------------------


class PartLearner(nn.Module):
    """Learns part tokens, part maps and the decoder; `num_parts` counts foreground parts.

    background "token": a learned token competes with the part tokens for each patch, and part 0 is
    what it wins; "attention": part 0 is where the teacher's class token does not look
    (`foreground`); "none": every part is equal. `weights` are those of reconstruction, diversity
    and balance; the last 0 gives the paper's two terms.
    """

    def __init__(
        self,
        dim: int,
        grid: Grid,
        *,
        num_parts: int = 6,
        background: str = "token",
        widths: tuple[int, ...] = (256, 128, 64, 32),
        reconstruction: str = "mse",
        weights: tuple[float, float, float] = (10.0, 0.1, 0.1),
    ):
        super().__init__()
        assert background in BACKGROUNDS and reconstruction in RECONSTRUCTIONS, (
            background,
            reconstruction,
        )
        self.grid = grid
        self.background = background
        self.weights = weights
        self.reconstruction = RECONSTRUCTIONS[reconstruction]
        self.temperature = math.inf  # the caller's affair: it falls with the steps
        self.embed = nn.Linear(dim, num_parts * dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.embed.bias, std=0.5)  # so that the part tokens differ from the start
        self.bg_token = nn.Parameter(0.02 * torch.randn(dim)) if background == "token" else None
        self.decoder = Decoder(num_parts + (background == "token"), dim, widths)
        for name in ("cls", "feat"):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))

    def no_weight_decay(self) -> set[str]:
        return set()

    @property
    def num_ids(self) -> int:
        """Return how many ids a map may hold: K."""
        return self.embed.out_features // self.embed.in_features + (self.background != "none")

    def forward(self, features: TeacherFeatures, images: Tensor) -> dict[str, Tensor]:
        """Losses against images [B, 3, S, S] in [0, 1]; `loss` is their weighted sum."""
        maps, cls = self.soft_maps(features)
        blurred = blur(maps)
        painted = self.decoder(blurred, cls)
        with torch.autocast(images.device.type, enabled=False):
            target = F.interpolate(images, size=painted.shape[-2:], mode="bilinear", antialias=True)
            terms = (
                self.reconstruction(painted.float(), target),
                diversity_loss(blurred),
                balance_loss(maps),
            )
        loss = sum(weight * term for weight, term in zip(self.weights, terms, strict=True))
        names = ("reconstruction", "diversity", "balance")
        metrics = {name: term.detach() for name, term in zip(names, terms, strict=True)}
        return {"loss": loss, **metrics, "confidence": maps.detach().amax(1).mean()}

    def soft_maps(self, features: TeacherFeatures) -> tuple[Tensor, Tensor]:
        """Return each patch's probabilities of parts [B, K, H, W], and the standardized class
        token [B, C]."""
        with torch.autocast(features.cls.device.type, enabled=False):
            cls = (features.cls - self.cls_mean) / self.cls_std
            patches = (features.patches - self.feat_mean) / self.feat_std
            tokens = self.part_tokens(cls)
            logits = (
                F.normalize(tokens, dim=-1)
                @ F.normalize(patches, dim=-1).transpose(1, 2)
                / self.temperature
            )
            return logits.softmax(1).unflatten(-1, self.grid), cls

    def part_tokens(self, cls: Tensor) -> Tensor:
        """Return part tokens [B, K, C] of class tokens [B, C], the background's first."""
        tokens = self.embed(cls).unflatten(-1, (-1, cls.shape[-1]))
        if self.bg_token is None:
            return tokens
        return torch.cat((self.bg_token.expand(len(cls), 1, -1), tokens), dim=1)

    @torch.no_grad()
    def maps(self, features: TeacherFeatures) -> Tensor:
        """Return blurred maps of all ids, [B, K, H, W], of which `hard_maps` takes the largest."""
        blurred = blur(self.soft_maps(features)[0])
        return (
            on_foreground(blurred, features, self.grid)
            if self.background == "attention"
            else blurred
        )

    @torch.no_grad()
    def reconstruct(self, features: TeacherFeatures) -> Tensor:
        """Return what the decoder makes of the parts: [B, 3, S', S'] in [0, 1]."""
        maps, cls = self.soft_maps(features)
        return self.decoder(blur(maps), cls)

    @torch.no_grad()
    def standardize(self, batches: Iterable[TeacherFeatures]) -> None:
        """Fix mean and std of every channel to those of these features, over all processes."""
        cls, feat = RunningMoments(self.cls_mean), RunningMoments(self.feat_mean)
        for features in batches:
            cls.add(features.cls)
            feat.add(features.patches.flatten(0, 1))
        for moments, mean, std in (
            (cls, self.cls_mean, self.cls_std),
            (feat, self.feat_mean, self.feat_std),
        ):
            found = moments.read()
            mean.copy_(found[0])
            std.copy_(found[1])


class RunningMoments:
    """Mean and std of the rows of tensors [n, C], over all processes; `like` is a tensor [C]."""

    def __init__(self, like: Tensor):
        self.sums = torch.zeros(3, *like.shape, dtype=torch.float64, device=like.device)

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        self.sums += torch.stack(
            (torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0))
        )

    def read(self) -> tuple[Tensor, Tensor]:
        count, total, squares = reduce_sum(self.sums.clone())
        mean = total / count
        return mean, (squares / count - mean.square()).clamp(min=1e-6).sqrt()


class Decoder(nn.Module):
    """A small StyleGAN-like decoder.

    It sees positions only through the maps [B, K, H, W]; the class token [B, C] sets mean and std
    of every channel. Each width after the first doubles the side.
    """

    def __init__(self, maps: int, dim: int, widths: tuple[int, ...]):
        super().__init__()
        pairs = zip((maps, *widths), widths, strict=False)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in pairs
        )
        self.adain = nn.ModuleList(nn.Linear(dim, 2 * width) for width in widths)
        for layer in self.adain:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.to_rgb = nn.Conv2d(widths[-1], 3, 1)

    def forward(self, x: Tensor, cls: Tensor) -> Tensor:
        for number, (conv, adain) in enumerate(zip(self.convs, self.adain, strict=True)):
            if number:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            scale, shift = adain(cls)[..., None, None].chunk(2, dim=1)
            x = F.leaky_relu(F.instance_norm(conv(x), eps=1e-5) * (1 + scale) + shift, 0.2)
        return self.to_rgb(x).sigmoid()


def blur(maps: Tensor) -> Tensor:
    """Blur maps by a 3 x 3 binomial filter with repeated edges.

    So no fine detail can be passed to the decoder.
    """
    line = maps.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line).expand(maps.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), kernel, groups=maps.shape[1])


def diversity_loss(maps: Tensor) -> Tensor:
    """Return by how much the cosine of two parts' maps exceeds `SIMILAR`, mean over all pairs."""
    flat = F.normalize(maps.float().flatten(2), dim=-1)
    parts = flat.shape[1]
    excess = (flat @ flat.transpose(1, 2) - SIMILAR).clamp(min=0)
    apart = ~torch.eye(parts, dtype=torch.bool, device=maps.device)
    return excess[:, apart].mean() if parts > 1 else excess.sum() * 0


def balance_loss(maps: Tensor) -> Tensor:
    """Return by how much a part's fraction of the batch falls below `LEAST_FRACTION`, mean over
    all parts, in units of it."""
    return ((LEAST_FRACTION - maps.mean((0, 2, 3))).clamp(min=0) / LEAST_FRACTION).mean()


def temperature_at(progress: float, start: float, end: float) -> float:
    """Return the temperature: it falls geometrically over the first `ANNEALED` of the run."""
    return start * (end / start) ** min(progress / ANNEALED, 1.0)


class PartLearning(Task):
    """The task: batches of normalized images to the learner's losses.

    The teacher is no submodule, so that no engine wraps, optimizes or saves it.
    """

    def __init__(
        self, learner: PartLearner, teacher: Teacher, mean_std, temperatures: tuple[float, float]
    ):
        super().__init__()
        self.learner = learner
        self.temperatures = temperatures
        self.teacher = teacher
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in mean_std)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.after_step(0.0)

    @property
    def network(self) -> PartLearner:
        return self.learner

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.learner(
            self.teacher.look(batch["image"]), batch["image"] * self.std + self.mean
        )

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        self.learner.temperature = temperature_at(progress, *self.temperatures)


# --- hard maps ------------------------------------------------------------------------------------


def hard_maps(maps: Tensor, grid: Grid | None = None, *, clean: bool = True) -> Tensor:
    """Return the id of the largest of maps [B, K, H, W] at every position of `grid`.

    uint8 [B, Hp, Wp]; the default grid is H x W.

    The smallest id wins a tie; a finer grid is interpolated first; `clean` removes single cells.
    """
    if grid is not None and grid != tuple(maps.shape[-2:]):
        maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
    parts = maps.argmax(1)
    return (without_single_cells(parts, maps.shape[1]) if clean else parts).to(torch.uint8)


def without_single_cells(parts: Tensor, num_parts: int) -> Tensor:
    """Give positions of int64 [B, H, W] that agree with none of 8 neighbors their most frequent
    id."""
    one_hot = F.one_hot(parts, num_parts).permute(0, 3, 1, 2).float()
    ring = one_hot.new_ones(3, 3).index_put(
        (torch.tensor(1), torch.tensor(1)), one_hot.new_zeros(())
    )
    neighbors = F.conv2d(one_hot, ring.expand(num_parts, 1, 3, 3), padding=1, groups=num_parts)
    alone = neighbors.gather(1, parts[:, None])[:, 0] == 0
    return torch.where(alone, neighbors.argmax(1), parts)


def foreground(attention: Tensor, grid: Grid) -> Tensor:
    """Return the fewest patches that hold `FOREGROUND_MASS` of attention [B, h, N]: bool [B, H,
    W].

    A 3 x 3 majority smooths them.
    """
    mass = attention.mean(1)
    mass, order = (mass / mass.sum(-1, keepdim=True)).sort(dim=-1, descending=True)
    needed = mass.cumsum(-1) - mass < FOREGROUND_MASS
    inside = torch.zeros_like(needed).scatter(1, order, needed).unflatten(-1, grid)
    votes = F.avg_pool2d(
        F.pad(inside[:, None].float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1
    )
    return votes[:, 0] > 0.5


def on_foreground(maps: Tensor, features: TeacherFeatures, grid: Grid) -> Tensor:
    """Restrict maps [B, K - 1, H, W] to the foreground; part 0 is the background: [B, K, H, W]."""
    inside = foreground(features.attention, grid)[:, None]
    return torch.cat(((~inside).float(), maps * inside), dim=1)


# --- parts without learning -----------------------------------------------------------------------


def attention_head_maps(features: TeacherFeatures, grid: Grid) -> Tensor:
    """Return one part for each head of the class token's attention, on its foreground: [B, 1 + h,
    H, W]."""
    return on_foreground(features.attention.unflatten(-1, grid), features, grid)


def kmeans_maps(
    features: TeacherFeatures, grid: Grid, num_parts: int, iterations: int = 20
) -> Tensor:
    """Cluster each image's normalized patch tokens by k-means.

    Returns minus the squared distances to the centers, [B, K, H, W].

    Centers start at the tokens that lie farthest from each other, so that nothing is random; ids
    are not comparable between images.
    """
    tokens = F.normalize(features.patches, dim=-1)
    centers = _farthest_tokens(tokens, num_parts)
    for _ in range(iterations):
        members = F.one_hot(torch.cdist(tokens, centers).argmin(-1), num_parts).to(
            tokens.dtype
        )  # [B, N, K]
        sizes = members.sum(1)[..., None]
        means = members.transpose(1, 2) @ tokens / sizes.clamp(min=1)
        centers = torch.where(sizes > 0, means, centers)
    return -torch.cdist(tokens, centers).square().transpose(1, 2).unflatten(-1, grid)


def _farthest_tokens(tokens: Tensor, count: int) -> Tensor:
    """Return the token farthest from the mean, then those farthest from the chosen: [B, count,
    C]."""
    chosen = []
    distance = torch.cdist(tokens, tokens.mean(1, keepdim=True))[..., 0]
    for number in range(count):
        row = distance.argmax(-1)[:, None, None].expand(-1, 1, tokens.shape[-1])
        chosen.append(tokens.gather(1, row))
        to_last = torch.cdist(tokens, chosen[-1])[..., 0]
        distance = torch.minimum(distance, to_last) if number else to_last
    return torch.cat(chosen, dim=1)


def random_maps(indices: list[int], grid: Grid, num_parts: int, seed: int) -> Tensor:
    """Return noise [B, K, H, W] that depends on the seed and the image's number only."""
    noise = [
        np.random.default_rng((seed, index)).random((num_parts, *grid), dtype=np.float32)
        for index in indices
    ]
    return torch.from_numpy(np.stack(noise))
