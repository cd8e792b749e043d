"""Decodes images, and of a JPEG only as much as the crop needs."""

import contextlib
import functools
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from masking_generator import Pair

RawImage = bytes | np.ndarray  # an encoded file, or decoded [H, W, 3] uint8


# --- decoding -------------------------------------------------------------------------------------

# whatever Pillow's readers raise for damaged files
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_TAIL = 64  # bytes that may follow the end, as some cameras write them
JPEG_SCAN = 0xDA
JPEG_SEQUENTIAL, JPEG_OTHER_FRAMES = b"\xc0\xc1", b"\xc2\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf"
CHROMA_ROWS = 8  # that a row's colors may depend on, below it


class BrokenImageError(Exception):
    """The bytes of one sample cannot be read or decoded; the message says why."""


def decode(raw: RawImage) -> np.ndarray:
    """RGB picture [H, W, 3] uint8, equal to Pillow's; JPEGs through simplejpeg, which is faster.

    Greyscale, palette, CMYK and transparent images become RGB as by Pillow's `convert`; EXIF
    orientation is ignored.

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
    """A picture's (height, width), and a function that decodes at least its first n rows, [>= n, W,
    3] as `decode`.

    A crop needs no rows below it, and most of a view's time is decoding.
    """
    height_at = cuttable_height(raw) if isinstance(raw, bytes) else None
    if height_at is None:
        picture = decode(raw)
        return picture.shape[:2], lambda rows: picture
    return struct.unpack_from(">HH", raw, height_at), functools.partial(_decode_top, raw, height_at)


def cuttable_height(raw: bytes) -> int | None:
    """Where a JPEG's height is written, if its rows can be decoded without those below them; None
    for other files.

    They can in sequential files with all of their one or three components in one scan. Whether a
    file is whole is only noticed at its end: those that do not end as they should are for `decode`
    to judge.
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
    """The decoder stops where the header says that the picture ends, so the header is told to end
    it earlier."""
    rows += CHROMA_ROWS
    if rows < struct.unpack_from(">H", raw, height_at)[0]:
        shortened = bytearray(raw)
        struct.pack_into(">H", shortened, height_at, rows)
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(
                shortened, strict=False
            )  # it complains of the data that is left over
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
