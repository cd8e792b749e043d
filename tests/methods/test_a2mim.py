"""SimMIM and A2MIM: tokens in every backbone, spectra, what is exported, what the optimizer is
told."""

import pickle
import subprocess
import sys

import pytest
import timm
import torch
from helpers import METHODS, ROOT, start, train_steps
from safetensors.torch import load_file
from timm.models import load_checkpoint
from torch import Tensor, nn

from modeling_backbones import TIMM_BACKBONES, enlarged, family_of
from modeling_finetune import create_model
from modeling_targets import (
    FocalFrequencyLoss,
    ReconstructionLoss,
    Regression,
    half_spectrum,
    whole_mean,
)
from optim_factory import annealing, by_rules, param_groups, set_schedule
from scripts.benchmarks.published import make_straightforward
from scripts.tools.extract_backbone import extract
from unimim.checkpoint import files
from unimim.checkpoint.files import save_encoder
from unimim.checkpoint.loading import load_pretrained
from unimim.checkpoint.names import from_openmixup

TINY = {
    "resnet18": {"channels": [8, 8, 16, 16], "input_size": 64},
    "convnext_tiny": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "input_size": 64},
    "swin_tiny": {
        "depths": [1, 2, 1, 1],
        "embed_dim": 8,
        "num_heads": [1, 2, 2, 4],
        "input_size": 64,
    },
    "swinv2_tiny": {
        "depths": [1, 2, 1, 1],
        "embed_dim": 8,
        "num_heads": [1, 2, 2, 4],
        "input_size": 64,
    },
    "vit_tiny_patch16_224": {
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "input_size": 32,
        "patch_size": 8,
    },
    "mobilenetv3_small_050": {"input_size": 64},
}
PLACES = {
    "resnet18": 4,
    "convnext_tiny": 4,
    "swin_tiny": 5,
    "swinv2_tiny": 5,
    "vit_tiny_patch16_224": 3,
    "mobilenetv3_small_050": 4,
}
STRIDES = {  # of the masks (docs/methods/simmim_a2mim.md#masks)
    "resnet18": (4, 4, 8, 16), "convnext_tiny": (4, 8, 16, 32), "swin_tiny": (4, 4, 8, 16, 32),
    "swinv2_tiny": (4, 4, 8, 16, 32),
    "vit_tiny_patch16_224": (8, 8, 8), "mobilenetv3_small_050": (2, 4, 8, 16),
}  # fmt: skip
PUBLISHED_NAMES = [  # weights under OpenMixup's names
    folder
    for method in ("a2mim_key_map", "resnet_key_map")
    for folder in sorted((ROOT / "tests" / "reference_cases" / method).iterdir())
]
each_place = pytest.mark.parametrize(
    ("name", "layer"), [(name, k) for name, count in PLACES.items() for k in range(count)]
)


def build(name: str, method: str = "a2mim", **options) -> nn.Module:
    torch.manual_seed(0)
    return create_model(f"{method}_{name}", **TINY[name], **options)


def images_of(model: nn.Module, count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(seed))


def cells_of(model: nn.Module) -> tuple[int, int]:
    return tuple(side // cell for side, cell in zip(model.image_size, model.cell_size, strict=True))


# --------------------------------------------------------------------------------------------------
# Tokens


@each_place
def test_a_replaced_map_is_the_same_for_every_image(name, layer):
    """And of a map that is masked in no place nothing is."""
    model = build(name, "simmim", mask_layer=layer, replace=True).eval()
    assert model.cell_size == (STRIDES[name][layer],) * 2
    nowhere, everywhere = torch.zeros(2, *cells_of(model)), torch.ones(2, *cells_of(model))
    images = images_of(model)
    features = model.features(images, everywhere)
    if name.startswith("vit"):  # the class token has seen the image by then
        assert layer > 1 or torch.equal(features[0], features[1])
    else:
        assert torch.equal(features[0], features[1])
    plain, untouched = model.features(images, None), model.features(images, nowhere)
    assert torch.equal(plain, untouched) and not torch.allclose(plain[0], plain[1])


@each_place
def test_an_added_token_is_seen_and_trained(name, layer):
    model = build(name, mask_layer=layer, mask_init=0.5)
    nn.init.normal_(model.inject.mask_token)
    mask = torch.zeros(2, *cells_of(model))
    mask[:, :, : max(mask.shape[2] // 2, 1)] = 1
    images = images_of(model)
    features = model.train().features(images, mask)
    assert not torch.allclose(features, model.features(images, None))
    model({"image": images, "mask": mask})["loss"].backward()
    untrained = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert untrained == set()
    assert (
        model.inject.mask_token.grad.abs().sum() > 0
        and model.inject.mask_gamma.grad.abs().sum() > 0
    )


def test_what_a_residual_token_makes_of_features():
    """docs/methods/simmim_a2mim.md#token, by hand."""
    inject = build("resnet18", mask_init=0.25, detach=True).inject
    nn.init.normal_(inject.mask_token)
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    inject.mask = torch.rand(2, 4, 4).round()
    m = inject.mask.unsqueeze(1)
    out = inject(x)
    torch.testing.assert_close(out, x * (1 - m) + 0.25 * x * m + inject.mask_token * m)
    out.sum().backward()
    assert torch.equal(x.grad, (1 - m).expand_as(x))  # masked features are detached


@pytest.mark.parametrize("kind", ["randn", "zero", "mean", "instance_mean", "none"])
def test_other_tokens(kind):
    model = build("resnet18", "simmim", mask_token=kind)
    assert not any(
        name == "inject.mask_token" for name, p in model.named_parameters() if p.requires_grad
    )
    inject, x = model.inject, torch.randn(3, 64, 16, 16)
    inject.mask = torch.ones(3, 16, 16)
    expected = {
        "zero": torch.zeros_like(x), "mean": x.mean((0, 2, 3), keepdim=True), "none": x,
        "instance_mean": x.mean((2, 3), keepdim=True), "randn": inject.mask_token,
    }[kind]  # fmt: skip
    torch.testing.assert_close(inject(x), expected.expand_as(x))


def test_mistakes_are_named():
    for options, said in (
        ({"mask_layer": 4}, "mask_layer=4 is none of this backbone's; use 0 to 3"),
        ({"mask_token": "learnt"}, "mask_token=learnt is unknown"),
        ({"input_size": 72}, "not a multiple of 32"),
        (
            {"patch_size": 16},
            "patch_size=16 is not an option of a2mim_resnet18;.* mask_layer,.* output_stride,",
        ),
        ({"mask_layr": 2}, r"mask_layr=2 is not an option .* mean mask_layer\?"),
        ({"output_stride": 4}, "output_stride=4 is not possible for resnet18; use one of 8, 16"),
        ({"fft_unmask_replace": "nothing"}, "fft_unmask_replace=nothing is unknown"),
    ):
        with pytest.raises(ValueError, match=said):
            create_model("a2mim_resnet18", **options)
    with pytest.raises(ValueError, match="model=a2mim_resnet is unknown"):
        create_model("a2mim_resnet")
    with pytest.raises(ValueError, match="ends in no map"):
        create_model("a2mim_mixer_s16_224")
    for name, options, said in (
        ("hrnet_w18_small", {}, "no place for a mask token after stage3 of hrnet_w18_small"),
        (
            "inception_v3",
            {},
            r"input_size=\(64, 64\) does not suit timm's inception_v3: .*Kernel size",
        ),
        ("vgg11", {"grad_checkpointing": True}, "grad_checkpointing: timm's vgg11 has none"),
        (
            "vgg11",
            {"drop_path": 0.1},
            "drop_path=0.1 is not possible: vgg11 has no stochastic depth",
        ),
        ("swin_tiny", {"input_size": 16}, "Swin needs 32 pixels"),
    ):
        with pytest.raises(ValueError, match=said):
            create_model(f"a2mim_{name}", **{"input_size": 64} | options)


@pytest.mark.parametrize("name", ["edgenext_xx_small", "mobilenetv3_small_050", "repvgg_a0"])
def test_any_network_sees_visible_pixels_from_masked_places(name):
    """The token of a network by name goes in before its last stage, not behind it, where nothing
    looks around."""
    model = create_model(f"a2mim_{name}", input_size=64, replace=True, mask_init=0).eval()
    assert model.inject.place.stride == 16
    images, mask = images_of(model, 1).requires_grad_(), torch.zeros(1, 4, 4)
    mask[:, 2:, 2:] = 1  # the last of 2 x 2 cells
    hidden = enlarged(mask, (64, 64)).bool().unsqueeze(1).expand_as(images)
    features = model.features(images, mask)
    features[:, :, 1, 1].square().sum().backward()
    assert images.grad[~hidden].any()


def test_other_swins_of_version_2_are_pretrained_and_finetuned():
    """By timm's names, with their own windows, at sizes that these do not divide."""
    tiny = {"depths": [1, 1, 1, 1], "embed_dim": 8, "num_heads": [1, 1, 2, 2]}
    model = create_model("simmim_swinv2_tiny_window8_256", **tiny, input_size=96)
    images, mask = images_of(model, 1), torch.ones(1, 24, 24)
    loss = model({"image": images, "mask": mask})["loss"]
    loss.backward()
    assert model.inject.mask_token.grad.any()
    classifier = create_model("swinv2_tiny_window8_256", **tiny, input_size=96, num_classes=3)
    report = load_pretrained(classifier, {"model": model.encoder_state_dict()})
    assert report.matched == 1.0 and classifier.eval()(images).shape == (1, 3)


def test_swins_own_windows_stay():
    """Only those of the published recipes follow the images' size."""
    network = timm.create_model("swin_s3_tiny_224", num_classes=0, img_size=64)
    exported = create_model("simmim_swin_s3_tiny_224", input_size=64).encoder_state_dict()
    assert {k: v.shape for k, v in exported.items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


# --------------------------------------------------------------------------------------------------
# Spectra


def full_focal_loss(difference: Tensor, options: FocalFrequencyLoss) -> Tensor:
    """docs/methods/simmim_a2mim.md#spectra on the whole complex spectrum."""
    spectrum = torch.fft.fft2(difference, norm="ortho")
    spectrum = spectrum.mean(0, keepdim=True) if options.ave_spectrum else spectrum
    weight = spectrum.abs() ** options.alpha
    weight = weight.log1p() if options.log_matrix else weight
    largest = (
        weight.max() if options.batch_matrix else weight.flatten(2).max(-1).values[..., None, None]
    )
    return ((weight / largest).nan_to_num(0).clamp(0, 1).detach() * spectrum.abs().square()).mean()


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (12, 7), (9, 9), (4, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ave_spectrum": False},
        {"log_matrix": False, "alpha": 0.5},
        {"ave_spectrum": False, "batch_matrix": False},
    ],
    ids=str,
)
def test_half_a_spectrum_gives_the_whole_loss(size, options):
    criterion = FocalFrequencyLoss(**options)
    ours = torch.randn(3, 3, *size, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss, expected = criterion(ours), full_focal_loss(theirs, criterion)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (12, 7)])
@pytest.mark.parametrize("ave_spectrum", [True, False])
@pytest.mark.parametrize("axes", [(), (3,), (3, 1)], ids=str)
def test_a_given_matrix_need_not_be_symmetric(size, ave_spectrum, axes):
    difference = torch.randn(3, 3, *size, dtype=torch.float64)
    matrix = torch.rand(*axes, *size, dtype=torch.float64)
    spectrum = torch.fft.fft2(difference, norm="ortho")
    spectrum = spectrum.mean(0, keepdim=True) if ave_spectrum else spectrum
    expected = (matrix * spectrum.abs().square()).mean()
    criterion = FocalFrequencyLoss(ave_spectrum=ave_spectrum, matrix=matrix)
    torch.testing.assert_close(criterion(difference), expected)


def test_a_given_matrix_must_fit():
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        FocalFrequencyLoss(matrix=torch.full((8, 8), 1.5))
    # as many columns of the half spectrum, so that nothing else would notice
    with pytest.raises(
        ValueError, match=r"\(8, 9\) frequencies; use one of the images' size \(8, 8\)"
    ):
        FocalFrequencyLoss(matrix=torch.ones(8, 9))(torch.randn(1, 3, 8, 8))


def test_mean_over_half_a_spectrum():
    """Parseval: an orthonormal transform keeps the sum of squares."""
    for size in ((6, 8), (6, 9)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(
            whole_mean(half_spectrum(images).abs().square(), size[1]), images.square().mean()
        )


def test_equal_images_have_no_loss_and_no_gradient():
    images = torch.randn(2, 3, 8, 8)
    for focal in (True, False):
        predicted = images.clone().requires_grad_()
        criterion = ReconstructionLoss(
            Regression("focal_l1"), fft_weight=1.0, fft_focal=focal, fft_unmask_weight=1.0
        )
        loss = criterion(predicted, images, torch.ones(2, 2, 2))["loss"]
        loss.backward()
        assert loss == 0 and not predicted.grad.any()


def test_visible_pixels_count_only_where_they_should():
    images, predicted = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 4, 4)
    mask[:, 1, 2] = 1
    hidden = enlarged(mask, (8, 8)).bool().unsqueeze(1)
    other = torch.where(hidden, predicted, torch.randn(2, 3, 8, 8))
    for replace in ("target", "mean"):
        criterion = ReconstructionLoss(fft_weight=1.0, fft_unmask_replace=replace)
        assert torch.equal(
            criterion(predicted, images, mask)["loss"], criterion(other, images, mask)["loss"]
        )
    criterion = ReconstructionLoss(fft_weight=1.0, fft_unmask_weight=0.5)
    assert criterion(predicted, images, mask)["loss"] != criterion(other, images, mask)["loss"]


def test_an_images_loss_can_be_its_own():
    """Published, it depends on the other images of the process in two ways; both can be switched
    off."""
    images, predicted, mask = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.ones(4, 4, 4)

    def gap(**options) -> Tensor:
        loss = build("resnet18", fft_weight=1.0, **options).loss
        whole, *halves = (
            loss(*(x[part] for x in (predicted, images, mask)))["loss_freq"]
            for part in (slice(None), slice(2), slice(2, None))
        )
        return (whole - sum(halves) / 2).abs() / whole

    assert gap(ave_spectrum=False, batch_matrix=False) < 1e-6
    assert gap(ave_spectrum=False) > 1e-3 and gap(batch_matrix=False) > 1e-3


# --------------------------------------------------------------------------------------------------
# Checkpoints


def timm_beit(size: tuple[int, int], patch: int, path: str = "", **sizes) -> nn.Module:
    return timm.create_model(
        "beit_base_patch16_224", num_classes=0, use_abs_pos_emb=True, global_pool="token",
        init_values=0.1, img_size=size, patch_size=patch, checkpoint_path=path, **sizes,
    )  # fmt: skip


def timm_model(name: str, model: nn.Module) -> nn.Module:
    """timm's own network of these sizes."""
    sizes = {
        key: value for key, value in TINY[name].items() if key not in ("input_size", "patch_size")
    }
    if name.startswith("vit"):
        return timm_beit(model.image_size, model.cell_size[0], **sizes)
    if name.startswith("swin"):
        window = 4 if name.startswith("swinv2") else 2
        sizes |= {"img_size": model.image_size, "window_size": window}
    return timm.create_model(TIMM_BACKBONES.get(name, name), num_classes=0, **sizes)


@pytest.mark.parametrize("name", TINY)
def test_what_is_exported_is_timms(tmp_path, name):
    """Strictly, with the features that pre-training sees of whole images."""
    model = build(name)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.eval()
    save_encoder(tmp_path / "encoder.safetensors", model.encoder_state_dict(), {"format": "timm"})
    exported = timm_model(name, model)
    load_checkpoint(exported, str(tmp_path / "encoder.safetensors"), strict=True)
    images, exported = images_of(model), exported.eval()
    if name.startswith("vit"):
        found = exported.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    else:
        found = family_of(exported).feature_map(exported, images)
    torch.testing.assert_close(found, model.features(images, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["a2mim_resnet", "a2mim_vit"])
def test_pretrain_export_extract(tmp_path, method):
    """A run's checkpoint through the script is the encoder that the run has written; timm takes it
    strictly."""
    run, position = start("pretrain", tmp_path, *METHODS[method])
    train_steps(run, 0, 2)
    run.session.save(position, finished=True)
    source, output = str(tmp_path / "checkpoint-0.pth"), tmp_path / "extracted.safetensors"
    script = [sys.executable, str(ROOT / "scripts/tools/extract_backbone.py"), source]
    subprocess.run([*script, str(output)], check=True)
    ours, theirs = (
        files.load_checkpoint(path) for path in (output, tmp_path / "encoder-0.safetensors")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not any(key.startswith(("inject", "neck", "backbone")) for key in ours)
    model, images = run.task.eval(), images_of(run.task)
    if method == "a2mim_vit":
        exported = timm_beit((16, 16), 4, str(output), embed_dim=32, depth=2, num_heads=2).eval()
        found = exported.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    else:
        sizes = {"channels": [8, 8, 16, 16], "num_classes": 0}
        found = (
            timm.create_model("resnet18", checkpoint_path=str(output), **sizes)
            .eval()
            .forward_features(images)
        )
    torch.testing.assert_close(found, model.features(images, None), rtol=1e-4, atol=1e-5)
    pickled = subprocess.run([*script, str(tmp_path / "d2.pkl")], capture_output=True, text=True)
    if method == "a2mim_vit":
        assert pickled.returncode != 0 and "are for ResNet" in pickled.stderr
        return
    names = pickle.loads((tmp_path / "d2.pkl").read_bytes())["model"]
    assert {
        "stem.conv1.weight",
        "stem.conv1.norm.running_var",
        "res3.0.shortcut.norm.bias",
    } <= names.keys()
    assert len(names) == len(ours)


@pytest.mark.parametrize(
    "case", PUBLISHED_NAMES, ids=lambda case: f"{case.parent.name}-{case.name}"
)
def test_backbones_come_out_of_published_files(tmp_path, case):
    """With neck, averages and classifier around them, for timm (the reference cases load them and
    compare features)."""
    tensors = load_file(case / "tensors.safetensors")
    weights = {
        key.partition("weights/")[2]: value.float()
        for key, value in tensors.items()
        if "weights/" in key
    }
    inside = {f"backbone.{key.removeprefix('backbone.')}": value for key, value in weights.items()}
    extra = ["backbone.mask_token", "neck.decoder.0.weight", "ema_backbone_norm"]
    extra += ["head.fc.weight", "head.fc.bias", "head.mlp.weight"]
    path = tmp_path / "published.pth"
    torch.save(
        {"state_dict": inside | dict.fromkeys(extra, torch.zeros(1)), "meta": {"epoch": 3}}, path
    )
    found, model = extract(str(path))
    expected = from_openmixup(weights)
    assert model == "" and found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_no_backbone_no_file(tmp_path):
    for names in (
        ["neck.decoder.0.weight", "ema_backbone_norm"],
        ["head.0.running_mean", "head.1.weight"],
    ):
        torch.save({"model": dict.fromkeys(names, torch.zeros(1))}, tmp_path / "heads.pth")
        with pytest.raises(ValueError, match=r"heads\.pth holds no backbone, only "):
            extract(str(tmp_path / "heads.pth"))


def test_a_run_is_fine_tuned_and_looked_at(tmp_path):
    """Its checkpoint and its encoder load into the classifier, and into the method itself."""
    run, position = start("pretrain", tmp_path, *METHODS["a2mim_vit"])
    run.session.save(position, finished=True)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "input_size": 16, "patch_size": 4}
    for name in ("checkpoint-0.pth", "encoder-0.safetensors"):
        classifier = create_model("mim_vit_tiny_patch16_224", **sizes, num_classes=10)
        report = load_pretrained(classifier, tmp_path / name)
        assert report.matched == 1 and set(report.missing) == {
            "fc_norm.weight",
            "fc_norm.bias",
            "head.weight",
            "head.bias",
        }
    again = create_model("a2mim_vit_tiny_patch16_224", **sizes, mask_layer=1, mask_init=1e-6)
    assert load_pretrained(again, tmp_path / "checkpoint-0.pth").missing == []


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_published_names_load_into_classifiers(prefix):
    """OpenMixup's ViT, whole with its neck or the backbone alone."""
    sizes = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "input_size": 16,
        "patch_size": 4,
        "num_classes": 3,
    }
    model = create_model("mim_vit_tiny_patch16_224", **sizes)
    names = {
        "blocks.": "layers.", ".norm": ".ln", ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.", "patch_embed.proj.": "patch_embed.projection.",
    }  # fmt: skip
    published, weights = {}, {}
    for key, value in model.state_dict().items():
        if not key.startswith("head."):
            weights[key], own = torch.randn_like(value), key
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            published[prefix + key] = weights[own]
    if prefix:
        published |= {
            "neck.decoder.0.weight": torch.zeros(1),
            "backbone.mask_token": torch.zeros(1),
        }
    report = load_pretrained(model, {"state_dict": published, "meta": {}})
    assert report.matched == 1
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


# --------------------------------------------------------------------------------------------------
# Optimization


def groups_of(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning-rate factor and decay of each parameter."""
    found = {
        id(p): (g["lr_scale"], g["weight_decay"])
        for g in param_groups(model, 0.05)
        for p in g["params"]
    }
    return {name: found[id(p)] for name, p in model.named_parameters()}


def test_later_rules_win_and_factors_are_of_the_base():
    """A factor forgets what an earlier rule said, a value what an earlier
    factor did."""
    factors, values = {"lr_mult": 0.1, "weight_decay_mult": 0.5}, {"lr": 1e-5, "weight_decay": 0.0}
    assert by_rules("bn1.bias", {"bn": values, "bias": factors}, 2e-3, 0.04) == pytest.approx(
        (2e-4, 0.02)
    )
    assert by_rules("bn1.bias", {"bias": factors, r"bn\d": values}, 2e-3, 0.04) == (1e-5, 0.0)
    assert by_rules("fc.weight", {"bias": factors, "bn": values}, 2e-3, 0.04) == (2e-3, 0.04)


def test_published_rules_of_decay_and_rate():
    """docs/methods/simmim_a2mim.md#weight-decay."""
    resnet = groups_of(build("resnet18"))
    assert resnet["inject.mask_token"] == (pytest.approx(0.1), 0.0)
    assert resnet["inject.mask_gamma"] == (1.0, 0.05)  # as in the recipes of 300 epochs
    assert groups_of(build("resnet18", gamma_lr=0.1))["inject.mask_gamma"] == (
        pytest.approx(0.1),
        0.0,
    )
    assert (
        resnet["backbone.layer2.0.downsample.1.weight"] == resnet["neck.pred.weight"] == (1.0, 0.05)
    )
    assert (
        resnet["backbone.layer2.0.downsample.1.bias"]
        == resnet["backbone.layer2.0.bn1.weight"]
        == (1.0, 0.0)
    )
    assert groups_of(build("resnet18", "simmim"))["inject.mask_token"] == (1.0, 0.0)
    convnext = groups_of(build("convnext_tiny"))
    assert convnext["backbone.stages.0.blocks.0.norm.weight"] == (1.0, 0.05)
    assert convnext["backbone.stages.0.blocks.0.gamma"] == (1.0, 0.0)
    assert (
        convnext["inject.mask_gamma"] == convnext["inject.mask_token"] == (pytest.approx(0.1), 0.0)
    )
    vit = groups_of(build("vit_tiny_patch16_224", mask_init=1e-6))
    matrices = [f"{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    decayed = {f"backbone.blocks.{block}.{name}" for block in range(3) for name in matrices}
    decayed |= {"neck.pred.weight", "backbone.patch_embed.proj.weight"}
    assert {name: values for name, values in vit.items() if values != (1.0, 0.0)} == dict.fromkeys(
        decayed, (1.0, 0.05)
    )
    swin = groups_of(build("swin_tiny"))
    assert swin["backbone.layers.1.blocks.0.attn.relative_position_bias_table"] == (1.0, 0.0)
    assert swin["backbone.layers.1.downsample.reduction.weight"] == (1.0, 0.05)


def test_every_group_ends_at_the_same_rate():
    rates = annealing("stepfix_cosine", 1.0, 0.1, 10, 4, 8)
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr_scale": scale} for scale in (1.0, 0.2)]
    )
    found = []
    for rate in (*rates, (0.1, 0.1)):  # the last step does not quite reach the end
        set_schedule(optimizer, rate, 0.0)
        found.append([group["lr"] for group in optimizer.param_groups])
    assert (
        found[0] == [0.0, 0.0] and found[8] == pytest.approx([1.0, 0.2]) and found[-1] == [0.1, 0.1]
    )
    step = annealing("step", 1.0, 0.5, 10, 2, 4, warmup_ratio=0.5, milestones=(6, 8))
    assert step[:, 0].tolist() == pytest.approx(
        [0.5, 0.625, 0.75, 0.875] + [1.0] * 8 + [0.1] * 4 + [0.01] * 4
    )
    with pytest.raises(ValueError, match="leaves nothing of the run"):
        annealing("step", 1.0, 0.0, 2, 2, 4)


# --------------------------------------------------------------------------------------------------
# The benchmark's plain form


@pytest.mark.parametrize(
    "options", [{}, {"fft_unmask_weight": 0.5, "fft_unmask_replace": "prediction"}], ids=str
)
def test_the_plain_variant_of_the_benchmark_computes_the_same(options):
    """Loss and gradients: the order in memory and half a spectrum change nothing."""
    ours, plain = (build("resnet18", pixel_loss="l1", **options) for _ in range(2))
    make_straightforward(plain)
    batch = {"image": images_of(ours), "mask": torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 1]]])}
    orders = [model.features(batch["image"], batch["mask"]) for model in (ours, plain)]
    assert orders[0].is_contiguous(memory_format=torch.channels_last) and orders[1].is_contiguous()
    losses = [model(batch)["loss"] for model in (ours, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
