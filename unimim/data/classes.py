"""Settle the number of classes and the image size between the flags, the data and the model."""

from argparse import Namespace

import torch
from torch import nn

from modeling_finetune import input_size_of
from unimim.cli.options import model_kwargs
from unimim.errors import refused
from unimim.sizes import to_pair


def settle_size(args: Namespace) -> None:
    """Set `args.input_size` to the default of the model or of --model_kwargs."""
    args.input_size = model_kwargs(args).get("input_size") or input_size_of(args.model)


@torch.no_grad()
def check_eval_size(args: Namespace, model: nn.Module) -> None:
    """Raise ValueError before training if the model does not accept images of --eval_input_size."""
    size = args.eval_input_size
    if size not in (None, args.input_size):
        with refused(
            f"--eval_input_size {size}: --model {args.model} is for --input_size {args.input_size}"
        ):
            model.eval()(torch.zeros(1, args.in_chans or 3, *to_pair(size)))
        model.train()


def settle_classes(args: Namespace, dataset) -> None:
    """Set `args.nb_classes`, if not given, to the data set's; raise ValueError if too small."""
    if args.nb_classes is None:
        args.nb_classes = len(dataset.source.classes)
    check_classes(args, dataset)


def check_classes(args: Namespace, dataset) -> None:
    """Raise ValueError if the data set has labels of more classes than `args.nb_classes`."""
    classes = len(dataset.source.classes)
    if classes > args.nb_classes:
        first = dataset.source.path(int(dataset.source.labels.argmax()))
        raise ValueError(
            f"--nb_classes {args.nb_classes} is too few: the data set has {classes} classes (label "
            f"{int(dataset.source.labels.max())} is that of {first}); without the flag the "
            "validation images say how many"
        )
