"""The views of an image that a method or a classifier asks for: from encoded bytes to tensors."""

import argparse
import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import RandomCrop

from masking_generator import MaskGenerator
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
from unimim.data.jpeg import RawImage, decode, decode_pillow, open_picture
from unimim.sizes import Pair, to_pair

cv2.setNumThreads(0)  # the loader's workers are the parallelism

MEAN_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
PIPELINES = ("fast", "reference")
SMALL_IMAGE = 32  # up to this size images are neither resized for evaluation nor cropped by area (spec 4.6, 4.7)
Sample = dict[str, torch.Tensor]


def image_mean_std(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and std by color that --imagenet_default_mean_and_std chooses."""
    return MEAN_STD["imagenet" if args.imagenet_default_mean_and_std else "inception"]


def draw_view(
    rng: np.random.Generator,
    size: Pair,
    crop_scale: tuple[float, float],
    interpolation: str,
    strong: bool,
    crop: Callable[..., tuple[int, int, int, int]] | None = None,
    jitter: float = 0.0,
    second: str = "lanczos",
) -> ViewDraws:
    """Draw the ConMIM view of a picture of `size` (height, width): flip, crop, and colors if
    `strong` (spec 2.1).

    `crop(rng, size, crop_scale)` draws the box; None: `draw_crop`. `jitter`: half the range of the
    factors.
    """
    steps = draw_jitter(rng, jitter) if jitter else ()
    flip = bool(rng.random() < 0.5)
    box = (crop or draw_crop)(rng, size, crop_scale)
    interpolation, second = (
        TORCH_FILTERS[rng.integers(2)] if name == "random" else name
        for name in (interpolation, second)
    )
    return ViewDraws(flip, box, interpolation, draw_color(rng) if strong else None, steps, second)


PLAIN_VIEWS = ("image", "image_strong", "image_second", "mask", "target_mask", "noise")
MAP_VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "part_ids": majority,
    "part_scores": mean_score,
}


# --- pre-training ---------------------------------------------------------------------------------


class PretrainTransform:
    """`transform(raw, rng, maps)` -> the keys in `views`.

    "image" (weak), "image_strong" and "image_second" (of `second_size`) of the same crop, "mask",
    "target_mask", "noise" (`noise_size` uniform float32 draws); of the same crop and flip of
    `maps`, arrays [any size] that cover the picture: "part_ids" uint8, "part_scores" float32, both
    [rows, columns] of `grid`.
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
    ):
        self.views, self.size, self.interpolation, self.crop_scale = (
            views,
            size,
            interpolation,
            crop_scale,
        )
        self.grid, self.noise_size = grid, noise_size
        self.color_jitter, self.second_interpolation = color_jitter, second_interpolation
        self.second_size = second_size if "image_second" in views else None
        self.apply = _apply_fast if pipeline == "fast" else _apply_reference
        self.masks = masks

    def __call__(
        self,
        raw: RawImage,
        rng: np.random.Generator,
        maps: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> Sample:
        draw = functools.partial(
            draw_view, rng, crop_scale=self.crop_scale, interpolation=self.interpolation,
            strong="image_strong" in self.views, jitter=self.color_jitter, second=self.second_interpolation,
        )  # fmt: skip
        found = self.apply(raw, draw, self.size, self.second_size)
        views = {"image": found.weak, "image_strong": found.strong, "image_second": found.second}
        sample = {
            name: torch.from_numpy(view) for name, view in views.items() if name in self.views
        }
        sample |= {name: torch.from_numpy(generate(rng)) for name, generate in self.masks.items()}
        if "noise" in self.views:
            sample["noise"] = torch.from_numpy(rng.random(self.noise_size, dtype=np.float32))
        for name, reduce in MAP_VIEWS.items():
            if name in self.views:
                sample[name] = torch.from_numpy(
                    reduce(crop_map(maps[name], found.draws, found.picture, self.grid))
                )
        return sample


class Views(NamedTuple):
    """The picture's size, what was drawn, and the views [3, H, W], None where not asked for."""

    picture: Pair
    draws: ViewDraws
    weak: np.ndarray
    strong: np.ndarray | None
    second: np.ndarray | None


def _apply_fast(
    raw: RawImage, draw: Callable[..., ViewDraws], size: Pair, second_size: Pair | None = None
) -> Views:
    whole, decode_rows = open_picture(raw)
    draws = draw(size=whole)
    top, _, height, _ = draws.box
    if draws.jitter:  # contrast depends on the whole picture
        planes = np.ascontiguousarray(decode_rows(whole[0])[: whole[0]].transpose(2, 0, 1))
        picture = np.ascontiguousarray(fast_jitter(planes, draws.jitter).transpose(1, 2, 0))
    else:
        picture = decode_rows(top + height)
    weak = fast_crop(picture, draws, size)
    strong = None if draws.color is None else fast_color(weak, draws.color)
    second = None if second_size is None else fast_crop(picture, draws, second_size, draws.second)
    return Views(whole, draws, weak, strong, second)


def _apply_reference(
    raw: RawImage, draw: Callable[..., ViewDraws], size: Pair, second_size: Pair | None = None
) -> Views:
    image = decode_pillow(raw)
    whole = image.height, image.width
    draws = draw(size=whole)
    image = reference_jitter(image, draws.jitter)
    weak = reference_crop(image, draws, size)
    strong = None if draws.color is None else _planes(reference_color(weak, draws.color))
    second = (
        None
        if second_size is None
        else _planes(reference_crop(image, draws, second_size, draws.second))
    )
    return Views(whole, draws, _planes(weak), strong, second)


def _planes(image: Image.Image) -> np.ndarray:
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
) -> PretrainTransform:
    """The transform that makes a method's `views` (see `PretrainTransform`) at `input_size`, cut
    into `grid` patches.

    Raises:
        ValueError: an interpolation or pipeline that does not exist, or a jitter that cannot be.
    """
    _check_choice("--train_interpolation", interpolation, INTERPOLATIONS)
    _check_choice("--second_interpolation", second_interpolation, INTERPOLATIONS)
    _check_choice("--data_pipeline", pipeline, PIPELINES)
    if not 0 <= color_jitter <= 1:
        raise ValueError(f"--color_jitter is {color_jitter}; it must lie between 0 and 1")
    assert "image" in views and set(views) <= {*PLAIN_VIEWS, *MAP_VIEWS}, views
    assert grid is not None or not MAP_VIEWS.keys() & set(views), "maps are cropped to a grid"
    assert "image_second" not in views or second_size is not None, "a second picture needs a size"
    generators = {"mask": mask_generator, "target_mask": target_mask_generator}
    masks = {name: generate for name, generate in generators.items() if generate is not None}
    assert masks.keys() == {"mask", "target_mask"} & set(views), (
        "masked views need mask generators, others have none"
    )
    return PretrainTransform(
        tuple(views), to_pair(input_size), interpolation, pipeline, masks, tuple(crop_scale), grid, noise_size,
        color_jitter, second_size, second_interpolation,
    )  # fmt: skip


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{flag} is '{value}'; it must be one of {', '.join(choices)}")


# --- linear probing -------------------------------------------------------------------------------


PROBE_CROPS = ("area", "short_side")


class ProbeTransform:
    """A crop and a flip, nothing else: `transform(raw, rng)` -> {"image": uint8 [3, H, W]}.

    `crop`: "area" is `draw_clipped_crop`, "short_side" is `draw_short_side_crop`.
    """

    def __init__(
        self,
        input_size: int | Pair,
        interpolation: str = "bicubic",
        crop_scale: Sequence[float] = (0.08, 1),
        crop: str = "area",
    ):
        _check_choice("--train_interpolation", interpolation, INTERPOLATIONS)
        _check_choice("--train_crop", crop, PROBE_CROPS)
        self.size, self.interpolation, self.crop_scale = (
            to_pair(input_size),
            interpolation,
            tuple(crop_scale),
        )
        short_side = functools.partial(draw_short_side_crop, target=self.size)
        self.crop = short_side if crop == "short_side" else draw_clipped_crop

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        draw = functools.partial(
            draw_view, rng, crop_scale=self.crop_scale, interpolation=self.interpolation, strong=False,
            crop=self.crop,
        )  # fmt: skip
        return {"image": torch.from_numpy(_apply_fast(raw, draw, self.size).weak)}


# --- fine-tuning ----------------------------------------------------------------------------------


class TrainTransform:
    """timm's ImageNet training augmentation, without normalization and erasing, which follow on the
    device."""

    def __init__(self, size: Pair, augment: Callable[[Image.Image], torch.Tensor]):
        self.size, self.augment = size, augment

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        image = Image.fromarray(decode(raw))
        if max(self.size) <= SMALL_IMAGE:
            image = _exactly(image, self.size)
        with seeded_globals(rng):
            return {"image": self.augment(image)}


class EvalTransform:
    """The center of the picture: resized to cover `size` / `crop_pct`, cut to `size`
    (specs/conmim.md 4.7).

    Up to 32 pixels there is no crop; pictures of another size than `size` are resized to it (a
    repair: upstream's batches could not be stacked).
    """

    def __init__(self, size: Pair, crop_pct: float | None):
        self.size = size
        self.crop_pct = crop_pct or (224 / 256 if max(size) < 384 else 1.0)

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        image = Image.fromarray(decode(raw))
        image = _exactly(image, self.size) if max(self.size) <= SMALL_IMAGE else self._centre(image)
        return {"image": torch.from_numpy(_planes(image))}

    def _centre(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        covered = _cover(
            (image.height, image.width), (int(height / self.crop_pct), int(width / self.crop_pct))
        )
        image = _exactly(image, covered)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _cover(size: Pair, area: Pair) -> Pair:
    """The smallest (height, width) with the aspect of `size` that covers `area`."""
    height, width = size
    if width * area[0] > height * area[1]:
        return area[0], int(area[0] * width / height)
    return int(area[1] * height / width), area[1]


def _exactly(image: Image.Image, size: Pair) -> Image.Image:
    height, width = size
    return (
        image
        if image.size == (width, height)
        else image.resize((width, height), Image.Resampling.BICUBIC)
    )


@contextlib.contextmanager
def seeded_globals(rng: np.random.Generator) -> Iterator[None]:
    """Inside, `random`, numpy's and torch's global generators follow from `rng`; afterwards they
    are as before."""
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
) -> TrainTransform | EvalTransform:
    """The transform of classification (specs/conmim.md 4.6, 4.7): `transform(raw, rng)` ->
    {"image": uint8 [3, H, W]}.

    Reads `input_size`, and for training `aa`, `color_jitter` (only used without `aa`),
    `train_interpolation`, `imagenet_default_mean_and_std` (the color that fills moved pictures);
    for evaluation `crop_pct` and, in place of `input_size`, `eval_input_size` where it is given.
    """
    if not train:
        return EvalTransform(
            to_pair(getattr(args, "eval_input_size", None) or args.input_size), args.crop_pct
        )
    size = to_pair(args.input_size)
    _check_choice("--train_interpolation", args.train_interpolation, INTERPOLATIONS)
    mean, std = image_mean_std(args)
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
