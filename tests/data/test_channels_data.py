"""Images of any number of channels: decoding, views, training, and EXIF orientation."""

import io
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import (
    FINETUNE,
    METHODS,
    SIZE,
    TINY,
    arguments,
    own_signals,
    start,
    train_steps,
    whole_weights,
)
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

import run_knn
from datasets import BadImagesError, build_dataset
from scripts.tools import make_map_file, measure_mean_std, tar_dataset, zip_dataset
from unimim.cli.options import parse
from unimim.data.channels import decode_channels, upright
from unimim.data.crops import draw_clipped_crop, draw_short_side_crop
from unimim.data.jpeg import BrokenImageError, decode
from unimim.data.random import sample_rng
from unimim.data.sources import build_source, detect
from unimim.data.views import EvalTransform, ProbeTransform, build_pretrain_transform, draw_view
from unimim.engine.samples import sample_images
from unimim.engine.session import Position
from unimim.evaluation.flags import parse_knn

CHANNELS = 5
STATISTICS = ["--in_chans", "5", "--mean", "0.1", "0.2", "0.3", "0.4", "0.5"]
STATISTICS += ["--std", "0.5", "0.6", "0.7", "0.8", "0.9"]


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def some(dtype: type, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(np.iinfo(dtype).max, size=shape, dtype=dtype)


def pages(count: int) -> bytes:
    """Return a TIFF of so many pages of 16-bit gray."""
    first, *others = [Image.fromarray(some(np.uint16, 6, 7) // (k + 1)) for k in range(count)]
    return saved(first, "TIFF", save_all=True, append_images=others)


WIDTH, WITHOUT_WIDTH = b"\0\1\4\0\1\0\0\0\7", b"\0\2\4\0\1\0\0\0\7"  # a tag of a page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 5-channel 16-bit arrays, for training and validation."""
    root = tmp_path_factory.mktemp("five")
    rng = np.random.default_rng(1)
    for split, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(1000, 20000, (20, 24, CHANNELS)) + 40000 * label
                np.save(root / split / name / f"{number}.npy", pixels.astype(np.uint16))
    return root


# --------------------------------------------------------------------------------------------------
# Decoding


def test_files_keep_their_channels_and_depth(tmp_path: Path) -> None:
    wide, narrow = some(np.uint16, 6, 7), some(np.uint8, 6, 7, 4)
    cases = {
        "npy": (encoded(some(np.uint16, 6, 7, 5)), some(np.uint16, 6, 7, 5) / 65535),
        "big-endian npy": (encoded(some(np.uint16, 6, 7, 2).astype(">u2")),
                           some(np.uint16, 6, 7, 2) / 65535),
        "columns first": (
            encoded(np.asfortranarray(some(np.uint8, 6, 7, 2))), some(np.uint8, 6, 7, 2) / 255
        ),
        "floats": (encoded(some(np.uint8, 6, 7, 2) - 7.5), some(np.uint8, 6, 7, 2) - 7.5),
        "16-bit PNG": (saved(Image.fromarray(wide), "PNG"), wide[..., None] / 65535),
        "16-bit TIFF": (saved(Image.fromarray(wide), "TIFF"), wide[..., None] / 65535),
        "float TIFF": (saved(Image.fromarray(np.float32(wide)), "TIFF"), wide[..., None]),
        "RGBA PNG": (saved(Image.fromarray(narrow), "PNG"), narrow / 255),
    }  # fmt: skip
    levels = [some(np.uint16, 6, 7) // (k + 1) for k in range(5)]
    cases["a page a channel"] = (pages(5), np.stack(levels, -1) / 65535)
    for name, (raw, expected) in cases.items():
        pixels = decode_channels(raw, expected.shape[2])
        assert pixels.dtype == np.float32, name
        np.testing.assert_allclose(pixels, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_colors_are_not_cut_to_8(kind: str) -> None:
    colors = some(np.uint16, 5, 6, 3)
    raw = cv2.imencode(f".{kind}", colors[..., ::-1])[1].tobytes()
    np.testing.assert_allclose(decode_channels(raw, 3), colors / 65535, rtol=1e-6)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (encoded(np.zeros((4, 4, 3), np.uint8)), "it has 3 channels, --in_chans is 5"),
        (encoded(np.zeros((5, 8, 4), np.uint8)), r"\[5, 8, 4\]: the 5 channels must come last"),
        (pages(2), "it has 2 pages, --in_chans is 5"),
        (encoded(np.zeros((4, 4, 5), np.int32)), "int32, whose range is unknown"),
        (encoded(np.full((4, 4, 5), np.nan)), "not finite"),
        (encoded(np.zeros(4)), r"shape is \[4\]"),
        (encoded(np.zeros((4, 4, 5), np.uint8))[:-1], "states 80 bytes, it has 79"),
        (encoded(np.zeros((10**5, 10**5, 0), np.uint8)), "more than --max_image_pixels"),
        (encoded(np.array([[None]])), "Python objects"),
        (b"\x93NUMPY\x01", "its header cannot be read"),
        (encoded(np.zeros(4)).replace(b"(4,), }", b"(4,),  "), "its header cannot be read"),
        (encoded(np.zeros(4)).replace(b"<f8", b"|V0"), "its values have no bytes"),
        (WITHOUT_WIDTH.join(pages(5).rsplit(WIDTH, 1)), "Missing dimensions"),
        (b"nothing", "cannot identify"),
        (b"", "empty"),
    ],
)
def test_broken_arrays_are_named(raw: bytes, reason: str) -> None:
    with pytest.raises(BrokenImageError, match=reason):
        decode_channels(raw, CHANNELS)


def test_arrays_of_colors_are_images_without_a_flag() -> None:
    colors = some(np.uint8, 4, 5, 3)
    np.testing.assert_array_equal(decode(encoded(colors)), colors)
    assert decode(encoded(colors)).flags.writeable  # torch takes no other without a warning
    np.testing.assert_array_equal(decode(encoded(colors[..., 0])), colors[..., :1].repeat(3, 2))
    with pytest.raises(BrokenImageError, match="not 8-bit gray or RGB; give --keep_channels"):
        decode(encoded(colors.astype(np.uint16)))
    with pytest.raises(BrokenImageError, match="not 8-bit gray or RGB; give --in_chans 5"):
        decode(encoded(some(np.uint8, 4, 5, 5)))


# --------------------------------------------------------------------------------------------------
# Views


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_are_the_crops_of_the_array(interpolation: str) -> None:
    pixels = some(np.uint16, 30, 40, CHANNELS)
    whole = torch.from_numpy(pixels.astype(np.float32) / 65535).permute(2, 0, 1)
    transform = build_pretrain_transform(
        ("image",), input_size=(12, 16), interpolation=interpolation, channels=CHANNELS
    )
    flips = set()
    for epoch in range(8):
        draws = draw_view(sample_rng(0, epoch, 0), (30, 40), (0.08, 1.0), interpolation, False)
        image = transform(encoded(pixels), sample_rng(0, epoch, 0))["image"]
        # The published order: mirror the whole image, crop, resize.
        top, left, height, width = draws.box
        mirrored = whole.flip(2) if draws.flip else whole
        crop = mirrored[:, top : top + height, left : left + width]
        expected = interpolate(crop[None], (12, 16), mode=interpolation, antialias=True)[0]
        low, high = crop.amin((1, 2), keepdim=True), crop.amax((1, 2), keepdim=True)
        torch.testing.assert_close(image, expected.clamp(low, high), atol=1e-6, rtol=0)
        flips.add(draws.flip)
    assert flips == {True, False}


@pytest.mark.parametrize(("name", "crop"), [("area", draw_clipped_crop), ("short_side", None)])
def test_probes_see_the_same_crops(name: str, crop: Callable | None) -> None:
    pixels = some(np.uint8, 30, 40, CHANNELS)
    crop = crop or partial(draw_short_side_crop, target=(16, 16))
    draws = draw_view(sample_rng(0, 1, 0), (30, 40), (0.08, 1), "bicubic", False, crop)
    transform = ProbeTransform(16, crop=name, channels=CHANNELS)
    image = transform(encoded(pixels), sample_rng(0, 1, 0))["image"]
    top, left, height, width = draws.box
    mirrored = pixels[:, ::-1] if draws.flip else pixels
    box = mirrored[top : top + height, left : left + width].astype(np.float32) / 255
    planes = torch.from_numpy(box).permute(2, 0, 1)
    expected = interpolate(planes[None], (16, 16), mode="bicubic", antialias=True)[0]
    low, high = planes.amin((1, 2), keepdim=True), planes.amax((1, 2), keepdim=True)
    torch.testing.assert_close(image, expected.clamp(low, high), atol=1e-6, rtol=0)


def test_evaluation_sees_the_center() -> None:
    pixels = some(np.uint16, 48, 80, CHANNELS)
    image = EvalTransform((48, 48), 1.0, CHANNELS)(encoded(pixels), None)["image"]
    expected = pixels[:, 16:64].transpose(2, 0, 1).astype(np.float32) / 65535
    np.testing.assert_allclose(image.numpy(), expected, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("name", ["mae", "a2mim_vit", "maskfeat", "semaim"])
def test_methods_train_and_resume_on_five_channels(name: str, folder: Path, tmp_path: Path) -> None:
    flags = [*METHODS[name], "--data_set", "image_folder", "--data_path", str(folder), *STATISTICS]
    assert detect(str(folder)) == "image_folder"
    if name == "semaim":
        flags += ["--gaussian_kernel_size", "3", "--gaussian_sigma", "1"]
    run, _ = start("pretrain", tmp_path / "whole", *flags)
    metrics = train_steps(run, 0, 2)
    assert all(math.isfinite(row["loss"]) for row in metrics)
    assert next(p for p in run.task.parameters() if p.ndim == 4).shape[1] == CHANNELS

    half, _ = start("pretrain", tmp_path / "half", *flags)
    train_steps(half, 0, 1)
    half.session.save(Position(epoch=0, step=1), finished=False)
    half.session.finish()
    rest, position = start("pretrain", tmp_path / "half", *flags)
    assert (position.epoch, position.step) == (0, 1)
    assert train_steps(rest, 1, 2)[0]["loss"] == metrics[1]["loss"]
    expected = whole_weights(run)
    assert all(torch.equal(value, expected[key]) for key, value in whole_weights(rest).items())
    picture = sample_images(rest)
    assert picture is None or (picture.dtype == torch.uint8 and len(picture) == 3)
    assert picture is not None or name == "semaim"


def test_normalization_and_broken_channels(folder: Path, tmp_path: Path) -> None:
    data = ["--data_set", "image_folder", "--data_path", str(tmp_path / "data")]
    (tmp_path / "data" / "a").mkdir(parents=True)
    for number in range(15):
        pixels = some(np.uint16, 16, 16, CHANNELS if number != 3 else 4)
        np.save(tmp_path / "data" / "a" / f"{number:02d}.npy", pixels)
    run, _ = start("pretrain", tmp_path / "out", *METHODS["mae"], *data, *STATISTICS)
    image = torch.rand(2, CHANNELS, 4, 4)
    mean, std = torch.arange(1, 6) / 10, torch.arange(5, 10) / 10
    kept = image.clone()
    seen = run.normalize({"image": image})["image"]
    torch.testing.assert_close(seen, (kept - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    torch.testing.assert_close(image, kept)
    # Another number of channels is a broken image: replaced, and named where none may be.
    assert run.loader.dataset[0, 3]["index"] != 3
    strict = arguments("pretrain", tmp_path, *METHODS["mae"], *data, *STATISTICS, "--strict_data")
    transform = EvalTransform((16, 16), None, CHANNELS)
    dataset = build_dataset(strict, train=True, transform=transform, need_labels=False)
    with pytest.raises(BadImagesError, match=r"a/03\.npy"):
        dataset[0, 3]


def test_classifier_and_neighbors_learn_from_five_channels(folder: Path, tmp_path: Path) -> None:
    data = ["--data_set", "image_folder", "--data_path", str(folder), *STATISTICS]
    run, _ = start("finetune", tmp_path / "finetune", *data, "--mixup", "0", "--cutmix", "0")
    assert run.args.aa == "" and run.args.color_jitter == 0
    (metrics,) = train_steps(run, 0, 1)
    assert math.isfinite(metrics["loss"])

    flags = [*METHODS["mae"], *data, "--epochs", "1"]
    pretrained, _ = start("pretrain", tmp_path / "mae", *flags)
    train_steps(pretrained, 0, 1)
    pretrained.session.save(Position(epoch=1), finished=True)
    pretrained.session.finish()
    encoder = next((tmp_path / "mae").glob("encoder-*.safetensors"))
    words = ["--model", "vit_tiny_patch16_224", *TINY, "--model_kwargs", *SIZE, *data]
    words += ["--finetune", str(encoder), "--output_dir", str(tmp_path / "knn")]
    with own_signals():
        rows = run_knn.main(parse_knn([*words, "--nb_knn", "3"]))
    assert rows


def test_what_channels_cannot_have_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    for flags, reason in {
        ("--aa", "rand-m9-mstd0.5-inc1"): "--aa rand-m9-mstd0.5-inc1 changes colors, which the 5",
        ("--color_jitter", "0.3"): "--color_jitter 0.3 changes colors",
        ("--in_chans", "0"): "--in_chans is 0",
    }.items():
        with pytest.raises(SystemExit):
            parse("finetune", [*FINETUNE, *STATISTICS, *flags])
        assert reason in " ".join(capsys.readouterr().err.split())
    data = ["--data_set", "image_folder", "--data_path", str(folder)]
    for flags, reason in {
        (): "strong view",  # ConMIM
        (*METHODS["mae"], "--train_interpolation", "lanczos"): "use bicubic, bilinear or random",
        (*METHODS["mae"], "--data_pipeline", "reference"): "--data_pipeline reference is for 8-bit",
    }.items():
        with pytest.raises(ValueError, match=reason):
            start("pretrain", tmp_path, *data, *STATISTICS, *flags)


def test_statistics_are_measured(folder: Path, capsys) -> None:
    words = ["--data_set", "image_folder", "--data_path", str(folder / "train")]
    measure_mean_std.main([*words, "--in_chans", "5", "--size", "20"])
    printed = capsys.readouterr().out.split()
    assert printed[0] == "--mean" and printed[6] == "--std" and len(printed) == 12
    files = sorted((folder / "train").rglob("*.npy"))
    expected = np.mean([np.load(file) / 65535 for file in files], axis=(0, 1, 2))
    np.testing.assert_allclose([float(value) for value in printed[1:6]], expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_packed_arrays_are_those_of_the_files(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    if kind == "tar":
        tar_dataset.main([str(folder / "train"), str(tmp_path / "train")])
        source = build_source("tar", str(tmp_path), train=True, need_labels=True)
    else:
        zip_dataset.main([str(folder / "train"), str(tmp_path / "train.zip")])
        zip_dataset.main([str(folder / "val"), str(tmp_path / "val.zip")])
        make_map_file.main([str(tmp_path)])
        source = build_source("IMNET", str(tmp_path), train=True, need_labels=True)
    files = build_source("image_folder", str(folder), train=True, need_labels=True)
    assert len(source) == len(files) == 20
    assert source.labels.tolist() == files.labels.tolist()
    assert all(source.read(index) == files.read(index) for index in range(20))


def test_own_depth_of_one_channel(tmp_path: Path) -> None:
    """--keep_channels with one channel: 16 bits, and no luminance."""
    (tmp_path / "data").mkdir()
    for number in range(8):
        gray = Image.fromarray(some(np.uint16, 16, 16) // (number + 1))
        gray.save(tmp_path / "data" / f"{number}.png")
    flags = [*METHODS["mae"], "--data_set", "image_folder", "--data_path", str(tmp_path / "data")]
    flags += ["--in_chans", "1", "--keep_channels", "--mean", "0.5", "--std", "0.25"]
    run, _ = start("pretrain", tmp_path / "out", *flags)
    batch = next(iter(run.loader))
    assert batch["image"].shape[1:] == (1, 16, 16) and batch["image"].dtype == torch.float32
    assert len(batch["image"].mul(65535).round().unique()) > 256
    seen = run.normalize({"image": batch["image"]})["image"]
    torch.testing.assert_close(seen, (batch["image"] - 0.5) / 0.25)


# --------------------------------------------------------------------------------------------------
# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honored_by_flag(orientation: int, tmp_path: Path) -> None:
    colors = Image.fromarray(some(np.uint8, 6, 9, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    colors.save(tmp_path / "a.png", exif=exif)
    raw = (tmp_path / "a.png").read_bytes()
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    np.testing.assert_array_equal(decode(upright(raw, None)), expected)
    np.testing.assert_allclose(decode_channels(upright(raw, 3), 3), expected / 255, rtol=1e-6)

    # A run turns images with the flag, and leaves them without it, as published.
    def image(*flags: str) -> np.ndarray:
        data = ["--data_set", "image_folder", "--data_path", str(tmp_path), *flags]
        args = arguments("pretrain", tmp_path / "out", *data)
        transform = EvalTransform((60, 60), 1.0)
        dataset = build_dataset(args, train=True, transform=transform, need_labels=False)
        return dataset[0, 0]["image"].numpy()

    plain = EvalTransform((60, 60), 1.0)
    np.testing.assert_array_equal(image(), plain(raw, None)["image"].numpy())
    turned = plain(saved(Image.fromarray(expected), "PNG"), None)["image"].numpy()
    np.testing.assert_array_equal(image("--exif_orientation"), turned)
