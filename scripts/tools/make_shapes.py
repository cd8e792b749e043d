"""Write the generated `shapes` data set, see unimim/data/shapes.py.

    python scripts/tools/make_shapes.py [FOLDER] [--train 2000] [--val 500]
    python scripts/tools/make_shapes.py --voc FOLDER

The default folder is the cache that `--data_set shapes` reads ($UNIMIM_CACHE/shapes, or
~/.cache/unimim/shapes).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.shapes import TRAIN_IMAGES, VAL_IMAGES, cached_shapes, write_shapes


def voc_shapes(folder: Path, train: int, val: int) -> Path:
    """Write the data set in Pascal VOC's layout, and return its folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; use a new or empty folder")
    write_shapes(folder, train, val, voc=True)
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
    args = parser.parse_args(argv)
    if args.voc and args.folder is None:
        parser.error("--voc needs a folder")
    try:
        folder = (voc_shapes if args.voc else cached_shapes)(args.folder, args.train, args.val)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"the shapes data set is in {folder}")


if __name__ == "__main__":
    main()
