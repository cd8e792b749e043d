"""Arrays that are made once on a machine and mapped by all of its ranks, which then share their
pages.

They lie in a folder of the user's own below the temporary one (TMPDIR moves it), a file for each
list, and serve later runs as long as what they were made from is unchanged.
"""

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unimim.files import write_atomically
from unimim.logs import log
from unimim.processes import has_peers

Arrays = dict[str, np.ndarray]

SHARED_BYTES = 2**22  # a shorter list is parsed in a moment
_FORMAT = "unimim arrays 2"
_HEADER_BYTES = 2**12
_ALIGNMENT = 64


def shared_arrays(kind: str, sources: Sequence[Path], make: Callable[[], Arrays]) -> Arrays:
    """Return what `make()` does, which depends on nothing but the files `sources`.

    Among several ranks the first of a machine to come makes the arrays and writes them, the others
    wait for it and map the file. Each makes its own where the first source is a short list, or
    where nothing can be written. No file of another user, format or state of the sources is read.
    """
    if not has_peers() or not sources[0].is_file() or sources[0].stat().st_size < SHARED_BYTES:
        return make()
    try:
        key = _key_of(kind, sources)
        path = own_folder() / f"{hashlib.sha256(repr(key[:2]).encode()).hexdigest()[:24]}.arrays"
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        log.warning("%s is not shared among ranks: %s", sources[0], error)
        return make()
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(OSError, ValueError):
            return _mapped(path, key)
        arrays = make()
        try:
            write_atomically(path, lambda file: _write(file, key, arrays))
            return _mapped(path, key)
        except (OSError, ValueError) as error:
            log.warning("%s is not shared among ranks: %s", sources[0], error)
            return arrays


def _key_of(kind: str, sources: Sequence[Path]) -> list[Any]:
    """What the arrays depend on: their kind, the files and the state that these are in."""
    paths = [os.fsencode(path.resolve()).hex() for path in sources]
    states = [path.stat() for path in sources]
    return [
        kind, paths, _FORMAT,
        [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino] for s in states],
    ]  # fmt: skip


def own_folder() -> Path:
    """The user's folder for such files; OSError where another user could write there."""
    folder = Path(tempfile.gettempdir()) / f"unimim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder that you alone may write to")
    return folder


def _write(file: BinaryIO, key: list[Any], arrays: Arrays) -> None:
    """A header of fixed length, then the arrays as they are in memory."""
    described, end = {}, _HEADER_BYTES
    for name, array in arrays.items():
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        described[name] = [array.dtype.str, array.shape, begin]
        end = begin + array.nbytes
    header = json.dumps({"key": key, "arrays": described, "bytes": end}).encode()
    if len(header) > _HEADER_BYTES:
        raise ValueError("the paths are too long")
    file.write(header.ljust(_HEADER_BYTES))
    for name, array in arrays.items():
        file.seek(described[name][2])
        file.write(np.ascontiguousarray(array).data)
    file.truncate(end)


def _mapped(path: Path, key: list[Any]) -> Arrays:
    """The arrays of the file; ValueError or OSError unless it is a whole one with this key."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid():
            raise ValueError(f"{path} is another user's")
        header = json.loads(file.read(_HEADER_BYTES))
        if header["key"] != key or header["bytes"] != found.st_size:
            raise ValueError(f"{path} was made from something else")
        return {
            name: _view(file, np.dtype(dtype), tuple(shape), begin)
            for name, (dtype, shape, begin) in header["arrays"].items()
        }


def _view(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], begin: int) -> np.ndarray:
    """An array in the file, read-only; a plain one, which is quicker to slice than a memmap."""
    if not all(shape):  # no bytes, which cannot be mapped
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(file, dtype, "r", begin, shape))
