"""Read images from tar shards of WebDataset's kind, in place (--data_set tar).

Shards are gone through once; the index, where each image begins and its label, lies beside them and
serves as long as no shard changes. From then on an image is read like a member of a zip: any worker
reads any image, in any order.
"""

import glob
import json
import os
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unimim.data.file_index import ARRAY_EXTENSION, IMAGE_EXTENSIONS, LARGEST_LABEL, PathTable
from unimim.data.files import check_size
from unimim.data.jpeg import BrokenImageError
from unimim.data.shard_index import ShardIndex
from unimim.data.shared_index import Arrays
from unimim.logs import log

LABEL_FIELD = "label"  # of a sample's json
OPEN_SHARDS = 64  # of each process
# how the names of a split's shards begin, or a word in them: imagenet1k-validation-00.tar
SPLITS = {
    True: re.compile(r"train|.*[-_.]train(ing)?[-_.\d]"),
    False: re.compile(r"val|.*[-_.](val|valid|validation)[-_.\d]"),
}
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # WebDataset's: up to the first dot
_BRACES = re.compile(r"\{([^{}]*)\}")


# --------------------------------------------------------------------------------------------------
# Which shards


def shards_of(data_path: str, *, train: bool) -> list[Path]:
    """Return the shards that --data_path names, in order: a file, a pattern with braces or with *
    and ?, or a folder.

    A folder may hold `train` and `val` folders, or shards whose names say their split (`SPLITS`);
    those that say none are for training. ValueError: there are none, or one of a pattern is
    missing.
    """
    if not os.path.isdir(data_path):
        return matching(data_path)
    split = "train" if train else "val"
    root = Path(data_path)
    folder = root / split if (root / "train").is_dir() and (root / split).is_dir() else root
    shards = sorted(folder.glob("*.tar"))
    if folder == root:
        named = [shard for shard in shards if SPLITS[train].match(shard.name)]
        others = [shard for shard in shards if not SPLITS[not train].match(shard.name)]
        shards = named or ((others or shards) if train else [])
    if not shards:
        use = "" if train else "; name some with --eval_data_path"
        raise ValueError(f"--data_path {data_path} holds no {split} shards (*.tar){use}")
    return shards


def matching(pattern: str, advice: str = "") -> list[Path]:
    """Return the files of a pattern with braces, or with * and ?, in order.

    ValueError, which ends in the advice: one is missing.
    """
    files = []
    for name in expanded(pattern):
        found = [name]
        if not os.path.isfile(name):
            found = sorted(path for path in glob.glob(name) if not os.path.isdir(path))
        if not found:
            raise ValueError(f"--data_path {pattern}: {name} does not exist{advice}")
        files += map(Path, found)
    return files


def expanded(pattern: str) -> list[str]:
    """Return what a pattern stands for: {000..127} is a range with as many digits, {a,b} a
    choice."""
    pieces = _BRACES.split(pattern)
    choices = [
        [piece] if number % 2 == 0 else _alternatives(piece, pattern)
        for number, piece in enumerate(pieces)
    ]
    return ["".join(parts) for parts in product(*choices)]


def _alternatives(text: str, pattern: str) -> list[str]:
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if found is None:
        return text.split(",")
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(f"--data_path {pattern}: the range {{{text}}} goes down; swap its ends")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


# --------------------------------------------------------------------------------------------------
# The index


@dataclass
class Members:
    """The images of one shard, in order: names, where their bytes begin, how many, labels or -1."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def samples_of(file: BinaryIO, shard: Path) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Yield the members of each sample by extension: consecutive ones of one key.

    A shard that ends early, or that holds more than its members, is named, and what precedes is
    used. ValueError: this is no tar.
    """
    key, members = None, {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # it would keep them all
                found = _KEY.fullmatch(member.name)
                if not member.isfile() or found is None:
                    continue
                if found[1] != key and members:
                    yield members
                    members = {}
                key = found[1]
                members[found[2].lower()] = member
            end = archive.offset
        if not is_zero(file, end):
            log.warning("%s is cut or damaged after %d bytes: the rest is not read", shard, end)
    except tarfile.ReadError as error:
        if key is None:
            raise ValueError(
                f"{shard} cannot be read as a tar: {error}; a compressed one must be unpacked first"
            ) from error
        log.warning("%s ends early: %s", shard, error)
    if members:
        yield members


def is_zero(file: BinaryIO, start: int) -> bool:
    """Return whether there is nothing in a file from `start` on but the zeros that end a tar."""
    file.seek(start)
    return not any(block.strip(b"\0") for block in iter(lambda: file.read(2**20), b""))


def read_shard(shard: Path) -> Members:
    """Return the images of a shard; samples without one are left out and counted in the log."""
    found, without = Members(), Counter()
    try:
        with open(shard, "rb") as file:
            for sample in samples_of(file, shard):
                kinds = (*IMAGE_EXTENSIONS, ARRAY_EXTENSION)
                image = next((sample[e[1:]] for e in kinds if e[1:] in sample), None)
                if image is None:
                    without[" ".join(sorted(sample))] += 1
                    continue
                found.names.append(image.name)
                found.offsets.append(image.offset_data)
                found.sizes.append(image.size)
                found.labels.append(label_of(file, sample, shard))
    except OSError as error:
        raise ValueError(f"shard {shard} cannot be read: {error.strerror}") from error
    if without:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in without.most_common(3))
        log.warning("%s: samples without an image are left out: %s", shard, kinds)
    return found


def label_of(file: BinaryIO, sample: dict[str, tarfile.TarInfo], shard: Path) -> int:
    """Return the class number in a sample's cls, or in the field "label" of its json; else -1."""
    member = sample.get("cls") or sample.get("json")
    if member is None:
        return -1
    position = file.tell()
    file.seek(member.offset_data)
    text = file.read(member.size)
    file.seek(position)
    try:
        value = text.strip() if "cls" in sample else json.loads(text).get(LABEL_FIELD, -1)
        label = int(value)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{shard}@/{member.name} holds no class number: {text[:40]!r}") from error
    if isinstance(value, float) and label != value:
        raise ValueError(f"{shard}@/{member.name} holds the label {value}, not a class number")
    if not -1 <= label <= LARGEST_LABEL:
        raise ValueError(
            f"{shard}@/{member.name} holds the class number {label}; use 0 to {LARGEST_LABEL}"
        )
    return label


def index_of(shards: Sequence[Path]) -> Arrays:
    """Return the index of the shards, whose arrays are "offset", "size" and "labels"."""
    return ShardIndex("tar", 2, _read_arrays).of(shards)


def _read_arrays(shard: Path) -> tuple[list[str], Arrays]:
    found = read_shard(shard)
    arrays = {
        "offset": np.asarray(found.offsets, dtype=np.int64),
        "size": np.asarray(found.sizes, dtype=np.int64),
        "labels": np.asarray(found.labels, dtype=np.int32),
    }
    return found.names, arrays


# --------------------------------------------------------------------------------------------------
# Reading


class TarFiles:
    """The images of tar shards by index, read in place.

    Each process opens the shards that it reads, at most `OPEN_SHARDS` at a time; what is open is
    never pickled.
    """

    def __init__(self, shards: Sequence[Path], index: Arrays):
        self.shards = list(shards)
        self.names = PathTable.of_arrays(index["text"], index["ends"])
        self.first = np.append(0, np.cumsum(index["counts"]))
        self.offset = index["offset"]
        self.size = index["size"]
        self._open: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.names)

    def shard(self, index: int) -> int:
        """Return the number of the shard that holds an image."""
        return int(np.searchsorted(self.first, index, side="right")) - 1

    def path(self, index: int) -> str:
        return f"{self.shards[self.shard(index)]}@/{self.names[index]}"

    def read(self, index: int) -> bytes:
        size = int(self.size[index])
        check_size(size)
        try:
            content = os.pread(self._file(self.shard(index)), size, int(self.offset[index]))
        except OSError as error:
            raise BrokenImageError(error.strerror or str(error)) from error
        if len(content) < size:
            raise BrokenImageError("the file ends inside this image")
        return content

    def _file(self, shard: int) -> int:
        """Return the descriptor of a shard, opened by this process."""
        if self._pid != os.getpid():  # a forked worker: the parent's stay the parent's
            self._open, self._pid = OrderedDict(), os.getpid()
        if shard not in self._open:
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_pid": None}
