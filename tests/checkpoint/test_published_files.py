"""Every kind of published file in every script that reads one: the same weights, or one sentence.

The files are synthetic: a tiny network of this repository, its weights under the published names
(`KEYS`), wrapped and pickled as the project does. The table of docs/engine.md#published-files is
made of `KINDS` and `CONSUMERS`: `python tests/checkpoint/test_published_files.py` prints it.
"""

import copy
import importlib.util
import re
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # pytest has these on its path
    sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (1, 2)]

import pytest
import timm
import torch
from helpers import ROOT, Payload, start
from torch import Tensor, nn

import modeling_pretrain  # noqa: F401  (registers the methods)
import run_class_finetuning
from analysis import common, fourier, visualize
from modeling_backbones import family_of
from modeling_finetune import VisionTransformer, create_model, entry_of
from optim_factory import param_groups
from scripts.tools.extract_backbone import extract
from semantic_segmentation import voc_linear_probe as voc
from unimim.checkpoint.files import load_checkpoint, save_encoder, takes_imagenet_mean_std
from unimim.checkpoint.loading import PUBLISHED_KEYS
from unimim.checkpoint.names import timm_vit_arguments
from unimim.checkpoint.runs import rebuild
from unimim.cli.models import build_classifier
from unimim.cli.options import parse
from unimim.data.views import MEAN_STD
from unimim.engine.session import Origin
from unimim.evaluation.features import build_backbone
from unimim.evaluation.flags import parse_knn
from unimim.openmmlab.checkpoint import load_backbone
from unimim.openmmlab.cnn_backbone import TimmBackbone
from unimim.openmmlab.vit_backbone import VisionTransformerBackbone

State = dict[str, Tensor]
DEPTH = 2
VIT = ["embed_dim=32", f"depth={DEPTH}", "num_heads=2"]
DECODER = ["decoder_embed_dim=24", "decoder_depth=2", "decoder_num_heads=2"]
PROJECTOR = ["projector_hidden_dim=16", "projector_out_dim=8"]
SMALL = ("--input_size", "16", "--patch_size", "4")
NETWORKS = {  # the sizes of other networks, whose patches are their own
    "resnet18": ["channels=[8,8,16,16]"],
    "convnext_tiny": ["depths=[1,1,2,1]", "dims=[8,12,16,24]"],
    "swin_tiny": ["depths=[1,2,1,1]", "embed_dim=8", "num_heads=[1,2,2,4]"],
}

# --------------------------------------------------------------------------------------------------
# Published names: {a,b} and N (the blocks) are alternatives

BLOCK = (
    "norm1.{weight,bias} attn.qkv.weight attn.proj.{weight,bias} norm2.{weight,bias} "
    "mlp.fc1.{weight,bias} mlp.fc2.{weight,bias}"
)
MAE_BLOCK = f"{BLOCK} attn.qkv.bias"
BEIT_BLOCK = f"{BLOCK} attn.q_bias attn.v_bias gamma_1 gamma_2"
TABLE = "attn.relative_position_bias_table attn.relative_position_index"
OPENMMLAB_BLOCK = (
    "ln1.{weight,bias} attn.proj.{weight,bias} ln2.{weight,bias} ffn.layers.0.0.{weight,bias} "
    "ffn.layers.1.{weight,bias}"
)


def blocks(prefix: str, names: str) -> str:
    return " ".join(f"{prefix}.N.{name}" for name in names.split())


EMBEDDING = "cls_token patch_embed.proj.{weight,bias}"
MAE_ENCODER = f"{EMBEDDING} pos_embed {blocks('blocks', MAE_BLOCK)} norm.{{weight,bias}}"
MAE_DECODER = (
    f"decoder_embed.{{weight,bias}} mask_token decoder_pos_embed decoder_norm.{{weight,bias}} "
    f"decoder_pred.{{weight,bias}} {blocks('decoder_blocks', MAE_BLOCK)}"
)
BEIT_ENCODER = f"{EMBEDDING} {blocks('blocks', BEIT_BLOCK)}"
SHARED_TABLE = "rel_pos_bias.relative_position_{bias_table,index}"
OPENMMLAB_VIT = (
    "cls_token pos_embed patch_embed.projection.{weight,bias} ln1.{weight,bias} "
    f"{blocks('layers', OPENMMLAB_BLOCK)}"
)
SPLIT_ATTENTION = "attn.{q,kv}.{weight,bias}"
SEMANTIC_BEIT = "gamma_1 gamma_2 attn.q_bias attn.v_bias attn.q_proj.weight attn.kv_proj.weight"
PROJECTORS = (
    "projectors.{0,3,6}.weight projectors.{1,4}.{weight,bias} "
    "projectors.{1,4,7}.{running_mean,running_var,num_batches_tracked}"
)
KEYS = {
    "mae": f"{MAE_ENCODER} {MAE_DECODER}",
    "mae_encoder": MAE_ENCODER,
    "mae_classifier": f"{EMBEDDING} pos_embed {blocks('blocks', MAE_BLOCK)} "
    "{fc_norm,head}.{weight,bias}",
    "conmim": f"{BEIT_ENCODER} {SHARED_TABLE} mask_token norm.{{weight,bias}} "
    f"lm_head.{{weight,bias}} {PROJECTORS}",
    "beit": f"{BEIT_ENCODER} {SHARED_TABLE} mask_token norm.{{weight,bias}} "
    "lm_head.{weight,bias}",
    "beit_classifier": f"{BEIT_ENCODER} {blocks('blocks', TABLE)} {{fc_norm,head}}.{{weight,bias}}",
    "semaim": f"{MAE_ENCODER} gaussian_blur.weight prediction_head.{{fc1,fc2}}.{{weight,bias}} "
    + blocks("query_blocks", BLOCK.replace("attn.qkv.weight", "attn.{q,k,v}.{weight,bias}")),
    "semanticmim_beit": f"{OPENMMLAB_VIT} {blocks('layers', SEMANTIC_BEIT)} mask_token "
    + blocks("extra_layers", f"{OPENMMLAB_BLOCK} {SEMANTIC_BEIT}"),
    "semanticmim_maskfeat": f"{OPENMMLAB_VIT} {blocks('layers', SPLIT_ATTENTION)} mask_token "
    + blocks("extra_layers", f"{OPENMMLAB_BLOCK} {SPLIT_ATTENTION}"),
    "semanticmim_classifier": "cls_token pos_embed patch_embed.projection.{weight,bias} "
    f"ln2.{{weight,bias}} {blocks('layers', f'{OPENMMLAB_BLOCK} {SPLIT_ATTENTION}')}",
    "openmixup_vit": f"{OPENMMLAB_VIT} "
    + blocks("layers", f"gamma_1 gamma_2 attn.qkv.weight attn.q_bias attn.v_bias {TABLE}"),
}


def published_names(kind: str) -> set[str]:
    """Return the names of a list in `KEYS` for a network of DEPTH blocks."""
    names = KEYS[kind].replace(".N.", f".{{{','.join(map(str, range(DEPTH)))}}}.").split()
    while any("{" in name for name in names):
        found = []
        for name in names:
            inside = re.search(r"\{([^}]*)\}", name)
            choices = inside[1].split(",") if inside else [None]
            found += [name if c is None else name.replace(inside[0], c, 1) for c in choices]
        names = found
    return set(names)


def renamed(state: State, *rules: tuple[str, str | Callable]) -> State:
    """Return the tensors with one substitution after another in their names."""
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def with_indices(state: State) -> State:
    """Add the constants that BEiT's tables are published with."""
    index = torch.zeros(17, 17, dtype=torch.int64)
    found = {}
    for name, value in state.items():
        found[name] = value
        if name.endswith("relative_position_bias_table"):
            found[name.replace("bias_table", "index")] = index
    return found


# --------------------------------------------------------------------------------------------------
# What the projects put around the weights


class CfgNode(dict):
    """As yacs' class: a dict with attributes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__["__immutable__"] = True


class HistoryBuffer:
    """As mmengine's class: arrays, and methods of its own in a dict."""

    def __init__(self):
        self._log_history, self._count_history = np.arange(3.0), np.ones(3)
        self._statistics_methods = {"mean": self.mean}

    def mean(self) -> float:
        return float(self._log_history.mean())


FOREIGN = {"yacs.config": CfgNode, "mmengine.logging.history_buffer": HistoryBuffer}


def save(content: Any, path: Path) -> None:
    """Write a file whose classes are of modules that are not there when it is read."""
    parents = {name.partition(".")[0]: None for name in FOREIGN}
    before = {name: sys.modules.get(name) for name in parents | FOREIGN}
    for name in parents:
        sys.modules[name] = types.ModuleType(name)
    for name, cls in FOREIGN.items():
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], cls.__name__, cls)
        cls.__module__ = name
    try:
        torch.save(content, path)
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def openmmlab(state: State, **more: Any) -> dict[str, Any]:
    """mmcv's file, or with `more` mmengine's; either counts finished epochs."""
    return {"meta": {"epoch": 8, "iter": 80}, "state_dict": state, **more}


def mmengine(state: State) -> dict[str, Any]:
    hub = {
        "log_scalars": {"train/loss": HistoryBuffer()},
        "runtime_info": {"iter": np.float64(80)},
        "resumed_keys": {},
    }
    return openmmlab(state, message_hub=hub, param_schedulers=[])


def simmim(state: State) -> dict[str, Any]:
    node = CfgNode({"MODEL": CfgNode({"TYPE": "swin"}), "DATA": CfgNode({"IMG_SIZE": 192})})
    return {"model": state, "max_accuracy": 0.0, "epoch": 7, "config": node, "lr_scheduler": {}}


def mae(state: State) -> dict[str, Any]:
    args = Namespace(model="mae_vit_tiny_patch16", mask_ratio=0.75, norm_pix_loss=True, lr=1e-3)
    return {"model": state, "epoch": 7, "scaler": {}, "args": args}


def conmim(state: State) -> dict[str, Any]:
    args = Namespace(
        model="conmim_tiny_patch16_224", mask_type="random", mask_ratio=0.5, input_size=16,
        imagenet_default_mean_and_std=True, rel_pos_bias=True, abs_pos_emb=False,
        layer_scale_init_value=0.1, drop_path=0.0, window_size=(4, 4), patch_size=(4, 4),
    )  # fmt: skip
    return {"model": state, "epoch": 7, "scaler": {}, "args": args}


# --------------------------------------------------------------------------------------------------
# The kinds


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    title: project and file, for the table. model: what is trained here under its name; classifier:
    as which its encoder is fine-tuned. publish: our state dict under the published names, wrapped.
    sizes: of either network; own: of `model` alone. keys: the list of names; under: what all of
    them begin with. has_head: it is a classifier of 10 classes. takes: the consumers that take it,
    the others refuse it. optimizer: how the published AdamW in the
    file, if there is one, groups the parameters. flags: that its network needs.
    """

    title: str
    model: str
    classifier: str
    publish: Callable[[State], dict[str, Any]]
    sizes: tuple[str, ...] = tuple(VIT)
    own: tuple[str, ...] = ()
    keys: str = ""
    under: str = ""
    has_head: bool = False
    takes: str = ""
    optimizer: str = ""
    flags: tuple[str, ...] = ()

    @property
    def mean_std(self) -> str:
        return "inception" if "_pt22k" in self.title else "imagenet"

    @property
    def is_vit(self) -> bool:
        return self.sizes == tuple(VIT)

    def size_flags(self) -> tuple[str, ...]:
        return SMALL if self.is_vit else ("--input_size", "64")

    def size(self) -> int:
        return 16 if self.is_vit else 64


ENCODER = "finetune knn analysis segmentation detection extract"  # what takes any encoder
OF_VIT = f"{ENCODER} voc attention"


def _of_vit(title: str, model: str, classifier: str, publish: Callable, more: str, **rest) -> Kind:
    return Kind(title, model, classifier, publish, takes=f"{OF_VIT} {more}", **rest)


def _of_network(title: str, name: str, publish: Callable, more: str, **rest) -> Kind:
    sizes = tuple(NETWORKS[name])
    takes = f"{ENCODER} {more}"
    return Kind(title, f"a2mim_{name}", name, publish, sizes=sizes, takes=takes, **rest)


TO_OPENMMLAB = (
    (r"patch_embed\.proj\.", "patch_embed.projection."), (r"mask_blocks\.", "extra_layers."),
    (r"(?<![a-z_])blocks\.", "layers."), (r"\.norm(\d)\.", r".ln\1."),
    (r"mlp\.fc1\.", "ffn.layers.0.0."), (r"mlp\.fc2\.", "ffn.layers.1."), (r"^norm\.", "ln1."),
    (r"^fc_norm\.", "ln2."),
)  # fmt: skip


def split_kv(state: State, names: str) -> State:
    """Projections of queries, and of keys and values, as `names` calls them."""
    found = {}
    for name, value in state.items():
        if ".attn.qkv." not in name:
            found[name] = value
            continue
        width = len(value) // 3
        for part, own in zip(names.split(), value.split((width, 2 * width)), strict=True):
            found[name.replace(".qkv.", f".{part}.")] = own
    return found


def parted(state: State, *beginnings: str) -> tuple[State, State]:
    """Return the tensors whose names begin so, and the others."""
    first = {name: value for name, value in state.items() if name.startswith(beginnings)}
    return first, {name: value for name, value in state.items() if name not in first}


def semanticmim_beit(state: State) -> dict[str, Any]:
    head, inside = parted(state, "lm_head.")
    inside = prefixed(renamed(split_kv(inside, "q_proj kv_proj"), *TO_OPENMMLAB), "backbone.")
    head = renamed(head, (r"^lm_head", "head.cls_head"))
    return mmengine(inside | head | {"target_generator.blocks.input.w": torch.ones(1)})


def semanticmim_maskfeat(state: State) -> dict[str, Any]:
    head, inside = parted(state, "hog_head.")
    inside = prefixed(renamed(split_kv(inside, "q kv"), *TO_OPENMMLAB), "backbone.")
    head = renamed(head, (r"^hog_head", "neck.fc"))
    return mmengine(inside | head | {"target_generator.weight_x": torch.ones(3, 1, 3, 3)})


def classifier_of_openmmlab(state: State) -> State:
    """The classifier's names: its head is no part of the backbone."""
    head, inside = parted(state, "head.", "fc.")
    return prefixed(inside, "backbone.") | renamed(head, (r"^(head|fc)\.", "head.fc."))


def semanticmim_classifier(state: State) -> dict[str, Any]:
    head, inside = parted(state, "head.")
    inside = renamed(split_kv(inside, "q kv"), *TO_OPENMMLAB)
    return mmengine(classifier_of_openmmlab(inside | head))


def of_pixels(state: State, rules: tuple = (), *, fix: Callable[[State], State] = dict) -> State:
    """A2MIM's whole network: backbone by `rules`, token and neck."""
    inside, others = parted(state, "backbone.")
    inside = renamed(inside, (r"^backbone\.", ""))
    others = renamed(
        others, (r"^inject\.", "backbone."), (r"^neck\.pred\.", "neck.decoder_pred.0.")
    )
    return prefixed(fix(renamed(inside, *rules)), "backbone.") | others


def a2mim_vit(state: State) -> dict[str, Any]:
    return openmmlab(of_pixels(state, TO_OPENMMLAB, fix=with_indices))


def a2mim_vit_classifier(state: State) -> dict[str, Any]:
    head, inside = parted(state, "head.")
    rules = [rule for rule in TO_OPENMMLAB if "fc_norm" not in rule[0]]
    return openmmlab(classifier_of_openmmlab(with_indices(renamed(inside, *rules)) | head))


TO_CONVNEXT = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."), (r"\.conv_dw\.", ".depthwise_conv."),
    (r"\.mlp\.fc(\d)\.", r".pointwise_conv\1."), (r"^head\.norm\.", "norm3."),
)  # fmt: skip


def earlier_stage(found: re.Match) -> str:
    return f"{found[1]}.{int(found[2]) - 1}.downsample."


TO_OPENMIXUP_SWIN = (
    (r"^(layers)\.(\d)\.downsample\.", earlier_stage), (r"^layers\.", "stages."),
    (r"\.attn\.", ".attn.w_msa."), (r"mlp\.fc1\.", "ffn.layers.0.0."), (r"^norm\.", "norm3."),
    (r"mlp\.fc2\.", "ffn.layers.1."), (r"^patch_embed\.proj\.", "patch_embed.projection."),
)  # fmt: skip


def channels_first(state: State) -> State:
    """The columns of OpenMixup's merging: (C, row, column) in place of timm's (column, row, C)."""
    found = {}
    for name, value in state.items():
        if ".downsample." in name:
            value = value.unflatten(-1, (2, 2, -1)).transpose(-3, -2).movedim(-1, -3).flatten(-3)
        found[name] = value
    return found


def openmixup_swin(state: State) -> dict[str, Any]:
    return openmmlab(of_pixels(state, TO_OPENMIXUP_SWIN, fix=channels_first))


def simmim_names(state: State, rules: tuple = (), fix: Callable = dict) -> dict[str, Any]:
    """SimMIM's own files: the backbone is its encoder, the neck its decoder."""
    whole = of_pixels(state, rules, fix=fix)
    return simmim(
        renamed(whole, (r"^backbone\.", "encoder."), (r"^neck\.decoder_pred\.", "decoder."))
    )


def simmim_swin(state: State) -> dict[str, Any]:
    file = simmim_names(state, ((r"^(layers)\.(\d)\.downsample\.", earlier_stage),))
    file["model"]["encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4)
    file["model"]["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    return file


def simmim_swin_classifier(state: State) -> dict[str, Any]:
    rules = ((r"^(layers)\.(\d)\.downsample\.", earlier_stage), (r"^head\.fc\.", "head."))
    return simmim(renamed(state, *rules))


def semaim(state: State) -> dict[str, Any]:
    """On several GPUs; `epoch` counts finished ones."""
    return {"epoch": 8, "state_dict": prefixed(state, "module."), "model": "aim_base"}


def dino(state: State) -> dict[str, Any]:
    teacher = prefixed(state, "backbone.") | {"head.mlp.0.weight": torch.ones(4, 32)}
    student = prefixed({k: v + 1 for k, v in teacher.items()}, "module.")
    args = Namespace(arch="vit_small", patch_size=4, epochs=300)
    return {"student": student, "teacher": teacher, "epoch": 300, "args": args}


def moco_v3(state: State) -> dict[str, Any]:
    head = {"head.0.weight": torch.ones(8, 32), "head.1.running_mean": torch.ones(8)}
    whole = prefixed(state | head, "base_encoder.")
    whole |= prefixed({k: v + 1 for k, v in state.items()}, "momentum_encoder.")
    return {"epoch": 300, "arch": "vit_small", "state_dict": prefixed(whole, "module.")}


def with_dead_head(state: State) -> State:
    """ConMIM's own files have BEiT's head, which nothing uses."""
    return with_indices(state) | {
        "lm_head.weight": torch.ones(9, 32),
        "lm_head.bias": torch.ones(9),
    }  # fmt: skip


MAE, BEIT, MIM = "vit_tiny_patch16_224", "beit_tiny_patch16_224", "mim_vit_tiny_patch16_224"
SEMANTIC = "beit_tiny_patch16_224_abs_pos"
KINDS = {
    "conmim": _of_vit(
        "ConMIM, pre-training: `checkpoint-799.pth`, `checkpoint_copy-799.pth`",
        "conmim_tiny_patch16_224", BEIT, lambda s: conmim(with_dead_head(s)), "resume optimizer",
        own=tuple(PROJECTOR), keys="conmim", optimizer="beit",
    ),
    "conmim_classifier": _of_vit(
        "ConMIM, fine-tuned", BEIT, BEIT,
        lambda s: {"model": with_indices(s), "args": Namespace(
            model=BEIT, imagenet_default_mean_and_std=True, nb_classes=10, input_size=16)},
        "eval", keys="beit_classifier", has_head=True,
    ),
    "mae": _of_vit(
        "MAE, pre-training, whole: `mae_pretrain_vit_base_full.pth`, `mae_visualize_vit_large.pth`",
        "mae_tiny_patch16_224", MAE, mae, "reconstruct resume optimizer", own=tuple(DECODER),
        keys="mae", optimizer="mae",
    ),
    "mae_encoder": _of_vit(
        "MAE, encoder: `mae_pretrain_vit_base.pth`", "mae_tiny_patch16_224", MAE,
        lambda s: {"model": parted(s, "decoder", "mask_token")[1]},
        "", own=tuple(DECODER), keys="mae_encoder",
    ),
    "mae_classifier": _of_vit(
        "MAE, SemMAE, fine-tuned: `mae_finetuned_vit_base.pth`", MAE, MAE,
        lambda s: {"model": s}, "eval", keys="mae_classifier", has_head=True,
    ),
    "semmae": _of_vit(
        "SemMAE, pre-training", "semmae_tiny_patch16_224", MAE, mae,
        "reconstruct resume optimizer", own=tuple(DECODER), keys="mae", optimizer="mae",
        flags=("--part_source", "random", "--num_parts", "3"),
    ),
    "semaim": _of_vit(
        "SemAIM, SAIM, pre-training: `aim_base.*.pth`", "semaim_tiny_patch16_224", MAE, semaim,
        "reconstruct resume optimizer", keys="semaim",
        own=("query_depth=2", "gaussian_kernel_size=9", "gaussian_sigma=1"),
        under="module.", optimizer="mae",
    ),
    "beit": _of_vit(
        "BEiT, pre-training: `beit_base_patch16_224_pt22k.pth`",
        "beit_tiny_patch16_224_8k_vocab", BEIT, lambda s: {"model": with_indices(s)}, "resume",
        own=("vocab_size=64",), keys="beit",
        flags=("--mask_type", "random", "--discrete_vae_weight_path", str(
            ROOT / "tests/reference_cases/dalle_encoder/tiny_hid8/tensors.safetensors")),
    ),
    "beit_classifier": _of_vit(
        "BEiT, fine-tuned: `beit_base_patch16_224_pt22k_ft22k.pth`", BEIT, BEIT,
        lambda s: {"model": with_indices(s)}, "eval", keys="beit_classifier", has_head=True,
    ),
    "simmim_vit": _of_vit(
        "SimMIM, pre-training of ViT: `ckpt_epoch_*.pth`", "simmim_vit_tiny_patch16_224", BEIT,
        lambda s: simmim_names(s, fix=with_indices), "reconstruct resume optimizer",
        own=("rel_pos_bias=shared", "pos_embed=none"), optimizer="simmim",
    ),
    "simmim_swin": replace(
        _of_network("SimMIM, pre-training of Swin: `ckpt_epoch_*.pth`", "swin_tiny", simmim_swin,
                    "reconstruct resume optimizer", optimizer="simmim"),
        model="simmim_swin_tiny",
    ),
    "simmim_swin_classifier": replace(
        _of_network("SimMIM, fine-tuned Swin", "swin_tiny", simmim_swin_classifier, "eval",
                    has_head=True),
        model="swin_tiny",
    ),
    "a2mim_vit": _of_vit(
        "A2MIM, OpenMixup, pre-training of ViT", "a2mim_vit_tiny_patch16_224", MIM, a2mim_vit,
        "reconstruct resume optimizer", own=("mask_layer=1", "mask_init=1e-6"), optimizer="mmcv",
    ),
    "a2mim_vit_classifier": _of_vit(
        "A2MIM, OpenMixup, fine-tuned ViT", MIM, MIM, a2mim_vit_classifier, "eval", has_head=True,
    ),
    "a2mim_resnet": _of_network(
        "A2MIM, OpenMixup, pre-training of ResNet", "resnet18", lambda s: openmmlab(of_pixels(s)),
        "reconstruct resume optimizer", optimizer="mmcv",
    ),
    "a2mim_resnet_backbone": _of_network(
        "A2MIM, OpenMixup, backbone of ResNet alone", "resnet18",
        lambda s: {"state_dict": {k.removeprefix("backbone."): v for k, v in s.items()
                                  if k.startswith("backbone.")}, "author": "openmixup"}, "",
    ),
    "a2mim_resnet_classifier": replace(
        _of_network("A2MIM, OpenMixup, fine-tuned ResNet", "resnet18",
                    lambda s: openmmlab(classifier_of_openmmlab(s)), "eval", has_head=True),
        model="resnet18",
    ),
    "a2mim_convnext": _of_network(
        "A2MIM, OpenMixup, pre-training of ConvNeXt", "convnext_tiny",
        lambda s: openmmlab(of_pixels(s, TO_CONVNEXT)), "reconstruct resume optimizer",
        optimizer="mmcv",
    ),
    "a2mim_swin": _of_network(
        "A2MIM, OpenMixup, pre-training of Swin", "swin_tiny", openmixup_swin,
        "reconstruct resume", optimizer="mmcv",
    ),
    "semanticmim_beit": _of_vit(
        "SemanticMIM in BEiT's form: `epoch_300.pth`", "semanticmim_beit_tiny_patch16_224",
        SEMANTIC, semanticmim_beit, "resume", own=("vocab_size=64", "num_cls_tokens=3"),
        optimizer="mmcv",
        keys="semanticmim_beit", under="backbone.",
        flags=("--mask_type", "random", "--discrete_vae_weight_path", str(
            ROOT / "tests/reference_cases/dalle_encoder/tiny_hid8/tensors.safetensors")),
    ),
    "semanticmim_maskfeat": _of_vit(
        "SemanticMIM in MaskFeat's form: `epoch_300.pth`", "semanticmim_maskfeat_tiny_patch16_224",
        MAE, semanticmim_maskfeat, "resume", own=("num_cls_tokens=3",), optimizer="mmcv",
        keys="semanticmim_maskfeat", under="backbone.",
    ),
    "semanticmim_classifier": _of_vit(
        "SemanticMIM, fine-tuned: `epoch_100.pth`", MAE, MAE, semanticmim_classifier, "eval",
        keys="semanticmim_classifier", under="backbone.", has_head=True,
    ),
    "timm": _of_vit(
        "timm's ViT", MAE, MAE, lambda s: {k: v for k, v in s.items() if k[:4] != "head"}, "",
        keys="mae_encoder", sizes=(*VIT,),
    ),
    "dino": _of_vit("DINO: `dino_vitbase16_pretrain_full_checkpoint.pth`", MAE, MAE, dino, ""),
    "moco_v3": _of_vit("MoCo v3: `vit-b-300ep.pth.tar`", MAE, MAE, moco_v3, ""),
}  # fmt: skip
CONSUMERS = {
    "finetune": "`--finetune`",
    "eval": "`--eval --resume`",
    "knn": "k-NN, linear probe",
    "voc": "VOC probe",
    "attention": "pictures: attention, orders",
    "reconstruct": "pictures: reconstruct",
    "analysis": "analyses",
    "segmentation": "segmentation",
    "detection": "detection",
    "extract": "`extract_backbone.py`",
    "resume": "pre-training `--resume`",
    "optimizer": "with its AdamW",
}

# --------------------------------------------------------------------------------------------------
# Networks and files


@dataclass
class Sample:
    """A file of a kind, the network whose weights it holds, and the classifier with its encoder,
    loaded by name; `printed` returns what a test has printed so far."""

    kind: Kind
    path: str
    source: nn.Module
    reference: nn.Module
    printed: Callable[[], str] = str


def options_of(words: tuple[str, ...], size: int, is_vit: bool) -> dict[str, Any]:
    pairs = dict(word.split("=") for word in words)
    sizes = {"input_size": size, "patch_size": 4} if is_vit else {"input_size": size}
    return sizes | {k: _value(v) for k, v in pairs.items()}


def _value(word: str) -> Any:
    try:
        return eval(word, {}) if word[0] in "[0123456789" else word
    except (NameError, SyntaxError):
        return word


def randomized(network: nn.Module) -> nn.Module:
    """Move every tensor of weights away from where it begins, so that a lost one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
    return network.eval()


def source_of(kind: Kind) -> nn.Module:
    options = options_of((*kind.sizes, *kind.own), kind.size(), kind.is_vit)
    if entry_of(kind.model).kind != "method":
        options |= {"num_classes": 10}
        if kind.is_vit and not kind.has_head:
            options |= {"num_classes": 0, "global_pool": "token"}
        if kind.title.startswith("MoCo") or kind.title.startswith(("DINO", "timm")):
            options |= {"pos_embed": "learned"}
    return randomized(create_model(kind.model, **options))


def encoder_of(source: nn.Module) -> State:
    """The tensors of the network's encoder under the classifier's names, a shared table in each
    block."""
    state = {k.removeprefix("backbone."): v for k, v in source.state_dict().items()}
    table = state.get("rel_pos_bias.relative_position_bias_table")
    for block in range(DEPTH if table is not None else 0):
        state[f"blocks.{block}.attn.relative_position_bias_table"] = table
    return state


def reference_of(kind: Kind, source: nn.Module) -> nn.Module:
    """The classifier without a head whose norm, after all tokens, is that of the file if any."""
    options = options_of(kind.sizes, kind.size(), kind.is_vit) | {"num_classes": 0}
    state = encoder_of(source)
    if kind.is_vit:
        tokens = state["cls_token"].shape[1]
        options |= {"global_pool": "token", "num_cls_tokens": tokens}
    model = create_model(kind.classifier, **options)
    if kind.is_vit:
        for name in ("norm", "fc_norm"):
            has_norm = f"{name}.weight" in state
            setattr(model, name, nn.LayerNorm(32, eps=1e-6) if has_norm else nn.Identity())
    missing = model.state_dict().keys() - state.keys()
    assert missing <= {"gaussian_blur.weight"}, missing
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval()


@pytest.fixture(scope="module")
def sample_of(tmp_path_factory) -> Callable[[str], Sample]:
    made: dict[str, Sample] = {}

    def make(name: str) -> Sample:
        if name not in made:
            kind = KINDS[name]
            torch.manual_seed(0)
            source = source_of(kind)
            content = kind.publish(dict(source.state_dict()))
            if kind.optimizer:
                content["optimizer"] = published_optimizer(kind, content, source)
            named = re.findall(r"`([^`*]+\.pth[^`*]*)`", kind.title) or [f"{name}.pth"]
            path = tmp_path_factory.mktemp(name) / named[-1]
            save(content, path)
            made[name] = Sample(kind, str(path), source, reference_of(kind, source))
        return made[name]

    return make


def features(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(network, VisionTransformer):
            return network.forward_features(images)
        return family_of(network).feature_map(network, images)


def images_for(kind: Kind) -> Tensor:
    side = kind.size()
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def same_features(network: nn.Module, sample: Sample) -> None:
    images = images_for(sample.kind)
    ours, theirs = features(network.eval(), images), features(sample.reference, images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Consumers


def classifier_flags(kind: Kind, *flags: str) -> list[str]:
    return ["--model", kind.classifier, *kind.size_flags(), *flags, "--model_kwargs", *kind.sizes]


def finetune(sample: Sample, folder: Path) -> None:
    flags = ["--data_set", "digits", "--device", "cpu", "--finetune", sample.path]
    args = parse("finetune", classifier_flags(sample.kind, *flags))
    args.nb_classes = 10
    model = build_classifier(args)
    run_class_finetuning.load_finetune(args, model)
    same_features(model, sample)
    if sample.kind.has_head:
        images = images_for(sample.kind)
        torch.testing.assert_close(model.eval()(images), sample.source(images), rtol=0, atol=1e-5)


def evaluate(sample: Sample, folder: Path) -> None:
    """Logits of --eval --resume, and of --eval --finetune."""
    images = images_for(sample.kind)
    for flag in ("--finetune", "--resume"):
        flags = ["--data_set", "digits", "--eval", flag, sample.path]
        args = parse("finetune", classifier_flags(sample.kind, *flags))
        args.nb_classes = 10
        model = build_classifier(args)
        if flag == "--resume":
            origin = Origin(Path(sample.path), load_checkpoint(sample.path))
            origin.load_weights(model, None, "model_ema")
        elif sample.kind.has_head:
            run_class_finetuning.load_finetune(args, model)
        else:
            with pytest.raises(ValueError, match=r"--eval --finetune .* random classifier"):
                run_class_finetuning.load_finetune(args, model)
            continue
        torch.testing.assert_close(model.eval()(images), sample.source(images), rtol=0, atol=1e-5)


def knn(sample: Sample, folder: Path) -> None:
    images = images_for(sample.kind)
    for pool in ("--cls_token", "--global_pool"):
        args = parse_knn(classifier_flags(sample.kind, pool, "--finetune", sample.path))
        found = build_backbone(args)(images)
        tokens = features(sample.reference, images)
        if not sample.kind.is_vit:
            expected = tokens.mean((2, 3))
        else:
            tokens, count = sample.reference.norm(tokens), sample.reference.num_prefix_tokens
            of_class, of_patches = tokens[:, :count].mean(1), tokens[:, count:].mean(1)
            normed = sample.reference.fc_norm(of_patches)
            expected = of_class if pool == "--cls_token" else normed
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def voc_probe(sample: Sample, folder: Path) -> None:
    sizes = ["--input_size", "16", "--eval_size", "16", "--patch_size", "4"]
    more = ["--finetune", sample.path, "--data_path", str(folder), "--layer_indices", "-1"]
    args = voc.parse(
        ["--model", sample.kind.classifier, *sizes, *more, "--model_kwargs", *sample.kind.sizes]
    )
    found = voc.build_backbones(args, torch.device("cpu"))["val"](images_for(sample.kind))
    tokens = sample.reference.norm(features(sample.reference, images_for(sample.kind)))
    expected = tokens[:, sample.reference.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def attention(sample: Sample, folder: Path) -> None:
    flags = [*classifier_flags(sample.kind), "--data_set", "digits"]
    found, args = visualize.load_vit(sample.path, PUBLISHED_KEYS, flags)
    images = images_for(sample.kind)
    expected = sample.reference.attention_maps(images)
    if entry_of(sample.kind.model).kind == "method":  # by the method's name, too
        own, _ = visualize.load_vit(sample.path, PUBLISHED_KEYS, method_flags(sample.kind))
        torch.testing.assert_close(own.eval().attention_maps(images), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.eval().attention_maps(images), expected, rtol=0, atol=1e-5)
    maps, wanted = (
        visualize.order_maps(found, images),
        visualize.order_maps(sample.reference, images),
    )
    torch.testing.assert_close(maps, wanted, rtol=0, atol=1e-4)
    assert args.imagenet_default_mean_and_std == (sample.kind.mean_std == "imagenet")


def method_flags(kind: Kind, *flags: str) -> list[str]:
    model = kind.model if entry_of(kind.model).kind == "method" else "mae_tiny_patch16_224"
    sizes = ["--model", model, *kind.size_flags(), "--data_set", "digits", *kind.flags, *flags]
    if not kind.is_vit or "mim_vit" in model:
        sizes += ["--mask_type", "random_mps32", "--mask_patch_size", str(kind.size() // 2)]
    if not kind.is_vit:
        sizes += ["--model_kwargs", "patch_size=null", *kind.sizes, *kind.own]
        return sizes
    return [*sizes, "--model_kwargs", *kind.sizes, *kind.own]


def reconstruct(sample: Sample, folder: Path) -> None:
    flags = method_flags(sample.kind, "--checkpoint", sample.path, "--images", "1")
    own, rest = visualize.parse(["reconstruct", "--output", "x.png", *flags])
    drawn: list[tuple] = []
    original = visualize.reconstruction_grid
    try:  # the pixels that are drawn, not the drawing
        visualize.reconstruction_grid = lambda *given: drawn.append(given)
        visualize.reconstruct(own, rest)
    finally:
        visualize.reconstruction_grid = original
    method, batch, normalize = drawn[0]
    # the same settings of the loss and of what is drawn
    plain = {k: v for k, v in vars(method).items() if isinstance(v, bool | int | float)}
    vars(sample.source).update(plain)
    for part in ("target", "masking"):  # with the options that the flags have given them
        setattr(sample.source, part, getattr(method, part, None))
    panels = []
    for network in (method, sample.source):
        torch.manual_seed(0)
        panels.append(network.eval().reconstruct(normalize(batch)))
    for ours, theirs in zip(*panels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def analysis(sample: Sample, folder: Path) -> None:
    flags = classifier_flags(sample.kind, "--checkpoint", sample.path, "--device", "cpu")
    args = fourier.parse(flags)
    name = sample.kind.classifier
    network = common.load_network(args, "it", sample.path, name, num_classes=0)
    same_features(network.features, sample)
    assert network.mean_std == MEAN_STD[sample.kind.mean_std]


def segmentation(sample: Sample, folder: Path) -> None:
    kind = sample.kind
    if not kind.is_vit:
        options = options_of(kind.sizes, 64, False) | {"input_size": (64, 64)}
        if "swin" in kind.classifier:
            options["window_size"] = 2
        backbone = TimmBackbone(name=kind.classifier, **options)
        load_backbone(backbone.network, sample.path)
        reference = sample.reference.state_dict()
        compared = [(name, value) for name, value in backbone.network.state_dict().items()]
    else:
        options = options_of(kind.sizes, 16, True)
        reference = sample.reference.state_dict()
        form = {
            "num_cls_tokens": sample.reference.num_prefix_tokens,
            "k_bias": "blocks.0.attn.qkv.bias" in reference,
            "pos_embed": "learned" if "pos_embed" in reference else "none",
            "init_values": 0.1 if "blocks.0.gamma_1" in reference else None,
        }
        has_table = "blocks.0.attn.relative_position_bias_table" in reference
        form["rel_pos_bias"] = "per_block" if has_table else "none"
        backbone = VisionTransformerBackbone(size="base", out_indices=(1,), **options | form)
        load_backbone(backbone, sample.path)
        compared = list(backbone.state_dict().items())
    assert compared and all(torch.equal(value, reference[name]) for name, value in compared)


def detection(sample: Sample, folder: Path) -> None:
    """Positions and bias tables come without the class token's rows."""
    spec = importlib.util.spec_from_file_location("loading", ROOT / "detection/det_ext/loading.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.weights_without_class(sample.path)
    for name, value in sample.reference.state_dict().items():
        if name.startswith(("norm.", "fc_norm.")) and sample.kind.is_vit:
            continue
        name_here = name
        if name.endswith("relative_position_bias_table") and name not in found:
            name_here = "rel_pos_bias.relative_position_bias_table"  # shared; the loader copies it
        if name.endswith("relative_position_bias_table") and sample.kind.is_vit:
            value = value[:-3]
        elif name == "pos_embed":
            value = value[:, sample.reference.num_prefix_tokens :]
        if name.endswith("attn.qkv.bias") and name not in found:
            continue
        assert torch.equal(found[name_here], value), name


def extraction(sample: Sample, folder: Path) -> None:
    """timm reads it strictly and computes the same."""
    weights, _ = extract(sample.path)
    save_encoder(folder / "it.safetensors", weights, {"format": "timm"})
    state = load_checkpoint(folder / "it.safetensors")
    images = images_for(sample.kind)
    if sample.kind.is_vit:
        network = timm.create_model(**timm_vit_arguments(state, (16, 16), 2))
    else:
        network = randomized(copy.deepcopy(sample.reference))
    network.load_state_dict(state, strict=True)
    network.eval()
    expected = features(sample.reference, images)
    if sample.kind.is_vit:
        expected = sample.reference.norm(expected)
        with torch.no_grad():
            found = network.forward_features(images)
    else:
        found = features(network, images)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def resume(sample: Sample, folder: Path) -> None:
    flags = method_flags(sample.kind, "--resume", sample.path, "--epochs", "9", "--opt", "adamw")
    run, position = start("pretrain", folder, *flags)
    counts = {"meta", "epoch"} & load_checkpoint(sample.path).keys()
    assert position.epoch == (8 if counts else 0)
    own, theirs = run.task.state_dict(), sample.source.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    carried = "optimizer" in sample.kind.takes.split()
    said = "weights and optimizer" if carried else "the optimizer begins afresh"
    assert said in sample.printed()
    moments = run.runner.optimizer.state
    names = {id(p): name for name, p in run.task.named_parameters()}
    if carried:
        assert moments
        for parameter, state in moments.items():
            assert (state["exp_avg"] == mark_of(names[id(parameter)])).all()
            assert int(state["step"]) == 11
        trained = [p for p in run.task.parameters() if p.requires_grad]
        assert len(moments) == len(trained)
    else:
        assert not moments


def mark_of(name: str) -> float:
    """A number that tells the moments of a parameter from others."""
    return float(sum(map(ord, name)) % 997)


def has_moments(name: str, value: Tensor) -> bool:
    constants = ("running_mean", "running_var", "target_generator.")
    return value.is_floating_point() and not any(part in name for part in constants)


def published_optimizer(kind: Kind, content: dict[str, Any], source: nn.Module) -> dict[str, Any]:
    """The state of AdamW as the project saves it: parameters in the file's order, in its groups."""
    weights = (
        content.get("model") if isinstance(content.get("model"), dict) else content["state_dict"]
    )
    ours = {value.data_ptr(): name for name, value in source.state_dict().items()}
    trained = {name for name, p in source.named_parameters() if p.requires_grad}
    decays = {}
    for group in param_groups(source, 0.05):
        for parameter in group["params"]:
            decays[id(parameter)] = group["decay"]
    by_name = {name: decays.get(id(p)) for name, p in source.named_parameters()}
    rows = []  # (our name or the file's, shape, decays)
    for key, value in weights.items():
        name = ours.get(value.data_ptr(), key)
        if name in trained:
            rows.append((name, value.shape, by_name[name]))
        elif key.startswith("lm_head.") or (kind.optimizer == "mmcv" and has_moments(key, value)):
            rows.append((key, value.shape, value.ndim > 1))
    if kind.optimizer == "mmcv":
        groups = [[row] for row in rows]
    else:
        order = {"mae": (False, True), "beit": (False, True), "simmim": (True, False)}
        groups = [[row for row in rows if row[2] == d] for d in order[kind.optimizer]]
    state, saved, number = {}, [], 0
    for group in groups:
        decay = 0.05 if group[0][2] else 0.0
        saved.append({"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay})
        saved[-1]["params"] = list(range(number, number + len(group)))
        for name, shape, _ in group:
            if not name.startswith("lm_head.") or name in trained:
                moment = torch.full(shape, mark_of(name))
                state[number] = {"step": 11, "exp_avg": moment, "exp_avg_sq": moment.clone()}
            number += 1
    return {"state": state, "param_groups": saved}


TESTS: dict[str, Callable[[Sample, Path], None]] = {
    "finetune": finetune, "eval": evaluate, "knn": knn, "voc": voc_probe, "attention": attention,
    "reconstruct": reconstruct, "analysis": analysis, "segmentation": segmentation,
    "detection": detection, "extract": extraction, "resume": resume,
}  # fmt: skip
CELLS = [(kind, consumer) for kind in KINDS for consumer in TESTS]


@pytest.mark.parametrize(("kind", "consumer"), CELLS, ids=lambda value: value)
def test_a_published_file_is_taken_whole_or_refused_in_a_sentence(
    sample_of, tmp_path, kind, consumer, capsys
):
    sample = sample_of(kind)
    sample.printed = lambda: capsys.readouterr().out
    if consumer in sample.kind.takes.split():
        TESTS[consumer](sample, tmp_path)
    else:
        with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
            TESTS[consumer](sample, tmp_path)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.keys])
def test_the_files_have_the_published_names(sample_of, kind):
    """Those of the backbone, where the project has one; its heads and targets have others."""
    sample = sample_of(kind)
    content = load_checkpoint(sample.path)
    weights = next(
        (content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)),
        content,
    )
    under = sample.kind.under
    names = {name.removeprefix(under) for name in weights if name.startswith(under)}
    assert names == published_names(sample.kind.keys)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_beside_the_weights_is_not_run(tmp_path, zipped):
    content = {
        "model": {"w": torch.ones(2)},
        "epoch": 3,
        "hook": Payload(tmp_path / "ran"),
        "list": [Payload(tmp_path / "ran"), 1.5],
        "whole": nn.Sequential(nn.Linear(2, 1)),
    }
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()
    assert found["hook"] is None and found["list"] == [None, 1.5] and found["epoch"] == 3
    assert found["model"]["w"].tolist() == [1, 1]
    assert found["whole"].keys() == {"0.weight", "0.bias"}  # a module is its state dict


def test_nothing_in_a_file_is_executed_but_read_as_what_it_holds(sample_of):
    """Of yacs' configuration the values, of mmengine's buffers no more than names."""
    config = load_checkpoint(sample_of("simmim_swin").path)["config"]
    assert config == {"MODEL": {"TYPE": "swin"}, "DATA": {"IMG_SIZE": 192}}
    hub = load_checkpoint(sample_of("semanticmim_beit").path)["message_hub"]
    assert hub["log_scalars"]["train/loss"].keys() <= {
        "_log_history", "_count_history", "_statistics_methods"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"refused: unpickling it would run yacs\.config\.CfgNode"):
        load_checkpoint(sample_of("simmim_swin").path, inert=False)


def test_an_evaluation_uses_the_mean_and_std_of_the_training(tmp_path):
    """BEiT's official classifiers by their names, runs by their flags, unless the user says so."""
    state = {"model": {"w": torch.ones(1)}}
    files = {
        "beit_base_patch16_224_pt22k_ft22kto1k.pth": (state, False),
        "conmim.pth": (state | {"args": Namespace(imagenet_default_mean_and_std=True)}, True),
        "half.pth": (state | {"args": Namespace(imagenet_default_mean_and_std=False)}, False),
        "mae_finetuned_vit_base.pth": (state, None),
    }
    for name, (content, said) in files.items():
        path = tmp_path / name
        torch.save(content, path)
        assert takes_imagenet_mean_std(path) is said
        flags = ["--model", "beit_base_patch16_224", "--eval", "--resume", str(path)]
        taken = parse("finetune", flags)
        run_class_finetuning.settle_mean_std(taken)
        assert taken.imagenet_default_mean_and_std == (said is None or said)  # the recipe's
        given = parse("finetune", [*flags, "--imagenet_default_mean_and_std"])
        run_class_finetuning.settle_mean_std(given)
        assert given.imagenet_default_mean_and_std


def test_pictures_say_by_what_images_are_normalized(tmp_path, capsys):
    """By a file's own flags or metadata, else by the recipe of its model, else as ImageNet."""
    run, position = start("pretrain", tmp_path, "--imagenet_default_mean_and_std")
    run.session.save(position, finished=True)
    vit = create_model("vit_tiny_patch16_224", **options_of(tuple(VIT), 16, True), num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "bare.pth")
    sizes = [*SMALL, "--data_set", "digits", "--model_kwargs", *VIT]
    bare = str(tmp_path / "bare.pth")
    for path, flags, said in (
        (str(tmp_path / "encoder-0.safetensors"), ["--data_set", "digits"], "the file's"),
        (str(tmp_path / "checkpoint-0.pth"), [], "the file's"),
        (
            bare,
            ["--model", "vit_tiny_patch16_224", *sizes],
            "those of the recipe mae_tiny_finetune",
        ),
        (bare, ["--model", "vit_tiny_patch8_224", *sizes], "ImageNet's"),
    ):
        capsys.readouterr()
        _, args = visualize.load_model(path, PUBLISHED_KEYS, flags)
        lines = capsys.readouterr().out.splitlines()
        line = next(line for line in lines if "images are normalized by mean (0.485," in line)
        assert line.endswith(said) and args.imagenet_default_mean_and_std
    with pytest.raises(ValueError, match="does not say which model it holds: name it with --model"):
        visualize.load_model(bare, PUBLISHED_KEYS, [])


def test_a_published_name_of_a_model_is_known_in_files_and_flags(tmp_path):
    state = {"w": torch.ones(1)}
    path = tmp_path / "it.pth"
    for content, flag, ours in (
        (
            mae(state) | {"args": Namespace(model="mae_vit_base_patch16")},
            "",
            "mae_base_patch16_224",
        ),
        ({"state_dict": state, "model": "aim_base"}, "", "semaim_base_patch16_224"),
        ({"model": state}, "mae_vit_base_patch16", "mae_base_patch16_224"),
        ({"model": state}, "vit_base_patch16", "vit_base_patch16_224"),
    ):
        torch.save(content, path)
        words = ["--model", flag] if flag else []
        depth = ["depth=1"] if ours.startswith("vit") else ["depth=1", "embed_dim=64"]
        sizes = ["--model_kwargs", *depth, "num_heads=2"]
        sizes += ["query_depth=1"] if "semaim" in ours else []
        assert rebuild(path, [*words, *sizes])[1].model == ours


def test_what_timm_would_refuse_is_not_written(tmp_path):
    vit = create_model("vit_tiny_patch16_224", **options_of(tuple(VIT), 16, True), num_classes=0)
    state = {k: v for k, v in vit.state_dict().items() if k != "blocks.1.mlp.fc2.bias"}
    for more, said in (
        ({}, "it has no blocks.1.mlp.fc2.bias"),
        ({"adapter.weight": torch.ones(1)}, "whose network has no adapter.weight"),
    ):
        torch.save(state | more, tmp_path / "it.pth")
        with pytest.raises(ValueError, match=f"cannot be written for timm.*{said}"):
            extract(str(tmp_path / "it.pth"))


def test_the_average_of_a_published_training_is_resumed_beside_its_weights(sample_of, tmp_path):
    sample = sample_of("semaim")
    content = load_checkpoint(sample.path)
    average = {k.removeprefix("module."): v + 1 for k, v in content["state_dict"].items()}
    torch.save(content | {"ema_state_dict": average}, tmp_path / "aim_base.temp.pth")
    flags = ("--resume", str(tmp_path / "aim_base.temp.pth"), "--epochs", "9", "--use_ema_model")
    run, _ = start("pretrain", tmp_path / "run", *method_flags(sample.kind, *flags))
    theirs = sample.source.state_dict()
    for name, value in run.task.ema.module.state_dict().items():
        assert torch.equal(value, theirs[name] + 1)
    assert torch.equal(run.task.cls_token, theirs["cls_token"])


# --------------------------------------------------------------------------------------------------
# The table of docs/engine.md


def table() -> str:
    """Return the rows of docs/engine.md#published-files."""
    rows = [f"| file | {' | '.join(CONSUMERS.values())} |", "|---" * (len(CONSUMERS) + 1) + "|"]
    for kind in KINDS.values():
        cells = ["yes" if name in kind.takes.split() else "-" for name in CONSUMERS]
        rows.append(f"| {kind.title} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_the_page_is_made_of_these_lists():
    found = re.findall(r"(?:^\|.*\n)+", (ROOT / "docs/engine.md").read_text(), re.MULTILINE)
    assert table() in found, "python tests/checkpoint/test_published_files.py prints the table"


if __name__ == "__main__":
    sys.stdout.write(table())
