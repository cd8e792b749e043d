"""Adapters of Pixio's and NEPA's cases."""

import math

import torch
from torch import Tensor

from modeling_pretrain import NEPA, Pixio
from reference.case import Case
from reference.common import gradients, load_weights, mlp_ratio, normalized
from reference.mae import autoencoder_parts, mae_options
from unimim.checkpoint.loading import load_pretrained

# published name: ours
PIXIO_OPTIONS = {"n_cls_tokens": "num_cls_tokens", "mask_grid": "mask_grid"}
NEPA_OPTIONS = {
    "hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
    "patch_size": "patch_size", "num_channels": "in_chans", "use_gated_mlp": "gated_mlp",
    "hidden_act": "act", "rope_theta": "rope_theta", "qkv_bias": "qkv_bias",
    "layerscale_value": "init_values", "is_causal": "causal", "pos_embed_shift": "pos_shift",
    "pos_embed_jitter": "pos_jitter", "pos_embed_rescale": "pos_rescale",
}  # fmt: skip
# ours: published, for gradients; the joint projection to queries, keys and values is split
NEPA_NAMES = (
    ("blocks.", "encoder.layer."), (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."), (".attn.proj.", ".attention.output.dense."),
    (".attn.", ".attention.attention."), (".gamma_1", ".layer_scale.lambda1"),
    (".gamma_2", ".output.layer_scale.lambda1"), (".mlp.fc1_g.", ".intermediate.gate_proj."),
    (".mlp.fc1_x.", ".intermediate.up_proj."), (".mlp.fc1.", ".intermediate.up_proj."),
    (".mlp.fc2.", ".output.dense."),
)  # fmt: skip
NEPA_OUTSIDE = (
    ("cls_token", "embeddings.cls_token"), ("norm.", "layernorm."),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
)  # fmt: skip


def pixio(case: Case) -> dict[str, Tensor]:
    config = case.config
    options = {ours: config[name] for name, ours in PIXIO_OPTIONS.items() if name in config}
    model = Pixio(**mae_options(config), **options)
    load_weights(model, case.inputs("weights/"))
    batch, noise = {"image": normalized(case.inputs()["image"])}, case.inputs()["noise"]
    loss = model(batch, noise)["loss"]
    loss.backward()
    computed, order, visible = autoencoder_parts(model, batch, noise)
    ids_restore = order.argsort(1)
    computed |= {"mask": (ids_restore >= visible).float(), "ids_restore": ids_restore}
    features = model.forward_features(batch["image"])
    computed |= {"features": features, "features_norm": model.norm(features)}
    return computed | {"loss": loss.view(1)} | gradients(model)


def nepa(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    model = nepa_model(config)
    report = load_pretrained(model, case.inputs("weights/"), min_matched=1.0)
    assert not report.ignored and all("_norm." in name for name in report.missing), report
    model.train(config["mode"] == "train")
    images = inputs["image"].float() / 127.5 - 1
    noise = coordinate_noise(config, inputs).expand(len(images), -1)
    model({"image": images}, noise)["loss"].backward()

    changes = model.rope.draw(noise) if model.training else None
    rotation = model.rope(images.device, changes)
    embeddings = model.embed(model.patch_embed(images), None)
    computed = {
        "rope_cos": rotation.cos[0, 0],
        "rope_sin": rotation.sin[0, 0],
        "input_embedding": embeddings,
        "last_hidden_state": model.norm(model.run_blocks(embeddings, changes, causal=model.causal)),
        "loss": model({"image": images}, noise)["loss"].view(1),
    }
    return computed | published_gradients(model)


def nepa_model(config: dict) -> NEPA:
    size = config["image_size"]
    options = {ours: config[name] for name, ours in NEPA_OPTIONS.items() if name in config}
    norm = "affine" if config.get("qk_norm_bias") else "weight"
    norm = norm if config.get("qk_norm_affine") else "plain"
    return NEPA(
        input_size=size if isinstance(size, int) else tuple(size),
        mlp_ratio=mlp_ratio(config["intermediate_size"], config["hidden_size"]),
        qk_norm=norm if config.get("qk_norm") else "none",
        **options,
    )


def coordinate_noise(config: dict, inputs: dict[str, Tensor]) -> Tensor:
    """The noise in [0, 1) that the drawn shift, jitter and rescale [1, 1 or 2] come from."""
    found = []
    if config.get("pos_embed_shift") is not None:
        shift = inputs.get("rope_shift", torch.zeros(1, 2))
        found.append(shift / config["pos_embed_shift"])
    for name, size in (("jitter", 2), ("rescale", 1)):
        limit = config.get(f"pos_embed_{name}")
        if limit is not None:
            factor = inputs.get(f"rope_{name}", torch.ones(size)).view(1, size)
            found.append(factor.log() / math.log(limit))
    return (torch.cat(found, dim=1) + 1) / 2 if found else torch.zeros(1, 0)


def published_gradients(model: NEPA) -> dict[str, Tensor]:
    renamed = {}
    for key, value in gradients(model).items():
        name = key.removeprefix("grad/")
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{part}.")] = piece
        else:
            renamed[name] = value
    return {f"grad/vit_nepa.{published_name(name)}": value for name, value in renamed.items()}


def published_name(name: str) -> str:
    for ours, theirs in NEPA_OUTSIDE:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for ours, theirs in NEPA_NAMES:
        name = name.replace(ours, theirs)
    return name


ADAPTERS = {"pixio": pixio, "nepa": nepa}
