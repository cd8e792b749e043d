"""k-NN accuracy of a pre-trained ViT's features; `--help` lists the flags, README.md has
examples."""

import argparse
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import modeling_pretrain  # noqa: F401  (registers the methods)
from unimim.cli.flags import add_data_flags, add_process_flags, add_recipe_flag
from unimim.cli.options import parse_flags
from unimim.data.classes import settle_classes
from unimim.engine.setup import launch, set_up
from unimim.evaluation.features import (
    add_backbone_flags,
    build_backbone,
    evaluation_images,
    features_of,
)
from unimim.evaluation.knn import Accuracy, evaluate_knn
from unimim.files import write_rows
from unimim.logs import log


@dataclass(frozen=True)
class KnnRow(Accuracy):
    """One row of knn.csv: an evaluation and what it was made with."""

    model: str
    finetune: str
    pool: str
    feature_norm: str
    train_images: int
    val_images: int
    seed: int


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
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
    add_recipe_flag(group)
    group.add_argument(
        "--config",
        default=None,
        metavar="FILE.yaml",
        help="flag values; flags on the command line win",
    )
    group.add_argument(
        "--output_dir", default="", help="folder of knn.csv; empty: nothing is saved"
    )
    group.add_argument("--seed", type=int, default=0, help="of random weights")
    group.add_argument("--dry_run", action="store_true", help="check the flags and exit")
    # as published: no autocast, and the mean and deviation that the recipes pre-train with
    parser.set_defaults(
        precision="fp32", imagenet_default_mean_and_std=True, enable_deepspeed=False
    )
    return parser


def validate(args: Namespace) -> None:
    for name in ("knn_k", "temperature"):
        if min(getattr(args, name)) <= 0:
            raise ValueError(f"--{name} must be positive, not {min(getattr(args, name))}")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {args.batch_size}")


def parse(argv: list[str] | None = None) -> Namespace:
    """Defaults < --recipe < --config < command line. Exits with argparse's message on bad flags."""
    return parse_flags(build_parser(), argv, validate, stage="knn")


def main(args: Namespace) -> list[KnnRow]:
    context = set_up(args)
    backbone = build_backbone(args).to(context.device)
    images = {
        name: evaluation_images(args, backbone, train=name == "train") for name in ("train", "val")
    }
    for dataset in images.values():
        settle_classes(args, dataset)
    if args.dry_run:
        return []
    bank, queries = (
        features_of(context, dataset, backbone, name) for name, dataset in images.items()
    )
    accuracies = evaluate_knn(
        bank,
        queries,
        args.knn_k,
        args.temperature,
        args.nb_classes,
        rank=args.rank,
        world_size=args.world_size,
    )
    sizes = {"train_images": len(bank), "val_images": len(queries)}
    about = {
        name: getattr(args, name) for name in ("model", "finetune", "pool", "feature_norm", "seed")
    }
    results = [KnnRow(**vars(accuracy), **about, **sizes) for accuracy in accuracies]
    for r in results:
        log.info("k %d  temperature %g: top-1 %.3f  top-5 %.3f", r.k, r.temperature, r.acc1, r.acc5)
    if args.output_dir and args.rank == 0:
        write_rows(Path(args.output_dir) / "knn.csv", results)
    return results


if __name__ == "__main__":
    launch(main, parse())
