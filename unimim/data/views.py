"""Turn encoded images into the views that a method or a classifier reads."""

import argparse
import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import RandomCrop

from masking_generator import MaskGenerator
from unimim.data.channels import (
    center_view,
    check_channel_views,
    draw_channel_view,
    kept_channels,
)
from unimim.data.color import (
    draw_color,
    draw_jitter,
    fast_color,
    fast_jitter,
    reference_color,
    reference_jitter,
)
from unimim.data.crops import (
    INTERPOLATIONS,
    TORCH_FILTERS,
    ViewDraws,
    crop_map,
    draw_clipped_crop,
    draw_crop,
    draw_short_side_crop,
    fast_crop,
    majority,
    mean_score,
    reference_crop,
)
from unimim.data.jpeg import (
    RawImage,
    check_pixels,
    decode,
    decode_pillow,
    open_picture,
    usual_jpeg_size,
)
from unimim.sizes import Pair, to_pair

cv2.setNumThreads(0)  # the loader's workers are the parallelism

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
MEAN_STD: dict[str, MeanStd] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue in gray, as in Pillow
PIPELINES = ("fast", "reference")
# images up to this size are not resized for evaluation and not cropped by area for training
SMALL_IMAGE = 32
Sample = dict[str, torch.Tensor]


def image_mean_std(args: argparse.Namespace) -> MeanStd:
    """Return mean and std of the channels that the model sees: --mean and --std, else those that
    --imagenet_default_mean_and_std chooses; of gray images one number each.

    Raises:
        ValueError: --mean or --std has another number of values, or is needed and missing.
    """
    kept = kept_channels(args)
    channels = getattr(args, "in_chans", None) or 3
    chosen = []
    default = MEAN_STD["imagenet" if args.imagenet_default_mean_and_std else "inception"]
    for name, value in zip(("mean", "std"), default, strict=True):
        given = tuple(getattr(args, name, None) or ())
        if not given and kept not in (None, 3) and args.imagenet_default_mean_and_std:
            raise ValueError(
                f"--in_chans {channels}: ImageNet's --{name} is that of RGB; give {channels} "
                "values, which scripts/tools/measure_mean_std.py measures"
            )
        given = given or (value if kept in (None, 3) else value[:1] * channels)
        if kept is None and channels == 1 and len(given) == 3:
            # of the gray images of a data set of colors
            given = (sum(weight * x for weight, x in zip(LUMINANCE, given, strict=True)),)
        if len(given) != channels:
            raise ValueError(f"--{name} has {len(given)} values, --in_chans is {channels}")
        chosen.append(given)
    return chosen[0], chosen[1]


def draw_view(
    rng: np.random.Generator,
    size: Pair,
    crop_scale: tuple[float, float],
    interpolation: str,
    strong: bool,
    crop: Callable[..., tuple[int, int, int, int]] | None = None,
    jitter: float = 0.0,
    second: str = "lanczos",
    hflip: float = 0.5,
) -> ViewDraws:
    """Draw the random parameters of an image's views: flip, crop, and colors if `strong`.

    `size` is the image's (height, width); `crop(rng, size, crop_scale)` draws the box and defaults
    to `draw_crop`; `jitter` is half the range of BEiT's jitter factors; `second` is the second
    view's interpolation, `hflip` the probability of a flip (docs/methods/conmim.md#views).
    """
    # The order of the draws is part of a run's reproducibility: do not change it.
    steps = draw_jitter(rng, jitter) if jitter else ()
    flip = bool(rng.random() < hflip)
    box = (crop or draw_crop)(rng, size, crop_scale)
    if interpolation == "random":
        interpolation = TORCH_FILTERS[rng.integers(2)]
    if second == "random":
        second = TORCH_FILTERS[rng.integers(2)]
    color = draw_color(rng) if strong else None
    return ViewDraws(flip, box, interpolation, color, steps, second)


PLAIN_VIEWS = ("image", "image_strong", "image_second", "mask", "target_mask", "noise")
MAP_VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "part_ids": majority,
    "part_scores": mean_score,
}


# --- pre-training ---------------------------------------------------------------------------------


class PretrainTransform:
    """Make the views of a pre-training method: `transform(raw, rng, maps)` -> dict with `views`.

    "image" (weak augmentation), "image_strong" and "image_second" (at `second_size`) show the same
    crop, uint8 [3, H, W]. "mask" and "target_mask" are bool; "noise" is `noise_size` uniform
    float32 numbers. "part_ids" (uint8) and "part_scores" (float32), both [rows, columns] of `grid`,
    come from the same crop and flip of `maps`, arrays of any size that cover the whole image.
    With `channels` an image is float32 [channels, H, W] (unimim/data/channels.py).
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
        hflip: float,
        channels: int | None = None,
    ):
        self.views = views
        self.size = size
        self.interpolation = interpolation
        if channels is not None:
            self.apply = functools.partial(_apply_channels, channels)
        else:
            self.apply = _apply_fast if pipeline == "fast" else _apply_reference
        self.masks = masks
        self.crop_scale = crop_scale
        self.grid = grid
        self.noise_size = noise_size
        self.color_jitter = color_jitter
        self.second_size = second_size if "image_second" in views else None
        self.second_interpolation = second_interpolation
        self.hflip = hflip

    def __call__(
        self,
        raw: RawImage,
        rng: np.random.Generator,
        maps: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> Sample:
        return self._sample(self.apply, raw, rng, maps)

    def leave_jpeg(
        self,
        raw: RawImage,
        rng: np.random.Generator,
        maps: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Return the same sample, of most JPEGs with "undecoded", an `UndecodedJpeg`, in place of
        the images."""
        return self._sample(_leave_jpeg, raw, rng, maps)

    def _sample(
        self,
        apply: Callable[..., "Views"],
        raw: RawImage,
        rng: np.random.Generator,
        maps: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        # The image's views.
        draw = functools.partial(
            draw_view,
            rng,
            crop_scale=self.crop_scale,
            interpolation=self.interpolation,
            strong="image_strong" in self.views,
            jitter=self.color_jitter,
            second=self.second_interpolation,
            hflip=self.hflip,
        )
        made = apply(raw, draw, self.size, self.second_size)
        sample = {}
        images = {"image": made.weak, "image_strong": made.strong, "image_second": made.second}
        for name, image in images.items():
            if image is not None:
                sample[name] = torch.from_numpy(image)
        if not sample:
            sample["undecoded"] = UndecodedJpeg(raw, made.image_size, made.params)

        # Masks and noise.
        for name, generate in self.masks.items():
            sample[name] = torch.from_numpy(generate(rng))
        if "noise" in self.views:
            sample["noise"] = torch.from_numpy(rng.random(self.noise_size, dtype=np.float32))

        # The maps, cropped like the image.
        for name, reduce in MAP_VIEWS.items():
            if name in self.views:
                points = crop_map(maps[name], made.params, made.image_size, self.grid)
                sample[name] = torch.from_numpy(reduce(points))
        return sample


class UndecodedJpeg(NamedTuple):
    """A JPEG that the device decodes: its bytes, its (height, width), and what its views are."""

    file: bytes
    size: Pair
    draws: ViewDraws


class Views(NamedTuple):
    """The image's size, the random parameters, and the views [3, H, W], None if not requested or
    left to the device."""

    image_size: Pair
    params: ViewDraws
    weak: np.ndarray | None
    strong: np.ndarray | None
    second: np.ndarray | None


def _apply_fast(
    raw: RawImage, draw: Callable[..., ViewDraws], size: Pair, second_size: Pair | None = None
) -> Views:
    """Make the views with OpenCV and torch, decoding only the rows that the crop needs."""
    image_size, decode_rows = open_picture(raw)
    params = draw(size=image_size)
    top, _, height, _ = params.box
    if params.jitter:  # contrast depends on the whole image
        planes = decode_rows(image_size[0])[: image_size[0]].transpose(2, 0, 1)
        planes = fast_jitter(np.ascontiguousarray(planes), params.jitter)
        image = np.ascontiguousarray(planes.transpose(1, 2, 0))
    else:
        image = decode_rows(top + height)
    weak = fast_crop(image, params, size)
    strong = None if params.color is None else fast_color(weak, params.color)
    second = None if second_size is None else fast_crop(image, params, second_size, params.second)
    return Views(image_size, params, weak, strong, second)


def _leave_jpeg(
    raw: RawImage, draw: Callable[..., ViewDraws], size: Pair, second_size: Pair | None = None
) -> Views:
    """Draw, but make no views of what every decoder takes; make those of other images."""
    image_size = usual_jpeg_size(raw)
    if image_size is None:
        return _apply_fast(raw, draw, size, second_size)
    check_pixels(*image_size)
    return Views(image_size, draw(size=image_size), None, None, None)


def _apply_reference(
    raw: RawImage, draw: Callable[..., ViewDraws], size: Pair, second_size: Pair | None = None
) -> Views:
    """Make the views with Pillow, in the order of the published code."""
    image = decode_pillow(raw)
    image_size = image.height, image.width
    params = draw(size=image_size)
    image = reference_jitter(image, params.jitter)
    weak = reference_crop(image, params, size)
    strong = second = None
    if params.color is not None:
        strong = _planes(reference_color(weak, params.color))
    if second_size is not None:
        second = _planes(reference_crop(image, params, second_size, params.second))
    return Views(image_size, params, _planes(weak), strong, second)


def _apply_channels(
    channels: int,
    raw: RawImage,
    draw: Callable[..., ViewDraws],
    size: Pair,
    second_size: Pair | None = None,
) -> Views:
    """Make the view of an image whose channels are kept."""
    assert second_size is None
    image_size, params, view = draw_channel_view(raw, draw, size, channels)
    return Views(image_size, params, view, None, None)


def _planes(image: Image.Image) -> np.ndarray:
    """Return the color planes [3, H, W] of a Pillow image."""
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
    hflip: float = 0.5,
    channels: int | None = None,
) -> PretrainTransform:
    """Build the transform that makes a method's `views`, see `PretrainTransform`.

    Raises:
        ValueError: an interpolation or pipeline is unknown, jitter or flip is out of range, or the
            views need colors and `channels` are kept.
    """
    _check_choice("--train_interpolation", interpolation, INTERPOLATIONS)
    _check_choice("--second_interpolation", second_interpolation, INTERPOLATIONS)
    _check_choice("--data_pipeline", pipeline, PIPELINES)
    if not 0 <= color_jitter <= 1:
        raise ValueError(f"--color_jitter is {color_jitter}; it must lie between 0 and 1")
    if not 0 <= hflip <= 1:
        raise ValueError(f"--hflip is {hflip}; it must lie between 0 and 1")
    if channels is not None:
        check_channel_views(views, interpolation, pipeline)
    assert "image" in views and set(views) <= {*PLAIN_VIEWS, *MAP_VIEWS}, views
    assert grid is not None or not MAP_VIEWS.keys() & set(views), "maps are cropped to a grid"
    assert "image_second" not in views or second_size is not None, "a second view needs a size"
    generators = {"mask": mask_generator, "target_mask": target_mask_generator}
    masks = {name: generate for name, generate in generators.items() if generate is not None}
    assert masks.keys() == {"mask", "target_mask"} & set(views), (
        "each masked view needs a mask generator, and no other does"
    )
    return PretrainTransform(
        views=tuple(views),
        size=to_pair(input_size),
        interpolation=interpolation,
        pipeline=pipeline,
        masks=masks,
        crop_scale=tuple(crop_scale),
        grid=grid,
        noise_size=noise_size,
        color_jitter=color_jitter,
        second_size=second_size,
        second_interpolation=second_interpolation,
        hflip=hflip,
        channels=channels,
    )


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{flag} is '{value}'; it must be one of {', '.join(choices)}")


# --- linear probing -------------------------------------------------------------------------------


PROBE_CROPS = ("area", "short_side")


class ProbeTransform:
    """Crop and flip, nothing else: `transform(raw, rng)` -> {"image": uint8 [3, H, W]}.

    `crop` "area" is `draw_clipped_crop`, "short_side" is `draw_short_side_crop`.
    """

    def __init__(
        self,
        input_size: int | Pair,
        interpolation: str = "bicubic",
        crop_scale: Sequence[float] = (0.08, 1),
        crop: str = "area",
        channels: int | None = None,
    ):
        _check_choice("--train_interpolation", interpolation, INTERPOLATIONS)
        _check_choice("--train_crop", crop, PROBE_CROPS)
        self.size = to_pair(input_size)
        self.interpolation = interpolation
        self.crop_scale = tuple(crop_scale)
        self.apply = _apply_fast
        if channels is not None:
            check_channel_views(("image",), interpolation, "fast")
            self.apply = functools.partial(_apply_channels, channels)
        short_side = functools.partial(draw_short_side_crop, target=self.size)
        self.crop = short_side if crop == "short_side" else draw_clipped_crop

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        draw = functools.partial(
            draw_view,
            rng,
            crop_scale=self.crop_scale,
            interpolation=self.interpolation,
            strong=False,
            crop=self.crop,
        )
        return {"image": torch.from_numpy(self.apply(raw, draw, self.size).weak)}


# --- fine-tuning ----------------------------------------------------------------------------------


class TrainTransform:
    """Apply timm's ImageNet training augmentation.

    Normalization and random erasing are left to the device.
    """

    def __init__(self, size: Pair, augment: Callable[[Image.Image], torch.Tensor]):
        self.size = size
        self.augment = augment

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        image = Image.fromarray(decode(raw))
        if max(self.size) <= SMALL_IMAGE:
            image = _exactly(image, self.size)
        with seeded_globals(rng):
            return {"image": self.augment(image)}


class EvalTransform:
    """Resize the image to cover `size` / `crop_pct` and crop its center to `size`.

    `crop_pct` defaults to 224 / 256, or 1 from 384 pixels on. If `size` is 32 or less there is no
    crop: images of another size are resized to it, whereas the published code leaves them, so that
    they cannot be stacked. `channels`: how many are kept, None for 8-bit RGB. `squash`: the image
    is resized to `size` / `crop_pct` whatever its aspect ratio.
    """

    def __init__(
        self,
        size: Pair,
        crop_pct: float | None,
        channels: int | None = None,
        *,
        squash: bool = False,
    ):
        self.size = size
        self.squash = squash
        self.channels = channels
        self.crop_pct = crop_pct or (224 / 256 if max(size) < 384 else 1.0)

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        small = max(self.size) <= SMALL_IMAGE
        if self.channels is not None:
            cover = None if small else self._resized
            return {"image": center_view(raw, self.size, cover, self.channels)}
        image = Image.fromarray(decode(raw))
        image = _exactly(image, self.size) if small else self._center_crop(image)
        return {"image": torch.from_numpy(_planes(image))}

    def _center_crop(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        image = _exactly(image, self._resized((image.height, image.width)))
        left = round((image.width - width) / 2)
        top = round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _resized(self, size: Pair) -> Pair:
        """Return the (height, width) to which an image of `size` is resized before the crop."""
        area = int(self.size[0] / self.crop_pct), int(self.size[1] / self.crop_pct)
        return area if self.squash else _cover(size, area)


def _cover(size: Pair, area: Pair) -> Pair:
    """Return the smallest (height, width) with the aspect ratio of `size` that covers `area`."""
    height, width = size
    if width * area[0] > height * area[1]:
        return area[0], int(area[0] * width / height)
    return int(area[1] * height / width), area[1]


def _exactly(image: Image.Image, size: Pair) -> Image.Image:
    """Return the image at `size` (height, width), resized if it has another."""
    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


@contextlib.contextmanager
def seeded_globals(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators of `random`, numpy and torch from `rng`; restore them on exit."""
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


def build_finetune_transform(
    args: argparse.Namespace, train: bool
) -> TrainTransform | EvalTransform | PretrainTransform:
    """Build the transform of classification: `transform(raw, rng)` -> {"image": uint8 [3, H, W]}.

    For training it reads `input_size`, `aa`, `color_jitter` (only used without `aa`),
    `train_interpolation` and `imagenet_default_mean_and_std` (the color that fills the border of
    shifted and rotated images); for evaluation `crop_pct`, `squash`, and `eval_input_size` if
    given, else `input_size`. Images whose channels are kept are cropped and flipped, and float32.
    """
    channels = kept_channels(args)
    if not train:
        size = getattr(args, "eval_input_size", None) or args.input_size
        squash = getattr(args, "squash", False)
        return EvalTransform(to_pair(size), args.crop_pct, channels, squash=squash)
    size = to_pair(args.input_size)
    if channels is not None:
        return build_pretrain_transform(
            ("image",),
            input_size=size,
            interpolation=args.train_interpolation,
            channels=channels,
        )
    _check_choice("--train_interpolation", args.train_interpolation, INTERPOLATIONS)
    mean, std = (values * (3 // len(values)) for values in image_mean_std(args))
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
