"""Measure how many directions the features of each layer use: effective rank.

    python analysis/effective_rank.py --checkpoint a/checkpoint-99.pth b/checkpoint-99.pth \\
        --data_path DATA

This is exp(H) for the entropy H of the singular values of the centered feature matrix, normalized
to sum to 1 (Roy and Vetterli, 2007). A row of that matrix is an image's mean over positions
(--features mean; use more images than channels) or the feature at one position (place). Writes
effective_rank.csv, one row per layer, and effective_rank.png.
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
from unimim.evaluation.rank import Moments, effective_rank
from unimim.logs import log

FEATURES = ("mean", "place")


@dataclass(frozen=True)
class Rank:
    """One row of effective_rank.csv; `share` is the ratio of the rank to the channels."""

    label: str
    layer: str
    depth: float
    channels: int
    effective_rank: float
    share: float


# --------------------------------------------------------------------------------------------------
# Numbers


def moments_of(
    args: Namespace, network: common.Network, device: torch.device
) -> dict[str, Moments]:
    """Return the moments of every layer's features over all images, by name."""
    features = network.features.to(device)
    layers = common.layers_of(network.features)
    moments: dict[str, Moments] = {}

    def vectors(maps: Tensor) -> Tensor:
        return maps.mean((2, 3)) if args.features == "mean" else maps.movedim(1, -1).flatten(0, 2)

    for images in common.batches(args, network, device):
        with common.autocast(args, device):
            by_layer = common.look(features, images, layers, vectors)
        for name, rows in by_layer.items():
            moments.setdefault(name, Moments()).add(rows)
    return moments


def tabulate(label: str, moments: dict[str, Moments]) -> list[Rank]:
    """Return one row per layer; warn if there are too few images."""
    rows = []
    depths = common.depths(len(moments))
    for depth, (layer, layer_moments) in zip(depths, moments.items(), strict=True):
        spectrum = layer_moments.spectrum()
        channels = len(spectrum)
        if layer_moments.count <= channels:
            log.warning(
                "%s: %d vectors of %d channels limit the rank; use more --images",
                layer,
                layer_moments.count,
                channels,
            )
        rank = effective_rank(spectrum)
        rows.append(Rank(label, layer, depth, channels, rank, rank / channels))
    return rows


# --------------------------------------------------------------------------------------------------
# Figure


def draw(rows: Sequence[Rank]) -> Figure:
    """Plot the rank of every layer by depth, absolute and relative to the channels."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, value in ((left, "effective_rank"), (right, "share")):
        common.draw_lines(axis, rows, "depth", value)
    left.set(xlabel="depth", ylabel="effective rank", ylim=(0, None))
    right.set(xlabel="depth", ylabel="effective rank / channels", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = common.build_parser(
        __doc__.splitlines()[0], "effective_rank", images=2048, batch_size=64
    )
    group = parser.add_argument_group("effective rank")
    group.add_argument(
        "--features",
        choices=FEATURES,
        default="mean",
        help="a vector: an image's mean over positions, or the feature at each position",
    )
    return common.parse(parser, argv)


def main(args: Namespace) -> list[Rank]:
    """Measure all networks, write table and figure, and return the rows."""
    device = common.set_up(args)
    rows = []
    for network in common.load_networks(args):
        rows += tabulate(network.label, moments_of(args, network, device))
    common.save(args, "effective_rank", rows, draw(rows))
    return rows


if __name__ == "__main__":
    launch(main, parse())
