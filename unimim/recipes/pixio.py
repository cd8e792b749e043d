"""Pixio (arXiv 2512.15715): ViT-H/16 at 256 px.

Published is the command of ViT-H's pre-training: 8,192 images per step on 128 GPUs, epochs of 1,605
steps, which is one pass over ImageNet-21K (winter), the same steps for ImageNet-1K. The encoder is
judged frozen: ADE20K 50.2 mIoU with a linear head, NYUv2 90.8 (MAE's ViT-H/14: 35.2 and 70.3).
`blr` is the peak lr for 256 images per step.
"""

from unimim.recipes.mae import PRETRAIN_MAE, PRETRAIN_MAE_TINY
from unimim.recipes.recipe import OURS, Recipe

PIXIO_KNN = "Pixio's k-NN evaluation (facebookresearch/pixio b83555d)"
PIXIO_SCRIPTS = "Pixio's pre-training scripts (facebookresearch/pixio b83555d)"

_FORM = {"mask_grid": 4, "num_cls_tokens": 8, "hflip": 0.0}
PRETRAIN_PIXIO = PRETRAIN_MAE | _FORM | {"epochs": 400, "blr": 2.5e-5, "drop_path": 0.4}
PRETRAIN_PIXIO_TINY = PRETRAIN_MAE_TINY | _FORM
KNN_PIXIO = {
    "batch_size": 128,
    "input_size": 256,
    "crop_pct": 1.0,
    "knn_k": (10, 20, 100, 200),
    "temperature": 0.07,
    "feature_norm": "none",
    "precision": "fp32",
    "imagenet_default_mean_and_std": True,
}

TINY_NOTE = "Ours, not published: a small model for small data on one device, derived from ViT-H's."

RECIPES = (
    Recipe(
        name="pixio_huge_pretrain",
        stage="pretrain",
        model="pixio_huge_patch16_256",
        gpus=128,
        flags=PRETRAIN_PIXIO,
        source=PIXIO_SCRIPTS,
        note="On ImageNet-1K the published 642,000 steps are --epochs 4115 --warmup_epochs 411. "
        "The published run is in bf16.",
        method="Pixio",
        network="ViT-H/16",
        data="ImageNet-21K",
    ),
    Recipe(
        name="pixio_huge_knn",
        stage="knn",
        model="vit_huge_patch16_224",
        gpus=8,
        flags=KNN_PIXIO,
        source=PIXIO_KNN,
        note="Unverified: batch, precision and the number of GPUs, which do not change the result.",
        method="Pixio",
        network="ViT-H/16",
    ),
    Recipe(
        name="pixio_tiny_pretrain",
        stage="pretrain",
        model="pixio_tiny_patch16_256",
        gpus=1,
        flags=PRETRAIN_PIXIO_TINY,
        source=OURS,
        note=TINY_NOTE,
        method="Pixio",
        network="ViT-Ti/16",
    ),
)
