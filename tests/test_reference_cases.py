"""Runs every reference case below the folder REFERENCE_CASES (default: tests/reference_cases)
against this repository.

A case is `<method>/<case>/case.json` + `tensors.safetensors`. An adapter takes a `Case` and returns
what we compute, under the names of the case's outputs; `check` compares with the tolerances the
case states. A folder without an adapter fails.
"""

import importlib
import json
import math
import os
import tempfile
from argparse import Namespace
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import block_outputs
from safetensors.torch import load_file, save_file
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from analysis import fourier, interaction
from masking_generator import (
    SimMIMMask,
    mask_lambda_schedule,
    others_first,
    patch_order,
    semantic_mask,
    visible_patches,
)
from modeling_backbones import PixelNeck
from modeling_finetune import VisionTransformer, patchify, sincos_pos_embed, unpatchify
from modeling_losses import ReconstructionLoss, mean_filled
from modeling_pretrain import (
    A2MIM,
    MAE,
    BEiT,
    ConMIM,
    MaskFeat,
    SemAIM,
    SemanticBEiT,
    SemanticMIM,
    SemMAE,
    SimMIM,
    build_semaim,
    masked_positions,
    put,
    similarity,
    stretched,
    take,
)
from modeling_targets import (
    HOG,
    TEACHERS,
    Teacher,
    VisualTokenizer,
    build_tower,
    dalle_pixels,
    from_openai,
    load_tokenizer,
    visual_weights,
)
from optim_factory import (
    LARS,
    annealing,
    by_rules,
    cosine_at,
    cosine_schedule,
    create_optimizer,
    layer_scales,
    layers_of,
    param_groups,
    set_schedule,
)
from semantic_segmentation.voc_linear_probe import class_iou, confusion_matrix
from unimim.checkpoint.loading import class_tokens, load_pretrained
from unimim.checkpoint.names import from_mmpretrain, from_openmixup, fuse_qkv
from unimim.checkpoint.resizing import (
    geometric_ratio,
    interpolate_pos_embed,
    interpolate_rel_pos_bias,
    source_coordinates,
)
from unimim.data.views import MEAN_STD
from unimim.evaluation.attention import class_maps, patch_maps
from unimim.evaluation.features import Features
from unimim.evaluation.knn import evaluate_knn
from unimim.evaluation.linear_probe import LinearHead, head_groups
from unimim.sizes import to_pair

OWN_CASES = Path(__file__).parent / "reference_cases"
CASES = Path(os.environ.get("REFERENCE_CASES", OWN_CASES))
FOLDERS = sorted(file.parent for file in CASES.glob("*/*/case.json"))


@dataclass
class Case:
    spec: dict
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict:
        return self.spec["config"]

    def inputs(self, prefix: str = "inputs/") -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def load(folder: Path) -> Case:
    tensors = load_file(folder / "tensors.safetensors")
    floats = {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}
    return Case(json.loads((folder / "case.json").read_text()), floats)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Published weights must fit by name and shape; the index buffers of BEiT are computed here,
    not loaded."""
    model.load_state_dict(
        {k: v for k, v in weights.items() if "relative_position_index" not in k}, strict=True
    )


def set_norms(model: nn.Module, config: dict) -> None:
    """The published constants of norms, which have one value each here."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.get("norm_eps", config.get("ln_eps", 1e-6))
        elif isinstance(module, nn.BatchNorm1d):
            module.eps, module.momentum = config.get("bn_eps", 1e-5), config.get("bn_momentum", 0.1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter: zeros of one that the loss does not come from or that is not trained."""
    found = {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
    }
    return {f"grad/{name}": grad for name, grad in found.items()}


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio from which int() makes `hidden` of `width` again: that of the quotient is one too
    small at times."""
    return (hidden + 0.5) / width


def position_options(config: dict) -> dict:
    """The published switches of a ViT's positions in this repository's words."""
    tables = bool(config.get("use_shared_rel_pos_bias")), bool(config.get("use_rel_pos_bias"))
    kinds = {
        (False, False): "none",
        (True, False): "shared",
        (False, True): "per_block",
        (True, True): "both",
    }
    return {
        "pos_embed": "learned"
        if config.get("use_abs_pos_emb", config.get("use_abs_pos_embed"))
        else "none",
        "rel_pos_bias": kinds[tables],
    }


def vit_options(config: dict) -> dict:
    names = (
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "init_values",
        "qkv_bias",
    )
    config = config | {"qkv_bias": bool(config.get("qkv_bias", True))}
    size = config["img_size"]
    size = size if isinstance(size, int) else tuple(size)
    return {
        "input_size": size,
        **{k: config[k] for k in names if k in config},
        **position_options(config),
    }


# --------------------------------------------------------------------------------------------------
# Adapters


def conmim(case: Case) -> dict[str, Tensor]:
    config = case.config
    model = ConMIM(
        **vit_options(config),
        projector_hidden_dim=config["projector_hidden_dim"],
        projector_out_dim=config["projector_out_dim"],
        temperature=config["temperature"],
    )
    for name, network in (("student", model), ("teacher", model.teacher)):
        load_weights(network, case.inputs(f"weights/{name}/"))
        set_norms(network, config)
    computed = conmim_steps(model, case) if "steps" in config else conmim_loss(model, case)
    for who, network in (("student", model), ("teacher", model.teacher)):
        computed |= {f"{who}_after/{k}": v for k, v in network.state_dict().items()}
    return computed


def conmim_batch(inputs: dict[str, Tensor], suffix: str = "") -> dict[str, Tensor]:
    names = {"image": "images", "image_strong": "images_aug", "mask": "mask"}
    batch = {ours: inputs[theirs + suffix] for ours, theirs in names.items()}
    return batch | {"mask": batch["mask"].bool()}


def conmim_loss(model: ConMIM, case: Case) -> dict[str, Tensor]:
    """One forward with everything in between kept; the running buffers must have seen exactly this
    forward."""
    seen: list[Tensor] = []
    for network in (model.teacher, model):
        network.project = lambda *args, call=network.project: seen.append(call(*args)) or seen[-1]
    batch = conmim_batch(case.inputs())
    loss = model(batch)["loss"]
    loss.backward()
    keys, queries = seen
    positions, counts = masked_positions(batch["mask"].flatten(1))
    logits = model.similarity(take(queries, positions), keys)
    computed = {"loss": loss, "student_features": queries, "teacher_features": keys}
    return computed | {"logits": logits[counts], "labels": positions[counts]} | gradients(model)


def conmim_steps(model: ConMIM, case: Case) -> dict[str, Tensor]:
    """Whole optimizer steps: scheduled AdamW on decay groups, clipping, then the moving average."""
    config, inputs = case.config, case.inputs()
    groups = param_groups(model, config["weight_decay"])
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=tuple(config["opt_betas"]), eps=config["opt_eps"], weight_decay=0.0
    )
    losses, norms = [], []
    for step in range(config["steps"]):
        set_schedule(optimizer, config["lr_per_step"][step], config["weight_decay_per_step"][step])
        optimizer.zero_grad()
        loss = model(conmim_batch(inputs, f"_{step}" if config["steps"] > 1 else ""))["loss"]
        loss.backward()
        norms.append(
            nn.utils.clip_grad_norm_(model.parameters(), config["clip_grad"] or float("inf"))
        )
        optimizer.step()
        model.ema.update(config["momentum_per_step"][step])
        losses.append(loss)
    return {"mean_loss": torch.stack(losses).mean(), "mean_grad_norm": torch.stack(norms).mean()}


def beit_finetune(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    model = VisionTransformer(
        **vit_options(config),
        num_classes=config["num_classes"],
        global_pool="avg" if config["use_mean_pooling"] else "token",
    )
    load_weights(model, case.inputs("weights/"))
    tokens = model.forward_features(inputs["images"])
    pooled = model.pool(tokens)
    logits = model.head(pooled)
    criteria = {
        "label_smoothing": lambda: LabelSmoothingCrossEntropy(config["smoothing"])(
            logits, inputs["labels"]
        ),
        "soft_target": lambda: SoftTargetCrossEntropy()(logits, inputs["targets"]),
        "cross_entropy": lambda: F.cross_entropy(logits, inputs["labels"]),
    }
    loss = criteria[config["criterion"]]()
    loss.backward()
    return {
        "loss": loss,
        "logits": logits,
        "pooled": pooled,
        "last_block_tokens": tokens,
    } | gradients(model)


def layer_decay(case: Case) -> dict[str, Tensor]:
    """Parameter groups of the real model with the case's shapes: their members, scales and
    order."""
    config, expected = case.config, case.spec["parameters"]
    model = model_of_shapes(config, {name: entry["shape"] for name, entry in expected.items()})
    tables = {name for name in expected if name.endswith("attn.relative_position_bias_table")}
    skipped = tables if config.get("disable_weight_decay_on_rel_pos_bias") else ()
    groups = param_groups(model, config["weight_decay"], config["layer_decay"], skipped)
    assert [g["group_name"] for g in groups] == case.spec["group_order"]
    group_of = {id(p): g for g in groups for p in g["params"]}
    found = {name: group_of[id(p)] for name, p in model.named_parameters()}
    assert {name: g["group_name"] for name, g in found.items()} == {
        n: p["group"] for n, p in expected.items()
    }
    computed = {
        "lr_scales": torch.tensor(
            [found[n]["lr_scale"] for n in sorted(found)], dtype=torch.float64
        ),
        "weight_decays": torch.tensor(
            [found[n]["weight_decay"] for n in sorted(found)], dtype=torch.float64
        ),
    }
    if config["layer_decay"] is not None:
        scales = layer_scales(config["layer_decay"], config["depth"])
        computed["layer_scales"] = torch.tensor(scales, dtype=torch.float64)
    return computed


def model_of_shapes(config: dict, shapes: dict[str, list[int]]) -> nn.Module:
    """ConMIM or the classifier, as the parameters' shapes tell."""
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    table = next(
        (shape for name, shape in shapes.items() if name.endswith("relative_position_bias_table")),
        None,
    )
    rows = table[0] if table else 0
    grid = (
        math.isqrt(shapes["pos_embed"][1])
        if "pos_embed" in shapes
        else (math.isqrt(rows) + 1) // 2 or 1
    )
    options = {
        "input_size": grid * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": config["depth"],
        "num_heads": table[1] if table else 1,
        "mlp_ratio": mlp_ratio(shapes["blocks.0.mlp.fc1.weight"][0], width),
        "init_values": config["init_values"],
        "qkv_bias": "blocks.0.attn.q_bias" in shapes,
        **position_options(config),
    }
    if config["stage"] == "pretrain":
        hidden, out = shapes["projectors.0.weight"][0], shapes["projectors.6.weight"][0]
        return ConMIM(**options, projector_hidden_dim=hidden, projector_out_dim=out)
    pool = "avg" if config["use_mean_pooling"] else "token"
    return VisionTransformer(**options, global_pool=pool, num_classes=shapes["head.weight"][0])


def schedules(case: Case) -> dict[str, Tensor]:
    names = {
        "base_value": "base", "final_value": "final", "epochs": "epochs", "niter_per_ep": "steps_per_epoch",
        "warmup_epochs": "warmup_epochs", "warmup_steps": "warmup_steps", "start_warmup_value": "start_warmup",
    }  # fmt: skip
    computed = {}
    for k, setting in enumerate(case.config["settings"]):
        options = {names[key]: value for key, value in setting.items() if key in names}
        computed[f"schedule_{k}"] = torch.from_numpy(cosine_schedule(**options))
    return computed


def rel_pos_bias_interp(case: Case) -> dict[str, Tensor]:
    src, dst = case.config["src_window"], case.config["dst_window"]
    ratio = geometric_ratio(src, dst)
    return {
        "table": interpolate_rel_pos_bias(case.inputs()["table"], src, dst),
        "ratio_q": torch.tensor([ratio], dtype=torch.float64),
        "source_coords": torch.as_tensor(np.asarray(source_coordinates(src, ratio))),
    }


def pos_embed_interp(case: Case) -> dict[str, Tensor]:
    grid, extra = case.config["dst_grid"], case.config["num_extra_tokens"]
    return {"pos_embed": interpolate_pos_embed(case.inputs()["pos_embed"], (grid, grid), extra)}


# -- k-NN and linear probing


def knn(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    bank, queries = (
        Features(inputs[f"{name}_features"], inputs[f"{name}_labels"]) for name in ("train", "test")
    )
    found = evaluate_knn(bank, queries, config["k"], config["temperature"], config["num_classes"])
    shape = len(config["k"]), len(config["temperature"])
    tables = {
        top: torch.tensor([getattr(f, f"acc{top}") for f in found], dtype=torch.float64)
        for top in (1, 5)
    }
    return {f"top{top}": table.view(shape) for top, table in tables.items()}


def probe_optimizer(config: dict, groups: list[dict]) -> torch.optim.Optimizer:
    """`sgd` is plain momentum upstream."""
    name = {"sgd": "momentum"}.get(config["optimizer"], config["optimizer"])
    args = Namespace(opt=name, lr=config["lr"], momentum=0.9, opt_eps=None, opt_betas=None)
    return create_optimizer(args, groups, "cpu")


def linprobe_head(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    head = LinearHead(config["embed_dim"], config["num_classes"])
    weights = {name.removeprefix("head."): value for name, value in case.inputs("weights/").items()}
    load_weights(head, weights)
    optimizer = probe_optimizer(config, head_groups([head], [config["lr"]], config["weight_decay"]))
    losses = []
    for features, labels in zip(inputs["features"], inputs["labels"], strict=True):
        losses.append(F.cross_entropy(head(features), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    logits = head.eval()(inputs["features"][0])
    final = {f"final/{name}": value for name, value in head.state_dict().items()}
    return {"losses": torch.stack(losses), "eval_logits": logits} | final


def lars(case: Case) -> dict[str, Tensor]:
    """Two families state the same rule with other names for parameters, gradients and results."""
    config, inputs = case.config, case.inputs()
    prefix = "param_" if any(name.startswith("param_") for name in inputs) else ""
    first = {
        name.removeprefix(prefix): value
        for name, value in inputs.items()
        if not name.startswith("grad")
    }
    parameters = {name: nn.Parameter(value.clone()) for name, value in first.items()}
    names = ("lr", "weight_decay", "momentum", "trust_coefficient")
    optimizer = LARS(parameters.values(), **{name: config[name] for name in names})
    computed = {}
    seen = len({name.partition("_")[0] for name in inputs if name.startswith("grad")})
    for step in range(config.get("steps", seen)):
        for name, parameter in parameters.items():
            parameter.grad = inputs.get(f"grad{step}_{name}")
        optimizer.step()
        for name, parameter in parameters.items():
            computed[f"step{step}_{name}"] = computed[f"param_{name}_after{step + 1}"] = (
                parameter.detach().clone()
            )
    return computed | {
        f"momentum_{name}": optimizer.state[p]["momentum_buffer"] for name, p in parameters.items()
    }


# -- MAE and SemMAE


def normalized(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] as the models see it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD["imagenet"])
    return (images.float() / 255 - mean) / std


def mae_options(config: dict) -> dict:
    names = (
        "mask_ratio", "norm_pix_loss", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "in_chans",
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


def mae_classifier(config: dict, pos_embed: str = "sincos_trainable") -> VisionTransformer:
    options = {
        key: value
        for key, value in vit_options(config).items()
        if key not in position_options(config)
    }
    pool = "avg" if config["global_pool"] else "token"
    return VisionTransformer(
        **options,
        num_classes=config["num_classes"],
        k_bias=True,
        pos_embed=pos_embed,
        global_pool=pool,
    )


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


def semmae(case: Case) -> dict[str, Tensor]:
    """On the ordinary image and part map, and the same again on the tokens that upstream's layout
    lists."""
    config, inputs = case.config, case.inputs()
    options = {"num_parts": config["num_parts"], "mask_lambda": config["mask_lambda"]}
    model = SemMAE(**mae_options(config), **options)
    load_weights(model, case.inputs("weights/"))
    cells, noise = inputs["sorted_index"], (inputs["noise_tokens"], inputs["noise_parts"])
    batch = {"image": normalized(inputs["image"]), "part_ids": inputs["part_map"]}
    if cells.tolist() != [list(range(model.patch_embed.num_patches))] * len(cells):
        batch["cells"] = cells
    loss = model(batch, noise)["loss"]
    loss.backward()
    computed, order, visible = autoencoder_parts(model, batch, noise)
    masks = semantic_mask(
        inputs["part_ids"], config["mask_ratio"], config["mask_lambda"], config["num_parts"], *noise
    )
    assert torch.equal(order, cells.gather(1, masks.order)) and masks.visible == visible
    packed_image = unpack(inputs["packed"], model.patch_embed.grid_size, config)
    shown = cells.unsqueeze(-1).expand(-1, -1, computed["pred"].shape[-1])
    torch.testing.assert_close(model(batch | {"image": packed_image}, noise)["loss"], loss)
    return (
        {
            "loss": loss.view(1),
            "latent": computed["latent"],
            "pred": computed["pred"].gather(1, shown),
        }
        | {"mask": masks.mask, "sorted_index_shuffled": cells.gather(1, masks.shuffle)}
        | in_shuffled_order(masks)
        | gradients(model)
    )


def unpack(packed: Tensor, grid: tuple[int, int], config: dict) -> Tensor:
    """The listed patches of upstream's samples at their cells of an image that is 0 elsewhere."""
    first = packed.shape[-1] - 3 * config["patch_size"] ** 2
    pixels, cells = packed[..., first:], packed[..., first - 1].long()
    canvas = torch.zeros(len(packed), grid[0] * grid[1], pixels.shape[-1])
    return unpatchify(put(canvas, cells, pixels), grid, (config["patch_size"],) * 2)


def in_shuffled_order(masks) -> dict[str, Tensor]:
    """The published outputs refer to positions in the shuffled order of the tokens."""
    ids_shuffle = others_first(masks.selected)
    ids_restore = ids_shuffle.argsort(1)
    return {
        "mask_shuffled": (ids_restore >= masks.visible).float(),
        "ids_keep": ids_shuffle[:, : masks.visible],
        "ids_restore": ids_restore,
    }


def semmae_mask(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    masks = semantic_mask(
        inputs["part_ids"], config["mask_ratio"], config["mask_lambda"], config["num_parts"],
        inputs["noise_tokens"], inputs["noise_parts"],
    )  # fmt: skip
    return in_shuffled_order(masks) | {
        "token_perm": masks.shuffle,
        "part_perm": masks.part_order,
        "intra_count": masks.intra,
        "inter_count": masks.inter,
        "mask_count": masks.count,
        "selected": masks.selected.float(),
        "mask": masks.mask,
        "kept_tokens": masks.order[:, : masks.visible],
    }


def semmae_flip(case: Case) -> dict[str, Tensor]:
    """A packed sample flipped as our data path does it: the whole image and the grid of cells are
    mirrored."""
    config, packed = case.config, case.inputs()["packed"]
    side, patch = config["grid"], config["patch_size"]
    first_pixel = packed.shape[-1] - 3 * patch * patch
    cells, pixels = packed[None, :, first_pixel - 1].long(), packed[None, :, first_pixel:]
    canvas = put(torch.zeros(1, side * side, pixels.shape[-1]), cells, pixels)
    mirrored = unpatchify(canvas, (side, side), (patch, patch)).flip(-1)
    seat = torch.arange(side * side).view(side, side).flip(-1).flatten()[cells]
    pixels = take(patchify(mirrored, (patch, patch)), seat)
    return {
        "packed_flipped": torch.cat(
            (packed[:, : first_pixel - 1], seat[0, :, None].float(), pixels[0]), 1
        )
    }


def semmae_finetune_tokens(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    model = mae_classifier(case.config, pos_embed="sincos")
    load_weights(model, case.inputs("weights/"))
    logits = model(normalized(inputs["image"]), cells=inputs["sorted_index"])
    loss = F.cross_entropy(logits, inputs["target"])
    loss.backward()
    return {"logits": logits, "loss": loss.view(1)} | gradients(model)


def lambda_schedule(case: Case) -> dict[str, Tensor]:
    config, epoch = case.config, case.inputs()["epoch"].numpy()
    total = config["total_epochs"]
    values = {
        f"power_{power}".replace(".", "p"): mask_lambda_schedule(epoch, total, power)
        for power in config["powers"]
    }
    values |= {
        kind: mask_lambda_schedule(epoch, total, kind=kind) for kind in ("increasing", "cosine")
    }
    return {name: torch.from_numpy(value) for name, value in values.items()}


# -- SemAIM


def semaim_options(config: dict) -> dict:
    names = (
        "in_chans", "permutation_type", "attention_type", "query_depth", "share_weight", "prediction_head_type",
        "predict_feature", "gaussian_kernel_size", "gaussian_sigma", "loss_type", "norm_pix_loss", "use_ema_model",
    )  # fmt: skip
    options = {
        key: value
        for key, value in vit_options(config).items()
        if key not in position_options(config)
    }
    options |= {key: config[key] for key in names if key in config}
    if config.get("predict_feature") in TEACHERS:
        options["out_dim"] = (
            config["out_dim"] if config["predict_feature"] == "clip" else config["embed_dim"]
        )
    return options | ({"use_ema_model": True} if config.get("predict_feature") == "ema" else {})


def load_semaim(case: Case, attn: str, **changes) -> SemAIM:
    """Published weights by name; SAIM's separate projections are joined unless the blocks are
    shared, which it lists twice."""
    options, weights = semaim_options(case.config), case.inputs("weights/")
    tokens = case.inputs().get("teacher_tokens")
    if tokens is not None:  # whoever made them
        options |= {"predict_feature": "clip", "out_dim": tokens.shape[-1]}
    options |= changes
    model = build_semaim(**options, attn=attn)
    if options.get("share_weight"):
        weights = {
            name: value for name, value in weights.items() if not name.startswith("query_blocks.")
        }
    else:
        weights = fuse_qkv(weights)
    load_weights(model, weights)
    if model.teacher is not None:
        model.teacher.load_state_dict(model.state_dict())
    return model


def semaim(case: Case) -> dict[str, Tensor]:
    """By explicit masks, which give what the case lists; where no values tie, the sorted form must
    come out equal."""
    model = load_semaim(case, "eager")
    inputs = case.inputs()
    names = {"image": "imgs", "target_tokens": "teacher_tokens"}
    batch = {ours: inputs[theirs] for ours, theirs in names.items() if theirs in inputs}
    noise = tuple(inputs[name] for name in ("noise", "center_noise") if name in inputs)
    attention, target = model.attention_and_target(batch)
    order = model.order_values(batch, attention, noise)
    h, g = model.masked_streams(batch["image"], order)
    g_norm = model.norm(g)
    predicted = model.prediction_head(g_norm)
    loss = model(batch, noise)["loss"]
    loss.backward()
    computed = {
        "permutation": order,
        "loss": loss,
        "loss_map": model.loss_map(predicted[:, 1:], target),
        "h": h,
        "g_norm": g_norm,
        "pred": predicted,
        **visible(order),
        **split_gradients(gradients(model)),
    }
    if order.sort(1).values.diff(dim=1).all():
        swift = load_semaim(case, "sdpa")
        loss = swift(batch, noise)["loss"]
        loss.backward()
        listed = {
            name: value
            for name, value in split_gradients(gradients(swift)).items()
            if name in case.spec["outputs"]
        }
        check(case, {**computed, "attention_map": attention, "loss": loss, **listed})
    return computed | {"attention_map": attention}


def visible(order: Tensor) -> dict[str, Tensor]:
    """Of the first image, as 1 and 0."""
    streams = {"visible_h": True, "visible_g": False}
    return {
        name: visible_patches(order, itself=itself)[0].byte() for name, itself in streams.items()
    }


def split_gradients(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The joint projection's gradients, or weights, under the names of separate ones too."""
    for name, value in list(found.items()):
        for part, own in zip("qkv", value.chunk(3), strict=False):
            found[name.replace(".attn.qkv.", f".attn.{part}.")] = (
                own if ".attn.qkv." in name else value
            )
    return found


def semaim_masks(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    order = patch_order(
        config["permutation_type"], (config["grid"],) * 2, inputs.get("noise"), inputs.get("attention_map"),
        inputs.get("center_noise"),
    )  # fmt: skip
    order = order.expand(config["batch"], -1)
    return {"permutation": order, **visible(order)}


def semaim_attention(case: Case) -> dict[str, Tensor]:
    """Each map by the pass that computes no more than it needs, the tokens by the one that predicts
    them."""
    images = case.inputs()["imgs"]
    kind = "gap" if case.config["attention_type"] == "gap" else "cls"
    own = {"permutation_type": "attention", "predict_feature": "none", "use_ema_model": False}
    similar = load_semaim(case, "auto", **own, attention_type=kind)
    attends = load_semaim(case, "auto", **own, attention_type="self")
    width = 3 * math.prod(similar.patch_embed.patch_size)  # that of the case's head
    features = own | {"predict_feature": "clip", "out_dim": width}
    both = load_semaim(case, "auto", **features, attention_type=kind)
    return {
        "tokens": both.attention_and_tokens(images)[1],
        "feature_attention": similar.attention_map(images),
        "self_attention": attends.attention_map(images),
    }


def semaim_clip_teacher(case: Case) -> dict[str, Tensor]:
    """The visual tower of OpenAI's file, and the map that SemAIM makes of its tokens."""
    config = case.config
    weights = from_openai(visual_weights(case.inputs("weights/")))
    side = config["input_resolution"] // config["patch_size"]
    teacher = Teacher(
        build_tower(weights, (side, side), quick_gelu=True, num_heads=config["heads"])
    )
    tokens = teacher(case.inputs()["imgs"])
    return {"tokens": tokens, "similarity": stretched(similarity(tokens[:, :1], tokens[:, 1:]))}


def semaim_weight_decay(case: Case) -> dict[str, Tensor]:
    """The published order of the groups: first what is not decayed."""
    config, expected = case.config, case.spec["expected"]
    model = build_semaim(**semaim_options(config))
    model.blocks.requires_grad_(
        True
    )  # also those that no query looks at, which are not trained here
    groups = {g["group_name"]: g for g in param_groups(model, config["weight_decay"])}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(parameters) == set(expected)
    order = ("no_decay", "decay")
    group_of = {id(p): order.index(name) for name, g in groups.items() for p in g["params"]}
    return {
        "group_index": torch.tensor([group_of[id(parameters[name])] for name in expected]),
        "group_weight_decay": torch.tensor(
            [groups[name]["weight_decay"] for name in order], dtype=torch.float64
        ),
    }


def semaim_rates(config: dict, epochs: np.ndarray) -> np.ndarray:
    """Learning rates of these epochs' iterations: one for all iterations that make up an update."""
    steps, accumulated = config["steps_per_epoch"], config["accum_iter"]
    step = np.arange(steps) // accumulated * accumulated
    when = (epochs[:, None] + step / steps).flatten()
    return cosine_at(
        when, config["lr"], config["min_lr"], config["epochs"], config["warmup_epochs"]
    )


def semaim_lr_schedule(case: Case) -> dict[str, Tensor]:
    scales = [1.0 if scale is None else scale for scale in case.config["lr_scales"]]
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr_scale": scale} for scale in scales]
    )
    rows = []
    for rate in semaim_rates(case.config, np.arange(case.config["epochs"])):
        set_schedule(optimizer, rate, 0.0)
        rows.append([group["lr"] for group in optimizer.param_groups])
    return {"lr": torch.tensor(rows, dtype=torch.float64)}


def semaim_train_steps(case: Case) -> dict[str, Tensor]:
    """By explicit masks; where no order values tie, the sorted form must come out equal."""
    computed = semaim_epoch(case, "eager")
    if computed["permutations"].sort(-1).values.diff(dim=-1).all():
        check(case, computed)
        computed = semaim_epoch(case, "auto")
    return computed


def semaim_epoch(case: Case, attn: str) -> dict[str, Tensor]:
    """Scheduled AdamW with accumulation and clipping, then the moving average."""
    config, inputs = case.config, case.inputs()
    model = load_semaim(case, attn)
    model.before_epoch(config["epoch"], config["epochs"])
    groups = param_groups(model, config["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    rates = semaim_rates(config, np.array([config["epoch"]]))
    losses, norms, orders = [], [], []
    draws = [
        inputs[name] for name in ("noise", "center_noise") if name in inputs
    ]  # some orders draw nothing
    for step, images in enumerate(inputs["imgs"]):
        batch = {"image": images} | (
            {"noise": torch.cat([noise[step] for noise in draws], 1)} if draws else {}
        )
        attention, _ = model.attention_and_target(batch)
        orders.append(model.order_values(batch, attention))
        losses.append(model(batch)["loss"])
        (losses[-1] / config["accum_iter"]).backward()
        if (step + 1) % config["accum_iter"] == 0:
            set_schedule(optimizer, rates[step], config["weight_decay"])
            norms.append(
                nn.utils.clip_grad_norm_(model.parameters(), config["clip_grad"] or float("inf"))
            )
            optimizer.step()
            optimizer.zero_grad()
            model.after_step(0.0)
    computed = {
        "losses": torch.stack(losses),
        "lrs": torch.from_numpy(rates),
        "grad_norms": torch.stack(norms),
    }
    computed |= {
        "permutations": torch.stack(orders),
        "ema_decay": torch.tensor(model.ema_decay, dtype=torch.float64),
    }
    for prefix, network in (("final", model), ("ema", model.teacher)):
        if network is not None:
            computed |= {
                f"{prefix}/{name}": value
                for name, value in split_gradients(network.state_dict()).items()
            }
    return computed


def gaussian_blur(case: Case) -> dict[str, Tensor]:
    config, images = case.config, case.inputs()["imgs"]
    blur = {key: config[key] for key in ("gaussian_kernel_size", "gaussian_sigma")}
    sizes = {"input_size": config["img_size"], "patch_size": config["patch_size"]}
    model = SemAIM(**sizes, **blur, embed_dim=4, depth=1, num_heads=1, query_depth=1)
    blurred = model.gaussian_blur(images)
    return {
        "kernel": model.gaussian_blur.weight,
        "blurred": blurred,
        "patches": patchify(blurred, model.patch_embed.patch_size),
        "normalised_target": model.pixel_target(images),
    }


def vit_finetune(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    model = mae_classifier(config, pos_embed="learned")
    load_weights(model, case.inputs("weights/"))
    features = model.pool(model.forward_features(inputs["imgs"]))
    logits = model.head(features)
    loss = F.cross_entropy(logits, inputs["labels"])
    loss.backward()
    return {"features": features, "logits": logits, "loss": loss} | gradients(model)


def voc_miou(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    batches = zip(
        *(inputs[name].chunk(config["num_updates"]) for name in ("label", "pred")), strict=True
    )
    confusion = sum(confusion_matrix(*batch, config["num_classes"]) for batch in batches)
    iou = class_iou(confusion)
    return {"miou": iou.mean(), "confusion": confusion, "class_iou": iou}


# -- BEiT, MaskFeat and SemanticMIM


def hog(case: Case) -> dict[str, Tensor]:
    config, images = case.config, case.inputs()["image"]
    grid = to_pair(config["grid"])
    patch = tuple(side // cells for side, cells in zip(images.shape[-2:], grid, strict=True))
    target = HOG(grid, patch, config["nbins"], config["pool"], config["gaussian_window"])
    return {"hog_map": target.histograms(images), "target": target(images)}


def tokenizer_of(weights: dict[str, Tensor], folder: Path) -> VisualTokenizer:
    """By the file that a user would have."""
    torch.save({"state_dict": weights}, folder / "encoder.pth")
    return load_tokenizer(str(folder / "encoder.pth"))


def dalle_encoder(case: Case) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(case.inputs("weights/"), Path(folder))
    pictures = case.inputs()["image_uint8"]
    mapped = dalle_pixels(pictures)
    features = tokenizer.encoder(mapped)
    logits = tokenizer.encoder.logits(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return {"mapped": mapped, "logits": logits, "ids": tokenizer(pictures)}


def beit_pretrain(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    model = BEiT(
        **vit_options(config), in_chans=config.get("in_chans", 3), vocab_size=config["vocab_size"]
    )
    set_norms(model, config)
    load_weights(model, case.inputs("weights/"))
    mask = inputs["bool_masked_pos"].bool()
    out = model({"image": inputs["image"], "mask": mask, "target_ids": inputs["target_ids"]})
    out["loss"].backward()
    tokens = model.encode_masked(inputs["image"], mask)
    return {
        **out,
        "tokens": tokens,
        "logits": logits_of(model, tokens[:, 1:][mask.flatten(1)]),
        **gradients(model),
    }


def logits_of(model: BEiT | SemanticBEiT, tokens: Tensor) -> Tensor:
    return F.linear(tokens, model.lm_head.weight, model.lm_head.bias)


def semanticmim_model(case: Case, form: type[SemanticMIM], **own) -> SemanticMIM:
    """The case's network with its weights, which come in OpenMMLab's names, for the image's
    size."""
    config, size = case.config, tuple(case.inputs()["image"].shape[-2:])
    options = {
        key: value
        for key, value in vit_options(config).items()
        if key not in position_options(config)
    }
    options |= {
        key: config[key]
        for key in ("num_cls_tokens", "use_bottleneck", "in_chans")
        if key in config
    }
    model = form(
        **options | {"input_size": size}, init_values=config["layer_scale_init_value"], **own
    )
    if not config.get("final_norm", True):
        model.norm = nn.Identity()
    set_norms(model, config)
    weights = {
        k: v for k, v in case.inputs("weights/").items() if not k.startswith("target_generator.")
    }
    native = from_mmpretrain(weights)
    if to_pair(options["input_size"]) != size:
        grid, extra = model.patch_embed.grid_size, model.num_prefix_tokens
        native["pos_embed"] = interpolate_pos_embed(native["pos_embed"], grid, extra)
    load_weights(model, native)
    return model


def semanticmim_outputs(model: SemanticMIM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step and what happens on its way; of the bottleneck's stream the class tokens first."""
    seen: dict[str, Tensor] = {}
    keep = {"stream_layer0": model.blocks[0], "mask_features": model.norm}
    keep |= {} if model.mask_blocks is None else {"mask_stream_layer0": model.mask_blocks[0]}
    for name, module in keep.items():
        module.register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: out, f"{name}_of": given[0]})
        )
    out = model(batch)
    out["loss"].backward()
    with torch.no_grad():  # a block that is the last computes no more than what is looked at
        seen["stream_layer0"] = model.blocks[0].forward(seen["stream_layer0_of"])
    if model.mask_blocks is not None:
        seen["stream_layer0"] = seen["stream_layer0"].roll(model.num_prefix_tokens, 1)
    return out | seen | published_gradients(model)


def published_gradients(model: SemanticMIM) -> dict[str, Tensor]:
    """Under OpenMMLab's names."""
    names = {
        "backbone.norm.": "backbone.ln1.", "mask_blocks.": "extra_layers.", "blocks.": "layers.", ".norm": ".ln",
        ".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1.", "patch_embed.proj.": "patch_embed.projection.",
    }  # fmt: skip
    heads = {"grad/lm_head.": "grad/head.cls_head.", "grad/hog_head.": "grad/neck.fc."}
    found = {}
    for name, value in gradients(model).items():
        head = next((head for head in heads if name.startswith(head)), None)
        theirs = (
            name.replace(head, heads[head]) if head else name.replace("grad/", "grad/backbone.")
        )
        for old, new in names.items():
            theirs = theirs.replace(old, new)
        if ".attn.qkv." in theirs:
            part = "_proj" if isinstance(model, SemanticBEiT) else ""
            width = len(value) // 3
            for short, own in zip(("q", "kv"), value.split((width, 2 * width)), strict=True):
                found[theirs.replace(".qkv.", f".{short}{part}.")] = own
        found[theirs] = value
    return found


def semanticmim_batch(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "image": inputs["image"],
        "mask": ~inputs["img_index"].bool(),
        "target_mask": inputs["mask_index"].bool(),
    }


def semanticmim_beit(case: Case) -> dict[str, Tensor]:
    inputs, config = case.inputs(), case.config
    model = semanticmim_model(case, SemanticBEiT, vocab_size=config["vocab_size"])
    batch = semanticmim_batch(inputs)
    computed = {}
    if "target_image" in inputs:
        with tempfile.TemporaryDirectory() as folder:
            model.tokenizer = tokenizer_of(case.inputs("weights/"), Path(folder))
        batch["image_second"] = inputs["target_image"]
        computed["target_ids"] = model.tokenizer(inputs["target_image"])
    else:
        batch["target_ids"] = inputs["target_ids"]
    computed |= semanticmim_outputs(model, batch)
    return computed | {"logits": logits_of(model, computed["mask_features"].flatten(0, 1))}


def semanticmim_maskfeat(case: Case) -> dict[str, Tensor]:
    names = ("hog_nbins", "hog_pool")
    own = {name: case.config[name] for name in names if name in case.config}
    model = semanticmim_model(case, MaskFeat, hog_window=case.config["hog_gaussian_window"], **own)
    batch = semanticmim_batch(case.inputs())
    computed = semanticmim_outputs(model, batch)
    predicted = model.patch_positions(batch)[1]
    target = take(model.hog(batch["image"]), predicted)
    return computed | {"pred": model.hog_head(computed["mask_features"]), "target": target}


def semanticmim_attention(case: Case) -> dict[str, Tensor]:
    """The encoder of a published checkpoint in a classifier, as evaluation loads it, at the image's
    size."""
    config, images = case.config, case.inputs()["image"]
    weights = {"state_dict": case.inputs("weights/")}
    beit = config["form"] == "beit"
    model = VisionTransformer(
        **{
            key: config[key]
            for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans")
        },
        input_size=tuple(images.shape[-2:]),
        num_cls_tokens=class_tokens(weights) or 1,
        init_values=config["layer_scale_init_value"],
        k_bias=not beit,
        qkv_bias=config.get("qkv_bias", True),
        pos_embed="learned",
        num_classes=0,
    )
    model.norm = nn.LayerNorm(config["embed_dim"])
    set_norms(model, config)
    report = load_pretrained(model, weights, min_matched=1.0)
    if not config["final_norm"]:
        model.norm = nn.Identity()
    assert "fc_norm.weight" in report.loaded
    num_cls, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    layers = block_outputs(model, images)
    layers[-1] = model.norm(layers[-1])
    featmaps = [tokens[:, num_cls:].mT.unflatten(2, grid) for tokens in layers]
    computed = {
        f"featmap_layer{layer}": featmaps[layer] for layer in range(-len(featmaps), len(featmaps))
    }
    computed["avg_featmap"] = model.fc_norm(layers[-1][:, num_cls:].mean(1))
    computed["cls_token"] = model.fc_norm(layers[-1][:, :num_cls].mean(1))
    cells = config["token_indices"]
    for layer in config["layer_indices"]:
        attention = model.attention_maps(images, layer)
        computed |= {
            f"attn_layer{layer}": attention,
            f"vis_cls_layer{layer}": class_maps(attention[0], num_cls, grid),
            f"vis_patch_layer{layer}": patch_maps(attention[0], num_cls, grid, cells),
            f"vis_patch_reduced_layer{layer}": patch_maps(
                attention[0], num_cls, grid, cells, reduce_mean=True
            ),
        }
    return computed


# -- SimMIM and A2MIM


def given_matrix(case: Case, variant: str) -> Tensor | None:
    """The weights of frequencies of a variant that is given them, in whichever way its case does
    so.

    The option `matrix` says whether, which input it is, or its numbers; without a word of it in any
    variant, all take what the inputs have. An input may belong to one variant, whose name is in its
    own.
    """
    variants = case.config["variants"]
    stated = variants[variant].get(
        "matrix", not any("matrix" in options for options in variants.values())
    )
    if isinstance(stated, list):
        return torch.tensor(stated)
    inputs = case.inputs()
    if isinstance(stated, str):
        return inputs[stated.removeprefix("inputs/")]
    return inputs.get(f"{variant}/matrix", inputs.get("matrix")) if stated else None


def focal_frequency_loss(case: Case) -> dict[str, Tensor]:
    """And where no matrix is given, the same again from the weights of all frequencies as one."""
    inputs, computed = case.inputs(), {}
    for name, options in case.config["variants"].items():
        predicted = inputs["pred"].clone().requires_grad_()
        matrix = given_matrix(case, name)
        options = options | {"matrix": matrix, "spectrum_alpha": options.get("alpha", 1.0)}
        weight = options.pop("loss_weight", 1.0)
        options.pop("alpha", None)
        criterion = loss_of_a2mim(**options).focal
        loss = weight * criterion(predicted - inputs["target"])
        loss.backward()
        computed |= {f"{name}/loss": loss, f"{name}/grad/pred": predicted.grad}
        if matrix is not None:
            continue
        difference = (predicted - inputs["target"]).detach()
        spectrum = torch.fft.fft2(
            difference.mean(0, keepdim=True) if criterion.ave_spectrum else difference, norm="ortho"
        )
        given = replace(criterion, matrix=criterion.weights(spectrum.abs() ** 2))
        torch.testing.assert_close(weight * given(difference), loss.detach())
    return computed


def loss_of_a2mim(**options) -> ReconstructionLoss:
    """The loss of the method with these options, whose network does not matter."""
    tiny = {"input_size": 16, "patch_size": 8, "embed_dim": 4, "depth": 2, "num_heads": 1}
    return A2MIM(backbone="vit_tiny", **tiny, **options).loss


def reconstruction_loss(head: dict, matrix: Tensor | None = None) -> ReconstructionLoss:
    """Of a published configuration of a head: SimMIM's has no options but the number of colors."""
    loss = dict(head.get("loss", {"mode": "l1_loss"}))
    assert loss.get("loss_weight", 1.0) == 1.0
    focal = {
        name: loss[name] for name in ("activate", "alpha", "gamma", "residual") if name in loss
    }
    names = (
        "unmask_weight",
        "fft_weight",
        "fft_focal",
        "fft_unmask_weight",
        "fft_unmask_replace",
        "fft_reweight",
    )
    options = {name: head[name] for name in names if name in head}
    options |= {f"focal_{name}": value for name, value in focal.items()}
    return loss_of_a2mim(pixel_loss=loss["mode"].removesuffix("_loss"), matrix=matrix, **options)


def a2mim_head(case: Case) -> dict[str, Tensor]:
    inputs, computed = case.inputs(), {}
    for name, head in case.config["variants"].items():
        predicted = inputs["pred"].clone().requires_grad_()
        criterion = reconstruction_loss(head, given_matrix(case, name))
        out = criterion(predicted, inputs["image"], inputs["mask"])
        out["loss"].backward()
        computed |= {
            f"{name}/{key}": value for key, value in (out | {"grad/pred": predicted.grad}).items()
        }
    return computed


NECK_NAMES = (
    ("decoder_pred.0.", "pred."), ("decoder.0.", "pred."), ("decoder.conv.0.conv.", "decoder.conv."),
    ("decoder.conv.0.ln.", "decoder.ln."),
)  # fmt: skip


def neck_name(name: str) -> str:
    for theirs, ours in NECK_NAMES:
        name = name.replace(theirs, ours)
    return name


def neck_options(config: dict) -> dict[str, int]:
    decoder = config.get("decoder_cfg")
    return {
        "kernel": config.get("kernel_size", 1),
        "decoder_kernel": decoder and decoder["kernel_size"],
    }


def mim_neck(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    neck = PixelNeck(config["in_channels"], config["encoder_stride"], **neck_options(config))
    weights = {name.removeprefix("neck."): value for name, value in case.inputs("weights/").items()}
    load_weights(neck, {neck_name(name): value for name, value in weights.items()})
    x = inputs["x"].requires_grad_()
    output = neck(x)
    output.backward(inputs["cotangent"])
    return {"output": output, "grad/x": x.grad}


def blockwise_mask(case: Case) -> dict[str, Tensor]:
    """The generator by what the case says of its masks, and by the permutations that it gives."""
    computed, inputs = {}, case.inputs()
    for number, expected in enumerate(case.config["invariants"]):
        config = expected["config"]
        side, cell = (
            config[key] // config["model_patch_size"] for key in ("input_size", "mask_patch_size")
        )
        generator = SimMIMMask((side, side), config["mask_ratio"], cell)
        mask = generator(np.random.default_rng(number))
        assert list(mask.shape) == expected["mask_shape"] and mask.sum() == expected["ones_in_mask"]
        coarse = mask[:: expected["upsample"], :: expected["upsample"]]
        assert (
            coarse.shape == (expected["coarse_grid"],) * 2
            and coarse.sum() == expected["masked_coarse_cells"]
        )
        if f"c{number}/image" in inputs:
            order, image = inputs[f"c{number}/permutation"], inputs[f"c{number}/image"]
            mask = torch.from_numpy(generator.mask_first(order.numpy()))
            assert torch.equal(mask, inputs[f"c{number}/mask"].bool())
            filled = mean_filled(image[None], mask[None])[0]
            computed[f"c{number}/image_out"] = filled if config["mask_color"] == "mean" else image
    return computed


def backbone_options(config: dict) -> dict:
    """A published configuration of a backbone in this repository's and timm's words."""
    arch = config.get("arch", {})
    if config["type"].endswith("ResNet"):
        channels = [config["base_channels"] * 2**stage for stage in range(4)]
        return {"backbone": f"resnet{config['depth']}", "channels": channels}
    if config["type"].endswith("ConvNeXt"):
        return {"backbone": "convnext_tiny", "depths": arch["depths"], "dims": arch["channels"]}
    names = {"embed_dims": "embed_dim", "num_layers": "depth"}
    sizes = {
        names.get(key, key): value for key, value in arch.items() if key != "feedforward_channels"
    }
    if config["type"].endswith("SwinTransformer"):
        window = config["stage_cfgs"]["block_cfgs"]["window_size"]
        return {"backbone": "swin_tiny_patch4_window7_224", "window_size": window, **sizes}
    return {
        "backbone": "vit_base",
        "patch_size": config["patch_size"],
        "mlp_ratio": mlp_ratio(arch["feedforward_channels"], arch["embed_dims"]),
        "init_values": config["init_values"],
        "qkv_bias": config["qkv_bias"],
        "rel_pos_bias": "per_block" if config["use_window"] else "none",
        "k_bias": not config["use_window"],
        **sizes,
    }


def reconstruction_model(case: Case) -> SimMIM:
    config, backbone = case.config, case.config["backbone"]
    names = ("replace", "detach", "mask_layer", "mask_token", "mask_init")
    model = (A2MIM if config["method"] == "a2mim" else SimMIM)(
        **backbone_options(backbone),
        **{name: backbone[name] for name in names if name in backbone},
        **neck_options(config["neck"]),
        input_size=tuple(case.inputs()["image"].shape[-2:]),
    )
    model.loss = reconstruction_loss(config["head"])
    model.mean_residual = config.get("residual", False)
    return model


def by_published_names(
    weights: dict[str, Tensor], own: Container[str]
) -> dict[str, tuple[str, Tensor]]:
    """Our name of each published tensor, and where in it each number of ours is, flat.

    Of mask token and gamma only those that are our `own`: a token that is a mean is no parameter
    here.
    """
    places = {
        name: torch.arange(value.numel()).view(value.shape) for name, value in weights.items()
    }
    inside = {
        name: value
        for name, value in places.items()
        if name.startswith("backbone.") and ".mask_" not in name
    }
    found = {
        theirs: (f"backbone.{ours}", value)
        for theirs, (ours, value) in zip(inside, from_openmixup(inside).items(), strict=True)
    }
    for name, value in places.items():
        if name.startswith("neck."):
            found[name] = neck_name(name), value
        elif name.removeprefix("backbone.") in own:
            found[name] = name.replace("backbone.", "inject."), value
    return found


def masked_reconstruction(case: Case) -> dict[str, Tensor]:
    """One training forward and its gradients, of a backbone, token, neck and head in published
    names."""
    config, inputs = case.config, case.inputs()
    model = reconstruction_model(case).train(config.get("train_mode", True))
    weights = case.inputs("weights/")
    weights = {
        name: value
        for name, value in weights.items()
        if not name.endswith(("position_index", "attn_mask"))
    }
    names = by_published_names(weights, dict(model.inject.named_parameters()))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    load_weights(
        model,
        {
            ours: weights[name].flatten()[at].view(shapes[ours])
            for name, (ours, at) in names.items()
        },
    )
    features = model.features(inputs["image"], inputs["mask"])
    predicted = model.predict(features, inputs["image"])
    loss = model.loss(predicted, inputs["image"], inputs["mask"])["loss"]
    loss.backward()
    computed = {"loss": loss, "features": features, "reconstruction_0": predicted[:1]}
    # a published token that is no parameter here is not trained there either
    computed |= {
        f"grad/{name}": torch.zeros_like(value)
        for name, value in weights.items()
        if name not in names
    }
    if "image_filled_0" in inputs:
        torch.testing.assert_close(
            model.seen(inputs["image"], inputs["mask"])[:1], inputs["image_filled_0"]
        )
    gradient_of, state = gradients(model), model.state_dict()
    for name, (ours, at) in names.items():
        for kind, values in (("grad", gradient_of.get(f"grad/{ours}")), ("after", state[ours])):
            if values is not None:
                computed[f"{kind}/{name}"] = values.flatten()[at.flatten().argsort()].view(at.shape)
    return computed


ANNEALING_NAMES = {
    ("StepFixCosineAnnealing", False): "stepfix_cosine", ("CosineAnnealing", False): "cosine_iters",
    ("CosineAnnealing", True): "cosine_epochs", ("step", True): "step",
}  # fmt: skip


def a2mim_lr_schedule(case: Case) -> dict[str, Tensor]:
    """Upstream's schedules go by epochs unless they say otherwise; a step does so in any case."""
    computed = {}
    for name, config in case.config["variants"].items():
        by_epoch = config.get("by_epoch", True) or config["policy"] == "step"
        kind, steps = ANNEALING_NAMES[config["policy"], by_epoch], config["iters_per_epoch"]
        warmup = config.get("warmup_iters", 0) if config.get("warmup") else 0
        rates = annealing(
            kind, config["base_lrs"][0], config.get("min_lr", 0.0), config["epochs"], steps,
            warmup * (steps if config.get("warmup_by_epoch") else 1), warmup_ratio=config.get("warmup_ratio", 0.1),
            milestones=config.get("step", ()), gamma=config.get("gamma", 0.1),
        )  # fmt: skip
        scales = [rate / config["base_lrs"][0] for rate in config["base_lrs"]]
        optimizer = torch.optim.SGD(
            [{"params": [torch.zeros(1)], "lr_scale": scale} for scale in scales]
        )
        rows = []
        for rate in rates:
            set_schedule(optimizer, rate, 0.0)
            rows.append([group["lr"] for group in optimizer.param_groups])
        computed[name] = torch.tensor(rows, dtype=torch.float64)
    return computed


def a2mim_param_groups(case: Case) -> dict[str, Tensor]:
    """The given rules on the published names; layers by the names that these tensors have here."""
    config, optimizer = case.config, case.config["optimizer"]
    names = config["param_names"]
    values = [
        by_rules(
            name,
            optimizer.get("paramwise_options") or {},
            optimizer["lr"],
            optimizer["weight_decay"],
        )
        for name in names
    ]
    scales = np.ones(len(names))
    if "model_type" in optimizer:
        ours = list(from_openmixup({name: torch.zeros(1, 4) for name in names}))
        layers, last = layers_of(ours, config.get("depths") or [config["depth"]])
        scales = [layer_scales(optimizer["layer_decay"], last - 1)[layers[name]] for name in ours]
    return {
        "lr": torch.tensor(
            [lr * scale for (lr, _), scale in zip(values, scales, strict=True)], dtype=torch.float64
        ),
        "weight_decay": torch.tensor([decay for _, decay in values], dtype=torch.float64),
    }


def resnet_key_map(case: Case) -> dict[str, Tensor]:
    """Published names are timm's: of the whole ResNet-50, where they or their shapes are listed,
    and of a small network with its features.
    """
    config = case.config
    shapes, names = config.get("resnet50_full_shapes"), config.get("resnet50_full_key_map")
    resnet50 = timm.create_model("resnet50", num_classes=0).state_dict() if shapes or names else {}
    if shapes:
        assert {name: list(value.shape) for name, value in resnet50.items()} == shapes
    if names:
        ours = list(from_openmixup({f"backbone.{name}": torch.zeros(1) for name in names}))
        assert ours == list(names.values()) and set(ours) == resnet50.keys()
    channels = [config["base_channels"] * 2**stage for stage in range(4)]
    resnet = timm.create_model(f"resnet{config['depth']}", num_classes=0, channels=channels)
    load_weights(resnet, from_openmixup(case.inputs("weights/")))
    x = resnet.eval().maxpool(resnet.act1(resnet.bn1(resnet.conv1(case.inputs()["image"]))))
    computed = {}
    for stage in range(1, 5):
        x = getattr(resnet, f"layer{stage}")(x)
        computed[f"stage{stage}"] = x if stage > 2 else x[:1, :, :4, :4]
    return computed


def a2mim_key_map(case: Case) -> dict[str, Tensor]:
    """Strictly into timm's classes, and our ViT: equal features."""
    config, image = case.config, case.inputs()["image"]
    weights = from_openmixup(case.inputs("weights/"))
    assert from_openmixup(dict.fromkeys(config["key_map"], torch.zeros(1, 4))).keys() == set(
        config["key_map"].values()
    )
    heads = [
        value for name, value in weights.items() if name.endswith(("head.weight", "head.fc.weight"))
    ]
    network = timm_network(config, tuple(image.shape[-2:]), len(heads[0]) if heads else 0)
    load_weights(network, weights)
    network.eval()
    features = network.forward_features(image)
    computed = {
        "pooled": network.forward_head(features, pre_logits=True),
        "logits": network.forward_head(features),
    }
    if config["timm_class"].endswith("ConvNeXt"):
        return computed | {"features": network.head.norm(features)}
    if config["timm_class"].endswith("SwinTransformer"):
        return computed | {"features": features.permute(0, 3, 1, 2)}
    arch = config["arch"]
    own = VisionTransformer(
        input_size=config["img_size"], patch_size=config["patch_size"], embed_dim=arch["embed_dims"],
        depth=arch["num_layers"], num_heads=arch["num_heads"], init_values=config["init_values"],
        mlp_ratio=mlp_ratio(arch["feedforward_channels"], arch["embed_dims"]), **position_options(config),
        num_classes=network.num_classes, global_pool="token" if config["final_norm"] else "avg",
    ).eval()  # fmt: skip
    load_weights(own, weights)
    torch.testing.assert_close(
        own.norm(own.forward_features(image)), features, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(own(image), computed["logits"], rtol=1e-4, atol=1e-5)
    return computed | {"tokens": features}


def timm_network(config: dict, size: tuple[int, int], num_classes: int) -> nn.Module:
    """The class that a case names, with its sizes."""
    module, _, name = config["timm_class"].rpartition(".")
    arch, cls = config["arch"], getattr(importlib.import_module(module), name)
    if name == "ConvNeXt":
        return cls(
            depths=arch["depths"],
            dims=arch["channels"],
            norm_eps=config["norm_eps"],
            num_classes=num_classes,
        )
    if name == "SwinTransformer":
        sizes = {
            "embed_dim": arch["embed_dims"],
            "depths": arch["depths"],
            "num_heads": arch["num_heads"],
        }
        return cls(
            img_size=size, window_size=config["window_size"], num_classes=num_classes, **sizes
        )
    return cls(
        img_size=size, patch_size=config["patch_size"], embed_dim=arch["embed_dims"], depth=arch["num_layers"],
        num_heads=arch["num_heads"], mlp_ratio=mlp_ratio(arch["feedforward_channels"], arch["embed_dims"]),
        init_values=config["init_values"], use_abs_pos_emb=config["use_abs_pos_embed"], num_classes=num_classes,
        use_rel_pos_bias=config["use_rel_pos_bias"], global_pool="token" if config["final_norm"] else "avg",
    )  # fmt: skip


def fourier_analysis(case: Case) -> dict[str, Tensor]:
    """Tokens [B, N, C] are of a square grid."""
    latents = [case.inputs()[f"latent{k}"] for k in range(len(case.inputs()))]
    maps = [
        x if x.ndim == 4 else x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]), -1))
        for x in latents
    ]
    curves = {
        f"rel_log_amp{k}": fourier.relative(fourier.log_amplitudes(x)) for k, x in enumerate(maps)
    }
    return curves | {"variance": torch.stack([fourier.spatial_variance(x) for x in maps])}


def multi_order_interaction(case: Case) -> dict[str, Tensor]:
    """All rewards of every ratio, those of the same order too; without contexts in the case they
    are empty."""
    config, inputs = case.config, case.inputs()
    shape = (config["pairs_number"], config["samples_number_of_s"], 0)
    found: dict[str, list[Tensor]] = {}
    computed = {}
    for ratio in config["ratios"]:
        percent = round(100 * ratio)
        contexts = inputs.get(
            f"context_{percent}", torch.zeros(len(inputs["image"]), *shape)
        ).long()
        assert contexts.shape[-1] == interaction.order_of(ratio, config["grid_size"] ** 2)
        logits = torch.stack(
            [quadratic_logits(case, k, contexts[k]) for k in range(len(contexts))]
        )  # [I, P, S, 4, K]
        computed[f"logits_{percent}"] = logits.flatten(1, 3)[:, :8]
        for kind in interaction.REWARDS:
            values = [
                interaction.reward(logits[k], int(label), kind)
                for k, label in enumerate(inputs["label"])
            ]
            found.setdefault(kind, []).append(interaction.second_difference(torch.stack(values)))
    for kind, of_ratios in found.items():
        computed[f"interaction_{kind}"] = torch.stack(of_ratios)
        strengths = computed[f"interaction_{kind}"].mean(-1).abs().mean((1, 2))
        computed[f"J_{kind}"] = interaction.normalized(strengths)
    return computed


def quadratic_logits(case: Case, number: int, contexts: Tensor) -> Tensor:
    """Of the case's model, which sees means of cells, on one image with contexts [P, S, m]: [P, S,
    4, classes]."""
    config, weights = case.config, case.inputs("weights/")
    grid, image = config["grid_size"], case.inputs()["image"][number]

    def model(images: Tensor) -> Tensor:
        cells = F.avg_pool2d(images, images.shape[-1] // grid).flatten(1)  # [K, c * g * g]
        quadratic = torch.einsum("bi,kij,bj->bk", cells, weights["Q"], cells)
        ranks = torch.arange(config["num_classes"])
        return cells @ weights["W"].T + quadratic + 0.3 * ranks * cells.sum(1, keepdim=True).tanh()

    present = interaction.coalitions(case.inputs()["pairs"][number].long(), contexts, grid**2)
    return interaction.masked_logits(model, image, present.flatten(0, 2), 7).unflatten(
        0, present.shape[:3]
    )


ADAPTERS = {
    adapter.__name__: adapter
    for adapter in (
        conmim, beit_finetune, layer_decay, schedules, rel_pos_bias_interp, pos_embed_interp,
        knn, linprobe_head, lars,
        mae, mae_finetune, mae_layer_decay, mae_lr_schedule, mae_pos_interp,
        semmae, semmae_mask, semmae_flip, semmae_finetune_tokens,
        semaim, semaim_masks, semaim_attention, semaim_clip_teacher, semaim_weight_decay, semaim_lr_schedule,
        semaim_train_steps, gaussian_blur, vit_finetune,
        voc_miou,
        hog, dalle_encoder, beit_pretrain, semanticmim_beit, semanticmim_maskfeat,
        semanticmim_attention,
        focal_frequency_loss, a2mim_head, mim_neck, blockwise_mask, a2mim_lr_schedule, a2mim_param_groups,
        resnet_key_map, a2mim_key_map, fourier_analysis,
    )
} | {
    "mask_lambda_schedule": lambda_schedule, "sincos_pos_embed": sincos_tables, "mae_lars": lars,
    "interaction": multi_order_interaction,
} | dict.fromkeys(("a2mim_resnet", "a2mim_vit", "a2mim_convnext", "simmim"), masked_reconstruction)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The test


def check(case: Case, computed: dict[str, Tensor]) -> None:
    """Every output that the case states must be there and agree."""
    for name, expected in case.inputs("outputs/").items():
        tolerance = case.spec["outputs"][name]
        actual = torch.as_tensor(computed[name]).detach()
        assert actual.shape == expected.shape, (
            f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        )
        torch.testing.assert_close(
            actual.double(),
            expected.double(),
            rtol=tolerance["rtol"],
            atol=tolerance["atol"],
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_there_are_cases():
    assert FOLDERS, f"no case.json below {CASES}"


@pytest.mark.parametrize(
    "folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}"
)
def test_reference_case(folder: Path):
    case, method = load(folder), folder.parent.name
    assert method in ADAPTERS, f"no adapter for {method}: the method of {folder} is not implemented"
    check(case, ADAPTERS[method](case))


# --------------------------------------------------------------------------------------------------
# What further cases may state or leave out


def crafted(
    tmp_path: Path, source: str, config: dict, inputs: dict, outputs: dict[str, Tensor]
) -> Case:
    """The case `source` written and read again with other configuration, more inputs and no outputs
    but these."""
    case = load(OWN_CASES / source)
    kept = {name: value for name, value in case.tensors.items() if not name.startswith("outputs/")}
    given = {f"inputs/{name}": value for name, value in inputs.items()}
    expected = {f"outputs/{name}": value.contiguous() for name, value in outputs.items()}
    save_file(kept | given | expected, tmp_path / "tensors.safetensors")
    tolerances = {name: {"rtol": 1e-4, "atol": 1e-7} for name in outputs}
    (tmp_path / "case.json").write_text(
        json.dumps(case.spec | {"config": config, "outputs": tolerances})
    )
    return load(tmp_path)


@pytest.mark.parametrize(
    ("source", "backbone", "parameter"),
    [
        ("mae/normpix", {}, "decoder_pos_embed"),
        ("semaim/saim_share_weight", {}, "pos_embed"),
        ("a2mim_vit/l2_gamma", {"mask_token": "randn"}, "backbone.mask_token"),
        ("a2mim_vit/l2_gamma", {"mask_token": "mean"}, "backbone.mask_token"),
        ("a2mim_vit/l2_gamma", {"mask_token": "none"}, "backbone.mask_gamma"),
    ],
)
def test_no_gradient_is_one_of_zeros(tmp_path, source, backbone, parameter):
    original = load(OWN_CASES / source)
    config = original.config
    if backbone:
        config["backbone"] |= backbone
    zeros = torch.zeros_like(original.tensors[f"weights/{parameter}"])
    case = crafted(tmp_path, source, config, {}, {f"grad/{parameter}": zeros})
    computed = ADAPTERS[source.partition("/")[0]](case)
    check(case, computed)
    case.tensors[f"outputs/grad/{parameter}"] += 1
    with pytest.raises(AssertionError, match=parameter):
        check(case, computed)


def weighted_spectrum(
    predicted: Tensor, target: Tensor, matrix: Tensor, ave_spectrum: bool
) -> tuple[Tensor, Tensor]:
    """Mean of weighted squared distances of whole complex spectra, and its gradient."""
    predicted = predicted.clone().requires_grad_()
    spectrum = torch.fft.fft2(predicted, norm="ortho") - torch.fft.fft2(target, norm="ortho")
    spectrum = spectrum.mean(0, keepdim=True) if ave_spectrum else spectrum
    loss = (matrix * spectrum.abs().square()).mean()
    loss.backward()
    return loss.detach(), predicted.grad


@pytest.mark.parametrize("stated", ["input", "option", "name", "numbers", "of one variant"])
def test_a_case_may_give_the_weights_of_frequencies(tmp_path, stated):
    """In any of the ways in which it can be stated; a variant that is given none has weights of its
    own."""
    source = "focal_frequency_loss/options_24"
    original, matrix = load(OWN_CASES / source), torch.rand(24, 24)
    variants = {name: original.config["variants"][name] for name in ("default", "no_ave")}
    option = {"option": True, "name": "inputs/matrix", "numbers": matrix.tolist()}.get(stated)
    if option:
        variants["no_ave"] |= {"matrix": option}
    inputs = {"of one variant": {"no_ave/matrix": matrix}, "numbers": {}}.get(
        stated, {"matrix": matrix}
    )
    pictures = original.inputs()["pred"], original.inputs()["target"]
    outputs = {}
    for name in variants:
        if name == "no_ave" or stated == "input":
            loss, grad = weighted_spectrum(*pictures, matrix, ave_spectrum=name == "default")
        else:
            loss, grad = (
                original.inputs("outputs/")[f"{name}/{key}"] for key in ("loss", "grad/pred")
            )
        outputs |= {f"{name}/loss": loss, f"{name}/grad/pred": grad}
    case = crafted(tmp_path, source, {"variants": variants}, inputs, outputs)
    check(case, focal_frequency_loss(case))


def test_a_heads_loss_takes_the_weights_of_frequencies(tmp_path):
    source = "a2mim_head/fft_focal_modes"
    original, matrix = load(OWN_CASES / source), torch.rand(3, 24, 24)
    head = original.config["variants"]["focal_target_w0p0"] | {"fft_unmask_weight": 1.0}
    inputs = original.inputs()
    loss, _ = weighted_spectrum(inputs["pred"], inputs["image"], matrix, ave_spectrum=True)
    case = crafted(
        tmp_path, source, {"variants": {"all": head}}, {"matrix": matrix}, {"all/loss_freq": loss}
    )
    check(case, a2mim_head(case))


@pytest.mark.parametrize(
    "left_out", [{"resnet50_full_shapes"}, {"resnet50_full_shapes", "resnet50_full_key_map"}]
)
def test_a_key_map_needs_no_list_of_shapes(tmp_path, left_out):
    source = "resnet_key_map/r18_tiny"
    original = load(OWN_CASES / source)
    config = {name: value for name, value in original.config.items() if name not in left_out}
    case = crafted(tmp_path, source, config, {}, original.inputs("outputs/"))
    check(case, resnet_key_map(case))
    if "resnet50_full_key_map" in config:
        config["resnet50_full_key_map"].popitem()
        with pytest.raises(AssertionError):
            resnet_key_map(crafted(tmp_path, source, config, {}, original.inputs("outputs/")))
