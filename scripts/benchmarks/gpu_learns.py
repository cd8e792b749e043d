"""The section `learns` of gpu_check.py: pre-trains every method on small images that lie on the
device.

    python scripts/benchmarks/gpu_learns.py --data_path DATA --output out/learns --seconds 330

The models, flags and evaluations are those of compare_methods.py, with whose rows these compare;
the batches come from unimim/data/device_loader.py. Several processes share the device, each with
one method at a time; forward and backward of a step are replayed as one CUDA graph, because steps
this short are bound by what launches their kernels. Every method gets the same epochs, seed after
seed, and with the time that is left over a longer budget. Every finished run is a line of
results.jsonl and a row of OUTPUT/learns.csv at once; what has not ended at the deadline is named.
"""

import argparse
import contextlib
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

BEGIN = time.monotonic()  # imports take seconds too

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine_for_finetuning import Classification
from modeling_pretrain import PretrainMethod
from optim_factory import create_optimizer, param_groups, set_schedule
from scripts.experiments.compare_methods import (
    COMMON,
    DATA,
    FINETUNE,
    LINEAR,
    METHODS,
    PROBE,
    Result,
    table,
)
from scripts.gpu_check import Checks
from unimim.checkpoint import files
from unimim.checkpoint.loading import load_pretrained
from unimim.cli.models import build_classifier, build_method
from unimim.cli.options import parse, resolve_lr
from unimim.data.device_loader import (
    DeviceLoader,
    color_place_parts,
    decoded,
    resample,
)
from unimim.data.pretraining import mask_generator
from unimim.data.sources import build_source, first_of_each_class
from unimim.data.views import image_mean_std
from unimim.engine.distributed import seed_step
from unimim.engine.runner import AUTOCAST_DTYPES, TorchRunner
from unimim.engine.setup import schedules
from unimim.engine.state import Normalize
from unimim.evaluation.accuracy import averages, tally
from unimim.evaluation.features import Features, build_backbone
from unimim.evaluation.flags import parse_knn, parse_linear
from unimim.evaluation.knn import evaluate_knn
from unimim.evaluation.linear_probe import Probe, head_groups, side_by_side
from unimim.files import write_rows, write_text
from unimim.logs import setup_logging
from unimim.parts.flags import build_learner, parse_parts
from unimim.parts.learning import PartLearning, hard_maps, load_teacher
from unimim.tokenizer.clusters import PatchClusters, kmeans_tokens

# the least proven first, but for MAE, on whose features SemMAE's parts are learned
PRETRAINED = (
    "maskfeat", "semanticmim_maskfeat", "conmim", "beit", "semanticmim_beit", "semaim", "mae",
    "saim", "igpt", "a2mim_vit", "a2mim_resnet18", "simmim_vit", "simmim_resnet18", "semmae",
    "semaim_raster", "pixio", "nepa",
)  # fmt: skip
RANDOM = (
    "random", "random_beit", "random_semanticmim_beit", "random_mim_vit", "random_resnet18",
    "random_pixio", "random_nepa",
)  # fmt: skip
NOTES = {
    "semmae": "parts: learned on the features of this seed's MAE",
    "semmae_kmeans": "parts: k-means of each image's colors and places",
    "semmae_random": "parts: drawn at random",
    "beit": "visual tokens: k-means of patches",
    "semanticmim_beit": "visual tokens: k-means of patches",
}
SIZE = (32, 32)
PART_GRID = (16, 16)
PARTS, WORDS = 7, 512
SHAPES = DATA["cifar10"]  # the lengths and sizes of 32-pixel images
EPOCHS, LONG_EPOCHS = 7, 30
WARMUP_SHARE = 0.1
PADDING = 4  # of fine-tuning's crops, in pixels
SEEDS = (0, 1, 2)
PROCESSES = 17  # at most; as many as methods, so that none waits for another
EAGER_STEPS = 8  # before a step is recorded: the check of gradients, lazy kernels, plans of cuFFT
LOSS_TOLERANCE, NORM_TOLERANCE = 0.005, 0.03  # of a replayed step against the same one launched
LONG_MARGIN, SHORTEST_STEP = 1.2, 0.006  # of what a long run is expected to take
STATISTICS_BATCHES = 50  # from which the features' mean and standard deviation are taken
RESERVE_SECONDS = 4.0  # for what is written at the end


@dataclass(frozen=True)
class Setting:
    """What every process needs to know; `images_file` holds the decoded images and labels."""

    device: str
    precision: str
    source_flags: str
    images_file: Path
    batch_size: int = 256
    pretrain_images: int | None = None  # None: all
    linear_epochs: int = 30
    finetune_epochs: int = 5
    part_epochs: int = 3


@dataclass(frozen=True)
class Job:
    """A method that is pre-trained for `epochs` with a seed, and evaluated.

    graphs: replay steps as a CUDA graph, where the device has them.
    """

    key: str
    seed: int
    epochs: int
    graphs: bool = True


@dataclass(frozen=True)
class Row(Result):
    """A row of learns.csv: that of compare_methods.py, and how it was made.

    lr: the peak; first_loss: the mean of the first epoch.
    """

    epochs: int
    steps: int
    lr: float
    first_loss: float
    step_ms: float
    evaluation_s: float
    seconds: float
    note: str


# --------------------------------------------------------------------------------------------------
# Data


def prepare(checks: Checks, folder: Path) -> Setting:
    """Decode both splits and write them where every process can read them."""
    path, device = checks.data_path, checks.device
    source_flags = f"--input_size {SIZE[0]} {COMMON} --device {device.type} "
    source_flags += (
        "--data_set digits"
        if path is None
        else f"--data_set IMNET --data_path {shlex.quote(str(path))}"
    )
    tensors = {}
    for split in ("train", "val"):
        kind, root = ("digits", None) if path is None else ("IMNET", str(path))
        source = build_source(kind, root, train=split == "train", need_labels=True)
        tensors[split] = decoded(source, SIZE, threads=len(os.sched_getaffinity(0)))
        tensors[f"{split}_labels"] = torch.as_tensor(source.labels, dtype=torch.int64)
    precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    file = folder / "images.pth"
    if checks.tiny:  # enough of each class for the evaluations to run
        tensors = {
            name: value[: 64 if name.startswith("train") else 32] for name, value in tensors.items()
        }
        torch.save(tensors, file)
        return Setting(
            str(device), precision, source_flags, file, 8, 8,
            linear_epochs=2, finetune_epochs=2, part_epochs=1,
        )  # fmt: skip
    torch.save(tensors, file)
    return Setting(str(device), precision, source_flags, file)


class Images:
    """The images of both splits on the device, and what is made of them once: part maps and visual
    tokens."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.device = torch.device(setting.device)
        self.tensors = {
            name: value.to(self.device) for name, value in torch.load(setting.images_file).items()
        }
        self.classes = int(self.tensors["train_labels"].max()) + 1
        self.pretrain = self.tensors["train"][: setting.pretrain_images]
        self.made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def part_maps(self, kind: str, job: Job, num_parts: int, grid: tuple[int, int]) -> Tensor:
        """Return the part of each place of the images to pre-train on, uint8 [N, rows,
        columns]."""
        seed = job.seed
        if kind == "learned":
            return self.once((kind, seed, job.epochs), lambda: learned_parts(self, job))
        if kind == "kmeans":
            return self.once(kind, lambda: color_place_parts(self.pretrain, PART_GRID, num_parts))
        generator = torch.Generator().manual_seed(seed)
        shape = len(self.pretrain), *grid
        draw = partial(torch.randint, num_parts, shape, generator=generator, dtype=torch.uint8)
        return self.once((kind, seed), lambda: draw().to(self.device))

    def words(self, patch: tuple[int, int], mean_std) -> PatchClusters:
        """The same tokenizer for all seeds."""
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in mean_std)
        images = self.tensors["train"][:10_000].float().div(255).sub(mean).div(std)
        return self.once("words", lambda: kmeans_tokens(images, patch, WORDS, seed=0))


# --------------------------------------------------------------------------------------------------
# Pre-training


def flags_of(text: str) -> list[str]:
    """A method's flags with the sizes of 32-pixel images."""
    return text.format(patch=SHAPES.patch, cell=SHAPES.cell).split()


def pretrain_args(setting: Setting, job: Job, steps_per_epoch: int) -> Namespace:
    """The flags that run_pretraining.py would be given."""
    steps = job.epochs * steps_per_epoch
    common = (
        f"{setting.source_flags} {SHAPES.pretrain} --epochs {job.epochs} "
        f"--warmup_steps {round(WARMUP_SHARE * steps)} "
        f"--warmup_epochs 0 --precision {setting.precision} --seed {job.seed}"
    )
    own = [*flags_of(METHODS[job.key].pretrain), "--batch_size", str(setting.batch_size)]
    args = parse("pretrain", [*shlex.split(common), *own])
    resolve_lr(args)
    return args


class Pretraining:
    """A method, its batches and its optimizer; `step()` is the next optimizer step, as that of the
    training loop."""

    def __init__(self, setting: Setting, images: Images, job: Job):
        steps_per_epoch = len(images.pretrain) // setting.batch_size
        self.args = pretrain_args(setting, job, steps_per_epoch)
        self.device = images.device
        self.method = build_method(self.args).to(self.device)
        if self.method.teacher is not None:
            self.method.teacher.to(self.device)
        self.loader = self.build_loader(images, job)
        groups = param_groups(self.method, self.args.weight_decay)
        optimizer = create_optimizer(self.args, groups, self.device)
        self.runner = TorchRunner(
            self.method, optimizer, device=self.device, precision=setting.precision, update_freq=1,
            clip_grad=self.args.clip_grad,
        )  # fmt: skip
        self.runner.watch(self.method, self.method.teacher)
        self.lr, self.weight_decay = schedules(self.args, steps_per_epoch)
        self.steps, self.done = job.epochs * steps_per_epoch, 0
        self.take = Steps(self.runner, graphs=can_record(setting, job))
        self.method.train()

    def build_loader(self, images: Images, job: Job) -> DeviceLoader:
        method, args, parts = self.method, self.args, METHODS[job.key].parts
        mean_std = image_mean_std(args)
        grid = tuple(
            side // cell for side, cell in zip(method.image_size, method.cell_size, strict=True)
        )
        masks = {view: mask_generator(args, method, view) for view in ("mask", "target_mask")}
        return DeviceLoader(
            images.pretrain,
            method.views,
            batch_size=args.batch_size,
            size=method.image_size,
            grid=grid,
            seed=args.seed,
            mean_std=mean_std,
            interpolation=args.train_interpolation,
            crop_scale=tuple(args.crop_scale),
            color_jitter=args.color_jitter,
            noise_size=method.noise_size,
            masks={view: make for view, make in masks.items() if make is not None},
            part_maps=images.part_maps(parts, job, method.num_parts, grid) if parts else None,
            words=images.words(method.cell_size, mean_std)
            if "target_ids" in method.views
            else None,
        )

    def step(self) -> Tensor:
        """Take one optimizer step and return its loss, on the device."""
        step, method = self.done, self.method
        if step % self.loader.steps_per_epoch == 0:
            method.before_epoch(step // self.loader.steps_per_epoch, self.args.epochs)
            if type(method).before_epoch is not PretrainMethod.before_epoch:
                self.take.forget()  # what it sets is a constant of the recorded kernels
        set_schedule(self.runner.optimizer, self.lr[step], self.weight_decay[step])
        loss = self.take(self.loader.batch(step), self.args.seed, step)
        applied = self.runner.step()["applied"]
        method.after_step(
            step / self.steps, float(applied) if applied.device.type == "cpu" else applied
        )
        self.done += 1
        return loss

    def run(self) -> tuple[float, float]:
        """Train to the end and return the mean losses of the first and the last epoch."""
        with own_stream(self.device):
            losses = torch.stack([self.step() for _ in range(self.steps)])
        length = self.loader.steps_per_epoch
        synchronize(self.device)
        return float(losses[:length].mean()), float(losses[-length:].mean())


class Steps:
    """Forward and backward of a runner's steps, on CUDA replayed as one graph after the first."""

    def __init__(self, runner: TorchRunner, *, graphs: bool):
        self.runner, self.graphs = runner, graphs
        self.taken, self.checked = 0, False
        self.recorded: RecordedStep | None = None

    def forget(self) -> None:
        """Make the next step be recorded again."""
        self.recorded = None

    def __call__(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Leave the gradients of a batch in the parameters and return its loss."""
        seed_step(seed, 0, step)
        if self.graphs and self.recorded is None and self.taken >= EAGER_STEPS:
            self.recorded = RecordedStep(self.runner, batch)
            if not self.checked:
                self.check(batch, seed, step)
                self.checked = True
            seed_step(seed, 0, step)
        self.taken += 1
        return (self.recorded or self.launched)(batch)

    def launched(self, batch: dict[str, Any]) -> Tensor:
        """Do so kernel by kernel."""
        return self.runner.micro_step(batch, last=True)["loss"].detach()

    def check(self, batch: dict[str, Any], seed: int, step: int) -> None:
        """Compare a replayed step with the same one launched kernel by kernel.

        Raises:
            RuntimeError: they differ by more than rounding.
        """
        found = []
        for run in (self.launched, self.recorded):
            seed_step(seed, 0, step)
            self.runner.statistics.keep()
            loss = run(batch)
            gradients = [p.grad for p in self.runner.parameters if p.grad is not None]
            found.append((float(loss), float(torch.nn.utils.get_total_norm(gradients))))
            del loss, gradients
            self.runner.optimizer.zero_grad(set_to_none=True)
            self.runner.statistics.put_back_unless(torch.zeros((), device=self.runner.device))
            self.runner.statistics.kept = []
        (loss, norm), (replayed_loss, replayed_norm) = found
        same = abs(replayed_loss - loss) <= LOSS_TOLERANCE * abs(loss)
        if not (same and abs(replayed_norm - norm) <= NORM_TOLERANCE * norm):
            raise RuntimeError(
                f"a replayed step has loss {replayed_loss} and gradient norm {replayed_norm}, "
                f"the launched one {loss} and {norm}"
            )


def can_record(setting: Setting, job: Job) -> bool:
    """Whether the steps of a job are replayed."""
    return job.graphs and torch.device(setting.device).type == "cuda"


class RecordedStep:
    """Forward and backward of a runner's step, recorded once and replayed with other batches.

    What the host decides in a step is part of the record: record again when that changes.
    """

    def __init__(
        self,
        runner: TorchRunner,
        batch: dict[str, Any],
    ):
        self.runner = runner
        # zeros: what a recording reads of its inputs on the host is an error, not a constant
        self.inputs = {
            name: torch.zeros_like(value) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        runner.optimizer.zero_grad(set_to_none=True)
        runner.statistics.keep()  # here, so that it is not recorded
        self.replay = cuda_graph(self._run)
        self.gradients = [(p, p.grad) for p in runner.parameters if p.grad is not None]
        runner.optimizer.zero_grad(set_to_none=True)
        runner.statistics.kept = []

    def _run(self) -> None:
        self.loss = self.runner.micro_step(self.inputs, last=True)["loss"].detach()

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Leave the gradients of a batch in the parameters and return its loss."""
        for name, value in self.inputs.items():
            if isinstance(value, Tensor):
                value.copy_(batch[name])
            else:
                assert batch[name] == value, f"{name} is recorded as {value}, not {batch[name]}"
        self.runner.statistics.keep()
        self.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()


def cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that a function launches on the current stream; return their replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be recorded, which the default one cannot."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------
# SemMAE's first stage


def teacher_file(setting: Setting, job: Job) -> Path:
    """Where the MAE of this seed and length leaves its encoder, whose features parts come from."""
    return setting.images_file.parent / f"mae-seed{job.seed}-{job.epochs}.safetensors"


def learned_parts(images: Images, job: Job) -> Tensor:
    """Learn parts as run_part_learning.py does; return them, uint8 [N, rows, columns]."""
    setting, device = images.setting, images.device
    flags = (
        f"{setting.source_flags} {SHAPES.parts} --precision {setting.precision} --seed {job.seed} "
        "--teacher"
    )
    args = parse_parts([*shlex.split(flags), str(teacher_file(setting, job))])
    args.epochs = setting.part_epochs
    args.batch_size = min(args.batch_size, len(images.pretrain))
    torch.manual_seed(args.seed)
    teacher = load_teacher(args.teacher, image_size=args.input_size)
    learner = build_learner(args, teacher)
    mean_std = image_mean_std(args)
    task = PartLearning(learner, teacher, mean_std, (args.tau_start, args.tau_end)).to(device)
    loader = DeviceLoader(
        images.pretrain, ("image",), batch_size=args.batch_size, size=SIZE, grid=teacher.grid,
        seed=args.seed, mean_std=mean_std, interpolation=args.train_interpolation,
        crop_scale=tuple(args.crop_scale),
    )  # fmt: skip
    first = range(min(STATISTICS_BATCHES, loader.steps_per_epoch))
    learner.standardize(teacher.look(loader.batch(step)["image"]) for step in first)
    args.warmup_epochs = 0
    args.warmup_steps = max(1, round(0.05 * args.epochs * loader.steps_per_epoch))
    groups = param_groups(learner, args.weight_decay)
    train_classifier(args, task, groups, loader.steps_per_epoch, loader.batch, task.after_step)
    task.after_step(1.0)
    normalize, parts = Normalize(mean_std, device), []
    grid = teacher.grid if args.part_grid is None else (args.part_grid, args.part_grid)
    with torch.no_grad():
        for some in images.pretrain.split(1000):
            with autocast(device, AUTOCAST_DTYPES.get(args.precision)):
                features = teacher.look(normalize({"image": some})["image"])
            parts.append(hard_maps(learner.maps(features), grid, clean=args.clean))
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(setting: Setting, images: Images, job: Job, encoder: Path | None) -> dict[str, float]:
    """The accuracies of compare_methods.py, in percent."""
    network = [
        *flags_of(METHODS[job.key].classifier),
        *shlex.split(setting.source_flags),
        "--seed",
        str(job.seed),
    ]
    network += ["--precision", setting.precision] + (
        [] if encoder is None else ["--finetune", str(encoder)]
    )
    args = parse_knn([*network, *PROBE.split()])
    backbone = build_backbone(args).to(images.device)
    bank, queries = (features_of(args, images, backbone, split) for split in ("train", "val"))
    return {
        "knn_acc1": evaluate_knn(bank, queries, [20], [0.07], images.classes)[0].acc1,
        "linear_acc1": linear_accuracy(setting, job, network, bank, queries, images.classes),
        "finetune_acc1": finetuned_accuracy(setting, job, network, images),
    }


@torch.no_grad()
def features_of(args: Namespace, images: Images, backbone: nn.Module, split: str) -> Features:
    """The features of all images of a split."""
    normalize = Normalize(image_mean_std(args), images.device)
    dtype = AUTOCAST_DTYPES.get(args.precision)
    vectors = []
    for some in images.tensors[split].split(1000):
        with autocast(images.device, dtype):
            vectors.append(backbone(normalize({"image": some})["image"]))
    return Features(torch.cat(vectors), images.tensors[f"{split}_labels"])


def autocast(device: torch.device, dtype: torch.dtype | None):
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def linear_accuracy(
    setting: Setting,
    job: Job,
    network: list[str],
    bank: Features,
    queries: Features,
    classes: int,
) -> float:
    """Of a linear probe, trained as by run_linear_probing.py on features of whole images."""
    flags = [*PROBE.split(), *LINEAR.split(), "--epochs", str(setting.linear_epochs)]
    args = parse_linear([*network, *flags])
    args.batch_size = min(args.batch_size, len(bank))
    heads = side_by_side([args.lr], bank.vectors.shape[1], classes, args.seed).to(
        bank.vectors.device
    )
    probe = Probe(heads, None)
    groups = head_groups(heads.values(), [args.lr], args.weight_decay)
    steps_per_epoch = len(bank) // args.batch_size
    batch = bank_batches(args, bank, steps_per_epoch)
    train_classifier(args, probe, groups, steps_per_epoch, batch, graphs=can_record(setting, job))
    probe.eval()
    with torch.no_grad():
        return accuracy(probe.logits({"features": queries.vectors})[0], queries.labels)


def bank_batches(
    args: Namespace, bank: Features, steps_per_epoch: int
) -> Callable[[int], dict[str, Tensor]]:
    """Batch number `step` of the features, in an order of its own in each epoch."""
    orders = Orders(args, len(bank), steps_per_epoch, bank.labels.device)

    def batch(step: int) -> dict[str, Tensor]:
        chosen = orders(step)
        return {"features": bank.vectors[chosen], "label": bank.labels[chosen]}

    return batch


class Orders:
    """The images of each batch: those of a permutation by (seed, epoch)."""

    def __init__(self, args: Namespace, images: int, steps_per_epoch: int, device: torch.device):
        generators = (
            torch.Generator().manual_seed(1000 * args.seed + epoch) for epoch in range(args.epochs)
        )
        orders = [torch.randperm(images, generator=generator) for generator in generators]
        self.rows = torch.stack(orders)[:, : steps_per_epoch * args.batch_size].to(device)
        self.rows = self.rows.reshape(-1, args.batch_size)

    def __call__(self, step: int) -> Tensor:
        return self.rows[step]


def train_classifier(
    args: Namespace,
    task: nn.Module,
    groups: list[dict],
    steps_per_epoch: int,
    batch: Callable[[int], dict[str, Tensor]],
    after_step: Callable[[float], None] = lambda progress: None,
    *,
    graphs: bool = False,
) -> None:
    """As the training loop: schedules, optimizer and runner that the flags say."""
    device = next(task.parameters()).device
    resolve_lr(args)
    optimizer = create_optimizer(args, groups, device)
    runner = TorchRunner(
        task,
        optimizer,
        device=device,
        precision=args.precision,
        update_freq=1,
        clip_grad=args.clip_grad,
    )
    lr, weight_decay = schedules(args, steps_per_epoch)
    task.train()
    steps, take = args.epochs * steps_per_epoch, Steps(runner, graphs=graphs)
    with own_stream(device):
        for step in range(steps):
            set_schedule(optimizer, lr[step], weight_decay[step])
            seed_step(args.seed, 0, step)  # before the batch, which may be drawn
            take(batch(step), args.seed, step)
            runner.step()
            after_step(step / steps)


def finetuned_accuracy(setting: Setting, job: Job, network: list[str], images: Images) -> float:
    """After fine-tuning on the first tenth of each class, as by run_class_finetuning.py."""
    flags = [*FINETUNE.split(), *SHAPES.finetune.split(), "--epochs", str(setting.finetune_epochs)]
    args = parse("finetune", [*network, *flags])
    args.nb_classes = images.classes
    model = build_classifier(args)
    if args.finetune:
        load_pretrained(model, args.finetune, model_key=args.model_key, prefix=args.model_prefix)
    task = Classification(model.to(images.device), args, images.device)
    labels = images.tensors["train_labels"]
    few = torch.from_numpy(first_of_each_class(labels.cpu().numpy(), args.label_fraction)).to(
        images.device
    )
    args.batch_size = min(args.batch_size, len(few))
    steps_per_epoch = len(few) // args.batch_size
    orders = Orders(args, len(few), steps_per_epoch, images.device)
    normalize = Normalize(image_mean_std(args), images.device)
    padded = F.pad(images.tensors["train"][few], (PADDING,) * 4)

    def batch(step: int) -> dict[str, Tensor]:
        chosen = orders(step)
        corners = torch.randint(2 * PADDING + 1, (len(chosen), 2), device=images.device)
        boxes = torch.cat((corners, torch.full_like(corners, SIZE[0])), 1).float()
        flip = torch.rand(len(chosen), device=images.device) < 0.5
        crops = resample(padded[chosen], boxes, SIZE, flip=flip).to(torch.uint8)
        return normalize({"image": crops, "label": labels[few[chosen]]})

    groups = param_groups(model, args.weight_decay, args.layer_decay)
    train_classifier(args, task, groups, steps_per_epoch, batch, graphs=can_record(setting, job))
    model.eval()
    logits = []
    with torch.no_grad(), autocast(images.device, AUTOCAST_DTYPES.get(args.precision)):
        for some in images.tensors["val"].split(1000):
            logits.append(model(normalize({"image": some})["image"]).float())
    return accuracy(torch.cat(logits), images.tensors["val_labels"])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    return averages(tally(logits, labels, torch.ones_like(labels, dtype=torch.bool)))["acc1"]


# --------------------------------------------------------------------------------------------------
# Jobs


def run_job(
    setting: Setting,
    images: Images,
    job: Job,
    trained: Callable[[dict[str, float]], None] = lambda figures: None,
) -> Row:
    """Pre-train and evaluate; `trained` is told the figures of pre-training as soon as there are
    some."""
    begin, steps, encoder = time.perf_counter(), 0, None
    figures = dict.fromkeys(("lr", "first_loss", "loss", "step_ms"), math.nan)
    with tempfile.TemporaryDirectory() as folder:
        if METHODS[job.key].pretrain:
            run = Pretraining(setting, images, job)
            start = time.perf_counter()
            first_loss, loss = run.run()
            steps = run.steps
            step_ms = 1e3 * (time.perf_counter() - start) / steps
            figures = {
                "lr": run.args.lr,
                "first_loss": first_loss,
                "loss": loss,
                "step_ms": step_ms,
            }
            trained(figures)
            encoder = save_encoder(run.method, Path(folder))
            if job.key == "mae":
                files.save_encoder(teacher_file(setting, job), run.method.encoder_state_dict(), {})
            del run
        start = time.perf_counter()
        found = evaluate(setting, images, job, encoder)
        evaluation = time.perf_counter() - start
    return Row(
        data="cifar10" if "IMNET" in setting.source_flags else "digits",
        method=job.key,
        seed=job.seed,
        pretrain_loss=figures["loss"],
        **found,
        epochs=job.epochs if steps else 0,
        steps=steps,
        lr=figures["lr"],
        first_loss=figures["first_loss"],
        step_ms=figures["step_ms"],
        evaluation_s=evaluation,
        seconds=time.perf_counter() - begin,
        note=NOTES.get(job.key, ""),
    )


def save_encoder(method: PretrainMethod, folder: Path) -> Path:
    """As a pre-training run does at its end."""
    path = folder / "encoder.safetensors"
    files.save_encoder(path, method.encoder_state_dict(), {})
    return path


# --------------------------------------------------------------------------------------------------
# Processes


def work(connection: Connection, device: str) -> None:
    """Do what comes through the connection until that is closed, in a process of its own.

    The first thing is a `Setting`, every other a `Job`. Answers are (kind, job, value): ("trained",
    job, metrics), ("row", job, row), ("error", job, traceback). After an error on a GPU the process
    ends, because what a broken recording leaves behind is not known.
    """
    torch.set_num_threads(1)
    setup_logging(rank=1)  # warnings only
    torch.zeros(1, device=device)  # while the images are still being decoded
    images = None
    with contextlib.suppress(EOFError):
        setting = connection.recv()
        while True:
            job = connection.recv()
            try:
                images = images or Images(setting)
                tell = partial(report_trained, connection, job)
                connection.send(("row", job, run_job(setting, images, job, tell)))
            except Exception:
                connection.send(("error", job, traceback.format_exc()))
                if setting.device != "cpu":
                    return
            if setting.device != "cpu":
                torch.cuda.empty_cache()


def report_trained(connection: Connection, job: Job, metrics: dict[str, float]) -> None:
    connection.send(("trained", job, metrics))


class Pool:
    """Processes with a queue each of one; a process that dies costs its job only and is replaced.

    They are begun at once, and begin with jobs when `start` has told them the setting.
    """

    def __init__(self, device: str, size: int):
        self.device, self.size = device, size
        self.context = mp.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.workers: dict[Connection, mp.Process] = {}
        self.busy: dict[Connection, Job] = {}
        self.setting: Setting | None = None
        self.spares = 2 * size
        for _ in range(size):
            self.add_worker()

    def add_worker(self) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, self.device), daemon=True)
        process.start()
        theirs.close()
        self.workers[ours] = process
        if self.setting is not None:
            ours.send(self.setting)

    def start(self, setting: Setting) -> None:
        """Tell all processes what they need to know."""
        self.setting = setting
        for worker in self.workers:
            worker.send(setting)

    def run(
        self,
        jobs: Sequence[Job],
        deadline: float,
        answered: Callable[[str, Job, Any], None],
        fits: Callable[[Job], bool] = lambda job: True,
        ready: Callable[[Job], bool] = lambda job: True,
    ) -> list[Job]:
        """Hand out the jobs in their order until all are done or the deadline; tell what is
        answered and return the jobs that had no time to end.

        A job that is not `ready` waits for others; one that does not `fit` any more is left out.
        One that failed with CUDA graphs is run again without, and so are later ones of its method.
        """
        waiting, left_out, without_graphs = list(jobs), [], set()

        def told(kind: str, job: Job, value: Any) -> None:
            answered(kind, job, value)
            if kind == "error" and job.graphs and self.device != "cpu":
                without_graphs.add(job.key)
                waiting.insert(0, job)

        while time.monotonic() < deadline:
            for worker in [worker for worker in self.workers if worker not in self.busy]:
                while (job := next(filter(ready, waiting), None)) is not None:
                    waiting.remove(job)
                    if fits(job):
                        break
                    left_out.append(job)
                if job is None:
                    break
                if job.key in without_graphs:
                    job = replace(job, graphs=False)
                self.busy[worker] = job
                with contextlib.suppress(OSError):  # it has died, which `receive` will find out
                    worker.send(job)
            if not self.busy:
                break
            for worker in wait(list(self.busy), timeout=max(0.0, deadline - time.monotonic())):
                self.receive(worker, told)
        return [*self.busy.values(), *waiting, *left_out]

    def receive(self, worker: Connection, answered: Callable[[str, Job, Any], None]) -> None:
        """Take one answer of a process, or notices that it has died."""
        try:
            kind, job, value = worker.recv()
        except (EOFError, OSError):  # it has died
            job = self.busy[worker]
            process = self.workers[worker]
            process.join(1)
            kind, value = "error", f"the process ended with exit code {process.exitcode}"
        if kind == "error" and (self.device != "cpu" or value.startswith("the process ended")):
            del self.workers[worker]
            self.spares -= 1
            if self.spares >= 0:
                self.add_worker()
        if kind != "trained":
            del self.busy[worker]
        answered(kind, job, value)

    def close(self) -> None:
        for process in self.workers.values():
            process.kill()
        for process in self.workers.values():
            process.join(5)


class LongRuns:
    """Admits long runs for as long as all that are admitted are expected to end in time.

    The device is shared evenly: a step of a method, measured beside `size` others, takes one part
    in `size` of the device for itself.
    """

    def __init__(self, steps: int, size: int, deadline: float):
        self.steps, self.size, self.deadline = steps, size, deadline
        self.begin, self.admitted = 0.0, 0.0

    def fits(self, step_seconds: float, evaluation: float) -> bool:
        """Whether another run still fits, which is admitted then."""
        now = time.monotonic()
        if not self.admitted:
            self.begin = now
        own = self.steps * step_seconds / self.size
        left = max(self.admitted + own - (now - self.begin), self.steps * SHORTEST_STEP)
        if now + LONG_MARGIN * left + evaluation > self.deadline:
            return False
        self.admitted += own
        return True


# --------------------------------------------------------------------------------------------------
# The section


class Report:
    """Takes rows as they come: results.jsonl, learns.csv, and what never came to a row."""

    def __init__(self, checks: Checks):
        self.checks, self.rows = checks, []
        self.trained: dict[Job, dict[str, float]] = {}  # without a row yet

    def __call__(self, kind: str, subject: Any, value: Any) -> None:
        if kind == "trained":
            self.trained[subject] = value
        elif kind == "row":
            self.trained.pop(subject, None)
            self.add(value)
        elif kind == "error":
            error = value.rstrip().rpartition("\n")[2][:500]
            self.checks.record(
                name_of(subject), ok=False, error=error, graphs=subject.graphs, details=value
            )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_rows(self.checks.output / "learns.csv", self.rows)
        accuracies = row.knn_acc1, row.linear_acc1, row.finetune_acc1
        ok = all(0 <= value <= 100 for value in accuracies)
        if row.steps:
            ok = ok and math.isfinite(row.pretrain_loss)
        values = {
            name: value
            for name, value in vars(row).items()
            if name not in ("method", "seed", "data")
        }
        known = {name: value for name, value in values.items() if value != "" and value == value}
        self.checks.record(name_of(Job(row.method, row.seed, row.epochs)), ok=ok, **known)

    def cut_off(self, jobs: Sequence[Job]) -> None:
        """Name the jobs that the deadline ended, with what pre-training had come to."""
        for job in jobs:
            figures = self.trained.get(job, {})
            self.checks.record(name_of(job), skipped="no time left", **figures)

    def finish(self) -> None:
        """Write a table for each length of pre-training, with random weights in all of them."""
        texts = []
        for epochs in sorted({row.epochs for row in self.rows if row.steps}) or [0]:
            rows = [row for row in self.rows if row.epochs in (0, epochs)]
            if rows:
                title = f"{epochs} epochs, {max(row.steps for row in rows)} steps"
                texts.append(f"{title}\n\n{table(rows, rows[0].data)}")
        if texts:
            write_text(self.checks.output / "learns.md", "\n\n".join(texts) + "\n")
            print("\n\n".join(texts), flush=True)


def name_of(job: Job) -> str:
    length = f" epochs {job.epochs}" if job.epochs else ""
    return f"{job.key} seed {job.seed}{length}"


def run(checks: Checks, **options: Any) -> None:
    """Run the section."""
    run_all(checks, in_processes=not checks.tiny, **options)


def run_all(checks: Checks, *, in_processes: bool, size: int | None = None, **options: Any) -> None:
    """Prepare the data while processes begin, run the jobs, and write the tables."""
    folder = Path(tempfile.mkdtemp(prefix="learns"))
    report, pool = Report(checks), None
    deadline = time.monotonic() + checks.time_left() - RESERVE_SECONDS
    cores = len(os.sched_getaffinity(0))
    try:
        if in_processes:
            size = max(1, min(PROCESSES, cores - 1)) if size is None else size
            pool = Pool(str(checks.device), size)
        begin = time.monotonic()
        setting = prepare(checks, folder)
        checks.record("images decoded", seconds=round(time.monotonic() - begin, 2))
        if pool is None:
            run_here(checks, setting, report, **options)
        else:
            run_in_processes(pool, setting, report, deadline, **options)
    finally:
        if pool is not None:
            pool.close()
        report.finish()
        shutil.rmtree(folder, ignore_errors=True)


def run_here(
    checks: Checks, setting: Setting, report: Report, *,
    keys: Sequence[str] = PRETRAINED, random_keys: Sequence[str] = RANDOM,
) -> None:  # fmt: skip
    """Every method for one epoch in this process."""
    images = Images(setting)
    for key in (*keys, *random_keys):
        job = Job(key, seed=0, epochs=0 if key in RANDOM else 1)
        checks.attempt(name_of(job), lambda job=job: report.add(run_job(setting, images, job)))


def run_in_processes(
    pool: Pool, setting: Setting, report: Report, deadline: float, *,
    keys: Sequence[str] = PRETRAINED, random_keys: Sequence[str] = RANDOM,
    seeds: Sequence[int] = SEEDS, epochs: int = EPOCHS, long_epochs: int = LONG_EPOCHS,
) -> None:  # fmt: skip
    """Run the jobs seed after seed, then long ones, until the deadline."""
    pool.start(setting)
    images = torch.load(setting.images_file, mmap=True)["train"][: setting.pretrain_images]
    steps_per_epoch = len(images) // setting.batch_size
    long_runs = LongRuns(long_epochs * steps_per_epoch, pool.size, deadline)
    jobs = []
    for seed in seeds:
        jobs += [Job(key, seed, epochs) for key in keys] + [
            Job(key, seed, 0) for key in random_keys
        ]
    if long_epochs:
        jobs += [Job(key, seed, long_epochs) for seed in seeds for key in keys]

    def fits(job: Job) -> bool:
        """Whether a job is expected to end in time, by the rows of its method so far."""
        rows = [row for row in report.rows if row.method == job.key and row.epochs <= epochs]
        if job.epochs == epochs or not job.epochs:
            needed = max((row.seconds for row in rows), default=0.0)
            return time.monotonic() + needed < deadline
        if not rows:
            return False
        slowest = max(row.step_ms for row in rows) / 1e3
        return long_runs.fits(slowest, max(row.seconds - row.steps * slowest for row in rows))

    def ready(job: Job) -> bool:
        """Whether the features are there that parts are learned from."""
        method = METHODS.get(job.key)
        learned = method is not None and method.parts == "learned"
        return not learned or teacher_file(setting, job).is_file()

    report.cut_off(pool.run(jobs, deadline, report, fits, ready))


def main(argv: Sequence[str] | None = None, begin: float = BEGIN) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", type=Path, default=None, help="zips; without: digits")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "learns", help="its folder")
    parser.add_argument("--seconds", type=float, default=330.0, help="after which it ends")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", choices=PRETRAINED, default=PRETRAINED)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of every method and seed")
    parser.add_argument(
        "--long_epochs", type=int, default=LONG_EPOCHS, help="with the time left over; 0: none"
    )
    parser.add_argument("--processes", type=int, default=None, help="that share the device")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.jsonl").unlink(missing_ok=True)
    device = torch.device(args.device)
    deadline = begin + args.seconds
    tiny = device.type == "cpu"
    checks = Checks(device, args.output, deadline, tiny, args.data_path, section="learns")
    options = {"keys": args.methods, "epochs": args.epochs, "long_epochs": args.long_epochs}
    run_all(checks, in_processes=True, size=args.processes, **options)


if __name__ == "__main__":
    from scripts.benchmarks import gpu_learns  # whose classes processes can name

    gpu_learns.main(begin=BEGIN)
