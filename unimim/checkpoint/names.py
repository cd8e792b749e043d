"""Translates state-dict names: published projects' to native ones, native ones to timm's."""

import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
_TABLE = "relative_position_bias_table"
_SHARED_TABLE = f"rel_pos_bias.{_TABLE}"
_INDICES = ("relative_position_index", "attn_mask")  # constants in published files, no weights


def to_timm(state_dict: StateDict) -> StateDict:
    """Return an encoder in native names under timm's names; timm loads it strictly.

    The BEiT variant is timm's `Beit`, a ViT with rotary positions its `Eva`, any other its
    `VisionTransformer`.

    The BEiT variant (bias tables, or query and value biases with layer scale) gets one bias table a
    block; a plain ViT gets whole qkv biases and timm's layer-scale names, as does any with several
    class tokens, which are timm's class token and `reg_tokens` registers. The features are the
    same. A converted dict stays as it is.
    """
    state = {key: value for key, value in state_dict.items() if not key.endswith(_INDICES)}
    # no plain transformer: Swin, or a convolutional network
    if not any(key.startswith("blocks.") for key in state):
        return state
    state = fuse_qkv(state)
    several = "cls_token" in state and state["cls_token"].shape[1] > 1
    if several:
        state["cls_token"], state["reg_token"] = state["cls_token"].tensor_split([1], dim=1)
    if (
        not several
        and "reg_token" not in state
        and (_has(state, _TABLE) or (_has(state, ".q_bias") and _has(state, ".gamma_1")))
    ):
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        return _expand_shared_table(_split_qkv_bias(state), depth)
    state = _fuse_qkv_bias(state)
    if "pos_embed" not in state:  # rotary positions: timm's `Eva`, whose names are native
        return state
    return _rename(state, r"\.gamma_(\d)$", r".ls\1.gamma")


def timm_vit_arguments(
    state: StateDict, image_size: tuple[int, int], num_heads: int
) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` for a ViT's encoder in timm's names.

    `state` is what `to_timm` returns; the model loads it strictly. The rest of what is needed can
    be seen in its shapes.
    """
    projection = state["patch_embed.proj.weight"]
    width = projection.shape[0]
    is_beit = _has(state, _TABLE) or _has(state, "attn.q_bias")
    arguments = {
        "model_name": "beit_base_patch16_224" if is_beit else "vit_base_patch16_224",
        "img_size": list(image_size),
        "patch_size": list(projection.shape[-2:]),
        "embed_dim": width,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "num_heads": num_heads,
        "num_classes": 0,
        "global_pool": "avg" if "fc_norm.weight" in state else "token",
    }
    others = {
        "in_chans": projection.shape[1],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": _has(state, "attn.q_bias") or _has(state, "attn.qkv.bias"),
        "init_values": 0.1 if _has(state, ".gamma_1") or _has(state, ".ls1.gamma") else None,
    }
    if is_beit:
        others["use_abs_pos_emb"] = "pos_embed" in state
        others["use_rel_pos_bias"] = _has(state, _TABLE)
    else:
        others["pos_embed"] = "learn" if "pos_embed" in state else "none"
        others["reg_tokens"] = state["reg_token"].shape[1] if "reg_token" in state else 0
    defaults = _TIMM_BEIT if is_beit else _TIMM_VIT
    return arguments | {k: value for k, value in others.items() if value != defaults[k]}


# defaults of timm's base models, which need not be told
_TIMM_SHARED = {"in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": True}
_TIMM_BEIT = _TIMM_SHARED | {
    "init_values": 0.1, "use_abs_pos_emb": False, "use_rel_pos_bias": True,
}  # fmt: skip
_TIMM_VIT = _TIMM_SHARED | {"init_values": None, "pos_embed": "learn", "reg_tokens": 0}


def to_native(state: StateDict, target: Collection[str]) -> StateDict:
    """Return the state under the model's names.

    Every converter that recognizes the names it meets is applied, in order.
    """
    for recognize, convert in _WRAPPERS:
        if recognize(state, target):
            state = convert(state)
    if _is_whole_simmim(state, target):
        return whole_simmim(state, target)
    for recognize, convert in _CONVERTERS:
        if recognize(state, target):
            state = convert(state)
    return state


def _has(names: Collection[str], part: str) -> bool:
    return any(part in name for name in names)


def _has_encoder(names: Collection[str]) -> bool:
    return any(name.startswith("encoder.patch_embed.") for name in names)


def _inside(state: StateDict, prefix: str) -> StateDict:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _rename(state: StateDict, pattern: str, replacement: str) -> StateDict:
    return {re.sub(pattern, replacement, key): value for key, value in state.items()}


def _expand_shared_table(state: StateDict, depth: int) -> StateDict:
    """Give each block the shared bias table, added to the block's own table if it has one."""
    state = dict(state)
    shared = state.pop(_SHARED_TABLE, None)
    if shared is not None:
        for block in range(depth):
            key = f"blocks.{block}.attn.{_TABLE}"
            state[key] = state[key] + shared if key in state else shared
    return state


def _split_qkv_bias(state: StateDict) -> StateDict:
    """Split qkv biases into query and value biases.

    A key bias adds the same to all scores of a query, and softmax drops it.
    """
    split = {}
    for key, value in state.items():
        if key.endswith("attn.qkv.bias"):
            stem = key.removesuffix("qkv.bias")
            split[f"{stem}q_bias"], _, split[f"{stem}v_bias"] = value.chunk(3)
        else:
            split[key] = value
    return split


def _join_registers(state: StateDict) -> StateDict:
    """Join timm's class token and registers as class tokens."""
    joined = {key: value for key, value in state.items() if key != "reg_token"}
    return joined | {"cls_token": torch.cat((state["cls_token"], state["reg_token"]), dim=1)}


def _fuse_qkv_bias(state: StateDict) -> StateDict:
    """Join query and value biases as whole qkv biases, with zeros for the keys."""
    fused = {key: value for key, value in state.items() if not key.endswith((".q_bias", ".v_bias"))}
    for key, query in state.items():
        if key.endswith(".q_bias"):
            stem = key.removesuffix("q_bias")
            fused[f"{stem}qkv.bias"] = torch.cat(
                (query, torch.zeros_like(query), state[f"{stem}v_bias"])
            )
    return fused


def fuse_qkv(state: StateDict) -> StateDict:
    """Join SAIM's separate projections to queries, keys and values of the encoder's blocks."""
    fused = {}
    for key, value in state.items():
        found = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", key)
        if found is None:
            fused[key] = value
        elif found[2] == "q":
            fused[f"{found[1]}qkv.{found[3]}"] = torch.cat(
                [state[f"{found[1]}{part}.{found[3]}"] for part in "qkv"]
            )
    return fused


def from_mmpretrain(state: StateDict) -> StateDict:
    """Return OpenMMLab's ViT, or SemanticMIM's, under native names."""
    native: StateDict = {}
    for name, value in state.items():
        # neck.fc is MaskFeat's head
        if _is_openmixup_extra(name) and not name.startswith("neck.fc."):
            continue
        for pattern, replacement in _MMPRETRAIN_NAMES:
            name = re.sub(pattern, replacement, name)
        native[name] = value
    return _join_key_values(native)


_MMPRETRAIN_NAMES = (
    (r"^backbone\.", ""), (r"^extra_layers\.", "mask_blocks."), (r"^layers\.", "blocks."),
    (r"(blocks\.\d+)\.ln(\d)\.", r"\1.norm\2."), (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."), (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."), (r"^ln2\.", "fc_norm."), (r"^head\.cls_head\.", "lm_head."),
    (r"^neck\.fc\.", "hog_head."), (r"^head\.fc\.", "head."),
)  # fmt: skip


def _join_key_values(state: StateDict) -> StateDict:
    """Join a projection to queries and one to keys and values (`q` and `kv`, or `q_proj` and
    `kv_proj`)."""
    joined = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attn\.)(q|kv)(_proj)?\.(weight|bias)", name)
        if found is None:
            joined[name] = value
        elif found[2] == "q":
            others = state[f"{found[1]}kv{found[3] or ''}.{found[4]}"]
            joined[f"{found[1]}qkv.{found[4]}"] = torch.cat((value, others))
    return joined


def from_nepa(state: StateDict) -> StateDict:
    """Return NEPA's published names under native ones, its three projections joined."""
    gated = _has(state, ".intermediate.gate_proj.")
    up = (r"\.intermediate\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1.")
    native: StateDict = {}
    for name, value in state.items():
        for pattern, replacement in (*_NEPA_NAMES, up):
            name = re.sub(pattern, replacement, name)
        native[name] = value
    return fuse_qkv(native)


_NEPA_NAMES = (
    (r"^vit_nepa\.", ""), (r"^embeddings\.cls_token$", "cls_token"), (r"^classifier\.", "head."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."), (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.([qk]_norm)\.", r".attn.\1."),
    (r"\.intermediate\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.output\.layer_scale\.lambda1$", ".gamma_2"), (r"\.layer_scale\.lambda1$", ".gamma_1"),
    (r"\.output\.dense\.", ".mlp.fc2."),
)  # fmt: skip


# OpenMixup's names (docs/methods/simmim_a2mim.md#checkpoints-of-openmixup): what its ViT, Swin and
# ConvNeXt are known by, and how their names change into timm's, one rule after another. Its ResNet
# has timm's names but for the classifier.
_OPENMIXUP_NAMES: dict[str, tuple[tuple[str, str | Callable[[re.Match], str]], ...]] = {
    ".ln1.weight": (
        (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^layers\.", "blocks."),
        (r"\.ln(\d)\.", r".norm\1."), (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."), (r"^ln1\.", "norm."), (r"^head\.fc\.", "head."),
    ),
    ".w_msa.": (
        (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        (r"^norm3\.", "norm."),
        (r"^stages\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample."),
        (r"^stages\.", "layers."),
    ),
    ".depthwise_conv.": (
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."), (r"\.depthwise_conv\.", ".conv_dw."),
        (r"\.pointwise_conv(\d)\.", r".mlp.fc\1."), (r"^norm3\.", "head.norm."),
    ),
    "layer1.0.conv1.": ((r"^head\.fc\.", "fc."),),
}  # fmt: skip


# What SimMIM's and A2MIM's files have beside the backbone, by our names; `inject.` and `neck.` are
# parts of the method, and so is what is in front of the backbone's own names.
_PIXEL_NAMES = (
    (r"^(?:encoder|backbone)\.(mask_token|mask_gamma)$", r"inject.\1"),
    (r"^neck\.decoder_pred\.0\.", "neck.pred."), (r"^(?:neck\.)?decoder\.0\.", "neck.pred."),
    (r"^neck\.decoder\.conv\.0\.conv\.", "neck.decoder.conv."),
    (r"^neck\.decoder\.conv\.0\.ln\.", "neck.decoder.ln."),
)  # fmt: skip


def whole_simmim(state: StateDict, target: Collection[str]) -> StateDict:
    """Return SimMIM's or A2MIM's pre-training network under native names: backbone, token, neck.

    A token or scale of another shape with as many numbers is brought into that of `target`, where
    it is a state dict.
    """
    of_backbone = re.compile(r"(?:encoder|backbone)\.(?!mask_)")
    inside = {of_backbone.sub("", k, 1): v for k, v in state.items() if of_backbone.match(k)}
    own = {name.removeprefix("backbone.") for name in target if name.startswith("backbone.")}
    converted = _in_form_of(to_native(inside, own), own, target)
    native = {f"backbone.{name}": value for name, value in converted.items()}
    for name, value in state.items():
        if of_backbone.match(name):
            continue
        for pattern, replacement in _PIXEL_NAMES:
            name = re.sub(pattern, replacement, name)
        shape = target[name].shape if isinstance(target, dict) and name in target else value.shape
        fits = name.startswith("inject.") and shape.numel() == value.numel()
        native[name] = value.reshape(shape) if fits and shape != value.shape else value
    return native


def _in_form_of(state: StateDict, own: Collection[str], target: Collection[str]) -> StateDict:
    """Give a ViT's backbone what stands for SimMIM's shared bias table and missing positions: a
    table in each block, and positions that are 0; the features are the same."""
    if not any(name.startswith("blocks.") for name in state):
        return state
    if _SHARED_TABLE not in own and _has(own, _TABLE):
        depth = len({name.split(".")[1] for name in own if name.startswith("blocks.")})
        state = _expand_shared_table(state, depth)
    positions = target.get("backbone.pos_embed") if isinstance(target, dict) else None
    if positions is not None and "pos_embed" not in state:
        state = state | {"pos_embed": torch.zeros_like(positions)}
    return state


def _is_whole_simmim(names: Collection[str], wanted: Collection[str]) -> bool:
    has_parts = any(
        re.match(r"(encoder|backbone)\.mask_|neck\.decoder|decoder\.0\.", n) for n in names
    )
    return has_parts and _has(wanted, "inject.") and _has(wanted, "neck.pred.")


def _renumber_merging(state: StateDict) -> StateDict:
    """Put Swin's patch merging at the beginning of the next stage, as timm has it, in place of the
    end of a stage; drop the constants."""
    return {
        re.sub(
            r"^layers\.(\d+)\.downsample\.",
            lambda found: f"layers.{int(found[1]) + 1}.downsample.",
            name,
        ): value
        for name, value in state.items()
        if not name.endswith(_INDICES)
    }


def openmixup_rules(
    names: Collection[str],
) -> tuple[tuple[str, str | Callable[[re.Match], str]], ...]:
    """Return the rules for a model of these names, without "backbone."; none for another
    naming."""
    return next((rules for mark, rules in _OPENMIXUP_NAMES.items() if _has(names, mark)), ())


def from_openmixup(state: StateDict) -> StateDict:
    """Return OpenMixup's ViT, Swin, ConvNeXt or ResNet, "backbone." or not, under timm's names.

    A neck, averages, indices and masks are left out, a classifier is kept. Swin's patch merging is
    brought into timm's order of columns.
    """
    inside = {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if not _is_openmixup_extra(name)
    }
    converted = inside
    for pattern, replacement in openmixup_rules(inside):
        converted = _rename(converted, pattern, replacement)
    if not _has(inside, ".w_msa."):
        return converted
    merging = re.compile(r"\.downsample\.(norm\.(weight|bias)|reduction\.weight)$")
    return {
        name: _columns_first(value) if merging.search(name) else value
        for name, value in converted.items()
    }


def _is_openmixup_extra(name: str) -> bool:
    return name.endswith(_INDICES) or name.startswith(("neck.", "ema_")) or "momentum" in name


def _columns_first(value: Tensor) -> Tensor:
    """Reorder the last axis of patch merging from (C, row, column) to (column, row, C)."""
    return value.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)


# (recognize(names, names the model has), convert): a further naming is one more line
_Converters = tuple[
    tuple[Callable[[Collection[str], Collection[str]], bool], Callable[[StateDict], StateDict]], ...
]
# DistributedDataParallel and torch.compile
_WRAPPERS: _Converters = (
    (
        lambda names, _: all(name.startswith("module.") for name in names),
        lambda s: _rename(s, r"^module\.", ""),
    ),
    (
        lambda names, _: all(name.startswith("_orig_mod.") for name in names),
        lambda s: _rename(s, r"^_orig_mod\.", ""),
    ),
)
_CONVERTERS: _Converters = (
    # MoCo: the encoder that is trained
    (
        lambda names, _: any(name.startswith("base_encoder.") for name in names),
        lambda s: _inside(s, "base_encoder."),
    ),
    (
        lambda names, _: any(name.startswith("encoder_q.") for name in names),
        lambda s: _inside(s, "encoder_q."),
    ),
    # OpenMMLab's ViTs
    (
        lambda names, _: any(re.match(r"(backbone\.)?layers\.0\.ln1\.", name) for name in names),
        from_mmpretrain,
    ),
    # NEPA's files
    (lambda names, _: _has(names, ".layer_scale.lambda1") or _has(names, "vit_nepa."), from_nepa),
    # SimMIM's own files: the encoder among others
    (
        lambda names, wanted: _has_encoder(names) and not _has_encoder(wanted),
        lambda s: _inside(s, "encoder."),
    ),
    # OpenMixup's files, whole or the backbone alone, and those of SimMIM and A2MIM, whose backbones
    # have timm's names
    (
        lambda names, wanted: (
            not _has(wanted, "backbone.")
            and (
                any(name.startswith("backbone.") for name in names) or bool(openmixup_rules(names))
            )
        ),
        from_openmixup,
    ),
    # the published Swin, SimMIM's among them
    (lambda names, _: _has(names, "layers.0.downsample."), _renumber_merging),
    # timm's Swin has its classifier one module deeper
    (
        lambda names, wanted: "head.fc.weight" in wanted and "head.weight" in names,
        lambda s: _rename(s, r"^head\.(weight|bias)$", r"head.fc.\1"),
    ),
    # SAIM's blocks
    (
        lambda names, wanted: _has(names, ".attn.q.weight") and _has(wanted, ".attn.qkv.weight"),
        fuse_qkv,
    ),
    # timm's ViT, our own export among them
    (lambda names, wanted: "reg_token" in names and "reg_token" not in wanted, _join_registers),
    (
        lambda names, wanted: _has(names, ".ls1.gamma") and _has(wanted, ".gamma_1"),
        lambda s: _rename(s, r"\.ls(\d)\.gamma$", r".gamma_\1"),
    ),
    (
        lambda names, wanted: _has(names, ".attn.qkv.bias") and _has(wanted, ".attn.q_bias"),
        _split_qkv_bias,
    ),
    (
        lambda names, wanted: _has(names, ".attn.q_bias") and _has(wanted, ".attn.qkv.bias"),
        _fuse_qkv_bias,
    ),
)
