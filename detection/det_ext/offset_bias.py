"""Relative position tables of maps of any size, without rows for a class token.

A table [(2 s - 1)^2, h] holds a bias for each offset of up to s - 1 rows and columns; an offset
that is farther has the bias of the farthest. Offsets are the query's place minus the key's,
row-major, as in `relative_position_index`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def side_of(table: Tensor) -> int:
    """s, the side of the map whose every offset a table [(2 s - 1)^2, h] holds."""
    side = (math.isqrt(len(table)) + 1) // 2
    assert (2 * side - 1) ** 2 == len(table), "a table without class rows, of a square map"
    return side


def bias_of_map(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bias [h, L, L] between all cells of a map (rows, columns); windows of the table, no index."""
    side = side_of(table)
    offsets = table.T.unflatten(1, (2 * side - 1, 2 * side - 1))  # [h, dy, dx]
    rows, columns = grid
    offsets = fit_offsets(fit_offsets(offsets, 1, rows), 2, columns)
    # query y reaches keys 0 ... rows - 1 at offsets y ... y - rows + 1: a window of the reversed
    # table
    windows = (
        offsets.flip(1, 2).unfold(1, rows, 1).unfold(2, columns, 1).flip(1, 2)
    )  # [h, y, x, key y, key x]
    return windows.flatten(3).flatten(1, 2)


def fit_offsets(offsets: Tensor, axis: int, size: int) -> Tensor:
    """[h, dy, dx] with offsets of up to size - 1 along the axis: cut, or the farthest ones
    repeated."""
    more = size - (offsets.shape[axis] + 1) // 2
    if more <= 0:
        return offsets.narrow(axis, -more, 2 * size - 1)
    return F.pad(offsets, (more, more, 0, 0) if axis == 2 else (0, 0, more, more), mode="replicate")


def bias_between(table: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bias [B, h, K, K] between the cells int64 [B, K] of a map: the rows and columns of
    `bias_of_map` for them."""
    reach = side_of(table) - 1
    dy, dx = (
        (axis[:, :, None] - axis[:, None]).clamp(-reach, reach) + reach
        for axis in (cells // grid[1], cells % grid[1])
    )
    return table[dy * (2 * reach + 1) + dx].permute(0, 3, 1, 2)


class OffsetBias(nn.Module):
    """One table for several blocks, at first zero: forward() gives the bias [h, L, L] of its
    map."""

    def __init__(self, side: int, num_heads: int):
        super().__init__()
        self.side = side
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * side - 1) ** 2, num_heads)
        )

    def forward(self) -> Tensor:
        return bias_of_map(self.relative_position_bias_table, (self.side, self.side))
