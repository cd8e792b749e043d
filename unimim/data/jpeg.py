"""Decode images, and of a JPEG only the rows that the crop needs.

Decoding is most of a view's time, and a crop ends on average well above the image's last row.
`_decode_top` shortens the height in a copy of the JPEG's header, so that the decoder stops early;
`cuttable_height` decides which files allow that. docs/benchmarks.md has the speed.
"""

import contextlib
import functools
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg
from PIL import Image

from masking_generator import Pair

RawImage = bytes | np.ndarray  # an encoded file, or decoded [H, W, 3] uint8 (or own channels)


# --- decoding -------------------------------------------------------------------------------------

# whatever Pillow's readers raise for damaged files; that of TIFFs the last four
PILLOW_ERRORS = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
)

SIXTEEN_BIT_AS_INT = ("PNG", "PPM")  # formats whose 16-bit gray Pillow may open as mode I

JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
JPEG_TAIL = 64  # bytes that some cameras write after the end marker
JPEG_SCAN = 0xDA
JPEG_SEQUENTIAL = b"\xc0\xc1"
JPEG_PROGRESSIVE = b"\xc2"
JPEG_OTHER_FRAMES = b"\xc2\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf"
JPEG_ADOBE = 0xEE
CHROMA_ROWS = 8  # rows below, on which a row's colors may depend
ARRAY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
MAX_IMAGE_PIXELS = 178_956_970  # above which Pillow refuses an image by default


class BrokenImageError(Exception):
    """Signals that an image cannot be read or decoded; the message says why."""


def limit_pixels(pixels: int) -> None:
    """Let every decoder of this process refuse images of more pixels, from the header alone."""
    if pixels < 1:
        raise ValueError(f"--max_image_pixels must be at least 1, not {pixels}")
    Image.MAX_IMAGE_PIXELS = pixels / 2  # Pillow warns from there on, and refuses twice as many
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def pixel_limit() -> int:
    """Return the largest number of pixels that an image may have in this process."""
    return int(2 * Image.MAX_IMAGE_PIXELS)


def check_pixels(height: int, width: int) -> None:
    """Raise BrokenImageError for a size of more pixels than an image may have."""
    if height * width > pixel_limit():
        raise BrokenImageError(
            f"its header says {width} x {height} pixels, more than --max_image_pixels "
            f"{pixel_limit()}"
        )


def decode(raw: RawImage) -> np.ndarray:
    """Return the RGB image [H, W, 3] uint8, equal to Pillow's; JPEGs go through faster simplejpeg.

    Grayscale, palette, CMYK and transparent images are converted as by Pillow; EXIF orientation is
    ignored. 16-bit gray becomes 8-bit by its range, as Pillow does for 16-bit colors only.

    Raises:
        BrokenImageError: the bytes are empty, truncated, not an image, or one of too many pixels.
    """
    if isinstance(raw, np.ndarray):
        return raw
    if is_array_file(raw):
        return _rgb_of_array(read_array_file(raw))
    if raw[:2] == JPEG_START:
        with contextlib.suppress(ValueError):  # damaged: Pillow tolerates it or names the reason
            height, width, colors, _ = simplejpeg.decode_jpeg_header(raw)
            check_pixels(height, width)
            if colors not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(raw)
    return np.array(decode_pillow(raw))


def open_picture(raw: RawImage) -> tuple[Pair, Callable[[int], np.ndarray]]:
    """Return an image's (height, width), and a function that decodes its first n rows or more.

    The function returns [>= n, W, 3], equal to the first rows of `decode`.
    """
    height_at = cuttable_height(raw) if isinstance(raw, bytes) else None
    if height_at is None:
        image = decode(raw)
        return image.shape[:2], lambda rows: image
    size = struct.unpack_from(">HH", raw, height_at)
    check_pixels(*size)
    return size, functools.partial(_decode_top, raw, height_at)


def cuttable_height(raw: bytes) -> int | None:
    """Return the offset of a JPEG's height if its top can be decoded alone, None for other files.

    That holds for sequential files with all of their one or three components in one scan. A
    truncated file shows only at its end, so files without an end marker are left to `decode`.
    """
    if raw[:2] != JPEG_START or JPEG_END not in raw[-JPEG_TAIL:]:
        return None
    height_at = None
    components = 0
    for marker, at in _segments(raw):
        if marker in JPEG_SEQUENTIAL:
            height_at = at + 5
            components = raw[at + 9]
        elif marker in JPEG_OTHER_FRAMES:
            return None
        elif marker == JPEG_SCAN:
            whole = components in (1, 3) and raw[at + 4] == components
            return height_at if whole and any(raw[height_at : height_at + 2]) else None
    return None


def usual_jpeg_size(raw: RawImage) -> Pair | None:
    """Return (height, width) of a JPEG that any decoder turns into the same RGB, None for others.

    It has an end marker, 8 bits, Huffman codes, and gray or YCbCr colors; it may be progressive.
    """
    if isinstance(raw, np.ndarray):
        return None
    if raw[:2] != JPEG_START or JPEG_END not in raw[-JPEG_TAIL:]:
        return None
    size = None
    for marker, at in _segments(raw):
        if marker in JPEG_SEQUENTIAL + JPEG_PROGRESSIVE:
            bits, height, width, components = struct.unpack_from(">BHHB", raw, at + 4)
            if bits != 8 or not height or not width or components not in (1, 3):
                return None
            if raw[at + 10 : at + 19 : 3] == b"RGB":  # the names of the components
                return None
            size = height, width
        elif marker in JPEG_OTHER_FRAMES:
            return None
        elif marker == JPEG_ADOBE and raw[at + 4 : at + 9] == b"Adobe" and raw[at + 15] == 0:
            return None  # RGB, or of an unknown kind
        elif marker == JPEG_SCAN:
            return size
    return None


def _segments(raw: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and offset of a JPEG's segments up to the first scan."""
    at = 2
    while at + 10 < len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        yield marker, at
        if marker == JPEG_SCAN:
            return
        # 0xFF may pad a marker; every segment begins with its length
        at += 1 if marker == 0xFF else 2 + int.from_bytes(raw[at + 2 : at + 4])


def _decode_top(raw: bytes, height_at: int, rows: int) -> np.ndarray:
    """Decode the first `rows` rows or more, by a header that ends the image there."""
    rows += CHROMA_ROWS
    if rows < struct.unpack_from(">H", raw, height_at)[0]:
        shortened = bytearray(raw)
        struct.pack_into(">H", shortened, height_at, rows)
        with contextlib.suppress(ValueError):
            # not strict: the decoder warns of the data that is left over
            return simplejpeg.decode_jpeg(shortened, strict=False)
    return decode(raw)


def decode_pillow(raw: RawImage) -> Image.Image:
    """Return the RGB image as a Pillow image; raise BrokenImageError like `decode`."""
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    if not raw:
        raise BrokenImageError("the file is empty")
    if is_array_file(raw):
        return Image.fromarray(decode(raw))
    try:
        image = Image.open(io.BytesIO(raw))
        return _gray8(image).convert("RGB") if image.mode[0] in "IF" else image.convert("RGB")
    except Image.DecompressionBombError as error:
        reason = f"its header states more pixels than --max_image_pixels {pixel_limit()}"
        raise BrokenImageError(reason) from error
    except PILLOW_ERRORS as error:
        raise BrokenImageError(str(error)) from error


def _gray8(image: Image.Image) -> Image.Image:
    """Return 16-bit gray as 8-bit gray; Pillow would clip it at 255, so that most of it is white.

    Integers that fit into 8 bits stay as they are.

    Raises:
        BrokenImageError: the pixels are floats or wider integers, whose range the file does not
            say.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT_AS_INT):
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "I" and values.min() >= 0 and values.max() <= 255:
        return Image.fromarray(values.astype(np.uint8))
    raise BrokenImageError(
        f"its pixels (Pillow's mode {image.mode}) have no known range; convert it to 8 or 16 bits"
    )


# --- NumPy's files --------------------------------------------------------------------------------


def is_array_file(raw: bytes) -> bool:
    """Return whether the bytes are a file that `numpy.save` writes."""
    return raw[:6] == np.lib.format.MAGIC_PREFIX


def read_array_file(raw: bytes) -> np.ndarray:
    """Return the array of an .npy file; no memory is taken before its size is known to be right.

    Raises:
        BrokenImageError: the file is damaged, has Python objects, or too many pixels.
    """
    file = io.BytesIO(raw)
    try:
        shape, fortran, dtype = ARRAY_HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # damaged headers raise anything
        raise BrokenImageError(f"its header cannot be read: {error}") from error
    if dtype.hasobject:
        raise BrokenImageError("it has Python objects, which are not loaded")
    if not dtype.itemsize:
        raise BrokenImageError("its values have no bytes")
    if len(shape) >= 2:
        check_pixels(*shape[:2])
    stated = math.prod(shape) * dtype.itemsize
    held = len(raw) - file.tell()
    if stated != held:
        raise BrokenImageError(f"its header states {stated} bytes, it has {held}")
    order = "F" if fortran else "C"
    return np.frombuffer(raw, dtype, offset=file.tell()).reshape(shape, order=order)


def _rgb_of_array(pixels: np.ndarray) -> np.ndarray:
    """Return an array of 8-bit gray or RGB as [H, W, 3] uint8."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        count = pixels.shape[-1]
        flag = "--keep_channels" if count in (1, 3) else f"--in_chans {count}"
        raise BrokenImageError(
            f"its array {pixels.dtype} {list(pixels.shape)} is not 8-bit gray or RGB; give {flag}"
        )
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")
