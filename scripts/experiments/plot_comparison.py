"""Draws and tabulates the accuracies of compare_methods.py or gpu_learns.py.

    python scripts/experiments/plot_comparison.py results.csv comparison.png [--epochs 7]
    python scripts/experiments/plot_comparison.py docs/results/cifar10.csv \
        docs/results/cifar10.png --page docs/results.md

Methods that train the same network stand together, and a line shows what its random weights reach.
Error bars and ± are standard errors of the mean over the seeds; differences are paired by seed.
Prints the tables; --page also writes them into a page, between the lines
"<!-- plot_comparison.py: NAME -->" and "<!-- end -->".
"""

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from scripts.experiments.compare_methods import ALL_METHODS, UNPUBLISHED
from unimim.files import write_text

COLUMNS = {
    "knn_acc1": "k-NN",
    "linear_acc1": "linear probe",
    "finetune_acc1": "fine-tuned, 10 % of labels",
}
MARKERS = "oDs^"  # of the lengths of pre-training, the shortest first
GAP = 0.7  # between the methods of two networks, in rows
# what each paper says is better, and than what
CLAIMS = (
    ("conmim", "beit"),
    ("semmae", "mae"),
    ("pixio", "mae"),
    ("semaim", "saim"),
    ("semaim", "semaim_raster"),
    ("semaim", "igpt"),
    ("semaim", "mae"),
    ("semanticmim_beit", "beit"),
    ("semanticmim_maskfeat", "maskfeat"),
    ("a2mim_vit", "simmim_vit"),
    ("a2mim_resnet18", "simmim_resnet18"),
)
# the published methods nearest to each point that nobody has published
NEIGHBORS = (
    ("mae_hog", "mae"),
    ("mae_hog", "maskfeat"),
    ("mae_contrast", "mae"),
    ("mae_contrast", "conmim"),
    ("mae_attention", "mae"),
    ("mae_spectra", "mae"),
    ("semanticmim_pixels", "semanticmim_maskfeat"),
    ("semmae_hog", "semmae_strong"),
    ("semmae_hog", "mae_hog"),
)
Rows = Sequence[dict[str, str]]

# --------------------------------------------------------------------------------------------------
# Rows


def read_rows(file: Path, data: str | None, epochs: Sequence[int] | None) -> list[dict[str, str]]:
    """Return the rows of one data set, those of some lengths of pre-training and of random weights.

    Raises:
        ValueError: no such rows, or rows of several data sets and none is named.
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = sorted({row["data"] for row in rows})
    if data is None and len(found) > 1:
        raise ValueError(f"{file} has rows of {', '.join(found)}; name one with --data")
    rows = [row for row in rows if data in (None, row["data"])]
    if epochs is not None:
        wanted = {str(length) for length in epochs}
        rows = [row for row in rows if is_random(row["method"]) or row.get("epochs") in wanted]
    if not any(not is_random(row["method"]) for row in rows):
        raise ValueError(f"{file} has no rows of that kind; see its columns data and epochs")
    return rows


def is_random(key: str) -> bool:
    """Whether a method is the random weights of a network."""
    return not ALL_METHODS[key].pretrain


def published(rows: Rows) -> list[dict[str, str]]:
    """Return the rows without the points of the space that nobody has published."""
    return [row for row in rows if row["method"] not in UNPUBLISHED]


def lengths(rows: Rows) -> list[str]:
    """Return the lengths of pre-training, the shortest first; [""] if the table names none."""
    found = {row.get("epochs", "") for row in rows if not is_random(row["method"])}
    return sorted(found, key=lambda text: (len(text), text))


def of_length(rows: Rows, epochs: str) -> list[dict[str, str]]:
    """Return the rows of one length of pre-training and those of random weights."""
    return [row for row in rows if is_random(row["method"]) or row.get("epochs", "") == epochs]


def by_seed(rows: Rows, key: str, column: str) -> dict[str, float]:
    """Return a method's values by seed; `rows` are of one length."""
    return {row["seed"]: float(row[column]) for row in rows if row["method"] == key}


def groups_of(rows: Rows) -> list[tuple[str | None, list[str]]]:
    """Return the methods of each network with the random weights of that network, or None."""
    present = {row["method"] for row in rows}
    keys = [key for key in ALL_METHODS if key in present]
    groups = []
    for network in dict.fromkeys(ALL_METHODS[key].classifier for key in keys):
        own = [key for key in keys if ALL_METHODS[key].classifier == network]
        random = next((key for key in own if is_random(key)), None)
        groups.append((random, [key for key in own if not is_random(key)]))
    return [group for group in groups if group[1]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is 0 for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def differences(rows: Rows, key: str, other: str, column: str) -> list[float]:
    """Return by how much a method is above another, for each seed that both have."""
    ours, theirs = by_seed(rows, key, column), by_seed(rows, other, column)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


# --------------------------------------------------------------------------------------------------
# Tables


def with_error(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Return mean ± standard error, or a single value alone."""
    mean, error = mean_and_error(values)
    text = f"{mean:{sign}.{digits}f}"
    return f"{text} ± {error:.{digits}f}" if len(values) > 1 else text


def accuracy_table(rows: Rows) -> str:
    """Return Markdown: for each network its random weights and the methods that train it."""
    lines = [
        "| method | seeds | pre-training loss | k-NN, % | linear, % | fine-tuned, % |",
        "|---|---|---|---|---|---|",
    ]
    for random, keys in groups_of(rows):
        for key in [random] * (random is not None) + keys:
            seeds = len(by_seed(rows, key, "knn_acc1"))
            loss = list(by_seed(rows, key, "pretrain_loss").values())
            loss = "" if is_random(key) else with_error(loss, digits=3)
            cells = [with_error(list(by_seed(rows, key, column).values())) for column in COLUMNS]
            label = f"*{ALL_METHODS[key].label}*" if is_random(key) else ALL_METHODS[key].label
            lines.append(f"| {label} | {seeds} | {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_table(rows: Rows, pairs: Sequence[tuple[str, str]]) -> str:
    """Return Markdown: differences paired by seed, in bold above two standard errors."""
    lines = ["| | against | k-NN | linear | fine-tuned |", "|---|---|---|---|---|"]
    for key, other in pairs:
        cells = []
        for column in COLUMNS:
            values = differences(rows, key, other, column)
            mean, error = mean_and_error(values)
            text = with_error(values, sign="+")
            clear = len(values) > 1 and abs(mean) > 2 * error
            cells.append(f"**{text}**" if clear else text)
        lines.append(
            f"| {ALL_METHODS[key].label} | {ALL_METHODS[other].label} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def tables(rows: Rows) -> dict[str, str]:
    """Return every table by its name in a page."""
    found = {}
    for epochs in lengths(rows):
        every = of_length(rows, epochs)
        own = published(every)
        present = {row["method"] for row in every}
        name = f" {epochs} epochs" if epochs else ""
        found[f"accuracies{name}"] = accuracy_table(own)
        gains = [(key, random) for random, keys in groups_of(own) if random for key in keys]
        claims = [pair for pair in CLAIMS if present.issuperset(pair)]
        neighbors = [pair for pair in NEIGHBORS if present.issuperset(pair)]
        if present & UNPUBLISHED.keys():
            others = [row for row in every if row["method"] in UNPUBLISHED]
            found[f"unpublished{name}"] = accuracy_table(others)
        for kind, pairs in (("gains", gains), ("claims", claims), ("neighbors", neighbors)):
            if pairs:
                found[f"{kind}{name}"] = difference_table(every, pairs)
    return found


def fill_in(page: str, found: dict[str, str]) -> str:
    """Return a page with its tables replaced by new ones of the same names.

    Raises:
        ValueError: the page names a table that there is not.
    """

    def replaced(match: re.Match) -> str:
        if match[1] not in found:
            raise ValueError(f"no table is called {match[1]!r}; use {', '.join(found)}")
        return f"<!-- plot_comparison.py: {match[1]} -->\n\n{found[match[1]]}\n\n<!-- end -->"

    pattern = r"<!-- plot_comparison\.py: (.*?) -->\n.*?<!-- end -->"
    return re.sub(pattern, replaced, page, flags=re.DOTALL)


# --------------------------------------------------------------------------------------------------
# Picture


def draw(axes: Axes, rows: Rows, column: str) -> dict[str, float]:
    """Draw one kind of accuracy; return the height of each method, from the top down."""
    heights: dict[str, float] = {}
    top = 0.0
    for number, (random, keys) in enumerate(groups_of(rows)):
        color = f"C{number}"
        heights |= {key: top + row for row, key in enumerate(keys)}
        if random is not None:
            mean, error = mean_and_error(list(by_seed(rows, random, column).values()))
            span = (top - 0.45, top + len(keys) - 0.55)
            axes.fill_betweenx(span, mean - error, mean + error, color=color, alpha=0.2)
            axes.plot([mean, mean], span, "--", color=color, linewidth=1.2)
        for epochs, marker in zip(lengths(rows), MARKERS, strict=False):
            own = of_length(rows, epochs)
            # the shortest, which all methods have, is filled
            face = color if marker == MARKERS[0] else "white"
            style = {"fmt": marker, "color": color, "markerfacecolor": face, "capsize": 2.5}
            for key in keys:
                values = list(by_seed(own, key, column).values())
                if values:
                    mean, error = mean_and_error(values)
                    axes.errorbar(mean, heights[key], xerr=error or None, markersize=5, **style)
        top += len(keys) + GAP
    axes.set_title(COLUMNS[column], fontsize=10)
    axes.set_xlabel("accuracy, %")
    axes.grid(axis="x", alpha=0.3)
    return heights


def legend_entries(rows: Rows) -> list[Line2D]:
    """Return a marker for each length of pre-training and a line for each network."""
    entries = []
    for epochs, marker in zip(lengths(rows), MARKERS, strict=False):
        own = [row for row in of_length(rows, epochs) if not is_random(row["method"])]
        seeds = sorted({row["seed"] for row in own})
        steps = own[0].get("steps")
        length = f"{int(steps):,} steps, " if steps else ""
        many = f"mean and standard error of {len(seeds)} seeds"
        label = length + (many if len(seeds) > 1 else f"seed {seeds[0]} only")
        face = "0.3" if marker == MARKERS[0] else "white"
        style = {"color": "0.3", "markerfacecolor": face, "linestyle": "none"}
        entries.append(Line2D([], [], marker=marker, label=label, **style))
    for number, (random, _) in enumerate(groups_of(rows)):
        if random is not None:
            label = ALL_METHODS[random].label
            entries.append(Line2D([], [], linestyle="--", color=f"C{number}", label=label))
    return entries


def plot(rows: Rows, picture: Path) -> None:
    """Write a picture of all three kinds of accuracy."""
    groups = groups_of(rows)
    count = sum(len(keys) + GAP for _, keys in groups)
    # nine inches wide, so that letters keep their size where a page is about 900 pixels wide
    size = (9, 1.9 + 0.25 * count)
    figure, panels = plt.subplots(1, len(COLUMNS), sharey=True, figsize=size, layout="constrained")
    for axes, column in zip(panels, COLUMNS, strict=True):
        heights = draw(axes, rows, column)
    labels = [ALL_METHODS[key].label for key in heights]
    panels[0].set_yticks(list(heights.values()), labels)
    colors = [f"C{number}" for number, (_, keys) in enumerate(groups) for _ in keys]
    for label, color in zip(panels[0].get_yticklabels(), colors, strict=True):
        label.set_color(color)
    panels[0].invert_yaxis()
    figure.legend(handles=legend_entries(rows), loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="results.csv or learns.csv")
    parser.add_argument("picture", type=Path, nargs="?", help="PNG to write")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced")
    parser.add_argument("--data", help="one of the table's data sets")
    parser.add_argument(
        "--epochs", type=int, nargs="+", help="some of the table's lengths of pre-training"
    )
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.table, args.data, args.epochs)
        found = tables(rows)
        if args.picture is not None:
            plot(published(rows), args.picture)
        if args.page is not None:
            write_text(args.page, fill_in(args.page.read_text(), found))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n\n".join(f"{name}\n\n{table}" for name, table in found.items()))


if __name__ == "__main__":
    main()
