"""Part maps on disk: the three forms hold the same maps, mistakes are named, writing goes on where
it stopped."""

import multiprocessing
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimim.data.part_maps import (
    SCORES,
    MissingMapError,
    PartMaps,
    PartMapWriter,
    PartMeta,
    file_sha256,
    names_sha256,
    png_of,
    write_zip,
)

NAMES = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "b/3.jpg"]
META = PartMeta(7, (3, 4), len(NAMES), background_id=0, names_sha256=names_sha256(NAMES))


def some_maps() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 7, (len(NAMES), 3, 4)).astype(np.uint8)


def write_array(folder: Path, maps: np.ndarray, meta: PartMeta = META) -> Path:
    PartMapWriter.create(folder, meta)
    writer = PartMapWriter(folder)
    for index, parts in enumerate(maps):
        writer.write(index, parts)
    writer.flush()
    return folder


def write_folder(folder: Path, maps: np.ndarray) -> Path:
    for name, parts in zip(NAMES, maps, strict=True):
        file = (folder / name).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png_of(parts))
    (folder / "parts_meta.json").write_text(META.to_json())
    return folder


@pytest.fixture(params=["array", "array_file", "folder", "zip"])
def maps_path(request, tmp_path) -> Path:
    """The same maps in each form."""
    if request.param == "folder":
        return write_folder(tmp_path / "pngs", some_maps())
    folder = write_array(tmp_path / "parts", some_maps())
    if request.param == "zip":
        write_zip(PartMaps.open(folder), tmp_path / "parts.zip", NAMES)
        return tmp_path / "parts.zip"
    return folder / "parts.npy" if request.param == "array_file" else folder


def read_in_child(maps: PartMaps, index: int, queue) -> None:
    queue.put(maps.read(index))


def test_every_form_gives_the_same_maps(maps_path):
    maps = PartMaps.open(maps_path, num_images=len(NAMES), paths=NAMES)
    assert (maps.num_parts, maps.grid, len(maps)) == (7, (3, 4), 5)
    assert np.array_equal(np.stack([maps.read(index) for index in range(5)]), some_maps())
    assert maps.read(2).dtype == np.uint8


def test_forked_and_spawned_workers_read_maps_that_were_opened_here(maps_path):
    maps = PartMaps.open(maps_path, paths=NAMES)
    maps.read(0)  # so that a fork inherits an open file
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(maps, 3, queue))
    child.start()
    assert np.array_equal(queue.get(timeout=60), some_maps()[3])
    child.join()
    assert np.array_equal(
        pickle.loads(pickle.dumps(maps)).read(3), some_maps()[3]
    )  # what a spawned worker gets


def test_pickling_sends_no_maps(tmp_path):
    meta = replace(META, num_images=20000, names_sha256=None)
    PartMapWriter.create(tmp_path, meta)
    assert len(pickle.dumps(PartMaps.open(tmp_path))) < 2000


def test_a_row_of_255_is_a_missing_map(tmp_path):
    maps = PartMaps.open(write_array(tmp_path, some_maps()[:4]))
    with pytest.raises(MissingMapError, match=r"parts\.npy\[4\] has not been written"):
        maps.read(4)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_an_image_without_a_png_is_named(tmp_path, form):
    path = write_folder(tmp_path / "pngs", some_maps())
    (path / "b/2.png").unlink()
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "pngs.zip", "w") as archive:
            for file in path.rglob("*.*"):
                archive.write(file, file.relative_to(path))
        path = tmp_path / "pngs.zip"
    maps = PartMaps.open(path, paths=NAMES)
    with pytest.raises(MissingMapError, match=r"pngs.*b/2\.png is missing"):
        maps.read(3)


def test_ids_that_are_no_part_are_refused(maps_path, tmp_path):
    wrong = some_maps()
    wrong[1, 0, 0] = 7
    array = np.lib.format.open_memmap(
        write_array(tmp_path / "wrong", some_maps()) / "parts.npy", mode="r+"
    )
    array[1] = wrong[1]
    array.flush()
    with pytest.raises(ValueError, match=r"parts\.npy\[1\] holds part 7; there are 7, from 0"):
        PartMaps.open(tmp_path / "wrong").read(1)
    pngs = write_folder(tmp_path / "wrong_pngs", wrong)
    with pytest.raises(ValueError, match=r"a/2\.png holds part 7"):
        PartMaps.open(pngs, paths=NAMES).read(1)


def test_a_png_of_another_shape_or_kind_is_refused(tmp_path):
    path = write_folder(tmp_path, some_maps())
    (path / "a/1.png").write_bytes(png_of(np.zeros((4, 3))))
    Image.new("RGB", (4, 3)).save(path / "a/2.png")
    maps = PartMaps.open(path, paths=NAMES)
    with pytest.raises(ValueError, match=r"a/1\.png is \(4, 3\), parts_meta\.json says \(3, 4\)"):
        maps.read(0)
    with pytest.raises(ValueError, match=r"a/2\.png cannot be read: its pixels are RGB"):
        maps.read(1)


@pytest.mark.parametrize("name", ["parts.npy", "scores.npy", "parts.json", "checksums.json"])
def test_any_changed_bit_of_an_array_is_noticed(tmp_path, name):
    PartMapWriter.create(tmp_path, replace(META, scores=SCORES))
    writer = PartMapWriter(tmp_path)
    for index, parts in enumerate(some_maps()):
        writer.write(index, parts, np.ones((3, 4), np.float16))
    writer.flush()
    PartMaps.open(tmp_path)  # may be read before it is finished
    writer.seal()
    PartMaps.open(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=str(tmp_path)):
            PartMaps.open(tmp_path)
    # what is written anew may change
    (tmp_path / name).write_bytes(whole)
    PartMapWriter.create(tmp_path, replace(META, scores=SCORES))
    PartMapWriter(tmp_path).write(0, some_maps()[1], np.zeros((3, 4), np.float16))
    PartMaps.open(tmp_path)


def test_maps_of_other_images_are_refused(maps_path):
    with pytest.raises(ValueError, match="has 5 part maps, the data set has 6 images"):
        PartMaps.open(maps_path, paths=[*NAMES, "b/4.jpg"])
    with pytest.raises(ValueError, match="other names or in another order"):
        PartMaps.open(maps_path, paths=NAMES[::-1])


def test_maps_of_another_map_file_are_refused(tmp_path):
    map_file = tmp_path / "train_map.txt"
    map_file.write_text("a/1.jpg\t0\n")
    folder = write_array(
        tmp_path / "parts", some_maps(), replace(META, map_file_sha256=file_sha256(map_file))
    )
    assert len(PartMaps.open(folder, map_file=map_file)) == 5
    map_file.write_text("a/1.jpg\t1\n")
    with pytest.raises(ValueError, match=r"made for another map file than .*train_map\.txt"):
        PartMaps.open(folder, map_file=map_file)


def test_an_array_of_another_shape_or_type_is_refused(tmp_path):
    folder = write_array(tmp_path, some_maps())
    np.save(folder / "parts.npy", some_maps()[:, :, :3])
    with pytest.raises(
        ValueError, match=r"parts\.npy is uint8 \(5, 3, 3\); parts\.json says uint8 \(5, 3, 4\)"
    ):
        PartMaps.open(folder)
    np.save(folder / "parts.npy", some_maps().astype(np.int64))
    with pytest.raises(ValueError, match=r"parts\.npy is int64"):
        PartMaps.open(folder)
    (folder / "parts.npy").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"parts\.npy cannot be read as an array"):
        PartMaps.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "must be JSON with num_parts, grid and num_images"),
        ('{"grid": [3, 4], "num_images": 5}', "num_parts"),
        (replace(META, num_parts=300).to_json(), "num_parts 300; it must be from 1 to 255"),
        (replace(META, version=2).to_json(), "version 2"),
    ],
)
def test_descriptions_that_cannot_be_read_are_named(tmp_path, text, message):
    folder = write_array(tmp_path, some_maps())
    (folder / "parts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        PartMaps.open(folder)


def test_no_maps_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"--part_maps .*nothing does not exist"):
        PartMaps.open(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"parts_meta\.json, which describes the part maps, cannot be read"
    ):
        PartMaps.open(tmp_path)


# --- writing --------------------------------------------------------------------------------------


def test_ranks_share_the_rows_and_go_on_after_a_stop(tmp_path):
    PartMapWriter.create(tmp_path, META)
    first, second = PartMapWriter(tmp_path), PartMapWriter(tmp_path)
    assert first.missing(0, 2).tolist() == [0, 2, 4]
    assert second.missing(1, 2).tolist() == [1, 3]
    first.write(2, some_maps()[2])
    second.write(1, some_maps()[1])
    PartMapWriter.create(tmp_path, META)  # the run starts again, now with three ranks
    writers = [PartMapWriter(tmp_path) for _ in range(3)]
    assert [writer.missing(rank, 3).tolist() for rank, writer in enumerate(writers)] == [
        [0, 3],
        [4],
        [],
    ]
    assert np.array_equal(PartMaps.open(tmp_path).read(2), some_maps()[2])


def test_maps_of_another_run_are_not_overwritten(tmp_path):
    write_array(tmp_path, some_maps())
    with pytest.raises(ValueError, match=r"another run \(teacher None there, other now\)"):
        PartMapWriter.create(tmp_path, replace(META, teacher="other"))
    assert np.array_equal(PartMaps.open(tmp_path).read(0), some_maps()[0])


def test_scores_lie_beside_the_maps(tmp_path):
    PartMapWriter.create(tmp_path, replace(META, scores=SCORES))
    scores = np.linspace(0, 1, 12).reshape(3, 4).astype(np.float16)
    PartMapWriter(tmp_path).write(3, some_maps()[3], scores)
    maps = PartMaps.open(tmp_path)
    assert maps.has_scores and np.array_equal(maps.read_scores(3), scores)


def test_two_images_cannot_share_a_png(tmp_path):
    folder = write_array(tmp_path / "parts", some_maps(), replace(META, names_sha256=None))
    with pytest.raises(ValueError, match=r"two images would share the part map a/1\.png"):
        write_zip(
            PartMaps.open(folder),
            tmp_path / "x.zip",
            ["a/1.jpg", "a/1.png", "b/1.jpg", "b/2.jpg", "b/3.jpg"],
        )
    assert not (tmp_path / "x.zip").exists()
