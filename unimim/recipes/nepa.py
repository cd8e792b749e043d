"""NEPA (arXiv 2512.16922): ViT-B/14 and ViT-L/14.

Published are the commands: 4,096 images per step in pre-training, 1,024 in fine-tuning, on an
unstated number of GPUs; ImageNet-1K top-1 of the released models 83.75 and 85.40, of the paper's,
whose MLP is gated, 83.8 and 85.3. `blr` is the peak lr for 256 images per step.
"""

from collections.abc import Mapping
from typing import Any

from unimim.recipes.recipe import OURS, Recipe

NEPA_SCRIPTS = "NEPA's scripts and configurations (SihanXU/nepa 15ea494)"

PRETRAIN_NEPA_BASE = {
    "batch_size": 256,
    "update_freq": 2,
    "epochs": 1600,
    "warmup_epochs": 40,
    "lr": None,
    "blr": 3e-4,
    "lr_schedule": "mae",
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "opt_betas": (0.9, 0.95),
    "clip_grad": 1.0,
    "use_ema_model": True,
    "crop_scale": (0.08, 1.0),
    "train_interpolation": "bilinear",
    "imagenet_default_mean_and_std": False,
    "save_ckpt_freq": 160,
}
PRETRAIN_NEPA_LARGE = PRETRAIN_NEPA_BASE | {"batch_size": 128, "update_freq": 4}
PRETRAIN_NEPA_TINY = PRETRAIN_NEPA_BASE | {
    "update_freq": 1,
    "epochs": 300,
    "warmup_epochs": 10,
    "use_ema_model": False,
    "save_ckpt_freq": 20,
}

FINETUNE_NEPA_BASE = {
    "batch_size": 128,
    "update_freq": 1,
    "epochs": 100,
    "warmup_epochs": 20,
    "lr": None,
    "blr": 1.5e-3,
    "lr_schedule": "mae",
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "layer_decay": 0.65,
    "full_last_block": True,
    "head_lr": 1e-3,
    "layer_warmup": True,
    "opt_betas": (0.9, 0.999),
    "clip_grad": 1.0,
    "drop_path": 0.1,
    "init_scale": 0.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "model_ema": True,
    "imagenet_default_mean_and_std": False,
    "model_kwargs": ("freeze_patch_embed=true",),
}
FINETUNE_NEPA_LARGE = FINETUNE_NEPA_BASE | {
    "warmup_epochs": 30,
    "blr": 1e-3,
    "layer_decay": 0.75,
    "drop_path": 0.2,
    "crop_pct": 0.95,
    "squash": True,
}

PRETRAIN_NOTE = (
    "Unverified: how the published 4,096 images were divided among GPUs. The exported encoder is "
    "the ema, as --use_ema_model is published."
)
FINETUNE_NOTE = "Unverified: the GPUs, and whether weights or the ema gave the published top-1."
TINY_NOTE = "Ours, not published: a small model for small data on one device, derived from ViT-B's."


def _nepa(
    size: str, published: float, pretrain: Mapping[str, Any], finetune: Mapping[str, Any]
) -> tuple[Recipe, ...]:
    """Return the pre-training for 1600 epochs and the fine-tuning for 100."""
    model = f"{size}_patch14_224"
    shared = {
        "source": NEPA_SCRIPTS,
        "published": published,
        "method": "NEPA",
        "network": f"ViT-{size[0].upper()}/14",
        "gpus": 8,
    }
    return (
        Recipe(
            name=f"nepa_{size}_pretrain", stage="pretrain", model=f"nepa_{model}",
            flags=pretrain, note=PRETRAIN_NOTE, **shared,
        ),
        Recipe(
            name=f"nepa_{size}_finetune", stage="finetune", model=f"rope_vit_{model}",
            flags=finetune, note=FINETUNE_NOTE, **shared,
        ),
    )  # fmt: skip


RECIPES = (
    *_nepa("base", 83.75, PRETRAIN_NEPA_BASE, FINETUNE_NEPA_BASE),
    *_nepa("large", 85.40, PRETRAIN_NEPA_LARGE, FINETUNE_NEPA_LARGE),
    Recipe(
        name="nepa_tiny_pretrain",
        stage="pretrain",
        model="nepa_tiny_patch14_224",
        gpus=1,
        flags=PRETRAIN_NEPA_TINY,
        source=OURS,
        note=TINY_NOTE,
        method="NEPA",
        network="ViT-Ti/14",
    ),
)
