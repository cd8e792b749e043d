"""The index of a data set in shards (tars, parquet files): made once, kept beside the shards, and
made again for those that change."""

import fcntl
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unimim.data.file_index import PathTable
from unimim.data.shared_index import Arrays, own_folder, shared_arrays
from unimim.files import write_atomically
from unimim.logs import log


class ShardIndex:
    """The index of one kind of shard, "tar" or "parquet".

    `read` returns the names of the images in a shard, and arrays of whatever length by their names.
    An index holds "text" and "ends" of all names, "counts", the images of each shard, and each
    array X of all shards one after another, with the length of each in "X.counts". `version` is
    that of what `read` returns.
    """

    def __init__(self, kind: str, version: int, read: Callable[[Path], tuple[list[str], Arrays]]):
        self.kind = kind
        self.format = f"unimim {kind} index {version}"
        self.read = read

    def of(self, shards: Sequence[Path]) -> Arrays:
        """Return the index of the shards: the one beside them, after those that changed have been
        gone through again.

        Among several ranks of a machine one does so, and all map the result.
        """
        states = [state_of(shard) for shard in shards]
        name = hashlib.sha256(repr([str(shard.resolve()) for shard in shards]).encode()).hexdigest()
        file = f".unimim-{name[:16]}.{self.kind}index"
        places = [shards[0].parent / file]
        try:
            places.append(own_folder() / file)
            lock = places[-1].with_suffix(".lock").open("w")
        except OSError as error:  # each rank for itself
            log.warning("the index of %s is not shared among ranks: %s", shards[0], error)
            return self._up_to_date(shards, states, {})
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            earlier: Arrays = {}
            for place in places:
                held = self._load(place)
                if held and json.loads(bytes(held["about"]))["shards"] == states:
                    return self._shared(place)
                earlier = earlier or held
            index = self._up_to_date(shards, states, earlier)
            for place in places:
                try:
                    write_atomically(place, partial(np.savez, **index))
                except OSError:  # a folder of somebody else, or a full disk
                    continue
                files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
                log.info("the index of %s is in %s", files, place)
                return self._shared(place)
        return index

    def _shared(self, place: Path) -> Arrays:
        return shared_arrays(f"{self.kind} index", [place], partial(self._load, place))

    def _load(self, place: Path) -> Arrays:
        """Return the arrays of an index file; empty where there is no whole one."""
        try:
            with np.load(place) as held:
                arrays = {name: held[name] for name in held.files}
            whole = json.loads(bytes(arrays["about"]))["format"] == self.format
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return {}
        return arrays if whole else {}

    def _up_to_date(self, shards: Sequence[Path], states: list[list[Any]], held: Arrays) -> Arrays:
        """Return the index of the shards; what `held` has of them in this state is copied."""
        known = known_pieces(held) if held else {}
        new = sum((place, *state) not in known for place, state in enumerate(states))
        bar = tqdm(total=new, desc=f"indexing {self.kind} files", unit="file", disable=None)
        pieces = []
        for place, (shard, state) in enumerate(zip(shards, states, strict=True)):
            if (place, *state) in known:
                pieces.append(known[place, *state])
                continue
            names, arrays = self.read(shard)
            table = PathTable(names)
            lengths = np.diff(table.ends, prepend=0)
            pieces.append({"text": table.text, "lengths": lengths, **arrays})
            bar.update()
        bar.close()

        index = {}
        for name in pieces[0]:
            index[name] = np.concatenate([piece[name] for piece in pieces])
            index[f"{name}.counts"] = np.array([len(p[name]) for p in pieces], dtype=np.int64)
        index["ends"] = np.cumsum(index.pop("lengths"), dtype=np.int64)
        index["counts"] = index.pop("lengths.counts")
        about = json.dumps({"format": self.format, "shards": states}).encode()
        return {"about": np.frombuffer(about, dtype=np.uint8), **index}


def state_of(shard: Path) -> list[Any]:
    """Return what tells whether a shard has changed: name, size, time of the last change.

    ValueError: it is gone, as what a link leads to.
    """
    try:
        found = shard.stat()
    except OSError as error:
        raise ValueError(f"{shard} cannot be read: {error.strerror}") from error
    return [shard.name, found.st_size, found.st_mtime_ns]


def known_pieces(held: Arrays) -> dict[tuple[Any, ...], Arrays]:
    """Return what an index holds of each shard, by its place in the list and the state it was in:
    shards of two folders may have the same name, size and time."""
    arrays = {name: held[name] for name in held if f"{name}.counts" in held}
    counts = {name: held[f"{name}.counts"] for name in arrays}
    arrays["lengths"] = np.diff(held["ends"], prepend=0)
    counts["lengths"] = held["counts"]
    ends = {name: np.append(0, np.cumsum(count)) for name, count in counts.items()}
    states = json.loads(bytes(held["about"]))["shards"]
    return {
        (k, *state): {name: arrays[name][ends[name][k] : ends[name][k + 1]] for name in arrays}
        for k, state in enumerate(states)
    }
