"""Rebuilds the model of a checkpoint from the flags of the run that wrote it, or from --model."""

import argparse
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
    takes_imagenet_mean_std,
    timm_arguments_of,
)
from unimim.checkpoint.loading import PUBLISHED_KEYS
from unimim.cli.flags import build_parser
from unimim.cli.models import build_classifier, build_method, fitting_mask
from unimim.cli.options import explicit_flags, recipe_values
from unimim.cli.published import MODELS
from unimim.data.views import MEAN_STD, MeanStd, image_mean_std
from unimim.logs import log
from unimim.recipes import recipe_for

MEAN_STD_FLAGS = ("imagenet_default_mean_and_std", "mean", "std")


def flags_of(path: str | Path) -> dict[str, Any]:
    """Return the flags of a run of this repository, or of BEiT's or ConMIM's, which are the same;
    empty for a file that carries none or those of another project."""
    return known_flags(load_checkpoint(path, mmap=True))


def known_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a loaded checkpoint's flags as `flags_of` does."""
    flags = checkpoint.get("args")
    ours = "engine" in checkpoint or "imagenet_default_mean_and_std" in (flags or {})
    return flags if ours and isinstance(flags, dict) else {}


def flags_of_method(path: str | Path, model: str) -> dict[str, Any]:
    """Return the flags in another project's file that set options of this method by the same
    names."""
    flags = load_checkpoint(path, mmap=True).get("args")
    own = {flag.name for flag in entry_of(model).flags}
    return {name: flags[name] for name in own & flags.keys()} if isinstance(flags, dict) else {}


def flags_of_export(path: str | Path) -> dict[str, Any]:
    """Return the classifier and sizes of a ViT's exported encoder as flags; empty for other
    files."""
    entry = entry_of(model_named_in(path)) if Path(path).suffix == ".safetensors" else None
    if entry is None or entry_of(entry.classifier) is None:
        return {}
    flags: dict[str, Any] = {"model": entry.classifier}
    flags |= mean_std_flags(path)
    if "mean" in flags:
        flags["in_chans"] = len(flags["mean"])
    timm_arguments = timm_arguments_of(path)
    if entry_of(entry.classifier).kind == "classifier" and timm_arguments:
        sizes = ("embed_dim", "depth", "num_heads", "patch_size")
        flags["input_size"] = timm_arguments["img_size"]
        flags["model_kwargs"] = [f"{name}={timm_arguments[name]}" for name in sizes]
    return flags


def exported_mean_std(path: str | Path) -> MeanStd | None:
    """Return mean and std of the images of an exported encoder; None for any other file."""
    metadata = metadata_of(path)
    if "mean" not in metadata:
        return None
    return tuple(json.loads(metadata["mean"])), tuple(json.loads(metadata["std"]))


def mean_std_flags(path: str | Path) -> dict[str, Any]:
    """Return the flags of mean and std that a network was trained with; empty if nothing tells
    them."""
    exported = exported_mean_std(path)
    if exported is not None:
        flags = {MEAN_STD_FLAGS[0]: exported == MEAN_STD["imagenet"]}
        named = exported in MEAN_STD.values()
        return flags if named else flags | {"mean": [*exported[0]], "std": [*exported[1]]}
    flags = load_checkpoint(path, mmap=True).get("args")
    if isinstance(flags, dict) and MEAN_STD_FLAGS[0] in flags:
        return {name: flags.get(name) for name in MEAN_STD_FLAGS}
    said = takes_imagenet_mean_std(path)
    return {} if said is None else {MEAN_STD_FLAGS[0]: said}


def trained_mean_std(path: str | Path) -> MeanStd | None:
    """Return mean and std of the images that a file's network was trained on; None if nothing
    tells them."""
    exported = exported_mean_std(path)
    found = mean_std_flags(path)
    if exported is not None or not found:
        return exported
    flags = load_checkpoint(path, mmap=True).get("args") or {}
    channels = {name: flags[name] for name in ("in_chans", "keep_channels") if name in flags}
    return image_mean_std(Namespace(**found, **channels))


def is_pretraining(flags: dict[str, Any]) -> bool:
    """Return whether these are the flags of a pre-training run."""
    entry = entry_of(str(flags.get("model", "")))
    return entry.kind == "method" if entry else "mask_type" in flags


def rebuild(
    path: str | Path, argv: Sequence[str] = (), *, model_key: str = PUBLISHED_KEYS, **changes: Any
) -> tuple[nn.Module, Namespace]:
    """Return the method or classifier of a checkpoint, with random weights, and its run's flags.

    The flags in `argv` win over the saved ones, and `changes` win over both. A file without flags
    of its own holds what --model in `argv` names, with the settings of that model's recipe; an
    encoder's export tells what `argv` leaves open.
    """
    saved = flags_of(path) or flags_of_export(path)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", default="")
    given = finder.parse_known_args(argv)[0].model
    model = our_name(given or saved.get("model", "") or named_by_project(path))
    if not model:
        raise ValueError(f"{path} does not say which model it holds: name it with --model")
    stage = "pretrain" if is_pretraining({**saved, "model": model}) else "finetune"
    parser = build_parser(stage)
    parser.set_defaults(**saved or defaults_of(path, model, stage, parser))
    words = [*argv, "--model", model]
    args = parser.parse_args(words)
    vars(args).update(changes)
    tell_mean_std(path, args, explicit_flags(stage, words))
    if stage == "pretrain":
        args.discrete_vae_weight_path = None  # nothing is trained, so no tokenizer is needed
        args.mask_type = fitting_mask(args.model, args.mask_type)
        return build_method(args), args
    # as many class tokens as this file has, not the file that its run began with
    args.resume = ""
    args.finetune = str(path)
    args.model_key = model_key
    return build_classifier(args), args


def our_name(model: str) -> str:
    """Return our name of a model that another project calls so; other names stay."""
    names = MODELS["pretrain"] | MODELS["finetune"]
    return names.get(model, model)


def named_by_project(path: str | Path) -> str:
    """Return the name of the model in another project's file, if it is known here; "" if not."""
    checkpoint = load_checkpoint(path, mmap=True)
    flags = checkpoint.get("args")
    name = flags.get("model", "") if isinstance(flags, dict) else checkpoint.get("model")
    return name if isinstance(name, str) and entry_of(our_name(name)) else ""


def defaults_of(
    path: str | Path, model: str, stage: str, parser: argparse.ArgumentParser
) -> dict[str, Any]:
    """Return the settings of a file without flags of ours: those of its model's recipe, over them
    the method's own flags that it has all the same."""
    recipe = recipe_for(model, stage)
    values = recipe_values(recipe, parser) if recipe else {"imagenet_default_mean_and_std": True}
    said = takes_imagenet_mean_std(path)
    values |= {} if said is None else {"imagenet_default_mean_and_std": said}
    return values | (flags_of_method(path, model) if stage == "pretrain" else {})


def tell_mean_std(path: str | Path, args: Namespace, given: set[str]) -> None:
    """Log by which mean and std images are normalized, and who says so."""
    if "imagenet_default_mean_and_std" in given:
        source = "given"
    elif takes_imagenet_mean_std(path) is not None:
        source = "the file's"
    else:
        stage = "pretrain" if is_pretraining(vars(args)) else "finetune"
        recipe = recipe_for(args.model, stage)
        source = f"those of the recipe {recipe.name}" if recipe else "ImageNet's"
    mean, std = image_mean_std(args)
    log.info("%s: images are normalized by mean %s and std %s, %s", path, mean, std, source)
