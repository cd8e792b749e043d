"""Which patches a masked method hides: pure functions of random draws and a grid.

Masks that come with the data (specs/conmim.md, section 3): a generator is called with a
`np.random.Generator` and returns a bool array [grid_h, grid_w], True = masked. Masks that a method
draws on its device (specs/semmae.md, A.3 and B.1): orders of the tokens [B, L], the visible ones
first. Orders in which patches are predicted (specs/semaim.md, 3).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unimim.sizes import Pair, to_pair

MASK_TYPES = ("block", "random", "random_mps32")
BLOCK_MASK_FRACTION = 75 / 14**2  # BEiT hides 75 patches of a 14 x 14 grid
LOG_BLOCK_ASPECT = math.log(1 / 0.3)  # aspects are log-uniform from 0.3 to 1 / 0.3
BLOCK_ATTEMPTS = 10

MaskGenerator = Callable[[np.random.Generator], np.ndarray]


class BlockwiseMask:
    """BEiT's rectangles of random area and aspect, added until `num_mask_patches` are hidden or
    none fits any more.

    The count never exceeds the target and may stay a little below it; a rectangle is strictly
    smaller than the grid in both directions. Where no rectangle fitted at all (tiny grids; the
    published code returns an empty mask, whose loss is undefined) the target count of single
    patches is hidden instead.

    Args:
        grid: patches (height, width).
        num_mask_patches: the target count.
        min_block, max_block: bounds of a rectangle's area in patches; `max_block` None means the target.
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
        self.grid, self.target = grid, num_mask_patches
        self.min_block, self.max_block = min_block, max_block or num_mask_patches

    @property
    def most(self) -> int:
        """How many patches a mask hides at most."""
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
        """Place one rectangle that hides 1 to `limit` new patches; the number it hides, 0 if every
        attempt failed."""
        rows, columns = mask.shape
        for area_draw, aspect_draw, top_draw, left_draw in rng.random((BLOCK_ATTEMPTS, 4)).tolist():
            # the published bounds are used as given, also when the minimum exceeds the limit
            area = self.min_block + (limit - self.min_block) * area_draw
            aspect = math.exp(LOG_BLOCK_ASPECT * (2 * aspect_draw - 1))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(top_draw * (rows - height + 1)), int(left_draw * (columns - width + 1))
            block = mask[top : top + height, left : left + width]
            new = block.size - int(np.count_nonzero(block))
            if 0 < new <= limit:
                block[...] = True
                return new
        return 0


class RandomMask:
    """Exactly floor(mask_ratio * patches) patches, chosen uniformly."""

    def __init__(self, grid: Pair, mask_ratio: float):
        _check_ratio(mask_ratio)
        self.grid = grid
        self.count = int(mask_ratio * grid[0] * grid[1])
        _check_count(self.count, grid, "--mask_ratio")

    @property
    def most(self) -> int:
        return self.count

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return _choose(self.grid, self.count, rng)


class SimMIMMask:
    """ceil(mask_ratio * cells) square cells of `cell` x `cell` patches, chosen uniformly and
    aligned to a cell grid."""

    def __init__(self, grid: Pair, mask_ratio: float, cell: int = 2):
        self.cells, self.cell = (grid[0] // cell, grid[1] // cell), cell
        self.count = math.ceil(self.cells[0] * self.cells[1] * mask_ratio)

    @property
    def most(self) -> int:
        return self.count * self.cell**2

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return self.first_of(rng.permutation(math.prod(self.cells)))

    def first_of(self, order: np.ndarray) -> np.ndarray:
        """The mask whose cells come first in `order`, a permutation of all cells."""
        return (
            _first(self.cells, self.count, order)
            .repeat(self.cell, axis=0)
            .repeat(self.cell, axis=1)
        )


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
    """The generator of `--mask_type` for images of `input_size` pixels (an int or (height, width)).

    `num_mask_patches` None scales BEiT's 75 of 196 to the grid; `mask_patch_size` None is two
    patches (SimMIM's 32 pixels for 16-pixel patches). A block's minimum is lowered to the target
    where it exceeds it (small grids).

    Raises:
        ValueError: unknown type, sizes that do not divide, or a mask that would hide nothing or everything.
    """
    grid = _grid(input_size, patch_size, "--patch_size")
    if mask_type == "random":
        return RandomMask(grid, mask_ratio)
    if mask_type == "random_mps32":
        _check_ratio(mask_ratio)
        generator = SimMIMMask(grid, mask_ratio, _cell(input_size, patch_size, mask_patch_size))
        _check_count(generator.count, generator.cells, "--mask_ratio")
        return generator
    if mask_type == "block":
        target = (
            int(grid[0] * grid[1] * BLOCK_MASK_FRACTION)
            if num_mask_patches is None
            else num_mask_patches
        )
        return BlockwiseMask(
            grid, target, min(min_mask_patches_per_block, target), max_mask_patches_per_block
        )
    raise ValueError(f"--mask_type is '{mask_type}'; it must be one of {', '.join(MASK_TYPES)}")


def _grid(input_size: int | Pair, cell_size: int | Pair, flag: str) -> Pair:
    """Cells of `cell_size` pixels in an image of `input_size` pixels, which they must fill
    exactly."""
    (height, width), (cell_h, cell_w) = to_pair(input_size), to_pair(cell_size)
    if cell_h < 1 or cell_w < 1 or height % cell_h or width % cell_w:
        raise ValueError(
            f"--input_size {height}x{width} is not a multiple of {flag} {cell_h}x{cell_w}"
        )
    return height // cell_h, width // cell_w


def _cell(input_size: int | Pair, patch_size: int | Pair, mask_patch_size: int | None) -> int:
    """Patches along the side of one SimMIM cell."""
    patch_h, patch_w = to_pair(patch_size)
    side = 2 * patch_h if mask_patch_size is None else mask_patch_size
    if patch_h != patch_w or side % patch_h:
        raise ValueError(
            f"--mask_patch_size {side} is not a multiple of a square --patch_size ({patch_h}x{patch_w})"
        )
    _grid(input_size, side, "--mask_patch_size")
    return side // patch_h


def _choose(grid: Pair, count: int, rng: np.random.Generator) -> np.ndarray:
    return _first(grid, count, rng.permutation(math.prod(grid)))


def _first(grid: Pair, count: int, order: np.ndarray) -> np.ndarray:
    mask = np.zeros(grid, dtype=bool)
    mask.reshape(-1)[order[:count]] = True
    return mask


def _check_ratio(mask_ratio: float) -> None:
    if not 0 < mask_ratio < 1:
        raise ValueError(
            f"--mask_ratio is {mask_ratio}; it must lie between 0 and 1, both excluded"
        )


def _check_count(count: int, grid: Pair, flag: str) -> None:
    cells = grid[0] * grid[1]
    if not 0 < count < cells:
        raise ValueError(
            f"{flag} hides {count} of {cells} cells ({grid[0]}x{grid[1]}); hide at least 1, leave 1 visible"
        )


# --------------------------------------------------------------------------------------------------
# Orders of tokens


COUNT_FIXES = ("parity", "apportion")
LAMBDA_SCHEDULES = ("power", "increasing", "cosine")


def num_visible(tokens: int, mask_ratio: float) -> int:
    """How many of `tokens` stay visible: truncated in double precision, as published (19 of 100 at
    a ratio of 0.8).

    Raises:
        ValueError: none or all of them.
    """
    _check_ratio(mask_ratio)
    visible = int(tokens * (1 - mask_ratio))
    if not 0 < visible < tokens:
        raise ValueError(
            f"--mask_ratio {mask_ratio} leaves {visible} of {tokens} patches visible; leave at least 1"
        )
    return visible


def mask_lambda_schedule(
    epoch: np.ndarray | float, epochs: int, power: float = 2.0, kind: str = "power"
) -> np.ndarray | float:
    """SemMAE's weight of intra-part against inter-part masking in `epoch`, from 0, of `epochs`
    (specs/semmae.md B.2).

    kind: "power" falls as 1 - t ** power to 0 in the last epoch, "cosine" falls too, "increasing"
    is t; t is the share of epochs begun. Clipped to [0, 1], which the published code, made for 800
    epochs, leaves when it trains longer.

    Raises:
        ValueError: an unknown kind, or a power that is not positive.
    """
    if kind not in LAMBDA_SCHEDULES:
        raise ValueError(
            f"mask_lambda_schedule={kind} is unknown; take one of {', '.join(LAMBDA_SCHEDULES)}"
        )
    if power <= 0:
        raise ValueError(f"--mask_lambda_power is {power}; it must be positive")
    share = (epoch + 1) / epochs
    value = {
        "power": 1 - share**power,
        "increasing": share,
        "cosine": (1 + np.cos(np.pi * share)) / 2,
    }[kind]
    return np.clip(value, 0.0, 1.0)


@dataclass(frozen=True)
class SemanticMask:
    """What `semantic_mask` found, for B images of L tokens in K parts.

    order: int64 [B, L], the tokens, visible ones first, in the order in which the encoder takes
    them. visible: how many of them are. shuffle: int64 [B, L], the random order of the tokens;
    part_order: int64 [B, K], that of the parts. intra, inter, count: float32 [B, K], tokens to mask
    of each part: its share, whole parts, and what lies between. selected: bool [B, L], the choice
    by `count`, in shuffled order; the masked tokens if `count` adds up exactly.
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
        """float32 [B, L] in the order of the tokens, 1 = masked."""
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
    """SemMAE's masks from the parts of an image's tokens (specs/semmae.md B.1).

    With `mask_lambda` 1 a share `mask_ratio` of every part is hidden, with 0 whole parts one after
    another until the budget is spent, in between the rounded mean of the two counts. A part hides
    its first tokens in a random order. Rounding leaves the sum of the counts a few tokens off.
    count_fix "parity": as published, a surplus comes back from the front of the random order and a
    lack is filled from its end; "apportion": the exact sum is divided among the parts by largest
    remainders, so that there is nothing to mend.

    Args:
        part_ids: integers [B, L], each below `num_parts`; parts may be empty.
        mask_ratio, mask_lambda: shares; `mask_lambda` is clipped to [0, 1].
        noise_tokens, noise_parts: [B, L] and [B, K], drawn uniformly in this order where not given; their ascending
            orders are the random orders.

    Raises:
        ValueError: an unknown `count_fix`, or a ratio that hides nothing or everything.
    """
    if count_fix not in COUNT_FIXES:
        raise ValueError(f"count_fix={count_fix} is unknown; take one of {', '.join(COUNT_FIXES)}")
    images, tokens = part_ids.shape
    visible, mask_lambda = num_visible(tokens, mask_ratio), min(max(float(mask_lambda), 0.0), 1.0)
    if noise_tokens is None:
        noise_tokens = torch.rand(images, tokens, device=part_ids.device)
    if noise_parts is None:
        noise_parts = torch.rand(images, num_parts, device=part_ids.device)
    shuffle, part_order = ascending(noise_tokens), ascending(noise_parts)

    shuffled = part_ids.long().gather(1, shuffle)
    rank, sizes = rank_in_part(shuffled, num_parts)
    intra = (sizes * mask_ratio).round()  # half to even, in float32, as published
    inter = whole_parts_first(sizes, tokens * mask_ratio, part_order)
    if count_fix == "parity":
        count = (mask_lambda * intra + (1 - mask_lambda) * inter).round()
    else:
        wanted = mask_lambda * mask_ratio * sizes.double() + (1 - mask_lambda) * inter
        count = apportion(wanted, sizes, tokens - visible, part_order)
    selected = rank < count.gather(1, shuffled)
    order = shuffle.gather(1, others_first(selected))
    return SemanticMask(order, visible, shuffle, part_order, intra, inter, count, selected)


def ascending(noise: Tensor) -> Tensor:
    """Positions int64 [B, L] in ascending order of noise [B, L], of equal ones the first one first.

    numpy's sort takes a sixth of torch's time, and a fifth of its own stable form's, which only
    ties need.
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
    """Of parts int64 [B, L]: how many tokens of the same part come before each [B, L], and the
    sizes [B, K] float32."""
    members = (
        parts.unsqueeze(1) == torch.arange(num_parts, device=parts.device)[:, None]
    )  # [B, K, L]
    before = members.cumsum(2, dtype=torch.int32)
    return before.gather(1, parts.unsqueeze(1)).squeeze(1) - 1, before[..., -1].float()


def whole_parts_first(sizes: Tensor, budget: float, part_order: Tensor) -> Tensor:
    """Tokens [B, K] that a budget takes from parts of these sizes, which are emptied in
    `part_order`."""
    ordered = sizes.gather(1, part_order)
    before = ordered.cumsum(1) - ordered
    taken = (budget - before).trunc().clamp(min=0).minimum(ordered)
    return torch.empty_like(taken).scatter_(1, part_order, taken)


def apportion(wanted: Tensor, sizes: Tensor, total: int, part_order: Tensor) -> Tensor:
    """Whole numbers [B, K] near `wanted`, none above its size, that add up to `total`: by largest
    remainders.

    Equal remainders are served in `part_order`. `wanted` adds up to less than two short of `total`,
    so that no part needs more than two tokens beyond its whole ones.
    """
    wanted, sizes = wanted.gather(1, part_order), sizes.gather(1, part_order)
    whole = wanted.floor()
    offers = torch.stack(
        [wanted - whole, wanted - whole - 1], 1
    )  # [B, 2, K]: the first token more, and the second
    room = whole.unsqueeze(1) + torch.arange(1, 3, device=sizes.device)[:, None] <= sizes.unsqueeze(
        1
    )
    ranked = (
        offers.masked_fill(~room, -math.inf).flatten(1).argsort(dim=1, descending=True, stable=True)
    )
    lacking = total - whole.sum(1, keepdim=True)
    served = torch.arange(ranked.shape[1], device=sizes.device) < lacking
    extra = torch.zeros_like(ranked).scatter_(1, ranked, served.long()).view_as(offers).sum(1)
    return torch.empty_like(sizes).scatter_(1, part_order, (whole + extra).to(sizes.dtype))


def others_first(selected: Tensor) -> Tensor:
    """Positions int64 [B, L] of what is not selected, then of what is, each in order: a stable
    sort, in linear time."""
    behind = selected.cumsum(1)
    ahead = torch.arange(1, selected.shape[1] + 1, device=selected.device) - behind
    place = torch.where(selected, ahead[:, -1:] + behind, ahead) - 1
    return torch.empty_like(place).scatter_(
        1, place, torch.arange(place.shape[1], device=place.device).expand_as(place)
    )


# --------------------------------------------------------------------------------------------------
# Orders in which patches are predicted


PATCH_ORDERS = (
    "zigzag", "raster", "stochastic", "stochastic_center", "center2out", "attention", "attention_guided",
    "attention_center",
)  # fmt: skip
ORDERS_WITHOUT_NOISE = ("zigzag", "raster", "attention")
ORDERS_WITH_TIES = ("attention",)  # of 1 - softmax over many patches float32 tells few values apart
WINDOW_SIDES = (2, 6, 10)
TABLE_SIDE = (
    14  # the published table of windows is for this grid, and takes it for one patch smaller
)


def patch_order(
    kind: str,
    grid: Pair,
    noise: Tensor | None = None,
    attention: Tensor | None = None,
    center_noise: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """SemAIM's order values float32 [B, N] of a grid's patches: smaller is earlier (specs/semaim.md
    3.2).

    "zigzag" is row-major and "raster" serpentine, as published; both are [1, N]. Equal values are
    ties: such patches are neither before nor behind each other.

    Args:
        noise: uniform draws [B, N], for all but `ORDERS_WITHOUT_NOISE`.
        attention: a map [B, N], for the orders that are called so; its first maximum is the center.
        center_noise: uniform draws [B, 2] for the row and column of stochastic_center's center.
        device: of the orders that follow from the grid alone.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in PATCH_ORDERS:
        raise ValueError(
            f"--permutation_type {kind} is unknown; take one of {', '.join(PATCH_ORDERS)}"
        )
    if kind in ("zigzag", "raster"):
        return rows_one_by_one(grid, kind == "raster", device or torch.device("cpu"))
    if kind == "stochastic":
        return noise
    if kind == "attention":
        return 1 - attention
    if kind == "center2out":
        return noise - windows_around_middle(grid, noise.device)
    if kind == "stochastic_center":
        center = torch.stack(
            [center_noise[:, k] * (side - 1) for k, side in enumerate(grid)], 1
        )  # never the last
        return noise - windows_around(center.long(), grid)
    center = cells_to_places(attention.argmax(1), grid)
    if kind == "attention_guided":
        return noise - windows_around(center, grid)
    return distances_to(center, grid) + 0.001 * noise


@lru_cache(maxsize=32)
def rows_one_by_one(grid: Pair, serpentine: bool, device: torch.device) -> Tensor:
    """Row after row, [1, N]; if `serpentine`, every second one backwards. Made once: it is copied
    to the device."""
    order = torch.arange(math.prod(grid), dtype=torch.float32).view(grid)
    if serpentine:
        order[1::2] = order[1::2].flip(1)
    return order.view(1, -1).to(device)


def cells_to_places(cells: Tensor, grid: Pair) -> Tensor:
    """Row and column, int64 [..., 2], of cells [...]."""
    return torch.stack((cells // grid[1], cells % grid[1]), dim=-1)


def distances_to(center: Tensor, grid: Pair) -> Tensor:
    """Euclidean distances [B, N], in patches, to places [B, 2]."""
    places = cells_to_places(torch.arange(math.prod(grid), device=center.device), grid)
    return (places - center.unsqueeze(1)).float().square().sum(-1).sqrt()


@lru_cache(maxsize=32)
def windows_around_middle(grid: Pair, device: torch.device) -> Tensor:
    """How many of three windows around the middle of the grid hold each patch, [1, N]; made
    once."""
    starts = [[side // 2 - width // 2 for side in grid] for width in WINDOW_SIDES]
    return sum(
        in_window(torch.tensor([start], device=device), width, grid)
        for start, width in zip(starts, WINDOW_SIDES, strict=True)
    )


def windows_around(center: Tensor, grid: Pair) -> Tensor:
    """How many of three windows hold each patch, [B, N]; they lie around places [B, 2], moved into
    the grid.

    A window as large as the grid would be the same for every patch and is left out.
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
    """First row (or column) of a window of `width` around `center`, both int64 [B], in a grid of
    `side` of them."""
    if side != TABLE_SIDE:
        return (center - width // 2).clamp(0, max(side - width, 0))
    last = side - 1 - width
    start = (center - width // 2).clamp(0, last)
    if width == WINDOW_SIDES[0]:  # next to the border, the table takes the window at the border
        start = start.where(start != 1, 0).where(start != last - 1, last)
    return start


def in_window(start: Tensor, width: int, grid: Pair) -> Tensor:
    """1 for each patch inside the square window of `width` whose first row and column are start [B,
    2]: [B, N]."""
    places = cells_to_places(torch.arange(math.prod(grid), device=start.device), grid)
    inside = (places >= start.unsqueeze(1)) & (places < start.unsqueeze(1) + width)
    return inside.all(-1).float()


def visible_patches(order: Tensor, *, itself: bool) -> Tensor:
    """Which tokens (last axis) each token may attend to under order values [B, N]: bool [B, T, T].

    The class token sees itself only and is seen by all. A patch sees those before it in the order;
    with `itself` also itself and those level with it.
    """
    mine, theirs = order.unsqueeze(2), order.unsqueeze(1)
    earlier = theirs <= mine if itself else theirs < mine
    visible = F.pad(earlier, (1, 0, 1, 0))
    visible[:, :, 0] = True
    return visible
