"""What segmentation and detection share: operators, backbones, loading, layer decay, resuming"""

import copy
import importlib
import subprocess
import sys

import pytest
import torch
import torchvision
from helpers import ROOT, block_outputs, environment
from torch import nn

from unimim.checkpoint.files import save_checkpoint, save_encoder
from unimim.checkpoint.loading import load_pretrained
from unimim.checkpoint.resizing import interpolate_rel_pos_bias
from unimim.engine.distributed import free_port
from unimim.openmmlab import compat, doctor

compat.prepare("mmseg", "mmdet")

from mmcv.ops import RoIAlign  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from modeling_finetune import VisionTransformer, create_model  # noqa: E402
from unimim.openmmlab import register, runner  # noqa: E402, F401
from unimim.openmmlab.checkpoint import class_tokens, load_backbone  # noqa: E402
from unimim.openmmlab.cnn_backbone import TimmBackbone  # noqa: E402
from unimim.openmmlab.data import Key, PositionSampler  # noqa: E402
from unimim.openmmlab.layer_decay import layer_groups  # noqa: E402
from unimim.openmmlab.pyramid import BeitPyramid  # noqa: E402
from unimim.openmmlab.vit_backbone import VisionTransformerBackbone, resized_table  # noqa: E402

TINY = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "patch_size": 8,
    "input_size": 32,
    "out_indices": (0, 1, 2, 3),
}
BEIT = TINY | {"rel_pos_bias": "per_block", "init_values": 0.1}
MAE = TINY | {"k_bias": True, "pos_embed": "sincos_trainable"}

# --------------------------------------------------------------------------------------------------
# Operators


def rois() -> torch.Tensor:
    corners = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)) * 20
    return torch.cat(
        [torch.tensor([[0.0], [0], [1], [1], [1], [0]]), corners, corners + 9.5], dim=1
    )


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("aligned", "ratio"), [(True, 0), (False, 2)])
def test_roi_align_of_mmcv_computes_what_torchvision_does_in_any_memory_order(
    order, aligned, ratio
):
    maps = torch.randn(2, 3, 16, 16).contiguous(memory_format=order).requires_grad_()
    layer = RoIAlign(7, spatial_scale=0.5, sampling_ratio=ratio, aligned=aligned)
    assert not layer.use_torchvision
    expected = torchvision.ops.roi_align(maps, rois(), 7, 0.5, ratio, aligned)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), maps)[0]
    found = layer(maps, rois())
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad((found * weights).sum(), maps)[0], wanted)


def test_nms_of_mmcv_is_torchvisions():
    from mmcv.ops import nms

    boxes = torch.rand(40, 2, generator=torch.Generator().manual_seed(2)) * 10
    boxes, scores = torch.cat([boxes, boxes + 4], dim=1), torch.rand(40)
    kept = torchvision.ops.nms(boxes, scores, 0.5)
    assert 1 < len(kept) < 40
    rows, indices = nms(boxes, scores, 0.5)
    assert torch.equal(indices, kept) and torch.equal(
        rows, torch.cat([boxes[kept], scores[kept, None]], dim=1)
    )


def test_other_operators_say_their_name_when_called():
    with pytest.raises(NotImplementedError, match="nms_rotated"):
        importlib.import_module("mmcv._ext").nms_rotated()
    with pytest.raises(NotImplementedError, match="avg"):
        RoIAlign(2, pool_mode="max")(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5))


def test_compiled_operators_are_left_alone(monkeypatch):
    compiled = type(sys)("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    assert compat.has_compiled_operators() and not compat.install_operators()
    assert sys.modules["mmcv._ext"] is compiled


def test_the_doctor_names_what_is_missing(monkeypatch, capsys):
    assert doctor.main() == 0 and "mmengine             0.10.7" in capsys.readouterr().out
    monkeypatch.setattr(
        compat,
        "pins",
        lambda: {"mmengine": "==0.10.6", "no-such-library": "==1.0", "setuptools": "<2"},
    )
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert (
        "mmengine is 0.10.7, ==0.10.6 is needed." in out
        and "no-such-library==1.0 is not installed." in out
    )
    with pytest.raises(
        SystemExit,
        match=r"no_such_library cannot be imported: pip install -r requirements-downstream",
    ):
        compat.require("no_such_library")


# --------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("name", ["encoder-1.safetensors", "checkpoint-1.pth"])
@pytest.mark.parametrize(
    "backbone",
    [{"type": "VisionTransformerBackbone", **TINY}, {"type": "TimmBackbone", "name": "resnet18"}],
    ids=["vit", "resnet"],
)
def test_a_flipped_bit_is_noticed_by_what_the_configurations_build(tmp_path, backbone, name):
    path = tmp_path / name
    built = MODELS.build({**backbone, "pretrained": str(path)})
    weights = getattr(built, "network", built).state_dict()
    weights = {key: value + 1 for key, value in weights.items() if value.is_floating_point()}
    if path.suffix == ".pth":
        save_checkpoint(path, {"model": weights})
    else:
        save_encoder(path, weights, {"model": "x"})
    whole = path.read_bytes()
    for at in (len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        before = copy.deepcopy(built.state_dict())
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            built.init_weights()
        assert all(map(torch.equal, built.state_dict().values(), before.values()))
    path.write_bytes(whole)
    built.init_weights()
    assert any(not torch.equal(value, before[key]) for key, value in built.state_dict().items())


RANK_WITH_A_MISTAKE = """
import sys, time
import torch.distributed as dist
from unimim.logs import setup_logging
from unimim.openmmlab.runner import launch

def main():
    dist.init_process_group("gloo")
    setup_logging(dist.get_rank())
    dist.barrier()
    dist.destroy_process_group = lambda: time.sleep(600)  # as nccl's may, while others wait
    if dist.get_rank() == 1:
        raise ValueError("--data-root holds no images") if sys.argv[1] == "user" else KeyError("x")
    dist.barrier()

launch(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("whose", "says"), [("user", "error: --data-root"), ("code", "KeyError")])
def test_after_an_error_no_rank_waits_to_leave(whose, says):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(2):
        own = environment() | place | {"RANK": str(rank)}
        command = [sys.executable, "-c", RANK_WITH_A_MISTAKE, whose]
        ranks.append(
            subprocess.Popen(
                command, cwd=ROOT, env=own, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=60)[0] for process in ranks]
    assert says in outputs[1] and [process.returncode for process in ranks] == [1, 1]
    assert ("Traceback" in outputs[1]) == (whose == "code")


# --------------------------------------------------------------------------------------------------
# The ViT


@pytest.mark.parametrize(
    "form", [BEIT, MAE, MAE | {"num_cls_tokens": 3}, BEIT | {"rel_pos_bias": "shared"}]
)
def test_maps_are_the_blocks_patch_tokens(form):
    backbone = VisionTransformerBackbone(**form).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.1)
    vit = VisionTransformer(**{k: v for k, v in form.items() if k != "out_indices"}, num_classes=0)
    vit.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32)
    maps, tokens = backbone(images), block_outputs(vit.eval(), images)
    for found, expected in zip(maps, tokens, strict=True):
        assert found.shape == (2, 32, 4, 4) and found.is_contiguous()
        assert torch.equal(found.flatten(2).transpose(1, 2), expected[:, vit.num_prefix_tokens :])


@pytest.mark.parametrize("form", [BEIT, MAE, BEIT | {"rel_pos_bias": "shared"}])
def test_other_sizes_equal_a_model_of_that_size_with_resized_weights(form):
    backbone = VisionTransformerBackbone(**form).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.1)
    large = VisionTransformerBackbone(**form | {"input_size": (40, 64)}).eval()
    load_pretrained(large, backbone.state_dict(), min_matched=1.0)
    images = torch.randn(1, 3, 40, 64)
    for found, expected in zip(backbone(images), large(images), strict=True):
        assert found.shape == (1, 32, 5, 8)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    padded = nn.functional.pad(images[..., :35, :61], (0, 3, 0, 5))
    assert all(map(torch.equal, backbone(images[..., :35, :61]), backbone(padded)))


def test_resized_tables_have_the_loaders_numbers_and_a_gradient():
    table = torch.randn(7 * 7 + 3, 2, dtype=torch.float64, requires_grad=True)
    found = resized_table(table, (4, 4), (3, 6))
    torch.testing.assert_close(found, interpolate_rel_pos_bias(table, 4, (3, 6)))
    found[:-3].sum().backward()
    assert table.grad[:-3].abs().sum() > 0 and not table.grad[-3:].any()


def test_final_norm_and_blocks_are_checked():
    with pytest.raises(ValueError, match="out_indices"):
        VisionTransformerBackbone(**TINY | {"out_indices": (0, 1, 2)})
    plain, normed = (
        VisionTransformerBackbone(**TINY, final_norm=on).eval() for on in (False, True)
    )
    normed.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 32, 32)
    (*first, last), (*same, other) = plain(images), normed(images)
    assert all(map(torch.equal, first, same))
    expected = normed.norm(last.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(other, expected)


def test_pyramid_has_four_strides_for_both_patch_sizes():
    for patch, sides in ((16, (16, 8, 4, 2)), (8, (8, 4, 2, 1))):
        pyramid = BeitPyramid(8, patch, {"type": "BN"})
        maps = pyramid(tuple(torch.randn(1, 8, 4, 4) for _ in range(4)))
        assert [tuple(m.shape) for m in maps] == [(1, 8, side, side) for side in sides]
    assert (
        sum(p.numel() for p in BeitPyramid(8, 16, {"type": "BN"}).parameters())
        == 3 * (8 * 8 * 4 + 8) + 16
    )


# --------------------------------------------------------------------------------------------------
# timm's networks


@pytest.mark.parametrize(
    ("name", "widths"),
    [("resnet18", (64, 128, 256, 512)), ("convnext_atto", (40, 80, 160, 320)), ("swin_tiny", None)],
)
def test_networks_of_timm_give_maps_of_their_stages(name, widths):
    backbone = TimmBackbone(name=name, out_norm=name != "resnet18").eval()
    widths = widths or (96, 192, 384, 768)
    height, width = (72, 104) if name == "swin_tiny" else (64, 96)
    maps = backbone(torch.randn(1, 3, height, width))
    assert [m.shape[1] for m in maps] == list(widths) and all(m.is_contiguous() for m in maps)
    assert [tuple(m.shape[2:]) for m in maps] == [
        (-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)
    ]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters()), "DDP waits for every parameter"


def test_resnet_with_dilated_stages_keeps_stride_8_and_loads_its_classifiers_weights(tmp_path):
    network = create_model("resnet18", num_classes=10)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "r18.pth")
    backbone = TimmBackbone(
        name="resnet18", output_stride=8, out_indices=(2, 3), pretrained=str(tmp_path / "r18.pth")
    )
    backbone.init_weights()
    assert torch.equal(backbone.network.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    assert [tuple(m.shape[2:]) for m in backbone(torch.randn(2, 3, 64, 64))] == [(8, 8), (8, 8)]


# --------------------------------------------------------------------------------------------------
# Loading


def source_of(form: dict) -> VisionTransformer:
    """A pre-trained encoder for backbones of `form`, with distinct weights."""
    torch.manual_seed(3)
    vit = VisionTransformer(**{k: v for k, v in form.items() if k != "out_indices"}, num_classes=0)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return vit


def mmengine_file(state: dict) -> dict:
    from mmengine.logging import HistoryBuffer

    hub = {
        "log_scalars": {"loss": HistoryBuffer([1.0], [1])},
        "runtime_info": {},
        "resumed_keys": {},
    }
    named = {f"backbone.{k}": v for k, v in state.items()}
    return {
        "meta": {"iter": 1},
        "state_dict": {**named, "decode_head.conv_seg.weight": torch.ones(1)},
        "message_hub": hub,
    }


def openmmlab(state: dict) -> dict:
    """Native names as OpenMMLab's, which SemanticMIM's files have."""
    names = {
        "blocks.": "layers.",
        ".norm1.": ".ln1.",
        ".norm2.": ".ln2.",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
        "patch_embed.proj": "patch_embed.projection",
    }
    renamed = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[f"backbone.{name}"] = value
    return {"state_dict": renamed, "meta": {}}


SHARED = BEIT | {"rel_pos_bias": "shared"}
ONE = torch.ones(1)  # a tensor that no backbone has
FILES = {
    "BEiT": (SHARED, BEIT, lambda s: {"model": {**s, "mask_token": ONE, "lm_head.weight": ONE}}),
    "MAE": (MAE, MAE, lambda s: {"model": {**s, "decoder_embed.weight": ONE, "mask_token": ONE}}),
    "MAE into BEiT": (MAE, BEIT | {"pos_embed": "learned"}, lambda s: {"model": s}),
    "SimMIM": (
        SHARED, BEIT,
        lambda s: {"model": {**{f"encoder.{k}": v for k, v in s.items()}, "decoder.0.weight": ONE}},
    ),
    "SemanticMIM": (MAE | {"num_cls_tokens": 3}, MAE | {"num_cls_tokens": 3}, openmmlab),
    "A2MIM": (
        BEIT | {"pos_embed": "learned"}, BEIT | {"pos_embed": "learned"},
        lambda s: {"state_dict": {**openmmlab(s)["state_dict"], "neck.decoder.0.weight": ONE}},
    ),
    "mmengine": (BEIT, BEIT, mmengine_file),
    "DeepSpeed": (BEIT, BEIT, lambda s: {"module": s, "optimizer": None, "ds_version": "0.19"}),
    "DDP": (BEIT, BEIT, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}),
    "ours": (BEIT, BEIT, lambda s: {"model": {}, "teacher": s, "epoch": 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_loads_whole(kind, tmp_path):
    from_form, to_form, pack = FILES[kind]
    vit, path = source_of(from_form), tmp_path / "weights.pth"
    torch.save(pack(vit.state_dict()), path)
    new = ("relative_position_bias_table", "gamma_") if kind == "MAE into BEiT" else ()
    options = to_form | {"input_size": 48}
    backbone = VisionTransformerBackbone(**options, pretrained=str(path), may_be_new=new)
    report = load_backbone(backbone, path, new=new)
    assert report.matched == 1.0
    backbone.init_weights()
    assert class_tokens(path) == from_form.get("num_cls_tokens", 1)
    if kind == "MAE into BEiT":
        assert {name.split(".")[-1] for name in report.missing} == {
            "relative_position_bias_table",
            "gamma_1",
            "gamma_2",
        }
        return
    # the same network, resized by the reference route
    expected = VisionTransformerBackbone(**options)
    load_pretrained(expected, vit.state_dict(), min_matched=1.0)
    assert all(map(torch.equal, backbone.state_dict().values(), expected.state_dict().values()))
    assert bool(report.interpolated) == (to_form is not None)


def test_exported_encoders_load(tmp_path):
    vit = source_of(BEIT)
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith("norm")}
    save_encoder(tmp_path / "encoder-0.safetensors", state, {})
    backbone = VisionTransformerBackbone(**BEIT)
    assert load_backbone(backbone, tmp_path / "encoder-0.safetensors").matched == 1.0
    assert torch.equal(backbone.blocks[3].attn.proj.weight, vit.blocks[3].attn.proj.weight)


def test_files_of_another_network_are_refused_and_change_nothing(tmp_path):
    other = {f"layers.{k}": v for k, v in source_of(BEIT).state_dict().items()}
    torch.save({"model": other}, tmp_path / "wrong.pth")
    backbone = VisionTransformerBackbone(**BEIT, pretrained=str(tmp_path / "wrong.pth"))
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(
        ValueError, match=r"--pretrained .*wrong\.pth.*matches only 0% of the encoder"
    ):
        backbone.init_weights()
    assert all(map(torch.equal, before.values(), backbone.state_dict().values()))
    small = {k: v for k, v in source_of(BEIT).state_dict().items() if not k.startswith("blocks.3.")}
    torch.save({"model": small}, tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"76%.*blocks\.3"):
        load_backbone(backbone, tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"does not exist"):
        load_backbone(backbone, tmp_path / "none.pth")


def test_missing_data_is_named_before_a_run(tmp_path):
    dataset = {"data_root": str(tmp_path), "ann_file": "annotations/train.json"}
    cfg = Config({"data_root": str(tmp_path), "train_dataloader": {"dataset": dataset}})
    with pytest.raises(
        ValueError, match=r"annotations/train\.json does not exist; set --data-root"
    ):
        runner.check_data(cfg, "train")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.json").write_text("{}")
    runner.check_data(cfg, "train")


def test_a_segmentor_on_timms_network_lends_its_backbone(tmp_path):
    source = TimmBackbone(name="resnet18")
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()} | {
        "decode_head.w": torch.ones(1)
    }
    torch.save({"state_dict": state}, tmp_path / "segmentor.pth")
    target = TimmBackbone(name="resnet18", pretrained=str(tmp_path / "segmentor.pth"))
    target.init_weights()
    assert all(map(torch.equal, source.state_dict().values(), target.state_dict().values()))


# --------------------------------------------------------------------------------------------------
# Layer decay


class Segmentor(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self.neck, self.decode_head = (
            backbone,
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 2, 1),
        )


def test_layer_decay_gives_each_block_its_rate():
    model = Segmentor(VisionTransformerBackbone(**BEIT | {"pos_embed": "learned"}))
    groups = layer_groups(model, 1e-3, 0.05, 0.5)
    rate = {
        name: (g["lr"], g["weight_decay"], g["group_name"])
        for g in groups
        for name in g["param_names"]
    }
    assert sorted(rate) == sorted(name for name, _ in model.named_parameters())
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert rate[f"backbone.{name}"] == (1e-3 * 0.5**5, 0.05, "layer_0_decay")
    assert rate["backbone.patch_embed.proj.bias"] == (1e-3 * 0.5**5, 0.0, "layer_0_no_decay")
    for block in range(4):
        names = {
            name: r for name, r in rate.items() if name.startswith(f"backbone.blocks.{block}.")
        }
        assert len(names) == 16 and {r[0] for r in names.values()} == {1e-3 * 0.5 ** (4 - block)}
        assert names[f"backbone.blocks.{block}.attn.relative_position_bias_table"][1] == 0.05
        assert (
            names[f"backbone.blocks.{block}.gamma_1"][1]
            == names[f"backbone.blocks.{block}.attn.q_bias"][1]
            == 0.0
        )
    assert rate["neck.weight"] == rate["decode_head.weight"] == (1e-3, 0.05, "layer_5_decay")
    assert rate["decode_head.bias"] == (1e-3, 0.0, "layer_5_no_decay")
    kept = layer_groups(model, 1e-3, 0.05, 0.5, ("pos_embed",))
    assert next(g for g in kept if "backbone.pos_embed" in g["param_names"])["weight_decay"] == 0.0


def test_layer_decay_keeps_its_ratios_through_mmengines_constructor_and_schedule():
    from mmengine.optim import LinearLR, PolyLR, build_optim_wrapper

    import unimim.openmmlab.register  # noqa: F401

    model = Segmentor(VisionTransformerBackbone(**BEIT))
    wrapper = build_optim_wrapper(model, {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.05},
        "constructor": "LayerDecayConstructor", "paramwise_cfg": {"layer_decay": 0.5},
    })  # fmt: skip
    groups = wrapper.optimizer.param_groups
    schedules = [LinearLR(wrapper, 1e-6, begin=0, end=3, by_epoch=False),
                 PolyLR(wrapper, 0.0, power=1.0, begin=3, end=13, by_epoch=False)]  # fmt: skip
    peaks = {}
    for step in range(13):
        assert all(
            g["lr"] == pytest.approx(g["lr_scale"] * groups[-1]["lr"], rel=1e-6) for g in groups
        )
        peaks[step] = groups[-1]["lr"]
        for schedule in schedules:
            schedule.step()
    assert groups[-1]["group_name"].startswith("layer_5") and peaks[0] == pytest.approx(1e-7)
    assert max(peaks.values()) == peaks[3] == pytest.approx(0.1) and groups[-1][
        "lr"
    ] == pytest.approx(0, abs=1e-9)


def test_layer_decay_of_timms_networks_follows_their_stages():
    for name, count in (("convnext_tiny", 6), ("swin_tiny", 12)):
        backbone = TimmBackbone(name=name, out_norm=True)
        assert backbone.num_layers == count
        ids = {backbone.get_layer_id(n) for n, _ in backbone.named_parameters()}
        assert min(ids) == 0 and max(ids) == backbone.get_layer_id("norms.0.weight") == count + 1


# --------------------------------------------------------------------------------------------------
# Order of images


def test_positions_cover_every_pass_and_go_on_where_they_stopped():
    data = list(range(5))
    sampler = PositionSampler(data, seed=1)
    keys = [key for key, _ in zip(sampler, range(15), strict=False)]
    for number in range(3):
        assert sorted(keys[5 * number : 5 * number + 5]) == data
    assert keys[:5] != keys[5:10] and [key.position for key in keys] == list(range(15))
    sampler.start = 7
    assert [key for key, _ in zip(sampler, range(8), strict=False)] == keys[7:]
    assert isinstance(keys[0], Key) and torch.utils.data.default_collate(
        [int(k) for k in keys]
    ).sum() == sum(keys)


@pytest.mark.parametrize("endless", [True, False])
def test_ranks_share_a_pass(endless):
    data, samplers = list(range(5)), []
    for rank in range(2):
        sampler = PositionSampler(data, seed=1, endless=endless)
        sampler.rank, sampler.world = rank, 2
        samplers.append(sampler)
    count = 5 if endless else 3
    shares = [[key for key, _ in zip(sampler, range(count), strict=False)] for sampler in samplers]
    assert [len(share) for share in shares] == [count, count]
    merged = [key for pair in zip(*shares, strict=True) for key in pair]
    assert sorted(merged[:5]) == data
    if not endless:
        for sampler in samplers:
            sampler.set_epoch(1)
        again = [key for pair in zip(*samplers, strict=True) for key in pair]
        assert (
            sorted(again[:5]) == data
            and again != merged
            and [k.position for k in again] == list(range(6, 12))
        )
