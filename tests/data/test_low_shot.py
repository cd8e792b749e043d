"""Lists of images and of classes: which images are trained on, and a class folder's label."""

import logging
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from datasets import build_dataset
from scripts.tools.make_subset import choose
from unimim.data.class_lists import imagenet_names, imagenet_synsets, read_classes, subset_synsets


@pytest.fixture
def folders(tmp_path):
    """Three classes with 4, 8 and 12 training images and 2 for validation each."""
    for number, name in enumerate(("n03", "n01", "n02"), 1):
        for split, count in (("train", 4 * number), ("val", 2)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                path = tmp_path / "data" / split / name / f"{name}_{index}.png"
                Image.new("RGB", (8, 8), (number, index, 0)).save(path)
    return tmp_path / "data"


def dataset(folders, *, train: bool = True, **flags):
    base = {
        "data_set": "image_folder",
        "data_path": str(folders),
        "eval_data_path": None,
        "seed": 0,
    }
    args = Namespace(**base, max_bad_images=0, strict_data=False, **flags)
    return build_dataset(args, train=train, transform=lambda raw, rng: {}, need_labels=True)


def names(found) -> list[str]:
    return [found.source.path(index).rpartition("/")[2] for index in range(len(found))]


def test_a_list_of_names_says_which_images_are_trained_on(folders, tmp_path):
    """By the file's name, as the lists of 1 % of ImageNet have it, or with its folder."""
    (tmp_path / "list.txt").write_text("n02_3.png\nn01/n01_0.png\n\nn03_1.png\n")
    found = dataset(folders, label_list=str(tmp_path / "list.txt"))
    assert names(found) == ["n01_0.png", "n02_3.png", "n03_1.png"]
    assert found.source.labels.tolist() == [0, 1, 2]
    assert len(dataset(folders, train=False, label_list=str(tmp_path / "list.txt"))) == 6
    (tmp_path / "list.txt").write_text("n02_3.png\nn02_99.png\n")
    with pytest.raises(ValueError, match=r"1 images that the training data lack, such as 'n02_99"):
        dataset(folders, label_list=str(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="leave --label_fraction"):
        dataset(folders, label_list=str(tmp_path / "list.txt"), label_fraction=0.5)


def test_make_subset_takes_the_same_part_of_every_class(folders, tmp_path):
    command = [sys.executable, "scripts/tools/make_subset.py", "--data_path", str(folders)]
    command += ["--fraction", "0.25", "--seed", "3", str(tmp_path / "quarter.txt")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    lines = (tmp_path / "quarter.txt").read_text().split()
    assert [sum(line.startswith(name) for line in lines) for name in ("n01/", "n02/", "n03/")] == [
        2,
        3,
        1,
    ]
    assert names(dataset(folders, label_list=str(tmp_path / "quarter.txt"))) == [
        line.partition("/")[2] for line in lines
    ]


def test_the_choice_is_random_seeded_and_by_class():
    labels = np.repeat([0, 1, 2], [10, 100, 1000])
    found = choose(labels, fraction=0.1, per_class=None, seed=0)
    assert np.bincount(labels[found]).tolist() == [1, 10, 100]
    assert not np.array_equal(found, choose(labels, fraction=0.1, per_class=None, seed=1))
    longer = choose(np.append(labels, [3] * 50), fraction=0.1, per_class=None, seed=0)
    assert np.array_equal(longer[: len(found)], found)  # another class changes nothing
    assert (
        np.bincount(labels[choose(labels, fraction=None, per_class=7, seed=0)]).tolist() == [7] * 3
    )
    with pytest.raises(ValueError, match="--per_class 11 is more than the 10 images of class 0"):
        choose(labels, fraction=None, per_class=11, seed=0)


def test_a_map_of_classes_gives_a_part_of_the_folders_the_right_labels(folders, tmp_path, caplog):
    (tmp_path / "classes.txt").write_text("n00\nn03\nn01\nn04\nn02\n")
    mapped = dataset(folders, train=False, nb_classes=5, class_map=str(tmp_path / "classes.txt"))
    assert mapped.source.labels.tolist() == [2, 2, 4, 4, 1, 1] and len(mapped.source.classes) == 5
    assert "class folders" not in caplog.text
    (tmp_path / "classes.txt").write_text("n03\nn01\n")
    with pytest.raises(ValueError, match="such as 'n02', or that --class_map does not list"):
        dataset(folders, train=False, class_map=str(tmp_path / "classes.txt"))


def test_fewer_folders_than_classes_are_warned_of(folders, caplog):
    with caplog.at_level(logging.WARNING, logger="unimim"):
        dataset(folders, train=False, nb_classes=3)
        assert not caplog.records
        dataset(folders, train=False, nb_classes=5)
    assert (
        "has 3 class folders and --nb_classes is 5" in caplog.text and "--class_map" in caplog.text
    )


def test_lists_of_imagenets_classes():
    synsets = imagenet_synsets()
    assert len(synsets) == len(imagenet_names()) == 1000 and synsets == sorted(synsets)
    assert synsets[0] == "n01440764" and imagenet_names()[0].startswith("tench")
    for suite in ("imagenet_a", "imagenet_r"):
        assert len(subset_synsets(suite)) == 200 and set(subset_synsets(suite)) < set(synsets)
    assert read_classes("--class_map", "imagenet") == subset_synsets("imagenet_v2") == synsets
