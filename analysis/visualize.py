"""Draw what a model sees, attends to and predicts: `python analysis/visualize.py KIND --help`.

KIND is attention, orders, masks, reconstruct or compare. A figure has one row per image and one
column per kind of map; `compare` has a row for each of several models and a column per image.
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
from masking_generator import PATCH_ORDERS, patch_order, stretched
from modeling_finetune import VisionTransformer
from modeling_pretrain import PretrainMethod, similarity
from unimim.checkpoint.loading import PUBLISHED_KEYS, RUN_KEYS, load_pretrained
from unimim.checkpoint.runs import rebuild
from unimim.cli import options
from unimim.cli.flags import options_as_flags
from unimim.cli.models import build_method
from unimim.data.preparation import preparation
from unimim.data.pretraining import build_data
from unimim.data.sources import build_source
from unimim.data.views import build_finetune_transform, image_mean_std
from unimim.engine.samples import hide
from unimim.engine.state import Normalize
from unimim.evaluation.attention import Pair, check_cells, class_maps, query_maps
from unimim.files import check_output_folder
from unimim.logs import log, setup_logging

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def draw_grid(
    rows: Iterable[list[np.ndarray]],
    titles: list[str],
    *,
    cell: float = 1.1,
    grid: Pair = (1, 1),
    marks: Sequence[Sequence[int]] = (),
    labels: Sequence[str] = (),
) -> Figure:
    """Return a figure with a row of panels per entry of `rows` and a column per title.

    A panel is an image [H, W, 3] uint8 or a map [h, w] of floats. A map's colors range from 0, or
    its minimum if that is negative, to its maximum. `cell` is a panel's side in inches. `marks`
    lists, for each column, the indices of the patches of `grid` (rows, columns) to be framed.
    `labels` are written beside the rows.
    """
    rows = list(rows)
    figure = Figure(figsize=(cell * len(titles), cell * (len(rows) + 0.25)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for panel, axis in zip(row, line, strict=True):
            lowest = min(0, panel.min())
            axis.imshow(panel, cmap="viridis", vmin=lowest, interpolation="nearest")
            axis.set_axis_off()
        for axis, indices in zip(line, marks, strict=False):
            for index in indices:
                axis.add_patch(frame(index, grid, axis.images[0].get_array().shape[:2]))
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=8)
    beside = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8}
    for label, axis in zip(labels, axes[:, 0], strict=False):
        axis.text(-0.05, 0.5, label, transform=axis.transAxes, **beside)
    return figure


def frame(index: int, grid: Pair, shape: Pair) -> Rectangle:
    """Return the frame around patch `index` of `grid` in a panel of `shape` (height, width)."""
    height = shape[0] / grid[0]
    width = shape[1] / grid[1]
    row, column = divmod(index, grid[1])
    corner = (column * width - 0.5, row * height - 0.5)  # matplotlib's first pixel is around 0
    return Rectangle(corner, width, height, fill=False, edgecolor="red")


# --------------------------------------------------------------------------------------------------
# Attention

HEADS = ("mean", "each", "all")


class Column(NamedTuple):
    """Maps [B, gh, gw] with a title, and the patches to mark in them."""

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
    """Draw the attention of the class tokens, or of the patches `cells`, in some blocks.

    `images` is uint8 [B, 3, H, W]. `heads` shows their mean, each head, or all of these; the
    default is "all" for a single query and "mean" for several. `reduce_mean` subtracts the mean map
    of the class tokens, which is shown, too.
    """
    num_cls = model.num_prefix_tokens
    grid = model.patch_embed.grid_size
    check_cells(cells, grid)
    if reduce_mean and not cells and num_cls == 1:
        raise ValueError(
            "--reduce_mean leaves nothing of a single class token; use --token_indices"
        )
    model.eval()
    heads = heads or ("all" if (len(cells) or num_cls) == 1 else "mean")

    # a column for each layer, query and head
    x = normalize({"image": images})["image"]
    columns = []
    for layer in layers:
        attention = model.attention_maps(x, layer).float().cpu()
        prefix = f"layer {layer}: " if len(layers) > 1 else ""
        queries = attention_columns(attention, num_cls, grid, cells, reduce_mean)
        for name, maps, marks in queries:
            columns += split(f"{prefix}{name}", maps, marks, heads)

    # a row for each image
    heat = [column.maps.numpy() for column in columns]
    rows = zip([to_hwc(image) for image in images], *heat, strict=True)
    titles = ["image", *(column.title for column in columns)]
    marks = [tuple(cells), *(column.marks for column in columns)]
    return draw_grid(rows, titles, grid=grid, marks=marks)


def attention_columns(
    attention: Tensor, num_cls: int, grid: Pair, cells: Sequence[int], reduce_mean: bool
) -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """Return name, maps [B, h, gh, gw] and patches to mark, for each query.

    Queries are the patches `cells`, or the class tokens if there are none; `attention` is
    [B, h, T, T].
    """
    if cells:
        queries = [num_cls + cell for cell in cells]
        names = [f"patch {cell}" for cell in cells]
        marks = [(cell,) for cell in cells]
    else:
        queries = range(num_cls)
        names = [f"class {number}" for number in queries] if num_cls > 1 else [""]
        marks = [()] * num_cls
    maps = query_maps(attention, num_cls, grid, queries)
    if not reduce_mean:
        return list(zip(names, maps.unbind(1), marks, strict=True))
    mean = class_maps(attention, num_cls, grid).mean(1)[:, None]  # [B, 1, gh, gw]
    reduced = (maps - mean[:, None]).unbind(1)
    return [("class mean", mean, ()), *zip(names, reduced, marks, strict=True)]


def split(name: str, maps: Tensor, marks: tuple[int, ...], heads: str) -> list[Column]:
    """Return the columns of one query, given its maps [B, h or 1, gh, gw]."""
    title = f"{name} mean of heads".strip() if heads == "all" else name or "mean of heads"
    mean = Column(title, maps.mean(1), marks)
    if heads == "mean" or maps.shape[1] == 1:
        return [mean]
    each = []
    for head, head_maps in enumerate(maps.unbind(1)):
        each.append(Column(f"{name} head {head}".strip(), head_maps, marks))
    return each if heads == "each" else [mean, *each]


def to_hwc(image: Tensor) -> np.ndarray:
    """Convert [3, H, W] to an array [H, W, 3]."""
    return image.permute(1, 2, 0).numpy()


def load_model(path: str, model_key: str, flags: list[str]) -> tuple[nn.Module, Namespace]:
    """Return a checkpoint's model with the weights of its encoder, and the flags of its run.

    `flags` override those of the run. A file without flags is loaded into the method or the
    classifier that `flags` describe; of a method only the encoder need be there. A classifier gets
    the norm that was trained with its tokens, even where its features are normed after the mean.
    """
    model, args = rebuild(path, flags, model_key=model_key)
    has_no_norm = isinstance(model, VisionTransformer) and isinstance(model.norm, nn.Identity)
    if has_no_norm:
        model.norm = nn.LayerNorm(model.embed_dim, eps=1e-6)
    found = load_pretrained(
        model, path, model_key=model_key, new=getattr(model, "not_exported", ())
    )
    log.info("%s", found)
    if has_no_norm and "norm.weight" in found.missing:
        model.norm = nn.Identity()
    return model, args


def validation_images(args: Namespace, size: tuple[int, int], count: int) -> Tensor:
    """Return evenly spaced validation images as evaluation sees them, uint8 [count, 3, H, W]."""
    path = getattr(args, "eval_data_path", None) or args.data_path
    source = build_source(args.data_set, path, train=False, need_labels=False)
    transform = build_finetune_transform(Namespace(input_size=size, crop_pct=None), train=False)
    dataset = ImageDataset(source, transform, seed=args.seed, prepare=preparation(args))
    return torch.stack([dataset[0, index]["image"] for index in spread(len(dataset), count)])


def spread(total: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices below `total`: data sets are often sorted by class."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def normalization(args: Namespace) -> Normalize:
    """Return the normalization of the run, on the CPU."""
    return Normalize(image_mean_std(args), torch.device("cpu"))


def load_vit(path: str, model_key: str, flags: list[str]) -> tuple[VisionTransformer, Namespace]:
    """Return a checkpoint's ViT, which may be a method's backbone, and the flags of its run."""
    model, args = load_model(path, model_key, flags)
    vit = getattr(model, "backbone", model)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"--checkpoint {path} holds {args.model}, which is not a ViT")
    return vit, args


def attention(own: Namespace, flags: list[str]) -> Figure:
    """Return the figure of `visualize.py attention`."""
    model, args = load_vit(own.checkpoint, own.model_key, flags)
    images = validation_images(args, model.patch_embed.img_size, own.images)
    return attention_grid(
        model, images, normalization(args), own.layer, own.token_indices, own.heads, own.reduce_mean
    )


# --------------------------------------------------------------------------------------------------
# Orders

ORDERS = ("raster", "stochastic", "attention", "attention_center")
# --attention_type -> title
MAPS = {"self": "self-attention", "cls": "similarity to class", "gap": "similarity to mean"}


@torch.no_grad()
def order_maps(model: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """Return the three maps [B, N] that SemAIM's orders can follow, for normalized images.

    A run with a target model follows the similarity to that model's class token, so that one is
    returned (docs/methods/semaim.md#map-of-the-order).
    """
    model.eval()
    prefix = model.num_prefix_tokens
    target = getattr(getattr(model, "target", None), "teacher", None)
    attention = model.attention_maps(images)[:, :, 0, prefix:].mean(1)
    tokens = model.norm(model.forward_features(images)) if target is None else target(images)
    patches = tokens[:, prefix:]
    return {
        "self": attention,
        "cls": stretched(similarity(tokens[:, :1], patches)),
        "gap": stretched(similarity(patches.mean(1, keepdim=True), patches)),
    }


def ranks(kind: str, grid: tuple[int, int], attention: Tensor, seed: int) -> Tensor:
    """Return each patch's rank [B, N] in the order `kind`: N for the first, 1 for the last."""
    images, patches = attention.shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(images, patches, generator=generator)
    center_noise = torch.rand(images, 2, generator=generator)
    order = patch_order(kind, grid, noise, attention, center_noise).expand(images, -1)
    return patches - order.argsort(dim=1, stable=True).argsort(dim=1)


def order_grid(
    model: VisionTransformer,
    images: Tensor,
    normalize: Normalize,
    kinds: list[str],
    followed: str,
    seed: int,
) -> Figure:
    """Draw attention maps of images uint8 [B, 3, H, W] and the orders `kinds`; earlier is brighter.

    Orders that follow a map follow `followed`, a key of `MAPS`.
    """
    grid = model.patch_embed.grid_size
    maps = order_maps(model, normalize({"image": images})["image"])
    columns = {MAPS[kind]: maps[kind] for kind in ("self", "cls", followed)}
    columns |= {kind: ranks(kind, grid, maps[followed], seed) for kind in kinds}
    heat = [column.unflatten(1, grid).float().numpy() for column in columns.values()]
    rows = zip([to_hwc(image) for image in images], *heat, strict=True)
    return draw_grid(rows, ["image", *columns])


def orders(own: Namespace, flags: list[str]) -> Figure:
    """Return the figure of `visualize.py orders`."""
    model, args = load_vit(own.checkpoint, own.model_key, flags)
    images = validation_images(args, model.patch_embed.img_size, own.images)
    has_target = getattr(model, "target", None) is not None
    followed = "cls" if has_target else getattr(model, "attention_type", "cls")
    return order_grid(model, images, normalization(args), own.orders, followed, args.seed)


# --------------------------------------------------------------------------------------------------
# Masks


def mask_grid(samples: Iterable[dict[str, Tensor]]) -> Figure:
    """Draw each training sample: the image, its visible patches, and the teacher's view if any."""
    batch = default_collate(list(samples))
    columns = {"image": batch["image"], "student sees": hide(batch["image"], batch["mask"])}
    if "image_strong" in batch:
        columns["teacher sees"] = batch["image_strong"]
    return draw_grid(image_rows(columns.values()), [*columns])


def image_rows(columns: Iterable[Tensor]) -> Iterable[tuple[np.ndarray, ...]]:
    """Return rows of images [H, W, 3], given columns of uint8 [B, 3, H, W]."""
    arrays = [column.permute(0, 2, 3, 1).numpy() for column in columns]
    return zip(*arrays, strict=True)


def training_samples(args: Namespace, method: PretrainMethod, count: int) -> list[dict]:
    """Return evenly spaced samples of epoch 0 as pre-training reads them."""
    args.rank, args.world_size = 0, 1
    args.batch_size = 1
    args.update_freq = 1
    args.num_workers = 0
    dataset = build_data(args, method).dataset
    return [dataset[0, index] for index in spread(len(dataset), count)]


def masks(own: Namespace, flags: list[str]) -> Figure:
    """Return the figure of `visualize.py masks`."""
    args = options.parse("pretrain", flags)
    method = build_method(args)
    if "mask" not in method.views:
        raise ValueError(
            f"--model {args.model} draws its masks itself; use analysis/visualize.py reconstruct"
        )
    return mask_grid(training_samples(args, method, own.images))


# --------------------------------------------------------------------------------------------------
# Reconstruction


@torch.no_grad()
def reconstruction_grid(
    method: PretrainMethod, batch: dict[str, Tensor], normalize: Normalize
) -> Figure:
    """Draw each image, its visible patches, the method's prediction, and both combined."""
    method.eval()
    pixels = []
    for panel in method.reconstruct(normalize(batch)):
        unit = (panel.float() * normalize.std + normalize.mean).clamp(0, 1)
        pixels.append(unit.mul(255).round().byte())
    titles = ["image", "visible patches", "prediction", "combined"]
    return draw_grid(image_rows(pixels), titles)


def load_method(path: str, flags: list[str]) -> tuple[PretrainMethod, Namespace]:
    """Return a whole pre-training network that predicts pixels, and the flags of its run.

    Raises:
        ValueError: it predicts no pixels, or the file holds only a part of it.
    """
    key = "|".join(RUN_KEYS)
    method, args = rebuild(path, flags, model_key=key)
    if not getattr(method, "predicts_pixels", False):  # classifiers have no such attribute
        raise ValueError(f"--checkpoint {path} holds {args.model}, which does not predict pixels")
    found = load_pretrained(method, path, model_key=key, min_matched=0.0)
    log.info("%s", found)
    trained = {name for name, _ in method.named_parameters()}
    if missing := [name for name in found.missing if name in trained]:
        raise ValueError(
            f"--checkpoint {path} has no {missing[0]} and {len(missing) - 1} other tensors of "
            f"{args.model}, without which no pixels are predicted: use the file of the whole "
            "pre-training network, not that of its encoder"
        )
    if method.teacher is not None:
        log.info("%s", load_pretrained(method.teacher, path))
    return method, args


def reconstruct(own: Namespace, flags: list[str]) -> Figure:
    """Return the figure of `visualize.py reconstruct`."""
    method, args = load_method(own.checkpoint, flags)
    batch = default_collate(training_samples(args, method, own.images))
    return reconstruction_grid(method, batch, normalization(args))


# --------------------------------------------------------------------------------------------------
# Several models

COMPARED = ("attention", "orders", "reconstruct")


class Compared(NamedTuple):
    """What one model shows of each image: the images uint8 [B, 3, H, W] that it saw, and panels."""

    images: Tensor
    panels: list[np.ndarray]


def compare(own: Namespace, flags: list[str]) -> Figure:
    """Return the figure of `visualize.py compare`: the images, then a row for each model.

    All models see the images of the first one's data, each at its own size. What reconstructions
    leave visible is up to each method.
    """
    count = len(own.checkpoints)
    for name in ("models", "labels"):
        given = getattr(own, name)
        if len(given) not in ((0, 1, count) if name == "models" else (0, count)):
            raise ValueError(
                f"--{name} takes one for each of the {count} --checkpoints, not {len(given)}"
            )
    names = own.models if len(own.models) == count else (own.models or [None]) * count
    show = {"attention": attention_row, "orders": order_row, "reconstruct": reconstruct_row}
    rows: list[Compared] = []
    data: Namespace | None = None
    for path, name in zip(own.checkpoints, names, strict=True):
        words = [*flags, "--model", name] if name else flags
        shown, args = show[own.show](own, path, words, data)
        rows.append(shown)
        data = data or args
    shown_images = [to_hwc(image) for image in rows[0].images]
    panels = [shown_images, *(row.panels for row in rows)]
    labels = own.labels or short_names(own.checkpoints)
    return draw_grid(panels, [""] * len(shown_images), labels=["image", *labels])


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the files' names, with as many folders as make them differ."""
    for parts in range(1, 9):
        names = ["/".join(Path(path).with_suffix("").parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def same_data(args: Namespace, data: Namespace | None) -> Namespace:
    """Return the flags with the data, the crops and the seed of another run."""
    names = ("data_set", "data_path", "eval_data_path", "seed", "crop_scale", "color_jitter")
    if data is not None:
        for name in names:
            if hasattr(data, name):
                setattr(args, name, getattr(data, name))
    return args


def attention_row(
    own: Namespace, path: str, flags: list[str], data: Namespace | None
) -> tuple[Compared, Namespace]:
    """Return the attention of the class tokens in the last block, mean over them and the heads."""
    model, args = load_vit(path, own.model_key, flags)
    images = validation_images(same_data(args, data), model.patch_embed.img_size, own.images)
    model.eval()
    attention = model.attention_maps(normalization(args)({"image": images})["image"]).float()
    maps = class_maps(attention, model.num_prefix_tokens, model.patch_embed.grid_size).mean(1)
    return Compared(images, list(maps.numpy())), args


def order_row(
    own: Namespace, path: str, flags: list[str], data: Namespace | None
) -> tuple[Compared, Namespace]:
    """Return the ranks of the patches in SemAIM's order, earlier is brighter."""
    model, args = load_vit(path, own.model_key, flags)
    grid = model.patch_embed.grid_size
    images = validation_images(same_data(args, data), model.patch_embed.img_size, own.images)
    maps = order_maps(model, normalization(args)({"image": images})["image"])
    has_target = getattr(model, "target", None) is not None
    followed = "cls" if has_target else getattr(model, "attention_type", "cls")
    found = ranks(own.order, grid, maps[followed], args.seed).unflatten(1, grid)
    return Compared(images, list(found.float().numpy())), args


def reconstruct_row(
    own: Namespace, path: str, flags: list[str], data: Namespace | None
) -> tuple[Compared, Namespace]:
    """Return the images with what the method predicts in place of what it did not see."""
    method, args = load_method(path, flags)
    batch = default_collate(training_samples(same_data(args, data), method, own.images))
    normalize = normalization(args)
    method.eval()
    pasted = method.reconstruct(normalize(batch)).pasted.float()
    unit = (pasted * normalize.std + normalize.mean).clamp(0, 1)
    pixels = unit.mul(255).round().byte()
    return Compared(batch["image"], [to_hwc(image) for image in pixels]), args


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Return this script's flags, and the remaining ones, which are flags of the run scripts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="PNG, PDF or SVG file to write"
    )
    shared.add_argument("--images", type=int, default=6, help="number of images")
    kinds = parser.add_subparsers(
        dest="kind",
        required=True,
        parser_class=partial(argparse.ArgumentParser, allow_abbrev=False),
    )
    vit = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    vit.add_argument("--checkpoint", required=True, help="any checkpoint of a ViT")
    vit.add_argument(
        "--model_key",
        default=PUBLISHED_KEYS,
        help="entry of the checkpoint to load; 'model' is the student",
    )

    attention_flags = kinds.add_parser(
        "attention",
        parents=[shared, vit],
        help="attention maps of class tokens or single patches; further flags override those of "
        "the run: another --input_size interpolates the positions",
    )
    attention_flags.add_argument(
        "--layer", type=int, nargs="+", default=[-1], help="blocks, counted from 0 or from the end"
    )
    attention_flags.add_argument(
        "--token_indices",
        type=int,
        nargs="+",
        default=[],
        metavar="PATCH",
        help="indices of the patches (row by row from 0) to use as queries instead of the class "
        "tokens",
    )
    attention_flags.add_argument(
        "--heads",
        choices=HEADS,
        default=None,
        help="show the mean of the heads, each head, or all of these (default: all for a single "
        "query, otherwise the mean)",
    )
    attention_flags.add_argument(
        "--reduce_mean",
        action="store_true",
        help="subtract the mean map of the class tokens, which is shown, too",
    )

    order_flags = kinds.add_parser(
        "orders",
        parents=[shared, vit],
        help="prediction orders and the maps that they follow; further flags override those of "
        "the run",
    )
    order_flags.add_argument(
        "--orders",
        nargs="+",
        choices=PATCH_ORDERS,
        default=ORDERS,
        metavar="ORDER",
        help=f"as for --permutation_type: {', '.join(PATCH_ORDERS)}",
    )

    kinds.add_parser(
        "masks",
        parents=[shared],
        help="the inputs of student and teacher; further flags as for run_pretraining.py",
    )
    reconstruct_flags = kinds.add_parser(
        "reconstruct",
        parents=[shared],
        help="the pixels that a method predicts; further flags override those of the run",
    )
    reconstruct_flags.add_argument(
        "--checkpoint",
        required=True,
        help="a checkpoint-<epoch>.pth of pre-training, or a published one with --model METHOD",
    )

    compare_flags = kinds.add_parser(
        "compare",
        parents=[shared],
        help="one picture of several models; further flags override those of every run, e.g. "
        "--data_path",
    )
    compare_flags.add_argument(
        "--checkpoints", nargs="+", required=True, metavar="FILE",
        help="this repository's and published ones, such as MoCo v3's and DINO's",
    )  # fmt: skip
    compare_flags.add_argument(
        "--kind", dest="show", choices=COMPARED, default="attention", help="what is shown"
    )
    compare_flags.add_argument(
        "--models", nargs="+", default=[], metavar="NAME",
        help="models of files without flags of their run, '' for others: one for all or for each",
    )  # fmt: skip
    compare_flags.add_argument("--labels", nargs="+", default=[], help="names of the rows")
    compare_flags.add_argument(
        "--order", choices=PATCH_ORDERS, default="attention_center", help="orders: which one"
    )
    compare_flags.add_argument(
        "--model_key", default=PUBLISHED_KEYS, help="entry of the checkpoints to load"
    )
    return parser.parse_known_args(argv)


def check_output(path: Path) -> None:
    """Raise ValueError, before anything is read, if --output cannot be written."""
    kinds = Figure().canvas.get_supported_filetypes()
    suffix = path.suffix.removeprefix(".").lower()
    if suffix and suffix not in kinds:
        raise ValueError(
            f"--output {path} ends in .{suffix}, which matplotlib does not write; use one of "
            f"{', '.join(f'.{kind}' for kind in sorted(kinds))}"
        )
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; name a file in it")
    check_output_folder("--output: the folder", path.parent)


KINDS = {
    "attention": attention,
    "orders": orders,
    "masks": masks,
    "reconstruct": reconstruct,
    "compare": compare,
}


def main(argv: list[str] | None = None) -> None:
    """Draw the figure and write it to --output."""
    own, flags = parse(argv)
    setup_logging(rank=0)
    try:
        check_output(own.output)
        with options_as_flags():
            figure = KINDS[own.kind](own, flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
    figure.savefig(own.output, dpi=150)
    log.info("wrote %s", own.output)


if __name__ == "__main__":
    main()
