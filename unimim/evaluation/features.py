"""One feature vector per image from a frozen network, for k-NN and linear probing.

A ViT's feature is the class token (the mean of several) or the mean of the patch tokens, after a
norm that was trained with them, or after none: a norm that the checkpoint lacks is left out, never
used as it was initialized. Of any other network it is the mean over the places of its last map.
"""

import hashlib
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from datasets import EvalBatchSampler, ImageDataset, build_dataset, build_loader
from modeling_backbones import family_of
from modeling_finetune import (
    VisionTransformer,
    check_choice,
    create_model,
    input_size_of,
)
from unimim.checkpoint.files import load_checkpoint, save_checkpoint
from unimim.checkpoint.loading import class_tokens, load_pretrained
from unimim.checkpoint.runs import trained_mean_std
from unimim.cli.models import check_is_classifier, warn_of_other_variant
from unimim.cli.options import given, model_kwargs
from unimim.data.channels import kept_channels
from unimim.data.files import Key
from unimim.data.preparation import DROP
from unimim.data.views import MEAN_STD, EvalTransform, image_mean_std
from unimim.engine.distributed import StopSignal, barrier, from_first_rank, reduce_sum
from unimim.engine.monitor import Progress
from unimim.engine.runner import AUTOCAST_DTYPES
from unimim.engine.state import Interruptible, RunContext
from unimim.logs import log
from unimim.sizes import to_pair

POOLS, NORMS = ("cls", "avg"), ("trained", "plain", "none")
CHUNK_ROWS = 2**14  # of features that are worked on at a time

# --------------------------------------------------------------------------------------------------
# The network


class Backbone(nn.Module):
    """A frozen network in eval mode, in which batch normalization keeps its statistics.

    Normalized images [B, 3, H, W] to features float32 [B, dim].
    """

    dim: int
    image_size: tuple[int, int]
    norms: str = ""  # what there is of norms after the last block

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).float()

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class ViTBackbone(Backbone):
    """A ViT whose feature is its class token or the mean of its patch tokens."""

    def __init__(self, vit: VisionTransformer, pool: str, norm: str):
        super().__init__()
        check_choice("pool", pool, POOLS)
        check_choice("feature_norm", norm, NORMS)
        self.vit = vit
        self.pool = pool
        self.kind = norm
        self.dim = vit.embed_dim
        self.image_size = vit.patch_embed.img_size
        self.norms = f"{vit.norm}, {vit.fc_norm}"
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        return self.pooled(self.vit.forward_features(images))

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return the feature [B, C] of the last block's tokens [B, T, C].

        Norms without trained weights are identities here.
        """
        tokens = self.vit.norm(tokens) if self.kind == "trained" else tokens
        prefix = self.vit.num_prefix_tokens
        vector = (tokens[:, :prefix] if self.pool == "cls" else tokens[:, prefix:]).mean(1)
        if self.kind == "plain":
            return F.layer_norm(vector, vector.shape[-1:], eps=1e-6)
        return self.vit.fc_norm(vector) if (self.kind, self.pool) == ("trained", "avg") else vector


class MapBackbone(Backbone):
    """Any other network; its feature is the mean of its last map, as it is pre-trained."""

    def __init__(self, network: nn.Module, image_size: tuple[int, int], channels: int = 3):
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.feature_map = family_of(network).feature_map
        images = torch.zeros(1, channels, *image_size)
        self.dim = self.feature_map(network.eval(), images).shape[1]
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        return self.feature_map(self.network, images).mean((2, 3))


def build_backbone(args: Namespace) -> Backbone:
    """Return the network that the flags name, with the weights of --finetune, as a backbone."""
    network = build_network(args)
    if isinstance(network, VisionTransformer):
        return ViTBackbone(network, args.pool, args.feature_norm)
    if args.feature_norm != "trained":
        raise ValueError(
            f"--feature_norm {args.feature_norm} is for ViTs, not for --model {args.model}"
        )
    size = to_pair(args.input_size or input_size_of(args.model))
    return MapBackbone(network, size, args.in_chans or 3)


def build_vit(args: Namespace) -> VisionTransformer:
    """Return the ViT that the flags name, with the weights of --finetune.

    Raises:
        ValueError: --model is another network.
    """
    network = build_network(args)
    if not isinstance(network, VisionTransformer):
        raise ValueError(f"--model {args.model} is not a ViT; this probe needs patch tokens")
    return network


def build_network(args: Namespace) -> nn.Module:
    """Return --model with the weights of --finetune and as many class tokens.

    Norms that these weights lack are identities.
    """
    check_is_classifier(args.model)
    torch.manual_seed(args.seed)
    form = {"num_classes": 0, "global_pool": "token", "attn": args.attn}
    source = {"model_key": args.model_key, "prefix": args.model_prefix}
    tokens = class_tokens(args.finetune, **source) if args.finetune else None
    chosen = given({"num_cls_tokens": tokens}) | model_kwargs(args) | form
    network = create_model(args.model, **chosen)
    if args.finetune and isinstance(network, VisionTransformer):
        # classifiers may have it in place of `norm`
        network.fc_norm = nn.LayerNorm(network.embed_dim, eps=1e-6)
    if args.finetune:
        load_whole(args, network)
    else:
        log.warning("no --finetune: these are the features of random weights")
    return network


def load_whole(args: Namespace, network: nn.Module) -> None:
    """Load every weight, and take out norms that the file lacks.

    Unlike in fine-tuning nothing would repair weights that are missing.
    """
    warn_of_other_variant(args.finetune, args.model)
    found = load_pretrained(
        network, args.finetune, model_key=args.model_key, prefix=args.model_prefix, min_matched=1.0
    )
    log.info("%s", found)
    warn_of_other_mean_std(args)
    for name in ("norm", "fc_norm", "head.norm"):
        if f"{name}.weight" in found.missing:
            network.set_submodule(name, nn.Identity())


def warn_of_other_mean_std(args: Namespace) -> None:
    """Log which flags normalize images as the checkpoint was trained, if these do not."""
    said = trained_mean_std(args.finetune)
    if said in (None, image_mean_std(args)):
        return
    if said in MEAN_STD.values():
        imagenet = said == MEAN_STD["imagenet"]
        log.warning(
            "%s was trained with %s mean and std: give --%simagenet_default_mean_and_std",
            args.finetune, "ImageNet's" if imagenet else "0.5 as", "" if imagenet else "no_",
        )  # fmt: skip
        return
    mean, std = (" ".join(f"{value:g}" for value in values) for values in said)
    log.warning(
        "%s was trained with its own mean and std: give --mean %s --std %s",
        args.finetune, mean, std,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Features of a data set


class NotFiniteError(ValueError):
    """A network gives features that are not finite."""


@dataclass
class Features:
    """The features of a data set, in the order of its images.

    vectors: float32 [N, C]; labels: int64 [N].
    """

    vectors: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class FeatureDataset(Dataset):
    """A data set of features in place of images, by the same keys (epoch, index); on the CPU."""

    def __init__(self, features: Features):
        self.vectors, self.labels = features.vectors.cpu(), features.labels.cpu().numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index = key[1]
        row = index if index >= 0 else -1 - index
        return {"features": self.vectors[row], "label": int(self.labels[row]), "index": index}


def evaluation_images(args: Namespace, backbone: Backbone, *, train: bool) -> ImageDataset:
    """Return the labeled images of a split, each transformed as for evaluation."""
    transform = EvalTransform(backbone.image_size, args.crop_pct, kept_channels(args))
    return build_dataset(args, train=train, transform=transform, need_labels=True)


def features_of(
    context: RunContext, dataset: ImageDataset, backbone: Backbone, name: str
) -> Features:
    """Return the features of all images on every rank, from --feature_cache where it has
    `name`."""
    args = context.args
    if not args.feature_cache:
        return extract(context, dataset, backbone, name)
    path = Path(args.feature_cache) / f"{name}.pth"
    about = description(args, dataset, backbone)
    if from_first_rank(path.is_file()):
        return read_cache(path, about, context.device)
    features = extract(context, dataset, backbone, name)
    if context.rank == 0:
        tensors = {"vectors": features.vectors.cpu(), "labels": features.labels.cpu()}
        save_checkpoint(path, {**tensors, "about": about})
        log.info("saved %s", path)
    barrier()
    return features


@torch.no_grad()
def extract(
    context: RunContext,
    dataset: ImageDataset,
    backbone: Backbone,
    name: str,
    stop: StopSignal | None = None,
) -> Features:
    """Compute the features of all images, each rank a part of them.

    A broken image has no feature; the image that replaced it counts once. A signal on any rank,
    which `stop` knows of, ends all of them after the batch: Interrupted.
    """
    args = context.args
    sampler = EvalBatchSampler(
        len(dataset), args.batch_size, rank=context.rank, world_size=context.world_size
    )
    loader = build_loader(dataset, sampler, num_workers=args.num_workers, pin_mem=args.pin_mem)
    device = context.device
    dtype = AUTOCAST_DTYPES.get(args.precision)
    sums = torch.zeros(len(dataset), backbone.dim, device=device)  # the only memory of this size
    times = torch.zeros(len(dataset), device=device)
    progress = Progress(f"{name} features", len(sampler), 0, every=50, rank=context.rank)
    batches = loader if stop is None else Interruptible(loader, stop)
    for number, batch in enumerate(batches, 1):
        counts = batch["index"] >= 0
        index = batch["index"][counts].to(device)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            vectors = backbone(context.normalize(batch)["image"])
        sums.index_add_(0, index, vectors[counts.to(device)])
        times.index_add_(0, index, torch.ones_like(index, dtype=times.dtype))
        progress.advance()
        if progress.due(number):
            progress.show(number, {})
    progress.close()
    reduce_sum(sums)
    reduce_sum(times)
    vectors = means_in_place(sums, times)
    if vectors is None:
        weights = f"--finetune {args.finetune}" if "finetune" in args else "the network"
        raise NotFiniteError(f"{weights} gives features that are not finite")
    labels = torch.as_tensor(dataset.source.labels, dtype=torch.int64).to(device)
    return Features(vectors, labels[times > 0])


def means_in_place(sums: Tensor, times: Tensor) -> Tensor | None:
    """The means of the rows of `sums` [N, C] that were added to, `times` [N] often, in the memory
    of `sums`; None if one is not finite.

    Features of millions of images fill a good part of a device: nothing of their size is allocated.
    """
    end = 0
    for first in range(0, len(sums), CHUNK_ROWS):
        count = times[first : first + CHUNK_ROWS]
        rows = (sums[first : first + CHUNK_ROWS] / count[:, None])[count > 0]
        if not rows.isfinite().all():
            return None
        sums[end : end + len(rows)] = rows
        end += len(rows)
    return sums[:end]


def description(args: Namespace, dataset: ImageDataset, backbone: Backbone) -> dict[str, str]:
    """Return what cached features depend on."""
    weights = hashlib.sha256()
    for value in backbone.state_dict().values():
        weights.update(value.cpu().contiguous().numpy().data)
    labels = torch.as_tensor(dataset.source.labels, dtype=torch.int64)
    described = {
        "weights": weights.hexdigest(),
        "labels": hashlib.sha256(labels.numpy().data).hexdigest(),
        "first image": str(dataset.source.path(0)),
        "norms": backbone.norms,
    }
    names = (
        "model",
        "model_kwargs",
        "pool",
        "feature_norm",
        "crop_pct",
        "imagenet_default_mean_and_std",
        "precision",
    )
    if args.mean or args.std or args.in_chans:
        described["mean and std"] = str(image_mean_std(args))
    for flag in ("keep_channels", "exif_orientation"):
        if getattr(args, flag, False):
            described[flag] = "True"
    if args.alpha != DROP:
        described["alpha"] = args.alpha
    return described | {name: str(getattr(args, name)) for name in names}


def read_cache(path: Path, about: dict[str, str], device: torch.device) -> Features:
    """Read cached features; ValueError where the file holds those of something else."""
    held = load_checkpoint(path)
    described = held.get("about")
    described = described if isinstance(described, dict) else {}
    for key in dict.fromkeys((*about, *described)):
        if (there := described.get(key)) != (value := about.get(key)):
            raise ValueError(
                f"--feature_cache: {path} holds features of another run, with {key} {there} "
                f"instead of {value}; use another folder"
            )
    vectors, labels = held.get("vectors"), held.get("labels")
    whole = isinstance(vectors, Tensor) and isinstance(labels, Tensor)
    if not (whole and vectors.ndim == 2 and labels.shape == vectors.shape[:1]):
        raise ValueError(
            f"--feature_cache: {path} does not hold a vector and a label for each image; delete it"
        )
    if not vectors.isfinite().all():
        raise ValueError(f"--feature_cache: {path} holds features that are not finite; delete it")
    log.info("read %s", path)
    return Features(vectors.to(device), labels.to(device))
