"""Adapters of MAE's cases: pre-training, fine-tuning, layer-wise decay and positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_finetune import sincos_pos_embed, take
from modeling_pretrain import MAE
from modeling_targets import put
from optim_factory import cosine_at, layers_of, param_groups, set_schedule
from reference.case import Case
from reference.common import (
    gradients,
    load_weights,
    mae_classifier,
    normalized,
    position_options,
    vit_options,
)
from unimim.checkpoint.resizing import interpolate_pos_embed


def mae_options(config: dict) -> dict:
    names = (
        "mask_ratio", "norm_pix_loss", "decoder_embed_dim", "decoder_depth", "decoder_num_heads",
        "in_chans",
    )  # fmt: skip
    options = {
        key: value
        for key, value in vit_options(config).items()
        if key not in position_options(config)
    }
    return options | {key: config[key] for key in names if key in config}


def mae(case: Case) -> dict[str, Tensor]:
    if "tables" in case.config:
        return sincos_tables(case)
    model = MAE(**mae_options(case.config))
    load_weights(model, case.inputs("weights/"))
    batch, noise = {"image": normalized(case.inputs()["image"])}, case.inputs()["noise"]
    loss = model(batch, noise)["loss"]
    loss.backward()
    computed, order, visible = autoencoder_parts(model, batch, noise)
    ids_restore = order.argsort(1)
    mask = (ids_restore >= visible).float()
    return (
        {"loss": loss.view(1), "mask": mask, "ids_restore": ids_restore}
        | computed
        | gradients(model)
    )


def autoencoder_parts(model: MAE, batch: dict, noise) -> tuple[dict[str, Tensor], Tensor, int]:
    """Latent tokens, and the predictions of all tokens at their cells: what the forward pass needs
    only in part."""
    patches, order, visible = model.mask_patches(batch, noise)
    latent = model.forward_encoder(take(patches, order[:, :visible]), order[:, :visible])
    predicted = model.forward_decoder(latent, order, order.shape[1])
    return (
        {"latent": latent, "pred": put(torch.zeros_like(patches), order, predicted)},
        order,
        visible,
    )


def sincos_tables(case: Case) -> dict[str, Tensor]:
    """Named as in the family `mae` or as in `sincos_pos_embed`; without a class token its row is
    left out."""
    computed = {}
    for table in case.config["tables"]:
        width, side, has_class = (
            table["embed_dim"],
            table.get("grid", table.get("grid_size")),
            table["cls_token"],
        )
        sides = (side, side) if isinstance(side, int) else tuple(side)
        positions = sincos_pos_embed(width, sides)
        computed[f"pos_embed_d{width}_g{side}"] = positions if has_class else positions[:, 1:]
        computed[f"table_{width}_{side}_{int(has_class)}"] = positions[0, 0 if has_class else 1 :]
    return computed


def mae_finetune(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    model = mae_classifier(config)
    load_weights(model, case.inputs("weights/"))
    features = model.pool(model.forward_features(normalized(inputs["image"])))
    logits = model.head(features)
    loss = F.cross_entropy(logits, inputs["target"])
    loss.backward()
    assert groups_by_name(model, config) == {
        name: (group["lr_scale"], group["weight_decay"])
        for group in case.spec["expected_param_groups"]
        for name in group["names"]
    }
    return {"features": features, "logits": logits, "loss": loss.view(1)} | gradients(model)


def groups_by_name(model: nn.Module, config: dict) -> dict[str, tuple[float, float]]:
    """Each trainable parameter's scale of the learning rate and its weight decay."""
    groups = param_groups(model, config["weight_decay"], config["layer_decay"])
    found = {
        id(p): (pytest.approx(g["lr_scale"]), g["weight_decay"])
        for g in groups
        for p in g["params"]
    }
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def mae_layer_decay(case: Case) -> dict[str, Tensor]:
    """Groups in the published order of the parameters, which is not quite ours."""
    config, expected = case.config, case.spec["expected"]
    model = mae_classifier(config)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if any(name == part or name.startswith(f"{part}.") for part in config["frozen"]):
            parameter.requires_grad_(False)
    assert {name for name, p in parameters.items() if p.requires_grad} == set(expected)
    groups = param_groups(model, config["weight_decay"], config["layer_decay"])
    layers, _ = layers_of(list(parameters))
    group_at = {id(p): g for g in groups for p in g["params"]}
    group_of = {
        id(p): (layers[name], group_at[id(p)]["decay"])
        for name, p in parameters.items()
        if p.requires_grad
    }
    order = list(dict.fromkeys(group_of[id(parameters[name])] for name in expected))
    by_name = {group_of[id(parameters[name])]: group_at[id(parameters[name])] for name in expected}
    return {
        "group_index": torch.tensor(
            [order.index(group_of[id(parameters[name])]) for name in expected]
        ),
        "group_lr_scale": torch.tensor(
            [by_name[name]["lr_scale"] for name in order], dtype=torch.float64
        ),
        "group_weight_decay": torch.tensor(
            [by_name[name]["weight_decay"] for name in order], dtype=torch.float64
        ),
    }


def mae_lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case.config
    rates = cosine_at(
        case.inputs()["epoch"].numpy(),
        config["lr"],
        config["min_lr"],
        config["epochs"],
        config["warmup_epochs"],
    )
    scale = config["lr_scale_of_second_output"]
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": scale}])
    scaled = []
    for rate in rates:
        set_schedule(optimizer, rate, 0.0)
        scaled.append(optimizer.param_groups[0]["lr"])
    return {"lr": torch.from_numpy(rates), "lr_scaled": torch.tensor(scaled, dtype=torch.float64)}


def mae_pos_interp(case: Case) -> dict[str, Tensor]:
    computed, extra = {}, case.config["extra_tokens"]
    for sizes in case.config["cases"]:
        old, new = sizes["old_grid"], sizes["new_grid"]
        table = case.inputs()[f"pos_embed_{old}"]
        computed[f"pos_embed_{old}_to_{new}"] = interpolate_pos_embed(table, (new, new), extra)
    return computed


# the folder of cases: its adapter
ADAPTERS = {
    "mae": mae,
    "mae_finetune": mae_finetune,
    "mae_layer_decay": mae_layer_decay,
    "mae_lr_schedule": mae_lr_schedule,
    "mae_pos_interp": mae_pos_interp,
    "sincos_pos_embed": sincos_tables,
}
