"""Fine-tunes or evaluates a classifier; `--help` lists the flags, README.md has examples."""

import math
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":
    from unimim.early import end_on_signals

    end_on_signals()

from torch import nn
from torch.utils.data import DataLoader

import modeling_pretrain  # noqa: F401  (registers the methods)
from datasets import EvalBatchSampler, build_dataset, build_loader
from engine_for_finetuning import Classification, evaluate_classifier
from engine_for_pretraining import train
from optim_factory import freeze_blocks, param_groups
from unimim.checkpoint.files import load_checkpoint, takes_imagenet_mean_std
from unimim.checkpoint.loading import load_pretrained
from unimim.checkpoint.runs import mean_std_flags
from unimim.cli.models import build_classifier, warn_of_other_variant
from unimim.cli.options import derived, parse, report
from unimim.data.classes import check_classes, check_eval_size, settle_classes, settle_size
from unimim.data.pretraining import steps_per_epoch, train_loader
from unimim.data.views import build_finetune_transform, image_mean_std
from unimim.engine.batch_norm import average_batch_statistics
from unimim.engine.distributed import from_first_rank
from unimim.engine.runner import AUTOCAST_DTYPES
from unimim.engine.session import Origin, Position, Session
from unimim.engine.setup import dry_run, launch, set_up, start_training
from unimim.engine.state import Interruptible, RunContext, Training
from unimim.evaluation.accuracy import published_lines
from unimim.logs import log


def build_eval_loader(args: Namespace, transform):
    """Return a loader of every image once, shared among the ranks unless --no_dist_eval is
    given."""
    dataset = build_dataset(args, train=False, transform=transform, need_labels=True)
    rank, world_size = (args.rank, args.world_size) if args.dist_eval else (0, 1)
    sampler = EvalBatchSampler(
        len(dataset), int(1.5 * args.batch_size), rank=rank, world_size=world_size
    )
    return build_loader(dataset, sampler, num_workers=args.num_workers, pin_mem=args.pin_mem)


def undecayed(args: Namespace, model: nn.Module) -> set[str]:
    """Return the names of the tables that --disable_weight_decay_on_rel_pos_bias exempts."""
    if not args.disable_weight_decay_on_rel_pos_bias:
        return set()
    return {
        name
        for name, _ in model.named_parameters()
        if name.endswith("relative_position_bias_table")
    }


def finetuning_groups(args: Namespace, model: nn.Module) -> list[dict]:
    """Return the groups of parameters that the flags ask for; --lr is known by now."""
    if args.head_lr is not None and not args.lr:
        raise ValueError(f"--head_lr {args.head_lr} needs an --lr that is not 0")
    return param_groups(
        model,
        args.weight_decay,
        args.layer_decay,
        undecayed(args, model),
        full_last_block=args.full_last_block,
        head_scale=None if args.head_lr is None else args.head_lr / args.lr,
    )


def settle_mean_std(args: Namespace) -> None:
    """Set the mean and std to those that the checkpoint was trained with, where the file tells them
    and the command does not."""
    path = args.resume or args.finetune
    if not path or args.mean_std_given:
        return
    found = {name: value for name, value in mean_std_flags(path).items() if value is not None}
    if len(found.get("mean", (0, 0, 0))) not in (3, args.in_chans):
        return  # the file's images have other channels
    if any(getattr(args, name) != value for name, value in found.items()):
        vars(args).update(found)
        log.info("images are normalized as %s was trained: %s", path, image_mean_std(args))


class ClassificationEvaluator:
    """Evaluates the model and its ema after each epoch, and keeps the best of either."""

    def __init__(self, run: Training, loader: DataLoader | Interruptible):
        self.args = run.args
        self.task = run.task
        self.context = run.context
        self.loader = loader
        self.dtype = run.runner.dtype

    def __call__(self, model: nn.Module, of: str = "network") -> dict[str, float]:
        device = next(model.parameters()).device
        model.to(self.context.device)
        result = evaluate_classifier(
            model, self.loader, self.context, dtype=self.dtype, shared=self.args.dist_eval
        )
        model.to(device)
        for line in published_lines(result, len(self.loader.dataset), of):
            log.info("%s", line)
        return result

    def after_epoch(self, position: Position, session: Session) -> dict[str, float]:
        """Evaluates; the metrics of rank 0 decide for all ranks.

        Ranks that evaluate by themselves may round differently, and all of them have to save
        together.
        """
        ema = self.task.ema and self.task.ema.module
        for network in (self.task.model, ema):
            if network is not None:  # what rank 0 saves is then what every rank evaluates
                average_batch_statistics(network, self.context.device)
        if self.args.disable_eval_during_finetuning:
            return {}
        metrics = {f"test_{k}": v for k, v in from_first_rank(self(self.task.model)).items()}
        if metrics["test_acc1"] > position.best:
            position.best = metrics["test_acc1"]
            session.save_best(position, of_ema=False, wait=False)
        if ema is not None:
            metrics |= {f"test_ema_{k}": v for k, v in from_first_rank(self(ema, "ema")).items()}
            if metrics["test_ema_acc1"] > position.best_average:
                position.best_average = metrics["test_ema_acc1"]
                session.save_best(position, of_ema=True, wait=False)
        return metrics | {"best_acc1": position.best}


def load_finetune(args: Namespace, model: nn.Module) -> None:
    """Load the weights of --finetune, of which --eval needs the classifier, too."""
    warn_of_other_variant(args.finetune, args.model)
    found = load_pretrained(
        model, args.finetune, model_key=args.model_key, prefix=args.model_prefix
    )
    log.info("%s", found)
    if args.eval and not args.resume and found.missing:
        raise ValueError(
            f"--eval --finetune {args.finetune} has no {', '.join(found.missing[:3])} of "
            f"--model {args.model} with {args.nb_classes} classes, so its accuracy would be that "
            "of a random classifier: fine-tune it first, or use run_knn.py or run_linear_probing.py"
        )


def tell_mean_std(args: Namespace) -> None:
    """Warn where a file does not say how its images were normalized, or says otherwise."""
    path = args.resume or args.finetune
    said, ours = takes_imagenet_mean_std(path), args.imagenet_default_mean_and_std
    names = {True: "ImageNet's mean and std", False: "mean and std 0.5"}
    if said is None:
        log.warning(
            "%s does not say how its images were normalized: %s are taken; "
            "--%simagenet_default_mean_and_std takes %s",
            path, names[ours], "no_" if ours else "", names[not ours],
        )  # fmt: skip
    elif said != ours:
        log.warning("%s was trained with %s, not with %s", path, names[said], names[ours])


def evaluate_only(context: RunContext, model: nn.Module, loader: DataLoader) -> None:
    """Log the accuracy of --resume (or of --finetune) in one line, for --eval."""
    args = context.args
    if args.resume:
        Origin(Path(args.resume), load_checkpoint(args.resume)).load_weights(
            model, None, "model_ema"
        )
    elif not args.finetune:
        raise ValueError("--eval needs a checkpoint: --resume FILE")
    tell_mean_std(args)
    if args.dry_run:
        return
    model.to(context.device)
    dtype = AUTOCAST_DTYPES.get(args.precision)
    result = evaluate_classifier(model, loader, context, dtype=dtype, shared=args.dist_eval)
    if not math.isfinite(result["loss"]):
        raise ValueError(
            f"the loss of {args.resume or args.finetune} is {result['loss']}: its weights, or what "
            f"--precision {args.precision} makes of them, are not finite"
        )
    log.info(
        "%s: acc1 %.3f  acc5 %.3f  loss %.4f",
        args.resume or args.finetune,
        *(result[k] for k in ("acc1", "acc5", "loss")),
    )
    for line in published_lines(result, len(loader.dataset)):
        log.info("%s", line)


def main(args: Namespace) -> None:
    context = set_up(args)
    settle_size(args)
    if args.eval:
        settle_mean_std(args)

    # validation images first: they settle the number of classes
    eval_loader = build_eval_loader(args, build_finetune_transform(args, train=False))
    settle_classes(args, eval_loader.dataset)
    model = build_classifier(args)
    if args.finetune:
        load_finetune(args, model)
    check_eval_size(args, model)
    if args.eval:
        return evaluate_only(context, model, eval_loader)

    if args.freeze_blocks:
        freeze_blocks(model, args.freeze_blocks)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("--freeze_blocks %d: %s weights are trained", args.freeze_blocks, f"{trained:,}")

    # training images, and what follows from their number
    dataset = build_dataset(
        args,
        train=True,
        transform=build_finetune_transform(args, train=not args.no_aug),
        need_labels=True,
    )
    check_classes(args, dataset)
    loader = train_loader(args, dataset)
    images = (
        f"{len(dataset)} for training, {len(eval_loader.dataset)} for validation, "
        f"{args.nb_classes} classes"
    )
    steps = steps_per_epoch(args, loader)
    report(args, derived(args, steps) | {"images": images})

    # an lr and a weight decay for each layer
    groups = finetuning_groups(args, model)
    if args.dry_run:
        return dry_run(args, groups, steps, context.device)

    # train, with an evaluation after each epoch
    task = Classification(model.to(context.device), args, context.device)
    run, position = start_training(context, task, loader, groups)
    evaluator = ClassificationEvaluator(run, Interruptible(eval_loader, run.stop))
    train(run, position, after_epoch=lambda position: evaluator.after_epoch(position, run.session))
    log.info("best acc1 %.3f", position.best)
    return None


if __name__ == "__main__":
    launch(main, parse("finetune"))
