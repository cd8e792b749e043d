"""Choose which patches to hide, or in which order to predict them: pure functions of noise and a
grid.

Four kinds, in this order:

1. Mask generators, which run in the data loader: called with a `np.random.Generator`, they return
   a bool array [grid_h, grid_w], True = masked (docs/methods/conmim.md#masks).
2. Token orders [B, L] with the visible tokens first, which MAE and SemMAE draw on the device
   (docs/methods/mae_semmae.md#masks-from-parts).
3. The masks that --mask_type names: objects with one contract, made of the two above.
4. Prediction orders of autoregressive methods (docs/methods/semaim.md#orders).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unimim.errors import OptionError, check_choice
from unimim.flag import Flag
from unimim.sizes import Pair, to_pair

LOADER_MASKS = ("block", "random", "random_mps32")
BLOCK_MASK_FRACTION = 75 / 14**2  # BEiT hides 75 patches of a 14 x 14 grid
LOG_BLOCK_ASPECT = math.log(1 / 0.3)  # aspect ratios are log-uniform in [0.3, 1 / 0.3]
BLOCK_ATTEMPTS = 10

MaskGenerator = Callable[[np.random.Generator], np.ndarray]
Noise = Tensor | tuple[Tensor | None, ...] | None  # the random noise of a mask or an order


class BlockwiseMask:
    """Draw BEiT's blockwise masks: rectangles of random area and aspect ratio.

    Rectangles are added until `num_mask_patches` are hidden or none fits any more, so a mask never
    exceeds the target and may fall a little short of it. A rectangle is strictly smaller than the
    grid in both directions. If none fits at all (tiny grids), single patches are hidden instead,
    where the published code returns an empty mask, whose loss is undefined.

    Args:
        grid: size in patches (height, width).
        num_mask_patches: target number of masked patches.
        min_block, max_block: bounds of a rectangle's area in patches; `max_block` None means the
            target.
    """

    def __init__(
        self, grid: Pair, num_mask_patches: int, min_block: int = 16, max_block: int | None = None
    ):
        _check_count(num_mask_patches, grid, "--num_mask_patches")
        for name, size in (("min", min_block), ("max", max_block)):
            if size is not None and size < 1:
                raise ValueError(
                    f"--{name}_mask_patches_per_block is {size}; a block has at least 1 patch"
                )
        self.grid = grid
        self.target = num_mask_patches
        self.min_block = min_block
        self.max_block = max_block or num_mask_patches

    @property
    def most(self) -> int:
        """The largest number of patches that a mask hides."""
        return self.target

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        mask = np.zeros(self.grid, dtype=bool)
        count = 0
        while count < self.target:
            added = self._add_block(mask, min(self.target - count, self.max_block), rng)
            if added == 0:
                break
            count += added
        return mask if count else _choose(self.grid, self.target, rng)

    def _add_block(self, mask: np.ndarray, limit: int, rng: np.random.Generator) -> int:
        """Add a rectangle that hides 1 to `limit` new patches; return how many, 0 if none fits."""
        rows, columns = mask.shape
        for u_area, u_aspect, u_top, u_left in rng.random((BLOCK_ATTEMPTS, 4)).tolist():
            # As published, the bounds are not checked: the minimum may exceed the limit.
            area = self.min_block + (limit - self.min_block) * u_area
            aspect = math.exp(LOG_BLOCK_ASPECT * (2 * u_aspect - 1))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue

            top = int(u_top * (rows - height + 1))
            left = int(u_left * (columns - width + 1))
            block = mask[top : top + height, left : left + width]
            new = block.size - int(np.count_nonzero(block))
            if 0 < new <= limit:
                block[...] = True
                return new
        return 0


class RandomMask:
    """Hide exactly floor(mask_ratio * patches) patches, chosen uniformly."""

    def __init__(self, grid: Pair, mask_ratio: float):
        _check_ratio(mask_ratio)
        self.grid = grid
        self.count = int(mask_ratio * grid[0] * grid[1])
        _check_count(self.count, grid, "--mask_ratio")

    @property
    def most(self) -> int:
        """The number of patches that every mask hides."""
        return self.count

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return _choose(self.grid, self.count, rng)


class SimMIMMask:
    """Hide ceil(mask_ratio * units) square mask units of `unit` x `unit` patches, chosen uniformly.

    The units tile the image, so a mask is coarse: SimMIM's `mask_patch_size` of 32 pixels makes
    units of 2 x 2 patches of 16 pixels.
    """

    def __init__(self, grid: Pair, mask_ratio: float, unit: int = 2):
        self.unit = unit
        self.unit_grid = (grid[0] // unit, grid[1] // unit)
        self.count = math.ceil(math.prod(self.unit_grid) * mask_ratio)

    @property
    def most(self) -> int:
        """The number of patches that every mask hides."""
        return self.count * self.unit**2

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return self.mask_first(rng.permutation(math.prod(self.unit_grid)))

    def mask_first(self, order: np.ndarray) -> np.ndarray:
        """Return the mask that hides the first units of `order`, a permutation of all units."""
        units = _first(self.unit_grid, self.count, order)
        return units.repeat(self.unit, axis=0).repeat(self.unit, axis=1)


def build_mask_generator(
    mask_type: str,
    *,
    input_size: int | Pair,
    patch_size: int | Pair,
    mask_ratio: float,
    num_mask_patches: int | None = None,
    min_mask_patches_per_block: int = 16,
    max_mask_patches_per_block: int | None = None,
    mask_patch_size: int | None = None,
) -> MaskGenerator:
    """Return the generator of `--mask_type` for images of `input_size` pixels.

    `num_mask_patches` None scales BEiT's 75 of 196 patches to the grid; `mask_patch_size` None is
    the side of two patches (SimMIM's 32 pixels for 16-pixel patches). On small grids a block's
    minimum area is lowered to the target.

    Raises:
        ValueError: the type is unknown, a size does not divide the image, or a mask would hide
            nothing or everything.
    """
    grid = _grid(input_size, patch_size, "--patch_size")
    if mask_type == "random":
        return RandomMask(grid, mask_ratio)
    if mask_type == "random_mps32":
        _check_ratio(mask_ratio)
        unit = _unit_side(input_size, patch_size, mask_patch_size)
        generator = SimMIMMask(grid, mask_ratio, unit)
        _check_count(generator.count, generator.unit_grid, "--mask_ratio")
        return generator
    if mask_type == "block":
        target = num_mask_patches
        if target is None:
            target = int(grid[0] * grid[1] * BLOCK_MASK_FRACTION)
        smallest = min(min_mask_patches_per_block, target)
        return BlockwiseMask(grid, target, smallest, max_mask_patches_per_block)
    raise ValueError(f"--mask_type is '{mask_type}'; it must be one of {', '.join(LOADER_MASKS)}")


def _grid(input_size: int | Pair, patch_size: int | Pair, flag: str) -> Pair:
    """Return the rows and columns of patches of `patch_size` that fill `input_size` pixels."""
    height, width = to_pair(input_size)
    patch_h, patch_w = to_pair(patch_size)
    if patch_h < 1 or patch_w < 1 or height % patch_h or width % patch_w:
        raise ValueError(
            f"--input_size {height}x{width} is not a multiple of {flag} {patch_h}x{patch_w}"
        )
    return height // patch_h, width // patch_w


def _unit_side(input_size: int | Pair, patch_size: int | Pair, mask_patch_size: int | None) -> int:
    """Return the side of one of SimMIM's mask units in patches."""
    patch_h, patch_w = to_pair(patch_size)
    side = 2 * patch_h if mask_patch_size is None else mask_patch_size
    if patch_h != patch_w or side < 1 or side % patch_h:
        raise ValueError(
            f"--mask_patch_size {side} is not a multiple of the side of a square patch, which is "
            f"{patch_h}x{patch_w} pixels"
        )
    height, width = to_pair(input_size)
    if height % side or width % side:
        default = ", two patches, which is the default" if mask_patch_size is None else ""
        raise ValueError(
            f"--input_size {height}x{width} is not a multiple of --mask_patch_size {side}{default}"
            f"; use --mask_patch_size {patch_h}, one patch"
        )
    if side >= max(height, width):
        raise ValueError(
            f"--mask_ratio hides 1 of 1 positions (1x1), as --mask_patch_size {side} is the whole "
            f"image; {f'use --mask_patch_size {patch_h}' if patch_h < side else 'use smaller ones'}"
        )
    return side // patch_h


def _choose(grid: Pair, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask of `count` patches, chosen uniformly without replacement."""
    return _first(grid, count, rng.permutation(math.prod(grid)))


def _first(grid: Pair, count: int, order: np.ndarray) -> np.ndarray:
    """Return a mask of the first `count` positions of `order`."""
    mask = np.zeros(grid, dtype=bool)
    mask.reshape(-1)[order[:count]] = True
    return mask


def _check_ratio(mask_ratio: float) -> None:
    if not 0 < mask_ratio < 1:
        raise ValueError(
            f"--mask_ratio is {mask_ratio}; it must lie between 0 and 1, both excluded"
        )


def _check_count(count: int, grid: Pair, flag: str) -> None:
    total = grid[0] * grid[1]
    if not 0 < count < total:
        raise ValueError(
            f"{flag} hides {count} of {total} positions ({grid[0]}x{grid[1]}); "
            "hide at least 1 and leave at least 1 visible"
        )


# --------------------------------------------------------------------------------------------------
# Token orders: visible tokens first


COUNT_FIXES = ("parity", "apportion")
LAMBDA_SCHEDULES = ("power", "increasing", "cosine")


def num_visible(tokens: int, mask_ratio: float) -> int:
    """Return how many of `tokens` stay visible.

    As published, the product is truncated in double precision: 19 of 100 at a ratio of 0.8.

    Raises:
        ValueError: no token, or every token, would stay visible.
    """
    _check_ratio(mask_ratio)
    visible = int(tokens * (1 - mask_ratio))
    if not 0 < visible < tokens:
        raise ValueError(
            f"--mask_ratio {mask_ratio} leaves {visible} of {tokens} patches visible; "
            "leave at least 1"
        )
    return visible


def mask_lambda_schedule(
    epoch: np.ndarray | float, epochs: int, power: float = 2.0, kind: str = "power"
) -> np.ndarray | float:
    """Return SemMAE's weight of intra-part against inter-part masking in `epoch` (from 0).

    With t = (epoch + 1) / epochs, `kind` "power" is 1 - t ** power, "cosine" is half a cosine from
    1 to 0, "increasing" is t. The value is clipped to [0, 1]; the published code, written for 800
    epochs, leaves that range in longer runs (docs/methods/mae_semmae.md#masks-from-parts).

    Raises:
        ValueError: `kind` is unknown, or `power` is not positive.
    """
    if kind not in LAMBDA_SCHEDULES:
        raise ValueError(
            f"mask_lambda_schedule={kind} is unknown; use one of {', '.join(LAMBDA_SCHEDULES)}"
        )
    if power <= 0:
        raise ValueError(f"--mask_lambda_power is {power}; it must be positive")
    progress = (epoch + 1) / epochs
    value = {
        "power": 1 - progress**power,
        "increasing": progress,
        "cosine": (1 + np.cos(np.pi * progress)) / 2,
    }[kind]
    return np.clip(value, 0.0, 1.0)


@dataclass(frozen=True)
class SemanticMask:
    """Masks made by `semantic_mask` for B images of L tokens in K parts.

    Attributes:
        order: int64 [B, L], token indices with the visible ones first, as the encoder takes them.
        visible: number of visible tokens.
        shuffle: int64 [B, L], the random order of the tokens.
        part_order: int64 [B, K], the random order of the parts.
        intra, inter: float32 [B, K], tokens to mask per part if every part loses the same fraction,
            and if whole parts are masked.
        count: float32 [B, K], tokens to mask per part, between `intra` and `inter`.
        selected: bool [B, L] in shuffled order, the tokens chosen by `count`; these are the masked
            tokens if `count` sums to the exact budget.
    """

    order: Tensor
    visible: int
    shuffle: Tensor
    part_order: Tensor
    intra: Tensor
    inter: Tensor
    count: Tensor
    selected: Tensor

    @property
    def mask(self) -> Tensor:
        """The mask in token order, float32 [B, L], 1 = masked."""
        return torch.ones_like(self.order, dtype=torch.float32).scatter_(
            1, self.order[:, : self.visible], 0.0
        )


def semantic_mask(
    part_ids: Tensor,
    mask_ratio: float,
    mask_lambda: float,
    num_parts: int,
    noise_tokens: Tensor | None = None,
    noise_parts: Tensor | None = None,
    *,
    count_fix: str = "parity",
) -> SemanticMask:
    """Return SemMAE's masks, given the part of each token.

    With `mask_lambda` 1 every part loses the fraction `mask_ratio`; with 0 whole parts are masked
    one after another until the budget is spent; in between, a part loses the rounded mean of the
    two counts. A part loses its first tokens in a random order. Rounding leaves the sum of the
    counts a few tokens off the budget, and `count_fix` says how that is repaired:

    - "parity", as published: surplus tokens become visible again from the front of the random
      order, missing ones are taken from its end;
    - "apportion": the exact budget is divided among the parts by largest remainders, so that
      nothing needs repair.

    See docs/methods/mae_semmae.md#masks-from-parts.

    Args:
        part_ids: integers [B, L], each below `num_parts`; parts may be empty.
        mask_ratio: fraction of tokens to mask.
        mask_lambda: weight of intra-part masking, clipped to [0, 1].
        noise_tokens, noise_parts: uniform noise [B, L] and [B, K] whose ascending orders are the
            random orders; drawn in this order if None.

    Raises:
        ValueError: `count_fix` is unknown, or the ratio hides nothing or everything.
    """
    if count_fix not in COUNT_FIXES:
        raise ValueError(f"count_fix={count_fix} is unknown; use one of {', '.join(COUNT_FIXES)}")
    images, tokens = part_ids.shape
    visible = num_visible(tokens, mask_ratio)
    mask_lambda = min(max(float(mask_lambda), 0.0), 1.0)
    if noise_tokens is None:
        noise_tokens = torch.rand(images, tokens, device=part_ids.device)
    if noise_parts is None:
        noise_parts = torch.rand(images, num_parts, device=part_ids.device)
    shuffle, part_order = ascending(noise_tokens), ascending(noise_parts)

    # How many tokens each part loses.
    shuffled = part_ids.long().gather(1, shuffle)
    rank, sizes = rank_in_part(shuffled, num_parts)
    intra = (sizes * mask_ratio).round()  # half to even, in float32, as published
    inter = whole_parts_first(sizes, tokens * mask_ratio, part_order)
    if count_fix == "parity":
        count = (mask_lambda * intra + (1 - mask_lambda) * inter).round()
    else:
        wanted = mask_lambda * mask_ratio * sizes.double() + (1 - mask_lambda) * inter
        count = apportion(wanted, sizes, tokens - visible, part_order)

    # Visible tokens first, then the masked ones, each in the shuffled order.
    selected = rank < count.gather(1, shuffled)
    order = shuffle.gather(1, others_first(selected))
    return SemanticMask(order, visible, shuffle, part_order, intra, inter, count, selected)


def ascending(noise: Tensor) -> Tensor:
    """Return the indices int64 [B, L] that sort noise [B, L] in ascending order, stably.

    On a CPU, numpy's default sort takes a sixth of the time of torch's and a fifth of numpy's
    stable sort, which is needed only if there are ties.
    """
    if noise.device.type != "cpu":
        return noise.argsort(dim=1, stable=True)
    values = noise.numpy()
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        order = np.argsort(values, axis=1, kind="stable")
    return torch.from_numpy(order)


def rank_in_part(parts: Tensor, num_parts: int) -> tuple[Tensor, Tensor]:
    """Return each token's rank within its part [B, L] and the parts' sizes float32 [B, K].

    `parts` is int64 [B, L]; a token's rank is the number of earlier tokens of the same part.
    """
    part_numbers = torch.arange(num_parts, device=parts.device)
    members = parts.unsqueeze(1) == part_numbers[:, None]  # [B, K, L]
    seen = members.cumsum(2, dtype=torch.int32)
    rank = seen.gather(1, parts.unsqueeze(1)).squeeze(1) - 1
    return rank, seen[..., -1].float()


def whole_parts_first(sizes: Tensor, budget: float, part_order: Tensor) -> Tensor:
    """Return how many tokens [B, K] each part loses if parts are emptied in `part_order`."""
    ordered = sizes.gather(1, part_order)
    before = ordered.cumsum(1) - ordered
    taken = (budget - before).trunc().clamp(min=0).minimum(ordered)
    return torch.empty_like(taken).scatter_(1, part_order, taken)


def apportion(wanted: Tensor, sizes: Tensor, total: int, part_order: Tensor) -> Tensor:
    """Round `wanted` [B, K] to whole numbers that sum to `total`, by largest remainders.

    No count exceeds its part's size, and equal remainders are served in `part_order`. `wanted` sums
    to less than two short of `total`, so no part needs more than two tokens beyond its whole ones.
    """
    wanted, sizes = wanted.gather(1, part_order), sizes.gather(1, part_order)
    whole = wanted.floor()

    # Every part bids for a first and a second extra token, unless it has no room for it.
    bids = torch.stack([wanted - whole, wanted - whole - 1], 1)  # [B, 2, K]
    extras = torch.arange(1, 3, device=sizes.device)[:, None]
    room = whole.unsqueeze(1) + extras <= sizes.unsqueeze(1)
    bids = bids.masked_fill(~room, -math.inf)

    # The highest bids win, as many as tokens are missing.
    ranked = bids.flatten(1).argsort(dim=1, descending=True, stable=True)
    missing = total - whole.sum(1, keepdim=True)
    wins = torch.arange(ranked.shape[1], device=sizes.device) < missing
    extra = torch.zeros_like(ranked).scatter_(1, ranked, wins.long()).view_as(bids).sum(1)
    return torch.empty_like(sizes).scatter_(1, part_order, (whole + extra).to(sizes.dtype))


def others_first(selected: Tensor) -> Tensor:
    """Return indices int64 [B, L] of what is not selected, then of what is, each in order.

    Equals a stable sort of `selected`, in linear time.
    """
    selected_rank = selected.cumsum(1)  # counted from 1, like other_rank
    other_rank = torch.arange(1, selected.shape[1] + 1, device=selected.device) - selected_rank
    rank = torch.where(selected, other_rank[:, -1:] + selected_rank, other_rank) - 1
    indices = torch.arange(rank.shape[1], device=rank.device).expand_as(rank)
    return torch.empty_like(rank).scatter_(1, rank, indices)


# --------------------------------------------------------------------------------------------------
# Masks of a method: one contract


class Mask:
    """What is hidden of each image. Options of its constructor are options of every method.

    flags: command-line flags of these options. views: keys of a batch that it reads. noise_size:
    how much uniform noise it takes for each image. teacher: a frozen network whose attention it
    follows. uses_ema: it follows that of the method's ema. equal_counts: as many patches are hidden
    of every image. chooses: some patches take no part at all.
    """

    flags: tuple[Flag, ...] = ()
    views: tuple[str, ...] = ()
    noise_size = 0
    teacher: Any = None
    uses_ema = False
    equal_counts = True
    chooses = False

    def __init__(self, grid: Pair, *, mask_ratio: float = 0.75):
        self.mask_ratio = mask_ratio
        self.num_tokens = math.prod(grid)

    def __deepcopy__(self, memo: dict) -> "Mask":
        """Return itself: the copies of a method share its masks."""
        return self

    def order(
        self, batch: dict[str, Tensor], noise: Noise = None, attention: Tensor | None = None
    ) -> Tensor:
        """Return the positions int64 [B, L] of the patches that take part, visible ones first, by
        uniform noise [B, noise_size]; `attention`: how much each patch is attended to, [B, N]."""
        raise NotImplementedError

    def num_visible(self, batch: dict[str, Tensor], tokens: int) -> int:
        """Return how many of the `tokens` that take part are visible, in each image."""
        return num_visible(tokens, self.mask_ratio)

    def before_epoch(self, epoch: int, epochs: int) -> None:
        """Move a schedule of the masks to this epoch of a run of `epochs`."""

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Return what the log shows beside the loss."""
        return {}


class NoMask(Mask):
    """Hides nothing: for prediction in an order."""


class LoaderMask(Mask):
    """Comes with the batch as "mask" [B, gh, gw], from a mask generator in the data loader."""

    views = ("mask",)

    def order(
        self, batch: dict[str, Tensor], noise: Noise = None, attention: Tensor | None = None
    ) -> Tensor:
        return batch["mask"].flatten(1).to(torch.int8).argsort(dim=1, stable=True)

    def num_visible(self, batch: dict[str, Tensor], tokens: int) -> int:
        return tokens - common_count(batch, "mask")[1]


class BlockMask(LoaderMask):
    """The loader's blocks, which hide more of one image than of another."""

    equal_counts = False


def common_count(batch: dict[str, Tensor], name: str) -> tuple[Tensor, int]:
    """Return the mask bool [B, N] of this name, and of how many patches it is True in each image.

    Raises an OptionError if that number is not the same in all images. The counts come with the
    batch from the host, where there is an engine.
    """
    mask = batch[name].flatten(1)
    known = batch.get(f"{name}_counts")
    low, high = mask.sum(1).aminmax() if known is None else known
    low = int(low)
    high = int(high)
    if low != high:
        raise OptionError(
            "mask_type", None,
            f"{name} selects {low} patches of one image and {high} of another, but every image "
            "needs the same number; use random or random_mps32",
        )  # fmt: skip
    return mask, low


class NoiseMask(Mask):
    """Hides the patches with the most noise, which comes with the batch: MAE's masks."""

    views = ("noise",)

    def __init__(self, grid: Pair, *, mask_ratio: float = 0.75):
        super().__init__(grid, mask_ratio=mask_ratio)
        self.noise_size = self.num_tokens
        num_visible(self.num_tokens, mask_ratio)  # refuses a ratio that cannot be

    def order(
        self, batch: dict[str, Tensor], noise: Noise = None, attention: Tensor | None = None
    ) -> Tensor:
        return ascending(noise)


class SquareMask(NoiseMask):
    """Hides squares of `mask_grid` x `mask_grid` patches, those with the most noise: Pixio's
    masks."""

    flags = (Flag("mask_grid", type=int, help="side of a masked square in patches"),)

    def __init__(self, grid: Pair, *, mask_ratio: float = 0.75, mask_grid: int = 4):
        super().__init__(grid, mask_ratio=mask_ratio)
        if mask_grid < 1 or any(side % mask_grid for side in grid):
            problem = f"does not divide the grid of {grid[0]} x {grid[1]} patches; use a divisor"
            raise OptionError("mask_grid", mask_grid, problem)
        self.squares = squares_of(grid, mask_grid)  # [squares, patches of each]
        self.noise_size, patches = self.squares.shape
        self.visible = num_visible(self.noise_size, mask_ratio) * patches

    def num_visible(self, batch: dict[str, Tensor], tokens: int) -> int:
        return self.visible

    def order(
        self, batch: dict[str, Tensor], noise: Noise = None, attention: Tensor | None = None
    ) -> Tensor:
        if self.squares.device != noise.device:
            self.squares = self.squares.to(noise.device)
        return self.squares[ascending(noise)].flatten(1)


def squares_of(grid: Pair, side: int) -> Tensor:
    """Return the patches of each square of side x side patches, int64 [squares, side * side];
    squares and patches are in row-major order."""
    rows, columns = (count // side for count in grid)
    positions = torch.arange(math.prod(grid)).view(rows, side, columns, side)
    return positions.transpose(1, 2).flatten(2).flatten(0, 1)


class AttentionMask(NoiseMask):
    """Hides the patches that are attended to most: in the order of attention, stretched to [0, 1)
    in each image, plus uniform noise up to `attention_noise`.

    The attention is that of the class token of a frozen network, `mask_teacher`, or without one how
    similar the patches' features are to their mean in the method's ema.
    """

    flags = (
        Flag(
            "attention_noise", type=float, group="masks by attention",
            help="of --mask_type attention_high, attention_low: largest noise that is added to the "
            "attention, which goes from 0 to 1",
        ),
        Flag(
            "mask_teacher", metavar="PATH", group="masks by attention",
            help="frozen network whose attention the masks follow: a file or its name in timm; "
            "None: the method's own ema",
        ),
    )  # fmt: skip
    high = True

    def __init__(
        self,
        grid: Pair,
        *,
        mask_ratio: float = 0.75,
        attention_noise: float = 0.5,
        mask_teacher: str | None = None,
        t_momentum: float = 0.996,
    ):
        super().__init__(grid, mask_ratio=mask_ratio)
        if attention_noise < 0:
            raise OptionError("attention_noise", attention_noise, "is negative; use 0 or more")
        self.attention_noise = attention_noise
        self.teacher = mask_teacher
        self.uses_ema = mask_teacher is None
        self.t_momentum = t_momentum

    def order(
        self, batch: dict[str, Tensor], noise: Noise = None, attention: Tensor | None = None
    ) -> Tensor:
        attention = stretched(attention)
        score = attention if self.high else 1 - attention
        return ascending(score + self.attention_noise * noise)


class LowAttentionMask(AttentionMask):
    """Hides the patches that are attended to least."""

    high = False


class PartMask(NoiseMask):
    """Hides semantic parts, as SemMAE does (docs/methods/mae_semmae.md#masks-from-parts).

    "part_ids" of a batch holds the part of each patch, integers [B, gh, gw] below `num_parts`.
    `mask_lambda` goes from nearly 1, a ratio of every part, to 0, whole parts, as 1 - (fraction of
    epochs begun) ** `mask_lambda_power`; a number given for it stays. `token_share` below 1 leaves
    all but that ratio of the patches out of encoder and loss: chosen for each image at random, or
    the best by `token_selection` "score"; a batch may also list them as "cells" [B, L].
    `count_fix`: see `semantic_mask`.
    """

    flags = (
        Flag(
            "num_parts", type=int, group="masks from parts",
            help="number of parts, the background among them",
        ),
        Flag(
            "mask_lambda", type=float, group="masks from parts",
            help="keep it constant: 1 masks a ratio of each part, 0 whole parts",
        ),
        Flag(
            "mask_lambda_power", type=float, group="masks from parts",
            help="let it fall from 1 to 0 as 1 - t ** POWER",
        ),
    )  # fmt: skip

    def __init__(
        self,
        grid: Pair,
        *,
        mask_ratio: float = 0.75,
        num_parts: int = 7,
        mask_lambda: float | None = None,
        mask_lambda_power: float = 2.0,
        lambda_schedule: str = "power",
        count_fix: str = "parity",
        token_share: float = 1.0,
        token_selection: str = "random",
    ):
        super().__init__(grid, mask_ratio=mask_ratio)
        check_choice("count_fix", count_fix, COUNT_FIXES)
        check_choice("token_selection", token_selection, ("random", "score"))
        if mask_lambda is not None and not 0 <= mask_lambda <= 1:
            raise OptionError("mask_lambda", mask_lambda, "does not lie between 0 and 1")
        patches = self.num_tokens
        self.num_parts = num_parts
        self.count_fix = count_fix
        self.token_selection = token_selection
        self.num_tokens = int(token_share * patches)
        num_visible(self.num_tokens, self.mask_ratio)  # refuses a ratio that cannot be
        self.chooses = self.num_tokens < patches
        by_score = token_selection == "score"
        self.views = ("part_ids", "noise", *(("part_scores",) if by_score else ()))

        # for each token and part, and for the choice of tokens
        self.choice_size = patches if self.chooses and not by_score else 0
        self.noise_size = self.num_tokens + num_parts + self.choice_size
        self.mask_lambda = 1.0 if mask_lambda is None else mask_lambda
        self.schedule = None
        if mask_lambda is None:
            self.schedule = partial(
                mask_lambda_schedule, power=mask_lambda_power, kind=lambda_schedule
            )
            self.before_epoch(0, 1)  # refuses a schedule that cannot be

    def before_epoch(self, epoch: int, epochs: int) -> None:
        if self.schedule is not None:
            self.mask_lambda = float(self.schedule(epoch, epochs))

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        return {"mask_lambda": torch.full_like(loss.detach(), self.mask_lambda)}

    def order(
        self, batch: dict[str, Tensor], noise: Noise = None, attention: Tensor | None = None
    ) -> Tensor:
        """Return the positions int64 [B, L] of the patches that take part, visible ones first.

        `noise` holds the noise for the order of the tokens [B, L], of the parts [B, K], and, where
        tokens are chosen at random, for their choice [B, N]: as a tuple or one after another.
        """
        if isinstance(noise, Tensor):
            noise = noise.split((self.num_tokens, self.num_parts, self.choice_size), dim=1)
        noise_tokens, noise_parts, noise_choice = (*noise, None)[:3]
        chosen = self.choose_tokens(batch, noise_choice)
        parts = batch["part_ids"].flatten(1).long()
        if chosen is not None:
            parts = parts.gather(1, chosen)
        masks = semantic_mask(
            parts, self.mask_ratio, self.mask_lambda, self.num_parts, noise_tokens, noise_parts,
            count_fix=self.count_fix,
        )  # fmt: skip
        return masks.order if chosen is None else chosen.gather(1, masks.order)

    def choose_tokens(self, batch: dict[str, Tensor], noise: Tensor | None) -> Tensor | None:
        """Return positions of the tokens that take part, int64 [B, L]; None: all of them in
        row-major order."""
        if "cells" in batch:
            return batch["cells"]
        if not self.chooses:
            return None
        if self.token_selection == "score":
            order = batch["part_scores"].flatten(1).argsort(dim=1, descending=True, stable=True)
        else:
            order = ascending(noise)
        return order[:, : self.num_tokens]


def stretched(x: Tensor) -> Tensor:
    """Return each row of [B, N] moved and scaled to [0, 1)."""
    low, high = x.aminmax(dim=1, keepdim=True)
    return (x - low) / (high - low + 1e-6)


# by the words of --mask_type
MASKS: dict[str, type[Mask]] = {
    "block": BlockMask,
    "random_mps32": LoaderMask,
    "random": LoaderMask,
    "parts": PartMask,
    "attention_high": AttentionMask,
    "attention_low": LowAttentionMask,
    "none": NoMask,
}


# --------------------------------------------------------------------------------------------------
# Prediction orders


PATCH_ORDERS = (
    "zigzag",
    "raster",
    "stochastic",
    "stochastic_center",
    "center2out",
    "attention",
    "attention_guided",
    "attention_center",
)
ORDERS_WITHOUT_NOISE = ("zigzag", "raster", "attention")
# 1 - softmax over many patches has few distinct values in float32
ORDERS_WITH_TIES = ("attention",)
WINDOW_SIDES = (2, 6, 10)
# the published table of windows is for a 14 x 14 grid, which it takes for one patch smaller
TABLE_SIDE = 14


def patch_order(
    kind: str,
    grid: Pair,
    noise: Tensor | None = None,
    attention: Tensor | None = None,
    center_noise: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return SemAIM's order values float32 [B, N] of a grid's patches: smaller is earlier.

    "zigzag" is row-major and "raster" serpentine, as published; both are [1, N]. Patches with equal
    values are tied: neither precedes the other (docs/methods/semaim.md#orders).

    Args:
        noise: uniform noise [B, N], for all kinds but `ORDERS_WITHOUT_NOISE`.
        attention: attention map [B, N], for the kinds named after it; its first maximum is the
            center.
        center_noise: uniform noise [B, 2] for the row and column of stochastic_center's center.
        device: where the orders are made that depend on the grid alone.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in PATCH_ORDERS:
        raise ValueError(
            f"--permutation_type {kind} is unknown; use one of {', '.join(PATCH_ORDERS)}"
        )
    if kind in ("zigzag", "raster"):
        return row_order(grid, kind == "raster", device or torch.device("cpu"))
    if kind == "stochastic":
        return noise
    if kind == "attention":
        return 1 - attention
    if kind == "center2out":
        return noise - windows_around_middle(grid, noise.device)
    if kind == "stochastic_center":
        # as published, never the last row or column
        center = torch.stack([center_noise[:, k] * (side - 1) for k, side in enumerate(grid)], 1)
        return noise - windows_around(center.long(), grid)

    center = to_coordinates(attention.argmax(1), grid)
    if kind == "attention_guided":
        return noise - windows_around(center, grid)
    return distances_to(center, grid) + 0.001 * noise


@lru_cache(maxsize=32)
def row_order(grid: Pair, serpentine: bool, device: torch.device) -> Tensor:
    """Return the order row by row, [1, N]; `serpentine` reverses every second row.

    Cached, because it is copied to the device.
    """
    order = torch.arange(math.prod(grid), dtype=torch.float32).view(grid)
    if serpentine:
        order[1::2] = order[1::2].flip(1)
    return order.view(1, -1).to(device)


def to_coordinates(indices: Tensor, grid: Pair) -> Tensor:
    """Return row and column, int64 [..., 2], of patch indices [...]."""
    return torch.stack((indices // grid[1], indices % grid[1]), dim=-1)


def grid_coordinates(grid: Pair, device: torch.device) -> Tensor:
    """Return row and column, int64 [N, 2], of every patch of the grid."""
    return to_coordinates(torch.arange(math.prod(grid), device=device), grid)


def distances_to(center: Tensor, grid: Pair) -> Tensor:
    """Return Euclidean distances [B, N], in patches, from a center (row, column) [B, 2]."""
    coordinates = grid_coordinates(grid, center.device)
    return (coordinates - center.unsqueeze(1)).float().square().sum(-1).sqrt()


@lru_cache(maxsize=32)
def windows_around_middle(grid: Pair, device: torch.device) -> Tensor:
    """Return how many of three windows around the grid's middle contain each patch, [1, N]."""
    count = 0
    for width in WINDOW_SIDES:
        start = [side // 2 - width // 2 for side in grid]
        count = count + in_window(torch.tensor([start], device=device), width, grid)
    return count


def windows_around(center: Tensor, grid: Pair) -> Tensor:
    """Return how many of three windows around `center` [B, 2] contain each patch, [B, N].

    Windows are shifted into the grid. One as large as the grid would not distinguish any patches
    and is left out.
    """
    count = torch.zeros(len(center), math.prod(grid), device=center.device)
    for width in WINDOW_SIDES:
        if width < max(grid):
            starts = [
                window_start(c, width, side) for c, side in zip(center.unbind(1), grid, strict=True)
            ]
            count += in_window(torch.stack(starts, 1), width, grid)
    return count


def window_start(center: Tensor, width: int, side: int) -> Tensor:
    """Return the first row (or column) [B] of a window of `width` around `center` [B].

    `side` is the number of rows (or columns) of the grid. On the published grid of 14 the start is
    that of the published table (docs/methods/semaim.md#windows-on-the-grid-of-14).
    """
    if side != TABLE_SIDE:
        return (center - width // 2).clamp(0, max(side - width, 0))
    last = side - 1 - width
    start = (center - width // 2).clamp(0, last)
    if width == WINDOW_SIDES[0]:  # one patch off the border, the table takes the border's window
        start = start.where(start != 1, 0).where(start != last - 1, last)
    return start


def in_window(start: Tensor, width: int, grid: Pair) -> Tensor:
    """Return float32 [B, N]: 1 inside the square window that starts at (row, column) [B, 2]."""
    coordinates = grid_coordinates(grid, start.device)
    first = start.unsqueeze(1)
    inside = (coordinates >= first) & (coordinates < first + width)
    return inside.all(-1).float()


def visible_patches(order: Tensor, *, itself: bool) -> Tensor:
    """Return which tokens (last axis) each token may attend to, bool [B, T, T].

    `order` holds order values [B, N]. The class token attends to itself only and every token
    attends to it. A patch attends to the patches before it; with `itself` also to itself and to
    patches tied with it.
    """
    query, key = order.unsqueeze(2), order.unsqueeze(1)
    earlier = key <= query if itself else key < query
    visible = F.pad(earlier, (1, 0, 1, 0))
    visible[:, :, 0] = True
    return visible
