"""Files of the published projects, in their own names and layouts, from a network of ours.

A writer takes a `Source` and returns the contents of one file, or of several by what is added to
the name of the file. What a project's code cannot hold is refused in one sentence.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from unimim.checkpoint.names import StateDict
from unimim.export.source import Source

Rules = Iterable[tuple[str, Any]]
Files = dict[str, dict[str, Any]]  # what is added to the file's name -> contents

_VIT_TO_OPENMMLAB = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."), (r"^blocks\.", "layers."),
    (r"^mask_blocks\.", "extra_layers."), (r"\.norm(\d)\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."), (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^norm\.", "ln1."),
)  # fmt: skip
_SWIN_TO_OPENMMLAB = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"stages.{int(found[1]) - 1}.downsample."),
    (r"^layers\.", "stages."), (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."), (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^norm\.", "norm3."),
)  # fmt: skip
_CONVNEXT_TO_OPENMMLAB = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."), (r"\.conv_dw\.", ".depthwise_conv."),
    (r"\.mlp\.fc(\d)\.", r".pointwise_conv\1."), (r"^head\.norm\.", "norm3."),
)  # fmt: skip


def renamed(state: StateDict, rules: Rules) -> StateDict:
    """Return the state under the names that the rules, one after another, make."""
    changed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        changed[name] = value
    return changed


def below(state: StateDict, prefix: str) -> StateDict:
    """Return the state with `prefix` in front of every name."""
    return {prefix + name: value for name, value in state.items()}


# --------------------------------------------------------------------------------------------------
# What a network is


def is_beit_form(source: Source) -> bool:
    """Return whether it is a ViT whose keys have no bias, or with bias tables: BEiT's form."""
    if not source.is_vit:
        return False
    attention = source.backbone.blocks[0].attn
    tables = attention.relative_position_bias_table is not None or source.backbone.rel_pos_bias
    return attention.q_bias is not None or bool(tables)


def is_mae_form(source: Source) -> bool:
    """Return whether it is a plain ViT: absolute positions, keys with a bias, no layer scale."""
    if not source.is_vit or is_beit_form(source):
        return False
    return source.backbone.pos_embed is not None and source.backbone.blocks[0].gamma_1 is None


def class_tokens(source: Source) -> int:
    return source.backbone.num_prefix_tokens if source.is_vit else 0


def refuse_unless(fits: bool, source: Source, target: str, what: str, others: str) -> None:
    """Raise a ValueError that says what `target` holds, and which targets are left."""
    if not fits:
        raise ValueError(
            f"--to {target} holds {what}, which {source.args.model} is not; use --to {others}"
        )


# --------------------------------------------------------------------------------------------------
# ConMIM and BEiT


def with_indices(source: Source, state: StateDict) -> StateDict:
    """Return the state with the buffers of relative positions, which BEiT's code saves too."""
    state = dict(state)
    for name, module in source.backbone.named_modules():
        if getattr(module, "relative_position_bias_table", None) is not None:
            state[f"{name}.relative_position_index"] = module.relative_position_index
    return state


def _beit_state(source: Source, target: str) -> StateDict:
    fits = is_beit_form(source) and class_tokens(source) == 1
    refuse_unless(
        fits, source, target, "a ViT in BEiT's form with one class token",
        "mae or semaim (a plain ViT), openmixup or mmpretrain (another network), timm, hf",
    )  # fmt: skip
    return with_indices(source, source.encoder())


def conmim(source: Source) -> Files:
    """Return ConMIM's files: {"model": ...} with the teacher's encoder, or with `full` student and
    teacher as `--resume` and `--resume_copy` of its code read them."""
    if not source.full or not source.is_method:
        return {"": {"model": _classifier_or(source, _beit_state(source, "conmim"))}}
    if source.teacher is None or not hasattr(source.network, "projectors"):
        raise ValueError(
            f"--to conmim --full holds ConMIM's student and teacher, which {source.args.model} has "
            "not; leave --full out for the encoder"
        )
    width = source.network.embed_dim
    unused = {"lm_head.weight": torch.zeros(8192, width), "lm_head.bias": torch.zeros(8192)}
    files = {}
    for suffix, state in (("", source.whole()), ("_copy", source.teacher)):
        files[suffix] = {"model": with_indices(source, state) | unused}
    return files


def beit(source: Source) -> Files:
    """Return BEiT's file: {"model": ...}."""
    encoder = _beit_state(source, "beit")
    if source.full and source.is_method:
        if not hasattr(source.network, "lm_head") or hasattr(source.network, "mask_blocks"):
            raise ValueError(
                f"--to beit --full holds BEiT's pre-training network, which {source.args.model} is "
                "not; leave --full out for the encoder"
            )
        return {"": {"model": with_indices(source, source.whole())}}
    return {"": {"model": _classifier_or(source, encoder)}}


def _classifier_or(source: Source, encoder: StateDict) -> StateDict:
    """Return the encoder, with the head of a classifier that is asked for whole."""
    return source.whole() | encoder if source.full else encoder


# --------------------------------------------------------------------------------------------------
# MAE and SemAIM


def _plain_state(source: Source, target: str) -> StateDict:
    fits = is_mae_form(source) and class_tokens(source) == 1
    refuse_unless(
        fits, source, target, "a plain ViT with absolute positions and one class token",
        "conmim or beit (BEiT's form), openmixup or mmpretrain (another network), timm, hf",
    )  # fmt: skip
    return source.encoder()


def mae(source: Source) -> Files:
    """Return MAE's (and SemMAE's) file: {"model": ...}."""
    encoder = _plain_state(source, "mae")
    if source.full and source.is_method:
        if not hasattr(source.network, "decoder_embed"):
            raise ValueError(
                f"--to mae --full holds MAE's encoder and decoder, and {source.args.model} has no "
                "such decoder; leave --full out for the encoder"
            )
        return {"": {"model": source.whole()}}
    return {"": {"model": _classifier_or(source, encoder)}}


def semaim(source: Source) -> Files:
    """Return SemAIM's file: {"state_dict": ...}, with "ema_state_dict" where there is an ema."""
    encoder = _plain_state(source, "semaim")
    if not (source.full and source.is_method):
        return {"": {"state_dict": _classifier_or(source, encoder)}}
    if not hasattr(source.network, "prediction_head"):
        raise ValueError(
            f"--to semaim --full holds SemAIM's pre-training network, which {source.args.model} is "
            "not; leave --full out for the encoder"
        )
    contents = {"state_dict": _both_streams(source, source.whole())}
    if source.teacher is not None:
        contents["ema_state_dict"] = _both_streams(source, source.teacher)
    return {"": contents}


def _both_streams(source: Source, state: StateDict) -> StateDict:
    """Return the state with the shared blocks under the query blocks' names too, as published."""
    if not source.network.share_weight:
        return state
    shared = {name: value for name, value in state.items() if name.startswith("blocks.")}
    return state | below(shared, "query_")


# --------------------------------------------------------------------------------------------------
# SimMIM


def simmim(source: Source) -> Files:
    """Return SimMIM's file: {"model": ...} with names that begin with "encoder."."""
    is_swin = isinstance(source.backbone, SwinTransformer)
    fits = is_swin or (is_beit_form(source) and class_tokens(source) == 1)
    refuse_unless(
        fits, source, "simmim", "a Swin or a ViT in BEiT's form",
        "mae (a plain ViT), openmixup or mmpretrain (a CNN), timm, hf",
    )  # fmt: skip
    encoder = source.encoder()
    if is_swin:  # its merging is at the end of a stage, timm's at the start of the next
        earlier = lambda found: f"layers.{int(found[1]) - 1}.downsample."  # noqa: E731
        encoder = renamed(encoder, ((r"^layers\.(\d+)\.downsample\.", earlier),))
    else:
        encoder = with_indices(source, encoder)
    if not source.full:
        return {"": {"model": below(encoder, "encoder.")}}
    if not source.is_method:
        head = renamed(
            {name: v for name, v in source.whole().items() if name.startswith(("head.", "fc."))},
            ((r"^head\.fc\.", "head."),),
        )
        return {"": {"model": encoder | head}}
    whole = source.whole()
    names = {"inject.mask_token", "neck.pred.weight", "neck.pred.bias"}
    own = {name for name in whole if name.startswith(("inject.", "neck."))}
    if own != names or source.network.inject.place.module != "patch_embed":
        raise ValueError(
            f"--to simmim --full holds a mask token after the patch embedding and one convolution, "
            f"which {source.args.model} differs from; use --to openmixup --full"
        )
    more = {
        "encoder.mask_token": whole["inject.mask_token"],
        "decoder.0.weight": whole["neck.pred.weight"],
        "decoder.0.bias": whole["neck.pred.bias"],
    }
    return {"": {"model": below(encoder, "encoder.") | more}}


# --------------------------------------------------------------------------------------------------
# OpenMixup and OpenMMLab


def rows_first(value: Tensor) -> Tensor:
    """Reorder the last axis of patch merging from (column, row, C) to (C, row, column)."""
    return value.unflatten(-1, (2, 2, -1)).transpose(-3, -2).movedim(-1, -3).flatten(-3)


def openmmlab_backbone(source: Source, state: StateDict, target: str) -> StateDict:
    """Return a ViT, Swin, ConvNeXt or ResNet under OpenMMLab's names, without a prefix."""
    backbone = source.backbone
    if source.is_vit:
        return renamed(state, _VIT_TO_OPENMMLAB)
    if isinstance(backbone, SwinTransformer):
        merged = {}
        for name, value in state.items():
            is_merging = ".downsample." in name
            merged[name] = rows_first(value) if is_merging else value
        return renamed(merged, _SWIN_TO_OPENMMLAB)
    if isinstance(backbone, ConvNeXt):
        return renamed(state, _CONVNEXT_TO_OPENMMLAB)
    refuse_unless(
        isinstance(backbone, ResNet), source, target, "a ViT, Swin, ConvNeXt or ResNet",
        "timm, hf, onnx or torch_export",
    )  # fmt: skip
    return state


def openmixup(source: Source) -> Files:
    """Return OpenMixup's (A2MIM's) file: {"state_dict": ...} with "backbone." in the names."""
    return {"": {"meta": {}, "state_dict": _openmmlab_state(source, "openmixup")}}


def mmpretrain(source: Source) -> Files:
    """Return OpenMMLab's file, which is also SemanticMIM's: {"state_dict": ...}."""
    return {"": {"meta": {}, "state_dict": _openmmlab_state(source, "mmpretrain")}}


def _openmmlab_state(source: Source, target: str) -> StateDict:
    if hasattr(source.network, "mask_blocks") and target == "mmpretrain":
        return _semanticmim_state(source)
    backbone = openmmlab_backbone(source, source.encoder(), target)
    if target == "mmpretrain":
        backbone = renamed(backbone, ((r"^fc_norm\.", "ln2."),))
    state = below(backbone, "backbone.")
    if not source.full:
        return state
    whole = source.whole()
    if not source.is_method:
        heads = {}
        for name, value in whole.items():
            if name.startswith(("head.", "fc.")) and not name.startswith("head.norm."):
                heads[re.sub(r"^(head\.fc|head|fc)\.", "head.fc.", name)] = value
        return state | heads
    if not hasattr(source.network, "neck"):
        raise ValueError(
            f"--to {target} --full holds SimMIM's, A2MIM's or SemanticMIM's pre-training network, "
            f"not {source.args.model}'s; leave --full out for the encoder"
        )
    own = {name: v for name, v in whole.items() if name.startswith(("inject.", "neck."))}
    decoder = "decoder_pred" if source.network.fills_input else "decoder"  # A2MIM's, SimMIM's
    rules = (
        (r"^inject\.", "backbone."), (r"^neck\.pred\.", f"neck.{decoder}.0."),
        (r"^neck\.decoder\.(conv|ln)\.", r"neck.decoder.conv.0.\1."),
    )  # fmt: skip
    return state | renamed(own, rules)


def _semanticmim_state(source: Source) -> StateDict:
    """Return SemanticMIM's names, whose projection to queries is apart from keys and values."""
    state = source.state()
    plain_keys = is_beit_form(source)
    queries, others = ("q_proj", "kv_proj") if plain_keys else ("q", "kv")
    split = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attn\.)qkv\.(weight|bias)", name)
        if found is None:
            split[name] = value
            continue
        width = len(value) // 3
        split[f"{found[1]}{queries}.{found[2]}"] = value[:width]
        split[f"{found[1]}{others}.{found[2]}"] = value[width:]
    heads = {name: v for name, v in split.items() if name.startswith(("lm_head.", "hog_head."))}
    inside = {name: value for name, value in split.items() if name not in heads}
    named = below(renamed(inside, _VIT_TO_OPENMMLAB), "backbone.")
    rules = ((r"^lm_head\.", "head.cls_head."), (r"^hog_head\.", "neck.fc."))
    return named | renamed(heads, rules)


WRITERS = {
    "conmim": conmim,
    "beit": beit,
    "mae": mae,
    "semaim": semaim,
    "simmim": simmim,
    "openmixup": openmixup,
    "mmpretrain": mmpretrain,
}
