"""Views that are made on the device: what they share with those of the CPU's transform, image by
image."""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from masking_generator import build_mask_generator
from scripts.benchmarks.gpu_learns import PRETRAINED, Images, Job, Pretraining, Setting
from scripts.experiments.compare_methods import METHODS
from unimim.data.color import FAST_JITTER
from unimim.data.crops import ViewDraws, crop_map, fast_crop, majority
from unimim.data.device_loader import (
    DeviceLoader,
    DeviceMasks,
    color_place_parts,
    crop_maps,
    decoded,
    random_boxes,
    strong_view,
)
from unimim.data.pretraining import mask_generator
from unimim.data.sources import digits_source
from unimim.data.tensor_views import brightness, contrast, hue, resample, saturation
from unimim.data.views import MEAN_STD, build_pretrain_transform
from unimim.engine.state import Normalize, with_mask_counts
from unimim.tokenizer.clusters import kmeans_tokens

CPU = torch.device("cpu")


def draws(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(shape, generator=generator)


def pictures(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Smooth colors with some noise, uint8 [count, 3, height, width]."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 4, 4))).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth + torch.from_numpy(rng.normal(0, 20, smooth.shape))).clamp(0, 255).byte()


def make_loader(
    images: torch.Tensor, views: tuple[str, ...] = ("image",), **options
) -> DeviceLoader:
    plain = {
        "batch_size": 8,
        "size": (32, 32),
        "grid": (8, 8),
        "seed": 3,
        "mean_std": MEAN_STD["imagenet"],
    }
    return DeviceLoader(images, views, **plain | options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Setting, Images]:
    file = tmp_path_factory.mktemp("digits") / "images.pth"
    images = decoded(digits_source(train=True), (32, 32))[:64]
    torch.save({"train": images, "train_labels": torch.arange(64) % 10}, file)
    flags = "--input_size 32 --imagenet_default_mean_and_std --num_workers 0 --device cpu"
    flags += " --data_set digits"
    setting = Setting("cpu", "fp32", flags, file, batch_size=8)
    return setting, Images(setting)


@pytest.mark.parametrize("key", [*(key for key in PRETRAINED if key != "semmae"), "semmae_kmeans"])
def test_every_method_gets_what_the_cpu_would_give_it(key, digits):
    """Name, shapes, types, and the counts that come with masks."""
    setting, images = digits
    run = Pretraining(setting, images, Job(key, seed=0, epochs=1))
    args, method = run.args, run.method
    masks = {view: mask_generator(args, method, view) for view in ("mask", "target_mask")}
    transform = build_pretrain_transform(
        tuple(view for view in method.views if view != "target_ids"),
        input_size=method.image_size,
        grid=run.loader.grid,
        noise_size=method.noise_size,
        mask_generator=masks["mask"],
        target_mask_generator=masks["target_mask"],
        color_jitter=args.color_jitter,
    )
    maps = {"part_ids": np.zeros((16, 16), dtype=np.uint8)} if "part_ids" in method.views else {}
    pixels = images.pretrain.permute(0, 2, 3, 1).contiguous().numpy()
    samples = [
        transform(pixels[i], np.random.default_rng(i), maps) for i in range(setting.batch_size)
    ]
    expected = Normalize(MEAN_STD["imagenet"], CPU)(with_mask_counts(default_collate(samples)))
    found = run.loader.batch(0)
    if "target_ids" in method.views:
        words = found.pop("target_ids")
        assert words.dtype == torch.int64 and words.shape == (8, 64) and len(words.unique()) > 10
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        else:
            assert type(found[name]) is type(value), name
    for name in {"mask", "target_mask"} & found.keys():
        counts, (low, high) = found[name].flatten(1).sum(1), found[f"{name}_counts"]
        assert low <= counts.min() and counts.max() <= high
        if METHODS[key].pretrain.find("block") < 0:
            assert (low, high) == expected[f"{name}_counts"]


# --------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 48), (10, 90)])
def test_boxes_lie_within_the_image_and_have_the_areas_that_were_asked_for(height, width):
    boxes = random_boxes(draws(), 2000, (height, width), (0.2, 0.8))
    top, left, crop_h, crop_w = boxes.unbind(1)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all() and (left >= 0).all() and (crop_h > 0).all() and (crop_w > 0).all()
    assert (top + crop_h <= height).all() and (left + crop_w <= width).all()
    if (height, width) == (32, 32):
        share = crop_h * crop_w / (height * width)
        assert share.min() > 0.18 and share.max() < 0.83 and abs(share.mean() - 0.5) < 0.02
        assert top.max() > 10 and left.max() > 10 and (top == 0).any()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (12, 20)])
def test_a_batch_of_crops_is_the_crops_one_by_one(interpolation, size):
    images, flip = pictures(40), torch.arange(40) % 2 == 0
    boxes = random_boxes(draws(), 40, (32, 32), (0.08, 1.0))
    found = resample(images, boxes, size, interpolation, flip)
    for image, box, mirrored, ours in zip(
        images, boxes.int().tolist(), flip.tolist(), found, strict=True
    ):
        top, left, height, width = box
        left = 32 - left - width if mirrored else left  # those draws are of the mirrored picture
        one = ViewDraws(mirrored, (top, left, height, width), interpolation, None)
        expected = torch.from_numpy(
            fast_crop(image.permute(1, 2, 0).contiguous().numpy(), one, size)
        )
        assert (ours - expected.float()).abs().max() <= 2  # both round to 8 bits in between
        assert (ours - expected.float()).abs().mean() < 0.3


def test_what_lies_outside_a_box_has_no_part_in_it():
    images = pictures(1)
    box = torch.tensor([[4.0, 6.0, 10.0, 12.0]])
    other = 255 - images
    other[:, :, 4:14, 6:18] = images[:, :, 4:14, 6:18]
    assert torch.equal(resample(images, box, (32, 32)), resample(other, box, (32, 32)))


def test_maps_are_cropped_as_by_the_cpu():
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (20, 6, 9), dtype=np.uint8))
    boxes, flip = random_boxes(draws(), 20, (32, 40), (0.1, 1.0)), torch.arange(20) % 2 == 0
    found = crop_maps(maps, 5, boxes, flip, (32, 40), (8, 4))
    for number, (top, left, height, width) in enumerate(boxes.int().tolist()):
        left = 40 - left - width if flip[number] else left
        one = ViewDraws(bool(flip[number]), (top, left, height, width), "bicubic", None)
        points = crop_map(maps[number].numpy(), one, (32, 40), (8, 4))
        # of equally frequent parts both take the smallest
        assert np.array_equal(found[number].numpy(), majority(points))


# --------------------------------------------------------------------------------------------------
# Colors and masks


@pytest.mark.parametrize(
    ("change", "factor", "mean_error"),
    [
        (brightness, 0.7, 0.6),
        (contrast, 1.3, 0.6),
        (saturation, 0.8, 0.6),
        (hue, 0.07, 2.0),
        (hue, -0.1, 2.0),
    ],
)
def test_colors_are_changed_as_by_pillow(change, factor, mean_error):
    images = pictures(4)
    found = change(images.float(), torch.full((4, 1, 1, 1), factor))
    expected = np.stack([FAST_JITTER[change.__name__](image.numpy(), factor) for image in images])
    error = (found - torch.from_numpy(expected).float()).abs()
    assert error.mean() < mean_error  # Pillow cuts off to whole levels, and to 8 bits of hue
    assert (found - images).abs().mean() > 3


def test_the_strong_view_changes_most_images_and_leaves_levels_in_range():
    images = pictures(200).float()
    found = strong_view(images, draws(), np.arange(4))
    assert found.min() >= -1e-3 and found.max() <= 255 + 1e-3
    changed = (found - images).abs().amax((1, 2, 3)) > 1
    assert 0.8 < changed.float().mean() < 1  # 1 - 0.2 * 0.8 * 0.9 * 0.8 = 0.885
    gray = ((found - found.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 0.01).float().mean()
    assert 0.12 < gray < 0.28


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("random", {"mask_ratio": 0.4}),
        ("random_mps32", {"mask_ratio": 0.6}),
        ("block", {"mask_ratio": 0.75}),
    ],
)
def test_masks_hide_every_patch_as_often_as_the_generator_does(kind, options):
    generate = build_mask_generator(kind, input_size=32, patch_size=4, **options)
    masks = DeviceMasks(generate, 0, CPU)
    found = masks(draws(), 3000)
    rng = np.random.default_rng(1)
    expected = torch.from_numpy(np.stack([generate(rng) for _ in range(3000)]))
    assert found.shape == expected.shape and found.dtype == torch.bool
    torch.testing.assert_close(found.float().mean(0), expected.float().mean(0), atol=0.06, rtol=0)
    assert set(found.flatten(1).sum(1).tolist()) <= set(expected.flatten(1).sum(1).tolist())
    if kind == "random_mps32":
        cells = found.view(-1, 4, 2, 4, 2).transpose(2, 3).flatten(3)
        assert (cells.all(-1) == cells.any(-1)).all()


# --------------------------------------------------------------------------------------------------
# Parts and words


def test_words_tell_patches_apart_and_are_the_nearest_centres():
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5])[torch.randint(4, (64, 1, 8, 8))]
    images = levels.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    words = kmeans_tokens(images, (4, 4), 4, seed=0, iterations=20)(images)
    assert words.shape == (64, 64)
    pairs = torch.stack((words.flatten(), levels.flatten().mul(2).long()), 1).unique(dim=0)
    assert len(pairs) == len(pairs[:, 1].unique()) == 4  # one word for each level


def test_too_few_patches_for_the_words_are_refused():
    with pytest.raises(ValueError, match="64 different patches are too few for 100 visual tokens"):
        kmeans_tokens(torch.randn(1, 3, 32, 32), (4, 4), 100, seed=0)


def test_parts_of_an_image_are_its_colors():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, :, 16:] = 255
    images[:, 2, :, :16] = 255
    parts = color_place_parts(images, (16, 16), 2)
    assert parts.shape == (2, 16, 16) and parts.dtype == torch.uint8
    assert len(parts[0, :, :8].unique()) == len(parts[0, :, 8:].unique()) == 1
    assert parts[0, 0, 0] != parts[0, 0, 15]


# --------------------------------------------------------------------------------------------------
# Batches


def test_a_batch_follows_from_seed_and_step_alone():
    images, views = pictures(40), ("image", "image_strong", "noise")
    options = {"noise_size": 5, "color_jitter": 0.4}
    first, second = (make_loader(images, views, **options) for _ in range(2))
    expected = [first.batch(step) for step in range(12)]
    for step in (7, 0, 11):
        for name, value in second.batch(step).items():
            assert torch.equal(value, expected[step][name]), name
    other = make_loader(images, views, **options, seed=4).batch(7)
    assert not torch.equal(other["image"], expected[7]["image"])
    assert not torch.equal(expected[6]["noise"], expected[7]["noise"])


def test_an_epoch_shows_every_image_once():
    loader = make_loader(pictures(40))
    epochs = [
        torch.cat([loader.chosen(5 * epoch + step) for step in range(5)]) for epoch in range(2)
    ]
    assert all(epoch.sort().values.tolist() == list(range(40)) for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize(
    ("views", "options", "message"),
    [
        (("image", "image_second"), {}, "view 'image_second' is not made on the device"),
        (
            ("image",),
            {"interpolation": "lanczos"},
            "--train_interpolation lanczos .* use bicubic or bilinear",
        ),
        (("image",), {"batch_size": 41}, "40 images do not fill a batch of 41"),
    ],
)
def test_what_cannot_be_made_is_refused(views, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(pictures(40), views, **options)


def test_images_of_several_sizes_are_refused_without_a_size():
    class Two:
        labels = np.zeros(2, dtype=np.int64)

        def __len__(self) -> int:
            return 2

        def read(self, index: int) -> np.ndarray:
            return np.zeros((8 + index, 8, 3), dtype=np.uint8)

    with pytest.raises(ValueError, match="images of 2 sizes"):
        decoded(Two())
    assert decoded(Two(), (8, 8)).shape == (2, 3, 8, 8)
