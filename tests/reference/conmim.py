"""Adapters of ConMIM's cases: pre-training, fine-tuning, schedules and resized positions."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from modeling_finetune import VisionTransformer
from modeling_pretrain import ConMIM, masked_positions, take
from optim_factory import cosine_schedule, layer_scales, param_groups, set_schedule
from reference.case import Case
from reference.common import (
    gradients,
    load_weights,
    mlp_ratio,
    position_options,
    set_norms,
    vit_options,
)
from unimim.checkpoint.resizing import (
    geometric_ratio,
    interpolate_pos_embed,
    interpolate_rel_pos_bias,
    source_coordinates,
)


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
    batch = conmim_batch(case.inputs())
    tokens = batch["mask"].flatten(1).shape[1] + 1
    for network in (model.teacher, model):  # the class token is projected too
        network.projectors.register_forward_hook(
            lambda _, given, out: seen.append(out.unflatten(0, (-1, tokens))[:, 1:])
        )
    loss = model(batch)["loss"]
    loss.backward()
    keys, queries = seen
    positions, counts = masked_positions(batch["mask"].flatten(1))
    logits = model.target.similarity(take(queries, positions), keys)
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
        "base_value": "base", "final_value": "final", "epochs": "epochs",
        "niter_per_ep": "steps_per_epoch", "warmup_epochs": "warmup_epochs",
        "warmup_steps": "warmup_steps", "start_warmup_value": "start_warmup",
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


# the folder of cases: its adapter
ADAPTERS = {
    "conmim": conmim,
    "beit_finetune": beit_finetune,
    "layer_decay": layer_decay,
    "schedules": schedules,
    "rel_pos_bias_interp": rel_pos_bias_interp,
    "pos_embed_interp": pos_embed_interp,
}
