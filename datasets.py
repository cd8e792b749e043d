"""Where images come from: folders, map files, zips and small embedded sets; and in which order they are loaded.

A source knows paths, labels and how to read one image; `ImageDataset` decodes and augments behind a guard that replaces
broken images; the batch samplers yield lists of (epoch, index), so that a sample depends on (seed, epoch, index) only.
"""

import argparse
import hashlib
import logging
import mmap
import os
import signal
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from file_index import IMAGE_EXTENSIONS, PathTable, locate, read_map_file, split_archive, zip_members
from transforms import BrokenImageError, RawImage

logger = logging.getLogger("unimim")

DATA_SETS = ("IMNET", "image_folder", "CIFAR", "CIFAR10", "digits", "shapes")
DIGITS_SIZE = 32
DIGITS_VAL_EVERY = 5  # each class's every fifth digit is held out

Key = tuple[int, int]  # (epoch, index); a negative index -1-i loads image i as padding
Transform = Callable[..., dict[str, torch.Tensor]]  # (raw, rng), and the image's maps where there are some

# what a generator is for: without it, (seed, a) and (seed, a, 0) would be the same stream
_SAMPLE_STREAM, _ORDER_STREAM, _REPLACEMENT_STREAM, _PARTS_STREAM = range(4)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The one generator of all randomness of image `index` in `epoch`; all three are non-negative."""
    return np.random.default_rng((seed, epoch, index, _SAMPLE_STREAM))


# --- files ------------------------------------------------------------------------------------------------------------


class FolderFiles:
    """The files `names` below the folder `root`."""

    def __init__(self, root: Path, names: PathTable | Iterable[str]):
        self.root, self.names = root, names if isinstance(names, PathTable) else PathTable(names)

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


class ZipFiles:
    """The members `names` of a zip, read in place: stored ones as they are, deflated ones inflated.

    The positions are looked up once and kept as arrays; the memory map is opened by the process that reads first, never
    inherited or pickled. A name that is not in the archive is a broken image.

    Raises:
        ValueError: the file is missing, is no zip archive, or holds none of the names.
    """

    def __init__(self, archive: Path, names: PathTable | Iterable[str]):
        self.archive, self.names = archive, names if isinstance(names, PathTable) else PathTable(names)
        members = zip_members(archive)
        found = locate(members.names, self.names)
        if len(found) and found.max() < 0:
            held = members.names[0] if len(members.names) else "nothing"
            raise ValueError(
                f"{archive} holds none of the listed members, such as '{self.names[0]}'; it holds '{held}'"
            )
        self.offset = np.where(found < 0, -1, members.offset[found])
        self.packed_size, self.size = members.packed_size[found], members.size[found]
        self.method = members.method[found].astype(np.int16)
        self._map, self._pid = None, None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return f"{self.archive}@/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """The bytes of member `index`; its checksum is left to the decoder, which sees most damage anyway."""
        if self.offset[index] < 0:
            raise BrokenImageError("not in the archive")
        content = self._content()
        start = self._data_start(content, int(self.offset[index]))
        packed = content[start : start + int(self.packed_size[index])]
        if len(packed) < self.packed_size[index]:
            raise BrokenImageError("the archive ends inside this member")
        return _unpack(packed, int(self.method[index]), int(self.size[index]))

    def _content(self) -> mmap.mmap:
        if self._pid != os.getpid():
            with open(self.archive, "rb") as file:
                self._map, self._pid = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.getpid()
        return self._map

    @staticmethod
    def _data_start(content: mmap.mmap, offset: int) -> int:
        # name and extra lengths of the local header may differ from the central directory's
        header = content[offset : offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise BrokenImageError("no member starts where the archive's directory says")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        return offset + 30 + name_length + extra_length

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None, "_pid": None}


def _unpack(packed: bytes, method: int, size: int) -> bytes:
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


# --- sources ----------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Images by number: encoded bytes or decoded [H, W, 3] uint8, with int64 `labels` (-1: none) and class names."""

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def path(self, index: int) -> str: ...

    def read(self, index: int) -> RawImage: ...


class FileSource:
    """Labelled files in a folder or a zip."""

    def __init__(self, files: FolderFiles | ZipFiles, labels: list[int] | np.ndarray, classes: list[str]):
        self.files, self.labels, self.classes = files, np.asarray(labels, dtype=np.int64), classes
        assert len(self.labels) == len(files)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return self.files.path(index)

    def read(self, index: int) -> bytes:
        return self.files.read(index)


class ArraySource:
    """Decoded images [N, H, W, 3] uint8 in memory."""

    def __init__(self, name: str, images: np.ndarray, labels: list[int] | np.ndarray, classes: list[str]):
        self.name, self.images = name, images
        self.labels, self.classes = np.asarray(labels, dtype=np.int64), classes
        assert len(self.labels) == len(images)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


class PartSource:
    """The images of `source` numbered `chosen`, in that order."""

    def __init__(self, source: Source, chosen: np.ndarray):
        self.source, self.chosen = source, chosen
        self.labels, self.classes = source.labels[chosen], source.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def path(self, index: int) -> str:
        return self.source.path(self.chosen[index])

    def read(self, index: int) -> RawImage:
        return self.source.read(self.chosen[index])


def first_of_each_class(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Ascending numbers of the first `fraction` (rounded, at least one image) of each class in `labels` [N].

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"--label_fraction is {fraction}; it must be above 0 and at most 1")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([numbers[: max(1, round(fraction * len(numbers)))] for numbers in members]))


def map_source(root: Path, split: str) -> FileSource:
    """The images that `root/<split>_map.txt` lists: in the folder `root/<split>`, in `root/<split>.zip`, or in a zip
    that the map itself names (`train.zip@/path`, Swin's form)."""
    map_file = root / f"{split}_map.txt"
    names, labels = read_map_file(map_file)
    archive, names = split_archive(map_file, names)
    if archive is None and (root / split).is_dir():
        files = FolderFiles(root / split, names)
    else:
        archive = archive or root / f"{split}.zip"
        if not archive.is_file():
            raise ValueError(f"{map_file} lists images, but neither {root / split} nor {archive} exists")
        files = ZipFiles(archive, names)
    return FileSource(files, labels, [str(label) for label in range(int(labels.max()) + 1)])


def folder_source(root: Path, *, need_labels: bool, classes: list[str] | None = None) -> FileSource:
    """Images below `root`, found recursively in sorted order; with labels, its sub-folders are the classes.

    `classes` fixes the class order (that of the training folder). Without need of labels any folder will do, flat or
    nested; images that lie directly in it have label -1, and so have all if it is flat.
    """
    if not root.is_dir():
        raise ValueError(f"image folder {root} does not exist")
    found = class_names(root) if classes is None else classes
    unknown = set(class_names(root)) - set(found)
    if need_labels and unknown:
        raise ValueError(f"{root} has class folders that the training folder lacks, such as '{min(unknown)}'")
    names = sorted(images_below(root))
    number = {name: label for label, name in enumerate(found)}
    labels = [number.get(name.partition(os.sep)[0], -1) if os.sep in name else -1 for name in names]
    if need_labels:  # as upstream: images outside every class folder belong to no class
        names = [name for name, label in zip(names, labels, strict=True) if label >= 0]
        labels = [label for label in labels if label >= 0]
    if not names:
        kind = "class folders with images" if need_labels else "images"
        raise ValueError(f"{root} holds no {kind} ({' '.join(IMAGE_EXTENSIONS)})")
    return FileSource(FolderFiles(root, names), labels, found)


def class_names(root: Path) -> list[str]:
    """Sorted names of the sub-folders of `root`, hidden ones left out."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def images_below(root: Path) -> Iterator[str]:
    """Relative paths of all image files below `root`, links followed, hidden folders left out; in no order."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(IMAGE_EXTENSIONS):
                yield os.path.relpath(os.path.join(folder, name), root)


def cifar_source(root: Path, classes: int, *, train: bool) -> ArraySource:
    """CIFAR-10 or CIFAR-100 as torchvision stores it below `root`; nothing is downloaded."""
    from torchvision.datasets import CIFAR10, CIFAR100

    try:
        data = (CIFAR100 if classes == 100 else CIFAR10)(str(root), train=train, download=False)
    except RuntimeError as error:
        raise ValueError(f"--data_path {root} does not hold torchvision's CIFAR-{classes} folder: {error}") from error
    return ArraySource(f"CIFAR-{classes}", data.data, data.targets, data.classes)


def digits_source(*, train: bool) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32; a fifth of each class is the val split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.zeros(len(digits.target), dtype=bool)
    for label in range(10):
        held_out[np.flatnonzero(digits.target == label)[DIGITS_VAL_EVERY - 1 :: DIGITS_VAL_EVERY]] = True
    chosen = ~held_out if train else held_out
    levels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    size = (DIGITS_SIZE, DIGITS_SIZE)
    images = np.stack([np.asarray(Image.fromarray(d).resize(size, Image.Resampling.BICUBIC)) for d in levels])
    labels = digits.target[chosen]
    return ArraySource("digits", np.repeat(images[..., None], 3, axis=3), labels, [str(label) for label in range(10)])


def shapes_source(cache: Path | None, *, train: bool) -> FileSource:
    """The generated scenes of `shapes.py`, written into the cache folder if they are not there yet."""
    from shapes import cached_shapes

    return map_source(cached_shapes(cache), "train" if train else "val")


def build_source(
    data_set: str | None, data_path: str | None, *, train: bool, need_labels: bool, train_path: str | None = None
) -> Source:
    """The source of `--data_set` at `--data_path`; without the former the kind is detected, without both it is digits.

    `train_path` is the training folder of an image_folder that is evaluated: it fixes the order of the classes.

    Raises:
        ValueError: an unknown kind, a missing path, or data that is not there.
    """
    kind = data_set or _detect(data_path)
    if kind not in DATA_SETS:
        raise ValueError(f"--data_set is '{kind}'; it must be one of {', '.join(DATA_SETS)}")
    root = None if data_path is None else Path(data_path)
    if kind == "digits":
        if root is not None:
            raise ValueError(f"--data_set digits comes with scikit-learn; leave --data_path {root} out")
        return digits_source(train=train)
    if kind == "shapes":
        return shapes_source(root, train=train)
    if root is None:
        raise ValueError(f"--data_set {kind} needs --data_path")
    if kind == "IMNET":
        return map_source(root, "train" if train else "val")
    if kind == "image_folder":
        class_root = _split_folder(Path(train_path or root), train=True)
        classes = class_names(class_root) if need_labels and class_root.is_dir() else None
        return folder_source(_split_folder(root, train), need_labels=need_labels, classes=classes)
    return cifar_source(root, 100 if kind == "CIFAR" else 10, train=train)


def _detect(data_path: str | None) -> str:
    if data_path is None:
        logger.info("neither --data_set nor --data_path is given: using scikit-learn's handwritten digits")
        return "digits"
    if any(os.path.isfile(os.path.join(data_path, f"{split}_map.txt")) for split in ("train", "val")):
        kind, reason = "IMNET", "it holds a map file"
    else:
        kind, reason = "image_folder", "it holds no map file"
    logger.info("data set %s detected at %s (%s)", kind, data_path, reason)
    return kind


def _split_folder(root: Path, train: bool) -> Path:
    """`root/train` or `root/val` where `root` is divided so, else `root` itself."""
    split = "train" if train else "val"
    return root / split if all((root / name).is_dir() for name in ("train", split)) else root


# --- the data set -----------------------------------------------------------------------------------------------------


class BadImagesError(RuntimeError):
    """Too many broken images, or one under `--strict_data`; the message lists them."""


class ImageDataset(Dataset):
    """Samples of `source` through `transform`, by keys (epoch, index).

    A sample is the transform's dict plus "label" and "index", the number of the image that was really used. A broken
    image is logged once and replaced by another, which depends on (seed, index) only; all workers share the set of
    broken images. More than `max_bad_images` of them, or the first if `strict`, raise BadImagesError.
    `maps` reads what else belongs to an image, by the name of the view that the transform makes of it.
    """

    def __init__(
        self, source: Source, transform: Transform, *, seed: int, max_bad_images: int = 100, strict: bool = False
    ):
        self.source, self.transform, self.seed = source, transform, seed
        self.maps: dict[str, Callable[[int], np.ndarray]] = {}
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
            return {**sample, "label": int(self.source.labels[used]), "index": -1 - used if index < 0 else used}
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
    """A set of at least `capacity` numbers from 0 on in memory that forked and spawned workers share, without a lock.

    Each number has its place, or one of those behind it if that is taken. Of two processes that take one place at the
    same moment the later wins: the other's number is missing then, and is added again when it is met again. What does
    not fit any more is left out.
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


class RandomParts:
    """Part maps [rows, columns] without meaning: each cell's part is drawn uniformly, the same for an image each time.

    In the place of real maps they show what these are worth.
    """

    def __init__(self, num_parts: int, grid: tuple[int, int], seed: int):
        self.num_parts, self.grid, self.seed = num_parts, grid, seed

    def read(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index, 0, _PARTS_STREAM))
        return rng.integers(self.num_parts, size=self.grid, dtype=np.uint8)

    def read_scores(self, index: int) -> np.ndarray:
        raise ValueError("--part_source random has no scores: take token_selection=random")


def build_dataset(args: argparse.Namespace, *, train: bool, transform: Transform, need_labels: bool) -> ImageDataset:
    """The data set of the flags `data_set`, `data_path`, `eval_data_path`, `seed`, `max_bad_images`, `strict_data`.

    For training `label_fraction`, where there is such a flag, keeps the first images of each class.
    For evaluation `eval_data_path` replaces `data_path` where it is given; an image_folder needs it unless it is
    divided into `train` and `val`.
    """
    eval_path = None if train else getattr(args, "eval_data_path", None)
    path = eval_path or args.data_path
    kind = args.data_set or _detect(path)
    if kind == "image_folder" and not train and not eval_path and _split_folder(Path(path), train) == Path(path):
        raise ValueError(f"evaluation on image folders needs --eval_data_path, or a folder {path}/val")
    source = build_source(kind, path, train=train, need_labels=need_labels, train_path=args.data_path)
    fraction = getattr(args, "label_fraction", 1.0)
    if train and fraction != 1.0:
        source = PartSource(source, first_of_each_class(source.labels, fraction))
    return ImageDataset(source, transform, seed=args.seed, max_bad_images=args.max_bad_images, strict=args.strict_data)


def fingerprint(dataset: Dataset) -> str:
    """Sixteen hexadecimal digits of which images there are and in which order, by their names below their root."""
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


# --- order ------------------------------------------------------------------------------------------------------------


class TrainBatchSampler:
    """Batches of (epoch, index) of one rank: chunks of `batch_size` of a permutation by (seed, epoch).

    Micro-batch j of rank r is chunk j * world_size + r, so one process that accumulates world_size times as often sees,
    in order, what the ranks see side by side. Partial chunks are dropped.

    With `repeats` each image comes that many times in a step of `step_batches` chunks, in as many of them as there are,
    each time with draws of its own; an epoch has the same number of batches (specs/a2mim.md 4.4).

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
        self.seed, self.shuffle, self.repeats, self.step_batches = seed, shuffle, repeats, step_batches
        self.set_position(0)

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration runs through, from micro-batch `start_batch` on."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order(self.epoch)
        for batch in range(self.start_batch, self.batches):
            places = self._places(batch * self.world_size + self.rank)
            copies, indices = self.epoch * self.repeats + places % self.repeats, order[places // self.repeats]
            yield list(zip(copies.tolist(), indices.tolist(), strict=True))

    def _places(self, chunk: int) -> np.ndarray:
        """Those of a chunk's images in the epoch's order: the chunks of a step take turns where images repeat."""
        if self.repeats == 1:
            return np.arange(chunk * self.batch_size, (chunk + 1) * self.batch_size)
        step, turn = divmod(chunk, self.step_batches)
        return step * self.step_batches * self.batch_size + turn + self.step_batches * np.arange(self.batch_size)

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
    """A loader whose batches depend on the sampler's keys only; workers stay alive between epochs."""
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
    """A launcher or a terminal signals the whole group; the parent still needs batches to finish its step."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    """Waits for a SIGTERM from the parent, which Python sends to leftover workers when it ends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
