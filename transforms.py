"""Views of an image: decoding, pre-training's crop and colours in two equal pipelines, fine-tuning's transforms.

Everything random is drawn first, from one generator, into a `ViewDraws`; the fast pipeline (simplejpeg, torch, OpenCV)
and the reference pipeline (Pillow, in the published order of operations) then apply the same draws. Images leave as
uint8 [3, H, W]; they are normalised on the device.
"""

import argparse
import contextlib
import functools
import io
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import create_transform
from torch.nn.functional import interpolate
from torchvision.transforms import RandomCrop

from masking_generator import MaskGenerator, Pair, as_pair

cv2.setNumThreads(0)  # the loader's workers are the parallelism

MEAN_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
PILLOW_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
TORCH_FILTERS = ("bicubic", "bilinear")
INTERPOLATIONS = (*PILLOW_FILTERS, "random")
PIPELINES = ("fast", "reference")
SMALL_IMAGE = 32  # up to this size images are neither resized for evaluation nor cropped by area (spec 4.6, 4.7)

CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
POINTS_PER_CELL = 4  # along each side of a patch, where a map of the picture is looked up
JITTER_PROBABILITY = 0.8
JITTER_RANGES = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
BEIT_JITTER = ("brightness", "contrast", "saturation")
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY, BLUR_RADIUS = 0.1, (0.1, 2.0)
SOLARISE_PROBABILITY = 0.2
ROUND_DOWN = -0.4999  # OpenCV rounds where Pillow cuts off

RawImage = bytes | np.ndarray  # an encoded file, or decoded [H, W, 3] uint8
Sample = dict[str, torch.Tensor]


# --- decoding ---------------------------------------------------------------------------------------------------------

# whatever Pillow's readers raise for damaged files
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_TAIL = 64  # bytes that may follow the end, as some cameras write them
JPEG_SCAN = 0xDA
JPEG_SEQUENTIAL, JPEG_OTHER_FRAMES = b"\xc0\xc1", b"\xc2\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf"
CHROMA_ROWS = 8  # that a row's colours may depend on, below it


class BrokenImageError(Exception):
    """The bytes of one sample cannot be read or decoded; the message says why."""


def decode(raw: RawImage) -> np.ndarray:
    """RGB picture [H, W, 3] uint8, equal to Pillow's; JPEGs through simplejpeg, which is faster.

    Greyscale, palette, CMYK and transparent images become RGB as by Pillow's `convert`; EXIF orientation is ignored.

    Raises:
        BrokenImageError: empty, truncated, or not an image.
    """
    if isinstance(raw, np.ndarray):
        return raw
    if raw[:2] == JPEG_START:
        with contextlib.suppress(ValueError):  # damaged: Pillow forgives it or names the reason
            if simplejpeg.decode_jpeg_header(raw)[2] not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(raw)
    return np.array(decode_pillow(raw))


def open_picture(raw: RawImage) -> tuple[Pair, Callable[[int], np.ndarray]]:
    """A picture's (height, width), and a function that decodes at least its first n rows, [>= n, W, 3] as `decode`.

    A crop needs no rows below it, and most of a view's time is decoding.
    """
    height_at = cuttable_height(raw) if isinstance(raw, bytes) else None
    if height_at is None:
        picture = decode(raw)
        return picture.shape[:2], lambda rows: picture
    return struct.unpack_from(">HH", raw, height_at), functools.partial(_decode_top, raw, height_at)


def cuttable_height(raw: bytes) -> int | None:
    """Where a JPEG's height is written, if its rows can be decoded without those below them; None for other files.

    They can in sequential files with all of their one or three components in one scan. Whether a file is whole is only
    noticed at its end: those that do not end as they should are for `decode` to judge.
    """
    if raw[:2] != JPEG_START or JPEG_END not in raw[-JPEG_TAIL:]:
        return None
    at, height_at, components = 2, None, 0
    while at + 10 < len(raw) and raw[at] == 0xFF:
        kind = raw[at + 1]
        if kind in JPEG_SEQUENTIAL:
            height_at, components = at + 5, raw[at + 9]
        elif kind in JPEG_OTHER_FRAMES:
            return None
        elif kind == JPEG_SCAN:
            whole = components in (1, 3) and raw[at + 4] == components
            return height_at if whole and any(raw[height_at : height_at + 2]) else None
        at += 1 if kind == 0xFF else 2 + int.from_bytes(raw[at + 2 : at + 4])
    return None


def _decode_top(raw: bytes, height_at: int, rows: int) -> np.ndarray:
    """The decoder stops where the header says that the picture ends, so the header is told to end it earlier."""
    rows += CHROMA_ROWS
    if rows < struct.unpack_from(">H", raw, height_at)[0]:
        shortened = bytearray(raw)
        struct.pack_into(">H", shortened, height_at, rows)
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(shortened, strict=False)  # it complains of the data that is left over
    return decode(raw)


def decode_pillow(raw: RawImage) -> Image.Image:
    """RGB picture as a Pillow image; raises BrokenImageError like `decode`."""
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    if not raw:
        raise BrokenImageError("the file is empty")
    try:
        return Image.open(io.BytesIO(raw)).convert("RGB")
    except PILLOW_ERRORS as error:
        raise BrokenImageError(str(error)) from error


# --- draws ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColourDraws:
    """The strong view's photometric changes: jitter steps (name, factor) in their order, then the rest."""

    jitter: tuple[tuple[str, float], ...]
    grey: bool
    blur_radius: float | None
    solarise: bool


@dataclass(frozen=True)
class ViewDraws:
    """One image's random choices: `box` is (top, left, height, width) in pixels of the picture after the flip.

    `jitter`: steps (name, factor) on the whole picture, before the crop; `second`: how the second view is resized.
    """

    flip: bool
    box: tuple[int, int, int, int]
    interpolation: str
    colour: ColourDraws | None
    jitter: tuple[tuple[str, float], ...] = ()
    second: str = "lanczos"


def draw_view(
    rng: np.random.Generator,
    size: Pair,
    crop_scale: tuple[float, float],
    interpolation: str,
    strong: bool,
    crop: Callable[..., tuple[int, int, int, int]] | None = None,
    jitter: float = 0.0,
    second: str = "lanczos",
) -> ViewDraws:
    """Draw the ConMIM view of a picture of `size` (height, width): flip, crop, and colours if `strong` (spec 2.1).

    `crop(rng, size, crop_scale)` draws the box; None: `draw_crop`. `jitter`: half the range of the factors.
    """
    steps = draw_jitter(rng, jitter) if jitter else ()
    flip = bool(rng.random() < 0.5)
    box = (crop or draw_crop)(rng, size, crop_scale)
    interpolation, second = (
        TORCH_FILTERS[rng.integers(2)] if name == "random" else name for name in (interpolation, second)
    )
    return ViewDraws(flip, box, interpolation, draw_colour(rng) if strong else None, steps, second)


def draw_jitter(rng: np.random.Generator, strength: float) -> tuple[tuple[str, float], ...]:
    """BEiT's: brightness, contrast and saturation in random order, always (specs/semanticmim.md 2.4)."""
    bounds = max(0.0, 1 - strength), 1 + strength
    return tuple((BEIT_JITTER[step], _between(rng, bounds)) for step in rng.permutation(len(BEIT_JITTER)))


def draw_crop(rng: np.random.Generator, size: Pair, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Box (top, left, height, width): area a fraction in `scale`, log-uniform aspect, up to 10 tries (spec 2.1)."""
    height, width = size
    log_aspect = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * _between(rng, scale)
        aspect = math.exp(_between(rng, log_aspect))
        crop_w, crop_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            top, left = int(rng.random() * (height - crop_h + 1)), int(rng.random() * (width - crop_w + 1))
            return top, left, crop_h, crop_w
    return _central_box(size)


def draw_clipped_crop(rng: np.random.Generator, size: Pair, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Box (top, left, height, width) of linear probing: as `draw_crop`, but at the first try, each side cut down to
    the picture's (spec SemMAE A.10)."""
    height, width = size
    area = height * width * _between(rng, scale)
    aspect = math.exp(_between(rng, (math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]))))
    crop_w = min(max(round(math.sqrt(area * aspect)), 1), width)
    crop_h = min(max(round(math.sqrt(area / aspect)), 1), height)
    return int(rng.random() * (height - crop_h + 1)), int(rng.random() * (width - crop_w + 1)), crop_h, crop_w


def draw_short_side_crop(rng: np.random.Generator, size: Pair, scale: tuple[float, float], target: Pair):
    """The largest box (top, left, height, width) with the aspect of `target`, anywhere: what is left of a random crop
    after a resize of the short side (spec SemAIM 9). `scale` has no part in it."""
    height, width = size
    factor = min(height / target[0], width / target[1])
    crop_h, crop_w = max(round(factor * target[0]), 1), max(round(factor * target[1]), 1)
    return int(rng.random() * (height - crop_h + 1)), int(rng.random() * (width - crop_w + 1)), crop_h, crop_w


def _central_box(size: Pair) -> tuple[int, int, int, int]:
    """The largest centred box whose aspect lies in the allowed range."""
    height, width = size
    crop_h, crop_w = height, width
    if width / height < CROP_ASPECT[0]:
        crop_h = round(width / CROP_ASPECT[0])
    elif width / height > CROP_ASPECT[1]:
        crop_w = round(height * CROP_ASPECT[1])
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def draw_colour(rng: np.random.Generator) -> ColourDraws:
    """Jitter in random order with probability 0.8, grey 0.2, Gaussian blur 0.1, solarise 0.2 (spec 2.1)."""
    jitter = ()
    if rng.random() < JITTER_PROBABILITY:
        names = list(JITTER_RANGES)
        order = rng.permutation(len(names))
        jitter = tuple((names[i], _between(rng, JITTER_RANGES[names[i]])) for i in order)
    grey = bool(rng.random() < GREY_PROBABILITY)
    blur_radius = _between(rng, BLUR_RADIUS) if rng.random() < BLUR_PROBABILITY else None
    return ColourDraws(jitter, grey, blur_radius, bool(rng.random() < SOLARISE_PROBABILITY))


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()  # a quarter of the time of rng.uniform


# --- reference pipeline: Pillow, published order ----------------------------------------------------------------------


def reference_crop(image: Image.Image, draws: ViewDraws, size: Pair, interpolation: str | None = None) -> Image.Image:
    """Flip the whole picture, cut the box out, resize it to `size` (height, width)."""
    if draws.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, height, width = draws.box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size[1], size[0]), PILLOW_FILTERS[interpolation or draws.interpolation])


def reference_jitter(image: Image.Image, steps: tuple[tuple[str, float], ...]) -> Image.Image:
    for name, factor in steps:
        image = REFERENCE_JITTER[name](image, factor)
    return image


def reference_colour(image: Image.Image, draws: ColourDraws) -> Image.Image:
    """The strong view of an RGB picture by Pillow's own operations."""
    image = reference_jitter(image, draws.jitter)
    if draws.grey:
        image = image.convert("L").convert("RGB")
    if draws.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(draws.blur_radius))
    return ImageOps.solarize(image, threshold=128) if draws.solarise else image


def _reference_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by `shift` of a full circle, in Pillow's 8-bit HSV (torchvision's definition)."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(_hue_steps(shift))
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


REFERENCE_JITTER: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": _reference_hue,
}


# --- fast pipeline: colour planes [3, H, W] uint8 ---------------------------------------------------------------------


def fast_crop(picture: np.ndarray, draws: ViewDraws, size: Pair, interpolation: str | None = None) -> np.ndarray:
    """`reference_crop` of a picture [H, W, 3], as contiguous colour planes [3, *size].

    The resize is symmetric, so the flip may follow it, where there are fewer pixels and the crop is not yet copied.
    """
    top, left, height, width = draws.box
    if draws.flip:
        left = picture.shape[1] - left - width
    resized = _resize(picture[top : top + height, left : left + width], size, interpolation or draws.interpolation)
    planes = np.empty((3, *size), dtype=np.uint8)
    cv2.split(cv2.flip(resized, 1) if draws.flip else resized, list(planes))
    return planes


def _resize(crop: np.ndarray, size: Pair, interpolation: str) -> np.ndarray:
    """As Pillow 12: width first. Pillow 13 begins with the height of tall pictures, which differs where 8 bits clip."""
    if interpolation not in TORCH_FILTERS:
        return np.asarray(Image.fromarray(crop).resize((size[1], size[0]), PILLOW_FILTERS[interpolation]))
    # [1, 3, h, w] with the strides of channels-last memory, for which torch has the fastest kernel
    pixels = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    return interpolate(pixels, size=size, mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def fast_jitter(planes: np.ndarray, steps: tuple[tuple[str, float], ...]) -> np.ndarray:
    for name, factor in steps:
        planes = FAST_JITTER[name](planes, factor)
    return planes


def fast_colour(planes: np.ndarray, draws: ColourDraws) -> np.ndarray:
    """`reference_colour` on colour planes; the argument is left as it is."""
    planes = fast_jitter(planes, draws.jitter)
    if draws.grey:
        planes = np.stack([_grey(planes)] * 3)
    if draws.blur_radius is not None:
        planes = _blur(planes, draws.blur_radius)
    return np.minimum(planes, 255 - planes) if draws.solarise else planes  # 128 is the middle: the darker of the two


def _grey(planes: np.ndarray) -> np.ndarray:
    """Pillow's luma: 16-bit weights, rounded half up; every sum stays below 2**24, so float32 is exact."""
    red, green, blue = planes
    luma = cv2.addWeighted(red, 19595, green, 38470, 32768, dtype=cv2.CV_32F)
    return cv2.addWeighted(blue, 7471 / 65536, luma, 1 / 65536, 0, dtype=cv2.CV_32F).astype(np.uint8)


def _blend_level(planes: np.ndarray, level: int, factor: float) -> np.ndarray:
    """Pillow's blend with one grey level."""
    flat = planes.reshape(-1, planes.shape[-1])
    return cv2.addWeighted(flat, factor, flat, 0, (1 - factor) * level + ROUND_DOWN).reshape(planes.shape)


def _brightness(planes: np.ndarray, factor: float) -> np.ndarray:
    return _blend_level(planes, 0, factor)


def _contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    return _blend_level(planes, int(cv2.mean(_grey(planes))[0] + 0.5), factor)


def _saturation(planes: np.ndarray, factor: float) -> np.ndarray:
    grey, out = _grey(planes), np.empty_like(planes)
    for plane, target in zip(planes, out, strict=True):
        cv2.addWeighted(plane, factor, grey, 1 - factor, ROUND_DOWN, dst=target)
    return out


def _hue_steps(shift: float) -> int:
    """A turn of the colour circle in the 1/255 steps of an 8-bit hue, cut off towards zero, modulo 256."""
    return int(shift * 255) % 256


@functools.cache
def _hue_table() -> torch.Tensor:
    """Pillow's 8-bit hue by (sector * 2 + sign, difference modulo 256, chroma), flat [6 * 256 * 256].

    In the sector of its largest channel a colour's hue is a function of its chroma and of the signed difference of the
    other two channels. Looking Pillow's own values up keeps its truncations, which change the result by up to 6 levels.
    """
    kind, difference, chroma = np.meshgrid(np.arange(6), np.arange(256), np.arange(256), indexing="ij")
    signed = np.clip(difference - 256 * (kind % 2), -chroma, chroma)
    colours = np.zeros((*kind.shape, 3), dtype=np.uint8)
    for sector in range(3):
        rows = slice(2 * sector, 2 * sector + 2)
        colours[rows, :, :, sector] = chroma[rows]
        colours[rows, :, :, (sector + 1) % 3] = np.maximum(signed[rows], 0)
        colours[rows, :, :, (sector + 2) % 3] = np.maximum(-signed[rows], 0)
    hsv = Image.fromarray(colours.reshape(6 * 256, 256, 3)).convert("HSV")
    return torch.from_numpy(np.asarray(hsv)[..., 0].reshape(-1).copy())


@functools.cache
def _chroma_shares() -> np.ndarray:
    """How much of the chroma each channel lacks, by hue: [3, 512] uint8 (twice round), 255 = all of it (HSV to RGB)."""
    angle = np.arange(256) * 6 / 255
    position = (np.array([[5], [3], [1]]) + angle) % 6
    shares = np.round(np.clip(np.minimum(position, 4 - position), 0, 1) * 255).astype(np.uint8)
    return np.concatenate([shares, shares], axis=1)


def _hue(planes: np.ndarray, shift: float) -> np.ndarray:
    value = cv2.max(cv2.max(planes[0], planes[1]), planes[2])
    chroma = cv2.subtract(value, cv2.min(cv2.min(planes[0], planes[1]), planes[2]))
    hue = _pillow_hue(planes, value, chroma)
    first, out = _hue_steps(shift), np.empty_like(planes)
    for shares, target in zip(_chroma_shares()[:, first : first + 256], out, strict=True):
        cv2.subtract(value, cv2.multiply(chroma, cv2.LUT(hue, shares), scale=1 / 255), dst=target)
    return out


def _pillow_hue(planes: np.ndarray, value: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """8-bit hue [H, W]: the index of `_hue_table` is put together bytewise, which needs 8-bit operations only."""
    red, green, blue = planes
    is_red = cv2.compare(red, value, cv2.CMP_EQ)
    is_green = cv2.compare(green, value, cv2.CMP_EQ)
    next_channel, last_channel = red.copy(), green.copy()  # right where blue is the largest
    for mask, after, before in ((is_green, blue, red), (is_red, green, blue)):
        cv2.copyTo(after, mask, next_channel)
        cv2.copyTo(before, mask, last_channel)
    kind = (~is_red & (4 ^ (is_green & 6))) | (next_channel < last_channel)
    index = cv2.merge([chroma, next_channel - last_channel, kind, np.zeros_like(chroma)]).view("<i4")
    return _hue_table().index_select(0, torch.from_numpy(index).view(-1)).numpy().reshape(chroma.shape)


FAST_JITTER: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}


def _blur(planes: np.ndarray, radius: float) -> np.ndarray:
    """Pillow's Gaussian: three passes of a box whose ends carry a fraction, edges repeated."""
    box = _box_kernel(radius)
    picture = planes.transpose(1, 2, 0).astype(np.float32)
    for _ in range(3):
        picture = cv2.sepFilter2D(picture, -1, box, box, borderType=cv2.BORDER_REPLICATE)
    return np.ascontiguousarray(np.rint(picture).astype(np.uint8).transpose(2, 0, 1))


def _box_kernel(radius: float) -> np.ndarray:
    """Box of variance radius**2 / 3: ones, and at each end the fraction that makes the variance exact."""
    variance = radius**2 / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.ones(2 * whole + 3)
    box[[0, -1]] = fraction
    return box / box.sum()


# --- maps that cover a picture ----------------------------------------------------------------------------------------


def crop_map(cells: np.ndarray, draws: ViewDraws, picture: Pair, grid: Pair) -> np.ndarray:
    """What a map of the whole picture says at 4 x 4 points in each patch of the view: [rows, columns, 16].

    The view's crop and flip are applied to the map [any size] as to the picture of `picture` (height, width) pixels;
    `grid` is the view's (rows, columns) of patches (specs/semmae.md B.5).
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
    """The most frequent of the small numbers in the last axis, of equally frequent ones the smallest: uint8."""
    votes = points.reshape(-1, points.shape[-1]).astype(np.int64)
    kinds = int(votes.max()) + 1
    votes += kinds * np.arange(len(votes))[:, None]
    counts = np.bincount(votes.ravel(), minlength=kinds * len(votes)).reshape(-1, kinds)
    return counts.argmax(1).reshape(points.shape[:-1]).astype(np.uint8)


def mean_score(points: np.ndarray) -> np.ndarray:
    """The mean over the last axis, float32."""
    return points.mean(-1, dtype=np.float32)


PLAIN_VIEWS = ("image", "image_strong", "image_second", "mask", "target_mask", "noise")
MAP_VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"part_ids": majority, "part_scores": mean_score}


# --- pre-training -----------------------------------------------------------------------------------------------------


class PretrainTransform:
    """`transform(raw, rng, maps)` -> the keys in `views`.

    "image" (weak), "image_strong" and "image_second" (of `second_size`) of the same crop, "mask", "target_mask",
    "noise" (`noise_size` uniform float32 draws); of the same crop and flip of `maps`, arrays [any size] that cover the
    picture: "part_ids" uint8, "part_scores" float32, both [rows, columns] of `grid`.
    """

    def __init__(
        self,
        views: tuple[str, ...],
        size: Pair,
        interpolation: str,
        pipeline: str,
        masks: Mapping[str, MaskGenerator],
        crop_scale: tuple[float, float],
        grid: Pair | None,
        noise_size: int,
        color_jitter: float,
        second_size: Pair | None,
        second_interpolation: str,
    ):
        self.views, self.size, self.interpolation, self.crop_scale = views, size, interpolation, crop_scale
        self.grid, self.noise_size = grid, noise_size
        self.color_jitter, self.second_interpolation = color_jitter, second_interpolation
        self.second_size = second_size if "image_second" in views else None
        self.apply = _apply_fast if pipeline == "fast" else _apply_reference
        self.masks = masks

    def __call__(
        self, raw: RawImage, rng: np.random.Generator, maps: Mapping[str, np.ndarray] = MappingProxyType({})
    ) -> Sample:
        draw = functools.partial(
            draw_view, rng, crop_scale=self.crop_scale, interpolation=self.interpolation,
            strong="image_strong" in self.views, jitter=self.color_jitter, second=self.second_interpolation,
        )  # fmt: skip
        found = self.apply(raw, draw, self.size, self.second_size)
        views = {"image": found.weak, "image_strong": found.strong, "image_second": found.second}
        sample = {name: torch.from_numpy(view) for name, view in views.items() if name in self.views}
        sample |= {name: torch.from_numpy(generate(rng)) for name, generate in self.masks.items()}
        if "noise" in self.views:
            sample["noise"] = torch.from_numpy(rng.random(self.noise_size, dtype=np.float32))
        for name, reduce in MAP_VIEWS.items():
            if name in self.views:
                sample[name] = torch.from_numpy(reduce(crop_map(maps[name], found.draws, found.picture, self.grid)))
        return sample


class Views(NamedTuple):
    """The picture's size, what was drawn, and the views [3, H, W], None where not asked for."""

    picture: Pair
    draws: ViewDraws
    weak: np.ndarray
    strong: np.ndarray | None
    second: np.ndarray | None


def _apply_fast(raw: RawImage, draw: Callable[..., ViewDraws], size: Pair, second_size: Pair | None = None) -> Views:
    whole, decode_rows = open_picture(raw)
    draws = draw(size=whole)
    top, _, height, _ = draws.box
    if draws.jitter:  # contrast depends on the whole picture
        planes = np.ascontiguousarray(decode_rows(whole[0])[: whole[0]].transpose(2, 0, 1))
        picture = np.ascontiguousarray(fast_jitter(planes, draws.jitter).transpose(1, 2, 0))
    else:
        picture = decode_rows(top + height)
    weak = fast_crop(picture, draws, size)
    strong = None if draws.colour is None else fast_colour(weak, draws.colour)
    second = None if second_size is None else fast_crop(picture, draws, second_size, draws.second)
    return Views(whole, draws, weak, strong, second)


def _apply_reference(
    raw: RawImage, draw: Callable[..., ViewDraws], size: Pair, second_size: Pair | None = None
) -> Views:
    image = decode_pillow(raw)
    whole = image.height, image.width
    draws = draw(size=whole)
    image = reference_jitter(image, draws.jitter)
    weak = reference_crop(image, draws, size)
    strong = None if draws.colour is None else _planes(reference_colour(weak, draws.colour))
    second = None if second_size is None else _planes(reference_crop(image, draws, second_size, draws.second))
    return Views(whole, draws, _planes(weak), strong, second)


def _planes(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def build_pretrain_transform(
    views: tuple[str, ...],
    *,
    input_size: int | Pair,
    interpolation: str = "bicubic",
    pipeline: str = "fast",
    mask_generator: MaskGenerator | None = None,
    target_mask_generator: MaskGenerator | None = None,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    grid: Pair | None = None,
    noise_size: int = 0,
    color_jitter: float = 0.0,
    second_size: Pair | None = None,
    second_interpolation: str = "lanczos",
) -> PretrainTransform:
    """The transform that makes a method's `views` (see `PretrainTransform`) at `input_size`, cut into `grid` patches.

    Raises:
        ValueError: an interpolation or pipeline that does not exist, or a jitter that cannot be.
    """
    _check_choice("--train_interpolation", interpolation, INTERPOLATIONS)
    _check_choice("--second_interpolation", second_interpolation, INTERPOLATIONS)
    _check_choice("--data_pipeline", pipeline, PIPELINES)
    if not 0 <= color_jitter <= 1:
        raise ValueError(f"--color_jitter is {color_jitter}; it must lie between 0 and 1")
    assert "image" in views and set(views) <= {*PLAIN_VIEWS, *MAP_VIEWS}, views
    assert grid is not None or not MAP_VIEWS.keys() & set(views), "maps are cropped to a grid"
    assert "image_second" not in views or second_size is not None, "a second picture needs a size"
    generators = {"mask": mask_generator, "target_mask": target_mask_generator}
    masks = {name: generate for name, generate in generators.items() if generate is not None}
    assert masks.keys() == {"mask", "target_mask"} & set(views), "masked views need mask generators, others have none"
    return PretrainTransform(
        tuple(views), as_pair(input_size), interpolation, pipeline, masks, tuple(crop_scale), grid, noise_size,
        color_jitter, second_size, second_interpolation,
    )  # fmt: skip


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{flag} is '{value}'; it must be one of {', '.join(choices)}")


# --- linear probing ---------------------------------------------------------------------------------------------------


PROBE_CROPS = ("area", "short_side")


class ProbeTransform:
    """A crop and a flip, nothing else: `transform(raw, rng)` -> {"image": uint8 [3, H, W]}.

    `crop`: "area" is `draw_clipped_crop`, "short_side" is `draw_short_side_crop`.
    """

    def __init__(
        self,
        input_size: int | Pair,
        interpolation: str = "bicubic",
        crop_scale: Sequence[float] = (0.08, 1),
        crop: str = "area",
    ):
        _check_choice("--train_interpolation", interpolation, INTERPOLATIONS)
        _check_choice("--train_crop", crop, PROBE_CROPS)
        self.size, self.interpolation, self.crop_scale = as_pair(input_size), interpolation, tuple(crop_scale)
        short_side = functools.partial(draw_short_side_crop, target=self.size)
        self.crop = short_side if crop == "short_side" else draw_clipped_crop

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        draw = functools.partial(
            draw_view, rng, crop_scale=self.crop_scale, interpolation=self.interpolation, strong=False,
            crop=self.crop,
        )  # fmt: skip
        return {"image": torch.from_numpy(_apply_fast(raw, draw, self.size).weak)}


# --- fine-tuning ------------------------------------------------------------------------------------------------------


class TrainTransform:
    """timm's ImageNet training augmentation, without normalisation and erasing, which follow on the device."""

    def __init__(self, size: Pair, augment: Callable[[Image.Image], torch.Tensor]):
        self.size, self.augment = size, augment

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        image = Image.fromarray(decode(raw))
        if max(self.size) <= SMALL_IMAGE:
            image = _exactly(image, self.size)
        with seeded_globals(rng):
            return {"image": self.augment(image)}


class EvalTransform:
    """The centre of the picture: resized to cover `size` / `crop_pct`, cut to `size` (specs/conmim.md 4.7).

    Up to 32 pixels there is no crop; pictures of another size than `size` are resized to it (a repair: upstream's
    batches could not be stacked).
    """

    def __init__(self, size: Pair, crop_pct: float | None):
        self.size = size
        self.crop_pct = crop_pct or (224 / 256 if max(size) < 384 else 1.0)

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        image = Image.fromarray(decode(raw))
        image = _exactly(image, self.size) if max(self.size) <= SMALL_IMAGE else self._centre(image)
        return {"image": torch.from_numpy(_planes(image))}

    def _centre(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        covered = _cover((image.height, image.width), (int(height / self.crop_pct), int(width / self.crop_pct)))
        image = _exactly(image, covered)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _cover(size: Pair, area: Pair) -> Pair:
    """The smallest (height, width) with the aspect of `size` that covers `area`."""
    height, width = size
    if width * area[0] > height * area[1]:
        return area[0], int(area[0] * width / height)
    return int(area[1] * height / width), area[1]


def _exactly(image: Image.Image, size: Pair) -> Image.Image:
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


@contextlib.contextmanager
def seeded_globals(rng: np.random.Generator) -> Iterator[None]:
    """Inside, `random`, numpy's and torch's global generators follow from `rng`; afterwards they are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def build_finetune_transform(args: argparse.Namespace, train: bool) -> TrainTransform | EvalTransform:
    """The transform of classification (specs/conmim.md 4.6, 4.7): `transform(raw, rng)` -> {"image": uint8 [3, H, W]}.

    Reads `input_size`, and for training `aa`, `color_jitter` (only used without `aa`), `train_interpolation`,
    `imagenet_default_mean_and_std` (the colour that fills moved pictures); for evaluation `crop_pct` and, in place of
    `input_size`, `eval_input_size` where it is given.
    """
    if not train:
        return EvalTransform(as_pair(getattr(args, "eval_input_size", None) or args.input_size), args.crop_pct)
    size = as_pair(args.input_size)
    _check_choice("--train_interpolation", args.train_interpolation, INTERPOLATIONS)
    mean, std = MEAN_STD["imagenet" if args.imagenet_default_mean_and_std else "inception"]
    augment = create_transform(
        input_size=size,
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=args.aa or None,
        interpolation=args.train_interpolation,
        mean=mean,
        std=std,
        normalize=False,
    )
    if max(size) <= SMALL_IMAGE:
        augment.transforms[0] = RandomCrop(size, padding=4)
    return TrainTransform(size, augment)
