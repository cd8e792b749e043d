"""Effective rank: how many directions vectors use (Roy and Vetterli, 2007)."""

import torch
from torch import Tensor


class Moments:
    """Running first and second moments of vectors of D numbers, in float64."""

    def __init__(self):
        self.count = 0
        self.sum = 0.0
        self.products = 0.0

    def add(self, vectors: Tensor) -> None:
        """Add vectors [n, D]."""
        vectors = vectors.double()
        self.count += len(vectors)
        self.sum = self.sum + vectors.sum(0)
        self.products = self.products + vectors.T @ vectors

    def spectrum(self) -> Tensor:
        """Return the squared singular values [D] of the centered matrix of all vectors."""
        centered = self.products - torch.outer(self.sum, self.sum) / self.count
        return torch.linalg.eigvalsh(centered).clamp(min=0)


def effective_rank(squares: Tensor) -> float:
    """Return exp of the entropy of the normalized singular values, given their squares [D].

    Squares below the rounding error of the largest count as 0, since their roots would not be
    small. The rank of zeros is 0.
    """
    floor = squares.max() * len(squares) * torch.finfo(squares.dtype).eps
    values = torch.where(squares > floor, squares, 0).sqrt()
    if not values.any():
        return 0.0
    fractions = values / values.sum()
    return float(torch.special.entr(fractions).sum().exp())
