"""Generated images in COCO's layout, and a MIMDet so small that a CPU trains it on them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from detection.check_coco import CATEGORY_IDS

HEIGHT, WIDTH = 96, 128
COLORS = ((200, 40, 40), (40, 60, 210))  # of the categories 1 (person) and 18 (dog)
CATEGORIES = (1, 18)


def write_coco(root: Path, train: int = 8, val: int = 4) -> Path:
    """Pictures of two colored squares on gray noise, with outlines: annotations/, train2017/,
    val2017/ in `root`."""
    from mmdet.datasets import CocoDataset

    names = CocoDataset.METAINFO["classes"]
    categories = [
        {"id": number, "name": name} for number, name in zip(CATEGORY_IDS, names, strict=True)
    ]
    (root / "annotations").mkdir(parents=True)
    for split, count, seed in (("train2017", train, 0), ("val2017", val, 1)):
        (root / split).mkdir()
        rng, images, annotations = np.random.default_rng(seed), [], []
        for number in range(1, count + 1):
            name = f"{number:012d}.jpg"
            picture, boxes = scene(rng)
            Image.fromarray(picture).save(root / split / name, quality=95)
            images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
            annotations += [
                annotation(box, kind, number, len(annotations) + k)
                for k, (kind, box) in enumerate(boxes, 1)
            ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def scene(
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """A square in each half of the picture, one of each kind: pixels and (kind, (x, y, w, h))."""
    picture = rng.integers(100, 140, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    boxes = []
    for half, kind in enumerate(rng.permutation(2)):
        side = int(rng.integers(24, 44))
        x = int(half * WIDTH // 2 + rng.integers(0, WIDTH // 2 - side))
        y = int(rng.integers(0, HEIGHT - side))
        picture[y : y + side, x : x + side] = COLORS[kind]
        boxes.append((int(kind), (x, y, side, side)))
    return picture, boxes


def annotation(box: tuple[int, int, int, int], kind: int, image: int, number: int) -> dict:
    x, y, w, h = box
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {
        "id": number,
        "image_id": image,
        "category_id": CATEGORIES[kind],
        "bbox": list(box),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": outline,
    }
