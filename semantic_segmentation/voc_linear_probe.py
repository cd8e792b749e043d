"""Linear segmentation of Pascal VOC on the frozen patch tokens of a ViT; `--help` lists flags.

python semantic_segmentation/voc_linear_probe.py --data_path /data/VOC2012 --finetune FILE
--output_dir out
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modeling_pretrain  # noqa: F401  (registers the methods)
from datasets import EvalBatchSampler, ImageDataset, build_loader
from engine_for_pretraining import train
from modeling_finetune import VisionTransformer
from unimim.checkpoint.loading import load_pretrained
from unimim.cli import options
from unimim.cli.flags import add_engine_flags, add_loader_flags, add_optimizer_flags, add_run_flags
from unimim.cli.options import derived, parse_flags, report
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
from unimim.engine.state import RunContext
from unimim.engine.task import Task
from unimim.evaluation.features import build_vit
from unimim.evaluation.flags import add_network_flags
from unimim.files import write_rows
from unimim.logs import log
from unimim.recipes import by_name

RECIPE = "semanticmim_maskfeat_base_voc"  # gives the defaults
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IGNORED = 255
CROP_SCALE = (0.8, 1.0)


@dataclass(frozen=True)
class VocRow:
    """The row of voc.csv: the mean IoU over all classes, in percent, after an epoch (numbered from
    0), and the best."""

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
    """Pixels by label (rows) and prediction (columns), int64 [K, K], of two integer tensors of one
    shape.

    Pixels with a label outside 0 ... K - 1 do not count.
    """
    counts = (labels >= 0) & (labels < num_classes)
    pairs = num_classes * labels[counts].long() + predictions[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, float64 [K]; a class that never occurs has 0, and
    counts in the mean."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits + 1e-6)


# --------------------------------------------------------------------------------------------------
# Data


def voc_images(
    root: Path, split: str, mask_folders: tuple[str, ...], num_classes: int, args: Namespace
):
    """The images that ImageSets/Segmentation/`split`.txt lists, with their masks, as a data set
    without transform.

    An image is JPEGImages/NAME.jpg (or .png), its mask NAME.png in the first of `mask_folders` that
    has it.

    Raises ValueError for a missing list, an empty one, and a listed image or mask that is not
    there.
    """
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        raise ValueError(
            f"--data_path {root} has no {listed.relative_to(root)}: it must be VOC's folder VOC2012"
        )
    names = [Path(line.split()[0]).stem for line in listed.read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{listed} lists no image")
    files = FolderFiles(
        root / "JPEGImages",
        [existing(root, ("JPEGImages",), n, (".jpg", ".png")).name for n in names],
    )
    masks = [existing(root, mask_folders, name, (".png",)) for name in names]
    dataset = ImageDataset(
        FileSource(files, np.full(len(names), -1), []), None, seed=args.seed, max_bad_images=args.max_bad_images,
        strict=args.strict_data,
    )  # fmt: skip
    dataset.maps = {"labels": lambda index: read_mask(masks[index], num_classes)}
    return dataset


def existing(root: Path, folders: tuple[str, ...], name: str, suffixes: tuple[str, ...]) -> Path:
    """The first of the files folder/name.suffix below `root` that exists."""
    candidates = [root / folder / f"{name}{suffix}" for folder in folders for suffix in suffixes]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"--data_path: none of {', '.join(map(str, candidates))} exists, but {name} is listed"
        )
    return found


def read_mask(path: Path, num_classes: int) -> np.ndarray:
    """Class numbers uint8 [H, W], 255 where none counts: the indices of a palette image or a gray
    one's values."""
    try:
        picture = Image.open(path)
        mask = np.array(picture)
    except PILLOW_ERRORS as error:
        raise BrokenImageError(f"mask {path}: {error}") from error
    if picture.mode not in ("P", "L"):
        raise ValueError(f"mask {path} is no palette or gray image, but of mode {picture.mode}")
    if (unknown := mask[(mask >= num_classes) & (mask != IGNORED)]).size:
        raise ValueError(
            f"mask {path} has class {unknown[0]}: --nb_classes {num_classes} is too few"
        )
    return mask


class TrainView:
    """A crop of most of the picture and a flip, the same for image and mask: {"image" [3, H, W],
    "labels" [H, W]}."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(
        self, raw: RawImage, rng: np.random.Generator, maps: Mapping[str, np.ndarray]
    ) -> Sample:
        picture, mask = decode(raw), maps["labels"]
        check_size(picture, mask)
        draws = draw_view(rng, mask.shape, CROP_SCALE, "bilinear", strong=False)
        image, labels = fast_crop(picture, draws, self.size), crop_labels(mask, draws, self.size)
        return {"image": torch.from_numpy(image), "labels": torch.from_numpy(labels)}


class EvalView:
    """The whole picture at `size`, its aspect not kept: {"image" [3, H, W], "labels" [H, W]}."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(
        self, raw: RawImage, rng: np.random.Generator, maps: Mapping[str, np.ndarray]
    ) -> Sample:
        picture, mask = decode(raw), maps["labels"]
        check_size(picture, mask)
        image = Image.fromarray(picture).resize(self.size[::-1], Image.Resampling.BILINEAR)
        planes = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        return {
            "image": torch.from_numpy(planes),
            "labels": torch.from_numpy(nearest(mask, self.size)),
        }


def check_size(picture: np.ndarray, mask: np.ndarray) -> None:
    if picture.shape[:2] != mask.shape:
        raise BrokenImageError(f"the image has {picture.shape[:2]} pixels, its mask {mask.shape}")


def crop_labels(mask: np.ndarray, draws: ViewDraws, size: tuple[int, int]) -> np.ndarray:
    """What `fast_crop` does to the picture, done to its mask [H, W]: [*size]."""
    top, left, height, width = draws.box
    mask = mask[:, ::-1] if draws.flip else mask  # the box is one of the mirrored picture
    return nearest(mask[top : top + height, left : left + width], size)


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(
        Image.fromarray(np.ascontiguousarray(mask)).resize(size[::-1], Image.Resampling.NEAREST)
    )


# --------------------------------------------------------------------------------------------------
# The model


class Backbone(nn.Module):
    """A frozen ViT up to block number `layer`, in eval mode: images [B, 3, H, W] to a map float32
    [B, C, gh, gw].

    The last block's tokens pass the norm that the checkpoint was trained with, if it has one; all
    others pass none.
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
        tokens = (self.vit.norm(tokens) if self.is_last else tokens)[
            :, self.vit.num_prefix_tokens :
        ]
        return tokens.float().transpose(1, 2).unflatten(2, self.vit.patch_embed.grid_size)


def build_backbones(args: Namespace, device: torch.device) -> dict[str, Backbone]:
    """{"train", "val"}: the same network, built for --input_size and --eval_size."""
    vit = build_vit(args)
    backbones = {"train": Backbone(vit, args.layer_indices).to(device)}
    backbones["val"] = backbones["train"]
    if args.eval_size != args.input_size:
        other = build_vit(Namespace(**vars(args) | {"input_size": args.eval_size}))
        if not args.finetune:  # other sizes draw other random weights
            load_pretrained(other, vit.state_dict(), min_matched=0.0)
        backbones["val"] = Backbone(other, args.layer_indices).to(device)
    return backbones


def build_head(dim: int, num_classes: int, seed: int) -> nn.Conv2d:
    torch.manual_seed(seed)
    head = nn.Conv2d(dim, num_classes, 1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class Segmentation(Task):
    """What the engine trains: batches of images and labels to a loss.

    The published code enlarges the features and then applies the head. Both are linear, and what
    enlarging mixes adds up to 1, so the head comes first here: the same logits from a fraction of
    the memory. The backbone is no submodule, so that it is neither wrapped nor optimized nor saved.
    """

    def __init__(self, head: nn.Conv2d, backbones: dict[str, Backbone], mask_size: int):
        super().__init__()
        self.head, self._backbones, self.mask_size = head, (backbones,), mask_size

    @property
    def network(self) -> nn.Module:
        return self.head

    def logits(self, images: Tensor, size: tuple[int, int], split: str) -> Tensor:
        """Images [B, 3, H, W] to float32 [B, classes, *size]."""
        features = self._backbones[0][split](images)
        with torch.autocast(images.device.type, enabled=False):
            return F.interpolate(self.head(features), size, mode="bilinear", align_corners=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        size = (self.mask_size, self.mask_size)
        labels = (
            F.interpolate(batch["labels"].unsqueeze(1).float(), size, mode="nearest")
            .squeeze(1)
            .long()
        )
        return {
            "loss": F.cross_entropy(
                self.logits(batch["image"], size, "train"), labels, ignore_index=IGNORED
            )
        }


@torch.no_grad()
def evaluate_segmentation(
    task: Segmentation, loader: DataLoader, context: RunContext, dtype: torch.dtype | None
) -> Tensor:
    """The confusion matrix, int64 [K, K], over a loader that is shared among the ranks; every image
    counts once."""
    classes, device = task.head.out_channels, context.device
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
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_network_flags(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", default=None, help="VOC2012: JPEGImages, SegmentationClass(Aug), ImageSets"
    )
    group.add_argument("--nb_classes", type=int, default=len(CLASSES), help="with the background")
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
        "--val_freq", type=int, default=1, help="epochs between evaluations; the last one always is"
    )
    group.add_argument("--eval", action="store_true", help="evaluate --resume and exit")
    for add, stage in ((add_optimizer_flags, "pretrain"), (add_engine_flags, "finetune"),
                       (add_run_flags, "finetune")):  # fmt: skip
        add(parser, stage)
    parser.set_defaults(**by_name(RECIPE).flags, opt_betas=None, recipe=RECIPE)
    return parser


def parse(argv: list[str] | None = None) -> Namespace:
    """Defaults < --recipe < --config < command line. Exits with argparse's message on bad flags."""
    return parse_flags(build_parser(), argv, options.validate, validate, stage="voc")


def validate(args: Namespace) -> None:
    if args.data_path is None:
        raise ValueError("--data_path must name VOC's folder VOC2012")
    for name in ("nb_classes", "train_mask_size", "eval_size", "val_batch_size", "val_freq"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.nb_classes > IGNORED:
        raise ValueError(f"--nb_classes {args.nb_classes}: masks have room for {IGNORED} classes")


# --------------------------------------------------------------------------------------------------
# Runs


class SegmentationEvaluator:
    """Evaluates the head, writes voc.csv, and keeps the best epoch's checkpoint."""

    def __init__(self, context: RunContext, task: Segmentation, loader: DataLoader):
        self.args, self.context = context.args, context
        self.task, self.loader = task, loader
        self.result: VocRow | None = None  # the latest

    def __call__(self, epoch: int, best: float = 0.0) -> VocRow:
        """The result after `epoch`, where that of the best epoch before was `best`."""
        args = self.args
        iou = class_iou(
            evaluate_segmentation(
                self.task, self.loader, self.context, AUTOCAST_DTYPES.get(args.precision)
            )
        ).cpu()
        about = {
            name: getattr(args, name)
            for name in ("lr", "layer_indices", "model", "finetune", "seed")
        }
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
            session.save_best(position, of_ema=False)
        return {"test_miou": miou, "best_miou": position.best}


def build_data(args: Namespace, backbones: dict[str, Backbone]) -> dict[str, ImageDataset]:
    """{"train", "val"}: trainaug with its own masks where it has some, and val."""
    load = partial(voc_images, Path(args.data_path), num_classes=args.nb_classes, args=args)
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
        return evaluator(origin.state["epoch"])
    loader = train_loader(args, data["train"])
    sizes = f"{len(data['train'])} for training, {len(data['val'])} for validation, {args.nb_classes} classes"
    steps = steps_per_epoch(args, loader)
    report(args, derived(args, steps) | {"images": sizes})
    groups = [
        {"params": list(head.parameters()), "weight_decay": args.weight_decay, "decay": True}
    ]  # bias too
    if args.dry_run:
        dry_run(args, groups, steps, context.device)
        return None
    run, position = start_training(context, task, loader, groups)
    train(run, position, after_epoch=lambda position: evaluator.after_epoch(position, run.session))
    log.info("best mIoU %.3f", position.best)
    return evaluator.result or evaluator(
        args.epochs - 1, position.best
    )  # a finished run has trained nothing


if __name__ == "__main__":
    launch(main, parse())
