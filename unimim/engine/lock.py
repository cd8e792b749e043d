"""Lets one run at a time write to an output folder.

The lock is a file that names its run's host and process. One whose process has ended (here), whose
machine was started anew, or that another host no longer touches, is taken over.
"""

import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from unimim import files
from unimim.logs import log

NAME = ".run.lock"
TOUCH_SECONDS = 5  # between two signs of life
SILENT_SECONDS = 45  # without one, after which another host's run is taken for dead


@dataclass(frozen=True)
class Owner:
    """The run that holds a lock; `started` and `boot` tell a process from a later one of its id."""

    host: str
    machine: str
    boot: str
    pid: int
    started: str
    token: str

    @classmethod
    def here(cls) -> "Owner":
        """Return this process, with a new token."""
        return cls(
            socket.gethostname(),
            files.machine(),
            _read("/proc/sys/kernel/random/boot_id"),
            os.getpid(),
            _start_of(os.getpid()),
            secrets.token_hex(8),
        )

    def is_here(self) -> bool:
        return self.machine == files.machine()

    def has_ended(self) -> bool:
        """Return whether a process of this machine has ended."""
        restarted = self.boot != _read("/proc/sys/kernel/random/boot_id")
        return restarted or _start_of(self.pid) != self.started


class FolderLock:
    """Holds `folder` for this process from `acquire` to `release`."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME
        self.owner: Owner | None = None
        self.lost = False  # noticed that the folder was removed, moved or taken
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock; ValueError, naming the host and process, while another run holds it."""
        owner = Owner.here()
        draft = self.path.with_name(f"{NAME}.{owner.token}")
        draft.write_text(json.dumps(asdict(owner)))
        try:
            for _ in range(10):
                if _put(draft, self.path):
                    break
                self._remove_if_stale()
            else:
                raise ValueError(f"{self.path} cannot be taken over; delete it")
        finally:
            draft.unlink()
        self.owner = owner
        threading.Thread(target=self._touch, daemon=True).start()

    def release(self) -> None:
        """Remove the lock, if it is still this process's."""
        self._ended.set()
        if self.owner is not None and self.held():
            with suppress(OSError):
                self.path.unlink()
        self.owner = None

    def held(self) -> bool:
        """Return whether the folder still has this process's lock: it was not removed or moved."""
        return self.owner is not None and _owner_in(self.path) == self.owner

    def _touch(self) -> None:
        """Give signs of life; end the run in order when the lock is gone."""
        while not self._ended.wait(TOUCH_SECONDS):
            if self.held():
                with suppress(OSError):
                    os.utime(self.path)
            elif not self._ended.is_set():
                self.lost = True
                log.error(
                    "error: --output_dir %s was removed, moved or taken by another run while this "
                    "one went on: it saves there once more and ends", self.path.parent,
                )  # fmt: skip
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _remove_if_stale(self) -> None:
        found = _owner_in(self.path)
        if found is not None and not self._is_stale(found):
            raise ValueError(
                f"--output_dir {self.path.parent} is in use by another run: process {found.pid} on "
                f"{found.host}. Wait for it, or name another folder; if it has ended, delete "
                f"{self.path}"
            )
        if found is not None:
            log.warning(
                "%s: taken over from process %d on %s, which has ended",
                self.path, found.pid, found.host,
            )  # fmt: skip
        # renamed first: of several that take it over, one finds it
        gone = self.path.with_name(f"{NAME}.{secrets.token_hex(8)}")
        with suppress(FileNotFoundError):
            os.rename(self.path, gone)
            gone.unlink()

    def _is_stale(self, found: Owner) -> bool:
        if found.is_here():
            return found.has_ended()
        # clocks of hosts differ, so that only a change of its time tells
        log.info("%s is of a run on %s: looking whether it goes on", self.path, found.host)
        before = _time_of(self.path)
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(0.5)
            if _time_of(self.path) != before:
                return False
        return True


_held: list[FolderLock] = []
_allowed = False


@contextmanager
def locks_allowed() -> Iterator[None]:
    """Let `lock_folder` lock inside the context, and release its locks at the end."""
    global _allowed
    _allowed = True
    try:
        yield
    finally:
        _allowed = False
        release_all()


def lock_folder(folder: str | Path) -> None:
    """Lock a folder until the end of a command; a function call within a larger program locks
    nothing."""
    if _allowed:
        lock = FolderLock(folder)
        lock.acquire()
        _held.append(lock)


def release_all() -> None:
    """Release what `lock_folder` has locked."""
    while _held:
        _held.pop().release()


def lost_folder() -> bool:
    """Return whether a folder that this process has locked was removed, moved or taken."""
    return any(lock.lost for lock in _held)


def _put(draft: Path, path: Path) -> bool:
    """Give `draft` the name `path` as well, unless there is such a file; return whether it has."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # no links on this file system
        try:
            with open(path, "x") as file:
                file.write(draft.read_text())
        except FileExistsError:
            return False
    return True


def _owner_in(path: Path) -> Owner | None:
    """Return the owner that a lock names, None without a lock or in one that cannot be read."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _time_of(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _start_of(pid: int) -> str:
    """Return when a process was started, in the kernel's ticks; empty for none."""
    text = _read(f"/proc/{pid}/stat")
    fields = text.rpartition(")")[2].split()
    # a zombie has ended
    return "" if not fields or fields[0] in "ZX" else fields[19]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
