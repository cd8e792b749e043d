"""Ends a script in order when a signal reaches it while its imports are under way.

A script that trains calls `end_on_signals` before it imports anything that takes seconds;
`unimim.engine.setup.launch` takes over from there.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType

UNFINISHED = os.EX_TEMPFAIL  # the exit status of a stopped script that does not train: 75
FLAG = "--stop_status"

_following = False


def end_on_signals() -> None:
    """Let SIGTERM, SIGINT and SIGUSR1, and the launcher's end, end this process in one line."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _end)
    follow_launcher()


def _end(number: int, _frame: FrameType | None) -> None:
    line = f"stopped by {signal.Signals(number).name} before the first step\n"
    try:
        print(line, end="", flush=True)
    except RuntimeError:  # the signal came in the middle of another print
        os.write(sys.stdout.fileno(), line.encode())
    os._exit(status_among(sys.argv[1:]))


def status_among(words: Sequence[str]) -> int:
    """Return the --stop_status in a command's words, 0 without one; 75 with --eval."""
    if "--eval" in words:
        return UNFINISHED
    given = [after for word, after in pairwise(words) if word == FLAG]
    given += [word.partition("=")[2] for word in words if word.startswith(f"{FLAG}=")]
    return int(given[-1]) if given and given[-1].isdecimal() else 0


def follow_launcher() -> None:
    """Send this process a SIGTERM when the launcher that started it has ended without it.

    `deepspeed` starts a launcher of its own, which starts the ranks: both are watched.
    """
    global _following
    if _following:
        return
    _following = True
    expected = {}
    process = os.getpid()
    while words := launcher_words(parent := parent_of(process)):
        expected[process] = parent
        process = parent
        if "torchrun" in words or "torch.distributed" in words:
            break
    if expected and "RANK" in os.environ:
        threading.Thread(target=_follow, args=(expected,), daemon=True).start()


def _follow(expected: dict[int, int]) -> None:
    while all(parent_of(process) == parent for process, parent in expected.items()):
        time.sleep(1)
    logging.getLogger("unimim").error("the launcher has ended; this process ends in order too")
    os.kill(os.getpid(), signal.SIGTERM)


def launcher_words(process: int) -> str:
    """Return the command of a process if it is torchrun or deepspeed, else nothing."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return ""
    words = [os.path.basename(word) for word in os.fsdecode(command).split("\0")[:5]]
    known = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed")
    found = [w for w in words if w in known or w.startswith("deepspeed.launcher")]
    return " ".join(found)


def parent_of(process: int) -> int:
    """Return the id of a process's parent, 0 if there is no such process."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])
