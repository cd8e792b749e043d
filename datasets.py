"""Load images: the data set, the order of the samples, and the data loader.

A source (unimim/data/sources.py) knows paths, labels and how to read one image. `ImageDataset`
decodes and augments, and replaces broken images. The batch samplers yield lists of (epoch, index),
so a sample is a function of (seed, epoch, index), whatever the number of workers and ranks.
"""

import argparse
import hashlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unimim.data.class_lists import read_classes
from unimim.data.files import Key
from unimim.data.hub import located
from unimim.data.jpeg import (
    MAX_IMAGE_PIXELS,
    BrokenImageError,
    limit_pixels,
    pixel_limit,
)
from unimim.data.preparation import Preparation, preparation
from unimim.data.random import (
    _ORDER_STREAM,
    _REPLACEMENT_STREAM,
    ImplicitOrder,
    sample_rng,
)
from unimim.data.sources import (
    FOLDERS,
    ArraySource,
    FileSource,
    PartSource,
    Source,
    _split_folder,
    build_source,
    detect,
    first_of_each_class,
    listed_images,
    logger,
)

# called with (raw, rng), and with the image's maps if the data set has any
Transform = Callable[..., dict[str, torch.Tensor]]
# by the name of a view: reads an image's map
Maps = dict[str, Callable[[int], np.ndarray]]

# how multiprocessing names a worker's socket below the temporary folder, and Linux' longest name
SOCKET = "/pymp-xxxxxxxx/listener-xxxxxxxx"
SOCKET_NAME_BYTES = 107

LISTED_ORDER = 2**26  # images, above which no process holds the order of an epoch


# --- the data set ---------------------------------------------------------------------------------


class BadImagesError(RuntimeError):
    """Signals too many broken images, or a single one under `--strict_data`, and lists them."""


class ImageDataset(Dataset):
    """Samples of `source` after `transform`, addressed by keys (epoch, index).

    A sample is the transform's dict plus "label" and "index", the index of the image actually
    used. A broken image is logged once and replaced by another, chosen by (seed, index) alone; all
    workers share the set of broken images. More than `max_bad_images` of them, or the first if
    `strict`, raise BadImagesError. `maps` holds, by the name of a view, a function that reads an
    image's map (part ids, part scores), which the transform crops like the image. `prepare` turns
    or composites images before they are transformed.
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
        prepare: Preparation | None = None,
    ):
        self.prepare = prepare
        self.source = source
        self.transform = transform
        self.seed = seed
        self.maps = maps or {}
        self.max_bad_images = 0 if strict else max_bad_images
        self.bad = SharedNumbers(min(len(source), self.max_bad_images + 1))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict:
        return self.load(key, self.transform)

    def load(self, key: Key, transform: Transform) -> dict:
        """Return the sample of `key` as `transform` makes it."""
        epoch, index = key
        wanted = -1 - index if index < 0 else index  # padding is loaded like any other image
        for used in self._candidates(wanted):
            try:
                raw = self.source.read(used)
                raw = raw if self.prepare is None else self.prepare(raw)
                rng = sample_rng(self.seed, epoch, wanted)
                maps = {view: read(used) for view, read in self.maps.items()}
                sample = transform(raw, rng, maps) if maps else transform(raw, rng)
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
        """Yield `wanted`, then its replacements, without images known to be broken."""
        rng = None
        candidate = wanted
        while True:
            if candidate not in self.bad:
                yield candidate
            if len(self.bad) >= len(self):
                raise BadImagesError(self._summary())
            rng = rng or np.random.default_rng((self.seed, wanted, 0, _REPLACEMENT_STREAM))
            candidate = int(rng.integers(len(self)))

    def _report(self, index: int, error: BrokenImageError) -> None:
        if index in self.bad:  # another worker has reported it
            return
        self.bad.add(index)
        logger.warning("broken image %s is replaced by another: %s", self.source.path(index), error)
        if len(self.bad) > self.max_bad_images:
            raise BadImagesError(self._summary()) from error

    def _summary(self) -> str:
        broken = self.bad.sorted()
        listed = ", ".join(self.source.path(index) for index in broken[:10])
        allowed = f"{self.max_bad_images} allowed by --max_bad_images or --strict_data"
        more = " ..." if len(broken) > 10 else ""
        return f"{len(broken)} of {len(self)} images are broken ({allowed}): {listed}{more}"


class SharedNumbers:
    """A lock-free set of at least `capacity` non-negative integers in shared memory.

    Forked and spawned workers see the same set, a hash table with linear probing. If two processes
    write one slot at the same moment, the later one wins; the other's number is missing until it is
    added again. Numbers that no longer fit are dropped.
    """

    def __init__(self, capacity: int):
        self.slots = torch.full((2 * capacity + 64,), -1, dtype=torch.int64).share_memory_()

    def __contains__(self, number: int) -> bool:
        return bool((self.slots.numpy() == number).any())

    def __len__(self) -> int:
        return len(self.sorted())

    def add(self, number: int) -> None:
        slots = self.slots.numpy()
        probes = (number + np.arange(len(slots))) % len(slots)
        free = probes[slots[probes] < 0]
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
    dataset_class: type[ImageDataset] = ImageDataset,
) -> ImageDataset:
    """Build the data set that the flags describe.

    Reads `data_set`, `data_path`, `eval_data_path`, `seed`, `max_bad_images` and `strict_data`, and
    where a script has them `max_image_pixels` (a limit for the whole process), `allow_outside`,
    `class_map`, which lists the class folders of an image_folder, and, for training,
    `label_fraction` and `label_list`, which keep the first images of each class or those in a list.
    For evaluation, `eval_data_path` overrides `data_path`; an image_folder needs it unless it is
    divided into `train` and `val`.
    `maps` opens what else belongs to the images of a source.
    """
    limit_pixels(getattr(args, "max_image_pixels", MAX_IMAGE_PIXELS))
    eval_path = None if train else getattr(args, "eval_data_path", None)
    path = eval_path or args.data_path
    path = path and located(path)  # None for digits
    kind = args.data_set or detect(path)

    # images beside the training ones would be evaluated on in silence
    if (
        kind in FOLDERS
        and not train
        and not eval_path
        and _split_folder(Path(path), train) == Path(path)
    ):
        raise ValueError(
            f"evaluation on image folders needs --eval_data_path, or a folder {path}/val"
        )
    class_map = getattr(args, "class_map", None)
    source = build_source(
        kind,
        path,
        train=train,
        need_labels=need_labels,
        train_path=args.data_path,
        allow_outside=getattr(args, "allow_outside", False),
        classes=read_classes("--class_map", class_map) if class_map else None,
    )
    if kind in FOLDERS and need_labels and not class_map:
        warn_of_few_classes(source, getattr(args, "nb_classes", None), path)

    # low-shot training takes the first images of each class, or those of a list
    fraction = getattr(args, "label_fraction", 1.0)
    label_list = getattr(args, "label_list", None)
    if train and fraction != 1.0:
        if label_list:
            raise ValueError(f"--label_list {label_list} says which images: leave --label_fraction")
        source = PartSource(source, first_of_each_class(source.labels, fraction))
    elif train and label_list:
        source = PartSource(source, listed_images(source, label_list))
    return dataset_class(
        source,
        transform,
        seed=args.seed,
        max_bad_images=args.max_bad_images,
        strict=args.strict_data,
        maps=None if maps is None else maps(source),
        prepare=preparation(args),
    )


def warn_of_few_classes(source: Source, nb_classes: int | None, path: str) -> None:
    """Log that labels are positions in sorted order, where a model of more classes is asked for."""
    found = len(source.classes)
    if nb_classes is not None and found < nb_classes:
        logger.warning(
            "%s has %d class folders and --nb_classes is %d: labels are positions of the sorted "
            "folders, which are wrong for a model of other classes; --class_map FILE lists the "
            "folders in the model's order",
            path, found, nb_classes,
        )  # fmt: skip


def fingerprint(dataset: Dataset) -> str:
    """Return a hash (16 hexadecimal digits) of the images' names and their order.

    Names are relative to the root, so that a data set may move.
    """
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
    """Yield one rank's batches of (epoch, index): chunks of a permutation set by (seed, epoch).

    Micro-batch j of rank r is chunk j * world_size + r, so that one process with world_size times
    the accumulation sees the same images in the same order as world_size ranks. Partial chunks are
    dropped.

    `repeats` is timm's repeated augmentation: every image comes that many times in a step of
    `step_batches` chunks, spread over the chunks, each time augmented anew. The number of batches
    in an epoch stays the same, so an epoch sees fewer images.

    Raises:
        ValueError: there are fewer images than one batch on every rank needs.
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
                f"{n} images do not fill one batch of --batch_size {batch_size} on {world_size} "
                f"process(es); lower --batch_size to at most {n // world_size}, "
                "or use fewer processes or more images"
            )
        self.n = n
        self.batch_size = batch_size
        self.batches = whole if batches_per_epoch is None else min(whole, batches_per_epoch)
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.shuffle = shuffle
        self.repeats = repeats
        self.step_batches = step_batches
        self.set_position(0)

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next iteration run through `epoch`, starting at micro-batch `start_batch`."""
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        order = self.order(self.epoch)
        for batch in range(self.start_batch, self.batches):
            positions = self._positions(batch * self.world_size + self.rank)
            # Repeats of an image differ in the epoch of their key, hence in their augmentation.
            epochs = self.epoch * self.repeats + positions % self.repeats
            indices = order[positions // self.repeats]
            yield list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def _positions(self, chunk: int) -> np.ndarray:
        """Return the positions of a chunk's samples in the epoch, where every image stands
        `repeats` times in a row."""
        if self.repeats == 1:
            return np.arange(chunk * self.batch_size, (chunk + 1) * self.batch_size)
        # The chunks of a step are dealt out like cards, which separates the repeats of an image.
        step, turn = divmod(chunk, self.step_batches)
        first = step * self.step_batches * self.batch_size
        return first + turn + self.step_batches * np.arange(self.batch_size)

    def order(self, epoch: int) -> np.ndarray | ImplicitOrder:
        """Return the images of an epoch in their order, to be indexed by arrays of positions.

        It is an array [n] of 4 bytes an image, which only the process that trains holds; of more
        than `LISTED_ORDER` images it is computed where it is needed.
        """
        rng = np.random.default_rng((self.seed, epoch, 0, _ORDER_STREAM))
        if self.shuffle and self.n > LISTED_ORDER:
            return ImplicitOrder(self.n, rng)
        numbers = np.arange(self.n, dtype=np.int32 if self.n < 2**31 else np.int64)
        if self.shuffle:
            rng.shuffle(numbers)
        return numbers


class EvalBatchSampler:
    """Yield rank r's images r, r + world_size, ... in batches of (0, index).

    All ranks yield the same number of batches of the same sizes. The end is padded with entries
    -1 - index, which metrics must leave out, so that every image counts once.
    """

    def __init__(self, n: int, batch_size: int, *, rank: int = 0, world_size: int = 1):
        self.n = n
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self._per_rank() // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, self._per_rank(), self.batch_size):
            turns = np.arange(first, min(first + self.batch_size, self._per_rank()))
            indices = self.rank + self.world_size * turns
            indices = np.where(indices < self.n, indices, -1 - indices % self.n)
            yield [(0, index) for index in indices.tolist()]

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
    """Return a loader whose batches depend on the sampler's keys only.

    Workers stay alive between epochs and leave signals to the parent.

    Raises:
        ValueError: the path of the temporary folder is too long for workers to send batches.
    """
    if num_workers > 0:
        _check_temporary_folder()
    return _Loader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=getattr(dataset, "collate", None),
        num_workers=num_workers,
        pin_memory=pin_mem and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        multiprocessing_context=multiprocessing_context if num_workers > 0 else None,
        worker_init_fn=partial(_start_worker, pixel_limit()),
        # without it every iteration would draw a base seed from the global generator
        generator=torch.Generator(),
    )


def _check_temporary_folder() -> None:
    """Raise ValueError where a worker's socket would have too long a name.

    The worker would drop its batches with no more than a traceback, and training wait for ever.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) + len(SOCKET) > SOCKET_NAME_BYTES:
        raise ValueError(
            f"the temporary folder {folder} has too long a path for the workers of the loader; "
            "set TMPDIR to a shorter one, or use --num_workers 0"
        )


class _Loader(DataLoader):
    """Starts its workers with signals held back, which they do until they can leave them."""

    def __iter__(self) -> Any:
        numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(pixels: int, _worker: int) -> None:
    limit_pixels(pixels)  # a spawned worker has Pillow's own
    _leave_signals_to_the_parent()


def _leave_signals_to_the_parent() -> None:
    """Ignore signals to the process group: the parent still needs batches to finish its step."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    """Exit on a SIGTERM from the parent, which Python sends to leftover workers when it ends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
