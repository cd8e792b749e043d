"""Read the files of a data set from folders, or from zip archives in place."""

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from unimim.data.file_index import PathTable, locate, zip_members
from unimim.data.jpeg import BrokenImageError

Key = tuple[int, int]  # (epoch, index); a negative index -1-i loads image i as padding


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
            with open(self.path(index), "rb") as file:
                return file.read()
        except OSError as error:
            raise BrokenImageError(error.strerror or str(error)) from error


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
    }


class ZipFiles:
    """The members `names` of a zip archive, stored or deflated, read in place.

    Offsets are looked up once, unless `members` has the result of `locate_members`. Each process
    opens the memory map when it first reads; the map is never inherited or pickled. A name that the
    archive lacks is a broken image.

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
        self._map = None
        self._pid = None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return f"{self.archive}@/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """Return the bytes of member `index`.

        Checksums are not compared: the image decoder notices most damage.
        """
        if self.offset[index] < 0:
            raise BrokenImageError("not in the archive")
        content = self._content()
        start = self._data_start(content, int(self.offset[index]))
        packed = content[start : start + int(self.packed_size[index])]
        if len(packed) < self.packed_size[index]:
            raise BrokenImageError("the archive ends inside this member")
        return _unpack(packed, int(self.method[index]), int(self.size[index]))

    def _content(self) -> mmap.mmap:
        """Return the archive's memory map, opened anew in a forked process."""
        if self._pid != os.getpid():
            with open(self.archive, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._pid = os.getpid()
        return self._map

    @staticmethod
    def _data_start(content: mmap.mmap, offset: int) -> int:
        """Return where a member's data begins, given the offset of its local header."""
        # the local header's name and extra lengths may differ from the central directory's
        header = content[offset : offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise BrokenImageError("no member starts where the archive's directory says")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        return offset + 30 + name_length + extra_length

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None, "_pid": None}


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    """Return a member's content; raise BrokenImageError if it cannot be unpacked."""
    if method == zipfile.ZIP_STORED:
        return packed
    if method != zipfile.ZIP_DEFLATED:
        raise BrokenImageError(f"compression method {method} is not supported; store or deflate")
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed)
    except zlib.error as error:
        raise BrokenImageError(str(error)) from error
    if len(data) != size:
        raise BrokenImageError(f"inflates to {len(data)} bytes instead of {size}")
    return data
