"""Which spatial frequencies the features of each layer hold: relative log amplitudes
(specs/a2mim.md 7.2).

    python analysis/fourier.py --checkpoint a/checkpoint-99.pth random --model vit_base_patch16_224 --data_path DATA

Writes fourier.csv, a row for each layer and frequency, fourier_layers.csv, a row for each layer,
and fourier.png.
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

EPSILON = 1e-6  # of the amplitudes, before their logarithm


@dataclass(frozen=True)
class Amplitude:
    """One row of fourier.csv. depth: from 0, the first layer, to 1; frequency: along the diagonal,
    in units of pi."""

    label: str
    layer: str
    depth: float
    frequency: float
    relative_log_amplitude: float


@dataclass(frozen=True)
class LayerSpectrum:
    """One row of fourier_layers.csv. high_frequency: relative log amplitude of the highest;
    variance: over places."""

    label: str
    layer: str
    depth: float
    high_frequency: float
    variance: float


# --------------------------------------------------------------------------------------------------
# Numbers


def log_amplitudes(maps: Tensor) -> Tensor:
    """Maps [B, C, h, w] to the mean over images and channels of log(|F| + EPSILON) on the half
    diagonal [h - h // 2].

    F(k, k) for k = 0, 1, ... below half the side; a map with other sides than a square has its
    diagonal from corner to corner. Half of a real map's spectrum says all.
    """
    height, width = maps.shape[-2:]
    rows = torch.arange(height - height // 2, device=maps.device)
    columns = (rows * width / height).round().long()
    spectrum = torch.fft.rfft2(maps.float())[..., rows, columns]  # [B, C, K]
    return (spectrum.abs() + EPSILON).log().mean((0, 1))


def spatial_variance(maps: Tensor) -> Tensor:
    """The unbiased variance over the places of maps [B, C, h, w], averaged over images and
    channels; 0 of one place."""
    places = maps.flatten(2)
    return (places.var(2) if places.shape[2] > 1 else torch.zeros_like(places[:, :, 0])).mean()


def relative(amplitudes: Tensor) -> Tensor:
    """Log amplitudes [K] less that of the mean, which is the first."""
    return amplitudes - amplitudes[0]


def spectra(
    args: Namespace, network: common.Network, device: torch.device
) -> list[tuple[str, int, Tensor, float]]:
    """Of each layer: its name, rows of its map, relative log amplitudes [K] and variance, averaged
    over the images."""
    features, layers = network.features.to(device), common.layers_of(network.features)
    sums: dict[str, Tensor] = {}
    sides: dict[str, int] = {}
    count = 0
    for images in common.batches(args, network, device):
        with common.autocast(args, device):
            found = common.look(features, images, layers, describe)
        for name, (side, numbers) in found.items():
            sums[name] = sums.get(name, 0) + numbers * len(images)
            sides[name] = side
        count += len(images)
    means = {name: (total / count).cpu() for name, total in sums.items()}
    return [
        (name, sides[name], relative(mean[:-1]), float(mean[-1])) for name, mean in means.items()
    ]


def describe(maps: Tensor) -> tuple[int, Tensor]:
    """Rows of the map, and log amplitudes with the variance behind them [K + 1]."""
    return maps.shape[2], torch.cat((log_amplitudes(maps), spatial_variance(maps)[None])).double()


def tabulate(
    label: str, found: list[tuple[str, int, Tensor, float]]
) -> tuple[list[Amplitude], list[LayerSpectrum]]:
    curves, summary = [], []
    for depth, (layer, side, amplitudes, variance) in zip(
        common.depths(len(found)), found, strict=True
    ):
        curves += [
            Amplitude(label, layer, depth, 2 * k / side, a)
            for k, a in enumerate(amplitudes.tolist())
        ]
        summary.append(LayerSpectrum(label, layer, depth, float(amplitudes[-1]), variance))
    return curves, summary


# --------------------------------------------------------------------------------------------------
# Figure


def draw(curves: list[Amplitude], summary: list[LayerSpectrum]) -> Figure:
    """Every layer's curve, a panel for each network; then the highest frequency and the variance by
    depth."""
    names = list(dict.fromkeys(row.label for row in summary))
    figure = Figure(figsize=(3.2 * (len(names) + 2), 3.0), layout="constrained")
    axes = figure.subplots(1, len(names) + 2)
    colors = matplotlib.colormaps["viridis"]
    for name, axis in zip(names, axes, strict=False):
        for layer in (row for row in summary if row.label == name):
            points = [row for row in curves if (row.label, row.layer) == (name, layer.layer)]
            axis.plot(
                [p.frequency for p in points],
                [p.relative_log_amplitude for p in points],
                color=colors(layer.depth),
            )
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="frequency (π)", ylabel="relative log amplitude", ylim=limits(curves))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colors)
    figure.colorbar(scale, ax=axes[len(names) - 1], label="depth")
    for axis, value in ((axes[-2], "high_frequency"), (axes[-1], "variance")):
        common.draw_lines(axis, summary, "depth", value)
        axis.set_xlabel("depth")
    axes[-2].set_ylabel("highest frequency's log amplitude")
    axes[-1].set(ylabel="variance over places", yscale="log")
    axes[-2].legend(frameon=False, fontsize=7)
    return figure


def limits(curves: list[Amplitude]) -> tuple[float, float]:
    """The same for all networks."""
    values = [row.relative_log_amplitude for row in curves]
    margin = 0.05 * (max(values) - min(values) or 1)
    return min(values) - margin, max(values) + margin


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    return common.parse(common.build_parser(__doc__.splitlines()[0], "fourier", images=512), argv)


def main(args: Namespace) -> tuple[list[Amplitude], list[LayerSpectrum]]:
    device = common.set_up(args)
    curves, summary = [], []
    for network in common.load_networks(args):
        for rows, found in zip(
            (curves, summary), tabulate(network.label, spectra(args, network, device)), strict=True
        ):
            rows += found
    write_rows(Path(args.output_dir) / "fourier_layers.csv", summary)
    common.save(args, "fourier", curves, draw(curves, summary))
    return curves, summary


if __name__ == "__main__":
    launch(main, parse())
