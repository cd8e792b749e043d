"""Pictures of what a model sees, predicts and looks at: `python analysis/visualize.py KIND --help`,
with KIND one of attention, orders, masks, reconstruct.

Every picture is a grid: a row for an image, a column for one way of looking at it.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import ImageDataset
from masking_generator import PATCH_ORDERS, patch_order
from modeling_finetune import VisionTransformer
from modeling_pretrain import PretrainMethod, similarity, stretched
from unimim.checkpoint.loading import PUBLISHED_KEYS, load_pretrained
from unimim.checkpoint.runs import rebuild
from unimim.cli import options
from unimim.cli.flags import options_as_flags
from unimim.cli.models import build_method
from unimim.data.pretraining import build_data
from unimim.data.sources import build_source
from unimim.data.views import build_finetune_transform, image_mean_std
from unimim.engine.state import Normalize
from unimim.evaluation.attention import Pair, check_cells, class_maps, query_maps
from unimim.logs import log, setup_logging

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

MASKED_GREY = 128


def draw_grid(
    rows: Iterable[list[np.ndarray]],
    titles: list[str],
    *,
    cell: float = 1.1,
    grid: Pair = (1, 1),
    marks: Sequence[Sequence[int]] = (),
) -> Figure:
    """A figure with one picture per row and title: [H, W, 3] uint8 is shown as it is, [h, w] floats
    as a map.

    Each map's colors run from 0, or from its smallest value below, to its own largest value.
    `cell` is a picture's side in inches. `marks` lists for each column the cells of `grid` (rows,
    columns) that get a frame.
    """
    rows = list(rows)
    figure = Figure(figsize=(cell * len(titles), cell * (len(rows) + 0.25)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for picture, axis in zip(row, line, strict=True):
            axis.imshow(
                picture, cmap="viridis", vmin=min(0, picture.min()), interpolation="nearest"
            )
            axis.set_axis_off()
        for axis, cells in zip(line, marks, strict=False):
            for number in cells:
                axis.add_patch(frame(number, grid, axis.images[0].get_array().shape[:2]))
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=8)
    return figure


def frame(number: int, grid: Pair, shape: Pair) -> Rectangle:
    """Around cell `number` of `grid` in a picture of `shape` (height, width) pixels, which
    matplotlib puts at 0."""
    height, width = shape[0] / grid[0], shape[1] / grid[1]
    row, column = divmod(number, grid[1])
    return Rectangle(
        (column * width - 0.5, row * height - 0.5), width, height, fill=False, edgecolor="red"
    )


# --------------------------------------------------------------------------------------------------
# Attention

HEADS = ("mean", "each", "all")


class Column(NamedTuple):
    """Maps [B, gh, gw] with a title, and the patches that are marked in them."""

    title: str
    maps: Tensor
    marks: tuple[int, ...] = ()


def attention_grid(
    model: VisionTransformer,
    images: Tensor,
    normalize: Normalize,
    layers: Sequence[int] = (-1,),
    cells: Sequence[int] = (),
    heads: str | None = None,
    reduce_mean: bool = False,
) -> Figure:
    """Where class tokens, or the patches `cells`, of images uint8 [B, 3, H, W] look in some blocks.

    Heads: their mean, each, or all of that, which is the default for a single query; of several it
    is the mean. `reduce_mean` takes away what the class tokens see on average, which is shown too.
    """
    num_cls, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    check_cells(cells, grid)
    if reduce_mean and not cells and num_cls == 1:
        raise ValueError(
            "--reduce_mean leaves nothing of a single class token: give --token_indices"
        )
    model.eval()
    heads = heads or ("all" if (len(cells) or num_cls) == 1 else "mean")
    x, columns = normalize({"image": images})["image"], []
    for layer in layers:
        attention = model.attention_maps(x, layer).float().cpu()
        found = attention_columns(attention, num_cls, grid, cells, reduce_mean)
        prefix = f"layer {layer}: " if len(layers) > 1 else ""
        columns += [
            column for name, *own in found for column in split(f"{prefix}{name}", *own, heads)
        ]
    rows = zip(
        [as_picture(image) for image in images],
        *(column.maps.numpy() for column in columns),
        strict=True,
    )
    marks = [tuple(cells), *(column.marks for column in columns)]
    return draw_grid(rows, ["image", *(column.title for column in columns)], grid=grid, marks=marks)


def attention_columns(
    attention: Tensor, num_cls: int, grid: Pair, cells: Sequence[int], reduce_mean: bool
) -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """Of attention [B, h, T, T], for each class token or each of the patches `cells`: its name, its
    maps [B, h, gh, gw] and the cells to mark."""
    maps = query_maps(
        attention, num_cls, grid, [num_cls + cell for cell in cells] or range(num_cls)
    )
    names = [f"patch {cell}" for cell in cells] or [f"class {number}" for number in range(num_cls)]
    names = [""] if names == ["class 0"] else names
    marks = [(cell,) for cell in cells] or [()] * num_cls
    if not reduce_mean:
        return list(zip(names, maps.unbind(1), marks, strict=True))
    mean = class_maps(attention, num_cls, grid).mean(1)[:, None]  # [B, 1, gh, gw]
    return [
        ("class mean", mean, ()),
        *zip(names, (maps - mean[:, None]).unbind(1), marks, strict=True),
    ]


def split(name: str, maps: Tensor, marks: tuple[int, ...], heads: str) -> list[Column]:
    """The columns of one query, from its maps [B, h or 1, gh, gw]."""
    mean = Column(
        f"{name} mean of heads".strip() if heads == "all" else name or "mean of heads",
        maps.mean(1),
        marks,
    )
    if heads == "mean" or maps.shape[1] == 1:
        return [mean]
    each = [
        Column(f"{name} head {head}".strip(), own, marks) for head, own in enumerate(maps.unbind(1))
    ]
    return each if heads == "each" else [mean, *each]


def as_picture(image: Tensor) -> np.ndarray:
    """uint8 [3, H, W] to [H, W, 3]."""
    return image.permute(1, 2, 0).numpy()


def load_model(path: str, model_key: str, flags: list[str]) -> tuple[nn.Module, Namespace]:
    """Returns the model of a checkpoint with its weights, and the flags of its run, over which the
    given `flags` win (`rebuild`)."""
    model, args = rebuild(path, flags, model_key=model_key)
    log.info("%s", load_pretrained(model, path, model_key=model_key))
    return model, args


def validation_images(args: Namespace, size: tuple[int, int], count: int) -> Tensor:
    """Images from all over the flags' data set, as evaluation sees them: uint8 [count, 3, H, W]."""
    path = getattr(args, "eval_data_path", None) or args.data_path
    source = build_source(args.data_set, path, train=False, need_labels=False)
    transform = build_finetune_transform(Namespace(input_size=size, crop_pct=None), train=False)
    dataset = ImageDataset(source, transform, seed=args.seed)
    return torch.stack([dataset[0, index]["image"] for index in spread(len(dataset), count)])


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` indices at equal distances: data sets are often in the order of their
    classes."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def normalization(args: Namespace) -> Normalize:
    return Normalize(image_mean_std(args), torch.device("cpu"))


def load_vit(path: str, model_key: str, flags: list[str]) -> tuple[VisionTransformer, Namespace]:
    """The ViT of a checkpoint, which may be a method's backbone, and the flags as of
    `load_model`."""
    model, args = load_model(path, model_key, flags)
    vit = getattr(model, "backbone", model)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"--checkpoint {path} holds {args.model}, which is no ViT")
    return vit, args


def attention(own: Namespace, flags: list[str]) -> Figure:
    model, args = load_vit(own.checkpoint, own.model_key, flags)
    images = validation_images(args, model.patch_embed.img_size, own.images)
    return attention_grid(
        model, images, normalization(args), own.layer, own.token_indices, own.heads, own.reduce_mean
    )


# --------------------------------------------------------------------------------------------------
# Orders

ORDERS = ("raster", "stochastic", "attention", "attention_center")
MAPS = {
    "self": "self-attention",
    "cls": "similarity to class",
    "gap": "similarity to mean",
}  # by --attention_type


@torch.no_grad()
def order_maps(model: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """The three maps that SemAIM's orders can follow, each [B, N], of normalized images
    (specs/semaim.md 4).

    A run with a target model follows the similarity to that model's class token, which is then the
    one shown.
    """
    model.eval()
    prefix, target = model.num_prefix_tokens, getattr(model, "target", None)
    attention = model.attention_maps(images)[:, :, 0, prefix:].mean(1)
    tokens = model.norm(model.forward_features(images)) if target is None else target(images)
    patches = tokens[:, prefix:]
    queries = {"cls": tokens[:, :1], "gap": patches.mean(1, keepdim=True)}
    return {"self": attention} | {
        kind: stretched(similarity(query, patches)) for kind, query in queries.items()
    }


def ranks(kind: str, grid: tuple[int, int], attention: Tensor, seed: int) -> Tensor:
    """Place of each patch [B, N] in the order `kind`, the first one's being N and the last one's
    1."""
    count, cells = attention.shape
    generator = torch.Generator().manual_seed(seed)
    noise, center_noise = (
        torch.rand(count, cells, generator=generator),
        torch.rand(count, 2, generator=generator),
    )
    order = patch_order(kind, grid, noise, attention, center_noise).expand(count, -1)
    return cells - order.argsort(dim=1, stable=True).argsort(dim=1)


def order_grid(
    model: VisionTransformer,
    images: Tensor,
    normalize: Normalize,
    kinds: list[str],
    followed: str,
    seed: int,
) -> Figure:
    """Self-attention and similarity of images uint8 [B, 3, H, W] and the orders `kinds`, the
    earlier the brighter.

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


# --------------------------------------------------------------------------------------------------
# Masks


def mask_grid(samples: Iterable[dict[str, Tensor]]) -> Figure:
    """What pre-training reads of each sample: the image, the same with its masked patches gray, the
    teacher's view."""
    batch = default_collate(list(samples))
    columns = {"image": batch["image"], "student sees": hide(batch["image"], batch["mask"])}
    if "image_strong" in batch:
        columns["teacher sees"] = batch["image_strong"]
    return draw_grid(
        zip(*([as_picture(i) for i in images] for images in columns.values()), strict=True),
        [*columns],
    )


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Images [B, 3, H, W] with the patches where mask [B, gh, gw] is True in gray."""
    height, width = (
        side // cells for side, cells in zip(images.shape[-2:], mask.shape[-2:], strict=True)
    )
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
        raise ValueError(
            f"{args.model} draws its masks itself: analysis/visualize.py reconstruct shows them"
        )
    return mask_grid(training_samples(args, method, own.images))


# --------------------------------------------------------------------------------------------------
# Reconstruction


@torch.no_grad()
def reconstruction_grid(
    method: PretrainMethod, batch: dict[str, Tensor], normalize: Normalize
) -> Figure:
    """What is known of each image, what the method predicts, and both put together."""
    method.eval()
    panels = method.reconstruct(normalize(batch))
    pixels = [
        (panel.float() * normalize.std + normalize.mean).clamp(0, 1).mul(255).round().byte()
        for panel in panels
    ]
    rows = zip(*([as_picture(image) for image in panel] for panel in pixels), strict=True)
    return draw_grid(rows, ["image", "known patches", "predicted", "put together"])


def reconstruct(own: Namespace, flags: list[str]) -> Figure:
    method, args = load_model(own.checkpoint, "model", flags)
    if not getattr(method, "predicts_pixels", False):  # a classifier says nothing of it
        raise ValueError(
            f"--checkpoint {own.checkpoint} holds {args.model}, which predicts no pixels"
        )
    if method.teacher is not None:
        log.info("%s", load_pretrained(method.teacher, own.checkpoint))
    batch = default_collate(training_samples(args, method, own.images))
    return reconstruction_grid(method, batch, normalization(args))


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """This script's own flags, and what is left over for the flags of the run scripts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="PNG, PDF or SVG to write"
    )
    shared.add_argument("--images", type=int, default=6, help="number of images")
    kinds = parser.add_subparsers(
        dest="kind",
        required=True,
        parser_class=partial(argparse.ArgumentParser, allow_abbrev=False),
    )
    of_vit = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    of_vit.add_argument("--checkpoint", required=True, help="any checkpoint of a ViT")
    of_vit.add_argument(
        "--model_key", default=PUBLISHED_KEYS, help="'model' for the student instead"
    )
    looks = kinds.add_parser(
        "attention",
        parents=[shared, of_vit],
        help="where class tokens or single patches look; further flags win over those of the run: with another "
        "--input_size positions are interpolated",
    )
    looks.add_argument(
        "--layer", type=int, nargs="+", default=[-1], help="blocks, counted from 0 or from the end"
    )
    looks.add_argument(
        "--token_indices", type=int, nargs="+", default=[], metavar="PATCH",
        help="patches that look, counted row by row from 0, in place of the class tokens",
    )  # fmt: skip
    looks.add_argument(
        "--heads",
        choices=HEADS,
        default=None,
        help="their mean, each, or all of that; None: all of a single query",
    )
    looks.add_argument(
        "--reduce_mean",
        action="store_true",
        help="less what the class tokens see on average, which is shown too",
    )
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
        "masks",
        parents=[shared],
        help="what student and teacher see; further flags as for run_pretraining.py",
    )
    predicts = kinds.add_parser(
        "reconstruct",
        parents=[shared],
        help="what a method predicts of the pixels; further flags win over those of the run",
    )
    predicts.add_argument(
        "--checkpoint", required=True, help="a checkpoint-<epoch>.pth of pre-training"
    )
    return parser.parse_known_args(argv)


KINDS = {"attention": attention, "orders": orders, "masks": masks, "reconstruct": reconstruct}


def main(argv: list[str] | None = None) -> None:
    own, flags = parse(argv)
    setup_logging(rank=0)
    try:
        with options_as_flags():
            figure = KINDS[own.kind](own, flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
    own.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(own.output, dpi=150)
    log.info("wrote %s", own.output)


if __name__ == "__main__":
    main()
