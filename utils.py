"""Processes, seeds, logging and meters: what every script needs and no model knows."""

import ctypes
import gc
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # first imported inside a group, its default arguments hold the group for ever
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from files import write_rows as write_rows
from files import write_text

log = logging.getLogger("unimim")

# Dense bf16/fp16 peak of a device in TFLOP/s, from the makers' data sheets; keys are words of torch's device names.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H200 NVL": 835, "GH200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "V100": 125,
    "V100 PCIE": 112, "T4": 65, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
OTHER_DEVICES = {"MIG", "LAPTOP", "TI", "D"}  # words of a part or a variant, whose peak is another


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Place:
    """Where a process stands among the others, and where they meet if the launcher says so."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int | None = None


def init_distributed(args: Namespace) -> torch.device:
    """Finds this process's place among the others, joins the group, and sets args.rank, world_size and local_rank."""
    if args.dist_on_itp:
        args.dist_url = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    place = find_place(os.environ, openmpi=args.dist_on_itp, local_rank=args.local_rank)
    args.rank = place.rank
    args.world_size = place.world_size
    args.local_rank = place.local_rank
    device = choose_device(args)
    if args.enable_deepspeed:  # it would take a GPU that it finds, whatever --device says
        os.environ.setdefault("DS_ACCELERATOR", device.type)
    if args.world_size > 1 or args.enable_deepspeed:
        join_process_group(args, device, place)
    return device


def find_place(env: Mapping[str, str], *, openmpi: bool = False, local_rank: int = -1) -> Place:
    """The place that a launcher's variables give this process.

    Order: OpenMPI with --dist_on_itp, torchrun and deepspeed (RANK), srun, else one process. `local_rank` is the flag.
    """
    if openmpi:
        return Place(*(int(env[f"OMPI_COMM_WORLD_{key}"]) for key in ("RANK", "SIZE", "LOCAL_RANK")))
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", max(local_rank, 0))))
    return slurm_place(env)


def slurm_place(env: Mapping[str, str]) -> Place:
    """The place of one of srun's tasks; one process outside of a job step, as in a batch script.

    Without MASTER_ADDR the tasks meet on the step's first host, at a port that follows from the job and the step.
    """
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or (env.get("SLURM_NTASKS", 1) if "MASTER_ADDR" in env else 1))
    if tasks == 1 or "SLURM_PROCID" not in env:
        return Place()
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    address = env.get("MASTER_ADDR") or (first_host(nodes) if nodes else env.get("SLURM_LAUNCH_NODE_IPADDR"))
    if not address:
        raise ValueError(
            f"srun started {tasks} tasks, but neither SLURM_STEP_NODELIST nor MASTER_ADDR says where they meet; "
            "export MASTER_ADDR as the first of the job's hosts"
        )
    job = int(env.get("SLURM_JOB_ID", 0))
    step = int(env.get("SLURM_STEP_ID", 0))
    port = 10000 + (101 * job + step) % 20000  # below the ports that the kernel hands out
    one_gpu = re.fullmatch(r"[^,]+", env.get("CUDA_VISIBLE_DEVICES", "")) is not None
    local_rank = 0 if one_gpu else int(env["SLURM_LOCALID"])
    return Place(int(env["SLURM_PROCID"]), tasks, local_rank, address, port)


def first_host(hosts: str) -> str:
    """The first name of a host list in SLURM's form: "gpu07" of "gpu[07-12,15],login"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", hosts)
    if first is None:
        raise ValueError(f"{hosts!r} is not a list of hosts; export MASTER_ADDR as the first of the job's hosts")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def choose_device(args: Namespace) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        args.device = "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(args.local_rank)
        return torch.device("cuda", args.local_rank)
    return torch.device(args.device)


def join_process_group(args: Namespace, device: torch.device, place: Place) -> None:
    """A lone process under DeepSpeed needs the variables of a launcher too.

    On GPUs the group has a side for the host's tensors: what is agreed on there waits for no device.
    """
    if in_group():  # a second run in the same processes
        return
    defaults = {
        "RANK": args.rank, "WORLD_SIZE": args.world_size, "LOCAL_RANK": args.local_rank,
        "MASTER_ADDR": place.address or "127.0.0.1",
        "MASTER_PORT": place.port or (free_port() if args.world_size == 1 else 29500),
    }  # fmt: skip
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    on_gpus = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        init_method=args.dist_url,
        rank=args.rank,
        world_size=args.world_size,
        timeout=timedelta(minutes=args.dist_timeout),
        device_id=device if on_gpus and args.world_size > 1 else None,  # a lone rank has no one to connect to
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def leave_process_group() -> None:
    """Also ends gloo's threads: one that frees a tensor while the interpreter shuts down aborts the process.

    DeepSpeed keeps its engine, and so the threads, until the process ends.
    """
    if in_group():
        dist.destroy_process_group()
        gc.collect()  # DDP lies in reference cycles and holds the group


def has_peers() -> bool:
    """Whether other processes may wait for this one in a collective."""
    return in_group() and dist.get_world_size() > 1


def exit_at_once(code: int) -> None:
    """Ends this process with what it has logged, without the farewell to peers that may never answer.

    They sit in a collective, where destroying the group would wait for them; a lost connection or the launcher ends
    them. Loader workers go with their parent.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def barrier() -> None:
    if in_group():
        dist.barrier()


def reduce_sum(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if in_group():
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over all processes, in a new tensor."""
    return reduce_sum(values.clone()) / (dist.get_world_size() if in_group() else 1)


def from_first_rank(value):
    """Rank 0's value of a plain object, on every process."""
    if not in_group():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The plain object of each process, in the order of ranks, on every process."""
    if not in_group():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class StopSignal:
    """Turns SIGTERM, SIGINT or SIGUSR1 into a request to stop, on which all ranks agree.

    Launchers and schedulers repeat what they have sent already, so repeats change nothing. Only SIGINT, that is Ctrl-C,
    ends the process at once when it comes again more than `patience` seconds after the first.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    patience = 2.0

    def __init__(self):
        self.received: str | None = None
        self.votes = torch.zeros(1)  # on the host: to ask there waits for no device
        self.voting: dist.Work | None = None
        self.may_interrupt: threading.Timer | None = None
        for number in self.signals:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame) -> None:
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT and self.may_interrupt is None:
            self.may_interrupt = threading.Timer(self.patience, _default_interrupt)
            self.may_interrupt.daemon = True
            self.may_interrupt.start()

    def agreed(self, *, last: bool = False) -> bool:
        """Whether any rank has been asked to stop; all ranks call it once a step and get the same answer.

        Among several ranks the answer is that to the votes of the step before, which have arrived meanwhile; in the
        `last` step of an epoch it is waited for. A lone process looks at its own request.
        """
        if not has_peers():
            return self.received is not None
        if self._result():
            return True
        self.votes.fill_(self.received is not None)
        self.voting = dist.all_reduce(self.votes, async_op=True)
        return last and self._result()

    def _result(self) -> bool:
        """The outcome of the vote under way, False without one."""
        if self.voting is None:
            return False
        self.voting.wait()
        self.voting = None
        return bool(self.votes > 0)


def _default_interrupt() -> None:
    """Gives SIGINT its default action, which also ends a process that is stuck outside of Python.

    Python's `signal` would do so on the main thread only, and that one may be stuck.
    """
    ctypes.pythonapi.PyOS_setsig(ctypes.c_int(signal.SIGINT), ctypes.c_void_p(signal.SIG_DFL))


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def seed_step(seed: int, rank: int, step: int) -> None:
    """Makes everything drawn on this process from here on a function of (seed, rank, step) alone.

    Called before each optimizer step: a resumed run then draws what the uninterrupted one drew.
    """
    state = np.random.SeedSequence([seed, rank, step]).generate_state(3)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))
    random.seed(int(state[2]))


# ---------------------------------------------------------------------------------------------------------------------
# Logging


def setup_logging(rank: int) -> None:
    """Rank 0 says everything, the others only errors."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False


class RunLog:
    """Where figures go: log.txt (one JSON object an epoch), tensorboardX and W&B; on rank 0 only."""

    def __init__(self, args: Namespace, config: dict):
        main = args.rank == 0
        self.file = Path(args.output_dir) / "log.txt" if main and args.output_dir else None
        self.board = _tensorboard(args.log_dir) if main and args.log_dir else None
        self.wandb = _wandb(args, config) if main and args.wandb else None

    def forget_from(self, epoch: int) -> None:
        """Drops lines of epochs that a resumed run will do again."""
        if self.file is None or not self.file.exists():
            return
        whole = [line for line in self.file.read_text().splitlines() if line.endswith("}")]  # a crash may cut the last
        lines = [line for line in whole if json.loads(line)["epoch"] < epoch]
        write_text(self.file, "".join(f"{line}\n" for line in lines))

    def step(self, figures: dict[str, float], step: int) -> None:
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(figures, step=step)

    def epoch(self, figures: dict, step: int) -> None:
        numbers = {f"epoch/{k}": v for k, v in figures.items() if isinstance(v, (int, float))}
        self.step(numbers, step)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(figures) + "\n")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _tensorboard(folder: str):
    from tensorboardX import SummaryWriter

    return SummaryWriter(logdir=folder)


def _wandb(args: Namespace, config: dict):
    try:
        import wandb
    except ImportError as error:
        raise ValueError("--wandb needs the package wandb: pip install wandb, or use --log_dir") from error
    name = Path(args.output_dir).name or None
    return wandb.init(project=args.wandb, name=name, config=config, id=wandb_id(args), resume="allow")


def wandb_id(args: Namespace) -> str | None:
    """The id under which W&B knows the run: kept in the output folder, new for a run that resumes nothing."""
    if not args.output_dir:
        return None
    file = Path(args.output_dir) / "wandb_id.txt"
    if not (file.is_file() and (args.auto_resume or args.resume)):
        write_text(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


# ---------------------------------------------------------------------------------------------------------------------
# Meters


class NonFiniteError(RuntimeError):
    """Too many optimizer steps in a row had a loss or a gradient that is not finite."""


class StepMonitor:
    """Keeps each step's figures on the device and reads them together, so that no step waits for the device.

    Figures are means over all processes, so that every rank counts, stops and resumes with the same ones.

    A step whose loss or gradient was not finite has `applied` 0: it did not change anything. Its batch is written to
    `folder`, and more than `max_nonfinite` of them in a row raise NonFiniteError. With a loss scaler (`scaled`) a
    gradient may overflow under a finite loss until the scale has come down: 16 more of those are let pass.
    """

    scaler_halvings = 16

    def __init__(self, *, folder: str, rank: int, max_nonfinite: int, scaled: bool = False):
        self.folder, self.rank, self.max_nonfinite, self.scaled = folder, rank, max_nonfinite, scaled
        self.pending: list[tuple[int, list[Tensor], dict[str, Tensor]]] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.recent: dict[str, float] = {}
        self.streak = 0

    def push(self, step: int, indices: list[Tensor], figures: dict[str, Tensor]) -> None:
        """`figures` holds scalar tensors, among them loss, grad_norm and applied; `indices` the samples of the step."""
        self.pending.append((step, indices, figures))

    def read(self) -> dict[str, float]:
        """Moves what is pending to the host and returns its means (of the steps that were applied); all ranks call."""
        if self.pending:
            names = list(self.pending[0][2])
            own = torch.stack([torch.stack([f[n].float() for n in names]) for *_, f in self.pending])
            rows = [dict(zip(names, values, strict=True)) for values in mean_over_ranks(own).tolist()]
            good = [row for row in rows if row["applied"]]
            self._check(rows, own)
            self._add(good)
            self.recent = {n: sum(row[n] for row in good) / len(good) for n in names} if good else self.recent
            self.pending.clear()
        return self.recent

    def _add(self, rows: list[dict[str, float]]) -> None:
        for row in rows:
            for name, value in row.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def _check(self, rows: list[dict[str, float]], own: Tensor) -> None:
        """`own` are this rank's figures, for the report of what happened here."""
        for (step, indices, _), row, values in zip(self.pending, rows, own, strict=True):
            overflow = self.scaled and math.isfinite(row["loss"])
            self.streak = 0 if row["applied"] else self.streak + 1
            if not row["applied"] and not overflow:
                self._report(step, indices, dict(zip(row, values.tolist(), strict=True)))
            if self.streak > self.max_nonfinite + overflow * self.scaler_halvings:
                raise NonFiniteError(
                    f"{self.streak} optimizer steps in a row had a loss or gradient that is not finite (--max_nonfinite"
                    f" {self.max_nonfinite}); weights, optimizer and teacher are as before them. Lower --lr, set "
                    f"--clip_grad, or look at the batches listed in {self.folder or 'the log'}"
                )

    def _report(self, step: int, indices: list[Tensor], row: dict[str, float]) -> None:
        samples = torch.cat(indices).tolist() if indices else []
        log.warning("step %d skipped: loss %s, grad norm %s", step, row["loss"], row["grad_norm"])
        if self.folder:
            report = {"step": step, "loss": str(row["loss"]), "grad_norm": str(row["grad_norm"]), "indices": samples}
            write_text(Path(self.folder) / f"nonfinite-{step}-rank{self.rank}.json", json.dumps(report))

    def means(self) -> dict[str, float]:
        """Averages since the last reset."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums if name != "applied"}

    def state(self) -> dict:
        return {"sums": dict(self.sums), "counts": dict(self.counts), "streak": self.streak}

    def load(self, state: dict) -> None:
        self.sums, self.counts, self.streak = dict(state["sums"]), dict(state["counts"]), state["streak"]

    def reset(self) -> None:
        self.sums, self.counts = {}, {}


class Throughput:
    """Images a second, the share of time spent waiting for data, MFU, and the time left.

    `flops_per_image` are those of the model: what --grad_checkpointing computes again is no use of the device.
    """

    def __init__(self, images_per_step: int, flops_per_image: float | None, peak: float | None):
        self.images_per_step, self.flops_per_image, self.peak = images_per_step, flops_per_image, peak
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def timed(self, loader: Iterable) -> Iterable:
        """Passes batches on and adds up the time that they took to come."""
        batches = iter(loader)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - begin
            yield batch

    def figures(self) -> dict[str, float]:
        """Since the last call: images/s over all ranks, data wait in percent, MFU in percent if the peak is known."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        rate = self.steps * self.images_per_step / elapsed
        figures = {
            "images_per_s": rate,
            "data_wait": 100 * self.waited / elapsed,
            "s_per_step": elapsed / max(self.steps, 1),
        }
        if self.flops_per_image and self.peak:
            figures["mfu"] = 100 * rate * self.flops_per_image / self.peak
        self.restart()
        return figures


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense peak in FLOP/s at this precision, None where it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    tflops = peak_tflops(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def peak_tflops(name: str) -> float | None:
    """The value of `PEAK_TFLOPS` with the most words in a device's name, None without one."""
    words = set(re.split(r"[\s-]+", name.upper()))
    known = [key for key in PEAK_TFLOPS if set(key.upper().split()) <= words]
    if not known or words & OTHER_DEVICES:
        return None
    return PEAK_TFLOPS[max(known, key=lambda key: len(key.split()))]


def count_flops(step, *args) -> float:
    """FLOPs of step(*args) by torch's counter, two for each multiply-add.

    The counter does not know the fused attention of CPUs: it is given the products of the explicit form.
    """
    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, *qkv, **_: 2 * _attention_flops(*qkv),
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        step(*args)
    return float(counter.get_total_flops())


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_, **__) -> int:
    """Of q k^T and its product with v; shapes [B, h, T, d]."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def memory_gib(device: torch.device) -> float:
    """Peak memory of the device so far; on a CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def refused(sentence: str) -> Iterator[None]:
    """ValueError of that sentence and the network's own words in place of what a network raises that does not fit."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{sentence}: {' '.join(str(error).split())}") from error


def keep_freed_memory(keep: bool = True) -> None:
    """Lets glibc's malloc keep what a step frees for the next one; `keep` False is its default again.

    By default large blocks go back to the kernel, which then hands out zeroed pages anew: a step on a CPU is 1.1 to 1.3
    times as long (docs/benchmarks.md). What was kept in the heap's middle until then stays in use with `keep` False:
    only a new process is without it. Nothing happens with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0 if keep else 2**16)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1 if keep else 2**17)  # M_TRIM_THRESHOLD


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def clock(seconds: float) -> str:
    """1:02:03 of 3723 seconds."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


class Progress:
    """A bar on a terminal, a plain line every `every` steps elsewhere; silent on ranks other than 0."""

    def __init__(self, title: str, total: int, start: int, *, every: int, rank: int):
        self.title, self.total, self.every, self.rank = title, total, every, rank
        self.bar = None
        if rank == 0 and sys.stdout.isatty():
            self.bar = tqdm(total=total, initial=start, desc=title, dynamic_ncols=True, file=sys.stdout)

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.total

    def show(self, step: int, figures: dict[str, str]) -> None:
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
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
