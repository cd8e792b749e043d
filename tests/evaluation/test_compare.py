"""One picture of several models, some of them files of MoCo v3 and DINO as these save them."""

import numpy as np
import pytest
import torch
from helpers import METHODS, SIZE, arguments
from torch import Tensor

from analysis import visualize
from modeling_finetune import create_model
from unimim.checkpoint.files import save_checkpoint
from unimim.cli.models import build_method
from unimim.cli.options import as_config

VIT = {"input_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
DESCRIBED = ["--input_size", "16", "--patch_size", "4", "--model_kwargs", *SIZE]


def vit_weights(seed: int) -> dict[str, Tensor]:
    """The names of MoCo v3's and DINO's ViTs are timm's, with a norm and without a head."""
    torch.manual_seed(seed)
    vit = create_model("vit_tiny_patch16_224", **VIT, num_classes=0, global_pool="token")
    return {name: torch.randn_like(value) for name, value in vit.state_dict().items()}


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def moco(path, own: dict[str, Tensor], other: dict[str, Tensor]):
    heads = {
        "module.base_encoder.head.0.weight": torch.zeros(8, 32),
        "module.predictor.0.weight": torch.zeros(8, 8),
    }
    state = below("module.base_encoder.", own) | below("module.momentum_encoder.", other) | heads
    save_checkpoint(path, {"epoch": 3, "arch": "vit_base", "state_dict": state, "optimizer": {}})


def dino(path, own: dict[str, Tensor], other: dict[str, Tensor]):
    student = below("module.backbone.", other) | {
        "module.head.last_layer.weight_v": torch.zeros(8, 8)
    }
    teacher = below("backbone.", own) | {"head.last_layer.weight_v": torch.zeros(8, 8)}
    save_checkpoint(path, {"student": student, "teacher": teacher, "epoch": 3})


def pretrained(folder, kind: str):
    args = arguments("pretrain", folder, *METHODS[kind])
    args.rank = 0
    method = build_method(args)
    state = {"model": method.state_dict(), "args": as_config(args)}
    if method.teacher is not None:
        state["teacher"] = method.teacher.state_dict()
    save_checkpoint(folder / f"{kind}.pth", state)
    return folder / f"{kind}.pth"


def drawn(kind: str, paths, *flags: str):
    words = ["compare", "--checkpoints", *map(str, paths), "--kind", kind, "--images", "3"]
    return visualize.compare(*visualize.parse([*words, "--output", "x.png", *flags]))


def panels(figure) -> list[np.ndarray]:
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes]


@pytest.mark.parametrize("write", [moco, dino])
def test_files_of_instance_contrast_load_as_they_are(write, tmp_path):
    own, other = vit_weights(1), vit_weights(2)
    write(tmp_path / "published.pth", own, other)
    words = ["--model", "vit_tiny_patch16_224", *DESCRIBED, "--use_cls"]
    model, args = visualize.load_model(
        str(tmp_path / "published.pth"), visualize.PUBLISHED_KEYS, words
    )
    for name, value in own.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert args.imagenet_default_mean_and_std


def test_each_model_has_a_row_of_its_attention(tmp_path):
    moco(tmp_path / "moco.pth", vit_weights(1), vit_weights(2))
    dino(tmp_path / "dino.pth", vit_weights(2), vit_weights(1))
    flags = ["--models", "vit_tiny_patch16_224", *DESCRIBED, "--use_cls", "--data_set", "digits"]
    paths = [tmp_path / "moco.pth", tmp_path / "dino.pth"]
    found = panels(drawn("attention", paths, *flags))
    assert [panel.shape for panel in found] == [(16, 16, 3)] * 3 + [(4, 4)] * 6
    model, args = visualize.load_vit(
        str(paths[1]), visualize.PUBLISHED_KEYS, ["--model", *flags[1:]]
    )
    images = torch.from_numpy(np.stack(found[:3])).permute(0, 3, 1, 2)
    attention = model.eval().attention_maps(
        visualize.normalization(args)({"image": images})["image"]
    )
    expected = attention[:, :, 0, 1:].mean(1).unflatten(1, (4, 4))
    np.testing.assert_allclose(np.stack(found[6:]), expected, atol=1e-6)


def test_rows_of_orders_and_reconstructions_show_the_same_images(tmp_path):
    paths = [pretrained(tmp_path, "mae"), pretrained(tmp_path, "semaim")]
    ranks = panels(drawn("orders", paths, "--order", "raster", "--labels", "MAE", "SemAIM"))
    assert np.array_equal(ranks[3], ranks[6]) and ranks[3].max() == 16
    found = panels(drawn("reconstruct", paths))
    assert len(found) == 9 and all(panel.shape == (16, 16, 3) for panel in found)
    for image, of_mae, of_semaim in zip(found[:3], found[3:6], found[6:], strict=True):
        for combined in (of_mae, of_semaim):  # what is known is pasted in
            same = (abs(combined.astype(int) - image.astype(int)) <= 1).all(-1).mean()
            assert 0.2 < same < 0.95


def test_mistakes_are_named(tmp_path):
    paths = [pretrained(tmp_path, "mae")] * 2
    with pytest.raises(
        ValueError, match="--labels takes one for each of the 2 --checkpoints, not 1"
    ):
        drawn("attention", paths, "--labels", "one")
    with pytest.raises(ValueError, match="does not predict pixels"):
        drawn("reconstruct", [pretrained(tmp_path, "maskfeat")])
