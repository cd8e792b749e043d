"""SemAIM (arXiv 2312.10457), SAIM (AAAI 2023) and ViT-iGPT, which has iGPT's raster order.

Published are SemAIM's commands for ViT-B on 32 GPUs (2,048 images per step) and SAIM's; ImageNet-1K
top-1: SemAIM 84.1 (ViT-B) and 85.8 (ViT-L), with CLIP targets 85.3 and 86.5; SAIM 83.9; ViT-iGPT
82.7.
"""

from collections.abc import Mapping
from typing import Any

from unimim.recipes.mae import FINETUNE_MAE_BASE, FINETUNE_MAE_LARGE, LINEAR_MAE, MAE_TINY_NOTE
from unimim.recipes.recipe import OURS, Recipe

SEMAIM_README = "SemAIM README (skyoux/SemAIM ade770f6)"
SAIM_README = "SAIM README (qiy20/SAIM 08d36c3e)"

PRETRAIN_SAIM = {
    "batch_size": 64,
    "update_freq": 1,
    "epochs": 800,
    "warmup_epochs": 30,
    "lr": None,
    "blr": 2e-4,
    "lr_schedule": "mae",
    "min_lr": 0.0,
    "weight_decay": 0.5,
    "opt_betas": (0.9, 0.95),
    "clip_grad": None,
    "permutation_type": "stochastic",
    "query_depth": 12,
    "prediction_head_type": "MLP",
    "gaussian_kernel_size": 9,
    "gaussian_sigma": 1.0,
    "norm_pix_loss": True,
    "crop_scale": (0.2, 1.0),
    "imagenet_default_mean_and_std": True,
    "save_ckpt_freq": 20,
}
PRETRAIN_IGPT = PRETRAIN_SAIM | {"epochs": 300, "permutation_type": "zigzag"}
PRETRAIN_SEMAIM = PRETRAIN_SAIM | {
    "weight_decay": 0.05,
    "clip_grad": 3.0,
    "permutation_type": "attention_center",
    "attention_type": "cls",
}
PRETRAIN_SEMAIM_CLIP = PRETRAIN_SEMAIM | {
    "predict_feature": "clip",
    "gaussian_kernel_size": None,
    "gaussian_sigma": None,
    "norm_pix_loss": None,
    "attention_type": None,
}
PRETRAIN_SEMAIM_TINY = PRETRAIN_SEMAIM | {
    "batch_size": 256,
    "epochs": 300,
    "warmup_epochs": 10,
    "blr": 5e-4,
    "query_depth": 6,
}
FINETUNE_SEMAIM = FINETUNE_MAE_BASE | {"batch_size": 64, "warmup_epochs": 20}
FINETUNE_SEMAIM_LARGE = FINETUNE_MAE_LARGE | {"batch_size": 64}
FINETUNE_SAIM = FINETUNE_SEMAIM | {"batch_size": 32, "use_mean_pooling": False}

LINEAR_SAIM = LINEAR_MAE | {"batch_size": 64, "warmup_epochs": 0, "opt": "momentum"}
LINEAR_SEMAIM = LINEAR_SAIM | {"batch_size": 512, "train_crop": "short_side", "crop_scale": None}
KNN_SEMAIM = {
    "batch_size": 512,
    "knn_k": (10, 20, 30),
    "temperature": 0.07,
    "global_pool": True,
    "feature_norm": "plain",
    "precision": "fp32",
    "imagenet_default_mean_and_std": True,
}
KNN_NOTE = "Unverified: the number of GPUs, which does not change the result."

SEMAIM_LARGE_NOTE = "Unverified: every setting; pre-training is ViT-B's, fine-tuning is MAE's."
SEMAIM_CLIP_NOTE = "Unverified: every setting but epochs and target; the rest is as for pixels."
IGPT_NOTE = "Unverified: every setting but epochs and order; the rest is SAIM's."
CLIP = {"target_model": ("TARGET_MODEL", "vit_base_patch16_clip_quickgelu_224.openai")}


def _semaim(
    size: str, published: float, flags: Mapping[str, Any], note: str = "", clip: bool = False
) -> tuple[Recipe, ...]:
    """Return SemAIM's pre-training on 32 GPUs and fine-tuning on 16, as published for ViT-B."""
    name = f"semaim_clip_{size}" if clip else f"semaim_{size}"
    network = f"ViT-{size[0].upper()}/16"
    shared = {
        "source": SEMAIM_README,
        "published": published,
        "note": note,
        "method": "SemAIM",
        "network": f"{network} with CLIP targets" if clip else network,
    }
    return (
        Recipe(
            name=f"{name}_pretrain",
            stage="pretrain",
            model=f"{name}_patch16_224",
            gpus=32,
            flags=flags,
            files=CLIP if clip else {},
            **shared,
        ),
        Recipe(
            name=f"{name}_finetune",
            stage="finetune",
            model=f"vit_{size}_patch16_224",
            gpus=16,
            flags=FINETUNE_SEMAIM if size == "base" else FINETUNE_SEMAIM_LARGE,
            **shared,
        ),
    )


RECIPES = (
    *_semaim("base", 84.1, PRETRAIN_SEMAIM),
    *_semaim("large", 85.8, PRETRAIN_SEMAIM, SEMAIM_LARGE_NOTE),
    *_semaim("base", 85.3, PRETRAIN_SEMAIM_CLIP, SEMAIM_CLIP_NOTE, clip=True),
    *_semaim("large", 86.5, PRETRAIN_SEMAIM_CLIP, SEMAIM_CLIP_NOTE, clip=True),
    Recipe(
        name="semaim_base_linear",
        stage="linear",
        model="vit_base_patch16_224",
        gpus=8,
        flags=LINEAR_SEMAIM,
        source=SEMAIM_README,
        method="SemAIM",
        network="ViT-B/16",
    ),
    Recipe(
        name="semaim_large_knn",
        stage="knn",
        model="vit_large_patch16_224",
        gpus=8,
        flags=KNN_SEMAIM,
        source=SEMAIM_README,
        note=KNN_NOTE,
        method="SemAIM",
        network="ViT-L/16",
    ),
    Recipe(
        name="saim_base_pretrain",
        stage="pretrain",
        model="saim_base_patch16_224",
        gpus=32,
        flags=PRETRAIN_SAIM,
        source=SAIM_README,
        published=83.9,
        method="SAIM",
        network="ViT-B/16",
    ),
    Recipe(
        name="saim_base_finetune",
        stage="finetune",
        model="vit_base_patch16_224",
        gpus=32,
        flags=FINETUNE_SAIM,
        source=SAIM_README,
        published=83.9,
        method="SAIM",
        network="ViT-B/16",
    ),
    Recipe(
        name="saim_base_linear",
        stage="linear",
        model="vit_base_patch16_224",
        gpus=32,
        flags=LINEAR_SAIM,
        source=SAIM_README,
        published=62.5,
        method="SAIM",
        network="ViT-B/16",
    ),
    Recipe(
        name="igpt_base_pretrain",
        stage="pretrain",
        model="igpt_base_patch16_224",
        gpus=32,
        flags=PRETRAIN_IGPT,
        source=SAIM_README,
        published=82.7,
        note=IGPT_NOTE,
        method="ViT-iGPT",
        network="ViT-B/16",
    ),
    *(
        Recipe(
            name=f"semaim_{size}_pretrain",
            stage="pretrain",
            model=f"semaim_{size}_patch16_224",
            gpus=1,
            flags=PRETRAIN_SEMAIM_TINY,
            source=OURS,
            note=MAE_TINY_NOTE,
            method="SemAIM",
            network=network,
        )
        for size, network in (("tiny", "ViT-Ti/16"), ("small", "ViT-S/16"))
    ),
)
