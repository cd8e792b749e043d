"""Draws what a detector finds in each picture of a folder: boxes, masks, classes and scores.

python detection/demo.py CONFIG CHECKPOINT pictures/ --out drawn/
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from detection.task import TASK
from downstream import runner

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
OPACITY = 0.45


def parse(argv: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("checkpoint", help="weights of the whole detector, as training saves them")
    parser.add_argument("pictures", type=Path, help="a folder, or one picture")
    parser.add_argument("--out", type=Path, default=Path("output/detected"), help="folder for the drawn pictures")
    parser.add_argument("--score-thr", type=float, default=0.3, help="what is less certain is not drawn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trust-checkpoint", action="store_true", help="run the code of a pickled checkpoint")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="anything of the config")
    return parser.parse_args(argv, Namespace(launcher="none", work_dir=None, data_root=None))


def pictures_in(path: Path) -> list[Path]:
    """ValueError: there are none."""
    found = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{path} has no pictures")
    return found


class Detector:
    """A file of a picture to what is found in it: mmdet's `pred_instances` on the CPU."""

    def __init__(self, cfg, checkpoint: str, device: str):
        from mmengine.dataset import Compose
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import MODELS, init_default_scope
        from mmengine.runner import load_checkpoint

        init_default_scope("mmdet")
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model))
        self.classes = load_checkpoint(self.model, checkpoint, map_location="cpu", strict=True)["meta"]["dataset_meta"]
        self.model.to(device).eval()
        steps = cfg.test_dataloader.dataset.pipeline
        self.pipeline = Compose([step for step in steps if step["type"] != "LoadAnnotations"])

    @torch.no_grad()
    def __call__(self, path: Path):
        data = self.pipeline({"img_path": str(path), "img_id": 0})
        batch = {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
        return self.model.test_step(batch)[0].pred_instances.cpu()


def draw(picture: Image.Image, instances, classes: tuple[str, ...]) -> Image.Image:
    """Masks as a tint, boxes and labels over them, the most certain on top."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    order = instances.scores.argsort().tolist()
    for number in order:
        mask = instances.masks[number].numpy().astype(bool)
        pixels[mask] = (1 - OPACITY) * pixels[mask] + OPACITY * np.array(colour(int(instances.labels[number])))
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for number in order:
        label = int(instances.labels[number])
        left, top, right, bottom = instances.bboxes[number].tolist()
        pen.rectangle((left, top, right, bottom), outline=colour(label), width=2)
        pen.text((left + 3, top + 1), f"{classes[label]} {instances.scores[number]:.2f}", fill="white",
                 stroke_width=1, stroke_fill="black")  # fmt: skip
    return drawn


def colour(label: int) -> tuple[int, int, int]:
    """A strong colour, another for each class."""
    return tuple(int(128 + 127 * np.cos(2 * np.pi * (label * 0.618 + shift))) for shift in (0, 1 / 3, 2 / 3))


def main(argv: list[str] | None = None) -> list[Path]:
    """Returns the files it has written."""
    args = parse(argv)
    pictures = pictures_in(args.pictures)
    runner.prepare(TASK, args.launcher)
    cfg = runner.load_config(args)
    runner.check_loads(args.checkpoint, args.trust_checkpoint)
    detector = Detector(cfg, args.checkpoint, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in pictures:
        found = detector(path)
        drawn = draw(Image.open(path), found[found.scores >= args.score_thr], detector.classes["classes"])
        written.append(args.out / f"{path.stem}.png")
        drawn.save(written[-1])
    print(f"{len(written)} pictures in {args.out}")
    return written


if __name__ == "__main__":
    runner.launch(main)
