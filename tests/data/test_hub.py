"""--data_set hf: which parquet or arrow files and columns, the hub's cache, the index, reading in
place, and that a run on such files is the run on a zip."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import DECODER, SIZE, differing, png, start, train_steps
from PIL import Image

from datasets import BadImagesError, ImageDataset, fingerprint
from engine_for_pretraining import grouped
from scripts.tools.tar_dataset import main as pack
from scripts.tools.zip_dataset import zip_folder
from unimim.data import arrow, parquet
from unimim.data.arrow import index_of as index_arrow
from unimim.data.classes import check_classes, settle_classes
from unimim.data.hub import files_of
from unimim.data.jpeg import BrokenImageError
from unimim.data.parquet import ParquetFiles, index_of
from unimim.data.part_maps import image_names, png_names
from unimim.data.sources import build_source, detect, digits_source, is_divided
from unimim.engine.session import Position

pytestmark = pytest.mark.usefixtures("own_temporary_folder")

IMAGES = 60
MAE = ("--model", "mae_tiny_patch16_224", "--model_kwargs", *SIZE, *DECODER)
NAMES = [f"digit {label}" for label in range(10)]
UNLABELED = {"train": True, "need_labels": False}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def row(value: int, path: str | None = None) -> dict:
    return {"bytes": png(value), "path": path}


def table_of(
    images: list,
    labels: list | None = None,
    *,
    names: list[str] | None = None,
    kind: pa.DataType = STRUCT,
    columns: tuple[str, str] = ("image", "label"),
) -> pa.Table:
    """Return a table as the library `datasets` makes it, with its description of the columns."""
    arrays = {columns[0]: pa.array(images, kind)}
    features = {columns[0]: {"_type": "Image"}}
    if labels is not None:
        arrays[columns[1]] = pa.array(labels, pa.int64())
        features[columns[1]] = {"_type": "Value", "dtype": "int64"}
    if names is not None:
        features[columns[1]] = {"_type": "ClassLabel", "names": names}
    about = json.dumps({"info": {"features": features}})
    return pa.table(arrays).replace_schema_metadata({"huggingface": about})


def write_parquet(path: Path, *rows: list, group: int = 7, **about) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table_of(*rows, **about), path, row_group_size=group, write_page_checksum=True,
        compression="none",
    )  # fmt: skip
    return path


def write_arrow(
    path: Path, *rows: list, batch: int = 7, write=pa.ipc.new_stream, compression=None, **about
) -> Path:
    table = table_of(*rows, **about)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with write(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def write_state(folder: Path, **more) -> Path:
    """Write what `datasets.save_to_disk` says of the arrow files in a folder."""
    files = [{"filename": file.name} for file in sorted(folder.glob("data-*.arrow"))]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None, **more}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture
def zipped(tmp_path) -> Path:
    """Digits in a zip with a map file."""
    source = digits_source(train=True)
    lines = []
    for index in range(IMAGES):
        name = f"{index:03d}.png"
        (tmp_path / "zip/images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.read(index)).save(tmp_path / "zip/images" / name)
        lines.append(f"{name}\t{source.labels[index]}\n")
    zip_folder(tmp_path / "zip/images", tmp_path / "zip/train.zip")
    (tmp_path / "zip/train_map.txt").write_text("".join(lines))
    return tmp_path / "zip"


class Rows:
    """Those of the zip, as a data set of the hub has them."""

    def __init__(self, zipped: Path):
        listed = [line.split("\t") for line in (zipped / "train_map.txt").read_text().splitlines()]
        self.images = [
            {"bytes": (zipped / "images" / name).read_bytes(), "path": name} for name, _ in listed
        ]
        self.labels = [int(label) for _, label in listed]

    def write(self, write, path: Path, first: int, last: int) -> Path:
        return write(path, self.images[first:last], self.labels[first:last], names=NAMES)


@pytest.fixture
def hub(tmp_path, zipped) -> Path:
    """The same images as a repository of the hub: three files in `data`, and one for validation."""
    rows, data = Rows(zipped), tmp_path / "hub/data"
    for number, (first, last) in enumerate(((0, 25), (25, 50), (50, 60))):
        rows.write(write_parquet, data / f"train-{number:05d}-of-00003.parquet", first, last)
    rows.write(write_parquet, data / "validation-00000-of-00001.parquet", 0, 20)
    return tmp_path / "hub"


@pytest.fixture
def saved(tmp_path, zipped) -> Path:
    """The same images as `datasets.save_to_disk` writes them: a folder for each split."""
    rows, root = Rows(zipped), tmp_path / "saved"
    for number, (first, last) in enumerate(((0, 30), (30, 60))):
        rows.write(write_arrow, root / f"train/data-{number:05d}-of-00002.arrow", first, last)
    rows.write(write_arrow, root / "test/data-00000-of-00001.arrow", 0, 20)
    rows.write(write_arrow, root / "train/cache-0123.arrow", 0, 9)  # of Dataset.map
    write_state(root / "train")
    write_state(root / "test")
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return root


def images_of(source) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


# --------------------------------------------------------------------------------------------------
# Which files and columns


def test_a_path_names_a_folder_a_file_or_a_pattern(tmp_path, hub, caplog):
    data = hub / "data"
    trained = [data / f"train-0000{k}-of-00003.parquet" for k in range(3)]
    assert files_of(str(hub), train=True) == files_of(str(data), train=True) == trained
    assert files_of(f"{data}/train-*.parquet", train=False) == trained
    assert files_of(f"{data}/train-{{00000..00001}}-of-00003.parquet", train=True) == trained[:2]
    assert files_of(str(trained[1]), train=True) == trained[1:2]
    held_out = files_of(str(hub), train=False)
    assert [file.name for file in held_out] == ["validation-00000-of-00001.parquet"]
    for path in (str(hub), str(data), str(trained[0]), f"{data}/train-*.parquet"):
        assert detect(path) == "hf"
    assert is_divided("hf", str(hub)) and not is_divided("hf", str(trained[0]))

    trained[1].unlink()
    with caplog.at_level("WARNING", logger="unimim"):
        assert len(files_of(str(hub), train=True)) == 2
    assert "there are 2 of 3 files" in caplog.text
    with pytest.raises(ValueError, match=r"9\.parquet does not exist; .* hf download"):
        files_of(f"{data}/9.parquet", train=True)


def test_splits_may_be_folders_and_test_stands_in_for_validation(tmp_path):
    for name in ("a/train/0000", "a/validation/0000", "b/train-0", "b/test-0", "c/0", "c/1"):
        write_parquet(tmp_path / f"{name}.parquet", [row(1)])
    assert files_of(str(tmp_path / "a"), train=True) == [tmp_path / "a/train/0000.parquet"]
    assert files_of(str(tmp_path / "a"), train=False) == [tmp_path / "a/validation/0000.parquet"]
    assert files_of(str(tmp_path / "b"), train=False) == [tmp_path / "b/test-0.parquet"]
    assert len(files_of(str(tmp_path / "c"), train=True)) == 2
    with pytest.raises(ValueError, match=r"holds no files .*test\*\.parquet; name some with"):
        files_of(str(tmp_path / "c"), train=False)


def test_a_folder_of_save_to_disk_has_the_files_of_its_state(tmp_path, saved, hub):
    assert detect(str(saved)) == detect(str(saved / "train")) == "hf"
    assert is_divided("hf", str(saved)) and not is_divided("hf", str(saved / "train"))
    for train, rows in ((True, IMAGES), (False, 20)):
        ours = build_source(None, str(saved), train=train, need_labels=True)
        theirs = build_source(None, str(hub), train=train, need_labels=True)
        assert images_of(ours) == images_of(theirs) and len(ours) == rows
        assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == theirs.classes
    assert ours.path(3) == f"{saved}/test/data-00000-of-00001.arrow@/3/003.png"

    # one that is not divided is for training, unless --eval_data_path names it
    one = {"need_labels": True, "train": False}
    test = build_source("hf", str(saved / "test"), train_path=str(saved / "train"), **one)
    assert images_of(test) == images_of(ours)
    with pytest.raises(ValueError, match="name some with --eval_data_path"):
        build_source("hf", str(saved / "test"), train_path=str(saved / "test"), **one)


def test_folders_of_save_to_disk_that_cannot_be_read_are_told_why(saved):
    root = str(saved)
    write_state(saved / "train", _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(ValueError, match=r"was shuffled or .*\.flatten_indices\(\)\.save_to_disk"):
        files_of(root, train=True)
    (saved / "train/state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json is not what datasets\.save_to_disk writes"):
        files_of(root, train=True)
    write_state(saved / "train")
    (saved / "train/data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"lists data-00001-of-00002\.arrow, which is missing"):
        files_of(root, train=True)
    (saved / "train").rename(saved / "part")
    with pytest.raises(
        ValueError, match="holds the splits part, test, and none of train; name one"
    ):
        files_of(root, train=True)
    (saved / "test").rename(saved / "rest")
    with pytest.raises(ValueError, match=r"splits part, rest, .*; name some with --eval_data_path"):
        files_of(root, train=False)


def test_splits_in_the_cache_of_datasets_follow_the_name_of_the_data_set(tmp_path):
    shards = ("beans-train-00000-of-00002", "beans-train-00001-of-00002")
    for name in (*shards, "beans-test", "cache-1"):
        write_arrow(tmp_path / f"{name}.arrow", [row(1)])
    trained = [tmp_path / f"{name}.arrow" for name in shards]
    assert files_of(str(tmp_path), train=True) == trained
    assert files_of(str(tmp_path), train=False) == [tmp_path / "beans-test.arrow"]
    write_parquet(tmp_path / "train-0.parquet", [row(1)])
    with pytest.raises(ValueError, match=r"parquet files and arrow files; .*/\*\.parquet'"):
        files_of(str(tmp_path), train=True)


def test_a_data_set_of_the_hub_is_looked_up_in_its_cache(tmp_path, hub, monkeypatch):
    cache = tmp_path / "home/hub/datasets--user--digits.10"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    wanted = r"user/digits\.10 does not exist, .*; download it by: hf .* dataset user/digits\.10$"
    with pytest.raises(ValueError, match=wanted):
        build_source(None, "user/digits.10", **UNLABELED)
    with pytest.raises(ValueError, match=wanted):
        build_source("hf", "user/digits.10", **UNLABELED)

    # links to files named by their contents, as the hub's tools keep them
    snapshot = cache / "snapshots/89ab/data"
    snapshot.mkdir(parents=True)
    for number, file in enumerate((hub / "data").glob("*.parquet")):
        (cache / "blobs").mkdir(exist_ok=True)
        (snapshot / file.name).symlink_to(file.rename(cache / "blobs" / f"c0de{number}"))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("89ab")
    assert is_divided("hf", "user/digits.10") and detect("user/digits.10/data") == "hf"
    source = build_source(None, "user/digits.10", **UNLABELED)
    assert len(source) == IMAGES
    assert source.path(0) == f"{snapshot}/train-00000-of-00003.parquet@/0/000.png"
    assert len(build_source("hf", "user/digits.10/data/val*.parquet", **UNLABELED)) == 20
    (cache / "blobs/c0de1").rename(cache / "blobs/c0de1.incomplete")
    with pytest.raises(ValueError, match="is a link to a file that is gone; download it again"):
        for train in (True, False):
            files_of(str(snapshot), train=train)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=wanted):
        detect("user/digits.10")
    (tmp_path / "user/digits.10").mkdir(parents=True)  # a folder comes first
    assert detect("user/digits.10") == "image_folder"


def test_images_are_structs_or_plain_bytes_under_several_names(tmp_path):
    plain, large = [png(k) for k in range(3)], [png(k + 3) for k in range(3)]
    files = (
        write_parquet(tmp_path / "a.parquet", plain, [4, None, 1], kind=pa.binary()),
        write_parquet(
            tmp_path / "b.parquet", large, [1, 2, 3], kind=pa.large_binary(),
            columns=("picture", "fine_label"), names=["a", "b", "c", "d"],
        ),
        write_parquet(tmp_path / "c.parquet", [row(7, "x/seven.png")], columns=("img", "-")),
    )  # fmt: skip
    sources = [build_source("hf", str(f), **UNLABELED) for f in files]
    assert [images_of(source) for source in sources] == [plain, large, [png(7)]]
    assert [source.labels.tolist() for source in sources] == [[4, -1, 1], [1, 2, 3], [-1]]
    assert sources[1].classes == ["a", "b", "c", "d"] and len(sources[0].classes) == 5
    assert sources[2].path(0) == f"{files[2]}@/0/seven.png"
    assert sources[0].path(1) == f"{files[0]}@/1"
    table = pa.table({"text": ["no", "image"]})
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet has no column of images.* it has text"):
        build_source("hf", str(tmp_path / "d.parquet"), **UNLABELED)


# --------------------------------------------------------------------------------------------------
# Labels


def test_names_of_labels_settle_and_check_the_number_of_classes(hub):
    def dataset(train: bool) -> ImageDataset:
        source = build_source("hf", str(hub), train=train, need_labels=True, train_path=str(hub))
        return ImageDataset(source, None, seed=0)

    class Flags:
        nb_classes = None

    assert dataset(True).source.classes[3] == "digit 3"
    settle_classes(Flags, dataset(False))
    assert Flags.nb_classes == 10
    Flags.nb_classes = 9
    with pytest.raises(ValueError, match="--nb_classes 9 is too few: the data set has 10 classes"):
        check_classes(Flags, dataset(True))


def test_files_of_other_classes_and_labels_without_a_name_are_refused(tmp_path, caplog):
    a = write_parquet(tmp_path / "a/train-0.parquet", [row(0)], [0], names=["cat", "dog"])
    b = write_parquet(tmp_path / "a/train-1.parquet", [row(1)], [0], names=["dog", "cat"])
    write_parquet(tmp_path / "a/test-0.parquet", [row(1)], [0], names=["dog", "cat"])
    with pytest.raises(ValueError, match=rf"{b} names other classes than {a}"):
        build_source("hf", str(tmp_path / "a"), **UNLABELED)
    b.unlink()
    path = str(tmp_path / "a")
    with pytest.raises(ValueError, match=r"test-0\.parquet names other classes than the training"):
        build_source("hf", path, train=False, need_labels=True, train_path=path)
    c = write_parquet(tmp_path / "c.parquet", [row(0), row(1)], [0, 2], names=["cat", "dog"])
    with pytest.raises(ValueError, match=rf"{c}@/1 has the label 2, but the file names 2 classes"):
        build_source("hf", str(c), train=True, need_labels=True)
    d = write_parquet(tmp_path / "d.parquet", [row(0), row(1)], [0, -2])
    with pytest.raises(ValueError, match=rf"{d}@/1 has the label -2; use 0 to"):
        build_source("hf", str(d), **UNLABELED)


def test_labels_are_needed_where_they_are_needed(tmp_path, caplog):
    some = str(write_parquet(tmp_path / "a.parquet", [row(0), row(1)], [-1, 1]))
    none = str(write_parquet(tmp_path / "b.parquet", [row(0)]))
    with caplog.at_level("WARNING", logger="unimim"):
        source = build_source("hf", some, train=True, need_labels=True)
    assert source.labels.tolist() == [1] and source.read(0) == png(1)
    assert "1 samples have no label" in caplog.text
    assert len(build_source("hf", none, **UNLABELED)) == 1
    with pytest.raises(ValueError, match="have no labels: they need a column 'label'"):
        build_source("hf", none, train=True, need_labels=True)


# --------------------------------------------------------------------------------------------------
# The index


def test_the_index_is_kept_beside_the_files_and_renewed_where_they_change(hub, monkeypatch):
    read = []
    original = parquet.read_file
    monkeypatch.setattr(parquet, "read_file", lambda file: read.append(file) or original(file))
    files = files_of(str(hub), train=True)
    first = index_of(files)
    assert read == files and len(list((hub / "data").glob(".unimim-*.parquetindex"))) == 1
    assert first["group_rows"].tolist() == [7, 7, 7, 4, 7, 7, 7, 4, 7, 3]
    again = index_of(files)
    assert len(read) == 3 and all(np.array_equal(first[name], again[name]) for name in first)
    write_parquet(files[1], [row(5)], [2], names=NAMES)
    renewed = index_of(files)
    assert read[3:] == [files[1]] and renewed["counts"].tolist() == [25, 1, 10]
    images = ParquetFiles(files, renewed)
    before = ParquetFiles(files, first)
    assert images.read(25) == png(5) and images.names[26] == before.names[50]
    assert renewed["labels"][25] == 2 and (renewed["labels"][26:] == first["labels"][50:]).all()
    assert before.read(0) == images.read(0)
    with pytest.raises(BrokenImageError, match="has changed since the run began"):
        before.read(30)  # a row of the file that is another one now


# --------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("kept", [2**27, 2000, 0])
def test_row_groups_are_kept_within_bounds_and_large_ones_are_streamed(
    hub, zipped, kept, monkeypatch
):
    monkeypatch.setattr(parquet, "KEPT_BYTES", kept)
    monkeypatch.setattr(parquet, "STREAM_ROWS", 2)
    monkeypatch.setattr(parquet, "OPEN_FILES", 2)
    files = files_of(str(hub), train=True)
    images = ParquetFiles(files, index_of(files))
    expected = images_of(build_source("IMNET", str(zipped), **UNLABELED))
    order = np.random.default_rng(0).permutation(IMAGES).tolist()
    assert [images.read(index) for index in order] == [expected[index] for index in order]
    held = sum(chunk.nbytes for chunks in images._kept.values() for chunk in chunks)
    assert held == images._kept_bytes and (held <= kept or len(images._kept) == 1)
    assert len(images._open) == 2 and (len(images._kept) == 10) == (kept == 2**27)
    copy = pickle.loads(pickle.dumps(images))
    assert not copy._open and not copy._kept and copy.read(30) == expected[30]


def test_names_are_of_files_and_rows(hub):
    source = build_source("hf", str(hub), **UNLABELED)
    assert source.path(26) == f"{hub}/data/train-00001-of-00003.parquet@/1/026.png"
    assert len(set(png_names(image_names(source)))) == IMAGES
    other = build_source("hf", str(hub), train=False, need_labels=False)
    assert fingerprint(ImageDataset(source, None, seed=0)) != fingerprint(
        ImageDataset(other, None, seed=0)
    )


def test_broken_rows_are_replaced_like_those_of_zips(tmp_path, caplog):
    rows = [row(k) for k in range(40)]
    rows[3], rows[5] = {"bytes": None, "path": "elsewhere.png"}, None
    whole = write_parquet(tmp_path / "a.parquet", rows, group=10)
    source = build_source("hf", str(whole), **UNLABELED)
    dataset = ImageDataset(source, lambda raw, rng: {"bytes": len(raw)}, seed=0, max_bad_images=2)
    with caplog.at_level("WARNING", logger="unimim"):
        used = [dataset[0, index]["index"] for index in (3, 4, 5)]
    assert used[1] == 4 and not {3, 5} & set(used) and dataset.bad.sorted() == [3, 5]
    assert f"{whole}@/3/elsewhere.png is replaced by another: the row holds no" in caplog.text

    content = bytearray(whole.read_bytes())
    at = content.index(png(22))  # in a page of the third row group
    content[at + 20] ^= 255
    whole.write_bytes(content)
    os.utime(whole, (0, 0))
    source = build_source("hf", str(whole), **UNLABELED)
    assert source.read(0) == png(0) and source.read(39) == png(39)
    with pytest.raises(BrokenImageError, match="its row group cannot be read"):
        source.read(22)
    dataset = ImageDataset(source, lambda raw, rng: {"bytes": len(raw)}, seed=0, strict=True)
    with pytest.raises(BadImagesError, match=rf"{whole}@/22"):
        dataset[0, 22]


def test_arrow_files_are_read_where_their_bytes_lie(tmp_path, monkeypatch):
    """Of every layout, without pyarrow once the index is made; rows without bytes are broken."""
    rows = [png(k) for k in range(20)]
    struct = [{"bytes": None, "path": "x.png"}, None, *map(row, range(2, 20))]
    files = (
        write_arrow(tmp_path / "a.arrow", struct, list(range(20))),
        write_arrow(tmp_path / "b.arrow", [None, None, *rows[2:]], kind=pa.large_binary(), batch=2),
        write_arrow(tmp_path / "c.arrow", [None, None, *rows[2:]], kind=pa.binary(), batch=99),
        write_arrow(tmp_path / "d.arrow", struct, write=pa.ipc.new_file),
        write_arrow(tmp_path / "e.arrow", []),
    )
    pattern = str(tmp_path / "{a,b,c,d,e}.arrow")
    source = build_source(None, pattern, **UNLABELED)
    again = index_arrow(files)
    assert again["labels"].tolist() == [*range(20), *[-1] * 60]
    for name in ("arrow", "columns"):
        monkeypatch.delattr(f"unimim.data.{name}.pyarrow_module")
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).permutation(80).tolist()
    for index in order:
        if index % 20 > 1:
            assert copy.read(index) == rows[index % 20]
            continue
        with pytest.raises(BrokenImageError, match="the row holds no bytes"):
            copy.read(index)
    assert source.path(0) == f"{files[0]}@/0/x.png" and source.path(21) == f"{files[1]}@/1"


def test_only_arrow_files_that_change_are_gone_through_again(saved, monkeypatch):
    read, original = [], arrow.read_file
    monkeypatch.setattr(arrow, "read_file", lambda file: read.append(file) or original(file))
    files = files_of(str(saved), train=True)
    index_arrow(files)
    assert read == files and len(list((saved / "train").glob(".unimim-*.arrowindex"))) == 1
    write_arrow(files[0], [row(5)], [2], names=NAMES)
    source = build_source(None, str(saved), **UNLABELED)
    assert read[2:] == files[:1] and len(source) == 31 and source.read(0) == png(5)


def test_damaged_arrow_files_are_told(tmp_path, caplog):
    whole = write_arrow(tmp_path / "a.arrow", [row(k) for k in range(20)])
    content = whole.read_bytes()
    source = build_source(None, str(whole), **UNLABELED)
    whole.write_bytes(content[: content.index(png(17)) + 9])  # while a run reads it
    assert source.read(16) == png(16)
    for index in (17, 18):
        with pytest.raises(BrokenImageError, match="the file ends inside this image"):
            source.read(index)
    with pytest.raises(ValueError, match=r"a\.arrow is cut or damaged after 14 rows: .*; copy"):
        build_source(None, str(whole), **UNLABELED)

    whole.write_bytes(content[:-8])
    with caplog.at_level("WARNING", logger="unimim"):
        assert len(build_source(None, str(whole), **UNLABELED)) == 20
    assert "has no end mark: it may have been cut after these 20 rows" in caplog.text
    ends = np.cumsum([0, *[len(png(k)) for k in range(7)]], dtype=np.int32).tobytes()
    at = content.index(ends)  # where the first batch says that its images end
    whole.write_bytes(content[: at + 4] + b"\xff" * 4 + content[at + 8 :])
    with pytest.raises(ValueError, match=r"a\.arrow cannot be read as an arrow file: .*offset"):
        build_source(None, str(whole), **UNLABELED)
    (tmp_path / "b.arrow").write_bytes(b"no arrow at all" * 100)
    (tmp_path / "c.arrow").touch()
    for name in "bc":
        with pytest.raises(ValueError, match=rf"{name}\.arrow cannot be read as an arrow file"):
            build_source(None, str(tmp_path / f"{name}.arrow"), **UNLABELED)


def test_arrow_files_of_paths_and_compressed_ones_are_refused(tmp_path):
    paths = [{"bytes": None, "path": f"/images/{k}.png"} for k in range(3)]
    with pytest.raises(ValueError, match=r"a\.arrow holds the bytes of no image.* save_to_disk"):
        build_source(None, str(write_arrow(tmp_path / "a.arrow", paths)), **UNLABELED)
    packed = write_arrow(tmp_path / "b.arrow", [row(1)], compression="lz4")
    with pytest.raises(ValueError, match=r"b\.arrow is compressed, .*; write it without"):
        build_source(None, str(packed), **UNLABELED)


def test_no_parquet_file_and_missing_pyarrow_are_told(tmp_path, hub, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all" * 100)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as a parquet file"):
        build_source(None, str(tmp_path / "a.parquet"), **UNLABELED)
    damaged = write_arrow(tmp_path / "b.arrow", [row(k, "name.png") for k in range(3)])
    damaged.write_bytes(damaged.read_bytes().replace(b"name.png", b"\xffame.png"))
    table = pa.ipc.open_stream(damaged).read_all()
    pq.write_table(table, tmp_path / "b.parquet")
    for kind in ("arrow", "parquet"):  # names that are no UTF-8
        with pytest.raises(ValueError, match=rf"b\.{kind} cannot be read as an? {kind} file"):
            build_source(None, str(tmp_path / f"b.{kind}"), **UNLABELED)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="--data_set hf needs pyarrow: pip install pyarrow"):
        build_source(None, str(hub), **UNLABELED)


def test_they_are_packed_into_tars_with_the_same_bytes_and_labels(tmp_path, hub):
    pack([str(hub), str(tmp_path / "shards/train"), "--images_per_shard", "25"])
    pack([str(hub / "data/validation-*.parquet"), str(tmp_path / "shards/val")])
    for train in (True, False):
        ours = build_source("hf", str(hub), train=train, need_labels=True)
        theirs = build_source("tar", str(tmp_path / "shards"), train=train, need_labels=True)
        assert images_of(ours) == images_of(theirs)
        assert ours.labels.tolist() == theirs.labels.tolist()
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) == 3
    rows = [{"bytes": data, "path": None} for data in (png(1), None, b"no image", png(2))]
    path = write_parquet(tmp_path / "some.parquet", rows)
    pack([str(path), str(tmp_path / "some")])
    assert images_of(build_source("tar", str(tmp_path / "some-000000.tar"), **UNLABELED)) == [
        png(1),
        png(2),
    ]


# --------------------------------------------------------------------------------------------------
# Runs


def run_on(folder: Path, kind: str, path: Path, *flags: str):
    data = ("--data_set", kind, "--data_path", str(path))
    return start("pretrain", folder, *MAE, *data, *flags)


def test_a_run_on_tables_is_the_run_on_a_zip_and_resumes_exactly(tmp_path, hub, saved, zipped):
    """The same images in the same order with the same masks, by workers too; then in mid-epoch."""
    files, _ = run_on(tmp_path / "zip_run", "IMNET", zipped)
    losses = train_steps(files, 0, 6)
    expected = dict(files.task.state_dict())
    for path in (hub, saved):
        first, _ = run_on(tmp_path / "resumed" / path.name, "hf", path, "--num_workers", "1")
        before = train_steps(first, 0, 3)
        first.session.save(Position(0, 3), finished=False)
        second, position = run_on(tmp_path / "resumed" / path.name, "hf", path)
        assert (position.epoch, position.step) == (0, 3)
        assert before + train_steps(second, 3, 6) == losses
        assert differing(dict(second.task.state_dict()), expected) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_of_ranks_and_workers_are_those_of_a_zip(tmp_path, hub, saved, zipped, rank):
    def batches(kind: str, path: Path, workers: int) -> list[dict]:
        run, _ = run_on(tmp_path / f"run_{path.name}", kind, path, "--num_workers", str(workers))
        sampler = run.loader.batch_sampler
        sampler.rank, sampler.world_size, sampler.batches = rank, 2, 3
        sampler.set_position(1, 0)
        return [micro[0] for micro in grouped(run.loader, 1)]

    theirs = batches("IMNET", zipped, 0)
    for path in (hub, saved):
        ours = batches("hf", path, 2)
        assert len(ours) == 3
        for one, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("image", "noise", "index"))
