"""Which patches a masked method hides: pure functions of a generator and a grid (specs/conmim.md, section 3).

Every generator is called with a `np.random.Generator` and returns a bool array [grid_h, grid_w], True = masked.
"""

import math
from collections.abc import Callable

import numpy as np

MASK_TYPES = ("block", "random", "random_mps32")
BLOCK_MASK_FRACTION = 75 / 14**2  # BEiT hides 75 patches of a 14 x 14 grid
LOG_BLOCK_ASPECT = math.log(1 / 0.3)  # aspects are log-uniform from 0.3 to 1 / 0.3
BLOCK_ATTEMPTS = 10

Pair = tuple[int, int]
MaskGenerator = Callable[[np.random.Generator], np.ndarray]


def as_pair(size: int | tuple[int, int] | list[int]) -> Pair:
    """(height, width) of a size that is given as one number or as two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


class BlockwiseMask:
    """BEiT's rectangles of random area and aspect, added until `num_mask_patches` are hidden or none fits any more.

    The count never exceeds the target and may stay a little below it; a rectangle is strictly smaller than the grid
    in both directions. Where no rectangle fitted at all (tiny grids; the published code returns an empty mask, whose
    loss is undefined) the target count of single patches is hidden instead.

    Args:
        grid: patches (height, width).
        num_mask_patches: the target count.
        min_block, max_block: bounds of a rectangle's area in patches; `max_block` None means the target.
    """

    def __init__(self, grid: Pair, num_mask_patches: int, min_block: int = 16, max_block: int | None = None):
        _check_count(num_mask_patches, grid, "--num_mask_patches")
        for name, size in (("min", min_block), ("max", max_block)):
            if size is not None and size < 1:
                raise ValueError(f"--{name}_mask_patches_per_block is {size}; a block has at least 1 patch")
        self.grid, self.target = grid, num_mask_patches
        self.min_block, self.max_block = min_block, max_block or num_mask_patches

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
        """Place one rectangle that hides 1 to `limit` new patches; the number it hides, 0 if every attempt failed."""
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

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return _choose(self.grid, self.count, rng)


class SimMIMMask:
    """ceil(mask_ratio * cells) square cells of `cell` x `cell` patches, chosen uniformly and aligned to a cell grid."""

    def __init__(self, grid: Pair, mask_ratio: float, cell: int = 2):
        _check_ratio(mask_ratio)
        self.cells, self.cell = (grid[0] // cell, grid[1] // cell), cell
        self.count = math.ceil(self.cells[0] * self.cells[1] * mask_ratio)
        _check_count(self.count, self.cells, "--mask_ratio")

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return _choose(self.cells, self.count, rng).repeat(self.cell, axis=0).repeat(self.cell, axis=1)


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

    `num_mask_patches` None scales BEiT's 75 of 196 to the grid; `mask_patch_size` None is two patches (SimMIM's 32
    pixels for 16-pixel patches). A block's minimum is lowered to the target where it exceeds it (small grids).

    Raises:
        ValueError: unknown type, sizes that do not divide, or a mask that would hide nothing or everything.
    """
    grid = _grid(input_size, patch_size, "--patch_size")
    if mask_type == "random":
        return RandomMask(grid, mask_ratio)
    if mask_type == "random_mps32":
        return SimMIMMask(grid, mask_ratio, _cell(input_size, patch_size, mask_patch_size))
    if mask_type == "block":
        target = int(grid[0] * grid[1] * BLOCK_MASK_FRACTION) if num_mask_patches is None else num_mask_patches
        return BlockwiseMask(grid, target, min(min_mask_patches_per_block, target), max_mask_patches_per_block)
    raise ValueError(f"--mask_type is '{mask_type}'; it must be one of {', '.join(MASK_TYPES)}")


def _grid(input_size: int | Pair, cell_size: int | Pair, flag: str) -> Pair:
    """Cells of `cell_size` pixels in an image of `input_size` pixels, which they must fill exactly."""
    (height, width), (cell_h, cell_w) = as_pair(input_size), as_pair(cell_size)
    if cell_h < 1 or cell_w < 1 or height % cell_h or width % cell_w:
        raise ValueError(f"--input_size {height}x{width} is not a multiple of {flag} {cell_h}x{cell_w}")
    return height // cell_h, width // cell_w


def _cell(input_size: int | Pair, patch_size: int | Pair, mask_patch_size: int | None) -> int:
    """Patches along the side of one SimMIM cell."""
    patch_h, patch_w = as_pair(patch_size)
    side = 2 * patch_h if mask_patch_size is None else mask_patch_size
    if patch_h != patch_w or side % patch_h:
        raise ValueError(f"--mask_patch_size {side} is not a multiple of a square --patch_size ({patch_h}x{patch_w})")
    _grid(input_size, side, "--mask_patch_size")
    return side // patch_h


def _choose(grid: Pair, count: int, rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros(grid, dtype=bool)
    mask.reshape(-1)[rng.permutation(mask.size)[:count]] = True
    return mask


def _check_ratio(mask_ratio: float) -> None:
    if not 0 < mask_ratio < 1:
        raise ValueError(f"--mask_ratio is {mask_ratio}; it must lie between 0 and 1, both excluded")


def _check_count(count: int, grid: Pair, flag: str) -> None:
    cells = grid[0] * grid[1]
    if not 0 < count < cells:
        raise ValueError(
            f"{flag} hides {count} of {cells} cells ({grid[0]}x{grid[1]}); hide at least 1, leave 1 visible"
        )
