"""Pre-trains a masked-image-modelling method; `--help` lists the flags, README.md has examples."""

from argparse import Namespace

import modeling_pretrain  # noqa: F401  (registers the methods)
from engine_for_pretraining import train
from optim_factory import (
    param_groups,
)
from unimim.cli.models import build_method
from unimim.cli.options import derived, parse, report
from unimim.data.pretraining import build_data, mask_generator
from unimim.engine.setup import dry_run, launch, set_up, start_training


def main(args: Namespace) -> None:
    normalize = set_up(args)
    method = build_method(args)
    loader = build_data(args, method)
    report(args, derived(args, loader.steps_per_epoch) | {"images": len(loader.dataset)})
    groups = param_groups(method, args.weight_decay)
    if args.dry_run:
        return dry_run(args, groups, loader.steps_per_epoch, normalize.device)
    if args.compile and (masks := mask_generator(args, method, "mask")) is not None:
        method.most_masked = masks.most
    method.to(normalize.device)
    if method.teacher is not None:
        method.teacher.to(normalize.device)
    run, position = start_training(args, method, method, loader, groups, normalize, "teacher")
    train(run, position, after_epoch=lambda position: {})


if __name__ == "__main__":
    launch(main, parse("pretrain"))
