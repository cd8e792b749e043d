"""Write the 20,000 training and 5,000 validation images of CIFAR-10 of docs/results.md.

    python scripts/tools/make_cifar10_subset.py CIFAR_ROOT OUTPUT [--download]

CIFAR_ROOT is where torchvision keeps CIFAR-10; --download fetches it there (170 MB). OUTPUT gets
`train.zip`, `val.zip` and their map files: the first 2,000 training and the first 500 test images
of each class, in CIFAR-10's order, as JPEG of Pillow's default quality under CLASS/NUMBER.jpg. Read
them with --data_set IMNET --data_path OUTPUT --input_size 32.
"""

import argparse
import io
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.files import write_atomically, write_text

COUNTS = {"train": 2000, "val": 500}  # of each class


def members(labels: list[int], classes: list[str], count: int) -> list[tuple[str, int, int]]:
    """Return (name, label, index in the data) of the first `count` images of each class: number 0
    of every class, then number 1.

    Raises:
        ValueError: a class has fewer images.
    """
    own = [np.flatnonzero(np.asarray(labels) == label) for label in range(len(classes))]
    for name, indices in zip(classes, own, strict=True):
        if len(indices) < count:
            raise ValueError(
                f"class {name} has {len(indices)} images, not {count}; is this CIFAR-10?"
            )
    return [
        (f"{classes[label]}/{number:04d}.jpg", label, int(own[label][number]))
        for number in range(count)
        for label in range(len(classes))
    ]


def jpeg(image: np.ndarray) -> bytes:
    """Encode an image [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def write_split(data: CIFAR10, output: Path, split: str, count: int) -> int:
    """Write the zip and the map file of a split, and return its number of images."""
    chosen = members(data.targets, data.classes, count)

    def write(draft: BinaryIO) -> None:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as file:
            for name, _, index in chosen:
                # a fixed date: the same images give the same archive
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                file.writestr(entry, jpeg(data.data[index]))

    write_atomically(output / f"{split}.zip", write)
    lines = [f"{name} {label}\n" for name, label, _ in chosen]
    write_text(output / f"{split}_map.txt", "".join(lines))
    return len(chosen)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cifar_root", type=Path, help="holds cifar-10-batches-py, or is to hold it")
    parser.add_argument("output", type=Path, help="folder of the zips and map files")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 if it is not there")
    parser.add_argument("--train", type=int, default=COUNTS["train"], help="images of each class")
    parser.add_argument("--val", type=int, default=COUNTS["val"], help="images of each class")
    args = parser.parse_args(argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for split in COUNTS:
            data = CIFAR10(str(args.cifar_root), train=split == "train", download=args.download)
            written = write_split(data, args.output, split, getattr(args, split))
            print(f"wrote {written} images to {args.output / split}.zip")
    except (RuntimeError, ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
