"""Runs the linear probe: its images, its heads, their evaluation after each epoch."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader, Dataset

from datasets import EvalBatchSampler, ImageDataset, build_dataset, build_loader
from unimim.checkpoint.loading import check_finite
from unimim.cli.options import derived, report
from unimim.data.channels import kept_channels
from unimim.data.classes import settle_classes
from unimim.data.pretraining import steps_per_epoch, train_loader
from unimim.data.views import ProbeTransform
from unimim.engine.distributed import from_first_rank
from unimim.engine.runner import AUTOCAST_DTYPES
from unimim.engine.session import Origin, Position, Session
from unimim.engine.setup import dry_run, set_up, start_training
from unimim.engine.state import Interruptible, RunContext, Training
from unimim.evaluation.features import (
    Backbone,
    FeatureDataset,
    build_backbone,
    evaluation_images,
    features_of,
)
from unimim.evaluation.linear_probe import Probe, evaluate_heads, head_groups, side_by_side
from unimim.files import write_rows
from unimim.logs import log


@dataclass(frozen=True)
class ProbeRow:
    """A row of linear.csv: a head after an epoch (counted from 0), accuracies in percent."""

    lr: float
    acc1: float
    acc5: float
    loss: float
    epoch: int
    model: str
    finetune: str
    pool: str
    feature_norm: str
    opt: str
    seed: int


class ProbeEvaluator:
    """Evaluates all heads, writes linear.csv, and saves the best epoch of the best head."""

    def __init__(
        self,
        context: RunContext,
        probe: Probe,
        lrs: list[float],
        loader: DataLoader | Interruptible,
    ):
        self.context = context
        self.probe = probe
        self.lrs = lrs
        self.loader = loader
        self.results: list[ProbeRow] = []  # the latest

    def __call__(self, epoch: int) -> list[ProbeRow]:
        args = self.context.args
        dtype = AUTOCAST_DTYPES.get(args.precision)
        found = evaluate_heads(self.probe, self.loader, self.context, dtype)
        found = from_first_rank(found)  # the best is to be the same one on all ranks
        names = ("model", "finetune", "pool", "feature_norm", "opt", "seed")
        about = {"epoch": epoch} | {name: getattr(args, name) for name in names}
        self.results = [
            ProbeRow(lr=lr, **own, **about) for lr, own in zip(self.lrs, found, strict=True)
        ]
        if args.output_dir and args.rank == 0:
            write_rows(Path(args.output_dir) / "linear.csv", self.results)
        for r in self.results:
            log.info("lr %g: acc1 %.3f  acc5 %.3f  loss %.4f", r.lr, r.acc1, r.acc5, r.loss)
        return self.results

    def after_epoch(self, position: Position, session: Session) -> dict[str, float]:
        results = self(position.epoch)
        best = max(results, key=lambda result: result.acc1)
        if best.acc1 > position.best:
            position.best = best.acc1
            session.save_best(position, of_ema=False, wait=False)
        metrics = {f"test_{name}": getattr(best, name) for name in ("acc1", "acc5", "loss")}
        if len(results) > 1:
            metrics |= {
                f"test_acc1_{name}": r.acc1
                for name, r in zip(self.probe.heads, results, strict=True)
            }
        return metrics | {"best_acc1": position.best}


def evaluate_only(
    args: Namespace, heads: nn.ModuleDict, evaluator: ProbeEvaluator
) -> list[ProbeRow]:
    """Return the accuracies of --resume, or of the newest checkpoint of --output_dir, for
    --eval."""
    origin = Origin.find(args)
    if origin is None:
        raise ValueError("--eval needs a checkpoint: --resume FILE")
    origin.load_weights(heads, None, "average")
    check_finite(heads, origin.path)
    return evaluator(origin.state["epoch"])


# --------------------------------------------------------------------------------------------------
# Data


def build_images(args: Namespace, backbone: Backbone) -> dict[str, ImageDataset]:
    """Return {"train", "val"} and settle --nb_classes; with --no_aug both as for evaluation."""
    augmented = ProbeTransform(
        backbone.image_size,
        args.train_interpolation,
        args.crop_scale,
        args.train_crop,
        kept_channels(args),
    )
    images = {
        "train": evaluation_images(args, backbone, train=True)
        if args.no_aug
        else build_dataset(args, train=True, transform=augmented, need_labels=True),
        "val": evaluation_images(args, backbone, train=False),
    }
    for dataset in images.values():
        settle_classes(args, dataset)
    return images


def in_features(
    context: RunContext, images: dict[str, ImageDataset], backbone: Backbone
) -> dict[str, FeatureDataset]:
    """Return the features of the images, computed once for all epochs, for --no_aug."""
    return {
        name: FeatureDataset(features_of(context, dataset, backbone, name))
        for name, dataset in images.items()
    }


def shared_loader(args: Namespace, dataset: Dataset) -> DataLoader:
    """Return a loader of every image once, shared among the ranks."""
    sampler = EvalBatchSampler(
        len(dataset), args.batch_size, rank=args.rank, world_size=args.world_size
    )
    return build_loader(dataset, sampler, num_workers=args.num_workers, pin_mem=args.pin_mem)


# --------------------------------------------------------------------------------------------------


def run_probe(
    args: Namespace, train: Callable[[Training, Position, Callable], None]
) -> list[ProbeRow]:
    """Train and evaluate the heads that the flags of run_linear_probing.py ask for.

    `train` is the training loop of engine_for_pretraining.py. Returns a row for each head.
    """
    context = set_up(args)
    backbone = build_backbone(args).to(context.device)
    data = build_images(args, backbone)
    lrs = args.lr_sweep or [args.lr]
    heads = side_by_side(lrs, backbone.dim, args.nb_classes, args.seed, args.batch_norm)
    heads.to(context.device)
    probe = Probe(heads, backbone)
    groups = head_groups(heads.values(), lrs, args.weight_decay)
    if args.no_aug and not args.dry_run:
        data = in_features(context, data, backbone)
    evaluator = ProbeEvaluator(context, probe, lrs, shared_loader(args, data["val"]))
    if args.eval and not args.dry_run:
        return evaluate_only(args, heads, evaluator)

    loader = train_loader(args, data["train"])
    sizes = (
        f"{len(data['train'])} for training, {len(data['val'])} for validation, "
        f"{args.nb_classes} classes"
    )
    steps = steps_per_epoch(args, loader)
    report(args, derived(args, steps) | {"images": sizes, "heads": ", ".join(heads)})
    if args.dry_run:
        dry_run(args, groups, steps, context.device)
        return []
    run, position = start_training(context, probe, loader, groups)
    evaluator.loader = Interruptible(evaluator.loader, run.stop)
    train(run, position, after_epoch=lambda position: evaluator.after_epoch(position, run.session))
    log.info("best acc1 %.3f", position.best)
    return evaluator.results or evaluator(args.epochs - 1)  # a finished run has trained nothing
