"""Writes files and folders that appear whole or not at all, and checks files.

A draft lies beside what it will replace, as `.NAME.MACHINE-PID-RANDOM.tmp`: no two writers share
one, and one whose writer is gone can be told from one that is being written.
"""

import csv
import hashlib
import io
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

STALE_SECONDS = 24 * 3600  # a draft that nothing was written to for so long is given up
_DRAFT = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")


# --- writing --------------------------------------------------------------------------------------


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace `path` by what `write(file)` writes.

    At any moment it is the old file or the whole new one, on the disk.

    Several processes may write the same name: the last to finish wins. Where `write` raises,
    nothing is left behind. A folder that is gone is made, and `write` called again if it goes
    meanwhile.
    """
    path = Path(path)
    try:
        _write_atomically(path, write)
    except FileNotFoundError:
        if path.parent.is_dir():
            raise
        _write_atomically(path, write)  # the folder went while it was written to


def _write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_drafts(path.parent)
    draft = _draft_of(path)
    try:
        with open(draft, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    fsync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file, in UTF-8, in one step."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_rows(path: str | Path, rows: Sequence[Any]) -> None:
    """Replace a CSV file by dataclass instances of one kind, under the names of their fields."""
    write_table(path, [asdict(row) for row in rows])


def write_table(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace a CSV file by rows with the same keys, under these keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_folder(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Make the new (or empty) folder `path` of what `write(draft)` puts into a draft, all at
    once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_drafts(path.parent)
    draft = _draft_of(path)
    draft.mkdir()
    try:
        write(draft)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    fsync(path.parent)


def check_output_folder(flag: str, folder: str | Path) -> None:
    """Make the folder that `flag` names; ValueError if it cannot be made or written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(
            f"{flag} {folder} is not a folder that can be written to ({reason}); name another"
        ) from error


def fsync(path: str | Path) -> None:
    """Return when the file's bytes, or the folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_drafts(folder: str | Path) -> None:
    """Remove drafts of writers of this machine that have ended, and drafts older than a day."""
    for draft in Path(folder).glob(".*.tmp"):
        with suppress(OSError):  # its writer has just finished, or it is another user's
            if not _is_stale(draft):
                continue
            if draft.is_file():
                draft.unlink()
            elif _DRAFT.fullmatch(draft.name):
                shutil.rmtree(draft)


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _is_stale(draft: Path) -> bool:
    owner = _DRAFT.fullmatch(draft.name)
    if owner and owner[1] == machine() and not _is_running(int(owner[2])):
        return True
    return time.time() - draft.stat().st_mtime > STALE_SECONDS


@cache
def machine() -> str:
    """Return eight digits for the host and the container, in which process ids are unique."""
    place = socket.gethostname()
    if os.path.exists("/proc/self/ns/pid"):
        place += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


# --- checking -------------------------------------------------------------------------------------


def file_sha256(path: str | Path) -> str:
    """Return the file's SHA-256 in hexadecimal; ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def begins_as_zip(path: str | Path) -> bool:
    """Return whether a file begins as a zip archive (torch's files are such), whole or not."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def is_intact_zip(path: str | Path) -> bool:
    """Return whether every member of a zip archive (torch's files are such) has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged bytes raise anything
        return False
