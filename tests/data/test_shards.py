"""--data_set tar: the index, reading in place, and that a run on shards is the run on files."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DECODER, SIZE, differing, png, start, train_steps
from PIL import Image

from datasets import ImageDataset
from engine_for_pretraining import grouped
from scripts.tools.tar_dataset import main as pack
from unimim.data import shard_index, shards
from unimim.data.jpeg import BrokenImageError
from unimim.data.shards import TarFiles, expanded, index_of, read_shard, shards_of
from unimim.data.sources import build_source, detect, digits_source, is_divided
from unimim.engine.session import Position

pytestmark = pytest.mark.usefixtures("own_temporary_folder")

IMAGES = 60
MAE = ("--model", "mae_tiny_patch16_224", "--model_kwargs", *SIZE, *DECODER)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Digits in class folders."""
    source = digits_source(train=True)
    for index in range(IMAGES):
        place = tmp_path / f"files/train/{source.labels[index]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.read(index)).save(place / f"{index}.png")
    return tmp_path / "files/train"


@pytest.fixture
def packed(tmp_path, folder) -> str:
    pack([str(folder), str(tmp_path / "shards/train"), "--images_per_shard", "25"])
    return str(tmp_path / "shards/train-{000000..000002}.tar")


# --------------------------------------------------------------------------------------------------
# What a data path names


def test_patterns_stand_for_their_shards():
    assert expanded("a-{008..011}.tar") == [f"a-{k:03d}.tar" for k in (8, 9, 10, 11)]
    assert expanded("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    assert expanded("/x/one.tar") == ["/x/one.tar"]
    with pytest.raises(ValueError, match="goes down"):
        expanded("a-{3..1}.tar")


def test_folders_may_be_divided_by_names_or_by_folders(tmp_path):
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"names/{name}.tar", {"a.png": png(1)})
        split = name.partition("-")[0]
        write_tar(tmp_path / f"folders/{split}/{name}.tar", {"a.png": png(1)})
        write_tar(tmp_path / f"plain/{name[-1]}.tar", {"a.png": png(1)})
    for name in ("a-train-00", "a-validation-00"):  # as the hub's imagenet1k
        write_tar(tmp_path / f"words/{name}.tar", {"a.png": png(1)})
    for name in ("a", "valid"):  # only those for validation say so
        write_tar(tmp_path / f"others/{name}-0.tar", {"a.png": png(1)})
    said = {"words": ["a-train-00", "a-validation-00"], "others": ["a-0", "valid-0"]}
    for kind, names in said.items():
        shards = [shards_of(str(tmp_path / kind), train=train) for train in (True, False)]
        assert [[shard.stem for shard in split] for split in shards] == [[name] for name in names]
    write_tar(tmp_path / "city/valencia.tar", {"a.png": png(1)})
    assert len(shards_of(str(tmp_path / "city"), train=True)) == 1
    for kind in ("names", "folders"):
        path = str(tmp_path / kind)
        assert [shard.name for shard in shards_of(path, train=True)] == [
            "train-0.tar",
            "train-1.tar",
        ]
        assert [shard.name for shard in shards_of(path, train=False)] == ["val-0.tar"]
        assert detect(path) == "tar" and is_divided("tar", path)
    plain = str(tmp_path / "plain")
    assert len(shards_of(plain, train=True)) == 2 and not is_divided("tar", plain)
    with pytest.raises(ValueError, match=r"holds no val shards .* --eval_data_path"):
        shards_of(plain, train=False)
    assert [shard.stem for shard in shards_of(f"{plain}/?.tar", train=True)] == ["0", "1"]
    for pattern in ("{0,9}", "9*"):
        with pytest.raises(ValueError, match=r"9\*?\.tar does not exist"):
            shards_of(f"{plain}/{pattern}.tar", train=True)


# --------------------------------------------------------------------------------------------------
# Samples and their labels


def test_samples_have_several_extensions_and_labels_of_two_kinds(tmp_path, caplog):
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "x/1.cls": b"3\n", "x/1.png": png(1), "x/1.seg.png": png(9),
            "x/1.json": b'{"label": 7}', "x/2.JPG": b"2", "x/2.json": b'{"label": 7, "other": 1}',
            "y.1.jpeg": b"", "3.png": png(3), "4.cls": b"1", "5.json": b'{"text": "no label"}',
            "5.png": png(5),
        },
    )  # fmt: skip
    with caplog.at_level("WARNING", logger="unimim"):
        found = read_shard(shard)
    assert found.names == ["x/1.png", "x/2.JPG", "3.png", "5.png"]
    assert found.labels == [3, 7, -1, -1]
    assert "without an image are left out" in caplog.text and "1 of cls" in caplog.text
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone\.tar cannot be read: No such file"):
        index_of([shard, tmp_path / "gone.tar"])
    for name, content, reason in (
        ("1.cls", b"cat", "no class number"), ("1.cls", b"10000000000", "use 0 to 999999"),
        ("1.json", b'{"label": 2.5}', "the label 2.5, not a class number"),
    ):  # fmt: skip
        write_tar(tmp_path / "b.tar", {"1.png": png(1), name: content})
        with pytest.raises(ValueError, match=rf"b\.tar@/{name} holds .*{reason}"):
            read_shard(tmp_path / "b.tar")


def test_labels_are_needed_where_they_are_needed(tmp_path, caplog):
    members = {f"{k}.png": png(k) for k in range(4)} | {"1.cls": b"1"}
    write_tar(tmp_path / "a/0.tar", dict(sorted(members.items())))
    write_tar(tmp_path / "b/0.tar", {"0.png": png(0)})
    some = str(tmp_path / "a")
    assert len(build_source("tar", some, train=True, need_labels=False)) == 4
    with caplog.at_level("WARNING", logger="unimim"):
        source = build_source("tar", some, train=True, need_labels=True)
    assert len(source) == 1 and source.labels.tolist() == [1] and source.classes == ["0", "1"]
    assert "3 samples have no label" in caplog.text
    with pytest.raises(ValueError, match=r"have no labels: give each a \.cls member"):
        build_source("tar", str(tmp_path / "b"), train=True, need_labels=True)


# --------------------------------------------------------------------------------------------------
# The index


def test_the_index_is_kept_beside_the_shards_and_renewed_where_they_change(packed, monkeypatch):
    read = []
    original = shards.read_shard
    monkeypatch.setattr(shards, "read_shard", lambda shard: read.append(shard) or original(shard))
    paths = shards_of(packed, train=True)
    first = index_of(paths)
    assert read == paths and len(list(paths[0].parent.glob(".unimim-*.tarindex"))) == 1
    again = index_of(paths)
    assert len(read) == 3 and differing_arrays(first, again) == []
    write_tar(paths[1], {"new.png": png(5), "new.cls": b"2"})
    renewed = index_of(paths)
    assert read[3:] == [paths[1]] and renewed["counts"].tolist() == [25, 1, 10]
    files = TarFiles(paths, renewed)
    assert files.names[25] == "new.png" and files.read(25) == png(5)
    assert files.names[26] == TarFiles(paths, first).names[50]
    assert renewed["labels"][25] == 2 and (renewed["labels"][26:] == first["labels"][50:]).all()


def differing_arrays(ours: dict, theirs: dict) -> list[str]:
    return [name for name in ours if not np.array_equal(ours[name], theirs[name])]


def test_a_damaged_index_is_made_again_and_a_read_only_folder_needs_none(packed, monkeypatch):
    paths = shards_of(packed, train=True)
    first = index_of(paths)
    (beside,) = paths[0].parent.glob(".unimim-*.tarindex")
    beside.write_bytes(beside.read_bytes()[:100])
    assert differing_arrays(first, index_of(paths)) == []
    beside.unlink()
    original = shard_index.write_atomically

    def refuse(path, write):
        if path.parent == paths[0].parent:
            raise PermissionError("read-only")
        original(path, write)

    monkeypatch.setattr(shard_index, "write_atomically", refuse)
    assert differing_arrays(first, index_of(paths)) == [] and not beside.exists()
    read = []
    monkeypatch.setattr(shards, "read_shard", read.append)
    assert differing_arrays(first, index_of(paths)) == [] and read == []


# --------------------------------------------------------------------------------------------------
# Reading


def test_broken_members_are_replaced_like_those_of_zips(tmp_path, packed, caplog):
    paths = shards_of(packed, train=True)
    index_of(paths)
    state = paths[2].stat()
    last = read_shard(paths[2])
    os.truncate(paths[2], last.offsets[-1] + 10)
    with caplog.at_level("WARNING", logger="unimim"):
        source = build_source("tar", packed, train=True, need_labels=False)
    assert "ends early" in caplog.text and state.st_size != paths[2].stat().st_size
    with pytest.raises(BrokenImageError, match="ends inside"):
        source.read(len(source) - 1)
    dataset = ImageDataset(source, lambda raw, rng: {"bytes": len(raw)}, seed=0, max_bad_images=1)
    sample = dataset[0, len(source) - 1]
    assert sample["index"] != len(source) - 1 and dataset.bad.sorted() == [len(source) - 1]


def test_what_follows_a_damaged_header_is_not_lost_in_silence(tmp_path, caplog):
    shard = write_tar(tmp_path / "a.tar", {f"{k}.png": png(k) for k in range(4)})
    with caplog.at_level("WARNING", logger="unimim"):
        whole = read_shard(shard)
    assert len(whole.names) == 4 and not caplog.text
    header = whole.offsets[2] - 512
    with shard.open("r+b") as file:
        file.seek(header)
        file.write(b"x" * 512)
    with caplog.at_level("WARNING", logger="unimim"):
        assert read_shard(shard).names == whole.names[:2]
    assert f"is cut or damaged after {header} bytes: the rest is not read" in caplog.text


def test_shards_of_two_folders_that_look_alike_are_told_apart(tmp_path):
    """Names, sizes and times are the same; the one that does not change keeps its own index."""
    shards = [write_tar(tmp_path / f"{k}/0.tar", {f"{k}.png": png(k)}) for k in range(3)]
    for shard in shards:
        os.utime(shard, (1, 1))
    index_of(shards)
    write_tar(shards[2], {"new.png": png(5)})
    files = TarFiles(shards, index_of(shards))
    assert [files.names[k] for k in range(3)] == ["0.png", "1.png", "new.png"]


def test_no_tar_and_a_compressed_one_are_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as a tar"):
        read_shard(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.add(tmp_path / "a.tar", "a.png")
    with pytest.raises(ValueError, match="a compressed one must be unpacked first"):
        read_shard(tmp_path / "b.tar")


def test_few_shards_are_open_and_none_is_pickled(packed, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    paths = shards_of(packed, train=True)
    files = TarFiles(paths, index_of(paths))
    contents = [files.read(index) for index in (0, 30, 59, 0)]
    assert contents[0] == contents[3] and len(files._open) == 2
    copy = pickle.loads(pickle.dumps(files))
    assert not copy._open and copy.read(30) == contents[1] and len(copy) == IMAGES
    assert "train-000001.tar@/000000030.png" in copy.path(30)


def test_packing_twice_gives_the_same_bytes_and_spoils_nothing(tmp_path, folder, packed, capsys):
    pack([str(folder), str(tmp_path / "again/train"), "--images_per_shard", "25"])
    for shard in (tmp_path / "again").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "shards" / shard.name).read_bytes()
    with pytest.raises(SystemExit):
        pack([str(folder), str(tmp_path / "again/train")])
    assert "exists; remove the shards of that prefix" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Runs


def tar_run(folder: Path, packed: str, *flags: str):
    data = ("--data_set", "tar", "--data_path", packed)
    return start("pretrain", folder, *MAE, *data, *flags)


def test_a_run_on_shards_is_the_run_on_files_and_resumes_exactly(tmp_path, folder, packed):
    """The same images in the same order with the same masks, by workers too; then in mid-epoch."""
    files, _ = start(
        "pretrain", tmp_path / "files_run", *MAE, "--data_set", "image_folder",
        "--data_path", str(folder),
    )  # fmt: skip
    whole, _ = tar_run(tmp_path / "whole", packed)
    assert train_steps(files, 0, 6) == train_steps(whole, 0, 6)
    ours, theirs = (dict(run.task.state_dict()) for run in (files, whole))
    assert differing(ours, theirs) == []
    first, _ = tar_run(tmp_path / "resumed", packed, "--num_workers", "1")
    train_steps(first, 0, 3)
    first.session.save(Position(0, 3), finished=False)
    second, position = tar_run(tmp_path / "resumed", packed)
    assert (position.epoch, position.step) == (0, 3)
    train_steps(second, 3, 6)
    assert differing(dict(second.task.state_dict()), ours) == []


def test_workers_read_what_the_process_reads(tmp_path, packed):
    run, _ = tar_run(tmp_path / "a", packed, "--num_workers", "2")
    run.loader.batch_sampler.set_position(0, 0)
    alone, _ = tar_run(tmp_path / "b", packed)
    alone.loader.batch_sampler.set_position(0, 0)
    for ours, theirs in zip(grouped(run.loader, 1), grouped(alone.loader, 1), strict=True):
        assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ("image", "noise"))
    index = json.loads(bytes(index_of(shards_of(packed, train=True))["about"]))
    assert [name for name, _, _ in index["shards"]] == [f"train-00000{k}.tar" for k in range(3)]
