"""Pack the images of a folder into tar shards of WebDataset's kind, which loaders read in place.

    python scripts/tools/tar_dataset.py FOLDER [PREFIX]

Writes PREFIX-000000.tar, PREFIX-000001.tar, ...; the default prefix is FOLDER. A sample is
NUMBER.jpg (or its other suffix) and, if the images lie in class folders, NUMBER.cls with the class
number: the position of the folder in sorted order. NUMBER counts the images in sorted order.
"""

import argparse
import io
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.sources import class_names, image_files, warn_of_skipped
from unimim.files import write_atomically


def pack_folder(folder: Path, prefix: Path, images_per_shard: int) -> int:
    """Write the images below `folder` into shards, each atomically, and return their number.

    Raises:
        ValueError: the folder is missing or has no images, or a shard of that prefix exists.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    if images_per_shard < 1:
        raise ValueError(f"--images_per_shard must be at least 1, not {images_per_shard}")
    if found := sorted(prefix.parent.glob(f"{prefix.name}-*.tar")):
        raise ValueError(f"{found[0]} exists; remove the shards of that prefix or use another")
    skipped: Counter[str] = Counter()
    names = image_files(folder, skipped)
    if not names:
        raise ValueError(f"folder {folder} holds no images")
    warn_of_skipped(folder, skipped, len(names))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    classes = {name: label for label, name in enumerate(class_names(folder))}
    starts = range(0, len(names), images_per_shard)
    for shard, first in enumerate(tqdm(starts, desc=prefix.name, unit="shard", disable=None)):
        chosen = names[first : first + images_per_shard]

        def write(draft: BinaryIO, first: int = first, chosen: list[str] = chosen) -> None:
            with tarfile.open(fileobj=draft, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for number, name in enumerate(chosen, first):
                    add(archive, folder, name, f"{number:09d}", classes)

        write_atomically(prefix.with_name(f"{prefix.name}-{shard:06d}.tar"), write)
    return len(names)


def add(
    archive: tarfile.TarFile, folder: Path, name: str, key: str, classes: dict[str, int]
) -> None:
    """Add one sample: the image and, if it lies in a class folder, its class number."""
    contents = {os.path.splitext(name)[1].lower(): (folder / name).read_bytes()}
    if os.sep in name:
        contents[".cls"] = str(classes[name.partition(os.sep)[0]]).encode()
    for suffix, content in contents.items():
        # without dates and owners: the same images give the same shards
        member = tarfile.TarInfo(f"{key}{suffix}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of images, such as ROOT/train")
    parser.add_argument("prefix", type=Path, nargs="?", help="of the shards (default: FOLDER)")
    parser.add_argument("--images_per_shard", type=int, default=10000, help="but for the last one")
    args = parser.parse_args(argv)
    try:
        prefix = args.prefix or args.folder
        count = pack_folder(args.folder, prefix, args.images_per_shard)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"packed {count} images into {prefix}-*.tar")


if __name__ == "__main__":
    main()
