"""Print the table and draw the figure of docs/results.md from runs of conmim_cifar10.sh.

Usage: conmim_cifar10_report.py RUNS_FOLDER FIGURE.png
"""

import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim import report

PATCHES = 64
ARMS = {"pretrained": "ConMIM teacher", "random": "random weights"}


def table(runs: Path, seeds: list[str]) -> str:
    """Return a Markdown table: loss and last-epoch accuracies of each seed, then mean and std."""
    header = "| seed | contrast loss, last epoch | contrast accuracy, % | "
    lines = [
        header + " | ".join(f"{arm}, %" for arm in ARMS.values()) + " |",
        "|---" * (3 + len(ARMS)) + "|",
    ]
    rows = []
    for seed in seeds:
        last = report.read_log(runs / f"pretrain-{seed}")[-1]
        accuracies = [
            report.read_log(runs / f"finetune-{arm}-{seed}")[-1]["test_acc1"] for arm in ARMS
        ]
        rows.append((last["train_loss"], 100 * last["train_contrast_acc"], *accuracies))
        lines.append(f"| {seed} | " + " | ".join(f"{value:.2f}" for value in rows[-1]) + " |")
    spreads = [report.spread(column, 2) for column in zip(*rows, strict=True)]
    lines.append(f"| mean ± std | {' | '.join(spreads)} |")
    return "\n".join(lines)


def figure_of(runs: Path, seeds: list[str]) -> Figure:
    """Plot the contrast loss of pre-training and the accuracy during fine-tuning."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for seed in seeds:
        loss = [epoch["train_loss"] for epoch in report.read_log(runs / f"pretrain-{seed}")]
        left.plot(range(1, len(loss) + 1), loss, color=report.COLORS[0], alpha=0.8)
        for arm, color in zip(ARMS, report.COLORS, strict=False):
            accuracy = [
                epoch["test_acc1"] for epoch in report.read_log(runs / f"finetune-{arm}-{seed}")
            ]
            label = ARMS[arm] if seed == seeds[0] else None
            right.plot(range(1, len(accuracy) + 1), accuracy, color=color, alpha=0.8, label=label)
    left.axhline(math.log(PATCHES), color="black", linewidth=0.8, linestyle=":")
    left.text(1, math.log(PATCHES), f" guessing, ln {PATCHES}", va="bottom", fontsize=8)
    left.set(xlabel="epoch", ylabel="contrast loss (nats)", title="ConMIM pre-training")
    right.set(
        xlabel="epoch", ylabel="validation accuracy (%)", title="Fine-tuning on 10 % of the labels"
    )
    right.legend(frameon=False, loc="lower right")
    return figure


def main() -> None:
    """Print the table and write the figure."""
    runs = Path(sys.argv[1])
    file = Path(sys.argv[2])
    seeds = sorted(folder.name.rpartition("-")[2] for folder in runs.glob("finetune-random-*"))
    if not seeds:
        raise SystemExit(
            f"no finished seed below {runs}; run scripts/experiments/conmim_cifar10.sh first"
        )
    print(table(runs, seeds))
    figure_of(runs, seeds).savefig(file, dpi=110)


if __name__ == "__main__":
    main()
