"""The flags of SemMAE's first stage, and the teacher's and learner's options among them."""

import argparse
from argparse import Namespace
from typing import Any

import torch

from unimim.cli import options
from unimim.cli.flags import add_data_flags, add_engine_flags, add_optimizer_flags, add_run_flags
from unimim.cli.options import model_kwargs, parse_flags
from unimim.cli.parser import FlagParser
from unimim.parts.learning import (
    BACKGROUNDS,
    PART_SOURCES,
    RECONSTRUCTIONS,
    PartLearner,
    Teacher,
)
from unimim.recipes import by_name

RECIPE = "semmae_parts"  # gives the defaults


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of run_part_learning.py."""
    parser = FlagParser(
        description="Learns SemMAE's semantic parts and writes part maps for a data set",
    )
    _teacher_flags(parser)
    _part_flags(parser)
    _map_flags(parser)
    # those of pre-training, but for --resume_copy, which has no meaning here
    for add, stage in ((add_data_flags, "pretrain"), (add_optimizer_flags, "pretrain"),
                       (add_engine_flags, "pretrain"), (add_run_flags, "finetune")):  # fmt: skip
        add(parser, stage)
    parser.set_defaults(**by_name(RECIPE).flags, recipe=RECIPE)
    return parser


def _teacher_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--teacher", default="vit_small_patch16_224.dino",
        help="checkpoint file of a ViT (timm's, DINO's, iBOT's or this repository's naming), or "
        "timm's name of one",
    )  # fmt: skip
    group.add_argument(
        "--teacher_checkpoint", default="", help="weights for a timm name; empty: timm's hub"
    )
    group.add_argument(
        "--teacher_kwargs", nargs="*", default=[], metavar="K=V", help="constructor options of it"
    )
    group.add_argument(
        "--allow_random_teacher",
        action="store_true",
        help="a timm name without its weights, for tests",
    )
    group.add_argument(
        "--input_size", type=int, default=224, help="image side in pixels, for teacher and learner"
    )


def _part_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parts")
    group.add_argument(
        "--num_parts", type=int, default=6, help="foreground parts; the background comes on top"
    )
    group.add_argument(
        "--background", choices=BACKGROUNDS, default="token", help="what makes part 0"
    )
    group.add_argument(
        "--decoder_widths",
        type=int,
        nargs="+",
        default=[256, 128, 64, 32],
        metavar="W",
        help="each next one doubles",
    )
    group.add_argument(
        "--reconstruction", choices=tuple(RECONSTRUCTIONS), default="mse",
        help="how the image that the parts give back is compared",
    )  # fmt: skip
    group.add_argument(
        "--loss_weights", type=float, nargs=3, default=(10.0, 0.1, 0.1), metavar=("R", "D", "B"),
        help="of reconstruction, diversity and balance; B = 0 is the paper's two-term form",
    )  # fmt: skip
    group.add_argument(
        "--tau_start", type=float, default=0.2, help="temperature of the part softmax at first"
    )
    group.add_argument("--tau_end", type=float, default=0.07, help="and from 70 %% of the steps on")


def _map_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("part maps")
    group.add_argument(
        "--part_source",
        choices=PART_SOURCES,
        default="learned",
        help="all but learned are baselines without training",
    )
    group.add_argument(
        "--extract", default="", metavar="FOLDER", help="write part maps of the data set; resumable"
    )
    group.add_argument("--split", choices=("train", "val"), default="train", help="of --extract")
    group.add_argument(
        "--part_grid",
        type=int,
        default=None,
        help="side of the maps in patches; None: the teacher's",
    )
    group.add_argument(
        "--save_scores", action="store_true", help="of --extract: class attention beside the maps"
    )
    group.add_argument(
        "--no_clean", dest="clean", action="store_false", help="keep single patches of another part"
    )
    group.add_argument(
        "--evaluate",
        default="",
        metavar="FILE.csv",
        help="agreement of all part sources with the val split's masks",
    )
    group.add_argument(
        "--mask_path",
        default=None,
        help="of --evaluate: folder of masks, named as images; None: those of shapes",
    )
    group.add_argument(
        "--visualize", default="", metavar="FILE.png", help="contact sheet of the val split"
    )
    group.add_argument("--visualize_images", type=int, default=8, help="rows of the contact sheet")


def parse_parts(argv: list[str] | None = None) -> Namespace:
    """Defaults < --recipe < --config < command line. Exits with argparse's message on bad flags."""
    return parse_flags(build_parser(), argv, options.validate, validate, stage="parts")


def teacher_kwargs(args: Namespace) -> dict[str, Any]:
    """Return constructor options from --teacher_kwargs (YAML values)."""
    return model_kwargs(
        Namespace(model_kwargs=args.teacher_kwargs, input_size=None, patch_size=None)
    )


def validate(args: Namespace) -> None:
    for name in ("num_parts", "input_size", "visualize_images"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.num_parts > 250:
        raise ValueError(
            f"--num_parts {args.num_parts} is more than the 250 that a part map can hold"
        )
    if not 0 < args.tau_end <= args.tau_start:
        raise ValueError(
            f"--tau_end {args.tau_end} must be positive and at most --tau_start {args.tau_start}"
        )
    if args.evaluate and args.exif_orientation:
        raise ValueError(
            "--exif_orientation turns images, but not the masks of --evaluate; leave it out"
        )
    if args.evaluate and args.mask_path is None and args.data_set != "shapes":
        raise ValueError(
            "--evaluate compares with masks: give --mask_path, or --data_set shapes, which has some"
        )


def build_learner(args: Namespace, teacher: Teacher) -> PartLearner:
    """Return the learner that the flags describe, with random weights."""
    torch.manual_seed(args.seed)
    return PartLearner(
        teacher.width,
        teacher.grid,
        num_parts=args.num_parts,
        background=args.background,
        widths=tuple(args.decoder_widths),
        reconstruction=args.reconstruction,
        weights=tuple(args.loss_weights),
    )
