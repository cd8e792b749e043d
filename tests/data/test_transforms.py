"""Views: decoding like Pillow's, the fast pipeline against the reference, the published draws,
fine-tuning."""

import argparse
import io
import random

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms import InterpolationMode as Mode

from masking_generator import build_mask_generator
from unimim.data.color import (
    JITTER_RANGES,
    REFERENCE_JITTER,
    ColorDraws,
    draw_color,
    fast_color,
    reference_color,
)
from unimim.data.crops import INTERPOLATIONS, PILLOW_FILTERS, draw_crop
from unimim.data.jpeg import (
    CHROMA_ROWS,
    BrokenImageError,
    cuttable_height,
    decode,
    decode_pillow,
    open_picture,
)
from unimim.data.shapes import background
from unimim.data.views import (
    PIPELINES,
    build_finetune_transform,
    build_pretrain_transform,
    draw_view,
)
from unimim.sizes import to_pair

NO_COLOR = ColorDraws(jitter=(), gray=False, blur_radius=None, solarize=False)


def photo(seed, height=375, width=500):
    """A picture with smooth and sharp parts, and black and white clipped ones."""
    rng = np.random.RandomState(seed)
    levels = (
        background(rng, height, width) * 2 - 128 + rng.randint(-20, 21, size=(height, width, 1))
    )
    return np.clip(levels, 0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(seed, height=375, width=500):
    return encode(Image.fromarray(photo(seed, height, width)), quality=90)


def levels_apart(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


# --- decoding -------------------------------------------------------------------------------------

PICTURE = Image.fromarray(photo(1, 40, 60))
ENCODED = {
    "jpeg 4:2:0": encode(PICTURE),
    "jpeg 4:4:4": encode(PICTURE, subsampling=0),
    "progressive jpeg": encode(PICTURE, progressive=True),
    "gray jpeg": encode(PICTURE.convert("L")),
    "cmyk jpeg": encode(PICTURE.convert("CMYK")),
    "png": encode(PICTURE, "PNG"),
    "gray png": encode(PICTURE.convert("L"), "PNG"),
    "palette png": encode(PICTURE.quantize(16), "PNG"),
    "png with alpha": encode(PICTURE.convert("RGBA"), "PNG"),
    "bilevel png": encode(PICTURE.convert("1"), "PNG"),
    "bmp": encode(PICTURE, "BMP"),
    "webp": encode(PICTURE, "WEBP"),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_decode_equals_pillow(kind):
    expected = np.asarray(Image.open(io.BytesIO(ENCODED[kind])).convert("RGB"))
    for picture in (decode(ENCODED[kind]), np.asarray(decode_pillow(ENCODED[kind]))):
        assert picture.shape == (40, 60, 3) and picture.dtype == np.uint8
        assert (picture == expected).all()


COLORS = np.random.default_rng(0).integers(
    0, 256, (67, 45, 3), dtype=np.uint8
)  # nothing in common from row to row
SEQUENTIAL = {
    **{
        name: simplejpeg.encode_jpeg(COLORS, colorsubsampling=name)
        for name in ("444", "422", "420", "440", "411")
    },
    "gray": encode(Image.fromarray(COLORS).convert("L")),
    "restart markers": encode(Image.fromarray(COLORS), restart_marker_rows=1),
    "a few bytes after the end": simplejpeg.encode_jpeg(COLORS) + bytes(20),
    "an end inside, of a thumbnail": encode(
        Image.fromarray(COLORS), comment=b"\xff\xd9\xff\xc2 thumbnail"
    ),
    "filling before a segment": simplejpeg.encode_jpeg(COLORS).replace(
        b"\xff\xc0", b"\xff\xff\xff\xc0", 1
    ),
}


@pytest.mark.parametrize("kind", SEQUENTIAL)
def test_the_first_rows_of_a_jpeg_are_exact_without_those_below(kind):
    raw, whole = SEQUENTIAL[kind], decode(SEQUENTIAL[kind])
    size, decode_rows = open_picture(raw)
    assert size == (67, 45)
    for rows in range(1, 68):
        top = decode_rows(rows)
        assert rows <= len(top) <= rows + CHROMA_ROWS and (top[:rows] == whole[:rows]).all()


@pytest.mark.parametrize("kind", ENCODED)
def test_an_image_that_is_opened_first_is_the_same(kind):
    size, decode_rows = open_picture(ENCODED[kind])
    assert size == (40, 60)
    assert all(
        (decode_rows(rows)[:rows] == decode(ENCODED[kind])[:rows]).all() for rows in (1, 20, 40)
    )


def test_only_whole_sequential_jpegs_are_decoded_in_part():
    not_whole = [
        SEQUENTIAL["420"][:-400],
        SEQUENTIAL["420"] + bytes(200),
        b"\xff\xd8\xff\xd9",
        COLORS.tobytes(),
    ]
    for raw in (ENCODED["progressive jpeg"], ENCODED["cmyk jpeg"], ENCODED["png"], *not_whole):
        assert cuttable_height(raw) is None
    assert all(cuttable_height(raw) for raw in SEQUENTIAL.values())


def test_a_truncated_jpeg_is_broken_also_where_the_crop_needs_none_of_what_is_lost():
    """Whether a file counts as broken must not depend on the draws."""
    for lost in (3, 100, 1000):
        with pytest.raises(BrokenImageError):
            open_picture(SEQUENTIAL["420"][:-lost])


def test_damage_within_a_jpeg_is_forgiven_as_by_pillow():
    raw = bytearray(SEQUENTIAL["420"])
    raw[-500:-450] = bytes(50)
    expected = np.asarray(decode_pillow(bytes(raw)))
    for rows in (40, 67):
        assert (open_picture(bytes(raw))[1](rows)[:rows] == expected[:rows]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_keeps_its_levels(kind):
    """Pillow's own conversion clips at 255, which turns such files white."""
    levels = np.linspace(0, 65535, 40 * 60).round().reshape(40, 60).astype(np.uint16)
    raw = encode(Image.fromarray(levels), kind)
    expected = np.repeat(np.round(levels / 257)[..., None], 3, axis=2)
    for picture in (decode(raw), np.asarray(decode_pillow(raw))):
        assert picture.dtype == np.uint8 and (picture == expected).all()


def test_32_bit_gray_is_refused_unless_it_fits_into_8_bits():
    levels = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert (decode(encode(Image.fromarray(levels), "TIFF"))[..., 0] == levels).all()
    for unknown in (levels * 1000, levels - 1, levels.astype(np.float32)):
        with pytest.raises(BrokenImageError, match=r"mode [IF].*have no known range; convert it"):
            decode(encode(Image.fromarray(unknown), "TIFF"))


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encode(PICTURE, exif=exif)).shape == (40, 60, 3)


@pytest.mark.parametrize(
    "raw", [b"", b"no image at all", ENCODED["jpeg 4:2:0"][:600], ENCODED["png"][:600], b"\xff\xd8"]
)
def test_broken_bytes_are_reported_as_such(raw):
    for decoder in (decode, decode_pillow):
        with pytest.raises(BrokenImageError):
            decoder(raw)


# --- draws ----------------------------------------------------------------------------------------


def test_random_parameters_have_the_published_distribution():
    rng = np.random.default_rng(0)
    found = [draw_view(rng, (400, 400), (0.08, 1.0), "bicubic", strong=True) for _ in range(4000)]
    areas = np.array([draws.box[2] * draws.box[3] / 400**2 for draws in found])
    aspects = np.array([draws.box[3] / draws.box[2] for draws in found])
    assert areas.min() > 0.075 and areas.max() <= 1
    assert aspects.min() > 0.74 and aspects.max() < 1.36
    assert abs(np.median(np.log(aspects))) < 0.02
    assert (
        abs((areas < 0.31).mean() - 0.27) < 0.05
    )  # a quarter of (0.08, 1), a little more as wide ones do not fit
    for name, share, expected in (
        ("flip", np.mean([draws.flip for draws in found]), 0.5),
        ("jitter", np.mean([len(draws.color.jitter) == 4 for draws in found]), 0.8),
        ("gray", np.mean([draws.color.gray for draws in found]), 0.2),
        ("blur", np.mean([draws.color.blur_radius is not None for draws in found]), 0.1),
        ("solarize", np.mean([draws.color.solarize for draws in found]), 0.2),
    ):
        assert abs(share - expected) < 0.03, name


def test_jitter_steps_come_in_every_order_with_factors_in_range():
    rng = np.random.default_rng(0)
    steps = [draws.jitter for draws in (draw_color(rng) for _ in range(1500)) if draws.jitter]
    assert len({tuple(name for name, _ in jitter) for jitter in steps}) == 24
    for name, (low, high) in JITTER_RANGES.items():
        factors = [dict(jitter)[name] for jitter in steps]
        assert (
            low <= min(factors) < low + 0.02 * (high - low)
            and high - 0.02 * (high - low) < max(factors) <= high
        )


@pytest.mark.parametrize(
    "size, box",
    [((10, 1000), (0, 493, 10, 13)), ((1000, 9), (494, 0, 12, 9)), ((1, 1), (0, 0, 1, 1))],
)
def test_crop_of_a_strip_is_central_and_clipped_to_the_aspect_range(size, box):
    assert draw_crop(np.random.default_rng(0), size, (0.9, 1.0)) == box


def test_boxes_stay_inside_and_reach_the_edges():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(rng, (30, 40), (0.08, 1.0)) for _ in range(2000)])
    assert boxes[:, :2].min() == 0
    assert (boxes[:, 0] + boxes[:, 2]).max() == 30 and (boxes[:, 1] + boxes[:, 3]).max() == 40


# --- the two pipelines ----------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [64, (48, 112)])
def test_weak_views_agree_within_two_levels(interpolation, size):
    pipelines = [
        build_pretrain_transform(
            ("image",), input_size=size, interpolation=interpolation, pipeline=pipeline
        )
        for pipeline in PIPELINES
    ]
    means = []
    for seed in range(12):
        raw = jpeg(seed, height=150 + 40 * (seed % 4), width=230)
        fast, reference = (
            pipeline(raw, np.random.default_rng(seed))["image"] for pipeline in pipelines
        )
        assert (
            fast.dtype == torch.uint8 and fast.shape == (3, *to_pair(size)) and fast.is_contiguous()
        )
        difference = levels_apart(fast, reference)
        assert difference.max() <= 2
        means.append(difference.mean())
    assert np.mean(means) < 0.1


def test_weak_views_agree_at_full_size():
    pipelines = [
        build_pretrain_transform(("image",), input_size=224, pipeline=p) for p in PIPELINES
    ]
    for seed in range(10):
        raw = jpeg(seed)
        fast, reference = (
            pipeline(raw, np.random.default_rng(seed))["image"] for pipeline in pipelines
        )
        assert levels_apart(fast, reference).max() <= 2


@pytest.mark.parametrize(
    "change, most",
    [
        *[({"jitter": (("brightness", factor),)}, 1) for factor in (0.6, 0.97, 1.4)],
        *[({"jitter": (("contrast", factor),)}, 1) for factor in (0.6, 1.4)],
        *[({"jitter": (("saturation", factor),)}, 1) for factor in (0.8, 1.2)],
        *[({"jitter": (("hue", shift),)}, 1) for shift in (-0.1, -0.003, 0.0, 0.05, 0.1)],
        ({"gray": True}, 0),
        *[({"blur_radius": radius}, 3) for radius in (0.12, 0.9, 2.0)],
        ({"solarize": True}, 0),
    ],
)
def test_color_operations_agree_with_pillow(change, most):
    draws = ColorDraws(**(vars(NO_COLOR) | change))
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 256, (120, 130, 3), dtype=np.uint8)
    for picture in (photo(3, 90, 120), anything):
        before = np.ascontiguousarray(picture.transpose(2, 0, 1))
        fast = fast_color(before.copy(), draws)
        expected = np.asarray(reference_color(Image.fromarray(picture), draws)).transpose(2, 0, 1)
        assert levels_apart(fast, expected).max() <= most
        if change not in ({"jitter": (("hue", 0.0),)}, {"blur_radius": 0.12}):
            assert levels_apart(fast, before).mean() > 0.3  # it does something


def test_strong_views_agree_on_average():
    generator = build_mask_generator("block", input_size=96, patch_size=16, mask_ratio=0.75)
    views = ("image", "image_strong", "mask")
    pipelines = [
        build_pretrain_transform(views, input_size=96, pipeline=pipeline, mask_generator=generator)
        for pipeline in PIPELINES
    ]
    means = []
    for seed in range(20):
        fast, reference = (
            pipeline(jpeg(seed, 150, 200), np.random.default_rng(seed)) for pipeline in pipelines
        )
        assert list(fast) == list(reference) == list(views)
        assert (fast["mask"] == reference["mask"]).all() and fast["mask"].dtype == torch.bool
        means.append(levels_apart(fast["image_strong"], reference["image_strong"]).mean())
    assert max(means) < 1 and np.mean(means) < 0.3


def test_both_views_are_the_same_crop():
    transform = build_pretrain_transform(("image", "image_strong"), input_size=64)
    picture, untouched = photo(0, 90, 120), 0
    for seed in range(60):
        draws = draw_view(
            np.random.default_rng(seed), (90, 120), (0.08, 1.0), "bicubic", strong=True
        )
        sample = transform(picture, np.random.default_rng(seed))
        if draws.color == NO_COLOR:
            untouched += 1
            assert torch.equal(sample["image"], sample["image_strong"])
    assert untouched >= 3


def test_the_weak_view_does_not_depend_on_the_other_views():
    picture = photo(0, 90, 120)
    generator = build_mask_generator("random", input_size=64, patch_size=16, mask_ratio=0.5)
    alone = build_pretrain_transform(("image",), input_size=64)
    full = build_pretrain_transform(
        ("image", "image_strong", "mask"), input_size=64, mask_generator=generator
    )
    for seed in range(5):
        rngs = np.random.default_rng(seed), np.random.default_rng(seed)
        assert torch.equal(alone(picture, rngs[0])["image"], full(picture, rngs[1])["image"])


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_second_image_is_the_same_crop_in_another_size(pipeline):
    """Both sizes are those of Pillow after jitter, flip and crop of the whole picture, in BEiT's
    order."""
    transform = build_pretrain_transform(
        ("image", "image_second"),
        input_size=64,
        second_size=(32, 32),
        color_jitter=0.4,
        pipeline=pipeline,
    )
    picture = photo(0, 90, 120)
    orders = set()
    for seed in range(12):
        draws = draw_view(
            np.random.default_rng(seed), (90, 120), (0.08, 1.0), "bicubic", strong=False, jitter=0.4
        )
        orders.add(tuple(name for name, _ in draws.jitter))
        assert all(0.6 <= factor <= 1.4 for _, factor in draws.jitter) and len(draws.jitter) == 3
        sample = transform(picture, np.random.default_rng(seed))
        whole = Image.fromarray(picture)
        for name, factor in draws.jitter:
            whole = REFERENCE_JITTER[name](whole, factor)
        if draws.flip:
            whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left, height, width = draws.box
        crop = whole.crop((left, top, left + width, top + height))
        for name, side, resample in (("image", 64, "bicubic"), ("image_second", 32, "lanczos")):
            expected = np.asarray(crop.resize((side, side), PILLOW_FILTERS[resample])).transpose(
                2, 0, 1
            )
            assert sample[name].shape == (3, side, side) and sample[name].dtype == torch.uint8
            apart = levels_apart(sample[name], expected)
            assert apart.mean() < 0.5 and apart.max() <= (0 if pipeline == "reference" else 4)
    assert len(orders) > 2


def test_jpegs_are_jittered_whole():
    """Contrast is about the mean of the whole picture: rows below the crop count."""
    views = [
        build_pretrain_transform(("image",), input_size=64, color_jitter=0.4, pipeline=pipeline)
        for pipeline in PIPELINES
    ]
    for seed in range(8):
        fast, reference = (
            view(jpeg(seed, 150, 200), np.random.default_rng(seed))["image"] for view in views
        )
        assert levels_apart(fast, reference).mean() < 1


def test_views_without_jitter_are_drawn_as_before():
    plain = draw_view(np.random.default_rng(0), (90, 120), (0.08, 1.0), "bicubic", strong=True)
    also = draw_view(
        np.random.default_rng(0), (90, 120), (0.08, 1.0), "bicubic", strong=True, second="bilinear"
    )
    assert (plain.flip, plain.box, plain.color, plain.jitter) == (
        also.flip,
        also.box,
        also.color,
        (),
    )


def test_two_masks_are_drawn_one_after_the_other():
    first, second = (
        build_mask_generator("random", input_size=64, patch_size=16, mask_ratio=ratio)
        for ratio in (0.5, 0.25)
    )
    views = ("image", "mask", "target_mask")
    both = build_pretrain_transform(
        views, input_size=64, mask_generator=first, target_mask_generator=second
    )
    alone = build_pretrain_transform(views[:2], input_size=64, mask_generator=first)
    picture, overlaps = photo(0, 90, 120), 0
    for seed in range(10):
        sample = both(picture, np.random.default_rng(seed))
        assert (int(sample["mask"].sum()), int(sample["target_mask"].sum())) == (8, 4)
        assert torch.equal(sample["mask"], alone(picture, np.random.default_rng(seed))["mask"])
        overlaps += int((sample["mask"] & sample["target_mask"]).sum())
    assert 0 < overlaps < 40


def test_random_interpolation_uses_both_filters():
    rng = np.random.default_rng(0)
    drawn = {
        draw_view(rng, (50, 50), (0.08, 1.0), "random", strong=False).interpolation
        for _ in range(30)
    }
    assert drawn == {"bilinear", "bicubic"}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"interpolation": "cubic"},
            "--train_interpolation is 'cubic'; it must be one of bicubic, bilinear",
        ),
        ({"second_interpolation": "cubic"}, "--second_interpolation is 'cubic'"),
        ({"color_jitter": -0.1}, "--color_jitter is -0.1; it must lie between 0 and 1"),
        ({"pipeline": "slow"}, "--data_pipeline is 'slow'; it must be one of fast, reference"),
    ],
)
def test_unknown_words_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_pretrain_transform(("image",), input_size=32, **options)


# --- fine-tuning ----------------------------------------------------------------------------------


def arguments(**changes):
    values = {
        "input_size": 64,
        "aa": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "train_interpolation": "bicubic",
        "crop_pct": None,
        "imagenet_default_mean_and_std": True,
    }
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize("changes", [{}, {"aa": ""}, {"input_size": 32}, {"input_size": (48, 64)}])
def test_training_augmentation_follows_from_its_generator_alone(changes):
    args = arguments(**changes)
    transform, raw = build_finetune_transform(args, train=True), jpeg(0, 100, 140)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    views = [transform(raw, np.random.default_rng(seed))["image"] for seed in (1, 1, 2, 3)]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all() and torch.equal(
        torch.get_rng_state(), states[2]
    )
    assert views[0].dtype == torch.uint8 and views[0].shape == (3, *to_pair(args.input_size))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2]) and not torch.equal(views[2], views[3])


def test_augmentation_does_not_depend_on_global_generators():
    transform, raw = build_finetune_transform(arguments(), train=True), jpeg(0, 100, 140)
    views = []
    for seed in (0, 1):
        random.seed(seed)
        torch.manual_seed(seed)
        views.append(transform(raw, np.random.default_rng(7))["image"])
    assert torch.equal(*views)


def test_small_images_are_shifted_by_at_most_four_pixels():
    picture = photo(0, 32, 32)
    transform = build_finetune_transform(
        arguments(input_size=32, aa="", color_jitter=0.0), train=True
    )
    padded = np.pad(picture, ((4, 4), (4, 4), (0, 0)))
    windows = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    windows += [window[:, ::-1] for window in windows]
    for seed in range(10):
        view = transform(picture, np.random.default_rng(seed))["image"].permute(1, 2, 0).numpy()
        assert any((view == window).all() for window in windows)


@pytest.mark.parametrize(
    "size, crop_pct, resized", [(64, None, 73), (384, None, 384), (64, 1.0, 64), (48, 0.9, 53)]
)
def test_evaluation_takes_the_published_centre(size, crop_pct, resized):
    transform = build_finetune_transform(arguments(input_size=size, crop_pct=crop_pct), train=False)
    expected = Compose([Resize(resized, Mode.BICUBIC), CenterCrop(size)])
    for shape in ((100, 141), (141, 100), (90, 90)):
        picture = photo(0, *shape)
        view = transform(picture, np.random.default_rng(0))["image"].permute(1, 2, 0).numpy()
        assert (view == np.asarray(expected(Image.fromarray(picture)))).all()


def test_images_may_be_squeezed_to_the_crops_aspect_ratio():
    args = arguments(input_size=224, crop_pct=0.95, squash=True)
    expected = Compose([Resize((235, 235), Mode.BICUBIC), CenterCrop(224)])
    picture = photo(0, 260, 400)
    view = build_finetune_transform(args, train=False)(picture, np.random.default_rng(0))["image"]
    assert (view.permute(1, 2, 0).numpy() == np.asarray(expected(Image.fromarray(picture)))).all()


def test_evaluation_of_small_and_of_oblong_images():
    picture = photo(0, 32, 32)
    small = build_finetune_transform(arguments(input_size=32), train=False)
    assert (
        small(picture, np.random.default_rng(0))["image"].permute(1, 2, 0).numpy() == picture
    ).all()
    assert small(photo(0, 50, 40), np.random.default_rng(0))["image"].shape == (3, 32, 32)
    oblong = build_finetune_transform(arguments(input_size=(48, 96)), train=False)
    assert oblong(photo(0, 90, 100), np.random.default_rng(0))["image"].shape == (3, 48, 96)
