"""What learned parts are for: maps of a data set, their agreement with objects, a contact sheet.

The part sources other than "learned" are the baselines of SemMAE's ablation
(docs/methods/mae_semmae.md#first-stage).
"""

import hashlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from datasets import ImageDataset, build_dataset, build_loader
from unimim.data.jpeg import PILLOW_ERRORS, RawImage, decode
from unimim.data.part_maps import (
    SCORES,
    PartMaps,
    PartMapWriter,
    PartMeta,
    file_sha256,
    image_names,
    names_sha256,
)
from unimim.data.shapes import FOLDERS, cached_shapes
from unimim.data.sources import Source
from unimim.engine.distributed import barrier
from unimim.engine.runner import AUTOCAST_DTYPES
from unimim.engine.state import RunContext
from unimim.files import write_atomically, write_table
from unimim.logs import log
from unimim.parts.learning import (
    PART_SOURCES,
    PartLearning,
    TeacherFeatures,
    attention_head_maps,
    hard_maps,
    kmeans_maps,
    random_maps,
)
from unimim.parts.metrics import PartQuality, overlap, usage

MASK_IDS = 256  # of an 8-bit mask
PANEL = 160  # pixels of a image on the contact sheet

# one color for each id, the first ones easy to tell apart; part 0 is gray
_FIRST_COLORS = [
    (128, 128, 128), (230, 60, 60), (60, 180, 75), (60, 100, 230), (245, 190, 30), (150, 50, 190),
    (60, 210, 220), (240, 130, 200),
]  # fmt: skip
_MORE_COLORS = np.random.default_rng(0).integers(0, 256, (256 - len(_FIRST_COLORS), 3))
PALETTE = np.concatenate((_FIRST_COLORS, _MORE_COLORS)).astype(np.uint8)


# --- from images to maps --------------------------------------------------------------------------


class WholeImage:
    """Squeezes the whole image to a square, on which part maps are made: {"image": uint8 [3, S,
    S]}."""

    def __init__(self, size: int):
        self.size = (size, size)

    def __call__(self, raw: RawImage, rng: np.random.Generator) -> dict[str, Tensor]:
        image = Image.fromarray(decode(raw)).resize(self.size, Image.Resampling.BICUBIC)
        return {"image": torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())}


def whole_images(args: Namespace, *, train: bool) -> ImageDataset:
    return build_dataset(
        args, train=train, transform=WholeImage(args.input_size), need_labels=False
    )


def batches_of(
    args: Namespace, dataset: ImageDataset, rows: list[int]
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of the images `rows`, in this order."""
    keys = [(0, row) for row in rows]
    batches = [
        keys[first : first + args.batch_size] for first in range(0, len(keys), args.batch_size)
    ]
    return iter(build_loader(dataset, batches, num_workers=args.num_workers, pin_mem=args.pin_mem))


class Viewer:
    """Turns batches of uint8 images into the teacher's features, in the run's precision."""

    def __init__(self, context: RunContext, task: PartLearning):
        self.teacher = task.teacher
        self.normalize = context.normalize
        dtype = AUTOCAST_DTYPES.get(context.args.precision)
        self.precision = partial(
            torch.autocast, context.device.type, dtype, enabled=dtype is not None
        )

    def __call__(self, batch: dict[str, Tensor]) -> TeacherFeatures:
        with self.precision():
            return self.teacher.look(self.normalize(batch)["image"])


class MapMaker:
    """Turns features into hard part maps uint8 [B, Hp, Wp] on the CPU, by one part source.

    `num_parts` counts the ids, `background_id` is the one that is not a part of an object, or None.
    """

    def __init__(self, args: Namespace, source: str, task: PartLearning):
        self.clean = args.clean and source != "random"
        teacher_grid = task.teacher.grid
        self.grid = teacher_grid if args.part_grid is None else (args.part_grid, args.part_grid)
        self.num_parts = task.learner.num_ids
        self.background_id = None
        self.soft: Callable[[TeacherFeatures, list[int]], Tensor]
        if source == "learned":
            self.background_id = None if args.background == "none" else 0
            self.soft = lambda features, _: task.learner.maps(features)
        elif source == "attention_heads":
            self.num_parts = 1 + task.teacher.num_heads
            self.background_id = 0
            self.soft = lambda features, _: attention_head_maps(features, teacher_grid)
        elif source == "kmeans":
            self.soft = lambda features, _: kmeans_maps(features, teacher_grid, self.num_parts)
        else:
            self.soft = lambda _, indices: random_maps(
                indices, teacher_grid, self.num_parts, args.seed
            )

    def __call__(self, features: TeacherFeatures, indices: list[int]) -> Tensor:
        return hard_maps(self.soft(features, indices), self.grid, clean=self.clean).cpu()


def attention_scores(
    features: TeacherFeatures, teacher_grid: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """Return the class token's attention on `grid`, mean over heads: float16 [B, Hp, Wp]."""
    attention = features.attention.mean(1, keepdim=True).unflatten(-1, teacher_grid)
    resized = F.interpolate(attention, size=grid, mode="bilinear", align_corners=False)
    return resized[:, 0].cpu().numpy().astype(np.float16)


# --- a whole data set -----------------------------------------------------------------------------


def extract(context: RunContext, task: PartLearning) -> None:
    """Write the part map of every image that has none yet into --extract.

    Each process makes its own rows.
    """
    args = context.args
    view = Viewer(context, task)
    make = MapMaker(args, args.part_source, task)
    dataset = whole_images(args, train=args.split == "train")

    # the first rank makes the files, every rank fills the rows that are missing
    folder = Path(args.extract)
    if context.rank == 0:
        PartMapWriter.create(folder, map_meta(args, make, task, dataset.source))
    barrier()
    writer = PartMapWriter(folder)
    rows = writer.missing(context.rank, context.world_size).tolist()
    with tqdm(
        total=len(rows),
        desc=f"{args.part_source} parts",
        unit="image",
        disable=context.rank > 0 or None,
    ) as bar:
        for batch in batches_of(args, dataset, rows):
            features, indices = view(batch), batch["index"].tolist()
            maps = make(features, indices).numpy()
            scores = (
                attention_scores(features, task.teacher.grid, make.grid)
                if args.save_scores
                else [None] * len(maps)
            )
            for row in zip(indices, maps, scores, strict=True):
                writer.write(*row)
            bar.update(len(maps))
    writer.flush()
    barrier()
    if context.rank == 0:
        writer.seal()
        report_maps(folder, writer)


def map_meta(args: Namespace, make: MapMaker, task: PartLearning, source: Source) -> PartMeta:
    folder = data_folder(args)
    map_file = folder / f"{args.split}_map.txt" if folder else None
    return PartMeta(
        num_parts=make.num_parts,
        grid=make.grid,
        num_images=len(source),
        background_id=make.background_id,
        part_source=args.part_source,
        teacher=" ".join(filter(None, (args.teacher, args.teacher_checkpoint))),
        # under the names that the teacher's weights have in maps written before
        checkpoint_sha256=weights_sha256(
            task.learner
            if args.part_source == "learned"
            else nn.ModuleDict({"vit": task.teacher.tower})
        ),
        map_file_sha256=file_sha256(map_file) if map_file and map_file.is_file() else None,
        names_sha256=names_sha256(image_names(source)),
        scores=SCORES if args.save_scores else None,
        exif_orientation=args.exif_orientation,
    )


def data_folder(args: Namespace) -> Path | None:
    """Return --data_path, or where the shapes are kept without one."""
    if args.data_set == "shapes":
        return cached_shapes(None if args.data_path is None else Path(args.data_path))
    return None if args.data_path is None else Path(args.data_path)


def weights_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def report_maps(folder: Path, writer: PartMapWriter) -> None:
    """Log how the parts are used, and which images have no map because they cannot be read."""
    missing = writer.missing()
    written = np.setdiff1d(np.arange(writer.meta.num_images), missing)
    log.info("%s: %d part maps of %s patches", folder, len(written), writer.meta.grid)
    if len(missing):
        log.warning(
            "%d images cannot be read and have no map: rows %s ...",
            len(missing),
            missing[:10].tolist(),
        )
    fractions, present = usage(PartMaps.open(folder), written)
    for part, (fraction, images) in enumerate(zip(fractions, present, strict=True)):
        log.info(
            "  part %d: %4.1f %% of the patches, in %5.1f %% of the images",
            part,
            100 * fraction,
            100 * images,
        )


# --- measuring ------------------------------------------------------------------------------------


def evaluate_parts(context: RunContext, task: PartLearning) -> list[dict[str, float | str]]:
    """Return the agreement of every part source with the masks of the val split (`PartQuality`).

    It is also logged and written as CSV.

    Every process measures everything; the first one writes.
    """
    args = context.args
    dataset = whole_images(args, train=False)
    view = Viewer(context, task)
    folder = (
        Path(args.mask_path)
        if args.mask_path
        else data_folder(args) / "annotations" / FOLDERS["val"]
    )
    makers = {source: MapMaker(args, source, task) for source in PART_SOURCES}
    qualities = {source: PartQuality(make.num_parts, MASK_IDS) for source, make in makers.items()}

    # count, for each source, how the parts of an image lie on the objects of its mask
    for batch in batches_of(args, dataset, list(range(len(dataset)))):
        features, indices = view(batch), batch["index"].tolist()
        masks = [read_mask(folder, dataset.source.path(index)) for index in indices]
        for source, make in makers.items():
            for parts, mask in zip(make(features, indices).numpy(), masks, strict=True):
                qualities[source].add(overlap(parts, mask, make.num_parts, MASK_IDS))
    rows = [
        {"part_source": s, "parts": makers[s].num_parts, **quality.metrics()}
        for s, quality in qualities.items()
    ]
    if context.rank == 0:
        write_table(args.evaluate, [rounded(row, 4) for row in rows])
        for row in rows:
            log.info("  ".join(f"{name} {text}" for name, text in rounded(row, 3).items()))
    return rows


def read_mask(folder: Path, image_path: str) -> np.ndarray:
    """Return the mask that is named as the image, uint8 [H, W]; 0 is the background."""
    file = folder / f"{Path(image_path).stem}.png"
    try:
        return np.asarray(Image.open(file))
    except PILLOW_ERRORS as error:
        raise ValueError(f"mask {file} of image {image_path} cannot be read: {error}") from error


def rounded(row: dict[str, float | str], digits: int) -> dict[str, str]:
    """Return a row as texts, its floats with so many digits after the point."""
    return {
        name: f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        for name, value in row.items()
    }


# --- looking --------------------------------------------------------------------------------------


def contact_sheet(context: RunContext, task: PartLearning) -> None:
    """Write --visualize: for each image a row with itself, its parts, and the class token's
    attention.

    For learned parts the image that the decoder makes of them comes last.
    """
    args = context.args
    dataset = whole_images(args, train=False)
    view = Viewer(context, task)
    make = MapMaker(args, args.part_source, task)
    rows = []
    for batch in batches_of(args, dataset, list(range(min(args.visualize_images, len(dataset))))):
        features, images = view(batch), batch["image"].permute(0, 2, 3, 1).numpy()
        colors = PALETTE[make(features, batch["index"].tolist()).numpy()]
        parts = [_blended(image, color) for image, color in zip(images, colors, strict=True)]
        columns = [images, parts, _grey(attention_scores(features, task.teacher.grid, make.grid))]
        if args.part_source == "learned":
            painted = (255 * task.learner.reconstruct(features)).byte()
            columns.append(painted.permute(0, 2, 3, 1).cpu().numpy())
        rows += [
            np.concatenate([_panel(image) for image in row], axis=1)
            for row in zip(*columns, strict=True)
        ]
    titles = ("image", f"parts: {args.part_source}", "attention", "reconstruction")
    sheet = _with_titles(Image.fromarray(np.concatenate(rows)), titles[: len(columns)])
    write_atomically(args.visualize, lambda file: sheet.save(file, format="PNG"))
    log.info("contact sheet written to %s", args.visualize)


def _panel(image: np.ndarray) -> np.ndarray:
    """Enlarge an image without smoothing, so that patches stay visible."""
    return np.asarray(Image.fromarray(image).resize((PANEL, PANEL), Image.Resampling.NEAREST))


def _blended(image: np.ndarray, colors: np.ndarray) -> np.ndarray:
    return (0.4 * _panel(image) + 0.6 * _panel(colors)).astype(np.uint8)


def _grey(scores: np.ndarray) -> np.ndarray:
    """Turn scores [B, H, W] into gray images [B, H, W, 3], the largest score of each white."""
    scaled = 255 * scores.astype(np.float32) / scores.max(axis=(1, 2), keepdims=True)
    return scaled.astype(np.uint8)[..., None].repeat(3, axis=-1)


def _with_titles(sheet: Image.Image, titles: tuple[str, ...]) -> Image.Image:
    titled = Image.new("RGB", (sheet.width, sheet.height + 16), "white")
    titled.paste(sheet, (0, 16))
    draw = ImageDraw.Draw(titled)
    for number, title in enumerate(titles):
        draw.text((number * PANEL + 4, 2), title, fill="black")
    return titled
