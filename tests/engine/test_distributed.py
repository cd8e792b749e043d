"""Plain torch, DDP and DeepSpeed ZeRO 0 to 3 compute the same, resume exactly, and skip what is not
finite.

All engines run one after another in the same spawned processes, once on one rank and once on two.
"""

import copy
import gc
import json
import math
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import (
    METHODS,
    SIZE,
    arguments,
    average_weights,
    column,
    differing,
    gloo_threads,
    in_ranks,
    largest_difference,
    own_signals,
    start,
    train_steps,
    whole_weights,
)
from torch.profiler import ProfilerActivity, profile

from datasets import BadImagesError, EvalBatchSampler, build_dataset, build_loader
from engine_for_finetuning import evaluate_classifier
from engine_for_pretraining import share_bad_images
from modeling_finetune import create_model, sincos_pos_embed
from run_class_finetuning import ClassificationEvaluator
from unimim.checkpoint.files import load_checkpoint
from unimim.checkpoint.loading import load_pretrained
from unimim.cli.models import build_classifier
from unimim.data.views import build_finetune_transform
from unimim.engine.batch_norm import BatchStatistics
from unimim.engine.distributed import StopSignal, barrier, leave_process_group
from unimim.engine.setup import set_up
from unimim.files import write_text

pytestmark = pytest.mark.slow
STEPS, SAVED = 4, 2
ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")
FARTHEST = ("torch", "zero3")  # DDP, and what takes the whole network apart
COMPILED = ("torch", "zero0", "zero2")  # stage 1 reduces gradients by the hooks of stage 2
TOLERANCE = {"torch": 1e-6, "zero0": 1e-6, "zero1": 1e-6, "zero2": 1e-6, "zero3": 2e-5}
ACCUMULATED = ("--update_freq", "2", "--batch_size", "4", "--clip_grad", "0.5")
MIXED = (
    "--update_freq",
    "2",
    "--batch_size",
    "4",
    "--mixup",
    "0.8",
    "--cutmix",
    "1.0",
    "--drop_path",
    "0.1",
)
AVERAGED = ("--model_ema", "--model_ema_decay", "0.9", "--clip_grad", "3.0")
EVALUATED = 101  # odd, and no multiple of the batch


# What stage 3 does to large networks: no parameter is kept whole, and they are stepped in several
# sub-groups.
PARTITIONED = Path(__file__).parent / "zero3_partitioned.json"


def engine_flags(engine: str) -> list[str]:
    flags = (
        []
        if engine == "torch"
        else ["--enable_deepspeed", "--zero_stage", engine.removeprefix("zero")]
    )
    return flags + (["--deepspeed_config", str(PARTITIONED)] if engine == "zero3" else [])


# --------------------------------------------------------------------------------------------------
# What the ranks do


def outcome(run, figures: list[dict]) -> dict:
    return {
        "loss": column(figures, "loss"),
        "norm": column(figures, "grad_norm"),
        "weights": whole_weights(run),
        "teacher": average_weights(run),
    }


def train_save_resume(stage: str, folder: Path, *flags: str) -> dict:
    """Four steps with a checkpoint after two, and the last two again from it; then damaged
    steps."""
    run, position = start(stage, folder, *flags)
    figures = train_steps(run, 0, SAVED)
    first, position.step = outcome(run, figures), SAVED
    run.session.save(position, finished=False)
    figures += train_steps(run, SAVED, STEPS)
    resumed, there = start(stage, folder, *flags)
    again = outcome(resumed, train_steps(resumed, SAVED, STEPS))
    whole = outcome(run, figures)
    return {
        "first": first,
        "whole": whole,
        "position": vars(there),
        "resumed": differing(
            {**whole, "loss": whole["loss"][SAVED:], "norm": whole["norm"][SAVED:]}, again
        ),
        "skipped": damaged_steps(resumed),
    }


def damaged_steps(run) -> dict:
    """On the last rank: a batch of NaNs, then a gradient that is not finite under a finite loss;
    then a good step."""
    at_fault = dist.get_rank() == dist.get_world_size() - 1 if dist.is_initialized() else True
    seen = {}

    def spoil(update, micro_batches):
        seen[update] = torch.cat([batch["index"] for batch in micro_batches]).tolist()
        spoiled = {"image", "image_strong"} & micro_batches[0].keys()
        for name in spoiled if at_fault and update == STEPS else ():
            micro_batches[0][name] = micro_batches[0][name].float() * float("nan")

    before, report = everything(run), {}
    train_steps(run, STEPS, STEPS + 1, spoil)
    report["loss"] = differing(before, everything(run))
    trained = next(p for p in run.task.parameters() if p.requires_grad)
    hook = trained.register_hook(lambda grad: grad * float("inf")) if at_fault else None
    train_steps(run, STEPS + 1, STEPS + 2, spoil)
    report["gradient"] = differing(before, everything(run))
    if hook is not None:
        hook.remove()
    report["streak"] = run.monitor.streak
    last = train_steps(run, STEPS + 2, STEPS + 3, spoil)[-1]
    report |= {
        "last": last,
        "indices": seen,
        "moved": largest_difference(before["weights"], whole_weights(run)),
    }
    return report


def everything(run) -> dict:
    """Weights, batch statistics, teacher and this rank's optimizer state."""
    return {
        "weights": whole_weights(run),
        "teacher": average_weights(run),
        "optimizer": copy.deepcopy(list(run.runner.optimizer.state.values())),
    }


def pretrain_all(
    folder: Path, engines: tuple[str, ...] = ENGINES, flags: tuple[str, ...] = ()
) -> dict[str, dict]:
    results = {}
    for engine in engines:
        gc.freeze()  # stage 3 collects garbage at each start: not among all that is imported
        engine_folder = folder / engine
        given = (*engine_flags(engine), *ACCUMULATED, *flags)
        results[engine] = train_save_resume("pretrain", engine_folder, *given)
    return results


def finetune_all(folder: Path) -> dict[str, dict]:
    """Three steps of fine-tuning with an average under each engine, and what evaluation makes of
    the result."""
    results = {}
    for engine in ("torch", "zero2", "zero3"):
        run, _ = start("finetune", folder / engine, *engine_flags(engine), *MIXED, *AVERAGED)
        figures = train_steps(run, 0, 3)
        results[engine] = outcome(run, figures) | {"evaluation": evaluations(run)}
    return results


def evaluations(run) -> dict:
    """The same images on every rank and shared among them, and which images this rank counted."""
    args = run.args
    dataset = build_dataset(
        args, train=False, transform=build_finetune_transform(args, train=False), need_labels=True
    )
    found = {}
    for name, place in (("whole", (0, 1)), ("shared", (args.rank, args.world_size))):
        sampler = EvalBatchSampler(EVALUATED, 12, rank=place[0], world_size=place[1])
        loader = build_loader(dataset, sampler, num_workers=0, pin_mem=False)
        found[name] = evaluate_classifier(
            run.task.model, loader, run.context, shared=name == "shared"
        )
        found[f"{name}_indices"] = [i for batch in loader for i in batch["index"].tolist()]
    return found


def one_rank(folder: Path) -> dict:
    # first: DeepSpeed's stage 3 changes torch's functions for the rest of the process, and compiled
    # code with them
    results = {
        "compiled": {engine: compiled(folder / "compiled" / engine, engine) for engine in COMPILED}
    }
    results["pretrain"] = pretrain_all(folder)
    results["half"] = half_precision(folder)
    results["rounded"] = evaluate_rounded(folder / "rounded")
    results["frozen"] = keep_frozen(folder / "frozen")
    results["offloaded"] = {
        engine: offloaded(folder / "offloaded" / engine, engine) for engine in ENGINES[2:]
    }
    return results


def compiled(folder: Path, engine: str) -> dict[str, list[float]]:
    """Losses of MAE with --compile, whose graphs run as they were traced: what Inductor makes of
    them is its affair."""
    torch._dynamo.reset()  # or blocks of the engine before this one serve
    traced = partial(torch.compile, backend="eager")
    with mock.patch.object(torch, "compile", traced):
        run, _ = start("pretrain", folder, *engine_flags(engine), *METHODS["mae"], "--compile")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    losses = column(train_steps(run, 0, STEPS), "loss")
    plain, _ = start("pretrain", folder / "plain", *METHODS["mae"])
    return {
        "losses": losses,
        "plain": column(train_steps(plain, 0, STEPS), "loss"),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
    }


def offloaded(folder: Path, engine: str) -> dict:
    """Three steps of MAE with the optimizer on the host, and where DeepSpeed has put it."""
    run, _ = start(
        "pretrain", folder, *engine_flags(engine), *METHODS["mae"], "--offload", "optimizer"
    )
    return outcome(run, train_steps(run, 0, 3)) | {
        "offloads": run.runner.model.zero_use_cpu_optimizer()
    }


def half_precision(folder: Path) -> dict[str, list[float]]:
    """Nothing is clipped: DeepSpeed's norm may differ in the last bit, and rounding to bf16
    enlarges that."""
    losses, unclipped = {}, ("--clip_grad", "1e9")
    for engine in ENGINES:
        flags = (*engine_flags(engine), "--precision", "bf16", *unclipped)
        losses[engine] = column(
            train_steps(start("pretrain", folder / "bf16" / engine, *flags)[0], 0, 5), "loss"
        )
    run, _ = start("pretrain", folder / "fp32", *unclipped)
    losses["fp32"] = column(train_steps(run, 0, 5), "loss")
    return losses


def bf16_config(folder: Path, stage: int) -> list[str]:
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    write_text(folder / "ds.json", json.dumps(config))  # every rank the same
    return ["--enable_deepspeed", "--deepspeed_config", str(folder / "ds.json")]


def users_config(folder: Path, stage: int) -> dict:
    """bf16 weights by the user's own configuration: losses, and the teacher beside an average kept
    by hand."""
    flags = (*bf16_config(folder, stage), "--t_momentum", "0.9", "--lr", "1e-4")
    run, position = start("pretrain", folder, *flags)
    expected = {name: p.clone() for name, p in run.task.teacher.named_parameters()}
    losses = []
    for step in range(16):
        losses += column(train_steps(run, step, step + 1), "loss")
        momentum = 1 - 0.05 * (1 + math.cos(math.pi * step / run.total_steps))
        weights = whole_weights(run)
        for name, value in expected.items():
            value.lerp_(weights[name], 1 - momentum)
    parameters = {name: weights[name] for name in expected}
    average = run.task.ema
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        average.update(1.0)  # which changes nothing
    position.step = 16
    run.session.save(position, finished=False)
    resumed, _ = start("pretrain", folder, *flags)
    return {
        "losses": losses,
        "rounded": largest_difference(
            parameters, {name: p.bfloat16().float() for name, p in parameters.items()}
        ),
        "teacher": largest_difference(expected, dict(run.task.teacher.named_parameters())),
        "dtypes": {p.dtype for p in run.task.teacher.parameters()},
        "live": {p.dtype for p in run.task.parameters()},
        "collectives": sum(event.name.startswith("c10d::") for event in seen.events()),
        "blocks": [len(ours) for ours, _ in average._blocks],
        "resumed": differing(train_steps(run, 16, 18), train_steps(resumed, 16, 18)),
    }


def evaluate_rounded(folder: Path) -> dict[str, float]:
    """What the run's own evaluation makes of sharded bf16 weights, and of the whole float32
    ones."""
    run, position = start("finetune", folder, *bf16_config(folder, 3), "--label_fraction", "0.2")
    train_steps(run, 0, 5)
    transform = build_finetune_transform(run.args, train=False)
    dataset = build_dataset(run.args, train=False, transform=transform, need_labels=True)
    loader = build_loader(dataset, EvalBatchSampler(EVALUATED, 12), num_workers=0, pin_mem=False)
    found = ClassificationEvaluator(run, loader).after_epoch(position, run.session)
    run.session.finish()
    whole = build_classifier(run.args)
    whole.load_state_dict(load_checkpoint(folder / "checkpoint-best.pth")["model"])
    return {
        "rounded": found["test_loss"],
        "whole": evaluate_classifier(whole, loader, run.context)["loss"],
    }


def keep_frozen(folder: Path) -> bool:
    """Whether a parameter that is not trained comes whole out of sharded bf16 weights."""
    flags = (
        *bf16_config(folder, 3),
        "--model_kwargs",
        *SIZE,
        "projector_hidden_dim=32",
        "pos_embed=sincos",
    )
    run, position = start("pretrain", folder, *flags)
    train_steps(run, 0, 2)
    run.session.save(position, finished=True)
    saved = load_checkpoint(folder / "checkpoint-0.pth")["model"]["pos_embed"]
    return torch.equal(saved, sincos_pos_embed(32, (4, 4)).bfloat16().float())


def two_ranks(folder: Path) -> dict:
    return {
        "pretrain": pretrain_all(folder / "pretrain"),
        "methods": {
            name: pretrain_all(folder / name, FARTHEST, (*flags, "--update_freq", "1"))
            for name, flags in METHODS.items()
        },
        "finetune": finetune_all(folder / "finetune"),
        "user": {stage: users_config(folder / f"user{stage}", stage) for stage in (1, 2, 3)},
        "evaluated": {
            engine: evaluate_apart(folder / "apart" / engine, engine)
            for engine in ("torch", "zero3")
        },
    }


class Batches(list):
    """What an evaluation asks of a loader: to be gone through, and its `dataset`."""


def evaluate_apart(folder: Path, engine: str) -> dict:
    """A ResNet with the batch statistics of each rank; the evaluation of rank 1 sees other labels
    than rank 0's."""
    flags = (
        *(
            "--model",
            "resnet18",
            "--input_size",
            "64",
            "--layer_decay",
            "1",
            "--drop_path",
            "0",
            "--init_scale",
            "1",
        ),
        *(
            "--model_kwargs",
            "patch_size=null",
            "channels=[8,8,16,16]",
            "--no_dist_eval",
            "--model_ema",
        ),
    )
    run, position = start("finetune", folder, *engine_flags(engine), *flags)
    train_steps(run, 0, 3)
    transform = build_finetune_transform(run.args, train=False)
    dataset = build_dataset(run.args, train=False, transform=transform, need_labels=True)
    loader = build_loader(dataset, EvalBatchSampler(EVALUATED, 12), num_workers=0, pin_mem=False)
    batches = list(loader)
    own = Batches(batch | {"label": (batch["label"] + run.args.rank) % 10} for batch in batches)
    own.dataset = dataset
    apart = BatchStatistics(run.task.model).buffers[0].clone()
    figures = ClassificationEvaluator(run, own).after_epoch(position, run.session)
    run.session.finish()
    saved = build_classifier(run.args)
    barrier()
    saved.load_state_dict(load_checkpoint(folder / "checkpoint-best.pth")["model"])
    return {
        "figures": figures,
        "position": vars(position),
        "apart": apart,
        "statistics": [
            buffer.clone()
            for buffer in BatchStatistics(run.task.model, run.task.ema.module).buffers
        ],
        "saved": evaluate_classifier(saved, batches, run.context),
        "kept": len(run.runner.full_state_dict()),
    }


# --------------------------------------------------------------------------------------------------
# What is asserted


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    return {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}


@pytest.fixture(scope="module")
def alone(folders) -> dict:
    return in_ranks(1, one_rank, folders[1])[0]


@pytest.fixture(scope="module")
def pair(folders) -> list[dict]:
    return in_ranks(2, two_ranks, folders[2])


@pytest.fixture(scope="module")
def runs(alone, pair) -> dict[int, list[dict[str, dict]]]:
    """Number of ranks -> rank -> engine -> result of pre-training."""
    return {1: [alone["pretrain"]], 2: [rank["pretrain"] for rank in pair]}


def assert_equal_runs(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance)
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4)
    assert largest_difference(ours["weights"], theirs["weights"]) <= tolerance
    assert largest_difference(ours["teacher"], theirs["teacher"]) <= tolerance


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_zero_equals_torch(runs, ranks, engine):
    ours, plain = runs[ranks][0][engine]["whole"], runs[ranks][0]["torch"]["whole"]
    assert max(plain["norm"]) > 0.5, "nothing is clipped"
    assert_equal_runs(ours, plain, TOLERANCE[engine])


def test_ranks_agree(runs):
    first, second = runs[2]
    for engine in ENGINES:
        ours, theirs = first[engine]["whole"], second[engine]["whole"]
        assert (
            ours["loss"] == theirs["loss"]
            and largest_difference(ours["weights"], theirs["weights"]) == 0
        )
        assert largest_difference(ours["teacher"], theirs["teacher"]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_on_all_engines(pair, method):
    """Losses and weights, exact resume, and steps that are not finite."""
    for number, rank in enumerate(pair):
        runs = rank["methods"][method]
        for engine, run in runs.items():
            assert_equal_runs(run["whole"], runs["torch"]["whole"], TOLERANCE[engine])
            assert run["resumed"] == [], engine
            assert run["skipped"]["loss"] == run["skipped"]["gradient"] == [], (engine, number)
            assert 1e-5 < run["skipped"]["moved"] < 1e-2


def accumulated(folder: Path, update_freq: int, *flags: str) -> dict:
    sizes = ("--update_freq", str(update_freq), "--batch_size", "4")
    run, _ = start("pretrain", folder, *sizes, "--clip_grad", "0.5", *flags)
    first = outcome(run, train_steps(run, 0, 1))
    return {"first": first, "rest": column(train_steps(run, 1, SAVED), "loss")}


def test_one_process_with_accumulation_equals_two_ranks(tmp_path, runs):
    """Four micro-batches in one process are two on each of two ranks: the sampler deals them in
    this order."""
    alone, pair = accumulated(tmp_path, 4), runs[2][0]["torch"]["first"]
    assert alone["first"]["loss"] + alone["rest"] == pytest.approx(pair["loss"], abs=1e-6)
    assert alone["first"]["norm"][0] == pytest.approx(pair["norm"][0], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_every_method_follow_the_images_not_the_processes(tmp_path, pair, method):
    """Batch statistics over both ranks are those of both micro-batches in one."""
    joined = ("--update_freq", "1", "--batch_size", "8") if "--sync_bn" in METHODS[method] else ()
    alone = accumulated(tmp_path, 2, *METHODS[method], *joined)
    ranks = pair[0]["methods"][method]["torch"]["first"]
    assert alone["first"]["loss"] + alone["rest"] == pytest.approx(ranks["loss"], abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bit_exact(runs, ranks, engine):
    for rank in runs[ranks]:
        assert rank[engine]["position"] == {
            "epoch": 0,
            "step": SAVED,
            "best": 0.0,
            "best_average": 0.0,
        }
    assert runs[ranks][0][engine]["resumed"] == []
    if (
        ranks == 2
    ):  # the other rank's own batch statistics are not kept, and do not matter for the weights
        assert [where for where in runs[2][1][engine]["resumed"] if "running_" not in where] == []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_plain_file_holds_the_live_weights(runs, folders, ranks, engine):
    folder = folders[1] / engine if ranks == 1 else folders[2] / "pretrain" / engine
    live = runs[ranks][0][engine]["first"]
    saved = load_checkpoint(folder / f"checkpoint-0-{SAVED}.pth")
    assert (
        differing(
            {"model": live["weights"], "teacher": live["teacher"]},
            {k: saved[k] for k in ("model", "teacher")},
        )
        == []
    )
    assert not (folder / f"checkpoint-0-{SAVED}").exists()
    sizes = {k: int(v) for k, v in (item.split("=") for item in SIZE)}
    model = create_model(
        "beit_tiny_patch16_224", **sizes, input_size=16, patch_size=4, num_classes=10
    )
    report = load_pretrained(model, folder / f"checkpoint-0-{SAVED}.pth")
    assert report.matched == 1.0
    assert torch.equal(model.blocks[1].attn.qkv.weight, live["teacher"]["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_nonfinite_steps_leave_no_trace(runs, folders, ranks, engine):
    folder = folders[1] / engine if ranks == 1 else folders[2] / "pretrain" / engine
    for number, rank in enumerate(runs[ranks]):
        skipped = rank[engine]["skipped"]
        assert skipped["loss"] == [] and skipped["gradient"] == []
        assert skipped["streak"] == 2
        assert skipped["last"]["applied"] == 1.0 and skipped["last"]["loss"] < 10
        assert 1e-5 < skipped["moved"] < 1e-2  # a step of AdamW at this learning rate
        for step in (STEPS, STEPS + 1):
            report = json.loads((folder / f"nonfinite-{step}-rank{number}.json").read_text())
            assert report["indices"] == skipped["indices"][step]


def test_bf16_equals_torch_autocast(alone):
    losses = alone["half"]
    assert losses["torch"] != pytest.approx(losses["fp32"], abs=1e-5), "bf16 changes nothing"
    assert losses["torch"][:2] == pytest.approx(losses["fp32"][:2], rel=0.02)
    for engine in ENGINES[1:]:
        assert losses[engine] == pytest.approx(losses["torch"], abs=1e-6), engine


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_users_bf16_section(pair, stage):
    """The average follows the float32 masters, which are gathered block by block."""
    for found in (rank["user"][stage] for rank in pair):
        assert sum(found["losses"][-4:]) < sum(found["losses"][:4])
        assert found["live"] == {torch.bfloat16} and found["dtypes"] == {torch.float32}
        assert found["rounded"] > 1e-5, "the weights read are not the float32 masters"
        assert found["teacher"] < 1e-6
        assert found["resumed"] == []
        assert found["collectives"] == len(found["blocks"]) < sum(found["blocks"]) / 3


def test_rounded_weights_are_evaluated(alone):
    found = alone["rounded"]
    assert (
        found["rounded"] == pytest.approx(found["whole"], rel=0.01)
        and found["rounded"] != found["whole"]
    )


def test_frozen_parameter_is_saved_whole(alone):
    assert alone["frozen"]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_finetuning_equals_ddp(pair, engine):
    for rank in pair:
        assert_equal_runs(rank["finetune"][engine], rank["finetune"]["torch"], TOLERANCE[engine])


@pytest.mark.parametrize("engine", ["torch", "zero3"])
def test_ranks_agree_on_what_is_best(pair, engine):
    """Otherwise one of them waits for ever for the others to save. The figures are those of the
    saved network."""
    first, second = (rank["evaluated"][engine] for rank in pair)
    assert not torch.equal(first["apart"], second["apart"])
    assert differing(first["statistics"], second["statistics"]) == []
    assert first["figures"] == second["figures"] and first["position"] == second["position"]
    for name, value in first["saved"].items():
        assert first["figures"][f"test_{name}"] == pytest.approx(value, rel=1e-5)
    assert first["kept"] > 0 and (engine == "torch" or second["kept"] == 0)


@pytest.mark.parametrize("engine", COMPILED)
def test_compiled_blocks_train_as_plain_ones(alone, engine):
    found = alone["compiled"][engine]
    assert found["graphs"] > 0, "nothing was compiled"
    assert found["losses"] == pytest.approx(found["plain"], abs=1e-6)


@pytest.mark.parametrize("engine", ENGINES[2:])
def test_the_optimizer_on_the_host_takes_the_same_steps(alone, tmp_path, engine):
    run, _ = start("pretrain", tmp_path, *METHODS["mae"])
    plain, found = outcome(run, train_steps(run, 0, 3)), alone["offloaded"][engine]
    assert found["offloads"]
    assert_equal_runs(found, plain, TOLERANCE[engine])


def test_shared_evaluation_counts_every_image_once(pair):
    indices = [
        i for rank in pair for i in rank["finetune"]["torch"]["evaluation"]["shared_indices"]
    ]
    assert sorted(i for i in indices if i >= 0) == list(range(EVALUATED))
    assert [i for i in indices if i < 0] == [-1]
    for rank in pair:
        for engine in ("torch", "zero3"):
            found = rank["finetune"][engine]["evaluation"]
            assert found["shared"] == pytest.approx(found["whole"], rel=1e-6)


def stops_and_bad_images(folder: Path) -> dict:
    """A request on rank 1 only, in its third step and in an epoch's last one; broken images that
    both ranks met."""
    set_up(arguments("pretrain", folder))
    rank = dist.get_rank()
    answers = {}
    with own_signals():
        for when in (2, 4):
            stop = StopSignal()
            answers[when] = []
            for step in range(5):
                stop.received = "SIGTERM" if rank == 1 and step >= when else None
                answers[when].append(stop.agreed(last=step == 4))
                if answers[when][-1]:
                    break
    dataset = build_dataset(
        arguments("pretrain", folder, "--max_bad_images", "3"),
        train=True,
        need_labels=False,
        transform=None,
    )
    for index in [4, 5] if rank == 0 else [5, 6]:
        dataset.bad.add(index)
    share_bad_images(dataset)
    shared = dataset.bad.sorted()
    if rank == 0:
        dataset.bad.add(9)
    try:
        share_bad_images(dataset)
        said = ""
    except BadImagesError as error:
        said = str(error)
    return {"answers": answers, "shared": shared, "said": said}


def agree_and_leave(folder: Path) -> dict:
    """What two ranks agree on, and gloo's threads before and after they leave the group.

    No DeepSpeed: it keeps its engine, and so the threads.
    """
    found = stops_and_bad_images(folder)
    train_steps(start("pretrain", folder)[0], 0, 2)
    before = gloo_threads()
    leave_process_group()
    return found | {"threads": (before, gloo_threads())}


@pytest.fixture(scope="module")
def leaving(tmp_path_factory) -> list[dict]:
    return in_ranks(2, agree_and_leave, tmp_path_factory.mktemp("leaving"))


def test_leaving_the_group_ends_its_threads(leaving):
    for before, after in (found["threads"] for found in leaving):
        assert before > 0 and after == 0


def test_ranks_agree_to_stop_and_on_bad_images(leaving):
    """At the same step, one after the request; four images in all are too many, though no rank met
    more than three."""
    for found in leaving:
        assert found["answers"] == {
            2: [False, False, False, True],
            4: [False, False, False, False, True],
        }
        assert found["shared"] == [4, 5, 6]
        assert found["said"].startswith("4 of ") and "--max_bad_images" in found["said"]
