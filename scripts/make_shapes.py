"""Write the generated `shapes` data set: zip and map files, ADE20K folders, COCO json (see shapes.py).

    python scripts/make_shapes.py [FOLDER] [--train 2000] [--val 500]

The default folder is the cache that `--data_set shapes` reads ($UNIMIM_CACHE/shapes, or ~/.cache/unimim/shapes).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shapes import TRAIN_IMAGES, VAL_IMAGES, cached_shapes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="new or empty folder (default: the cache)")
    parser.add_argument("--train", type=int, default=TRAIN_IMAGES, help="training images")
    parser.add_argument("--val", type=int, default=VAL_IMAGES, help="validation images")
    args = parser.parse_args(argv)
    try:
        folder = cached_shapes(args.folder, args.train, args.val)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"the shapes data set is in {folder}")


if __name__ == "__main__":
    main()
