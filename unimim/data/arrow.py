"""Read images from arrow files as the library `datasets` writes them, in place (--data_set hf).

A file is mapped once for labels, names and where the bytes of each image lie; this index lies
beside the files. From then on an image is read like one in a tar shard, by any worker and in any
order: nothing is mapped or parsed any more. Making the index needs pyarrow.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimim.data.columns import (
    Columns,
    columns_of,
    path_of_row,
    pyarrow_module,
    read_errors,
    rows_of,
)
from unimim.data.jpeg import BrokenImageError
from unimim.data.shard_index import ShardIndex
from unimim.data.shards import TarFiles
from unimim.data.shared_index import Arrays
from unimim.logs import log

FILE_START = b"ARROW1"  # of the format with a footer; `datasets` writes streams, which have none
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


# --------------------------------------------------------------------------------------------------
# The index


def columns_in(file: Path) -> Columns:
    """Return what the columns of a file are for; ValueError if it cannot be read."""
    with _opened(file) as opened:
        return columns_of(opened.reader.schema, file)


def index_of(files: Sequence[Path]) -> Arrays:
    """Return the index of arrow files; its arrays are "labels" of the images, "offset" and "size"
    of their bytes, and a digest of each file's class names in "classes"."""
    pyarrow_module()
    return ShardIndex("arrow", 1, read_file).of(files)


def read_file(file: Path) -> tuple[list[str], Arrays]:
    """Return the names of a file's images, and the arrays of its index.

    A row without bytes has the size -1. Of the images themselves nothing is read.

    Raises:
        ValueError: the file is damaged or compressed, or holds no image.
    """
    batches, offsets, sizes = [], [], []
    with _opened(file) as opened:
        schema = opened.reader.schema
        columns = columns_of(schema, file)
        for batch in _batches(opened, file):
            batches.append(batch)
            offset, size = _spans(batch, columns, opened, file)
            offsets.append(offset)
            sizes.append(size)
        table = pyarrow_module().Table.from_batches(batches, schema)
        names, arrays = rows_of(table, table.num_rows, columns, file)
    none = [np.empty(0, dtype=np.int64)]
    arrays |= {"offset": np.concatenate(none + offsets), "size": np.concatenate(none + sizes)}
    if names and (arrays["size"] < 0).all():
        raise ValueError(
            f"{file} holds the bytes of no image, but paths at most; load it by the library "
            "datasets and write it by save_to_disk, which takes the images in"
        )
    return names, arrays


class _Opened(NamedTuple):
    """A mapped arrow file, the address at which it begins, and a reader of its record batches."""

    mapped: Any
    begin: int
    reader: Any


@contextmanager
def _opened(file: Path) -> Iterator[_Opened]:
    """Map an arrow file; ValueError where it is damaged, also where that shows later."""
    pa = pyarrow_module()
    try:
        with pa.memory_map(str(file)) as mapped:
            head = mapped.read_buffer(len(FILE_START))
            mapped.seek(0)
            read = pa.ipc.open_file if head.to_pybytes() == FILE_START else pa.ipc.open_stream
            yield _Opened(mapped, head.address, read(mapped))
    except read_errors() as error:
        raise ValueError(f"{file} cannot be read as an arrow file: {error}") from error


def _batches(opened: _Opened, file: Path) -> Iterator[Any]:
    """Yield the record batches of a file; ValueError: it ends inside one, or one is damaged."""
    mapped, _, reader = opened
    if hasattr(reader, "get_batch"):  # of the format with a footer, which is whole if it is there
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        return
    rows = 0
    try:
        for batch in reader:
            yield batch
            rows += batch.num_rows
    except read_errors() as error:
        raise ValueError(
            f"{file} is cut or damaged after {rows} rows: {error}; copy or write it again"
        ) from error
    mapped.seek(mapped.size() - len(STREAM_END))
    if mapped.read() != STREAM_END:
        log.warning("%s has no end mark: it may have been cut after these %d rows", file, rows)


def _spans(
    batch: Any, columns: Columns, opened: _Opened, file: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return where the bytes of each row's image begin in the file, and how many they are.

    Both are int64 [rows]; the size is -1 where there are none.
    """
    is_plain = columns.image in batch.schema.names
    column = batch.column(columns.image if is_plain else columns.image.removesuffix(".bytes"))
    column.validate(full=True)  # so that no image begins or ends outside the batch
    values = column if is_plain else column.flatten()[column.type.get_field_index("bytes")]
    if not len(values):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    _, ends, content = values.buffers()
    kind = np.int32 if pyarrow_module().types.is_binary(values.type) else np.int64
    ends = np.frombuffer(ends, kind)[values.offset :][: len(values) + 1].astype(np.int64)
    sizes = np.where(values.is_null().to_numpy(zero_copy_only=False), -1, np.diff(ends))
    if (sizes <= 0).all():
        return np.zeros_like(sizes), sizes
    begin = content.address - opened.begin
    if not 0 <= begin <= opened.mapped.size() - content.size:  # it was unpacked into memory
        raise ValueError(
            f"{file} is compressed, so that its images must be unpacked to be read; "
            "write it without compression, or as parquet"
        )
    return begin + ends[:-1], sizes


# --------------------------------------------------------------------------------------------------
# Reading


class ArrowFiles(TarFiles):
    """The images of arrow files by index, read in place: their bytes lie there as they are."""

    def path(self, index: int) -> str:
        """Return FILE@/ROW, and the name of the image if it has one."""
        return path_of_row(self.shards[self.shard(index)], self.names[index])

    def read(self, index: int) -> bytes:
        if self.size[index] < 0:
            raise BrokenImageError("the row holds no bytes of an image")
        return super().read(index)
