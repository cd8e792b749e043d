"""Draw the objects that a detector finds in a folder of images.

Usage: demo.py CONFIG CHECKPOINT IMAGES --out FOLDER
"""

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
    """Add the flags of detection."""
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="smallest score of an object that is drawn"
    )


def class_names(cfg) -> tuple[str, ...]:
    """Return the class names of the configuration's data set."""
    from mmdet.registry import DATASETS

    dataset = cfg.test_dataloader.dataset
    return {**DATASETS.get(dataset.type).METAINFO, **dataset.get("metainfo", {})}["classes"]


def overlay(image: Image.Image, instances, names: Sequence[str]) -> Image.Image:
    """Draw mmdet's instances over an image: tinted masks, boxes, classes and scores."""
    pixels = np.array(image, dtype=np.float32)
    order = instances.scores.argsort().tolist()
    for number in order:
        mask = instances.masks[number].numpy().astype(bool)
        tint = np.array(color(int(instances.labels[number])))
        pixels[mask] = (1 - OPACITY) * pixels[mask] + OPACITY * tint
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for number in order:
        label = int(instances.labels[number])
        box = instances.bboxes[number].tolist()
        left, top, *_ = box
        pen.rectangle(box, outline=color(label), width=2)
        text = f"{names[label]} {instances.scores[number]:.2f}"
        pen.text((left + 3, top + 1), text, fill="white", stroke_width=1, stroke_fill="black")
    return drawn


def color(label: int) -> tuple[int, ...]:
    """Return a strong color; neighboring classes differ clearly."""
    angles = (label * 0.618 + shift for shift in (0, 1 / 3, 2 / 3))
    return tuple(int(128 + 127 * np.cos(2 * np.pi * angle)) for angle in angles)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the objects of all images."""
    args = runner.parse_demo(argv, __doc__, add_flags)
    cfg, network = runner.demo_network(TASK, args)
    names = class_names(cfg)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for path in runner.image_files(args.images):
        instances = runner.predict(cfg, network, path).pred_instances.cpu()
        instances = instances[instances.scores >= args.score_thr]
        drawn = overlay(Image.open(path).convert("RGB"), instances, names)
        drawn.save(folder / f"{path.stem}.png")
        runner.log.info("%s: %d objects", path.name, len(instances))


if __name__ == "__main__":
    runner.launch(main)
