"""The section `right` of gpu_check.py: tiny forms of every method on the device against what they
must be equal to.

The device is compared with the CPU, each precision with float32, each kernel and engine with the
plain one. What needs a process of its own runs beside that as a group, and its results are read at
the end: `python scripts/benchmarks/gpu_right.py GROUP --output FOLDER`. On a CPU the comparisons
with the device are left out, and one process runs the groups.
"""

import argparse
import faulthandler
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

from helpers import METHODS as OTHERS
from helpers import PRETRAIN, SIZE, TINY, differing, own_signals
from helpers import arguments as tiny_arguments

from datasets import ImageDataset, build_dataset, build_loader
from engine_for_finetuning import Classification
from engine_for_pretraining import train, train_one_step
from masking_generator import build_mask_generator
from modeling_pretrain import PretrainMethod
from optim_factory import param_groups
from scripts.benchmarks.data import write_stand_in
from scripts.gpu_check import Checks
from unimim.cli.models import build_classifier, build_method
from unimim.cli.options import parse
from unimim.data.device_decode import UndecodedImages, batch_decoder
from unimim.data.pretraining import build_data, train_loader
from unimim.data.sources import map_source
from unimim.data.views import (
    build_finetune_transform,
    build_pretrain_transform,
    image_mean_std,
)
from unimim.engine import setup
from unimim.engine.batch_norm import synchronized_batch_norm
from unimim.engine.compiling import compile_blocks
from unimim.engine.distributed import (
    barrier,
    free_port,
    init_distributed,
    leave_process_group,
)
from unimim.engine.runner import Runner
from unimim.engine.session import Position
from unimim.engine.setup import build_runner, start_training
from unimim.engine.state import Normalize, RunContext, Training, with_mask_counts
from unimim.evaluation.flags import parse_knn, parse_linear
from unimim.evaluation.knn import evaluate_features
from unimim.evaluation.probing import run_probe
from unimim.logs import log

METHODS: dict[str, tuple[str, ...]] = {"conmim": ()} | OTHERS  # flags over those of PRETRAIN
TRANSFORMERS = [name for name in METHODS if name != "a2mim_resnet"]
FEW = ("conmim", "mae")
CLOSE = {
    "fp32": (1e-5, 5e-4),
    "bf16": (3e-2, 0.2),
    "fp16": (5e-3, 0.05),
}  # relative: of the loss, of all gradients
WORDS = (3e-2, 0.5)  # in lower precision the tokenizer may choose other words
STEADY = (
    "--opt_eps",
    "1e-4",
)  # AdamW makes whole steps of gradients that are rounding noise otherwise
MOVED = 1e-2  # how far apart two trainings may end, as a share of the way
# Four steps of two engines, relative: of the losses, of the weights' way. In fp16 DeepSpeed rounds
# weights, tokens and the residual stream, which autocast leaves in float32: two other roundings,
# as far apart as either is from float32, which ConMIM's batch statistics of a few images enlarge to
# 0.03 of the loss within four steps. In bf16 both engines keep float32 weights.
ENGINES_ALIKE = {"fp32": (1e-4, MOVED), "bf16": (5e-2, 0.3), "fp16": (5e-2, 0.1)}
# gray levels, on average: decoders may interpolate colors in other ways
DECODED_ALIKE = {"image": 2.0, "image_strong": 3.0, "image_second": 2.0}
MARGIN = 3.0  # seconds at the end of the section for what the groups found


# --------------------------------------------------------------------------------------------------
# Tiny runs


def arguments(name: str, device: torch.device, *flags: str) -> Namespace:
    """The flags of a tiny pre-training by method `name`."""
    place = (
        "--device",
        device.type,
        "--precision",
        "fp32",
        "--drop_path",
        "0",
        "--matmul_precision",
        "highest",
    )
    return parse("pretrain", [*PRETRAIN, *METHODS[name], *place, *flags])


def set_up(args: Namespace) -> RunContext:
    """As run_pretraining's, without its words on the terminal."""
    context = setup.set_up(args)
    log.setLevel("ERROR")
    return context


@dataclass
class Built:
    """A method with its runner on a device."""

    method: PretrainMethod
    runner: Runner
    context: RunContext

    def gradients(self, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """Loss of a batch from the loader, and the float32 gradients on the CPU that now lie in the
        parameters."""
        mean_std = image_mean_std(self.context.args)
        normalize = Normalize(mean_std, self.context.device, self.method.raw_views)
        batch = normalize(with_mask_counts(batch))
        loss = self.runner.micro_step(batch, last=True)["loss"]
        scale = self.runner.scaler.get_scale()
        found = {name: p.grad for name, p in self.method.named_parameters() if p.grad is not None}
        return float(loss.detach()), {
            name: grad.float().cpu() / scale for name, grad in found.items()
        }


def build(name: str, device: torch.device, *flags: str) -> Built:
    """Method `name` as run_pretraining.py builds it: the same weights on every device."""
    args = arguments(name, device, *flags)
    context = set_up(args)
    method = build_method(args).to(context.device)
    if method.teacher is not None:
        method.teacher.to(context.device)
    runner = build_runner(args, method, param_groups(method, args.weight_decay), context.device)
    runner.watch(method, method.teacher)
    method.train()
    method.before_epoch(0, args.epochs)
    return Built(method, runner, context)


@cache
def host_batches(name: str, count: int = 4) -> list[dict[str, Tensor]]:
    """The first batches of the loader, pinned where there is a GPU: images, masks and noise for
    every device."""
    args = arguments(name, torch.device("cpu"))
    set_up(args)
    loader = build_data(args, build_method(args))
    loader.batch_sampler.set_position(0)
    return list(islice(loader, count))


def start(
    name: str, device: torch.device, folder: Path | str, *flags: str
) -> tuple[Training, Position]:
    """What run_pretraining.py's main() does up to the first step."""
    args = arguments(name, device, "--output_dir", str(folder), *flags)
    context = set_up(args)
    method = build_method(args)
    loader = build_data(args, method)
    groups = param_groups(method, args.weight_decay)
    method.to(context.device)
    if method.teacher is not None:
        method.teacher.to(context.device)
    with own_signals():
        run, position = start_training(context, method, loader, groups)
    run.task.train()
    run.task.before_epoch(0, args.epochs)
    return run, position


def updates(run: Training, first: int, last: int) -> Iterator[None]:
    """Do updates first ... last - 1 of epoch 0, one at a time."""
    run.loader.batch_sampler.set_position(0, first)
    for update, batch in zip(range(first, last), run.loader, strict=False):
        train_one_step(run, update, [batch])
        yield


def train_steps(run: Training, first: int, last: int) -> list[float]:
    """The losses of updates first ... last - 1 of epoch 0."""
    losses = []
    for _ in updates(run, first, last):
        losses.append(run.monitor.read().get("loss", math.nan))
    return losses


def weights(run: Training) -> dict[str, Tensor]:
    """The whole float32 weights and buffers, on the CPU."""
    return {
        name: value.detach().cpu().clone() for name, value in run.runner.full_state_dict().items()
    }


def everything(run: Training) -> dict[str, Any]:
    """Copy of weights, teacher and optimizer state."""
    teacher = {} if run.task.teacher is None else run.task.teacher.state_dict()
    state = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in one.items()}
        for one in run.runner.optimizer.state.values()
    ]
    return {
        "weights": weights(run),
        "teacher": {k: v.clone() for k, v in teacher.items()},
        "optimizer": state,
    }


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products and convolutions without TF32 for a while."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


# --------------------------------------------------------------------------------------------------
# What is compared


def norm_of(values: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differences of tensors of the same names; names that only one side has are a ValueError."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one side has {sorted(ours.keys() ^ theirs.keys())[:3]}")
    return {name: ours[name].double() - theirs[name].double() for name in ours}


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


Step = tuple[float, dict[str, Tensor]]  # loss and gradients


def compared(ours: Step, theirs: Step, tolerance: tuple[float, float]) -> dict[str, Any]:
    """The row of two steps: relative difference of the loss, and of all gradients in the 2-norm;
    NaN never passes."""
    differences = apart(ours[1], theirs[1])
    whole = norm_of(theirs[1])
    worst = max(differences, key=lambda name: float(differences[name].norm()))
    row = {
        "loss": relative(ours[0], theirs[0]),
        "gradients": norm_of(differences) / whole,
        "tolerance": tolerance,
        "worst": f"{worst} {float(differences[worst].norm()) / whole:.1e}",
    }
    return row | {"ok": row["loss"] <= tolerance[0] and row["gradients"] <= tolerance[1]}


def trained_alike(
    ours: Training, theirs: Training, steps: int, tolerance: tuple[float, float]
) -> dict[str, Any]:
    """The row of two runs after some steps: their losses, and their weights as a share of how far
    these moved."""
    initial = weights(theirs)
    losses = [train_steps(run, 0, steps) for run in (ours, theirs)]
    return alike(*losses, weights(ours), weights(theirs), initial, tolerance)


def alike(
    losses: list[float],
    other_losses: list[float],
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    initial: dict[str, Tensor],
    tolerance: tuple[float, float],
) -> dict[str, Any]:
    """See `trained_alike`. Running statistics of batch normalization count as weights."""
    kept = [
        name
        for name, value in theirs.items()
        if value.is_floating_point() and not value.equal(initial[name])
    ]
    ours, theirs, initial = (
        {name: side[name] for name in kept} for side in (ours, theirs, initial)
    )
    row = {
        "loss": max(relative(a, b) for a, b in zip(losses, other_losses, strict=True)),
        "weights": norm_of(apart(ours, theirs)) / norm_of(apart(theirs, initial)),
        "tolerance": tolerance,
    }
    return row | {"ok": row["loss"] <= tolerance[0] and row["weights"] <= tolerance[1]}


def against_cpu(name: str, device: torch.device) -> dict[str, Any]:
    """Loss and gradients on the device against the CPU, in fp32."""
    batch = host_batches(name)[0]
    with exact_products():
        ours = build(name, device).gradients(batch)
    return compared(ours, build(name, torch.device("cpu")).gradients(batch), CLOSE["fp32"])


def predicts_visual_tokens(method: PretrainMethod) -> bool:
    return hasattr(method, "tokenizer")


def lower_precision(name: str, device: torch.device, *, precision: str) -> dict[str, Any]:
    """A first step near to the one in fp32, and three more that are finite and applied."""
    batches = host_batches(name)
    with exact_products():
        theirs = build(name, device).gradients(batches[0])
    built = build(name, device, "--precision", precision)
    ours = built.gradients(batches[0])
    skipped = 0
    while not bool(built.runner.step()["applied"]) and skipped < 8:  # a loss scale comes down
        ours = built.gradients(batches[0])
        skipped += 1
    row = compared(
        ours, theirs, WORDS if predicts_visual_tokens(built.method) else CLOSE[precision]
    )
    losses = []
    for batch in batches[1:]:
        losses.append(built.gradients(batch)[0])
        row["ok"] &= bool(built.runner.step()["applied"])
    row["ok"] &= all(map(math.isfinite, losses))
    return row | {"skipped": skipped, "losses": [round(loss, 4) for loss in losses]}


def kernels(name: str, device: torch.device, *, precision: str = "fp32") -> dict[str, Any]:
    """--attn sdpa against eager."""
    steps = []
    with exact_products():
        for kernel in ("sdpa", "eager"):
            built = build(name, device, "--attn", kernel, "--precision", precision)
            steps.append(built.gradients(host_batches(name)[0]))
    return compared(*steps, CLOSE[precision])


def checkpointing(name: str, device: torch.device) -> dict[str, Any]:
    """--grad_checkpointing against keeping everything."""
    with exact_products():
        ours, theirs = (build(name, device, *flags) for flags in (["--grad_checkpointing"], []))
        batch = host_batches(name)[0]
        return compared(ours.gradients(batch), theirs.gradients(batch), (1e-6, 1e-5))


def skips(name: str, device: torch.device, *, precision: str = "fp32") -> dict[str, Any]:
    """Images of NaNs, then an infinite gradient under a finite loss, leave no trace; the next step
    is applied."""
    run, _ = start(name, device, "", "--precision", precision)
    train_steps(run, 0, 2)
    before = everything(run)
    run.loader.batch_sampler.set_position(0, 2)
    batches = list(islice(run.loader, 3))
    spoiled = {
        key: torch.full(value.shape, math.nan) if key in ("image", "image_strong") else value
        for key, value in batches[0].items()
    }
    train_one_step(run, 2, [spoiled])
    run.monitor.read()
    changed = {"by_loss": differing(before, everything(run))}
    trained = next(p for p in run.task.parameters() if p.requires_grad)
    hook = trained.register_hook(lambda grad: grad * math.inf)
    train_one_step(run, 3, [batches[1]])
    run.monitor.read()
    hook.remove()
    changed["by_gradient"] = differing(before, everything(run))
    streak = run.monitor.streak
    train_one_step(run, 4, [batches[2]])
    run.monitor.read()
    moved = differing(before, everything(run)) != [] and run.monitor.streak == 0
    left = {key: places[:3] for key, places in changed.items()}
    return left | {
        "skipped": streak,
        "goes_on": moved,
        "ok": not any(changed.values()) and streak == 2 and moved,
    }


def waits(name: str, device: torch.device, *flags: str, precision: str = "bf16") -> dict[str, Any]:
    """Four training steps under which every wait for the device is an error, up to the one that
    judges the gradients of the first five; then the places of all waits."""
    run, _ = start(name, device, "", "--precision", precision, *flags)
    train_steps(
        run, 0, 2
    )  # the first ones may wait: torch's fused optimizers cannot skip the very first
    pinned = all(v.is_pinned() for v in host_batches(name)[0].values() if isinstance(v, Tensor))
    batches = updates(run, 2, 8)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            next(batches)
    except RuntimeError as error:
        torch.cuda.set_sync_debug_mode("default")
        return {
            "error": f"{error} {our_frames(error.__traceback__)}",
            "all": waiting_places(run),
            "ok": False,
        }
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # in fp16 the first steps may be skipped until the loss scale fits: then there is no loss
    return {"pinned": pinned, "loss": run.monitor.read().get("loss"), "ok": pinned}


def our_frames(found: Any) -> list[str]:
    """file:line function of the repository's own innermost frames."""
    frames = traceback.extract_tb(found) if found is not None else traceback.extract_stack()
    own = [f for f in frames if str(ROOT) in f.filename and "site-packages" not in f.filename]
    own = [f for f in own if f.name not in ("remember", "our_frames")]
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in own[-4:]]


def waiting_places(run: Training) -> list[str]:
    """Where another step waits for the device; of the backward pass only that it does is known."""
    places: list[str] = []

    def remember(message, *_args, **_options) -> None:
        if "synchroniz" in str(message):
            places.append(" < ".join(reversed(our_frames(None))))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = remember
        torch.cuda.set_sync_debug_mode("warn")
        try:
            next(updates(run, 6, 7))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return list(dict.fromkeys(places))


def neighbors(device: torch.device) -> dict[str, Any]:
    """k-NN of random features on the device against the CPU, in percent of the digits."""
    flags = (
        *TINY,
        "--model",
        "vit_tiny_patch16_224",
        "--model_kwargs",
        *SIZE,
        "--knn_k",
        "5",
        "20",
    )
    found = {}
    with exact_products():
        for place in dict.fromkeys(("cpu", device.type)):
            with redirect_stdout(io.StringIO()):
                found[place] = evaluate_features(parse_knn([*flags, "--device", place]))
    pairs = list(zip(found["cpu"], found[device.type], strict=True))
    largest = max(abs(a.acc1 - b.acc1) for a, b in pairs)
    return {
        "top1": [round(b.acc1, 2) for _, b in pairs],
        "apart": largest,
        "tolerance": 0.6,
        "ok": largest <= 0.6,
    }


def decoding(device: torch.device) -> dict[str, Any]:
    """Views of `--decode gpu` against those of `--decode cpu`: mean and largest difference in gray
    levels; crops, masks and what else a batch has must be equal."""
    masks = build_mask_generator("block", input_size=224, patch_size=16, mask_ratio=0.5)
    transform = build_pretrain_transform(
        ("image", "image_strong", "image_second", "mask"),
        input_size=224,
        mask_generator=masks,
        second_size=(112, 112),
    )
    keys = [[(0, index) for index in range(16)]]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_stand_in(Path(folder))
        source = map_source(Path(folder), "train")
        for dataset_class in (UndecodedImages, ImageDataset):
            images = dataset_class(source, transform, seed=0)
            try:
                decode = batch_decoder(images, device)
            except ValueError as error:  # no nvJPEG here
                return {"skipped": str(error)}
            loader = build_loader(images, keys, num_workers=0, pin_mem=False)
            found.append(decode(next(iter(loader))))
    ours, theirs = found
    result: dict[str, Any] = {"equal_masks": torch.equal(ours["mask"], theirs["mask"])}
    for view in DECODED_ALIKE:
        levels = (ours[view].cpu().int() - theirs[view].int()).abs()
        result[f"{view}_mean"] = float(levels.float().mean())
        result[f"{view}_max"] = int(levels.max())
    alike = all(result[f"{view}_mean"] < most for view, most in DECODED_ALIKE.items())
    return result | {"ok": alike and result["equal_masks"]}


def probing(device: torch.device) -> dict[str, Any]:
    """Two epochs of linear probing on the device against the CPU."""
    flags = (
        *TINY,
        "--model",
        "vit_tiny_patch16_224",
        "--model_kwargs",
        *SIZE,
        "--no_aug",
        "--epochs",
        "2",
    )
    flags = (
        *flags,
        "--batch_size",
        "64",
        "--lr",
        "0.1",
        "--warmup_epochs",
        "0",
        "--precision",
        "fp32",
    )
    last = {}
    with exact_products():
        for place in dict.fromkeys(("cpu", device.type)):
            with own_signals(), redirect_stdout(io.StringIO()):
                last[place] = run_probe(parse_linear([*flags, "--device", place]), train)[-1]
    ours, theirs = last[device.type], last["cpu"]
    row = {
        "loss": relative(ours.loss, theirs.loss),
        "acc1": ours.acc1,
        "apart": abs(ours.acc1 - theirs.acc1),
    }
    return row | {"tolerance": (1e-3, 0.6), "ok": row["loss"] <= 1e-3 and row["apart"] <= 0.6}


# --------------------------------------------------------------------------------------------------
# Groups: in a process of their own


def engine_checks(checks: Checks) -> None:
    """DeepSpeed against plain torch on one device, and batch normalization over a group of one."""
    device = checks.device
    folder = checks.output
    names = FEW if checks.tiny else (*FEW, "a2mim_resnet", "semaim")
    for name in names:
        for stage in (0, 1, 2, 3):
            attempt(
                checks,
                f"ZeRO {stage} against plain",
                name,
                partial(zero, name, device, folder, stage),
            )
    checks.attempt("SyncBN in a group of one", partial(sync_bn_of_one, device, folder))


def zero(
    name: str,
    device: torch.device,
    folder: Path,
    stage: int,
    *,
    precision: str = "fp32",
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Four steps by DeepSpeed against four by plain torch in the same precision, with flags `more`
    for DeepSpeed."""
    flags = ("--enable_deepspeed", "--zero_stage", str(stage), *more)
    tolerance = ENGINES_ALIKE[precision]
    common = (*STEADY, "--precision", precision)
    with exact_products():
        theirs, _ = start(name, device, folder / "plain", *common)
        take_scale(theirs)
        ours, _ = start(name, device, folder / f"zero{stage}", *common, *flags)
        return trained_alike(ours, theirs, 4, tolerance)


def take_scale(run: Training, scale: float = 2.0**7) -> None:
    """Give a plain run in fp16 the loss scale that DeepSpeed begins with, at which no step is
    skipped."""
    if run.runner.scaler.is_enabled():
        run.runner.scaler = torch.amp.GradScaler(run.context.device.type, init_scale=scale)


def refused_fp16(name: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """DeepSpeed in fp16 without sharding is refused in one sentence."""
    flags = ("--enable_deepspeed", "--zero_stage", "0", "--precision", "fp16")
    try:
        start(name, device, folder / "refused", *flags)
    except ValueError as error:
        return {"error": str(error), "ok": "--zero_stage 1" in str(error)}
    return {"ok": False}


def precision_checks(checks: Checks) -> None:
    """DeepSpeed in lower precision against plain torch in the same, and the optimizer on the
    host."""
    device = checks.device
    folder = checks.output
    on_gpu = device.type == "cuda"
    lower = (("bf16", (0, 2, 3)), ("fp16", (1, 2, 3))) if on_gpu else (("bf16", (2,)),)
    for name in FEW:
        for precision, stages in lower:
            for stage in stages:
                check = f"DeepSpeed {precision}, ZeRO {stage}, against plain"
                run = partial(zero, name, device, folder, stage, precision=precision)
                attempt(checks, check, name, run)
        more = ("--offload", "optimizer")
        for precision, stage in (("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 2))[
            : 4 if on_gpu else 1
        ]:
            check = f"optimizer on the host, {precision}, ZeRO {stage}, against plain"
            run = partial(zero, name, device, folder, stage, precision=precision, more=more)
            attempt(checks, check, name, run)
    if on_gpu:
        check = "DeepSpeed fp16, ZeRO 0, is refused"
        attempt(checks, check, "mae", partial(refused_fp16, "mae", device, folder))


def optimizer_checks(checks: Checks) -> None:
    """Optimizers without AdamW's fused form, a skipped first step, and averages on the host."""
    device = checks.device
    for optimizer in ("lamb", "lars", "sgd") if device.type == "cuda" else ():
        for name in FEW:
            run = partial(waits, name, device, "--opt", optimizer)
            attempt(checks, f"no wait in a step, {optimizer}", name, run)
    for optimizer in ("sgd", "adamw", "lamb"):
        precision = "fp16" if device.type == "cuda" else "bf16"
        for name in FEW:
            run = partial(first_step_skipped, name, device, optimizer, precision)
            attempt(checks, f"first step skipped, {optimizer}, {precision}", name, run)
    checks.attempt("average on the host", partial(average_on_host, device), seconds=MARGIN)


def first_step_skipped(
    name: str, device: torch.device, optimizer: str, precision: str
) -> dict[str, Any]:
    """A run whose first step is skipped against one that begins with the second."""
    flags = (*STEADY, "--precision", precision, "--opt", optimizer)
    with exact_products():
        ours, _ = start(name, device, "", *flags)
        theirs, _ = start(name, device, "", *flags)
        for run in (ours, theirs):
            take_scale(run)
        initial = weights(ours)
        ours.loader.batch_sampler.set_position(0, 0)
        first = next(iter(ours.loader))
        for key in {"image", "image_strong"} & first.keys():
            first[key] = torch.full(first[key].shape, math.nan)
        train_one_step(ours, 0, [first])
        ours.monitor.read()
        untouched = differing(initial, weights(ours)) == []
        skipped = ours.monitor.streak == 1
        losses = [train_steps(run, 1, 4) for run in (ours, theirs)]
        row = alike(*losses, weights(ours), weights(theirs), initial, (1e-2, 0.05))
    finite = all(map(math.isfinite, losses[0]))
    row |= {"untouched": untouched, "skipped": skipped, "finite": finite}
    return row | {"ok": row["ok"] and untouched and skipped and finite}


def average_on_host(device: torch.device) -> dict[str, Any]:
    """Fine-tuning with --model_ema_force_cpu against an average on the device."""
    averages = []
    for flags in ((), ("--model_ema_force_cpu",)):
        args = tiny_arguments(
            "finetune", "", "--device", device.type, "--precision", "fp32", "--model_ema",
            "--model_ema_decay", "0.9", "--drop_path", "0", "--matmul_precision", "highest", *flags,
        )  # fmt: skip
        run = start_finetuning(args)
        places = {p.device.type for p in run.task.ema.module.parameters()}
        initial = on_host(run.task.ema.module)
        losses = train_steps(run, 0, 3)
        averages.append((losses, on_host(run.task.ema.module), places))
    (theirs_losses, theirs, _), (losses, ours, places) = averages
    row = alike(losses, theirs_losses, ours, theirs, initial, (1e-5, 1e-4))
    return row | {"places": sorted(places), "ok": row["ok"] and places == {"cpu"}}


def on_host(network: nn.Module) -> dict[str, Tensor]:
    """Copy of a network's weights and buffers on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def start_finetuning(args: Namespace) -> Training:
    """What run_class_finetuning.py's main() does up to the first step."""
    args.nb_classes = 10
    context = set_up(args)
    model = build_classifier(args).to(context.device)
    transform = build_finetune_transform(args, train=not args.no_aug)
    dataset = build_dataset(args, train=True, transform=transform, need_labels=True)
    loader = train_loader(args, dataset)
    task = Classification(model, args, context.device)
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    with own_signals():
        run, _ = start_training(context, task, loader, groups)
    run.task.train()
    return run


def sync_bn_of_one(device: torch.device, folder: Path) -> dict[str, Any]:
    """Batch normalization by sums over a group with one member, and torch's, against plain: results
    and gradients."""
    device = init_distributed(
        arguments("mae", device, "--enable_deepspeed", "--output_dir", str(folder))
    )
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).to(device)
    x = torch.randn(16, 8, 5, 5).to(device).requires_grad_()
    steps = []
    forwards = [norm, partial(synchronized_batch_norm, norm)]
    if device.type != "cpu":  # where torch has none
        forwards.append(nn.SyncBatchNorm.convert_sync_batchnorm(norm))
    for forward in forwards:
        y = forward(x)
        loss = y.square().mul(torch.linspace(0, 1, y.numel(), device=device).view_as(y)).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        steps.append((float(loss.detach()), {"x": gradient.cpu()}))
    rows = [compared(step, steps[0], (1e-5, 1e-4)) for step in steps[1:]]
    return max(rows, key=lambda row: row["gradients"]) | {"ok": all(row["ok"] for row in rows)}


def resume_checks(checks: Checks) -> None:
    """Three steps, a checkpoint and three more, against three from the checkpoint."""
    for exact in (True,) if checks.tiny else (True, False):
        names = METHODS if exact and not checks.tiny else ("conmim", "mae", "a2mim_resnet")
        for name in names:
            folder = checks.output / f"{name}-{exact}"
            how = "deterministic kernels" if exact else "default kernels"
            attempt(
                checks,
                f"resume, {how}",
                name,
                partial(resume, name, checks.device, folder, exact=exact),
            )


def resume(name: str, device: torch.device, folder: Path, *, exact: bool) -> dict[str, Any]:
    """Weights, teacher, optimizer and losses to the last bit, which without deterministic kernels
    is not promised.

    torch refuses an operation that has no such kernel; it is then named, and runs as it is.
    """
    refused = ""
    warned: list[str] = []
    try:
        places = differences_after_resume(name, device, folder / "strict", deterministic=exact)
    except RuntimeError as error:
        if "determinis" not in str(error):
            raise
        refused = str(error)[:200]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            places = differences_after_resume(
                name, device, folder / "warned", deterministic=True, warn_only=True
            )
        warned = sorted({str(w.message)[:80] for w in caught if "determinis" in str(w.message)})
    row = {"exact": places == [], "differing": len(places), "where": places[:3]}
    promised = exact and not refused
    return row | {
        "no_such_kernel": refused,
        "warned": warned,
        "ok": not places if promised or not places else None,
    }


def differences_after_resume(
    name: str, device: torch.device, folder: Path, *, deterministic: bool, warn_only: bool = False
) -> list[str]:
    """Where steps 3 to 5 of a resumed run end otherwise than those of the run itself."""
    flags = ("--precision", "bf16")
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    try:
        run, position = start(name, device, folder, *flags)
        train_steps(run, 0, 3)
        position.step = 3
        run.session.save(position, finished=False)
        losses = train_steps(run, 3, 6)
        resumed, there = start(name, device, folder, *flags)
        assert there.step == 3, there
        again = train_steps(resumed, 3, 6)
    finally:
        torch.use_deterministic_algorithms(False)
    return differing(
        {**everything(run), "losses": losses}, {**everything(resumed), "losses": again}
    )


def compile_checks(checks: Checks) -> None:
    """--compile against eager; the same block's code is compiled anew for each method."""
    asked = checks.models or TRANSFORMERS
    for name in (name for name in asked if name in TRANSFORMERS):
        run = partial(compiled, name, checks.device)
        attempt(checks, "--compile against eager, fp32", name, run, seconds=5.0)
    for name in (name for name in FEW if not checks.models or f"{name}-bf16" in checks.models):
        run = partial(compiled, name, checks.device, precision="bf16")
        attempt(checks, "--compile against eager, bf16", name, run, seconds=5.0)


def compiled(name: str, device: torch.device, *, precision: str = "fp32") -> dict[str, Any]:
    """Loss and gradients of compiled blocks."""
    torch._dynamo.reset()  # otherwise the methods use up each other's recompilations
    torch._dynamo.utils.counters.clear()
    batch = host_batches(name)[0]
    flags = ("--precision", precision)
    with exact_products():
        theirs = build(name, device, *flags).gradients(batch)
        built = build(name, device, *flags)
        method = built.method
        compile_blocks(method, method.teacher, method.frozen)
        row = compared(built.gradients(batch), theirs, CLOSE[precision])
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return row | {"graphs": graphs, "ok": row["ok"] and graphs > 0}


def rank_checks(checks: Checks) -> None:
    """Two ranks against one process: with nccl where there are two GPUs, else with gloo on one
    device."""
    for name in ("mae", "a2mim_resnet"):  # the latter with batch normalization over both
        attempt(
            checks,
            "two ranks against one process",
            name,
            partial(two_ranks, name, checks.device, checks.output),
        )


def two_ranks(name: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Three steps by DDP, each rank with half of the batch, against the whole batch in one
    process."""
    import torch.multiprocessing as mp

    places = torch.cuda.device_count() if device.type == "cuda" else 0
    backend = "nccl" if places > 1 else "gloo"
    path = folder / f"{name}.pt"
    mp.start_processes(
        one_rank, (name, device, path, backend, free_port()), nprocs=2, start_method="spawn"
    )
    losses, trained = torch.load(path)
    with exact_products():
        run, _ = start(name, device, "", *STEADY, "--batch_size", "8")
        initial = weights(run)
        alone = train_steps(run, 0, 3)
    return alike(losses, alone, trained, weights(run), initial, (1e-4, MOVED)) | {
        "backend": backend
    }


def one_rank(
    rank: int, name: str, device: torch.device, path: Path, backend: str, port: int
) -> None:
    """Train as one of two; the first writes losses and weights to `path`."""
    local = rank if backend == "nccl" else 0
    place = {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(local)
    torch.distributed.init_process_group(backend, rank=rank, world_size=2)
    with exact_products():
        run, _ = start(name, device, "", *STEADY, "--batch_size", "4")
        losses = train_steps(run, 0, 3)
    if rank == 0:
        torch.save((losses, weights(run)), path)
    barrier()
    leave_process_group()


def case_checks(checks: Checks) -> None:
    """The reference cases with everything on the device, ten times their tolerance.

    Some adapters make tensors on the CPU on purpose or pass through numpy: these cases cannot run
    there, which is no failure.
    """
    import test_reference_cases as cases

    def smallest_first(folder: Path) -> int:
        return (folder / "tensors.safetensors").stat().st_size

    for folder in sorted(cases.FOLDERS, key=smallest_first):
        name = f"{folder.parent.name}/{folder.name}"
        checks.attempt(
            f"reference case {name}",
            partial(reference_case, cases, folder, checks.device),
            seconds=1.0,
        )


def reference_case(cases: Any, folder: Path, device: torch.device) -> dict[str, Any]:
    """The largest difference of a case's outputs as a share of what is allowed."""
    case = cases.load(folder)
    on_device = cases.Case(
        case.spec, {name: value.to(device) for name, value in case.tensors.items()}
    )
    row: dict[str, Any] = {"comparison": "reference case", "ok": None}
    try:
        with exact_products(), torch.device(device):
            computed = cases.ADAPTERS[folder.parent.name](on_device)
            names = case.inputs("outputs/")
            computed = {
                name: torch.as_tensor(computed[name]).detach().cpu().double() for name in names
            }
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        misplaced = any(word in str(error) for word in ("device", "cuda", "CPU", "numpy"))
        if device.type == "cpu" or not misplaced or "CUDA error" in str(error):
            raise
        return row | {"cannot": f"{type(error).__name__}: {error}"[:200]}
    largest = 0.0
    worst = ""
    for name, expected in case.inputs("outputs/").items():
        allowed = case.spec["outputs"][name]
        difference = (computed[name] - expected.double()).abs()
        limit = 10 * (allowed["atol"] + allowed["rtol"] * expected.double().abs()).clamp(min=1e-7)
        share = torch.where(difference == 0, 0.0, difference / limit).nan_to_num(nan=math.inf)
        if share.numel() and float(share.max()) > largest:
            largest = float(share.max())
            worst = name
    return row | {"share": largest, "worst": worst, "ok": largest <= 1}


@dataclass
class Group:
    """Groups that run in one process, and where their results and words go."""

    name: str
    process: subprocess.Popen
    folder: Path

    def stop(self) -> None:
        """End it with its own children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def report(self, checks: Checks) -> None:
        """Record what the group recorded, and whether it ended badly."""
        results = self.folder / "results.jsonl"
        lines = results.read_text().splitlines() if results.exists() else []
        for line in lines:
            if line.endswith("}"):  # the last one may be cut
                row = json.loads(line)
                checks.record(
                    row.pop("check"),
                    ok=row.pop("ok"),
                    **{k: v for k, v in row.items() if k != "section"},
                )
        code = self.process.returncode
        if code == -signal.SIGKILL:
            checks.record(f"group {self.name}", skipped="no time left", results=len(lines))
        elif code != 0:
            words = (self.folder / "output.txt").read_text()[-3000:]
            checks.record(f"group {self.name}", ok=False, error=f"ended with {code}", details=words)


def start_group(names: Sequence[str], checks: Checks) -> Group:
    """Begin groups in one process of their own, with what deterministic products ask of the
    environment."""
    folder = checks.output / "right" / names[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").unlink(missing_ok=True)
    seconds = checks.time_left() - MARGIN - 1
    command = [
        sys.executable,
        str(Path(__file__)),
        *names,
        "--output",
        str(folder),
        "--seconds",
        f"{seconds:.0f}",
    ]
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            [*command, "--device", str(checks.device)], cwd=ROOT, env=environment, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Group(" ".join(names), process, folder)


def attempt(
    checks: Checks,
    comparison: str,
    name: str,
    run: Callable[[], dict[str, Any]],
    *,
    seconds: float = 0.5,
) -> None:
    """Check one method in one comparison."""
    about = {"comparison": comparison, "method": name}
    checks.attempt(f"{comparison}: {name}", lambda: about | run(), seconds=MARGIN + seconds)


# --------------------------------------------------------------------------------------------------


def comparisons(checks: Checks, methods: Sequence[str]) -> None:
    """Compare devices, precisions and kernels: the most valuable first, each for every method."""
    device = checks.device
    on_gpu = device.type == "cuda"
    for name in methods if on_gpu else ():
        attempt(checks, "device against CPU, fp32", name, partial(against_cpu, name, device))
    for name in methods if on_gpu else ():
        attempt(checks, "no wait in a step, bf16", name, partial(waits, name, device))
    for name in methods[:1] if on_gpu else ():  # an optimizer without a fused form
        check = partial(waits, name, device, "--opt", "lamb")
        attempt(checks, "no wait in a step, bf16", f"{name}, lamb", check)
    for precision in ("bf16", "fp16") if on_gpu else ("bf16",):
        for name in methods:
            run = partial(lower_precision, name, device, precision=precision)
            attempt(checks, f"{precision} against fp32", name, run)
    for name in methods:
        attempt(checks, "skip of a non-finite step, fp32", name, partial(skips, name, device))
    for precision in ("fp32", "bf16") if on_gpu else ("fp32",):
        for name in (name for name in methods if name in TRANSFORMERS):
            run = partial(kernels, name, device, precision=precision)
            attempt(checks, f"sdpa against eager, {precision}", name, run)
    for name in methods:
        attempt(checks, "grad checkpointing", name, partial(checkpointing, name, device))
    for name in methods if on_gpu else ():
        attempt(
            checks, "no wait in a step, fp16", name, partial(waits, name, device, precision="fp16")
        )


def frozen_features(checks: Checks) -> None:
    """Compare decoded JPEGs, k-NN and linear probing on the device with the CPU's."""
    device = checks.device
    checks.attempt("--decode gpu against cpu", partial(decoding, device), seconds=MARGIN + 4)
    checks.attempt("k-NN on the device against CPU", partial(neighbors, device), seconds=MARGIN + 2)
    checks.attempt(
        "linear probing on the device against CPU", partial(probing, device), seconds=MARGIN + 2
    )


def cnn_checks(checks: Checks) -> None:
    """Compare the one method without attention, whose kernels are other libraries'."""
    comparisons(checks, [name for name in METHODS if name not in TRANSFORMERS])


GROUPS: dict[str, Callable[[Checks], None]] = {
    "engines": engine_checks,
    "precisions": precision_checks,
    "optimizers": optimizer_checks,
    "resume": resume_checks,
    "ranks": rank_checks,
    "compile": compile_checks,
    "cases": case_checks,
    "cnn": cnn_checks,
}
# On a CPU, in one process: stage 3 changes torch's functions for the rest of it, and comes last.
ON_CPU = ("optimizers", "resume", "cnn", "precisions", "engines")


def run(checks: Checks) -> None:
    """Run the section."""
    processes = [ON_CPU] if checks.tiny else [(name,) for name in GROUPS]
    groups: list[Group] = []
    try:
        for names in processes:
            groups.append(start_group(names, checks))
        comparisons(checks, TRANSFORMERS)
        frozen_features(checks)
        while any(group.process.poll() is None for group in groups) and checks.time_left() > MARGIN:
            time.sleep(0.2)
    finally:
        for group in groups:
            group.stop()
            group.report(checks)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Runs groups of the section `right`.")
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--output", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="what it may take")
    parser.add_argument(
        "--models", nargs="+", default=[], help="methods of `compile`, mae-bf16 for bf16; or all"
    )
    args = parser.parse_args(argv)
    faulthandler.enable()
    deadline = time.monotonic() + args.seconds
    checks = Checks(
        args.device, args.output, deadline, tiny=args.device.type == "cpu", section="right",
        models=tuple(args.models),
    )  # fmt: skip
    for name in args.groups:
        GROUPS[name](checks)
    leave_process_group()


if __name__ == "__main__":
    main()
