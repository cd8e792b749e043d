"""Robustness on class folders whose right answers are known: labels, subsets, mCE, occlusion."""

import csv
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import arguments
from PIL import Image

import run_robustness
from analysis.common import Network
from modeling_finetune import create_model
from unimim.checkpoint.files import save_checkpoint
from unimim.cli.options import as_config
from unimim.data.class_lists import imagenet_synsets, subset_synsets
from unimim.data.views import MEAN_STD
from unimim.evaluation import robustness

CLASSES = ["n01", "n02", "n03", "n04"]
GRAYS = [20, 90, 160, 230]


def gray_classifier() -> torch.nn.Module:
    """A ViT that takes an image for the class of the nearest gray value."""
    vit = create_model(
        "vit_tiny_patch16_224", input_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=1,
        num_classes=4,
    )  # fmt: skip
    vit.pool = lambda tokens: tokens
    vit.forward_features = lambda x, cells=None: x.mean((1, 2, 3))[:, None]
    values = torch.tensor([gray / 255 * 2 - 1 for gray in GRAYS])
    vit.head = torch.nn.Module()
    vit.head.forward = lambda x: -((x - values) ** 2)
    return vit


@pytest.fixture
def network():
    return Network("gray", gray_classifier(), (16, 16), MEAN_STD["inception"], True)


def write_images(folder, grays: dict[str, list[int]]) -> None:
    for name, values in grays.items():
        (folder / name).mkdir(parents=True)
        for number, gray in enumerate(values):
            Image.new("RGB", (16, 16), (gray,) * 3).save(folder / name / f"{number}.png")


def flags(root, *suite: str, **changes) -> Namespace:
    words = ["--suite", *suite, "--data_path", str(root), "--model", "x", "--num_workers", "0"]
    args = run_robustness.parse([*words, "--grid", "4", "--ratios", "0", "0.5"])
    vars(args).update(changes)
    return args


def measured(args, network, classes=CLASSES) -> list[robustness.Row]:
    return robustness.measure(args, network, classes, torch.device("cpu"))


def test_folders_are_the_models_classes_by_name_or_number(tmp_path, network):
    """Not by their position: the second and the fourth class are there, once under V2's numbers."""
    grays = {"n04": [230, 230, 20], "n02": [90]}
    write_images(tmp_path / "imagenet_sketch", grays)
    write_images(tmp_path / "imagenet_v2", {"3": [230, 230, 20], "1": [90]})
    sketch, v2 = measured(flags(tmp_path, "imagenet_sketch", "imagenet_v2"), network)
    assert sketch.acc1 == v2.acc1 == 75 and sketch.images == 4 and sketch.classes == 4
    write_images(tmp_path / "imagenet_sketch", {"n09": [1]})
    with pytest.raises(
        ValueError, match="n09 is not one of the model's 4 classes; use --class_map"
    ):
        measured(flags(tmp_path, "imagenet_sketch"), network)
    with pytest.raises(ValueError, match="--suite imagenet_r is not in --data_path"):
        measured(flags(tmp_path, "imagenet_r", "imagenet_v2"), network)


def test_only_the_logits_of_a_subset_count(tmp_path, network):
    """Gray 60 is nearer to the first class, which ImageNet-R's folders lack."""
    write_images(tmp_path, {"n02": [50], "n03": [160]})
    assert measured(flags(tmp_path, "imagenet_sketch"), network)[0].acc1 == 50
    (row,) = measured(flags(tmp_path, "imagenet_r"), network)
    assert row.acc1 == 100 and row.classes == 2
    synsets = imagenet_synsets()
    counted = robustness.counted_classes("imagenet_a", ["n01498041"], synsets)
    assert [synsets[number] for number in counted] == sorted(subset_synsets("imagenet_a"))


def test_mce_is_relative_to_alexnets_published_errors(tmp_path, network, caplog):
    """Of 4 images 1, then 3 are wrong: 50 % on average."""
    right, wrong = {"n01": [20, 20], "n02": [90, 20]}, {"n01": [20, 90], "n02": [20, 20]}
    write_images(tmp_path / "imagenet_c/noise/gaussian_noise/1", right)
    write_images(tmp_path / "imagenet_c/noise/gaussian_noise/2", wrong)
    write_images(tmp_path / "imagenet_c/fog/1", right)
    *rows, mce = measured(flags(tmp_path, "imagenet_c"), network)
    assert [(r.condition, r.value, r.error) for r in rows] == [
        ("gaussian_noise", 1, 25), ("gaussian_noise", 2, 75), ("fog", 1, 25),
    ]  # fmt: skip
    assert mce.condition == "mCE" and mce.ce == pytest.approx(100 * (50 / 88.6 + 25 / 81.9) / 2)
    assert len(robustness.ALEXNET) == 15 and np.mean(
        [*robustness.ALEXNET.values()]
    ) == pytest.approx(78.9, abs=0.01)


def test_hidden_patches_are_the_same_ones_and_more(tmp_path):
    images = torch.ones(2, 3, 16, 16)
    some, more = (robustness.hide_patches(images, [4, 9], ratio, 4, 0) for ratio in (0.25, 0.5))
    assert (some == 0).float().mean((1, 2, 3)).tolist() == [0.25, 0.25]
    assert (more == 0).float().mean() == 0.5 and not (more[some == 0]).any()
    assert not torch.equal(some[0], some[1])
    again = robustness.hide_patches(images[1:], [9], 0.25, 4, 0)
    assert torch.equal(some[1:], again)


def test_the_command_writes_a_table_and_a_picture_of_several_classifiers(tmp_path):
    args = arguments("finetune", tmp_path)
    args.rank, args.nb_classes = 0, 4
    from unimim.cli.models import build_classifier

    for name in ("a", "b"):
        state = {"model": build_classifier(args).state_dict(), "args": as_config(args)}
        save_checkpoint(tmp_path / f"{name}.pth", state)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    grays = dict(zip(CLASSES, ([gray] for gray in GRAYS), strict=True))
    for folder in ("imagenet-a", "val", "imagenet_c/fog/3"):
        write_images(tmp_path / "data" / folder, grays)
    words = ["--checkpoint", str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--labels", "a", "b"]
    words += [
        "--suite",
        "imagenet_a",
        "imagenet_c",
        "occlusion",
        "--data_path",
        str(tmp_path / "data"),
    ]
    words += ["--class_map", str(tmp_path / "classes.txt"), "--ratios", "0", "0.5", "--grid", "4"]
    words += ["--num_workers", "0", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    run_robustness.main(run_robustness.parse(words))
    with (tmp_path / "out/robustness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = ["imagenet_a", "imagenet_c", "imagenet_c", "occlusion", "occlusion"]
    assert [row["suite"] for row in rows] == 2 * expected and rows[5]["label"] == "b"
    assert (tmp_path / "out/robustness.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="has 4 classes, --class_map imagenet lists 1000"):
        run_robustness.main(run_robustness.parse([*words, "--class_map", "imagenet"]))
