"""Between the flags and a trained tokenizer: images, task, metrics and the file that is written."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from datasets import build_dataset
from unimim.checkpoint.names import StateDict
from unimim.data.views import EvalTransform, image_mean_std
from unimim.engine.state import RunContext, Training
from unimim.logs import log
from unimim.sizes import Pair
from unimim.tokenizer.clusters import PatchClusters
from unimim.tokenizer.files import TokenizerInfo, save_tokenizer
from unimim.tokenizer.learning import DiscreteVAE, openai_names, perplexity, token_counts

NAME = "tokenizer.safetensors"
SCORED_IMAGES = 256
# what DALL-E's encoder does to images in [0, 1]: 0.8 x + 0.1
DALLE_MEAN_STD = ((-0.125,) * 3, (1.25,) * 3)


def scored_images(args: Namespace) -> Tensor:
    """Return the first images of the data set, uint8 [N, 3, H, W], without augmentation."""
    transform = EvalTransform((args.input_size, args.input_size), None)
    dataset = build_dataset(args, train=True, transform=transform, need_labels=False)
    count = min(SCORED_IMAGES, len(dataset))
    return torch.stack([dataset[0, index]["image"] for index in range(count)])


def build_vae(args: Namespace) -> DiscreteVAE:
    """Return the discrete VAE that the flags describe, with random weights."""
    torch.manual_seed(args.seed)
    return DiscreteVAE(
        vocab_size=args.vocab_size,
        patch_size=args.patch_size,
        n_hid=args.n_hid,
        blocks_per_group=args.blocks_per_group,
        tau=(args.tau_start, args.tau_end),
        tau_fraction=args.tau_fraction,
        kl_weight=args.kl_weight,
        kl_fraction=args.kl_fraction,
    )


# --- metrics --------------------------------------------------------------------------------------


@torch.no_grad()
def score(
    images: Tensor,
    tokens: Callable[[Tensor], Tensor],
    reconstruct: Callable[[Tensor, Pair], Tensor] | None,
    vocab_size: int,
    grid: Pair,
) -> dict[str, float]:
    """Return how well hard tokens describe uint8 images [N, 3, H, W] on the device.

    `hard_mse` is the squared error of pixels in [0, 1], where tokens can be reconstructed;
    `hard_perplexity` and `used_tokens` say how many tokens are in use.
    """
    error = torch.zeros((), device=images.device)
    counts = torch.zeros(vocab_size, device=images.device)
    for some in images.split(32):
        ids = tokens(some)
        if reconstruct is not None:
            error += (reconstruct(ids, grid) - some.float() / 255).square().sum()
        counts += token_counts(ids, vocab_size)
    metrics = {} if reconstruct is None else {"hard_mse": float(error / images.numel())}
    return metrics | {
        "hard_perplexity": float(perplexity(counts)),
        "used_tokens": int((counts > 0).sum()),
    }


def score_vae(run: Training, vae: DiscreteVAE, images: Tensor) -> dict[str, float]:
    """Return the `score` of a discrete VAE in training."""
    dtype = run.runner.dtype
    vae.eval()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return score(images, vae.tokens, vae.reconstruct, vae.vocab_size, grid_of(run.args))


def score_clusters(
    context: RunContext, images: Tensor, clusters: PatchClusters
) -> dict[str, float]:
    """Return the `score` of clusters of normalized patches."""
    mean, std = context.normalize.mean, context.normalize.std

    def reconstruct(ids: Tensor, grid: Pair) -> Tensor:
        return (clusters.reconstruct(ids, grid) * std + mean).clamp(0, 1)

    return score(
        images,
        lambda some: clusters((some.float() / 255 - mean) / std),
        None if context.args.kmeans_teacher else reconstruct,
        context.args.vocab_size,
        grid_of(context.args),
    )


def grid_of(args: Namespace) -> Pair:
    """Return the tokens of an image along each side."""
    side = args.input_size // args.patch_size
    return side, side


# --- the file -------------------------------------------------------------------------------------


def export(args: Namespace, tensors: StateDict) -> None:
    """Write tokenizer.safetensors with centers, or with a discrete VAE's encoder in OpenAI's
    names."""
    if args.rank != 0:
        return
    mean, std = image_mean_std(args) if args.kind == "kmeans" else DALLE_MEAN_STD
    if args.kind == "dvae":
        inside = {k: v for k, v in tensors.items() if k.startswith("encoder.")}
        tensors = openai_names({k.removeprefix("encoder."): v for k, v in inside.items()})
    info = TokenizerInfo(
        kind=args.kind,
        vocab_size=args.vocab_size,
        patch_size=(args.patch_size, args.patch_size),
        image_size=(args.input_size, args.input_size),
        mean=mean,
        std=std,
        teacher=args.kmeans_teacher or "",
    )
    path = Path(args.output_dir) / NAME
    save_tokenizer(path, tensors, info)
    log.info("saved %s", path)
    words = "" if args.vocab_size == 8192 else f" --model_kwargs vocab_size={args.vocab_size}"
    log.info("run_pretraining.py takes it with --discrete_vae_weight_path %s%s", path, words)
