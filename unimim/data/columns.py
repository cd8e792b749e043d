"""Tell what the columns of parquet and arrow files are for: images, their names and labels."""

import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from unimim.data.file_index import LARGEST_LABEL
from unimim.data.shared_index import Arrays

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")
DIGEST_BYTES = 8


def pyarrow_module(name: str = "pyarrow") -> ModuleType:
    """Return pyarrow, or a module of it; ValueError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError("--data_set hf needs pyarrow: pip install pyarrow") from error


def read_errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for files that are damaged, or of a kind that it does not know."""
    from pyarrow import ArrowException

    return (OSError, ArrowException, UnicodeDecodeError)


# --------------------------------------------------------------------------------------------------
# Which columns


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


# --------------------------------------------------------------------------------------------------
# What the index holds of them


def rows_of(table: Any, rows: int, columns: Columns, file: Path) -> tuple[list[str], Arrays]:
    """Return the names of a file's images, and the arrays "labels" and "classes" of its index.

    `table` has the columns of labels and of images' names, where there are such columns. A name is
    the file's, the number of the row and, where there is one, the name in `path`; "classes" is a
    digest of the classes' names.
    """
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
    return names, {"labels": labels, "classes": np.frombuffer(digest, dtype=np.uint8)}


def path_of_row(file: Path, name: str) -> str:
    """Return FILE@/ROW, and the name of the image if it has one, for a name of `rows_of`."""
    return f"{file}@/{name.removeprefix(f'{file.stem}/')}"


def check_classes(files: Sequence[Path], index: Arrays) -> None:
    """Raise ValueError, naming a file, if its class names are not those of the first one."""
    digests = index["classes"].reshape(-1, DIGEST_BYTES)
    others = np.flatnonzero((digests != digests[0]).any(1))
    if len(others):
        raise ValueError(
            f"{files[others[0]]} names other classes than {files[0]}, or in another order; use "
            "files of one data set"
        )
