"""Two agents of torchrun, as two machines have them: one loses its process or ends itself, and the
run goes on from the last checkpoint as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import differing, run_command, script, start_command, wait_for

from unimim.checkpoint.files import load_checkpoint
from unimim.engine.distributed import free_port

FLAGS = ("--batch_size", "32", "--epochs", "1", "--save_ckpt_steps", "4")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    ranks = (*TORCHRUN, "--standalone", "--local_addr", "localhost", "--nproc_per_node", "2")
    done = run_command(script("pretrain", folder, *FLAGS, launcher=ranks))
    assert done.returncode == 0, done.stdout
    return folder


def start_agent(folder: Path, port: int) -> subprocess.Popen:
    """Start what one of two machines starts, as docs/engine.md says; both meet at the port."""
    agent = (
        *("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", *TORCHRUN, "--nnodes", "2"),
        *("--nproc_per_node", "1", "--max_restarts", "1", "--rdzv_backend", "c10d"),
        *("--rdzv_endpoint", f"localhost:{port}", "--rdzv_conf", "keep_alive_interval=3"),
        *("--local_addr", "localhost"),
    )
    log = folder / f"agent-{len(list(folder.glob('agent-*')))}.txt"
    with log.open("w") as output:
        return start_command(script("pretrain", folder / "run", *FLAGS, launcher=agent), output)


def listens(port: int) -> bool:
    """Return whether a server of this machine listens at the port."""
    lines = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    return any(f":{port:04X} " in line and " 0A " in line for line in lines.splitlines())


def rank_of(agent: subprocess.Popen) -> int:
    """Return the id of the process that an agent has started."""
    threads = Path(f"/proc/{agent.pid}/task").iterdir()
    (found,) = [word for thread in threads for word in (thread / "children").read_text().split()]
    return int(found)


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["process", "agent"])
def test_a_run_goes_on_exactly_after_the_end_of(ends, tmp_path, whole):
    port = free_port()
    agents = [start_agent(tmp_path, port)]
    try:
        wait_for(lambda: listens(port), agents[0])  # it holds the meeting, so the other one may go
        agents.append(start_agent(tmp_path, port))
        wait_for((tmp_path / "run/checkpoint-0-8.pth").exists, agents[0])
        rank = rank_of(agents[1])
        if ends == "agent":  # a machine that goes, and is started anew
            agents[1].kill()
            agents[1].wait()
            os.kill(rank, signal.SIGKILL)
            agents[1] = start_agent(tmp_path, port)
        else:
            os.kill(rank, signal.SIGKILL)
        for agent in agents:
            assert agent.wait(timeout=150) == 0, said(tmp_path)
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    assert "at epoch 0, step " in said(tmp_path)
    ours, theirs = (
        load_checkpoint(path / "checkpoint-0.pth") for path in (tmp_path / "run", whole)
    )
    for key in ("model", "teacher", "optimizer", "rng", "monitor"):
        assert differing(ours[key], theirs[key]) == [], key
    assert (tmp_path / "run/log.txt").read_text() == (whole / "log.txt").read_text()


def said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("agent-*.txt")))
