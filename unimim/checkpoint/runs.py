"""Rebuilds the model of a checkpoint from the flags of the run that wrote it."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from modeling_finetune import entry_of
from unimim.checkpoint.files import (
    load_checkpoint,
    metadata_of,
    model_named_in,
    timm_arguments_of,
)
from unimim.checkpoint.loading import PUBLISHED_KEYS
from unimim.cli.flags import build_parser
from unimim.cli.models import build_classifier, build_method, fitting_mask
from unimim.data.views import MEAN_STD


def flags_of(path: str | Path) -> dict[str, Any]:
    """Return the flags that a checkpoint carries; empty for a file that carries none."""
    return load_checkpoint(path, mmap=True).get("args") or {}


def flags_of_export(path: str | Path) -> dict[str, Any]:
    """Return the classifier and sizes of a ViT's exported encoder as flags; empty for other
    files."""
    entry = entry_of(model_named_in(path)) if Path(path).suffix == ".safetensors" else None
    if entry is None or entry_of(entry.classifier) is None:
        return {}
    flags: dict[str, Any] = {"model": entry.classifier}
    mean = metadata_of(path).get("mean")
    if mean is not None:
        is_imagenet = tuple(json.loads(mean)) == MEAN_STD["imagenet"][0]
        flags["imagenet_default_mean_and_std"] = is_imagenet
    timm_arguments = timm_arguments_of(path)
    if entry_of(entry.classifier).kind == "classifier" and timm_arguments:
        sizes = ("embed_dim", "depth", "num_heads", "patch_size")
        flags["input_size"] = timm_arguments["img_size"]
        flags["model_kwargs"] = [f"{name}={timm_arguments[name]}" for name in sizes]
    return flags


def is_pretraining(flags: dict[str, Any]) -> bool:
    """Return whether these are the flags of a pre-training run of this repository."""
    return "mask_type" in flags


def rebuild(
    path: str | Path, argv: Sequence[str] = (), *, model_key: str = PUBLISHED_KEYS, **changes: Any
) -> tuple[nn.Module, Namespace]:
    """Return the method or classifier of a checkpoint, with random weights, and its run's flags.

    The flags in `argv` win over the saved ones, and `changes` win over both. A file without flags
    of its own is taken for a classifier that `argv` describes; an encoder's export tells what
    `argv` leaves open.
    """
    saved = flags_of(path)
    stage = "pretrain" if is_pretraining(saved) else "finetune"
    parser = build_parser(stage)
    parser.set_defaults(**saved or flags_of_export(path))
    args = parser.parse_args(list(argv))
    vars(args).update(changes)
    if stage == "pretrain":
        args.discrete_vae_weight_path = None  # nothing is trained, so no tokenizer is needed
        args.mask_type = fitting_mask(args.model, args.mask_type)
        return build_method(args), args
    # as many class tokens as this file has, not the file that its run began with
    args.resume = ""
    args.finetune = str(path)
    args.model_key = model_key
    return build_classifier(args), args
