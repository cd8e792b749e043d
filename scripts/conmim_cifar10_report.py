"""The table and the picture of docs/results.md from the runs of scripts/conmim_cifar10.sh.

Usage: conmim_cifar10_report.py RUNS_FOLDER PICTURE.png
"""

import json
import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATCHES = 64
ARMS = {"pretrained": "ConMIM teacher", "random": "random weights"}


def read_log(folder: Path) -> list[dict]:
    """One dict an epoch."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def print_table(runs: Path, seeds: list[str]) -> None:
    """Markdown rows: pre-training loss and last-epoch accuracies of each seed, then mean and deviation."""
    rows = []
    for seed in seeds:
        last = read_log(runs / f"pretrain-{seed}")[-1]
        accuracies = [read_log(runs / f"finetune-{arm}-{seed}")[-1]["test_acc1"] for arm in ARMS]
        rows.append((last["train_loss"], 100 * last["train_contrast_acc"], *accuracies))
    print(
        "| seed | contrast loss, last epoch | contrast accuracy, % | "
        + " | ".join(f"{a}, %" for a in ARMS.values())
        + " |"
    )
    print("|---|---|---|---|---|")
    for seed, (loss, hits, *accuracies) in zip(seeds, rows, strict=True):
        print(f"| {seed} | {loss:.3f} | {hits:.1f} | " + " | ".join(f"{a:.1f}" for a in accuracies) + " |")
    columns = list(zip(*rows, strict=True))
    print(
        f"| mean ± sd | {statistics.mean(columns[0]):.3f} | " + " | ".join(spread(list(c)) for c in columns[1:]) + " |"
    )


def plot(runs: Path, seeds: list[str], picture: Path) -> None:
    """Left the contrast loss of pre-training, right the accuracy while fine-tuning."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for seed in seeds:
        loss = [epoch["train_loss"] for epoch in read_log(runs / f"pretrain-{seed}")]
        left.plot(range(1, len(loss) + 1), loss, color="tab:blue", alpha=0.8)
        for arm, colour in zip(ARMS, ("tab:blue", "tab:grey"), strict=True):
            accuracy = [epoch["test_acc1"] for epoch in read_log(runs / f"finetune-{arm}-{seed}")]
            label = ARMS[arm] if seed == seeds[0] else None
            right.plot(range(1, len(accuracy) + 1), accuracy, color=colour, alpha=0.8, label=label)
    left.axhline(math.log(PATCHES), color="black", linewidth=0.8, linestyle=":")
    left.text(1, math.log(PATCHES), " chance, ln 64", va="bottom", fontsize=8)
    left.set(xlabel="epoch", ylabel="contrast loss (nats)", title="ConMIM pre-training")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)", title="Fine-tuning on 10 % of the labels")
    right.legend(frameon=False, loc="lower right")
    figure.savefig(picture, dpi=110)


def main() -> None:
    runs, picture = Path(sys.argv[1]), Path(sys.argv[2])
    seeds = sorted(folder.name.rpartition("-")[2] for folder in runs.glob("finetune-random-*"))
    if not seeds:
        raise SystemExit(f"no finished seed below {runs}: run scripts/conmim_cifar10.sh first")
    print_table(runs, seeds)
    plot(runs, seeds, picture)


if __name__ == "__main__":
    main()
