"""Check that a folder is COCO 2017 as the configurations expect it.

    python detection/check_coco.py data/coco

Expected are annotations/instances_{train,val}2017.json and the images they list in train2017/ and
val2017/.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

SPLITS = ("train2017", "val2017")
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
# of the 80 classes
CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _UNUSED_IDS)
MOST_EXAMPLES = 5


def check_split(root: Path, split: str, every: int = 100) -> tuple[str, list[str]]:
    """Return a line on a split and a sentence per problem; open every `every`-th image."""
    file = root / "annotations" / f"instances_{split}.json"
    folder = root / split
    if not file.is_file():
        return f"{split}: missing", [f"{file} does not exist."]
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        return f"{split}: unreadable", [f"{file} is not JSON or damaged ({error})."]
    keys = ("images", "annotations", "categories")
    lacking = [key for key in keys if not isinstance(content.get(key), list)]
    if lacking:
        return f"{split}: incomplete", [f"{file} has no list {' and '.join(lacking)}."]
    images, annotations = content["images"], content["annotations"]
    with_objects = len({annotation["image_id"] for annotation in annotations})
    line = (
        f"{split}: {len(images)} images, {with_objects} of them with objects, "
        f"{len(annotations)} objects"
    )
    problems = (
        check_categories(content["categories"])
        + check_annotations(content)
        + check_images(folder, images, every)
    )
    return line, [f"{split}: {problem}" for problem in problems]


def check_categories(categories: list[dict[str, Any]]) -> list[str]:
    """Return a problem unless the categories are COCO's."""
    ids = sorted(category["id"] for category in categories)
    if ids == list(CATEGORY_IDS):
        return []
    return [
        f"it has {len(ids)} categories, not COCO's 80 with the numbers 1 to 90: "
        "set num_classes and metainfo."
    ]


def check_annotations(content: dict[str, Any]) -> list[str]:
    """Return problems: duplicate ids, unknown images or categories, empty boxes or outlines."""
    images = Counter(image["id"] for image in content["images"])
    categories = {category["id"] for category in content["categories"]}
    objects = content["annotations"]
    wrong = {
        "images have the same number": [number for number, count in images.items() if count > 1],
        "objects have the same number": [
            n for n, count in Counter(o["id"] for o in objects).items() if count > 1
        ],
        "objects are in no image that is listed": [
            o["id"] for o in objects if o["image_id"] not in images
        ],
        "objects are of no category that is listed": [
            o["id"] for o in objects if o["category_id"] not in categories
        ],
        "objects have an empty box": [o["id"] for o in objects if not valid_box(o.get("bbox"))],
        "objects have no outline": [o["id"] for o in objects if not o.get("segmentation")],
    }
    return [f"{len(found)} {what}: {examples(found)}." for what, found in wrong.items() if found]


def valid_box(box: Any) -> bool:
    """Tell whether a box is valid; COCO has empty ones, which training leaves out."""
    return isinstance(box, list) and len(box) == 4 and min(box[2:]) >= 0


def check_images(folder: Path, images: list[dict[str, Any]], every: int) -> list[str]:
    """Return problems: missing files, and in a sample damaged ones or unlisted sizes."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [image["file_name"] for image in images if image["file_name"] not in present]
    problems = (
        [f"{len(missing)} listed images are not in {folder}: {examples(missing)}."]
        if missing
        else []
    )
    there = [image for image in images if image["file_name"] in present]
    for image in there[::every]:
        try:
            with Image.open(folder / image["file_name"]) as opened:
                size = opened.size
        except (UnidentifiedImageError, OSError) as error:
            problems.append(f"{image['file_name']} cannot be opened ({error}).")
            continue
        if size != (image["width"], image["height"]):
            problems.append(
                f"{image['file_name']} is {size}, listed as {(image['width'], image['height'])}."
            )
    return problems


def examples(values: list[Any]) -> str:
    """Return the first values as text."""
    more = ", ..." if len(values) > MOST_EXAMPLES else ""
    return ", ".join(map(str, values[:MOST_EXAMPLES])) + more


def main(argv: list[str] | None = None) -> int:
    """Print the reports of all splits; return 1 if there is a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="the folder that --data-root names")
    parser.add_argument(
        "--every", type=int, default=100, metavar="N", help="open every N-th image; 1 opens all"
    )
    args = parser.parse_args(argv)
    if args.every < 1:
        raise SystemExit(f"error: --every {args.every} must be at least 1")
    reports = [check_split(args.root, split, args.every) for split in SPLITS]
    for line, problems in reports:
        print("\n".join([line, *(f"  {problem}" for problem in problems)]))
    return int(any(problems for _, problems in reports))


if __name__ == "__main__":
    raise SystemExit(main())
