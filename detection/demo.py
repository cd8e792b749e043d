"""Draws what a detector finds in a folder of images: `demo.py CONFIG CHECKPOINT IMAGES --out
FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from detection.task import TASK
from unimim.openmmlab import runner

OPACITY = 0.45


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="what is less certain is not drawn"
    )


def class_names(cfg) -> tuple[str, ...]:
    """Of the configuration's data set."""
    from mmdet.registry import DATASETS

    dataset = cfg.test_dataloader.dataset
    return {**DATASETS.get(dataset.type).METAINFO, **dataset.get("metainfo", {})}["classes"]


def overlay(image: Image.Image, instances, names: Sequence[str]) -> Image.Image:
    """mmdet's instances over an image: masks as a tint, boxes, classes and scores, the most certain
    on top."""
    pixels = np.array(image, dtype=np.float32)
    order = instances.scores.argsort().tolist()
    for number in order:
        mask = instances.masks[number].numpy().astype(bool)
        pixels[mask] = (1 - OPACITY) * pixels[mask] + OPACITY * np.array(
            color(int(instances.labels[number]))
        )
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for number in order:
        label, (left, top, *_) = int(instances.labels[number]), instances.bboxes[number].tolist()
        pen.rectangle(instances.bboxes[number].tolist(), outline=color(label), width=2)
        text = f"{names[label]} {instances.scores[number]:.2f}"
        pen.text((left + 3, top + 1), text, fill="white", stroke_width=1, stroke_fill="black")
    return drawn


def color(label: int) -> tuple[int, ...]:
    """A strong color, of neighboring classes far apart."""
    return tuple(
        int(128 + 127 * np.cos(2 * np.pi * (label * 0.618 + shift))) for shift in (0, 1 / 3, 2 / 3)
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = runner.parse_demo(argv, __doc__, add_flags)
    cfg, network = runner.demo_network(TASK, args)
    names, folder = class_names(cfg), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for path in runner.pictures(args.images):
        found = runner.predict(cfg, network, path).pred_instances.cpu()
        found = found[found.scores >= args.score_thr]
        overlay(Image.open(path).convert("RGB"), found, names).save(folder / f"{path.stem}.png")
        runner.log.info("%s: %d objects", path.name, len(found))


if __name__ == "__main__":
    runner.launch(main)
