"""Sizes of images, patches and grids: one number for a square, or (height, width)."""

from collections.abc import Sequence

Pair = tuple[int, int]


def to_pair(size: int | Sequence[int]) -> Pair:
    """Return (height, width) of a size that is given as one number or as two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
