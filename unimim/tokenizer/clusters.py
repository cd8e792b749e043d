"""Visual tokens without a network: the nearest of the centers that k-means finds for patches.

They stand in for the discrete VAE of BEiT (arXiv 2106.08254, section 2.1), whose tokens say more
than colors. Shapes in comments: N images of P patches, M patches of C numbers, K centers.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimim.engine.distributed import from_first_rank, reduce_sum
from unimim.sizes import Pair

PATCHES_AT_ONCE = 2**18


class PatchClusters(nn.Module):
    """Gives each patch of normalized images the number of the nearest of centers [K, C].

    features: what a patch is described by in place of its pixels: a function of normalized images
    [N, 3, H, W] that returns [N, P, C].
    """

    def __init__(
        self, centers: Tensor, patch: Pair, features: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.register_buffer("centers", centers)
        self.patch = patch
        self.features = features or partial(pixels_of, patch=patch)

    @torch.no_grad()
    def forward(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return ids int64 of images [N, 3, H, W]: [N, M] at `positions` int64 [N, M], of all
        patches without them."""
        patches = self.features(images)
        if positions is not None:
            patches = patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[-1]))
        return self.nearest(patches.flatten(0, 1)).view(patches.shape[:2])

    def nearest(self, patches: Tensor) -> Tensor:
        """Return ids int64 [M] of patches [M, C]."""
        return nearest_center(patches, self.centers)

    def reconstruct(self, ids: Tensor, grid: Pair) -> Tensor:
        """Return the normalized images [N, 3, H, W] that consist of the centers of ids [N, P]."""
        size = tuple(count * side for count, side in zip(grid, self.patch, strict=True))
        patches = self.centers[ids].transpose(1, 2)
        return F.fold(patches, size, self.patch, stride=self.patch)


def pixels_of(images: Tensor, patch: Pair) -> Tensor:
    """Return the pixels [N, P, C] of the patches of images [N, 3, H, W]."""
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


def kmeans_tokens(
    images: Tensor,
    patch: Pair,
    vocab_size: int,
    *,
    seed: int,
    patches: int = 200_000,
    iterations: int = 10,
) -> PatchClusters:
    """Return the clusters of a random sample of the patches of normalized images [N, 3, H, W]."""
    sample = F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    rng = np.random.default_rng(seed)
    chosen = torch.from_numpy(rng.permutation(len(sample))[:patches]).to(sample.device)
    sample = sample[chosen]
    centers = first_centers(sample, vocab_size)
    for _ in range(iterations):
        centers, _ = lloyd_step(sample, centers)
    return PatchClusters(centers, patch)


def first_centers(patches: Tensor, count: int) -> Tensor:
    """Return the first `count` of patches [M, C] that differ from each other, those of rank 0.

    Raises:
        ValueError: there are not so many.
    """
    kinds, kind_of = torch.unique(patches, dim=0, return_inverse=True)
    if len(kinds) < count:
        raise ValueError(
            f"{len(kinds)} different patches are too few for {count} visual tokens; take more "
            "images or a smaller --vocab_size"
        )
    numbers = torch.arange(len(patches), device=patches.device)
    first = torch.full_like(numbers[: len(kinds)], len(patches))
    first.scatter_reduce_(0, kind_of, numbers, "amin")
    centers = patches[first.sort().values[:count]]
    return from_first_rank(centers.cpu()).to(patches.device)


def lloyd_step(patches: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means [K, C] of the patches [M, C] of all processes that are nearest to each
    center, and their numbers [K]; a center without patches stays."""
    nearest = nearest_center(patches, centers)
    ones = torch.ones_like(patches[:, :1])
    sizes = torch.zeros_like(centers[:, :1]).index_add_(0, nearest, ones)
    sums = torch.zeros_like(centers).index_add_(0, nearest, patches)
    reduce_sum(sizes)
    reduce_sum(sums)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), centers), sizes[:, 0]


def nearest_center(patches: Tensor, centers: Tensor) -> Tensor:
    """Return the number of the nearest center [K, C] of each patch [M, C], int64 [M]."""
    found = []
    with torch.autocast(patches.device.type, enabled=False):
        lengths = centers.square().sum(1)
        for some in patches.split(PATCHES_AT_ONCE):
            found.append((lengths - 2 * some @ centers.T).argmin(1))
    return torch.cat(found)
