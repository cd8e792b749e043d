"""Damaged and hostile data: what it costs to refuse it, and what the message names."""

import io
import os
import resource
import struct
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import BadImagesError, ImageDataset, build_dataset, build_loader
from unimim.data.file_index import read_map_file
from unimim.data.files import FolderFiles
from unimim.data.jpeg import (
    MAX_IMAGE_PIXELS,
    BrokenImageError,
    decode,
    decode_pillow,
    limit_pixels,
    open_picture,
)
from unimim.data.sources import images_below, map_source

DECODERS = (decode, decode_pillow, lambda raw: open_picture(raw)[1](8))


def encoded(kind="PNG", size=(48, 40), **options):
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (*size, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def jpeg_that_says(height, width):
    raw = bytearray(encoded("JPEG", quality=80))
    at = raw.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", raw, at, height, width)
    return bytes(raw)


@pytest.fixture(autouse=True)
def default_limit():
    yield
    limit_pixels(MAX_IMAGE_PIXELS)


def zipped(root: Path, members: dict[str, bytes], method=zipfile.ZIP_STORED) -> Path:
    root.mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "train.zip", "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    (root / "train_map.txt").write_text("".join(f"{name}\t0\n" for name in members))
    return root / "train.zip"


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_header_of_too_many_pixels_is_refused_before_memory_is_taken(decoder):
    raw = jpeg_that_says(65500, 65500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BrokenImageError, match="--max_image_pixels 178956970"):
        decoder(raw)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "PPM"])
def test_the_limit_is_that_of_the_flag_for_every_format(tmp_path, decoder, kind):
    raw = encoded(kind)  # 192 x 160
    args = Namespace(
        data_set=None, data_path=str(tmp_path), seed=0, max_bad_images=1, strict_data=False,
        max_image_pixels=192 * 160,
    )  # fmt: skip
    (tmp_path / "a.png").write_bytes(encoded())
    build_dataset(args, train=True, transform=None, need_labels=False)
    decoder(raw)
    args.max_image_pixels -= 1
    dataset = build_dataset(args, train=True, transform=None, need_labels=False)
    with pytest.raises(BrokenImageError, match=f"--max_image_pixels {192 * 160 - 1}"):
        decoder(raw)
    limit_pixels(MAX_IMAGE_PIXELS)  # as a spawned worker begins
    loader = build_loader(dataset, [[(0, 0)]], num_workers=0, pin_mem=False)
    assert loader.worker_init_fn.args == (MAX_IMAGE_PIXELS,)


def test_no_limit_below_one_pixel():
    with pytest.raises(ValueError, match="--max_image_pixels must be at least 1, not 0"):
        limit_pixels(0)


# --- zips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_one_flipped_bit_of_a_member_is_a_broken_image(tmp_path, method):
    raw = encoded(compress_level=0)
    archive = zipped(tmp_path, {"a.png": raw}, method)
    source = map_source(tmp_path, "train")
    assert source.read(0) == raw
    whole = archive.read_bytes()
    rng = np.random.default_rng(0)
    start = 30 + len("a.png")
    for at in rng.integers(start, start + int(source.files.packed_size[0]), 40):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        archive.write_bytes(damaged)
        with pytest.raises(BrokenImageError):
            map_source(tmp_path, "train").read(0)


def test_a_member_that_inflates_to_more_than_it_states_costs_what_it_states(tmp_path):
    archive = zipped(tmp_path, {"a.png": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    content = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        struct.pack_into("<L", content, content.index(signature) + at, 1000)
    archive.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BrokenImageError, match="inflates to more bytes instead of the 1000"):
        map_source(tmp_path, "train").read(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15


def test_a_member_that_states_more_bytes_than_an_image_has_is_refused(tmp_path):
    archive = zipped(tmp_path, {"a.png": b"x" * 2000}, zipfile.ZIP_DEFLATED)
    content = bytearray(archive.read_bytes())
    for field in (20, 24):  # packed, unpacked
        changed = content.copy()
        struct.pack_into("<L", changed, content.index(b"PK\1\2") + field, 2**31)
        archive.write_bytes(changed)
        with pytest.raises(BrokenImageError, match="2147483648 bytes are more"):
            map_source(tmp_path, "train").read(0)


@pytest.mark.parametrize("left", [0, 20, 5000])
def test_a_zip_that_is_cut_while_it_is_read_ends_in_a_sentence(tmp_path, left):
    """A mapped file would kill the process here."""
    archive = zipped(tmp_path, {f"{i}.png": encoded(compress_level=0) for i in range(5)})
    dataset = ImageDataset(
        map_source(tmp_path, "train"), lambda raw, rng: {"x": len(decode(raw))}, seed=0,
        max_bad_images=3,
    )  # fmt: skip
    assert dataset[0, 4]["x"] == 192
    os.truncate(archive, left)
    with pytest.raises(BadImagesError, match=r"4 of 5 images are broken .*train.zip@/"):
        for index in range(5):
            dataset[0, index]


def test_checksums_of_members_are_those_of_zipfile(tmp_path):
    names = {"a.png": b"one", "b.png": b"two" * 500}
    zipped(tmp_path, names, zipfile.ZIP_DEFLATED)
    found = map_source(tmp_path, "train").files.crc
    assert found.tolist() == [zlib.crc32(content) for content in names.values()]


# --- folders --------------------------------------------------------------------------------------


def test_what_is_no_regular_file_is_a_broken_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(2**40)
    files = FolderFiles(tmp_path, ["pipe.jpg", "zeros.jpg", "folder.jpg", "sparse.jpg", "a\0b.jpg"])
    for index, reason in enumerate(["regular", "regular", "irectory|regular", "bytes", "null"]):
        with pytest.raises(BrokenImageError, match=reason):
            files.read(index)


def test_links_in_a_circle_are_followed_once(tmp_path):
    for name in ("a/x.jpg", "b/y.jpg", "other/z.jpg"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"")
    (tmp_path / "root/a/loop").symlink_to("..")
    (tmp_path / "root/b/self").symlink_to(".")
    (tmp_path / "root/b/again").symlink_to(".")
    (tmp_path / "root/b/twin").symlink_to(tmp_path / "root/other")  # no circle: followed
    (tmp_path / "root/gone").symlink_to("nowhere")
    found = sorted(images_below(tmp_path / "root"))
    assert found == ["a/x.jpg", "b/twin/z.jpg", "b/y.jpg", "other/z.jpg"]


# --- map files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, says",
    [
        (b"b.jpg\t9999999999", "label 9999999999 of 'b.jpg' is above 999999"),
        (b"b.jpg\t" + b"9" * 5000, "is above 999999"),
        (b"b.jpg 1000000", "label 1000000 of 'b.jpg' is above 999999"),
        (b"b.jpg\t-1", "label '-1' of 'b.jpg' is not an integer from 0 on"),
        (b"b\0.jpg\t1", "a zero byte"),
        (
            b"/etc/passwd\t1",
            "'/etc/passwd' leads out of the folder of the images; .*--allow_outside",
        ),
        (b"c/../../b.jpg 1", "'c/../../b.jpg' leads out"),
        (b"../other.zip@/b.jpg 1", "leads out"),
        (b" ..\t1", "leads out"),
    ],
)
def test_lines_that_no_run_should_read(tmp_path, line, says):
    path = tmp_path / "train_map.txt"
    path.write_bytes(b"a..b/c.jpg\t0\r\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"train_map.txt, line 2: .*{says}"):
        read_map_file(path)


def test_paths_may_lead_outside_where_that_is_allowed(tmp_path):
    path = tmp_path / "train_map.txt"
    path.write_text(f"{tmp_path}/a.jpg\t000000012\n../b.jpg 999999\n..\t0\n")
    names, labels = read_map_file(path, allow_outside=True)
    assert list(names) == [f"{tmp_path}/a.jpg", "../b.jpg", ".."]
    assert labels.tolist() == [12, 999999, 0]


def test_a_map_in_utf_16_is_named(tmp_path):
    (tmp_path / "train_map.txt").write_bytes("a.jpg\t0\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"train_map.txt, line 1: a zero byte; .*UTF-8"):
        read_map_file(tmp_path / "train_map.txt")
