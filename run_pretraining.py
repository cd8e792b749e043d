"""Pre-train a masked-image-modeling method; `--help` lists the flags, README.md has examples."""

from argparse import Namespace

if __name__ == "__main__":
    from unimim.early import end_on_signals

    end_on_signals()

import modeling_pretrain  # noqa: F401  (registers the methods)
from engine_for_pretraining import train
from optim_factory import param_groups
from unimim.cli.models import build_method
from unimim.cli.options import derived, parse, report
from unimim.data.pretraining import build_data, mask_generator, steps_per_epoch
from unimim.engine.setup import dry_run, launch, set_up, start_training
from unimim.evaluation.online import OnlineEvaluation


def main(args: Namespace) -> None:
    context = set_up(args)
    method = build_method(args)
    loader = build_data(args, method)
    steps = steps_per_epoch(args, loader)
    report(args, derived(args, steps) | {"images": len(loader.dataset)})
    groups = param_groups(method, args.weight_decay)
    evaluation = OnlineEvaluation(context, method) if args.eval_every else None
    if args.dry_run:
        return dry_run(args, groups, steps, context.device)
    if args.compile and (masks := mask_generator(args, method, "mask")) is not None:
        method.pad_masks_to(masks.most)
    method.to(context.device)
    if method.teacher is not None:
        method.teacher.to(context.device)
    run, position = start_training(context, method, loader, groups)
    if evaluation:
        evaluation.follow(run)
    train(run, position, after_epoch=evaluation.after_epoch if evaluation else lambda position: {})
    run.session.log_encoder()


if __name__ == "__main__":
    launch(main, parse("pretrain"))
