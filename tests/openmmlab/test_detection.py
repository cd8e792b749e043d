"""Detection on mmdet: MIMDet, the windowed ViT, C4, rates, weights, configurations, and training on
small images."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, launcher, run_command
from PIL import Image
from torch import nn

from detection import check_coco, demo
from detection.task import TASK
from unimim.checkpoint.files import load_checkpoint, save_checkpoint, save_encoder
from unimim.checkpoint.resizing import interpolate_pos_embed, interpolate_rel_pos_bias
from unimim.data.shapes import CLASSES, make_scene, write_shapes
from unimim.openmmlab import runner

runner.prepare(TASK, "none")

from det_ext import loading  # noqa: E402
from det_ext.lr_groups import prefix_groups  # noqa: E402
from det_ext.mimdet import MIMDet, sampling_order  # noqa: E402
from det_ext.offset_bias import bias_between, bias_of_map  # noqa: E402
from det_ext.window_vit import WindowViT  # noqa: E402
from detection_data import write_coco  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.testing import demo_mm_inputs  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

from modeling_finetune import create_model, relative_position_index  # noqa: E402

TINY_CONFIG = ROOT / "tests/openmmlab/tiny_detection.py"
CONFIGS = sorted(
    path for path in (ROOT / "detection/configs").glob("*/*.py") if path.parent.name != "_base_"
)
SHAPES = ROOT / "detection/configs/shapes/mask_rcnn_tiny_shapes.py"
SMALL = {"embed_dim": 32, "depth": 8, "num_heads": 2}
MIMDET = SMALL | {
    "img_size": 64,
    "decoder_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "drop_path": 0.0,
}
WINDOWS = SMALL | {"input_size": 64, "window": 2, "drop_path": 0.0}
BEIT = {"k_bias": False, "init_values": 0.1}
IMAGES = partial(torch.randn, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def mmdets_names():
    """Other tests of this process may have built segmentors."""
    init_default_scope("mmdet")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(config: str) -> nn.Module:
    """The model of a configuration without memory for its weights."""
    cfg = Config.fromfile(ROOT / "detection/configs" / config)
    with torch.device("meta"):
        return MODELS.build(cfg.model)


def drawn(model: nn.Module, std: float = 0.1) -> nn.Module:
    """All its weights at random, those that begin as zeros too."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


# --------------------------------------------------------------------------------------------------
# MIMDet


def test_parameters_of_mimdet_base_with_its_heads_are_the_published_ones():
    model = on_meta("mimdet/mimdet_base_sr0p5_3x.py")
    encoder, decoder = model.backbone.encoder, model.backbone.decoder
    frozen = encoder.pos_embed.numel() + decoder.decoder_pos_embed.numel()
    assert count(model) == 127_954_768 and count(model) - frozen == 124_753_488
    assert count(encoder.patch_embed) == 4_079_712
    assert count(encoder) - encoder.pos_embed.numel() == 89_135_712
    assert count(decoder) - decoder.decoder_pos_embed.numel() == 13_398_016
    assert [count(part) for part in (model.neck, model.rpn_head, model.roi_head)] == [
        2_772_992,
        1_184_015,
        18_262_753,
    ]
    assert not encoder.pos_embed.requires_grad and not decoder.decoder_pos_embed.requires_grad
    assert {m.eps for m in model.backbone.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_parameters_of_mimdet_large_with_its_heads_are_the_published_ones():
    model = on_meta("mimdet/mimdet_large_sr0p5_3x.py")
    encoder, decoder = model.backbone.encoder, model.backbone.decoder
    assert count(model) == 349_332_080 and count(encoder.patch_embed) == 7_250_048
    assert (
        count(model) - encoder.pos_embed.numel() - decoder.decoder_pos_embed.numel() == 345_490_544
    )


def test_maps_of_mimdet_have_four_strides_and_are_contiguous():
    maps = MIMDet("tiny", **MIMDET).eval()(IMAGES(2, 3, 50, 96))
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 16, 24),
        (2, 16, 8, 12),
        (2, 24, 4, 6),
        (2, 24, 2, 3),
    ]
    assert all(m.is_contiguous() for m in maps)
    assert set(dict(MIMDet("tiny", **MIMDET).encoder.patch_embed.named_parameters())) == {
        *(f"proj.{stage}.{part}" for stage in range(4)
          for part in ("0.weight", "1.weight", "1.bias")),
        "proj.3.3.weight", "proj.3.3.bias",
    }  # fmt: skip


def test_cells_of_the_padding_are_sampled_last():
    noise = torch.tensor([[[0.5, 0.1, 0.3], [0.2, 0.4, 0.0]], [[0.5, 0.1, 0.3], [0.2, 0.4, 0.0]]])
    order = sampling_order(noise, [(32, 48), (16, 17)])  # the second: one row of two columns
    assert order[0].tolist() == [5, 1, 3, 2, 4, 0]
    assert order[1].tolist() == [1, 0, 2, 3, 4, 5]
    assert noise[1, 0, 2].item() == pytest.approx(0.3)  # the caller's is left alone


@pytest.mark.parametrize("form", [{}, BEIT | {"rel_pos_bias": "per_block", "pos_embed": "none"}])
def test_sampling_every_token_equals_no_sampling(form):
    backbone = drawn(MIMDet("tiny", **MIMDET | form, train_sample_ratio=1.0)).eval()
    images = IMAGES(2, 3, 64, 96)
    for found, expected in zip(
        backbone(images, torch.rand(2, 4, 6)), backbone(images), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_training_samples_its_share_and_evaluation_everything():
    backbone = MIMDet("tiny", **MIMDET)
    seen = []
    backbone.encoder.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    images = IMAGES(1, 3, 64, 96)
    backbone(images)
    backbone.eval()(images)
    assert seen == [12, 24]
    assert torch.equal(backbone(images)[2], backbone(images)[2])


def test_what_is_not_sampled_shows_the_stems_features():
    """Without decoder blocks a cell's output comes from its own token alone."""
    backbone = drawn(MIMDet("tiny", **MIMDET | {"decoder_depth": 0, "pos_embed": "none"}))
    noise = torch.rand(2, 4, 4)
    kept = sampling_order(noise, [(64, 64)] * 2)[:, :8]
    coarse = backbone(images := IMAGES(2, 3, 64, 64), noise)[2].flatten(2).transpose(1, 2)
    decoder, features = backbone.decoder, backbone.encoder.patch_embed(images)[-1]
    tokens = features.flatten(2).transpose(1, 2)
    expected = decoder.conv_feat_proj(tokens)
    for image in range(2):
        cells = kept[image]
        expected[image, cells] = decoder.decoder_embed(
            backbone.encoder(features[image : image + 1], cells[None])
        )[0]
    expected = decoder.decoder_norm(expected + decoder.decoder_pos_embed[:, 1:])
    torch.testing.assert_close(coarse, expected, atol=1e-5, rtol=1e-4)


def test_all_parameters_get_a_gradient_whatever_the_ratio():
    for ratio in (0.5, 1.0):
        backbone = MIMDet("tiny", **MIMDET, train_sample_ratio=ratio)
        sum(m.square().mean() for m in backbone(IMAGES(1, 3, 64, 64))).backward()
        assert [
            n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None
        ] == []


def test_checkpointing_of_activations_changes_no_gradient():
    plain, saving = (drawn(MIMDet("tiny", **MIMDET, grad_checkpointing=on)) for on in (False, True))
    saving.load_state_dict(plain.state_dict())
    images, noise = IMAGES(1, 3, 64, 64), torch.rand(1, 4, 4)
    for backbone in (plain, saving):
        backbone(images, noise)[3].square().sum().backward()
    for (name, one), (_, other) in zip(
        plain.named_parameters(), saving.named_parameters(), strict=True
    ):
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-6), name


def test_the_detector_tells_the_backbone_the_sizes_of_images():
    model = tiny_detector().eval()
    model.backbone.sample_ratios[False] = 0.5
    given = []
    model.backbone.sample = lambda features, noise, sizes: (
        given.append(sizes) or (None, features[0, 0].numel())
    )
    samples = [
        DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1, 1)})
        for size in ((50, 64), (64, 40))
    ]
    with torch.no_grad():
        model.predict(IMAGES(2, 3, 64, 64), samples)
        model.backbone(IMAGES(2, 3, 50, 60))
    assert given == [[(50, 64), (64, 40)], [(50, 60), (50, 60)]]


@pytest.mark.parametrize(
    "wrong", [{"train_sample_ratio": 0.0}, {"test_sample_ratio": 1.5}, {"embed_dim": 36}]
)
def test_bad_options_of_mimdet_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MIMDet("tiny", **MIMDET | wrong)


# --------------------------------------------------------------------------------------------------
# Tables without a class token


def test_the_bias_of_a_map_is_the_tables_by_the_repositorys_index():
    table = torch.randn(25, 2)  # of 3 x 3 cells
    index = relative_position_index((3, 3))[1:, 1:]
    assert torch.equal(bias_of_map(table, (3, 3)), table[index].permute(2, 0, 1))


@pytest.mark.parametrize("grid", [(3, 3), (2, 3), (4, 3), (2, 6), (5, 5)])
def test_the_bias_between_patches_is_that_of_the_map_and_far_offsets_are_the_farthest(grid):
    table = torch.randn(25, 2)
    cells = torch.stack([torch.randperm(math.prod(grid))[:5] for _ in range(3)])
    whole = bias_of_map(table, grid)
    for found, ids in zip(bias_between(table, cells, grid), cells, strict=True):
        assert torch.equal(found, whole[:, ids][:, :, ids])
    last = math.prod(grid) - 1
    reach = [min(side - 1, 2) for side in grid]
    row = (2 + reach[0]) * 5 + 2 + reach[1]
    assert torch.equal(whole[:, last, 0], table[row])


# --------------------------------------------------------------------------------------------------
# The windowed ViT


def test_windows_are_cut_and_joined():
    backbone = WindowViT("tiny", **WINDOWS)
    tokens = torch.arange(16.0).view(1, 16, 1).expand(1, 16, 32)
    windows = backbone.cut(tokens)
    assert windows.shape == (4, 4, 32) and windows[1, :, 0].tolist() == [2, 3, 6, 7]
    assert torch.equal(backbone.join(windows), tokens)


def test_windowed_blocks_see_their_window_and_the_last_of_a_group_everything():
    backbone = drawn(WindowViT("tiny", **WINDOWS)).eval()
    assert [backbone.is_global(k) for k in range(8)] == [False, True] * 4
    outputs = []
    for number in (0, 1):
        backbone.blocks[number].register_forward_hook(lambda _, __, out: outputs.append(out))
    images = IMAGES(1, 3, 64, 64)
    backbone(images)
    changed = images.clone()
    changed[..., :16, :16] += 1  # the first token, in the first window
    backbone(changed)
    windowed, whole = (outputs[2] - outputs[0]).abs(), (outputs[3] - outputs[1]).abs()
    assert windowed.shape == (4, 4, 32) and windowed[0].amax(-1).all() and not windowed[1:].any()
    assert whole.shape == (1, 16, 32) and whole.amax(-1).all()


def test_maps_of_the_windowed_ViT_are_the_outputs_of_its_groups():
    backbone = drawn(
        WindowViT("tiny", **WINDOWS | {"depth": 4})
    ).eval()  # each block sees everything
    x = backbone.patch_embed(images := IMAGES(2, 3, 64, 64)) + backbone.pos_embed
    maps = backbone(images)
    index = relative_position_index((4, 4))[1:, 1:]
    bias = backbone.global_bias.relative_position_bias_table[index].permute(2, 0, 1)
    for block, found in zip(backbone.blocks, maps, strict=True):
        x = block(x, bias)
        assert found.shape == (2, 32, 4, 4) and found.is_contiguous()
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), x, atol=1e-5, rtol=1e-4)


def test_the_windowed_ViT_pads_smaller_images_and_refuses_larger_ones():
    backbone = drawn(WindowViT("tiny", **WINDOWS)).eval()
    images = IMAGES(1, 3, 40, 64)
    padded = nn.functional.pad(images, (0, 0, 0, 24))
    assert all(map(torch.equal, backbone(images), backbone(padded)))
    with pytest.raises(ValueError, match="input_size=64"):
        backbone(IMAGES(1, 3, 64, 80))


def test_tables_of_the_windowed_ViT_have_the_published_sizes_and_positions_say_whether_they_train():
    with torch.device("meta"):
        backbone = WindowViT("base")
    assert backbone.window_bias.relative_position_bias_table.shape == (961, 12)
    assert backbone.global_bias.relative_position_bias_table.shape == (16129, 12)
    assert not backbone.pos_embed.requires_grad
    assert WindowViT("tiny", **WINDOWS, pos_embed="sincos_trainable").pos_embed.requires_grad
    with pytest.raises(ValueError, match="window 3"):
        WindowViT("tiny", **WINDOWS | {"window": 3})


# --------------------------------------------------------------------------------------------------
# Weights


def saved(folder, state: dict) -> str:
    path = folder / "checkpoint-0.pth"
    save_checkpoint(path, {"model": state})
    return str(path)


def mae_state(**decoder) -> dict[str, torch.Tensor]:
    import modeling_pretrain  # noqa: F401, registers

    form = (
        SMALL
        | {"input_size": 48, "decoder_embed_dim": 24, "decoder_depth": 3, "decoder_num_heads": 2}
        | decoder
    )
    return drawn(create_model("mae_tiny_patch16_224", **form)).state_dict()


def beit_state(**form) -> dict[str, torch.Tensor]:
    return drawn(
        create_model("beit_tiny_patch16_224", **SMALL | {"input_size": 48} | form)
    ).state_dict()


def test_mimdet_takes_encoder_and_decoder_of_a_whole_mae(tmp_path, caplog):
    state = mae_state()
    backbone = MIMDet("tiny", **MIMDET, pretrained=saved(tmp_path, state))
    stem = copy.deepcopy(backbone.encoder.patch_embed.state_dict())
    backbone.init_weights()
    own = backbone.state_dict()
    for name, value in own.items():
        inner = name.split(".", 1)[1]
        if inner.endswith("pos_embed"):
            assert torch.equal(value, interpolate_pos_embed(state[inner], (4, 4), 1)), name
        elif not inner.startswith(("patch_embed.", "conv_feat_proj.")):
            assert torch.equal(value, state[inner]), name
    assert all(
        torch.equal(value, stem[name])
        for name, value in backbone.encoder.patch_embed.state_dict().items()
    )
    assert "no decoder" not in caplog.text


def test_mimdet_says_so_where_a_file_has_no_decoder(tmp_path, caplog):
    state = {name: value for name, value in mae_state().items() if not name.startswith("decoder_")}
    backbone = MIMDet("tiny", **MIMDET, pretrained=saved(tmp_path, state))
    before = copy.deepcopy(backbone.decoder.state_dict())
    backbone.init_weights()
    assert all(
        torch.equal(value, before[name]) for name, value in backbone.decoder.state_dict().items()
    )
    assert torch.equal(backbone.encoder.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])
    assert "no decoder: MIMDet's starts from random weights" in caplog.text


@pytest.mark.parametrize("shared", [True, False])
def test_mimdet_takes_the_tables_of_BEiTs_form_without_the_class_tokens_rows(tmp_path, shared):
    state = beit_state(rel_pos_bias="shared" if shared else "per_block")
    form = BEIT | {"rel_pos_bias": "per_block", "pos_embed": "none"}
    backbone = MIMDet("tiny", **MIMDET | form, pretrained=saved(tmp_path, state))
    backbone.init_weights()
    name = "rel_pos_bias" if shared else "blocks.2.attn"
    table = state[f"{name}.relative_position_bias_table"]
    expected = interpolate_rel_pos_bias(table, 3, 4)[:-3]
    torch.testing.assert_close(
        backbone.encoder.blocks[2].attn.relative_position_bias_table.data, expected
    )
    assert torch.equal(backbone.encoder.blocks[2].gamma_1, state["blocks.2.gamma_1"])
    assert torch.equal(backbone.encoder.blocks[2].attn.q_bias, state["blocks.2.attn.q_bias"])


def test_files_of_other_networks_are_refused(tmp_path):
    path = saved(tmp_path, {f"layers.{k}.weight": torch.zeros(3) for k in range(9)})
    for backbone in (
        MIMDet("tiny", **MIMDET, pretrained=path),
        WindowViT("tiny", **WINDOWS, pretrained=path),
    ):
        before = copy.deepcopy(backbone.state_dict())
        with pytest.raises(ValueError, match="matches only 0%"):
            backbone.init_weights()
        assert all(
            torch.equal(value, before[name]) for name, value in backbone.state_dict().items()
        )


def test_the_windowed_ViT_takes_MAEs_weights_with_their_positions(tmp_path):
    state = mae_state()
    backbone = WindowViT("tiny", **WINDOWS, pretrained=saved(tmp_path, state))
    backbone.init_weights()
    assert torch.equal(backbone.pos_embed, interpolate_pos_embed(state["pos_embed"], 4, 1)[:, 1:])
    assert torch.equal(backbone.patch_embed.proj.weight, state["patch_embed.proj.weight"])
    assert torch.equal(backbone.blocks[1].attn.qkv.bias, state["blocks.1.attn.qkv.bias"])
    assert not backbone.window_bias.relative_position_bias_table.any()  # as published, from zero


def test_the_windowed_ViT_resizes_a_shared_table_for_windows_and_for_the_whole(tmp_path):
    state = beit_state(rel_pos_bias="shared")
    path, form = saved(tmp_path, state), WINDOWS | BEIT | {"pos_embed": "none"}
    table = state["rel_pos_bias.relative_position_bias_table"]
    published, geometric = (
        WindowViT("tiny", **form),
        WindowViT("tiny", **form, table_resize="geometric"),
    )
    for backbone in (published, geometric):
        backbone.load(path)
    grid = table[:-3].T.unflatten(1, (5, 5))
    for name, side in (("window_bias", 2), ("global_bias", 4)):
        found = getattr(published, name).relative_position_bias_table
        expected = (
            nn.functional.interpolate(grid[None], size=2 * side - 1, mode="bicubic")[0].flatten(1).T
        )
        torch.testing.assert_close(found.data, expected)
        found = getattr(geometric, name).relative_position_bias_table
        torch.testing.assert_close(found.data, interpolate_rel_pos_bias(table, 3, side)[:-3])


def test_the_windowed_ViT_averages_the_tables_of_the_blocks_that_share_one(tmp_path):
    state = beit_state(rel_pos_bias="per_block")
    backbone = WindowViT(
        "tiny", **WINDOWS | BEIT | {"pos_embed": "none", "window": 4, "input_size": 192}
    )
    backbone.load(saved(tmp_path, state))
    tables = torch.stack(
        [state[f"blocks.{k}.attn.relative_position_bias_table"][:-3] for k in (0, 2, 4, 6)]
    )
    expected = interpolate_pos_embed(tables.mean(0, keepdim=True), 7, 0)[0]
    torch.testing.assert_close(backbone.window_bias.relative_position_bias_table.data, expected)


def test_an_exported_encoder_gives_the_weights_of_its_checkpoint(tmp_path):
    state = beit_state(rel_pos_bias="shared")
    save_encoder(tmp_path / "encoder-0.safetensors", state, {})
    one, other = (WindowViT("tiny", **WINDOWS | BEIT | {"pos_embed": "none"}) for _ in range(2))
    one.load(saved(tmp_path, state))
    other.load(str(tmp_path / "encoder-0.safetensors"))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_several_class_tokens_lose_their_positions(tmp_path):
    form = {"num_cls_tokens": 3, "pos_embed": "learned", "rel_pos_bias": "none"}
    state = beit_state(**form)
    path = saved(tmp_path, state)
    assert torch.equal(loading.weights_without_class(path)["pos_embed"], state["pos_embed"][:, 3:])
    assert torch.equal(
        loading.weights_without_class(path, prefix=1)["pos_embed"], state["pos_embed"][:, 2:]
    )


METHODS = {  # that pre-trains for the configurations of that name
    "mae": "mae_tiny_patch16_224",
    "semmae": "semmae_tiny_patch16_224",
    "semaim": "semaim_tiny_patch16_224",
    "beit": "beit_tiny_patch16_224_8k_vocab",
    "conmim": "conmim_tiny_patch16_224",
    "semanticmim_beit": "semanticmim_beit_tiny_patch16_224",
    "semanticmim_maskfeat": "semanticmim_maskfeat_tiny_patch16_224",
}


@pytest.mark.parametrize("method", METHODS)
def test_configurations_take_what_their_method_saves(method, tmp_path):
    """No weight of the blocks and no position stays as it was drawn."""
    import modeling_pretrain  # noqa: F401, registers

    options = {"query_depth": 8} if method == "semaim" else {}
    model = create_model(METHODS[method], **SMALL, **options, input_size=48)
    cfg = Config.fromfile(
        ROOT / f"detection/configs/vit_fpn/{method}_base_25ep_lsj.py"
    ).model.backbone
    backbone = MODELS.build(
        {**cfg, **WINDOWS, "pretrained": saved(tmp_path, drawn(model).state_dict())}
    )
    before = {name: value.clone() for name, value in backbone.named_parameters()}
    backbone.init_weights()
    same = [name for name, value in backbone.named_parameters() if torch.equal(value, before[name])]
    assert all(name.startswith(("window_bias.", "global_bias.")) for name in same), same
    assert (len(same) == 0) == (method in ("beit", "conmim"))  # the others have no tables


@pytest.mark.parametrize("method", ["a2mim", "simmim"])
def test_the_ViT_of_A2MIM_starts_from_its_pretraining(method, tmp_path):
    import modeling_pretrain  # noqa: F401, registers

    model = create_model(f"{method}_vit_tiny_patch16_224", **SMALL, input_size=48)
    path = ROOT / "detection/configs/a2mim/mask_rcnn_vit_base_giou_4conv1fc_1x.py"
    options = {
        **SMALL,
        "out_indices": (1, 3, 5, 7),
        "pretrained": saved(tmp_path, drawn(model).state_dict()),
    }
    backbone = MODELS.build({**Config.fromfile(path).model.backbone, **options})
    before = {name: value.clone() for name, value in backbone.named_parameters()}
    backbone.init_weights()
    assert [
        name for name, value in backbone.named_parameters() if torch.equal(value, before[name])
    ] == []


def test_both_parts_of_C4_start_from_one_file(tmp_path):
    """Backbone and shared head of stage 4, which the configuration names as the parts that
    --pretrained is for."""
    import timm

    cfg = Config.fromfile(ROOT / "detection/configs/a2mim/mask_rcnn_r50_c4_ms_1x.py")
    state = timm.create_model("resnet50").state_dict()
    runner.use_pretrained(cfg, saved(tmp_path, state))
    backbone, head = MODELS.build(cfg.model.backbone), MODELS.build(cfg.model.roi_head.shared_head)
    for part in (backbone, head):
        part.init_weights()
    assert torch.equal(backbone.network.layer3[5].conv3.weight, state["layer3.5.conv3.weight"])
    for name, value in head.state_dict().items():
        assert name.startswith("norm.") or torch.equal(value, state[name]), name
    head.eval()
    found = head(torch.randn(1, 1024, 14, 14))
    assert found.shape == (1, 2048, 7, 7) and head.norm.num_features == 2048


# --------------------------------------------------------------------------------------------------
# Rates


def test_rates_of_mimdets_parts_are_the_published_ones():
    model = tiny_detector()
    rates = Config.fromfile(
        ROOT / "detection/configs/mimdet/mimdet_large_sr0p5_3x.py"
    ).optim_wrapper.paramwise_cfg.rates
    groups = {group["group_name"]: group for group in prefix_groups(model, 8e-5, 0.1, rates)}
    stem, rest = "backbone.encoder.patch_embed", "backbone.encoder"
    lr = {stem: 8e-5, rest: 8e-5 / 3.5, "rest": 8e-5 * 3.5}
    assert {key: group["lr"] for key, group in groups.items()} == {
        f"{part}_{kind}": pytest.approx(rate)
        for part, rate in lr.items()
        for kind in ("decay", "no_decay")
    }
    assert {
        key: group["weight_decay"] for key, group in groups.items() if key.endswith("no_decay")
    } == {f"{part}_no_decay": 0.0 for part in lr}
    grouped = [name for group in groups.values() for name in group["param_names"]]
    assert sorted(grouped) == sorted(
        name for name, p in model.named_parameters() if p.requires_grad
    )
    assert (
        "backbone.decoder.decoder_blocks.0.attn.qkv.weight" in groups["rest_decay"]["param_names"]
    )
    assert "backbone.encoder.blocks.0.norm1.weight" in groups[f"{rest}_no_decay"]["param_names"]
    assert "backbone.encoder.patch_embed.proj.3.3.weight" in groups[f"{stem}_decay"]["param_names"]
    with pytest.raises(ValueError, match=r"begins with 'decoder\.'"):
        prefix_groups(model, 1.0, 0.0, {"decoder.": 1.0, "": 1.0})
    with pytest.raises(ValueError, match="none is given for neck"):
        prefix_groups(model, 1.0, 0.0, {"backbone.": 1.0})


# --------------------------------------------------------------------------------------------------
# Configurations


def shrunk(model: Config) -> Config:
    """The same classes and options of a configuration's model, quickly built: fewer channels, where
    a ViT has them."""
    model = copy.deepcopy(model)
    if model.backbone.type != "TimmBackbone":
        model.backbone.update(SMALL, grad_checkpointing=False)
        model.backbone.update(
            {"out_indices": (1, 3, 5, 7)} if model.backbone.type.startswith("Vision") else {}
        )
        model.neck.update(
            in_channels=[8, 16, 512, 512] if model.backbone.type == "MIMDet" else [32] * 4
        )
    return model


def dicts_in(value):
    """All dicts in nested dicts and lists."""
    if isinstance(value, dict):
        yield value
    for item in (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    ):
        yield from dicts_in(item)


def tiny_detector() -> nn.Module:
    """MIMDet with small heads, batch norms in place of synchronized ones."""
    return revert_sync_batchnorm(MODELS.build(Config.fromfile(TINY_CONFIG).model))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds_and_keeps_the_rules(path):
    cfg = Config.fromfile(path)
    model = MODELS.build(shrunk(cfg.model))
    assert model.backbone.pretrained in ("", None)
    layers = [part for part in dicts_in(cfg.model) if part.get("type") == "RoIAlign"]
    assert layers and all(layer["use_torchvision"] for layer in layers)
    assert {"SafeCheckpointHook", "SeedStepHook"} <= {hook["type"] for hook in cfg.custom_hooks}
    assert cfg.train_dataloader.dataset.pipeline[0].type == "SeedSample"
    processes = 1 if path == SHAPES else 8
    assert cfg.train_dataloader.batch_size * processes == cfg.auto_scale_lr.base_batch_size
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_epochs


@pytest.mark.parametrize(
    "name",
    [
        "mimdet/mimdet_base_sr0p5_3x", "vit_fpn/mae_base_100ep_lsj", "vit_fpn/beit_base_100ep_lsj",
        "a2mim/mask_rcnn_r50_fpn_ms_1x", "a2mim/mask_rcnn_r50_c4_ms_1x",
        "a2mim/mask_rcnn_vit_base_giou_4conv1fc_1x",
    ],
)  # fmt: skip
def test_every_kind_of_detector_trains_all_its_parameters_and_predicts(name):
    """DDP waits for a gradient of every parameter."""
    cfg = shrunk(Config.fromfile(ROOT / f"detection/configs/{name}.py").model)
    cfg.train_cfg.rcnn.sampler.num, cfg.train_cfg.rpn_proposal.max_per_img = 16, 32
    cfg.test_cfg.rcnn.score_thr, cfg.test_cfg.rpn.max_per_img = 0.0, 16
    if cfg.backbone.type == "WindowViT":
        cfg.backbone.update(input_size=128, window=4)
    model = revert_sync_batchnorm(MODELS.build(cfg))
    batch = model.data_preprocessor(
        demo_mm_inputs(2, [(3, 96, 128), (3, 128, 96)], with_mask=True), True
    )
    losses = model(**batch, mode="loss")
    total = sum(
        sum(value) if isinstance(value, list) else value
        for key, value in losses.items()
        if "loss" in key
    )
    total.backward()
    assert total.isfinite() and {"loss_rpn_cls", "loss_cls", "loss_bbox", "loss_mask"} <= set(
        losses
    )
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        found = model.eval()(**batch, mode="predict")
    for sample in found:
        instances = sample.pred_instances
        assert len(instances) and instances.masks.shape == (len(instances), *sample.ori_shape[:2])


@pytest.mark.parametrize("name", ["ms", "crop", "mimdet", "lsj1024"])
def test_training_images_have_the_published_sizes(name, tmp_path):
    cfg = Config.fromfile(ROOT / f"detection/configs/_base_/datasets/coco_instance_{name}.py")
    from mmdet.registry import DATASETS

    cfg.train_dataloader.dataset.data_root = str(write_coco(tmp_path / "coco"))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    shapes, shorts = [], set()
    for index in [*range(8)] * 2:
        sample = dataset[index]
        instances = sample["data_samples"].gt_instances
        height, width = sample["inputs"].shape[1:]
        assert instances.masks.masks.shape == (len(instances), height, width)
        shapes.append((height, width))
        shorts.add(min(height, width))
    if name == "lsj1024":
        assert all(max(shape) <= 1024 for shape in shapes) and min(map(max, shapes)) < 1024
    else:
        steps = {"ms": range(640, 801, 32), "crop": range(480, 801, 32)}.get(
            name, range(480, 801, 32)
        )
        allowed = set(steps) - ({672, 704} if name == "mimdet" else set())
        capped = {shape for shape in shapes if max(shape) == 1333}
        assert shorts <= allowed | {min(shape) for shape in capped}


def test_the_roi_extractor_reads_maps_in_any_memory_order():
    cfg = Config.fromfile(CONFIGS[0].parent.parent / "mimdet/mimdet_base_sr0p5_3x.py")
    extractor = MODELS.build(cfg.model.roi_head.bbox_roi_extractor)
    maps = [torch.randn(2, 256, side, side) for side in (32, 16, 8, 4)]
    rois = torch.tensor([[0, 3.0, 4, 60, 50], [1, 10, 10, 100, 120]])
    expected = extractor(maps, rois)
    found = extractor([level.contiguous(memory_format=torch.channels_last) for level in maps], rois)
    assert torch.equal(found, expected)


# --------------------------------------------------------------------------------------------------
# COCO's layout


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


def test_a_folder_in_cocos_layout_passes_the_check(coco, capsys):
    assert check_coco.main([str(coco), "--every", "1"]) == 0
    assert (
        "train2017: 8 images, 8 of them with objects, 16 objects\nval2017: 4 images"
        in capsys.readouterr().out
    )


def test_the_check_names_everything_that_is_wrong(tmp_path, capsys):
    root = write_coco(tmp_path / "coco")
    (root / "val2017/000000000002.jpg").unlink()
    (root / "val2017/000000000003.jpg").write_bytes(b"no picture")
    Image.new("RGB", (20, 30)).save(root / "val2017/000000000004.jpg")
    file = root / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"].pop()
    content["annotations"][0] |= {
        "image_id": 99,
        "category_id": 12,
        "segmentation": [],
        "bbox": [1, 2, -3, 4],
    }
    file.write_text(json.dumps(content))
    assert check_coco.main([str(root), "--every", "1"]) == 1
    out = capsys.readouterr().out
    for problem in (
        "1 listed images are not in", "000000000003.jpg cannot be opened",
        "000000000004.jpg is (20, 30), listed as", "it has 79 categories",
        "1 objects are in no image that is listed: 1.",
        "1 objects are of no category that is listed", "1 objects have an empty box",
        "1 objects have no outline",
    ):  # fmt: skip
        assert f"val2017: {problem}" in out, problem
    file.write_text("{")
    assert check_coco.main([str(root)]) == 1 and "is not JSON or damaged" in capsys.readouterr().out
    assert check_coco.main([str(tmp_path)]) == 1 and "does not exist" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Runs


ALL = "model.test_cfg.rcnn.score_thr=0.0"  # after a few steps nothing is certain


def flags(coco, folder, *more: str) -> list[str]:
    return ["--data-root", str(coco), "--work-dir", str(folder), *more]


def schedule(epochs: int, every: int = 1) -> list[str]:
    keys = ("train_cfg.max_epochs", "train_cfg.val_interval", "default_hooks.checkpoint.interval")
    return [
        "--cfg-options",
        ALL,
        *map("=".join, zip(keys, map(str, (epochs, epochs, every)), strict=True)),
    ]


def train_tiny(coco, folder, epochs: int, *more: str):
    start = [str(TINY_CONFIG), "--pretrained", "none", "--seed", "0", *more]
    return runner.train(TASK, [*start, *flags(coco, folder, *schedule(epochs))])


def evaluate(coco, folder, path, *more: str) -> dict[str, float]:
    return runner.test(
        TASK, [str(TINY_CONFIG), str(path), *more, *flags(coco, folder, "--cfg-options", ALL)]
    )


def last_metrics(run) -> dict[str, float]:
    """What the last validation of a training found."""
    scalars = run.message_hub.log_scalars
    return {
        name.removeprefix("val/"): scalars[name].current()
        for name in scalars
        if name.startswith("val/coco/")
    }


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    """The folder of two epochs without a break, and what validation found after them."""
    folder = tmp_path_factory.mktemp("run")
    return folder, last_metrics(train_tiny(coco, folder, 2))


def test_a_checkpoint_gives_what_validation_in_training_found(coco, trained, tmp_path):
    folder, metrics = trained
    found = evaluate(coco, tmp_path, folder / "epoch_2.pth", "--out", str(tmp_path / "found"))
    assert {"coco/bbox_mAP_50", "coco/segm_mAP_50"} < set(found) and found == metrics
    rows = json.loads((tmp_path / "found.segm.json").read_text())
    assert {row["image_id"] for row in rows} == {1, 2, 3, 4} and {"score", "segmentation"} < set(
        rows[0]
    )


def test_a_resumed_training_equals_one_without_a_break(coco, trained, tmp_path):
    train_tiny(coco, tmp_path, 1)
    train_tiny(coco, tmp_path, 2, "--resume")
    files = [load_checkpoint(folder / "epoch_2.pth") for folder in (trained[0], tmp_path)]  # safely
    whole, resumed = (file["state_dict"] for file in files)
    assert whole.keys() == resumed.keys() and all(
        torch.equal(whole[name], resumed[name]) for name in whole
    )


def test_training_says_where_its_weights_come_from_and_that_the_batch_is_another(
    coco, tmp_path, capsys
):
    with pytest.raises(ValueError, match="--pretrained is missing"):
        runner.train(TASK, [str(TINY_CONFIG), *flags(coco, tmp_path)])
    other = saved(tmp_path, {"layers.0.weight": torch.zeros(3)})
    options = ["--cfg-options", "auto_scale_lr.base_batch_size=64"]
    with pytest.raises(ValueError, match=r"--pretrained .*matches only 0%"):
        runner.train(
            TASK, [str(TINY_CONFIG), "--pretrained", other, *flags(coco, tmp_path, *options)]
        )
    said = capsys.readouterr().out
    assert "the total batch is 2" in said and "the recipe's is 64" in said


def test_the_demo_draws_what_it_finds(coco, trained, tmp_path):
    arguments = [
        str(TINY_CONFIG),
        str(trained[0] / "epoch_2.pth"),
        str(coco / "val2017"),
        "--out",
        str(tmp_path),
    ]
    demo.main([*arguments, "--score-thr", "0.0", "--cfg-options", ALL])
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == [f"{number:012d}.png" for number in range(1, 5)]
    before = np.asarray(Image.open(coco / "val2017/000000000001.jpg")).astype(int)
    after = np.asarray(Image.open(written[0])).astype(int)
    assert after.shape == before.shape and (np.abs(after - before).max(-1) > 30).mean() > 0.01


def test_the_configuration_of_shapes_trains_on_what_make_shapes_writes(tmp_path):
    scenes, work = tmp_path / "scenes", tmp_path / "work"
    write_shapes(scenes, train=16, val=2)
    where = ["--data-root", str(scenes), "--work-dir", str(work)]
    config = Config.fromfile(SHAPES)
    assert tuple(config.classes) == CLASSES
    start = [str(SHAPES), "--pretrained", "none", *where]
    run = runner.train(TASK, [*start, *schedule(1)])
    assert {"coco/bbox_mAP", "coco/segm_mAP"} < set(last_metrics(run))

    # the numbers of the categories are those of the data set
    dataset = run.train_dataloader.dataset
    first = dataset[0]["data_samples"]
    index = int(Path(first.img_path).stem)
    assert first.gt_instances.labels.tolist() == list(make_scene("train", index).classes)

    images = scenes / "images" / "validation"
    drawn = ["--out", str(tmp_path / "drawn"), "--score-thr", "0.0"]
    demo.main([str(SHAPES), str(work / "epoch_1.pth"), str(images), *drawn, *where])
    assert len(list((tmp_path / "drawn").iterdir())) == 2

    (scenes / "instances_val.json").unlink()
    with pytest.raises(ValueError, match=r"instances_val\.json does not exist; set --data-root"):
        runner.train(TASK, start)


@pytest.mark.slow
def test_two_ranks_train_together(coco, tmp_path):
    """Six steps of two processes; what they validated together, one process finds in their file."""
    launch = [*launcher(2), "detection/train.py"]
    start = [str(TINY_CONFIG), "--pretrained", "none", "--seed", "0"]
    done = run_command([*launch, *start, *flags(coco, tmp_path, *schedule(3, 3))])
    assert done.returncode == 0, done.stdout[-3000:]
    path = tmp_path / "epoch_3.pth"
    meta = load_checkpoint(path)["meta"]
    assert (meta["iter"], meta["epoch"]) == (6, 3)  # one process would need 12
    rows = [
        json.loads(line)
        for line in next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    ]
    together = next(row for row in rows if "coco/bbox_mAP" in row)
    found = evaluate(coco, tmp_path / "one", path)
    assert found == {name: together[name] for name in found}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute and a half on an idle core
def test_mimdet_learns_to_find_squares(coco, tmp_path):
    """192 steps from random weights; seen (two seeds): box AP50 0.96, 1.00; box AP 0.62, 0.63; mask
    AP 0.70, 0.68."""
    metrics = last_metrics(train_tiny(coco, tmp_path, 48))
    names = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
    runner.log.info("%s", {name: metrics[f"coco/{name}"] for name in names})
    assert metrics["coco/bbox_mAP_50"] > 0.6 and metrics["coco/segm_mAP_50"] > 0.6
    assert evaluate(coco, tmp_path / "one", tmp_path / "epoch_48.pth") == metrics
