"""Where images come from: folders, map files, zips and small embedded sets; and in which order they
are loaded.

A source knows paths, labels and how to read one image; `ImageDataset` decodes and augments behind a
guard that replaces broken images; the batch samplers yield lists of (epoch, index), so that a
sample depends on (seed, epoch, index) only.
"""

import argparse
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unimim.data.files import Key
from unimim.data.jpeg import BrokenImageError
from unimim.data.random import _ORDER_STREAM, _REPLACEMENT_STREAM, sample_rng
from unimim.data.sources import (
    ArraySource,
    FileSource,
    PartSource,
    Source,
    _detect,
    _split_folder,
    build_source,
    first_of_each_class,
    logger,
)

# of (raw, rng), and of the image's maps where there are some
Transform = Callable[..., dict[str, torch.Tensor]]
Maps = dict[str, Callable[[int], np.ndarray]]  # by the name of a view: reads an image's map


# --- the data set ---------------------------------------------------------------------------------


class BadImagesError(RuntimeError):
    """Too many broken images, or one under `--strict_data`; the message lists them."""


class ImageDataset(Dataset):
    """Samples of `source` through `transform`, by keys (epoch, index).

    A sample is the transform's dict plus "label" and "index", the number of the image that was
    really used. A broken image is logged once and replaced by another, which depends on (seed,
    index) only; all workers share the set of broken images. More than `max_bad_images` of them, or
    the first if `strict`, raise BadImagesError. `maps` reads what else belongs to an image, by the
    name of the view that the transform makes of it.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        seed: int,
        max_bad_images: int = 100,
        strict: bool = False,
        maps: Maps | None = None,
    ):
        self.source, self.transform, self.seed = source, transform, seed
        self.maps = maps or {}
        self.max_bad_images = 0 if strict else max_bad_images
        self.bad = SharedNumbers(min(len(source), self.max_bad_images + 1))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict:
        epoch, index = key
        wanted = -1 - index if index < 0 else index
        for used in self._candidates(wanted):
            try:
                raw, rng = self.source.read(used), sample_rng(self.seed, epoch, wanted)
                maps = {view: read(used) for view, read in self.maps.items()}
                sample = self.transform(raw, rng, maps) if maps else self.transform(raw, rng)
            except BrokenImageError as error:
                self._report(used, error)
                continue
            return {
                **sample,
                "label": int(self.source.labels[used]),
                "index": -1 - used if index < 0 else used,
            }
        raise AssertionError("candidates never end")

    def _candidates(self, wanted: int) -> Iterator[int]:
        """`wanted`, then its replacements, without those that are known to be broken."""
        rng, candidate = None, wanted
        while True:
            if candidate not in self.bad:
                yield candidate
            if len(self.bad) >= len(self):
                raise BadImagesError(self._summary())
            rng = rng or np.random.default_rng((self.seed, wanted, 0, _REPLACEMENT_STREAM))
            candidate = int(rng.integers(len(self)))

    def _report(self, index: int, error: BrokenImageError) -> None:
        if index in self.bad:  # another worker was faster
            return
        self.bad.add(index)
        logger.warning("broken image %s is replaced by another: %s", self.source.path(index), error)
        if len(self.bad) > self.max_bad_images:
            raise BadImagesError(self._summary()) from error

    def _summary(self) -> str:
        broken = self.bad.sorted()
        listed = ", ".join(self.source.path(index) for index in broken[:10])
        allowed = f"{self.max_bad_images} allowed by --max_bad_images or --strict_data"
        return f"{len(broken)} of {len(self)} images are broken ({allowed}): {listed}{' ...' * (len(broken) > 10)}"


class SharedNumbers:
    """A set of at least `capacity` numbers from 0 on in memory that forked and spawned workers
    share, without a lock.

    Each number has its place, or one of those behind it if that is taken. Of two processes that
    take one place at the same moment the later wins: the other's number is missing then, and is
    added again when it is met again. What does not fit any more is left out.
    """

    def __init__(self, capacity: int):
        self.slots = torch.full((2 * capacity + 64,), -1, dtype=torch.int64).share_memory_()

    def __contains__(self, number: int) -> bool:
        return bool((self.slots.numpy() == number).any())

    def __len__(self) -> int:
        return len(self.sorted())

    def add(self, number: int) -> None:
        slots = self.slots.numpy()
        behind = (number + np.arange(len(slots))) % len(slots)
        free = behind[slots[behind] < 0]
        if number not in self and len(free):
            slots[free[0]] = number

    def sorted(self) -> list[int]:
        slots = self.slots.numpy()
        return np.unique(slots[slots >= 0]).tolist()


def build_dataset(
    args: argparse.Namespace,
    *,
    train: bool,
    transform: Transform,
    need_labels: bool,
    maps: Callable[[Source], Maps] | None = None,
) -> ImageDataset:
    """The data set of the flags `data_set`, `data_path`, `eval_data_path`, `seed`,
    `max_bad_images`, `strict_data`.

    For training `label_fraction`, where there is such a flag, keeps the first images of each class.
    For evaluation `eval_data_path` replaces `data_path` where it is given; an image_folder needs it
    unless it is divided into `train` and `val`. `maps` opens what else belongs to the images of a
    source.
    """
    eval_path = None if train else getattr(args, "eval_data_path", None)
    path = eval_path or args.data_path
    kind = args.data_set or _detect(path)
    if (
        kind == "image_folder"
        and not train
        and not eval_path
        and _split_folder(Path(path), train) == Path(path)
    ):
        raise ValueError(
            f"evaluation on image folders needs --eval_data_path, or a folder {path}/val"
        )
    source = build_source(
        kind, path, train=train, need_labels=need_labels, train_path=args.data_path
    )
    fraction = getattr(args, "label_fraction", 1.0)
    if train and fraction != 1.0:
        source = PartSource(source, first_of_each_class(source.labels, fraction))
    return ImageDataset(
        source,
        transform,
        seed=args.seed,
        max_bad_images=args.max_bad_images,
        strict=args.strict_data,
        maps=None if maps is None else maps(source),
    )


def fingerprint(dataset: Dataset) -> str:
    """Sixteen hexadecimal digits of which images there are and in which order, by their names below
    their root."""
    digest = hashlib.blake2b(str(len(dataset)).encode(), digest_size=8)
    source = getattr(dataset, "source", None)
    while isinstance(source, PartSource):
        digest.update(np.ascontiguousarray(source.chosen, dtype=np.int64).data)
        source = source.source
    if isinstance(source, FileSource):
        names = source.files.names
        digest.update(names.ends.data)
        digest.update(names.text.data)
    elif isinstance(source, ArraySource):
        digest.update(f"{source.name} {len(source)}".encode())
    return digest.hexdigest()


# --- order ----------------------------------------------------------------------------------------


class TrainBatchSampler:
    """Batches of (epoch, index) of one rank: chunks of `batch_size` of a permutation by (seed,
    epoch).

    Micro-batch j of rank r is chunk j * world_size + r, so one process that accumulates world_size
    times as often sees, in order, what the ranks see side by side. Partial chunks are dropped.

    With `repeats` each image comes that many times in a step of `step_batches` chunks, in as many
    of them as there are, each time with draws of its own; an epoch has the same number of batches
    (specs/a2mim.md 4.4).

    Raises:
        ValueError: fewer images than one batch on every rank.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        batches_per_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        repeats: int = 1,
        step_batches: int = 1,
    ):
        whole = n // batch_size // world_size
        if whole == 0:
            raise ValueError(
                f"{n} images do not fill one batch of --batch_size {batch_size} on {world_size} process(es); "
                f"lower --batch_size to at most {n // world_size}, or use fewer processes or more images"
            )
        self.n, self.batch_size, self.rank, self.world_size = n, batch_size, rank, world_size
        self.batches = whole if batches_per_epoch is None else min(whole, batches_per_epoch)
        self.seed, self.shuffle, self.repeats, self.step_batches = (
            seed,
            shuffle,
            repeats,
            step_batches,
        )
        self.set_position(0)

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration runs through, from micro-batch `start_batch`
        on."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order(self.epoch)
        for batch in range(self.start_batch, self.batches):
            places = self._places(batch * self.world_size + self.rank)
            copies, indices = (
                self.epoch * self.repeats + places % self.repeats,
                order[places // self.repeats],
            )
            yield list(zip(copies.tolist(), indices.tolist(), strict=True))

    def _places(self, chunk: int) -> np.ndarray:
        """Those of a chunk's images in the epoch's order: the chunks of a step take turns where
        images repeat."""
        if self.repeats == 1:
            return np.arange(chunk * self.batch_size, (chunk + 1) * self.batch_size)
        step, turn = divmod(chunk, self.step_batches)
        return (
            step * self.step_batches * self.batch_size
            + turn
            + self.step_batches * np.arange(self.batch_size)
        )

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.n)
        return np.random.default_rng((self.seed, epoch, 0, _ORDER_STREAM)).permutation(self.n)


class EvalBatchSampler:
    """Rank r's images r, r + world_size, ... in batches of (0, index).

    Every rank yields the same number of batches of the same sizes; what is missing at the end is padded with entries
    -1-index, which a metric must leave out, so that every image counts once.
    """

    def __init__(self, n: int, batch_size: int, *, rank: int = 0, world_size: int = 1):
        self.n, self.batch_size, self.rank, self.world_size = n, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self._per_rank() // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        indices = self.rank + self.world_size * np.arange(self._per_rank())
        indices = np.where(indices < self.n, indices, -1 - indices % self.n).tolist()
        for first in range(0, len(indices), self.batch_size):
            yield [(0, index) for index in indices[first : first + self.batch_size]]

    def _per_rank(self) -> int:
        return -(-self.n // self.world_size)


def build_loader(
    dataset: ImageDataset,
    batch_sampler: TrainBatchSampler | EvalBatchSampler,
    *,
    num_workers: int,
    pin_mem: bool,
    multiprocessing_context: str | None = None,
) -> DataLoader:
    """A loader whose batches depend on the sampler's keys only; workers stay alive between
    epochs."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        pin_memory=pin_mem and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        multiprocessing_context=multiprocessing_context if num_workers > 0 else None,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # else every iteration would draw its base seed from the global generator
    )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A launcher or a terminal signals the whole group; the parent still needs batches to finish
    its step."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    """Waits for a SIGTERM from the parent, which Python sends to leftover workers when it ends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
