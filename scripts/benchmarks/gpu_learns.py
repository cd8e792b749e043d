"""The section `learns` of gpu_check.py: pre-trains every method on small images that lie on the
device.

The models, flags and evaluations are those of compare_methods.py, with which the figures compare;
the batches come from unimim/data/device_loader.py. Several processes share the device, each with
one method at a time, because steps this short are bound by what launches their kernels. All methods
get as many epochs as the time allows, measured first, and with what is left over the next seeds.
Every finished method is a line of results.jsonl and a row of OUTPUT/learns.csv at once.
"""

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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

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
    VisualTokens,
    color_place_parts,
    decoded,
    kmeans_tokens,
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

# the least proven first; SemMAE's first stage is left out, whose parts would need a teacher
PRETRAINED = (
    "maskfeat", "semanticmim_maskfeat", "conmim", "semaim", "beit", "semanticmim_beit", "a2mim_vit", "a2mim_resnet18",
    "simmim_vit", "simmim_resnet18", "semmae_kmeans", "mae", "saim", "igpt", "semmae_random",
)  # fmt: skip
RANDOM = ("random", "random_beit", "random_mim_vit", "random_resnet18")
NOTES = {
    "semmae_kmeans": "parts: k-means of each image's colors and places",
    "semmae_random": "parts: drawn at random",
    "beit": "visual tokens: k-means of patches",
    "semanticmim_beit": "visual tokens: k-means of patches",
}
SIZE = (32, 32)
PART_GRID = (16, 16)
PARTS, WORDS = 7, 512
SHAPES = DATA["cifar10"]  # the lengths and sizes of 32-pixel images
WARMUP_SHARE = 0.1
PADDING = 4  # of fine-tuning's crops, in pixels
SEEDS = (0, 1, 2)
PROCESSES = 15  # at most; as many as methods, so that none waits for another
MEASURED_SECONDS, WARM_STEPS = 2.5, 8
SHARE_OF_TIME = 0.8  # of what is left, for the first seed
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


@dataclass(frozen=True)
class Job:
    """A method that is pre-trained for `epochs` with a seed, and evaluated."""

    key: str
    seed: int
    epochs: int


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
    seconds: float
    note: str


# --------------------------------------------------------------------------------------------------
# Data


def prepare(checks: Checks, folder: Path) -> Setting:
    """Decodes both splits and writes them where every process can read them."""
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
            str(device), precision, source_flags, file, 8, 8, linear_epochs=2, finetune_epochs=2
        )
    torch.save(tensors, file)
    return Setting(str(device), precision, source_flags, file)


class Images:
    """The images of both splits on the device, and what is made of them once: part maps and visual
    words."""

    def __init__(self, setting: Setting):
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

    def part_maps(self, kind: str, seed: int, num_parts: int, grid: tuple[int, int]) -> Tensor:
        """uint8 [N, rows, columns]."""
        if kind == "kmeans":
            return self.once(kind, lambda: color_place_parts(self.pretrain, PART_GRID, num_parts))
        generator = torch.Generator().manual_seed(seed)
        shape = len(self.pretrain), *grid
        draw = partial(torch.randint, num_parts, shape, generator=generator, dtype=torch.uint8)
        return self.once((kind, seed), lambda: draw().to(self.device))

    def words(self, patch: tuple[int, int], mean_std) -> VisualTokens:
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
        f"{setting.source_flags} {SHAPES.pretrain} --epochs {job.epochs} --warmup_steps {round(WARMUP_SHARE * steps)} "
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
        self.loader = self.build_loader(images, METHODS[job.key].parts)
        groups = param_groups(self.method, self.args.weight_decay)
        optimizer = create_optimizer(self.args, groups, self.device)
        self.runner = TorchRunner(
            self.method, optimizer, device=self.device, precision=setting.precision, update_freq=1,
            clip_grad=self.args.clip_grad,
        )  # fmt: skip
        self.runner.watch(self.method, self.method.teacher)
        self.lr, self.weight_decay = schedules(self.args, steps_per_epoch)
        self.steps, self.done = job.epochs * steps_per_epoch, 0
        self.method.train()

    def build_loader(self, images: Images, parts: str) -> DeviceLoader:
        method, args = self.method, self.args
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
            part_maps=images.part_maps(parts, args.seed, method.num_parts, grid) if parts else None,
            words=images.words(method.cell_size, mean_std)
            if "target_ids" in method.views
            else None,
        )

    def step(self) -> Tensor:
        """The loss, on the device."""
        step, method = self.done, self.method
        if step % self.loader.steps_per_epoch == 0:
            method.before_epoch(step // self.loader.steps_per_epoch, self.args.epochs)
        set_schedule(self.runner.optimizer, self.lr[step], self.weight_decay[step])
        seed_step(self.args.seed, 0, step)
        loss = self.runner.micro_step(self.loader.batch(step), last=True)["loss"].detach()
        applied = self.runner.step()["applied"]
        method.after_step(
            step / self.steps, float(applied) if applied.device.type == "cpu" else applied
        )
        self.done += 1
        return loss

    def run(self) -> tuple[float, float]:
        """Trains to the end: mean losses of the first and the last epoch."""
        losses = torch.stack([self.step() for _ in range(self.steps)])
        length = self.loader.steps_per_epoch
        return float(losses[:length].mean()), float(losses[-length:].mean())


def measure(setting: Setting, images: Images, key: str) -> float:
    """Seconds of one step of a method, beside whatever else runs on the device."""
    run = Pretraining(setting, images, Job(key, seed=0, epochs=10_000))
    for _ in range(WARM_STEPS):
        run.step()
    synchronize(images.device)
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < MEASURED_SECONDS:
        for _ in range(4):
            run.step()
        synchronize(images.device)
        steps += 4
    return (time.perf_counter() - begin) / steps


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        "linear_acc1": linear_accuracy(setting, network, bank, queries, images.classes),
        "finetune_acc1": finetuned_accuracy(setting, network, images),
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
    setting: Setting, network: list[str], bank: Features, queries: Features, classes: int
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
    train_classifier(
        args, probe, groups, steps_per_epoch, bank_batches(args, bank, steps_per_epoch)
    )
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
    for step in range(args.epochs * steps_per_epoch):
        set_schedule(optimizer, lr[step], weight_decay[step])
        seed_step(args.seed, 0, step)
        runner.micro_step(batch(step), last=True)
        runner.step()


def finetuned_accuracy(setting: Setting, network: list[str], images: Images) -> float:
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

    train_classifier(
        args, task, param_groups(model, args.weight_decay, args.layer_decay), steps_per_epoch, batch
    )
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
    """Pre-trains and evaluates; `trained` is told the figures of pre-training as soon as there are
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
            del run
        found = evaluate(setting, images, job, encoder)
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


def work(connection: Connection, setting: Setting) -> None:
    """A process of its own: does what comes through the connection until that is closed.

    Answers are (kind, subject, value): of ("load", number) ("loaded", number, None) when the images
    are on the device, of ("measure", key) ("measured", key, seconds), of ("job", job) ("trained",
    job, figures) and ("row", job, row); of what raises ("error", subject, traceback).
    """
    torch.set_num_threads(1)
    setup_logging(rank=1)  # warnings only
    images = None
    while True:
        try:
            kind, subject = connection.recv()
        except EOFError:
            return
        try:
            images = images or Images(setting)
            if kind == "load":
                connection.send(("loaded", subject, None))
            elif kind == "measure":
                connection.send(("measured", subject, measure(setting, images, subject)))
            else:
                tell = partial(report_trained, connection, subject)
                connection.send(("row", subject, run_job(setting, images, subject, tell)))
        except Exception:
            connection.send(("error", subject, traceback.format_exc()))


def report_trained(connection: Connection, job: Job, figures: dict[str, float]) -> None:
    connection.send(("trained", job, figures))


class Pool:
    """Processes with a queue each of one; a process that dies costs its task only."""

    def __init__(self, setting: Setting, size: int):
        context = mp.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.workers = {}
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, setting), daemon=True)
            process.start()
            theirs.close()
            self.workers[ours] = process
        self.busy: dict[Connection, Any] = {}

    def run(
        self,
        tasks: list[tuple[str, Any]],
        deadline: float,
        answered: Callable[[str, Any, Any], None],
        fits: Callable[[Any], bool] = lambda subject: True,
    ) -> list[Any]:
        """Hands out the tasks in their order, those that `fits` says can still end in time, until
        all are done or the deadline; tells what is answered. Returns the subjects that had no time
        to end."""
        waiting, left_out = list(tasks), []
        while time.monotonic() < deadline:
            for worker in [worker for worker in self.workers if worker not in self.busy]:
                while waiting and not fits(waiting[0][1]):
                    left_out.append(waiting.pop(0)[1])
                if waiting:
                    self.busy[worker] = waiting.pop(0)
                    with contextlib.suppress(OSError):  # it has died, which `receive` will find out
                        worker.send(self.busy[worker])
            if not self.busy:
                break
            for worker in wait(list(self.busy), timeout=max(0.0, deadline - time.monotonic())):
                self.receive(worker, answered)
        return [subject for _, subject in (*self.busy.values(), *waiting)] + left_out

    def receive(self, worker: Connection, answered: Callable[[str, Any, Any], None]) -> None:
        try:
            kind, subject, value = worker.recv()
        except (EOFError, OSError):  # it has died
            kind, subject = "error", self.busy.pop(worker)[1]
            process = self.workers.pop(worker)
            process.join(1)
            answered(kind, subject, f"the process ended with exit code {process.exitcode}")
            return
        if kind != "trained":
            del self.busy[worker]
        answered(kind, subject, value)

    def close(self) -> None:
        for process in self.workers.values():
            process.kill()
        for process in self.workers.values():
            process.join(5)


def epochs_that_fit(
    step_seconds: dict[str, float], steps_per_epoch: int, workers: int, seconds: float
) -> int:
    """The most epochs with which all methods, one after another on the first free worker, end
    within `seconds`."""

    def makespan(epochs: int) -> float:
        ends = [0.0] * workers
        for each in step_seconds.values():
            first = ends.index(min(ends))
            ends[first] += epochs * steps_per_epoch * each
        return max(ends)

    epochs = 1
    while makespan(epochs + 1) <= seconds:
        epochs += 1
    return epochs


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
            name = name_of(subject) if isinstance(subject, Job) else f"process for {subject}"
            error = value.rstrip().rpartition("\n")[2][:500]
            self.checks.record(name, ok=False, error=error, details=value)

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
        self.checks.record(f"{row.method} seed {row.seed}", ok=ok, **known)

    def cut_off(self, jobs: Sequence[Job]) -> None:
        """Names the jobs that the deadline ended, with what pre-training had come to."""
        for job in jobs:
            figures = self.trained.get(job, {})
            self.checks.record(name_of(job), skipped="no time left", epochs=job.epochs, **figures)

    def finish(self) -> None:
        """Writes the table."""
        if self.rows:
            text = table(self.rows, self.rows[0].data)
            write_text(self.checks.output / "learns.md", text + "\n")
            print(text, flush=True)


def name_of(job: Job) -> str:
    return f"{job.key} seed {job.seed}"


def run(checks: Checks) -> None:
    """Runs the section."""
    folder = Path(tempfile.mkdtemp(prefix="learns"))
    report = Report(checks)
    try:
        setting = prepare(checks, folder)
        if checks.tiny:
            run_here(checks, setting, report)
        else:
            torch.cuda.empty_cache()
            run_in_processes(checks, setting, report)
    finally:
        report.finish()
        shutil.rmtree(folder, ignore_errors=True)


def run_here(checks: Checks, setting: Setting, report: Report) -> None:
    """Every method for one epoch in this process."""
    images = Images(setting)
    for key in (*PRETRAINED, *RANDOM):
        job = Job(key, seed=0, epochs=1)
        checks.attempt(name_of(job), lambda job=job: report.add(run_job(setting, images, job)))


def run_in_processes(
    checks: Checks, setting: Setting, report: Report, *, size: int | None = None, keys: Sequence[str] = PRETRAINED,
    random_keys: Sequence[str] = RANDOM, seeds: Sequence[int] = SEEDS,
) -> None:  # fmt: skip
    """Measures, settles the epochs, and runs the jobs seed after seed, until the deadline."""
    cores = len(os.sched_getaffinity(0))
    size = max(1, min(PROCESSES, cores - 1)) if size is None else size
    deadline = time.monotonic() + checks.time_left() - RESERVE_SECONDS
    pool = Pool(setting, size)
    try:
        steps_per_epoch = (
            len(torch.load(setting.images_file)["train"][: setting.pretrain_images])
            // setting.batch_size
        )
        step_seconds = measured(checks, pool, keys, random_keys, deadline, report)
        evaluation = max(
            (row.seconds for row in report.rows), default=10.0
        )  # random weights' are nothing else
        left = SHARE_OF_TIME * (deadline - time.monotonic())
        left -= evaluation * math.ceil(len(step_seconds) / size)
        epochs = epochs_that_fit(step_seconds, steps_per_epoch, size, left)
        checks.record(
            "epochs",
            epochs=epochs,
            steps=epochs * steps_per_epoch,
            processes=size,
            evaluation_s=evaluation,
        )

        def fits(job: Job) -> bool:
            """Of the later seeds only what will end in time is begun."""
            needed = epochs * steps_per_epoch * step_seconds.get(job.key, 0.0) + evaluation
            return job.seed == seeds[0] or time.monotonic() + needed < deadline

        jobs = [Job(key, seeds[0], epochs) for key in step_seconds]
        for seed in seeds[1:]:
            jobs += [
                Job(key, seed, epochs if key in step_seconds else 0)
                for key in (*step_seconds, *random_keys)
            ]
        report.cut_off(pool.run([("job", job) for job in jobs], deadline, report, fits))
    finally:
        pool.close()


def measured(
    checks: Checks,
    pool: Pool,
    keys: Sequence[str],
    random_keys: Sequence[str],
    deadline: float,
    report: Report,
) -> dict[str, float]:
    """Seconds of a step of each method, beside those of the others; without those that cannot be
    run.

    Random weights are evaluated at the same time.
    """
    found = {}

    def answered(kind: str, subject: Any, value: Any) -> None:
        if kind == "measured":
            found[subject] = value
        else:
            report(kind, subject, value)

    pool.run(
        [("load", number) for number in range(len(pool.workers))], deadline, report
    )  # to begin side by side
    evaluations = [("job", Job(key, SEEDS[0], 0)) for key in random_keys]
    pool.run([("measure", key) for key in keys] + evaluations, deadline, answered)
    step_ms = {key: round(1e3 * value, 2) for key, value in found.items()}
    checks.record("ms a step, processes side by side", **step_ms)
    return {key: found[key] for key in keys if key in found}


if __name__ == "__main__":
    sys.exit("this is a section: python scripts/gpu_check.py --only learns")
