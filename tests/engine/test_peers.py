"""A rank that ends takes the others with it: with a sentence that names it, whatever they wait
for."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import TextIO

import pytest
from helpers import ROOT, environment

from unimim.engine.distributed import free_port

# Ranks are forked when the imports are done, each with the descriptor that it writes to.
RANKS = """
import os, signal, sys, time
from argparse import Namespace
import torch.distributed as dist
from unimim.engine import setup
from unimim.engine.distributed import leave_process_group
from unimim.engine.peers import watch_peers
from unimim.logs import setup_logging

def main(args):
    dist.init_process_group("gloo")
    setup_logging(dist.get_rank())
    watch_peers(stop_status=0)
    print("ready", flush=True)
    if args.what == "error" and dist.get_rank() == 1:
        time.sleep(0.5)
        raise ValueError("a mistake of mine")
    if args.what == "stop" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if args.what == "leave":
        time.sleep(dist.get_rank() * 0.7)  # one after the other
        return
    while args.what != "collective":
        time.sleep(0.1)  # as a rank that waits for a GPU does not look at its connections
    while True:
        dist.barrier()

what, *outputs = sys.argv[1:]
outputs = list(map(int, outputs))
pids = []
for rank, output in enumerate(outputs):
    pids.append(os.fork())
    if pids[-1] == 0:
        os.environ["RANK"] = str(rank)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for each in outputs:
            os.close(each)
        setup.launch(main, Namespace(what=what, stop_status=0))
        sys.exit()
for each in outputs:
    os.close(each)
print(*pids, flush=True)
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


@dataclass
class Ranks:
    """Ranks that run: what has forked them, their ids and what they write."""

    parent: subprocess.Popen
    pids: list[int]
    outputs: list[TextIO]

    def end(self) -> tuple[list[str], list[int]]:
        """Wait for all ranks, and return what each said after "ready" and how it ended."""
        said = []
        for output in self.outputs:
            with output:  # its buffer may hold some of it already
                said.append(output.read())
        with self.parent.stdout:
            codes = [int(code) for code in self.parent.stdout.read().split()]
        self.parent.wait(timeout=60)
        return said, codes


def start_ranks(what: str, count: int) -> Ranks:
    """Start the ranks, and wait until all are ready."""
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = [os.pipe() for _ in range(count)]
    writers = [writer for _, writer in pipes]
    parent = subprocess.Popen(
        [sys.executable, "-c", RANKS, what, *map(str, writers)],
        cwd=ROOT, env=environment() | place, pass_fds=writers, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for writer in writers:
        os.close(writer)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    outputs = [os.fdopen(reader) for reader, _ in pipes]
    for output in outputs:
        for line in output:
            if line == "ready\n":
                break
    return Ranks(parent, pids, outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "count", "dies"), [("collective", 2, 1), ("wait", 3, 2), ("wait", 3, 0)]
)
def test_a_killed_rank_is_named_by_the_others(what, count, dies):
    ranks = start_ranks(what, count)
    os.kill(ranks.pids[dies], signal.SIGKILL)
    outputs, codes = ranks.end()
    name = f"rank {dies} ({socket.gethostname()}, process {ranks.pids[dies]}) has ended,"
    for rank, output in enumerate(outputs):
        if rank != dies:
            assert name in output and "Traceback" not in output, output
            assert len(output.splitlines()) == 1
    assert codes == [-signal.SIGKILL if rank == dies else 1 for rank in range(count)]


@pytest.mark.slow
def test_a_rank_with_a_mistake_of_its_own_says_so_and_ends_all():
    outputs, codes = start_ranks("error", 2).end()
    assert outputs[1] == "[rank 1] error: a mistake of mine\n"
    assert "has ended with an error, so this one ends too" in outputs[0], outputs[0]
    assert codes == [1, 1]


@pytest.mark.slow
def test_a_rank_that_is_stopped_before_its_first_step_stops_all():
    outputs, codes = start_ranks("stop", 3).end()
    assert outputs[1] == "[rank 1] stopped by SIGTERM before the first step\n"
    said = "was stopped by a signal before its first step, so this one ends too"
    assert said in outputs[0] and "error" not in outputs[0] and outputs[2] == ""
    assert codes == [0, 0, 0]


@pytest.mark.slow
def test_ranks_that_leave_in_order_end_nobody():
    outputs, codes = start_ranks("leave", 2).end()
    assert outputs == ["", ""] and codes == [0, 0]
