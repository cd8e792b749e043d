"""MAE (arXiv 2111.06377) and SemMAE (arXiv 2206.10207): ViT-B, ViT-L and ViT-H.

Published are MAE's commands: 4,096 images per step in pre-training (64 GPUs), 1,024 in fine-tuning
(32; ViT-H 64), 16,384 in linear probing; ImageNet-1K top-1 83.6, 85.9 and 86.9. SemMAE: 83.352
with patches of 16 pixels, 84.444 with 8. `blr` is the peak lr for 256 images per step.
"""

from collections.abc import Mapping
from typing import Any

from unimim.recipes.recipe import OURS, Recipe

MAE_README = "MAE README (facebookresearch/mae efb2a80)"
SEMMAE_README = "SemMAE README (ucasligang/SemMAE 95b39ff)"
SEMMAE_PAPER = "SemMAE, arXiv 2206.10207"
MAE_PAPER = "MAE, arXiv 2111.06377"
# data set -> its name in those of the recipes
TRANSFER_NAMES = {
    "iNaturalist 2017": "inat17", "iNaturalist 2018": "inat18", "iNaturalist 2019": "inat19",
    "Places205": "places205", "Places365": "places365", "CUB-200-2011": "cub",
    "Stanford Cars": "cars",
}  # fmt: skip
TRANSFER_TOP1 = {  # of ViT-B and ViT-L
    "iNaturalist 2017": (70.5, 75.7), "iNaturalist 2018": (75.4, 80.1),
    "iNaturalist 2019": (80.5, 83.4), "Places205": (63.9, 65.8), "Places365": (57.9, 59.4),
}  # fmt: skip

PRETRAIN_MAE = {
    "batch_size": 64,
    "update_freq": 1,
    "epochs": 1600,
    "warmup_epochs": 40,
    "lr": None,
    "blr": 1.5e-4,
    "lr_schedule": "mae",
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "opt_betas": (0.9, 0.95),
    "clip_grad": None,
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
    "crop_scale": (0.2, 1.0),
    "imagenet_default_mean_and_std": True,
    "save_ckpt_freq": 20,
}
PRETRAIN_SEMMAE = PRETRAIN_MAE | {"batch_size": 256, "epochs": 800, "mask_lambda_power": 2.0}
PRETRAIN_MAE_TINY = PRETRAIN_MAE | {
    "batch_size": 256,
    "epochs": 300,
    "warmup_epochs": 10,
    "blr": 5e-4,
}
PRETRAIN_SEMMAE_TINY = PRETRAIN_MAE_TINY | {"mask_lambda_power": 2.0}

FINETUNE_MAE_BASE = {
    "batch_size": 32,
    "update_freq": 1,
    "epochs": 100,
    "warmup_epochs": 5,
    "lr": None,
    "blr": 5e-4,
    "lr_schedule": "mae",
    "min_lr": 1e-6,
    "weight_decay": 0.05,
    "layer_decay": 0.65,
    "opt_betas": (0.9, 0.999),
    "clip_grad": None,
    "drop_path": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "imagenet_default_mean_and_std": True,
}
FINETUNE_MAE_LARGE = FINETUNE_MAE_BASE | {
    "epochs": 50,
    "blr": 1e-3,
    "layer_decay": 0.75,
    "drop_path": 0.2,
}
FINETUNE_MAE_HUGE = FINETUNE_MAE_LARGE | {"batch_size": 16, "drop_path": 0.3}
FINETUNE_MAE_TINY = FINETUNE_MAE_BASE | {
    "batch_size": 256,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}

SPLIT_NOTE = "Unverified: how the published effective batch of {} was divided among GPUs."
PARTS_NOTE = (
    "Unverified: crops, since the published code does not crop, and the batch: 4096 images a step "
    "(lr 2.4e-3) are MAE's; SemMAE's README says 8 machines x 8 GPUs x 128, which is 8192 (lr "
    "4.8e-3) and looks copied from MAE's. run_part_learning.py makes the part maps."
)
TRANSFER_NOTE = (
    "The paper takes its settings for ImageNet and adjusts lr and epochs to each data set without "
    "giving them. Unverified: lr and epochs, which are those for ImageNet."
)
SMALL_SET_NOTE = (
    "Ours, not published: MAE's fine-tuning with as many epochs as a set of some thousand images "
    "needs, and smaller batches.{}"
)
MAE_TINY_NOTE = (
    "Ours, not published: a small model for small data on one device, "
    "derived from the ViT-B recipe."
)


LINEAR_MAE = {
    "batch_size": 512,
    "update_freq": 1,
    "epochs": 90,
    "warmup_epochs": 10,
    "lr": None,
    "blr": 0.1,
    "lr_schedule": "mae",
    "min_lr": 0.0,
    "weight_decay": 0.0,
    "opt": "lars",
    "momentum": 0.9,
    "cls_token": True,
    "train_crop": "area",
    "crop_scale": (0.08, 1.0),
    "imagenet_default_mean_and_std": True,
}
LINEAR_MAE_LARGE = LINEAR_MAE | {"epochs": 50}
# CUB-200-2011 and Stanford Cars have 6 and 8 thousand training images
FINETUNE_SMALL_SET = FINETUNE_MAE_BASE | {"batch_size": 16, "warmup_epochs": 10}

# SemMAE's first stage was never released: the settings are ours.
LEARN_PARTS = {
    "batch_size": 256,
    "update_freq": 1,
    "epochs": 3,
    "warmup_epochs": 0,
    "lr": 1e-3,
    "min_lr": 0.0,
    "weight_decay": 0.01,
    "opt_betas": (0.9, 0.99),
    "clip_grad": 1.0,
    "crop_scale": (0.5, 1.0),
    "imagenet_default_mean_and_std": True,
    "save_ckpt_freq": 1,
}
LEARN_PARTS_NOTE = (
    "Ours, not published: SemMAE's code and settings of this stage were never released. "
    "Add --extract FOLDER to write the part maps."
)


def _mae(
    size: str, patch: int, published: float, finetune: Mapping[str, Any], also: str = ""
) -> tuple[Recipe, ...]:
    """Return MAE's pre-training for 1600 epochs with normalized pixels, and its fine-tuning."""
    model = f"{size}_patch{patch}_224"
    shared = {
        "source": MAE_README,
        "published": published,
        "method": "MAE",
        "network": f"ViT-{size[0].upper()}/{patch}",
    }
    return (
        Recipe(
            name=f"mae_{size}_pretrain",
            stage="pretrain",
            model=f"mae_{model}",
            gpus=64,
            flags=PRETRAIN_MAE,
            also=also,
            **shared,
        ),
        Recipe(
            name=f"mae_{size}_finetune",
            stage="finetune",
            model=f"vit_{model}",
            gpus=1024 // finetune["batch_size"],
            flags=finetune,
            **shared,
        ),
    )


def _semmae(name: str, patch: int, published: float) -> tuple[Recipe, ...]:
    """Return SemMAE's pre-training on part maps for 800 epochs, and its (MAE's) fine-tuning."""
    model = f"base_patch{patch}_224"
    shared = {"published": published, "method": "SemMAE", "network": f"ViT-B/{patch}"}
    return (
        Recipe(
            name=f"semmae_{name}_pretrain",
            stage="pretrain",
            model=f"semmae_{model}",
            gpus=16,
            flags=PRETRAIN_SEMMAE,
            source=f"{SEMMAE_README}; {SEMMAE_PAPER}",
            note=PARTS_NOTE,
            files={"part_maps": ("PART_MAPS", "output/part_maps")},
            **shared,
        ),
        Recipe(
            name=f"semmae_{name}_finetune",
            stage="finetune",
            model=f"vit_{model}",
            gpus=32,
            flags=FINETUNE_MAE_BASE,
            source=SEMMAE_README,
            note=SPLIT_NOTE.format(1024),
            **shared,
        ),
    )


def _linear(size: str, flags: Mapping[str, Any], published: float, patch: int = 16) -> Recipe:
    """Return MAE's linear probing."""
    return Recipe(
        name=f"mae_{size}_linear",
        stage="linear",
        model=f"vit_{size}_patch{patch}_224",
        gpus=32,
        flags=flags,
        source=MAE_README,
        published=published,
        method="MAE",
        network=f"ViT-{size[0].upper()}/{patch}",
    )


def _transfer(size: str, flags: Mapping[str, Any], data: str, top1: float) -> Recipe:
    """Return MAE's fine-tuning on another data set."""
    name = TRANSFER_NAMES[data]
    return Recipe(
        name=f"mae_{size}_finetune_{name}",
        stage="finetune",
        model=f"vit_{size}_patch16_224",
        gpus=32,
        flags=flags,
        source=MAE_PAPER,
        published=top1,
        note=TRANSFER_NOTE,
        method="MAE",
        network=f"ViT-{size[0].upper()}/16 on {data}",
        data=data,
    )


def _small_set(name: str, method: str, patch: int, data: str, also: str = "") -> Recipe:
    """Return our fine-tuning of ViT-B on a small data set."""
    return Recipe(
        name=f"{name}_finetune_{TRANSFER_NAMES[data]}",
        stage="finetune",
        model=f"vit_base_patch{patch}_224",
        gpus=8,
        flags=FINETUNE_SMALL_SET,
        source=OURS,
        note=SMALL_SET_NOTE.format(also),
        method=method,
        network=f"ViT-B/{patch} on {data}",
        data=data,
    )


def _own(name: str, stage: str, model: str, flags: Mapping[str, Any]) -> Recipe:
    """Return our recipe for ViT-Ti or ViT-S on small data."""
    return Recipe(
        name=f"{name}_{stage}",
        stage=stage,
        model=f"{model}_patch16_224",
        gpus=1,
        flags=flags,
        source=OURS,
        note=MAE_TINY_NOTE,
        method={"mae": "MAE", "semmae": "SemMAE"}[name.partition("_")[0]],
        network="ViT-Ti/16" if name.endswith("tiny") else "ViT-S/16",
        files={"part_maps": ("PART_MAPS", "output/part_maps")} if "semmae" in name else {},
    )


RECIPES = (
    *_mae("base", 16, 83.6, FINETUNE_MAE_BASE),
    *_mae("large", 16, 85.9, FINETUNE_MAE_LARGE, also="85.5 with --epochs 800"),
    *_mae("huge", 14, 86.9, FINETUNE_MAE_HUGE),
    _linear("base", LINEAR_MAE, 67.8),
    _linear("large", LINEAR_MAE_LARGE, 76.0),
    _linear("huge", LINEAR_MAE_LARGE, 77.2, patch=14),
    *(
        _transfer(size, flags, data, top1)
        for data, values in TRANSFER_TOP1.items()
        for size, flags, top1 in zip(
            ("base", "large"), (FINETUNE_MAE_BASE, FINETUNE_MAE_LARGE), values, strict=True
        )
    ),
    *(_small_set("mae_base", "MAE", 16, data) for data in ("CUB-200-2011", "Stanford Cars")),
    *(
        _small_set(
            "semmae_base_patch8",
            "SemMAE",
            8,
            data,
            " SemMAE's authors report 86.5 on CUB with patches of 8 pixels."
            if "CUB" in data
            else "",
        )
        for data in ("CUB-200-2011", "Stanford Cars")
    ),
    Recipe(
        name="finetune_small_dataset",
        stage="finetune",
        model="vit_base_patch16_224",
        gpus=8,
        flags=FINETUNE_SMALL_SET,
        source=OURS,
        note=SMALL_SET_NOTE.format(" It takes as many classes as there are folders."),
        method="MAE, SemMAE or SemAIM",
        network="ViT-B/16 on class folders",
        data="class folders",
    ),
    *_semmae("base", 16, 83.352),
    *_semmae("base_patch8", 8, 84.444),
    Recipe(
        name="semmae_parts",
        stage="parts",
        model="vit_small_patch16_224.dino",
        gpus=1,
        flags=LEARN_PARTS,
        source=OURS,
        note=LEARN_PARTS_NOTE,
        method="SemMAE",
        network="DINO's ViT-S/16",
    ),
    *(
        _own(f"mae_{size}", "pretrain", f"mae_{size}", PRETRAIN_MAE_TINY)
        for size in ("tiny", "small")
    ),
    *(
        _own(f"mae_{size}", "finetune", f"vit_{size}", FINETUNE_MAE_TINY)
        for size in ("tiny", "small")
    ),
    *(
        _own(f"semmae_{size}", "pretrain", f"semmae_{size}", PRETRAIN_SEMMAE_TINY)
        for size in ("tiny", "small")
    ),
)
