"""The command line: flags in labelled groups, and the order in which their values win.

Defaults < the recipe (--recipe NAME, else the model's) < --config FILE.yaml < flags given on the command line.
Flag names are the published ones (specs/conmim.md 7); flags that never had an effect there are accepted and named.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

import utils
from masking_generator import PATCH_ORDERS
from modeling_finetune import ATTENTION_KERNELS, is_of_timm, list_models
from modeling_targets import PREDICTED_FEATURES, TARGET_PRECISIONS
from optim_factory import LR_SCHEDULES, takes_betas
from parallel import has_bf16
from transforms import INTERPOLATIONS
from unimim.recipes import Recipe, by_name, names_for, recipe_for
from utils import log

# Accepted because published commands carry them; they had no effect there either.
LEFTOVERS = {
    "pretrain": ("discrete_vae_type", "warmup_lr", "no_loss_masked"),
    "finetune": ("warmup_lr", "resplit"),
}  # fmt: skip
_LEFTOVER_SWITCHES = ("no_loss_masked", "resplit")


def build_parser(stage: str) -> argparse.ArgumentParser:
    """The parser of `stage`: "pretrain" or "finetune"."""
    titles = {
        "pretrain": "Masked-image-modelling pre-training",
        "finetune": "Fine-tuning and evaluation for classification",
    }
    parser = argparse.ArgumentParser(
        description=titles[stage],
        usage="%(prog)s [flags]; --help lists them",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    stage_flags = {"pretrain": _pretrain_flags, "finetune": _finetune_flags}
    for add in (_model_flags, add_data_flags, add_optimizer_flags, stage_flags[stage], add_engine_flags, add_run_flags):
        add(parser, stage)
    group = parser.add_argument_group("published flags without effect")
    for name in LEFTOVERS[stage]:
        switch = {"action": "store_true"} if name in _LEFTOVER_SWITCHES else {}
        group.add_argument(f"--{name}", default=None, help=argparse.SUPPRESS, **switch)
    return parser


class _Rate(argparse.Action):
    """--lr and --blr replace each other: the one that comes later counts."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.lr = namespace.blr = None
        setattr(namespace, self.dest, values)


def _switch(group, name: str, off: str, *, default: bool | None = True, help: str) -> None:
    group.add_argument(f"--{name}", dest=name, action="store_true", default=default, help=help)
    group.add_argument(f"--{off}", dest=name, action="store_false", default=default, help=f"switches --{name} off")


def _model_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    group = parser.add_argument_group("model")
    name = {"pretrain": "conmim_base_patch16_224", "finetune": "beit_base_patch16_224"}[stage]
    group.add_argument("--model", default=name, help="a registered model; --list_models shows them")
    group.add_argument("--list_models", action="store_true", help="print the registered models and exit")
    group.add_argument("--input_size", type=int, default=None, help="image side in pixels; None is the model's own")
    group.add_argument("--patch_size", type=int, default=None, help="patch side in pixels; None is the model's own")
    group.add_argument(
        "--model_kwargs", nargs="*", default=[], metavar="K=V", help="any constructor option of the model"
    )
    group.add_argument(
        "--layer_scale_init_value", type=float, default=None, help="0 disables layer scale; None: the model's own"
    )
    group.add_argument("--drop_path", type=float, default={"pretrain": 0.0, "finetune": 0.1}[stage])
    group.add_argument("--abs_pos_emb", action="store_true", help="learned absolute positions")
    placement = {"pretrain": "one shared table", "finetune": "one table per block"}[stage]
    _switch(
        group, "rel_pos_bias", "disable_rel_pos_bias", default=None,
        help=f"relative position bias, {placement}; None: the model's own",
    )  # fmt: skip
    group.add_argument("--attn", choices=ATTENTION_KERNELS, default="auto", help="attention kernel; flex: GPUs only")
    group.add_argument(
        "--grad_checkpointing", action="store_true", help="recompute activations: less memory, 1.3x time"
    )
    group.add_argument(
        "--recompute_gelu", choices=("auto", "on", "off"), default="auto",
        help="a fifth less memory by making the GELU again in the backward pass; auto: on a CPU, where it is free",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="torch.compile, block by block")


def add_data_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Where the images come from and how they are read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_set", default=None, choices=("IMNET", "image_folder", "CIFAR", "CIFAR10", "digits", "shapes"),
        help="IMNET: map files beside folders or zips; None: found out from --data_path, or digits without one",
    )  # fmt: skip
    group.add_argument("--data_path", default=None, help="root folder of the data")
    if stage not in ("knn", "analysis"):
        group.add_argument("--train_interpolation", default="bicubic", choices=INTERPOLATIONS)
    add_loader_flags(group)
    if stage == "pretrain":
        group.add_argument(
            "--crop_scale",
            type=float,
            nargs=2,
            default=(0.08, 1.0),
            metavar=("MIN", "MAX"),
            help="share of the area that a crop keeps",
        )
        group.add_argument(
            "--color_jitter", type=float, default=0.0,
            help="range of brightness, contrast and saturation of the whole picture, before the crop; BEiT: 0.4",
        )  # fmt: skip
        group.add_argument(
            "--data_pipeline", choices=("fast", "reference"), default="fast", help="reference: PIL, as published"
        )
        return
    group.add_argument(
        "--eval_data_path", default=None, help="validation folder, where --data_path holds only training images"
    )
    if stage == "analysis":
        return
    group.add_argument("--nb_classes", type=int, default=None, help="number of classes; None is the data set's")
    group.add_argument(
        "--label_fraction", type=float, default=1.0, help="train on this share of each class, the first ones"
    )


def add_loader_flags(group: argparse._ArgumentGroup) -> None:
    """How images are normalised and read, and what becomes of unreadable ones."""
    _switch(
        group, "imagenet_default_mean_and_std", "no_imagenet_default_mean_and_std", default=False,
        help="ImageNet mean and standard deviation instead of 0.5",
    )  # fmt: skip
    group.add_argument("--num_workers", type=int, default=10)
    _switch(group, "pin_mem", "no_pin_mem", help="pinned host memory for faster copies to a GPU")
    group.add_argument(
        "--max_bad_images", type=int, default=100, help="unreadable images that are replaced before the run stops"
    )
    group.add_argument("--strict_data", action="store_true", help="stop at the first unreadable image")


def add_optimizer_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Batch, optimizer and schedules."""
    pretrain = stage == "pretrain"
    group = parser.add_argument_group("optimizer and schedule")
    group.add_argument("--batch_size", type=int, default=64, help="images per process and micro-step")
    group.add_argument(
        "--update_freq", type=int, default=1, help="micro-steps per optimizer step (gradient accumulation)"
    )
    group.add_argument("--epochs", type=int, default=300 if pretrain else 30)
    group.add_argument("--opt", default="adamw", help="adamw, sgd, lamb, lars, ... (timm's names)")
    group.add_argument("--opt_eps", type=float, default=1e-8)
    group.add_argument(
        "--opt_betas", type=float, nargs="+", default=(0.9, 0.98) if pretrain else None, help="None: the optimizer's"
    )
    group.add_argument("--momentum", type=float, default=0.9, help="of SGD's family")
    group.add_argument(
        "--clip_grad", type=float, default=None, help="largest 2-norm of the gradients; None: no clipping"
    )
    group.add_argument("--weight_decay", type=float, default=0.05)
    group.add_argument("--weight_decay_end", type=float, default=None, help="cosine to this value; None: constant")
    group.add_argument(
        "--lr", type=float, default=5e-4, action=_Rate, help="peak learning rate, not scaled by the batch size"
    )
    group.add_argument(
        "--blr", type=float, default=None, action=_Rate, help="in place of --lr: the peak for 256 images a step"
    )
    group.add_argument(
        "--lr_schedule", choices=LR_SCHEDULES, default="cosine",
        help="mae: its warm-up reaches the peak one step later, as in MAE's code; the others are A2MIM's",
    )  # fmt: skip
    group.add_argument("--lr_steps", type=int, nargs="*", default=(), help="of --lr_schedule step: epochs of its steps")
    group.add_argument("--lr_gamma", type=float, default=0.1, help="of --lr_schedule step: factor of each step")
    group.add_argument(
        "--warmup_ratio", type=float, default=0.0,
        help="of --lr_schedule step, cosine_iters, cosine_epochs: what share of the rate the warm-up begins with",
    )  # fmt: skip
    group.add_argument("--min_lr", type=float, default=1e-5 if pretrain else 1e-6)
    group.add_argument("--warmup_epochs", type=int, default=5)
    group.add_argument("--warmup_steps", type=int, default=-1, help="overrides --warmup_epochs if positive")
    if not pretrain:
        group.add_argument("--layer_decay", type=float, default=0.9)
        group.add_argument("--disable_weight_decay_on_rel_pos_bias", action="store_true")


def _pretrain_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    group = parser.add_argument_group("masks")
    group.add_argument("--mask_type", choices=("block", "random_mps32", "random"), default="block")
    group.add_argument("--mask_ratio", type=float, default=0.75, help="of random and random_mps32")
    group.add_argument(
        "--mask_patch_size", type=int, default=None, help="random_mps32: cell side in pixels; None: two patches"
    )
    group.add_argument(
        "--num_mask_patches", type=int, default=None, help="block: patches to mask; None: 75 of 196, scaled"
    )
    group.add_argument("--max_mask_patches_per_block", type=int, default=None)
    group.add_argument("--min_mask_patches_per_block", type=int, default=16)
    group.add_argument(
        "--separate_mask_ratio", type=float, default=None, metavar="RATIO",
        help="SemanticMIM: predict this share of the patches, drawn by itself; None: the hidden ones",
    )  # fmt: skip
    _semanticmim_flags(parser)
    group = parser.add_argument_group("ConMIM; None: the model's own")
    group.add_argument("--temp", type=float, default=None, help="temperature of the contrast")
    group.add_argument(
        "--t_momentum", type=float, default=None, help="teacher momentum at the first step; 1 at the last"
    )
    group = parser.add_argument_group("MAE and SemMAE; None: the model's own")
    _switch(group, "norm_pix_loss", "no_norm_pix_loss", default=None, help="predict each patch normalised by itself")
    group.add_argument(
        "--part_maps", default=None, metavar="PATH", help="folder, zip or array of the images' part maps"
    )
    group.add_argument(
        "--part_source", choices=("maps", "attention_heads", "kmeans", "random"), default="maps",
        help="maps: any that --part_maps holds; attention_heads, kmeans: maps of that kind; random: without meaning",
    )  # fmt: skip
    group.add_argument("--num_parts", type=int, default=None, help="number of parts, the background among them")
    group.add_argument(
        "--mask_lambda", type=float, default=None, help="constant: 1 a share of each part, 0 whole parts"
    )
    group.add_argument(
        "--mask_lambda_power", type=float, default=None, help="from shares to whole parts: 1 - t ** POWER"
    )
    _semaim_flags(parser)


def _semanticmim_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("BEiT, MaskFeat and SemanticMIM; None: the model's own")
    group.add_argument(
        "--discrete_vae_weight_path", default=None, metavar="FILE",
        help="DALL-E's encoder, which gives the visual words: OpenAI's encoder.pkl or OpenMMLab's dalle_encoder.pth",
    )  # fmt: skip
    group.add_argument(
        "--second_input_size", type=int, default=None, help="side of its pictures; None: one word for each patch"
    )
    group.add_argument("--second_interpolation", choices=INTERPOLATIONS, default="lanczos")
    group.add_argument("--num_cls_tokens", type=int, default=None, help="class tokens, through which all has to pass")
    _switch(
        group, "use_bottleneck", "no_bottleneck", default=None,
        help="mask tokens see class tokens only; without, SemanticMIM's baseline",
    )  # fmt: skip


def _semaim_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("SemAIM; None: the model's own")
    group.add_argument(
        "--permutation_type", choices=PATCH_ORDERS, default=None,
        help="order of the patches; zigzag is row-major, raster serpentine; attention_center is SemAIM's",
    )  # fmt: skip
    group.add_argument(
        "--attention_type", choices=("cls", "gap", "self"), default=None,
        help="the map that an attention order follows: similarity to the class token or the mean, or self-attention",
    )  # fmt: skip
    group.add_argument(
        "--order_precision", choices=("fp32", "auto"), default=None, help="of the pass for the map; auto: --precision"
    )
    group.add_argument("--query_depth", type=int, default=None, help="blocks of the query stream")
    _switch(group, "share_weight", "no_share_weight", default=None, help="encoder blocks serve as query blocks")
    group.add_argument("--prediction_head_type", choices=("MLP", "LINEAR"), default=None)
    group.add_argument("--gaussian_kernel_size", type=int, default=None, help="of the blur of the pixels to predict")
    group.add_argument("--gaussian_sigma", type=float, default=None)
    group.add_argument("--loss_type", choices=("L1", "L2"), default=None, help="of pixels")
    group.add_argument(
        "--predict_feature", choices=PREDICTED_FEATURES, default=None,
        help="in place of pixels: features of the network, of its average, of a DINO or a CLIP model",
    )  # fmt: skip
    group.add_argument(
        "--target_model", default=None, metavar="PATH", help="the DINO or CLIP model: a file, or timm's name of it"
    )
    group.add_argument(
        "--target_precision", choices=TARGET_PRECISIONS, default=None, help="of that model; auto: --precision"
    )
    group.add_argument(
        "--target_mean_std", choices=("images", "own"), default="images",
        help="what that model's images are normalised by: as all images, which is as published, or by its own values",
    )  # fmt: skip
    _switch(group, "use_ema_model", "no_use_ema_model", default=None, help="keep an average, which gives the map")


def _finetune_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    group = parser.add_argument_group("starting point")
    group.add_argument("--finetune", default="", help="pre-trained checkpoint: file or https address")
    group.add_argument("--model_key", default="model|module", help="where the weights are in that file")
    group.add_argument("--model_prefix", default="", help="prefix of the weights' names in that file")
    group.add_argument("--init_scale", type=float, default=0.001, help="of the new head")
    _switch(group, "use_mean_pooling", "use_cls", help="mean of patch tokens instead of the class token")
    group = parser.add_argument_group("regularisation")
    group.add_argument("--drop", type=float, default=0.0)
    group.add_argument("--attn_drop_rate", type=float, default=0.0)
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    _switch(
        group, "bce_loss", "no_bce_loss", default=False,
        help="binary cross entropy, summed over the classes, in place of softmax's",
    )  # fmt: skip
    group.add_argument("--color_jitter", type=float, default=0.4, help="only with an empty --aa")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help='RandAugment or AutoAugment policy; "" for none')
    group.add_argument("--reprob", type=float, default=0.25, help="random erasing")
    group.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"))
    group.add_argument("--recount", type=int, default=1)
    group.add_argument(
        "--aug_repeats", type=int, default=1, metavar="N",
        help="repeated augmentation: each image N times in a step, so that an epoch shows one in N",
    )  # fmt: skip
    group.add_argument(
        "--no_aug", action="store_true", help="no crop, flip, --aa, --color_jitter, --reprob: images as for evaluation"
    )
    group.add_argument("--mixup", type=float, default=0.0)
    group.add_argument("--cutmix", type=float, default=0.0)
    group.add_argument("--cutmix_minmax", type=float, nargs=2, default=None)
    group.add_argument("--mixup_prob", type=float, default=1.0)
    group.add_argument("--mixup_switch_prob", type=float, default=0.5)
    group.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"))
    _switch(group, "model_ema", "no_model_ema", default=False, help="keep and evaluate an average of the weights")
    group.add_argument("--model_ema_decay", type=float, default=0.9999)
    group.add_argument(
        "--model_ema_warmup_epochs", type=int, default=0, help="epochs in which the decay rises, from nine tenths"
    )
    group.add_argument("--model_ema_force_cpu", action="store_true")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval", action="store_true", help="evaluate --resume (or --finetune) and exit")
    _switch(group, "dist_eval", "no_dist_eval", help="share the validation images among processes")
    group.add_argument("--disable_eval_during_finetuning", action="store_true")
    group.add_argument("--crop_pct", type=float, default=None)
    group.add_argument(
        "--eval_input_size", type=int, default=None, help="side of validation images; None: that of training images"
    )


def add_process_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Device, precision and the processes: all that a script without training needs of the engine."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="cuda", help="cuda (falls back to cpu where there is none) or cpu")
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 where the hardware has it",
    )
    group.add_argument("--dist_on_itp", action="store_true", help="read the process's place from OpenMPI")
    group.add_argument("--dist_url", default="env://")
    group.add_argument(
        "--dist_timeout", type=float, default=60.0, metavar="MINUTES", help="how long a process waits for the others"
    )
    group.add_argument("--world_size", type=int, default=1, help=argparse.SUPPRESS)
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return group


def add_engine_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Device, precision, DeepSpeed and the processes."""
    group = add_process_flags(parser)
    group.add_argument(
        "--matmul_precision",
        choices=("auto", "highest", "high"),
        default="auto",
        help="of float32 products and convolutions: high takes TF32 on a GPU; auto: high on a GPU, highest on a CPU",
    )
    _switch(group, "sync_bn", "no_sync_bn", default=False, help="batch normalisation over the batches of all processes")
    group.add_argument("--enable_deepspeed", action="store_true")
    group.add_argument("--zero_stage", type=int, choices=(0, 1, 2, 3), default=1)
    group.add_argument(
        "--deepspeed_config", default=None, metavar="FILE.json", help="overrides what the flags would generate"
    )
    group.add_argument(
        "--offload", choices=("optimizer",), default=None, help="keep the optimizer's state and step on the host"
    )
    group.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    group.add_argument(
        "--max_nonfinite",
        type=int,
        default=3,
        help="steps in a row that may be skipped for a non-finite loss or gradient",
    )


def add_recipe_flag(group: argparse._ArgumentGroup) -> None:
    """Adds --recipe, whose values `parse` and `parse_flags` take as defaults."""
    group.add_argument(
        "--recipe", default=None, metavar="NAME",
        help="published settings, --model too; scripts/recipe.sh --list shows them. None: those of the model, if any",
    )  # fmt: skip


def add_run_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Output, log, checkpoints and resuming."""
    group = parser.add_argument_group("run")
    add_recipe_flag(group)
    group.add_argument("--config", default=None, metavar="FILE.yaml", help="flag values; flags on the command line win")
    group.add_argument("--output_dir", default="", help="empty: nothing is saved")
    group.add_argument("--log_dir", default=None, help="tensorboard folder")
    group.add_argument("--wandb", default=None, metavar="PROJECT")
    group.add_argument("--log_every", type=int, default=50, help="steps between lines of the log")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--start_epoch", type=int, default=0)
    group.add_argument(
        "--resume",
        default="",
        help="checkpoint to go on from; a run that SIGTERM, SIGINT or SIGUSR1 stopped has saved one and exits with 75",
    )
    if stage == "pretrain":
        group.add_argument(
            "--resume_copy", default="", help="published checkpoint_copy-*.pth: the teacher that belongs to --resume"
        )
    _switch(group, "auto_resume", "no_auto_resume", help="go on from the newest whole checkpoint in --output_dir")
    _switch(group, "save_ckpt", "no_save_ckpt", help="save checkpoints")
    group.add_argument("--save_ckpt_freq", type=int, default=20, help="epochs between checkpoints")
    group.add_argument(
        "--save_ckpt_steps", type=int, default=0, help="optimizer steps between checkpoints within an epoch; 0: none"
    )
    group.add_argument("--keep_checkpoints", type=int, default=None, metavar="K", help="keep the last K; None: all")
    group.add_argument("--dry_run", action="store_true", help="check the flags, print the configuration and exit")


# ---------------------------------------------------------------------------------------------------------------------
# Resolution


def parse(stage: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line with recipe and config file as defaults. Exits with argparse's message on bad flags."""
    parser = build_parser(stage)
    first, _ = parser.parse_known_args(argv)
    if first.list_models:
        parser.exit(message="\n".join(list_models()) + "\n")
    try:
        overlay = read_config(first.config, parser) if first.config else {}
        parser.set_defaults(**overlay)
        first, _ = parser.parse_known_args(argv)
        recipe = named_recipe(first.recipe, stage) or recipe_for(first.model, stage)
        parser.set_defaults(**{**(recipe_values(recipe, parser) if recipe else {}), **overlay})
        args = parser.parse_args(argv)
        adapt_defaults(args, given=explicit_flags(stage, argv) | overlay.keys(), has_recipe=recipe is not None)
        validate(args)
    except ValueError as error:
        parser.error(str(error))
    args.recipe = recipe.name if recipe else None
    args.other_recipes = () if first.recipe else names_for(args.model, stage, args.recipe)
    return args


def parse_flags(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    *checks: Callable[[argparse.Namespace], None],
    stage: str | None = None,
) -> argparse.Namespace:
    """Of a script whose model has no recipe by itself: defaults < --recipe < --config < command line, then the checks.

    `stage` is that of the recipes which --recipe may name, None without that flag. Exits with argparse's message on bad
    flags.
    """
    config = parser.parse_known_args(argv)[0].config
    try:
        overlay = read_config(config, parser) if config else {}
        parser.set_defaults(**overlay)
        first, _ = parser.parse_known_args(argv)
        recipe = named_recipe(first.recipe, stage) if stage else None
        if recipe:
            parser.set_defaults(**{**recipe_values(recipe, parser), **overlay})
        args = parser.parse_args(argv)
        for check in checks:
            check(args)
    except ValueError as error:
        parser.error(str(error))
    if stage and recipe is None:
        args.other_recipes = names_for(getattr(args, "model", ""), stage)
    return args


def named_recipe(name: str | None, stage: str) -> Recipe | None:
    """The recipe of that name, which must be of this stage; None for None."""
    recipe = by_name(name) if name else None
    if recipe and recipe.stage != stage:
        raise ValueError(f"--recipe {name} is not for this script; use it with {recipe.program}")
    return recipe


def recipe_values(recipe: Recipe, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The values that the recipe's model and flags have for this parser, as if they stood on the command line."""
    bare = copy.deepcopy(parser)
    bare._defaults.clear()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    values = vars(bare.parse_args(recipe.words()))
    if not recipe.model.endswith("*"):  # of a whole family of networks
        values["teacher" if recipe.stage == "parts" else "model"] = recipe.model
    return values


def explicit_flags(stage: str, argv: list[str] | None) -> set[str]:
    """Names of the flags that stand on the command line."""
    parser = build_parser(stage)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def adapt_defaults(args: argparse.Namespace, given: set[str], has_recipe: bool) -> None:
    """Defaults that do not fit what was asked for give way; what the user gave stays, and may be refused later."""
    if "layer_decay" in args and not has_recipe and is_of_timm(args.model):  # they are for ViTs, few networks take them
        args.layer_decay = args.layer_decay if "layer_decay" in given else 1.0
        args.drop_path = args.drop_path if "drop_path" in given else 0.0
    if "warmup_epochs" not in given and args.warmup_epochs >= args.epochs:
        args.warmup_epochs = args.epochs // 5
    if "eval_input_size" in args and "input_size" in given and "eval_input_size" not in given:
        args.eval_input_size = None
    if "opt_betas" not in given and args.opt_betas is not None and not takes_betas(args.opt, len(args.opt_betas)):
        args.opt_betas = None


def read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The values of a YAML file, which must all be flags of this script."""
    if not Path(path).is_file():
        raise ValueError(f"--config {path} does not exist")
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold lines of the form flag: value")
    if ("lr" in values) != ("blr" in values):  # one of them replaces what the recipe says of either
        values = {"lr": None, "blr": None} | values
    known = {action.dest for action in parser._actions}
    if unknown := values.keys() - known:
        raise ValueError(f"--config {path} has names that are no flags: {', '.join(sorted(unknown))}")
    for action in parser._actions:  # argparse checks types of defaults, not choices
        if action.choices and values.get(action.dest, action.default) not in (*action.choices, action.default):
            raise ValueError(f"--config {path}: --{action.dest} is not one of {', '.join(map(str, action.choices))}")
    return values


def validate(args: argparse.Namespace) -> None:
    """Combinations that cannot work, each refused in one sentence."""
    for name in ("batch_size", "update_freq", "epochs", "log_every", "save_ckpt_freq", "aug_repeats"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.enable_deepspeed and not args.output_dir and args.save_ckpt:
        raise ValueError("--enable_deepspeed writes its configuration and checkpoints: give --output_dir")
    separate = getattr(args, "separate_mask_ratio", None)
    if separate is not None and (not 0 < separate < 1 or args.mask_type == "block"):
        raise ValueError(f"--separate_mask_ratio {separate} must lie between 0 and 1 and needs a random --mask_type")
    for name in ("deepspeed_config", "offload"):
        if getattr(args, name) and not args.enable_deepspeed:
            raise ValueError(f"--{name} needs --enable_deepspeed")
    if args.deepspeed_config and not Path(args.deepspeed_config).is_file():
        raise ValueError(f"--deepspeed_config {args.deepspeed_config} does not exist")
    if args.keep_checkpoints is not None and args.keep_checkpoints < 1:
        raise ValueError(f"--keep_checkpoints must be at least 1, not {args.keep_checkpoints}")
    if getattr(args, "lr_schedule", "") == "step" and not args.lr_steps:
        raise ValueError("--lr_schedule step needs --lr_steps, the epochs after which the rate falls")
    mixing = getattr(args, "mixup", 0) or getattr(args, "cutmix", 0) or getattr(args, "cutmix_minmax", None)
    if mixing and args.batch_size % 2:
        raise ValueError(f"--mixup and --cutmix pair images up: --batch_size must be even, not {args.batch_size}")


def model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Constructor options from --model_kwargs (YAML values), --input_size and --patch_size."""
    options = {name: getattr(args, name) for name in ("input_size", "patch_size") if getattr(args, name) is not None}
    for item in args.model_kwargs:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--model_kwargs takes K=V pairs, not {item!r}")
        options[key] = yaml.safe_load(value)
        with contextlib.suppress(ValueError):  # YAML takes 1e-6 for a word
            options[key] = float(options[key]) if isinstance(options[key], str) else options[key]
    return options


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Those flags that have a value; for the others the model's own holds."""
    return {name: value for name, value in flags.items() if value is not None}


def resolve_lr(args: argparse.Namespace) -> None:
    """--blr is for 256 images a step and grows with the effective batch. A script without training has no --lr."""
    if "lr" in args and args.lr is None:
        args.lr = args.blr * effective_batch(args) / 256


def resolve_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Settles --precision auto: bf16 on a GPU that has it, fp32 on a CPU (whose bf16 is only sometimes faster)."""
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" and has_bf16() else "fp32"


def resolve_matmul_precision(args: argparse.Namespace, device: torch.device) -> str:
    """Settles --matmul_precision auto. Scripts without training do not have the flag: they stay exact."""
    if getattr(args, "matmul_precision", "highest") == "auto":
        args.matmul_precision = "high" if device.type == "cuda" else "highest"
    return getattr(args, "matmul_precision", "highest")


def report(args: argparse.Namespace, derived: dict[str, Any]) -> None:
    """Prints the recipe and the derived quantities, and saves the whole configuration as config.yaml."""
    for name in LEFTOVERS["pretrain"] + LEFTOVERS["finetune"]:
        if getattr(args, name, None):
            log.info("--%s is accepted for old commands' sake and has no effect, as in the published code", name)
    others = getattr(args, "other_recipes", ())
    choose = f"; --recipe takes for this model also {', '.join(others)}" if others else ""
    log.info("recipe: %s%s", args.recipe or "none, the flags' defaults", choose)
    for name, value in derived.items():
        log.info("  %-22s %s", name, value)
    if args.output_dir and args.rank == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        utils.write_text(Path(args.output_dir) / "config.yaml", yaml.safe_dump(as_config(args), sort_keys=True))


def as_config(args: argparse.Namespace) -> dict[str, Any]:
    """The effective configuration in plain types; it can be given to --config again."""
    skipped = {"rank", "world_size", "local_rank", "config", "dry_run", "list_models", "deepspeed", "other_recipes"}
    leftovers = {*LEFTOVERS["pretrain"], *LEFTOVERS["finetune"]}
    values = {k: v for k, v in vars(args).items() if k not in skipped | leftovers}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def effective_batch(args: argparse.Namespace) -> int:
    """Images per optimizer step over all processes."""
    return args.batch_size * args.update_freq * args.world_size


def warmup_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Length of the warm-up: --warmup_steps if given, else --warmup_epochs."""
    return args.warmup_steps if args.warmup_steps > 0 else args.warmup_epochs * steps_per_epoch


def derived(args: argparse.Namespace, steps_per_epoch: int) -> dict[str, Any]:
    """The derived quantities of a run: effective batch, steps, warm-up, learning rates."""
    warmup = warmup_steps(args, steps_per_epoch)
    scaled = f"--blr {args.blr:g} x {effective_batch(args)} / 256" if args.blr else "not scaled by the batch size"
    falls = f"cosine to {args.min_lr:g}"
    if args.lr_schedule == "step":
        falls = f"times {args.lr_gamma:g} after epochs {', '.join(map(str, args.lr_steps)) or 'none'}"
    return {
        "effective batch": f"{args.batch_size} x {args.update_freq} x {args.world_size} = {effective_batch(args)}",
        "steps": f"{args.epochs} epochs x {steps_per_epoch} = {args.epochs * steps_per_epoch}",
        "lr": f"0 -> {args.lr:g} in {warmup} steps, {falls}; {scaled}",
        "weight decay": f"{args.weight_decay:g} -> {args.weight_decay_end or args.weight_decay:g}",
        "precision": args.precision,
        "float32 products": {"high": "in TF32", "highest": "exact"}[getattr(args, "matmul_precision", "highest")],
    }
