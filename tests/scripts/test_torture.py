"""The script that damages and kills: it notices what is wrong, and in short finds nothing."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, run_command

from scripts.experiments import torture

ENDS = {
    "fine": lambda rng, folder: None,
    "silent": lambda rng, folder: "content changed silently",
    "traceback": lambda rng, folder: [][0],
    "crash": lambda rng, folder: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda rng, folder: time.sleep(60),
    "memory": lambda rng, folder: bytearray(2**33) and None,
}


@pytest.mark.parametrize("end", ENDS)
def test_every_disorderly_end_is_counted_once(end, monkeypatch):
    monkeypatch.setattr(torture, "HANG_SECONDS", 1)
    tally = torture.Tally(end)

    def trial(rng: random.Random, folder: Path) -> str | None:
        return ENDS[end](rng, folder) if folder.is_dir() and rng.random() < 2 else None

    torture.try_inputs(tally, trial, seed=0, first=0, last=2)
    assert tally.tried == 2
    words = {
        "silent": "silently", "traceback": "IndexError", "crash": "with -11", "hang": "(hung)",
        "memory": "MemoryError",
    }  # fmt: skip
    assert len(tally.failures) == (0 if end == "fine" else 2)
    assert all(words[end] in failure for failure in tally.failures), tally.failures
    assert f"| {end} | 2 | {2 - len(tally.failures)} | {len(tally.failures)} |" in torture.table(
        [tally]
    )


def test_damage_follows_from_the_seed_and_changes_something():
    content = bytes(range(256))
    ways = [torture.damaged(random.Random(seed), content) for seed in range(60)]
    assert ways == [torture.damaged(random.Random(seed), content) for seed in range(60)]
    assert sum(way != content for way in ways) > 50
    assert min(map(len, ways)) < 256 < max(map(len, ways))


@pytest.mark.slow
def test_a_short_round_finds_nothing():
    command = [sys.executable, str(ROOT / "scripts/experiments/torture.py"), "--inputs", "300"]
    kinds = [*torture.INPUTS, "second run", "SIGTERM: deepspeed, to the launcher"]
    result = run_command([*command, "--minutes", "3", "--rounds", "1", "--only", *kinds])
    assert result.returncode == 0, result.stdout
    assert "| checkpoint | 30 | 30 | 0 |" in result.stdout
    assert "| SIGTERM: deepspeed, to the launcher | 1 | 1 | 0 |" in result.stdout
