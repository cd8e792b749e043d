"""Unpack ADEChallengeData2016.zip and check it, or only check a folder.

    prepare_ade20k.py ADEChallengeData2016.zip [--out data/ade]

The archive is MIT's "SceneParsing" set (images, annotations), not the full one.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

COUNTS = {"training": 20210, "validation": 2000}
CLASSES = 150


def unpack(archive: Path, out: Path) -> Path:
    """Unpack the archive and return its folder; raise ValueError if it is invalid or unsafe."""
    try:
        with zipfile.ZipFile(archive) as file:
            paths = [Path(name) for name in file.namelist()]
            tops = {path.parts[0] for path in paths}
            unsafe = any(path.is_absolute() or ".." in path.parts for path in paths)
            if len(tops) != 1 or unsafe:
                raise ValueError(f"{archive} is not one folder with images and annotations")
            file.extractall(out)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a zip or damaged: {error}") from error
    return out / tops.pop()


def check(root: Path, counts: dict[str, int] | None = None) -> list[str]:
    """Return the problems of a folder in ADE20K's layout: counts, pairs, sizes, class numbers."""
    problems = []
    for split, count in (counts or COUNTS).items():
        images = {path.stem: path for path in (root / "images" / split).glob("*.jpg")}
        labels = {path.stem: path for path in (root / "annotations" / split).glob("*.png")}
        if len(images) != count:
            problems.append(f"{root / 'images' / split} holds {len(images)} images, not {count}")
        if single := sorted(images.keys() ^ labels.keys()):
            problems.append(
                f"{split}: {len(single)} without image or labels, the first is {single[0]}"
            )
        pairs = [(images[name], labels[name]) for name in sorted(images.keys() & labels.keys())]
        with ThreadPoolExecutor() as pool:
            checked = tqdm(pool.map(check_pair, pairs), split, len(pairs), disable=None)
            problems += [problem for problem in checked if problem]
    return problems


def check_pair(pair: tuple[Path, Path]) -> str:
    """Return the problem of an image and its labels in one line, or an empty string."""
    try:
        with Image.open(pair[0]) as image, Image.open(pair[1]) as labels:
            if labels.mode not in ("L", "P"):
                return f"{pair[1]}: mode {labels.mode}, not one number per pixel"
            if image.size != labels.size:
                return f"{pair[1]}: {labels.size} pixels, its image has {image.size}"
            image.load()
            largest = int(np.asarray(labels).max())
    except (OSError, SyntaxError) as error:  # Pillow's for broken PNG files
        return f"{pair[0].stem}: {error}"
    return f"{pair[1]}: class {largest} of {CLASSES}" if largest > CLASSES else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Unpack and check; return 1 if there are problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the zip, or a folder to check")
    parser.add_argument(
        "--out", type=Path, default=Path("data/ade"), help="where the zip is unpacked"
    )
    args = parser.parse_args(argv)
    if not args.source.exists():
        parser.error(f"{args.source} does not exist")
    try:
        root = args.source if args.source.is_dir() else unpack(args.source, args.out)
    except ValueError as error:
        parser.error(str(error))
    problems = check(root)
    if problems:
        print("\n".join([*problems[:20], f"{len(problems)} problems"]))
    else:
        print(f"{root} is complete")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
