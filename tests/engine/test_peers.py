"""A rank that ends takes the others with it: with a sentence that names it, whatever they wait
for."""

import signal
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, environment

from unimim.engine.distributed import free_port

RANK = """
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

setup.launch(main, Namespace(what=sys.argv[1], stop_status=0))
"""


def start_ranks(what: str, ranks: int) -> list[subprocess.Popen]:
    port = free_port()
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(ranks):
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, what],
                cwd=ROOT,
                env=environment() | place | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in started:
        for line in process.stdout:
            if line == "ready\n":
                break
    return started


def rest_of(process: subprocess.Popen) -> str:
    """Return what a rank says after "ready", some of which the pipe's buffer may hold already."""
    with process.stdout:
        said = process.stdout.read()
    process.wait(timeout=60)
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "count", "dies"), [("collective", 2, 1), ("wait", 3, 2), ("wait", 3, 0)]
)
def test_a_killed_rank_is_named_by_the_others(what, count, dies):
    ranks = start_ranks(what, count)
    ranks[dies].send_signal(signal.SIGKILL)
    for rank, process in enumerate(ranks):
        output = rest_of(process)
        if rank != dies:
            name = f"rank {dies} ({socket.gethostname()}, process {ranks[dies].pid}) has ended,"
            assert name in output and "Traceback" not in output, output
            assert len(output.splitlines()) == 1 and process.returncode == 1


@pytest.mark.slow
def test_a_rank_with_a_mistake_of_its_own_says_so_and_ends_all():
    ranks = start_ranks("error", 2)
    outputs = [rest_of(process) for process in ranks]
    assert outputs[1] == "[rank 1] error: a mistake of mine\n"
    assert "has ended with an error, so this one ends too" in outputs[0], outputs[0]
    assert [process.returncode for process in ranks] == [1, 1]


@pytest.mark.slow
def test_a_rank_that_is_stopped_before_its_first_step_stops_all():
    ranks = start_ranks("stop", 3)
    outputs = [rest_of(process) for process in ranks]
    assert outputs[1] == "[rank 1] stopped by SIGTERM before the first step\n"
    said = "was stopped by a signal before its first step, so this one ends too"
    assert said in outputs[0] and "error" not in outputs[0] and outputs[2] == ""
    assert [process.returncode for process in ranks] == [0, 0, 0]


@pytest.mark.slow
def test_ranks_that_leave_in_order_end_nobody():
    ranks = start_ranks("leave", 2)
    for process in ranks:
        assert rest_of(process) == ""
        assert process.returncode == 0
