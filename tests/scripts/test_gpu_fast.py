"""The section `fast` of gpu_check.py: every model has a row, with the FLOPs that are counted
without the section."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import ROOT

from modeling_finetune import Block
from scripts.benchmarks import gpu_ab, gpu_fast
from scripts.benchmarks.benchmark import random_batch
from scripts.benchmarks.data import write_stand_in
from scripts.gpu_check import Checks
from unimim.cli.models import build_classifier, build_method
from unimim.engine.monitor import count_flops


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What one run of the section with tiny sizes leaves behind."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [
        sys.executable,
        "scripts/gpu_check.py",
        "--only",
        "fast",
        "--device",
        "cpu",
        "--output",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def rows_of(output, variant: str) -> dict[str, dict]:
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return {
        row["model"]: row for row in reversed(rows) if row.get("variant") == variant
    }  # the first of each stays


@pytest.mark.slow
def test_every_model_has_a_row(output):
    eager, plain = rows_of(output, "eager"), rows_of(output, "plain")
    assert eager.keys() == {*gpu_fast.CASES, gpu_fast.LAUNCHES.name} and plain.keys() == {
        *gpu_fast.PLAIN
    }
    for row in [*eager.values(), *plain.values()]:
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"])
        assert row["tflops"] == pytest.approx(row["images_per_s"] * row["gflop_per_image"] / 1e3)
        assert row["gemm_share"] == pytest.approx(row["tflops"] / row["gemm_tflops"])
    table = (output / "fast.md").read_text()
    for name in gpu_fast.CASES:
        assert table.count(f"\n| {name} | {eager[name]['batch']} | ") >= 1
    for name in gpu_fast.PROFILED:
        assert f"### Kernels of a step: {name}, eager" in table
        assert (output / f"profile-{gpu_fast.file_name(name)}-eager.txt").read_text()
    lines = (output / "results.jsonl").read_text().splitlines()
    eats = {
        row["check"]: row["model_eats"] for row in map(json.loads, lines) if "model_eats" in row
    }
    for decode in ("", ", --decode gpu"):
        assert eats[f"JPEGs alone{decode}"] is None and eats[f"JPEGs into MAE B{decode}"] > 0
    assert "into MAE B's step" in table and "| high |" in table and "| highest |" in table


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ConMIM B", "MAE L", "SemAIM B", "A2MIM ResNet-50", "SimMIM Swin-B"]
)
def test_flops_are_those_of_forward_and_backward(output, name):
    args = gpu_fast.CASES[name].args(tiny=True)
    method = build_method(args)
    batch = random_batch(method, 4, torch.device("cpu"), gpu_fast.mask_share(args))
    flops = count_flops(lambda: method(batch)["loss"].backward())
    assert rows_of(output, "eager")[name]["gflop_per_image"] == pytest.approx(flops / 4e9, rel=1e-9)


def test_a_gpu_without_nvjpeg_is_no_failure(tmp_path, monkeypatch):
    """The row says why it was left out, and the check goes on."""

    def missing(*_args):
        raise ValueError("--decode gpu needs nvJPEG, which torchvision does not have")

    monkeypatch.setattr(gpu_fast, "batch_decoder", missing)
    checks = Checks(torch.device("cpu"), tmp_path, time.monotonic() + 99, tiny=True)
    bench = gpu_fast.Bench(checks, None, tmp_path, None)
    run = partial(gpu_fast.load_images, bench, train=False, decode="gpu")
    assert checks.attempt("JPEGs alone, --decode gpu", run)
    (row,) = checks.results
    assert row["ok"] is None and row["skipped"].startswith("--decode gpu needs nvJPEG")


@pytest.mark.parametrize("name", gpu_fast.COMPILED)
def test_what_is_compiled_ahead_has_every_kind_of_block(name):
    case = gpu_fast.CASES[name]
    deep = replace(case, tiny=tuple(option.replace("depth=2", "depth=4") for option in case.tiny))

    def blocks(*, shorten: bool) -> list[Block]:
        build = build_classifier if case.stage == "finetune" else build_method
        return [
            b
            for b in build(deep.args(tiny=True, shorten=shorten)).modules()
            if isinstance(b, Block)
        ]

    def kinds(found: list[Block]) -> set:
        return {(type(block), *(p.shape for p in block.parameters())) for block in found}

    short, whole = blocks(shorten=True), blocks(shorten=False)
    assert 2 * len(short) == len(whole) and kinds(short) == kinds(whole)


@pytest.mark.slow
def test_questions_of_the_engine_are_answered_on_a_cpu(tmp_path):
    images = tmp_path / "images" / "made"
    images.mkdir(parents=True)
    write_stand_in(images)
    command = [sys.executable, "-m", "scripts.benchmarks.gpu_ab", "orders", "flex", "flex_steps"]
    command += ["--device", "cpu", "--output", str(tmp_path), "--data_path", str(images.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert all(row["ok"] is not False for row in rows), rows
    named = {row["check"]: row for row in rows}
    for precision in ("fp64", "bf16"):
        row = named[f"orders of made, random weights: {precision} against fp32"]
        assert row["images"] == 4 and row["equal_pairs"] > 0.9
    assert named["attention under a bias: sdpa"]["ok"] is True
    assert named["ConMIM B, eager, sdpa"]["images_per_s"] > 0


def test_orders_are_compared_place_by_place():
    reference = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    same = gpu_ab.compare_orders(reference + 1, reference)
    assert same["equal_places"] == 1 and same["equal_pairs"] == 1 and same["tied"] == 0
    swapped = gpu_ab.compare_orders(torch.tensor([[0.2, 0.1, 0.3, 0.4]]), reference)
    assert swapped["equal_places"] == 0.5
    assert swapped["equal_pairs"] == pytest.approx(5 / 6)
    tied = gpu_ab.compare_orders(reference, torch.tensor([[0.2, 0.2, 0.3, 0.4]]))
    assert tied["tied"] == 0.5 and tied["equal_places_without_ties"] == 1
