"""Measure how far the heads of each layer attend: mean attention distance.

    python analysis/attention_distance.py --data_path DATA \\
        --checkpoint a/checkpoint-99.pth b/encoder-99.safetensors

This is the distance in pixels between a patch and those it attends to, weighted by the attention
and averaged over patches and images (Dosovitskiy et al., arXiv 2010.11929). Class tokens are left
out and the attention to patches is rescaled to sum to 1; Swin attends within its windows only.
Writes attention_distance.csv, one row per head, and attention_distance.png.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from analysis import common
from modeling_finetune import Attention
from unimim.engine.setup import launch
from unimim.errors import refused
from unimim.sizes import to_pair


@dataclass(frozen=True)
class Distance:
    """One row of attention_distance.csv.

    `distance` is in pixels, `relative` is its ratio to the distance of uniform attention.
    """

    label: str
    layer: str
    depth: float
    head: int
    distance: float
    relative: float


# --------------------------------------------------------------------------------------------------
# Numbers


def patch_distances(grid: tuple[int, int], stride: tuple[float, float]) -> Tensor:
    """Return the distances between patch centers `stride` pixels apart, float64 [N, N]."""
    rows = torch.arange(grid[0], dtype=torch.float64) * stride[0]
    columns = torch.arange(grid[1], dtype=torch.float64) * stride[1]
    centers = torch.cartesian_prod(rows, columns).view(-1, 2)
    return torch.cdist(centers, centers, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(attention: Tensor, distances: Tensor) -> Tensor:
    """Return the mean attention distance [B, h].

    `attention` is [B, h, T, T]; its last N tokens are the patches of `distances` [N, N].
    """
    patches = len(distances)
    among = attention[..., -patches:, -patches:].double()
    weights = among / among.sum(-1, keepdim=True).clamp(min=torch.finfo(among.dtype).tiny)
    return (weights * distances.to(weights.device)).sum(-1).mean(-1)


# --------------------------------------------------------------------------------------------------
# Attention of a network


@dataclass(frozen=True)
class AttentionSite:
    """An attention module of a network, the grid of its patches and their stride in pixels."""

    name: str
    module: nn.Module
    grid: tuple[int, int]
    stride: tuple[float, float]


def attentions_of(network: nn.Module) -> list[AttentionSite]:
    """Return the attention of every block; raise ValueError if the network has none."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    sites = []
    for name, module in network.named_modules():
        if not isinstance(module, common.TRANSFORMER_BLOCKS):
            continue
        whole = getattr(module, "input_resolution", None) or network.patch_embed.grid_size
        grid = to_pair(getattr(module, "window_size", whole))
        stride = (size[0] / whole[0], size[1] / whole[1])
        sites.append(AttentionSite(name, module.attn, grid, stride))
    if not sites:
        raise ValueError(f"{type(network).__name__} has no known attention module; leave it out")
    return sites


@torch.no_grad()
def observe(
    network: nn.Module,
    images: Tensor,
    sites: Sequence[AttentionSite],
    record: Callable[[AttentionSite, Tensor], None],
) -> None:
    """Call record(site, probabilities [B, h, T, T]) for each site in a forward pass of `images`."""
    handles = []
    for site in sites:
        module = site.module
        record_here = partial(record, site)
        if isinstance(module, Attention):
            hook = partial(_record_probabilities, record_here)
            handles.append(module.register_forward_pre_hook(hook))
        else:  # timm's unfused attention applies dropout to the probabilities
            module.fused_attn = False
            hook = partial(_record_input, record_here)
            handles.append(module.attn_drop.register_forward_pre_hook(hook))
    try:
        network.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()


def _record_probabilities(
    record: Callable[[Tensor], None], module: Attention, inputs: tuple
) -> None:
    """Compute the probabilities of our attention, whose fused kernel does not return them."""
    x, bias, *_ = *inputs, None
    q, k, _ = module.project(x)
    record(module.probabilities(q, k, module.position_bias(bias)))


def _record_input(record: Callable[[Tensor], None], module: nn.Module, inputs: tuple) -> None:
    """Record a module's first input."""
    record(inputs[0])


def distances_of(
    args: Namespace, network: common.Network, device: torch.device
) -> list[tuple[AttentionSite, Tensor]]:
    """Return every attention in forward order with its heads' mean distances [h] over images."""
    features = network.features.to(device)
    with refused(network.label):
        sites = attentions_of(features)
    distances = {site: patch_distances(site.grid, site.stride).to(device) for site in sites}
    sums: dict[AttentionSite, Tensor] = {}
    count = 0

    def record(site: AttentionSite, attention: Tensor) -> None:
        heads = attention_distance(attention, distances[site])  # [B, h], or [B * windows, h]
        sums[site] = sums.get(site, 0) + heads.mean(0) * len(images)

    for images in common.batches(args, network, device):
        with common.autocast(args, device):
            observe(features, images, sites, record)
        count += len(images)
    return [(site, (total / count).cpu()) for site, total in sums.items()]


def tabulate(label: str, layers: Sequence[tuple[AttentionSite, Tensor]]) -> list[Distance]:
    """Return one row per head of every layer."""
    rows = []
    for depth, (site, heads) in zip(common.depths(len(layers)), layers, strict=True):
        uniform = float(patch_distances(site.grid, site.stride).mean())
        for head, distance in enumerate(heads.tolist()):
            relative = distance / uniform if uniform else 0.0
            rows.append(Distance(label, site.name, depth, head, distance, relative))
    return rows


# --------------------------------------------------------------------------------------------------
# Figure


def draw(rows: Sequence[Distance]) -> Figure:
    """Plot heads as points and their means as lines: distances, and relative distances."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for network_rows, style in common.by_network(rows):
        for axis, name in ((left, "distance"), (right, "relative")):
            by_depth: dict[float, list[float]] = {}
            for row in network_rows:
                by_depth.setdefault(row.depth, []).append(getattr(row, name))
            for depth, values in by_depth.items():
                points = [depth] * len(values)
                axis.scatter(points, values, s=8, alpha=0.5, color=style["color"])
            axis.plot(list(by_depth), [mean(values) for values in by_depth.values()], **style)
    left.set(xlabel="depth", ylabel="mean attention distance (pixels)", ylim=(0, None))
    right.set(xlabel="depth", ylabel="relative to uniform attention", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = common.build_parser(__doc__.splitlines()[0], "attention_distance", images=256)
    return common.parse(parser, argv)


def main(args: Namespace) -> list[Distance]:
    """Measure all networks, write table and figure, and return the rows."""
    device = common.set_up(args)
    rows = []
    for network in common.load_networks(args):
        rows += tabulate(network.label, distances_of(args, network, device))
    common.save(args, "attention_distance", rows, draw(rows))
    return rows


if __name__ == "__main__":
    launch(main, parse())
