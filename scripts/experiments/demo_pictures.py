"""Draws the demo's picture: what each system hides, orders, predicts and attends to."""

from argparse import Namespace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from analysis import visualize
from masking_generator import semantic_mask
from unimim.data.part_maps import PartMaps
from unimim.data.pretraining import mask_generator
from unimim.engine.samples import MASKED_GRAY
from unimim.evaluation.attention import class_maps
from unimim.parts.extraction import PALETTE

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.figure import Figure

SHOWN = 224  # pixels of a picture in the figure
IMAGES = 5
MASK_RATIO = 0.75  # of the masks that follow parts
Columns = dict[str, list[np.ndarray]]


def enlarged(picture: np.ndarray, how: Image.Resampling) -> np.ndarray:
    """Return a picture [h, w, 3] uint8 at the size that is shown."""
    return np.asarray(Image.fromarray(picture).resize((SHOWN, SHOWN), how))


def smooth(picture: np.ndarray) -> np.ndarray:
    return enlarged(picture, Image.Resampling.BICUBIC)


def blocks(picture: np.ndarray) -> np.ndarray:
    return enlarged(picture, Image.Resampling.NEAREST)


def overlay(image: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Blend colors [SHOWN, SHOWN, 3] with an image of that size, in gray."""
    gray = image.mean(-1, keepdims=True)
    return (0.4 * gray + 0.6 * colors).astype(np.uint8)


def heat(values: Tensor, image: np.ndarray, name: str, *, soft: bool) -> np.ndarray:
    """Return the colors of a map [gh, gw] over the image."""
    values = values.float()
    spread = (values.max() - values.min()).clamp_min(1e-12)
    colors = colormaps[name](((values - values.min()) / spread).numpy())[..., :3]
    colors = (255 * colors).astype(np.uint8)
    return overlay(image, smooth(colors) if soft else blocks(colors))


def newest(folder: Path) -> str:
    """Return the last checkpoint of a run."""
    return str(max(folder.glob("checkpoint-*.pth"), key=lambda file: file.stat().st_mtime))


def as_pictures(pixels: Tensor) -> list[np.ndarray]:
    """Return images [B, 3, H, W] uint8 as they are shown."""
    return [smooth(visualize.to_hwc(image)) for image in pixels]


@torch.no_grad()
def filled_in(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return what a method sees of each image, and that with its predictions pasted in."""
    method, args = visualize.load_model(newest(folder), "model", [])
    images = visualize.validation_images(args, method.image_size, IMAGES)
    batch = {"image": images}
    draw = mask_generator(args, method, "mask")
    if draw is not None:
        rng = np.random.default_rng(0)
        batch["mask"] = torch.stack([torch.from_numpy(draw(rng)) for _ in images])
    torch.manual_seed(0)
    normalize = visualize.normalization(args)
    panels = method.eval().reconstruct(normalize(batch))
    shown = []
    for panel in (panels.masked, panels.pasted):
        unit = (panel * normalize.std + normalize.mean).clamp(0, 1)
        if images.eq(images[:, :1]).all():  # of gray images the predictions are shown gray too
            unit = unit.mean(1, keepdim=True).expand_as(unit)
        pixels = unit.mul(255).round().byte()
        shown.append(pixels)
    hidden = panels.masked.eq(0).all(1, keepdim=True)
    shown[0] = shown[0].masked_fill(hidden, MASKED_GRAY)
    return as_pictures(shown[0]), as_pictures(shown[1])


def parts_and_masks(folder: Path, images: list[np.ndarray]) -> tuple[list, list]:
    """Return the learned parts over each image, and what is left of it where whole parts hide."""
    maps = PartMaps.open(folder)
    chosen = visualize.spread(maps.meta.num_images, IMAGES)
    parts = torch.stack([torch.from_numpy(maps.read(index).copy()) for index in chosen]).long()
    torch.manual_seed(0)
    found = semantic_mask(parts.flatten(1), MASK_RATIO, 0.0, int(parts.max()) + 1).mask.bool()
    colored, masked = [], []
    for image, part, mask in zip(images, parts, found, strict=True):
        colored.append(overlay(image, blocks(PALETTE[part.numpy()])))
        hidden = blocks(mask.reshape(part.shape).numpy().astype(np.uint8)).astype(bool)
        masked.append(np.where(hidden[..., None], np.uint8(MASKED_GRAY), image))
    return colored, masked


@torch.no_grad()
def orders(folder: Path, images: list[np.ndarray]) -> list[np.ndarray]:
    """Return SemAIM's order over each image; the earlier, the brighter."""
    model, args = visualize.load_vit(newest(folder), visualize.PUBLISHED_KEYS, [])
    grid = model.patch_embed.grid_size
    pixels = visualize.validation_images(args, model.patch_embed.img_size, IMAGES)
    similar = visualize.order_maps(model, visualize.normalization(args)({"image": pixels})["image"])
    ranks = visualize.ranks("attention_center", grid, similar["cls"], seed=0)
    pairs = zip(ranks, images, strict=True)
    return [heat(rank.reshape(grid), image, "viridis", soft=False) for rank, image in pairs]


@torch.no_grad()
def attention(folder: Path, images: list[np.ndarray]) -> list[np.ndarray]:
    """Return where the class token looks that differs most from the others."""
    model, args = visualize.load_vit(newest(folder), visualize.PUBLISHED_KEYS, [])
    pixels = visualize.validation_images(args, model.patch_embed.img_size, IMAGES)
    normalized = visualize.normalization(args)({"image": pixels})["image"]
    grid = model.patch_embed.grid_size
    maps = class_maps(model.eval().attention_maps(normalized), model.num_prefix_tokens, grid)
    if maps.shape[1] > 1:
        maps = (maps - maps.mean(1, keepdim=True)).clamp(min=0)
    token = int(maps.flatten(2).std(-1).mean(0).argmax())
    pairs = zip(maps[:, token], images, strict=True)
    return [heat(values, image, "inferno", soft=True) for values, image in pairs]


def columns(demo) -> Columns:
    """Return all columns of the figure by their titles."""
    folder = {key: demo.run_folder(key, 0) / "pretrain" for key in (
        "mae", "semaim", "semanticmim", "conmim", "a2mim")}  # fmt: skip
    args = visualize.load_model(newest(folder["mae"]), "model", [])[1]
    shown = Namespace(data_set=args.data_set, data_path=args.data_path, seed=0)
    side = (args.input_size, args.input_size) if isinstance(args.input_size, int) else None
    images = as_pictures(visualize.validation_images(shown, side or args.input_size, IMAGES))
    mae_sees, mae_fills = filled_in(folder["mae"])
    a2mim_sees, a2mim_fills = filled_in(folder["a2mim"])
    parts, hidden_parts = parts_and_masks(demo.run_folder("semmae", 0) / "parts/shown", images)
    return {
        "image": images,
        "MAE sees": mae_sees,
        "MAE fills in": mae_fills,
        "SemMAE's parts": parts,
        "SemMAE sees": hidden_parts,
        "SemAIM's order": orders(folder["semaim"], images),
        "SemanticMIM\nattends": attention(folder["semanticmim"], images),
        "ConMIM\nattends": attention(folder["conmim"], images),
        "A2MIM sees": a2mim_sees,
        "A2MIM fills in": a2mim_fills,
    }


def draw(demo, file: Path) -> None:
    """Write the figure: a row for each image."""
    found = columns(demo)
    figure = Figure(figsize=(1.05 * len(found), 1.05 * IMAGES + 0.4), layout="constrained")
    axes = figure.subplots(IMAGES, len(found), squeeze=False)
    for column, (title, pictures) in enumerate(found.items()):
        axes[0, column].set_title(title, fontsize=8)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="antialiased")
            axes[row, column].set_axis_off()
    figure.savefig(file, dpi=140)
