"""Parameter groups, schedules, and optimizers by name against formulas and directly built
references."""

import math
import sys
import types
from argparse import Namespace

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn

from modeling_finetune import VisionTransformer
from optim_factory import (
    LARS,
    LayerWarmups,
    cosine_schedule,
    create_optimizer,
    layer_id,
    needs_create_graph,
    param_groups,
    set_schedule,
)
from run_class_finetuning import finetuning_groups
from unimim.cli.models import build_classifier
from unimim.cli.options import parse
from unimim.engine.setup import schedules


def tiny_vit(**options) -> VisionTransformer:
    form = {
        "pos_embed": "learned",
        "rel_pos_bias": "per_block",
        "init_values": 0.1,
        "num_classes": 3,
    }
    return VisionTransformer(
        input_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, **form | options
    )


def names_of(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def flags(opt: str, **values) -> Namespace:
    return Namespace(
        **{"opt": opt, "lr": 0.1, "momentum": 0.9, "opt_eps": 1e-8, "opt_betas": None} | values
    )


# --------------------------------------------------------------------------------------------------
# Groups


def test_matrices_tokens_and_tables_decay_vectors_and_skipped_names_do_not():
    model = tiny_vit()
    model.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
    model.extra = nn.ParameterDict(
        {"bias": torch.zeros(2, 2)}
    )  # not one-dimensional, yet a bias by name
    by_name = {g["group_name"]: g for g in param_groups(model, 0.05)}
    assert list(by_name) == ["no_decay", "decay"]
    parts = (
        "attn.qkv.weight",
        "attn.proj.weight",
        "attn.relative_position_bias_table",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    )
    decayed = {f"blocks.{i}.{part}" for i in range(2) for part in parts}
    decayed |= {"patch_embed.proj.weight", "head.weight", "mask_token"}
    assert names_of(model, by_name["decay"]) == decayed
    assert (
        names_of(model, by_name["no_decay"]) == {n for n, _ in model.named_parameters()} - decayed
    )
    assert [g["weight_decay"] for g in by_name.values()] == [0.0, 0.05]
    assert [g["lr_scale"] for g in by_name.values()] == [1.0, 1.0]


def test_further_names_are_not_decayed_and_frozen_parameters_are_left_out():
    model = tiny_vit()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    table = "blocks.1.attn.relative_position_bias_table"
    groups = {
        g["group_name"]: names_of(model, g)
        for g in param_groups(model, 0.05, no_decay_names=[table])
    }
    assert (
        table in groups["no_decay"]
        and "blocks.0.attn.relative_position_bias_table" in groups["decay"]
    )
    assert "blocks.0.attn.qkv.weight" not in groups["decay"] | groups["no_decay"]


def test_a_model_that_skips_no_names_decays_its_class_token_as_mae_does():
    model = tiny_vit()
    model.no_weight_decay = set
    decayed = next(g for g in param_groups(model, 0.05) if g["decay"])
    assert {"cls_token", "pos_embed"} <= names_of(model, decayed)


def test_layer_decay_scales_each_layer_and_orders_groups_by_first_appearance():
    model = tiny_vit()
    groups = param_groups(model, 0.05, layer_decay=0.5)
    assert [g["group_name"] for g in groups] == [
        f"layer_{layer}_{kind}" for layer in range(4) for kind in ("no_decay", "decay")
    ]
    assert [g["lr_scale"] for g in groups] == [0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    assert names_of(model, groups[7]) == {"head.weight"}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_layer_decay_of_one_is_no_layer_decay_and_others_out_of_range_are_refused():
    assert [g["group_name"] for g in param_groups(tiny_vit(), 0.05, layer_decay=1.0)] == [
        "no_decay",
        "decay",
    ]
    for factor in (0.0, 1.5):
        with pytest.raises(ValueError, match="--layer_decay"):
            param_groups(tiny_vit(), 0.05, layer_decay=factor)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("cls_token", 0), ("mask_token", 0), ("pos_embed", 0), ("patch_embed.proj.bias", 0),
     ("blocks.0.gamma_1", 1),
     ("blocks.11.attn.relative_position_bias_table", 12),
     ("rel_pos_bias.relative_position_bias_table", 13),
     ("norm.weight", 13), ("fc_norm.bias", 13), ("head.weight", 13)],
)  # fmt: skip
def test_layer_id(name, layer):
    assert layer_id(name, 12) == layer


def test_without_weight_decay_the_decayed_group_stays_known_and_can_be_raised_later():
    model = tiny_vit()
    groups = param_groups(model, 0.0, layer_decay=0.5)
    assert len(groups) == 8 and all(g["weight_decay"] == 0.0 for g in groups)
    optimizer = create_optimizer(flags("adamw"), groups, "cpu")
    set_schedule(optimizer, np.float64(0.4), np.float64(0.1))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1] * 4
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.05, 0.1, 0.1, 0.2, 0.2, 0.4, 0.4]
    assert {
        type(g[key]) for g in optimizer.param_groups for key in ("lr", "weight_decay", "lr_scale")
    } == {float}


def test_groups_without_our_keys_follow_the_schedule_by_their_present_decay():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [
        {"params": parameters[:1], "weight_decay": 0.0},
        {"params": parameters[1:], "weight_decay": 0.3},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_schedule(optimizer, 0.5, 0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.0),
        (0.5, 0.2),
    ]


# --------------------------------------------------------------------------------------------------
# Schedules


def test_cosine_schedule_without_warmup():
    expected = [1 + 0.5 * 3 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    np.testing.assert_allclose(
        cosine_schedule(4, 1, epochs=2, steps_per_epoch=3), expected, rtol=1e-14
    )


def test_warmup_in_epochs_ends_at_the_base_which_the_cosine_repeats():
    values = cosine_schedule(
        1.0, 0.0, epochs=4, steps_per_epoch=3, warmup_epochs=1, start_warmup=0.2
    )
    np.testing.assert_allclose(
        values[:5], [0.2, 0.6, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 9))], rtol=1e-14
    )
    assert values.shape == (12,) and values.dtype == np.float64 and values[-1] > 0


def test_warmup_steps_work_without_warmup_epochs_and_override_them():
    expected = [0.0, 0.5, 1.0]
    for epochs in (0, 1):
        values = cosine_schedule(
            1.0, 0.0, epochs=2, steps_per_epoch=5, warmup_epochs=epochs, warmup_steps=3
        )
        np.testing.assert_allclose(values[:3], expected)
        assert len(values) == 10 and values[3] == 1.0 > values[4]


def test_a_warmup_as_long_as_the_run_is_only_the_ramp_and_a_longer_one_is_refused():
    np.testing.assert_allclose(cosine_schedule(3.0, 0.0, 1, 4, warmup_epochs=1), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="--warmup_epochs / --warmup_steps"):
        cosine_schedule(3.0, 0.0, 1, 4, warmup_steps=5)


# --------------------------------------------------------------------------------------------------
# Optimizers


def train(make, steps: int = 13, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Parameters after a few steps on a fixed curved loss; `make` builds the optimizer from two
    decay groups."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector = (
        nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in ((3, 4), (4,))
    )
    data = torch.randn(5, 3, generator=generator, dtype=dtype)
    groups = [
        {"params": [matrix], "weight_decay": 0.1, "lr_scale": 0.5, "group_name": "decay"},
        {"params": [vector], "weight_decay": 0.0, "lr_scale": 1.0, "group_name": "no_decay"},
    ]
    optimizer = make(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        (data @ matrix + vector).tanh().square().sum().backward(
            create_graph=needs_create_graph(optimizer)
        )
        optimizer.step()
    assert [g["lr_scale"] for g in optimizer.param_groups] == [0.5, 1.0]
    return [matrix.detach(), vector.detach()]


TORCH, TIMM = torch.optim, timm.optim
REFERENCES = {
    "adamw": lambda g: TORCH.AdamW(g, 0.1, foreach=False),
    "AdamW": lambda g: TORCH.AdamW(g, 0.1, foreach=False),
    "adam": lambda g: TORCH.Adam(g, 0.1, foreach=False),
    "sgd": lambda g: TORCH.SGD(g, 0.1, momentum=0.9, nesterov=True, foreach=False),
    "nesterov": lambda g: TORCH.SGD(g, 0.1, momentum=0.9, nesterov=True, foreach=False),
    "momentum": lambda g: TORCH.SGD(g, 0.1, momentum=0.9, foreach=False),
    "nadam": lambda g: TORCH.NAdam(g, 0.1),
    "radam": lambda g: TORCH.RAdam(g, 0.1),
    "adadelta": lambda g: TORCH.Adadelta(g, 0.1, eps=1e-8),
    "rmsprop": lambda g: TORCH.RMSprop(g, 0.1, alpha=0.9, momentum=0.9),
    "lamb": lambda g: TIMM.Lamb(g, 0.1, eps=1e-8),
    "adamp": lambda g: TIMM.AdamP(g, 0.1, wd_ratio=0.01, nesterov=True),
    "sgdp": lambda g: TIMM.SGDP(g, 0.1, momentum=0.9, nesterov=True, eps=1e-8),
    "rmsproptf": lambda g: TIMM.RMSpropTF(g, 0.1, alpha=0.9, momentum=0.9, eps=1e-8),
    "novograd": lambda g: TIMM.NvNovoGrad(g, 0.1),
    "nvnovograd": lambda g: TIMM.NvNovoGrad(g, 0.1),
    "adafactor": lambda g: TIMM.Adafactor(g, 0.1, eps=1e-8),
    "lars": lambda g: LARS(g, 0.1, momentum=0.9),
    "lookahead_adamw": lambda g: TIMM.Lookahead(TORCH.AdamW(g, 0.1, foreach=False)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_optimizer_by_name_steps_like_its_reference(name):
    ours = train(lambda groups: create_optimizer(flags(name), groups, "cpu"))
    reference = train(REFERENCES[name])
    assert all(torch.isfinite(p).all() for p in ours)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_the_named_optimizers_differ_where_they_should():
    results = {
        n: train(lambda g, n=n: create_optimizer(flags(n), g, "cpu"))[0]
        for n in ("adam", "adamw", "sgd", "momentum")
    }
    assert not torch.allclose(results["adam"], results["adamw"], rtol=1e-3)
    assert not torch.allclose(results["sgd"], results["momentum"], rtol=1e-3)


def test_adamw_first_step_by_the_formula_with_flags_for_eps_and_betas():
    weight, gradient = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1e-3])
    parameter = nn.Parameter(weight.clone())
    groups = [{"params": [parameter], "weight_decay": 0.05, "lr_scale": 1.0}]
    optimizer = create_optimizer(
        flags("adamw", lr=0.01, opt_eps=1e-2, opt_betas=[0.8, 0.5]), groups, "cpu"
    )
    parameter.grad = gradient.clone()
    optimizer.step()
    # bias correction makes both moments those of the single gradient
    expected = weight * (1 - 0.01 * 0.05) - 0.01 * gradient / (gradient.abs() + 1e-2)
    torch.testing.assert_close(parameter.detach(), expected)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.5)


def test_torch_optimizers_are_fused_where_the_device_has_it():
    group = {"params": [nn.Parameter(torch.zeros(1))]}
    for name in ("adamw", "adam", "sgd", "momentum"):
        assert create_optimizer(flags(name), [group.copy()], "cpu").defaults["fused"]
        assert not create_optimizer(flags(name), [group.copy()], "meta").defaults["fused"]


def test_lookahead_pulls_the_fast_weights_halfway_back_every_sixth_step():
    plain = [
        train(lambda g: create_optimizer(flags("sgd", momentum=0.0), g, "cpu"), steps)[1]
        for steps in (6, 12)
    ]
    pulled = train(lambda g: create_optimizer(flags("lookahead_sgd", momentum=0.0), g, "cpu"), 12)[
        1
    ]
    torch.testing.assert_close(pulled, (plain[0] + plain[1]) / 2)


def test_lars_by_the_formula():
    matrix, vector, zero = (
        nn.Parameter(p)
        for p in (torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]), torch.zeros(1, 2))
    )
    optimizer = LARS(
        [matrix, vector, zero], lr=2.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.01
    )
    gradients = [torch.tensor([[0.7, -0.4]]), torch.tensor([0.3]), torch.tensor([[0.6, 0.8]])]
    for _ in range(2):
        for parameter, gradient in zip((matrix, vector, zero), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    # matrix: g = (1, 0), rescaled by 0.01 * 5; vector: plain momentum; zero matrix: not rescaled at
    # first
    first = torch.tensor([[3.0, 4.0]]) - 2.0 * 0.05 * torch.tensor([[1.0, 0.0]])
    decayed = gradients[0] + 0.1 * first
    momentum = (
        0.5 * 0.05 * torch.tensor([[1.0, 0.0]]) + decayed * 0.01 * first.norm() / decayed.norm()
    )
    torch.testing.assert_close(matrix.detach(), first - 2.0 * momentum)
    torch.testing.assert_close(
        vector.detach(), torch.tensor([1.0 - 2.0 * 0.3 - 2.0 * (0.15 + 0.3)])
    )
    zero_first = -2.0 * gradients[2]
    zero_decayed = gradients[2] + 0.1 * zero_first
    zero_second = 0.5 * gradients[2] + zero_decayed * 0.01 * zero_first.norm() / zero_decayed.norm()
    torch.testing.assert_close(zero.detach(), zero_first - 2.0 * zero_second)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_adahessian_asks_for_the_graph_and_trains():
    assert not needs_create_graph(
        create_optimizer(flags("adamw"), [{"params": [nn.Parameter(torch.ones(1))]}], "cpu")
    )
    before = train(lambda g: create_optimizer(flags("adahessian"), g, "cpu"), steps=0)
    after = train(lambda g: create_optimizer(flags("adahessian"), g, "cpu"), steps=5)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))


def test_adafactor_without_lr_finds_its_own():
    before, after = (
        train(lambda g: create_optimizer(flags("adafactor", lr=0.0), g, "cpu"), n)[0]
        for n in (0, 5)
    )
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sgd", "momentum", "lars", "rmsprop", "lookahead_sgd"])
def test_betas_for_an_optimizer_without_them_are_refused(name):
    with pytest.raises(ValueError, match=f"--opt_betas .*--opt {name} has no betas"):
        create_optimizer(
            flags(name, opt_betas=[0.9, 0.98]), [{"params": [nn.Parameter(torch.zeros(1))]}], "cpu"
        )


def test_one_beta_too_few_and_an_unknown_name_are_refused():
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}]
    with pytest.raises(ValueError, match="takes 2 betas"):
        create_optimizer(flags("adamw", opt_betas=[0.9]), groups, "cpu")
    with pytest.raises(ValueError, match=r"--opt adamww is unknown; close matches: .*\badamw\b"):
        create_optimizer(flags("adamww"), groups, "cpu")


@pytest.mark.parametrize(
    ("name", "substitute"),
    [("fusedadam", "adam"), ("fusedadamw", "adamw"), ("fusedsgd", "sgd"),
     ("fusedmomentum", "momentum"),
     ("fusedlamb", "lamb"), ("fusednovograd", "novograd")],
)  # fmt: skip
def test_without_apex_its_optimizers_are_refused_with_a_substitute(name, substitute, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(ValueError, match=rf"--opt {name} needs NVIDIA apex, .*--opt {substitute},"):
        create_optimizer(flags(name), [{"params": [nn.Parameter(torch.zeros(1))]}], "cpu")


def test_with_apex_its_classes_get_the_flags(monkeypatch):
    apex = types.ModuleType("apex.optimizers")
    apex.FusedAdam = apex.FusedNovoGrad = apex.FusedSGD = lambda groups, **options: options
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    common = {"lr": 0.1, "weight_decay": 0.0}
    assert create_optimizer(flags("fusedadam"), [], "cpu") == common | {
        "eps": 1e-8,
        "adam_w_mode": False,
    }
    assert create_optimizer(flags("fusedadamw"), [], "cpu") == common | {
        "eps": 1e-8,
        "adam_w_mode": True,
    }
    assert create_optimizer(flags("fusedsgd"), [], "cpu") == common | {
        "momentum": 0.9,
        "nesterov": True,
    }
    assert create_optimizer(flags("fusednovograd"), [], "cpu")["betas"] == (0.95, 0.98)
    assert create_optimizer(flags("fusednovograd", opt_betas=[0.9, 0.9]), [], "cpu")["betas"] == (
        0.9,
        0.9,
    )


# --------------------------------------------------------------------------------------------------
# NEPA's fine-tuning


def test_each_layer_warms_up_by_itself_to_its_own_lr():
    """ViT of two blocks, 100 epochs of one step, decay 0.65: docs/methods/nepa.md#fine-tuning."""
    words = "--model rope_vit_tiny_patch14_224 --model_kwargs embed_dim=32 depth=2 num_heads=2 "
    words += "freeze_patch_embed=true --lr 6e-3 --min_lr 0 --lr_schedule mae --epochs 100 "
    words += "--warmup_epochs 20 --layer_decay 0.65 --full_last_block --head_lr 1e-3 --layer_warmup"
    args = parse("finetune", words.split())
    args.nb_classes = 10
    model = build_classifier(args)
    groups = finetuning_groups(args, model)
    optimizer = create_optimizer(args, groups, "cpu")
    lr, weight_decay = schedules(args, 1, groups)
    found = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for step in range(100):
        set_schedule(optimizer, lr[step], weight_decay[step])
        for group in optimizer.param_groups:
            for name in names_of(model, group):
                found[name].append(group["lr"])

    def published(peak: float, warmup: int) -> list[float]:
        falling = [0.5 * (1 + math.cos(math.pi * k / (100 - warmup))) for k in range(100 - warmup)]
        return [peak * factor for factor in [s / warmup for s in range(warmup)] + falling]

    # factor, and 20 - round(20 * factor)
    expected = {
        "cls_token": published(6e-3 * 0.65**2, 12),
        "blocks.0.": published(6e-3 * 0.65, 7),
        "blocks.1.": published(6e-3, 1),
        "fc_norm.": published(6e-3, 1),
        "norm.": published(1e-3, 1),
        "head.": published(1e-3, 1),
    }
    assert not any(name.startswith("patch_embed.") for name in found)
    for name, values in found.items():
        (key,) = [key for key in expected if name.startswith(key)]
        assert values == pytest.approx(expected[key], rel=1e-9, abs=1e-15), name
    assert found["head.weight"][:2] == [0.0, pytest.approx(1e-3)]


def test_layer_warmups_follow_schedules_with_a_floor():
    groups = [{"lr_scale": 0.5}, {"lr_scale": 3.0, "warmup_scale": 1.0}]
    curve = LayerWarmups(lambda steps: np.array([[1.0 + steps, 1.0]]), 10, groups)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], **group} for group in groups], lr=1.0)
    set_schedule(optimizer, curve[0], 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [5 * 0.5 + 1, 1 * 3.0 + 1]


def test_flags_of_layers_without_layer_decay_are_refused(capsys):
    base = ["--model", "vit_tiny_patch16_224", "--layer_decay", "1"]
    for flag in ("--full_last_block", "--layer_warmup"):
        with pytest.raises(SystemExit):
            parse("finetune", [*base, flag])
        assert f"{flag} is about --layer_decay, which is 1" in capsys.readouterr().err
