"""Write the generated `shapes` data set, see unimim/data/shapes.py.

    python scripts/tools/make_shapes.py [FOLDER] [--train 2000] [--val 500]
    python scripts/tools/make_shapes.py --voc FOLDER
    python scripts/tools/make_shapes.py --cluttered FOLDER

The default folder is the cache that `--data_set shapes` reads ($UNIMIM_CACHE/shapes2, or
~/.cache/unimim/shapes2); for another folder add `--data_path FOLDER`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.shapes import (
    CLUTTERED,
    PLAIN,
    TRAIN_IMAGES,
    VAL_IMAGES,
    Style,
    cached_shapes,
    write_shapes,
)


def new_shapes(folder: Path, train: int, val: int, style: Style, *, voc: bool) -> Path:
    """Write the data set to a new or empty folder, and return the folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; use a new or empty folder")
    write_shapes(folder, train, val, voc=voc, style=style)
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="new or empty folder (default: the cache)"
    )
    parser.add_argument("--train", type=int, default=TRAIN_IMAGES, help="training images")
    parser.add_argument("--val", type=int, default=VAL_IMAGES, help="validation images")
    parser.add_argument(
        "--voc", action="store_true", help="Pascal VOC's layout, for voc_linear_probe.py"
    )
    parser.add_argument(
        "--cluttered",
        action="store_true",
        help="textured objects on cluttered backgrounds of many sizes, which are hard to learn",
    )
    args = parser.parse_args(argv)
    for flag in ("voc", "cluttered"):
        if getattr(args, flag) and args.folder is None:
            parser.error(f"--{flag} needs a folder")
    style = CLUTTERED if args.cluttered else PLAIN
    try:
        if args.voc or args.cluttered:
            folder = new_shapes(args.folder, args.train, args.val, style, voc=args.voc)
        else:
            folder = cached_shapes(args.folder, args.train, args.val)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"the shapes data set is in {folder}")


if __name__ == "__main__":
    main()
