"""Measure the spatial frequencies in the features of each layer: relative log amplitudes.

    python analysis/fourier.py --checkpoint a/checkpoint-99.pth random \\
        --model vit_base_patch16_224 --data_path DATA

This is A2MIM's analysis (docs/methods/simmim_a2mim.md#analysis). Writes fourier.csv, one row per
layer and frequency, fourier_layers.csv, one row per layer, and fourier.png.
"""

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis import common
from unimim.engine.setup import launch
from unimim.files import write_rows

EPSILON = 1e-6  # added to the amplitudes before the logarithm


@dataclass(frozen=True)
class Amplitude:
    """One row of fourier.csv.

    `depth` is 0 for the first layer and 1 for the last; `frequency` is along the diagonal, in units
    of pi.
    """

    label: str
    layer: str
    depth: float
    frequency: float
    relative_log_amplitude: float


@dataclass(frozen=True)
class LayerSpectrum:
    """One row of fourier_layers.csv.

    `high_frequency` is the relative log amplitude of the highest frequency, `variance` that over
    positions.
    """

    label: str
    layer: str
    depth: float
    high_frequency: float
    variance: float


# --------------------------------------------------------------------------------------------------
# Numbers


def log_amplitudes(maps: Tensor) -> Tensor:
    """Return the mean of log(|F| + EPSILON) on half the diagonal of the spectrum, [h - h // 2].

    `maps` is [B, C, h, w]; the mean is over images and channels. The frequencies are F(k, k) for
    k = 0, 1, ... below half the side, which suffices for real maps; if a map is not square, the
    diagonal runs from corner to corner.
    """
    height, width = maps.shape[-2:]
    rows = torch.arange(height - height // 2, device=maps.device)
    columns = (rows * width / height).round().long()
    spectrum = torch.fft.rfft2(maps.float())[..., rows, columns]  # [B, C, K]
    return (spectrum.abs() + EPSILON).log().mean((0, 1))


def spatial_variance(maps: Tensor) -> Tensor:
    """Return the unbiased variance over the positions of maps [B, C, h, w], 0 for one position.

    It is averaged over images and channels.
    """
    positions = maps.flatten(2)
    if positions.shape[2] == 1:
        return torch.zeros_like(positions).mean()
    return positions.var(2).mean()


def relative(amplitudes: Tensor) -> Tensor:
    """Subtract the log amplitude of frequency 0 from log amplitudes [K]."""
    return amplitudes - amplitudes[0]


def spectra(
    args: Namespace, network: common.Network, device: torch.device
) -> list[tuple[str, int, Tensor, float]]:
    """Return name, rows of the map, relative log amplitudes [K] and variance of each layer.

    Amplitudes and variance are averaged over the images.
    """
    features = network.features.to(device)
    layers = common.layers_of(network.features)
    sums: dict[str, Tensor] = {}
    sides: dict[str, int] = {}
    count = 0
    for images in common.batches(args, network, device):
        with common.autocast(args, device):
            by_layer = common.look(features, images, layers, describe)
        for name, (side, numbers) in by_layer.items():
            sums[name] = sums.get(name, 0) + numbers * len(images)
            sides[name] = side
        count += len(images)
    results = []
    for name, total in sums.items():
        mean = (total / count).cpu()
        results.append((name, sides[name], relative(mean[:-1]), float(mean[-1])))
    return results


def describe(maps: Tensor) -> tuple[int, Tensor]:
    """Return the rows of the map, and its log amplitudes followed by its variance [K + 1]."""
    numbers = torch.cat((log_amplitudes(maps), spatial_variance(maps)[None]))
    return maps.shape[2], numbers.double()


def tabulate(
    label: str, layers: list[tuple[str, int, Tensor, float]]
) -> tuple[list[Amplitude], list[LayerSpectrum]]:
    """Return the rows of fourier.csv and of fourier_layers.csv."""
    curves, summary = [], []
    depths = common.depths(len(layers))
    for depth, (layer, side, amplitudes, variance) in zip(depths, layers, strict=True):
        for k, amplitude in enumerate(amplitudes.tolist()):
            curves.append(Amplitude(label, layer, depth, 2 * k / side, amplitude))
        summary.append(LayerSpectrum(label, layer, depth, float(amplitudes[-1]), variance))
    return curves, summary


# --------------------------------------------------------------------------------------------------
# Figure


def draw(curves: list[Amplitude], summary: list[LayerSpectrum]) -> Figure:
    """Plot each network's curves in a panel, then highest frequency and variance by depth."""
    names = list(dict.fromkeys(row.label for row in summary))
    figure = Figure(figsize=(3.2 * (len(names) + 2), 3.0), layout="constrained")
    axes = figure.subplots(1, len(names) + 2)
    colors = matplotlib.colormaps["viridis"]
    for name, axis in zip(names, axes, strict=False):
        for layer in (row for row in summary if row.label == name):
            points = [row for row in curves if (row.label, row.layer) == (name, layer.layer)]
            frequencies = [point.frequency for point in points]
            amplitudes = [point.relative_log_amplitude for point in points]
            axis.plot(frequencies, amplitudes, color=colors(layer.depth))
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="frequency (π)", ylabel="relative log amplitude", ylim=limits(curves))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colors)
    figure.colorbar(scale, ax=axes[len(names) - 1], label="depth")
    for axis, value in ((axes[-2], "high_frequency"), (axes[-1], "variance")):
        common.draw_lines(axis, summary, "depth", value)
        axis.set_xlabel("depth")
    axes[-2].set_ylabel("log amplitude of the highest frequency")
    axes[-1].set(ylabel="variance over positions", yscale="log")
    axes[-2].legend(frameon=False, fontsize=7)
    return figure


def limits(curves: list[Amplitude]) -> tuple[float, float]:
    """Return limits of the vertical axis that hold for all networks."""
    values = [row.relative_log_amplitude for row in curves]
    margin = 0.05 * (max(values) - min(values) or 1)
    return min(values) - margin, max(values) + margin


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    return common.parse(common.build_parser(__doc__.splitlines()[0], "fourier", images=512), argv)


def main(args: Namespace) -> tuple[list[Amplitude], list[LayerSpectrum]]:
    """Measure all networks, write tables and figure, and return the rows of both tables."""
    device = common.set_up(args)
    curves, summary = [], []
    for network in common.load_networks(args):
        layer_curves, layer_summary = tabulate(network.label, spectra(args, network, device))
        curves += layer_curves
        summary += layer_summary
    write_rows(Path(args.output_dir) / "fourier_layers.csv", summary)
    common.save(args, "fourier", curves, draw(curves, summary))
    return curves, summary


if __name__ == "__main__":
    launch(main, parse())
