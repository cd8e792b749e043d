"""The section `learns` of gpu_check.py: every method for a step on a CPU, its processes, its
evaluations."""

import csv
import json
import math
import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_knn
from scripts.benchmarks import gpu_learns
from scripts.benchmarks.gpu_learns import (
    PRETRAINED,
    RANDOM,
    Images,
    Job,
    LongRuns,
    Pool,
    Pretraining,
    prepare,
    run_in_processes,
)
from scripts.experiments.compare_methods import METHODS, PROBE
from scripts.gpu_check import Checks, section_functions
from unimim.data.sources import digits_source
from unimim.evaluation.features import build_backbone
from unimim.evaluation.flags import parse_knn


def tiny_checks(folder: Path, seconds: float, data_path: Path | None = None) -> Checks:
    checks = Checks(
        torch.device("cpu"), folder, time.monotonic() + seconds, tiny=True, data_path=data_path
    )
    checks.section = "learns"
    return checks


# Parts are learned on the features of the first one; then random weights of the networks that these
# are not judged on.
JUDGED = ("mae", "semmae", "a2mim_resnet18")
RANDOM_JUDGED = tuple(
    key
    for key in RANDOM
    if METHODS[key].classifier not in {METHODS[judged].classifier for judged in JUDGED}
)


@pytest.mark.slow
def test_methods_are_trained_and_every_network_is_judged_on_a_cpu(tmp_path):
    checks = tiny_checks(tmp_path, 500)
    section_functions()["learns"](checks, keys=JUDGED, random_keys=RANDOM_JUDGED)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {line["check"]: line for line in lines if line["section"] == "learns"}
    names = {key: f"{key} seed 0 epochs 1" for key in JUDGED}
    names |= {key: f"{key} seed 0" for key in RANDOM_JUDGED}
    assert found.keys() - {"images decoded"} == set(names.values())
    for key, name in names.items():
        line = found[name]
        assert line["ok"] is True
        assert all(0 <= line[name] <= 100 for name in ("knn_acc1", "linear_acc1", "finetune_acc1"))
        if key in JUDGED:
            assert line["steps"] == 1 and 0 < line["pretrain_loss"] < 10
        else:
            assert line["steps"] == 0 and "pretrain_loss" not in line
    rows = list(csv.DictReader((tmp_path / "learns.csv").open()))
    assert [row["method"] for row in rows] == [*JUDGED, *RANDOM_JUDGED]
    assert all(math.isfinite(float(row["knn_acc1"])) for row in rows)
    assert len((tmp_path / "learns.md").read_text().splitlines()) == 4 + len(rows)
    networks = {method.classifier for method in METHODS.values()}
    assert {METHODS[key].classifier for key in names} == networks


@pytest.fixture(scope="module")
def tiny_images(tmp_path_factory) -> Images:
    folder = tmp_path_factory.mktemp("images")
    return Images(prepare(tiny_checks(folder, 60), folder))


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in PRETRAINED if key not in JUDGED])
def test_every_other_method_takes_a_step_and_its_network_takes_its_encoder(
    key, tiny_images, tmp_path
):
    setting = tiny_images.setting
    run = Pretraining(setting, tiny_images, Job(key, 0, 1))
    first, last = run.run()
    assert run.steps == 1
    assert first == last and 0 < abs(last) < 10  # NEPA's is a cosine with a minus
    encoder = gpu_learns.save_encoder(run.method, tmp_path)
    network = [*gpu_learns.flags_of(METHODS[key].classifier), *shlex.split(setting.source_flags)]
    args = parse_knn([*network, *PROBE.split(), "--finetune", str(encoder)])
    # which refuses an encoder that does not fit
    features = gpu_learns.features_of(args, tiny_images, build_backbone(args), "val")
    assert features.vectors.isfinite().all() and features.vectors.std(0).max() > 0


@pytest.mark.slow
def test_processes_share_the_methods_and_what_fails_costs_itself_only(tmp_path):
    checks = tiny_checks(tmp_path, 500)
    setting = prepare(checks, tmp_path)
    report, pool = gpu_learns.Report(checks), Pool("cpu", 2)
    try:
        # SemMAE comes first and waits for the MAE whose features its parts are learned on
        run_in_processes(
            pool, setting, report, checks.deadline, keys=("semmae", "no_method", "mae"),
            random_keys=("random",), seeds=(0, 1), epochs=1, long_epochs=2,
        )  # fmt: skip
    finally:
        pool.close()
    report.finish()
    lines = {line["check"]: line for line in checks.results}
    failed = lines["no_method seed 0 epochs 1"]
    assert failed["ok"] is False and "KeyError" in failed["error"]
    expected = {("random", 0, 0), ("random", 1, 0)}
    expected |= {(key, seed, n) for key in ("mae", "semmae") for seed in (0, 1) for n in (1, 2)}
    assert {(row.method, row.seed, row.epochs) for row in report.rows} == expected
    # a process computes what this one does
    here = gpu_learns.run_job(setting, Images(setting), Job("mae", 0, 1))
    there = next(row for row in report.rows if (row.method, row.seed, row.epochs) == ("mae", 0, 1))
    assert (here.pretrain_loss, here.knn_acc1, here.finetune_acc1) == pytest.approx(
        (there.pretrain_loss, there.knn_acc1, there.finetune_acc1), rel=1e-5
    )


@pytest.mark.slow
def test_the_deadline_ends_jobs_and_a_dead_process_is_replaced(tmp_path):
    checks = tiny_checks(tmp_path, 60)
    pool = Pool("cpu", 2)
    answers = []

    def answered(*answer):
        answers.append(answer)

    try:
        pool.start(prepare(checks, tmp_path))
        # the first answer comes when the process is up, then its queue is cut off in the middle
        pool.run([Job("random", 0, 0)], time.monotonic() + 300, answered)
        endless, dies, after = Job("mae", 0, 10_000), Job("mae", 1, 10_000), Job("random", 1, 0)
        begin = time.monotonic()
        assert pool.run([endless], begin + 2, answered) == [endless]
        assert time.monotonic() - begin < 30
        (other,) = [worker for worker in pool.workers if worker not in pool.busy]
        pool.workers[other].kill()
        left = pool.run([dies], time.monotonic() + 3, answered)
        assert left == [endless] and len(pool.workers) == 2
        begin = time.monotonic()
        while len(answers) < 3 and time.monotonic() < begin + 100:
            pool.run([after], time.monotonic() + 20, answered)
    finally:
        pool.close()
    assert [answer[:2] for answer in answers[:3]] == [
        ("row", Job("random", 0, 0)), ("error", dies), ("row", after)
    ]  # fmt: skip
    assert "exit code -9" in answers[1][2]
    assert not any(process.is_alive() for process in pool.workers.values())


def repeated(run):
    """What a CUDA graph does, on a CPU: the same tensors get what the function computes."""
    step = run.__self__
    runner = step.runner
    run()
    runner.statistics.put_back_unless(torch.zeros(()))  # recording computes nothing
    loss, gradients = step.loss, [p.grad for p in runner.parameters]

    def replay() -> None:
        runner.optimizer.zero_grad(set_to_none=True)
        run()
        for mine, parameter in zip(gradients, runner.parameters, strict=True):
            if mine is not None:
                mine.copy_(parameter.grad)
        loss.copy_(step.loss)
        step.loss = loss

    return replay


@pytest.mark.parametrize("key", ["conmim", "semmae_random", "a2mim_resnet18"])
def test_recorded_steps_train_as_launched_ones(key, tmp_path, monkeypatch):
    """With running statistics, an average, and a number that changes with the epoch."""
    monkeypatch.setattr(gpu_learns, "cuda_graph", repeated)
    monkeypatch.setattr(gpu_learns, "EAGER_STEPS", 1)
    setting = replace(prepare(tiny_checks(tmp_path, 60), tmp_path), pretrain_images=16)
    images, found = Images(setting), {}
    for graphs in (False, True):
        run = Pretraining(setting, images, Job(key, 0, 3))
        run.take.graphs = graphs
        found[graphs] = run.run(), run.method.encoder_state_dict()
        assert (run.take.recorded is not None) == graphs
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for name, value in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], value, rtol=1e-4, atol=1e-5)


def test_a_recording_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    def wrong(run):
        run()
        return lambda: run.__self__.loss.mul_(1.1)

    monkeypatch.setattr(gpu_learns, "cuda_graph", wrong)
    monkeypatch.setattr(gpu_learns, "EAGER_STEPS", 0)
    setting = prepare(tiny_checks(tmp_path, 60), tmp_path)
    run = Pretraining(setting, Images(setting), Job("mae", 0, 3))
    run.take.graphs = True
    with pytest.raises(RuntimeError, match="a replayed step has loss"):
        run.run()


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


def test_long_runs_are_admitted_while_they_end_in_time():
    # each takes 100 steps of 0.2 s / 2, that is 10 s of a device shared by two, and a margin
    runs = LongRuns(100, 2, time.monotonic() + 40)
    assert [runs.fits(0.2, 1.0) for _ in range(5)] == [True, True, True, False, False]
    assert runs.fits(0.02, 1.0) and not runs.fits(0.2, 1.0)
