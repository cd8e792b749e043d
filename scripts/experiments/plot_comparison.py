"""Draws the table of compare_methods.py or gpu_learns.py: mean accuracies with standard errors.

    python scripts/experiments/plot_comparison.py results.csv comparison.png [--epochs 7]

Methods that train the same network stand together, and a line shows what its random weights reach.
Error bars are standard errors of the mean over the seeds.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from scripts.experiments.compare_methods import METHODS

COLUMNS = {
    "knn_acc1": "k-NN",
    "linear_acc1": "linear probe",
    "finetune_acc1": "fine-tuned on a tenth of the labels",
}


def read_rows(file: Path, data: str | None, epochs: int | None) -> list[dict[str, str]]:
    """Returns the rows of one data set and one length of pre-training, and of random weights.

    Raises:
        ValueError: no such rows, or rows of several lengths or data sets and none is named.
    """
    rows = list(csv.DictReader(file.open()))
    for name, wanted, flag in (("data", data, "--data"), ("epochs", epochs, "--epochs")):
        trained = [row for row in rows if METHODS[row["method"]].pretrain]
        found = sorted({row.get(name, "") for row in trained}, key=lambda text: (len(text), text))
        if wanted is None and len(found) > 1:
            raise ValueError(f"{file} has rows of {', '.join(found)}; name one with {flag}")
        if wanted is not None:
            own = trained if name == "epochs" else rows
            rows = [row for row in rows if row not in own or row.get(name) == str(wanted)]
    if not rows:
        raise ValueError(f"{file} has no rows of that kind; see its columns data and epochs")
    return rows


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, which is 0 for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def groups_of(rows: Sequence[dict[str, str]]) -> list[tuple[str | None, list[str]]]:
    """Returns the methods of each network with the random weights of that network, or None."""
    present = {row["method"] for row in rows}
    keys = [key for key in METHODS if key in present]
    groups = []
    for network in dict.fromkeys(METHODS[key].classifier for key in keys):
        own = [key for key in keys if METHODS[key].classifier == network]
        random = next((key for key in own if not METHODS[key].pretrain), None)
        groups.append((random, [key for key in own if METHODS[key].pretrain]))
    return [group for group in groups if group[1]]


def draw(axes: Axes, rows: Sequence[dict[str, str]], column: str) -> list[str]:
    """Draws one kind of accuracy; returns the labels of the methods from the top down."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["method"], []).append(float(row[column]))
    labels: list[str] = []
    for number, (random, keys) in enumerate(groups_of(rows)):
        places = range(len(labels), len(labels) + len(keys))
        means, errors = zip(*(mean_and_error(values[key]) for key in keys), strict=True)
        axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3, color=f"C{number}")
        if random is not None:
            mean, error = mean_and_error(values[random])
            span = (places[0] - 0.4, places[-1] + 0.4)
            axes.fill_betweenx(span, mean - error, mean + error, color=f"C{number}", alpha=0.2)
            axes.plot([mean, mean], span, "--", color=f"C{number}", linewidth=1)
        labels += [METHODS[key].label for key in keys]
    axes.set_title(COLUMNS[column])
    axes.set_xlabel("accuracy, %")
    axes.grid(axis="x", alpha=0.3)
    return labels


def plot(rows: Sequence[dict[str, str]], picture: Path) -> None:
    """Writes a picture of all three kinds of accuracy."""
    count = len({row["method"] for row in rows})
    figure, panels = plt.subplots(
        1, len(COLUMNS), sharey=True, figsize=(12, 1.6 + 0.27 * count), layout="constrained"
    )
    for axes, column in zip(panels, COLUMNS, strict=True):
        labels = draw(axes, rows, column)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"Mean and standard error of up to {seeds} seeds; dashed: random weights of that network",
        fontsize=10,
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="results.csv or learns.csv")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--data", help="one of the table's data sets")
    parser.add_argument("--epochs", type=int, help="one of the table's lengths of pre-training")
    args = parser.parse_args(argv)
    try:
        plot(read_rows(args.table, args.data, args.epochs), args.picture)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
