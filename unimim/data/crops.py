"""Crops: where they are drawn, and how images and maps are cut and resized."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from masking_generator import Pair
from unimim.data.color import ColorDraws, _between

PILLOW_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
TORCH_FILTERS = ("bicubic", "bilinear")
INTERPOLATIONS = (*PILLOW_FILTERS, "random")

CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
POINTS_PER_CELL = 4  # along each side of a patch, where a map of the picture is looked up


@dataclass(frozen=True)
class ViewDraws:
    """One image's random choices: `box` is (top, left, height, width) in pixels of the picture
    after the flip.

    `jitter`: steps (name, factor) on the whole picture, before the crop; `second`: how the second
    view is resized.
    """

    flip: bool
    box: tuple[int, int, int, int]
    interpolation: str
    color: ColorDraws | None
    jitter: tuple[tuple[str, float], ...] = ()
    second: str = "lanczos"


def draw_crop(
    rng: np.random.Generator, size: Pair, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box (top, left, height, width): area a fraction in `scale`, log-uniform aspect, up to 10
    tries (spec 2.1)."""
    height, width = size
    log_aspect = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * _between(rng, scale)
        aspect = math.exp(_between(rng, log_aspect))
        crop_w, crop_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            top, left = (
                int(rng.random() * (height - crop_h + 1)),
                int(rng.random() * (width - crop_w + 1)),
            )
            return top, left, crop_h, crop_w
    return _central_box(size)


def draw_clipped_crop(
    rng: np.random.Generator, size: Pair, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box (top, left, height, width) of linear probing: as `draw_crop`, but at the first try, each
    side cut down to the picture's (spec SemMAE A.10)."""
    height, width = size
    area = height * width * _between(rng, scale)
    aspect = math.exp(_between(rng, (math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]))))
    crop_w = min(max(round(math.sqrt(area * aspect)), 1), width)
    crop_h = min(max(round(math.sqrt(area / aspect)), 1), height)
    return (
        int(rng.random() * (height - crop_h + 1)),
        int(rng.random() * (width - crop_w + 1)),
        crop_h,
        crop_w,
    )


def draw_short_side_crop(
    rng: np.random.Generator, size: Pair, scale: tuple[float, float], target: Pair
):
    """The largest box (top, left, height, width) with the aspect of `target`, anywhere: what is
    left of a random crop after a resize of the short side (spec SemAIM 9). `scale` has no part in
    it."""
    height, width = size
    factor = min(height / target[0], width / target[1])
    crop_h, crop_w = max(round(factor * target[0]), 1), max(round(factor * target[1]), 1)
    return (
        int(rng.random() * (height - crop_h + 1)),
        int(rng.random() * (width - crop_w + 1)),
        crop_h,
        crop_w,
    )


def _central_box(size: Pair) -> tuple[int, int, int, int]:
    """The largest centerd box whose aspect lies in the allowed range."""
    height, width = size
    crop_h, crop_w = height, width
    if width / height < CROP_ASPECT[0]:
        crop_h = round(width / CROP_ASPECT[0])
    elif width / height > CROP_ASPECT[1]:
        crop_w = round(height * CROP_ASPECT[1])
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


# --- reference pipeline: Pillow, published order --------------------------------------------------


def reference_crop(
    image: Image.Image, draws: ViewDraws, size: Pair, interpolation: str | None = None
) -> Image.Image:
    """Flip the whole picture, cut the box out, resize it to `size` (height, width)."""
    if draws.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, height, width = draws.box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size[1], size[0]), PILLOW_FILTERS[interpolation or draws.interpolation])


# --- fast pipeline: color planes [3, H, W] uint8 --------------------------------------------------


def fast_crop(
    picture: np.ndarray, draws: ViewDraws, size: Pair, interpolation: str | None = None
) -> np.ndarray:
    """`reference_crop` of a picture [H, W, 3], as contiguous color planes [3, *size].

    The resize is symmetric, so the flip may follow it, where there are fewer pixels and the crop is
    not yet copied.
    """
    top, left, height, width = draws.box
    if draws.flip:
        left = picture.shape[1] - left - width
    resized = _resize(
        picture[top : top + height, left : left + width], size, interpolation or draws.interpolation
    )
    planes = np.empty((3, *size), dtype=np.uint8)
    cv2.split(cv2.flip(resized, 1) if draws.flip else resized, list(planes))
    return planes


def _resize(crop: np.ndarray, size: Pair, interpolation: str) -> np.ndarray:
    """As Pillow 12: width first. Pillow 13 begins with the height of tall pictures, which differs
    where 8 bits clip."""
    if interpolation not in TORCH_FILTERS:
        return np.asarray(
            Image.fromarray(crop).resize((size[1], size[0]), PILLOW_FILTERS[interpolation])
        )
    # [1, 3, h, w] with the strides of channels-last memory, for which torch has the fastest kernel
    pixels = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    return (
        interpolate(pixels, size=size, mode=interpolation, antialias=True)[0]
        .permute(1, 2, 0)
        .numpy()
    )


# --- maps that cover a picture --------------------------------------------------------------------


def crop_map(cells: np.ndarray, draws: ViewDraws, picture: Pair, grid: Pair) -> np.ndarray:
    """What a map of the whole picture says at 4 x 4 points in each patch of the view: [rows,
    columns, 16].

    The view's crop and flip are applied to the map [any size] as to the picture of `picture`
    (height, width) pixels; `grid` is the view's (rows, columns) of patches (specs/semmae.md B.5).
    """
    top, left, height, width = draws.box
    if draws.flip:  # the box is one of the mirrored picture
        left = picture[1] - left - width
    rows = _points(top, height, picture[0], grid[0], cells.shape[0])
    columns = _points(left, width, picture[1], grid[1], cells.shape[1])
    points = cells[np.ix_(rows, columns[::-1] if draws.flip else columns)]
    shape = grid[0], POINTS_PER_CELL, grid[1], POINTS_PER_CELL
    return points.reshape(shape).swapaxes(1, 2).reshape(*grid, -1)


def _points(start: int, length: int, picture: int, patches: int, cells: int) -> np.ndarray:
    """Cells of the map, along one axis, at equally spaced points of the crop."""
    share = (np.arange(patches * POINTS_PER_CELL) + 0.5) / POINTS_PER_CELL / patches
    return np.minimum(cells - 1, ((start + share * length) / picture * cells).astype(np.int64))


def majority(points: np.ndarray) -> np.ndarray:
    """The most frequent of the small numbers in the last axis, of equally frequent ones the
    smallest: uint8."""
    votes = points.reshape(-1, points.shape[-1]).astype(np.int64)
    kinds = int(votes.max()) + 1
    votes += kinds * np.arange(len(votes))[:, None]
    counts = np.bincount(votes.ravel(), minlength=kinds * len(votes)).reshape(-1, kinds)
    return counts.argmax(1).reshape(points.shape[:-1]).astype(np.uint8)


def mean_score(points: np.ndarray) -> np.ndarray:
    """The mean over the last axis, float32."""
    return points.mean(-1, dtype=np.float32)
