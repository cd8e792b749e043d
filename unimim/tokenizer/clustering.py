"""Samples patches from a data set's images and clusters them, over all processes."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unimim.cli.options import as_config
from unimim.data.device_decode import batch_decoder
from unimim.engine.distributed import reduce_sum
from unimim.engine.monitor import RunLog
from unimim.engine.state import RunContext
from unimim.logs import log
from unimim.tokenizer.clusters import PatchClusters, first_centers, lloyd_step, pixels_of
from unimim.tokenizer.learning import perplexity

LEAST_OF_AN_IMAGE = 8  # patches, so that no more images are decoded than needed


def cluster(
    context: RunContext,
    loader: DataLoader,
    after_iteration: Callable[[PatchClusters], dict[str, float]],
    features: Callable[[Tensor], Tensor] | None = None,
) -> PatchClusters:
    """Return the clusters of patches of the loader's images, as the flags ask for them, by their
    `features` [B, P, C] if these are given.

    Each iteration is a line of log.txt: its loss is the squared error of a normalized pixel, or a
    feature, before it, and `after_iteration` measures the clusters after it.
    """
    args = context.args
    patch = (args.patch_size, args.patch_size)
    features = features or partial(pixels_of, patch=patch)
    patches = sample_patches(context, loader, features)
    centers = first_centers(patches, args.vocab_size)
    run_log = RunLog(args, as_config(args))
    run_log.forget_from(0)
    for iteration in range(args.kmeans_iterations):
        loss = quantization_error(patches, PatchClusters(centers, patch))
        centers, sizes = lloyd_step(patches, centers)
        metrics = {"train_loss": loss, "train_perplexity": float(perplexity(sizes))}
        metrics |= after_iteration(PatchClusters(centers, patch, features))
        run_log.epoch(metrics | {"epoch": iteration}, iteration)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        log.info("iteration %d: %s", iteration, shown)
    run_log.close()
    return PatchClusters(centers, patch, features)


def sample_patches(
    context: RunContext, loader: DataLoader, features: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return this process's part of --kmeans_patches random patches of normalized images, float32
    [M, C] on the device; a function of --seed and the process's images."""
    args = context.args
    wanted = math.ceil(args.kmeans_patches / args.world_size)
    images = len(loader) * args.batch_size
    per_image = max(LEAST_OF_AN_IMAGE, math.ceil(wanted / images))
    generator = torch.Generator().manual_seed(args.seed * args.world_size + args.rank)
    loader.batch_sampler.set_position(0)
    found: list[Tensor] = []
    count = 0
    for some in _of_batches(context, loader, features, per_image, generator):
        found.append(some)
        count += len(some)
        if count >= wanted:
            break
    # the first centers are the first patches: they must not all be of the same few images
    patches = torch.cat(found)
    order = torch.randperm(len(patches), generator=generator)[:wanted]
    return patches[order.to(patches.device)]


def _of_batches(
    context: RunContext,
    loader: DataLoader,
    features: Callable[[Tensor], Tensor],
    per_image: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    decode = batch_decoder(loader.dataset, context.device)
    for batch in loader:
        patches = features(context.normalize(decode(batch))["image"])  # [B, P, C]
        order = torch.rand(patches.shape[:2], generator=generator).argsort(1)[:, :per_image]
        order = order.to(patches.device)[..., None].expand(-1, -1, patches.shape[-1])
        yield patches.gather(1, order).flatten(0, 1)


def quantization_error(patches: Tensor, clusters: PatchClusters) -> float:
    """Return the mean squared distance of a number of patches [M, C] to its nearest center's, over
    all processes."""
    total = torch.zeros(2, dtype=torch.float64, device=patches.device)
    for some in patches.split(2**14):
        apart = some - clusters.centers[clusters.nearest(some)]
        total += torch.stack((apart.double().square().sum(), total.new_tensor(apart.numel())))
    error, count = reduce_sum(total)
    return float(error / count)
