"""A run that was killed or asked to stop goes on as if nothing had happened, to the last bit."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    METHODS,
    ROOT,
    arguments,
    average_weights,
    differing,
    environment,
    launcher,
    own_signals,
    script,
    start,
    start_command,
    train_steps,
    wait_for,
    whole_weights,
)

import run_class_finetuning
import run_pretraining
from engine_for_pretraining import train
from run_class_finetuning import ClassificationEvaluator, build_eval_loader
from unimim.checkpoint.files import latest_valid_checkpoint, load_checkpoint, save_checkpoint
from unimim.data.views import build_finetune_transform
from unimim.engine import session
from unimim.engine.distributed import StopSignal, seed_step
from unimim.engine.monitor import RunLog
from unimim.engine.session import Position
from unimim.engine.state import Interruptible, Stopped

WORKERS = ("--num_workers", "2", "--update_freq", "2")
AUGMENTED = (
    *("--mixup", "0.8", "--cutmix", "1.0", "--drop_path", "0.2", "--reprob", "0.5", "--model_ema"),
    *("--model_ema_decay", "0.99", "--label_fraction", "0.5", "--log_every", "1"),
)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The last checkpoints, tensor for tensor, and every line of log.txt."""
    states = [load_checkpoint(folder / "checkpoint-1.pth") for folder in (ours, theirs)]
    for state in states:
        assert state.pop("args")["update_freq"] == 2
    assert len(states[0]["optimizer"]["state"]) > 20
    assert differing(*states) == []
    assert (ours / "log.txt").read_text() == (theirs / "log.txt").read_text()
    assert [json.loads(line)["epoch"] for line in (ours / "log.txt").read_text().splitlines()] == [
        0,
        1,
    ]


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


# --------------------------------------------------------------------------------------------------
# Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kills"),
    [((), 2), (METHODS["semmae"], 1)],
    ids=["conmim", "semmae"],
)
def test_killed_pretraining_resumes_bit_exactly(tmp_path, method, kills):
    """Killed at a random moment of one or both epochs, with loader workers, accumulation and
    deletion of old checkpoints."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = (*method, *WORKERS, "--batch_size", "16", "--save_ckpt_steps", "4")
    flags += ("--save_ckpt_freq", "1", "--keep_checkpoints", "3")
    rng = random.Random()
    for epoch in sorted(rng.sample((0, 1), kills)):
        process = start_command(script("pretrain", killed, *flags))
        step = 4 * rng.randint(1, 8)
        wait_for(lambda epoch=epoch, step=step: written_beyond(killed, epoch, step), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        print(f"killed in epoch {epoch} after step {step}")
        assert not (killed / "checkpoint-1.pth").exists()
    output = finish(start_command(script("pretrain", killed, *flags)))
    resumed = rf"resumed .*checkpoint-{epoch}-\d+.pth: at epoch {epoch}, step \d+ of 45"
    assert re.search(resumed, output), output
    with own_signals():
        run_pretraining.main(arguments("pretrain", whole, *flags))
    assert_same_run(killed, whole)


def written_beyond(folder: Path, epoch: int, step: int) -> bool:
    steps = [int(path.stem.split("-")[2]) for path in folder.glob(f"checkpoint-{epoch}-*.pth")]
    return any(done >= step for done in steps)


# --------------------------------------------------------------------------------------------------
# Asked to stop


def stop_at(process: subprocess.Popen, epoch: int, step: int, number: signal.Signals) -> str:
    """Send the signal to the process and its workers when the log reaches the step; the rest of
    the output."""
    for line in process.stdout:
        found = re.search(rf"epoch {epoch} \[ *(\d+)/", line)
        if found and int(found.group(1)) >= step:
            os.killpg(process.pid, number)
            return process.communicate(timeout=120)[0]
    raise AssertionError(f"ended with {process.wait()} before epoch {epoch}, step {step}")


@pytest.mark.slow
def test_stopped_finetuning_resumes_bit_exactly(tmp_path):
    """Two signals in a row, under every source of randomness that fine-tuning has."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for number, epoch, step, told in (
        (signal.SIGTERM, 0, 20, ()),
        (signal.SIGINT, 1, 8, ("--stop_status", "75")),
    ):
        process = start_command(script("finetune", stopped, *WORKERS, *AUGMENTED, *told))
        output = stop_at(process, epoch, step, number)
        assert process.returncode == (75 if told else 0), output
        said = re.search(
            rf"^stopped by {number.name} after step (\d+) of epoch {epoch}; "
            "run the same command to go on$",
            output,
            re.MULTILINE,
        )
        assert said and output.rstrip().endswith(said.group(0)) and "Traceback" not in output
        assert latest_valid_checkpoint(stopped).name == f"checkpoint-{epoch}-{said.group(1)}.pth"
    finish(start_command(script("finetune", stopped, *WORKERS, *AUGMENTED)))
    with own_signals():
        run_class_finetuning.main(arguments("finetune", whole, *WORKERS, *AUGMENTED))
    assert_same_run(stopped, whole)
    best = [load_checkpoint(folder / "checkpoint-best.pth") for folder in (stopped, whole)]
    assert differing(*({k: v for k, v in state.items() if k != "args"} for state in best)) == []


class StoppedAt:
    """Batches of an evaluation; a signal comes with the second one."""

    def __init__(self, batches, stop):
        self.batches = batches
        self.dataset = batches.dataset
        self.stop = stop

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == 1:
                self.stop.received = "SIGTERM"
            yield batch


def test_a_run_that_is_stopped_in_an_evaluation_resumes_bit_exactly(tmp_path):
    flags = ("--model_ema", "--label_fraction", "0.1", "--epochs", "2", "--save_ckpt_freq", "1")

    def go_on(folder: Path, stopped: bool) -> Position:
        run, position = start("finetune", folder, *flags)
        batches = build_eval_loader(run.args, build_finetune_transform(run.args, train=False))
        batches = StoppedAt(batches, run.stop) if stopped else batches
        evaluator = ClassificationEvaluator(run, Interruptible(batches, run.stop))
        train(run, position, lambda position: evaluator.after_epoch(position, run.session))
        return position

    with pytest.raises(Stopped, match="SIGTERM during an evaluation"):
        go_on(tmp_path / "stopped", stopped=True)
    (saved,) = (tmp_path / "stopped").glob("checkpoint-*.pth")
    state = load_checkpoint(saved)
    assert saved.stem == f"checkpoint-0-{state['data']['steps_per_epoch']}" and state["best"] == 0
    go_on(tmp_path / "stopped", stopped=False)
    go_on(tmp_path / "whole", stopped=False)
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("stopped", "whole")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 2
    states = [
        load_checkpoint(tmp_path / name / "checkpoint-1.pth") for name in ("stopped", "whole")
    ]
    assert differing(*({k: v for k, v in state.items() if k != "args"} for state in states)) == []


RANK_OF_A_LAUNCHER = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
import run_pretraining
from unimim.cli import options
from unimim.engine import setup
folder, rank = pathlib.Path({folder!r}), os.environ["RANK"]
(folder / f"pid-{{rank}}").write_text(str(os.getpid()))
setup.launch(run_pretraining.main, options.parse("pretrain"))
(folder / f"code-{{rank}}").write_text("0")
"""


@pytest.mark.slow
def test_launch_script_stops_all_ranks_with_a_checkpoint(tmp_path):
    """SIGUSR1 reaches the launcher alone, and every process a SIGTERM right after it, as a
    scheduler may send them."""
    program = tmp_path / "rank.py"
    program.write_text(RANK_OF_A_LAUNCHER.format(root=str(ROOT), folder=str(tmp_path)))
    _, _, *flags = script("pretrain", tmp_path, "--num_workers", "1", "--log_every", "1")
    process = start_command([*launcher(2), os.path.relpath(program, ROOT), *flags])
    for line in process.stdout:
        if "epoch 0 [ 5/" in line:
            break
    ranks = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    process.send_signal(signal.SIGUSR1)
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    said = re.search(r"stopped by (SIGUSR1|SIGTERM) after step (\d+) of epoch 0", output)
    assert said and "DataLoader worker" not in output, output
    path = tmp_path / f"checkpoint-0-{said.group(2)}.pth"
    assert load_checkpoint(path)["engine"]["world_size"] == 2
    assert process.returncode != 0
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(2)] == ["0", "0"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


STUCK = """
import ctypes, time
from unimim.engine import session
from unimim.engine.distributed import StopSignal
stop = StopSignal()
print("ready", flush=True)
while stop.received is None:
    time.sleep(0.01)
print(stop.received, flush=True)
mutex = ctypes.create_string_buffer(64)
while True:
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_only_a_second_interrupt_after_a_while_ends_at_once(tmp_path):
    """In a step that never ends, outside of Python; what comes within the two seconds is a
    launcher's repetition."""
    command = [sys.executable, "-c", STUCK]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    for repeated in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(repeated)
    time.sleep(StopSignal.patience + 0.5)
    for repeated in (signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(repeated)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT


# --------------------------------------------------------------------------------------------------
# In this process


@pytest.mark.parametrize(
    "opt", ["adamw", "sgd", "lamb", "lars", "lookahead_adamw", "adafactor", "radam"]
)
def test_every_kind_of_optimizer_resumes_bit_exactly(tmp_path, opt):
    flags = ("--opt", opt, "--lr", "1e-3")
    run, position = start("pretrain", tmp_path, *flags)
    train_steps(run, 0, 7)
    position.step = 7
    run.session.save(position, finished=False)
    resumed, there = start("pretrain", tmp_path, *flags)
    assert (there.epoch, there.step) == (0, 7)
    assert differing(train_steps(run, 7, 12), train_steps(resumed, 7, 12)) == []
    assert differing(whole_weights(run), whole_weights(resumed)) == []


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with a checkpoint in mid-epoch."""
    run, position = start("pretrain", tmp_path)
    train_steps(run, 0, 2)
    position.step = 2
    run.session.save(position, finished=False)
    return tmp_path


def test_checkpoint_in_mid_epoch_needs_the_same_global_batch(saved):
    with pytest.raises(
        ValueError, match="effective batch of 8, this run has 16: keep --batch_size"
    ):
        start("pretrain", saved, "--update_freq", "2")
    _, position = start("pretrain", saved, "--update_freq", "2", "--batch_size", "4")
    assert position.step == 2


def test_finished_epoch_resumes_with_another_batch(tmp_path):
    run, position = start("pretrain", tmp_path)
    train_steps(run, 0, 2)
    position.step = run.steps_per_epoch
    run.session.save(position, finished=True)
    _, there = start("pretrain", tmp_path, "--update_freq", "2")
    assert (there.epoch, there.step) == (1, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--seed", "1"),
            "--seed 0, this run has 1: the rest of the epoch would be of other samples",
        ),
        (("--aug_repeats", "2"), "--aug_repeats 1, this run has 2"),
        (("--mask_ratio", "0.25"), r"--mask_ratio 0\.5, this run has 0\.25"),
        (("--label_fraction", "0.5"), r"--data_path: number of images 1442, this run has 7\d\d"),
    ],
    ids=["seed", "aug_repeats", "mask", "images"],
)
def test_what_decides_the_samples_must_stay_in_mid_epoch(tmp_path, flags, message, capsys):
    """From the end of an epoch the same change is a line in the log."""
    stage = "finetune" if flags[0] in ("--aug_repeats", "--label_fraction") else "pretrain"
    run, position = start(stage, tmp_path)
    position.step = 2
    run.session.save(position, finished=False)
    with pytest.raises(
        ValueError, match=rf"checkpoint-0-2\.pth was saved in mid-epoch with {message}"
    ):
        start(stage, tmp_path, *flags)
    run.session.save(position, finished=True)
    capsys.readouterr()
    assert start(stage, tmp_path, *flags)[1].epoch == 1
    assert re.search(
        rf"checkpoint-0\.pth was saved with {message.partition(':')[0]}", capsys.readouterr().out
    )


@pytest.mark.parametrize("finished", [False, True], ids=["mid-epoch", "epoch end"])
def test_what_changes_the_computation_is_logged(saved, capsys, finished):
    if finished:
        edit(saved / "checkpoint-0-2.pth", lambda state: state)
        (saved / "checkpoint-0-2.pth").rename(saved / "checkpoint-0.pth")
    flags = {
        "weight_decay": ("0.05", "0.2"), "layer_scale_init_value": ("0.1", "0.5"),
        "drop_path": ("0.0", "0.1"), "clip_grad": ("3.0", "1.0"), "lr": ("0.001", "0.01"),
        "precision": ("fp32", "bf16"),
    }  # fmt: skip
    capsys.readouterr()
    changed = [word for name, (_, ours) in flags.items() for word in (f"--{name}", ours)]
    quiet = (
        "--num_workers",
        "1",
        "--log_every",
        "3",
        "--save_ckpt_freq",
        "7",
        "--max_nonfinite",
        "2",
    )
    start("pretrain", saved, *changed, *quiet)
    output = capsys.readouterr().out
    for name, (there, ours) in flags.items():
        assert f".pth was saved with --{name} {there}, this run has {ours}\n" in output
    assert output.count("was saved with") == len(flags)


def test_another_method_is_refused(saved):
    """Its network might fit."""
    path = saved / "checkpoint-0-2.pth"
    edit(path, lambda state: state["args"].update(model="mae_tiny_patch16_224"))
    with pytest.raises(
        ValueError,
        match=r"checkpoint-0-2\.pth was saved by --model mae_tiny_patch16_224, this run has "
        r"--model conmim_tiny_patch16_224: keep it",
    ):
        start("pretrain", saved)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": None}, "model"),
        ({"args": [1]}, "args"),
        ({"engine": {}}, "engine kind, engine world_size, engine global_batch"),
        ({"monitor": None}, "monitor"),
        ({"epoch": 1.5}, "epoch"),
        ({"step": -3}, "step"),
        ({"best": "x"}, "best"),
    ],
)
def test_a_file_that_lacks_a_part_is_refused(saved, change, named):
    edit(saved / "checkpoint-0-2.pth", lambda state: state.update(change))
    with pytest.raises(ValueError, match=rf"0-2\.pth is no checkpoint .*: its {named} is missing"):
        start("pretrain", saved)


def test_weights_of_another_type_are_refused(saved):
    def change(state):
        state["model"] = {name: value.long() for name, value in state["model"].items()}

    edit(saved / "checkpoint-0-2.pth", change)
    with pytest.raises(ValueError, match=r"does not fit the model .* another shape or type"):
        start("pretrain", saved)


def edit(path: Path, change) -> None:
    """Another run's file: `change(state)` of what this one wrote."""
    state = load_checkpoint(path)
    change(state)
    save_checkpoint(path, state)


def test_other_images_of_the_same_number_are_refused_in_mid_epoch(saved):
    edit(saved / "checkpoint-0-2.pth", lambda state: state["data"].update(fingerprint="0" * 16))
    with pytest.raises(
        ValueError, match=r"mid-epoch with --data_path: list of images 0{16}, this run has"
    ):
        start("pretrain", saved)


def test_step_beyond_the_epoch_is_refused(saved):
    """A file without the number of images, as they were once written."""
    edit(saved / "checkpoint-0-2.pth", lambda state: (state.pop("data"), state.update(step=400)))
    with pytest.raises(
        ValueError, match=r"saved at step 400 of an epoch, which has \d+ steps in this run"
    ):
        start("pretrain", saved)


def test_hyper_parameters_are_those_of_this_run(saved, capsys):
    flags = (
        "--opt_betas",
        "0.5",
        "0.6",
        "--opt_eps",
        "1e-6",
        "--precision",
        "bf16",
        "--epochs",
        "3",
    )
    run, _ = start("pretrain", saved, *flags)
    for group in run.runner.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.5, 0.6), 1e-6)
        assert all("exp_avg" in run.runner.optimizer.state[p] for p in group["params"])
    said = capsys.readouterr().out
    for text in (
        "saved with betas [0.9, 0.98], this run takes [0.5, 0.6]",
        "saved with eps 1e-08, this run takes 1e-06",
        "saved with --precision fp32, this run has bf16",
        "saved with --epochs: a schedule of 2 x 180 steps, this run has 3 x 180 steps",
    ):
        assert said.count(text) == 1, said


def test_layer_decay_of_this_run_regroups_the_optimizer(tmp_path, capsys):
    """Other groups in another order: each parameter keeps its own moments."""
    run, position = start("finetune", tmp_path)
    train_steps(run, 0, 3)
    position.step = 3
    run.session.save(position, finished=False)
    capsys.readouterr()
    resumed, _ = start("finetune", tmp_path, "--layer_decay", "1.0")
    assert "lr_scale" in capsys.readouterr().out
    ours, theirs = (r.runner.optimizer for r in (resumed, run))
    assert len(ours.param_groups) < len(theirs.param_groups)
    assert {group["lr_scale"] for group in ours.param_groups} == {1.0}
    names = dict(run.task.named_parameters())
    for name, parameter in resumed.task.named_parameters():
        assert differing(dict(ours.state[parameter]), dict(theirs.state[names[name]])) == [], name


def permute_groups(state: dict) -> None:
    """The same optimizer with its groups, and the parameters in them, in reverse order."""
    groups = state["optimizer"]["groups"]
    for group in groups:
        group["names"] = group["names"][::-1]
    state["optimizer"]["groups"] = groups[::-1]


def in_numbers(state: dict) -> None:
    """As it was written before the state went by name: numbers, with the names beside them."""
    named = state["optimizer"]
    state["param_names"] = [group.pop("names") for group in named["groups"]]
    numbered, groups = {}, []
    for names, group in zip(state["param_names"], named["groups"], strict=True):
        numbers = list(range(len(numbered), len(numbered) + len(names)))
        numbered |= dict(zip(numbers, (named["state"][name] for name in names), strict=True))
        groups.append({**group, "params": numbers})
    state["optimizer"] = {"state": numbered, "param_groups": groups}


def in_other_numbers(state: dict) -> None:
    permute_groups(state)
    in_numbers(state)


def without_names(state: dict) -> None:
    """What was written before parameters had names in it."""
    in_numbers(state)
    del state["param_names"], state["data"]


@pytest.mark.parametrize("change", [permute_groups, in_numbers, in_other_numbers, without_names])
def test_optimizer_state_of_other_order_and_of_old_files(saved, change):
    run, _ = start("pretrain", saved)
    expected = train_steps(run, 2, 5)
    edit(saved / "checkpoint-0-2.pth", change)
    resumed, _ = start("pretrain", saved)
    assert differing(train_steps(resumed, 2, 5), expected) == []
    assert differing(whole_weights(resumed), whole_weights(run)) == []


def test_another_optimizer_starts_afresh(saved, capsys):
    run, position = start("pretrain", saved, "--opt", "sgd")
    assert (
        "holds the state of --opt adamw: that of --opt sgd starts afresh" in capsys.readouterr().out
    )
    assert position.step == 2 and not run.runner.optimizer.state
    train_steps(run, 2, 3)


def test_a_resumed_run_does_not_need_its_file_any_more(saved):
    """The file is mapped while it is read."""
    run, _ = start("pretrain", saved)
    path = saved / "checkpoint-0-2.pth"
    before = (
        whole_weights(run),
        [dict(run.runner.optimizer.state[p]) for p in run.task.parameters() if p.requires_grad],
    )
    copies = [{k: v.clone() for k, v in entry.items()} for entry in before[1]]
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert differing(before[1], copies) == [] and differing(whole_weights(run), before[0]) == []


def test_shards_that_a_killed_run_left_do_not_hide_a_new_checkpoint(saved):
    left = saved / "checkpoint-0-4"
    left.mkdir()
    (left / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"half")
    run, position = start("pretrain", saved)
    position.step = 4
    run.session.save(position, finished=False)
    assert not left.exists() and latest_valid_checkpoint(saved).stem == "checkpoint-0-4"


def test_flags_that_build_another_model_are_named(saved):
    with pytest.raises(
        ValueError, match=r"checkpoint-0-2\.pth does not fit the model .* rel_pos_bias"
    ):
        start("pretrain", saved, "--patch_size", "8")


def test_no_auto_resume_and_start_epoch(saved):
    _, position = start("pretrain", saved, "--no_auto_resume", "--start_epoch", "1")
    assert (position.epoch, position.step) == (1, 0)


def test_resume_flag_wins_over_the_folder(saved, tmp_path):
    run, position = start("pretrain", saved)
    train_steps(run, 2, 4)
    position.step = 4
    run.session.save(position, finished=False)
    assert start("pretrain", saved)[1].step == 4
    assert start("pretrain", saved, "--resume", str(saved / "checkpoint-0-2.pth"))[1].step == 2


def test_weights_only_file_is_no_place_to_resume_from(tmp_path):
    run, position = start("finetune", tmp_path)
    run.session.save_best(position, of_ema=False)
    with pytest.raises(
        ValueError, match=r"checkpoint-best\.pth holds weights only: give it to --finetune"
    ):
        start("finetune", tmp_path, "--resume", str(tmp_path / "checkpoint-best.pth"))


def test_damaged_newest_checkpoint_is_passed_over(saved):
    (saved / "checkpoint-0-3.pth").write_bytes((saved / "checkpoint-0-2.pth").read_bytes()[:-100])
    assert start("pretrain", saved)[1].step == 2


def test_log_forgets_epochs_that_are_done_again(tmp_path):
    args = arguments("pretrain", tmp_path)
    args.rank = 0
    log = RunLog(args, {})
    for epoch in range(3):
        log.epoch({"epoch": epoch, "train_loss": 1.0}, epoch)
    log.forget_from(1)
    log.epoch({"epoch": 1, "train_loss": 2.0}, 1)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == [{"epoch": 0, "train_loss": 1.0}, {"epoch": 1, "train_loss": 2.0}]


def test_resumed_run_goes_on_in_its_run_of_wandb(tmp_path, monkeypatch):
    """The package need not be installed: what counts is how it is asked."""
    asked = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: asked.append(how)))
    for folder, flags in (("a", ()), ("a", ()), ("b", ()), ("a", ("--no_auto_resume",))):
        args = arguments("pretrain", tmp_path / folder, "--wandb", "project", *flags)
        args.rank = 0
        RunLog(args, {})
    first, resumed, other, afresh = (how["id"] for how in asked)
    assert first == resumed and len({first, other, afresh}) == 3
    assert {how["resume"] for how in asked} == {"allow"} and min(
        map(len, (first, other, afresh))
    ) > 8


def test_moments_of_another_shape_are_refused(saved):
    def change(state):
        own = state["optimizer"]["state"]["blocks.0.mlp.fc1.weight"]
        own["exp_avg"] = own["exp_avg"].T.contiguous()

    edit(saved / "checkpoint-0-2.pth", change)
    with pytest.raises(
        ValueError, match=r"exp_avg of blocks\.0\.mlp\.fc1\.weight has another shape"
    ):
        start("pretrain", saved)


def test_skipped_steps_come_along(tmp_path):
    def spoil(update, micro_batches):
        if update == 1:
            images = next(name for name in micro_batches[0] if name.startswith("image"))
            micro_batches[0][images] = micro_batches[0][images].float() * float("nan")

    run, position = start("pretrain", tmp_path, *METHODS["mae"])
    train_steps(run, 0, 3, spoil)
    position.step = 3
    run.session.save(position, finished=False)
    resumed, _ = start("pretrain", tmp_path, *METHODS["mae"])
    assert run.monitor.skipped == resumed.monitor.skipped == 1


def test_a_file_without_names_of_other_groups_is_refused(saved):
    def with_less(state: dict) -> None:
        without_names(state)
        state["optimizer"]["param_groups"].pop()

    edit(saved / "checkpoint-0-2.pth", with_less)
    with pytest.raises(ValueError, match="does not say which parameters its optimizer had"):
        start("pretrain", saved)


# --------------------------------------------------------------------------------------------------
# Saved while training goes on


@pytest.fixture
def slow_disk(monkeypatch) -> SimpleNamespace:
    """Checkpoints are written when `go` is set; then `error` is raised, if there is one."""
    disk = SimpleNamespace(go=threading.Event(), error=None)

    def write(path: Path, state: dict) -> None:
        assert disk.go.wait(60)
        if disk.error is not None:
            raise disk.error
        save_checkpoint(path, state)

    monkeypatch.setattr(session, "save_checkpoint", write)
    yield disk
    disk.go.set()


def test_what_is_saved_is_the_state_of_its_step(tmp_path, slow_disk):
    """Training, which changes tensors in place, goes on before anything is written."""
    run, position = start("pretrain", tmp_path)
    train_steps(run, 0, 7)
    position.step = 7
    run.session.save(position, finished=False, wait=False)
    metrics = train_steps(run, 7, 12)
    assert not (tmp_path / "checkpoint-0-7.pth").exists()
    slow_disk.go.set()
    run.session.finish()
    resumed, there = start("pretrain", tmp_path)
    assert there.step == 7
    assert differing(train_steps(resumed, 7, 12), metrics) == []
    assert differing(whole_weights(resumed), whole_weights(run)) == []
    assert differing(average_weights(resumed), average_weights(run)) == []


def test_the_next_save_waits_for_the_last(tmp_path, slow_disk):
    run, position = start("pretrain", tmp_path, "--keep_checkpoints", "1")
    for position.step in (1, 2):
        threading.Timer(0.2, slow_disk.go.set).start()
        run.session.save(position, finished=False, wait=False)
        assert len(list(tmp_path.glob("checkpoint-*.pth"))) == position.step - 1
    run.session.finish()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0-2.pth"]


def test_a_run_that_ends_waits_for_what_is_being_written(tmp_path, slow_disk):
    """Also one that ends with an error of its own."""
    flags = ("--label_fraction", "0.02", "--epochs", "3", "--save_ckpt_freq", "1")
    run, position = start("finetune", tmp_path, *flags)

    def after_epoch(position):
        if position.epoch == 1:
            assert not (tmp_path / "checkpoint-0.pth").exists()
            threading.Timer(0.2, slow_disk.go.set).start()
            raise ValueError("evaluation failed")
        return {}

    with pytest.raises(ValueError, match="evaluation failed"):
        train(run, position, after_epoch)
    assert latest_valid_checkpoint(tmp_path).name == "checkpoint-0.pth"


def test_a_process_that_ends_at_once_finishes_its_checkpoint(tmp_path):
    """After an error among several ranks, where nothing else is waited for."""
    program = (
        "import time\n"
        "from pathlib import Path\n"
        "from unimim.engine.distributed import exit_at_once\n"
        "from unimim.engine.writing import Writer\n"
        f"path = Path({str(tmp_path / 'file')!r})\n"
        "Writer().start('file', lambda: (time.sleep(0.5), path.touch()))\n"
        "exit_at_once(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment())
    assert ended.returncode == 3 and (tmp_path / "file").exists()


@pytest.mark.parametrize("when", ["next save", "next step", "end"])
def test_what_goes_wrong_in_the_thread_is_one_sentence(tmp_path, slow_disk, when):
    run, position = start("pretrain", tmp_path)
    slow_disk.go.set()
    position.step = 1
    run.session.save(position, finished=False)
    slow_disk.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    position.step = 2
    run.session.save(position, finished=False, wait=False)
    run.session.writer._thread.join()
    calls = {
        "next save": lambda: run.session.save(position, finished=True, wait=False),
        "next step": run.session.check,
        "end": run.session.finish,
    }
    with pytest.raises(
        ValueError, match=r"checkpoint-0-2\.pth cannot be written: the disk is full"
    ):
        calls[when]()
    assert latest_valid_checkpoint(tmp_path).name == "checkpoint-0-1.pth"


# --------------------------------------------------------------------------------------------------
# Published checkpoints


def published(network: torch.nn.Module, epoch: int, prefix: str = "") -> dict:
    """A file as ConMIM's release writes it: dead weights and index buffers included
    (docs/methods/conmim.md#projector)."""
    state = {
        prefix + name: value + 0.25 if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    state[f"{prefix}lm_head.weight"] = torch.zeros(8192, 32)
    state[f"{prefix}lm_head.bias"] = torch.zeros(8192)
    state[f"{prefix}rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    state[f"{prefix}rel_pos_bias2.relative_position_bias_table"] = torch.zeros(124, 2)
    return {
        "model": state,
        "epoch": epoch,
        "scaler": {},
        "optimizer": {"state": {}, "param_groups": []},
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_student_and_teacher_resume(tmp_path, prefix):
    run, _ = start("pretrain", tmp_path / "source")
    student, teacher = tmp_path / "checkpoint-7.pth", tmp_path / "checkpoint_copy-7.pth"
    torch.save(published(run.task, 7, prefix), student)
    with torch.no_grad():
        for p in run.task.teacher.parameters():
            p.mul_(2)
    torch.save(published(run.task.teacher, 7, prefix), teacher)

    resumed, position = start(
        "pretrain",
        tmp_path / "run",
        "--epochs",
        "9",
        "--resume",
        str(student),
        "--resume_copy",
        str(teacher),
    )
    assert (position.epoch, position.step) == (8, 0)
    for ours, file in ((resumed.task, student), (resumed.task.teacher, teacher)):
        weights = torch.load(file, weights_only=True)["model"]
        assert (
            differing(
                dict(ours.state_dict()),
                {name: weights[prefix + name] for name in ours.state_dict()},
            )
            == []
        )

    alone, _ = start("pretrain", tmp_path / "alone", "--resume", str(student))
    assert differing(dict(alone.task.state_dict()), dict(alone.task.teacher.state_dict())) == []


def test_published_file_of_another_size_is_refused(tmp_path):
    run, _ = start(
        "pretrain", tmp_path / "source", "--model_kwargs", "embed_dim=16", "depth=2", "num_heads=2"
    )
    torch.save(published(run.task, 7), tmp_path / "checkpoint-7.pth")
    with pytest.raises(
        ValueError, match=r"checkpoint-7\.pth does not fit the model that these flags build"
    ):
        start("pretrain", tmp_path / "run", "--resume", str(tmp_path / "checkpoint-7.pth"))


def test_a_step_draws_what_its_seed_rank_and_number_say():
    state = np.random.SeedSequence([3, 1, 7]).generate_state(3)
    torch.manual_seed(int(state[0]))
    expected = torch.rand(4)
    np.random.seed(int(state[1]))
    random.seed(int(state[2]))
    others = np.random.rand(), random.random()
    seed_step(3, 1, 7)
    assert torch.equal(torch.rand(4), expected)
    assert (np.random.rand(), random.random()) == others
