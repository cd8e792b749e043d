"""Classify photographs with a fine-tuned checkpoint.

    python scripts/predict.py --checkpoint out/finetuned/checkpoint-best.pth PHOTO.jpg FOLDER ...

Prints the most probable classes of each image, and with --output writes them to a CSV. Size, crop
and normalization are those of the checkpoint's flags; further flags override them, and describe the
network of a file without flags. An image that cannot be read is named and left out.
"""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modeling_pretrain  # noqa: F401  (registers the methods)
from unimim.checkpoint.loading import PUBLISHED_KEYS, load_pretrained
from unimim.checkpoint.runs import rebuild
from unimim.cli.flags import options_as_flags
from unimim.data.class_lists import imagenet_names, read_classes
from unimim.data.classes import settle_size
from unimim.data.jpeg import BrokenImageError
from unimim.data.preparation import preparation
from unimim.data.sources import _split_folder, build_source, class_names, images_below
from unimim.data.views import build_finetune_transform, image_mean_std
from unimim.engine.state import Normalize
from unimim.files import write_rows
from unimim.logs import log, setup_logging

NAMED = ("digits", "mnist5k")  # data sets that are always at hand


@dataclass(frozen=True)
class Guess:
    """A row of the table: the class that is `rank`-th most probable for an image."""

    image: str
    rank: int
    index: int
    name: str
    probability: float


def listed(paths: Sequence[Path]) -> list[Path]:
    """Return the images: files as they are, folders with all images below them.

    Raises:
        ValueError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(images_below(path))
            if not below:
                raise ValueError(f"{path} holds no images; name a folder with photographs")
            found += [path / name for name in below]
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist; name images or folders")
    return found


def load_classifier(own: Namespace, flags: list[str]) -> tuple[nn.Module, Namespace]:
    """Return the classifier with its weights and the flags of its run; ValueError if it has no
    trained head."""
    model, args = rebuild(own.checkpoint, flags, model_key=own.model_key)
    if hasattr(model, "encoder_state_dict"):
        raise ValueError(
            f"--checkpoint {own.checkpoint} is a pre-training network without classes; fine-tune "
            "it with run_class_finetuning.py first"
        )
    found = load_pretrained(model, own.checkpoint, model_key=own.model_key)
    heads = [name for name in found.missing if name.startswith(("head.", "fc.", "classifier."))]
    if heads:
        raise ValueError(
            f"--checkpoint {own.checkpoint} has no {heads[0]}, so no classes; use a fine-tuned "
            "checkpoint, and --nb_classes where the file has no flags of its run"
        )
    settle_size(args)
    return model.eval(), args


def names_of(own: Namespace, args: Namespace) -> list[str]:
    """Return the classes' names: of --class_names, of the run's data, or of ImageNet; else their
    numbers."""
    count = args.nb_classes
    if own.class_names:
        names = read_classes("--class_names", own.class_names)
        if len(names) != count:
            raise ValueError(
                f"--class_names {own.class_names} lists {len(names)} classes, the checkpoint has "
                f"{count}; use the file of its classes"
            )
        return names
    names = names_of_data(args)
    if len(names) == count:
        return names
    return imagenet_names() if count == 1000 else [str(index) for index in range(count)]


def names_of_data(args: Namespace) -> list[str]:
    """Return the classes of the data that the run was trained on, if these are still there."""
    if args.data_set in NAMED or (args.data_set is None and args.data_path is None):
        return build_source(args.data_set, None, train=False, need_labels=True).classes
    folder = Path(args.data_path or "")
    is_folder = args.data_set in (None, "image_folder") and args.data_path and folder.is_dir()
    return class_names(_split_folder(folder, train=True)) if is_folder else []


def read_images(paths: Sequence[Path], args: Namespace) -> Iterator[tuple[Path, Tensor]]:
    """Yield each image as evaluation sees it, uint8 [3, H, W]; those that are broken are named."""
    transform = build_finetune_transform(args, train=False)
    prepare = preparation(args) or (lambda raw: raw)
    for path in paths:
        try:
            yield path, transform(prepare(path.read_bytes()), None)["image"]
        except (BrokenImageError, OSError) as error:
            log.warning("%s cannot be read and is left out: %s", path, error)


@torch.no_grad()
def predict(own: Namespace, flags: list[str]) -> list[Guess]:
    """Return the most probable classes of every readable image."""
    paths = listed(own.images)
    model, args = load_classifier(own, flags)
    names = names_of(own, args)
    device = torch.device(own.device)
    normalize = Normalize(image_mean_std(args), device)
    model.to(device)
    rows: list[Guess] = []
    for batch in batches(read_images(paths, args), own.batch_size):
        images = torch.stack([image for _, image in batch])
        logits = model(normalize({"image": images.to(device)})["image"]).float()
        top = logits.softmax(-1).topk(min(own.top_k, len(names)), dim=-1)
        for (path, _), values, indices in zip(batch, *top, strict=True):
            ranked = zip(values.tolist(), indices.tolist(), strict=True)
            for rank, (value, index) in enumerate(ranked, 1):
                rows.append(Guess(os.fspath(path), rank, index, names[index], value))
    if not rows:
        raise ValueError("none of the images can be read")
    return rows


def batches(
    images: Iterator[tuple[Path, Tensor]], size: int
) -> Iterator[list[tuple[Path, Tensor]]]:
    batch: list[tuple[Path, Tensor]] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def lines(rows: Sequence[Guess]) -> Iterator[str]:
    """Yield a line for each image: its path and its classes with their probabilities."""
    for image, guesses in groupby(rows, key=lambda row: row.image):
        shown = ", ".join(f"{guess.name} {guess.probability:.3f}" for guess in guesses)
        yield f"{image}: {shown}"


def parse(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("images", nargs="+", type=Path, help="images and folders of images")
    parser.add_argument("--checkpoint", required=True, help="a fine-tuned checkpoint")
    parser.add_argument(
        "--model_key", default=PUBLISHED_KEYS, help="where the weights are in the file"
    )
    parser.add_argument("--top_k", type=int, default=5, help="classes shown for each image")
    parser.add_argument("--output", type=Path, default=None, metavar="CSV", help="table to write")
    parser.add_argument(
        "--class_names", default=None, metavar="FILE",
        help="names of the classes, one a line; None: those of the run's data, if they are known",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, help="images in a forward pass")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ..."
    )
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    own, flags = parse(argv)
    setup_logging(rank=0)
    try:
        for name in ("top_k", "batch_size"):
            if getattr(own, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(own, name)}")
        with options_as_flags():
            rows = predict(own, flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for line in lines(rows):
        print(line)
    if own.output:
        write_rows(own.output, rows)


if __name__ == "__main__":
    main()
