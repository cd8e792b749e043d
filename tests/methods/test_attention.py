"""Attention as numbers and as pictures, for every ViT, and how far it agrees with objects whose
masks are known."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import start
from torch import Tensor, nn

from analysis import attention_agreement, visualize
from modeling_finetune import create_model
from unimim.checkpoint.files import save_checkpoint
from unimim.checkpoint.resizing import interpolate_pos_embed
from unimim.data.views import MEAN_STD
from unimim.engine.session import Position
from unimim.evaluation.attention import (
    best_iou,
    class_maps,
    patch_fractions,
    patch_maps,
    pixel_auc,
    pointing,
)

SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS = {  # a model and what its constructor takes beside the size
    "conmim_tiny_patch16_224": {"projector_hidden_dim": 8},
    "mae_tiny_patch16_224": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "semaim_tiny_patch16_224": {"query_depth": 2},
    "beit_tiny_patch16_224_8k_vocab": {"vocab_size": 8},
    "maskfeat_tiny_patch16_224": {"num_cls_tokens": 1},
    "semanticmim_beit_tiny_patch16_224": {"vocab_size": 8, "num_cls_tokens": 4},
    "semanticmim_maskfeat_tiny_patch16_224": {"num_cls_tokens": 3},
    "vit_tiny_patch16_224": {"num_cls_tokens": 2, "num_classes": 10},
    "beit_tiny_patch16_224": {"num_classes": 10},
}


def saved(folder: Path, name: str, **more) -> tuple[nn.Module, str]:
    """A model for 16 pixels, with weights that make attention uneven, and its checkpoint."""
    options = {**SIZE, **MODELS[name], **more}
    torch.manual_seed(0)
    model = create_model(name, input_size=16, patch_size=4, **options)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
    is_classifier = "num_classes" in options
    kept = options.keys() - ({"num_classes", "num_cls_tokens"} if is_classifier else set())
    flags = {
        "model": name, "data_set": "digits", "input_size": 16, "patch_size": 4,
        "imagenet_default_mean_and_std": True,
        "model_kwargs": [f"{key}={options[key]}" for key in kept],
        "discrete_vae_weight_path": "/gone/encoder.pkl",
    }  # fmt: skip
    flags |= (
        {"nb_classes": 10, "finetune": "/gone.pth"} if is_classifier else {"mask_type": "random"}
    )
    save_checkpoint(folder / "checkpoint-0.pth", {"model": model.state_dict(), "args": flags})
    return model.eval(), str(folder / "checkpoint-0.pth")


def shown(path: str, *flags: str, images: int = 1) -> dict[str, list[np.ndarray]]:
    """Title -> the pictures of that column."""
    own, rest = visualize.parse(
        ["attention", "--checkpoint", path, "--images", str(images), "--output", "x", *flags]
    )
    figure = visualize.attention(own, rest)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    pictures = [axis.images[0].get_array().data for axis in figure.axes]
    return {title: pictures[column :: len(titles)] for column, title in enumerate(titles)}


def normalized(picture: np.ndarray) -> Tensor:
    mean_std = MEAN_STD["imagenet"]
    return visualize.Normalize(mean_std, torch.device("cpu"))({"image": as_image(picture)})["image"]


def as_image(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


# --------------------------------------------------------------------------------------------------
# Pictures


def test_maps_by_hand():
    """Of a batch: [2, h, T, T] with 3 class tokens and 2 x 3 patches."""
    attention = torch.rand(2, 4, 9, 9)
    by_class, by_patch = class_maps(attention, 3, (2, 3)), patch_maps(attention, 3, (2, 3), [4, 0])
    for image in range(2):
        mean = attention[image].mean(0)
        torch.testing.assert_close(by_class[image], mean[:3, 3:].reshape(3, 2, 3))
        torch.testing.assert_close(by_patch[image], mean[[7, 3], 3:].reshape(2, 2, 3))
    reduced = patch_maps(attention, 3, (2, 3), [4, 0], reduce_mean=True)
    torch.testing.assert_close(reduced, by_patch - by_class.mean(1, keepdim=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_vit_at_another_image_size(tmp_path, name):
    """Six by six patches in place of four by four: the weights with interpolated positions or bias
    tables."""
    model, path = saved(tmp_path, name)
    columns = shown(
        path, "--token_indices", "0", "35", "--input_size", "24", "--layer", "0", "1", images=2
    )
    assert list(columns) == [
        "image",
        *(f"layer {layer}: patch {cell}" for layer in (0, 1) for cell in (0, 35)),
    ]
    larger = visualize.load_model(path, "model|module", ["--input_size", "24"])[0].eval()
    assert larger.num_prefix_tokens == model.num_prefix_tokens and larger.patch_embed.grid_size == (
        6,
        6,
    )
    if model.pos_embed is not None:
        expected = interpolate_pos_embed(model.pos_embed, 6, model.num_prefix_tokens)
        if model.pos_embed.requires_grad:
            torch.testing.assert_close(larger.pos_embed, expected)
        assert larger.pos_embed.shape == expected.shape
    for image, found in zip(columns["image"], columns["layer 1: patch 35"], strict=True):
        attention = larger.attention_maps(normalized(image), 1)[0]
        expected = attention[:, -1, model.num_prefix_tokens :].mean(0).view(6, 6).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert 0 < found.sum() < 1, "what goes to class tokens is dropped"


def test_class_tokens_heads_and_means(tmp_path):
    model, path = saved(tmp_path, "semanticmim_maskfeat_tiny_patch16_224")
    columns = shown(path)
    assert list(columns) == ["image", "class 0", "class 1", "class 2"]
    heads = model.attention_maps(normalized(columns["image"][0]))[0, :, :, 3:]  # [h, T, N]
    classes = heads[:, :3].mean(0)
    for number in range(3):
        np.testing.assert_allclose(
            columns[f"class {number}"][0].ravel(), classes[number], atol=1e-6
        )
    columns = shown(path, "--reduce_mean")
    np.testing.assert_allclose(columns["class mean"][0].ravel(), classes.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        columns["class 2"][0].ravel(), classes[2] - classes.mean(0), atol=1e-6
    )
    columns = shown(path, "--heads", "each", "--token_indices", "5", "--reduce_mean")
    assert list(columns) == ["image", "class mean", "patch 5 head 0", "patch 5 head 1"]
    np.testing.assert_allclose(
        columns["patch 5 head 1"][0].ravel(), heads[1, 8] - classes.mean(0), atol=1e-6
    )
    assert list(shown(path, "--token_indices", "5"))[1:] == [
        "patch 5 mean of heads",
        "patch 5 head 0",
        "patch 5 head 1",
    ]


def test_queries_are_marked_in_their_map_and_in_the_image(tmp_path):
    _, path = saved(tmp_path, "maskfeat_tiny_patch16_224")
    own, rest = visualize.parse(
        [
            "attention",
            "--checkpoint",
            path,
            "--images",
            "1",
            "--output",
            "x",
            "--token_indices",
            "6",
            "13",
        ]
    )
    frames = [
        [(*f.get_xy(), f.get_width(), f.get_height()) for f in a.patches]
        for a in visualize.attention(own, rest).axes
    ]
    assert frames == [
        [(7.5, 3.5, 4, 4), (3.5, 11.5, 4, 4)],  # of 16 pixels; cell 6 is row 1, column 2
        [(1.5, 0.5, 1, 1)],
        [(0.5, 2.5, 1, 1)],
    ]


def test_colors_of_negative_values_start_at_the_smallest():
    figure = visualize.draw_grid([[np.array([[-1.0, 2.0]]), np.array([[1.0, 2.0]])]], ["a", "b"])
    assert [axis.images[0].get_clim() for axis in figure.axes] == [(-1.0, 2.0), (0.0, 2.0)]


def test_looks_that_cannot_be_are_refused(tmp_path):
    _, path = saved(tmp_path, "maskfeat_tiny_patch16_224")
    for flags, said in (
        (("--token_indices", "3", "16"), r"--token_indices \[16\] lie beyond the grid of 4 x 4"),
        (("--layer", "2"), "layer=2 is none of the 2 blocks"),
        (("--reduce_mean",), "--reduce_mean leaves nothing"),
        (("--input_size", "18"), "--input_size .* is not a multiple of --patch_size"),
    ):
        with pytest.raises(ValueError, match=said):
            shown(path, *flags)


def test_output_is_checked_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, said in (
        (tmp_path / "a.xyz", "ends in .xyz, which matplotlib does not write; use one of ."),
        (tmp_path / "file/a.png", "file is not a folder that can be written to"),
        (tmp_path, "is a folder; name a file in it"),
    ):
        with pytest.raises(SystemExit) as stopped:
            visualize.main(["attention", "--checkpoint", "none.pth", "--output", str(output)])
        assert said in stopped.value.code and "none.pth" not in stopped.value.code


def test_an_exported_encoder_says_which_vit_it_is(tmp_path):
    """Without --model, as the whole checkpoint does."""
    run, _ = start("pretrain", tmp_path)
    run.session.save(Position(), finished=True)
    figures = []
    for name in ("checkpoint-0.pth", "encoder-0.safetensors"):
        flags = ["--data_set", "digits"]
        model, args = visualize.load_vit(str(tmp_path / name), visualize.PUBLISHED_KEYS, flags)
        images = visualize.validation_images(args, model.patch_embed.img_size, 2)
        figures.append(
            model.eval().attention_maps(visualize.normalization(args)({"image": images})["image"])
        )
    torch.testing.assert_close(*figures)


# --------------------------------------------------------------------------------------------------
# Agreement with objects


def test_measures_against_pixels():
    """Map enlarged to pixels and compared one by one; some values are equal."""
    draws = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 12, 8, generator=draws) < 0.4
    maps = torch.randint(0, 7, (3, 24), generator=draws).float()  # patches of 2 x 2
    shares = patch_fractions(mask, (6, 4))
    for image in range(3):
        pixels = maps[image].view(6, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
        inside, outside = pixels[mask[image]][:, None], pixels[~mask[image]][None]
        auc = ((inside > outside).float() + 0.5 * (inside == outside)).mean()
        assert pixel_auc(maps, shares)[image].item() == pytest.approx(auc.item(), abs=1e-6)
        above = [pixels >= threshold for threshold in pixels.unique()]
        iou = max(((a & mask[image]).sum() / (a | mask[image]).sum()).item() for a in above)
        assert best_iou(maps, shares)[image].item() == pytest.approx(iou, abs=1e-6)
        top = maps[image].argmax().item()
        there = mask[image, top // 4 * 2 :][:2, top % 4 * 2 :][:, :2].float().mean().item()
        assert pointing(maps, shares)[image].item() == pytest.approx(there)


def test_measures_at_their_ends():
    shares = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert pixel_auc(shares, shares) == best_iou(shares, shares) == pointing(shares, shares) == 1
    assert (
        pixel_auc(-shares, shares) == pointing(-shares, shares) == 0
        and best_iou(-shares, shares) == 0.5
    )
    assert pixel_auc(torch.ones(4), shares) == 0.5, "a map that says nothing"
    nothing = torch.zeros(4)
    assert math.isnan(pixel_auc(shares, nothing)) and math.isnan(best_iou(shares, nothing))


def test_attention_that_knows_the_objects():
    """Two objects that fill patches: class token 0 looks at both, token 1 beside them, patches at
    their own object."""
    objects = torch.zeros(8, 8, dtype=torch.uint8)
    objects[:4, :4], objects[4:, 6:] = 1, 2  # four and two patches of 2 x 2 pixels
    own = objects[::2, ::2].flatten()  # [N]
    attention = torch.zeros(2, 18, 18)
    attention[:, 0, 2:] = (own > 0).float()
    attention[:, 1, 2:] = 0.9 * (own == 0)
    attention[:, 2:, 2:] = (own[:, None] == own).float()
    found: dict[str, list[float]] = {}
    for name, value in attention_agreement.metrics(attention, objects, 2, (4, 4)):
        found.setdefault(name, []).append(value)
    assert {
        name: len(values) for name, values in found.items() if "patch" in name
    } == dict.fromkeys(("patch_auc", "patch_iou", "patch_pointing"), 6)
    means = {name: np.mean(values) for name, values in found.items()}
    assert [means[f"{kind}_auc"] for kind in ("cls", "one_cls", "best_cls", "patch")] == [
        1,
        0.5,
        1,
        1,
    ]
    assert (
        means["best_cls_iou"]
        == means["patch_iou"]
        == means["cls_pointing"]
        == means["patch_pointing"]
        == 1
    )
    assert means["one_cls_iou"] == pytest.approx((1 + 6 / 16) / 2), (
        "at worst the whole picture is taken"
    )


def test_scenes_and_masks_belong_together():
    image, objects = attention_agreement.scene_at(3, (48, 64))
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8 and objects.shape == (48, 64)
    scene = attention_agreement.make_scene("val", 3)
    _, other = attention_agreement.scene_at(3, (48, 64), attention_agreement.CLUTTERED)
    assert not torch.equal(other, objects)
    share = (scene.instances > 0).mean()
    assert 0.02 < share == pytest.approx((objects > 0).float().mean().item(), abs=0.01)


def test_one_row_for_each_layer_of_a_checkpoint(tmp_path, capsys):
    _, path = saved(tmp_path, "semanticmim_maskfeat_tiny_patch16_224")
    flags = [
        "--checkpoint",
        path,
        "--images",
        "40",
        "--layer",
        "0",
        "-1",
        "--csv",
        str(tmp_path / "rows.csv"),
    ]
    attention_agreement.main(flags)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["layer"], row["class_tokens"]) for row in rows] == [("0", "3"), ("-1", "3")]
    assert list(csv.DictReader((tmp_path / "rows.csv").open())) == rows
    assert (
        rows[0]["cls_auc"] != rows[1]["cls_auc"]
        and rows[0]["random_cls_auc"] == rows[1]["random_cls_auc"]
    )
    for kind in ("cls", "one_cls", "patch"):
        assert float(rows[0][f"random_{kind}_auc"]) == pytest.approx(0.5, abs=0.06)
    assert float(rows[0]["random_best_cls_auc"]) > float(rows[0]["random_one_cls_auc"])
    shares = [
        (attention_agreement.scene_at(index, (16, 16))[1] > 0).float().mean() for index in range(40)
    ]
    assert float(rows[0]["random_cls_iou"]) > np.mean(shares), (
        "the threshold is chosen for each map"
    )
    with pytest.raises(SystemExit, match="error: --layer 9 is none of the 2 blocks"):
        attention_agreement.main([*flags[:2], "--images", "1", "--layer", "9"])
    with pytest.raises(SystemExit):
        attention_agreement.main([*flags[:2], "--images", "0"])
