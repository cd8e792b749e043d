"""Read and write part maps: the semantic part of every patch of an image.

The maps of a data set are stored as one memory-mapped array in the order of the images, as a folder
of grayscale PNGs, or as a zip of PNGs. `PartMaps` reads all three, and `PartMapWriter` fills the
array from several processes (docs/methods/mae_semmae.md#part-maps-and-crops).
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

from unimim import files
from unimim.data.files import FolderFiles, ZipFiles
from unimim.data.jpeg import PILLOW_ERRORS, BrokenImageError
from unimim.data.random import _PARTS_STREAM
from unimim.data.sources import FileSource, Source
from unimim.files import file_sha256

MISSING = 255  # fills rows that have not been written
ARRAY, ARRAY_META, SCORES, PNG_META = "parts.npy", "parts.json", "scores.npy", "parts_meta.json"
CHECKSUMS = "checksums.json"  # SHA-256 of these files by their names, once all rows are written
FULL_IMAGE = "full_image_square_resize"

Grid = tuple[int, int]


class MissingMapError(ValueError):
    """Signals an image without a part map; the message names both."""


# --- metadata -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartMeta:
    """The metadata stored as JSON beside the maps.

    Part ids are 0 ... `num_parts` - 1; `background_id` is one of them or None. `names_sha256` and
    `map_file_sha256` identify the images that the maps belong to; `scores` is the file name of the
    token scores, if there are any; `exif_orientation` says whether the images were turned as their
    EXIF data say before the maps were made.
    """

    num_parts: int
    grid: Grid
    num_images: int
    background_id: int | None = None
    part_source: str = "learned"
    teacher: str | None = None
    checkpoint_sha256: str | None = None
    map_file_sha256: str | None = None
    names_sha256: str | None = None
    scores: str | None = None
    coverage: str = FULL_IMAGE
    version: int = 1
    exif_orientation: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> "PartMeta":
        """Parse the metadata; raise ValueError, naming `path`, if it is invalid or another kind."""
        try:
            values = json.loads(text)
            names = [field.name for field in fields(cls)]
            known = {name: values[name] for name in names if name in values}
            meta = cls(**{**known, "grid": tuple(known["grid"])})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be JSON with num_parts, grid and num_images: {error}"
            ) from error
        if (meta.version, meta.coverage) != (cls.version, cls.coverage):
            raise ValueError(
                f"{path} has version {meta.version} and coverage {meta.coverage}; "
                f"use version {cls.version} and {cls.coverage}"
            )
        if not 1 <= meta.num_parts <= MISSING:
            raise ValueError(
                f"{path} has num_parts {meta.num_parts}; it must be from 1 to {MISSING}"
            )
        return meta


def image_names(source: Source) -> Sequence[str]:
    """Return the images' paths relative to their root; numbered names for images in memory."""
    return source.files.names if isinstance(source, FileSource) else numbered_names(len(source))


def numbered_names(count: int) -> list[str]:
    """Return 00000000.png, 00000001.png, ..."""
    return [f"{number:08d}.png" for number in range(count)]


def png_names(names: Sequence[str]) -> list[str]:
    """Return the maps' names: the images' names with the suffix .png.

    Raises:
        ValueError: two images would share one map.
    """
    renamed = [PurePosixPath(name).with_suffix(".png").as_posix() for name in names]
    if len(set(renamed)) < len(renamed):
        twice = next(name for name in renamed if renamed.count(name) > 1)
        raise ValueError(
            f"two images would share the part map {twice}: their names differ in the suffix only"
        )
    return renamed


def names_sha256(names: Sequence[str]) -> str:
    """Return a hash of the names and their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\n")
    return digest.hexdigest()


# --- reading --------------------------------------------------------------------------------------


class PartMaps:
    """The part maps of a data set: `read(n)` returns the part ids of image n, uint8 [Hp, Wp].

    Each process opens the files when it first reads; they are never inherited or pickled, so that
    workers may be forked or spawned.
    """

    def __init__(
        self, rows: "_ArrayRows | _PngRows", meta: PartMeta, scores: "_ArrayRows | None" = None
    ):
        self._rows = rows
        self.meta = meta
        self._scores = scores

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        num_images: int | None = None,
        paths: Sequence[str] | None = None,
        map_file: str | Path | None = None,
    ) -> "PartMaps":
        """Open the maps at `path`.

        `path` is a folder with `parts.npy` (or that file), a folder of PNGs, or a zip of PNGs.
        `paths` are the images' names relative to their root (`image_names`); PNGs are found by them
        and all kinds of maps are checked against them. Without them PNGs are 00000000.png,
        00000001.png, ... `map_file` is checked by its hash.

        Raises:
            ValueError: there are no maps, their number, shape or type is wrong, or they were made
                for other images. The message names the file.
        """
        path = Path(path)
        array = path if path.suffix == ".npy" else path / ARRAY
        if array.is_file():
            maps = cls._open_array(array)
        elif path.is_dir() or path.is_file():
            maps = cls._open_pngs(path, paths)
        else:
            raise ValueError(
                f"--part_maps {path} does not exist; give a folder, a zip or a {ARRAY}"
            )
        maps._check_images(path, num_images, paths, map_file)
        return maps

    @classmethod
    def _open_array(cls, array: Path) -> "PartMaps":
        check_sums(array.with_name(CHECKSUMS))
        meta_file = array.with_suffix(".json")
        meta = PartMeta.from_json(_read_file(meta_file), meta_file)
        shape = (meta.num_images, *meta.grid)
        scores = None
        if meta.scores:
            scores = _ArrayRows(array.with_name(meta.scores), shape, np.float16)
        return cls(_ArrayRows(array, shape, np.uint8), meta, scores)

    @classmethod
    def _open_pngs(cls, path: Path, paths: Sequence[str] | None) -> "PartMaps":
        files_of = FolderFiles if path.is_dir() else ZipFiles
        meta_file = files_of(path, [PNG_META])
        try:
            meta = PartMeta.from_json(meta_file.read(0), path / PNG_META)
        except BrokenImageError as error:
            raise ValueError(
                f"{meta_file.path(0)}, which describes the part maps, cannot be read: {error}"
            ) from error
        names = png_names(numbered_names(meta.num_images) if paths is None else paths)
        return cls(_PngRows(files_of(path, names)), meta)

    def _check_images(self, path: Path, num_images: int | None, paths, map_file) -> None:
        """Raise ValueError unless the maps were made for these images."""
        wanted = len(paths) if num_images is None and paths is not None else num_images
        if wanted is not None and wanted != len(self):
            raise ValueError(f"{path} has {len(self)} part maps, the data set has {wanted} images")
        made_for = self.meta.names_sha256
        if paths is not None and made_for and made_for != names_sha256(paths):
            raise ValueError(
                f"{path} was made for images of other names or in another order (names_sha256)"
            )
        made_for = self.meta.map_file_sha256
        if map_file is not None and made_for and made_for != file_sha256(map_file):
            raise ValueError(
                f"{path} was made for another map file than {map_file} (map_file_sha256)"
            )

    @property
    def kind(self) -> str:
        return self.meta.part_source

    @property
    def num_parts(self) -> int:
        return self.meta.num_parts

    @property
    def grid(self) -> Grid:
        return self.meta.grid

    @property
    def has_scores(self) -> bool:
        return self._scores is not None

    def __len__(self) -> int:
        return self.meta.num_images

    def read(self, index: int) -> np.ndarray:
        """Return the map of image `index`, uint8 [Hp, Wp].

        Raises:
            MissingMapError: the image has no map.
            ValueError: the map's shape is not the grid's, or it contains an invalid id.
        """
        row = self._rows.read(index)
        if row.shape != self.grid:
            raise ValueError(
                f"{self._rows.path(index)} is {row.shape}, {PNG_META} says {self.grid}"
            )
        largest = int(row.max())
        if largest == MISSING and (row == MISSING).all():
            raise MissingMapError(
                f"{self._rows.path(index)} has not been written: finish the extraction"
            )
        if largest >= self.num_parts:
            raise ValueError(
                f"{self._rows.path(index)} holds part {largest}; there are {self.num_parts}, from 0"
            )
        return row

    def read_scores(self, index: int) -> np.ndarray:
        """Return the token scores of image `index`, float16 [Hp, Wp]; the highest are kept."""
        if self._scores is None:
            raise ValueError(
                f"{self._rows.path(index)} has no scores beside it; extract with --save_scores"
            )
        return self._scores.read(index)


class _ArrayRows:
    """The rows of a memory-mapped array [N, Hp, Wp], whose pages all processes share.

    For ImageNet's 1.28 M images that is at most 251 MB at 14 x 14 and 1.0 GB at 28 x 28.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: type):
        self.file = file
        rows = self._map()
        if (rows.shape, rows.dtype) != (shape, np.dtype(dtype)):
            raise ValueError(
                f"{file} is {rows.dtype} {rows.shape}; {ARRAY_META} says {np.dtype(dtype)} {shape}"
            )
        self._rows = rows
        self._pid = os.getpid()

    def _map(self) -> np.ndarray:
        try:
            # slices of an ndarray cost less than a memmap's
            return np.load(self.file, mmap_mode="r").view(np.ndarray)
        except MemoryError:
            raise
        except Exception as error:  # damaged headers raise anything
            raise ValueError(f"{self.file} cannot be read as an array: {error}") from error

    def path(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def read(self, index: int) -> np.ndarray:
        if self._pid != os.getpid():
            self._rows = self._map()
            self._pid = os.getpid()
        return np.array(self._rows[index])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None, "_pid": None}


class _PngRows:
    """One 8-bit grayscale PNG per image."""

    def __init__(self, files: FolderFiles | ZipFiles):
        self.files = files

    def path(self, index: int) -> str:
        return self.files.path(index)

    def read(self, index: int) -> np.ndarray:
        try:
            data = self.files.read(index)
        except BrokenImageError as error:
            raise MissingMapError(f"part map {self.path(index)} is missing: {error}") from error
        try:
            image = Image.open(io.BytesIO(data))
            if image.mode not in ("L", "P"):  # palette indices are ids as well
                raise ValueError(f"its pixels are {image.mode}, not 8-bit gray levels")
            return np.array(image)
        except PILLOW_ERRORS as error:
            raise ValueError(f"part map {self.path(index)} cannot be read: {error}") from error


def check_sums(path: Path) -> None:
    """Raise ValueError unless the files that `path` lists have the checksums that it states.

    Maps that have not been finished have no such file, as those of older versions.
    """
    if not path.is_file():
        return
    try:
        stated = json.loads(path.read_bytes())
        pairs = [(str(name), str(digest)) for name, digest in stated.items()]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, digest in pairs:
        if file_sha256(path.with_name(Path(name).name)) != digest:
            raise ValueError(
                f"{path.with_name(name)} is damaged or was changed: its SHA-256 is not the one in "
                f"{path}; extract the part maps again"
            )


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}, which describes the part maps, cannot be read: {error.strerror}"
        ) from error


# --- writing --------------------------------------------------------------------------------------


class PartMapWriter:
    """Fill the array in `folder`: one process calls `create`, then each of several writes its rows.

    At the end each calls `flush` and one calls `seal`. Rows are kept when the folder is opened
    again, so an interrupted extraction can be resumed.
    """

    def __init__(self, folder: str | Path):
        folder = self.folder = Path(folder)
        (folder / CHECKSUMS).unlink(missing_ok=True)  # what is written from here on changes them
        self.meta = PartMeta.from_json(_read_file(folder / ARRAY_META), folder / ARRAY_META)
        self._maps = np.lib.format.open_memmap(folder / ARRAY, mode="r+")
        self._scores = None
        if self.meta.scores:
            self._scores = np.lib.format.open_memmap(folder / self.meta.scores, mode="r+")

    @staticmethod
    def create(folder: str | Path, meta: PartMeta) -> None:
        """Create the files with all rows missing; keep existing files with the same `meta`.

        Raises:
            ValueError: the folder holds maps with other metadata.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        meta_file = folder / ARRAY_META
        if meta_file.is_file():
            _check_same(PartMeta.from_json(_read_file(meta_file), meta_file), meta, folder)
            return
        open_memmap = np.lib.format.open_memmap
        shape = (meta.num_images, *meta.grid)
        if meta.scores:
            open_memmap(folder / meta.scores, mode="w+", dtype=np.float16, shape=shape).flush()
        rows = open_memmap(folder / ARRAY, mode="w+", dtype=np.uint8, shape=shape)
        rows[:] = MISSING
        rows.flush()
        # written last and atomically: the metadata asserts that the arrays are complete
        files.write_text(meta_file, meta.to_json())

    def missing(self, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return which of the rows rank, rank + world_size, ... have not been written."""
        rows = np.arange(rank, self.meta.num_images, world_size)
        return rows[(self._maps[rank::world_size] == MISSING).all(axis=(1, 2))]

    def write(self, index: int, parts: np.ndarray, scores: np.ndarray | None = None) -> None:
        """Write the map [Hp, Wp] of image `index`, and its scores if the metadata names them."""
        assert parts.shape == self.meta.grid, parts.shape
        assert parts.max() < self.meta.num_parts, parts.max()
        assert (scores is None) == (self._scores is None), (
            "scores are written for all images or for none"
        )
        # scores first: the map marks the row as written
        if scores is not None:
            self._scores[index] = scores
        self._maps[index] = parts

    def flush(self) -> None:
        for array in (self._scores, self._maps):
            if array is not None:
                array.flush()

    def seal(self) -> None:
        """Write the checksums of the files; one process calls after all have flushed."""
        names = filter(None, (ARRAY, ARRAY_META, self.meta.scores))
        sums = {name: file_sha256(self.folder / name) for name in names}
        files.write_text(self.folder / CHECKSUMS, json.dumps(sums, indent=1))


def _check_same(stored: PartMeta, wanted: PartMeta, folder: Path) -> None:
    """Raise ValueError, listing the differences, unless both metadata agree."""
    changes = []
    for field in fields(PartMeta):
        there, now = getattr(stored, field.name), getattr(wanted, field.name)
        if there != now:
            changes.append(f"{field.name} {there} there, {now} now")
    if changes:
        raise ValueError(
            f"{folder} holds part maps of another run ({', '.join(changes)}); "
            "remove it or use another folder"
        )


def write_zip(maps: PartMaps, archive: str | Path, names: Sequence[str]) -> None:
    """Write the maps as PNGs into a zip, atomically and without the scores.

    `names` are the images' names (`image_names`).

    Raises:
        ValueError: a map is missing.
    """
    meta = PartMeta(**{**asdict(maps.meta), "scores": None})

    def write(draft: BinaryIO) -> None:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as file:
            file.writestr(_entry(PNG_META), meta.to_json())
            for index, name in enumerate(png_names(names)):
                file.writestr(_entry(name), png_of(maps.read(index)))

    files.write_atomically(archive, write)


def _entry(name: str) -> zipfile.ZipInfo:
    """Return a member with a fixed date, so that equal maps give equal archives."""
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def png_of(parts: np.ndarray) -> bytes:
    """Return a part map [Hp, Wp] as an 8-bit grayscale PNG."""
    buffer = io.BytesIO()
    Image.fromarray(parts.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


class RandomParts:
    """Meaningless part maps [rows, columns], the control for learned ones.

    The part of every patch is drawn uniformly, always the same for an image.
    """

    def __init__(self, num_parts: int, grid: tuple[int, int], seed: int):
        self.num_parts = num_parts
        self.grid = grid
        self.seed = seed

    def read(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index, 0, _PARTS_STREAM))
        return rng.integers(self.num_parts, size=self.grid, dtype=np.uint8)

    def read_scores(self, index: int) -> np.ndarray:
        raise ValueError("--part_source random has no scores; use token_selection=random")
