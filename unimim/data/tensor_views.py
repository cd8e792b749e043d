"""Crop, resize and color batches of images by tensor operations, on any device.

Shapes in comments: images are float32 [B, 3, H, W] with values from 0 to 255, boxes [B, 4] (top,
left, height, width), factors [B, 1, 1, 1] or a number.
"""

import math

import torch
from torch import Tensor

from masking_generator import Pair
from unimim.data.crops import PILLOW_FILTERS

LUMA = (0.299, 0.587, 0.114)


# --- crops ----------------------------------------------------------------------------------------


def resample(
    images: Tensor,
    boxes: Tensor,
    size: Pair,
    interpolation: str = "bicubic",
    flip: Tensor | None = None,
) -> Tensor:
    """Return the boxes of images resized to `size` with antialiasing, some mirrored: whole float32.

    As by Pillow: a box is cut out before it is resized, its width first, and each pass is rounded
    to 8 bits.
    """
    rows = resize_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size[0], interpolation)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size[1], interpolation)
    if flip is not None:
        columns = torch.where(flip.view(-1, 1, 1), columns.flip(1), columns)
    narrow = (images.float() @ columns.transpose(1, 2).unsqueeze(1)).round_().clamp_(0, 255)
    return (rows.unsqueeze(1) @ narrow).round_().clamp_(0, 255)


def resize_weights(
    start: Tensor, length: Tensor, pixels: int, size: int, interpolation: str
) -> Tensor:
    """Return how much each of `size` new pixels takes of each of the old ones, along one axis:
    float32 [B, size, pixels]."""
    start, scale = start.view(-1, 1, 1), length.view(-1, 1, 1) / size
    stretch = scale.clamp(min=1.0)  # antialiasing: the filter covers what one new pixel does
    center = start + (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5) * scale
    positions = torch.arange(pixels, device=start.device).view(1, 1, -1) + 0.5
    weights = FILTERS[interpolation](((positions - center) / stretch).abs())
    inside = (positions > start) & (positions < start + length.view(-1, 1, 1))
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)


def bicubic(distance: Tensor) -> Tensor:
    """Return Keys' filter with a = -1/2, Pillow's, at distances of 0 and more."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def bilinear(distance: Tensor) -> Tensor:
    """Return a triangle of width 2."""
    return (1 - distance).clamp(min=0)


def hamming(distance: Tensor) -> Tensor:
    """Return Pillow's Hamming filter: a sinc in a Hamming window of width 2."""
    window = 0.54 + 0.46 * torch.cos(math.pi * distance)
    return torch.where(distance < 1, torch.sinc(distance) * window, 0.0)


def lanczos(distance: Tensor) -> Tensor:
    """Return Lanczos' filter of three lobes."""
    return torch.where(distance < 3, torch.sinc(distance) * torch.sinc(distance / 3), 0.0)


FILTERS = {"bicubic": bicubic, "bilinear": bilinear, "hamming": hamming, "lanczos": lanczos}
assert FILTERS.keys() == PILLOW_FILTERS.keys()


# --- colors ---------------------------------------------------------------------------------------


def luma(images: Tensor) -> Tensor:
    """Return gray images [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def brightness(images: Tensor, factor: Tensor | float) -> Tensor:
    """Blend with black."""
    return (images * factor).clamp_(0, 255)


def contrast(images: Tensor, factor: Tensor | float) -> Tensor:
    """Blend with each image's mean gray."""
    mean = luma(images).mean((2, 3), keepdim=True)
    return (images * factor + mean * (1 - factor)).clamp_(0, 255)


def saturation(images: Tensor, factor: Tensor | float) -> Tensor:
    """Blend with the gray images."""
    return (images * factor + luma(images) * (1 - factor)).clamp_(0, 255)


def hue(images: Tensor, turn: Tensor | float) -> Tensor:
    """Turn the hue by a fraction of the full circle, in HSV."""
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    safe = chroma.clamp(min=1e-6)
    angle = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    # each channel lacks a fraction of the chroma that follows from the angle, in sixths of a circle
    angle = angle + 6 * turn
    position = torch.cat((angle + 5, angle + 3, angle + 1), dim=1) % 6
    return value - chroma * torch.minimum(position, 4 - position).clamp_(0, 1)


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}


def gaussian_blur(images: Tensor, radius: Tensor) -> Tensor:
    """Return images after a Gaussian of std `radius` [B, 1, 1]; pixels beyond the border have no
    weight."""
    rows, columns = (_gaussian_weights(radius, side) for side in images.shape[2:])
    return rows.unsqueeze(1) @ (images @ columns.transpose(1, 2).unsqueeze(1))


def _gaussian_weights(radius: Tensor, side: int) -> Tensor:
    """Return the weights of each pixel for each along one axis, [B, side, side]."""
    position = torch.arange(side, device=radius.device, dtype=torch.float32)
    return (-((position[:, None] - position) ** 2) / (2 * radius**2)).softmax(-1)


def solarize(images: Tensor) -> Tensor:
    """Invert values from 128 on."""
    return images.minimum(255 - images)
