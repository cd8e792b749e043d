"""Prepare images before anything else sees them: turn them upright (--exif_orientation), and
composite those with an alpha channel over white or black (--alpha)."""

import argparse
import io
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from unimim.data.channels import kept_channels, upright
from unimim.data.jpeg import (
    JPEG_START,
    PILLOW_ERRORS,
    RawImage,
    check_pixels,
    decode,
    decode_pillow,
    is_array_file,
)

DROP = "drop"  # the color that a transparent pixel has in the file, as Pillow's convert("RGB")
BACKGROUNDS = {"white": 255, "black": 0}
ALPHAS = (DROP, *BACKGROUNDS)

Preparation = Callable[[RawImage], RawImage]


def preparation(args: argparse.Namespace) -> Preparation | None:
    """Return what --exif_orientation and --alpha do to images; None if that is nothing."""
    turn = getattr(args, "exif_orientation", False)
    background = background_of(args)
    if not turn and background is None:
        return None
    return partial(prepared, turn=turn, background=background, channels=kept_channels(args))


def prepared(
    raw: RawImage, *, turn: bool, background: int | None, channels: int | None
) -> RawImage:
    """Return an image upright if `turn`, and composited over a background if there is one."""
    if turn:
        turned = upright(raw, channels, lambda raw: decode(composited(raw, background)))
        if turned is not raw:
            return turned
    return composited(raw, background)


def background_of(args: argparse.Namespace) -> int | None:
    """Return the gray level of the background of --alpha, None where alpha is dropped.

    Raises:
        ValueError: the channels of images are kept, of which alpha is one.
    """
    alpha = getattr(args, "alpha", DROP)
    if alpha == DROP:
        return None
    if kept_channels(args) is not None:
        raise ValueError(
            f"--alpha {alpha} is for 8-bit RGB images; where channels are kept alpha is one of "
            "them: leave it out"
        )
    return BACKGROUNDS[alpha]


def composited(raw: RawImage, background: int | None) -> RawImage:
    """Return an image with alpha as RGB [H, W, 3] over a background, any other one as it is.

    Alpha is a channel of its own, that of a palette, or one color that counts as transparent.
    """
    if background is None or isinstance(raw, np.ndarray):
        return raw
    if raw[:2] == JPEG_START or is_array_file(raw):
        return raw
    try:
        image = Image.open(io.BytesIO(raw))
        if not image.has_transparency_data:
            return raw
        check_pixels(image.height, image.width)
        pixels = Image.new("RGB", image.size, (background,) * 3)
        if image.mode[0] == "I":  # 16-bit gray, of which one level is transparent
            opaque = np.asarray(image) != image.info["transparency"]
            pixels.paste(decode_pillow(raw), mask=Image.fromarray(opaque))
        else:
            colors = image.convert("RGBA")
            pixels.paste(colors, mask=colors)
    except PILLOW_ERRORS:
        return raw  # the decoder says what is wrong
    return np.array(pixels)
