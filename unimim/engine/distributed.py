"""Joins processes, exchanges values between ranks, handles signals, and seeds steps."""

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# first imported inside a process group, its default arguments would hold the group for ever
import torch.distributed.nn.functional
from torch import Tensor

from unimim.engine.lock import release_all
from unimim.engine.writing import wait_for_writers
from unimim.processes import has_peers, in_group

WRITE_SECONDS = 30  # for a checkpoint that is being written when a rank ends at once

before_leaving: list[Callable[[], None]] = []  # what `leave_process_group` calls, once


@dataclass(frozen=True)
class Place:
    """The rank of a process, and where the processes meet if the launcher says so."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int | None = None


def init_distributed(args: Namespace) -> torch.device:
    """Join the group of processes and sets args.rank, args.world_size and args.local_rank."""
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
    """Return the rank that a launcher's variables give this process.

    Order: OpenMPI with --dist_on_itp, torchrun and deepspeed (RANK), srun, else one process.
    `local_rank` is the flag.
    """
    if openmpi:
        return Place(
            *(int(env[f"OMPI_COMM_WORLD_{key}"]) for key in ("RANK", "SIZE", "LOCAL_RANK"))
        )
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(
            int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", max(local_rank, 0)))
        )
    return slurm_place(env)


def slurm_place(env: Mapping[str, str]) -> Place:
    """Return the rank of one of srun's tasks; a lone process outside of a job step, as in a batch
    script.

    Without MASTER_ADDR the tasks meet on the step's first host, at a port that follows from the job
    and the step.
    """
    tasks = int(
        env.get("SLURM_STEP_NUM_TASKS")
        or (env.get("SLURM_NTASKS", 1) if "MASTER_ADDR" in env else 1)
    )
    if tasks == 1 or "SLURM_PROCID" not in env:
        return Place()
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    address = env.get("MASTER_ADDR") or (
        first_host(nodes) if nodes else env.get("SLURM_LAUNCH_NODE_IPADDR")
    )
    if not address:
        raise ValueError(
            f"srun started {tasks} tasks, but neither SLURM_STEP_NODELIST nor MASTER_ADDR says "
            "where they meet; export MASTER_ADDR as the first of the job's hosts"
        )
    job = int(env.get("SLURM_JOB_ID", 0))
    step = int(env.get("SLURM_STEP_ID", 0))
    port = 10000 + (101 * job + step) % 20000  # below the ports that the kernel hands out
    one_gpu = re.fullmatch(r"[^,]+", env.get("CUDA_VISIBLE_DEVICES", "")) is not None
    local_rank = 0 if one_gpu else int(env["SLURM_LOCALID"])
    return Place(int(env["SLURM_PROCID"]), tasks, local_rank, address, port)


def first_host(hosts: str) -> str:
    """Return the first name of a host list in SLURM's notation: "gpu07" of
    "gpu[07-12,15],login"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", hosts)
    if first is None:
        raise ValueError(
            f"{hosts!r} is not a list of hosts; export MASTER_ADDR as the first of the job's hosts"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def choose_device(args: Namespace) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        args.device = "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(args.local_rank)
        return torch.device("cuda", args.local_rank)
    return torch.device(args.device)


def join_process_group(args: Namespace, device: torch.device, place: Place) -> None:
    """Join the process group, which a lone process under DeepSpeed needs too.

    On GPUs the group has a side for the host's tensors: what is agreed on there waits for no
    device.
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
        device_id=device
        if on_gpus and args.world_size > 1
        else None,  # a lone rank has no one to connect to
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_first_rank() -> bool:
    """Return whether this process is rank 0, as one without a group is."""
    return not in_group() or dist.get_rank() == 0


def leave_process_group() -> None:
    """Leave the group and ends gloo's threads.

    A thread that frees a tensor while the interpreter shuts down aborts the process.

    DeepSpeed keeps its engine, and so the threads, until the process ends.
    """
    while before_leaving:
        before_leaving.pop()()
    if in_group():
        dist.destroy_process_group()
        gc.collect()  # DDP lies in reference cycles and holds the group


def exit_at_once(code: int) -> None:
    """End this process with what it has logged, without waiting for peers that may not answer.

    A checkpoint that is being written is finished, if that takes no more than half a minute.

    They sit in a collective, where destroying the group would wait for them; a lost connection or
    the launcher ends them. Loader workers go with their parent.
    """
    wait_for_writers(WRITE_SECONDS)
    release_all()
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or on a full disk
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
    """Return the sum over all processes; `values` is changed in place."""
    if in_group():
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean over all processes in a new tensor."""
    return reduce_sum(values.clone()) / (dist.get_world_size() if in_group() else 1)


def from_first_rank(value):
    """Return rank 0's value of a plain object on every process."""
    if not in_group():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Return the plain objects of all processes, in the order of ranks, on every process."""
    if not in_group():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class StopSignal:
    """Turns SIGTERM, SIGINT or SIGUSR1 into a request to stop, on which all ranks agree.

    Launchers and schedulers repeat what they have sent already, so repeats change nothing. Only
    SIGINT, that is Ctrl-C, ends the process at once when it comes again more than `patience`
    seconds after the first.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    patience = 2.0
    began = False  # in this process

    def __init__(self):
        StopSignal.began = True
        self.received: str | None = None
        self.votes = torch.zeros(1)  # on the host: to ask there waits for no device
        self.voting: dist.Work | None = None
        self.may_interrupt: threading.Timer | None = None
        self.handlers = {number: signal.signal(number, self._remember) for number in self.signals}

    def release(self) -> None:
        """Give signals back to who had them before, with a request that came too late for a
        step."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self.received:
            signal.raise_signal(signal.Signals[self.received])

    @property
    def reason(self) -> str:
        """The signal that all ranks stop for, once they have agreed."""
        return self.received or "a signal on another rank"

    def _remember(self, number: int, _frame) -> None:
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT and self.may_interrupt is None:
            self.may_interrupt = threading.Timer(self.patience, _default_interrupt)
            self.may_interrupt.daemon = True
            self.may_interrupt.start()

    def agreed(self, *, last: bool = False) -> bool:
        """Return whether any rank has been asked to stop; all ranks call it once a step.

        Among several ranks the answer is that to the votes of the step before, which have arrived
        meanwhile; in the `last` step of an epoch it is waited for. A lone process looks at its own
        request.
        """
        if not has_peers():
            return self.received is not None
        if self._result():
            return True
        self.votes.fill_(self.received is not None)
        self.voting = dist.all_reduce(self.votes, async_op=True)
        return last and self._result()

    def _result(self) -> bool:
        """Return the outcome of the vote under way, False without one."""
        if self.voting is None:
            return False
        self.voting.wait()
        self.voting = None
        return bool(self.votes > 0)


def _default_interrupt() -> None:
    """Give SIGINT its default action, which also ends a process that is stuck outside of Python.

    Python's `signal` would do so on the main thread only, and that one may be stuck.
    """
    ctypes.pythonapi.PyOS_setsig(ctypes.c_int(signal.SIGINT), ctypes.c_void_p(signal.SIG_DFL))


def seed_step(seed: int, rank: int, step: int) -> None:
    """Make all random numbers of this process from here on a function of (seed, rank, step).

    Called before each optimizer step: a resumed run then draws what the uninterrupted one drew.
    """
    state = np.random.SeedSequence([seed, rank, step]).generate_state(3)
    # before CUDA has started, torch.manual_seed formats a traceback for it, a millisecond a step
    seed_torch = (
        torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed
    )
    seed_torch(int(state[0]))
    np.random.seed(int(state[1]))
    random.seed(int(state[2]))
