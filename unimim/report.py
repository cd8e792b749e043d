"""Report finished runs: read logs, draw learning curves, write a self-contained HTML page."""

import base64
import html
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

# Safe for color-blind readers; the first is the method's color, the second the baseline's.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
Logs = Sequence[list[dict]]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 }
h2 { margin-top: 2.5rem }
img { max-width: 100% }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .8rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc }
th { text-align: left }
td:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums }
"""


def read_log(folder: Path) -> list[dict]:
    """Return a run's log.txt as one dict per epoch."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return "mean ± sample std", or the mean alone for a single value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


# --------------------------------------------------------------------------------------------------
# Curves


def contrast_curves(log: list[dict], patches: int) -> Figure:
    """Plot ConMIM's contrast loss and accuracy by epoch, with the chance level of `patches`."""
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(log) + 1)
    left.plot(epochs, [epoch["train_loss"] for epoch in log], color=COLORS[0])
    right.plot(epochs, [100 * epoch["train_contrast_acc"] for epoch in log], color=COLORS[0])
    _guessing(left, math.log(patches), f"guessing: ln {patches} = {math.log(patches):.2f}")
    _guessing(right, 100 / patches, f"guessing: 1 of {patches}")
    left.set(xlabel="epoch", ylabel="contrast loss (nats)")
    right.set(xlabel="epoch", ylabel="contrast accuracy (%)", ylim=(0, None))
    return figure


def _guessing(axis, level: float, text: str) -> None:
    """Draw the chance level as a dashed line."""
    axis.axhline(level, color="#888", linewidth=0.9, linestyle="--")
    axis.annotate(
        text, (0.98, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
    )


def accuracy_curves(arms: Mapping[str, Logs]) -> Figure:
    """Plot validation accuracy by epoch: the mean of each arm's seeds, and their range."""
    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    axis = figure.subplots()
    for (name, logs), color in zip(arms.items(), COLORS, strict=False):
        by_epoch = []
        for seeds in zip(*logs, strict=True):
            by_epoch.append([epoch["test_acc1"] for epoch in seeds])
        epochs = range(1, len(by_epoch) + 1)
        axis.plot(epochs, [statistics.mean(values) for values in by_epoch], color=color, label=name)
        low = [min(values) for values in by_epoch]
        high = [max(values) for values in by_epoch]
        axis.fill_between(epochs, low, high, color=color, alpha=0.2)
    axis.set(xlabel="epoch", ylabel="validation accuracy (%)")
    axis.legend(frameon=False, loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------
# Pages and tables


def picture(source: Figure | Path, caption: str) -> str:
    """Return an HTML figure with a figure or a PNG file embedded."""
    if isinstance(source, Figure):
        buffer = io.BytesIO()
        source.savefig(buffer, format="png", dpi=110)
        data = buffer.getvalue()
    else:
        data = source.read_bytes()
    encoded = base64.b64encode(data).decode()
    return (
        f'<figure><img src="data:image/png;base64,{encoded}" alt="{html.escape(caption)}"></figure>'
    )


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
    for row in rows:
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in row))
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain-text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def page(title: str, parts: Iterable[str]) -> str:
    """Return a self-contained HTML document."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    heading = f"<h1>{html.escape(title)}</h1>"
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{heading}\n{body}</body></html>\n'
    )
