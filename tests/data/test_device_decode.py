"""JPEGs that the device decodes (--decode gpu): crops, masks and replacements of the CPU.

Here the device is the CPU: all but the decoder is what runs on a GPU.
"""

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arguments, differing, start, train_steps
from PIL import Image
from torch.utils.data import default_collate

from datasets import BadImagesError, ImageDataset, build_loader
from masking_generator import build_mask_generator
from unimim.cli.models import build_method
from unimim.data import device_decode
from unimim.data.crops import INTERPOLATIONS
from unimim.data.device_decode import DeviceDecoder, UndecodedImages, batch_decoder
from unimim.data.jpeg import usual_jpeg_size
from unimim.data.pretraining import build_data, crop_loader
from unimim.data.shapes import background
from unimim.data.sources import build_source
from unimim.data.views import build_pretrain_transform
from unimim.engine.session import Position
from unimim.engine.state import RunContext
from unimim.tokenizer.clustering import sample_patches
from unimim.tokenizer.clusters import pixels_of
from unimim.tokenizer.flags import parse_tokenizer

CPU = torch.device("cpu")
ALL_VIEWS = ("image", "image_strong", "image_second", "mask", "noise")
MAE = (
    "--model", "mae_tiny_patch16_224", "--model_kwargs", "embed_dim=32", "depth=2", "num_heads=2",
    "decoder_embed_dim=24", "decoder_depth=1", "decoder_num_heads=2",
)  # fmt: skip
# the mean difference that is allowed for an image
LEVELS = {"image": 1.0, "image_second": 1.0, "image_strong": 2.0}


def photo(seed: int, height: int, width: int) -> Image.Image:
    rng = np.random.RandomState(seed)
    levels = background(rng, height, width) + rng.randint(-20, 21, size=(height, width, 1))
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PICTURE = photo(0, 60, 90)
LEFT = {  # to the device
    "0.jpg": encoded(PICTURE),
    "1.jpg": encoded(photo(1, 150, 80), subsampling=0),
    "2.jpg": encoded(photo(2, 48, 200), progressive=True),
    "3.jpg": encoded(photo(3, 64, 64).convert("L")),
    "4.jpg": encoded(photo(4, 31, 33), restart_marker_rows=1),
}
FINISHED = {  # by the workers
    "5.png": encoded(photo(5, 70, 50), "PNG"),
    "6.jpg": encoded(photo(6, 70, 50).convert("CMYK")),
    "7.jpg": encoded(photo(7, 70, 50), keep_rgb=True),
}
TABLE = b"\xff\xc4\x00\x1f\x00"  # begins a Huffman table, the codes of one bit follow
BROKEN = LEFT["0.jpg"].replace(TABLE + b"\x00", TABLE + b"\xff")


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for name, raw in (LEFT | FINISHED).items():
        (root / name).write_bytes(raw)
    return root


def transform(views: tuple[str, ...] = ALL_VIEWS, **options):
    masks = build_mask_generator("block", input_size=32, patch_size=4, mask_ratio=0.5)
    return build_pretrain_transform(
        views,
        **{
            "input_size": 32,
            "mask_generator": masks if "mask" in views else None,
            "noise_size": 6,
            "second_size": (16, 24) if "image_second" in views else None,
        }
        | options,
    )


def loaded(
    dataset_class, root: Path, keys: list, workers: int = 0, strict=False, **options
) -> list[dict]:
    """Return the finished batches of these keys."""
    source = build_source("image_folder", str(root), train=True, need_labels=False)
    images = dataset_class(source, transform(**options), seed=3, strict=strict)
    loader = build_loader(images, keys, num_workers=workers, pin_mem=False)
    decode = batch_decoder(images, CPU)
    return [decode(batch) for batch in loader]


def assert_alike(ours: dict, theirs: dict, exact: list[int]) -> None:
    """Assert equal batches, but for the pixels of rows that are not `exact`."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        if name not in LEVELS:
            assert torch.equal(ours[name], value), name
            continue
        apart = (ours[name].int() - value.int()).abs().float().mean((1, 2, 3))
        assert (apart <= LEVELS[name]).all(), (name, apart)
        assert (apart[exact] == 0).all(), name


def test_which_jpegs_are_left_to_the_device():
    sizes = {name: usual_jpeg_size(raw) for name, raw in (LEFT | FINISHED).items()}
    assert [sizes[name] for name in LEFT] == [(60, 90), (150, 80), (48, 200), (64, 64), (31, 33)]
    assert [sizes[name] for name in FINISHED] == [None] * 3
    truncated = LEFT["0.jpg"][:-400]
    for raw in (truncated, truncated[:30], b"", np.zeros((4, 4, 3), np.uint8)):
        assert usual_jpeg_size(raw) is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"color_jitter": 0.4, "interpolation": "random", "second_interpolation": "bicubic"},
        {"views": ("image",), "interpolation": "bilinear", "hflip": 1.0},
        {"views": ("image", "mask"), "interpolation": "hamming"},
    ],
)
def test_batches_are_those_of_the_cpu(folder, options):
    keys = [[(epoch, index) for index in range(8)] for epoch in range(4)]
    theirs = loaded(ImageDataset, folder, keys, **options)
    for ours, expected in zip(
        loaded(UndecodedImages, folder, keys, **options), theirs, strict=True
    ):
        assert_alike(ours, expected, exact=[5, 6, 7])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_filter_is_pillows(folder, interpolation):
    keys = [[(epoch, 1) for epoch in range(6)]]
    options = {"views": ("image",), "interpolation": interpolation}
    ours, theirs = (
        loaded(kind, folder, keys, **options)[0]["image"]
        for kind in (UndecodedImages, ImageDataset)
    )
    apart = (ours.int() - theirs.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.05


def test_workers_and_memory_make_no_difference(folder, monkeypatch):
    """Batches by workers, and images one by one where there is no memory for more."""
    keys = [[(epoch, index) for index in (7, 1, 0, 5, 4)] for epoch in range(2)]
    expected = loaded(UndecodedImages, folder, keys)
    for ours, theirs in zip(loaded(UndecodedImages, folder, keys, 2), expected, strict=True):
        assert_alike(ours, theirs, exact=list(range(5)))
    monkeypatch.setattr(device_decode, "PIXELS_AT_ONCE", 1)
    for ours, theirs in zip(loaded(UndecodedImages, folder, keys), expected, strict=True):
        assert_alike(ours, theirs, exact=[0, 3])
    finished = [[(0, 5), (1, 6)]]
    ours, theirs = (loaded(kind, folder, finished)[0] for kind in (UndecodedImages, ImageDataset))
    assert_alike(ours, theirs, exact=[0, 1])


def test_a_single_sample_is_finished(folder):
    """So are batches of these, of which a run's pictures and FLOPs are made."""
    source = build_source("image_folder", str(folder), train=True, need_labels=False)
    images = UndecodedImages(source, transform(), seed=3)
    ours, theirs = images[2, 1], ImageDataset(source, transform(), seed=3)[2, 1]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name
    batch = default_collate([ours, ours])
    assert batch_decoder(images, CPU)(batch) is batch


# --- what cannot be decoded -----------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 3])
def test_a_broken_jpeg_is_replaced_and_reported_as_on_the_cpu(folder, caplog, row):
    (folder / f"{row}.jpg").write_bytes(BROKEN)
    assert usual_jpeg_size(BROKEN) == (60, 90)  # the workers see nothing wrong
    keys = [[(0, 1), (0, row), (0, 4)]] * 2
    messages = []
    batches = []
    for kind in (ImageDataset, UndecodedImages):
        caplog.clear()
        batches.append(loaded(kind, folder, keys))
        found = [record.getMessage() for record in caplog.records]
        messages.append([text for text in found if "broken image" in text])
        with pytest.raises(BadImagesError, match=f"1 of 8 images are broken .*{row}.jpg"):
            loaded(kind, folder, keys, strict=True)
    assert len(messages[0]) == 1 and messages[0] == messages[1]
    for theirs, ours in zip(*batches, strict=True):
        assert ours["index"][1] != row
        assert_alike(ours, theirs, exact=[])


def test_what_the_device_refuses_the_cpu_decodes(folder, caplog, monkeypatch):
    """nvJPEG may refuse files that other decoders take: the batch is then decoded one by one."""
    decode = device_decode.decode_jpeg
    refused = torch.frombuffer(bytearray(LEFT["1.jpg"]), dtype=torch.uint8)

    def refusing(files, *args, **kwargs):
        if any(torch.equal(file, refused) for file in files):
            raise RuntimeError("Failed to decode jpeg with hardware support: 5")
        return decode(files, *args, **kwargs)

    monkeypatch.setattr(device_decode, "decode_jpeg", refusing)
    keys = [[(epoch, index) for index in range(4)] for epoch in range(3)]
    caplog.set_level("INFO", "unimim")
    theirs = loaded(ImageDataset, folder, keys)
    for ours, expected in zip(loaded(UndecodedImages, folder, keys), theirs, strict=True):
        assert_alike(ours, expected, exact=[1])
    told = [text for text in caplog.messages if "the device does not decode" in text]
    assert len(told) == 1 and "1.jpg" in told[0]


def test_too_many_pixels_are_refused_before_anything_is_decoded(folder, caplog, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000 / 2)
    batch = loaded(UndecodedImages, folder, [[(0, 0), (0, 1)]])[0]
    assert batch["index"][0] == 0 and batch["index"][1] != 1
    assert "80 x 150 pixels, more than --max_image_pixels 10000" in caplog.text


def test_a_gpu_without_nvjpeg_is_named(folder, monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nat x")

    monkeypatch.setattr(device_decode, "decode_jpeg", missing)
    source = build_source("image_folder", str(folder), train=True, need_labels=False)
    images = UndecodedImages(source, transform(), seed=0)
    with pytest.raises(ValueError, match=r"--decode gpu needs nvJPEG, .* nvJPEG support\); use"):
        DeviceDecoder(images, torch.device("cuda"))


# --- runs -----------------------------------------------------------------------------------------


def run_of(output: Path, images: Path, *flags: str):
    data = ("--data_set", "image_folder", "--data_path", str(images), "--batch_size", "2")
    return start("pretrain", output, *MAE, *data, "--decode", "gpu", *flags)


def test_a_run_resumes_in_mid_epoch_to_the_last_bit(tmp_path, folder):
    whole, _ = run_of(tmp_path / "whole", folder, "--num_workers", "1")
    losses = train_steps(whole, 0, 4)
    first, _ = run_of(tmp_path / "resumed", folder)
    assert train_steps(first, 0, 2) == losses[:2]
    first.session.save(Position(0, 2), finished=False)
    second, position = run_of(tmp_path / "resumed", folder)
    assert (position.epoch, position.step) == (0, 2)
    assert train_steps(second, 2, 4) == losses[2:]
    assert differing(dict(second.task.state_dict()), dict(whole.task.state_dict())) == []


def test_patches_of_a_tokenizer_are_those_of_the_cpu(tmp_path, folder):
    flags = (
        f"--kind kmeans --data_set image_folder --data_path {folder} --input_size 32 --vocab_size"
    )
    flags += (
        f" 8 --patch_size 8 --batch_size 4 --num_workers 0 --output_dir {tmp_path} --device cpu"
    )
    found = []
    for place in ("cpu", "gpu"):
        args = parse_tokenizer([*flags.split(), "--kmeans_patches", "40", "--decode", place])
        args.rank, args.world_size = 0, 1
        context = RunContext(args, CPU, 0, 1)
        patches = sample_patches(context, crop_loader(args), partial(pixels_of, patch=(8, 8)))
        found.append(patches)
    assert found[0].shape == found[1].shape == (40, 192)
    assert 0 < (found[0] - found[1]).abs().mean() < 1 / 255


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--in_chans", "5"), "--decode gpu makes 8-bit RGB images, and --in_chans 5 keeps"),
        (("--keep_channels",), "--decode gpu makes 8-bit RGB images, and --keep_channels keeps"),
        (("--data_pipeline", "reference"), "--decode gpu .* as --data_pipeline reference does"),
    ],
)
def test_what_is_not_made_on_the_device_is_refused(tmp_path, folder, flags, message):
    data = ("--data_set", "image_folder", "--data_path", str(folder), "--batch_size", "2")
    mean_std = ("--no_imagenet_default_mean_and_std",)
    args = arguments("pretrain", tmp_path, *MAE, *data, *mean_std, "--decode", "gpu", *flags)
    args.rank, args.world_size = 0, 1
    with pytest.raises(ValueError, match=message):
        build_data(args, build_method(args))
