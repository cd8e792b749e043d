"""Write the map files of a data set: ROOT/train_map.txt for ROOT/train or ROOT/train.zip.

    python scripts/tools/make_map_file.py ROOT [--split train val] [--synsets FILE]

Classes are numbered in sorted order of their folder names, or as listed in the synset file (one
name per line; words after it are ignored). All splits use the numbers of the first.
"""

import argparse
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.file_index import ARRAY_EXTENSION, IMAGE_EXTENSIONS
from unimim.data.sources import image_files, warn_of_skipped
from unimim.files import write_atomically


def image_names(root: Path, split: str) -> list[str]:
    """Return the sorted relative names (with /) of a split's images, from its folder or its zip.

    Raises:
        ValueError: neither exists, the zip is damaged, or there are no images.
    """
    folder, archive = root / split, root / f"{split}.zip"
    skipped: Counter[str] = Counter()
    if folder.is_dir():
        found = (name.replace(os.sep, "/") for name in image_files(folder, skipped))
    elif archive.is_file():
        found = _zip_names(archive)
    else:
        raise ValueError(
            f"neither {folder} nor {archive} exists; use the folder that holds one of them"
        )
    names = sorted(tqdm(found, desc=f"{split} images", unit="", disable=None))
    if not names:
        raise ValueError(f"{folder if folder.is_dir() else archive} holds no images")
    warn_of_skipped(folder, skipped, len(names))
    return names


def _zip_names(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a complete zip archive: {error}") from error
    images = [name for name in names if name.lower().endswith(IMAGE_EXTENSIONS)]
    return images or [name for name in names if name.lower().endswith(ARRAY_EXTENSION)]


def class_of(name: str) -> str:
    """Return the first folder of an image's name; raise ValueError if there is none."""
    folder, slash, _ = name.partition("/")
    if not slash:
        raise ValueError(f"image '{name}' lies in no class folder; its label cannot be known")
    return folder


def read_synsets(path: Path, folders: Iterable[str]) -> list[str]:
    """Return the class names in the order of a synset file, whose lines start with a name."""
    folders = set(folders)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    classes = [line if line in folders else line.split()[0] for line in lines if line]
    if len(set(classes)) < len(classes):
        raise ValueError(f"synset file {path} lists a class twice")
    missing = folders - set(classes)
    if missing:
        raise ValueError(
            f"synset file {path} lacks {len(missing)} class folders, such as '{min(missing)}'"
        )
    return classes


def write_map_files(root: Path, splits: list[str], synsets: Path | None = None) -> list[Path]:
    """Write `root/<split>_map.txt` ("path<TAB>label" lines) for every split; return the files.

    Raises:
        ValueError: there are no images, images outside class folders, or classes that the synset
            file or the first split lacks.
    """
    names = {split: image_names(root, split) for split in splits}
    folders = {split: sorted({class_of(name) for name in names[split]}) for split in splits}
    classes = folders[splits[0]]
    if synsets is not None:
        classes = read_synsets(synsets, {folder for split in splits for folder in folders[split]})
    number = {name: label for label, name in enumerate(classes)}
    for split in splits:
        unknown = [folder for folder in folders[split] if folder not in number]
        if unknown:
            raise ValueError(
                f"class '{unknown[0]}' of {split} does not occur in {splits[0]}; give --synsets"
            )
    return [_write_map(root / f"{split}_map.txt", names[split], number) for split in splits]


def _write_map(path: Path, names: list[str], number: dict[str, int]) -> Path:
    lines = (f"{name}\t{number[class_of(name)]}\n" for name in names)
    write_atomically(
        path,
        lambda file: file.writelines(line.encode("utf-8", "surrogateescape") for line in lines),
    )
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder with train/ or train.zip, val/ or val.zip")
    parser.add_argument(
        "--split", nargs="+", help="splits to list (default: train, and val where it exists)"
    )
    parser.add_argument("--synsets", type=Path, help="file that gives the order of the classes")
    args = parser.parse_args(argv)
    has_val = (args.root / "val").is_dir() or (args.root / "val.zip").is_file()
    splits = args.split or (["train", "val"] if has_val else ["train"])
    try:
        paths = write_map_files(args.root, splits, args.synsets)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for path in paths:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
