"""A checkpoint of any engine is resumed by any other, on another number of ranks.

Each engine saves once in mid-epoch, and every engine goes on from each of these files; with MAE,
which keeps no average, each goes on from the file of one other. The plain one runs in this process,
the others one after another in one group of two spawned ranks.
"""

import gc
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import (
    METHODS,
    average_weights,
    column,
    differing,
    in_ranks,
    largest_difference,
    start,
    train_steps,
    whole_weights,
)
from torch import nn

from unimim.checkpoint.files import load_checkpoint, save_checkpoint
from unimim.engine.deepspeed import DeepSpeedRunner, read_shard
from unimim.engine.distributed import barrier
from unimim.engine.runner import TorchRunner
from unimim.engine.session import Position
from unimim.engine.state import Training
from unimim.files import file_sha256

SAVED, STEPS = 5, 8
TRIED = {"conmim": (), "mae": METHODS["mae"]}
PAIRS = ("ddp", "zero1", "zero2", "zero3")  # of two ranks
ENGINES = ("plain", *PAIRS)
# method, the engine that saves, the engines that go on; a circle around all engines for MAE
NEXT = {"conmim": dict.fromkeys(ENGINES, ENGINES)}
NEXT["mae"] = {first: (ENGINES[i - 1],) for i, first in enumerate(ENGINES)}
RESUMED = [
    (method, first, second)
    for method, engines in NEXT.items()
    for first, seconds in engines.items()
    for second in seconds
]
# Sources of the plain engine: the target, flags of both, flags of the target alone.
OTHERS = {
    "momentum": ("zero3", [*METHODS["mae"], "--opt", "momentum"], []),  # other keys than Adam's
    "nadam": ("zero1", [*METHODS["mae"], "--opt", "nadam"], []),
    "offload": ("zero2", [*METHODS["mae"]], ["--offload", "optimizer"]),
    # many groups, and names that are others in the task than in the file
    "finetune": ("zero3", ["--drop_path", "0", "--reprob", "0", "--model_ema"], []),
}
# the effective batch is the same on one rank and on two
BATCH = {"plain": ("--update_freq", "2")} | dict.fromkeys(PAIRS, ("--update_freq", "1"))
# not a multiple of two: the last of its two parts is padded
ODD = ("--batch_size", "4", "--clip_grad", "0.5")


def flags_of(engine: str) -> list[str]:
    flags = [*ODD, *BATCH[engine]]
    if engine.startswith("zero"):
        flags += ["--enable_deepspeed", "--zero_stage", engine.removeprefix("zero")]
    if engine == "zero3":  # no parameter whole, and several shards in a group
        flags += ["--deepspeed_config", str(Path(__file__).parent / "zero3_partitioned.json")]
    return flags


def outcome(run: Training, metrics: list[dict]) -> dict:
    return {
        "loss": column(metrics, "loss"),
        "weights": whole_weights(run),
        "teacher": average_weights(run),
    }


def source(folder: Path, engine: str, flags: Sequence[str], stage: str = "pretrain") -> dict:
    """Save after some of the steps, and take the others uninterrupted."""
    run, position = start(stage, folder, *flags_of(engine), *flags)
    train_steps(run, 0, SAVED)
    position.step = SAVED
    run.session.save(position, finished=False)
    return outcome(run, train_steps(run, SAVED, STEPS))


def target(
    folder: Path, file: Path, engine: str, flags: Sequence[str], stage: str = "pretrain"
) -> dict:
    """Take the other steps of the run that wrote the file."""
    run, position = start(stage, folder, *flags_of(engine), *flags, "--resume", str(file))
    assert (position.epoch, position.step) == (0, SAVED)
    assert getattr(run.runner.model, "global_steps", SAVED) == SAVED
    changed = changed_state(run, file)
    return outcome(run, train_steps(run, SAVED, STEPS)) | {"changed": changed}


def changed_state(run: Training, file: Path) -> list[str]:
    """Where the state that a resumed run would save differs from the file; all ranks call."""
    ours = run.session._state(Position()) | run.session._progress(Position())
    if run.args.rank:
        return []
    saved = load_checkpoint(file)
    assert saved["optimizer"]["state"]
    parts = ("model", run.task.ema_key, "scaler")
    found = differing({k: ours[k] for k in parts}, {k: saved[k] for k in parts})
    return found + differing(ours["optimizer"]["state"], saved["optimizer"]["state"])


def two_ranks(folder: Path) -> dict:
    """Sources and targets of two ranks; those of the plain engine lie in the folder already."""
    gc.freeze()  # DeepSpeed collects garbage at each start: not among all that is imported
    found = {"source": {}, "target": {}, "others": {}}
    for method, flags in TRIED.items():
        for engine in PAIRS:
            found["source"][method, engine] = source(folder / method / engine, engine, flags)
    for method, first, second in RESUMED:
        if second in PAIRS:
            file = folder / method / first / f"checkpoint-0-{SAVED}.pth"
            run = target(folder / "resumed", file, second, TRIED[method])
            found["target"][method, first, second] = run
    for name, (engine, flags, own) in OTHERS.items():
        file = folder / name / f"checkpoint-0-{SAVED}.pth"
        run = target(folder / "resumed", file, engine, [*flags, *own], stage_of(name))
        found["others"][name] = run
    found["sharded"] = sharded(folder / "sharded")
    return found if dist.get_rank() == 0 else {"sharded": found["sharded"]}


def stage_of(name: str) -> str:
    return "finetune" if name == "finetune" else "pretrain"


# --------------------------------------------------------------------------------------------------
# Shards of DeepSpeed


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


class Member:
    """A member of an enum as Python 3.11.0 to 3.11.3 pickle it."""

    def __init__(self, owner: type, name: str):
        self.owner = owner
        self.name = name

    def __reduce__(self):
        return (getattr, (self.owner, self.name))


def sharded(folder: Path) -> dict:
    """What a run with --deepspeed_shards makes of its files, and of changed ones."""
    flags = (*flags_of("zero2"), *METHODS["mae"], "--deepspeed_shards")
    run, position = start("pretrain", folder, *flags)
    train_steps(run, 0, 2)
    position.step = 2
    run.session.save(position, finished=False)
    file = folder / "checkpoint-0-2.pth"
    whole = outcome(run, train_steps(run, 2, 4))
    found = {"keys": sorted(load_checkpoint(file))}
    found["files"] = sorted(path.name for path in (folder / "checkpoint-0-2").iterdir())
    resumed, _ = start("pretrain", folder, *flags)
    found["resumed"] = differing(whole, outcome(resumed, train_steps(resumed, 2, 4)))
    found["stage"] = says(folder, *flags_of("zero1"), *METHODS["mae"])
    found["engine"] = says(folder, *flags_of("ddp"), *METHODS["mae"])
    found["optimizer"] = says(folder, *flags, "--opt", "sgd")
    edit(file, lambda state: state["engine"].update(world_size=4))
    found["ranks"] = says(folder, *flags)
    edit(file, lambda state: state["engine"].update(world_size=2))

    shard = folder / "checkpoint-0-2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = shard.read_bytes()
    barrier()
    if dist.get_rank() == 0:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        shard.write_bytes(flipped)
    barrier()
    found["flipped"] = says(folder, *flags)
    barrier()
    if dist.get_rank() == 0:
        shard.write_bytes(content)
        state = torch.load(shard, weights_only=False)
        torch.save({**state, "more": Evil(str(folder / "ran"))}, shard)
    barrier()
    edit(file, lambda state: state["shards"].update({shard.name: file_sha256(shard)}))
    found["code"] = says(folder, *flags)
    found["ran"] = (folder / "ran").exists()
    return found


def says(folder: Path, *flags: str) -> str:
    """What resuming the folder's run says; empty if it goes on."""
    barrier()
    try:
        start("pretrain", folder, *flags)
    except ValueError as error:
        return str(error)
    return ""


def edit(file: Path, change) -> None:
    """Change what one rank reads back; all ranks call."""
    barrier()
    if dist.get_rank() == 0:
        state = load_checkpoint(file)
        change(state)
        save_checkpoint(file, state)
    barrier()


# --------------------------------------------------------------------------------------------------
# What is asserted


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("engines")
    plain = {}
    for method, flags in TRIED.items():
        plain[method, "plain"] = source(folder / method / "plain", "plain", flags)
    others = {
        name: source(folder / name, "plain", flags, stage_of(name))
        for name, (_, flags, _) in OTHERS.items()
    }
    found, other = in_ranks(2, two_ranks, folder)
    found["source"] |= plain
    found["plain others"] = others
    for method, first, second in RESUMED:
        if second == "plain":
            file = folder / method / first / f"checkpoint-0-{SAVED}.pth"
            run = target(folder / "resumed" / "plain", file, "plain", TRIED[method])
            found["target"][method, first, "plain"] = run
    return found | {"folder": folder, "other": other}


def apart(ours: dict, theirs: dict) -> float:
    """Return the largest difference of losses, weights and teachers."""
    losses = [abs(a - b) for a, b in zip(ours["loss"], theirs["loss"], strict=True)]
    weights = largest_difference(ours["weights"], theirs["weights"])
    return max(*losses, weights, largest_difference(ours["teacher"], theirs["teacher"]))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "first", "second"), RESUMED)
def test_any_engine_goes_on_from_the_file_of_any_other(runs, method, first, second):
    """As the run that wrote it did: to the bit on the same engine, else up to rounding. What it
    would save at once is what it read, to the bit."""
    whole, resumed = runs["source"][method, first], runs["target"][method, first, second]
    assert resumed["changed"] == []
    assert len(resumed["loss"]) == STEPS - SAVED and len(whole["weights"]) > 20
    difference = apart(resumed, whole)
    print(f"{method} {first} -> {second}: {difference:.1e}")
    if first == second:
        resumed = {key: resumed[key] for key in whole}
        assert differing(resumed, whole) == []
    assert difference <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_offload_and_fine_tuning_go_on(runs, name):
    resumed = runs["others"][name]
    assert resumed["changed"] == []
    difference = apart(resumed, runs["plain others"][name])
    print(f"{name} plain -> {OTHERS[name][0]}: {difference:.1e}")
    assert difference <= 1e-6
    file = runs["folder"] / name / f"checkpoint-0-{SAVED}.pth"
    state = load_checkpoint(file)["optimizer"]["state"]
    keys = {
        "momentum": {"momentum_buffer"},
        "nadam": {"step", "exp_avg", "exp_avg_sq", "mu_product"},
    }
    adam = {"step", "exp_avg", "exp_avg_sq"}
    assert {key for own in state.values() for key in own} == keys.get(name, adam)


@pytest.mark.slow
def test_the_file_is_the_same_whoever_wrote_it(runs):
    """Names, keys, shapes and types of what all engines save; no shards beside it."""
    described = {}
    for engine in ENGINES:
        folder = runs["folder"] / "conmim" / engine
        assert not (folder / f"checkpoint-0-{SAVED}").exists()
        state = load_checkpoint(folder / f"checkpoint-0-{SAVED}.pth")
        described[engine] = outline(
            {key: state[key] for key in ("model", "teacher", "optimizer", "data", "rng")}
        )
    state = described["plain"]["optimizer"]["state"]
    assert state["blocks.0.attn.qkv.weight"]["exp_avg"] == (torch.float32, (96, 32))
    for engine in PAIRS:
        ours = {**described[engine], "optimizer": described[engine]["optimizer"]["state"]}
        theirs = {**described["plain"], "optimizer": state}
        assert differing(ours, theirs) == []


def outline(value):
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape))
    if isinstance(value, dict):
        return {key: outline(item) for key, item in value.items()}
    return value


@pytest.mark.slow
def test_shards_of_deepspeed_are_for_the_same_stage_and_ranks(runs):
    for found in (runs["sharded"], runs["other"]["sharded"]):
        assert "optimizer" not in found["keys"] and "shards" in found["keys"]
        assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in found["files"]
        assert found["resumed"] == []
        assert "zero_stage 2, this run has 1" in found["stage"]
        assert "world_size 4, this run has 2" in found["ranks"]
        assert "shards of --opt adamw, which --opt sgd cannot use" in found["optimizer"]
        assert found["engine"] == "", "weights without the optimizer's state"


@pytest.mark.slow
def test_damaged_shards_are_named_and_their_code_is_not_run(runs):
    """One flipped bit; an object under a checksum that is right."""
    for found in (runs["sharded"], runs["other"]["sharded"]):
        assert (
            "rank_1_mp_rank_00_optim_states.pt is not the file that was saved" in found["flipped"]
        )
        assert "would run posix.mkdir" in found["code"]
    assert not runs["sharded"]["ran"]


# --------------------------------------------------------------------------------------------------
# The loss scale


def deepspeed_runner(window: int) -> DeepSpeedRunner:
    """A runner with nothing but DeepSpeed's dynamic loss scale, for which it needs a GPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=2.0**7,
        scale_window=window,
        min_scale=1.0,
        delayed_shift=2,
        consecutive_hysteresis=False,
        dtype=torch.float32,
    )
    runner = DeepSpeedRunner.__new__(DeepSpeedRunner)
    runner.model = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    return runner


def test_loss_scale_goes_from_engine_to_engine(monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # for its log
    first = deepspeed_runner(window=5)
    scaler = first.model.optimizer.loss_scaler
    for overflow in (True, True, False, False, False):
        scaler.update_scale(overflow)
    saved = first.scaler_state()
    assert saved == {"scale": 64.0, "good_steps": 3, "hysteresis": 1}

    again = deepspeed_runner(window=5)
    again.load_scaler_state(saved)
    scales = []
    for runner in (first, again):
        ours = runner.model.optimizer.loss_scaler
        scales.append([])
        for overflow in (False, False, False, True, False):
            ours.update_scale(overflow)
            scales[-1].append(ours.cur_scale)
    assert scales[0] == scales[1] and len(set(scales[0])) == 2

    network = nn.Linear(2, 2)
    plain = TorchRunner(
        network,
        torch.optim.SGD(network.parameters(), lr=0.1),
        device=torch.device("cpu"),
        precision="fp16",
        update_freq=1,
        clip_grad=None,
    )
    plain.load_scaler_state({"scale": 64.0, "good_steps": 4001})
    assert plain.scaler_state() == {"scale": 64.0, "good_steps": 1}
    assert plain.scaler.scale(torch.ones(())) == 64.0
    plain.load_scaler_state({"scale": 32.0, "_growth_tracker": 7})  # as older files have it
    assert plain.scaler_state() == {"scale": 32.0, "good_steps": 7}
    again.load_scaler_state(plain.scaler_state())
    assert math.isclose(again.model.optimizer.loss_scaler.cur_scale, 32.0)


def test_stages_in_shards_are_read_as_any_python_writes_them(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    shard = tmp_path / "shard.pt"
    torch.save({"stage": Member(ZeroStageEnum, "gradients")}, shard)
    assert read_shard(str(shard)) == {"stage": ZeroStageEnum.gradients}
    torch.save({"stage": Member(LossScaler, "backward")}, shard)
    with pytest.raises(ValueError, match="is refused: unpickling it would run getattr"):
        read_shard(str(shard))
