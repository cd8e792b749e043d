"""--alpha: exact pixels of every kind of transparency, alone and with EXIF orientation, in every
pipeline."""

import io
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SIZE, start
from PIL import Image, ImageOps

import run_knn
from datasets import ImageDataset, build_dataset
from scripts.tools import measure_mean_std
from unimim.cli.options import parse
from unimim.data.jpeg import decode
from unimim.data.preparation import composited, preparation
from unimim.data.views import EvalTransform, build_finetune_transform, build_pretrain_transform
from unimim.evaluation.flags import parse_knn

RNG = np.random.default_rng(0)
COLORS = RNG.integers(256, size=(12, 18, 3), dtype=np.uint8)
ALPHA = RNG.integers(256, size=(12, 18), dtype=np.uint8)
ALPHA[0] = np.arange(18) % 2 * 255  # fully transparent and fully opaque, too


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def over(colors: np.ndarray, alpha: np.ndarray, background: int) -> np.ndarray:
    """The rounded mean of color and background, weighted by alpha."""
    weight = alpha[..., None] / 255
    return np.round(colors * weight + background * (1 - weight)).astype(np.uint8)


def case(kind: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A file with transparency, its colors [12, 18, 3] and its alpha [12, 18]."""
    gray = COLORS[..., :1].repeat(3, axis=2)
    if kind in ("RGBA PNG", "RGBA WebP", "RGBA TIFF"):
        image = Image.fromarray(np.dstack((COLORS, ALPHA)))
        options = {"lossless": True, "exact": True} if kind == "RGBA WebP" else {}
        return saved(image, kind.split()[1], **options), COLORS, ALPHA
    if kind == "LA":
        return saved(Image.fromarray(np.dstack((COLORS[..., 0], ALPHA)), "LA")), gray, ALPHA
    if kind == "palette":
        numbers = COLORS[..., 0] % 4
        palette = RNG.integers(256, size=(4, 3), dtype=np.uint8)
        image = Image.fromarray(numbers, "P")
        image.putpalette(palette.tobytes())
        levels = np.array([0, 100, 255, 17], dtype=np.uint8)
        return saved(image, transparency=levels.tobytes()), palette[numbers], levels[numbers]
    if kind == "one color":
        found = (COLORS[3, 4] == COLORS).all(-1)
        image = Image.fromarray(COLORS)
        alpha = np.where(found, 0, 255).astype(np.uint8)
        return saved(image, transparency=tuple(COLORS[3, 4].tolist())), COLORS, alpha
    if kind == "one gray":
        alpha = np.where(gray[..., 0] == 77, 0, 255).astype(np.uint8)
        return saved(Image.fromarray(gray[..., 0]), transparency=77), gray, alpha
    assert kind == "one level of 16 bits"
    wide = COLORS[..., 0].astype(np.uint16) * 257
    alpha = np.where(wide == wide[2, 2], 0, 255).astype(np.uint8)
    return saved(Image.fromarray(wide), transparency=int(wide[2, 2])), gray, alpha


KINDS = (
    "RGBA PNG", "RGBA WebP", "RGBA TIFF", "LA", "palette", "one color", "one gray",
    "one level of 16 bits",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_transparency_is_composited_to_the_exact_pixel(kind):
    raw, colors, alpha = case(kind)
    for background in (255, 0):
        pixels = decode(composited(raw, background))
        assert pixels.dtype == np.uint8 and (pixels == over(colors, alpha, background)).all()
    assert composited(raw, None) is raw and (decode(raw) == colors).all(), "dropped by default"


def test_other_images_are_left_alone():
    picture = Image.fromarray(COLORS)
    array = io.BytesIO()
    np.save(array, COLORS)
    for raw in (saved(picture), saved(picture, "JPEG"), array.getvalue(), b"", b"no image"):
        assert composited(raw, 255) is raw
    assert composited(COLORS, 255) is COLORS
    raw = saved(Image.fromarray(np.dstack((COLORS, ALPHA))))
    assert composited(raw[:60], 255) == raw[:60], "the decoder says what is wrong"


@pytest.mark.parametrize("orientation", [3, 5, 8])
def test_transparent_images_are_turned_as_well(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = preparation(Namespace(exif_orientation=True, alpha="black"))
    composited_first = Image.fromarray(over(COLORS, ALPHA, 0))
    raw = saved(Image.fromarray(np.dstack((COLORS, ALPHA))), exif=exif)
    composited_first.getexif()[0x0112] = orientation
    assert (turn(raw) == np.asarray(ImageOps.exif_transpose(composited_first))).all()
    assert preparation(Namespace(exif_orientation=False, alpha="drop")) is None


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Transparent images in class folders, and the same ones composited over white."""
    root = tmp_path_factory.mktemp("alpha")
    for number in range(12):
        colors = RNG.integers(256, size=(24, 30, 3), dtype=np.uint8)
        alpha = RNG.integers(256, size=(24, 30), dtype=np.uint8)
        flat = Image.fromarray(over(colors, alpha, 255))
        for kind, image in (("clear", Image.fromarray(np.dstack((colors, alpha)))), ("flat", flat)):
            for split in ("train", "val"):
                place = root / kind / split / "ab"[number % 2]
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{number}.png")
    return root / "clear", root / "flat"


def dataset(folder: Path, alpha: str, transform) -> ImageDataset:
    args = parse(
        "pretrain", ["--data_path", str(folder), "--data_set", "image_folder", "--alpha", alpha]
    )
    return build_dataset(args, train=True, transform=transform, need_labels=False)


@pytest.mark.parametrize("name", ["fast", "reference", "train", "val", "eval"])
def test_every_pipeline_sees_the_composited_image(folders, name):
    if name in ("fast", "reference"):
        transform = build_pretrain_transform(
            ("image", "image_strong"), input_size=16, pipeline=name
        )
    elif name == "eval":
        transform = EvalTransform((16, 16), None)
    else:
        args = parse("finetune", ["--input_size", "16", "--nb_classes", "2"])
        transform = build_finetune_transform(args, train=name == "train")
    clear, flat = folders
    ours, theirs = dataset(clear, "white", transform), dataset(flat, "drop", transform)
    dropped = dataset(clear, "drop", transform)
    for index in range(len(ours)):
        assert torch.equal(ours[1, index]["image"], theirs[1, index]["image"])
        assert not torch.equal(ours[1, index]["image"], dropped[1, index]["image"])


def test_flags_of_runs_evaluation_and_tools_agree(folders, tmp_path, capsys):
    clear, flat = map(str, folders)
    size = ("--model", "mae_tiny_patch16_224", "--model_kwargs", *SIZE)
    data = ("--data_set", "image_folder", "--batch_size", "4", "--num_workers", "0")
    first, _ = start("pretrain", tmp_path / "a", *size, *data, "--data_path", clear, "--alpha",
                     "white")  # fmt: skip
    other, _ = start("pretrain", tmp_path / "b", *size, *data, "--data_path", flat)
    assert torch.equal(next(iter(first.loader))["image"], next(iter(other.loader))["image"])

    means = []
    for flags in ([clear, "--alpha", "white"], [flat], [clear]):
        measure_mean_std.main(["--data_path", *flags])
        means.append(capsys.readouterr().out.splitlines()[-1])
    assert means[0] == means[1] != means[2]

    cache = ["--feature_cache", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "knn")]
    knn = [
        "--model", "vit_tiny_patch16_224", "--model_kwargs", *SIZE, "--input_size", "16",
        "--patch_size", "4", "--device", "cpu", *data, "--data_path", clear, "--nb_knn", "3",
        *cache,
    ]  # fmt: skip
    run_knn.main(parse_knn([*knn, "--alpha", "white"]))
    for other, there in ((["--alpha", "black"], "black"), ([], "None")):
        with pytest.raises(ValueError, match=f"with alpha white instead of {there}"):
            run_knn.main(parse_knn([*knn, *other]))


def test_alpha_is_a_channel_where_channels_are_kept(folders):
    args = parse("pretrain", ["--data_path", str(folders[0]), "--alpha", "white"])
    args.in_chans = 4
    with pytest.raises(ValueError, match=r"--alpha white is for 8-bit RGB images; .* leave it out"):
        build_dataset(args, train=True, transform=None, need_labels=False)
