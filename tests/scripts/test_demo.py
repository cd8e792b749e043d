"""The demo's report against the files of its runs, the pictures against the tensors that they
show."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from analysis import visualize
from modeling_finetune import create_model
from scripts.experiments import demo as demo_script
from unimim import report
from unimim.checkpoint.files import save_checkpoint
from unimim.data.views import MEAN_STD
from unimim.engine import samples

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """Tables, images and preformatted text of a report, and every address that it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.images, self.addresses, self.tags, self.commands = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attributes if name in ("src", "href", "srcset", "data")
        ]
        if tag == "img":
            self.images.append(
                Image.open(io.BytesIO(base64.b64decode(dict(attributes)["src"].partition(",")[2])))
            )
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self.tags and self.tags.pop() != tag:
            pass

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.tags and self.tags[-1] == "pre":
            self.commands += data


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A few steps of everything: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("demo") / "with space"
    program = str(ROOT / "scripts/experiments/demo.py")
    result = subprocess.run(
        [sys.executable, program, "--fast", "--output", str(folder)],
        cwd=folder.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return folder, result.stdout, Page((folder / "report.html").read_text())


@pytest.mark.slow
def test_the_table_repeats_what_the_runs_wrote(demo):
    folder, printed, page = demo
    header, *rows = page.tables[0]
    assert header[0] == "frozen features of" and len(rows) == 1 + 3 + 6
    cells = {row[0]: row[1:] for row in rows}
    for key, system in demo_script.SYSTEMS.items():
        run = folder / f"{key}-0"
        with (run / "knn/knn.csv").open() as file:
            knn = float(next(csv.DictReader(file))["acc1"])
        linear = [log_of(run / name)[-1]["test_acc1"] for name in ("linear", "linear10")]
        assert cells[system.label][:3] == [f"{value:.1f}" for value in (knn, *linear)]
        name = demo_script.NETWORKS[system.network]
        untrained = log_of(folder / f"random-{system.network}-0" / "linear")[-1]["test_acc1"]
        gain = linear[0] - untrained
        assert cells[system.label][3] == f"{gain:+.1f}" and f"random weights: {name}" in cells
    assert re.search(r"^MAE +[\d.]+ +[\d.]+ +[\d.]+ +[+-][\d.]+ +\d+$", printed, re.MULTILINE)


@pytest.mark.slow
def test_both_starts_are_judged_alike(demo):
    lines = demo[2].commands.splitlines()
    probes = [line for line in lines if line.startswith("python run_linear") and "vit_tiny" in line]
    start = r"--finetune \S+with space\S+encoder-0.safetensors' "
    same = set()
    for line in probes:
        alike = re.sub(r"(random-vit|mae|semmae|semaim|semanticmim)-0", "ARM", line)
        same.add(re.sub(start, "", alike))
    assert len(probes) == 2 * 5 and len(same) == 2  # all labels, a tenth of them
    assert sum("--finetune " in line for line in probes) == 2 * 4


@pytest.mark.slow
def test_the_parts_that_semmae_masks_are_learned_on_its_seeds_mae(demo):
    folder = demo[0]
    teacher = str(folder / "mae-0/pretrain/encoder-0.safetensors")
    learned = json.loads((folder / "semmae-0/parts/finished.json").read_text())["command"]
    trained = json.loads((folder / "semmae-0/pretrain/finished.json").read_text())["command"]
    assert f"--teacher '{teacher}'" in learned
    assert f"--part_maps '{folder}/semmae-0/parts/maps'" in trained


@pytest.mark.slow
def test_runs_that_are_finished_are_kept_and_others_are_not(demo):
    folder = demo[0]
    made = demo_script.Demo(folder, folder / "data", demo_script.SEEDS[:1], fast=True)
    for job in made.jobs():
        for run, command in job.commands.items():
            assert demo_script.is_finished(run, command), command
    assert not demo_script.is_finished(folder / "mae-0/knn", "run_knn.py")


@pytest.mark.slow
def test_the_report_stands_alone(demo):
    page = demo[2]
    assert page.addresses and all(
        address.startswith("data:image/png;base64,") for address in page.addresses
    )
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.images) == 2  # what each system does, and the accuracies
    for image in page.images:
        assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5


def test_the_verdict_names_who_is_not_ahead():
    def row(name, value, baseline="", **others):
        accuracies = dict.fromkeys(demo_script.COLUMNS, value) | others
        return demo_script.Row(name, accuracies, 9, baseline)

    rows = [
        row("pixels", [80.0]), row("random weights", [50.0, 52.0]),
        row("A", [70.0, 72.0], "random weights", knn=[49.0, 60.0]),
        row("B", [60.0, 51.0], "random weights"),
    ]  # fmt: skip
    outcome = demo_script.verdict(rows, seeds=2)
    assert (
        "1 of 2 systems" in outcome and "with each seed (not B) and 0 in k-NN (not A, B)" in outcome
    )
    assert "gains +4.5 to +20.0 points" in outcome and "A's, 71.0 % (pixels: 80.0 %)" in outcome


def test_own_images_are_seen_as_often_as_the_digits(tmp_path):
    demo_script.export_few_digits(tmp_path / "digits")
    own = demo_script.Demo(tmp_path, tmp_path / "digits", (0,), fast=False)
    usual = demo_script.Demo(tmp_path, None, (0,), fast=False)
    for key, system in demo_script.SYSTEMS.items():
        assert f"--epochs {system.epochs} " in "".join(usual.pretrain(key, 0).values())
        epochs = system.epochs * 4000 // 100
        assert f"--epochs {epochs} " in "".join(own.pretrain(key, 0).values())
        assert own.encoder(key, 0).endswith(f"encoder-{epochs - 1}.safetensors")


def test_class_folders_alone_are_split(tmp_path):
    images = []
    for name in ("a cat", "dog"):
        for number in range(11):
            images.append(tmp_path / "own" / name / "below" / f"{number:02d}.png")
            images[-1].parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(images[-1])
    split = demo_script.with_validation(tmp_path / "own", tmp_path / "split")
    found = {part: sorted((split / part).rglob("*.png")) for part in ("train", "val")}
    assert [len(found[part]) for part in ("train", "val")] == [18, 4]
    assert sorted(link.resolve() for part in found.values() for link in part) == images
    assert demo_script.with_validation(split, tmp_path / "again") == split
    assert demo_script.data_flags(split).startswith("--data_set image_folder ")


def test_images_without_a_validation_part_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither train_map"):
        demo_script.data_flags(demo_script.with_validation(tmp_path, tmp_path / "split"))


# --------------------------------------------------------------------------------------------------
# Pictures


def test_hidden_patches_are_grey_and_the_others_as_they_were():
    images = torch.randint(200, 256, (2, 3, 8, 12), dtype=torch.uint8)
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0, 0] = True
    hidden = visualize.hide(images, mask)
    expected = images.clone()
    expected[0, :, 4:, 8:] = expected[1, :, :4, :4] = samples.MASKED_GRAY
    assert torch.equal(hidden, expected)


def pictures(figure) -> list[np.ndarray]:
    return [axis.images[0].get_array().data for axis in figure.axes]


def test_attention_of_a_checkpoint_is_that_of_its_teacher(tmp_path):
    size = {"input_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    method = create_model("conmim_tiny_patch16_224", **size, projector_hidden_dim=8)
    torch.nn.init.normal_(method.teacher.blocks[-1].attn.qkv.weight, std=0.3)
    flags = {
        "model": "conmim_tiny_patch16_224", "input_size": 16, "patch_size": 4,
        "mask_type": "random", "imagenet_default_mean_and_std": False,
        "model_kwargs": ["embed_dim=32", "depth=2", "num_heads=2", "projector_hidden_dim=8"],
    }  # fmt: skip
    state = {"model": method.state_dict(), "teacher": method.teacher.state_dict(), "args": flags}
    save_checkpoint(tmp_path / "checkpoint-0.pth", state)
    shown = {}
    for key in ("model|module", "model"):
        own = visualize.parse(
            [
                "attention",
                "--checkpoint",
                f"{tmp_path}/checkpoint-0.pth",
                "--images",
                "2",
                "--output",
                "x",
                "--model_key",
                key,
            ]
        )
        shown[key] = pictures(visualize.attention(*own))
    image, mean, *heads = shown["model|module"][:4]
    assert image.shape == (16, 16, 3) and [m.shape for m in (mean, *heads)] == [(4, 4)] * 3
    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    expected = method.teacher.eval().attention_maps(x)[0, :, 0, 1:].view(2, 4, 4).numpy()
    np.testing.assert_allclose(np.stack(heads), expected, atol=1e-6)
    np.testing.assert_allclose(mean, expected.mean(0), atol=1e-6)
    assert np.abs(shown["model"][2] - heads[0]).max() > 1e-4


def test_shown_images_come_from_all_over_the_data_set():
    assert visualize.spread(100, 4) == [0, 33, 66, 99]
    assert visualize.spread(3, 6) == [0, 1, 2]


def test_reconstruction_keeps_the_visible_patches_and_predicts_the_others(tmp_path):
    size = {"input_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    method = create_model("mae_tiny_patch16_224", **size)
    with (
        torch.no_grad()
    ):  # a decoder that predicts pure green, in units of the pixels scaled to [-1, 1]
        method.decoder_pred.weight.zero_()
        method.decoder_pred.bias.view(-1, 3).copy_(torch.tensor([-1.0, 1.0, -1.0]))
    flags = {
        "model": "mae_tiny_patch16_224", "data_set": "digits", "input_size": 32, "patch_size": 8,
        "mask_type": "random", "imagenet_default_mean_and_std": False,
        "model_kwargs": ["embed_dim=32", "depth=1", "num_heads=2"],
    }  # fmt: skip
    save_checkpoint(tmp_path / "checkpoint-0.pth", {"model": method.state_dict(), "args": flags})
    line = f"reconstruct --checkpoint {tmp_path}/checkpoint-0.pth --images 1 --output x"
    image, seen, predicted, pasted = pictures(visualize.reconstruct(*visualize.parse(line.split())))
    assert (predicted == [0, 255, 0]).all()
    green = (pasted == [0, 255, 0]).all(-1)
    assert green.mean() == 0.75 and (seen[green] == 128).all()
    assert (pasted[~green] == image[~green]).all() and (seen[~green] == image[~green]).all()


def tiny_semaim(folder: Path, **options) -> tuple[torch.nn.Module, str]:
    """A model whose average differs from it, and its checkpoint."""
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "query_depth": 2}
    torch.manual_seed(0)
    method = create_model("semaim_tiny_patch16_224", input_size=16, patch_size=4, **size, **options)
    flags = {
        "model": "semaim_tiny_patch16_224", "data_set": "digits", "input_size": 16, "patch_size": 4,
        "mask_type": "random", "imagenet_default_mean_and_std": True,
        "model_kwargs": [f"{name}={value}" for name, value in (size | options).items()],
    }  # fmt: skip
    state = {"model": method.state_dict(), "args": flags}
    if method.teacher is not None:
        torch.nn.init.normal_(method.teacher.blocks[-1].mlp.fc2.weight)
        state["teacher"] = method.teacher.state_dict()
    save_checkpoint(folder / "checkpoint-0.pth", state)
    return method.eval(), str(folder / "checkpoint-0.pth")


def test_orders_of_a_checkpoint_are_those_of_the_network_that_gives_the_map(tmp_path):
    method, saved = tiny_semaim(tmp_path, use_ema_model=True)
    line = f"orders --checkpoint {saved} --images 2 --output x --seed 3 "
    line += "--orders zigzag attention attention_center"
    image, attention, close, rows, similar, central = pictures(
        visualize.orders(*visualize.parse(line.split()))
    )[:6]
    normalize = visualize.Normalize(MEAN_STD["imagenet"], torch.device("cpu"))
    x = normalize({"image": torch.from_numpy(image).permute(2, 0, 1)[None]})["image"]
    expected = method.attention_map(x)
    np.testing.assert_allclose(
        attention.ravel(), method.teacher.attention_maps(x)[0, :, 0, 1:].mean(0), atol=1e-6
    )
    order = torch.from_numpy(close).flatten().argsort(descending=True)
    assert torch.equal(order, expected[0].argsort(descending=True)) and close.min() == 0
    assert rows.ravel().tolist() == list(range(16, 0, -1))
    assert similar.ravel()[order].tolist() == list(range(16, 0, -1))
    distance = np.hypot(
        *(np.indices((4, 4)).reshape(2, 16) - np.array(divmod(int(order[0]), 4))[:, None])
    )
    assert (np.diff(distance[central.ravel().argsort()[::-1]]) >= 0).all()


def test_orders_of_a_classifier(tmp_path):
    model = create_model(
        "vit_tiny_patch16_224", input_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2
    )
    weights = {
        name: value for name, value in model.state_dict().items() if not name.startswith("head.")
    }
    save_checkpoint(tmp_path / "checkpoint-0.pth", {"model": weights, "args": None})
    flags = [
        "--model",
        "vit_tiny_patch16_224",
        "--model_kwargs",
        "embed_dim=32",
        "depth=1",
        "num_heads=2",
    ]
    place = [
        "--data_set",
        "digits",
        "--input_size",
        "16",
        "--patch_size",
        "4",
        "--nb_classes",
        "10",
    ]
    line = [
        "orders",
        "--checkpoint",
        f"{tmp_path}/checkpoint-0.pth",
        "--images",
        "1",
        "--output",
        "x",
    ]
    shown = pictures(visualize.orders(*visualize.parse([*line, *flags, *place])))
    assert [picture.shape for picture in shown] == [(16, 16, 3)] + [(4, 4)] * 6
    # a file without flags is shown as ImageNet's images are
    normalize = visualize.Normalize(MEAN_STD["imagenet"], torch.device("cpu"))
    x = normalize({"image": torch.from_numpy(shown[0]).permute(2, 0, 1)[None]})["image"]
    maps = visualize.order_maps(model, x)
    np.testing.assert_allclose(shown[2], maps["cls"].view(4, 4), atol=1e-5)


def test_reconstruction_by_a_method_with_an_ema_takes_its_map(tmp_path):
    method, saved = tiny_semaim(
        tmp_path, use_ema_model=True, permutation_type="attention", norm_pix_loss=False
    )
    own, flags = visualize.parse(
        ["reconstruct", "--checkpoint", saved, "--images", "1", "--output", "x"]
    )
    known, pasted = pictures(visualize.reconstruct(own, flags))[1::2]
    args = visualize.load_model(saved, "model", flags)[1]
    batch = visualize.default_collate(visualize.training_samples(args, method, 1))
    image = visualize.normalization(args)(batch)["image"]
    first = method.attention_map(image).argsort(descending=True)[0, :4]
    shown = (
        method.reconstruct({"image": image})
        .masked[0]
        .permute(1, 2, 0)
        .reshape(4, 4, 4, 4, 3)
        .transpose(1, 2)
    )
    assert sorted(first.tolist()) == shown.flatten(2).any(-1).flatten().nonzero().flatten().tolist()
    blocks = [
        panel.reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, 48)
        for panel in (known, pasted)
    ]
    assert (blocks[0] == blocks[1]).all(1).nonzero()[0].tolist() == sorted(first.tolist())


def test_predicted_features_and_classifiers_have_no_pictures(tmp_path):
    saved = tiny_semaim(tmp_path, predict_feature="inference")[1]
    with pytest.raises(
        ValueError,
        match=r"checkpoint-0\.pth holds semaim_tiny_patch16_224, which does not predict pixels",
    ):
        visualize.reconstruct(
            *visualize.parse(["reconstruct", "--checkpoint", saved, "--output", "x"])
        )
    state = torch.load(saved)
    del state["args"]["mask_type"]
    state["args"]["model"], state["args"]["model_kwargs"] = (
        "vit_tiny_patch16_224",
        ["embed_dim=32", "depth=2", "num_heads=2"],
    )
    save_checkpoint(tmp_path / "checkpoint-1.pth", state)
    line = [
        "reconstruct",
        "--checkpoint",
        str(tmp_path / "checkpoint-1.pth"),
        "--output",
        "x",
        "--nb_classes",
        "10",
    ]
    with pytest.raises(
        ValueError, match="holds vit_tiny_patch16_224, which does not predict pixels"
    ):
        visualize.reconstruct(*visualize.parse(line))


def test_pictures_that_a_method_cannot_give_are_refused_by_name(tmp_path):
    flags = ["--model", "mae_tiny_patch16_224", "--input_size", "32", "--patch_size", "8"]
    with pytest.raises(
        ValueError, match=r"draws its masks itself; use analysis/visualize\.py reconstruct"
    ):
        visualize.masks(*visualize.parse(["masks", "--output", "x", *flags]))


# --------------------------------------------------------------------------------------------------
# Numbers in words


def test_spread_is_mean_and_sample_std():
    assert report.spread([1.0, 2.0, 6.0]) == "3.0 ± 2.6"
    assert report.spread([41.96]) == "42.0"
