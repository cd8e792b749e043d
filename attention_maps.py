"""Pictures of attention as numbers: where class tokens and single patches look (specs/semanticmim.md 6).

Shapes: h heads, n class tokens, N = gh * gw patches, T = n + N tokens, class tokens first.
"""

from torch import Tensor


def class_maps(attention: Tensor, num_cls: int, grid: tuple[int, int]) -> Tensor:
    """Attention [h, T, T] of one image to what each class token sees of the patches, mean over heads: [n, gh, gw]."""
    return attention[:, :num_cls, num_cls:].mean(0).unflatten(-1, grid)


def patch_maps(
    attention: Tensor, num_cls: int, grid: tuple[int, int], cells: list[int], *, reduce_mean: bool = False
) -> Tensor:
    """Attention [h, T, T] to what the patches in `cells` see of all patches, mean over heads: [len(cells), gh, gw].

    The share that goes to class tokens is dropped and the rest not scaled up. `reduce_mean` takes away what the class
    tokens see on average. ValueError: a cell beyond the grid.
    """
    if outside := [cell for cell in cells if not 0 <= cell < grid[0] * grid[1]]:
        raise ValueError(f"--token_indices {outside} lie beyond the grid of {grid[0]} x {grid[1]} patches")
    rows = [num_cls + cell for cell in cells]
    maps = attention[:, rows, num_cls:].mean(0).unflatten(-1, grid)
    return maps - class_maps(attention, num_cls, grid).mean(0) if reduce_mean else maps
