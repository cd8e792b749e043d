"""Generate the `shapes` data set: scenes with class labels, semantic masks and instances.

A scene's class is the outline of its largest object; color, size, angle and position do not depend
on it. The files are the same bytes on every machine: only integers and single IEEE operations,
numpy's frozen random streams (RandomState), and uncompressed PNGs, whose bytes do not depend on a
library's version. Image i does not depend on how many images are written.
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
VERSION = 2  # of the default scenes: cached folders of another version are not read
LARGEST_OVERLAP = 0.25
FOLDERS = {"train": "training", "val": "validation"}  # ADE20K's names
SEED = 20260131
SHADE = 24  # by which a plain background's color changes over the image
LEAST_CONTRAST = 192  # of a plain object, summed over the three channels


@dataclass(frozen=True)
class Style:
    """How scenes look: ranges of the sides in pixels and of the radii in shorter sides.

    `clutter`: textured objects on a strewn background of noise, in place of two plain colors.
    """

    sides: tuple[int, int]
    main_radius: tuple[float, float]
    other_radius: tuple[float, float]
    most_others: int
    noise: int
    clutter: bool


PLAIN = Style((64, 64), (0.30, 0.45), (0.10, 0.16), most_others=2, noise=4, clutter=False)
CLUTTERED = Style((64, 128), (0.22, 0.40), (0.12, 0.20), most_others=3, noise=8, clutter=True)


@dataclass(frozen=True)
class Scene:
    """A generated image with its objects.

    `image` is uint8 [H, W, 3]. `instances` is uint8 [H, W], 0 = background, k = the k-th object,
    whose class (from 0) is the k-th of `classes`.
    """

    image: np.ndarray
    instances: np.ndarray
    classes: tuple[int, ...]

    @property
    def label(self) -> int:
        """The class of the object with the most visible pixels."""
        areas = np.bincount(self.instances.ravel(), minlength=len(self.classes) + 1)[1:]
        return self.classes[int(areas.argmax())]

    @property
    def semantic(self) -> np.ndarray:
        """The semantic mask [H, W] uint8 as in ADE20K: 0 = background, 1 + class."""
        labels = np.array([0, *(1 + number for number in self.classes)], dtype=np.uint8)
        return labels[self.instances]


# --- one scene ------------------------------------------------------------------------------------


def make_scene(split: str, index: int, style: Style = PLAIN) -> Scene:
    """Return scene `index` of "train" or "val": one large object and some smaller ones."""
    rng = np.random.RandomState([SEED, list(FOLDERS).index(split), index])
    height, width = rng.randint(style.sides[0], style.sides[1] + 1, size=2)
    image = background(rng, height, width) if style.clutter else _gradient(rng, height, width)
    instances = np.zeros((height, width), dtype=np.uint8)
    classes = []
    for number in range(1 + rng.randint(style.most_others + 1)):
        main = number == 0
        kind = (index if main else rng.randint(len(CLASSES))) % len(CLASSES)
        radii = style.main_radius if main else style.other_radius
        shape = _object_mask(rng, kind, (height, width), radii)
        if not _overlaps(shape, instances, len(classes)):
            classes.append(kind)
            instances[shape] = len(classes)
            if style.clutter:
                image[shape] = _texture(rng, height, width)[shape]
            else:
                image[shape] = _contrasting_color(rng, image[shape])
    noise = rng.randint(-style.noise, style.noise + 1, size=image.shape)
    return Scene(np.clip(image + noise, 0, 255).astype(np.uint8), instances, tuple(classes))


def _gradient(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Return a random color that changes a little from corner to corner, [height, width, 3]."""
    color = rng.randint(SHADE, 256 - SHADE, size=3)
    return color + (_smooth_noise(rng, height, width, 1) - 128) * SHADE // 128


def _contrasting_color(rng: np.random.RandomState, ground: np.ndarray) -> np.ndarray:
    """Return a random color [3] that differs from the mean of `ground` [N, 3]."""
    mean = ground.sum(axis=0) // len(ground)
    while True:
        color = rng.randint(0, 256, size=3)
        if abs(color - mean).sum() >= LEAST_CONTRAST:
            return color


def background(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Return colored noise of four scales, strewn with small rectangles.

    The result is int64 [height, width, 3] from 0 to 255.
    """
    ground = 0
    for weight, squares in zip((8, 4, 2, 1), (3, 6, 12, 24), strict=True):
        ground = ground + weight * _smooth_noise(rng, height, width, squares)
    ground //= 15
    for _ in range(height * width // 400):
        top, left = rng.randint(height), rng.randint(width)
        bottom, right = top + rng.randint(1, 7), left + rng.randint(1, 7)
        under = ground[top:bottom, left:right]
        ground[top:bottom, left:right] = (under + rng.randint(0, 256, size=3)) // 2
    return ground


def _smooth_noise(rng: np.random.RandomState, height: int, width: int, squares: int) -> np.ndarray:
    """Return random colors at the corners of `squares` x `squares` squares, interpolated linearly.

    Arithmetic is 8-bit fixed point.
    """
    corners = rng.randint(0, 256, size=(squares + 1, squares + 1, 3))
    row, below = np.divmod(np.arange(height) * squares * 256 // height, 256)
    column, right = np.divmod(np.arange(width) * squares * 256 // width, 256)
    below = below[:, None, None]
    right = right[None, :, None]
    lines = corners[row] * (256 - below) + corners[row + 1] * below
    return (lines[:, column] * (256 - right) + lines[:, column + 1] * right) >> 16


def _texture(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Return two colors in stripes, squares, spots or blotches, [height, width, 3]."""
    colors = rng.randint(0, 256, size=(2, 3))
    pattern = rng.randint(4)
    step = rng.randint(3, 8)
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
    """Return the pixels of one object, rotated, scaled, and placed wholly inside the image."""
    height, width = size
    radius = min(size) * (radii[0] + (radii[1] - radii[0]) * rng.random_sample())
    center_x = radius + (width - 2 * radius) * rng.random_sample()
    center_y = radius + (height - 2 * radius) * rng.random_sample()
    cosine, sine = _rotation(rng)
    x = (np.arange(width)[None, :] - center_x) / radius
    y = (np.arange(height)[:, None] - center_y) / radius
    return OUTLINES[CLASSES[kind]](x * cosine + y * sine, y * cosine - x * sine)


def _rotation(rng: np.random.RandomState) -> tuple[float, float]:
    """Return the cosine and sine of a random angle, by a rational parametrization.

    The sines of math libraries differ in the last bit.
    """
    t = 2 * rng.random_sample() - 1
    cosine = (1 - t * t) / (1 + t * t)
    sine = 2 * t / (1 + t * t)
    sign = 1 if rng.randint(2) else -1
    return sign * cosine, sign * sine


def _overlaps(shape: np.ndarray, instances: np.ndarray, count: int) -> bool:
    """Tell whether `shape` would hide too much of an object, or lie mostly on one."""
    hidden = np.bincount(instances[shape], minlength=count + 1)[1:]
    areas = np.bincount(instances.ravel(), minlength=count + 1)[1:]
    return bool((hidden > LARGEST_OVERLAP * np.minimum(areas, shape.sum())).any())


# coordinates x and y within [-1, 1] -> inside or not
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * x + y * y <= 1


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # a pentagram is the set of points on the inner side of at least four of its five lines
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
    """Return a PNG of [H, W, 3] or [H, W] uint8 in stored (uncompressed) blocks."""
    height, width = image.shape[:2]
    rows = image.reshape(height, -1)
    filters = np.zeros((height, 1), dtype=np.uint8)  # filter type 0 before each row
    data = np.concatenate([filters, rows], axis=1).tobytes()

    # A zlib stream of stored blocks, each of at most 65,535 bytes.
    stored = b""
    for start in range(0, len(data), 65535):
        block = data[start : start + 65535]
        last = start + 65535 >= len(data)
        stored += struct.pack("<BHH", last, len(block), 65535 - len(block)) + block
    body = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(data))

    color_type = 2 if image.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(name: bytes, body: bytes) -> bytes:
    """Return a PNG chunk: length, name, body and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def run_lengths(mask: np.ndarray) -> dict:
    """Return COCO's uncompressed run-length encoding of a bool mask, column by column.

    The first run counts zeros.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """Return COCO annotations of the visible parts of a scene's objects, ids from `first_id`."""
    annotations = []
    for number, kind in enumerate(scene.classes, start=1):
        mask = scene.instances == number
        rows = np.flatnonzero(mask.any(axis=1))
        columns = np.flatnonzero(mask.any(axis=0))
        box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        annotations.append(
            {
                "id": first_id + len(annotations),
                "image_id": image_id,
                "category_id": kind + 1,
                "bbox": [int(side) for side in box],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": run_lengths(mask),
            }
        )
    return annotations


def write_shapes(
    root: Path,
    train: int = TRAIN_IMAGES,
    val: int = VAL_IMAGES,
    *,
    voc: bool = False,
    style: Style = PLAIN,
) -> None:
    """Write the data set to the new folder `root`, which appears when it is complete.

    With `voc` it has the layout of Pascal VOC, otherwise:

    - `{train,val}.zip` with `{train,val}_map.txt`, for classification;
    - `images/` and `annotations/` with `training` and `validation`, as ADE20K (0 = background,
      1-10 = class);
    - `instances_{train,val}.json`, as COCO (category = class + 1, file names relative to `images`).
    """

    def write(draft: Path) -> None:
        for split, count in (("train", train), ("val", val)):
            (_write_voc_split if voc else _write_split)(draft, split, count, style)

    files.write_folder(root, write)


def _write_split(root: Path, split: str, count: int, style: Style) -> None:
    """Write one split for classification, as ADE20K and as COCO."""
    images = root / "images" / FOLDERS[split]
    masks = root / "annotations" / FOLDERS[split]
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    lines = []
    coco = {"images": [], "annotations": [], "categories": _coco_categories()}
    with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
        for index in tqdm(range(count), desc=f"shapes {split}", disable=None):
            scene = make_scene(split, index, style)
            image = png_bytes(scene.image)
            name = f"{index:06d}.png"
            member = f"{CLASSES[scene.label]}/{name}"
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


def _write_voc_split(root: Path, split: str, count: int, style: Style) -> None:
    """Write one split in the layout of Pascal VOC with augmented training masks.

    Images (PNG files) are in JPEGImages, lists in ImageSets/Segmentation/{trainaug,val}.txt. Every
    other training mask is in SegmentationClassAug, all others are in SegmentationClass.
    """
    folders = ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation")
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = []
    for index in tqdm(range(count), desc=f"shapes {split}", disable=None):
        scene = make_scene(split, index, style)
        name = f"{split}_{index:06d}"
        augmented = split == "train" and index % 2 == 0
        (root / "JPEGImages" / f"{name}.png").write_bytes(png_bytes(scene.image))
        masks = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
        (masks / f"{name}.png").write_bytes(png_bytes(with_edges(scene)))
        names.append(f"{name}\n")
    list_name = "trainaug" if split == "train" else split
    (root / "ImageSets" / "Segmentation" / f"{list_name}.txt").write_text("".join(names))


def with_edges(scene: Scene) -> np.ndarray:
    """Return the semantic mask [H, W] with 255 at the right and lower edges of objects."""
    mask = scene.semantic.copy()
    instances = scene.instances
    mask[:, :-1][instances[:, :-1] != instances[:, 1:]] = 255
    mask[:-1][instances[:-1] != instances[1:]] = 255
    return mask


def _coco_categories() -> list[dict]:
    return [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]


def _zip_entry(name: str) -> zipfile.ZipInfo:
    """Return a member whose header is the same on every machine."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # the default depends on the operating system
    entry.external_attr = 0o644 << 16
    return entry


def cached_shapes(
    root: Path | None = None, train: int = TRAIN_IMAGES, val: int = VAL_IMAGES
) -> Path:
    """Return the folder of the data set (default `$UNIMIM_CACHE/shapes2`), written on first use.

    One process per machine writes while the others wait. An existing folder is used as it is,
    whatever its number and style of images.
    """
    if root is None:
        cache = Path(os.environ.get("UNIMIM_CACHE", "~/.cache/unimim")).expanduser()
        root = cache / f"shapes{VERSION}"
    if not (root / "train_map.txt").is_file():
        if root.is_dir() and any(root.iterdir()):
            raise ValueError(
                f"{root} is not empty and holds no shapes data set; set --data_path to a new folder"
            )
        root.parent.mkdir(parents=True, exist_ok=True)
        with open(root.with_name(f".{root.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / "train_map.txt").is_file():
                write_shapes(root, train, val)
    return root
