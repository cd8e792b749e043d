"""Build the data loader of a pre-training method from the flags and the method's views."""

from argparse import Namespace
from functools import partial
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader, Dataset

from datasets import ImageDataset, Maps, TrainBatchSampler, build_dataset, build_loader
from masking_generator import build_mask_generator
from unimim.cli.options import effective_batch
from unimim.data.channels import kept_channels
from unimim.data.device_decode import UndecodedImages, check_device_decoding
from unimim.data.packed import PackedParts, PackedSource
from unimim.data.part_maps import PartMaps, RandomParts, image_names
from unimim.data.sources import Source
from unimim.data.views import build_pretrain_transform
from unimim.logs import log


def mask_generator(args: Namespace, method: nn.Module, view: str):
    """Return the generator of the masks in `view`, None if the method does not read that view."""
    if view not in method.views:
        return None
    try:
        return build_mask_generator(
            args.mask_type,
            input_size=method.image_size,
            patch_size=method.cell_size,
            mask_ratio=args.mask_ratio if view == "mask" else args.separate_mask_ratio,
            num_mask_patches=args.num_mask_patches,
            min_mask_patches_per_block=args.min_mask_patches_per_block,
            max_mask_patches_per_block=args.max_mask_patches_per_block,
            mask_patch_size=args.mask_patch_size,
        )
    except ValueError as error:
        raise ValueError(f"{error}{method.finer_patches}") from error


def build_data(args: Namespace, method: nn.Module) -> DataLoader:
    """Return the loader of the method's views."""
    if "target_ids" in method.views:
        raise ValueError(
            f"--model {args.model} needs --discrete_vae_weight_path: a file of run_tokenizer.py, "
            "or DALL-E's encoder.pkl"
        )
    height, width = method.image_size
    patch_height, patch_width = method.cell_size
    transform = build_pretrain_transform(
        method.views,
        input_size=method.image_size,
        grid=(height // patch_height, width // patch_width),
        noise_size=method.noise_size,
        interpolation=args.train_interpolation,
        pipeline=args.data_pipeline,
        mask_generator=mask_generator(args, method, "mask"),
        target_mask_generator=mask_generator(args, method, "target_mask"),
        crop_scale=tuple(args.crop_scale),
        color_jitter=args.color_jitter,
        second_size=second_size(args, method),
        second_interpolation=args.second_interpolation,
        hflip=args.hflip,
        channels=kept_channels(args),
    )
    maps = None
    if "part_ids" in method.views:
        maps = partial(part_readers, args, method)
    dataset = build_dataset(
        args,
        train=True,
        transform=transform,
        need_labels=False,
        maps=maps,
        dataset_class=dataset_class(args),
    )
    return train_loader(args, dataset)


def dataset_class(args: Namespace) -> type[ImageDataset]:
    """Return the class of data set that --decode asks for; ValueError if other flags forbid it."""
    if args.decode == "cpu":
        return ImageDataset
    check_device_decoding(args)
    return UndecodedImages


def part_readers(args: Namespace, method: nn.Module, source: Source) -> Maps:
    """Return what reads the part maps of the images in `source`, by the name of the view."""
    parts = open_parts(args, source, method)
    readers = {"part_ids": parts.read, "part_scores": parts.read_scores}
    return {view: read for view, read in readers.items() if view in method.views}


def second_size(args: Namespace, method: nn.Module) -> tuple[int, int] | None:
    """Return the tokenizer's image size (height, width), which gives one visual token per patch."""
    if "image_second" not in method.views:
        return None
    if args.second_input_size is not None and {args.second_input_size} != {*method.second_size}:
        raise ValueError(
            f"--second_input_size {args.second_input_size} does not give one visual token per "
            f"patch; use {method.second_size}"
        )
    return method.second_size


def open_parts(
    args: Namespace, source: Source, method: nn.Module
) -> PartMaps | PackedParts | RandomParts:
    """Open the part maps of the images in `source`; raise ValueError if they do not fit."""
    if args.part_source == "random":
        log.warning("--part_source random: parts without meaning, for a control experiment")
        return RandomParts(method.num_parts, method.cell_grid, args.seed)
    if args.part_maps is not None:
        given = f"--part_maps {args.part_maps}"
        map_file = Path(args.data_path or "", "train_map.txt")
        parts = PartMaps.open(
            args.part_maps,
            paths=image_names(source),
            map_file=map_file if args.data_path and map_file.is_file() else None,
        )
        check_orientation(args, parts)
    elif isinstance(source, PackedSource):
        given = f"--data_path {args.data_path}"
        parts = PackedParts(source)
    else:
        raise ValueError("--mask_type parts needs --part_maps, which run_part_learning.py writes")
    if args.part_source not in ("maps", parts.kind):
        raise ValueError(
            f"{given} holds {parts.kind} parts, not "
            f"{args.part_source}; make those with run_part_learning.py "
            f"--part_source {args.part_source} --extract FOLDER"
        )
    log.info("part maps: %s, %d parts", parts.kind, parts.num_parts)
    if parts.num_parts > method.num_parts:
        raise ValueError(f"{given} has {parts.num_parts} parts; use --num_parts {parts.num_parts}")
    return parts


def check_orientation(args: Namespace, parts: PartMaps) -> None:
    """Raise ValueError if either the images or those that the maps were made of are upright."""
    ours, theirs = getattr(args, "exif_orientation", False), parts.meta.exif_orientation
    if ours and not theirs:
        raise ValueError(
            f"--exif_orientation turns images, but --part_maps {args.part_maps} were made of "
            "images as the files have them; leave it out, or extract maps with it"
        )
    if theirs and not ours:
        raise ValueError(
            f"--part_maps {args.part_maps} were made of upright images; use --exif_orientation"
        )


def crop_loader(args: Namespace) -> DataLoader:
    """Return the loader of augmented training crops, without masks or labels."""
    transform = build_pretrain_transform(
        ("image",),
        input_size=args.input_size,
        interpolation=args.train_interpolation,
        pipeline=args.data_pipeline,
        crop_scale=tuple(args.crop_scale),
        color_jitter=args.color_jitter,
        hflip=args.hflip,
    )
    dataset = build_dataset(
        args,
        train=True,
        transform=transform,
        need_labels=False,
        dataset_class=dataset_class(args),
    )
    return train_loader(args, dataset)


def train_loader(args: Namespace, dataset: Dataset) -> DataLoader:
    """Return a loader of whole optimizer steps, `steps_per_epoch` of them.

    Images that do not fill the last step of an epoch are dropped.
    """
    steps = len(dataset) // effective_batch(args)
    if steps == 0:
        raise ValueError(
            f"{len(dataset)} images do not fill one step of {effective_batch(args)}: "
            "lower --batch_size, --update_freq or the number of processes"
        )
    sampler = TrainBatchSampler(
        len(dataset),
        args.batch_size,
        batches_per_epoch=steps * args.update_freq,
        rank=args.rank,
        world_size=args.world_size,
        seed=args.seed,
        repeats=getattr(args, "aug_repeats", 1),  # a flag of fine-tuning alone
        step_batches=args.update_freq * args.world_size,
    )
    return build_loader(dataset, sampler, num_workers=args.num_workers, pin_mem=args.pin_mem)


def steps_per_epoch(args: Namespace, loader: DataLoader) -> int:
    """Return how many optimizer steps a loader of `train_loader` has batches for."""
    return len(loader) // args.update_freq
