"""Teachers: every file format gives the tokens of the model that wrote it; what cannot be is said
in one line."""

from functools import partial

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_backbones import family_of
from modeling_pretrain import FeatureSemAIM, build_semaim
from modeling_targets import (
    GaussianBlur,
    MapTeacher,
    Teacher,
    build_tower,
    load_teacher,
    near_gelu,
)

GRID = (4, 4)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = (timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD)
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}


class NearGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return near_gelu(x)


def spread(model: nn.Module) -> nn.Module:
    """Away from what the start makes equal: zeros, ones; in steps that half precision keeps."""
    for name, parameter in model.named_parameters():
        draws = torch.Generator().manual_seed(len(name))
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=draws)).copy_(
            parameter.half()
        )
    return model.eval()


def timm_clip(act: type[nn.Module] = NearGELU) -> nn.Module:
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-5)
    return spread(
        timm.models.VisionTransformer(
            **SIZES,
            pre_norm=True,
            norm_layer=norm,
            act_layer=act,
            num_classes=24,
            global_pool="token",
        )
    )


def timm_dino() -> nn.Module:
    torch.manual_seed(0)
    return spread(timm.models.VisionTransformer(**SIZES, num_classes=0))


def pictures(side: int = 32) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.head(model.forward_features(images))


def openai_state(model: nn.Module) -> dict[str, Tensor]:
    """timm's CLIP under OpenAI's names and shapes (docs/methods/semaim.md#clips-teacher)."""
    names = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding",
        "patch_embed.proj.": "conv1.", "norm_pre.": "ln_pre.", "norm.": "ln_post.",
        "blocks.": "transformer.resblocks.", ".qkv.": ".in_proj_", "attn.proj.": "attn.out_proj.",
        ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.",
    }  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            at_start = ours[0] != "." and not ours.startswith("attn")
            if not at_start or name.startswith(ours):
                name = name.replace(ours, theirs, 1)
        state[name] = value.half()
    state["class_embedding"] = state["class_embedding"].flatten()
    state["positional_embedding"] = state["positional_embedding"][0]
    state["proj"] = state.pop("head.weight").T.contiguous()
    assert not state.pop("head.bias").any(), "OpenAI's projection has none"
    return state


class Archive(nn.Module):
    """Holds tensors under dotted names; its TorchScript is of OpenAI's format."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        for name in {name.partition(".")[0] for name in state}:
            below = {
                k.partition(".")[2]: v for k, v in state.items() if k.partition(".")[0] == name
            }
            if "" in below:
                self.register_parameter(name, nn.Parameter(below[""], requires_grad=False))
            else:
                self.add_module(name, Archive(below))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_openais_files(tmp_path):
    """A TorchScript archive, the state dict of the whole model, and the visual tower alone."""
    model = timm_clip()
    model.head.bias.data.zero_()
    visual = openai_state(model)
    whole = {"logit_scale": torch.ones(()), "token_embedding.weight": torch.ones(2, 2)}
    whole |= {f"visual.{name}": value for name, value in visual.items()}
    torch.jit.script(Archive(whole)).save(tmp_path / "archive.pt")
    torch.save(whole, tmp_path / "whole.pt")
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in whole.items()}},
        tmp_path / "wrapped.pt",
    )
    safetensors.torch.save_file(visual, tmp_path / "visual.safetensors")
    expected = tokens_of(model, pictures())
    for name in ("archive.pt", "whole.pt", "wrapped.pt", "visual.safetensors"):
        teacher = load_teacher("clip", str(tmp_path / name), GRID)
        assert teacher.width == 24
        torch.testing.assert_close(teacher(pictures()), expected, rtol=1e-4, atol=1e-5)


def test_timms_files(tmp_path):
    for kind, model in (("clip", timm_clip()), ("dino", timm_dino())):
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        teacher = load_teacher(kind, str(tmp_path / "weights.pth"), GRID)
        assert teacher.width == {"clip": 24, "dino": 128}[kind]
        torch.testing.assert_close(
            teacher(pictures()), tokens_of(model, pictures()), rtol=1e-4, atol=1e-5
        )


def test_dinos_training_checkpoint(tmp_path):
    """Its teacher, without the projection head."""
    model = timm_dino()
    state = {f"module.backbone.{name}": value for name, value in model.state_dict().items()}
    state["module.head.mlp.0.weight"] = torch.ones(2, 2)
    student = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"student": student, "teacher": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    teacher = load_teacher("dino", str(tmp_path / "checkpoint.pth"), GRID)
    torch.testing.assert_close(
        teacher(pictures()), tokens_of(model, pictures()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "act"), [("unimim_test_clip", nn.GELU), ("unimim_test_clip_quickgelu", NearGELU)]
)
def test_timms_names(name, act):
    """A tagless or LAION model of timm's computes GELU, one called quickgelu what OpenAI's does."""
    if not timm.is_model(name):

        def build(pretrained: bool = False, **_) -> nn.Module:
            assert pretrained
            return timm_clip(act)

        build.__name__, build.__module__ = name, __name__
        timm.models.register_model(build)
    teacher = load_teacher("clip", name, GRID)
    torch.testing.assert_close(
        teacher(pictures()), tokens_of(timm_clip(act), pictures()), rtol=1e-4, atol=1e-5
    )


def test_another_grid_and_another_image_size(tmp_path):
    """Positions are resized to the student's grid, images to as many of the teacher's patches."""
    model = timm_dino()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    teacher = load_teacher("dino", str(tmp_path / "weights.pth"), (6, 6))
    finer = timm.models.VisionTransformer(**{**SIZES, "img_size": 48}, num_classes=0).eval()
    state = model.state_dict()
    grid = (
        F.interpolate(state["pos_embed"][:, 1:].mT.unflatten(2, (4, 4)), (6, 6), mode="bicubic")
        .flatten(2)
        .mT
    )
    finer.load_state_dict(state | {"pos_embed": torch.cat((state["pos_embed"][:, :1], grid), 1)})
    torch.testing.assert_close(
        teacher(pictures(48)), tokens_of(finer, pictures(48)), rtol=1e-4, atol=1e-5
    )
    small = F.interpolate(pictures(24), (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(pictures(24)), tokens_of(finer, small), rtol=1e-4, atol=1e-5)


def test_precision(tmp_path):
    torch.save(timm_dino().state_dict(), tmp_path / "weights.pth")
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        for precision in ("auto", "fp32", "bf16"):
            teacher = load_teacher("dino", str(tmp_path / "weights.pth"), GRID, precision)
            found[precision] = teacher(pictures())
            dtypes = {p.dtype for p in teacher.tower.parameters()}
            assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
            assert found[precision].dtype == torch.float32 and not found[precision].requires_grad
    exact = tokens_of(timm_dino(), pictures())
    torch.testing.assert_close(found["fp32"], exact, rtol=1e-4, atol=1e-5)
    for precision in ("auto", "bf16"):
        assert 1e-3 < (found[precision] - exact).abs().max() < 0.2


def test_images_in_the_teachers_own_normalization(tmp_path):
    torch.save(timm_clip().state_dict(), tmp_path / "weights.pth")
    raw = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ours, own = (
        (raw - torch.tensor(m).view(3, 1, 1)) / torch.tensor(s).view(3, 1, 1)
        for m, s in (HALF, CLIP)
    )
    teacher = load_teacher("clip", str(tmp_path / "weights.pth"), GRID, image_mean_std=HALF)
    torch.testing.assert_close(teacher(ours), tokens_of(timm_clip(), own), rtol=1e-4, atol=2e-5)
    as_published = load_teacher("clip", str(tmp_path / "weights.pth"), GRID)
    torch.testing.assert_close(
        as_published(ours), tokens_of(timm_clip(), ours), rtol=1e-4, atol=2e-5
    )


def test_a_method_with_a_teacher(tmp_path):
    """The teacher makes target and order, and is no part of what is trained, averaged and saved."""
    torch.save(timm_clip().state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(0)
    options = {
        "input_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "query_depth": 2,
    }
    model = FeatureSemAIM(
        **options,
        predict_feature="clip",
        target_model=str(tmp_path / "weights.pth"),
        use_ema_model=True,
    )
    assert model.prediction_head.fc2.out_features == 24
    assert not any("tower" in name or "target" in name for name in model.state_dict())
    assert model.teacher.target is model.target, "the ema needs no copy of it"
    batch = {"image": pictures(), "noise": torch.rand(3, 16)}
    attention, target = model.attention_and_target(batch)
    tokens = tokens_of(timm_clip(), pictures())
    torch.testing.assert_close(target, tokens[:, 1:], rtol=1e-4, atol=1e-5)
    assert model.order_values(batch, attention).argmin(1).tolist() == attention.argmax(1).tolist()
    given = FeatureSemAIM(**options, predict_feature="clip", out_dim=24)
    given.load_state_dict(model.state_dict())
    batch["target_tokens"] = model.target.teacher(batch["image"])
    assert torch.equal(model(batch)["loss"], given(batch)["loss"])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_network_that_ends_in_a_map_gives_each_patch_the_features_at_its_place(name):
    torch.manual_seed(0)
    teacher = MapTeacher(timm.create_model(name, num_classes=0), (7, 7))
    images = torch.randn(1, 3, 224, 224)
    tokens = teacher(images)
    assert tokens.shape == (1, 49, teacher.width) and not tokens.requires_grad
    features = family_of(teacher.tower).feature_map(teacher.tower, images)
    torch.testing.assert_close(tokens, features.flatten(2).mT)
    finer = MapTeacher(teacher.tower, (14, 14))(images)
    corner = finer.unflatten(1, (14, 14))[:, 0, 0]
    torch.testing.assert_close(corner, tokens[:, 0], msg="the corner of the map is its first patch")


def test_what_is_refused(tmp_path):
    def said(kind: str, source: str) -> str:
        with pytest.raises(ValueError) as error:
            load_teacher(kind, source, GRID)
        assert "\n" not in str(error.value)
        return str(error.value)

    path = tmp_path / "weights.pth"
    assert "neither a file nor the name of a model" in said("clip", str(tmp_path / "missing.pt"))
    torch.save(timm_dino().state_dict(), path)
    assert "not of the kind that target clip needs; use target dino" in said("clip", str(path))
    torch.save(timm_clip().state_dict(), path)
    assert "not of the kind that target dino needs; use target clip" in said("dino", str(path))
    torch.save({"conv.weight": torch.ones(3)}, path)
    assert "holds no vision transformer" in said("dino", str(path))
    path.write_bytes(b"no weights")
    assert "damaged" in said("dino", str(path))
    assert "has no weights at timm" in said("dino", "vit_base_patch16_plus_240")
    with pytest.raises(ValueError, match="of no use without"):
        build_semaim(target_model=str(path), embed_dim=8, depth=1, num_heads=1, query_depth=1)
    with pytest.raises(ValueError, match="target_precision=int8 is unknown"):
        Teacher(build_tower(timm_dino().state_dict(), GRID, quick_gelu=False), "int8")


def test_blur_keeps_what_is_even_and_darkens_borders():
    blurred = GaussianBlur(5, 1.5)(torch.ones(1, 3, 12, 12))
    torch.testing.assert_close(blurred[..., 2:-2, 2:-2], torch.ones(1, 3, 8, 8))
    assert (blurred[..., 0, :] < 0.8).all()
