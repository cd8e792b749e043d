"""Data loading, measured: the fast pipeline against the published one in one process, and their
pictures' difference.

Called by `benchmark.py data`. Images per second are of processor time on one core, decoding and
masks included.
"""

import argparse
import dataclasses
import random
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import ColorJitter, Compose, RandomApply, RandomGrayscale
from torchvision.transforms.functional import normalize, to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import modeling_pretrain  # noqa: F401  (registers the methods)
from datasets import ImageDataset
from masking_generator import MaskGenerator, build_mask_generator
from unimim.data.color import (
    BLUR_RADIUS,
    JITTER_RANGES,
    ColorDraws,
    draw_color,
    fast_color,
    reference_color,
)
from unimim.data.crops import reference_crop
from unimim.data.jpeg import RawImage, decode_pillow
from unimim.data.shapes import background
from unimim.data.sources import map_source
from unimim.data.views import MEAN_STD, Sample, build_pretrain_transform, draw_view

SAMPLE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "imagenet_sample"
SECOND_SIZE = (112, 112)  # of the picture that the published loader makes and does not use
STAND_IN_IMAGES, STAND_IN_SIZE = 100, (375, 500)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py data`."""
    parser.add_argument(
        "--data_path", type=Path, default=SAMPLE, help="zip and map file of JPEGs (IMNET layout)"
    )
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument(
        "--rounds", type=int, default=7, help="interleaved rounds; medians are reported"
    )
    parser.add_argument("--images", type=int, default=100, help="images per pipeline and round")


class PublishedTransform:
    """What the released ConMIM loader computes: Pillow, an unused second picture, normalized
    float32 (spec 2.1)."""

    def __init__(self, input_size: int, mask_generator: MaskGenerator | None):
        self.size, self.mask_generator = (input_size, input_size), mask_generator
        jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
        self.color = Compose(
            [RandomApply([jitter], 0.8), RandomGrayscale(0.2), _published_blur_and_solarize]
        )

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        image = decode_pillow(raw)
        draws = draw_view(rng, (image.height, image.width), (0.08, 1.0), "bicubic", False)
        weak = reference_crop(image, draws, self.size)
        sample = {"image": _normalized(weak)}
        if self.mask_generator:
            reference_crop(image, dataclasses.replace(draws, interpolation="lanczos"), SECOND_SIZE)
            sample["image_strong"] = _normalized(self.color(weak))
            sample["mask"] = torch.from_numpy(self.mask_generator(rng))
        return sample


def _published_blur_and_solarize(image: Image.Image) -> Image.Image:
    if random.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return ImageOps.solarize(image) if random.random() < 0.2 else image


def _normalized(image: Image.Image) -> torch.Tensor:
    return normalize(to_tensor(image), *MEAN_STD["imagenet"])


def measure(datasets: dict[str, ImageDataset], rounds: int, images: int) -> dict[str, list[float]]:
    """Images per second of processor time of each data set, one number per round, the data sets
    taking turns."""
    rates = {name: [] for name in datasets}
    for dataset in datasets.values():  # lazy imports, tables, the page cache
        _load(dataset, rounds, images)
    for epoch in range(rounds):
        for name, dataset in datasets.items():
            start = time.process_time()
            _load(dataset, epoch, images)
            rates[name].append(images / (time.process_time() - start))
    return rates


def _load(dataset: ImageDataset, epoch: int, images: int) -> None:
    for index in range(images):
        dataset[epoch, index % len(dataset)]


def report_speed(title: str, rates: dict[str, list[float]], target: float) -> None:
    """Print each pipeline's median rate and its median ratio to the first one."""
    print(f"{title:42s} images/s/core   against published (median, range)")
    published = next(iter(rates.values()))
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, published, strict=True)]
        print(
            f"  {name:40s} {statistics.median(values):13.0f}   {statistics.median(ratios):.2f}x"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(f"  target for the fast pipeline: {target}x")


def color_differences(pictures: list[np.ndarray]) -> dict[str, tuple[int, float]]:
    """Gray levels between the fast and Pillow's form of each color operation on the same input:
    (maximum, mean)."""
    rng = np.random.default_rng(0)
    none = {"jitter": (), "gray": False, "blur_radius": None, "solarize": False}
    cases = {
        name: lambda name=name: none | {"jitter": ((name, rng.uniform(*JITTER_RANGES[name])),)}
        for name in JITTER_RANGES
    }
    cases["gray"] = lambda: none | {"gray": True}
    cases["blur"] = lambda: none | {"blur_radius": rng.uniform(*BLUR_RADIUS)}
    cases["solarize"] = lambda: none | {"solarize": True}
    cases["all of a strong view"] = lambda: vars(draw_color(rng))
    return {name: _difference(pictures, draw) for name, draw in cases.items()}


def _difference(pictures: list[np.ndarray], draw: Callable[[], dict]) -> tuple[int, float]:
    differences = []
    for picture in pictures:
        draws = ColorDraws(**draw())
        fast = fast_color(np.ascontiguousarray(picture.transpose(2, 0, 1)), draws).transpose(
            1, 2, 0
        )
        reference = np.asarray(reference_color(Image.fromarray(picture), draws))
        differences.append(np.abs(fast.astype(int) - reference))
    return int(max(d.max() for d in differences)), float(np.mean([d.mean() for d in differences]))


def view_differences(
    fast: ImageDataset, reference: ImageDataset, images: int
) -> dict[str, tuple[int, float]]:
    """Gray levels between the two pipelines' views for the same draws: (maximum, mean)."""
    found = {"image": [], "image_strong": []}
    for index in range(min(images, len(fast))):
        a, b = fast[0, index], reference[0, index]
        for view, values in found.items():
            values.append((a[view].int() - b[view].int()).abs())
    return {
        view: (
            max(int(d.max()) for d in values),
            float(np.mean([d.float().mean() for d in values])),
        )
        for view, values in found.items()
    }


def write_stand_in(root: Path) -> None:
    """A zip and map file of generated JPEGs, 500 x 375, quality 90, for machines without the
    photographs."""
    rng = np.random.RandomState(0)
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for number in range(STAND_IN_IMAGES):
            picture = background(rng, *STAND_IN_SIZE) + rng.randint(
                -12, 13, size=(*STAND_IN_SIZE, 3)
            )
            picture = np.ascontiguousarray(np.clip(picture, 0, 255), dtype=np.uint8)
            archive.writestr(
                f"{number}.jpg", simplejpeg.encode_jpeg(picture, quality=90, colorsubsampling="420")
            )
    (root / "train_map.txt").write_text(
        "".join(f"{number}.jpg\t0\n" for number in range(STAND_IN_IMAGES))
    )


def run(args: argparse.Namespace) -> None:
    """Measure on `args.data_path`, or on generated photographs where it does not exist, and print
    the tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path
        if not root.is_dir():
            print(f"{root} is absent: measuring on {STAND_IN_IMAGES} generated photographs")
            root = Path(folder)
            write_stand_in(root)
        _run(args, root)


def _run(args: argparse.Namespace, root: Path) -> None:
    source, size = map_source(root, "train"), args.input_size
    mask = build_mask_generator(
        "block", input_size=size, patch_size=args.patch_size, mask_ratio=0.75
    )

    def dataset(views: tuple[str, ...], pipeline: str) -> ImageDataset:
        generator = mask if "mask" in views else None
        transform = build_pretrain_transform(
            views, input_size=size, pipeline=pipeline, mask_generator=generator
        )
        return ImageDataset(source, transform, seed=0)

    two_views, one_view = ("image", "image_strong", "mask"), ("image",)
    for title, views, target in (
        ("two views + block mask", two_views, 3.5),
        ("one view", one_view, 2.2),
    ):
        published = PublishedTransform(size, mask if views == two_views else None)
        contenders = {"published (Pillow, float32)": ImageDataset(source, published, seed=0)}
        contenders |= {
            f"{pipeline} (uint8)": dataset(views, pipeline) for pipeline in ("reference", "fast")
        }
        report_speed(title, measure(contenders, args.rounds, args.images), target)

    fast = dataset(two_views, "fast")
    print("difference from Pillow, gray levels           maximum      mean")
    views = view_differences(fast, dataset(two_views, "reference"), args.images)
    pictures = [
        fast[0, index]["image"].permute(1, 2, 0).numpy()
        for index in range(min(args.images, len(fast)))
    ]
    for name, (maximum, mean) in (views | color_differences(pictures)).items():
        print(f"  {name:42s} {maximum:8d}  {mean:8.3f}")


if __name__ == "__main__":
    command_line = argparse.ArgumentParser(description=__doc__)
    add_arguments(command_line)
    run(command_line.parse_args())
