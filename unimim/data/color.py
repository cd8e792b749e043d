"""Color augmentation: the exact operations of Pillow, and fast ones with equal results."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

JITTER_PROBABILITY = 0.8
JITTER_RANGES = {
    "brightness": (0.6, 1.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.8, 1.2),
    "hue": (-0.1, 0.1),
}
BEIT_JITTER = ("brightness", "contrast", "saturation")
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY, BLUR_RADIUS = 0.1, (0.1, 2.0)
SOLARIZE_PROBABILITY = 0.2
ROUND_DOWN = -0.4999  # OpenCV rounds where Pillow cuts off


# --- draws ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColorDraws:
    """The strong view's photometric changes: jitter steps (name, factor) in their order, then the
    rest."""

    jitter: tuple[tuple[str, float], ...]
    gray: bool
    blur_radius: float | None
    solarize: bool


def draw_jitter(rng: np.random.Generator, strength: float) -> tuple[tuple[str, float], ...]:
    """BEiT's: brightness, contrast and saturation in random order, always (specs/semanticmim.md
    2.4)."""
    bounds = max(0.0, 1 - strength), 1 + strength
    return tuple(
        (BEIT_JITTER[step], _between(rng, bounds)) for step in rng.permutation(len(BEIT_JITTER))
    )


def draw_color(rng: np.random.Generator) -> ColorDraws:
    """Jitter in random order with probability 0.8, gray 0.2, Gaussian blur 0.1, solarize 0.2 (spec
    2.1)."""
    jitter = ()
    if rng.random() < JITTER_PROBABILITY:
        names = list(JITTER_RANGES)
        order = rng.permutation(len(names))
        jitter = tuple((names[i], _between(rng, JITTER_RANGES[names[i]])) for i in order)
    gray = bool(rng.random() < GREY_PROBABILITY)
    blur_radius = _between(rng, BLUR_RADIUS) if rng.random() < BLUR_PROBABILITY else None
    return ColorDraws(jitter, gray, blur_radius, bool(rng.random() < SOLARIZE_PROBABILITY))


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return (
        bounds[0] + (bounds[1] - bounds[0]) * rng.random()
    )  # a quarter of the time of rng.uniform


def reference_jitter(image: Image.Image, steps: tuple[tuple[str, float], ...]) -> Image.Image:
    for name, factor in steps:
        image = REFERENCE_JITTER[name](image, factor)
    return image


def reference_color(image: Image.Image, draws: ColorDraws) -> Image.Image:
    """The strong view of an RGB picture by Pillow's own operations."""
    image = reference_jitter(image, draws.jitter)
    if draws.gray:
        image = image.convert("L").convert("RGB")
    if draws.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(draws.blur_radius))
    return ImageOps.solarize(image, threshold=128) if draws.solarize else image


def _reference_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by `shift` of a full circle, in Pillow's 8-bit HSV (torchvision's
    definition)."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(_hue_steps(shift))
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


REFERENCE_JITTER: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": _reference_hue,
}


def fast_jitter(planes: np.ndarray, steps: tuple[tuple[str, float], ...]) -> np.ndarray:
    for name, factor in steps:
        planes = FAST_JITTER[name](planes, factor)
    return planes


def fast_color(planes: np.ndarray, draws: ColorDraws) -> np.ndarray:
    """`reference_color` on color planes; the argument is left as it is."""
    planes = fast_jitter(planes, draws.jitter)
    if draws.gray:
        planes = np.stack([_grey(planes)] * 3)
    if draws.blur_radius is not None:
        planes = _blur(planes, draws.blur_radius)
    return (
        np.minimum(planes, 255 - planes) if draws.solarize else planes
    )  # 128 is the middle: the darker of the two


def _grey(planes: np.ndarray) -> np.ndarray:
    """Pillow's luma: 16-bit weights, rounded half up; every sum stays below 2**24, so float32 is
    exact."""
    red, green, blue = planes
    luma = cv2.addWeighted(red, 19595, green, 38470, 32768, dtype=cv2.CV_32F)
    return cv2.addWeighted(blue, 7471 / 65536, luma, 1 / 65536, 0, dtype=cv2.CV_32F).astype(
        np.uint8
    )


def _blend_level(planes: np.ndarray, level: int, factor: float) -> np.ndarray:
    """Pillow's blend with one gray level."""
    flat = planes.reshape(-1, planes.shape[-1])
    return cv2.addWeighted(flat, factor, flat, 0, (1 - factor) * level + ROUND_DOWN).reshape(
        planes.shape
    )


def _brightness(planes: np.ndarray, factor: float) -> np.ndarray:
    return _blend_level(planes, 0, factor)


def _contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    return _blend_level(planes, int(cv2.mean(_grey(planes))[0] + 0.5), factor)


def _saturation(planes: np.ndarray, factor: float) -> np.ndarray:
    gray, out = _grey(planes), np.empty_like(planes)
    for plane, target in zip(planes, out, strict=True):
        cv2.addWeighted(plane, factor, gray, 1 - factor, ROUND_DOWN, dst=target)
    return out


def _hue_steps(shift: float) -> int:
    """A turn of the color circle in the 1/255 steps of an 8-bit hue, cut off towards zero, modulo
    256."""
    return int(shift * 255) % 256


@functools.cache
def _hue_table() -> torch.Tensor:
    """Pillow's 8-bit hue by (sector * 2 + sign, difference modulo 256, chroma), flat [6 * 256 *
    256].

    In the sector of its largest channel a color's hue is a function of its chroma and of the
    signed difference of the other two channels. Looking Pillow's own values up keeps its
    truncations, which change the result by up to 6 levels.
    """
    kind, difference, chroma = np.meshgrid(
        np.arange(6), np.arange(256), np.arange(256), indexing="ij"
    )
    signed = np.clip(difference - 256 * (kind % 2), -chroma, chroma)
    colors = np.zeros((*kind.shape, 3), dtype=np.uint8)
    for sector in range(3):
        rows = slice(2 * sector, 2 * sector + 2)
        colors[rows, :, :, sector] = chroma[rows]
        colors[rows, :, :, (sector + 1) % 3] = np.maximum(signed[rows], 0)
        colors[rows, :, :, (sector + 2) % 3] = np.maximum(-signed[rows], 0)
    hsv = Image.fromarray(colors.reshape(6 * 256, 256, 3)).convert("HSV")
    return torch.from_numpy(np.asarray(hsv)[..., 0].reshape(-1).copy())


@functools.cache
def _chroma_shares() -> np.ndarray:
    """How much of the chroma each channel lacks, by hue: [3, 512] uint8 (twice round), 255 = all of
    it (HSV to RGB)."""
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
    """8-bit hue [H, W]: the index of `_hue_table` is put together bytewise, which needs 8-bit
    operations only."""
    red, green, blue = planes
    is_red = cv2.compare(red, value, cv2.CMP_EQ)
    is_green = cv2.compare(green, value, cv2.CMP_EQ)
    next_channel, last_channel = red.copy(), green.copy()  # right where blue is the largest
    for mask, after, before in ((is_green, blue, red), (is_red, green, blue)):
        cv2.copyTo(after, mask, next_channel)
        cv2.copyTo(before, mask, last_channel)
    kind = (~is_red & (4 ^ (is_green & 6))) | (next_channel < last_channel)
    index = cv2.merge([chroma, next_channel - last_channel, kind, np.zeros_like(chroma)]).view(
        "<i4"
    )
    return (
        _hue_table().index_select(0, torch.from_numpy(index).view(-1)).numpy().reshape(chroma.shape)
    )


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
    """Box of variance radius**2 / 3: ones, and at each end the fraction that makes the variance
    exact."""
    variance = radius**2 / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (
        (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    )
    box = np.ones(2 * whole + 3)
    box[[0, -1]] = fraction
    return box / box.sum()
