"""Read images of any number of channels at their own depth, and make their views.

The published pipelines see 8-bit RGB. Here an image is float32 [H, W, N]: 8-bit and 16-bit values
divided by their largest one, floats as the file has them. Crops are resized in float32 by torch;
colors are left alone, for they mean nothing where channels are not red, green and blue.
"""

import argparse
import io
from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torch.nn.functional import interpolate

from masking_generator import Pair
from unimim.data.crops import TORCH_FILTERS, Box, ViewDraws
from unimim.data.jpeg import (
    PILLOW_ERRORS,
    SIXTEEN_BIT_AS_INT,
    BrokenImageError,
    RawImage,
    check_pixels,
    decode,
    is_array_file,
    read_array_file,
)

BITS_PER_SAMPLE = 258  # TIFF's tag
CHANNELS_OF_MODE = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "F": 1}
COLOR_FLAGS = {"aa": "", "color_jitter": 0.0}  # what changes colors, and its value for none


# --- flags ----------------------------------------------------------------------------------------


def kept_channels(args: argparse.Namespace) -> int | None:
    """Return how many channels are read at their own depth; None where images are 8-bit RGB."""
    channels = getattr(args, "in_chans", None)
    channels = 3 if channels is None else channels
    if channels < 1:
        raise ValueError(f"--in_chans is {channels}; it must be at least 1")
    kept = getattr(args, "keep_channels", False) or channels not in (1, 3)
    return channels if kept else None


def leave_colors(args: argparse.Namespace, given: set[str]) -> None:
    """Set the flags that change colors to none where channels are kept.

    Raises:
        ValueError: one of them is among the `given` names and asks for a change.
    """
    channels = kept_channels(args)
    if channels is None:
        return
    for name, none in COLOR_FLAGS.items():
        if name in args and getattr(args, name) and name in given:
            raise ValueError(
                f"--{name} {getattr(args, name)} changes colors, which the {channels} channels "
                "that are kept may not be; leave it out"
            )
        if name in args:
            setattr(args, name, none)


# --- decoding -------------------------------------------------------------------------------------


def decode_channels(raw: RawImage, channels: int) -> np.ndarray:
    """Return an image of `channels` channels as float32 [H, W, channels].

    Raises:
        BrokenImageError: the image cannot be read, has another number of channels, or has values
            of an unknown range.
    """
    pixels = raw if isinstance(raw, np.ndarray) else _own_pixels(raw, channels)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not pixels.size:
        raise BrokenImageError(f"its shape is {list(pixels.shape)}, not [H, W, N]")
    if pixels.shape[2] != channels:
        if pixels.shape[0] == channels:
            raise BrokenImageError(
                f"its shape is {list(pixels.shape)}: the {channels} channels must come last, "
                "as [H, W, N]"
            )
        raise BrokenImageError(f"it has {pixels.shape[2]} channels, --in_chans is {channels}")
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:  # of any byte order
        return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    if pixels.dtype.kind != "f":
        raise BrokenImageError(
            f"its values are {pixels.dtype}, whose range is unknown; use uint8, uint16 or floats"
        )
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise BrokenImageError("it has values that are not finite")
    return pixels


def _own_pixels(raw: bytes, channels: int) -> np.ndarray:
    """Return the pixels of a file with its own channels and depth, [H, W] or [H, W, N]; of several
    pages, each of which is a channel, there must be `channels`."""
    if is_array_file(raw):
        return read_array_file(raw)
    if not raw:
        raise BrokenImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(raw))
        check_pixels(image.height, image.width)
        if image.format == "TIFF" and image.n_frames > 1:  # a page for each channel
            if image.n_frames != channels:
                raise BrokenImageError(f"it has {image.n_frames} pages, --in_chans is {channels}")
            pages = []
            for page in ImageSequence.Iterator(image):
                check_pixels(page.height, page.width)
                pages.append(_own_values(page, b""))
            return np.stack(pages, axis=-1)
        return _own_values(image, raw)
    except PILLOW_ERRORS as error:
        raise BrokenImageError(str(error)) from error


def _own_values(image: Image.Image, raw: bytes) -> np.ndarray:
    """Return the values of an opened image; 16-bit colors, which Pillow cuts, by OpenCV."""
    if image.mode in ("RGB", "RGBA") and raw and _sixteen_bit_colors(image, raw):
        pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.ndim != 3:
            raise BrokenImageError("its 16-bit colors cannot be decoded")
        order = [2, 1, 0, 3][: pixels.shape[2]]  # OpenCV has blue first
        return np.ascontiguousarray(pixels[..., order])
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT_AS_INT):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    return np.asarray(image)


def _sixteen_bit_colors(image: Image.Image, raw: bytes) -> bool:
    if image.format == "PNG":
        return raw[24] == 16  # IHDR's bit depth
    return image.format == "TIFF" and 16 in image.tag_v2.get(BITS_PER_SAMPLE, ())


# --- views ----------------------------------------------------------------------------------------


def channel_crop(
    pixels: np.ndarray, box: Box, flip: bool, size: Pair, interpolation: str
) -> np.ndarray:
    """Return the box of an image [H, W, N] resized to `size`: float32 [N, *size].

    The box lies in the mirrored image if `flip`, as in `fast_crop`.
    """
    top, left, height, width = box
    if flip:
        left = pixels.shape[1] - left - width
    crop = pixels[top : top + height, left : left + width]
    resized = _resize(torch.from_numpy(crop).permute(2, 0, 1), size, interpolation)
    return (resized.flip(2) if flip else resized).contiguous().numpy()


def _resize(planes: Tensor, size: Pair, interpolation: str = "bicubic") -> Tensor:
    """Resize [N, H, W] with antialiasing; no value leaves the range of the crop's own."""
    if planes.shape[1:] == size:
        return planes
    resized = interpolate(planes[None], size=size, mode=interpolation, antialias=True)[0]
    low, high = planes.amin((1, 2), keepdim=True), planes.amax((1, 2), keepdim=True)
    return resized.clamp(low, high)


def draw_channel_view(
    raw: RawImage, draw: Callable[..., ViewDraws], size: Pair, channels: int
) -> tuple[Pair, ViewDraws, np.ndarray]:
    """Return the image's size, what was drawn, and its view [channels, *size]."""
    pixels = decode_channels(raw, channels)
    image_size = pixels.shape[:2]
    params = draw(size=image_size)
    view = channel_crop(pixels, params.box, params.flip, size, params.interpolation)
    return image_size, params, view


def center_view(
    raw: RawImage, size: Pair, cover: Callable[[Pair], Pair] | None, channels: int
) -> Tensor:
    """Return an image for evaluation, float32 [channels, *size].

    `cover` gives the (height, width) to which an image of a (height, width) is resized before its
    center is cropped; without it the whole image is resized to `size`.
    """
    planes = torch.from_numpy(decode_channels(raw, channels)).permute(2, 0, 1)
    if cover is None:
        return _resize(planes, size).contiguous()
    planes = _resize(planes, cover(tuple(planes.shape[1:])))
    top = round((planes.shape[1] - size[0]) / 2)
    left = round((planes.shape[2] - size[1]) / 2)
    return planes[:, top : top + size[0], left : left + size[1]].contiguous()


def check_channel_views(views: tuple[str, ...], interpolation: str, pipeline: str) -> None:
    """Raise ValueError if `views` need colors, or where flags name what only 8-bit images have."""
    for view, reason in {
        "image_strong": "the colors of its strong view",
        "image_second": "the RGB images that its tokenizer reads",
    }.items():
        if view in views:
            raise ValueError(
                f"this --model needs {reason}, which images whose channels are kept lack; use MAE, "
                "SimMIM, A2MIM, MaskFeat or SemAIM"
            )
    if interpolation not in (*TORCH_FILTERS, "random"):
        raise ValueError(
            f"--train_interpolation {interpolation} is for 8-bit RGB images; use bicubic, bilinear "
            "or random"
        )
    if pipeline != "fast":
        raise ValueError(f"--data_pipeline {pipeline} is for 8-bit RGB images; use fast")


# --- orientation ----------------------------------------------------------------------------------

EXIF_ORIENTATION = 0x0112
QUARTER_TURNS = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}  # counterclockwise
MIRRORED = (2, 4, 5, 7)  # left to right, after the turns


def upright(
    raw: RawImage,
    channels: int | None,
    to_pixels: Callable[[RawImage], np.ndarray] = decode,
) -> RawImage:
    """Return an image as its EXIF orientation says; one that need not be turned as it is.

    `channels`: how many are kept, None for 8-bit RGB, which `to_pixels` decodes.
    """
    if isinstance(raw, np.ndarray) or is_array_file(raw):
        return raw
    try:
        orientation = Image.open(io.BytesIO(raw)).getexif().get(EXIF_ORIENTATION, 1)
    except PILLOW_ERRORS:
        return raw  # the decoder says what is wrong
    if orientation not in QUARTER_TURNS or orientation == 1:
        return raw
    pixels = to_pixels(raw) if channels is None else decode_channels(raw, channels)
    pixels = np.rot90(pixels, QUARTER_TURNS[orientation])
    if orientation in MIRRORED:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
