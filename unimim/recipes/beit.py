"""BEiT (arXiv 2106.08254), MaskFeat (arXiv 2112.09133) and SemanticMIM (arXiv 2406.10673).

Published are BEiT's documentation (2,048 images per step) and SemanticMIM's code for ViT-B on 8
GPUs (also 2,048, 300 epochs). ImageNet-1K top-1: BEiT 83.2 (ViT-B) and 85.2 (ViT-L), from table 1
of ConMIM's paper; MaskFeat 83.4, from mmpretrain. SemanticMIM's code comes without numbers.
"""

from collections.abc import Mapping
from typing import Any

from unimim.recipes.conmim import BEIT_DOCS, FINETUNE_BASE, FINETUNE_LARGE, PAPER
from unimim.recipes.mae import MAE_TINY_NOTE
from unimim.recipes.recipe import OURS, Recipe

SEMANTICMIM = "SemanticMIM code (yyk-wew/SemanticMIM)"
MMPRETRAIN = "mmpretrain 1.2.0 (open-mmlab/mmpretrain)"

PRETRAIN_BEIT = {
    "batch_size": 128,
    "update_freq": 1,
    "epochs": 800,
    "warmup_epochs": 10,
    "lr": 1.5e-3,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "opt_betas": (0.9, 0.999),
    "clip_grad": 3.0,
    "drop_path": 0.1,
    "layer_scale_init_value": 0.1,
    "mask_type": "block",
    "color_jitter": 0.4,
    "imagenet_default_mean_and_std": True,
    "save_ckpt_freq": 20,
}
PRETRAIN_BEIT_LARGE = PRETRAIN_BEIT | {"batch_size": 64, "layer_scale_init_value": 1e-5}
UNIFORM_MASKS = {"mask_type": "random_mps32", "mask_patch_size": 16}  # rounds the count up
PRETRAIN_SEMANTIC_BEIT = (
    PRETRAIN_BEIT
    | UNIFORM_MASKS
    | {
        "batch_size": 256,
        "epochs": 300,
        "mask_ratio": 0.6,
        "num_cls_tokens": 1,
        "use_bottleneck": None,
    }
)
PRETRAIN_BEIT_ABS_POS = PRETRAIN_SEMANTIC_BEIT | {"mask_ratio": 0.4, "use_bottleneck": False}
PRETRAIN_SEMANTIC_MASKFEAT = PRETRAIN_SEMANTIC_BEIT | {
    "warmup_epochs": 30,
    "lr": 1.6e-3,
    "min_lr": 1e-6,
    "clip_grad": 0.02,
    "drop_path": 0.0,
    "layer_scale_init_value": None,
    "mask_ratio": 0.8,
    "num_cls_tokens": 8,
    "color_jitter": 0.0,
    "crop_scale": (0.5, 1.0),
}
PRETRAIN_MASKFEAT = PRETRAIN_SEMANTIC_MASKFEAT | {"mask_ratio": 0.4, "num_cls_tokens": 1}
_OWN_BATCH = {
    "mask_type": "random",
    "mask_patch_size": None,
    "batch_size": 256,
    "warmup_epochs": 10,
}
PRETRAIN_BEIT_TINY = PRETRAIN_BEIT | {"batch_size": 256, "epochs": 300, "drop_path": 0.0}
PRETRAIN_SEMANTIC_BEIT_TINY = PRETRAIN_SEMANTIC_BEIT | _OWN_BATCH | {"drop_path": 0.0}
PRETRAIN_SEMANTIC_MASKFEAT_TINY = PRETRAIN_SEMANTIC_MASKFEAT | _OWN_BATCH | {"clip_grad": None}
PRETRAIN_MASKFEAT_TINY = PRETRAIN_MASKFEAT | _OWN_BATCH | {"clip_grad": None}

FINETUNE_SEMANTIC_BEIT = FINETUNE_BASE | {"init_scale": 1.0}
FINETUNE_MASKFEAT = FINETUNE_BASE | {
    "batch_size": 256,
    "lr": 8e-3,
    "lr_schedule": "cosine",
    "layer_scale_init_value": None,
}
LINEAR_SEMANTIC = {
    "batch_size": 128,
    "update_freq": 1,
    "epochs": 100,
    "warmup_epochs": 0,
    "lr": 4e-3,
    "lr_schedule": "cosine",
    "min_lr": 0.0,
    "weight_decay": 1e-4,
    "opt": "adamw",
    "global_pool": True,
    "feature_norm": "plain",
    "batch_norm": False,
    "crop_scale": (0.08, 1.0),
    "imagenet_default_mean_and_std": True,
}


# Pascal VOC: a 1 x 1 convolution on the patch tokens of the fifth block from the end.
VOC_SEMANTIC = {
    "input_size": 448,
    "batch_size": 60,
    "update_freq": 1,
    "epochs": 25,
    "warmup_epochs": 0,
    "lr": None,
    "blr": 0.01 * 256 / 60,
    "lr_schedule": "step",
    "lr_steps": (10, 20),
    "min_lr": 0.0,
    "weight_decay": 1e-4,
    "opt": "momentum",
    "imagenet_default_mean_and_std": True,
}

BEIT_NOTE = "Unverified: how the published batch of 2048 was divided among GPUs."
BEIT_LARGE_NOTE = (
    "Published are the accuracy, in ConMIM's table 1, 800 epochs and layer scale. "
    "Unverified: everything else is ViT-B's."
)
WARMUP_NOTE = "The published warm-up starts from 1/10000 of the peak, here it starts from 0."
ABS_POS_NOTE = (
    "BEiT as SemanticMIM's baseline; scripts/recipe.sh semanticmim_beit_base_finetune "
    f"fine-tunes it. {WARMUP_NOTE}"
)
MASKFEAT_NOTE = (
    "The accuracy is mmpretrain's, which used block-wise masks. Unverified: what SemanticMIM's "
    "settings reach. The published warm-up starts from a millionth of the peak, here from 0."
)
CLS_NOTE = (
    "The released setting has 1 class token; the authors also trained 8 (--num_cls_tokens 8). "
    f"{WARMUP_NOTE}"
)
MEAN_STD_NOTE = "Published with mean and std 0.5; here they are those of pre-training."
JITTER_NOTE = (
    "The published fine-tuning adds a color jitter after RandAugment and resizes test images "
    "bilinearly; both are left out here."
)
SEMANTIC_MASKFEAT_NOTE = "The published warm-up starts from a millionth of the peak, here from 0."
BORROWED_NOTE = "Unverified: every setting is SemanticMIM's for its own models."
VOC_NOTE = "No result is published. Unverified: the number of GPUs, with which the lr scales."
TOKENIZER_NOTE = (
    "Ours, not published: the settings are for images of 32 pixels. Its file gives "
    "--discrete_vae_weight_path; the model needs 8 x 8 patches and vocab_size=512."
)
TOKENIZER_SIZES = {"input_size": 32, "patch_size": 4, "vocab_size": 512}
TOKENIZER_DVAE_TINY = {
    **TOKENIZER_SIZES,
    "n_hid": 32,
    "warmup_epochs": 0,
    "blocks_per_group": 1,
    "batch_size": 64,
    "update_freq": 1,
    "epochs": 3,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "kl_weight": 5e-3,
    "imagenet_default_mean_and_std": True,
}
TOKENIZER_KMEANS = {
    **TOKENIZER_SIZES,
    "batch_size": 64,
    "kmeans_patches": 200_000,
    "imagenet_default_mean_and_std": True,
}
DALLE = {"discrete_vae_weight_path": ("TOKENIZER", "encoder.pkl")}


def _beit(
    size: str,
    gpus: int,
    published: float,
    flags: Mapping[str, Any],
    finetune: Mapping[str, Any],
    notes: tuple[str, str],
) -> tuple[Recipe, ...]:
    """Return BEiT's pre-training on ImageNet-1K, its fine-tuning, and SemanticMIM's linear probe.

    `notes` are on pre-training and fine-tuning.
    """
    model = f"beit_{size}_patch16_224"
    sources = f"{BEIT_DOCS}; {PAPER}"
    shared = {"method": "BEiT", "network": f"ViT-{size[0].upper()}/16"}
    return (
        Recipe(
            name=f"beit_{size}_pretrain",
            stage="pretrain",
            model=f"{model}_8k_vocab",
            gpus=gpus,
            flags=flags,
            source=sources,
            published=published,
            note=notes[0],
            files=DALLE,
            **shared,
        ),
        Recipe(
            name=f"beit_{size}_finetune",
            stage="finetune",
            model=model,
            gpus=8,
            flags=finetune,
            source=sources,
            published=published,
            note=notes[1],
            **shared,
        ),
        Recipe(
            name=f"beit_{size}_linear",
            stage="linear",
            model=model,
            gpus=8,
            flags=LINEAR_SEMANTIC,
            source=SEMANTICMIM,
            note=BORROWED_NOTE,
            **shared,
        ),
    )


def _semantic(
    name: str,
    method: str,
    classifier: str,
    flags: Mapping[str, Any],
    finetune: Mapping[str, Any],
    notes: tuple[str, str, str],
    published: float | None = None,
    files: Mapping[str, tuple[str, str]] | None = None,
) -> tuple[Recipe, ...]:
    """Return SemanticMIM's three recipes of ViT-B on 8 GPUs, or those of a baseline.

    `notes` are on pre-training, fine-tuning and linear probing.
    """
    source = SEMANTICMIM if published is None else f"{SEMANTICMIM}; {MMPRETRAIN}"
    shared = {"gpus": 8, "method": method, "network": "ViT-B/16"}
    return (
        Recipe(
            name=f"{name}_base_pretrain",
            stage="pretrain",
            model=f"{name}_base_patch16_224",
            flags=flags,
            source=source,
            published=published,
            note=notes[0],
            files=files or {},
            **shared,
        ),
        Recipe(
            name=f"{name}_base_finetune",
            stage="finetune",
            model=classifier,
            flags=finetune,
            source=source,
            published=published,
            note=notes[1],
            **shared,
        ),
        Recipe(
            name=f"{name}_base_linear",
            stage="linear",
            model=classifier,
            flags=LINEAR_SEMANTIC,
            source=SEMANTICMIM,
            note=notes[2],
            **shared,
        ),
    )


def _own(name: str, size: str, method: str, flags: Mapping[str, Any], suffix: str = "") -> Recipe:
    """Return our recipe for pre-training ViT-Ti or ViT-S on small data."""
    return Recipe(
        name=f"{name}_{size}_pretrain",
        stage="pretrain",
        model=f"{name}_{size}_patch16_224{suffix}",
        gpus=1,
        flags=flags,
        source=OURS,
        note=MAE_TINY_NOTE,
        method=method,
        network="ViT-Ti/16" if size == "tiny" else "ViT-S/16",
        files=DALLE if "beit" in name else {},
    )


def _tokenizer(name: str, kind: str, network: str, flags: Mapping[str, Any]) -> Recipe:
    """Return our recipe of a tokenizer for small images."""
    return Recipe(
        name=name,
        stage="tokenizer",
        model=kind,
        gpus=1,
        flags=flags,
        source=OURS,
        note=TOKENIZER_NOTE,
        method="Visual tokens",
        network=network,
    )


SMALL_MODELS = (
    ("beit", "BEiT", PRETRAIN_BEIT_TINY, "_8k_vocab"),
    ("semanticmim_beit", "SemanticMIM on BEiT", PRETRAIN_SEMANTIC_BEIT_TINY, ""),
    ("maskfeat", "MaskFeat", PRETRAIN_MASKFEAT_TINY, ""),
    ("semanticmim_maskfeat", "SemanticMIM on MaskFeat", PRETRAIN_SEMANTIC_MASKFEAT_TINY, ""),
)
RECIPES = (
    *_beit(
        "base",
        16,
        83.2,
        PRETRAIN_BEIT,
        FINETUNE_BASE,
        (BEIT_NOTE, "Unverified: every setting is that of ConMIM's README for ViT-B."),
    ),
    *_beit(
        "large",
        32,
        85.2,
        PRETRAIN_BEIT_LARGE,
        FINETUNE_LARGE,
        (BEIT_LARGE_NOTE, "Unverified: mean and std. The accuracy is from ConMIM's table 1."),
    ),
    *_semantic(
        "semanticmim_beit",
        "SemanticMIM on BEiT",
        "beit_base_patch16_224_abs_pos",
        PRETRAIN_SEMANTIC_BEIT,
        FINETUNE_SEMANTIC_BEIT,
        (CLS_NOTE, MEAN_STD_NOTE, MEAN_STD_NOTE),
        files=DALLE,
    ),
    Recipe(
        name="beit_abs_pos_base_pretrain",
        stage="pretrain",
        model="semanticmim_beit_base_patch16_224",
        gpus=8,
        flags=PRETRAIN_BEIT_ABS_POS,
        source=SEMANTICMIM,
        note=ABS_POS_NOTE,
        method="SemanticMIM's baseline of BEiT",
        network="ViT-B/16",
        files=DALLE,
    ),
    *_semantic(
        "maskfeat",
        "MaskFeat",
        "vit_base_patch16_224",
        PRETRAIN_MASKFEAT,
        FINETUNE_MASKFEAT,
        (MASKFEAT_NOTE, JITTER_NOTE, ""),
        published=83.4,
    ),
    *_semantic(
        "semanticmim_maskfeat",
        "SemanticMIM on MaskFeat",
        "vit_base_patch16_224",
        PRETRAIN_SEMANTIC_MASKFEAT,
        FINETUNE_MASKFEAT,
        (SEMANTIC_MASKFEAT_NOTE, JITTER_NOTE, ""),
    ),
    Recipe(
        name="semanticmim_maskfeat_base_voc",
        stage="voc",
        model="vit_base_patch16_224",
        gpus=8,
        flags=VOC_SEMANTIC,
        source=SEMANTICMIM,
        note=VOC_NOTE,
        method="SemanticMIM on MaskFeat",
        network="ViT-B/16",
        data="Pascal VOC",
    ),
    _tokenizer("tokenizer_dvae_tiny", "dvae", "a discrete VAE", TOKENIZER_DVAE_TINY),
    _tokenizer("tokenizer_kmeans", "kmeans", "clusters of patches", TOKENIZER_KMEANS),
    *(
        _own(name, size, method, flags, suffix)
        for name, method, flags, suffix in SMALL_MODELS
        for size in ("tiny", "small")
    ),
)
