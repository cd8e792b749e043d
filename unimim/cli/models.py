"""Builds the networks that the flags name."""

from argparse import Namespace
from typing import Any

import torch
from torch import nn

import modeling_backbones  # noqa: F401  (registers its networks)
from modeling_finetune import create_model, entry_of, list_models, registered_flags
from unimim.checkpoint.files import model_named_in
from unimim.checkpoint.loading import class_tokens
from unimim.cli.flags import options_as_flags
from unimim.cli.options import given, model_kwargs
from unimim.cli.published import MODELS
from unimim.data.views import image_mean_std
from unimim.errors import did_you_mean
from unimim.flag import RunFacts
from unimim.logs import log


def build_method(args: Namespace) -> nn.Module:
    """Return the method that --model names, with the flags that were given."""
    check_is_known(args.model, "pretrain")
    entry = entry_of(args.model)
    if entry and entry.kind != "method":
        methods = [name for name in list_models() if entry_of(name).classifier == args.model]
        use = f": use {', '.join(methods)}" if methods else "; --list_models shows those"
        raise ValueError(
            f"--model {args.model} is a classifier, not a pre-training method fine-tuned as it{use}"
        )
    listed = entry.flags if entry else ()
    facts = RunFacts(image_mean_std(args))
    options = {
        flag.option or flag.name: flag.value(getattr(args, flag.name), facts)
        for flag in registered_flags()
        if flag in listed or not flag.optional
    }
    return _build(args, shared_options(args, bias="shared") | options)


def fitting_mask(model: str, mask_type: str) -> str:
    """Return the --mask_type of a run's file, or the model's own in place of one that the model
    refuses: older files hold the default of models that did not ask for it."""
    entry = entry_of(model)
    form = entry.classes[0] if entry and entry.classes else None
    refuses = hasattr(form, "refusal") and form.refusal(mask_type, form.own_target)
    return form.own_mask if refuses else mask_type


def build_classifier(args: Namespace) -> nn.Module:
    """Return the classifier that --model names."""
    check_is_classifier(args.model)
    options = {
        "num_classes": args.nb_classes,
        "drop": args.drop,
        "attn_drop": args.attn_drop_rate,
        "global_pool": "avg" if args.use_mean_pooling else "token",
        "init_scale": args.init_scale,
        "num_cls_tokens": weights_class_tokens(args),
    }
    return _build(args, shared_options(args, bias="per_block") | options)


def check_is_known(model: str, stage: str) -> None:
    """Raise a ValueError with the nearest names of this stage, published ones among them, if there
    is no such model."""
    if entry_of(model) is not None:
        return
    known = {*MODELS[stage]}
    for name in list_models():
        if (entry_of(name).kind == "method") == (stage == "pretrain"):
            known.add(name)
    raise ValueError(
        f"--model {model} is unknown here{did_you_mean(model, known)} --list_models shows the "
        "models"
    )


def check_is_classifier(model: str) -> None:
    """Raise a ValueError that names the classifier if the model is a pre-training method, or the
    nearest names if it is none at all."""
    check_is_known(model, "finetune")
    entry = entry_of(model)
    if entry and entry.kind == "method":
        raise ValueError(
            f"--model {model} is a pre-training method; its encoder is fine-tuned and evaluated as "
            f"--model {entry.classifier}"
        )


def warn_of_other_variant(path: str, model: str) -> None:
    """Log which classifier takes a method's encoder whole, if `model` is of another variant."""
    held = model_named_in(path)
    entry = entry_of(held)
    if entry is None or entry.kind != "method":
        return
    variants = [name.partition("_")[0] for name in (entry.classifier, model)]
    if variants[0] != variants[1]:
        log.warning(
            "%s holds %s, which is the %s variant: use --model %s instead of %s",
            path, held, variants[0], entry.classifier, model,
        )  # fmt: skip


def shared_options(args: Namespace, bias: str) -> dict[str, Any]:
    """Return the options that pre-training and fine-tuning share; `bias` is the kind of relative
    position bias that --rel_pos_bias switches on."""
    return {
        "init_values": args.layer_scale_init_value,
        "drop_path": args.drop_path,
        "pos_embed": "learned" if args.abs_pos_emb else None,
        "rel_pos_bias": {None: None, True: bias, False: "none"}[args.rel_pos_bias],
        "attn": args.attn,
        "grad_checkpointing": args.grad_checkpointing,
    }


def _build(args: Namespace, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(args.seed)
    with options_as_flags():
        return create_model(args.model, **{**given(options), **model_kwargs(args)})


def weights_class_tokens(args: Namespace) -> int | None:
    """Return how many class tokens the model must have for the weights that it will get; None: its
    own number."""
    if args.resume:
        return class_tokens(args.resume)
    if args.finetune:
        return class_tokens(args.finetune, model_key=args.model_key, prefix=args.model_prefix)
    return None
