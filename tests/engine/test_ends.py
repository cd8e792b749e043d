"""What ends a run from outside is one sentence, whatever the words of the library that met it."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest
from helpers import ROOT, own_signals

from unimim.early import launcher_words, parent_of, status_among
from unimim.engine.distributed import free_port
from unimim.engine.setup import launch
from unimim.errors import explain
from unimim.logs import setup_logging

SHM = "unable to open shared memory object </torch_12_34_5> in read-write mode: "
BUS = (
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory."
)


def torchs_own(text: str, context: Exception) -> Exception:
    error = RuntimeError(text)
    error.__context__ = context
    return error


def of_disk(number: int, path: str | None = "/out/x.pth") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (of_disk(errno.ENOSPC), "the disk is full (/out/x.pth: No space left on device)"),
        (of_disk(errno.EDQUOT, None), "the disk is full (Disk quota exceeded)"),
        (torchs_own("unexpected pos 64 vs 0", of_disk(errno.ENOSPC)), "the disk is full (/out"),
        (RuntimeError("write: No space left on device (os error 28)"), "the disk is full"),
        (of_disk(errno.EACCES), "the system refuses a file (/out/x.pth: Permission denied)"),
        (of_disk(errno.EROFS, None), "the system refuses a file (Read-only file system)"),
        (of_disk(errno.EMFILE), "too many open files"),
        (RuntimeError(SHM + "Too many open files (24)"), "too many open files"),
        (RuntimeError("received 0 items of ancdata"), "too many open files"),
        (RuntimeError(SHM + "No space left on device (28)"), "not enough shared memory (/dev/shm)"),
        (of_disk(errno.ENOSPC, "/dev/shm/sem.x"), "not enough shared memory (/dev/shm)"),
        (RuntimeError(BUS), "not enough shared memory (/dev/shm)"),
        (RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly"), "a worker that loads"),
        (ConnectionResetError(104, "Connection reset by peer"), "a worker that loads images"),
        (MemoryError(), "the machine's memory is full"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU's memory is full"),
    ],
)
def test_the_surroundings_are_explained(error, says, capfd):
    assert says in explain(error)

    def main(_):
        raise error

    setup_logging(0)
    with own_signals(), pytest.raises(SystemExit) as end:
        launch(main, Namespace())
    (line,) = capfd.readouterr().out.splitlines()
    assert end.value.code == 1 and line.startswith("error: ") and says in line


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), KeyError("x"), RuntimeError("shapes differ"), OSError("odd")]
)
def test_mistakes_of_the_code_keep_their_traceback(error):
    assert explain(error) is None


@pytest.mark.parametrize("closed", [False, True])
def test_the_log_takes_any_name_and_a_closed_output(closed):
    program = (
        "from unimim.logs import log, setup_logging\nsetup_logging(0)\n"
        "log.info('\\udcff.jpg \u4e2d')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True,
        preexec_fn=(lambda: os.close(1)) if closed else None,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == (b"" if closed else b"\\udcff.jpg \\u4e2d\n")


@pytest.mark.parametrize(
    ("number", "flags", "status"),
    [
        (signal.SIGTERM, {"stop_status": 0, "eval": False}, 0),
        (signal.SIGINT, {"stop_status": 75}, 75),
        (signal.SIGUSR1, {}, 75),
        (signal.SIGTERM, {"stop_status": 0, "eval": True}, 75),
    ],
    ids=["training", "as told", "no training", "evaluation"],
)
def test_a_signal_before_the_first_step_ends_in_order(number, flags, status):
    """What is left undone is begun anew by the same command, unless it trains: 75."""
    program = (
        "import time\nfrom argparse import Namespace\nfrom unimim.engine.setup import launch\n"
        "def main(args):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        f"launch(main, Namespace(**{flags}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert said == f"stopped by {number.name} before the first step\n"
    assert process.returncode == status


@pytest.mark.parametrize("during", [True, False])
def test_a_signal_after_the_last_step_ends_what_follows(during):
    """As the extraction of parts, which looks at no requests; one that came too late counts."""
    program = (
        "import signal, time\nfrom argparse import Namespace\n"
        "from unimim.engine.distributed import StopSignal\n"
        "from unimim.engine.setup import launch\n"
        "def main(args):\n    stop = StopSignal()\n"
        f"    if {during}:\n        signal.raise_signal(signal.SIGTERM)\n"
        "    print('ready', flush=True)\n    stop.release()\n    time.sleep(60)\n"
        "launch(main, Namespace(stop_status=0))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    if not during:
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    with process.stdout:  # its buffer may hold the line already
        assert process.stdout.read() == "stopped by SIGTERM after the last step\n"
    assert process.wait(timeout=20) == 0


def test_a_script_leaves_the_signals_as_it_found_them():
    """As do many in one process, in the demo and in tests; no thread waits for ever."""

    def main(_):
        seen.append((signal.getsignal(signal.SIGTERM), threading.active_count()))

    seen = []
    before = signal.getsignal(signal.SIGTERM), threading.active_count()
    for _ in range(2):
        launch(main, Namespace())
        assert (signal.getsignal(signal.SIGTERM), threading.active_count()) == before
    assert seen[0] == seen[1] and seen[0][0] != before[0] and seen[0][1] == before[1] + 1


def test_a_signal_ends_a_rank_that_waits_for_the_others():
    """In the rendezvous Python calls no handler."""
    program = (
        "import torch.distributed as dist\nfrom argparse import Namespace\n"
        "from unimim.engine.setup import launch\n"
        "def main(args):\n    print('ready', flush=True)\n    dist.init_process_group('gloo')\n"
        "launch(main, Namespace())"
    )
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, env=os.environ | place | {"MASTER_PORT": str(free_port())}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopped by SIGTERM before the first step\n"
    assert process.returncode == os.EX_TEMPFAIL


@pytest.mark.parametrize(("words", "status"), [((), 0), (("--stop_status", "75"), 75)])
def test_a_signal_during_the_imports_ends_in_order(tmp_path, words, status):
    """The script hangs in its first heavy import."""
    (tmp_path / "torch.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_pretraining.py"), *words],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "stopped by SIGINT before the first step\n"
    assert process.returncode == status


PRINTING = """
import io, os, signal, sys

class Output(io.RawIOBase):
    def writable(self):
        return True
    def fileno(self):
        return 1
    def write(self, data):
        signal.raise_signal(signal.SIGTERM)
        return len(data)

sys.stdout = io.TextIOWrapper(io.BufferedWriter(Output()))
print("more than is seen", flush=True)
"""


def test_a_signal_in_the_middle_of_a_print_ends_in_order(tmp_path):
    """Where Python refuses to print once more."""
    (tmp_path / "torch.py").write_text(PRINTING)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_pretraining.py")], timeout=60, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "stopped by SIGTERM before the first step\n")
    assert done.stderr == ""


def test_the_status_is_read_before_the_flags_are():
    assert status_among(["--epochs", "3"]) == status_among(["--stop_status", "x"]) == 0
    assert status_among(["--stop_status", "1", "--stop_status=75", "--seed", "1"]) == 75
    assert status_among(["--eval"]) == 75


def test_launchers_are_told_from_other_parents():
    """By their commands: what a shell or pytest has started is not ended with it."""
    assert parent_of(os.getpid()) == os.getppid() and parent_of(2**22 + 1) == 0
    assert launcher_words(os.getpid()) == "" and launcher_words(2**22 + 1) == ""
    for words, said in (
        (["-m", "deepspeed.launcher.launch"], "deepspeed.launcher.launch"),
        (["-m", "torch.distributed.run", "x.py"], "torch.distributed.run"),
        (["/usr/bin/torchrun"], "torchrun"),
        (["x.py", "--launcher=torchrun"], ""),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        process.stdout.readline()
        try:
            assert launcher_words(process.pid) == said
        finally:
            process.communicate(b"\n")
