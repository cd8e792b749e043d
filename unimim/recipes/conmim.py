"""ConMIM, "Masked Image Modeling with Denoising Contrast" (arXiv 2205.09616): ViT-S, ViT-B and
ViT-L.

Published are the commands for ViT-L's pre-training on 32 GPUs (2,048 images per step) and ViT-B's
fine-tuning on 8 (1,024); ImageNet-1K top-1 at 224 px: 82.0, 83.7 and 85.5 (tables 1 to 3).
Settings that those leave open are BEiT's (arXiv 2106.08254) or mc-BEiT's.
"""

from unimim.recipes.recipe import OURS, Recipe

README = "ConMIM README (TencentARC/ConMIM 4263955f)"
BEIT_DOCS = "BEiT documentation (microsoft/unilm 768a3c87)"
MC_BEIT = "mc-BEiT (lixiaotong97/mc-BEiT 37489a1e)"
PAPER = "ConMIM, arXiv 2205.09616"

PRETRAIN_LARGE = {
    "batch_size": 64,
    "update_freq": 1,
    "epochs": 1600,
    "warmup_epochs": 10,
    "lr": 7.5e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "opt_betas": (0.9, 0.98),
    "clip_grad": 1.0,
    "drop_path": 0.0,
    "layer_scale_init_value": 1e-5,
    "mask_type": "random_mps32",
    "mask_ratio": 0.75,
    "temp": 0.1,
    "t_momentum": 0.996,
    "imagenet_default_mean_and_std": True,
    "save_ckpt_freq": 20,
}
PRETRAIN_BASE = PRETRAIN_LARGE | {
    "batch_size": 128,
    "epochs": 800,
    "lr": 1.5e-3,
    "clip_grad": 3.0,
    "layer_scale_init_value": 0.1,
}
PRETRAIN_SMALL = PRETRAIN_BASE | {"epochs": 300}
PRETRAIN_TINY = PRETRAIN_SMALL | {"batch_size": 64, "warmup_epochs": 1, "lr": 5e-4}

FINETUNE_BASE = {
    "batch_size": 128,
    "update_freq": 1,
    "epochs": 100,
    "warmup_epochs": 20,
    "lr": 4e-3,
    "min_lr": 1e-6,
    "weight_decay": 0.05,
    "layer_decay": 0.65,
    "opt_betas": (0.9, 0.999),
    "clip_grad": None,
    "drop_path": 0.1,
    "layer_scale_init_value": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "imagenet_default_mean_and_std": True,
}
FINETUNE_LARGE = FINETUNE_BASE | {
    "batch_size": 64,
    "update_freq": 2,
    "epochs": 50,
    "warmup_epochs": 5,
    "lr": 1e-3,
    "layer_decay": 0.75,
    "drop_path": 0.2,
    "layer_scale_init_value": 1e-5,
}
FINETUNE_TINY = FINETUNE_BASE | {
    "batch_size": 64,
    "warmup_epochs": 1,
    "lr": 1e-3,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}

# After fine-tuning at 224 px: a tenth of its epochs at 384 px, with a small lr and almost no weight
# decay.
FINETUNE_BASE_384 = FINETUNE_BASE | {
    "input_size": 384,
    "batch_size": 32,
    "update_freq": 4,
    "epochs": 10,
    "warmup_epochs": 2,
    "lr": 2e-5,
    "weight_decay": 1e-8,
    "layer_decay": 0.85,
}
FINETUNE_LARGE_384 = FINETUNE_BASE_384 | {
    "batch_size": 16,
    "update_freq": 8,
    "epochs": 5,
    "warmup_epochs": 1,
    "layer_decay": 0.9,
    "drop_path": 0.4,
    "layer_scale_init_value": 1e-5,
}
FINETUNE_TINY_384 = FINETUNE_TINY | {"input_size": 384}

TINY_NOTE = (
    "Ours, not published: a small model for small data on one device, "
    "derived from the ViT-S recipe."
)
PRETRAIN_NOTE = (
    "Epochs and layer scale are published. Unverified: lr, batch, warm-up and clip_grad are "
    "mc-BEiT's for ViT-B, everything else is ConMIM's for ViT-L."
)
DEEPSPEED_NOTE = "The published run used DeepSpeed: add --enable_deepspeed."
NOTE_384 = (
    "A tenth of the 224 px epochs is published. Unverified: lr, weight_decay, layer_decay and "
    "drop_path are BEiT's after its ImageNet-22K stage; batch and warm-up are ours; mixup, cutmix "
    "and smoothing are the same as at 224 px."
)


FROM_224 = "at 384 px, from the model fine-tuned at 224 px"

TINY = "ViT-Ti/16"
TINY_384 = f"{TINY} {FROM_224}"
TINY_MODELS = (
    ("conmim_tiny_pretrain", "pretrain", "conmim_tiny_patch16_224", PRETRAIN_TINY, TINY),
    ("conmim_tiny_finetune", "finetune", "beit_tiny_patch16_224", FINETUNE_TINY, TINY),
    ("conmim_tiny_finetune_384", "finetune", "beit_tiny_patch16_384", FINETUNE_TINY_384, TINY_384),
)
RECIPES = (
    Recipe(
        name="conmim_small_pretrain",
        stage="pretrain",
        model="conmim_small_patch16_224",
        gpus=16,
        flags=PRETRAIN_SMALL,
        source=f"{README}; {MC_BEIT}",
        published=82.0,
        note=PRETRAIN_NOTE,
        method="ConMIM",
        network="ViT-S/16",
    ),
    Recipe(
        name="conmim_base_pretrain",
        stage="pretrain",
        model="conmim_base_patch16_224",
        gpus=16,
        flags=PRETRAIN_BASE,
        source=f"{README}; {MC_BEIT}",
        published=83.7,
        note=PRETRAIN_NOTE,
        also="83.5 with --epochs 300",
        method="ConMIM",
        network="ViT-B/16",
    ),
    Recipe(
        name="conmim_large_pretrain",
        stage="pretrain",
        model="conmim_large_patch16_224",
        gpus=32,
        flags=PRETRAIN_LARGE,
        source=README,
        published=85.5,
        also="85.2 with --epochs 800, 84.6 with 400",
        method="ConMIM",
        network="ViT-L/16",
    ),
    Recipe(
        name="conmim_small_finetune",
        stage="finetune",
        model="beit_small_patch16_224",
        gpus=8,
        flags=FINETUNE_BASE,
        source=README,
        published=82.0,
        note="Unverified: every setting is the README's for ViT-B.",
        method="ConMIM",
        network="ViT-S/16",
    ),
    Recipe(
        name="conmim_small_finetune_384",
        stage="finetune",
        model="beit_small_patch16_384",
        gpus=8,
        flags=FINETUNE_BASE_384,
        source=f"{PAPER}; {BEIT_DOCS}",
        published=83.9,
        note=f"{NOTE_384} All of it is BEiT's for ViT-B.",
        method="ConMIM",
        network=f"ViT-S/16 {FROM_224}",
    ),
    Recipe(
        name="conmim_base_finetune",
        stage="finetune",
        model="beit_base_patch16_224",
        gpus=8,
        flags=FINETUNE_BASE,
        source=README,
        published=83.7,
        note=DEEPSPEED_NOTE,
        also="83.5 with 300 epochs of pre-training",
        method="ConMIM",
        network="ViT-B/16",
    ),
    Recipe(
        name="conmim_base_finetune_384",
        stage="finetune",
        model="beit_base_patch16_384",
        gpus=8,
        flags=FINETUNE_BASE_384,
        source=f"{PAPER}; {BEIT_DOCS}",
        published=85.3,
        note=NOTE_384,
        method="ConMIM",
        network=f"ViT-B/16 {FROM_224}",
    ),
    Recipe(
        name="conmim_large_finetune",
        stage="finetune",
        model="beit_large_patch16_224",
        gpus=8,
        flags=FINETUNE_LARGE,
        source=BEIT_DOCS,
        published=85.5,
        note=(
            "Unverified: the settings are BEiT's for its own ViT-L, the mean and std ConMIM's. "
            f"{DEEPSPEED_NOTE}"
        ),
        also="85.2 with 800 epochs of pre-training, 84.6 with 400",
        method="ConMIM",
        network="ViT-L/16",
    ),
    Recipe(
        name="conmim_large_finetune_384",
        stage="finetune",
        model="beit_large_patch16_384",
        gpus=8,
        flags=FINETUNE_LARGE_384,
        source=f"{PAPER}; {BEIT_DOCS}",
        published=86.5,
        note=NOTE_384,
        also="86.3 with 800 epochs of pre-training",
        method="ConMIM",
        network=f"ViT-L/16 {FROM_224}",
    ),
    *(
        Recipe(
            name=name,
            stage=stage,
            model=model,
            gpus=1,
            flags=flags,
            source=OURS,
            note=TINY_NOTE,
            method="ConMIM",
            network=network,
        )
        for name, stage, model, flags, network in TINY_MODELS
    ),
)
