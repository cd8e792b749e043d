"""Draws docs/overview.jpg: the methods of the repository at work on three photographs.

    python scripts/experiments/overview.py [--picture docs/overview.jpg] [--fast]

The photographs come with scikit-learn and matplotlib. Small networks are trained on crops of them
by the run scripts, in minutes on a CPU; what is shown are crops of the same photographs. Runs that
are finished below --output are kept. `--fast` shows in a minute that the parts fit together.
"""

import argparse
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from analysis import visualize
from masking_generator import build_mask_generator, semantic_mask
from unimim.data.part_maps import PartMaps
from unimim.engine.samples import MASKED_GRAY
from unimim.evaluation.attention import class_maps
from unimim.parts.extraction import PALETTE

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.figure import Figure

SIDE, PATCH = 80, 8
GRID = (SIDE // PATCH, SIDE // PATCH)
SHOWN = 224  # pixels of a picture in the figure
# left, top and side of the square that is shown of each photograph
SQUARES = {"china": (200, 0, 427), "flower": (120, 0, 427), "hopper": (0, 40, 512)}
CROPS = 160  # of each photograph

DATA = (
    f"--data_set image_folder --input_size {SIDE} --imagenet_default_mean_and_std --num_workers 0"
)
TRAIN = "--batch_size 16 --warmup_epochs 1 --min_lr 1e-5 --save_ckpt_freq 1000 --log_every 15"
VIT = f"--patch_size {PATCH} --crop_scale 0.6 1.0"
SMALL = "embed_dim=128 depth=4 num_heads=4"
PRETRAIN = {  # name: (epochs, flags)
    "mae": (
        36,
        f"--model mae_tiny_patch16_224 {VIT} --model_kwargs embed_dim=128 depth=4 num_heads=4 "
        "decoder_embed_dim=96 decoder_depth=2 decoder_num_heads=3 --no_norm_pix_loss --lr 1.5e-3",
    ),
    "a2mim": (
        8,
        f"--model a2mim_vit_tiny_patch16_224 {VIT} --model_kwargs {SMALL} --lr 2e-3 "
        "--mask_type random_mps32 --mask_ratio 0.6",
    ),
    "semaim": (
        3,
        f"--model semaim_tiny_patch16_224 {VIT} --model_kwargs {SMALL} --query_depth 4 --lr 1e-3 "
        "--clip_grad 3 --permutation_type attention_center",
    ),
    "semanticmim": (
        5,
        f"--model semanticmim_maskfeat_tiny_patch16_224 {VIT} --model_kwargs {SMALL} --lr 2e-3 "
        "--mask_type random --mask_ratio 0.8 --num_cls_tokens 8",
    ),
}
PARTS = "--num_parts 6 --decoder_widths 64 48 32 --batch_size 16 --epochs 2 --split val"


def write_photographs(folder: Path) -> None:
    """Write overlapping crops of each photograph to train/, the squares that are shown to val/."""
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_images

    photographs = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    with get_sample_data("grace_hopper.jpg") as file:
        photographs["hopper"] = np.asarray(Image.open(file).convert("RGB"))
    rng = np.random.default_rng(0)
    for name, pixels in photographs.items():
        photograph = Image.fromarray(pixels)
        left, top, side = SQUARES[name]
        save_square(photograph, left, top, side, SHOWN, folder / "val" / name / "0.png")
        for number in range(CROPS):
            side = int(min(photograph.size) * rng.uniform(0.4, 1))
            left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
            save_square(
                photograph, left, top, side, SIDE + 16, folder / "train" / name / f"{number}.png"
            )


def save_square(
    photograph: Image.Image, left: int, top: int, side: int, pixels: int, file: Path
) -> None:
    """Write a square of the photograph, `pixels` wide."""
    file.parent.mkdir(parents=True, exist_ok=True)
    box = (left, top, left + side, top + side)
    photograph.crop(box).resize((pixels, pixels), Image.Resampling.LANCZOS).save(file)


def run(command: str) -> None:
    """Train by `python COMMAND` in the repository on one core."""
    print(f"$ python {command}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*shlex.split(command), "--stop_status", "75"]  # a stopped run is no reason to go on
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)


def train(folder: Path, fast: bool) -> None:
    """Pre-train each method, and learn parts on the features of MAE."""
    data = f"--data_path {shlex.quote(str(folder / 'photographs'))} {DATA}"
    for name, (epochs, flags) in PRETRAIN.items():
        out = shlex.quote(str(folder / name))
        epochs = 2 if fast else epochs
        run(f"run_pretraining.py {flags} {data} {TRAIN} --epochs {epochs} --output_dir {out}")
    parts = PARTS.replace("--epochs 2", "--epochs 1") if fast else PARTS
    run(
        f"run_part_learning.py --teacher {shlex.quote(str(latest(folder / 'mae')))} {data} {parts} "
        f"--output_dir {shlex.quote(str(folder / 'stage1'))} "
        f"--extract {shlex.quote(str(folder / 'parts'))}"
    )


def latest(folder: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return max(folder.glob("checkpoint-*.pth"), key=lambda file: file.stat().st_mtime)


# --------------------------------------------------------------------------------------------------
# Columns: lists of pictures uint8 [SHOWN, SHOWN, 3]


def smooth(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC))


def blocks(picture: np.ndarray) -> np.ndarray:
    """Enlarge a picture with one pixel for each patch, so that patches stay squares."""
    return np.asarray(Image.fromarray(picture).resize((SHOWN, SHOWN), Image.Resampling.NEAREST))


def heat(values: Tensor, photograph: np.ndarray, name: str, *, soft: bool) -> np.ndarray:
    """Colors of a map [gh, gw] over the photograph in gray."""
    values = values.float().reshape(GRID)
    values = (values - values.min()) / (values.max() - values.min())
    colors = (255 * colormaps[name](values.numpy())[..., :3]).astype(np.uint8)
    gray = photograph.mean(-1, keepdims=True)
    enlarged = smooth(colors) if soft else blocks(colors)
    return (0.35 * gray + 0.65 * enlarged).astype(np.uint8)


def masked(photograph: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photograph with its masked patches in gray."""
    hidden = blocks(mask.astype(np.uint8))[..., None].astype(bool)
    return np.where(hidden, np.uint8(MASKED_GRAY), photograph)


def mask_columns(photographs: list[np.ndarray], parts: Tensor) -> dict[str, list[np.ndarray]]:
    """Masks as ConMIM and BEiT (block), MAE (random) and SemMAE (whole parts) draw them."""
    size = {"input_size": SIDE, "patch_size": PATCH, "mask_ratio": 0.75}
    rng = np.random.default_rng(1)
    columns = {}
    for name in ("block", "random"):
        draw = build_mask_generator(name, **size)
        columns[f"mask: {name}"] = [masked(photograph, draw(rng)) for photograph in photographs]
    torch.manual_seed(2)
    found = semantic_mask(parts.flatten(1), 0.75, 0.0, int(parts.max()) + 1).mask.bool()
    columns["mask: parts"] = [
        masked(photograph, mask.reshape(GRID).numpy())
        for photograph, mask in zip(photographs, found, strict=True)
    ]
    return columns


@torch.no_grad()
def reconstructions(checkpoint: Path, batch: dict[str, Tensor]) -> list[np.ndarray]:
    """Predicted pixels where patches were masked, the image's own elsewhere."""
    method, args = visualize.load_model(str(checkpoint), "model", [])
    normalize = visualize.normalization(args)
    pasted = method.eval().reconstruct(normalize(dict(batch))).pasted
    pixels = (pasted * normalize.std + normalize.mean).clamp(0, 1).mul(255).round().byte()
    return [smooth(visualize.to_hwc(image)) for image in pixels]


def orders(checkpoint: Path, images: Tensor, photographs: list[np.ndarray]) -> list[np.ndarray]:
    """SemAIM's order, the earlier the brighter."""
    model, args = visualize.load_vit(str(checkpoint), visualize.PUBLISHED_KEYS, [])
    normalized = visualize.normalization(args)({"image": images})["image"]
    similar = visualize.order_maps(model, normalized)["cls"]
    ranks = visualize.ranks("attention_center", GRID, similar, seed=0)
    pairs = zip(ranks, photographs, strict=True)
    return [heat(rank, photograph, "viridis", soft=False) for rank, photograph in pairs]


@torch.no_grad()
def attention(checkpoint: Path, images: Tensor, photographs: list[np.ndarray]) -> list[np.ndarray]:
    """Where one class token looks, compared with the mean of all of them."""
    model, args = visualize.load_vit(str(checkpoint), visualize.PUBLISHED_KEYS, [])
    normalized = visualize.normalization(args)({"image": images})["image"]
    maps = class_maps(model.eval().attention_maps(normalized), model.num_prefix_tokens, GRID)
    own = maps - maps.mean(1, keepdim=True)
    # the token whose attention differs most from the others'
    token = int(own.flatten(2).std(-1).mean(0).argmax())
    pairs = zip(own[:, token].clamp(min=0), photographs, strict=True)
    return [heat(values, photograph, "inferno", soft=True) for values, photograph in pairs]


def columns_of(folder: Path) -> dict[str, list[np.ndarray]]:
    """All columns of the figure by their titles."""
    args = Namespace(
        data_set="image_folder",
        data_path=str(folder / "photographs"),
        seed=0,
    )
    images = visualize.validation_images(args, (SIDE, SIDE), len(SQUARES))
    files = sorted((folder / "photographs/val").glob("*/0.png"))
    photographs = [np.asarray(Image.open(file)) for file in files]
    maps = PartMaps.open(folder / "parts", num_images=len(files))
    parts = torch.stack(
        [torch.from_numpy(maps.read(number).copy()) for number in range(len(files))]
    )
    colored = [
        (0.45 * photograph + 0.55 * blocks(PALETTE[part.numpy()])).astype(np.uint8)
        for photograph, part in zip(photographs, parts, strict=True)
    ]
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    draw = build_mask_generator("random_mps32", input_size=SIDE, patch_size=PATCH, mask_ratio=0.6)
    masks = torch.stack([torch.from_numpy(draw(rng)) for _ in files])
    batch = {"image": images}
    return {
        "image": photographs,
        "SemMAE: parts": colored,
        "SemAIM: order": orders(latest(folder / "semaim"), images, photographs),
        **mask_columns(photographs, parts),
        "MAE: 75 % filled in": reconstructions(latest(folder / "mae"), batch),
        "A2MIM: 60 % filled in": reconstructions(latest(folder / "a2mim"), batch | {"mask": masks}),
        "SemanticMIM: attention": attention(latest(folder / "semanticmim"), images, photographs),
    }


def draw_figure(columns: dict[str, list[np.ndarray]], file: Path) -> None:
    """Write the figure: a row for each photograph."""
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.5 * len(columns), 1.5 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=8)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="antialiased")
            axes[row, column].set_axis_off()
    options = {"pil_kwargs": {"quality": 88}} if file.suffix == ".jpg" else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, **options)
    print(f"wrote {file}, {file.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output/overview")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/overview.jpg")
    parser.add_argument("--fast", action="store_true", help="two epochs of each, to try it out")
    args = parser.parse_args()
    folder = args.output.resolve()
    if not (folder / "photographs/val").is_dir():
        write_photographs(folder / "photographs")
    train(folder, args.fast)
    draw_figure(columns_of(folder), args.picture)


if __name__ == "__main__":
    main()
