"""Report finished runs: read logs, draw learning curves, write a self-contained HTML page."""

import base64
import html
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

# Safe for color-blind readers; the first is the method's color, the second the baseline's.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 }
h2 { margin-top: 2.5rem }
img { max-width: 100%; height: auto }
.lead { font-size: 1.15rem }
figure { margin: 1.2rem 0 }
figcaption { font-size: .85rem; color: #555 }
pre { background: #f5f5f5; padding: .8rem; font-size: .75rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc }
th { text-align: left }
th:not(:first-child), td:not(:first-child) { text-align: right }
td:not(:first-child) { font-variant-numeric: tabular-nums; white-space: nowrap }
@media print {
  @page { margin: 15mm }
  body { max-width: none; margin: 0; padding: 0; font-size: 10.5pt }
  .wide { overflow: visible }
  table { font-size: 9pt }
  th, td { padding: .2rem .5rem }
  figure, table { break-inside: avoid }
  h2 { break-after: avoid }
}
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


def dots(
    values: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    names: tuple[str, str],
    level: float,
    level_name: str,
) -> Figure:
    """Plot two groups of accuracies in percent for each row, and a common level as a line."""
    figure = Figure(figsize=(7.4, 0.42 * len(values) + 1.1), layout="constrained")
    axis = figure.subplots()
    rows = list(values)[::-1]
    for row, label in enumerate(rows):
        learned, untrained = values[label]
        ends = (statistics.mean(untrained), statistics.mean(learned))
        axis.plot(ends, (row, row), color="#bbb", linewidth=1, zorder=1)
        for group, color, name in (
            (learned, COLORS[0], names[0]),
            (untrained, COLORS[1], names[1]),
        ):
            axis.scatter(
                group, [row] * len(group), color=color, s=28, label=name if row == 0 else None
            )
    axis.axvline(level, color="#888", linewidth=0.9, linestyle="--", label=level_name)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel="accuracy (%)", xlim=(0, 100))
    axis.legend(frameon=False, loc="lower left", fontsize=8)
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
    text = html.escape(caption)
    shown = f'<img src="data:image/png;base64,{encoded}" alt="{text}">'
    return f"<figure>{shown}<figcaption>{text}</figcaption></figure>"


def lead(text: str) -> str:
    """Return the opening HTML paragraph, in larger type."""
    return f'<p class="lead">{html.escape(text)}</p>'


def paragraph(text: str) -> str:
    """Return an HTML paragraph."""
    return f"<p>{html.escape(text)}</p>"


def listing(text: str) -> str:
    """Return preformatted HTML text, whose long lines are wrapped."""
    return f"<pre>{html.escape(text)}</pre>"


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


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
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    heading = f"<h1>{html.escape(title)}</h1>"
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{heading}\n{body}</body></html>\n'
    )
