"""Checks what this machine computes, how fast, and that the methods learn on it, in one command and
a few minutes.

    python scripts/gpu_check.py --minutes 8 --output out/gpu

Sections, in the order of their worth: `right` compares the device with the CPU and the engines with
each other, `fast` measures training steps, `learns` pre-trains every method on small images. On a
CPU all of it runs with tiny sizes. Every result is a line of OUTPUT/results.jsonl as soon as it is
there; a check that raises is recorded with its exception and the next one runs. Exit code 1: a
check failed.
"""

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HIDDEN = (
    "details",
    "comparison",
    "method",
)  # not on the terminal: too long, or in the check's name
GRACE = 15.0  # seconds after its time in which a section has to end by itself
# Fractions of --minutes; what a section leaves over goes to the ones after it.
SECTIONS = {"right": 0.22, "fast": 0.48, "learns": 0.3}


@dataclass
class Checks:
    """Records results of checks while there is time for them."""

    device: torch.device
    output: Path
    deadline: float  # of the section that runs, in seconds of time.monotonic()
    tiny: bool = False  # sizes for a CPU
    data_path: Path | None = None  # small images to learn on
    models: tuple[str, ...] = ()  # of the section `fast`; none: all of them
    section: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)

    def time_left(self) -> float:
        """Return the seconds that the running section still has."""
        return self.deadline - time.monotonic()

    def record(self, check: str, *, ok: bool | None = None, **values: Any) -> None:
        """Append one result to results.jsonl; `ok` is None for a measurement that cannot fail."""
        row = {"section": self.section, "check": check, "ok": ok} | values
        self.results.append(row)
        with open(self.output / "results.jsonl", "a") as file:
            file.write(json.dumps(row, default=str) + "\n")
        verdict = {True: "ok", False: "FAILED", None: ""}[ok]
        text = "  ".join(
            f"{name} {short(value)}" for name, value in values.items() if name not in HIDDEN
        )
        print(f"{self.section:6s} {check:44s} {verdict:6s} {text}", flush=True)

    def read_back(self) -> None:
        """Take the results that other processes have recorded."""
        lines = (self.output / "results.jsonl").read_text().splitlines()
        self.results = [json.loads(line) for line in lines if line.endswith("}")]

    def attempt(
        self, check: str, run: Callable[[], dict[str, Any] | None], *, seconds: float = 0.0
    ) -> bool:
        """Run one check and records what it returns; False if it raised, or had no time to begin.

        `seconds` is what the check is expected to take. `run` returns the values to record, among
        them `ok` where there is something to pass; None records nothing.
        """
        if self.time_left() < seconds:
            self.record(check, skipped="no time left")
            return False
        begin = time.monotonic()
        try:
            values = run()
        except (Exception, SystemExit) as error:  # argparse exits
            details = traceback.format_exc()
            self.record(
                check, ok=False, error=f"{type(error).__name__}: {error}"[:500], details=details
            )
            return False
        if values is not None:
            values = {"ok": None} | values
            self.record(check, **values, seconds=round(time.monotonic() - begin, 2))
        return True


def short(value: Any) -> str:
    """Return a value as the terminal shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def section_functions() -> dict[str, Callable[[Checks], None]]:
    """Return what runs each section; imported late, so that --help needs no model code."""
    from scripts.benchmarks import gpu_fast, gpu_learns, gpu_right

    return {"right": gpu_right.run, "fast": gpu_fast.run, "learns": gpu_learns.run}


def describe_machine(checks: Checks) -> None:
    """Record device, driver and versions."""
    values: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if checks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(checks.device)
        values["device"] = properties.name
        values["memory_gib"] = round(properties.total_memory / 2**30, 1)
        values["cuda"] = torch.version.cuda
        values["cudnn"] = torch.backends.cudnn.version()
        values["devices"] = torch.cuda.device_count()
    else:
        values["device"] = "CPU"
        values["threads"] = torch.get_num_threads()
    checks.section = "machine"
    checks.record("machine", **values)


def run_sections(checks: Checks, args: argparse.Namespace) -> None:
    """Run the sections within --minutes together, each in a process of its own: a crash ends one
    of them only."""
    end = time.monotonic() + 60 * args.minutes
    remaining = {name: part for name, part in SECTIONS.items() if name in args.only}
    for name in list(remaining):
        share = remaining[name] / sum(remaining.values())
        del remaining[name]
        checks.section = name
        seconds = share * (end - time.monotonic())
        command = [sys.executable, __file__, "--section", name, "--minutes", f"{seconds / 60:.3f}"]
        command += ["--output", str(args.output), "--device", args.device]
        if args.data_path is not None:
            command += ["--data_path", str(args.data_path)]
        if args.models:
            command += ["--models", *args.models]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        checks.read_back()
        if code != 0:
            checks.record(f"section {name}", ok=False, error=f"ended with {code}")


def run_section(checks: Checks, name: str, minutes: float) -> None:
    """Run one section in this process."""
    checks.section = name
    checks.deadline = time.monotonic() + 60 * minutes
    function = section_functions()[name]
    checks.attempt(f"section {name}", lambda: function(checks))


def show_table(checks: Checks) -> None:
    """Print how many checks each section passed, and what failed."""
    print()
    for name in SECTIONS:
        rows = [row for row in checks.results if row["section"] == name]
        if not rows:
            continue
        passed = sum(row["ok"] is True for row in rows)
        failed = [row for row in rows if row["ok"] is False]
        measured = sum(row["ok"] is None for row in rows)
        print(f"{name:8s} {passed} passed, {len(failed)} failed, {measured} measured")
        for row in failed:
            print(f"  FAILED {row['check']}: {row.get('error', '')}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="what all sections may take together"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "out" / "gpu", help="folder of results.jsonl"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--data_path", type=Path, default=None, help="small images for `learns`; without: digits"
    )
    parser.add_argument(
        "--models", nargs="+", default=[], help="rows of `fast`, by their names; without: all"
    )
    parser.add_argument(
        "--section", choices=SECTIONS, help=argparse.SUPPRESS
    )  # of a process begun by this script
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    faulthandler.enable()
    device = torch.device(args.device)
    checks = Checks(
        device, args.output, deadline=0.0, tiny=device.type == "cpu", data_path=args.data_path
    )
    checks.models = tuple(args.models)
    if args.section is not None:
        return run_section(checks, args.section, args.minutes)
    (args.output / "results.jsonl").unlink(missing_ok=True)
    describe_machine(checks)
    run_sections(checks, args)
    show_table(checks)
    sys.exit(any(row["ok"] is False for row in checks.results))


if __name__ == "__main__":
    main()
