"""The subset of CIFAR-10 of docs/results.md, from a tiny archive in torchvision's form."""

import hashlib
import pickle
import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from scripts.tools import make_cifar10_subset
from unimim.data.sources import build_source

CLASSES = ["airplane", "automobile", "bird"]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A folder as torchvision's: two training batches and a test batch of images of one gray, 70
    * label + 10 * place."""
    folder = tmp_path / "cifar" / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str, labels: list[int], first: int) -> list[str]:
        colors = [70 * label + 10 * (first + row) for row, label in enumerate(labels)]
        images = np.repeat(np.array(colors, dtype=np.uint8)[:, None], 3072, axis=1)
        return write(name, {"data": images, "labels": labels})

    train = [batch("data_batch_1", [2, 0, 1, 0], 0), batch("data_batch_2", [1, 2, 2, 0], 4)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", [1, 1, 0, 2], 0)])
    name, md5 = write("batches.meta", {"label_names": CLASSES})
    meta = {"filename": name, "key": "label_names", "md5": md5}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path / "cifar"


def test_the_first_images_of_each_class_are_written_in_turn(archive, tmp_path):
    output = tmp_path / "subset"
    make_cifar10_subset.main([str(archive), str(output), "--train", "2", "--val", "1"])
    expected = {
        "train": [
            f"{name}/{n:04d}.jpg {label}" for n in (0, 1) for label, name in enumerate(CLASSES)
        ],
        "val": [f"{name}/0000.jpg {label}" for label, name in enumerate(CLASSES)],
    }
    # the places in the batches of the first ones of each class, which their colors tell
    places = {
        "train": [(0, 1), (1, 2), (2, 0), (0, 3), (1, 4), (2, 5)],
        "val": [(0, 2), (1, 0), (2, 3)],
    }
    for split, lines in expected.items():
        assert (output / f"{split}_map.txt").read_text().splitlines() == lines
        assert zipfile.ZipFile(output / f"{split}.zip").namelist() == [x.split()[0] for x in lines]
        source = build_source("IMNET", str(output), train=split == "train", need_labels=True)
        assert source.labels.tolist() == [int(line.split()[1]) for line in lines]
        for index, (label, place) in enumerate(places[split]):
            with zipfile.ZipFile(output / f"{split}.zip") as file:
                image = np.asarray(Image.open(BytesIO(file.read(lines[index].split()[0]))))
            assert image.shape == (32, 32, 3)
            assert abs(image.astype(int) - (70 * label + 10 * place)).max() <= 2


def test_what_is_missing_is_named(archive, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_cifar10_subset.main([str(archive), str(tmp_path / "out")])
    assert "class airplane has 3 images, not 2000" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make_cifar10_subset.main([str(tmp_path / "empty"), str(tmp_path / "out")])
    assert "download=True" in capsys.readouterr().err
