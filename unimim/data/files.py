"""Read the files of a data set from folders, or from zip archives in place."""

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from unimim.data.file_index import PathTable, locate, zip_members
from unimim.data.jpeg import BrokenImageError

Key = tuple[int, int]  # (epoch, index); a negative index -1-i loads image i as padding

LARGEST_FILE = 2**30  # bytes; whatever is larger is not one image


class FolderFiles:
    """The files `names` below the folder `root`."""

    def __init__(self, root: Path, names: PathTable | Iterable[str]):
        self.root = root
        self.names = names if isinstance(names, PathTable) else PathTable(names)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        try:
            # a pipe that nobody writes to would otherwise be waited for
            with open(self.path(index), "rb", opener=_open_at_once) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise BrokenImageError("it is not a regular file")
                check_size(found.st_size)
                return file.read()
        except (OSError, ValueError) as error:  # a ValueError for a name with a zero byte
            raise BrokenImageError(getattr(error, "strerror", None) or str(error)) from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def check_size(size: int) -> None:
    """Raise BrokenImageError for a size in bytes that no image has, before memory is taken."""
    if size > LARGEST_FILE:
        raise BrokenImageError(f"its {size} bytes are more than the {LARGEST_FILE} of an image")


def locate_members(archive: Path, names: PathTable) -> dict[str, np.ndarray]:
    """Return where the members `names` of a zip are and how they are packed, one array each.

    The keys are names of attributes of `ZipFiles`; a name that the archive lacks has offset -1.

    Raises:
        ValueError: the file is missing, is not a zip archive, or contains none of the names.
    """
    members = zip_members(archive)
    rows = locate(members.names, names)
    if len(rows) and rows.max() < 0:
        held = members.names[0] if len(members.names) else "nothing"
        raise ValueError(
            f"{archive} holds none of the listed members, such as '{names[0]}'; it holds '{held}'"
        )
    return {
        "offset": np.where(rows < 0, -1, members.offset[rows]),
        "packed_size": members.packed_size[rows],
        "size": members.size[rows],
        "method": members.method[rows].astype(np.int16),
        "crc": members.crc[rows].astype(np.uint32),
    }


class ZipFiles:
    """The members `names` of a zip archive, stored or deflated, read in place.

    Offsets are looked up once, unless `members` has the result of `locate_members`. Each process
    opens the archive when it first reads; a pickled one is opened anew. A name that the archive
    lacks is a broken image, as is one whose bytes differ from the archive's checksum.

    The archive is read rather than mapped: a mapped file that is cut while a run reads it kills
    the process without a word.

    Raises:
        ValueError: the file is missing, is not a zip archive, or contains none of the names.
    """

    def __init__(
        self,
        archive: Path,
        names: PathTable | Iterable[str],
        members: dict[str, np.ndarray] | None = None,
    ):
        self.archive = archive
        self.names = names if isinstance(names, PathTable) else PathTable(names)
        members = locate_members(archive, self.names) if members is None else members
        self.offset = members["offset"]
        self.packed_size = members["packed_size"]
        self.size = members["size"]
        self.method = members["method"]
        self.crc = members["crc"]
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return f"{self.archive}@/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """Return the bytes of member `index`, which have the checksum of the directory."""
        if self.offset[index] < 0:
            raise BrokenImageError("not in the archive")
        try:
            packed = self._packed(int(self.offset[index]), int(self.packed_size[index]))
        except OSError as error:
            raise BrokenImageError(error.strerror or str(error)) from error
        data = _unpack(packed, int(self.method[index]), int(self.size[index]))
        if zlib.crc32(data) != self.crc[index]:
            raise BrokenImageError("its bytes do not have the checksum that the archive states")
        return data

    def _packed(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes of the member whose local header lies at `offset`."""
        check_size(size)
        if self._file is None:
            self._file = open(self.archive, "rb", buffering=0)  # noqa: SIM115 (kept open)
        file = self._file.fileno()
        header = os.pread(file, 30, offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise BrokenImageError("no member starts where the archive's directory says")
        # the local header's name and extra lengths may differ from the central directory's
        start = offset + 30 + sum(struct.unpack("<HH", header[26:]))
        packed = os.pread(file, size, start)
        if len(packed) < size:
            raise BrokenImageError("the archive ends inside this member")
        return packed

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    """Return a member's content; raise BrokenImageError if it cannot be unpacked."""
    if method == zipfile.ZIP_STORED:
        return packed
    if method != zipfile.ZIP_DEFLATED:
        raise BrokenImageError(f"compression method {method} is not supported; store or deflate")
    check_size(size)
    try:
        # one byte more than stated tells of too many, however many there are
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
    except zlib.error as error:
        raise BrokenImageError(str(error)) from error
    if len(data) != size:
        more = "more" if len(data) > size else f"{len(data)}"
        raise BrokenImageError(f"inflates to {more} bytes instead of the {size} that are stated")
    return data
