"""Read images from parquet files as the Hugging Face hub stores them, in place (--data_set hf).

The files are gone through once for labels, names and the sizes of their row groups; this index lies
beside them. An image is then read by whichever worker needs it, in any order, through the row group
that holds it: the last ones are kept. Needs pyarrow.
"""

import glob
import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from unimim.data.file_index import LARGEST_LABEL, PathTable
from unimim.data.files import check_size
from unimim.data.jpeg import BrokenImageError
from unimim.data.shard_index import ShardIndex
from unimim.data.shards import expanded
from unimim.data.shared_index import Arrays
from unimim.logs import log

SPLITS = {True: (("train",),), False: (("validation", "valid", "val", "dev"), ("test",))}
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")
OPEN_FILES = 64  # of each process
KEPT_BYTES = 2**27  # of row groups, in each process; a larger one is not kept but streamed
STREAM_BYTES, STREAM_ROWS = 2**20, 16  # that are read at a time where a row group is streamed
DIGEST_BYTES = 8
BESIDE_IMAGES = "metadata.parquet"  # tells of the images in its folder, and holds none


def parquet() -> ModuleType:
    """Return pyarrow's module for parquet files; ValueError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("--data_set hf needs pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def read_errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for files that are damaged, or of a kind that it does not know."""
    from pyarrow import ArrowException

    return (OSError, ArrowException)


# --------------------------------------------------------------------------------------------------
# Which files


def files_of(data_path: str, *, train: bool) -> list[Path]:
    """Return the files that --data_path names, in order: a file, a pattern, or a folder.

    A folder may be divided by the beginnings of the files' names (train-00000-of-00128.parquet), or
    into folders of the splits; else all of its files are for training. A repository of the hub,
    whose files lie in `data`, is such a folder, too. ValueError: there are none.
    """
    if not os.path.isdir(data_path):
        return _matching(data_path)
    root = Path(data_path)
    for folder in (root, root / "data"):
        for names in SPLITS[train]:
            found = _of_split(folder, names)
            if found:
                _warn_of_missing(found)
                return found
        plain = sorted(folder.glob("*.parquet"))
        if plain and train and not any(_of_split(folder, names) for names in SPLITS[False]):
            return plain
    if is_saved_to_disk(root):
        raise ValueError(
            f"--data_path {root} was written by datasets.save_to_disk: write its splits as parquet "
            "files, by datasets.load_from_disk(FOLDER)['train'].to_parquet('train.parquet')"
        )
    names = ", ".join(f"{name}*.parquet" for names in SPLITS[train] for name in names)
    use = "" if train else "; name some with --eval_data_path"
    raise ValueError(f"--data_path {root} holds no files {names}{use}")


def _matching(pattern: str) -> list[Path]:
    """Return the files of a pattern with braces, or with * and ?; ValueError if one is missing."""
    files = []
    for name in expanded(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found or not os.path.isfile(found[0]):
            raise ValueError(
                f"--data_path {pattern}: {name} does not exist; a data set of the hub is downloaded"
                " by: hf download --repo-type dataset NAME --local-dir FOLDER"
            )
        files += map(Path, found)
    return files


def _of_split(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of a split: those in a folder of one of its names, or that begin so."""
    for name in names:
        found = sorted((folder / name).glob("*.parquet"))
        if not found:
            begins = re.compile(rf"{name}[-_.]")
            found = sorted(file for file in folder.glob("*.parquet") if begins.match(file.name))
        if found:
            return found
    return []


def _warn_of_missing(files: Sequence[Path]) -> None:
    """Log where the names say that there are more files: a download may have been cut short."""
    stated = re.search(r"-of-(\d+)\.parquet$", files[-1].name)
    if stated and int(stated[1]) > len(files):
        log.warning("%s: there are %d of %d files", files[0].parent, len(files), int(stated[1]))


def holds_parquet(root: Path) -> bool:
    """Return whether a folder, or that of its data or training files, holds parquet files."""
    folders = (root, root / "data", root / "train")
    found = (file for folder in folders for file in folder.glob("*.parquet"))
    return any(file.name != BESIDE_IMAGES for file in found) or is_saved_to_disk(root)


def is_saved_to_disk(root: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote a folder: arrow files, or folders of them."""
    if (root / "dataset_dict.json").is_file():
        return True
    return (root / "state.json").is_file() and any(root.glob("*.arrow"))


# --------------------------------------------------------------------------------------------------
# The index


@dataclass(frozen=True)
class Columns:
    """The columns of a file: `image` is the name of that of the bytes, `path` and `label` may be
    missing; `classes` are the names of the labels, in order, if the file says them."""

    image: str
    path: str | None
    label: str | None
    classes: list[str] | None


def columns_of(schema: Any, file: Path) -> Columns:
    """Return what the columns of an arrow schema are for; ValueError if none holds images."""
    features = _features(schema)
    named = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    binary = {name: leaf for name in schema.names if (leaf := _bytes_of(schema.field(name)))}
    image = next((n for n in (*named, *IMAGE_COLUMNS, *binary) if n in binary), None)
    if image is None:
        raise ValueError(
            f"{file} has no column of images, which are bytes, or bytes and path: it has "
            f"{', '.join(schema.names)}"
        )
    inside = schema.field(image).type
    has_path = binary[image] != image and inside.get_field_index("path") >= 0

    classes = {n: f.get("names") for n, f in features.items() if f.get("_type") == "ClassLabel"}
    whole = [name for name in schema.names if _is_integer(schema.field(name))]
    candidates = (*LABEL_COLUMNS, *classes)
    label = next((name for name in candidates if name in whole), None)
    names = classes.get(label)
    return Columns(
        binary[image],
        f"{image}.path" if has_path else None,
        label,
        [str(name) for name in names] if isinstance(names, list) else None,
    )


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what `datasets` wrote of the columns; empty where it did not write the file."""
    try:
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def _bytes_of(field: Any) -> str | None:
    """Return the name of a column's bytes, which may lie in a struct; None if it has none."""
    from pyarrow import types

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    if is_binary(field.type):
        return field.name
    inside = field.type.get_field_index("bytes") if types.is_struct(field.type) else -1
    return f"{field.name}.bytes" if inside >= 0 and is_binary(field.type[inside].type) else None


def _is_integer(field: Any) -> bool:
    from pyarrow import types

    return types.is_integer(field.type)


def columns_in(file: Path) -> Columns:
    """Return what the columns of a file are for; ValueError if it cannot be read."""
    pq = parquet()
    try:
        return columns_of(pq.read_schema(file), file)
    except read_errors() as error:
        raise ValueError(f"{file} cannot be read as a parquet file: {error}") from error


def index_of(files: Sequence[Path]) -> Arrays:
    """Return the index of parquet files; its arrays are "labels" of the images, "group_rows" of the
    row groups, and a digest of each file's class names in "classes"."""
    parquet()
    return ShardIndex("parquet", 1, read_file).of(files)


def read_file(file: Path) -> tuple[list[str], Arrays]:
    """Return the names of a file's images, and the arrays of its index.

    A name is the file's, the number of the row and, where there is one, the name in `path`.
    """
    columns = columns_in(file)
    wanted = [name for name in (columns.label, columns.path) if name]
    try:
        with parquet().ParquetFile(file) as opened:
            footer = opened.metadata
            groups = [footer.row_group(k).num_rows for k in range(footer.num_row_groups)]
            table = opened.read(columns=wanted, use_threads=False) if wanted else None
    except read_errors() as error:
        raise ValueError(f"{file} cannot be read as a parquet file: {error}") from error

    rows = sum(groups)
    labels = np.full(rows, -1, dtype=np.int32)
    if columns.label:
        found = table.column(columns.label).cast("int64").fill_null(-1).to_numpy()
        if len(wrong := np.flatnonzero((found < -1) | (found > LARGEST_LABEL))):
            raise ValueError(
                f"{file}@/{wrong[0]} has the label {found[wrong[0]]}; use 0 to {LARGEST_LABEL}"
            )
        labels = found.astype(np.int32)
    names = [f"{file.stem}/{row}" for row in range(rows)]
    if columns.path:
        chunks = table.column(columns.path.removesuffix(".path")).chunks
        paths = chain.from_iterable(chunk.field("path").to_pylist() for chunk in chunks)
        names = [
            f"{name}/{os.path.basename(path)}" if path else name
            for name, path in zip(names, paths, strict=True)
        ]
    digest = hashlib.blake2b(repr(columns.classes).encode(), digest_size=DIGEST_BYTES).digest()
    return names, {
        "labels": labels,
        "group_rows": np.array(groups, dtype=np.int64),
        "classes": np.frombuffer(digest, dtype=np.uint8),
    }


def check_classes(files: Sequence[Path], index: Arrays) -> None:
    """Raise ValueError, naming a file, if its class names are not those of the first one."""
    digests = index["classes"].reshape(-1, DIGEST_BYTES)
    others = np.flatnonzero((digests != digests[0]).any(1))
    if len(others):
        raise ValueError(
            f"{files[others[0]]} names other classes than {files[0]}, or in another order; use "
            "files of one data set"
        )


# --------------------------------------------------------------------------------------------------
# Reading


class ParquetFiles:
    """The images of parquet files by index, read in place.

    Each process opens the files that it reads, at most `OPEN_FILES` at a time, and keeps the row
    groups that it read last, at most `KEPT_BYTES`; of a larger one it reads up to the wanted row.
    Nothing of that is ever pickled.
    """

    def __init__(self, files: Sequence[Path], index: Arrays):
        self.files = list(files)
        self.names = PathTable.of_arrays(index["text"], index["ends"])
        self.first = np.append(0, np.cumsum(index["counts"]))
        self.group_ends = np.cumsum(index["group_rows"])
        self.first_group = np.append(0, np.cumsum(index["group_rows.counts"]))
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[int, tuple[Any, str]] = OrderedDict()
        self._kept: OrderedDict[int, list[Any]] = OrderedDict()
        self._kept_bytes = 0
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Return FILE@/ROW, and the name of the image if it has one."""
        file = self.files[int(np.searchsorted(self.first, index, side="right")) - 1]
        return f"{file}@/{self.names[index].removeprefix(f'{file.stem}/')}"

    def read(self, index: int) -> bytes:
        if self._pid != os.getpid():  # a forked worker: the parent's files stay the parent's
            self._forget()
        group = int(np.searchsorted(self.group_ends, index, side="right"))
        row = int(index - self.group_ends[group - 1] if group else index)
        try:
            value = self._value(group, row)
        except read_errors() as error:
            raise BrokenImageError(f"its row group cannot be read: {error}") from error
        if value is None:
            raise BrokenImageError("the row holds no bytes of an image")
        check_size(value.size)
        return value.to_pybytes()

    def _value(self, group: int, row: int) -> Any:
        """Return the buffer of a row in a row group, None for an empty one."""
        if group not in self._kept:
            file = int(np.searchsorted(self.first_group, group, side="right")) - 1
            number = group - int(self.first_group[file])
            opened, column = self._file(file)
            rows = self.group_ends[group] - (self.group_ends[group - 1] if group else 0)
            if (
                number >= opened.metadata.num_row_groups
                or opened.metadata.row_group(number).num_rows != rows
            ):
                raise BrokenImageError("the file has changed since the run began")
            if _bytes_in(opened, number, column) > KEPT_BYTES:
                return self._streamed(file, number, row)
            table = opened.read_row_group(number, columns=[column], use_threads=False)
            self._keep(group, _values(table.column(0).chunks))
        self._kept.move_to_end(group)
        return _buffer(self._kept[group], row)

    def _keep(self, group: int, chunks: list[Any]) -> None:
        """Keep the values of a row group, and let go of those that were not read for longest."""
        self._kept[group] = chunks
        self._kept_bytes += sum(chunk.nbytes for chunk in chunks)
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._kept_bytes -= sum(chunk.nbytes for chunk in gone)

    def _streamed(self, file: int, number: int, row: int) -> Any:
        """Return the buffer of a row without holding the row group that it is in."""
        _, column = self._file(file)
        with parquet().ParquetFile(self.files[file], **CHECKED, buffer_size=STREAM_BYTES) as opened:
            for batch in opened.iter_batches(
                STREAM_ROWS, row_groups=[number], columns=[column], use_threads=False
            ):
                if row < len(batch):
                    return _buffer(_values([batch.column(0)]), row)
                row -= len(batch)
        raise BrokenImageError("the row group ends before this row")

    def _file(self, file: int) -> tuple[Any, str]:
        """Return a file, opened by this process, and the name of its column of images."""
        if file not in self._open:
            opened = parquet().ParquetFile(self.files[file], **CHECKED)
            self._open[file] = opened, columns_of(opened.schema_arrow, self.files[file]).image
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(file)
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        empty = {"_open": OrderedDict(), "_kept": OrderedDict(), "_kept_bytes": 0, "_pid": None}
        return {**self.__dict__, **empty}


CHECKED = {"page_checksum_verification": True}  # where a file has checksums


def _bytes_in(opened: Any, group: int, column: str) -> int:
    """Return the bytes of a column in a row group, unpacked."""
    about = opened.metadata.row_group(group)
    columns = (about.column(number) for number in range(about.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)


def _values(chunks: Sequence[Any]) -> list[Any]:
    """Return the arrays of bytes in chunks of a column, which may be structs."""
    return [chunk.field("bytes") if chunk.type.num_fields else chunk for chunk in chunks]


def _buffer(chunks: Sequence[Any], row: int) -> Any:
    for chunk in chunks:
        if row < len(chunk):
            return chunk[row].as_buffer()
        row -= len(chunk)
    raise BrokenImageError("the row group ends before this row")
