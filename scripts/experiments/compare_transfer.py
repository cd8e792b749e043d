"""Compare UPerNet on `shapes` from pre-trained encoders and from random weights: a table of mIoU.

The encoders are those of scripts/experiments/compare_methods.py. All runs have the same number of
iterations; finished ones are not repeated.

    python scripts/experiments/compare_methods.py --data shapes --methods mae --output OUTPUT
    python scripts/experiments/compare_transfer.py --methods mae --compare OUTPUT
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.experiments.compare_methods import METHODS, encoder_of
from unimim import report
from unimim.data.shapes import cached_shapes
from unimim.files import write_rows, write_text

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "semantic_segmentation" / "configs" / "shapes" / "upernet_tiny_shapes.py"


@dataclass(frozen=True)
class TransferRow:
    """One row of transfer.csv: percent on the validation images after the last iteration."""

    method: str
    seed: int
    miou: float
    accuracy: float
    pretrained: str


def train(
    data: Path, folder: Path, pretrained: str, seed: int, options: Sequence[str]
) -> tuple[float, float]:
    """Return mIoU and pixel accuracy of a run, trained unless it has finished in `folder`."""
    results = folder / "results.json"
    if not results.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder}", flush=True)
        command = [
            sys.executable,
            str(ROOT / "semantic_segmentation" / "train.py"),
            str(CONFIG),
            *("--pretrained", pretrained),
            *("--seed", str(seed)),
            *("--data-root", str(data)),
            *("--work-dir", str(folder)),
            *options,
        ]
        with (folder / "output.txt").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        if ended.returncode:
            raise SystemExit(f"{folder}: the run failed; see output.txt there")
        write_text(results, json.dumps(last_metrics(folder)))
    metrics = json.loads(results.read_text())
    return metrics["mIoU"], metrics["aAcc"]


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the last validation that mmengine logged below `folder`."""
    newest = max(folder.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    return next(row for row in reversed(rows) if "mIoU" in row)


def table(results: Sequence[TransferRow]) -> str:
    """Return a Markdown table: per start the mean and std over the seeds, then each seed."""
    seeds = sorted({row.seed for row in results})
    columns = " | ".join(f"seed {seed}, mIoU" for seed in seeds)
    lines = [
        f"| start | mIoU, % | pixel accuracy, % | {columns} |",
        "|---" * (3 + len(seeds)) + "|",
    ]
    for method in dict.fromkeys(row.method for row in results):
        rows = [row for row in results if row.method == method]
        miou = report.spread([row.miou for row in rows])
        accuracy = report.spread([row.accuracy for row in rows])
        each = " | ".join(f"{row.miou:.1f}" for row in rows)
        lines.append(f"| {METHODS[method].label} | {miou} | {accuracy} | {each} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all runs, write transfer.csv, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["mae"],
        choices=METHODS,
        help="methods of compare_methods.py to start from",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        default=ROOT / "output" / "compare",
        help="output folder of compare_methods.py",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        help="folder of the shapes data set (default: the cache)",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "transfer")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="configuration entries to override in every run",
    )
    args = parser.parse_args(argv)
    data = cached_shapes(args.data)
    results = []
    options = ["--cfg-options", *args.cfg_options] if args.cfg_options else []
    for seed in args.seeds:
        for method in ["random", *args.methods]:
            start = "none"
            if method != "random":
                pretraining = args.compare / "shapes" / f"seed{seed}" / method / "pretrain"
                start = str(encoder_of(pretraining).resolve())
            folder = args.output / f"seed{seed}" / method
            results.append(
                TransferRow(method, seed, *train(data, folder, start, seed, options), start)
            )
    write_rows(args.output / "transfer.csv", results)
    print(table(results))


if __name__ == "__main__":
    main()
