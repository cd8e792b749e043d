"""Read images from parquet files as the Hugging Face hub stores them, in place (--data_set hf).

The files are gone through once for labels, names and the sizes of their row groups; this index lies
beside them. An image is then read by whichever worker needs it, in any order, through the row group
that holds it: the last ones are kept. Needs pyarrow.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from unimim.data.columns import (
    Columns,
    columns_of,
    path_of_row,
    pyarrow_module,
    read_errors,
    rows_of,
)
from unimim.data.file_index import PathTable
from unimim.data.files import check_size
from unimim.data.jpeg import BrokenImageError
from unimim.data.shard_index import ShardIndex
from unimim.data.shared_index import Arrays

OPEN_FILES = 64  # of each process
KEPT_BYTES = 2**27  # of row groups, in each process; a larger one is not kept but streamed
STREAM_BYTES, STREAM_ROWS = 2**20, 16  # that are read at a time where a row group is streamed


def parquet() -> ModuleType:
    """Return pyarrow's module for parquet files; ValueError where it is not installed."""
    return pyarrow_module("pyarrow.parquet")


# --------------------------------------------------------------------------------------------------
# The index


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
    """Return the names of a file's images, and the arrays of its index."""
    columns = columns_in(file)
    wanted = [name for name in (columns.label, columns.path) if name]
    try:
        with parquet().ParquetFile(file) as opened:
            footer = opened.metadata
            groups = [footer.row_group(k).num_rows for k in range(footer.num_row_groups)]
            table = opened.read(columns=wanted, use_threads=False) if wanted else None
        names, arrays = rows_of(table, sum(groups), columns, file)
    except read_errors() as error:
        raise ValueError(f"{file} cannot be read as a parquet file: {error}") from error
    return names, {**arrays, "group_rows": np.array(groups, dtype=np.int64)}


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
        return path_of_row(file, self.names[index])

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
