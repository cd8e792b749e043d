"""Resizes position embeddings and relative position bias tables to another grid."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unimim.sizes import to_pair


def interpolate_rel_pos_bias(
    table: Tensor,
    src_window: int | tuple[int, int],
    dst_window: int | tuple[int, int],
    num_extra: int = 3,
) -> Tensor:
    """Resize a relative position table for another window, at BEiT's geometric positions.

    `table` is [(2 h - 1) (2 w - 1) + num_extra, heads] for a window of h x w patches; an int means
    a square. Along each axis the rows are put at the geometrically spaced `source_coordinates`, a
    not-a-knot cubic spline (of lower degree through fewer than four points) is laid through them in
    float64, and read at the whole offsets of the new window, clamped to the source's range. The
    last `num_extra` rows are copied. Returns the table's dtype.
    """
    src, dst = to_pair(src_window), to_pair(dst_window)
    if src == dst:
        return table
    offsets, extra = table.detach().split([table.shape[0] - num_extra, num_extra])
    values = offsets.cpu().double().numpy().reshape(2 * src[0] - 1, 2 * src[1] - 1, -1)
    for axis in (0, 1):
        values = resample(values, axis, src[axis], dst[axis])
    return torch.cat([torch.from_numpy(values).flatten(0, 1).to(table), extra])


def geometric_ratio(src_window: int, dst_window: int) -> float:
    """Return the ratio q in [1.01, 1.5] for which 1 + q + q^2 + ... comes nearest to dst_window -
    1.

    The sum has src_window - 1 terms.

    The last midpoint of a bisection down to 1e-6, as published.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (src_window - 1)) / (1 - ratio) > dst_window - 1:
            high = ratio
        else:
            low = ratio
    return ratio


def source_coordinates(src_window: int, ratio: float) -> np.ndarray:
    """Return 0, +-1, +-(1 + q), +-(1 + q + q^2), ... in ascending order: float64 [2 * src_window -
    1]."""
    positive = np.cumsum(ratio ** np.arange(src_window - 1))
    return np.concatenate([-positive[::-1], [0.0], positive])


def interpolate_pos_embed(
    pos_embed: Tensor, dst_grid: int | tuple[int, int], num_prefix: int
) -> Tensor:
    """Resize absolute positions [1, num_prefix + g * g, C] to a grid of patches, bicubic.

    The prefix rows (class token) are copied. Returns [1, num_prefix + dst_h * dst_w, C] in the
    dtype of `pos_embed`.
    """
    dst = to_pair(dst_grid)
    prefix, patches = pos_embed.detach().split([num_prefix, pos_embed.shape[1] - num_prefix], dim=1)
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise ValueError(
            f"pos_embed of {patches.shape[1]} patches is not of a square grid and cannot be resized"
        )
    if dst == (side, side):
        return pos_embed
    grid = patches.float().transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(grid, size=dst, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2).to(prefix)], dim=1)


def resample(values: np.ndarray, axis: int, src_window: int, dst_window: int) -> np.ndarray:
    """Read one axis of offsets, 2 * src_window - 1, at those of another window; linear in
    `values`."""
    if src_window == dst_window:
        return values
    from scipy.interpolate import make_interp_spline  # late: most runs resize nothing

    coordinates = source_coordinates(src_window, geometric_ratio(src_window, dst_window))
    targets = np.arange(1 - dst_window, dst_window).clip(coordinates[0], coordinates[-1])
    return make_interp_spline(coordinates, values, k=min(3, len(coordinates) - 1), axis=axis)(
        targets
    )
