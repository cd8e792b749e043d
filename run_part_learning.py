"""Learns SemMAE's semantic parts and writes part maps for a data set; `--help` lists the flags,
README.md has examples.

One command does one or more of: train (resumed where it stopped; a finished run is not trained
again), --extract, --evaluate, --visualize.
"""

from argparse import Namespace
from itertools import islice

if __name__ == "__main__":
    from unimim.early import end_on_signals

    end_on_signals()

import torch

import modeling_pretrain  # noqa: F401  (registers the methods)
from engine_for_pretraining import train
from optim_factory import param_groups
from unimim.cli.options import default_warmup, derived, report
from unimim.data.pretraining import crop_loader, steps_per_epoch
from unimim.data.views import image_mean_std
from unimim.engine.session import Position
from unimim.engine.setup import launch, set_up, start_training
from unimim.engine.state import RunContext
from unimim.parts.extraction import contact_sheet, evaluate_parts, extract
from unimim.parts.flags import build_learner, parse_parts, teacher_kwargs
from unimim.parts.learning import PartLearning, load_teacher

STATISTICS_BATCHES = 50  # of optimizer steps, from which the features' mean and std are taken

# --------------------------------------------------------------------------------------------------
# Training


def train_learner(context: RunContext, task: PartLearning) -> None:
    """Train to the last epoch, from wherever an earlier run stopped."""
    args = context.args
    loader = crop_loader(args)
    steps_in_epoch = steps_per_epoch(args, loader)
    steps = args.epochs * steps_in_epoch
    default_warmup(args, steps)
    report(args, derived(args, steps_in_epoch) | {"images": len(loader.dataset)})
    if args.dry_run:
        return
    groups = param_groups(task.learner, args.weight_decay)
    run, position = start_training(context, task, loader, groups)
    if position == Position():
        loader.batch_sampler.set_position(0)
        first = islice(loader, STATISTICS_BATCHES * args.update_freq)
        task.learner.standardize(task.teacher.look(run.prepare(batch)["image"]) for batch in first)
    done = position.epoch * steps_in_epoch + position.step
    task.after_step(max(done - 1, 0) / steps)  # the temperature that the last step left
    train(run, position, after_epoch=lambda position: {})
    run.stop.release()  # what follows is begun anew by the same command
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
    launch(main, parse_parts())
