"""Learns SemMAE's semantic parts and writes part maps for a data set; `--help` lists the flags,
README.md has examples.

One command does one or more of: train (resumed where it stopped; a finished run is not trained
again), --extract, --evaluate, --visualize.
"""

import argparse
from argparse import Namespace
from itertools import islice
from typing import Any

import torch

import modeling_pretrain  # noqa: F401  (registers the methods)
from datasets import build_dataset
from engine_for_pretraining import train
from optim_factory import param_groups
from unimim.cli import options
from unimim.cli.flags import add_data_flags, add_engine_flags, add_optimizer_flags, add_run_flags
from unimim.cli.options import derived, model_kwargs, parse_flags, report
from unimim.data.pretraining import steps_per_epoch, train_loader
from unimim.data.views import build_pretrain_transform, image_mean_std
from unimim.engine.session import Position
from unimim.engine.setup import launch, set_up, start_training
from unimim.engine.state import RunContext
from unimim.parts.extraction import contact_sheet, evaluate_parts, extract
from unimim.parts.learning import (
    BACKGROUNDS,
    PART_SOURCES,
    RECONSTRUCTIONS,
    PartLearner,
    PartLearning,
    Teacher,
    load_teacher,
)
from unimim.recipes import by_name

RECIPE = "semmae_parts"  # gives the defaults
STATISTICS_BATCHES = 50  # of optimizer steps, from which the features' mean and std are taken
WARMUP_FRACTION = 0.05  # of the steps, where the flags give no warm-up

# --------------------------------------------------------------------------------------------------
# Flags


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
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
    group.add_argument("--reconstruction", choices=tuple(RECONSTRUCTIONS), default="mse")
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


def parse(argv: list[str] | None = None) -> Namespace:
    """Defaults < --recipe < --config < command line. Exits with argparse's message on bad flags."""
    return parse_flags(build_parser(), argv, options.validate, validate, stage="parts")


def teacher_kwargs(args: Namespace) -> dict[str, Any]:
    """Returns constructor options from --teacher_kwargs (YAML values)."""
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
    if args.evaluate and args.mask_path is None and args.data_set != "shapes":
        raise ValueError(
            "--evaluate compares with masks: give --mask_path, or --data_set shapes, which has some"
        )


# --------------------------------------------------------------------------------------------------
# Training


def build_learner(args: Namespace, teacher: Teacher) -> PartLearner:
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


def train_learner(context: RunContext, task: PartLearning) -> None:
    """Trains to the last epoch, from wherever an earlier run stopped."""
    args = context.args
    transform = build_pretrain_transform(
        ("image",),
        input_size=args.input_size,
        interpolation=args.train_interpolation,
        pipeline=args.data_pipeline,
        crop_scale=tuple(args.crop_scale),
    )
    loader = train_loader(
        args, build_dataset(args, train=True, transform=transform, need_labels=False)
    )
    steps_in_epoch = steps_per_epoch(args, loader)
    steps = args.epochs * steps_in_epoch
    if args.warmup_steps < 0 and not args.warmup_epochs:
        args.warmup_steps = max(1, round(WARMUP_FRACTION * steps))
    report(args, derived(args, steps_in_epoch) | {"images": len(loader.dataset)})
    if args.dry_run:
        return
    groups = param_groups(task.learner, args.weight_decay)
    run, position = start_training(context, task, loader, groups)
    if position == Position():
        loader.batch_sampler.set_position(0)
        first = islice(loader, STATISTICS_BATCHES * args.update_freq)
        task.learner.standardize(
            task.teacher.look(run.normalize(batch)["image"]) for batch in first
        )
    done = position.epoch * steps_in_epoch + position.step
    task.after_step(max(done - 1, 0) / steps)  # the temperature that the last step left
    train(run, position, after_epoch=lambda position: {})
    task.after_step(1.0)


# --------------------------------------------------------------------------------------------------


def main(args: Namespace) -> None:
    context = set_up(args)
    torch.manual_seed(args.seed)  # of a random teacher, which must be the same in every call
    teacher = load_teacher(
        args.teacher,
        image_size=args.input_size,
        checkpoint=args.teacher_checkpoint,
        allow_random=args.allow_random_teacher,
        model_kwargs=teacher_kwargs(args),
    )
    temperatures = (args.tau_start, args.tau_end)
    task = PartLearning(build_learner(args, teacher), teacher, image_mean_std(args), temperatures)
    task.to(context.device)
    if args.part_source == "learned" or args.evaluate:
        train_learner(context, task)
    if args.dry_run:
        return
    if args.extract:
        extract(context, task)
    if args.evaluate:
        evaluate_parts(context, task)
    if args.visualize and args.rank == 0:
        contact_sheet(context, task)


if __name__ == "__main__":
    launch(main, parse())
