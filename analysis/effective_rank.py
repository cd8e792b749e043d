"""How many directions the features of each layer use: effective rank.

    python analysis/effective_rank.py --checkpoint a/checkpoint-99.pth b/checkpoint-99.pth --data_path DATA

exp(H) of the singular values of the centerd feature matrix, as shares of their sum (Roy and
Vetterli, 2007). A row of that matrix is an image's mean over places (--features mean), of which
there should be more images than channels, or a place (place). Writes effective_rank.csv, a row for
each layer, and effective_rank.png.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis import common
from unimim.engine.setup import launch
from unimim.logs import log

FEATURES = ("mean", "place")


@dataclass(frozen=True)
class Rank:
    """One row of effective_rank.csv. share: of the channels."""

    label: str
    layer: str
    depth: float
    channels: int
    effective_rank: float
    share: float


# --------------------------------------------------------------------------------------------------
# Numbers


class Moments:
    """Sums over vectors of D numbers, in float64, as they come in."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, vectors: Tensor) -> None:
        """Vectors [n, D]."""
        vectors = vectors.double()
        self.count += len(vectors)
        self.sum = self.sum + vectors.sum(0)
        self.products = self.products + vectors.T @ vectors

    def spectrum(self) -> Tensor:
        """Squared singular values [D] of the centerd matrix of all vectors."""
        centerd = self.products - torch.outer(self.sum, self.sum) / self.count
        return torch.linalg.eigvalsh(centerd).clamp(min=0)


def effective_rank(squares: Tensor) -> float:
    """exp of the entropy of singular values, whose squares [D] are given, as shares of their sum; 0
    of zeros.

    What is below the rounding error of the largest square counts as 0: its root would not be small.
    """
    floor = squares.max() * len(squares) * torch.finfo(squares.dtype).eps
    values = torch.where(squares > floor, squares, 0).sqrt()
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def moments_of(
    args: Namespace, network: common.Network, device: torch.device
) -> dict[str, Moments]:
    """Of the features of every layer over all images, by name."""
    features, layers = network.features.to(device), common.layers_of(network.features)
    moments: dict[str, Moments] = {}

    def vectors(maps: Tensor) -> Tensor:
        return maps.mean((2, 3)) if args.features == "mean" else maps.movedim(1, -1).flatten(0, 2)

    for images in common.batches(args, network, device):
        with common.autocast(args, device):
            found = common.look(features, images, layers, vectors)
        for name, rows in found.items():
            moments.setdefault(name, Moments()).add(rows)
    return moments


def tabulate(label: str, moments: dict[str, Moments]) -> list[Rank]:
    rows = []
    for depth, (layer, of_layer) in zip(common.depths(len(moments)), moments.items(), strict=True):
        spectrum = of_layer.spectrum()
        if of_layer.count <= len(spectrum):
            log.warning(
                "%s: %d vectors of %d channels bound the rank: more --images",
                layer,
                of_layer.count,
                len(spectrum),
            )
        rank = effective_rank(spectrum)
        rows.append(Rank(label, layer, depth, len(spectrum), rank, rank / len(spectrum)))
    return rows


# --------------------------------------------------------------------------------------------------
# Figure


def draw(rows: Sequence[Rank]) -> Figure:
    """The rank of every layer by depth, and its share of the channels."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, value in ((left, "effective_rank"), (right, "share")):
        common.draw_lines(axis, rows, "depth", value)
    left.set(xlabel="depth", ylabel="effective rank", ylim=(0, None))
    right.set(xlabel="depth", ylabel="share of the channels", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    parser = common.build_parser(
        __doc__.splitlines()[0], "effective_rank", images=2048, batch_size=64
    )
    group = parser.add_argument_group("effective rank")
    group.add_argument(
        "--features",
        choices=FEATURES,
        default="mean",
        help="a vector: an image's mean, or each place",
    )
    return common.parse(parser, argv)


def main(args: Namespace) -> list[Rank]:
    device = common.set_up(args)
    rows = [
        row
        for network in common.load_networks(args)
        for row in tabulate(network.label, moments_of(args, network, device))
    ]
    common.save(args, "effective_rank", rows, draw(rows))
    return rows


if __name__ == "__main__":
    launch(main, parse())
