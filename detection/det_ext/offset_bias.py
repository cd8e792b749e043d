"""Apply relative position tables, without rows for a class token, to maps of any size.

A table [(2 s - 1)^2, h] holds a bias for each offset of up to s - 1 rows and columns; larger
offsets have the bias of the largest. Offsets are query position minus key position, row-major, as
in `relative_position_index`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def side_of(table: Tensor) -> int:
    """Return the side s of the map that a table [(2 s - 1)^2, h] was made for."""
    side = (math.isqrt(len(table)) + 1) // 2
    assert (2 * side - 1) ** 2 == len(table), "a table without class rows, of a square map"
    return side


def bias_of_map(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the bias [h, L, L] between all positions of a map, as windows of the table."""
    side = side_of(table)
    offsets = table.T.unflatten(1, (2 * side - 1, 2 * side - 1))  # [h, dy, dx]
    rows, columns = grid
    offsets = fit_offsets(fit_offsets(offsets, 1, rows), 2, columns)
    # query y has keys 0 ... rows - 1 at offsets y ... y - rows + 1: a window of the reversed table
    windows = offsets.flip(1, 2).unfold(1, rows, 1).unfold(2, columns, 1)
    windows = windows.flip(1, 2)  # [h, y, x, key y, key x]
    return windows.flatten(3).flatten(1, 2)


def fit_offsets(offsets: Tensor, axis: int, size: int) -> Tensor:
    """Crop [h, dy, dx] to offsets of up to size - 1 along an axis, or repeat the largest ones."""
    more = size - (offsets.shape[axis] + 1) // 2
    if more <= 0:
        return offsets.narrow(axis, -more, 2 * size - 1)
    return F.pad(offsets, (more, more, 0, 0) if axis == 2 else (0, 0, more, more), mode="replicate")


def bias_between(table: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the bias [B, h, K, K] between the patches `cells`, int64 [B, K], of a map.

    These are rows and columns of `bias_of_map`.
    """
    reach = side_of(table) - 1
    row = cells // grid[1]
    column = cells % grid[1]
    dy = (row[:, :, None] - row[:, None]).clamp(-reach, reach) + reach
    dx = (column[:, :, None] - column[:, None]).clamp(-reach, reach) + reach
    return table[dy * (2 * reach + 1) + dx].permute(0, 3, 1, 2)


class OffsetBias(nn.Module):
    """A table shared by several blocks, initially zero; forward() returns its bias [h, L, L]."""

    def __init__(self, side: int, num_heads: int):
        super().__init__()
        self.side = side
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * side - 1) ** 2, num_heads)
        )

    def forward(self) -> Tensor:
        return bias_of_map(self.relative_position_bias_table, (self.side, self.side))
