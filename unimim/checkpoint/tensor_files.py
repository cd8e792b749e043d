"""Write safetensors files that hold their own checksum, and check it.

The format has none: a flipped bit is another weight. The checksum stands in the metadata, as
"sha256", and is that of the header without it, followed by the tensors' bytes. Equal content gives
equal bytes: safetensors itself writes the metadata in an order that changes from run to run.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

from unimim import files

CHECKSUM = "sha256"
_METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
_BLOCK = 2**22


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Replace a safetensors file in one step; `metadata` gets a checksum of all."""
    raw = memoryview(safetensors.torch.save(dict(tensors), dict(metadata)))
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(bytes(raw[8 : 8 + length]))
    data = raw[8 + length :]
    described = header.setdefault(_METADATA, {})
    described[CHECKSUM] = _digest(header, data).hexdigest()
    text = json.dumps(_ordered(header), ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(data)

    files.write_atomically(path, write)


def check_tensors(path: str | Path) -> None:
    """Raise ValueError, naming the file, unless it has the checksum that it states, if any.

    What is wrong with the file otherwise is left to safetensors' reader.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER:
            return
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return
        described = header.get(_METADATA) if isinstance(header, dict) else None
        stated = described.get(CHECKSUM) if isinstance(described, dict) else None
        if stated is None:
            return
        digest = _digest(header, b"")
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != stated:
        raise ValueError(f"{path} is damaged: it does not have the checksum in its metadata")


def _digest(header: dict[str, Any], data: bytes | memoryview) -> Any:
    """Return the hash of a header, the checksum in it left out, and of what follows it."""
    described = {name: text for name, text in header[_METADATA].items() if name != CHECKSUM}
    text = json.dumps(header | {_METADATA: described}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    digest.update(data)
    return digest


def _ordered(header: dict[str, Any]) -> dict[str, Any]:
    """Return the header with sorted metadata first, then the tensors in their bytes' order."""
    tensors = [(name, entry) for name, entry in header.items() if name != _METADATA]
    tensors.sort(key=lambda item: (*item[1]["data_offsets"], item[0]))
    return {_METADATA: dict(sorted(header[_METADATA].items())), **dict(tensors)}
