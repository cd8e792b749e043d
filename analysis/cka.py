"""Compare the layers of networks: linear CKA on minibatches.

    python analysis/cka.py --checkpoint a/checkpoint-99.pth b/checkpoint-99.pth \\
        --data_path DATA --images 1024

This is linear centered kernel alignment (Kornblith et al., arXiv 1905.00414) of every pair of
layers. An image's vector is its whole feature map (--features map) or the mean over positions
(mean). The three HSIC terms are unbiased and averaged over minibatches before the division (Nguyen
et al., arXiv 2010.15327), so --batch_size hardly matters; with few images a value may lie slightly
outside [0, 1]. Writes cka.csv, one row per pair of layers, and cka.png.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis import common
from unimim.engine.setup import launch

FEATURES = ("map", "mean")
LEAST_BATCH = 4  # images; the unbiased HSIC divides by n - 3


@dataclass(frozen=True)
class Similarity:
    """One row of cka.csv: the similarity of two layers."""

    label: str
    layer: str
    other_label: str
    other_layer: str
    cka: float


# --------------------------------------------------------------------------------------------------
# Numbers


def gram(features: Tensor) -> Tensor:
    """Return the inner products, float64 [n, n], of n images' vectors [n, D]."""
    features = features.double()
    return features @ features.T


def unbiased_hsic(grams: Tensor) -> Tensor:
    """Return the unbiased HSIC [L, L] of every pair of L Gram matrices [L, n, n] of n images.

    With zeros on the diagonals, HSIC(K, L) is (tr(KL) + sum(K) sum(L) / ((n - 1)(n - 2)) -
    2 sum(KL) / (n - 2)) / (n (n - 3)).
    """
    n = grams.shape[-1]
    assert n >= LEAST_BATCH, "too few images for an unbiased HSIC"
    grams = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows = grams.sum(2)  # [L, n]
    flat = grams.flatten(1)  # [L, n * n]
    totals = rows.sum(1)
    traces = flat @ flat.T
    products = rows @ rows.T  # sum(KL), since the matrices are symmetric
    terms = traces + torch.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 * products / (n - 2)
    return terms / (n * (n - 3))


def cka(hsic: Tensor) -> Tensor:
    """Return CKA [L, L] from the mean HSIC [L, L] over minibatches."""
    norms = hsic.diagonal().clamp(min=0).sqrt()
    return hsic / torch.outer(norms, norms)


def grams_of(args: Namespace, network: common.Network, images: Tensor) -> dict[str, Tensor]:
    """Return the Gram matrix of every layer by name, for images [B, 3, H, W]."""

    def reduce(maps: Tensor) -> Tensor:
        return gram(maps.flatten(1) if args.features == "map" else maps.mean((2, 3)))

    with common.autocast(args, images.device):
        return common.look(network.features, images, common.layers_of(network.features), reduce)


def compare(
    args: Namespace, networks: Sequence[common.Network], device: torch.device
) -> tuple[list[tuple[str, str]], Tensor]:
    """Return (label, layer) of all L layers of all networks, and their CKA [L, L].

    All networks see the same images.
    """
    for network in networks:
        network.features.to(device)
    total = torch.zeros(())
    count = 0
    names: list[tuple[str, str]] = []
    loaders = [common.batches(args, network, device) for network in networks]
    for views in zip(*loaders, strict=True):
        if len(views[0]) < args.batch_size and count:  # a smaller batch would need less weight
            break
        names, grams = [], []
        for network, images in zip(networks, views, strict=True):
            for name, matrix in grams_of(args, network, images).items():
                names.append((network.label, name))
                grams.append(matrix)
        total = total + unbiased_hsic(torch.stack(grams)).cpu()
        count += 1
    return names, cka(total / count)


def tabulate(names: list[tuple[str, str]], values: Tensor) -> list[Similarity]:
    """Return one row per unordered pair of layers."""
    rows = []
    for a, first in enumerate(names):
        for b, second in enumerate(names[a:], start=a):
            rows.append(Similarity(*first, *second, float(values[a, b])))
    return rows


# --------------------------------------------------------------------------------------------------
# Figure


def draw(names: list[tuple[str, str]], values: Tensor) -> Figure:
    """Draw a panel for every pair of networks; layers run to the right and upwards."""
    indices: dict[str, list[int]] = {}
    for index, (label, _) in enumerate(names):
        indices.setdefault(label, []).append(index)
    networks = list(indices)
    side = len(networks)
    figure = Figure(figsize=(2.8 * side + 0.9, 2.8 * side), layout="constrained")
    axes = figure.subplots(side, side, squeeze=False)
    for row, first in enumerate(networks):
        for column, second in enumerate(networks):
            axis = axes[row, column]
            if column > row:
                axis.set_axis_off()
                continue
            block = values[np.ix_(indices[first], indices[second])].numpy()
            image = axis.imshow(block, vmin=0, vmax=1, origin="lower", cmap="magma", aspect="auto")
            axis.set_xlabel(second if row == side - 1 else "", fontsize=9)
            axis.set_ylabel(first if column == 0 else "", fontsize=9)
    figure.colorbar(image, ax=axes, label="linear CKA", shrink=0.8)
    return figure


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = common.build_parser(__doc__.splitlines()[0], "cka", images=512, batch_size=64)
    group = parser.add_argument_group("CKA")
    group.add_argument(
        "--features",
        choices=FEATURES,
        default="map",
        help="an image's vector: its feature map, or the mean over positions",
    )
    return common.parse(parser, argv, check_flags)


def check_flags(args: Namespace) -> None:
    """Raise ValueError if there are too few images for an unbiased HSIC."""
    if min(args.batch_size, args.images) < LEAST_BATCH:
        raise ValueError(
            f"--batch_size and --images must be at least {LEAST_BATCH} for an unbiased HSIC"
        )


def main(args: Namespace) -> list[Similarity]:
    """Compare all networks, write table and figure, and return the rows."""
    device = common.set_up(args)
    names, values = compare(args, common.load_networks(args), device)
    rows = tabulate(names, values)
    common.save(args, "cka", rows, draw(names, values))
    return rows


if __name__ == "__main__":
    launch(main, parse())
