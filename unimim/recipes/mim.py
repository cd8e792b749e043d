"""SimMIM (arXiv 2111.09886) and A2MIM (arXiv 2205.13943): ViT, Swin, ResNet and ConvNeXt.

Published are A2MIM's and OpenMixup's configurations: 2,048 images per step in pre-training, 1,024
to 4,096 in fine-tuning. ImageNet-1K top-1 with ViT-B: SimMIM 83.8, A2MIM 84.2; with ResNet-50: 79.9
and 80.4. The registered models set the options of the mask token and the loss. "RSB" is "ResNet
strikes back" (arXiv 2110.00476).
"""

from collections.abc import Mapping
from typing import Any

from unimim.recipes.conmim import FINETUNE_BASE, FINETUNE_TINY
from unimim.recipes.mae import MAE_TINY_NOTE
from unimim.recipes.recipe import OURS, Recipe

A2MIM_README = "A2MIM README and configurations (Westlake-AI/A2MIM ccca6dc)"
OPENMIXUP = "OpenMixup configurations (Westlake-AI/openmixup 37e1372)"

PRETRAIN_MIM = {
    "batch_size": 256,
    "update_freq": 1,
    "epochs": 300,
    "warmup_epochs": 10,
    "lr": 8e-4,
    "lr_schedule": "stepfix_cosine",
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "opt_betas": (0.9, 0.999),
    "clip_grad": None,
    "drop_path": 0.0,
    "mask_type": "random_mps32",
    "mask_ratio": 0.6,
    "mask_patch_size": 32,
    "crop_scale": (0.67, 1.0),
    "train_interpolation": "bilinear",
    "imagenet_default_mean_and_std": True,
    "save_ckpt_freq": 10,
}
PRETRAIN_SIMMIM_RESNET = PRETRAIN_MIM | {"sync_bn": True}
PRETRAIN_A2MIM_CNN = PRETRAIN_MIM | {"lr": 1.2e-3, "crop_scale": (0.8, 1.0)}
PRETRAIN_A2MIM_RESNET = PRETRAIN_A2MIM_CNN | {"sync_bn": True}
PRETRAIN_A2MIM_RESNET_100 = PRETRAIN_A2MIM_RESNET | {
    "epochs": 100,
    "model_kwargs": ("gamma_lr=0.1",),
}
PRETRAIN_MIM_VIT = PRETRAIN_MIM | {
    "epochs": 800,
    "lr": 4e-4,
    "lr_schedule": "step",
    "lr_steps": (700,),
    "warmup_ratio": 2e-6,
    "min_lr": 0.0,
    "clip_grad": 5.0,
    "drop_path": 0.1,
}
PRETRAIN_MIM_VIT_LARGE = PRETRAIN_MIM_VIT | {"batch_size": 128}
PRETRAIN_SIMMIM_SWIN = PRETRAIN_MIM_VIT | {"input_size": 192, "drop_path": 0.0}
PRETRAIN_SIMMIM_SWIN_100 = PRETRAIN_SIMMIM_SWIN | {
    "epochs": 100,
    "lr": 8e-4,
    "lr_schedule": "cosine_iters",
    "lr_steps": None,
    "min_lr": 4e-5,
    "warmup_ratio": 4e-6,
}
PRETRAIN_A2MIM_DEIT = PRETRAIN_MIM | {
    "epochs": 800,
    "input_size": 192,
    "clip_grad": 5.0,
    "drop_path": 0.1,
    "model_kwargs": ("decoder_kernel=5",),
}
PRETRAIN_A2MIM_DEIT_DEEP = PRETRAIN_A2MIM_DEIT | {"model_kwargs": ("mask_layer=8",)}
PRETRAIN_A2MIM_RESNET_IN100 = PRETRAIN_A2MIM_RESNET_100 | {"epochs": 800, "input_size": 192}
# the mask token without gamma, before the last stage and before the first
PRETRAIN_A2MIM_RESNET_L3 = PRETRAIN_A2MIM_RESNET | {"epochs": 100, "model_kwargs": ("mask_init=0",)}
PRETRAIN_A2MIM_RESNET_L0 = PRETRAIN_A2MIM_RESNET_L3 | {
    "model_kwargs": ("mask_layer=0", "mask_init=0")
}
CIFAR_MEAN_STD = {
    "imagenet_default_mean_and_std": None,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.201),
}
PRETRAIN_A2MIM_RESNET_CIFAR = (
    PRETRAIN_A2MIM_RESNET | CIFAR_MEAN_STD | {"epochs": 1000, "crop_scale": (0.67, 1.0)}
)
PRETRAIN_A2MIM_VIT_CIFAR = (
    PRETRAIN_MIM_VIT
    | CIFAR_MEAN_STD
    | {
        "epochs": 1000,
        "lr": 8e-4,
        "lr_schedule": "cosine_iters",
        "lr_steps": None,
        "min_lr": 4e-5,
        "warmup_ratio": 4e-6,
        "model_kwargs": ("fft_weight=0",),
    }
)
PRETRAIN_SIMMIM_SWIN_CIFAR = PRETRAIN_SIMMIM_SWIN_100 | CIFAR_MEAN_STD | {"epochs": 1000}
PRETRAIN_SIMMIM_IN100 = PRETRAIN_MIM | {
    "epochs": 800,
    "input_size": 192,
    "lr_schedule": "cosine_iters",
    "min_lr": 4e-5,
    "clip_grad": 5.0,
}
PRETRAIN_SIMMIM_SWIN_IN100 = PRETRAIN_SIMMIM_IN100 | {"warmup_ratio": 4e-6}
PRETRAIN_MIM_TINY = PRETRAIN_A2MIM_CNN | {"lr": 5e-4, "warmup_epochs": 5, "mask_patch_size": None}

FINETUNE_MIM = FINETUNE_BASE | {
    "lr": 1e-2,
    "lr_schedule": "stepfix_cosine",
    "clip_grad": 5.0,
    "disable_weight_decay_on_rel_pos_bias": True,
}
FINETUNE_MIM_AVERAGED = FINETUNE_MIM | {
    "model_ema": True,
    "model_ema_decay": 0.99996,
    "model_ema_warmup_epochs": 20,
}
FINETUNE_MIM_LARGE = FINETUNE_MIM_AVERAGED | {"aug_repeats": 3}
# A2MIM's fine-tuning of MAE's and BEiT's weights
FINETUNE_MIM_MAE = FINETUNE_MIM | {
    "lr": 4e-3,
    "warmup_epochs": 5,
    "layer_scale_init_value": None,
    "disable_weight_decay_on_rel_pos_bias": None,
}
FINETUNE_MIM_MAE_LARGE = FINETUNE_MIM_MAE | {"lr": 2e-3}
FINETUNE_MIM_BEIT = FINETUNE_MIM | {"lr": 4e-3, "lr_schedule": "cosine_iters"}
FINETUNE_MIM_DEIT = FINETUNE_MIM | {"lr": 8e-3, "warmup_epochs": 5}
FINETUNE_SWIN = FINETUNE_MIM | {
    "batch_size": 256,
    "input_size": 224,
    "lr": 5e-3,
    "lr_schedule": "cosine_iters",
    "warmup_ratio": 2e-4,
    "layer_decay": 0.9,
    "layer_scale_init_value": None,
    "init_scale": 1.0,
}
FINETUNE_CONVNEXT = FINETUNE_BASE | {
    "update_freq": 4,
    "epochs": 300,
    "warmup_epochs": 5,
    "lr_schedule": "cosine_iters",
    "warmup_ratio": 1e-5,
    "layer_decay": 1.0,
    "layer_scale_init_value": None,
    "init_scale": 1.0,
    "model_ema": True,
    "model_ema_decay": 0.9999,
    "model_ema_warmup_epochs": 20,
}
FINETUNE_CONVNEXT_TINY = FINETUNE_CONVNEXT | {
    "epochs": 400,
    "lr": 4e-4,
    "weight_decay": 0.01,
    "layer_decay": 0.7,
}
# "ResNet strikes back": A3 trains at 160 px for 100 epochs, A2 at 224 px for 300
FINETUNE_A3 = {
    "batch_size": 256,
    "update_freq": 1,
    "epochs": 100,
    "warmup_epochs": 5,
    "warmup_ratio": 1e-5,
    "input_size": 160,
    "eval_input_size": 224,
    "crop_pct": 0.949,
    "opt": "lamb",
    "opt_eps": 1e-6,
    "opt_betas": (0.9, 0.999),
    "lr": 8e-3,
    "lr_schedule": "cosine_epochs",
    "min_lr": 1e-6,
    "weight_decay": 0.02,
    "layer_decay": 1.0,
    "clip_grad": None,
    "drop_path": 0.0,
    "init_scale": 1.0,
    "bce_loss": True,
    "smoothing": 0.0,
    "mixup": 0.1,
    "cutmix": 1.0,
    "aa": "rand-m6-mstd0.5-inc1",
    "reprob": 0.0,
    "imagenet_default_mean_and_std": True,
}
FINETUNE_A2 = FINETUNE_A3 | {
    "epochs": 300,
    "input_size": 224,
    "lr": 5e-3,
    "drop_path": 0.05,
    "aa": "rand-m7-mstd0.5-inc1",
    "aug_repeats": 3,
}
FINETUNE_A2_AVERAGED = FINETUNE_A2 | {
    "model_ema": True,
    "model_ema_decay": 0.9999,
    "model_ema_warmup_epochs": 20,
}
# ResNet-50 with Swin's fine-tuning, and with crops, flips and cross entropy alone
FINETUNE_RESNET_AS_SWIN = FINETUNE_A3 | {
    "warmup_epochs": 20,
    "warmup_ratio": 2e-4,
    "input_size": 224,
    "crop_pct": 0.875,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "lr": 5e-3,
    "lr_schedule": "cosine_iters",
    "weight_decay": 0.05,
    "bce_loss": False,
    "smoothing": 0.1,
    "mixup": 0.8,
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25,
}
FINETUNE_RESNET_PLAIN = FINETUNE_RESNET_AS_SWIN | {
    "smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "aa": "",
    "color_jitter": 0.0,
    "reprob": 0.0,
}
FINETUNE_CONVNEXT_TINY_A3 = FINETUNE_A3 | {
    "lr_schedule": "cosine_iters",
    "drop_path": 0.1,
    "layer_scale_init_value": None,
    "model_ema": False,
    "model_ema_decay": None,
    "model_ema_warmup_epochs": None,
}
FINETUNE_MIM_TINY = FINETUNE_TINY | {
    "lr_schedule": "stepfix_cosine",
    "disable_weight_decay_on_rel_pos_bias": True,
}

# Linear probes: lr for the whole batch, steps at 60 and 80 epochs
LINEAR_A2MIM_CNN = {
    "batch_size": 32,
    "update_freq": 1,
    "epochs": 100,
    "warmup_epochs": 0,
    "lr": 30.0,
    "lr_schedule": "step",
    "lr_steps": (60, 80),
    "weight_decay": 0.0,
    "opt": "momentum",
    "momentum": 0.9,
    "global_pool": True,
    "batch_norm": False,
    "crop_scale": (0.08, 1.0),
    "imagenet_default_mean_and_std": True,
}
LINEAR_A2MIM_VIT = LINEAR_A2MIM_CNN | {"batch_size": 128, "epochs": 90, "lr": 12.0}

MIM_NOTE = "Unverified: how the published effective batch of 2048 was divided among GPUs."
MIM_SWIN_NOTE = f"{MIM_NOTE} Unverified: no stochastic depth."
MIM_IN100_NOTE = f"For ImageNet-100, on which this is the accuracy. {MIM_NOTE}"
MIM_OTHER_IN100_NOTE = f"For ImageNet-100. {MIM_NOTE}"
MIM_SWIN_IN100_NOTE = f"{MIM_OTHER_IN100_NOTE} Unverified: no stochastic depth."
MIM_CIFAR_NOTE = f"For CIFAR-100. {MIM_NOTE}"
MIM_CIFAR_RESNET_NOTE = (
    "For CIFAR-100. The published file's name and comment say 4 GPUs x 256 images x 2, its data "
    "say 64 images for each GPU; 2048 a step is what the name says. Unverified: that gamma has no "
    "rule of lr and decay."
)
SIMMIM_CIFAR_NOTE = (
    "Three of the four published files for CIFAR inherit one that is missing. Unverified: every "
    "value; mean, std and 1000 epochs are A2MIM's for CIFAR-100, the rest is SimMIM's for "
    "ImageNet-1K."
)
CONVNEXT_BASE_NOTE = (
    f"{MIM_NOTE} The published file says both update_interval=2 under 8 GPUs x 256, which is 4096 "
    "images a step, and in a comment 4 GPUs x 2, which is 2048."
)
RESNET152_NOTE = (
    f"{MIM_NOTE} The weight of the spectra is 0.1 in A2MIM's file and 0 in OpenMixup's; here 0.1, "
    "--model_kwargs fft_weight=0 gives the other."
)
A3_NOTE = (
    "The authors call A3 unstable: 77.98 was reported in place of 78.9, and they advise A2 "
    "(Westlake-AI/A2MIM, issue 2)."
)
MAE_STYLE_NOTE = (
    "A2MIM's fine-tuning of weights of another method. Unverified: which weights it was run on, "
    "and how the published effective batch of 1024 was divided among GPUs."
)
BEIT_STYLE_NOTE = f"{MAE_STYLE_NOTE} Unverified: lr and warm-up, which are BEiT's."
DEIT_LINK_NOTE = (
    "A2MIM's table links this file to the accuracy; the other file, with a decoder of "
    "convolutions, has none."
)
MIM_FINETUNE_NOTE = "Unverified: how the published effective batch of 1024 was divided among GPUs."
MIM_CNN_NOTE = (
    "Unverified: how the published effective batch of {} was divided among GPUs, "
    "and the head's initialization."
)
MIM_SWIN_800_NOTE = f"{MIM_CNN_NOTE.format(2048)} Unverified: that this accuracy is for 224 px."
MIM_DEIT_NOTE = (
    f"For ImageNet-100, on which this is the accuracy. {MIM_FINETUNE_NOTE} Unverified: 224 px."
)
LINEAR_A2MIM_NOTE = (
    "Unverified: how the published batch of {} was divided among GPUs. No accuracy is published.{}"
)
STEPS_NOTE = (
    " The published setting names both a cosine and steps, and inherits Mixup, "
    "which is left out here."
)

METHODS = {"a2mim": "A2MIM", "simmim": "SimMIM"}
SOURCES = {"a2mim": A2MIM_README, "simmim": OPENMIXUP}


def _pretrain(
    name: str,
    model: str,
    network: str,
    published: float | None,
    flags: Mapping[str, Any],
    note: str = MIM_NOTE,
    **changes: str,
) -> Recipe:
    """Return a recipe for pre-training with 2048 images per step."""
    method = name.partition("_")[0]
    facts = {"source": SOURCES[method], "note": note} | changes
    return Recipe(
        name=f"{name}_pretrain",
        stage="pretrain",
        model=model,
        gpus=2048 // flags["batch_size"],
        flags=flags,
        published=published,
        method=METHODS[method],
        network=network,
        **facts,
    )


def _vit(method: str, size: str, epochs: int, published: float) -> tuple[Recipe, ...]:
    """Return the pre-training of a ViT for 800 epochs, and its fine-tuning."""
    finetune = {"small": FINETUNE_MIM, "base": FINETUNE_MIM_AVERAGED, "large": FINETUNE_MIM_LARGE}
    model = f"vit_{size}_patch16_224"
    network = {"small": "wide ViT-S/16", "base": "ViT-B/16", "large": "ViT-L/16"}[size]
    return (
        _pretrain(
            f"{method}_vit_{size}",
            f"{method}_{model}",
            network,
            published,
            PRETRAIN_MIM_VIT_LARGE if size == "large" else PRETRAIN_MIM_VIT,
        ),
        Recipe(
            name=f"{method}_vit_{size}_finetune",
            stage="finetune",
            model=f"mim_{model}",
            gpus=8,
            flags=finetune[size] | {"epochs": epochs},
            source=SOURCES[method],
            published=published,
            note=MIM_FINETUNE_NOTE,
            method=METHODS[method],
            network=network,
        ),
    )


def _finetune(
    name: str,
    model: str,
    network: str,
    published: float | None,
    flags: Mapping[str, Any],
    note: str = "",
    **changes: Any,
) -> Recipe:
    """Return a recipe for fine-tuning one of timm's networks on 8 GPUs."""
    method = name.partition("_")[0]
    return Recipe(
        name=name,
        stage="finetune",
        model=model,
        gpus=8,
        flags=flags | changes,
        source=SOURCES[method],
        published=published,
        note=note or MIM_CNN_NOTE.format(8 * flags["batch_size"] * flags["update_freq"]),
        method=METHODS[method],
        network=network,
    )


def _own(name: str, stage: str, method: str, flags: Mapping[str, Any]) -> Recipe:
    """Return our recipe for ViT-Ti on small data."""
    return Recipe(
        name=f"{name}_{stage}",
        stage=stage,
        model=f"{name}_patch16_224",
        gpus=1,
        flags=flags,
        source=OURS,
        note=MAE_TINY_NOTE,
        method=method,
        network="ViT-Ti/16",
    )


A3 = "as RSB A3, at 160 px"
IN100 = {"data": "ImageNet-100"}
CIFAR = {"data": "CIFAR-100", "note": MIM_CIFAR_NOTE, "source": OPENMIXUP}

RECIPES = (
    *_vit("a2mim", "small", 200, 82.1),
    *_vit("a2mim", "base", 100, 84.2),
    *_vit("a2mim", "large", 150, 86.1),
    *_vit("simmim", "small", 100, 81.7),
    *_vit("simmim", "base", 100, 83.8),
    *_vit("simmim", "large", 100, 85.6),
    *(
        _pretrain(
            f"a2mim_resnet{depth}",
            f"a2mim_resnet{depth}",
            f"ResNet-{depth}",
            published,
            PRETRAIN_A2MIM_RESNET,
            RESNET152_NOTE if depth == 152 else MIM_NOTE,
        )
        for depth, published in ((50, 80.4), (101, 81.9), (152, 82.5), (200, 83.0))
    ),
    _pretrain(
        "a2mim_resnet50_100",
        "a2mim_resnet50",
        "ResNet-50",
        78.8,
        PRETRAIN_A2MIM_RESNET_100,
        also="100 epochs, RSB A3",
    ),
    _pretrain(
        "a2mim_resnet50_in100",
        "a2mim_resnet50",
        "ResNet-50 on ImageNet-100",
        89.32,
        PRETRAIN_A2MIM_RESNET_IN100,
        MIM_IN100_NOTE,
        **IN100,
    ),
    _pretrain(
        "a2mim_resnet50_l3_100",
        "a2mim_resnet50",
        "ResNet-50 with the mask token before the last stage and no gamma",
        None,
        PRETRAIN_A2MIM_RESNET_L3,
    ),
    _pretrain(
        "a2mim_resnet50_l0_100",
        "a2mim_resnet50",
        "ResNet-50 with the mask token before the first stage and no gamma",
        None,
        PRETRAIN_A2MIM_RESNET_L0,
    ),
    _pretrain(
        "a2mim_resnet50_cifar100",
        "a2mim_resnet50",
        "ResNet-50 on CIFAR-100 at 224 px",
        None,
        PRETRAIN_A2MIM_RESNET_CIFAR,
        **CIFAR | {"note": MIM_CIFAR_RESNET_NOTE},
    ),
    _pretrain(
        "a2mim_vit_small_cifar100",
        "a2mim_vit_small_patch16_224",
        "wide ViT-S/16 on CIFAR-100 at 224 px",
        None,
        PRETRAIN_A2MIM_VIT_CIFAR,
        **CIFAR,
    ),
    *(
        _pretrain(
            f"a2mim_convnext_{size}",
            f"a2mim_convnext_{size}",
            f"ConvNeXt-{size[0].upper()}",
            published,
            PRETRAIN_A2MIM_CNN,
        )
        for size, published in (("small", 83.7), ("base", 84.1), ("tiny", None))
    ),
    _pretrain(
        "a2mim_deit_small_in100",
        "a2mim_deit_small_patch16_224",
        "DeiT-S/16 on ImageNet-100",
        None,
        PRETRAIN_A2MIM_DEIT,
        MIM_OTHER_IN100_NOTE,
        **IN100,
    ),
    _pretrain(
        "a2mim_deit_small_l8_in100",
        "a2mim_deit_small_patch16_224",
        "DeiT-S/16 on ImageNet-100 with the mask token before the eighth block",
        87.24,
        PRETRAIN_A2MIM_DEIT_DEEP,
        f"{MIM_IN100_NOTE} {DEIT_LINK_NOTE}",
        **IN100,
    ),
    *(
        _pretrain(
            f"simmim_resnet{depth}",
            f"simmim_resnet{depth}",
            f"ResNet-{depth}",
            published,
            PRETRAIN_SIMMIM_RESNET,
        )
        for depth, published in ((50, 79.9), (101, 81.3), (152, 81.9), (200, 82.2))
    ),
    *(
        _pretrain(
            f"simmim_convnext_{size}",
            f"simmim_convnext_{size}",
            f"ConvNeXt-{size[0].upper()}",
            published,
            PRETRAIN_MIM,
            CONVNEXT_BASE_NOTE if size == "base" else MIM_NOTE,
        )
        for size, published in (("small", 83.2), ("base", 83.6), ("tiny", None))
    ),
    _pretrain(
        "simmim_swin_base",
        "simmim_swin_base",
        "Swin-B at 192 px",
        84.0,
        PRETRAIN_SIMMIM_SWIN,
        MIM_SWIN_NOTE,
    ),
    _pretrain(
        "simmim_swin_base_100",
        "simmim_swin_base",
        "Swin-B at 192 px",
        82.9,
        PRETRAIN_SIMMIM_SWIN_100,
        MIM_SWIN_NOTE,
    ),
    _pretrain(
        "simmim_resnet50_in100",
        "simmim_resnet50",
        "ResNet-50 on ImageNet-100",
        None,
        PRETRAIN_SIMMIM_IN100 | {"sync_bn": True},
        MIM_OTHER_IN100_NOTE,
        source=A2MIM_README,
        **IN100,
    ),
    _pretrain(
        "simmim_swin_tiny_in100",
        "simmim_swin_tiny",
        "Swin-T on ImageNet-100 at 192 px",
        None,
        PRETRAIN_SIMMIM_SWIN_IN100,
        MIM_SWIN_IN100_NOTE,
        source=A2MIM_README,
        **IN100,
    ),
    *(
        _pretrain(
            f"simmim_swin_base_cifar{classes}",
            "simmim_swin_base",
            f"Swin-B on CIFAR-{classes} at 192 px",
            None,
            PRETRAIN_SIMMIM_SWIN_CIFAR,
            SIMMIM_CIFAR_NOTE,
            data=f"CIFAR-{classes}",
        )
        for classes in (10, 100)
    ),
    *(
        _finetune(
            f"a2mim_{name}_finetune_a3",
            f"resnet{depth}",
            f"ResNet-{depth} {A3}",
            published,
            FINETUNE_A3,
            f"{MIM_CNN_NOTE.format(2048)} {A3_NOTE}",
        )
        for name, depth, published in (
            ("resnet50", 50, 78.9),
            ("resnet50_100", 50, 78.8),
            ("resnet101", 101, 80.3),
            ("resnet152", 152, 80.9),
            ("resnet200", 200, None),
        )
    ),
    *(
        _finetune(
            f"{method}_resnet{depth}_finetune_a2",
            f"resnet{depth}",
            f"ResNet-{depth} as RSB A2",
            published,
            FINETUNE_A2_AVERAGED if depth == 50 else FINETUNE_A2,
            drop_path=drop_path,
        )
        for method, depth, published, drop_path in (
            ("a2mim", 50, 80.4, 0.05),
            ("a2mim", 101, 81.9, 0.05),
            ("a2mim", 152, 82.5, 0.05),
            ("a2mim", 200, 83.0, 0.2),
            ("simmim", 50, 79.9, 0.05),
            ("simmim", 101, 81.3, 0.1),
            ("simmim", 152, 81.9, 0.15),
            ("simmim", 200, 82.2, 0.2),
        )
    ),
    _finetune(
        "a2mim_resnet50_finetune_swin",
        "resnet50",
        "ResNet-50 with Swin's fine-tuning",
        None,
        FINETUNE_RESNET_AS_SWIN,
    ),
    _finetune(
        "a2mim_resnet50_finetune_plain",
        "resnet50",
        "ResNet-50 with crops, flips and cross entropy alone",
        None,
        FINETUNE_RESNET_PLAIN,
    ),
    _finetune(
        "a2mim_convnext_tiny_finetune", "convnext_tiny", "ConvNeXt-T", None, FINETUNE_CONVNEXT_TINY
    ),
    _finetune(
        "a2mim_convnext_tiny_finetune_a3",
        "convnext_tiny",
        f"ConvNeXt-T {A3}",
        None,
        FINETUNE_CONVNEXT_TINY_A3,
    ),
    _finetune(
        "simmim_convnext_tiny_finetune", "convnext_tiny", "ConvNeXt-T", None, FINETUNE_CONVNEXT_TINY
    ),
    *(
        _finetune(
            f"{method}_convnext_{size}_finetune",
            f"convnext_{size}",
            f"ConvNeXt-{size[0].upper()}",
            published,
            FINETUNE_CONVNEXT,
            drop_path=drop_path,
        )
        for method, size, published, drop_path in (
            ("a2mim", "small", 83.7, 0.4),
            ("a2mim", "base", 84.1, 0.5),
            ("simmim", "small", 83.2, 0.4),
            ("simmim", "base", 83.6, 0.5),
        )
    ),
    _finetune(
        "simmim_swin_base_finetune", "swin_base", "Swin-B", 84.0, FINETUNE_SWIN, MIM_SWIN_800_NOTE
    ),
    _finetune(
        "simmim_swin_base_100_finetune",
        "swin_base",
        "Swin-B at 192 px",
        82.9,
        FINETUNE_SWIN,
        input_size=192,
    ),
    _finetune(
        "simmim_swin_base_100_finetune_224", "swin_base", "Swin-B at 224 px", 83.5, FINETUNE_SWIN
    ),
    *(
        Recipe(
            name=f"a2mim_deit_small_{token}in100_finetune",
            stage="finetune",
            model="mim_deit_small_patch16_224",
            gpus=8,
            flags=FINETUNE_MIM_DEIT,
            source=A2MIM_README,
            published=published,
            note=note,
            method="A2MIM",
            network="DeiT-S",
            data="ImageNet-100",
        )
        for token, published, note in (
            ("", None, f"For ImageNet-100. {MIM_FINETUNE_NOTE} Unverified: 224 px."),
            ("l8_", 87.24, MIM_DEIT_NOTE),
        )
    ),
    *(
        Recipe(
            name=f"{name}_finetune_a2mim",
            stage="finetune",
            model=model,
            gpus=8,
            flags=flags,
            source=A2MIM_README,
            note=note,
            method="A2MIM",
            network=network,
        )
        for name, model, flags, network, note in (
            ("mae_base", "vit_base_patch16_224", FINETUNE_MIM_MAE, "MAE's ViT-B", MAE_STYLE_NOTE),
            (
                "mae_large",
                "vit_large_patch16_224",
                FINETUNE_MIM_MAE_LARGE,
                "MAE's ViT-L",
                MAE_STYLE_NOTE,
            ),
            (
                "beit_base",
                "beit_base_patch16_224",
                FINETUNE_MIM_BEIT,
                "BEiT's ViT-B",
                BEIT_STYLE_NOTE,
            ),
        )
    ),
    Recipe(
        name="a2mim_resnet50_linear",
        stage="linear",
        model="resnet50",
        gpus=8,
        flags=LINEAR_A2MIM_CNN,
        source=A2MIM_README,
        note=LINEAR_A2MIM_NOTE.format(256, ""),
        method="A2MIM",
        network="ResNet-50",
    ),
    Recipe(
        name="a2mim_vit_small_linear",
        stage="linear",
        model="mim_vit_small_patch16_224",
        gpus=8,
        flags=LINEAR_A2MIM_VIT,
        source=A2MIM_README,
        note=LINEAR_A2MIM_NOTE.format(1024, STEPS_NOTE),
        method="A2MIM",
        network="ViT-S/16",
    ),
    _own("a2mim_vit_tiny", "pretrain", "A2MIM", PRETRAIN_MIM_TINY),
    _own("simmim_vit_tiny", "pretrain", "SimMIM", PRETRAIN_MIM_TINY),
    _own("mim_vit_tiny", "finetune", "SimMIM and A2MIM", FINETUNE_MIM_TINY),
)

# For models without a recipe of their own: the first whose name is a prefix of the model's.
RELATIVES = tuple(
    Recipe(f"{family}*_{stage}", stage, f"{family}*", 8, flags, OURS)
    for stage, family, flags in (
        ("pretrain", "a2mim_resnet", PRETRAIN_A2MIM_RESNET),
        ("pretrain", "a2mim_swin_", PRETRAIN_SIMMIM_SWIN),
        ("pretrain", "a2mim_swinv2_", PRETRAIN_SIMMIM_SWIN),
        ("pretrain", "a2mim_", PRETRAIN_A2MIM_CNN),
        ("pretrain", "simmim_resnet", PRETRAIN_SIMMIM_RESNET),
        ("pretrain", "simmim_swin_", PRETRAIN_SIMMIM_SWIN),
        ("pretrain", "simmim_swinv2_", PRETRAIN_SIMMIM_SWIN),
        ("pretrain", "simmim_deit_", PRETRAIN_MIM_VIT),
        ("pretrain", "simmim_", PRETRAIN_MIM),
        ("finetune", "swin_", FINETUNE_SWIN),
        ("finetune", "swinv2_", FINETUNE_SWIN),
    )
)
