"""Read the packed samples of SemMAE's published pre-training: one `.npy` an image with its parts.

docs/methods/mae_semmae.md#packed-samples has the columns. A folder of them is a source like others,
whose images bring their own part maps.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimim.data.jpeg import BrokenImageError
from unimim.data.sources import PACKED_SUFFIXES, FileSource, folder_source, logger
from unimim.data.views import MEAN_STD

PUBLISHED_PARTS = 7
PUBLISHED_SIDE = 224


@dataclass(frozen=True)
class PackedSample:
    """One packed sample, rearranged on the grid of patches.

    Attributes:
        image: uint8 [S, S, 3], the mean color where no token is listed.
        parts: uint8 [G, G], 0 where no token is listed.
        scores: float16 [G, G], descending in the order of the list and 0 elsewhere, so that a
            selection by score picks the listed tokens.
    """

    image: np.ndarray
    parts: np.ndarray
    scores: np.ndarray


class PackedSource(FileSource):
    """Packed samples in class folders: an image and its part map come from one file."""

    _last: tuple[int, PackedSample] | None = None  # the map is asked for right after the image

    def sample(self, index: int) -> PackedSample:
        """Return sample `index`; raise BrokenImageError if the file is not such a sample."""
        if self._last is None or self._last[0] != index:
            data = self.files.read(index)
            try:
                self._last = index, unpack(data, self.path(index))
            except ValueError as error:
                raise BrokenImageError(str(error)) from error
        return self._last[1]

    def read(self, index: int) -> np.ndarray:
        return self.sample(index).image


class PackedParts:
    """The part maps in the samples of `source`, read as those of `PartMaps`."""

    kind = "packed"
    num_parts = PUBLISHED_PARTS

    def __init__(self, source: PackedSource):
        self.source = source

    def read(self, index: int) -> np.ndarray:
        return self.source.sample(index).parts

    def read_scores(self, index: int) -> np.ndarray:
        return self.source.sample(index).scores


def packed_source(
    root: Path, *, need_labels: bool, classes: list[str] | None = None
) -> PackedSource:
    """Return all packed samples below `root`, as `folder_source` does images.

    Raises:
        ValueError: there are none, or the first file is not such a sample.
    """
    found = folder_source(root, need_labels=need_labels, classes=classes, suffixes=PACKED_SUFFIXES)
    rows, columns = read_packed(found.path(0)).parts.shape
    logger.info(
        "%s: %d packed samples of %d x %d patches are read in place, images and part maps together",
        root, len(found), rows, columns,
    )  # fmt: skip
    return PackedSource(found.files, found.labels, found.classes)


def read_packed(
    path: str | Path, *, num_parts: int = PUBLISHED_PARTS, image_size: int = PUBLISHED_SIDE
) -> PackedSample:
    """Read a packed sample from a file; raise ValueError, naming it, if it is something else."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return unpack(data, path, num_parts=num_parts, image_size=image_size)


def unpack(
    data: bytes,
    path: str | Path,
    *,
    num_parts: int = PUBLISHED_PARTS,
    image_size: int = PUBLISHED_SIDE,
) -> PackedSample:
    """Return the packed sample that `data`, the content of the file `path`, holds.

    It is an array [tokens, 2 * num_parts + 1 + 3 * p * p] of part sizes, one-hot part, patch index
    and the patch's pixels. The pixels are assumed to be normalized with ImageNet's mean and std, as
    in the published code (docs/methods/mae_semmae.md#packed-samples).

    Raises:
        ValueError: it is not such an array, a patch index is outside the grid, or the parts are
            not one-hot or disagree with the sizes. The message names the file.
    """
    table = _read_table(data, path, num_parts)
    patch = round(((table.shape[1] - 2 * num_parts - 1) / 3) ** 0.5)
    side = image_size // patch
    columns = [num_parts, 2 * num_parts, 2 * num_parts + 1]
    sizes, one_hot, indices, pixels = np.split(table, columns, axis=1)

    indices = indices[:, 0].astype(np.int64)
    distinct = len(np.unique(indices)) == len(indices)
    if not distinct or indices.min() < 0 or indices.max() >= side * side:
        raise ValueError(
            f"{path}: column {2 * num_parts} must list distinct patch indices "
            f"from 0 to {side * side - 1}"
        )
    if not ((one_hot == 0) | (one_hot == 1)).all() or (one_hot.sum(1) != 1).any():
        raise ValueError(f"{path}: columns {num_parts} to {2 * num_parts - 1} must be one-hot")
    if (sizes != one_hot.sum(0)).any():
        raise ValueError(f"{path}: columns 0 to {num_parts - 1} must count the tokens of each part")

    parts = np.zeros(side * side, dtype=np.uint8)
    parts[indices] = one_hot.argmax(1)
    scores = np.zeros(side * side, dtype=np.float16)
    scores[indices] = np.linspace(1, 0, len(indices), endpoint=False)
    image = _assemble_image(pixels.reshape(-1, patch, patch, 3), indices, side)
    return PackedSample(image, parts.reshape(side, side), scores.reshape(side, side))


def _read_table(data: bytes, path: str | Path, num_parts: int) -> np.ndarray:
    """Return the array of a packed sample; raise ValueError if its shape or type is wrong.

    Unlike `np.load` it takes no memory that a damaged header asks for, and never unpickles.
    """
    try:
        file = io.BytesIO(data)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is not of version 1.0")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in "fiu":
            raise ValueError(f"its values are {dtype}")
        values = np.frombuffer(data, dtype, offset=file.tell())
        table = values.reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # damaged headers raise anything
        raise ValueError(f"{path} cannot be read as an array: {error}") from error
    pixels = table.shape[-1] - 2 * num_parts - 1 if table.ndim == 2 and len(table) else 0
    patch = round(max(pixels / 3, 0) ** 0.5)
    if patch == 0 or 3 * patch * patch != pixels:
        raise ValueError(
            f"{path} is {table.shape}; a packed sample is [tokens, {2 * num_parts + 1} + 3 * p * p]"
        )
    if not np.isfinite(table).all():
        raise ValueError(f"{path} holds values that are not finite")
    return table


def _assemble_image(patches: np.ndarray, indices: np.ndarray, side: int) -> np.ndarray:
    """Return the uint8 image [side * p, side * p, 3] with normalized patches [n, p, p, 3]."""
    patch = patches.shape[1]
    canvas = np.zeros((side * side, patch, patch, 3))
    canvas[indices] = patches
    image = canvas.reshape(side, side, patch, patch, 3).swapaxes(1, 2)
    image = image.reshape(side * patch, side * patch, 3)
    mean, std = (np.array(values) for values in MEAN_STD["imagenet"])
    return np.clip(np.rint((image * std + mean) * 255), 0, 255).astype(np.uint8)
