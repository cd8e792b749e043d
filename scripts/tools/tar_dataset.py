"""Pack images into tar shards of WebDataset's kind, which loaders read in place.

    python scripts/tools/tar_dataset.py IMAGES [PREFIX]

IMAGES is a folder of images, or parquet or arrow files as --data_set hf reads them: a folder, a
file or a pattern. Writes PREFIX-000000.tar, PREFIX-000001.tar, ...; the default prefix is IMAGES. A
sample is NUMBER.jpg (or its other suffix) and NUMBER.cls with the class number: the label in such a
file, or the position of the image's class folder in sorted order. NUMBER counts the images, those
of a folder in sorted order.
"""

import argparse
import io
import os
import sys
import tarfile
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.file_index import ARRAY_EXTENSION, IMAGE_EXTENSIONS
from unimim.data.hub import SUFFIXES, holds_tables, located
from unimim.data.jpeg import PILLOW_ERRORS, BrokenImageError
from unimim.data.sources import Source, folder_source, hf_source
from unimim.files import write_atomically
from unimim.logs import log


def pack_images(images: str, prefix: Path, images_per_shard: int) -> int:
    """Write the images into shards, each atomically, and return their number.

    Rows of parquet and arrow files that hold no image are named and left out.

    Raises:
        ValueError: there are no images, or a shard of that prefix exists.
    """
    if images_per_shard < 1:
        raise ValueError(f"--images_per_shard must be at least 1, not {images_per_shard}")
    if found := sorted(prefix.parent.glob(f"{prefix.name}-*.tar")):
        raise ValueError(f"{found[0]} exists; remove the shards of that prefix or use another")
    source = source_of(images)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(source), images_per_shard)
    left_out: set[int] = set()
    for shard, first in enumerate(tqdm(starts, desc=prefix.name, unit="shard", disable=None)):
        chosen = range(first, min(first + images_per_shard, len(source)))

        def write(draft: BinaryIO, chosen: range = chosen) -> None:
            with tarfile.open(fileobj=draft, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for index in chosen:
                    try:
                        add(archive, source, index)
                    except BrokenImageError as error:
                        log.warning("%s is left out: %s", source.path(index), error)
                        left_out.add(index)

        write_atomically(prefix.with_name(f"{prefix.name}-{shard:06d}.tar"), write)
    return len(source) - len(left_out)


def source_of(images: str) -> Source:
    """Return the images that the command line names; ValueError if there are none."""
    images = located(images)
    folder = Path(images)
    if images.endswith(SUFFIXES) or (folder.is_dir() and holds_tables(folder)):
        return hf_source(images, train=True, need_labels=False)
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    return folder_source(folder, need_labels=False)


def add(archive: tarfile.TarFile, source: Source, index: int) -> None:
    """Add one sample: the image and, if it has one, its class number."""
    content = source.read(index)
    contents = {suffix_of(source.path(index), content): content}
    if source.labels[index] >= 0:
        contents[".cls"] = str(source.labels[index]).encode()
    for suffix, data in contents.items():
        # without dates and owners: the same images give the same shards
        member = tarfile.TarInfo(f"{index:09d}{suffix}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def suffix_of(path: str, content: bytes) -> str:
    """Return the suffix of an image's name, or that of its format where the name has none.

    Raises:
        BrokenImageError: it has none, and no format that is known.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (*IMAGE_EXTENSIONS, ARRAY_EXTENSION):
        return suffix
    try:
        return f".{Image.open(io.BytesIO(content)).format.lower()}"
    except PILLOW_ERRORS as error:
        raise BrokenImageError(str(error)) from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images", help="folder of images, such as ROOT/train; parquet or arrow files"
    )
    parser.add_argument("prefix", type=Path, nargs="?", help="of the shards (default: IMAGES)")
    parser.add_argument("--images_per_shard", type=int, default=10000, help="but for the last one")
    args = parser.parse_args(argv)
    try:
        prefix = args.prefix or Path(args.images)
        count = pack_images(args.images, prefix, args.images_per_shard)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"packed {count} images into {prefix}-*.tar")


if __name__ == "__main__":
    main()
