"""Networks other than the repository's ViT behind classifier and probes
(docs/methods/simmim_a2mim.md#classifiers)."""

import copy
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import start, train_steps
from torch import Tensor, nn

import run_class_finetuning
from datasets import TrainBatchSampler
from engine_for_finetuning import BinaryCrossEntropy, Classification
from modeling_finetune import create_model, input_size_of
from optim_factory import layers_of, param_groups
from unimim.checkpoint.files import save_encoder
from unimim.checkpoint.loading import load_pretrained
from unimim.checkpoint.resizing import interpolate_rel_pos_bias
from unimim.cli.options import parse
from unimim.data.classes import check_eval_size, settle_size
from unimim.data.views import build_finetune_transform
from unimim.evaluation.features import build_backbone
from unimim.evaluation.flags import parse_linear
from unimim.evaluation.linear_probe import Probe, side_by_side

TINY = {
    "resnet18": {"channels": [8, 8, 16, 16], "input_size": 64},
    "convnext_tiny": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "input_size": 64},
    "swin_tiny": {
        "depths": [1, 2, 1, 1],
        "embed_dim": 8,
        "num_heads": [1, 2, 2, 4],
        "input_size": 64,
    },
    "mobilenetv3_small_050": {"input_size": 64},
}
FLAGS = [
    *(
        "--model",
        "resnet18",
        "--data_set",
        "digits",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--input_size",
        "64",
    ),
    *("--model_kwargs", "patch_size=null", "channels=[8,8,16,16]"),
]


def encoder_of(name: str, **options) -> dict[str, Tensor]:
    """What pre-training exports."""
    torch.manual_seed(1)
    method = create_model(f"a2mim_{name}", **TINY[name] | options)
    for parameter in method.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return method.encoder_state_dict()


# --------------------------------------------------------------------------------------------------
# Weights and layers


@pytest.mark.parametrize("name", TINY)
def test_exported_encoders_become_classifiers(name):
    """Everything but the new head, which is scaled, comes from the encoder."""
    encoder = encoder_of(name)
    torch.manual_seed(0)
    model = create_model(name, **TINY[name], num_classes=7, init_scale=0.5, drop_path=0.0)
    torch.manual_seed(0)
    whole = create_model(name, **TINY[name], num_classes=7, drop_path=0.0).get_classifier()
    assert torch.equal(model.get_classifier().weight, 0.5 * whole.weight)
    report = load_pretrained(model, encoder)
    (head,) = (key for key, module in model.named_modules() if module is model.get_classifier())
    assert (
        report.matched == 1
        and report.missing == [f"{head}.weight", f"{head}.bias"]
        and report.ignored == []
    )
    assert all(torch.equal(model.state_dict()[key], value) for key, value in encoder.items())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_tables_of_a_swin_are_resized_to_its_windows():
    """From 192 px to 224 px, as published."""
    encoder = encoder_of("swin_tiny", input_size=96)
    model = create_model("swin_tiny", **TINY["swin_tiny"] | {"input_size": 160}, num_classes=7)
    report = load_pretrained(model, encoder)
    tables = [key for key in encoder if key.endswith("relative_position_bias_table")]
    assert (
        report.matched == 1 and sorted(report.interpolated) == sorted(tables) and len(tables) == 5
    )
    for key in tables:
        expected = interpolate_rel_pos_bias(encoder[key], 3, 5, num_extra=0)
        assert expected.shape == (81, encoder[key].shape[1])
        assert torch.equal(model.state_dict()[key], expected)
        center = encoder[key].shape[0] // 2
        torch.testing.assert_close(
            expected[40], encoder[key][center]
        )  # equal positions have no offset


def test_layers_of_each_architecture():
    """Swin-T has 14 layers, ConvNeXt-T 8 and ConvNeXt-S 14, of published
    sizes."""
    swin = {
        "patch_embed.proj.weight": 0, "layers.0.blocks.1.norm1.weight": 2,
        "layers.1.downsample.norm.weight": 2, "layers.2.blocks.5.norm1.weight": 10,
        "layers.3.downsample.norm.weight": 10, "layers.3.blocks.1.norm1.bias": 12,
        "norm.weight": 13, "head.fc.weight": 13,
    }  # fmt: skip
    tiny = {
        "stem.0.weight": 0, "stages.0.blocks.2.gamma": 1, "stages.1.downsample.0.bias": 2,
        "stages.1.blocks.0.gamma": 2, "stages.2.downsample.0.bias": 3, "stages.2.blocks.2.gamma": 3,
        "stages.2.blocks.8.gamma": 5, "stages.3.downsample.1.bias": 6, "stages.3.blocks.0.gamma": 6,
        "head.norm.weight": 7, "head.fc.weight": 7,
    }  # fmt: skip
    small = tiny | {
        "stages.2.blocks.26.gamma": 11, "stages.3.downsample.1.bias": 12,
        "stages.3.blocks.0.gamma": 12, "head.norm.weight": 13, "head.fc.weight": 13,
    }  # fmt: skip
    for names, depths, last in (
        (swin, (2, 2, 6, 2), 13),
        (tiny, (3, 3, 9, 3), 7),
        (small, (3, 3, 27, 3), 13),
    ):
        assert layers_of(list(names), depths) == (names, last)


@pytest.mark.parametrize(("name", "last"), [("swin_tiny", 6), ("convnext_tiny", 7)])
def test_layer_decay_reaches_the_groups(name, last):
    """And tables, norms and biases are not decayed."""
    model = create_model(name, **TINY[name], num_classes=7)
    groups = param_groups(model, 0.05, 0.5)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    values = {key: found[id(p)] for key, p in model.named_parameters()}
    first = "patch_embed.proj.weight" if name == "swin_tiny" else "stem.0.weight"
    assert values[first] == (0.5**last, 0.05) and values["head.fc.weight"] == (1.0, 0.05)
    undecayed = {key for key, (_, decay) in values.items() if decay == 0}
    one_dimensional = {key for key, p in model.named_parameters() if p.ndim == 1}
    assert undecayed == one_dimensional | {key for key in values if key.endswith("bias_table")}


def test_networks_without_known_layers_are_refused():
    for name in ("resnet18", "mobilenetv3_small_050"):
        model = create_model(name, **TINY[name])
        with pytest.raises(ValueError, match="--layer_decay 1 for this network"):
            param_groups(model, 0.05, 0.9)
        assert all(group["lr_scale"] == 1 for group in param_groups(model, 0.05, 1.0))


def test_defaults_of_vits_give_way_for_networks_without_a_recipe():
    """So that pre-training and fine-tuning of any CNN go together without further flags."""
    for name, flags, expected in (
        ("regnety_008", [], (1.0, 0.0)),
        ("densenet121", ["--drop_path", "0.2"], (1.0, 0.2)),
        ("resnet18", ["--layer_decay", "0.9"], (0.9, 0.0)),
        ("convnext_tiny", [], (0.7, 0.1)),
        ("swin_tiny", [], (0.9, 0.1)),
        ("beit_small_patch16_224_abs_pos", [], (0.9, 0.1)),
    ):
        args = parse("finetune", ["--model", name, *flags])
        assert (args.layer_decay, args.drop_path) == expected


@pytest.mark.parametrize("name", ["swin_tiny", "mim_vit_tiny_patch16_224"])
def test_a_size_to_evaluate_at_is_refused_before_training(name):
    sizes = TINY.get(name, {"embed_dim": 32, "depth": 1, "num_heads": 2, "input_size": 64})
    model = create_model(name, **sizes, num_classes=7)
    args = Namespace(
        model=name, input_size=model.patch_embed.img_size[0], eval_input_size=96, in_chans=None
    )
    with pytest.raises(
        ValueError, match=f"--eval_input_size 96: --model {name} is for --input_size"
    ):
        check_eval_size(args, model)
    resnet = create_model("resnet18", **TINY["resnet18"], num_classes=7)
    check_eval_size(args, resnet)
    assert resnet.training


def test_models_know_their_size():
    assert [input_size_of(f"beit_tiny_patch16_{size}") for size in (224, 384)] == [224, 384]
    assert input_size_of("resnet50") == 224 and input_size_of("nothing") == 0
    args = parse("finetune", ["--model", "beit_tiny_patch16_384"])
    settle_size(args)
    assert args.input_size == 384
    assert parse("finetune", ["--model", "resnet50"]).eval_input_size == 224
    assert parse("finetune", ["--model", "resnet50", "--input_size", "96"]).eval_input_size is None
    args = parse("finetune", ["--model", "resnet18", "--model_kwargs", "input_size=96"])
    settle_size(args)
    assert args.input_size == 96


# --------------------------------------------------------------------------------------------------
# Training


def test_binary_cross_entropy_is_summed_over_classes():
    torch.manual_seed(0)
    logits, labels, criterion = torch.randn(4, 5), torch.tensor([0, 3, 3, 1]), BinaryCrossEntropy()
    shares = torch.rand(4, 5)
    odds = logits.sigmoid()
    by_hand = -(shares * odds.log() + (1 - shares) * (1 - odds).log()).sum() / 4
    torch.testing.assert_close(criterion(logits, shares), by_hand)
    torch.testing.assert_close(
        criterion(logits, labels), criterion(logits, F.one_hot(labels, 5).float())
    )
    smooth = F.one_hot(labels, 5) * 0.9 + 0.02
    torch.testing.assert_close(BinaryCrossEntropy(0.1)(logits, labels), criterion(logits, smooth))


def test_the_ema_has_the_networks_batch_statistics():
    """The ema averages weights, not statistics (docs/methods/simmim_a2mim.md#classifiers)."""
    args = parse("finetune", ["--model_ema", "--model_ema_decay", "0.5"])
    args.nb_classes = 3
    task = Classification(
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), args, torch.device("cpu")
    )
    before, average = task.ema.module[1].weight.clone(), task.ema.module
    task.model[1].weight.data += 1
    task.model(torch.randn(16, 4) + 3)
    task.after_step(1.0)
    torch.testing.assert_close(average[1].weight, before + 0.5)
    assert torch.equal(average[0].running_mean, task.model[0].running_mean)
    assert task.model[0].running_mean.min() > 0.1 and average[0].num_batches_tracked == 1


def test_the_decay_of_the_ema_rises():
    """m (1 - 0.1 (1 - i / W)) in the first W of the epochs
    (docs/methods/simmim_a2mim.md#classifiers)."""
    flags = [
        "--model_ema",
        "--model_ema_decay",
        "0.8",
        "--model_ema_warmup_epochs",
        "5",
        "--epochs",
        "10",
    ]
    args = parse("finetune", flags)
    args.nb_classes = 3
    task = Classification(nn.Linear(4, 3), args, torch.device("cpu"))
    for progress, decay in ((0.0, 0.72), (0.25, 0.76), (0.5, 0.8), (0.9, 0.8)):
        before = copy.deepcopy(task.ema.module.weight)
        task.model.weight.data += 1
        task.after_step(progress)
        torch.testing.assert_close(
            task.ema.module.weight.data, decay * before + (1 - decay) * task.model.weight
        )


def keys_of(epoch: int = 0, **sampler) -> list[list[tuple[int, int]]]:
    found = TrainBatchSampler(**{"n": 24, "batch_size": 2, "repeats": 3, "seed": 4} | sampler)
    found.set_position(epoch)
    return list(found)


def test_repeated_images():
    """Three times in a step with draws of their own, on different ranks; one process that
    accumulates sees the same."""
    ranks = [keys_of(rank=rank, world_size=3, step_batches=3) for rank in range(3)]
    alone = keys_of(step_batches=3)
    assert [len(rank) for rank in ranks] == [4, 4, 4] and len(alone) == 12
    order = [index for batch in keys_of(repeats=1) for _, index in batch]
    for step in range(4):
        batches = [rank[step] for rank in ranks]
        assert batches == alone[3 * step : 3 * step + 3]
        seen = [[index for _, index in batch] for batch in batches]
        assert seen == [order[2 * step : 2 * step + 2]] * 3
        assert [{copy for copy, _ in batch} for batch in batches] == [{0}, {1}, {2}]
    later = keys_of(1, step_batches=3)
    assert {copy for batch in later for copy, _ in batch} == {3, 4, 5}
    mixed = [key for batch in keys_of(step_batches=2) for key in batch]
    assert len(set(mixed)) == len(mixed) == 24
    assert {index for _, index in mixed} == set(order[:8])


def test_a_resnet_is_trained_small_and_evaluated_large(tmp_path):
    """RSB's ingredients in one run."""
    flags = (
        *FLAGS, "--opt", "lamb", "--opt_eps", "1e-6", "--bce_loss", "--smoothing", "0", "--mixup",
        "0.1", "--cutmix", "1", "--aug_repeats", "3", "--eval_input_size", "96", "--layer_decay",
        "1", "--lr_schedule", "cosine_epochs", "--init_scale", "1", "--drop_path", "0.05",
        "--reprob", "0",
    )  # fmt: skip
    run, _ = start("finetune", tmp_path, *flags)
    assert (
        isinstance(run.task.criterion, BinaryCrossEntropy)
        and type(run.runner.optimizer).__name__ == "Lamb"
    )
    before = {name: value.clone() for name, value in run.task.model.state_dict().items()}
    losses = [row["loss"] for row in train_steps(run, 0, 4)]
    assert np.isfinite(losses).all()
    still = {
        name
        for name, value in run.task.model.state_dict().items()
        if torch.equal(value, before[name])
    }
    assert still == set()
    loader = run_class_finetuning.build_eval_loader(
        run.args, build_finetune_transform(run.args, train=False)
    )
    assert next(iter(loader))["image"].shape[-2:] == (96, 96)
    assert run.loader.dataset[0, 0]["image"].shape[-2:] == (64, 64)


# --------------------------------------------------------------------------------------------------
# Probing


def probe_args(path, **changes) -> Namespace:
    args = parse_linear([*FLAGS, "--finetune", str(path)])
    return Namespace(**vars(args) | changes)


def test_a_frozen_network_keeps_its_statistics(tmp_path):
    """The published probe leaves batch normalization in train mode; features are the mean of the
    last map."""
    save_encoder(tmp_path / "encoder.safetensors", encoder_of("resnet18"), {"format": "timm"})
    backbone = build_backbone(probe_args(tmp_path / "encoder.safetensors"))
    assert (backbone.dim, backbone.image_size) == (16, (64, 64))
    probe = Probe(side_by_side([0.1], backbone.dim, 10, 0), backbone).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    images = torch.randn(4, 3, 64, 64)
    probe({"image": images, "label": torch.tensor([0, 1, 2, 3])})["loss"].backward()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not backbone.network.training and all(p.grad is None for p in backbone.parameters())
    method = create_model("a2mim_resnet18", **TINY["resnet18"])
    load_pretrained(method.backbone, encoder_of("resnet18"))
    torch.testing.assert_close(backbone(images), method.eval().features(images, None).mean((2, 3)))


def test_what_only_vits_have_is_refused(tmp_path):
    save_encoder(tmp_path / "encoder.safetensors", encoder_of("resnet18"), {"format": "timm"})
    with pytest.raises(ValueError, match="--feature_norm plain is for ViTs"):
        build_backbone(probe_args(tmp_path / "encoder.safetensors", feature_norm="plain"))
    other = {name: value for name, value in encoder_of("resnet18").items() if "layer4" not in name}
    save_encoder(tmp_path / "other.safetensors", other, {"format": "timm"})
    with pytest.raises(ValueError, match="100% are needed"):
        build_backbone(probe_args(tmp_path / "other.safetensors"))
