"""Decode, crop, resize and color JPEGs on the device of the training: --decode gpu.

A worker of the loader draws a sample as it does under --decode cpu, masks included, but leaves the
JPEG undecoded (`UndecodedImages`); `DeviceDecoder` makes the views of a batch of these. What not
every decoder takes comes with the views that the CPU made of it, in the same batch, and what the
device's decoder refuses is loaded again as under --decode cpu (docs/data.md#decoding-on-a-gpu).
Shapes in comments: an image [3, H, W], n of a batch's B images, views of h x w.
"""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from datasets import ImageDataset
from unimim.data.channels import kept_channels
from unimim.data.color import ColorDraws
from unimim.data.crops import ViewDraws
from unimim.data.files import Key
from unimim.data.tensor_views import JITTER, gaussian_blur, luma, resample, solarize
from unimim.logs import log
from unimim.sizes import Pair

IMAGE_VIEWS = ("image", "image_strong", "image_second")
PIXELS_AT_ONCE = 2**25  # of images on the device, padded to one size: 400 MB as float32

Batch = dict[str, Any]


def check_device_decoding(args: Namespace) -> None:
    """Raise ValueError where flags ask for images that --decode gpu does not make."""
    if args.data_pipeline != "fast":
        raise ValueError(
            f"--decode gpu does not decode with PIL, as --data_pipeline {args.data_pipeline} does; "
            "use --decode cpu, or --data_pipeline fast"
        )
    if kept_channels(args) is not None:
        flag = "--keep_channels" if args.keep_channels else f"--in_chans {args.in_chans}"
        raise ValueError(
            f"--decode gpu makes 8-bit RGB images, and {flag} keeps the files' channels; "
            "use --decode cpu"
        )


# --- in the loader's workers ----------------------------------------------------------------------


class Jpeg(NamedTuple):
    """A JPEG of a batch: its row, where its bytes lie, its (height, width), and its draws."""

    row: int
    begin: int
    end: int
    size: Pair
    draws: ViewDraws


@dataclass(frozen=True)
class Undecoded:
    """What the device makes of a batch's images.

    Attributes:
        keys: (epoch, index) of every sample, with which it can be loaded again.
        files: the bytes of all JPEGs, uint8 [bytes].
        jpegs: the JPEGs, in the order of their rows.
        finished: the views of the other rows, uint8 [B - n, 3, h, w].
    """

    keys: list[Key]
    files: Tensor
    jpegs: list[Jpeg]
    finished: dict[str, Tensor]


class UndecodedImages(ImageDataset):
    """An `ImageDataset` whose loader leaves JPEGs undecoded; a single `images[key]` is finished."""

    def __getitems__(self, keys: list[Key]) -> list[dict]:
        """Return the samples of a batch, as torch's loader asks for them."""
        return [self.load(key, self.transform.leave_jpeg) | {"key": key} for key in keys]

    @staticmethod
    def collate(samples: list[dict]) -> Batch:
        """Return a batch with an `Undecoded` as "undecoded" in place of the images."""
        keys = [sample.pop("key") for sample in samples]
        files: list[bytes] = []
        jpegs: list[Jpeg] = []
        finished: list[dict[str, Tensor]] = []
        end = 0
        for row, sample in enumerate(samples):
            if "undecoded" in sample:
                file, size, draws = sample.pop("undecoded")
                begin, end = end, end + len(file)
                files.append(file)
                jpegs.append(Jpeg(row, begin, end, size, draws))
            else:
                finished.append({view: sample.pop(view) for view in IMAGE_VIEWS if view in sample})
        # one tensor, because each one takes a file descriptor on its way to the parent
        together = torch.from_numpy(np.frombuffer(bytearray().join(files), np.uint8))
        views = default_collate(finished) if finished else {}
        return default_collate(samples) | {"undecoded": Undecoded(keys, together, jpegs, views)}


# --- in the process that trains -------------------------------------------------------------------


def batch_decoder(dataset: Dataset, device: torch.device) -> Callable[[Batch], Batch]:
    """Return what decodes the batches of a loader of `dataset`; finished ones stay as they are."""
    if isinstance(dataset, UndecodedImages):
        return DeviceDecoder(dataset, device)
    return lambda batch: batch


class DeviceDecoder:
    """Make the views of batches of `UndecodedImages` on the device: `decoder(batch)`.

    On a CUDA device nvJPEG decodes; anywhere else the CPU does, in this process.

    Raises:
        ValueError: there is no nvJPEG for a CUDA device.
    """

    def __init__(self, images: UndecodedImages, device: torch.device):
        self.images = images
        self.device = device
        self.decoding_device = device if device.type == "cuda" else torch.device("cpu")
        transform = images.transform
        sizes = dict.fromkeys(IMAGE_VIEWS, transform.size) | {"image_second": transform.second_size}
        self.sizes = {view: size for view, size in sizes.items() if view in transform.views}
        self.has_refused = False
        if device.type == "cuda":
            self._try_nvjpeg()
        else:
            log.warning(
                "--decode gpu: device %s has no nvJPEG, so the process that trains decodes "
                "all images on the CPU, which is slow", device,
            )  # fmt: skip

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with uint8 views [B, 3, h, w] on the device; a finished one as it is."""
        if "undecoded" not in batch:  # of single samples
            return batch
        batch = dict(batch)
        left: Undecoded = batch.pop("undecoded")
        for view, size in self.sizes.items():
            shape = (len(left.keys), 3, *size)
            batch[view] = torch.empty(shape, dtype=torch.uint8, device=self.device)

        # the views that came finished
        rows = sorted(set(range(len(left.keys))) - {jpeg.row for jpeg in left.jpegs})
        for view, images in left.finished.items():
            batch[view][rows] = images.to(self.device)

        # the others, as many at once as there is memory for
        for jpegs in _chunks(left.jpegs):
            images = self._decoded([left.files[jpeg.begin : jpeg.end] for jpeg in jpegs])
            taken: list[Jpeg] = []
            decoded: list[Tensor] = []
            for jpeg, image in zip(jpegs, images, strict=True):
                if image is None or tuple(image.shape[1:]) != jpeg.size:
                    self._load_again(batch, jpeg.row, left.keys[jpeg.row])
                else:
                    taken.append(jpeg)
                    decoded.append(image)
            if taken:
                rows = [jpeg.row for jpeg in taken]
                for view, images in self._views(decoded, [jpeg.draws for jpeg in taken]).items():
                    batch[view][rows] = images
        return batch

    def _decoded(self, files: list[Tensor]) -> list[Tensor | None]:
        """Return images uint8 [3, H, W] on the device, None for files that cannot be decoded."""
        try:
            images = decode_jpeg(files, ImageReadMode.RGB, device=self.decoding_device)
            return [image.to(self.device) for image in images]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of one of them
            if len(files) == 1:
                return [None]
        return [image for file in files for image in self._decoded([file])]

    def _load_again(self, batch: Batch, row: int, key: Key) -> None:
        """Replace a row of the batch by the sample of --decode cpu, which may be of another image:
        a broken one is reported there."""
        sample = self.images[key]
        for name, value in sample.items():
            batch[name][row] = torch.as_tensor(value)
        if not self.has_refused and sample["index"] == key[1]:
            self.has_refused = True
            path = self.images.source.path(sample["index"])
            log.info("the device does not decode %s; the CPU does, also others like it", path)

    def _views(self, images: list[Tensor], draws: list[ViewDraws]) -> dict[str, Tensor]:
        """Return the views uint8 [n, 3, h, w] of n images, in the order of the CPU's pipeline."""
        images = [_jittered(image, one.jitter) for image, one in zip(images, draws, strict=True)]
        crops = [_cut(image, one) for image, one in zip(images, draws, strict=True)]
        flip = torch.tensor([one.flip for one in draws], device=self.device)
        weak = _resized(crops, flip, self.sizes["image"], [one.interpolation for one in draws])
        views = {"image": weak}
        if "image_strong" in self.sizes:
            views["image_strong"] = _colored(weak, [one.color for one in draws])
        if "image_second" in self.sizes:
            second = [one.second for one in draws]
            views["image_second"] = _resized(crops, flip, self.sizes["image_second"], second)
        return views

    def _try_nvjpeg(self) -> None:
        """Decode an image of one color; ValueError if that fails."""
        file = encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
        try:
            decode_jpeg([file], ImageReadMode.RGB, device=self.device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--decode gpu needs nvJPEG, which torchvision {torchvision.__version__} does not "
                f"have on {self.device} ({reason}); use --decode cpu"
            ) from error


# --- images and their draws -----------------------------------------------------------------------


def _chunks(jpegs: Sequence[Jpeg]) -> Iterator[list[Jpeg]]:
    """Yield all JPEGs, the small ones first, in lists that fill PIXELS_AT_ONCE if padded."""
    chunk: list[Jpeg] = []
    height = width = 0
    for jpeg in sorted(jpegs, key=lambda jpeg: (jpeg.size[0] * jpeg.size[1], jpeg.row)):
        height, width = max(height, jpeg.size[0]), max(width, jpeg.size[1])
        if chunk and (len(chunk) + 1) * height * width > PIXELS_AT_ONCE:
            yield chunk
            chunk = []
            height, width = jpeg.size
        chunk.append(jpeg)
    if chunk:
        yield chunk


def _jittered(image: Tensor, steps: Sequence[tuple[str, float]]) -> Tensor:
    """Return an image after jitter steps (name, factor), each cut to whole levels."""
    for name, factor in steps:
        image = JITTER[name](image[None].float(), factor)[0].floor_()
    return image


def _cut(image: Tensor, draws: ViewDraws) -> Tensor:
    """Return the crop of an image, before the flip."""
    top, left, height, width = draws.box
    if draws.flip:
        left = image.shape[2] - left - width
    return image[:, top : top + height, left : left + width]


def _resized(
    crops: Sequence[Tensor], flip: Tensor, size: Pair, interpolations: Sequence[str]
) -> Tensor:
    """Return crops of any size resized to `size` and mirrored where `flip` [n], uint8."""
    device = flip.device
    views = torch.empty(len(crops), 3, *size, dtype=torch.uint8, device=device)
    for interpolation in sorted(set(interpolations)):
        rows = [row for row, own in enumerate(interpolations) if own == interpolation]
        sides = [crops[row].shape[1:] for row in rows]
        height, width = (max(side) for side in zip(*sides, strict=True))
        padded = torch.zeros(len(rows), 3, height, width, device=device)
        for place, row in zip(padded, rows, strict=True):
            crop = crops[row]
            place[:, : crop.shape[1], : crop.shape[2]] = crop
        boxes = torch.tensor([(0, 0, *side) for side in sides], dtype=torch.float32, device=device)
        views[rows] = resample(padded, boxes, size, interpolation, flip[rows]).byte()
    return views


def _colored(images: Tensor, colors: Sequence[ColorDraws]) -> Tensor:
    """Return the strong views of weak ones, uint8 [n, 3, h, w]."""
    images = images.float()

    # the jitter, whose steps each image has in an order of its own
    for step, (name, jitter) in itertools.product(range(len(JITTER)), JITTER.items()):
        factors = {
            row: color.jitter[step][1]
            for row, color in enumerate(colors)
            if color.jitter and color.jitter[step][0] == name
        }
        if factors:
            rows = list(factors)
            factor = images.new_tensor(list(factors.values())).view(-1, 1, 1, 1)
            images[rows] = jitter(images[rows], factor).floor_()

    # the changes that follow
    gray = [row for row, color in enumerate(colors) if color.gray]
    images[gray] = luma(images[gray]).round_()
    radii = {row: color.blur_radius for row, color in enumerate(colors) if color.blur_radius}
    radius = images.new_tensor(list(radii.values())).view(-1, 1, 1)
    images[list(radii)] = gaussian_blur(images[list(radii)], radius).round_()
    solarized = [row for row, color in enumerate(colors) if color.solarize]
    images[solarized] = solarize(images[solarized])
    return images.clamp_(0, 255).byte()
