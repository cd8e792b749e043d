"""Sources: what images a data set has and where each is, from map files, folders, CIFAR or
digits."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from unimim.data.file_index import IMAGE_EXTENSIONS, PathTable, read_map_file, split_archive
from unimim.data.files import FolderFiles, ZipFiles, locate_members
from unimim.data.jpeg import RawImage
from unimim.data.shared_index import shared_arrays

logger = logging.getLogger("unimim")

DATA_SETS = ("IMNET", "image_folder", "CIFAR", "CIFAR10", "digits", "shapes")
DIGITS_SIZE = 32
DIGITS_VAL_EVERY = 5  # each class's every fifth digit is held out


# --- sources --------------------------------------------------------------------------------------


class Source(Protocol):
    """Images by number: encoded bytes or decoded [H, W, 3] uint8, with int64 `labels` (-1: none)
    and class names."""

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def path(self, index: int) -> str: ...

    def read(self, index: int) -> RawImage: ...


class FileSource:
    """Labelled files in a folder or a zip."""

    def __init__(
        self, files: FolderFiles | ZipFiles, labels: list[int] | np.ndarray, classes: list[str]
    ):
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

    def __init__(
        self, name: str, images: np.ndarray, labels: list[int] | np.ndarray, classes: list[str]
    ):
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
    """Ascending numbers of the first `fraction` (rounded, at least one image) of each class in
    `labels` [N].

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"--label_fraction is {fraction}; it must be above 0 and at most 1")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(
        np.concatenate([numbers[: max(1, round(fraction * len(numbers)))] for numbers in members])
    )


def map_source(root: Path, split: str) -> FileSource:
    """The images that `root/<split>_map.txt` lists: in the folder `root/<split>`, in
    `root/<split>.zip`, or in a zip that the map itself names (`train.zip@/path`, Swin's form)."""
    map_file = root / f"{split}_map.txt"
    listed = shared_arrays("map file", [map_file], partial(_listed, map_file))
    names, labels = PathTable.of_arrays(listed["text"], listed["ends"]), listed["labels"]
    archive = os.fsdecode(listed["archive"].tobytes())
    archive = map_file.parent / archive if archive else None
    if archive is None and (root / split).is_dir():
        files = FolderFiles(root / split, names)
    else:
        archive = archive or root / f"{split}.zip"
        if not archive.is_file():
            raise ValueError(
                f"{map_file} lists images, but neither {root / split} nor {archive} exists"
            )
        members = partial(locate_members, archive, names)
        files = ZipFiles(archive, names, shared_arrays("members", [map_file, archive], members))
    return FileSource(files, labels, [str(label) for label in range(int(labels.max()) + 1)])


def _listed(map_file: Path) -> dict[str, np.ndarray]:
    """What a map file says, in arrays: names, labels and the bytes of an archive's name."""
    names, labels = read_map_file(map_file)
    archive, names = split_archive(map_file, names)
    named = b"" if archive is None else os.fsencode(os.path.relpath(archive, map_file.parent))
    return {
        "text": names.text,
        "ends": names.ends,
        "labels": labels,
        "archive": np.frombuffer(named, dtype=np.uint8),
    }


def folder_source(root: Path, *, need_labels: bool, classes: list[str] | None = None) -> FileSource:
    """Images below `root`, found recursively in sorted order; with labels, its sub-folders are the
    classes.

    `classes` fixes the class order (that of the training folder). Without need of labels any folder
    will do, flat or nested; images that lie directly in it have label -1, and so have all if it is
    flat.
    """
    if not root.is_dir():
        raise ValueError(f"image folder {root} does not exist")
    found = class_names(root) if classes is None else classes
    unknown = set(class_names(root)) - set(found)
    if need_labels and unknown:
        raise ValueError(
            f"{root} has class folders that the training folder lacks, such as '{min(unknown)}'"
        )
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
    return sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    )


def images_below(root: Path) -> Iterator[str]:
    """Relative paths of all image files below `root`, links followed, hidden folders left out; in
    no order."""
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
        raise ValueError(
            f"--data_path {root} does not hold torchvision's CIFAR-{classes} folder: {error}"
        ) from error
    return ArraySource(f"CIFAR-{classes}", data.data, data.targets, data.classes)


def digits_source(*, train: bool) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32; a fifth of each class is
    the val split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.zeros(len(digits.target), dtype=bool)
    for label in range(10):
        held_out[
            np.flatnonzero(digits.target == label)[DIGITS_VAL_EVERY - 1 :: DIGITS_VAL_EVERY]
        ] = True
    chosen = ~held_out if train else held_out
    levels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    size = (DIGITS_SIZE, DIGITS_SIZE)
    images = np.stack(
        [np.asarray(Image.fromarray(d).resize(size, Image.Resampling.BICUBIC)) for d in levels]
    )
    labels = digits.target[chosen]
    return ArraySource(
        "digits",
        np.repeat(images[..., None], 3, axis=3),
        labels,
        [str(label) for label in range(10)],
    )


def shapes_source(cache: Path | None, *, train: bool) -> FileSource:
    """The generated scenes of `unimim/data/shapes.py`, written into the cache folder if they are
    not there yet."""
    from unimim.data.shapes import cached_shapes

    return map_source(cached_shapes(cache), "train" if train else "val")


def build_source(
    data_set: str | None,
    data_path: str | None,
    *,
    train: bool,
    need_labels: bool,
    train_path: str | None = None,
) -> Source:
    """The source of `--data_set` at `--data_path`; without the former the kind is detected, without
    both it is digits.

    `train_path` is the training folder of an image_folder that is evaluated: it fixes the order of
    the classes.

    Raises:
        ValueError: an unknown kind, a missing path, or data that is not there.
    """
    kind = data_set or _detect(data_path)
    if kind not in DATA_SETS:
        raise ValueError(f"--data_set is '{kind}'; it must be one of {', '.join(DATA_SETS)}")
    root = None if data_path is None else Path(data_path)
    if kind == "digits":
        if root is not None:
            raise ValueError(
                f"--data_set digits comes with scikit-learn; leave --data_path {root} out"
            )
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
        logger.info(
            "neither --data_set nor --data_path is given: using scikit-learn's handwritten digits"
        )
        return "digits"
    if any(
        os.path.isfile(os.path.join(data_path, f"{split}_map.txt")) for split in ("train", "val")
    ):
        kind, reason = "IMNET", "it holds a map file"
    else:
        kind, reason = "image_folder", "it holds no map file"
    logger.info("data set %s detected at %s (%s)", kind, data_path, reason)
    return kind


def _split_folder(root: Path, train: bool) -> Path:
    """`root/train` or `root/val` where `root` is divided so, else `root` itself."""
    split = "train" if train else "val"
    return root / split if all((root / name).is_dir() for name in ("train", split)) else root
