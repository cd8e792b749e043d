"""How far the heads of each layer look: mean attention distance.

    python analysis/attention_distance.py --checkpoint a/checkpoint-99.pth b/encoder-99.safetensors --data_path DATA

The distance in pixels between a patch and those it attends to, weighted by the attention and
averaged over patches and images (Dosovitskiy et al., 2010.11929). Tokens that are no patches are
left out and the others' shares rescaled; Swin looks no further than its windows. Writes
attention_distance.csv, a row for each head, and attention_distance.png.
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
    """One row of attention_distance.csv, in pixels. relative: over the distance of uniform
    attention there."""

    label: str
    layer: str
    depth: float
    head: int
    distance: float
    relative: float


# --------------------------------------------------------------------------------------------------
# Numbers


def patch_distances(grid: tuple[int, int], stride: tuple[float, float]) -> Tensor:
    """Between the centers of patches of a grid that are `stride` pixels apart: float64 [N, N]."""
    axes = [
        torch.arange(count, dtype=torch.float64) * pixels
        for count, pixels in zip(grid, stride, strict=True)
    ]
    centers = torch.cartesian_prod(*axes).view(-1, 2)
    return torch.cdist(centers, centers, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(attention: Tensor, distances: Tensor) -> Tensor:
    """Mean distance [B, h] that is looked, from attention [B, h, T, T] whose last N tokens are
    those of [N, N]."""
    patches = len(distances)
    among = attention[..., -patches:, -patches:].double()
    shares = among / among.sum(-1, keepdim=True).clamp(min=torch.finfo(among.dtype).tiny)
    return (shares * distances.to(shares.device)).sum(-1).mean(-1)


# --------------------------------------------------------------------------------------------------
# Attention of a network


@dataclass(frozen=True)
class Attending:
    """An attention module of a network: the grid of its patches and the pixels between them."""

    name: str
    module: nn.Module
    grid: tuple[int, int]
    stride: tuple[float, float]


def attentions_of(network: nn.Module) -> list[Attending]:
    """Of every block. ValueError: there is no attention that is known here."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    found = []
    for name, module in network.named_modules():
        if not isinstance(module, common.TRANSFORMER_BLOCKS):
            continue
        whole = getattr(module, "input_resolution", None) or network.patch_embed.grid_size
        grid = to_pair(getattr(module, "window_size", whole))
        stride = tuple(pixels / places for pixels, places in zip(size, whole, strict=True))
        found.append(Attending(name, module.attn, grid, stride))
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no attention that is known here: leave it out"
        )
    return found


@torch.no_grad()
def look(
    network: nn.Module,
    images: Tensor,
    attentions: Sequence[Attending],
    see: Callable[[Attending, Tensor], None],
) -> None:
    """Calls see(attending, its probabilities [B, h, T, T]) for each that images [B, 3, H, W] go
    through."""
    handles = []
    for attending in attentions:
        module, watch = attending.module, partial(see, attending)
        if isinstance(module, Attention):
            hook = partial(_own_probabilities, watch)
            handles.append(module.register_forward_pre_hook(hook))
        else:  # timm's, which drops out of them where they are computed at all
            module.fused_attn = False
            handles.append(
                module.attn_drop.register_forward_pre_hook(
                    lambda _, inputs, watch=watch: watch(inputs[0])
                )
            )
    try:
        network.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()


def _own_probabilities(see: Callable[[Tensor], None], module: Attention, inputs: tuple) -> None:
    x, bias, *_ = *inputs, None
    q, k, _ = module.project(x)
    see(module.probabilities(q, k, module.position_bias(bias)))


def distances_of(
    args: Namespace, network: common.Network, device: torch.device
) -> list[tuple[Attending, Tensor]]:
    """Every attention in the order of the forward pass, with its heads' mean distances [h] over all
    images."""
    features = network.features.to(device)
    with refused(network.label):
        attentions = attentions_of(features)
    between = {
        attending: patch_distances(attending.grid, attending.stride).to(device)
        for attending in attentions
    }
    sums: dict[Attending, Tensor] = {}
    count = 0

    def see(attending: Attending, attention: Tensor) -> None:
        heads = attention_distance(attention, between[attending])  # [B, h], or [B * windows, h]
        sums[attending] = sums.get(attending, 0) + heads.mean(0) * len(images)

    for images in common.batches(args, network, device):
        with common.autocast(args, device):
            look(features, images, attentions, see)
        count += len(images)
    return [(attending, (total / count).cpu()) for attending, total in sums.items()]


def tabulate(label: str, found: Sequence[tuple[Attending, Tensor]]) -> list[Distance]:
    rows = []
    for depth, (attending, heads) in zip(common.depths(len(found)), found, strict=True):
        uniform = float(patch_distances(attending.grid, attending.stride).mean())
        rows += [
            Distance(
                label, attending.name, depth, head, distance, distance / uniform if uniform else 0.0
            )
            for head, distance in enumerate(heads.tolist())
        ]
    return rows


# --------------------------------------------------------------------------------------------------
# Figure


def draw(rows: Sequence[Distance]) -> Figure:
    """Heads as points, their means as lines; beside it the same over what uniform attention would
    give."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for own, style in common.by_network(rows):
        depths = list(dict.fromkeys(row.depth for row in own))
        for axis, value in ((left, "distance"), (right, "relative")):
            axis.scatter(
                [r.depth for r in own],
                [getattr(r, value) for r in own],
                s=8,
                alpha=0.5,
                color=style["color"],
            )
            means = [mean(getattr(r, value) for r in own if r.depth == depth) for depth in depths]
            axis.plot(depths, means, **style)
    left.set(xlabel="depth", ylabel="mean attention distance (pixels)", ylim=(0, None))
    right.set(xlabel="depth", ylabel="over that of uniform attention", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    return common.parse(
        common.build_parser(__doc__.splitlines()[0], "attention_distance", images=256), argv
    )


def main(args: Namespace) -> list[Distance]:
    device = common.set_up(args)
    rows = [
        row
        for network in common.load_networks(args)
        for row in tabulate(network.label, distances_of(args, network, device))
    ]
    common.save(args, "attention_distance", rows, draw(rows))
    return rows


if __name__ == "__main__":
    launch(main, parse())
