"""The generated data set: the same bytes everywhere, and three layouts that say the same."""

import hashlib
import io
import json
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset
from scripts.tools import make_shapes
from unimim.data import shapes
from unimim.data.views import build_finetune_transform

ROOT = Path(__file__).resolve().parents[2]
# of write_shapes(root, 20, 5): file names and contents in sorted order
DIGESTS = {
    shapes.PLAIN: "3150994426dc9f2e4de302e12057fbb8a8bb78e593ef77c8e2d9a3422093718d",
    shapes.CLUTTERED: "0c77f7e0cf3b3b2b3d48c445a84fbf9eab3de40eb532989361ee4e1c483a9f2a",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / f"shapes{shapes.VERSION}"
    shapes.write_shapes(folder, train=20, val=5)
    return folder


def digest(root):
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def test_the_bytes_are_pinned(root, tmp_path):
    assert digest(root) == DIGESTS[shapes.PLAIN]
    flags = [str(tmp_path / "hard"), "--cluttered", "--train", "20", "--val", "5"]
    make_shapes.main(flags)
    assert digest(tmp_path / "hard") == DIGESTS[shapes.CLUTTERED]


def test_an_image_does_not_depend_on_how_many_are_written(root, tmp_path):
    shapes.write_shapes(tmp_path / "few", train=3, val=2)
    for split, count in (("training", 3), ("validation", 2)):
        for kind in ("images", "annotations"):
            for index in range(count):
                name = f"{kind}/{split}/{index:06d}.png"
                assert (tmp_path / "few" / name).read_bytes() == (root / name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name != "few"]


@pytest.mark.parametrize("style", [shapes.PLAIN, shapes.CLUTTERED], ids=["plain", "cluttered"])
def test_scenes(style):
    scenes = [shapes.make_scene("train", index, style) for index in range(200)]
    smallest, largest = style.sides
    for scene in scenes:
        height, width = scene.instances.shape
        assert smallest <= min(height, width) and max(height, width) <= largest
        assert scene.image.shape == (height, width, 3)
        areas = np.bincount(scene.instances.ravel())[1:]
        assert len(areas) == len(scene.classes) and areas.min() >= 20
        assert scene.classes[int(areas.argmax())] == scene.label
    assert np.bincount([scene.label for scene in scenes]).min() >= 12  # of 20 a class
    assert 1.3 < np.mean([len(scene.classes) for scene in scenes]) < 2.6
    assert 0.05 < np.mean([(scene.instances > 0).mean() for scene in scenes]) < 0.4
    other = shapes.make_scene("val", 0, style)
    assert other.image.shape != scenes[0].image.shape or (other.image != scenes[0].image).any()


def test_the_color_of_a_plain_object_differs_from_its_background_and_says_nothing_of_its_class():
    scenes = [shapes.make_scene("train", index) for index in range(400)]
    inside, outside = (
        np.array([scene.image[(scene.instances == 1) == part].mean(0) for scene in scenes])
        for part in (True, False)
    )
    # a background's mean also counts smaller objects
    assert np.abs(inside - outside).sum(1).min() > shapes.LEAST_CONTRAST / 2
    labels = np.array([scene.label for scene in scenes])
    means = np.array([inside[labels == kind].mean(0) for kind in range(len(shapes.CLASSES))])
    assert np.abs(means - inside.mean(0)).max() < 4 * inside.std() / np.sqrt(40)


def test_outlines_differ_and_keep_inside_the_unit_circle():
    axis = np.linspace(-1.2, 1.2, 121)
    x, y = np.meshgrid(axis, axis)
    masks = {name: outline(x, y) for name, outline in shapes.OUTLINES.items()}
    assert tuple(masks) == shapes.CLASSES
    for name, mask in masks.items():
        assert 0.1 < mask.mean() < 0.6 and not (mask & (x * x + y * y > 1.1)).any(), name
        for other, other_mask in masks.items():
            assert name == other or (mask & other_mask).sum() < 0.9 * (mask | other_mask).sum(), (
                name,
                other,
            )
    assert masks["star"][np.abs(axis).argmin(), np.abs(axis).argmin()]  # its middle belongs to it


def png(path):
    return np.asarray(Image.open(path))


def test_png_is_read_back_by_pillow():
    rng = np.random.default_rng(0)
    for shape in ((3, 5), (130, 260, 3)):  # the second needs more than one stored block
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        assert (np.asarray(Image.open(io.BytesIO(shapes.png_bytes(image)))) == image).all()


def test_the_three_layouts_agree(root):
    for split, folder, count in (("train", "training", 20), ("val", "validation", 5)):
        lines = (root / f"{split}_map.txt").read_text().splitlines()
        coco = json.loads((root / f"instances_{split}.json").read_text())
        assert len(lines) == len(coco["images"]) == count
        archive = zipfile.ZipFile(root / f"{split}.zip")
        for index, (line, entry) in enumerate(zip(lines, coco["images"], strict=True)):
            member, label = line.split("\t")
            scene = shapes.make_scene(split, index)
            assert member.split("/")[0] == shapes.CLASSES[int(label)] and int(label) == scene.label
            image = png(root / "images" / entry["file_name"])
            assert (image == scene.image).all() and image.shape[:2] == (
                entry["height"],
                entry["width"],
            )
            assert archive.read(member) == (root / "images" / entry["file_name"]).read_bytes()
            semantic = png(root / "annotations" / folder / f"{index:06d}.png")
            assert ((semantic > 0) == (scene.instances > 0)).all() and semantic.max() <= 10
            check_instances(
                scene, semantic, [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
            )
        numbers = [annotation["id"] for annotation in coco["annotations"]]
        assert numbers == list(range(1, len(numbers) + 1))
        assert [category["name"] for category in coco["categories"]] == list(shapes.CLASSES)


def check_instances(scene, semantic, annotations):
    assert [annotation["category_id"] - 1 for annotation in annotations] == list(scene.classes)
    for number, annotation in enumerate(annotations, start=1):
        counts, size = annotation["segmentation"]["counts"], annotation["segmentation"]["size"]
        values = np.arange(len(counts)) % 2 == 1
        mask = np.repeat(values, counts).reshape(size, order="F")
        assert (mask == (scene.instances == number)).all() and mask.sum() == annotation["area"]
        assert (semantic[mask] == annotation["category_id"]).all()
        left, top, width, height = annotation["bbox"]
        inside = mask[top : top + height, left : left + width]
        assert inside.sum() == mask.sum()
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_run_lengths_of_a_mask_that_begins_masked():
    assert shapes.run_lengths(np.array([[True, False], [True, True]])) == {
        "size": [2, 2],
        "counts": [0, 2, 1, 1],
    }


def test_the_data_set_is_loaded_from_its_cache(root, monkeypatch):
    monkeypatch.setenv("UNIMIM_CACHE", str(root.parent))
    args = Namespace(data_set="shapes", data_path=None, input_size=48, crop_pct=None)
    args.seed, args.max_bad_images, args.strict_data = 0, 0, True
    dataset = build_dataset(
        args, train=False, transform=build_finetune_transform(args, False), need_labels=True
    )
    assert len(dataset) == 5  # of the small set that is there already
    for index in range(5):
        sample = dataset[0, index]
        assert sample["label"] == shapes.make_scene("val", index).label and sample[
            "image"
        ].shape == (3, 48, 48)


def test_a_cache_whose_writing_was_killed_is_written_anew(tmp_path):
    program = (
        "import sys, pathlib; from unimim.data import shapes; "
        "shapes.cached_shapes(pathlib.Path(sys.argv[1]), 10**6, 1)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "shapes"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shapes.*.tmp/images/training/*.png")):
        assert writer.poll() is None and time.monotonic() < deadline, "the writer wrote nothing"
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    assert not (tmp_path / "shapes").exists()
    assert shapes.cached_shapes(tmp_path / "shapes", 2, 1) == tmp_path / "shapes"
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", ".shapes.lock"}
    assert len(list((tmp_path / "shapes" / "images").rglob("*.png"))) == 3


def test_the_cache_is_written_once_and_nothing_else_is_touched(tmp_path, capsys):
    folder = tmp_path / "new"
    make_shapes.main([str(folder), "--train", "2", "--val", "1"])
    assert str(folder) in capsys.readouterr().out
    (folder / "train_map.txt").write_text("edited")
    assert shapes.cached_shapes(folder, 2, 1) == folder
    assert (folder / "train_map.txt").read_text() == "edited"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no shapes data set"):
        shapes.cached_shapes(tmp_path / "mine", 2, 1)
