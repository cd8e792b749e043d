"""The section `learns` of gpu_check.py: every method once on a CPU, its processes, its
evaluations."""

import csv
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import run_knn
from scripts.benchmarks import gpu_learns
from scripts.benchmarks.gpu_learns import (
    PRETRAINED,
    RANDOM,
    Images,
    Job,
    epochs_that_fit,
    prepare,
    run_in_processes,
)
from scripts.experiments.compare_methods import PROBE
from scripts.gpu_check import Checks
from unimim.data.sources import digits_source
from unimim.evaluation.flags import parse_knn


def tiny_checks(folder: Path, seconds: float, data_path: Path | None = None) -> Checks:
    checks = Checks(
        torch.device("cpu"), folder, time.monotonic() + seconds, tiny=True, data_path=data_path
    )
    checks.section = "learns"
    return checks


@pytest.mark.slow
def test_every_method_is_trained_and_evaluated_on_a_cpu(tmp_path):
    command = [
        sys.executable,
        "scripts/gpu_check.py",
        "--only",
        "learns",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {line["check"]: line for line in lines if line["section"] == "learns"}
    assert found.keys() == {f"{key} seed 0" for key in (*PRETRAINED, *RANDOM)}
    for key in (*PRETRAINED, *RANDOM):
        line = found[f"{key} seed 0"]
        assert line["ok"] is True
        assert all(0 <= line[name] <= 100 for name in ("knn_acc1", "linear_acc1", "finetune_acc1"))
        if key in PRETRAINED:
            assert line["steps"] == 1 and 0 < line["pretrain_loss"] < 10
        else:
            assert line["steps"] == 0 and "pretrain_loss" not in line
    rows = list(csv.DictReader((tmp_path / "learns.csv").open()))
    assert [row["method"] for row in rows] == [*PRETRAINED, *RANDOM]
    assert all(math.isfinite(float(row["knn_acc1"])) for row in rows)
    assert len((tmp_path / "learns.md").read_text().splitlines()) == 2 + len(rows)


@pytest.mark.slow
def test_processes_share_the_methods_and_what_fails_costs_itself_only(tmp_path, monkeypatch):
    checks = tiny_checks(tmp_path, 500)
    setting = prepare(checks, tmp_path)
    monkeypatch.setattr(
        gpu_learns, "SHARE_OF_TIME", 1e-4
    )  # one epoch, so that the next seed begins
    report = gpu_learns.Report(checks)
    options = {"size": 2, "keys": ("mae", "no_method"), "random_keys": ("random",), "seeds": (0, 1)}
    run_in_processes(checks, setting, report, **options)
    report.finish()
    lines = {line["check"]: line for line in checks.results}
    assert (
        lines["process for no_method"]["ok"] is False
        and "KeyError" in lines["process for no_method"]["error"]
    )
    assert lines["ms a step, processes side by side"]["mae"] > 0 and lines["epochs"]["epochs"] == 1
    assert {(row.method, row.seed, row.epochs) for row in report.rows} == {
        ("random", 0, 0), ("random", 1, 0), ("mae", 0, 1), ("mae", 1, 1)
    }  # fmt: skip
    # a process computes what this one does
    here = gpu_learns.run_job(setting, Images(setting), Job("mae", 0, 1))
    there = next(row for row in report.rows if (row.method, row.seed) == ("mae", 0))
    assert (here.pretrain_loss, here.knn_acc1, here.finetune_acc1) == pytest.approx(
        (there.pretrain_loss, there.knn_acc1, there.finetune_acc1), rel=1e-5
    )


@pytest.mark.slow
def test_the_deadline_ends_jobs_and_a_dead_process_is_named(tmp_path):
    checks = tiny_checks(tmp_path, 60)
    pool = gpu_learns.Pool(prepare(checks, tmp_path), 2)
    answers = []
    try:
        # the first answer comes when the process is up, then its queue is cut off in the middle
        pool.run(
            [("job", Job("random", 0, 0))],
            time.monotonic() + 300,
            lambda *answer: answers.append(answer),
        )
        endless, dies = Job("mae", 0, 10_000), Job("mae", 1, 10_000)
        begin = time.monotonic()
        assert pool.run([("job", endless)], begin + 2, lambda *answer: answers.append(answer)) == [
            endless
        ]
        assert time.monotonic() - begin < 30
        (other,) = [worker for worker in pool.workers if worker not in pool.busy]
        pool.workers[other].kill()
        left = pool.run(
            [("job", dies)], time.monotonic() + 3, lambda *answer: answers.append(answer)
        )
    finally:
        pool.close()
    assert [answer[:2] for answer in answers] == [("row", Job("random", 0, 0)), ("error", dies)]
    assert "exit code -9" in answers[-1][2] and left == [endless]
    assert not any(process.is_alive() for process in pool.workers.values())


def test_features_and_neighbours_are_those_of_run_knn(tmp_path):
    data = tmp_path / "with space"
    for split in ("train", "val"):
        source, lines = digits_source(train=split == "train"), []
        for index in range(40 if split == "train" else 20):
            (data / split).mkdir(exist_ok=True, parents=True)
            Image.fromarray(source.read(index)).save(data / split / f"{index}.png")
            lines.append(f"{index}.png {source.labels[index]}")
        (data / f"{split}_map.txt").write_text("\n".join(lines) + "\n")
    setting = prepare(tiny_checks(tmp_path, 60, data_path=data), tmp_path)
    images, job = Images(setting), Job("mae", 0, 1)
    run = gpu_learns.Pretraining(setting, images, job)
    run.run()
    encoder = gpu_learns.save_encoder(run.method, tmp_path)
    found = gpu_learns.evaluate(setting, images, job, encoder)["knn_acc1"]
    network = gpu_learns.flags_of(gpu_learns.METHODS["mae"].classifier)
    flags = [
        *network,
        *shlex.split(setting.source_flags),
        *PROBE.split(),
        "--finetune",
        str(encoder),
        "--knn_k",
        "20",
    ]
    assert found == pytest.approx(run_knn.main(parse_knn(flags))[0].acc1)
    assert np.isfinite(found)


def test_as_many_epochs_as_fit():
    # two processes, 10 steps an epoch: 1 s and 0.5 s an epoch side by side, then the third on the
    # second process
    seconds = {"a": 0.1, "b": 0.05, "c": 0.05}
    assert epochs_that_fit(seconds, 10, workers=2, seconds=5.5) == 5
    assert epochs_that_fit(seconds, 10, workers=1, seconds=5.5) == 2
    assert epochs_that_fit(seconds, 10, workers=2, seconds=0.1) == 1
