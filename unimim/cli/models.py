"""Builds the networks that the flags name."""

from argparse import Namespace

import torch
from torch import nn

import modeling_backbones  # noqa: F401  (registers its networks)
from modeling_finetune import create_model, options_of
from unimim.checkpoint.loading import class_tokens
from unimim.cli.options import given, model_kwargs
from unimim.data.views import image_mean_std

SEMAIM_FLAGS = (  # named as the options of the model
    "permutation_type", "attention_type", "order_precision", "query_depth", "share_weight", "prediction_head_type",
    "gaussian_kernel_size", "gaussian_sigma", "loss_type", "predict_feature", "target_model", "target_precision",
    "use_ema_model",
)  # fmt: skip


def build_method(args: Namespace) -> nn.Module:
    """The method that --model names, with the flags that were given."""
    flags = {
        "init_values": args.layer_scale_init_value,
        "drop_path": args.drop_path,
        "pos_embed": "learned" if args.abs_pos_emb else None,
        "rel_pos_bias": {None: None, True: "shared", False: "none"}[args.rel_pos_bias],
        "temperature": args.temp,
        "t_momentum": args.t_momentum,
        "mask_ratio": args.mask_ratio if "mask_ratio" in options_of(args.model) else None,
        "norm_pix_loss": args.norm_pix_loss,
        "num_parts": args.num_parts,
        "mask_lambda": args.mask_lambda,
        "mask_lambda_power": args.mask_lambda_power,
        **{name: getattr(args, name) for name in SEMAIM_FLAGS},
        "num_cls_tokens": args.num_cls_tokens,
        "use_bottleneck": args.use_bottleneck,
        "separate_mask": None if args.separate_mask_ratio is None else True,
        "discrete_vae_weight_path": args.discrete_vae_weight_path
        if takes_visual_tokens(args)
        else None,
        "image_mean_std": image_mean_std(args) if args.target_mean_std == "own" else None,
        "attn": args.attn,
        "grad_checkpointing": args.grad_checkpointing,
    }
    torch.manual_seed(args.seed)
    method = create_model(args.model, **{**given(flags), **model_kwargs(args)})
    if not hasattr(method, "views"):
        raise ValueError(
            f"--model {args.model} is a classifier, not a pre-training method: see --list_models"
        )
    return method


def takes_visual_tokens(args: Namespace) -> bool:
    """Whether the method predicts visual tokens; published commands of others name a tokenizer
    too."""
    return "discrete_vae_weight_path" in options_of(args.model)


def build_classifier(args: Namespace) -> nn.Module:
    """The classifier that --model names."""
    flags = {
        "num_classes": args.nb_classes,
        "init_values": args.layer_scale_init_value,
        "drop": args.drop,
        "attn_drop": args.attn_drop_rate,
        "drop_path": args.drop_path,
        "pos_embed": "learned" if args.abs_pos_emb else None,
        "rel_pos_bias": {None: None, True: "per_block", False: "none"}[args.rel_pos_bias],
        "global_pool": "avg" if args.use_mean_pooling else "token",
        "init_scale": args.init_scale,
        "num_cls_tokens": weights_class_tokens(args),
        "attn": args.attn,
        "grad_checkpointing": args.grad_checkpointing,
    }
    torch.manual_seed(args.seed)
    return create_model(args.model, **{**given(flags), **model_kwargs(args)})


def weights_class_tokens(args: Namespace) -> int | None:
    """How many class tokens the model must have for the weights that it will get; None: its own
    number."""
    if args.resume:
        return class_tokens(args.resume)
    if args.finetune:
        return class_tokens(args.finetune, model_key=args.model_key, prefix=args.model_prefix)
    return None
