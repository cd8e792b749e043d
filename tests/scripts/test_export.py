"""Exports of tiny networks of every kind, read back by libraries and under projects' names."""

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from helpers import METHODS, ROOT, SIZE, arguments
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from scripts.tools import export
from unimim.checkpoint.files import load_checkpoint, save_checkpoint
from unimim.cli.models import build_classifier, build_method
from unimim.cli.options import as_config

SWIN = (
    "window_size=2", "embed_dim=8", "depths=[1,1,2,1]", "num_heads=[1,1,2,2]", "patch_size=null",
)  # fmt: skip
CONVNEXT = ("dims=[8,12,16,24]", "depths=[1,1,2,1]", "patch_size=null")
BIG = ("--input_size", "64", "--mask_type", "random_mps32", "--mask_patch_size", "32")
PRETRAINED = METHODS | {
    "conmim": (),
    "simmim_swin": ("--model", "simmim_swin_tiny", *BIG, "--model_kwargs", *SWIN),
    "simmim_vit": ("--model", "simmim_vit_tiny_patch16_224", "--model_kwargs", *SIZE),
    "a2mim_convnext": ("--model", "a2mim_convnext_tiny", *BIG, "--model_kwargs", *CONVNEXT),
}
CLASSIFIERS = {
    "beit": (),
    "vit_token": ("--model", "vit_tiny_patch16_224", "--use_cls", "--model_kwargs", *SIZE),
    "vit_avg": ("--model", "vit_tiny_patch16_224", "--model_kwargs", *SIZE),
    "resnet": (
        "--model", "resnet18", *BIG[:2],
        "--model_kwargs", "channels=[8,8,16,16]", "patch_size=null",
    ),
    "swin": ("--model", "swin_tiny", *BIG[:2], "--model_kwargs", *SWIN),
    "convnext": ("--model", "convnext_tiny", *BIG[:2], "--model_kwargs", *CONVNEXT),
}  # fmt: skip


def scrambled(network: nn.Module) -> nn.Module:
    """Move every weight and statistic away from its start, so that none may be left out."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and "pos_embed" not in name and "gaussian" not in name:
            noise = 0.1 * torch.randn_like(value)
            value += noise.abs() if name.endswith("running_var") else noise
    return network


def checkpoint(folder: Path, kind: str, stage: str = "pretrain") -> Path:
    flags = (PRETRAINED if stage == "pretrain" else CLASSIFIERS)[kind]
    args = arguments(stage, folder, *flags)
    args.rank, args.nb_classes = 0, 10
    network = scrambled((build_method if stage == "pretrain" else build_classifier)(args))
    state = {"model": network.state_dict(), "args": as_config(args)}
    if getattr(network, "teacher", None) is not None:
        state["teacher"] = scrambled(network.teacher).state_dict()
    save_checkpoint(folder / "checkpoint-0.pth", state)
    return folder / "checkpoint-0.pth"


def exported(path: Path, target: str, *flags: str) -> Path:
    """Export and return what was written, after the script's own comparison."""
    endings = {"timm": ".safetensors", "hf": "", "onnx": ".onnx", "torch_export": ".pt2"}
    out = path.with_name(f"out{endings.get(target, '.pth')}")
    assert export.export([str(path), "--to", target, str(out), *flags]) <= export.TOLERANCE
    return out


# --------------------------------------------------------------------------------------------------
# Target x kind of network

BEIT_FORM = {"timm", "conmim", "beit", "simmim", "openmixup", "mmpretrain", "hf"}
PLAIN = {"timm", "mae", "semaim", "openmixup", "mmpretrain", "hf"}
OTHER = {"timm", "openmixup", "mmpretrain", "hf"}
PIXELS = {"openmixup", "mmpretrain"}
FITS = {  # kind -> targets of its encoder, targets of the whole network
    "mae": (PLAIN, {"mae", "hf"}), "semmae": (PLAIN, {"mae", "hf"}),
    "semaim": (PLAIN, {"semaim"}), "saim": (PLAIN, {"semaim"}),
    "maskfeat": (PLAIN, {"mmpretrain"}), "semanticmim_maskfeat": (OTHER, {"mmpretrain"}),
    "semanticmim_beit": (OTHER, {"mmpretrain"}), "beit": (BEIT_FORM, {"beit", "hf"}),
    "conmim": (BEIT_FORM, {"conmim"}), "simmim_vit": (BEIT_FORM, PIXELS | {"simmim"}),
    "a2mim_vit": (BEIT_FORM, PIXELS), "a2mim_resnet": (OTHER, PIXELS),
    "a2mim_convnext": (OTHER, PIXELS), "simmim_swin": (OTHER | {"simmim"}, PIXELS | {"simmim"}),
}  # fmt: skip
CLASSIFIER_FITS = {
    "beit": BEIT_FORM, "vit_token": PLAIN, "vit_avg": PLAIN, "resnet": OTHER,
    "swin": OTHER | {"simmim"}, "convnext": OTHER,
}  # fmt: skip
TRACED = {"onnx", "torch_export"}


def check_fits(path: Path, fits: set[str], *flags: str) -> None:
    """Export to every target that fits; every other one says what to use."""
    for target in export.TARGETS.keys() - TRACED:
        if target in fits:
            exported(path, target, *flags)
        else:
            with pytest.raises(ValueError, match=r"; (use --to|leave --full out)"):
                exported(path, target, *flags)


@pytest.mark.parametrize("kind", FITS)
def test_every_target_takes_what_fits_and_refuses_the_rest_in_a_sentence(kind, tmp_path):
    path = checkpoint(tmp_path, kind)
    encoder, whole = FITS[kind]
    check_fits(path, encoder)
    check_fits(path, whole, "--full")
    with pytest.raises(ValueError, match="leave --full out"):
        exported(path, "torch_export", "--full")


@pytest.mark.parametrize("kind", CLASSIFIER_FITS)
def test_classifiers_go_with_their_head_or_without(kind, tmp_path):
    path = checkpoint(tmp_path, kind, "finetune")
    check_fits(path, CLASSIFIER_FITS[kind])
    check_fits(path, CLASSIFIER_FITS[kind], "--full")


@pytest.mark.parametrize(
    ("kind", "stage", "flags"),
    [
        ("conmim", "pretrain", ()),
        ("a2mim_resnet", "pretrain", ()),
        ("beit", "finetune", ("--full",)),
    ],
)
def test_graphs_take_any_number_of_images(kind, stage, flags, tmp_path):
    path = checkpoint(tmp_path, kind, stage)
    program = torch.export.load(exported(path, "torch_export", *flags))
    session = onnxruntime.InferenceSession(exported(path, "onnx", *flags))
    (inputs,), (outputs,) = session.get_inputs(), session.get_outputs()
    assert inputs.name == "images" and isinstance(inputs.shape[0], str)
    assert outputs.name == ("logits" if flags else "features")
    images = torch.zeros(5, *inputs.shape[1:])
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(
        program.module()(images), torch.from_numpy(found), atol=1e-4, rtol=1e-4
    )


# --------------------------------------------------------------------------------------------------
# Names of the published projects


def folded(names) -> set[str]:
    """Names without numbers of blocks and without what not every file has."""
    kept = {re.sub(r"\.\d+(?=\.)", ".N", name) for name in names}
    return {n for n in kept if not n.endswith(("num_batches_tracked", "relative_position_index"))}


def published(case: str, prefix: str = "") -> set[str]:
    """The names of a reference case's weights, which were made by the published code."""
    names = load_checkpoint(ROOT / f"tests/reference_cases/{case}/tensors.safetensors")
    start = f"weights/{prefix}"
    return folded(name.removeprefix(start) for name in names if name.startswith(start))


@pytest.mark.parametrize(
    ("kind", "target", "key", "case", "prefix"),
    [
        ("conmim", "conmim", "model", "conmim/shared_rel_bias_layer_scale", "student/"),
        ("mae", "mae", "model", "mae/normpix", ""),
        ("beit", "beit", "model", "beit_pretrain/shared_rel_pos", ""),
        ("semaim", "semaim", "state_dict", "semaim/attention_center_cls_pixel", ""),
        ("semanticmim_beit", "mmpretrain", "state_dict", "semanticmim_beit/bottleneck_cls8", ""),
        ("maskfeat", "mmpretrain", "state_dict", "semanticmim_maskfeat/baseline_cls1", ""),
        ("a2mim_resnet", "openmixup", "state_dict", "a2mim_resnet/r18_l3_gamma_train", ""),
        ("a2mim_vit", "openmixup", "state_dict", "a2mim_vit/l2_gamma", ""),
        ("a2mim_convnext", "openmixup", "state_dict", "a2mim_convnext/convnext_l3_gamma", ""),
        ("simmim_swin", "openmixup", "state_dict", "simmim/swin_l0_replace", ""),
        ("simmim_vit", "openmixup", "state_dict", "simmim/vit_replace", ""),
    ],
)
def test_names_are_those_of_the_published_code(kind, target, key, case, prefix, tmp_path):
    path = checkpoint(tmp_path, kind)
    written = load_checkpoint(exported(path, target, "--full"))
    names = folded(written[key])
    if target == "conmim":  # ConMIM's code builds a head that it never uses
        assert {"lm_head.weight", "lm_head.bias"} <= names
        names -= {"lm_head.weight", "lm_head.bias"}
        assert folded(load_checkpoint(tmp_path / "out_copy.pth")["model"]) >= names
    assert names == published(case, prefix)


def test_simmims_own_names(tmp_path):
    path = checkpoint(tmp_path, "simmim_swin")
    export.write_upstream(*source_of(path, "simmim"))
    written = load_checkpoint(tmp_path / "simmim.pth")["model"]
    assert "encoder.layers.0.downsample.reduction.weight" in written
    assert not any("layers.3.downsample" in name for name in written)
    others = {name for name in written if not name.startswith("encoder.")}
    assert others == {"decoder.0.weight", "decoder.0.bias"} and "encoder.mask_token" in written


def source_of(path: Path, target: str):
    source = export.load_source(path, full=True)
    source.args.to = target
    return source, path.with_name(f"{target}.pth")


@pytest.mark.parametrize(
    ("kind", "target"),
    [("conmim", "conmim"), ("mae", "mae"), ("beit", "beit"), ("semaim", "semaim")],
)
def test_whole_networks_come_back_tensor_by_tensor(kind, target, tmp_path):
    path = checkpoint(tmp_path, kind)
    out = exported(path, target, "--full")
    fresh = build_method(arguments("pretrain", tmp_path, *PRETRAINED[kind]))
    export.load_pretrained(fresh, out, min_matched=1.0)
    before = load_checkpoint(path)["model"]
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, before[name]), name
    if target == "conmim":
        teacher = load_checkpoint(tmp_path / "out_copy.pth")["model"]
        for name, value in load_checkpoint(path)["teacher"].items():
            assert torch.equal(value, teacher[name]), name


# --------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_has_a_config_a_preprocessor_and_a_card(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    path = checkpoint(tmp_path, "resnet", "finetune")
    (tmp_path / "log.txt").write_text(
        '{"epoch": 0, "test_acc1": 12.5}\n{"epoch": 1, "test_acc1": 25.5}\n'
    )
    (tmp_path / "knn.csv").write_text("k,top1\n20,33.25\n")
    folder = exported(path, "hf", "--full")
    assert AutoModelForImageClassification.from_pretrained(folder).config.num_labels == 10
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    found = AutoImageProcessor.from_pretrained(folder)(photograph, return_tensors="pt")
    ours = export.hugging_face.EvalTransform((64, 64), None)(np.asarray(photograph), None)["image"]
    expected = (ours.float() / 255 - 0.5) / 0.5
    assert (found["pixel_values"][0] - expected).abs().mean() < 0.02
    card = (folder / "README.md").read_text()
    assert "resnet18" in card and "test_acc1 | 25.5" in card and "top1 33.25" in card
    assert f"--to hf {folder}" in card and "ResNetForImageClassification.from_pretrained" in card
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config  # no remote code


def test_what_transformers_lacks_is_a_timm_folder(tmp_path):
    path = checkpoint(tmp_path, "semanticmim_maskfeat")
    folder = exported(path, "hf")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_prefix_tokens == 8 and model.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]
    assert "timm.create_model" in (folder / "README.md").read_text()


def test_an_exported_encoder_can_be_exported_again(tmp_path):
    """The safetensors file of a run says which classifier takes it."""
    path = checkpoint(tmp_path, "mae")
    first = exported(path, "timm")
    out = tmp_path / "again.pth"
    assert export.export([str(first), "--to", "mae", str(out)]) <= export.TOLERANCE
    encoder = load_checkpoint(path)["model"]
    assert torch.equal(load_checkpoint(out)["model"]["cls_token"], encoder["cls_token"])


def test_a_difference_is_printed_and_ends_with_1(tmp_path, monkeypatch, capsys):
    path = checkpoint(tmp_path, "mae")
    words = ["export.py", str(path), "--to", "mae", str(tmp_path / "out.pth")]
    monkeypatch.setattr("sys.argv", words)
    export.main()
    assert "largest difference of the features: 0 (at most 1e-05)" in capsys.readouterr().out
    target = export.TARGETS["mae"]._replace(compare=lambda *_: 2e-5)
    monkeypatch.setitem(export.TARGETS, "mae", target)
    with pytest.raises(SystemExit, match="1"):
        export.main()


def test_the_page_holds_the_scripts_own_table():
    assert export.table() in (ROOT / "docs/export.md").read_text()
