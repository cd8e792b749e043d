"""Measures and shows a run: metrics, throughput, logs and progress."""

import ctypes
import importlib
import json
import math
import re
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch

# first imported inside a process group, its default arguments would hold the group for ever
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from unimim.engine.distributed import mean_over_ranks
from unimim.engine.run_record import RunRecord
from unimim.files import write_text
from unimim.logs import log

# Dense bf16/fp16 peak of a device in TFLOP/s, from the vendors' data sheets; keys are words of
# torch's device names.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H200 NVL": 835, "GH200": 989, "H100": 989, "H100 PCIe": 756,
    "H100 NVL": 835, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70,
    "A10": 125, "V100": 125, "V100 PCIE": 112, "T4": 65, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
# words of a part or a variant of a device, which has another peak
OTHER_DEVICES = {"MIG", "LAPTOP", "TI", "D"}


class RunLog:
    """Writes metrics to log.txt (one JSON object an epoch), run.json, tensorboardX and W&B or
    trackio, on rank 0 only."""

    def __init__(self, args: Namespace, config: dict):
        main = args.rank == 0
        self.file = Path(args.output_dir) / "log.txt" if main and args.output_dir else None
        self.record = RunRecord(self.file.parent, args) if self.file is not None else None
        choose_tracker(args)
        self.board = _tensorboard(args.log_dir) if main and args.log_dir else None
        self.wandb, self.package = None, None
        if main and args.wandb:
            self.wandb, self.package = _wandb(args, config)

    def forget_from(self, epoch: int) -> None:
        """Drop lines of epochs that a resumed run will do again."""
        if self.file is None or not self.file.exists():
            return
        whole = [
            line for line in self.file.read_text().splitlines() if line.endswith("}")
        ]  # a crash may cut the last
        lines = [line for line in whole if json.loads(line)["epoch"] < epoch]
        write_text(self.file, "".join(f"{line}\n" for line in lines))

    def step(self, metrics: dict[str, float], step: int) -> None:
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    @property
    def shows_images(self) -> bool:
        """Whether there is a place for images, on rank 0: tensorboard, W&B or trackio."""
        return self.board is not None or self.wandb is not None

    def images(self, name: str, images: Tensor, step: int) -> None:
        """Send one picture uint8 [3, H, W] to tensorboard and W&B or trackio."""
        if self.board is not None:
            self.board.add_image(name, images.numpy(), step)
        if self.wandb is not None:
            picture = self.package.Image(images.permute(1, 2, 0).numpy())
            self.wandb.log({name: picture}, step=step)

    def epoch(self, metrics: dict, step: int) -> None:
        numbers = {f"epoch/{k}": v for k, v in metrics.items() if isinstance(v, (int, float))}
        self.step(numbers, step)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)  # the next save tells of its loss
            with self.file.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            self.record.epoch(metrics)

    def close(self) -> None:
        if self.record is not None:
            self.record.end()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _tensorboard(folder: str):
    from tensorboardX import SummaryWriter

    return SummaryWriter(logdir=folder)


def choose_tracker(args: Namespace) -> None:
    """Set what --tracker stands for: --log_dir, by default the output folder, or --wandb, by
    default the project "unimim"."""
    tracker = getattr(args, "tracker", None)
    if tracker == "tensorboard":
        args.log_dir = args.log_dir or args.output_dir
        if not args.log_dir:
            raise ValueError("--tracker tensorboard needs a folder: give --output_dir or --log_dir")
    elif tracker is not None:
        args.wandb = args.wandb or "unimim"


def _wandb(args: Namespace, config: dict):
    """Return a run of W&B, or of trackio, which is called alike, and that package."""
    package = "trackio" if getattr(args, "tracker", None) == "trackio" else "wandb"
    flag = f"--tracker {package}" if getattr(args, "tracker", None) else "--wandb"
    try:
        tracker = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{flag} needs the package {package}: pip install {package}, or use --log_dir"
        ) from error
    name = Path(args.output_dir).name or None
    own = wandb_id(args)
    if package == "trackio":  # a run is known there by its name alone
        name = f"{name}-{own}" if name else None
        run = tracker.init(project=args.wandb, name=name, config=config, resume="allow")
    else:
        run = tracker.init(project=args.wandb, name=name, config=config, id=own, resume="allow")
    return run, tracker


def wandb_id(args: Namespace) -> str | None:
    """Return the run's id at a tracker: kept in the output folder, new unless the run resumes."""
    if not args.output_dir:
        return None
    file = Path(args.output_dir) / "wandb_id.txt"
    if not (file.is_file() and (args.auto_resume or args.resume)):
        write_text(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


# --------------------------------------------------------------------------------------------------
# Meters


class NonFiniteError(RuntimeError):
    """Too many optimizer steps in a row had a loss or a gradient that is not finite."""


class StepMonitor:
    """Keeps the metrics of each step on the device and reads them together: no step waits for it.

    Metrics are means over all processes, so that every rank counts, stops and resumes with the same
    ones.

    A step whose loss or gradient was not finite has `applied` 0: it did not change anything. Its
    batch is written to `folder`, and more than `max_nonfinite` of them in a row raise
    NonFiniteError. With a loss scaler (`scaled`) a gradient may overflow under a finite loss until
    the scale has come down: 16 more of those are let pass.
    """

    scaler_halvings = 16

    def __init__(self, *, folder: str, rank: int, max_nonfinite: int, scaled: bool = False):
        self.folder = folder
        self.rank = rank
        self.max_nonfinite = max_nonfinite
        self.scaled = scaled
        self.pending: list[tuple[int, list[Tensor], dict[str, Tensor]]] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.recent: dict[str, float] = {}
        self.streak = 0
        self.skipped = 0  # of the whole run

    def push(self, step: int, indices: list[Tensor], metrics: dict[str, Tensor]) -> None:
        """Add a step.

        `metrics` holds scalar tensors, among them loss, grad_norm and applied; `indices` are the
        images of the step.
        """
        self.pending.append((step, indices, metrics))

    def read(self) -> dict[str, float]:
        """Move what is pending to the host and return the means of the applied steps; all ranks
        call."""
        if self.pending:
            names = list(self.pending[0][2])
            steps = []
            for _, _, metrics in self.pending:
                steps.append(torch.stack([metrics[name].float() for name in names]))
            own = torch.stack(steps)
            rows = [
                dict(zip(names, values, strict=True)) for values in mean_over_ranks(own).tolist()
            ]
            good = [row for row in rows if row["applied"]]
            self._check(rows, own)
            self._add(good)
            if good:
                self.recent = {name: sum(row[name] for row in good) / len(good) for name in names}
            self.pending.clear()
        return self.recent

    def _add(self, rows: list[dict[str, float]]) -> None:
        for row in rows:
            for name, value in row.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def _check(self, rows: list[dict[str, float]], own: Tensor) -> None:
        """Count and reports steps that were not applied; `own` are the metrics of this rank."""
        for (step, indices, _), row, values in zip(self.pending, rows, own, strict=True):
            overflow = self.scaled and math.isfinite(row["loss"])
            self.streak = 0 if row["applied"] else self.streak + 1
            self.skipped += not row["applied"]
            if not row["applied"] and not overflow:
                self._report(step, indices, dict(zip(row, values.tolist(), strict=True)))
            if self.streak > self.max_nonfinite + overflow * self.scaler_halvings:
                raise NonFiniteError(
                    f"{self.streak} optimizer steps in a row had a loss or gradient that is not "
                    f"finite (--max_nonfinite {self.max_nonfinite}); weights, optimizer and "
                    "teacher are as before them. Lower --lr, set --clip_grad, or look at the "
                    f"batches listed in {self.folder or 'the log'}"
                )

    def _report(self, step: int, indices: list[Tensor], row: dict[str, float]) -> None:
        samples = torch.cat(indices).tolist() if indices else []
        log.warning("step %d skipped: loss %s, grad norm %s", step, row["loss"], row["grad_norm"])
        if self.folder:
            report = {
                "step": step,
                "loss": str(row["loss"]),
                "grad_norm": str(row["grad_norm"]),
                "indices": samples,
            }
            write_text(
                Path(self.folder) / f"nonfinite-{step}-rank{self.rank}.json", json.dumps(report)
            )

    def means(self) -> dict[str, float]:
        """Return the means since the last reset."""
        return {
            name: self.sums[name] / self.counts[name] for name in self.sums if name != "applied"
        }

    def state(self) -> dict:
        return {"sums": dict(self.sums), "counts": dict(self.counts), "streak": self.streak}

    def load(self, state: dict) -> None:
        self.sums = dict(state["sums"])
        self.counts = dict(state["counts"])
        self.streak = state["streak"]

    def reset(self) -> None:
        self.sums, self.counts = {}, {}


class Throughput:
    """Measures images per second, the fraction of time spent waiting for data, and MFU.

    `flops_per_image` are those of the model: what --grad_checkpointing computes again is no use of
    the device.
    """

    def __init__(self, images_per_step: int, flops_per_image: float | None, peak: float | None):
        self.images_per_step = images_per_step
        self.flops_per_image = flops_per_image
        self.peak = peak
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def timed(self, loader: Iterable) -> Iterable:
        """Pass batches on and add up the time that they took to arrive."""
        batches = iter(loader)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - begin
            yield batch

    def metrics(self) -> dict[str, float]:
        """Return what was measured since the last call.

        images_per_s is over all ranks; data_wait and mfu are in percent, the latter only if the
        device's peak is known.
        """
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        images_per_s = self.steps * self.images_per_step / elapsed
        metrics = {
            "images_per_s": images_per_s,
            "data_wait": 100 * self.waited / elapsed,
            "s_per_step": elapsed / max(self.steps, 1),
        }
        if self.flops_per_image and self.peak:
            metrics["mfu"] = 100 * images_per_s * self.flops_per_image / self.peak
        self.restart()
        return metrics


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the device's dense peak in FLOP/s at this precision, None where it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    tflops = peak_tflops(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def peak_tflops(name: str) -> float | None:
    """Return the entry of `PEAK_TFLOPS` with the most words in a device's name, None without
    one."""
    words = set(re.split(r"[\s-]+", name.upper()))
    known = [key for key in PEAK_TFLOPS if set(key.upper().split()) <= words]
    if not known or words & OTHER_DEVICES:
        return None
    return PEAK_TFLOPS[max(known, key=lambda key: len(key.split()))]


def count_flops(step, *args) -> float:
    """Return the FLOPs of step(*args) by torch's counter, two for each multiply-add.

    The counter does not know the fused attention of CPUs: it is given the products of the explicit
    form.
    """
    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, *qkv, **_: (
            2 * _attention_flops(*qkv)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        step(*args)
    return float(counter.get_total_flops())


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_, **__) -> int:
    """Return the FLOPs of q k^T and of its product with v; shapes [B, h, T, d]."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def memory_gib(device: torch.device) -> float:
    """Return the device's peak memory so far; on a CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_freed_memory(keep: bool = True) -> None:
    """Let glibc's malloc keep freed memory for the next step; `keep` False restores its default.

    By default large blocks go back to the kernel, which then hands out zeroed pages anew: a step on
    a CPU is 1.1 to 1.3 times as long (docs/benchmarks.md). What was kept in the heap's middle until
    then stays in use with `keep` False: only a new process is without it. Nothing happens with
    another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0 if keep else 2**16)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1 if keep else 2**17)  # M_TRIM_THRESHOLD


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def clock(seconds: float) -> str:
    """Return 3723 seconds as 1:02:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


class Progress:
    """Shows a bar on a terminal and a line every `every` steps elsewhere, on rank 0 only."""

    def __init__(self, title: str, total: int, start: int, *, every: int, rank: int):
        self.title = title
        self.total = total
        self.every = every
        self.rank = rank
        self.bar = None
        if rank == 0 and sys.stdout is not None and sys.stdout.isatty():
            self.bar = tqdm(
                total=total, initial=start, desc=title, dynamic_ncols=True, file=sys.stdout
            )

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.total

    def show(self, step: int, metrics: dict[str, str]) -> None:
        text = "  ".join(f"{name} {value}" for name, value in metrics.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        elif self.rank == 0:
            log.info("%s [%*d/%d]  %s", self.title, len(str(self.total)), step, self.total, text)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
