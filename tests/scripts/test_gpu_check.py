"""scripts/gpu_check.py on a CPU: what it says of tiny runs is there for every method, and
passes."""

import json
import sys

import pytest
from helpers import METHODS, ROOT, run_command

ALL = {"conmim", *METHODS}
TRANSFORMERS = ALL - {"a2mim_resnet"}
COMPARISONS = {
    "bf16 against fp32": ALL,
    "skip of a non-finite step, fp32": ALL,
    "grad checkpointing": ALL,
    "sdpa against eager, fp32": TRANSFORMERS,
    "resume, deterministic kernels": {"conmim", "mae", "a2mim_resnet"},
    **{f"ZeRO {stage} against plain": {"conmim", "mae"} for stage in range(4)},
    "DeepSpeed bf16, ZeRO 2, against plain": {"conmim", "mae"},
    "optimizer on the host, fp32, ZeRO 1, against plain": {"conmim", "mae"},
    **{f"first step skipped, {name}, bf16": {"conmim", "mae"} for name in ("sgd", "adamw", "lamb")},
}
ALONE = (
    "--decode gpu against cpu",
    "k-NN on the device against CPU",
    "linear probing on the device against CPU",
    "SyncBN in a group of one",
    "average on the host",
)


@pytest.mark.slow
def test_right_passes_for_every_method(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts/gpu_check.py"),
        "--only",
        "right",
        "--minutes",
        "4",
    ]
    done = run_command([*command, "--device", "cpu", "--output", str(tmp_path)])
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for comparison, methods in COMPARISONS.items():
        passed = {
            row["method"]
            for row in rows
            if row.get("comparison") == comparison and row["ok"] is True
        }
        assert passed == methods, comparison
    assert {row["check"] for row in rows if row["ok"] is True} >= set(ALONE)
    assert "0 failed" in done.stdout
