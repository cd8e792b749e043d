"""Adapters of SemAIM's cases: pre-training, orders and masks, teacher, steps, fine-tuning."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masking_generator import patch_order, stretched, visible_patches
from modeling_finetune import patchify
from modeling_pretrain import SemAIM, build_semaim, similarity
from modeling_targets import TEACHERS, Teacher, build_tower, from_openai, visual_weights
from optim_factory import cosine_at, param_groups, set_schedule
from reference.case import Case, check
from reference.common import gradients, load_weights, mae_classifier, position_options, vit_options
from unimim.checkpoint.names import fuse_qkv


def semaim_options(config: dict) -> dict:
    names = (
        "in_chans", "permutation_type", "attention_type", "query_depth", "share_weight",
        "prediction_head_type", "predict_feature", "gaussian_kernel_size", "gaussian_sigma",
        "loss_type", "norm_pix_loss", "use_ema_model",
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
        "loss_map": model.target.loss_map(predicted[:, 1:], target),
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
        config["permutation_type"], (config["grid"],) * 2, inputs.get("noise"),
        inputs.get("attention_map"), inputs.get("center_noise"),
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
        "normalised_target": model.target.of({"image": images}),
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


# the folder of cases: its adapter
ADAPTERS = {
    "semaim": semaim,
    "semaim_masks": semaim_masks,
    "semaim_attention": semaim_attention,
    "semaim_clip_teacher": semaim_clip_teacher,
    "semaim_weight_decay": semaim_weight_decay,
    "semaim_lr_schedule": semaim_lr_schedule,
    "semaim_train_steps": semaim_train_steps,
    "gaussian_blur": gaussian_blur,
    "vit_finetune": vit_finetune,
}
