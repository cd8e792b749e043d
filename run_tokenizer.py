"""Trains a tokenizer of images, whose visual tokens BEiT and SemanticMIM predict; `--help` lists
the flags, docs/methods/beit_maskfeat_semanticmim.md#training-a-tokenizer has examples.

It writes tokenizer.safetensors to --output_dir, which `--discrete_vae_weight_path` of
run_pretraining.py takes.
"""

from argparse import Namespace
from functools import partial

if __name__ == "__main__":
    from unimim.early import end_on_signals

    end_on_signals()

from torch.utils.data import DataLoader

from engine_for_pretraining import train
from modeling_targets import teacher_features
from optim_factory import param_groups
from unimim.cli.options import default_warmup, derived, report
from unimim.data.pretraining import crop_loader, steps_per_epoch
from unimim.engine.setup import dry_run, launch, set_up, start_training
from unimim.engine.state import RunContext
from unimim.tokenizer.clustering import cluster
from unimim.tokenizer.flags import parse_tokenizer
from unimim.tokenizer.training import (
    build_vae,
    export,
    grid_of,
    score_clusters,
    score_vae,
    scored_images,
)


def train_vae(context: RunContext, loader: DataLoader) -> None:
    """Train a discrete VAE to the last epoch, from wherever an earlier run stopped."""
    args = context.args
    vae = build_vae(args).to(context.device)
    steps = steps_per_epoch(args, loader)
    total = args.epochs * steps
    default_warmup(args, total)
    report(args, derived(args, steps) | {"images": len(loader.dataset)})
    groups = param_groups(vae, args.weight_decay)
    if args.dry_run:
        return dry_run(args, groups, steps, context.device)
    run, position = start_training(context, vae, loader, groups)
    done = position.epoch * steps + position.step
    vae.after_step(max(done - 1, 0) / total)  # the schedules as the last step left them
    images = scored_images(args).to(context.device)
    train(run, position, after_epoch=lambda position: score_vae(run, vae, images))
    export(args, run.runner.full_state_dict())


def fit_clusters(context: RunContext, loader: DataLoader) -> None:
    """Cluster patches; a repeated command does the same again."""
    args = context.args
    report(args, {"images": len(loader.dataset), "patches": args.kmeans_patches})
    if args.dry_run:
        return
    images = scored_images(args).to(context.device)
    features = args.kmeans_teacher and teacher_features(args.kmeans_teacher, grid_of(args))
    clusters = cluster(context, loader, partial(score_clusters, context, images), features)
    export(args, clusters.state_dict())


def main(args: Namespace) -> None:
    context = set_up(args)
    loader = crop_loader(args)
    kinds = {"dvae": train_vae, "kmeans": fit_clusters}
    kinds[args.kind](context, loader)


if __name__ == "__main__":
    launch(main, parse_tokenizer())
