"""Batches for pre-training from images that lie on the device as one tensor, every view of which is
made there.

For images so small and steps so short that decoding and augmenting them on the CPU would take
longer than the step. All images have one size and are decoded once; what is random follows from
(seed, step) alone. Shapes in comments: N images, B of a batch, H x W their pixels, h x w those of a
view, gh x gw its patches.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from masking_generator import MaskGenerator, Pair, RandomMask, SimMIMMask
from unimim.data.color import (
    BLUR_PROBABILITY,
    BLUR_RADIUS,
    GRAY_PROBABILITY,
    JITTER_PROBABILITY,
    JITTER_RANGES,
    SOLARIZE_PROBABILITY,
)
from unimim.data.crops import CROP_ASPECT, CROP_ATTEMPTS, POINTS_PER_SIDE, TORCH_FILTERS
from unimim.data.jpeg import decode
from unimim.data.sources import Source
from unimim.data.tensor_views import JITTER, gaussian_blur, luma, resample, solarize
from unimim.data.views import EvalTransform
from unimim.engine.state import Normalize
from unimim.parts.learning import TeacherFeatures, hard_maps, kmeans_maps

VIEWS = ("image", "image_strong", "mask", "target_mask", "noise", "part_ids", "target_ids")
MASK_BANK = 4096  # masks of a generator that only the CPU knows
MAPS_AT_ONCE = 2**11


class Draws(Protocol):
    """Uniform numbers in [0, 1) of a shape, on the device."""

    def __call__(self, *shape: int) -> Tensor: ...


# --- images ---------------------------------------------------------------------------------------


def decoded(source: Source, size: Pair | None = None, threads: int = 1) -> Tensor:
    """All images of a source, uint8 [N, 3, H, W] on the CPU; with `size` each as for evaluation at
    that size.

    Raises:
        ValueError: images of several sizes, and no `size`.
    """

    def read(index: int) -> Tensor:
        if size is None:
            return torch.from_numpy(decode(source.read(index)).transpose(2, 0, 1).copy())
        return EvalTransform(size, None)(source.read(index), None)["image"]

    with ThreadPoolExecutor(threads) as pool:
        images = list(pool.map(read, range(len(source))))
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"images of {len(sizes)} sizes, such as {sorted(sizes)[:2]}, are no single tensor; "
            "give a size"
        )
    return torch.stack(images)


# --- crops ----------------------------------------------------------------------------------------


def random_boxes(draw: Draws, count: int, size: Pair, scale: tuple[float, float]) -> Tensor:
    """Boxes (top, left, height, width), float32 [B, 4], distributed as `transforms.draw_crop`'s."""
    height, width = size
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draw(count, CROP_ATTEMPTS))
    low, high = (math.log(aspect) for aspect in CROP_ASPECT)
    aspect = (low + (high - low) * draw(count, CROP_ATTEMPTS)).exp()
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    # where no attempt fits: the largest centerd box of an allowed aspect
    fallback_h, fallback_w = height, width
    if width / height < CROP_ASPECT[0]:
        fallback_h = round(width / CROP_ASPECT[0])
    elif width / height > CROP_ASPECT[1]:
        fallback_w = round(height * CROP_ASPECT[1])
    found = fits.any(1)
    crop_h = torch.where(found, heights.gather(1, first)[:, 0], fallback_h)
    crop_w = torch.where(found, widths.gather(1, first)[:, 0], fallback_w)
    top = torch.where(
        found, (draw(count) * (height - crop_h + 1)).floor(), (height - fallback_h) // 2
    )
    left = torch.where(
        found, (draw(count) * (width - crop_w + 1)).floor(), (width - fallback_w) // 2
    )
    return torch.stack(
        (top.minimum(height - crop_h), left.minimum(width - crop_w), crop_h, crop_w), dim=1
    )


# --- colors: float images [B, 3, H, W] from 0 to 255, factors [B, 1, 1, 1] ------------------------


def jittered(images: Tensor, strength: float, draw: Draws, order: np.ndarray) -> Tensor:
    """BEiT's jitter of whole pictures; the order of the three steps is the batch's, not each
    image's."""
    names = ("brightness", "contrast", "saturation")
    for step in order:
        images = JITTER[names[step]](images, 1 + strength * (2 * draw(len(images), 1, 1, 1) - 1))
    return images


def strong_view(images: Tensor, draw: Draws, order: np.ndarray) -> Tensor:
    """ConMIM's second view of crops: jitter, gray, blur and solarization with the published
    probabilities.

    It differs from the CPU's in that the order of the jitter's steps is the batch's, the blur a
    true Gaussian, and nothing is rounded in between.
    """
    count = len(images)
    names = list(JITTER_RANGES)
    chosen = (draw(count, 1, 1, 1) < JITTER_PROBABILITY).float()
    for step in order:
        low, high = JITTER_RANGES[names[step]]
        neutral = 0.0 if names[step] == "hue" else 1.0
        factor = low + (high - low) * draw(count, 1, 1, 1)
        images = JITTER[names[step]](images, neutral + chosen * (factor - neutral))
    images = torch.where(draw(count, 1, 1, 1) < GRAY_PROBABILITY, luma(images), images)
    images = blurred(
        images, BLUR_RADIUS[0] + (BLUR_RADIUS[1] - BLUR_RADIUS[0]) * draw(count, 1, 1), draw
    )
    return torch.where(draw(count, 1, 1, 1) < SOLARIZE_PROBABILITY, solarize(images), images)


def blurred(images: Tensor, radius: Tensor, draw: Draws) -> Tensor:
    """A Gaussian of deviation radius [B, 1, 1] on a tenth of the images; the others are as they
    were."""
    radius = torch.where(draw(len(images), 1, 1) < BLUR_PROBABILITY, radius, 1e-2)
    return gaussian_blur(images, radius)


# --- masks ----------------------------------------------------------------------------------------


class DeviceMasks:
    """Masks bool [B, gh, gw] that are distributed as a generator's; `counts`: the fewest and the
    most hidden patches.

    Uniform masks are the first cells in order of noise. Of any other kind a bank of `MASK_BANK`
    masks is made once by the generator, from which masks are drawn.
    """

    def __init__(self, generate: MaskGenerator, seed: int, device: torch.device):
        self.bank, self.repeat = None, 1
        if isinstance(generate, RandomMask):
            self.cells, self.count = generate.grid, generate.count
        elif isinstance(generate, SimMIMMask):
            self.cells, self.count, self.repeat = generate.unit_grid, generate.count, generate.unit
        else:
            rng = np.random.default_rng(seed)
            self.bank = torch.from_numpy(np.stack([generate(rng) for _ in range(MASK_BANK)])).to(
                device
            )
        if self.bank is None:
            self.counts = (self.count * self.repeat**2,) * 2
        else:
            sizes = self.bank.flatten(1).sum(1)
            self.counts = int(sizes.min()), int(sizes.max())

    def __call__(self, draw: Draws, count: int) -> Tensor:
        if self.bank is not None:
            return self.bank[(draw(count) * len(self.bank)).long()]
        order = draw(count, math.prod(self.cells)).argsort(1)
        mask = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
        mask = mask.scatter_(1, order[:, : self.count], True).view(-1, *self.cells)
        return (
            mask.repeat_interleave(self.repeat, 1).repeat_interleave(self.repeat, 2)
            if self.repeat > 1
            else mask
        )


# --- parts ----------------------------------------------------------------------------------------


def crop_maps(
    maps: Tensor, num_parts: int, boxes: Tensor, flip: Tensor, picture: Pair, grid: Pair
) -> Tensor:
    """The part of each patch of views, uint8 [B, gh, gw], from maps uint8 [B, any size] that cover
    the pictures.

    The most frequent of 4 x 4 points in a patch, as by `transforms.crop_map` and `majority`.
    """
    rows = _points(boxes[:, 0], boxes[:, 2], picture[0], grid[0], maps.shape[1])
    columns = _points(boxes[:, 1], boxes[:, 3], picture[1], grid[1], maps.shape[2])
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    image = torch.arange(len(maps), device=maps.device).view(-1, 1, 1)
    points = maps[image, rows.unsqueeze(2), columns.unsqueeze(1)]
    shape = -1, grid[0], POINTS_PER_SIDE, grid[1], POINTS_PER_SIDE
    votes = points.view(shape).transpose(2, 3).flatten(3).long()  # [B, gh, gw, 16]
    return (
        (votes.unsqueeze(-1) == torch.arange(num_parts, device=maps.device))
        .sum(3)
        .argmax(-1)
        .to(torch.uint8)
    )


def _points(start: Tensor, length: Tensor, picture: int, patches: int, cells: int) -> Tensor:
    """Cells of the map, along one axis, at equally spaced points of the crops: int64 [B, 4 *
    patches]."""
    share = torch.arange(patches * POINTS_PER_SIDE, device=start.device, dtype=torch.float32) + 0.5
    places = start[:, None] + share / (patches * POINTS_PER_SIDE) * length[:, None]
    return (places / picture * cells).long().clamp_(max=cells - 1)


def color_place_parts(
    images: Tensor, grid: Pair, num_parts: int, place_weight: float = 0.5
) -> Tensor:
    """Parts of images uint8 [N, 3, H, W] by k-means on each one's own cells: uint8 [N, *grid].

    A cell is its mean color and its place; no network has a hand in it.
    """
    rows, columns = torch.meshgrid(
        *(torch.linspace(-1, 1, side, device=images.device) for side in grid), indexing="ij"
    )
    place = place_weight * torch.stack((rows, columns), -1).flatten(0, 1)
    parts = []
    for some in images.split(MAPS_AT_ONCE):
        colors = F.adaptive_avg_pool2d(some.float() / 127.5 - 1, grid).flatten(2).transpose(1, 2)
        # the constant lets colors keep their brightness when `kmeans_maps` normalizes them
        cells = torch.cat(
            (colors, place.expand(len(some), -1, -1), torch.ones_like(colors[..., :1])), -1
        )
        soft = kmeans_maps(TeacherFeatures(cells[:, 0], cells, cells[..., 0]), grid, num_parts)
        parts.append(hard_maps(soft, clean=False))
    return torch.cat(parts)


# --- batches --------------------------------------------------------------------------------------


class DeviceLoader:
    """What a method reads, made on the device of `images`: `loader.batch(step)` is batch number
    `step` of the run.

    It is what `Normalize` makes of a batch of `build_pretrain_transform`'s samples: "image" and
    "image_strong" float32 [B, 3, h, w], normalized; "mask" and "target_mask" bool [B, gh, gw], with
    their counts on the host; "noise" float32 [B, noise_size]; "part_ids" uint8 [B, gh, gw]; and
    "target_ids" int64 [B, gh * gw], the visual tokens of "image". An epoch is `steps_per_epoch`
    batches, a permutation of the images without what is left over.

    Args:
        images: uint8 [N, 3, H, W].
        size, grid: (height, width) of views, and how many patches they have along each side.
        masks: the generators of "mask" and "target_mask", where the method reads these.
        part_maps: uint8 [N, any size], parts of the whole images.
        words: a tokenizer of normalized images [B, 3, h, w].

    Raises:
        ValueError: a view or an interpolation that is not made here, or fewer images than a batch.
    """

    def __init__(
        self,
        images: Tensor,
        views: tuple[str, ...],
        *,
        batch_size: int,
        size: Pair,
        grid: Pair,
        seed: int,
        mean_std: tuple[tuple[float, ...], tuple[float, ...]],
        interpolation: str = "bicubic",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        color_jitter: float = 0.0,
        noise_size: int = 0,
        masks: Mapping[str, MaskGenerator] | None = None,
        part_maps: Tensor | None = None,
        words: Callable[[Tensor], Tensor] | None = None,
    ):
        if unknown := set(views) - set(VIEWS):
            raise ValueError(
                f"view '{min(unknown)}' is not made on the device; it makes {', '.join(VIEWS)}"
            )
        if interpolation not in TORCH_FILTERS:
            raise ValueError(
                f"--train_interpolation {interpolation} is not made on the device; "
                "use bicubic or bilinear"
            )
        if len(images) < batch_size:
            raise ValueError(
                f"{len(images)} images do not fill a batch of {batch_size}; "
                "use a smaller --batch_size"
            )
        assert "part_ids" not in views or part_maps is not None, "parts are looked up in maps"
        assert "target_ids" not in views or words is not None, "visual tokens need a tokenizer"
        self.images = images
        self.views = views
        self.batch_size = batch_size
        self.size = size
        self.grid = grid
        self.seed = seed

        # how an image becomes its views
        self.crop_scale = crop_scale
        self.interpolation = interpolation
        self.color_jitter = color_jitter
        self.normalize = Normalize(mean_std, images.device)

        # what comes with the views
        self.noise_size = noise_size
        self.words = words
        self.part_maps = part_maps
        self.num_parts = 0 if part_maps is None else int(part_maps.max()) + 1
        self.masks = {
            name: DeviceMasks(make, seed, images.device) for name, make in (masks or {}).items()
        }
        assert self.masks.keys() == {"mask", "target_mask"} & set(views), (
            "masked views need mask generators"
        )
        self.steps_per_epoch = len(images) // batch_size
        self.generator = torch.Generator(images.device)

        # the shuffled order is kept until the epoch changes
        self.epoch = -1
        self.order = images.new_empty(0)

    def batch(self, step: int) -> dict[str, Tensor | int | tuple[int, int]]:
        """Batch number `step`, from 0, a function of (seed, step)."""
        # one stream for choices made once for the whole batch, one for those of each image
        chosen = self.chosen(step)
        rng = np.random.default_rng((self.seed, step, 1))
        draw = self.drawing(int(rng.integers(2**62)))
        picture = tuple(self.images.shape[2:])

        # the crop that the network sees, and its distorted copy
        boxes = random_boxes(draw, self.batch_size, picture, self.crop_scale)
        flip = draw(self.batch_size) < 0.5
        images = self.images[chosen].float()
        if self.color_jitter:
            images = jittered(images, self.color_jitter, draw, rng.permutation(3))
        crops = resample(images, boxes, self.size, self.interpolation, flip)
        batch = {"image": self.normalized(crops)}
        if "image_strong" in self.views:
            strong = strong_view(crops, draw, rng.permutation(len(JITTER_RANGES)))
            batch["image_strong"] = self.normalized(strong.round())

        # masks and what else belongs to the crop
        for name, make in self.masks.items():
            batch |= {name: make(draw, self.batch_size), f"{name}_counts": make.counts}
        if "mask" in self.masks:
            batch["max_masked"] = self.masks["mask"].counts[1]
        if "noise" in self.views:
            batch["noise"] = draw(self.batch_size, self.noise_size)
        if "part_ids" in self.views:
            batch["part_ids"] = crop_maps(
                self.part_maps[chosen], self.num_parts, boxes, flip, picture, self.grid
            )
        if "target_ids" in self.views:
            batch["target_ids"] = self.words(batch["image"]).flatten(1)
        return batch

    def normalized(self, images: Tensor) -> Tensor:
        """What networks see of images from 0 to 255."""
        return self.normalize.normalized(images.div(255))

    def chosen(self, step: int) -> Tensor:
        """The images of batch number `step`, int64 [B]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            order = np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.images))
            self.epoch, self.order = epoch, torch.from_numpy(order).to(self.images.device)
        return self.order[place * self.batch_size : (place + 1) * self.batch_size]

    def drawing(self, seed: int) -> Draws:
        """Uniform draws on the device from a generator of this seed."""
        self.generator.manual_seed(seed)
        device = self.images.device
        return lambda *shape: torch.rand(shape, generator=self.generator, device=device)
