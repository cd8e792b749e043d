"""Draw crops, and cut and resize images and maps accordingly."""

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
POINTS_PER_SIDE = 4  # a map of the image is sampled at 4 x 4 points in each patch

Box = tuple[int, int, int, int]  # (top, left, height, width) in pixels


@dataclass(frozen=True)
class ViewDraws:
    """The random parameters of one image's views.

    Attributes:
        flip: whether the image is mirrored.
        box: the crop, in pixels of the image after the flip.
        interpolation: how the crop is resized.
        color: the strong view's colors, None if there is no strong view.
        jitter: steps (name, factor) applied to the whole image, before the crop.
        second: how the second view is resized.
    """

    flip: bool
    box: Box
    interpolation: str
    color: ColorDraws | None
    jitter: tuple[tuple[str, float], ...] = ()
    second: str = "lanczos"


def draw_crop(rng: np.random.Generator, size: Pair, scale: tuple[float, float]) -> Box:
    """Draw the box of a random resized crop of an image of `size` (height, width).

    The box has a fraction of the image's area within `scale` and a log-uniform aspect ratio. If it
    does not fit in 10 attempts, the crop is central, as in torchvision.
    """
    height, width = size
    for _ in range(CROP_ATTEMPTS):
        crop_h, crop_w = _draw_sides(rng, size, scale)
        if 0 < crop_w <= width and 0 < crop_h <= height:
            return _draw_position(rng, size, crop_h, crop_w)
    return _central_box(size)


def draw_clipped_crop(rng: np.random.Generator, size: Pair, scale: tuple[float, float]) -> Box:
    """Draw MAE's box for linear probing: one attempt, each side clipped to the image's."""
    height, width = size
    crop_h, crop_w = _draw_sides(rng, size, scale)
    crop_h = min(max(crop_h, 1), height)
    crop_w = min(max(crop_w, 1), width)
    return _draw_position(rng, size, crop_h, crop_w)


def draw_short_side_crop(
    rng: np.random.Generator, size: Pair, scale: tuple[float, float], target: Pair
) -> Box:
    """Draw SemAIM's box for linear probing: the largest one with the aspect ratio of `target`.

    This equals resizing the short side and a random crop; `scale` is not used.
    """
    height, width = size
    factor = min(height / target[0], width / target[1])
    crop_h = max(round(factor * target[0]), 1)
    crop_w = max(round(factor * target[1]), 1)
    return _draw_position(rng, size, crop_h, crop_w)


def _draw_sides(rng: np.random.Generator, size: Pair, scale: tuple[float, float]) -> Pair:
    """Draw (height, width) of a box of random area and aspect ratio; it may exceed the image."""
    area = size[0] * size[1] * _between(rng, scale)
    log_aspect = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    aspect = math.exp(_between(rng, log_aspect))
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def _draw_position(rng: np.random.Generator, size: Pair, crop_h: int, crop_w: int) -> Box:
    """Draw the position of a box of crop_h x crop_w, uniformly within the image."""
    top = int(rng.random() * (size[0] - crop_h + 1))
    left = int(rng.random() * (size[1] - crop_w + 1))
    return top, left, crop_h, crop_w


def _central_box(size: Pair) -> Box:
    """Return the largest centered box whose aspect ratio lies in the allowed range."""
    height, width = size
    crop_h, crop_w = height, width
    if width / height < CROP_ASPECT[0]:
        crop_h = round(width / CROP_ASPECT[0])
    elif width / height > CROP_ASPECT[1]:
        crop_w = round(height * CROP_ASPECT[1])
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


# --- reference pipeline: Pillow, published order --------------------------------------------------


def reference_crop(
    image: Image.Image, params: ViewDraws, size: Pair, interpolation: str | None = None
) -> Image.Image:
    """Flip the whole image, crop the box, and resize it to `size` (height, width)."""
    if params.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, height, width = params.box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size[1], size[0]), PILLOW_FILTERS[interpolation or params.interpolation])


# --- fast pipeline: color planes [3, H, W] uint8 --------------------------------------------------


def fast_crop(
    image: np.ndarray, params: ViewDraws, size: Pair, interpolation: str | None = None
) -> np.ndarray:
    """Return `reference_crop` of an image [H, W, 3] as contiguous color planes [3, *size].

    Resizing commutes with mirroring, so the flip comes after it, when there are fewer pixels.
    """
    top, left, height, width = params.box
    if params.flip:
        left = image.shape[1] - left - width
    crop = image[top : top + height, left : left + width]
    resized = _resize(crop, size, interpolation or params.interpolation)
    planes = np.empty((3, *size), dtype=np.uint8)
    cv2.split(cv2.flip(resized, 1) if params.flip else resized, list(planes))
    return planes


def _resize(crop: np.ndarray, size: Pair, interpolation: str) -> np.ndarray:
    """Resize [H, W, 3] to `size` exactly as Pillow 12 does: width first.

    Pillow 13 resizes the height of tall images first, which differs where 8 bits clip.
    """
    if interpolation not in TORCH_FILTERS:
        pixels = Image.fromarray(crop).resize((size[1], size[0]), PILLOW_FILTERS[interpolation])
        return np.asarray(pixels)
    # [1, 3, h, w] with channels-last strides, for which torch has its fastest kernel
    pixels = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    pixels = interpolate(pixels, size=size, mode=interpolation, antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


# --- maps that cover an image ---------------------------------------------------------------------


def crop_map(values: np.ndarray, params: ViewDraws, image_size: Pair, grid: Pair) -> np.ndarray:
    """Sample a map of the whole image at 4 x 4 points in each patch of the view.

    The view's crop and flip apply to the map (of any size) as to the image of `image_size` (height,
    width); `grid` is the view's (rows, columns) of patches. Returns [rows, columns, 16]
    (docs/methods/mae_semmae.md#part-maps-and-crops).
    """
    top, left, height, width = params.box
    if params.flip:  # the box is relative to the mirrored image
        left = image_size[1] - left - width
    rows = _sample_points(top, height, image_size[0], grid[0], values.shape[0])
    columns = _sample_points(left, width, image_size[1], grid[1], values.shape[1])
    points = values[np.ix_(rows, columns[::-1] if params.flip else columns)]
    shape = grid[0], POINTS_PER_SIDE, grid[1], POINTS_PER_SIDE
    return points.reshape(shape).swapaxes(1, 2).reshape(*grid, -1)


def _sample_points(
    start: int, length: int, image_side: int, patches: int, map_side: int
) -> np.ndarray:
    """Return the map's indices along one axis at equally spaced points of the crop."""
    fraction = (np.arange(patches * POINTS_PER_SIDE) + 0.5) / POINTS_PER_SIDE / patches
    indices = ((start + fraction * length) / image_side * map_side).astype(np.int64)
    return np.minimum(map_side - 1, indices)


def majority(points: np.ndarray) -> np.ndarray:
    """Return the most frequent small integer of the last axis, uint8; ties go to the smallest."""
    votes = points.reshape(-1, points.shape[-1]).astype(np.int64)
    kinds = int(votes.max()) + 1
    votes += kinds * np.arange(len(votes))[:, None]  # one bincount for all rows
    counts = np.bincount(votes.ravel(), minlength=kinds * len(votes)).reshape(-1, kinds)
    return counts.argmax(1).reshape(points.shape[:-1]).astype(np.uint8)


def mean_score(points: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis, float32."""
    return points.mean(-1, dtype=np.float32)
