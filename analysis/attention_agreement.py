"""How well attention finds the objects of `shapes`, whose masks are known: one CSV row for a layer
of a checkpoint.

    python analysis/attention_agreement.py --checkpoint out/semanticmim/checkpoint-29.pth [--layer -1] [--csv FILE]

Further flags describe the model of a file that has none of its own (`encoder-*.safetensors`) and
win over those of the others. Values are means over the validation images, or as many as --images
says; every map is the mean over heads.

cls_*       what the class tokens see, on average, against all objects together
one_cls_*   each class token by itself, against all objects together: mean over class tokens
best_cls_*  the best class token of each image; more tokens have more chances, and so does random_best_cls_*
patch_*     what a patch that lies in an object sees, against that object; the patch itself does not count
*_auc       how often a pixel of the object has a larger value than one beside it
*_iou       intersection over union at the best threshold of each map
*_pointing  share of the object in the patch that is looked at most
random_*    the same of maps without meaning: the floor
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
from unimim.data.shapes import VAL_IMAGES, make_scene
from unimim.engine.state import Normalize
from unimim.evaluation.attention import (
    best_iou,
    class_maps,
    patch_maps,
    patch_shares,
    pixel_auc,
    pointing,
)
from unimim.files import write_text

Pair = tuple[int, int]
MEASURES = {"auc": pixel_auc, "iou": best_iou, "pointing": pointing}
SEED = 0  # of the random maps


def scene_at(index: int, size: Pair) -> tuple[Tensor, Tensor]:
    """A validation scene at `size` (height, width), uint8 [3, H, W], and the object of each pixel,
    uint8 [H, W]."""
    scene = make_scene("val", index)
    image = Image.fromarray(scene.image).resize(size[::-1], Image.Resampling.BICUBIC)
    objects = Image.fromarray(scene.instances).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(objects))


def figures(
    attention: Tensor, objects: Tensor, num_cls: int, grid: Pair
) -> Iterator[tuple[str, float]]:
    """All values of one image, from attention [h, T, T] and the objects' numbers [H, W]; 0 is the
    background."""
    shares = patch_shares(objects > 0, grid)
    maps = class_maps(attention, num_cls, grid).flatten(1)  # [n, N]
    for name, measure in MEASURES.items():
        each = measure(maps, shares.expand_as(maps))
        yield f"cls_{name}", float(measure(maps.mean(0), shares))
        yield f"one_cls_{name}", float(each.mean())
        yield f"best_cls_{name}", float(each.max())
    for seen, wanted in patch_queries(attention, objects, num_cls, grid):
        for name, measure in MEASURES.items():
            yield f"patch_{name}", float(measure(seen, wanted))


def patch_queries(
    attention: Tensor, objects: Tensor, num_cls: int, grid: Pair
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each patch of which an object has more than half: what it sees of the other patches, and
    that object."""
    for number in objects[objects > 0].unique().tolist():
        shares = patch_shares(objects == number, grid)
        for cell in (shares > 0.5).nonzero().flatten().tolist():
            others = torch.arange(len(shares)) != cell
            if shares[others].any():
                yield (
                    patch_maps(attention, num_cls, grid, [cell])[0].flatten()[others],
                    shares[others],
                )


@torch.no_grad()
def measure(model: nn.Module, normalize: Normalize, layer: int, images: int) -> dict[str, float]:
    """Means over the first `images` validation scenes; those of patches are taken image by image
    first."""
    num_cls, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    draws, found = torch.Generator().manual_seed(SEED), defaultdict(list)
    model.eval()
    for index in range(images):
        image, objects = scene_at(index, model.patch_embed.img_size)
        attention = model.attention_maps(normalize({"image": image[None]})["image"], layer)[
            0
        ].float()
        random = torch.rand(attention.shape, generator=draws)
        for prefix, values in (("", attention), ("random_", random)):
            own = defaultdict(list)
            for name, value in figures(values, objects, num_cls, grid):
                own[prefix + name].append(value)
            for name, several in own.items():
                found[name].append(np.nanmean(several))
    return {name: float(np.mean(values)) for name, values in found.items()}


def parse(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="any checkpoint of a ViT")
    parser.add_argument(
        "--model_key", default=PUBLISHED_KEYS, help="'model' for the student instead"
    )
    parser.add_argument(
        "--layer", type=int, nargs="+", default=[-1], help="blocks, counted from 0 or from the end"
    )
    parser.add_argument(
        "--images", type=int, default=VAL_IMAGES, help="number of validation images"
    )
    parser.add_argument(
        "--csv", type=Path, default=None, metavar="FILE", help="the rows go there too"
    )
    own, flags = parser.parse_known_args(argv)
    if not 1 <= own.images <= VAL_IMAGES:
        parser.error(f"--images {own.images} must lie between 1 and {VAL_IMAGES}")
    return own, flags


def rows_of(own: Namespace, flags: list[str]) -> list[dict[str, object]]:
    """A row for each layer."""
    model, args = load_model(own.checkpoint, own.model_key, flags)
    about = {
        "checkpoint": own.checkpoint,
        "model": args.model,
        "class_tokens": model.num_prefix_tokens,
    }
    normalize = normalization(args)
    return [
        about | {"layer": layer} | measure(model, normalize, layer, own.images)
        for layer in own.layer
    ]


def main(argv: list[str] | None = None) -> None:
    own, flags = parse(argv)
    try:
        with options_as_flags():
            rows = rows_of(own, flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
    rows = [{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    print(text.getvalue(), end="")
    if own.csv:
        write_text(own.csv, text.getvalue())


if __name__ == "__main__":
    main()
