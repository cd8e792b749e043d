"""Part maps: which semantic part each cell of an image's grid belongs to, as files that training
reads in place.

Three forms hold the same maps (specs/semmae.md C.7): one memory-mapped array in the order of the
images, a folder of greyscale PNGs, or a zip of them. `PartMaps` reads all three, `PartMapWriter`
fills the array from several processes, and `read_packed` understands the `.npy` samples that
SemMAE's published pre-training consumed (B.3).
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
from unimim.data.jpeg import BrokenImageError
from unimim.data.random import _PARTS_STREAM
from unimim.data.sources import FileSource, Source
from unimim.data.views import MEAN_STD
from unimim.files import file_sha256

MISSING = 255  # a row of it has not been written
ARRAY, ARRAY_META, SCORES, PNG_META = "parts.npy", "parts.json", "scores.npy", "parts_meta.json"
FULL_IMAGE = "full_image_square_resize"
PUBLISHED_PARTS, PUBLISHED_SIDE = 7, 224  # of the packed samples

Grid = tuple[int, int]


class MissingMapError(ValueError):
    """The data set has an image without a part map; the message names both."""


# --- what is known about a set of maps ------------------------------------------------------------


@dataclass(frozen=True)
class PartMeta:
    """What is stored beside the maps as JSON. Ids are 0..`num_parts` - 1; `background_id` is one of
    them or None.

    `names_sha256` and `map_file_sha256` tie row n to image n; `scores` names the array of token
    scores, if any.
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

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> "PartMeta":
        """ValueError, naming `path`, for what is no description of part maps or one of another
        kind."""
        try:
            values = json.loads(text)
            known = {
                field.name: values[field.name] for field in fields(cls) if field.name in values
            }
            meta = cls(**{**known, "grid": tuple(known["grid"])})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be JSON with num_parts, grid and num_images: {error}"
            ) from error
        if (meta.version, meta.coverage) != (cls.version, cls.coverage):
            raise ValueError(
                f"{path} has version {meta.version} and coverage {meta.coverage}; "
                f"version {cls.version} and {cls.coverage} can be read"
            )
        if not 1 <= meta.num_parts <= MISSING:
            raise ValueError(
                f"{path} has num_parts {meta.num_parts}; it must be from 1 to {MISSING}"
            )
        return meta


def image_names(source: Source) -> Sequence[str]:
    """The images' paths below their root, in order; numbered names for images that come from no
    file."""
    return source.files.names if isinstance(source, FileSource) else numbered_names(len(source))


def numbered_names(count: int) -> list[str]:
    return [f"{number:08d}.png" for number in range(count)]


def png_names(names: Sequence[str]) -> list[str]:
    """The maps' names: those of the images with the suffix .png. ValueError where two images would
    share one."""
    renamed = [PurePosixPath(name).with_suffix(".png").as_posix() for name in names]
    if len(set(renamed)) < len(renamed):
        twice = next(name for name in renamed if renamed.count(name) > 1)
        raise ValueError(
            f"two images would have the part map {twice}: their names differ in the suffix only"
        )
    return renamed


def names_sha256(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\n")
    return digest.hexdigest()


# --- reading --------------------------------------------------------------------------------------


class PartMaps:
    """The part maps of a data set: `read(n)` is the map of image n, uint8 [Hp, Wp] with ids below
    `num_parts`.

    Files are opened by the process that reads first, never inherited or pickled: workers may fork
    or be spawned.
    """

    def __init__(
        self, rows: "_ArrayRows | _PngRows", meta: PartMeta, scores: "_ArrayRows | None" = None
    ):
        self._rows, self.meta, self._scores = rows, meta, scores

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        num_images: int | None = None,
        paths: Sequence[str] | None = None,
        map_file: str | Path | None = None,
    ) -> "PartMaps":
        """Maps at `path`: a folder with `parts.npy` (or that file), a folder of PNGs, or a zip of
        PNGs.

        `paths` are the images' names below their root (`image_names`), which PNGs are found by and
        every form is checked against; without them PNGs are 00000000.png, 00000001.png, ...
        `map_file` is checked by its hash.

        Raises:
            ValueError: naming the file: no maps there, a wrong number, shape or type, or maps made for other images.
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
        meta_file = array.with_suffix(".json")
        meta = PartMeta.from_json(_read_file(meta_file), meta_file)
        shape = (meta.num_images, *meta.grid)
        scores = (
            _ArrayRows(array.with_name(meta.scores), shape, np.float16) if meta.scores else None
        )
        return cls(_ArrayRows(array, shape, np.uint8), meta, scores)

    @classmethod
    def _open_pngs(cls, path: Path, paths: Sequence[str] | None) -> "PartMaps":
        about = FolderFiles(path, [PNG_META]) if path.is_dir() else ZipFiles(path, [PNG_META])
        try:
            meta = PartMeta.from_json(about.read(0), path / PNG_META)
        except BrokenImageError as error:
            raise ValueError(
                f"{about.path(0)}, which describes the part maps, cannot be read: {error}"
            ) from error
        names = png_names(numbered_names(meta.num_images) if paths is None else paths)
        return cls(
            _PngRows(FolderFiles(path, names) if path.is_dir() else ZipFiles(path, names)), meta
        )

    def _check_images(self, path: Path, num_images: int | None, paths, map_file) -> None:
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
        """The map of image `index`, uint8 [Hp, Wp].

        Raises:
            MissingMapError: there is none.
            ValueError: it has another shape than the grid, or an id that is no part.
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
        """The token scores of image `index`, float16 [Hp, Wp]: the larger, the sooner a token is
        selected (B.5)."""
        if self._scores is None:
            raise ValueError(
                f"{self._rows.path(index)} has no scores beside it; extract with --save_scores"
            )
        return self._scores.read(index)


class _ArrayRows:
    """Rows of an array [N, Hp, Wp] that is mapped, not loaded.

    All processes share its pages: for ImageNet's 1.28 M images 251 MB at 14 x 14 and 1.0 GB at 28 x
    28, at most.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: type):
        self.file = file
        rows = self._map()
        if (rows.shape, rows.dtype) != (shape, np.dtype(dtype)):
            raise ValueError(
                f"{file} is {rows.dtype} {rows.shape}; {ARRAY_META} says {np.dtype(dtype)} {shape}"
            )
        self._rows, self._pid = rows, os.getpid()

    def _map(self) -> np.ndarray:
        try:
            return np.load(self.file, mmap_mode="r").view(
                np.ndarray
            )  # whose slices cost less than a memmap's
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.file} cannot be read as an array: {error}") from error

    def path(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def read(self, index: int) -> np.ndarray:
        if self._pid != os.getpid():
            self._rows, self._pid = self._map(), os.getpid()
        return np.array(self._rows[index])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None, "_pid": None}


class _PngRows:
    """One 8-bit greyscale PNG for each image."""

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
            if image.mode not in ("L", "P"):  # a palette's numbers are the ids too
                raise ValueError(f"its pixels are {image.mode}, not 8-bit gray levels")
            return np.array(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"part map {self.path(index)} cannot be read: {error}") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}, which describes the part maps, cannot be read: {error.strerror}"
        ) from error


# --- writing --------------------------------------------------------------------------------------


class PartMapWriter:
    """Fills the array form in `folder`: one process calls `create`, then any number of them write,
    each its own rows.

    Rows that are written stay when the folder is opened again, so that an interrupted extraction
    goes on.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.meta = PartMeta.from_json(_read_file(folder / ARRAY_META), folder / ARRAY_META)
        self._maps = np.lib.format.open_memmap(folder / ARRAY, mode="r+")
        self._scores = (
            np.lib.format.open_memmap(folder / self.meta.scores, mode="r+")
            if self.meta.scores
            else None
        )

    @staticmethod
    def create(folder: str | Path, meta: PartMeta) -> None:
        """Makes the files, all rows missing; leaves those of an earlier call with the same `meta`
        as they are.

        Raises:
            ValueError: the folder holds maps of another description.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / ARRAY_META).is_file():
            _check_same(
                PartMeta.from_json(_read_file(folder / ARRAY_META), folder / ARRAY_META),
                meta,
                folder,
            )
            return
        shape = (meta.num_images, *meta.grid)
        if meta.scores:
            np.lib.format.open_memmap(
                folder / meta.scores, mode="w+", dtype=np.float16, shape=shape
            ).flush()
        rows = np.lib.format.open_memmap(folder / ARRAY, mode="w+", dtype=np.uint8, shape=shape)
        rows[:] = MISSING
        rows.flush()
        # last and in one step: the description says that the arrays are whole
        files.write_text(folder / ARRAY_META, meta.to_json())

    def missing(self, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Those of the rows `rank`, `rank` + `world_size`, ... that have not been written."""
        rows = np.arange(rank, self.meta.num_images, world_size)
        return rows[(self._maps[rank::world_size] == MISSING).all(axis=(1, 2))]

    def write(self, index: int, parts: np.ndarray, scores: np.ndarray | None = None) -> None:
        """Puts the map [Hp, Wp] of image `index`; scores go first, since the map marks the row as
        written."""
        assert parts.shape == self.meta.grid and parts.max() < self.meta.num_parts, (
            parts.shape,
            parts.max(),
        )
        assert (scores is None) == (self._scores is None), (
            "scores are written for all images or for none"
        )
        if scores is not None:
            self._scores[index] = scores
        self._maps[index] = parts

    def flush(self) -> None:
        for array in (self._scores, self._maps):
            if array is not None:
                array.flush()


def _check_same(found: PartMeta, wanted: PartMeta, folder: Path) -> None:
    differing = [
        f.name for f in fields(PartMeta) if getattr(found, f.name) != getattr(wanted, f.name)
    ]
    if differing:
        changes = ", ".join(
            f"{n} {getattr(found, n)} there, {getattr(wanted, n)} now" for n in differing
        )
        raise ValueError(
            f"{folder} holds part maps of another run ({changes}): remove it or give another folder"
        )


def write_zip(maps: PartMaps, archive: str | Path, names: Sequence[str]) -> None:
    """Writes the maps as PNGs into a zip, which appears when it is complete; scores are left
    behind.

    `names` are the images' (`image_names`). ValueError where a map is missing.
    """
    meta = PartMeta(**{**asdict(maps.meta), "scores": None})

    def write(draft: BinaryIO) -> None:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as file:
            file.writestr(_entry(PNG_META), meta.to_json())
            for index, name in enumerate(png_names(names)):
                file.writestr(_entry(name), png_of(maps.read(index)))

    files.write_atomically(archive, write)


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(
        name, date_time=(1980, 1, 1, 0, 0, 0)
    )  # the same maps give the same archive


def png_of(parts: np.ndarray) -> bytes:
    """A part map [Hp, Wp] as an 8-bit greyscale PNG."""
    buffer = io.BytesIO()
    Image.fromarray(parts.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


# --- the published packed samples -----------------------------------------------------------------


@dataclass(frozen=True)
class PackedSample:
    """What one packed `.npy` holds, put back in its place (specs/semmae.md B.3).

    image: [S, S, 3] uint8, the mean color where no token is listed; parts: uint8 [G, G], 0 there;
    scores: float16 [G, G], falling in the order of the list and 0 elsewhere, so that a selection by
    score finds the listed tokens.
    """

    image: np.ndarray
    parts: np.ndarray
    scores: np.ndarray


def read_packed(
    path: str | Path, *, num_parts: int = PUBLISHED_PARTS, image_size: int = PUBLISHED_SIDE
) -> PackedSample:
    """Reads a float array [tokens, 2 * num_parts + 1 + 3 * p * p]: part sizes, one-hot part, cell,
    pixels of a patch.

    Pixels are taken to be normalized with ImageNet's mean and deviation, which the published code
    assumes.

    Raises:
        ValueError: naming the file: another shape, cells that are not of the grid, or parts that are not one-hot or
            disagree with the sizes.
    """
    table = _load_packed(Path(path), num_parts)
    patch = round(((table.shape[1] - 2 * num_parts - 1) / 3) ** 0.5)
    side = image_size // patch
    sizes, one_hot, cells, pixels = np.split(
        table, [num_parts, 2 * num_parts, 2 * num_parts + 1], axis=1
    )
    cells = cells[:, 0].astype(np.int64)
    if len(np.unique(cells)) < len(cells) or cells.min() < 0 or cells.max() >= side * side:
        raise ValueError(
            f"{path}: column {2 * num_parts} must list different cells from 0 to {side * side - 1}"
        )
    if not ((one_hot == 0) | (one_hot == 1)).all() or (one_hot.sum(1) != 1).any():
        raise ValueError(f"{path}: columns {num_parts} to {2 * num_parts - 1} must be one-hot")
    if (sizes != one_hot.sum(0)).any():
        raise ValueError(f"{path}: columns 0 to {num_parts - 1} must count the tokens of each part")
    parts, scores = np.zeros(side * side, dtype=np.uint8), np.zeros(side * side, dtype=np.float16)
    parts[cells] = one_hot.argmax(1)
    scores[cells] = np.linspace(1, 0, len(cells), endpoint=False)
    image = _place_patches(pixels.reshape(-1, patch, patch, 3), cells, side)
    return PackedSample(image, parts.reshape(side, side), scores.reshape(side, side))


def _load_packed(path: Path, num_parts: int) -> np.ndarray:
    try:
        table = np.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error
    pixels = table.shape[-1] - 2 * num_parts - 1
    patch = round(max(pixels / 3, 0) ** 0.5)
    if table.ndim != 2 or patch == 0 or 3 * patch * patch != pixels:
        raise ValueError(
            f"{path} is {table.shape}; a packed sample is [tokens, {2 * num_parts + 1} + 3 * p * p]"
        )
    return table


def _place_patches(patches: np.ndarray, cells: np.ndarray, side: int) -> np.ndarray:
    """Normalized patches [n, p, p, 3] at their cells of an image [side * p, side * p, 3] uint8."""
    patch = patches.shape[1]
    canvas = np.zeros((side * side, patch, patch, 3))
    canvas[cells] = patches
    image = (
        canvas.reshape(side, side, patch, patch, 3)
        .swapaxes(1, 2)
        .reshape(side * patch, side * patch, 3)
    )
    mean, std = (np.array(values) for values in MEAN_STD["imagenet"])
    return np.clip(np.rint((image * std + mean) * 255), 0, 255).astype(np.uint8)


class RandomParts:
    """Part maps [rows, columns] without meaning: each cell's part is drawn uniformly, the same for
    an image each time.

    In the place of real maps they show what these are worth.
    """

    def __init__(self, num_parts: int, grid: tuple[int, int], seed: int):
        self.num_parts, self.grid, self.seed = num_parts, grid, seed

    def read(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index, 0, _PARTS_STREAM))
        return rng.integers(self.num_parts, size=self.grid, dtype=np.uint8)

    def read_scores(self, index: int) -> np.ndarray:
        raise ValueError("--part_source random has no scores: take token_selection=random")
