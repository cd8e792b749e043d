"""Pictures of what a model sees, predicts and looks at: `python visualize.py KIND --help`, with
KIND one of attention, orders, masks, reconstruct.

Every picture is a grid: a row for an image, a column for one way of looking at it.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import checkpoint
import options
import utils
from datasets import ImageDataset, build_source
from engine_for_pretraining import Normalize
from masking_generator import PATCH_ORDERS, patch_order
from modeling_finetune import VisionTransformer
from modeling_pretrain import PretrainMethod, similarity, stretched
from run_class_finetuning import build_classifier
from run_pretraining import build_data, build_method
from transforms import MEAN_STD, build_finetune_transform
from utils import log

matplotlib.use("Agg")
from matplotlib.figure import Figure

MASKED_GREY = 128


def draw_grid(rows: Iterable[list[np.ndarray]], titles: list[str], *, cell: float = 1.1) -> Figure:
    """A figure with one picture per row and title: [H, W, 3] uint8 is shown as it is, [h, w] floats as a map.

    Each map's colours run from 0 to its own largest value. `cell` is a picture's side in inches.
    """
    rows = list(rows)
    figure = Figure(figsize=(cell * len(titles), cell * (len(rows) + 0.25)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for picture, axis in zip(row, line, strict=True):
            axis.imshow(picture, cmap="viridis", vmin=0, interpolation="nearest")
            axis.set_axis_off()
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def attention_grid(model: nn.Module, images: Tensor, normalize: Normalize, layer: int = -1) -> Figure:
    """Where the class token of images uint8 [B, 3, H, W] looks in a block: mean over heads, then each head."""
    model.eval()
    maps = model.attention_maps(normalize({"image": images})["image"], layer)[:, :, 0, model.num_prefix_tokens :]
    maps = maps.unflatten(-1, model.patch_embed.grid_size).float().cpu().numpy()
    rows = ([as_picture(image), heads.mean(0), *heads] for image, heads in zip(images, maps, strict=True))
    return draw_grid(rows, ["image", "mean of heads", *(f"head {head}" for head in range(maps.shape[1]))])


def as_picture(image: Tensor) -> np.ndarray:
    """uint8 [3, H, W] to [H, W, 3]."""
    return image.permute(1, 2, 0).numpy()


def load_model(path: str, model_key: str, flags: list[str]) -> tuple[nn.Module, Namespace]:
    """The model of a checkpoint with its weights, and the flags of its run, over which the given `flags` win.

    A file without flags of its own (an encoder export) is taken for a classifier that `flags` describe.
    """
    saved = checkpoint.load_checkpoint(path).get("args") or {}
    stage = "pretrain" if "mask_type" in saved else "finetune"
    parser = options.build_parser(stage)
    parser.set_defaults(**saved)
    args = parser.parse_args(flags)
    model = (build_method if stage == "pretrain" else build_classifier)(args)
    log.info("%s", checkpoint.load_pretrained(model, path, model_key=model_key))
    return model, args


def validation_images(args: Namespace, size: tuple[int, int], count: int) -> Tensor:
    """Images from all over the flags' data set, as evaluation sees them: uint8 [count, 3, H, W]."""
    path = getattr(args, "eval_data_path", None) or args.data_path
    source = build_source(args.data_set, path, train=False, need_labels=False)
    transform = build_finetune_transform(Namespace(input_size=size, crop_pct=None), train=False)
    dataset = ImageDataset(source, transform, seed=args.seed)
    return torch.stack([dataset[0, index]["image"] for index in spread(len(dataset), count)])


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` indices at equal distances: data sets are often in the order of their classes."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def normalization(args: Namespace) -> Normalize:
    return Normalize(MEAN_STD["imagenet" if args.imagenet_default_mean_and_std else "inception"], torch.device("cpu"))


def load_vit(path: str, model_key: str, flags: list[str]) -> tuple[VisionTransformer, Namespace]:
    """The ViT of a checkpoint, which may be a method's backbone, and the flags as of `load_model`."""
    model, args = load_model(path, model_key, flags)
    vit = getattr(model, "backbone", model)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"--checkpoint {path} holds {args.model}, which is no ViT")
    return vit, args


def attention(own: Namespace, flags: list[str]) -> Figure:
    model, args = load_vit(own.checkpoint, own.model_key, flags)
    images = validation_images(args, model.patch_embed.img_size, own.images)
    return attention_grid(model, images, normalization(args), own.layer)


# ---------------------------------------------------------------------------------------------------------------------
# Orders

ORDERS = ("raster", "stochastic", "attention", "attention_center")
MAPS = {"self": "self-attention", "cls": "similarity to class", "gap": "similarity to mean"}  # by --attention_type


@torch.no_grad()
def order_maps(model: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """The three maps that SemAIM's orders can follow, each [B, N], of normalised images (specs/semaim.md 4).

    A run with a target model follows the similarity to that model's class token, which is then the one shown.
    """
    model.eval()
    prefix, target = model.num_prefix_tokens, getattr(model, "target", None)
    attention = model.attention_maps(images)[:, :, 0, prefix:].mean(1)
    tokens = model.norm(model.forward_features(images)) if target is None else target(images)
    patches = tokens[:, prefix:]
    queries = {"cls": tokens[:, :1], "gap": patches.mean(1, keepdim=True)}
    return {"self": attention} | {kind: stretched(similarity(query, patches)) for kind, query in queries.items()}


def ranks(kind: str, grid: tuple[int, int], attention: Tensor, seed: int) -> Tensor:
    """Place of each patch [B, N] in the order `kind`, the first one's being N and the last one's 1."""
    count, cells = attention.shape
    generator = torch.Generator().manual_seed(seed)
    noise, center_noise = torch.rand(count, cells, generator=generator), torch.rand(count, 2, generator=generator)
    order = patch_order(kind, grid, noise, attention, center_noise).expand(count, -1)
    return cells - order.argsort(dim=1, stable=True).argsort(dim=1)


def order_grid(
    model: VisionTransformer, images: Tensor, normalize: Normalize, kinds: list[str], followed: str, seed: int
) -> Figure:
    """Self-attention and similarity of images uint8 [B, 3, H, W] and the orders `kinds`, the earlier the brighter.

    Orders that follow a map follow that of `followed`, a key of `MAPS`.
    """
    grid = model.patch_embed.grid_size
    maps = order_maps(model, normalize({"image": images})["image"])
    columns = {MAPS[kind]: maps[kind] for kind in ("self", "cls", followed)}
    columns |= {kind: ranks(kind, grid, maps[followed], seed) for kind in kinds}
    heat = [column.unflatten(1, grid).float().numpy() for column in columns.values()]
    rows = zip([as_picture(image) for image in images], *heat, strict=True)
    return draw_grid(rows, ["image", *columns])


def orders(own: Namespace, flags: list[str]) -> Figure:
    model, args = load_vit(own.checkpoint, own.model_key, flags)
    images = validation_images(args, model.patch_embed.img_size, own.images)
    has_target = getattr(model, "target", None) is not None
    followed = "cls" if has_target else getattr(model, "attention_type", "cls")
    return order_grid(model, images, normalization(args), own.orders, followed, args.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def mask_grid(samples: Iterable[dict[str, Tensor]]) -> Figure:
    """What pre-training reads of each sample: the image, the same with its masked patches grey, the teacher's view."""
    batch = default_collate(list(samples))
    columns = {"image": batch["image"], "student sees": hide(batch["image"], batch["mask"])}
    if "image_strong" in batch:
        columns["teacher sees"] = batch["image_strong"]
    return draw_grid(zip(*([as_picture(i) for i in images] for images in columns.values()), strict=True), [*columns])


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Images [B, 3, H, W] with the patches where mask [B, gh, gw] is True in grey."""
    height, width = (side // cells for side, cells in zip(images.shape[-2:], mask.shape[-2:], strict=True))
    pixels = mask.repeat_interleave(height, 1).repeat_interleave(width, 2)
    return images.masked_fill(pixels.unsqueeze(1), MASKED_GREY)


def training_samples(args: Namespace, method: PretrainMethod, count: int) -> list[dict]:
    """What pre-training reads of images from all over its data, in epoch 0."""
    args.rank, args.world_size, args.batch_size, args.update_freq, args.num_workers = 0, 1, 1, 1, 0
    dataset = build_data(args, method).dataset
    return [dataset[0, index] for index in spread(len(dataset), count)]


def masks(own: Namespace, flags: list[str]) -> Figure:
    args = options.parse("pretrain", flags)
    method = build_method(args)
    if "mask" not in method.views:
        raise ValueError(f"{args.model} draws its masks itself: visualize.py reconstruct shows them")
    return mask_grid(training_samples(args, method, own.images))


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


@torch.no_grad()
def reconstruction_grid(method: PretrainMethod, batch: dict[str, Tensor], normalize: Normalize) -> Figure:
    """What is known of each image, what the method predicts, and both put together."""
    method.eval()
    panels = method.reconstruct(normalize(batch))
    pixels = [(panel.float() * normalize.std + normalize.mean).clamp(0, 1).mul(255).round().byte() for panel in panels]
    rows = zip(*([as_picture(image) for image in panel] for panel in pixels), strict=True)
    return draw_grid(rows, ["image", "known patches", "predicted", "put together"])


def reconstruct(own: Namespace, flags: list[str]) -> Figure:
    method, args = load_model(own.checkpoint, "model", flags)
    if not getattr(method, "predicts_pixels", False):  # a classifier says nothing of it
        raise ValueError(f"--checkpoint {own.checkpoint} holds {args.model}, which predicts no pixels")
    if method.teacher is not None:
        log.info("%s", checkpoint.load_pretrained(method.teacher, own.checkpoint))
    batch = default_collate(training_samples(args, method, own.images))
    return reconstruction_grid(method, batch, normalization(args))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """This script's own flags, and what is left over for the flags of the run scripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--output", type=Path, required=True, metavar="FILE", help="PNG, PDF or SVG to write")
    shared.add_argument("--images", type=int, default=6, help="number of images")
    kinds = parser.add_subparsers(
        dest="kind", required=True, parser_class=partial(argparse.ArgumentParser, allow_abbrev=False)
    )
    of_vit = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    of_vit.add_argument("--checkpoint", required=True, help="any checkpoint of a ViT")
    of_vit.add_argument("--model_key", default=checkpoint.PUBLISHED_KEYS, help="'model' for the student instead")
    looks = kinds.add_parser(
        "attention",
        parents=[shared, of_vit],
        help="where the class token looks; further flags win over those of the run",
    )
    looks.add_argument("--layer", type=int, default=-1, help="block, counted from 0 or from the end")
    follows = kinds.add_parser(
        "orders",
        parents=[shared, of_vit],
        help="orders of the patches and the maps that they follow; further flags win over those of the run",
    )
    follows.add_argument(
        "--orders", nargs="+", choices=PATCH_ORDERS, default=ORDERS, metavar="ORDER",
        help=f"as for --permutation_type: {', '.join(PATCH_ORDERS)}",
    )  # fmt: skip
    kinds.add_parser(
        "masks", parents=[shared], help="what student and teacher see; further flags as for run_pretraining.py"
    )
    predicts = kinds.add_parser(
        "reconstruct",
        parents=[shared],
        help="what a method predicts of the pixels; further flags win over those of the run",
    )
    predicts.add_argument("--checkpoint", required=True, help="a checkpoint-<epoch>.pth of pre-training")
    return parser.parse_known_args(argv)


KINDS = {"attention": attention, "orders": orders, "masks": masks, "reconstruct": reconstruct}


def main(argv: list[str] | None = None) -> None:
    own, flags = parse(argv)
    utils.setup_logging(rank=0)
    try:
        figure = KINDS[own.kind](own, flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
    own.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(own.output, dpi=150)
    log.info("wrote %s", own.output)


if __name__ == "__main__":
    main()
