"""Measure data loading: the fast pipeline against the published one, and how their images differ.

Called by `benchmark.py data`. Images per second refer to processor time on one core and include
decoding and masks.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
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
from unimim.data.sources import Source, map_source
from unimim.data.views import MEAN_STD, Sample, build_pretrain_transform, draw_view

SECOND_SIZE = (112, 112)  # of the second view that the published loader makes and does not use
STAND_IN_IMAGES = 100
STAND_IN_SIZE = (375, 500)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `benchmark.py data`."""
    parser.add_argument(
        "--data_path",
        type=Path,
        default=None,
        help="zip and map file of JPEGs (IMNET layout); generated photographs by default",
    )
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument(
        "--rounds", type=int, default=7, help="interleaved rounds; medians are reported"
    )
    parser.add_argument("--images", type=int, default=100, help="images per pipeline and round")


class PublishedTransform:
    """Compute what the released ConMIM loader does: Pillow, an unused second view, float32."""

    def __init__(self, input_size: int, mask_generator: MaskGenerator | None):
        self.size = (input_size, input_size)
        self.mask_generator = mask_generator
        jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
        self.color = Compose(
            [RandomApply([jitter], 0.8), RandomGrayscale(0.2), _published_blur_and_solarize]
        )

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> Sample:
        image = decode_pillow(raw)
        params = draw_view(rng, (image.height, image.width), (0.08, 1.0), "bicubic", False)
        weak = reference_crop(image, params, self.size)
        sample = {"image": _normalized(weak)}
        if self.mask_generator:
            reference_crop(image, params, SECOND_SIZE, "lanczos")
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
    """Return each data set's images per second of processor time, one number per round.

    The data sets take turns.
    """
    speeds = {name: [] for name in datasets}
    for dataset in datasets.values():  # warms up lazy imports, tables and the page cache
        _load(dataset, rounds, images)
    for epoch in range(rounds):
        for name, dataset in datasets.items():
            start = time.process_time()
            _load(dataset, epoch, images)
            speeds[name].append(images / (time.process_time() - start))
    return speeds


def _load(dataset: ImageDataset, epoch: int, images: int) -> None:
    for index in range(images):
        dataset[epoch, index % len(dataset)]


def report_speed(title: str, speeds: dict[str, list[float]], target: float) -> None:
    """Print each pipeline's median speed and its median ratio to the first one."""
    print(f"{title:42s} images/s/core   against published (median, range)")
    published = next(iter(speeds.values()))
    for name, values in speeds.items():
        ratios = [value / base for value, base in zip(values, published, strict=True)]
        print(
            f"  {name:40s} {statistics.median(values):13.0f}   {statistics.median(ratios):.2f}x"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(f"  target for the fast pipeline: {target}x")


def report_checksums(source: Source, images_per_s: float, images: int) -> None:
    """Print how much of the fast pipeline's time the checksums of a zip's members take."""
    raws = [source.read(index) for index in range(min(images, len(source)))]
    start = time.process_time()
    for raw in raws:
        zlib.crc32(raw)
    seconds = (time.process_time() - start) / len(raws)
    print(
        f"  checksum of a zip's member: {1e3 * seconds:.3f} ms, "
        f"{100 * seconds * images_per_s:.1f} %"
    )


def color_differences(images: list[np.ndarray]) -> dict[str, tuple[int, float]]:
    """Return the differences between fast and Pillow's color operations on the same input.

    Each is (maximum, mean) in gray levels.
    """
    rng = np.random.default_rng(0)
    none = {"jitter": (), "gray": False, "blur_radius": None, "solarize": False}

    def jitter(name: str) -> dict:
        return none | {"jitter": ((name, rng.uniform(*JITTER_RANGES[name])),)}

    cases = {name: partial(jitter, name) for name in JITTER_RANGES}
    cases["gray"] = lambda: none | {"gray": True}
    cases["blur"] = lambda: none | {"blur_radius": rng.uniform(*BLUR_RADIUS)}
    cases["solarize"] = lambda: none | {"solarize": True}
    cases["all of a strong view"] = lambda: vars(draw_color(rng))
    return {name: _color_difference(images, draw) for name, draw in cases.items()}


def _color_difference(images: list[np.ndarray], draw: Callable[[], dict]) -> tuple[int, float]:
    """Return the (maximum, mean) difference of one operation, with random parameters per image."""
    differences = []
    for image in images:
        params = ColorDraws(**draw())
        fast = fast_color(np.ascontiguousarray(image.transpose(2, 0, 1)), params)
        reference = np.asarray(reference_color(Image.fromarray(image), params))
        differences.append(np.abs(fast.transpose(1, 2, 0).astype(int) - reference))
    return int(max(d.max() for d in differences)), float(np.mean([d.mean() for d in differences]))


def view_differences(
    fast: ImageDataset, reference: ImageDataset, images: int
) -> dict[str, tuple[int, float]]:
    """Return the two pipelines' (maximum, mean) difference in gray levels by view.

    Both pipelines draw the same random parameters.
    """
    differences = {}
    for view in ("image", "image_strong"):
        largest, means = 0, []
        for index in range(min(images, len(fast))):
            difference = (fast[0, index][view].int() - reference[0, index][view].int()).abs()
            largest = max(largest, int(difference.max()))
            means.append(float(difference.float().mean()))
        differences[view] = largest, float(np.mean(means))
    return differences


def write_stand_in(root: Path) -> None:
    """Write a zip and map file of generated JPEGs, 500 x 375, quality 90."""
    rng = np.random.RandomState(0)
    lines = []
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for number in range(STAND_IN_IMAGES):
            image = background(rng, *STAND_IN_SIZE)
            image = image + rng.randint(-12, 13, size=(*STAND_IN_SIZE, 3))
            image = np.ascontiguousarray(np.clip(image, 0, 255), dtype=np.uint8)
            data = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420")
            archive.writestr(f"{number}.jpg", data)
            lines.append(f"{number}.jpg\t0\n")
    (root / "train_map.txt").write_text("".join(lines))


def run(args: argparse.Namespace) -> None:
    """Measure on `args.data_path`, or on generated photographs, and print the tables."""
    torch.set_num_threads(1)
    if args.data_path is not None:
        _run(args, args.data_path)
        return
    print(f"no --data_path: measuring on {STAND_IN_IMAGES} generated photographs")
    with tempfile.TemporaryDirectory() as folder:
        write_stand_in(Path(folder))
        _run(args, Path(folder))


def _run(args: argparse.Namespace, root: Path) -> None:
    """Measure on the images of `root` and print the tables."""
    source = map_source(root, "train")
    size = args.input_size
    mask = build_mask_generator(
        "block", input_size=size, patch_size=args.patch_size, mask_ratio=0.75
    )

    def dataset(views: tuple[str, ...], pipeline: str) -> ImageDataset:
        generator = mask if "mask" in views else None
        transform = build_pretrain_transform(
            views, input_size=size, pipeline=pipeline, mask_generator=generator
        )
        return ImageDataset(source, transform, seed=0)

    two_views = ("image", "image_strong", "mask")
    comparisons = (("two views + block mask", two_views, 3.5), ("one view", ("image",), 2.2))
    for title, views, target in comparisons:
        published = PublishedTransform(size, mask if views == two_views else None)
        datasets = {
            "published (Pillow, float32)": ImageDataset(source, published, seed=0),
            "reference (uint8)": dataset(views, "reference"),
            "fast (uint8)": dataset(views, "fast"),
        }
        speeds = measure(datasets, args.rounds, args.images)
        report_speed(title, speeds, target)
        report_checksums(source, statistics.median(speeds["fast (uint8)"]), args.images)

    fast = dataset(two_views, "fast")
    print("difference from Pillow, gray levels           maximum      mean")
    views = view_differences(fast, dataset(two_views, "reference"), args.images)
    images = []
    for index in range(min(args.images, len(fast))):
        images.append(fast[0, index]["image"].permute(1, 2, 0).numpy())
    for name, (maximum, mean) in (views | color_differences(images)).items():
        print(f"  {name:42s} {maximum:8d}  {mean:8.3f}")


if __name__ == "__main__":
    command_line = argparse.ArgumentParser(description=__doc__)
    add_arguments(command_line)
    run(command_line.parse_args())
