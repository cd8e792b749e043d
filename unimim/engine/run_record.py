"""run.json: what a run's folder says of how it was made, and of how far and how well it came."""

import json
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unimim import __version__
from unimim.files import write_text
from unimim.logs import log

FILE = "run.json"
ROOT = Path(__file__).resolve().parents[2]
_SKIPPED = ("epoch", "n_parameters", "train_lr")


class RunRecord:
    """Keeps run.json up to date: at the start, after each epoch, at the end.

    A resumed run keeps the first start and the best metrics, and lists the commands that went on.
    """

    def __init__(self, folder: Path, args: Namespace):
        self.path = folder / FILE
        held = read_record(self.path) if args.auto_resume or args.resume else {}
        now = {"command": command_line(), "start": moment(), "host": platform.node()}
        self.record: dict[str, Any] = {
            **now,
            "resumed": [],
            "version": __version__,
            "commit": git_commit(),
            "model": getattr(args, "model", None),
            "epochs": args.epochs,
            "epochs_done": 0,
            "end": None,
            "best": {},
        }
        if held:
            kept = {key: held[key] for key in (*now, "best", "epochs_done") if key in held}
            again = [*held.get("resumed", []), now | {"commit": self.record["commit"]}]
            self.record |= kept | {"resumed": again}
        self.write()

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Note the metrics of a finished epoch."""
        self.record["epochs_done"] = metrics["epoch"] + 1
        best = self.record["best"]
        for name, value in metrics.items():
            if name in _SKIPPED or not isinstance(value, (int, float)) or not is_ranked(name):
                continue
            known = best.get(name)
            if known is None or is_better(name, value, known["value"]):
                best[name] = {"value": value, "epoch": metrics["epoch"]}
        self.write()

    def end(self) -> None:
        """Note that the process ends, having finished or not."""
        self.record["end"] = moment()
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.record, indent=2) + "\n")


def is_ranked(name: str) -> bool:
    """Return whether one value of a metric is better than another."""
    return "loss" in name or "acc" in name or name.endswith("effective_rank")


def is_better(name: str, value: float, than: float) -> bool:
    """Return whether a value is better: a lower loss, a higher anything else."""
    return value < than if "loss" in name else value > than


def read_record(path: Path) -> dict[str, Any]:
    """Return what a run.json holds; empty where there is no whole one."""
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def command_line() -> str:
    return shlex.join([Path(sys.executable).name, *sys.argv])


def moment() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """Return the commit of the checkout, "-dirty" after it where files differ; None outside one."""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("no commit for %s: %s", FILE, error)
        return None
