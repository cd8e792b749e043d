"""Measure how well attention finds the objects of `shapes`: one CSV row per layer of a checkpoint.

    python analysis/attention_agreement.py --checkpoint out/semanticmim/checkpoint-29.pth \\
        [--layer -1] [--cluttered] [--csv FILE]

Further flags describe the model of a file without flags (`encoder-*.safetensors`) and override
those of other files. Values are means over the first --images validation images; every map is the
mean over heads.

cls_*       the mean map of the class tokens against the union of all objects
one_cls_*   each class token's map against the union of all objects: mean over class tokens
best_cls_*  the best class token of each image; more tokens have more chances, which
            random_best_cls_* accounts for
patch_*     the map of a patch inside an object against that object, without the patch itself
*_auc       probability that a pixel of the object has a larger value than one outside
*_iou       intersection over union at the best threshold of each map
*_pointing  fraction of the object in the patch with the largest value
random_*    the same for random maps: the baseline
"""

import argparse
import csv
import io
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.visualize import load_model, normalization
from unimim.checkpoint.loading import PUBLISHED_KEYS
from unimim.cli.flags import options_as_flags
from unimim.data.shapes import CLUTTERED, PLAIN, VAL_IMAGES, Style, make_scene
from unimim.engine.state import Normalize
from unimim.evaluation.attention import (
    best_iou,
    class_maps,
    patch_fractions,
    patch_maps,
    pixel_auc,
    pointing,
)
from unimim.files import write_text

Pair = tuple[int, int]
MEASURES = {"auc": pixel_auc, "iou": best_iou, "pointing": pointing}
SEED = 0  # of the random maps


def scene_at(index: int, size: Pair, style: Style = PLAIN) -> tuple[Tensor, Tensor]:
    """Return a validation scene of `size`, uint8 [3, H, W], and each pixel's object, [H, W]."""
    scene = make_scene("val", index, style)
    image = Image.fromarray(scene.image).resize(size[::-1], Image.Resampling.BICUBIC)
    objects = Image.fromarray(scene.instances).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(objects))


def metrics(
    attention: Tensor, objects: Tensor, num_cls: int, grid: Pair
) -> Iterator[tuple[str, float]]:
    """Yield all metrics of one image by name.

    `attention` is [h, T, T]; `objects` holds object numbers [H, W], 0 for the background.
    """
    coverage = patch_fractions(objects > 0, grid)
    maps = class_maps(attention, num_cls, grid).flatten(1)  # [n, N]
    for name, measure in MEASURES.items():
        each = measure(maps, coverage.expand_as(maps))
        yield f"cls_{name}", float(measure(maps.mean(0), coverage))
        yield f"one_cls_{name}", float(each.mean())
        yield f"best_cls_{name}", float(each.max())
    for patch_map, object_coverage in patch_queries(attention, objects, num_cls, grid):
        for name, measure in MEASURES.items():
            yield f"patch_{name}", float(measure(patch_map, object_coverage))


def patch_queries(
    attention: Tensor, objects: Tensor, num_cls: int, grid: Pair
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the map and the object's coverage over the other patches, for each patch of an object.

    A patch belongs to an object that covers more than half of it.
    """
    for number in objects[objects > 0].unique().tolist():
        coverage = patch_fractions(objects == number, grid)
        for index in (coverage > 0.5).nonzero().flatten().tolist():
            others = torch.arange(len(coverage)) != index
            if coverage[others].any():
                patch_map = patch_maps(attention, num_cls, grid, [index])[0].flatten()
                yield patch_map[others], coverage[others]


@torch.no_grad()
def measure(
    model: nn.Module, normalize: Normalize, layer: int, images: int, style: Style = PLAIN
) -> dict[str, float]:
    """Return the metrics, averaged over patches in each image and then over the first `images`."""
    num_cls = model.num_prefix_tokens
    grid = model.patch_embed.grid_size
    generator = torch.Generator().manual_seed(SEED)
    per_image = defaultdict(list)
    model.eval()
    for index in range(images):
        image, objects = scene_at(index, model.patch_embed.img_size, style)
        x = normalize({"image": image[None]})["image"]
        attention = model.attention_maps(x, layer)[0].float()
        random = torch.rand(attention.shape, generator=generator)
        for prefix, values in (("", attention), ("random_", random)):
            per_query = defaultdict(list)
            for name, value in metrics(values, objects, num_cls, grid):
                per_query[prefix + name].append(value)
            for name, several in per_query.items():
                per_image[name].append(np.nanmean(several))
    return {name: float(np.mean(values)) for name, values in per_image.items()}


def parse(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Return this script's flags, and the remaining ones, which describe the model."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="any checkpoint of a ViT")
    parser.add_argument(
        "--model_key",
        default=PUBLISHED_KEYS,
        help="entry of the checkpoint to load; 'model' is the student",
    )
    parser.add_argument(
        "--layer", type=int, nargs="+", default=[-1], help="blocks, counted from 0 or from the end"
    )
    parser.add_argument(
        "--images", type=int, default=VAL_IMAGES, help="number of validation images"
    )
    parser.add_argument(
        "--csv", type=Path, default=None, metavar="FILE", help="also write the rows to this file"
    )
    parser.add_argument(
        "--cluttered", action="store_true", help="use the scenes of make_shapes.py --cluttered"
    )
    own, flags = parser.parse_known_args(argv)
    if not 1 <= own.images <= VAL_IMAGES:
        parser.error(f"--images {own.images} must lie between 1 and {VAL_IMAGES}")
    return own, flags


def rows_of(own: Namespace, flags: list[str]) -> list[dict[str, object]]:
    """Return one row per layer."""
    model, args = load_model(own.checkpoint, own.model_key, flags)
    about = {
        "checkpoint": own.checkpoint,
        "model": args.model,
        "class_tokens": model.num_prefix_tokens,
    }
    normalize = normalization(args)
    style = CLUTTERED if own.cluttered else PLAIN
    rows = []
    for layer in own.layer:
        means = measure(model, normalize, layer, own.images, style)
        rows.append(about | {"layer": layer} | means)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Print the rows as CSV and write them to --csv."""
    own, flags = parse(argv)
    try:
        with options_as_flags():
            rows = rows_of(own, flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
    print(text.getvalue(), end="")
    if own.csv:
        write_text(own.csv, text.getvalue())


if __name__ == "__main__":
    main()
