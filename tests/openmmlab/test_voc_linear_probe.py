"""Linear segmentation: files, views, the frozen layer, the head's order, the schedule, and whole
runs."""

import csv
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import block_outputs, in_ranks, own_signals, run_command
from PIL import Image

from datasets import BadImagesError
from modeling_finetune import create_model
from scripts.tools import make_shapes
from semantic_segmentation import voc_linear_probe as voc
from unimim.checkpoint.files import save_checkpoint
from unimim.data.crops import ViewDraws
from unimim.data.shapes import make_scene, with_edges, write_shapes
from unimim.engine.setup import launch, schedules
from unimim.evaluation.features import build_vit

SIZE = ("embed_dim=32", "depth=3", "num_heads=2")
BASE = [
    *(
        "--model",
        "vit_tiny_patch16_224",
        "--patch_size",
        "4",
        "--input_size",
        "32",
        "--eval_size",
        "32",
    ),
    *(
        "--train_mask_size",
        "20",
        "--layer_indices",
        "-2",
        "--nb_classes",
        "11",
        "--model_kwargs",
        *SIZE,
    ),
    *(
        "--batch_size",
        "4",
        "--epochs",
        "3",
        "--lr_steps",
        "1",
        "2",
        "--num_workers",
        "0",
        "--device",
        "cpu",
    ),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("voc") / "VOC2012"
    write_shapes(folder, train=11, val=5, voc=True)
    return folder


def parse(root: Path, folder: Path | str, *flags: str) -> Namespace:
    return voc.parse([*BASE, "--data_path", str(root), "--output_dir", str(folder), *flags])


def run_here(folder: Path, root: Path, *flags: str) -> voc.VocRow:
    with own_signals():
        return voc.main(parse(root, folder, *flags))


# --------------------------------------------------------------------------------------------------
# The metric


def test_iou_by_hand():
    labels, predictions = torch.tensor([[0, 0, 1, 255, 7]]), torch.tensor([[0, 1, 1, 0, 2]])
    confusion = voc.confusion_matrix(labels.to(torch.uint8), predictions, 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    torch.testing.assert_close(
        voc.class_iou(confusion), torch.tensor([0.5, 0.5, 0.0]).double(), rtol=1e-5, atol=0
    )


# --------------------------------------------------------------------------------------------------
# Data


def test_shapes_in_the_layout_of_voc(root):
    args = parse(root, "")
    data = voc.voc_images(root, "trainaug", ("SegmentationClassAug", "SegmentationClass"), 11, args)
    assert len(data) == 11 and data.source.path(3).endswith("JPEGImages/train_000003.png")
    for index in (2, 3):  # in SegmentationClassAug, and not
        mask = data.maps["labels"](index)
        assert np.array_equal(mask, with_edges(make_scene("train", index)))
        assert set(np.unique(mask)) <= {*range(11), 255} and (mask == 255).any()
    assert not (root / "SegmentationClassAug" / "train_000003.png").exists()


def test_script_writes_that_layout_to_a_new_folder_only(root, tmp_path, capsys):
    make_shapes.main(["--voc", str(tmp_path / "new"), "--train", "3", "--val", "1"])
    for path in (tmp_path / "new").rglob("*.png"):
        assert path.read_bytes() == (root / path.relative_to(tmp_path / "new")).read_bytes()
    for flags, named in (
        (["--voc"], "--voc needs a folder"),
        (["--cluttered"], "--cluttered needs a folder"),
        (["--voc", str(root)], f"{root} exists already"),
    ):
        with pytest.raises(SystemExit):
            make_shapes.main(flags)
        assert named in capsys.readouterr().err


def test_palette_indices_are_the_classes(tmp_path):
    mask = np.random.default_rng(0).choice([0, 3, 20, 255], size=(9, 7)).astype(np.uint8)
    picture = Image.fromarray(mask, mode="P")
    picture.putpalette(np.random.default_rng(1).integers(256, size=768, dtype=np.uint8).tobytes())
    picture.save(tmp_path / "a.png")
    assert np.array_equal(voc.read_mask(tmp_path / "a.png", 21), mask)
    with pytest.raises(ValueError, match=r"a\.png has class 20: --nb_classes 20 is too few"):
        voc.read_mask(tmp_path / "a.png", 20)
    picture.convert("RGB").save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is not a palette or gray image, but of mode RGB"):
        voc.read_mask(tmp_path / "b.png", 21)


def test_mask_and_image_are_cut_alike():
    """Of a picture that shows its own mask, every view does."""
    mask = np.repeat(np.repeat(np.arange(20, dtype=np.uint8).reshape(4, 5), 16, 0), 16, 1)
    picture = np.repeat((mask * 10)[..., None], 3, axis=2)
    flipped = 0
    for seed in range(20):
        view = voc.TrainView((96, 80))(picture, np.random.default_rng(seed), {"labels": mask})
        image, labels = view["image"], view["labels"]
        assert (
            image.shape == (3, 96, 80) and labels.shape == (96, 80) and labels.dtype == torch.uint8
        )
        assert (
            (image[0].float() - 10 * labels.float()).abs() < 5
        ).float().mean() > 0.85  # but for blurred borders
        flipped += int(labels[40, 5] > labels[40, 75])
    assert 4 < flipped < 16
    view = voc.EvalView((32, 40))(picture, np.random.default_rng(0), {"labels": mask})
    assert np.array_equal(
        view["labels"], np.repeat(np.repeat(np.arange(20).reshape(4, 5), 8, 0), 8, 1)
    )
    draws = ViewDraws(flip=True, box=(16, 0, 32, 32), interpolation="bilinear", color=None)
    assert voc.crop_labels(mask, draws, (2, 2)).tolist() == [[9, 8], [14, 13]]


def test_crops_keep_most_of_the_image():
    mask = np.arange(200 * 100, dtype=np.int32).reshape(200, 100) // 100 % 256
    rows = [
        voc.TrainView((64, 64))(
            np.zeros((200, 100, 3), np.uint8),
            np.random.default_rng(s),
            {"labels": mask.astype("u1")},
        )
        for s in range(10)
    ]  # no such crop has an allowed aspect: the central 133 rows
    for view in rows:
        assert 33 <= view["labels"].min() <= 35 and 164 <= view["labels"].max() <= 167


# --------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize(("layer", "block"), [(-2, 1), (0, 0), (2, 2), (-1, 2)])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_tiny_patch16_224"])
def test_features_are_those_of_one_block(root, name, layer, block):
    args = parse(root, "", "--model", name)
    vit, images = build_vit(args), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(vit.norm.weight)
    expected = block_outputs(vit.eval(), images)[block]
    expected = (vit.norm(expected) if block == 2 else expected)[:, 1:]
    features = voc.Backbone(vit, layer)(images)
    assert features.shape == (2, 32, 8, 8) and not features.requires_grad
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), expected.detach())


def test_the_loss_is_that_of_enlarged_features(root):
    args = parse(root, "")
    backbones = voc.build_backbones(args, torch.device("cpu"))
    head = voc.build_head(32, 11, seed=0)
    torch.nn.init.normal_(head.bias)
    batch = {
        "image": torch.randn(2, 3, 32, 32),
        "labels": torch.randint(0, 11, (2, 32, 32), dtype=torch.uint8),
    }
    batch["labels"][:, :, :5] = 255
    features = F.interpolate(
        backbones["train"](batch["image"]), (20, 20), mode="bilinear", align_corners=False
    )
    cells = torch.arange(20) * 32 // 20
    labels = batch["labels"][:, cells][:, :, cells].long()
    losses = F.cross_entropy(head(features), labels.where(labels != 255, 0), reduction="none")
    loss = voc.Segmentation(head, backbones, 20)(batch)["loss"]
    torch.testing.assert_close(loss, losses[labels != 255].mean())


def test_another_size_for_evaluation_is_the_same_network(root, tmp_path):
    saved = create_model(
        "vit_tiny_patch16_224", input_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2
    )
    torch.nn.init.normal_(saved.pos_embed)
    save_checkpoint(tmp_path / "a.pth", {"model": saved.state_dict()})
    for flags in (
        (),
        ("--finetune", str(tmp_path / "a.pth")),
        ("--model", "beit_tiny_patch16_224"),
    ):
        backbones = voc.build_backbones(
            parse(root, "", "--eval_size", "48", *flags), torch.device("cpu")
        )
        small, large = (backbones[name].vit for name in ("train", "val"))
        assert large.patch_embed.grid_size == (12, 12) and len(large.blocks) == 2
        assert torch.equal(small.patch_embed.proj.weight, large.patch_embed.proj.weight)
        assert torch.equal(small.blocks[1].mlp.fc1.weight, large.blocks[1].mlp.fc1.weight)
        assert backbones["val"](torch.randn(1, 3, 48, 48)).shape == (1, 32, 12, 12)


def test_class_tokens_are_as_many_as_the_checkpoint_has(root, tmp_path):
    saved = create_model(
        "vit_tiny_patch16_224",
        input_size=32,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_cls_tokens=3,
    )
    torch.nn.init.normal_(saved.cls_token)
    save_checkpoint(tmp_path / "a.pth", {"model": saved.state_dict()})
    flags = ("--finetune", str(tmp_path / "a.pth"), "--eval_size", "48")
    backbones, images = (
        voc.build_backbones(parse(root, "", *flags), torch.device("cpu")),
        torch.randn(2, 3, 32, 32),
    )
    expected = block_outputs(saved.eval(), images)[1][:, 3:].detach()
    torch.testing.assert_close(backbones["train"](images).flatten(2).transpose(1, 2), expected)
    assert backbones["val"](torch.randn(1, 3, 48, 48)).shape == (1, 32, 12, 12)


def test_published_settings(root):
    args = voc.parse(["--data_path", str(root)])
    assert (args.input_size, args.eval_size, args.train_mask_size, args.layer_indices) == (
        448,
        448,
        100,
        -5,
    )
    assert (args.batch_size, args.epochs, args.momentum, args.weight_decay, args.opt) == (
        60,
        25,
        0.9,
        1e-4,
        "momentum",
    )
    assert args.blr * 8 * 60 / 256 == pytest.approx(0.08)
    args.lr = 0.08
    lr, weight_decay = schedules(args, steps_per_epoch=4)
    np.testing.assert_allclose(lr[:, 0], np.repeat([0.08, 0.008, 0.0008], [40, 40, 20]))
    assert (weight_decay == 1e-4).all()
    head = voc.build_head(768, 21, seed=0)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.03) and not head.bias.any()


# --------------------------------------------------------------------------------------------------
# Runs


def head_of(folder: Path, stem: str = "checkpoint-2") -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{stem}.pth")["model"]


def test_a_run_by_hand_and_its_resume(root, tmp_path):
    flags = ("--lr", "0.5", "--save_ckpt_freq", "1")
    result = run_here(tmp_path, root, *flags)
    args = parse(root, "", *flags)
    args.rank, args.world_size = 0, 1
    normalize = voc.set_up(args).normalize
    backbones = voc.build_backbones(args, torch.device("cpu"))
    data = voc.build_data(args, backbones)
    task = voc.Segmentation(voc.build_head(32, 11, seed=0), backbones, 20)
    optimizer = torch.optim.SGD(task.head.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-4)
    loader = voc.train_loader(args, data["train"])
    for epoch in range(3):
        loader.batch_sampler.set_position(epoch)
        optimizer.param_groups[0]["lr"] = 0.5 * 0.1**epoch
        for batch in loader:
            optimizer.zero_grad()
            task(normalize(batch))["loss"].backward()
            optimizer.step()
    assert len(loader) == 2  # 11 images, the last three are dropped
    for name, value in head_of(tmp_path).items():
        torch.testing.assert_close(task.head.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    found = torch.zeros(11, 11, dtype=torch.int64)
    for index in range(5):
        sample = data["val"][0, index]
        image = normalize({"image": sample["image"][None]})["image"]
        features = F.interpolate(
            backbones["val"](image), (32, 32), mode="bilinear", align_corners=False
        )
        found += voc.confusion_matrix(sample["labels"], task.head(features).argmax(1)[0], 11)
    assert result.miou == pytest.approx(100 * voc.class_iou(found).mean().item(), abs=0.1)
    (row,) = csv.DictReader((tmp_path / "voc.csv").open())
    assert (float(row["miou"]), float(row["best_miou"]), row["epoch"]) == (
        result.miou,
        result.best_miou,
        "2",
    )
    whole = head_of(tmp_path)
    (tmp_path / "checkpoint-2.pth").unlink()
    assert run_here(tmp_path, root, *flags) == result
    assert all(torch.equal(whole[name], value) for name, value in head_of(tmp_path).items())
    saved = str(tmp_path / "checkpoint-2.pth")
    assert run_here(tmp_path / "e", root, *flags, "--eval", "--resume", saved).miou == result.miou


def write_colored(root: Path) -> Path:
    """VOC's layout with 32 + 8 images [48, 64] of rectangles whose class is their color, JPEG as
    in VOC."""
    rng, colors = (
        np.random.default_rng(0),
        np.array([[40, 40, 40], [220, 40, 40], [40, 60, 220]], np.uint8),
    )
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, count in (("trainaug", 32), ("val", 8)):
        names = [f"{split}_{number}" for number in range(count)]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            mask = np.zeros((48, 64), np.uint8)
            for number in (1, 2):
                top, left = rng.integers(0, 28), rng.integers(0, 44)
                mask[top : top + 20, left : left + 20] = number
            Image.fromarray(colors[mask]).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
    return root


def test_classes_that_are_colors_are_learned(tmp_path):
    """Even on random weights, 77 is seen: rectangles end within patches. Flipped apart, 66."""
    root = write_colored(tmp_path / "VOC2012")
    flags = (
        "--nb_classes",
        "3",
        "--lr",
        "10",
        "--epochs",
        "10",
        "--lr_steps",
        "8",
        "--layer_indices",
        "0",
    )
    result = run_here(tmp_path / "out", root, *flags, "--val_freq", "10")
    assert result.miou > 72, result


def test_saved_configuration_gives_the_same_run(root, tmp_path):
    with own_signals():
        voc.main(parse(root, tmp_path, "--dry_run"))
        saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
        voc.main(voc.parse(["--config", str(tmp_path / "config.yaml"), "--dry_run"]))
    assert (
        yaml.safe_load((tmp_path / "config.yaml").read_text()) == saved
        and saved["layer_indices"] == -2
    )


def test_evaluation_is_as_often_as_asked(root, tmp_path):
    run_here(tmp_path, root, "--val_freq", "2")
    assert [
        line.count("test_miou") for line in (tmp_path / "log.txt").read_text().splitlines()
    ] == [0, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [(), ("--enable_deepspeed", "--zero_stage", "3")], ids=["ddp", "zero3"]
)
def test_two_ranks_train_and_evaluate_as_one(root, tmp_path, engine):
    flags = ("--lr", "0.5", "--no_auto_resume", "--batch_size", "2")
    one = run_here(tmp_path / "one", root, *flags, "--update_freq", "2")
    first, second = in_ranks(2, run_here, tmp_path / "two", root, *flags, *engine)
    assert first == second
    for name, value in head_of(tmp_path / "one").items():
        torch.testing.assert_close(head_of(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-5)
    saved = str(tmp_path / "two" / "checkpoint-2.pth")
    assert run_here(tmp_path / "check", root, "--eval", "--resume", saved).miou == first.miou
    assert one.miou == pytest.approx(first.miou, abs=1.0)


@pytest.mark.slow
def test_it_runs_from_the_command_line(root, tmp_path):
    command = [
        sys.executable,
        "semantic_segmentation/voc_linear_probe.py",
        *BASE,
        "--data_path",
        str(root),
    ]
    done = run_command(
        [*command, "--output_dir", str(tmp_path), "--num_workers", "1", "--epochs", "1"]
    )
    assert done.returncode == 0 and "best mIoU" in done.stdout, done.stdout


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--layer_indices 3", "--layer_indices 3: the model has blocks 0 to 2, or -1 to -3"),
        ("--layer_indices -4", "--layer_indices -4: the model has blocks 0 to 2, or -1 to -3"),
        ("--nb_classes 300", "--nb_classes 300: masks have room for 255 classes"),
        ("--val_freq 0", "--val_freq must be at least 1, not 0"),
        (
            "--data_path nowhere",
            "--data_path nowhere is not a folder; use VOC's folder VOC2012, or ADE20K's",
        ),
        (
            "--data_path .",
            ". has no ImageSets/Segmentation/trainaug.txt: it must be VOC's folder VOC2012",
        ),
        ("--eval", "--eval needs a checkpoint: --resume FILE"),
        ("--nb_classes 2", "--nb_classes 2 is too few"),
        ("--nb_classes 2 --num_workers 1", "--nb_classes 2 is too few"),
        ("--batch_size 12", "11 images do not fill one step of 12: lower --batch_size"),
        ("--finetune nowhere.pth", "checkpoint nowhere.pth does not exist"),
        ("--input_size 33", "--input_size (33, 33) is not a multiple of --patch_size (4, 4)"),
    ],
)
def test_mistake_is_named_in_one_line(root, tmp_path, capfd, flags, named):
    with own_signals(), pytest.raises(SystemExit):
        launch(voc.main, parse(root, tmp_path, *flags.split()))
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "error: " in line]
    assert len(lines) == 1 and named in lines[0]


def test_listed_files_that_are_missing_are_named(root, tmp_path):
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("\n")
    args = parse(tmp_path, "")
    with pytest.raises(ValueError, match=r"val\.txt lists no image"):
        voc.voc_images(tmp_path, "val", ("SegmentationClass",), 21, args)
    (lists / "val.txt").write_text("/JPEGImages/a.jpg /SegmentationClass/a.png\n")
    with pytest.raises(ValueError, match=r"JPEGImages/a\.jpg, .*a\.png exists, but a is listed"):
        voc.voc_images(tmp_path, "val", ("SegmentationClass",), 21, args)


def test_broken_masks_are_replaced_and_counted(tmp_path, caplog):
    """One cut off, one of another size: the rest takes their places, until there are more than
    allowed."""
    root = tmp_path / "VOC2012"
    write_shapes(root, train=2, val=4, voc=True)
    masks = root / "SegmentationClass"
    (masks / "val_000000.png").write_bytes((masks / "val_000000.png").read_bytes()[:60])
    Image.new("L", (5, 5)).save(masks / "val_000001.png")
    args = parse(root, "", "--max_bad_images", "2")
    backbones = voc.build_backbones(args, torch.device("cpu"))
    data = voc.build_data(args, backbones)["val"]
    assert [data[0, index]["index"] >= 2 for index in range(4)] == [True] * 4
    assert "val_000000.png" in caplog.text and "its mask (5, 5)" in caplog.text
    args.max_bad_images = 1
    data = voc.build_data(args, backbones)["val"]
    with pytest.raises(BadImagesError, match="2 of 4 images are broken"):
        [data[0, index] for index in range(4)]


def write_ade20k(root: Path) -> Path:
    """Two splits of shapes whose class is their color; 0 in the masks is no class."""
    for split, count in (("training", 8), ("validation", 4)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((20, 30), dtype=np.uint8)
            mask[5:] = 1 + number % 3
            image = np.zeros((20, 30, 3), dtype=np.uint8)
            image[mask > 0, number % 3] = 200
            Image.fromarray(image).save(root / f"images/{split}/ADE_{number}.jpg")
            Image.fromarray(mask).save(root / f"annotations/{split}/ADE_{number}.png")
    return root


def test_ade20ks_folders_have_150_classes_and_ignore_the_masks_0(tmp_path):
    root = write_ade20k(tmp_path / "ade")
    args = parse(root, tmp_path)
    args.nb_classes = None
    voc.validate(args)
    assert args.nb_classes == 150
    data = voc.ade20k_images(root, "training", 150, args)
    assert len(data) == 8
    labels = data.maps["labels"](4)
    assert set(np.unique(labels)) == {1, 255} and (labels[:5] == 255).all()
    with pytest.raises(ValueError, match="--nb_classes 2 is too few"):
        voc.ade20k_images(root, "validation", 2, args).maps["labels"](2)
    (root / "annotations/validation/ADE_3.png").unlink()
    with pytest.raises(ValueError, match=r"annotations/validation/ADE_3\.png exists"):
        voc.ade20k_images(root, "validation", 150, args)


def test_a_run_on_ade20ks_folders(tmp_path):
    root = write_ade20k(tmp_path / "ade")
    row = run_here(tmp_path / "out", root, "--nb_classes", "3", "--batch_size", "4")
    assert 0 < row.miou <= 100
