"""The flags of run_tokenizer.py."""

import argparse
from argparse import Namespace

from unimim.cli import options
from unimim.cli.flags import add_data_flags, add_engine_flags, add_optimizer_flags, add_run_flags
from unimim.cli.options import parse_flags
from unimim.tokenizer.files import KINDS

DEFAULTS = {
    "epochs": 3, "lr": 1e-3, "min_lr": 1e-4, "weight_decay": 0.0, "warmup_epochs": 0,
    "clip_grad": 1.0, "save_ckpt_freq": 1,
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of run_tokenizer.py."""
    parser = argparse.ArgumentParser(
        description="Trains a tokenizer of images for BEiT and SemanticMIM",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _tokenizer_flags(parser)
    _vae_flags(parser)
    _kmeans_flags(parser)
    # those of pre-training, but for --resume_copy, which has no meaning here
    for add, stage in ((add_data_flags, "pretrain"), (add_optimizer_flags, "pretrain"),
                       (add_engine_flags, "pretrain"), (add_run_flags, "finetune")):  # fmt: skip
        add(parser, stage)
    parser.set_defaults(**DEFAULTS)
    return parser


def _tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--kind", choices=KINDS, default="dvae",
        help="dvae: a discrete VAE in DALL-E's form; kmeans: the nearest of centers of patches",
    )  # fmt: skip
    group.add_argument("--vocab_size", type=int, default=8192, help="number of visual tokens")
    group.add_argument(
        "--input_size", type=int, default=112, help="image side in pixels; BEiT at 224: 112"
    )
    group.add_argument(
        "--patch_size", type=int, default=8,
        help="side in pixels of what a token stands for; of a discrete VAE a power of 2",
    )  # fmt: skip


def _vae_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("discrete VAE")
    group.add_argument(
        "--n_hid", type=int, default=64, help="channels of the first group; DALL-E: 256"
    )
    group.add_argument("--blocks_per_group", type=int, default=2)
    group.add_argument("--tau_start", type=float, default=1.0, help="temperature at first")
    group.add_argument("--tau_end", type=float, default=0.0625, help="temperature at last")
    group.add_argument(
        "--tau_fraction", type=float, default=0.75, help="of the run, in which it falls"
    )
    group.add_argument(
        "--kl_weight", type=float, default=5e-3, help="of the divergence from uniform tokens"
    )
    group.add_argument(
        "--kl_fraction", type=float, default=0.05, help="of the run, in which it rises from 0"
    )


def _kmeans_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("k-means")
    group.add_argument(
        "--kmeans_patches", type=int, default=200_000, help="patches to cluster, of all processes"
    )
    group.add_argument("--kmeans_iterations", type=int, default=10, help="Lloyd's iterations")
    group.add_argument(
        "--kmeans_teacher", metavar="PATH", default=None,
        help="cluster the normalized features that this frozen DINO or CLIP model, a file or its "
        "name in timm, gives the patches, in place of their pixels",
    )  # fmt: skip


def parse_tokenizer(argv: list[str] | None = None) -> Namespace:
    """Defaults < --recipe < --config < command line. Exits with argparse's message on bad flags."""
    return parse_flags(build_parser(), argv, options.validate, validate, stage="tokenizer")


def validate(args: Namespace) -> None:
    """Refuse values that cannot work, each in one sentence."""
    for name in ("input_size", "patch_size", "blocks_per_group", "kmeans_iterations"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.vocab_size < 2:
        raise ValueError(f"--vocab_size must be at least 2, not {args.vocab_size}")
    if args.input_size % args.patch_size:
        raise ValueError(
            f"--input_size {args.input_size} is not a multiple of --patch_size {args.patch_size}"
        )
    if args.kind == "kmeans" and args.kmeans_patches < args.vocab_size:
        raise ValueError(
            f"--kmeans_patches {args.kmeans_patches} are too few for --vocab_size {args.vocab_size}"
        )
    if args.kind == "dvae":
        _validate_vae(args)
    if not args.output_dir and not args.dry_run:
        raise ValueError("--output_dir is not set; the tokenizer is written there")


def _validate_vae(args: Namespace) -> None:
    if args.patch_size.bit_count() != 1:
        raise ValueError(
            f"--patch_size {args.patch_size} is not a power of 2; use one, or --kind kmeans"
        )
    if args.n_hid < 4 or args.n_hid % 4:
        raise ValueError(f"--n_hid {args.n_hid} is not a multiple of 4")
    if not 0 < args.tau_end <= args.tau_start:
        raise ValueError(
            f"--tau_end {args.tau_end} must be positive and at most --tau_start {args.tau_start}"
        )
    for name in ("tau_fraction", "kl_fraction"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name)} must lie above 0 and not above 1")
    if args.kl_weight < 0:
        raise ValueError(f"--kl_weight {args.kl_weight} must not be negative")
