"""Draw the classes that a segmentor predicts over a folder of images.

Usage: demo.py CONFIG CHECKPOINT IMAGES --out FOLDER
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from semantic_segmentation.task import TASK
from unimim.openmmlab import runner

OPACITY = 0.6


def overlay(image: np.ndarray, classes: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Blend the colors of classes [H, W] with an image [H, W, 3], uint8."""
    return (image * (1 - OPACITY) + palette[classes] * OPACITY).astype(np.uint8)


def class_names(cfg) -> tuple[Sequence[str], np.ndarray]:
    """Return class names and colors [K, 3] of the configuration's data set."""
    from mmseg.registry import DATASETS

    dataset = cfg.test_dataloader.dataset
    info = {**DATASETS.get(dataset.type).METAINFO, **dataset.get("metainfo", {})}
    return info["classes"], np.array(info["palette"], dtype=np.uint8)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the classes of all images."""
    args = runner.parse_demo(argv, __doc__)
    cfg, network = runner.demo_network(TASK, args)
    names, palette = class_names(cfg)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for path in runner.image_files(args.images):
        classes = runner.predict(cfg, network, path).pred_sem_seg.data[0].cpu().numpy()
        image = np.asarray(Image.open(path).convert("RGB"))
        Image.fromarray(overlay(image, classes, palette)).save(folder / f"{path.stem}.png")
        numbers, counts = np.unique(classes, return_counts=True)
        fractions = sorted(zip(counts / classes.size, numbers, strict=True), reverse=True)
        summary = ", ".join(f"{names[k]} {fraction:.0%}" for fraction, k in fractions[:5])
        runner.log.info("%s: %s", path.name, summary)


if __name__ == "__main__":
    runner.launch(main)
