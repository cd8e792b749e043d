"""List the runs below a folder with their best metrics.

    python scripts/tools/runs.py FOLDER [--sort METRIC] [--csv FILE]

A run is a folder with run.json, which every training writes to --output_dir.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.engine.monitor import clock
from unimim.engine.run_record import FILE, is_better, read_record
from unimim.files import write_table

# the metrics that are shown where a run has them, in this order
SHOWN = ("test_acc1", "test_acc1_ema", "knn_acc1", "linear_acc1", "teacher_knn_acc1",
         "teacher_linear_acc1", "train_loss")  # fmt: skip


def row_of(path: Path, root: Path) -> dict[str, Any]:
    """Return what the table shows of a run.json; empty for one that cannot be read."""
    record = read_record(path)
    if not record:
        return {}
    best = {name: found["value"] for name, found in record.get("best", {}).items()}
    done, epochs = record.get("epochs_done", 0), record.get("epochs", 0)
    return {
        "run": str(path.parent.relative_to(root)),
        "model": record.get("model") or "",
        "epochs": f"{done}/{epochs}",
        "state": state_of(record),
        "took": took(record),
        "commit": record.get("commit") or "",
        **{name: best[name] for name in SHOWN if name in best},
        **{name: value for name, value in best.items() if name not in SHOWN},
    }


def state_of(record: dict[str, Any]) -> str:
    """Return "finished", "stopped", or "running", which a killed run seems to be too."""
    if record.get("epochs_done", 0) >= record.get("epochs", 0):
        return "finished"
    return "stopped" if record.get("end") else "running"


def took(record: dict[str, Any]) -> str:
    """Return the time from the first start to the end; empty for a run without an end."""
    if not record.get("end"):
        return ""
    begin, end = (datetime.fromisoformat(record[key]) for key in ("start", "end"))
    return clock((end - begin).total_seconds())


def find_runs(root: Path) -> list[dict[str, Any]]:
    """Return a row for each run below a folder, in the order of their names."""
    rows = (row_of(path, root) for path in sorted(root.rglob(FILE)))
    return [row for row in rows if row]


def by_metric(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return the rows, best first; those without the metric come last."""
    having = [row for row in rows if metric in row]
    if not having:
        known = sorted({name for row in rows for name in row if isinstance(row[name], float)})
        raise ValueError(f"--sort {metric}: no run has it; there are {', '.join(known) or 'none'}")
    high = is_better(metric, 1, 0)
    having.sort(key=lambda row: row[metric], reverse=high)
    return having + [row for row in rows if metric not in row]


def text_of(rows: list[dict[str, Any]]) -> str:
    """Return a table of the columns that all runs have and of the metrics in `SHOWN`."""
    names = [name for name in rows[0] if not isinstance(rows[0][name], float)]
    names += [name for name in SHOWN if any(name in row for row in rows)]
    lines = [names]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        lines.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write all columns of all runs; one that a run lacks is empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    write_table(file, [names | row for row in rows])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to look, at any depth")
    parser.add_argument("--sort", default=None, metavar="METRIC", help="best first, by this metric")
    parser.add_argument("--csv", type=Path, default=None, metavar="FILE", help="write all metrics")
    args = parser.parse_args(argv)
    rows = find_runs(args.folder)
    if not rows:
        parser.error(f"{args.folder} holds no run: no {FILE} is below it")
    try:
        rows = by_metric(rows, args.sort) if args.sort else rows
        if args.csv:
            write_csv(args.csv, rows)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(text_of(rows))


if __name__ == "__main__":
    main()
