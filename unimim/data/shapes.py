"""The `shapes` data set: generated scenes with a class label, a semantic mask and instances, the
same bytes everywhere.

Only integers and single IEEE operations are used, random streams that numpy has frozen
(RandomState), and PNG files without compression, whose bytes do not depend on a library's version.
Image i never depends on how many are written.
"""

import fcntl
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unimim import files

CLASSES = (
    "disc",
    "ring",
    "square",
    "triangle",
    "star",
    "cross",
    "hexagon",
    "crescent",
    "half_disc",
    "arrow",
)
TRAIN_IMAGES, VAL_IMAGES = 2000, 500
SIDES = (64, 128)
MAIN_RADIUS, OTHER_RADIUS = (0.22, 0.40), (0.12, 0.20)  # of the shorter side
MOST_OTHERS, LARGEST_OVERLAP = 3, 0.25
FOLDERS = {"train": "training", "val": "validation"}  # ADE20K's names
SEED = 20260131


@dataclass(frozen=True)
class Scene:
    """`image` [H, W, 3] uint8; `instances` [H, W] uint8, 0 = background, k = the k-th of `classes`
    (numbers from 0)."""

    image: np.ndarray
    instances: np.ndarray
    classes: tuple[int, ...]

    @property
    def label(self) -> int:
        """The class of the object that shows most pixels."""
        areas = np.bincount(self.instances.ravel(), minlength=len(self.classes) + 1)[1:]
        return self.classes[int(areas.argmax())]

    @property
    def semantic(self) -> np.ndarray:
        """[H, W] uint8, ADE20K's numbers: 0 = background, 1 + class."""
        return np.array([0, *(1 + number for number in self.classes)], dtype=np.uint8)[
            self.instances
        ]


# --- one scene ------------------------------------------------------------------------------------


def make_scene(split: str, index: int) -> Scene:
    """Scene number `index` of "train" or "val": one large object and up to three smaller ones on a
    cluttered ground."""
    rng = np.random.RandomState([SEED, list(FOLDERS).index(split), index])
    height, width = rng.randint(SIDES[0], SIDES[1] + 1, size=2)
    image, instances, classes = (
        background(rng, height, width),
        np.zeros((height, width), dtype=np.uint8),
        [],
    )
    for number in range(1 + rng.randint(MOST_OTHERS + 1)):
        kind = (index if number == 0 else rng.randint(len(CLASSES))) % len(CLASSES)
        shape = _object_mask(
            rng, kind, (height, width), MAIN_RADIUS if number == 0 else OTHER_RADIUS
        )
        if not _overlaps(shape, instances, len(classes)):
            classes.append(kind)
            instances[shape] = len(classes)
            image[shape] = _texture(rng, height, width)[shape]
    noise = rng.randint(-8, 9, size=image.shape)
    return Scene(np.clip(image + noise, 0, 255).astype(np.uint8), instances, tuple(classes))


def background(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Colored noise of four scales with small patches strewn over it, [height, width, 3] int64
    from 0 to 255."""
    octaves = zip((8, 4, 2, 1), (3, 6, 12, 24), strict=True)
    ground = (
        sum(weight * _smooth_noise(rng, height, width, cells) for weight, cells in octaves) // 15
    )
    for _ in range(height * width // 400):
        top, left = rng.randint(height), rng.randint(width)
        bottom, right = top + rng.randint(1, 7), left + rng.randint(1, 7)
        ground[top:bottom, left:right] = (
            ground[top:bottom, left:right] + rng.randint(0, 256, size=3)
        ) // 2
    return ground


def _smooth_noise(rng: np.random.RandomState, height: int, width: int, cells: int) -> np.ndarray:
    """Random colors on a grid of `cells` x `cells`, interpolated linearly in 8-bit fixed point."""
    corners = rng.randint(0, 256, size=(cells + 1, cells + 1, 3))
    row, row_part = np.divmod(np.arange(height) * cells * 256 // height, 256)
    column, column_part = np.divmod(np.arange(width) * cells * 256 // width, 256)
    row_part, column_part = row_part[:, None, None], column_part[None, :, None]
    lines = corners[row] * (256 - row_part) + corners[row + 1] * row_part
    return (lines[:, column] * (256 - column_part) + lines[:, column + 1] * column_part) >> 16


def _texture(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Two colors in stripes, squares, spots or blotches, [height, width, 3]."""
    colors = rng.randint(0, 256, size=(2, 3))
    pattern, step = rng.randint(4), rng.randint(3, 8)
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    if pattern == 0:
        second = (x * rng.randint(-2, 3) + y * rng.randint(1, 3)) // step % 2 == 1
    elif pattern == 1:
        second = (x // step + y // step) % 2 == 1
    elif pattern == 2:
        second = (x % (2 * step) - step) ** 2 + (y % (2 * step) - step) ** 2 < step * step // 2
    else:
        second = _smooth_noise(rng, height, width, 16)[..., 0] > 127
    return colors[np.broadcast_to(second, (height, width)).astype(np.int64)]


def _object_mask(
    rng: np.random.RandomState, kind: int, size: tuple[int, int], radii: tuple[float, float]
) -> np.ndarray:
    """Pixels of one object: turned, scaled, and placed wholly inside the picture."""
    height, width = size
    radius = min(size) * (radii[0] + (radii[1] - radii[0]) * rng.random_sample())
    centre_x = radius + (width - 2 * radius) * rng.random_sample()
    centre_y = radius + (height - 2 * radius) * rng.random_sample()
    cosine, sine = _rotation(rng)
    x, y = (
        (np.arange(width)[None, :] - centre_x) / radius,
        (np.arange(height)[:, None] - centre_y) / radius,
    )
    return OUTLINES[CLASSES[kind]](x * cosine + y * sine, y * cosine - x * sine)


def _rotation(rng: np.random.RandomState) -> tuple[float, float]:
    """Cosine and sine of a random angle by the rational parametrisation: libraries' sines differ in
    the last bit."""
    t = 2 * rng.random_sample() - 1
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    sign = 1 if rng.randint(2) else -1
    return sign * cosine, sign * sine


def _overlaps(shape: np.ndarray, instances: np.ndarray, count: int) -> bool:
    """Whether `shape` would hide too much of an object, or lie mostly on one."""
    hidden = np.bincount(instances[shape], minlength=count + 1)[1:]
    areas = np.bincount(instances.ravel(), minlength=count + 1)[1:]
    return bool((hidden > LARGEST_OVERLAP * np.minimum(areas, shape.sum())).any())


Outline = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # coordinates within [-1, 1] -> inside or not


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * x + y * y <= 1


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # a pentagram is what lies on the inner side of at least four of its five lines
    sides = ((0.0, 1.0), (0.9511, 0.3090), (-0.9511, 0.3090), (0.5878, -0.8090), (-0.5878, -0.8090))
    return sum((a * x + b * y <= 0.3090).astype(int) for a, b in sides) >= 4


OUTLINES: dict[str, Outline] = {
    "disc": _disc,
    "ring": lambda x, y: _disc(x, y) & (x * x + y * y >= 0.3),
    "square": lambda x, y: (abs(x) <= 0.7) & (abs(y) <= 0.7),
    "triangle": lambda x, y: (
        (y <= 0.5) & (0.866 * x - 0.5 * y <= 0.5) & (-0.866 * x - 0.5 * y <= 0.5)
    ),
    "star": _star,
    "cross": lambda x, y: (
        ((abs(x) <= 0.3) & (abs(y) <= 0.95)) | ((abs(y) <= 0.3) & (abs(x) <= 0.95))
    ),
    "hexagon": lambda x, y: (abs(x) <= 0.866) & (0.5 * abs(x) + 0.866 * abs(y) <= 0.866),
    "crescent": lambda x, y: _disc(x, y) & ((x - 0.5) * (x - 0.5) + y * y > 0.64),
    "half_disc": lambda x, y: _disc(x, y) & (y >= 0),
    "arrow": lambda x, y: (
        ((abs(x) <= 0.28) & (y >= 0) & (y <= 0.95)) | ((y < 0) & (abs(x) <= 0.8 * (y + 1)))
    ),
}


# --- files ----------------------------------------------------------------------------------------


def png_bytes(image: np.ndarray) -> bytes:
    """A PNG of [H, W, 3] or [H, W] uint8 in stored (uncompressed) blocks."""
    height, width = image.shape[:2]
    rows = image.reshape(height, -1)
    data = np.concatenate(
        [np.zeros((height, 1), dtype=np.uint8), rows], axis=1
    ).tobytes()  # filter type 0
    blocks = [data[start : start + 65535] for start in range(0, len(data), 65535)]
    stored = b"".join(
        struct.pack("<BHH", block is blocks[-1], len(block), 65535 - len(block)) + block
        for block in blocks
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if image.ndim == 3 else 0, 0, 0, 0)
    body = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        map(_chunk, (b"IHDR", b"IDAT", b"IEND"), (header, body, b""))
    )


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length code of a bool mask: column by column, beginning with the
    zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """COCO's annotations of the visible parts of a scene's objects, numbered from `first_id`."""
    found = []
    for number, kind in enumerate(scene.classes, start=1):
        mask = scene.instances == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        found.append(
            {
                "id": first_id + len(found),
                "image_id": image_id,
                "category_id": kind + 1,
                "bbox": [int(side) for side in box],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": run_lengths(mask),
            }
        )
    return found


def write_shapes(
    root: Path, train: int = TRAIN_IMAGES, val: int = VAL_IMAGES, *, voc: bool = False
) -> None:
    """Write the data set to the new folder `root`, all at once: it appears when it is complete.
    With `voc` it has Pascal VOC's layout, else:

    `{train,val}.zip` with `{train,val}_map.txt`; `images/` and `annotations/` with `training` and
    `validation` (ADE20K: 0 = background, 1-10 = class); `instances_{train,val}.json` (COCO;
    category = class + 1, file names below `images`).
    """

    def write(draft: Path) -> None:
        for split, count in (("train", train), ("val", val)):
            (_write_voc_split if voc else _write_split)(draft, split, count)

    files.write_folder(root, write)


def _write_split(root: Path, split: str, count: int) -> None:
    images, masks = (root / kind / FOLDERS[split] for kind in ("images", "annotations"))
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    lines, coco = [], {"images": [], "annotations": [], "categories": _coco_categories()}
    with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
        for index in tqdm(range(count), desc=f"shapes {split}", disable=None):
            scene, name = make_scene(split, index), f"{index:06d}.png"
            image, member = png_bytes(scene.image), f"{CLASSES[scene.label]}/{name}"
            archive.writestr(_zip_entry(member), image)
            (images / name).write_bytes(image)
            (masks / name).write_bytes(png_bytes(scene.semantic))
            lines.append(f"{member}\t{scene.label}\n")
            height, width = scene.instances.shape
            file_name = f"{FOLDERS[split]}/{name}"
            coco["images"].append(
                {"id": index, "file_name": file_name, "height": height, "width": width}
            )
            coco["annotations"] += coco_annotations(scene, index, 1 + len(coco["annotations"]))
    (root / f"{split}_map.txt").write_text("".join(lines))
    (root / f"instances_{split}.json").write_text(json.dumps(coco, separators=(",", ":")))


def _write_voc_split(root: Path, split: str, count: int) -> None:
    """JPEGImages (PNG files), ImageSets/Segmentation/{trainaug,val}.txt, masks in
    SegmentationClass{Aug,}.

    Every other training mask lies in SegmentationClass, where VOC has those of its own.
    """
    lists, names = root / "ImageSets" / "Segmentation", []
    for folder in (
        lists,
        *(root / name for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug")),
    ):
        folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(count), desc=f"shapes {split}", disable=None):
        scene, name = make_scene(split, index), f"{split}_{index:06d}"
        added = split == "train" and index % 2 == 0
        (root / "JPEGImages" / f"{name}.png").write_bytes(png_bytes(scene.image))
        masks = root / ("SegmentationClassAug" if added else "SegmentationClass")
        (masks / f"{name}.png").write_bytes(png_bytes(with_edges(scene)))
        names.append(f"{name}\n")
    (lists / f"{'trainaug' if split == 'train' else split}.txt").write_text("".join(names))


def with_edges(scene: Scene) -> np.ndarray:
    """The semantic mask [H, W] with 255 where the pixel to the right or below belongs to something
    else."""
    mask, instances = scene.semantic.copy(), scene.instances
    mask[:, :-1][instances[:, :-1] != instances[:, 1:]] = 255
    mask[:-1][instances[:-1] != instances[1:]] = 255
    return mask


def _coco_categories() -> list[dict]:
    return [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]


def _zip_entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # else it names the operating system
    entry.external_attr = 0o644 << 16
    return entry


def cached_shapes(
    root: Path | None = None, train: int = TRAIN_IMAGES, val: int = VAL_IMAGES
) -> Path:
    """The folder of the data set (default `$UNIMIM_CACHE/shapes`), written first if it is not
    there.

    One process of a machine writes, the others wait. A folder that is there is used as it is,
    whatever its counts.
    """
    if root is None:
        root = Path(os.environ.get("UNIMIM_CACHE", "~/.cache/unimim")).expanduser() / "shapes"
    if not (root / "train_map.txt").is_file():
        if root.is_dir() and any(root.iterdir()):
            raise ValueError(
                f"{root} is not empty and holds no shapes data set; give --data_path a new folder"
            )
        root.parent.mkdir(parents=True, exist_ok=True)
        with open(root.with_name(f".{root.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / "train_map.txt").is_file():
                write_shapes(root, train, val)
    return root
