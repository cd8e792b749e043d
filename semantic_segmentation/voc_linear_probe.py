"""Segment Pascal VOC or ADE20K with a linear head on the frozen patch tokens of a ViT.

    python semantic_segmentation/voc_linear_probe.py --data_path /data/VOC2012 \\
        --finetune FILE --output_dir out
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from unimim.early import end_on_signals

    end_on_signals()

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import modeling_pretrain  # noqa: F401  (registers the methods)
from datasets import EvalBatchSampler, ImageDataset, build_loader
from engine_for_pretraining import train
from modeling_finetune import VisionTransformer
from unimim.checkpoint.loading import check_finite, load_pretrained
from unimim.cli import options
from unimim.cli.flags import add_engine_flags, add_loader_flags, add_optimizer_flags, add_run_flags
from unimim.cli.options import derived, parse_flags, report
from unimim.cli.parser import FlagParser
from unimim.data.crops import ViewDraws, fast_crop
from unimim.data.files import FolderFiles
from unimim.data.jpeg import PILLOW_ERRORS, BrokenImageError, RawImage, decode
from unimim.data.pretraining import steps_per_epoch, train_loader
from unimim.data.sources import FileSource
from unimim.data.views import Sample, draw_view
from unimim.engine.distributed import reduce_sum
from unimim.engine.runner import AUTOCAST_DTYPES
from unimim.engine.session import Origin, Position, Session
from unimim.engine.setup import dry_run, launch, set_up, start_training
from unimim.engine.state import Interruptible, RunContext
from unimim.engine.task import Task
from unimim.evaluation.features import build_vit
from unimim.evaluation.flags import add_network_flags
from unimim.files import write_rows
from unimim.logs import log
from unimim.recipes import by_name

RECIPE = "semanticmim_maskfeat_base_voc"  # sets the defaults
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus",
    "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
ADE_CLASSES = 150
VOC = "data/VOCdevkit/VOC2012"  # where mmsegmentation, too, looks for it
IGNORED = 255
CROP_SCALE = (0.8, 1.0)


@dataclass(frozen=True)
class VocRow:
    """The row of voc.csv: the mean IoU in percent after an epoch (from 0), and the best so far."""

    miou: float
    best_miou: float
    epoch: int
    lr: float
    layer_indices: int
    model: str
    finetune: str
    seed: int


# --------------------------------------------------------------------------------------------------
# The metric


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count pixels by label (rows) and prediction (columns), int64 [K, K].

    Both are integer tensors of one shape; labels outside 0 ... K - 1 are ignored.
    """
    counts = (labels >= 0) & (labels < num_classes)
    pairs = num_classes * labels[counts].long() + predictions[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Return the IoU of each class, float64 [K].

    As published, a class that never occurs has 0, and counts in the mean.
    """
    confusion = confusion.double()
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits + 1e-6)


# --------------------------------------------------------------------------------------------------
# Data


def voc_images(
    root: Path, split: str, mask_folders: tuple[str, ...], num_classes: int, args: Namespace
) -> ImageDataset:
    """Return the images and masks listed in ImageSets/Segmentation/`split`.txt, untransformed.

    An image is JPEGImages/NAME.jpg (or .png), its mask is NAME.png in the first of `mask_folders`
    that has it.

    Raises:
        ValueError: the list is missing or empty, or a listed image or mask is missing.
    """
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        raise ValueError(
            f"--data_path {root} has no {listed.relative_to(root)}: it must be VOC's folder VOC2012"
        )
    names = [Path(line.split()[0]).stem for line in listed.read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{listed} lists no image")
    images = [existing(root, ("JPEGImages",), name, (".jpg", ".png")).name for name in names]
    masks = [existing(root, mask_folders, name, (".png",)) for name in names]
    return with_masks(
        FolderFiles(root / "JPEGImages", images),
        lambda index: read_mask(masks[index], num_classes),
        args,
    )


def is_ade20k(root: Path) -> bool:
    """Return whether a folder is ADE20K's, as the challenge of 2016 packs it."""
    return (root / "images" / "training").is_dir()


def ade20k_images(root: Path, split: str, num_classes: int, args: Namespace) -> ImageDataset:
    """Return the images and masks of ADE20K's "training" or "validation", untransformed.

    An image is images/`split`/NAME.jpg (or .png), its mask annotations/`split`/NAME.png, whose 0 is
    ignored and whose 1 is class 0. ValueError: there are no images, or one has no mask.
    """
    folder = root / "images" / split
    images = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".png"))
    if not images:
        raise ValueError(f"--data_path {root}: {folder} holds no image")
    annotations = (f"annotations/{split}",)
    masks = [existing(root, annotations, Path(name).stem, (".png",)) for name in images]

    def labels(index: int) -> np.ndarray:
        mask = read_mask(masks[index], num_classes, first=1)
        return np.where(mask == IGNORED, mask, mask - np.uint8(1))  # 0 becomes 255, ignored

    return with_masks(FolderFiles(folder, images), labels, args)


def with_masks(
    files: FolderFiles, read: Callable[[int], np.ndarray], args: Namespace
) -> ImageDataset:
    """Return the images of some files, with the masks that `read` gives as "labels"."""
    dataset = ImageDataset(
        FileSource(files, np.full(len(files), -1), []),
        None,
        seed=args.seed,
        max_bad_images=args.max_bad_images,
        strict=args.strict_data,
    )
    dataset.maps = {"labels": read}
    return dataset


def existing(root: Path, folders: tuple[str, ...], name: str, suffixes: tuple[str, ...]) -> Path:
    """Return the first of the files folder/name.suffix below `root` that exists."""
    candidates = [root / folder / f"{name}{suffix}" for folder in folders for suffix in suffixes]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(
        f"--data_path: none of {', '.join(map(str, candidates))} exists, but {name} is listed"
    )


def read_mask(path: Path, num_classes: int, first: int = 0) -> np.ndarray:
    """Return class numbers uint8 [H, W] as they are, 255 = ignored, from a palette or grayscale
    image; `first` is that of class 0."""
    try:
        image = Image.open(path)
        mask = np.array(image)
    except PILLOW_ERRORS as error:
        raise BrokenImageError(f"mask {path}: {error}") from error
    if image.mode not in ("P", "L"):
        raise ValueError(f"mask {path} is not a palette or gray image, but of mode {image.mode}")
    unknown = mask[(mask >= num_classes + first) & (mask != IGNORED)]
    if unknown.size:
        raise ValueError(
            f"mask {path} has class {unknown[0]}: --nb_classes {num_classes} is too few"
        )
    return mask


class TrainView:
    """Crop most of the image and flip it, with its mask: {"image" [3, H, W], "labels" [H, W]}."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(
        self, raw: RawImage, rng: np.random.Generator, maps: Mapping[str, np.ndarray]
    ) -> Sample:
        pixels = decode(raw)
        mask = maps["labels"]
        check_size(pixels, mask)
        params = draw_view(rng, mask.shape, CROP_SCALE, "bilinear", strong=False)
        image = fast_crop(pixels, params, self.size)
        labels = crop_labels(mask, params, self.size)
        return {"image": torch.from_numpy(image), "labels": torch.from_numpy(labels)}


class EvalView:
    """Resize the whole image to `size`: {"image" [3, H, W], "labels" [H, W]}."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(
        self, raw: RawImage, rng: np.random.Generator, maps: Mapping[str, np.ndarray]
    ) -> Sample:
        pixels = decode(raw)
        mask = maps["labels"]
        check_size(pixels, mask)
        image = Image.fromarray(pixels).resize(self.size[::-1], Image.Resampling.BILINEAR)
        planes = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        return {
            "image": torch.from_numpy(planes),
            "labels": torch.from_numpy(nearest(mask, self.size)),
        }


def check_size(image: np.ndarray, mask: np.ndarray) -> None:
    """Raise BrokenImageError unless image and mask have the same size."""
    if image.shape[:2] != mask.shape:
        raise BrokenImageError(f"the image has {image.shape[:2]} pixels, its mask {mask.shape}")


def crop_labels(mask: np.ndarray, params: ViewDraws, size: tuple[int, int]) -> np.ndarray:
    """Crop a mask [H, W] as `fast_crop` crops its image: [*size]."""
    top, left, height, width = params.box
    mask = mask[:, ::-1] if params.flip else mask  # the box is relative to the mirrored image
    return nearest(mask[top : top + height, left : left + width], size)


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask by nearest neighbors."""
    image = Image.fromarray(np.ascontiguousarray(mask))
    return np.array(image.resize(size[::-1], Image.Resampling.NEAREST))


# --------------------------------------------------------------------------------------------------
# The model


class Backbone(nn.Module):
    """A frozen ViT up to block `layer`: images [B, 3, H, W] to a map float32 [B, C, gh, gw].

    Tokens of the last block pass the final norm if the checkpoint has one, others pass none.
    """

    def __init__(self, vit: VisionTransformer, layer: int):
        super().__init__()
        depth = len(vit.blocks)
        if not -depth <= layer < depth:
            raise ValueError(
                f"--layer_indices {layer}: the model has blocks 0 to {depth - 1}, or -1 to -{depth}"
            )
        self.is_last = layer in (-1, depth - 1)
        vit.blocks = vit.blocks[: layer % depth + 1]
        self.vit = vit.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.forward_features(images)
        if self.is_last:
            tokens = self.vit.norm(tokens)
        tokens = tokens[:, self.vit.num_prefix_tokens :]
        return tokens.float().transpose(1, 2).unflatten(2, self.vit.patch_embed.grid_size)


def build_backbones(args: Namespace, device: torch.device) -> dict[str, Backbone]:
    """Return the network for "train" and "val", built for --input_size and --eval_size."""
    vit = build_vit(args)
    backbones = {"train": Backbone(vit, args.layer_indices).to(device)}
    backbones["val"] = backbones["train"]
    if args.eval_size != args.input_size:
        other = build_vit(Namespace(**vars(args) | {"input_size": args.eval_size}))
        if not args.finetune:  # random weights depend on the size
            load_pretrained(other, vit.state_dict(), min_matched=0.0)
        backbones["val"] = Backbone(other, args.layer_indices).to(device)
    return backbones


def build_head(dim: int, num_classes: int, seed: int) -> nn.Conv2d:
    """Return the linear head, a 1 x 1 convolution."""
    torch.manual_seed(seed)
    head = nn.Conv2d(dim, num_classes, 1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class Segmentation(Task):
    """The task that the engine trains: batches of images and labels to a loss.

    The published code enlarges the features and then applies the head. Both are linear and the
    interpolation weights sum to 1, so the head comes first here: the same logits with a fraction of
    the memory. The backbone is not a submodule, so it is neither wrapped nor optimized nor saved.
    """

    def __init__(self, head: nn.Conv2d, backbones: dict[str, Backbone], mask_size: int):
        super().__init__()
        self.head = head
        self._backbones = (backbones,)  # in a tuple, which hides them from nn.Module
        self.mask_size = mask_size

    @property
    def network(self) -> nn.Module:
        return self.head

    def logits(self, images: Tensor, size: tuple[int, int], split: str) -> Tensor:
        """Return the logits of images [B, 3, H, W], float32 [B, classes, *size]."""
        features = self._backbones[0][split](images)
        with torch.autocast(images.device.type, enabled=False):
            return F.interpolate(self.head(features), size, mode="bilinear", align_corners=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        size = (self.mask_size, self.mask_size)
        labels = F.interpolate(batch["labels"].unsqueeze(1).float(), size, mode="nearest")
        labels = labels.squeeze(1).long()
        logits = self.logits(batch["image"], size, "train")
        return {"loss": F.cross_entropy(logits, labels, ignore_index=IGNORED)}


@torch.no_grad()
def evaluate_segmentation(
    task: Segmentation, loader: DataLoader, context: RunContext, dtype: torch.dtype | None
) -> Tensor:
    """Return the confusion matrix, int64 [K, K], over all ranks; every image counts once."""
    classes = task.head.out_channels
    device = context.device
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for batch in loader:
        counts = batch["index"] >= 0
        moved = context.normalize({name: batch[name][counts] for name in ("image", "labels")})
        labels = moved["labels"]
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            predictions = task.logits(moved["image"], labels.shape[1:], "val").argmax(1)
        confusion += confusion_matrix(labels, predictions, classes)
    return reduce_sum(confusion)


# --------------------------------------------------------------------------------------------------
# Flags


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        description=__doc__,
    )
    add_network_flags(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", default=VOC,
        help="VOC2012 (JPEGImages, SegmentationClass(Aug), ImageSets) or ADEChallengeData2016 "
        "(images, annotations)",
    )  # fmt: skip
    group.add_argument(
        "--nb_classes", type=int, default=None,
        help=f"classes, VOC's background among them; None: {len(CLASSES)}, ADE20K {ADE_CLASSES}",
    )  # fmt: skip
    add_loader_flags(group)
    group = parser.add_argument_group("segmentation probe")
    group.add_argument(
        "--layer_indices", type=int, default=-5, help="block whose patch tokens are classified"
    )
    group.add_argument(
        "--train_mask_size",
        type=int,
        default=100,
        help="side to which logits and labels are resized",
    )
    group.add_argument(
        "--eval_size", type=int, default=448, help="side of the images that are evaluated"
    )
    group.add_argument(
        "--val_batch_size", type=int, default=5, help="images per process in evaluation"
    )
    group.add_argument(
        "--val_freq", type=int, default=1, help="epochs between evaluations, besides the last epoch"
    )
    group.add_argument("--eval", action="store_true", help="evaluate --resume and exit")
    add_optimizer_flags(parser, "pretrain")
    add_engine_flags(parser, "finetune")
    add_run_flags(parser, "finetune")
    parser.set_defaults(**by_name(RECIPE).flags, opt_betas=None, recipe=RECIPE)
    return parser


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the flags: defaults < --recipe < --config < command line."""
    return parse_flags(build_parser(), argv, options.validate, validate, stage="voc")


def validate(args: Namespace) -> None:
    if args.nb_classes is None:
        args.nb_classes = ADE_CLASSES if is_ade20k(Path(args.data_path)) else len(CLASSES)
    for name in ("nb_classes", "train_mask_size", "eval_size", "val_batch_size", "val_freq"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.nb_classes > IGNORED:
        raise ValueError(f"--nb_classes {args.nb_classes}: masks have room for {IGNORED} classes")


# --------------------------------------------------------------------------------------------------
# Runs


class SegmentationEvaluator:
    """Evaluate the head, write voc.csv, and keep the best epoch's checkpoint."""

    def __init__(self, context: RunContext, task: Segmentation, loader: DataLoader | Interruptible):
        self.args = context.args
        self.context = context
        self.task = task
        self.loader = loader
        self.result: VocRow | None = None  # the latest

    def __call__(self, epoch: int, best: float = 0.0) -> VocRow:
        """Return the result after `epoch`, given the best mIoU so far."""
        args = self.args
        dtype = AUTOCAST_DTYPES.get(args.precision)
        iou = class_iou(evaluate_segmentation(self.task, self.loader, self.context, dtype)).cpu()
        names = ("lr", "layer_indices", "model", "finetune", "seed")
        about = {name: getattr(args, name) for name in names}
        miou = 100 * iou.mean().item()
        self.result = VocRow(miou=miou, best_miou=max(miou, best), epoch=epoch, **about)
        if args.output_dir and args.rank == 0:
            write_rows(Path(args.output_dir) / "voc.csv", [self.result])
        log.info("mIoU %.3f; by class: %s", miou, " ".join(f"{100 * x:.1f}" for x in iou.tolist()))
        return self.result

    def after_epoch(self, position: Position, session: Session) -> dict[str, float]:
        last = position.epoch + 1 == self.args.epochs
        if (position.epoch + 1) % self.args.val_freq and not last:
            return {}
        miou = self(position.epoch, position.best).miou
        if miou > position.best:
            position.best = miou
            session.save_best(position, of_ema=False, wait=False)
        return {"test_miou": miou, "best_miou": position.best}


def build_data(args: Namespace, backbones: dict[str, Backbone]) -> dict[str, ImageDataset]:
    """Return the data sets "train" (VOC's is trainaug, with its augmented masks first) and
    "val"."""
    root = Path(args.data_path)
    if not root.is_dir():
        raise ValueError(
            f"--data_path {root} is not a folder; use VOC's folder VOC2012, or ADE20K's"
        )
    if is_ade20k(root):
        splits = {"train": "training", "val": "validation"}
        data = {
            name: ade20k_images(root, split, args.nb_classes, args)
            for name, split in splits.items()
        }
    else:
        load = partial(voc_images, root, num_classes=args.nb_classes, args=args)
        data = {
            "train": load("trainaug", ("SegmentationClassAug", "SegmentationClass")),
            "val": load("val", ("SegmentationClass",)),
        }
    for name, view in (("train", TrainView), ("val", EvalView)):
        data[name].transform = view(backbones[name].vit.patch_embed.img_size)
    return data


def main(args: Namespace) -> VocRow | None:
    context = set_up(args)
    backbones = build_backbones(args, context.device)
    data = build_data(args, backbones)
    head = build_head(backbones["train"].vit.embed_dim, args.nb_classes, args.seed)
    head.to(context.device)
    task = Segmentation(head, backbones, args.train_mask_size)
    sampler = EvalBatchSampler(
        len(data["val"]), args.val_batch_size, rank=args.rank, world_size=args.world_size
    )
    val_loader = build_loader(
        data["val"], sampler, num_workers=args.num_workers, pin_mem=args.pin_mem
    )
    evaluator = SegmentationEvaluator(context, task, val_loader)
    if args.eval and not args.dry_run:
        origin = Origin.find(args)
        if origin is None:
            raise ValueError("--eval needs a checkpoint: --resume FILE")
        origin.load_weights(head, None, "average")
        check_finite(head, origin.path)
        return evaluator(origin.state["epoch"])
    loader = train_loader(args, data["train"])
    sizes = (
        f"{len(data['train'])} for training, {len(data['val'])} for validation, "
        f"{args.nb_classes} classes"
    )
    steps = steps_per_epoch(args, loader)
    report(args, derived(args, steps) | {"images": sizes})
    # the bias is decayed as well
    groups = [{"params": list(head.parameters()), "weight_decay": args.weight_decay, "decay": True}]
    if args.dry_run:
        dry_run(args, groups, steps, context.device)
        return None
    run, position = start_training(context, task, loader, groups)
    evaluator.loader = Interruptible(evaluator.loader, run.stop)
    train(run, position, after_epoch=lambda position: evaluator.after_epoch(position, run.session))
    log.info("best mIoU %.3f", position.best)
    # a finished run that is resumed trains nothing, so it has no result yet
    return evaluator.result or evaluator(args.epochs - 1, position.best)


if __name__ == "__main__":
    launch(main, parse())
