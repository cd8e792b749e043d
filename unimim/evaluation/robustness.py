"""Accuracy of a classifier on the sets that measure robustness: their folders, their classes, the
corruption error, and images with hidden patches (run_robustness.py)."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from datasets import ImageDataset, build_loader
from modeling_backbones import enlarged
from unimim.data.class_lists import subset_synsets
from unimim.data.random import sample_rng
from unimim.data.sources import class_names, folder_source
from unimim.data.views import EvalTransform, MeanStd
from unimim.engine.runner import AUTOCAST_DTYPES
from unimim.engine.state import Normalize
from unimim.evaluation.accuracy import averages, tally
from unimim.logs import log

# by suite, the names that its folder may have
FOLDERS = {
    "imagenet_a": ("imagenet_a", "imagenet-a"),
    "imagenet_r": ("imagenet_r", "imagenet-r"),
    "imagenet_sketch": ("imagenet_sketch", "imagenet-sketch", "sketch"),
    "imagenet_v2": ("imagenet_v2", "imagenetv2", "imagenetv2-matched-frequency-format-val"),
    "imagenet_c": ("imagenet_c", "imagenet-c"),
    "occlusion": ("val",),
}
# AlexNet's error in percent, mean of the five severities (arXiv 1903.12261)
ALEXNET = {
    "gaussian_noise": 88.6, "shot_noise": 89.4, "impulse_noise": 92.3, "defocus_blur": 82.0,
    "glass_blur": 82.6, "motion_blur": 78.6, "zoom_blur": 79.8, "snow": 86.7, "frost": 82.7,
    "fog": 81.9, "brightness": 56.5, "contrast": 85.3, "elastic_transform": 64.6, "pixelate": 71.8,
    "jpeg_compression": 60.7,
}  # fmt: skip
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Classifier(Protocol):
    """What is measured: a network, the (height, width) of its images, and what they are normalized
    by."""

    label: str
    model: nn.Module
    size: tuple[int, int]
    mean_std: MeanStd


@dataclass(frozen=True)
class Row:
    """A row of robustness.csv.

    condition: a corruption, "mCE", the ratio of hidden patches, or "". value: severity or ratio, 0
    if there is none. classes: whose logits count. acc1, acc5, error in percent; ce: error relative
    to AlexNet's in percent, nan where there is none.
    """

    label: str
    suite: str
    condition: str
    value: float
    images: int
    classes: int
    acc1: float
    acc5: float
    error: float
    ce: float = float("nan")


# --------------------------------------------------------------------------------------------------
# Folders and classes


def folder_of(suite: str, root: Path, alone: bool) -> Path:
    """Return the folder of a suite below `root`, or `root` if it is the only suite.

    Raises:
        ValueError: there is none.
    """
    for name in FOLDERS[suite]:
        if (root / name).is_dir():
            return root / name
    if alone and root.is_dir():
        return root
    raise ValueError(
        f"--suite {suite} is not in --data_path {root}; it needs a folder {FOLDERS[suite][0]} there"
    )


def numbers_of(folders: Sequence[str], classes: Sequence[str], root: Path) -> list[int]:
    """Return the model's class of each class folder: by name, or by number as in ImageNet-V2.

    Raises:
        ValueError: a folder is not a class.
    """
    by_name = {name: number for number, name in enumerate(classes)}
    if folders and all(name.isdecimal() for name in folders) and not by_name.keys() & set(folders):
        by_name = {str(number): number for number in range(len(classes))}
    unknown = [name for name in folders if name not in by_name]
    if unknown:
        raise ValueError(
            f"{root / unknown[0]} is not one of the model's {len(classes)} classes; use "
            "--class_map with the model's classes in their order, one a line"
        )
    return [by_name[name] for name in folders]


def counted_classes(suite: str, folders: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return the classes whose logits count: the suite's, as far as the model has them, or all.

    Folders beyond the suite's list, which a suite of one's own has, take its place.
    """
    if suite not in ("imagenet_a", "imagenet_r"):
        return list(range(len(classes)))
    subset = set(subset_synsets(suite))
    if not set(folders) <= subset:
        subset = set(folders)
    return [number for number, name in enumerate(classes) if name in subset]


def class_folders(
    args: Namespace,
    root: Path,
    classes: Sequence[str],
    size: tuple[int, int],
    crop_pct: float | None,
) -> ImageDataset:
    """Return the images in class folders below `root`, with the model's classes as labels."""
    folders = class_names(root)
    if not folders:
        raise ValueError(f"{root} holds no class folders; use the folder that holds them")
    numbers = np.array(numbers_of(folders, classes, root))
    source = folder_source(root, need_labels=True)
    source.labels = numbers[source.labels]
    source.classes = list(classes)
    return ImageDataset(
        source, EvalTransform(size, crop_pct), seed=args.seed, max_bad_images=args.max_bad_images,
        strict=args.strict_data,
    )  # fmt: skip


def corruptions(root: Path) -> Iterator[tuple[str, int, Path]]:
    """Yield corruption, severity and folder of ImageNet-C; the categories of its archives (noise,
    blur, ...) may be folders too."""
    found = 0
    for name in ALEXNET:
        for folder in (root / name, *sorted(root.glob(f"*/{name}"))):
            severities = [path for path in sorted(folder.glob("[1-5]")) if path.is_dir()]
            for path in severities:
                yield name, int(path.name), path
            found += len(severities)
    if not found:
        raise ValueError(f"{root} holds no folders CORRUPTION/SEVERITY, such as gaussian_noise/1")


# --------------------------------------------------------------------------------------------------
# Accuracy


def hide_patches(
    images: Tensor, indices: Sequence[int], ratio: float, grid: int, seed: int
) -> Tensor:
    """Return normalized images [B, 3, H, W] in which a ratio of the grid's patches is 0, the mean
    color; which ones depends on seed and image, and those of a lower ratio are among them."""
    hidden = round(ratio * grid * grid)
    masks = torch.zeros(len(images), grid * grid)
    for row, index in enumerate(indices):
        order = sample_rng(seed, 0, index).permutation(grid * grid)
        masks[row, torch.from_numpy(order[:hidden].copy())] = 1
    masks = masks.view(-1, grid, grid).to(images.device)
    return images.masked_fill(enlarged(masks, images.shape[-2:]).bool().unsqueeze(1), 0)


@torch.no_grad()
def accuracy(
    args: Namespace,
    network: Classifier,
    dataset: ImageDataset,
    counted: Sequence[int],
    device: torch.device,
    ratio: float = 0.0,
) -> dict[str, float]:
    """Return "acc1" and "acc5" in percent and "images", by the logits of the classes `counted`."""
    position = {number: place for place, number in enumerate(counted)}
    total = min(args.images, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, total).round().astype(int).tolist()
    keys = []
    for first in range(0, total, args.batch_size):
        keys.append([(0, index) for index in chosen[first : first + args.batch_size]])
    normalize = Normalize(network.mean_std, device)
    dtype = AUTOCAST_DTYPES.get(args.precision)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in build_loader(dataset, keys, num_workers=args.num_workers, pin_mem=args.pin_mem):
        labels = torch.tensor([position[int(label)] for label in batch["label"]], device=device)
        images = normalize(batch)["image"]
        if ratio:
            images = hide_patches(images, batch["index"].tolist(), ratio, args.grid, args.seed)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = network.model(images).float()[:, list(counted)]
        sums += tally(logits, labels, torch.ones_like(labels, dtype=torch.bool))
    return averages(sums) | {"images": int(sums[3])}


def measure(
    args: Namespace, network: Classifier, classes: Sequence[str], device: torch.device
) -> list[Row]:
    """Return the rows of one network, of every suite."""
    root = Path(args.data_path)
    rows: list[Row] = []
    for suite in args.suite:
        folder = folder_of(suite, root, alone=len(args.suite) == 1)
        row = partial(Row, network.label, suite)
        if suite == "imagenet_c":
            rows += measure_corruptions(args, network, classes, device, folder)
            continue
        dataset = class_folders(args, folder, classes, network.size, args.crop_pct)
        counted = counted_classes(suite, class_names(folder), classes)
        for ratio in args.ratios if suite == "occlusion" else (0.0,):
            found = accuracy(args, network, dataset, counted, device, ratio)
            numbers = (found["images"], len(counted), found["acc1"], found["acc5"])
            condition = f"{ratio:g} hidden" if suite == "occlusion" else ""
            rows.append(row(condition, ratio, *numbers, 100 - found["acc1"]))
            log.info("%s, %s %s: acc1 %.3f", network.label, suite, condition, found["acc1"])
    return rows


def measure_corruptions(
    args: Namespace,
    network: Classifier,
    classes: Sequence[str],
    device: torch.device,
    root: Path,
) -> list[Row]:
    """Return a row for each corruption and severity, and one for mCE."""
    rows: list[Row] = []
    everything = list(range(len(classes)))
    crop_pct = args.crop_pct or 1.0  # its images are cropped already
    for name, severity, folder in corruptions(root):
        dataset = class_folders(args, folder, classes, network.size, crop_pct)
        found = accuracy(args, network, dataset, everything, device)
        numbers = (found["images"], len(classes), found["acc1"], found["acc5"])
        rows.append(Row(network.label, "imagenet_c", name, severity, *numbers, 100 - found["acc1"]))
        log.info("%s, %s %d: acc1 %.3f", network.label, name, severity, found["acc1"])
    return [*rows, summary(rows)]


def corruption_errors(rows: Sequence[Row]) -> dict[str, float]:
    """Return each corruption's mean error over severities relative to AlexNet's, in percent."""
    found = {}
    for name, alexnet in ALEXNET.items():
        errors = [row.error for row in rows if row.condition == name]
        if errors:
            found[name] = 100 * float(np.mean(errors)) / alexnet
    return found


def summary(rows: Sequence[Row]) -> Row:
    """Return the row of mCE, the mean of the corruption errors."""
    errors = corruption_errors(rows)
    if len(errors) < len(ALEXNET):
        log.warning(
            "mCE is of %d of the %d corruptions: it cannot be compared with published ones",
            len(errors), len(ALEXNET),
        )  # fmt: skip
    mce = float(np.mean([*errors.values()]))
    means = [float(np.mean([getattr(r, name) for r in rows])) for name in ("acc1", "acc5", "error")]
    images = sum(row.images for row in rows)
    log.info("%s: mCE %.2f", rows[0].label, mce)
    return Row(rows[0].label, "imagenet_c", "mCE", 0, images, rows[0].classes, *means, mce)
