"""Attention as numbers: where class tokens and patches look, and whether there are the objects.

Shapes: B images, h heads, n class tokens, N = gh * gw patches, T = n + N tokens, class tokens
first; Q queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[int, int]


def query_maps(attention: Tensor, num_cls: int, grid: Pair, rows: Sequence[int]) -> Tensor:
    """Return the attention of the tokens `rows` to the patches, [..., Q, h, gh, gw], from
    attention [..., h, T, T].

    The fraction that goes to class tokens is dropped and the rest not scaled up.
    """
    return attention[..., list(rows), num_cls:].transpose(-3, -2).unflatten(-1, grid)


def class_maps(attention: Tensor, num_cls: int, grid: Pair) -> Tensor:
    """Return the attention of each class token to the patches, mean over heads: [..., n, gh,
    gw]."""
    return query_maps(attention, num_cls, grid, range(num_cls)).mean(-3)


def patch_maps(
    attention: Tensor, num_cls: int, grid: Pair, cells: Sequence[int], *, reduce_mean: bool = False
) -> Tensor:
    """Return the attention of the patches in `cells` to all patches, mean over heads: [..., Q, gh,
    gw].

    `reduce_mean` takes away what the class tokens see on average. ValueError: a cell beyond the
    grid.
    """
    check_cells(cells, grid)
    maps = query_maps(attention, num_cls, grid, [num_cls + cell for cell in cells]).mean(-3)
    return (
        maps - class_maps(attention, num_cls, grid).mean(-3, keepdim=True) if reduce_mean else maps
    )


def check_cells(cells: Sequence[int], grid: Pair) -> None:
    """Raise a ValueError for a patch index beyond the grid."""
    if outside := [cell for cell in cells if not 0 <= cell < grid[0] * grid[1]]:
        raise ValueError(
            f"--token_indices {outside} lie beyond the grid of {grid[0]} x {grid[1]} patches"
        )


# --------------------------------------------------------------------------------------------------
# Agreement with masks

# Maps are compared as they are drawn: each patch's value for all of its pixels. So an object is the
# fraction of each patch's pixels that belongs to it, in [0, 1].


def patch_fractions(masks: Tensor, grid: Pair) -> Tensor:
    """Return the fraction of each patch's pixels that masks bool [..., H, W] cover: [..., N]."""
    height, width = (side // cells for side, cells in zip(masks.shape[-2:], grid, strict=True))
    cut = (
        masks.float().unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    )  # [..., gh, ph, gw, pw]
    return cut.mean((-3, -1)).flatten(-2)


def pixel_auc(maps: Tensor, fractions: Tensor) -> Tensor:
    """Return how often a pixel of the object has a larger value than one outside, ties counting
    half; chance: 0.5.

    Maps and fractions [..., N] to [...]; nan where there are no pixels of either kind.
    """
    larger = (maps.unsqueeze(-1) > maps.unsqueeze(-2)).to(fractions.dtype)
    ties = (maps.unsqueeze(-1) == maps.unsqueeze(-2)).to(fractions.dtype)
    outside = 1 - fractions
    won = torch.einsum("...i,...ij,...j->...", fractions, larger + 0.5 * ties, outside)
    return won / (fractions.sum(-1) * outside.sum(-1))


def best_iou(maps: Tensor, fractions: Tensor) -> Tensor:
    """Return the largest intersection over union that any threshold of maps [..., N] reaches:
    [...].

    nan where there is no object.
    """
    above = (maps.unsqueeze(-2) >= maps.unsqueeze(-1)).to(fractions.dtype)  # [..., thresholds, N]
    hits = (above @ fractions.unsqueeze(-1)).squeeze(-1)
    wanted = fractions.sum(-1, keepdim=True)
    found = (hits / (above.sum(-1) + wanted - hits)).amax(-1)
    return torch.where(wanted.squeeze(-1) > 0, found, torch.nan)


def pointing(maps: Tensor, fractions: Tensor) -> Tensor:
    """Return the object's fraction of the patch with the largest value: [..., N] to [...].

    Chance: the object's fraction of the image.
    """
    return fractions.gather(-1, maps.argmax(-1, keepdim=True)).squeeze(-1)
