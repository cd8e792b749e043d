"""Augment colors, with Pillow's own operations or with fast ones that give equal results.

The fast operations work on color planes [3, H, W] uint8. They reproduce Pillow's fixed-point
rounding; `_hue` looks Pillow's 8-bit hue up in a table, which is exact and needs no division.
docs/benchmarks.md has the speed of both pipelines.
"""

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
GRAY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.1
BLUR_RADIUS = (0.1, 2.0)
SOLARIZE_PROBABILITY = 0.2
ROUND_DOWN = -0.4999  # OpenCV rounds where Pillow truncates


# --- random parameters ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ColorDraws:
    """The random parameters of the strong view's colors.

    `jitter` holds steps (name, factor) in the order of their application; the other changes follow.
    """

    jitter: tuple[tuple[str, float], ...]
    gray: bool
    blur_radius: float | None
    solarize: bool


def draw_jitter(rng: np.random.Generator, strength: float) -> tuple[tuple[str, float], ...]:
    """Draw BEiT's jitter: brightness, contrast and saturation in random order, always applied.

    See docs/methods/beit_maskfeat_semanticmim.md#jitter-of-beit.
    """
    bounds = max(0.0, 1 - strength), 1 + strength
    order = rng.permutation(len(BEIT_JITTER))
    return tuple((BEIT_JITTER[step], _between(rng, bounds)) for step in order)


def draw_color(rng: np.random.Generator) -> ColorDraws:
    """Draw ConMIM's strong augmentation (docs/methods/conmim.md#views).

    Jitter in random order with probability 0.8, gray 0.2, Gaussian blur 0.1, solarize 0.2.
    """
    jitter = ()
    if rng.random() < JITTER_PROBABILITY:
        names = list(JITTER_RANGES)
        order = rng.permutation(len(names))
        jitter = tuple((names[i], _between(rng, JITTER_RANGES[names[i]])) for i in order)
    gray = bool(rng.random() < GRAY_PROBABILITY)
    blur_radius = _between(rng, BLUR_RADIUS) if rng.random() < BLUR_PROBABILITY else None
    solarize = bool(rng.random() < SOLARIZE_PROBABILITY)
    return ColorDraws(jitter, gray, blur_radius, solarize)


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """Draw uniformly within `bounds`, in a quarter of the time of `rng.uniform`."""
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


# --- reference pipeline: Pillow -------------------------------------------------------------------


def reference_jitter(image: Image.Image, steps: tuple[tuple[str, float], ...]) -> Image.Image:
    """Apply jitter steps (name, factor) with Pillow."""
    for name, factor in steps:
        image = REFERENCE_JITTER[name](image, factor)
    return image


def reference_color(image: Image.Image, params: ColorDraws) -> Image.Image:
    """Return the strong view of an RGB image, made with Pillow's own operations."""
    image = reference_jitter(image, params.jitter)
    if params.gray:
        image = image.convert("L").convert("RGB")
    if params.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(params.blur_radius))
    return ImageOps.solarize(image, threshold=128) if params.solarize else image


def _reference_hue(image: Image.Image, shift: float) -> Image.Image:
    """Rotate the hue by the fraction `shift` of a full circle in 8-bit HSV, as torchvision does."""
    hue, saturation, value = image.convert("HSV").split()
    rotated = np.asarray(hue) + np.uint8(_hue_steps(shift))
    return Image.merge("HSV", (Image.fromarray(rotated), saturation, value)).convert("RGB")


REFERENCE_JITTER: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": _reference_hue,
}


# --- fast pipeline: color planes [3, H, W] uint8 --------------------------------------------------


def fast_jitter(planes: np.ndarray, steps: tuple[tuple[str, float], ...]) -> np.ndarray:
    """Apply jitter steps (name, factor) to color planes."""
    for name, factor in steps:
        planes = FAST_JITTER[name](planes, factor)
    return planes


def fast_color(planes: np.ndarray, params: ColorDraws) -> np.ndarray:
    """Return `reference_color` of color planes; the argument is not changed."""
    planes = fast_jitter(planes, params.jitter)
    if params.gray:
        planes = np.stack([_gray(planes)] * 3)
    if params.blur_radius is not None:
        planes = _blur(planes, params.blur_radius)
    if params.solarize:  # inverting all from 128 on leaves the darker of value and inverse
        planes = np.minimum(planes, 255 - planes)
    return planes


def _gray(planes: np.ndarray) -> np.ndarray:
    """Return Pillow's luma [H, W]: 16-bit weights, rounded half up.

    Every sum stays below 2**24, so float32 is exact.
    """
    red, green, blue = planes
    luma = cv2.addWeighted(red, 19595, green, 38470, 32768, dtype=cv2.CV_32F)
    luma = cv2.addWeighted(blue, 7471 / 65536, luma, 1 / 65536, 0, dtype=cv2.CV_32F)
    return luma.astype(np.uint8)


def _blend_level(planes: np.ndarray, level: int, factor: float) -> np.ndarray:
    """Blend with one gray level as Pillow does."""
    flat = planes.reshape(-1, planes.shape[-1])
    blended = cv2.addWeighted(flat, factor, flat, 0, (1 - factor) * level + ROUND_DOWN)
    return blended.reshape(planes.shape)


def _brightness(planes: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black."""
    return _blend_level(planes, 0, factor)


def _contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean gray."""
    return _blend_level(planes, int(cv2.mean(_gray(planes))[0] + 0.5), factor)


def _saturation(planes: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the gray image."""
    gray = _gray(planes)
    out = np.empty_like(planes)
    for plane, target in zip(planes, out, strict=True):
        cv2.addWeighted(plane, factor, gray, 1 - factor, ROUND_DOWN, dst=target)
    return out


def _hue_steps(shift: float) -> int:
    """Return a rotation in the 1/255 steps of an 8-bit hue, truncated toward zero, modulo 256."""
    return int(shift * 255) % 256


@functools.cache
def _hue_table() -> torch.Tensor:
    """Return Pillow's 8-bit hue by (sector * 2 + sign, difference modulo 256, chroma), flattened.

    The sector is the largest channel; within it, a color's hue is a function of its chroma and of
    the signed difference of the other two channels. Tabulating Pillow's own values keeps its
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
def _chroma_fractions() -> np.ndarray:
    """Return the fraction of the chroma that each channel lacks, by hue (HSV to RGB).

    [3, 512] uint8, 255 = all of it; the 256 hues are listed twice, so that a rotation is a slice.
    """
    angle = np.arange(256) * 6 / 255
    position = (np.array([[5], [3], [1]]) + angle) % 6
    lacking = np.clip(np.minimum(position, 4 - position), 0, 1)
    fractions = np.round(lacking * 255).astype(np.uint8)
    return np.concatenate([fractions, fractions], axis=1)


def _hue(planes: np.ndarray, shift: float) -> np.ndarray:
    """Rotate the hue: to Pillow's HSV and back, by table look-ups."""
    value = cv2.max(cv2.max(planes[0], planes[1]), planes[2])
    chroma = cv2.subtract(value, cv2.min(cv2.min(planes[0], planes[1]), planes[2]))
    hue = _pillow_hue(planes, value, chroma)
    first = _hue_steps(shift)
    out = np.empty_like(planes)
    for fractions, target in zip(_chroma_fractions()[:, first : first + 256], out, strict=True):
        lacking = cv2.multiply(chroma, cv2.LUT(hue, fractions), scale=1 / 255)
        cv2.subtract(value, lacking, dst=target)
    return out


def _pillow_hue(planes: np.ndarray, value: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Return Pillow's 8-bit hue [H, W].

    The index into `_hue_table` is assembled byte by byte, which takes 8-bit operations only.
    """
    red, green, blue = planes
    is_red = cv2.compare(red, value, cv2.CMP_EQ)
    is_green = cv2.compare(green, value, cv2.CMP_EQ)

    # The two other channels in cyclic order after the largest one; at first as if that were blue.
    next_channel, last_channel = red.copy(), green.copy()
    for mask, after, before in ((is_green, blue, red), (is_red, green, blue)):
        cv2.copyTo(after, mask, next_channel)
        cv2.copyTo(before, mask, last_channel)

    # 0, 2, 4 for red, green, blue, without branches; plus 1 if the difference is negative
    sector = ~is_red & (4 ^ (is_green & 6))
    kind = sector | (next_channel < last_channel)
    difference = next_channel - last_channel  # modulo 256
    index = cv2.merge([chroma, difference, kind, np.zeros_like(chroma)]).view("<i4")
    hue = _hue_table().index_select(0, torch.from_numpy(index).view(-1))
    return hue.numpy().reshape(chroma.shape)


FAST_JITTER: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}


def _blur(planes: np.ndarray, radius: float) -> np.ndarray:
    """Blur as Pillow's Gaussian does: three box filters with fractional ends, edges repeated."""
    box = _box_kernel(radius)
    image = planes.transpose(1, 2, 0).astype(np.float32)
    for _ in range(3):
        image = cv2.sepFilter2D(image, -1, box, box, borderType=cv2.BORDER_REPLICATE)
    return np.ascontiguousarray(np.rint(image).astype(np.uint8).transpose(2, 0, 1))


def _box_kernel(radius: float) -> np.ndarray:
    """Return a box of variance radius**2 / 3: ones, and at both ends the fraction that is left."""
    variance = radius**2 / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    surplus = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    fraction = surplus / (6 * (variance - (whole + 1) ** 2))
    box = np.ones(2 * whole + 3)
    box[[0, -1]] = fraction
    return box / box.sum()
