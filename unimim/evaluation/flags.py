"""The flags of what evaluates frozen features: the network, k-NN and the linear probe."""

import argparse
from argparse import Namespace

from modeling_finetune import ATTENTION_KERNELS
from unimim.checkpoint.loading import PUBLISHED_KEYS
from unimim.cli import options
from unimim.cli.flags import (
    add_data_flags,
    add_default_flags,
    add_engine_flags,
    add_optimizer_flags,
    add_process_flags,
    add_run_flags,
    add_size_flags,
)
from unimim.cli.options import parse_flags
from unimim.cli.parser import FlagParser
from unimim.data.views import PROBE_CROPS
from unimim.evaluation.features import NORMS
from unimim.evaluation.linear_probe import head_names

# --- the network ----------------------------------------------------------------------------------


def add_network_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of the frozen network and its weights."""
    group = parser.add_argument_group("backbone")
    group.add_argument(
        "--model", default="vit_base_patch16_224", help="a registered model, as for fine-tuning"
    )
    add_size_flags(group)
    group.add_argument("--attn", choices=ATTENTION_KERNELS, default="auto", help="attention kernel")
    group.add_argument(
        "--finetune",
        "--pretrained_weights",
        default="",
        help="checkpoint, as for fine-tuning; empty: random weights",
    )
    group.add_argument(
        "--model_key", default=PUBLISHED_KEYS, help="where the weights are in that file"
    )
    group.add_argument(
        "--model_prefix", default="", help="prefix of the weights' names in that file"
    )
    return group


def add_backbone_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the network, and of how its tokens become one vector."""
    group = add_network_flags(parser)
    pools = group.add_mutually_exclusive_group()
    pools.add_argument(
        "--cls_token",
        dest="pool",
        action="store_const",
        const="cls",
        default="cls",
        help="the feature is the class token, where there is one",
    )
    pools.add_argument(
        "--global_pool",
        dest="pool",
        action="store_const",
        const="avg",
        default="cls",
        help="the feature is the mean of the patch tokens",
    )
    group.add_argument(
        "--feature_norm",
        choices=NORMS,
        default="trained",
        help="trained: the checkpoint's own norm, none if it has none; plain: a layer norm without "
        "weights after pooling un-normed tokens, as published for --global_pool; none: these are "
        "pooled alone",
    )
    group.add_argument(
        "--crop_pct",
        type=float,
        default=None,
        help="of evaluation images; None: 0.875, 1 from 384 px",
    )
    group.add_argument(
        "--feature_cache",
        default="",
        metavar="FOLDER",
        help="keep features there, and read them if they are there",
    )


# --- k-NN -----------------------------------------------------------------------------------------


def knn_parser() -> argparse.ArgumentParser:
    """Return the parser of run_knn.py."""
    parser = FlagParser(
        description="k-NN accuracy of a pre-trained network's features",
    )
    add_backbone_flags(parser)
    group = parser.add_argument_group("k-NN")
    group.add_argument(
        "--knn_k",
        type=int,
        nargs="+",
        default=[10, 20, 100],
        metavar="K",
        help="neighbors that vote",
    )
    group.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[0.07],
        metavar="T",
        help="votes are exp(similarity / T)",
    )
    group.add_argument("--batch_size", type=int, default=128, help="images per process and step")
    add_data_flags(parser, "knn")
    add_process_flags(parser)
    group = parser.add_argument_group("run")
    add_default_flags(group)
    group.add_argument(
        "--output_dir", default="", help="folder of knn.csv; empty: nothing is saved"
    )
    group.add_argument("--seed", type=int, default=0, help="of random weights")
    group.add_argument("--dry_run", action="store_true", help="check the flags and exit")
    # as published: no autocast, and the mean and std that the recipes pre-train with
    parser.set_defaults(
        precision="fp32", imagenet_default_mean_and_std=True, enable_deepspeed=False
    )
    return parser


def _check_knn(args: Namespace) -> None:
    for name in ("knn_k", "temperature"):
        if min(getattr(args, name)) <= 0:
            raise ValueError(f"--{name} must be positive, not {min(getattr(args, name))}")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {args.batch_size}")


def parse_knn(argv: list[str] | None = None) -> Namespace:
    """Return the flags of run_knn.py: defaults < --recipe < --config < command line."""
    return parse_flags(knn_parser(), argv, _check_knn, stage="knn")


# --- linear probe ---------------------------------------------------------------------------------


def linear_parser() -> argparse.ArgumentParser:
    """Return the parser of run_linear_probing.py."""
    parser = FlagParser(
        description="Linear probing of a frozen network, for one learning rate or several at once",
    )
    add_backbone_flags(parser)
    _probe_flags(parser)
    # those of pre-training where the others have what a linear layer does not: layer decay
    for add, stage in ((add_data_flags, "finetune"), (add_optimizer_flags, "pretrain"),
                       (add_engine_flags, "finetune"), (add_run_flags, "finetune")):  # fmt: skip
        add(parser, stage)
    # docs/methods/semaim.md#k-nn-and-linear-probe; without --warmup_epochs the warm-up is the
    # published 10 of 90 epochs
    parser.set_defaults(
        batch_size=512,
        epochs=90,
        opt="momentum",
        opt_betas=None,
        lr=None,
        blr=0.1,
        lr_schedule="mae",
        min_lr=0.0,
        warmup_epochs=None,
        weight_decay=0.0,
        imagenet_default_mean_and_std=True,
    )
    return parser


def _probe_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("linear probe")
    group.add_argument(
        "--lr_sweep", type=float, nargs="+", default=None, metavar="LR",
        help="in place of --lr: one head for each lr, trained side by side; --min_lr is that of "
        "the largest lr, the others fall to the same fraction of theirs",
    )  # fmt: skip
    group.add_argument(
        "--crop_scale", type=float, nargs=2, default=(0.08, 1.0), metavar=("MIN", "MAX"),
        help="fraction of the area that a training crop keeps",
    )  # fmt: skip
    group.add_argument(
        "--train_crop", choices=PROBE_CROPS, default="area",
        help="area: MAE's, by --crop_scale; short_side: SemAIM's, as large as the image allows",
    )  # fmt: skip
    group.add_argument(
        "--no_aug",
        action="store_true",
        help="train on features of images as for evaluation, computed once",
    )
    group.add_argument(
        "--no_batch_norm", dest="batch_norm", action="store_false",
        help="no batch normalization in front of the linear layer: SemanticMIM's probe",
    )  # fmt: skip
    group.add_argument("--eval", action="store_true", help="evaluate --resume and exit")


def parse_linear(argv: list[str] | None = None) -> Namespace:
    """Return the flags of run_linear_probing.py: defaults < --recipe < --config < command line."""
    args = parse_flags(linear_parser(), argv, options.validate, _check_linear, stage="linear")
    if args.lr_sweep:
        args.lr_sweep = sorted(args.lr_sweep)  # the optimizer's state goes by position
        args.lr = max(args.lr_sweep)
        args.blr = None
    if args.warmup_epochs is None:
        args.warmup_epochs = round(args.epochs / 9)
    return args


def _check_linear(args: Namespace) -> None:
    if args.lr_sweep:
        if min(args.lr_sweep) <= 0 or len(set(head_names(args.lr_sweep))) < len(args.lr_sweep):
            raise ValueError(
                f"--lr_sweep takes different positive learning rates, not {args.lr_sweep}"
            )
        if args.lr is not None and args.lr != max(args.lr_sweep):
            raise ValueError(
                f"--lr_sweep {args.lr_sweep} says every lr: leave --lr {args.lr:g} out"
            )
        if args.clip_grad and len(args.lr_sweep) > 1:
            raise ValueError(
                "--clip_grad would clip the heads of --lr_sweep together: run them one by one"
            )
    if args.feature_cache and not args.no_aug:
        raise ValueError(
            "--feature_cache holds features of images without augmentation: give --no_aug too"
        )
