"""Pack the images of a folder into one uncompressed zip, which the loaders read in place.

    python scripts/tools/zip_dataset.py FOLDER [ARCHIVE]

The default archive is FOLDER.zip; members are named relative to FOLDER, in sorted order.
"""

import argparse
import os
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.sources import image_files, warn_of_skipped
from unimim.files import write_atomically


def zip_folder(folder: Path, archive: Path, *, overwrite: bool = False) -> int:
    """Write the images below `folder` into `archive`, atomically, and return their number.

    Raises:
        ValueError: the folder is missing or has no images, or the archive exists and `overwrite` is
            not set.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    if archive.exists() and not overwrite:
        raise ValueError(f"{archive} exists; remove it or use --overwrite")
    skipped: Counter[str] = Counter()
    names = image_files(folder, skipped)
    if not names:
        raise ValueError(f"folder {folder} holds no images")
    warn_of_skipped(folder, skipped, len(names))

    def write(draft: BinaryIO) -> None:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as file:
            for name in tqdm(names, desc=archive.name, disable=None):
                # a fixed date: the same images give the same archive
                entry = zipfile.ZipInfo(name.replace(os.sep, "/"), date_time=(1980, 1, 1, 0, 0, 0))
                file.writestr(entry, (folder / name).read_bytes())

    write_atomically(archive, write)
    return len(names)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of images, such as ROOT/train")
    parser.add_argument("archive", type=Path, nargs="?", help="zip to write (default: FOLDER.zip)")
    parser.add_argument("--overwrite", action="store_true", help="replace an archive that exists")
    args = parser.parse_args(argv)
    archive = args.archive or args.folder.with_name(f"{args.folder.name}.zip")
    try:
        count = zip_folder(args.folder, archive, overwrite=args.overwrite)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"packed {count} images into {archive}")


if __name__ == "__main__":
    main()
