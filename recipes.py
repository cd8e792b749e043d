"""Every published recipe as plain data: the defaults of the run scripts for a model, and what the shell scripts pass.

Flags carry the command line's own names. A value that no source states is named in the recipe's `note`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STAGES = ("pretrain", "finetune")  # "linear" and "knn" have recipes too, which only their scripts pass

# ConMIM, tables 1 to 3: ImageNet-1K top-1 in percent, by pre-training epochs and fine-tuning resolution in pixels.
IMAGENET_TOP1: dict[str, dict[int, dict[int, float]]] = {
    "small": {300: {224: 82.0, 384: 83.9}},
    "base": {300: {224: 83.5}, 800: {224: 83.7, 384: 85.3}},
    "large": {400: {224: 84.6}, 800: {224: 85.2, 384: 86.3}, 1600: {224: 85.5, 384: 86.5}},
}

README = "ConMIM README (TencentARC/ConMIM 4263955f)"
BEIT_DOCS = "BEiT documentation (microsoft/unilm 768a3c87)"
MC_BEIT = "mc-BEiT (lixiaotong97/mc-BEiT 37489a1e)"
PAPER = "ConMIM, arXiv 2205.09616"
OURS = "UniMIM"


@dataclass(frozen=True)
class Recipe:
    """How one model was, or should be, trained or evaluated in one stage.

    `flags` maps command-line names to values: `lr` is the peak, never scaled by the batch, `batch_size` the images per
    GPU and micro-batch, and None switches a flag off. `published` is the ImageNet-1K top-1 in percent that the recipe
    leads to; for pre-training, that of the model fine-tuned at 224 px. `note` says what is not published. What has
    another source than ourselves has a script.
    """

    name: str
    stage: str
    model: str
    gpus: int
    flags: Mapping[str, Any]
    source: str
    published: float | None = None
    note: str = ""

    @property
    def has_script(self) -> bool:
        return self.source != OURS

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step on the published number of GPUs."""
        return self.gpus * self.flags["batch_size"] * self.flags.get("update_freq", 1)

    @property
    def hardware(self) -> str:
        """GPUs, images per GPU, accumulation and their product in one line; no source names the type of GPU."""
        batch, update_freq = self.flags["batch_size"], self.flags.get("update_freq")
        if update_freq is None:  # nothing is trained
            return f"{self.gpus} GPUs x batch {batch} = {self.effective_batch}"
        return f"{self.gpus} GPUs x batch {batch} x update_freq {update_freq} = {self.effective_batch}"


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

# Fine-tuned at 224 px, then a tenth of those epochs at 384 px with a small rate and almost no decay.
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

TINY_NOTE = "Ours, not published: a small model for small data on one device, derived from the ViT-S recipe."
PRETRAIN_NOTE = (
    "Epochs and layer scale are published. Unverified: lr, batch, warm-up and clip_grad are mc-BEiT's for ViT-B, "
    "all else is ConMIM's for ViT-L."
)
DEEPSPEED_NOTE = "The published run used DeepSpeed: add --enable_deepspeed."
NOTE_384 = (
    "A tenth of the 224 px epochs is published. Unverified: lr, weight_decay, layer_decay and drop_path are BEiT's "
    "after its ImageNet-22K stage; batch and warm-up are ours; mixup, cutmix and smoothing stay as at 224 px."
)

# MAE and SemMAE. `blr` is the peak for 256 images a step (specs/semmae.md A.8, A.9, B.6).
MAE_README = "MAE README (facebookresearch/mae efb2a80)"
SEMMAE_README = "SemMAE README (ucasligang/SemMAE 95b39ff)"
SEMMAE_PAPER = "SemMAE, arXiv 2206.10207"

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
PRETRAIN_MAE_TINY = PRETRAIN_MAE | {"batch_size": 256, "epochs": 300, "warmup_epochs": 10, "blr": 5e-4}
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
FINETUNE_MAE_LARGE = FINETUNE_MAE_BASE | {"epochs": 50, "blr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2}
FINETUNE_MAE_HUGE = FINETUNE_MAE_LARGE | {"drop_path": 0.3}
FINETUNE_MAE_TINY = FINETUNE_MAE_BASE | {"batch_size": 256, "drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0}

SPLIT_NOTE = "Unverified: how the published effective batch of {} was shared among GPUs."
PARTS_NOTE = "Unverified: crops, which the published code has none of. The part maps come from run_part_learning.py."
MAE_TINY_NOTE = "Ours, not published: a small model for small data on one device, derived from the ViT-B recipe."

# SemAIM and its ancestors (specs/semaim.md 7, 8, 12)
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

# Linear probing (specs/semmae.md A.10, semaim.md 9 and 12), and k-NN (semaim.md 10 and 12)
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

# BEiT, MaskFeat and SemanticMIM (specs/semanticmim.md 1.7, 3)
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
UNIFORM_MASKS = {"mask_type": "random_mps32", "mask_patch_size": 16}  # rounds their number up
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
_OWN_BATCH = {"mask_type": "random", "mask_patch_size": None, "batch_size": 256, "warmup_epochs": 10}
PRETRAIN_BEIT_TINY = PRETRAIN_BEIT | {"batch_size": 256, "epochs": 300, "drop_path": 0.0}
PRETRAIN_SEMANTIC_BEIT_TINY = PRETRAIN_SEMANTIC_BEIT | _OWN_BATCH | {"drop_path": 0.0}
PRETRAIN_SEMANTIC_MASKFEAT_TINY = PRETRAIN_SEMANTIC_MASKFEAT | _OWN_BATCH | {"clip_grad": None}
PRETRAIN_MASKFEAT_TINY = PRETRAIN_MASKFEAT | _OWN_BATCH | {"clip_grad": None}

FINETUNE_SEMANTIC_BEIT = FINETUNE_BASE | {"init_scale": 1.0}
FINETUNE_MASKFEAT = FINETUNE_BASE | {
    "batch_size": 256, "lr": 8e-3, "lr_schedule": "cosine", "layer_scale_init_value": None,
}  # fmt: skip
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

# A2MIM's probes (specs/a2mim.md 4.5): a linear layer alone, its rate of the whole batch, steps at 60 and 80 epochs
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

BEIT_NOTE = "Unverified: how the published batch of 2048 was shared among GPUs."
BEIT_LARGE_NOTE = (
    "Published are the figure, from ConMIM's table 1, 800 epochs and layer scale. Unverified: all else is ViT-B's."
)
WARMUP_NOTE = "The published warm-up starts from 1/10000 of the peak, here it starts from 0."
ABS_POS_NOTE = (
    f"SemanticMIM's baseline in BEiT's form: scripts/semanticmim_beit_base_finetune.sh fine-tunes it. {WARMUP_NOTE}"
)
MASKFEAT_NOTE = (
    "The figure is mmpretrain's, whose masks were block-wise. Unverified: what SemanticMIM's settings reach. "
    "The published warm-up starts from a millionth of the peak, here from 0."
)
CLS_NOTE = f"The released setting has 1 class token; the authors trained 8 too (--num_cls_tokens 8). {WARMUP_NOTE}"
MEAN_STD_NOTE = "The published normalisation is not that of pre-training but 0.5; here it is the same."
JITTER_NOTE = "Published with a colour jitter after RandAugment and bilinear test images, which are not made here."
LINEAR_A2MIM_NOTE = "Unverified: how the published batch of {} was shared among GPUs. No accuracy is published.{}"
STEPS_NOTE = " The published setting names a cosine and steps, and inherits Mixup, which a probe does without."
BORROWED_NOTE = "Unverified: every setting is SemanticMIM's for its own models."

SEMAIM_LARGE_NOTE = "Unverified: every setting; pre-training is as for ViT-B, fine-tuning as MAE's."
SEMAIM_CLIP_NOTE = "Unverified: every setting but epochs and target; the rest is as for pixels."
IGPT_NOTE = "Unverified: every setting but epochs and order; the rest is SAIM's."

# SimMIM and A2MIM (specs/a2mim.md 1.4, 4.3 to 5). Forms of the token and the loss are those of the registered models.
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
PRETRAIN_A2MIM_RESNET_100 = PRETRAIN_A2MIM_RESNET | {"epochs": 100, "model_kwargs": ("gamma_lr=0.1",)}
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
# the token without gamma, before the last stage and before the first
PRETRAIN_A2MIM_RESNET_L3 = PRETRAIN_A2MIM_RESNET | {"epochs": 100, "model_kwargs": ("mask_init=0",)}
PRETRAIN_A2MIM_RESNET_L0 = PRETRAIN_A2MIM_RESNET_L3 | {"model_kwargs": ("mask_layer=0", "mask_init=0")}
PRETRAIN_A2MIM_RESNET_CIFAR = PRETRAIN_A2MIM_RESNET_L3 | {"epochs": 1000}
PRETRAIN_A2MIM_VIT_CIFAR = PRETRAIN_MIM_VIT | {
    "epochs": 1000,
    "lr": 8e-4,
    "lr_schedule": "cosine_iters",
    "lr_steps": None,
    "min_lr": 4e-5,
    "warmup_ratio": 0.0,
    "model_kwargs": ("fft_weight=0",),
}
PRETRAIN_SIMMIM_IN100 = PRETRAIN_MIM | {
    "epochs": 800,
    "input_size": 192,
    "lr_schedule": "cosine_iters",
    "min_lr": 4e-5,
    "clip_grad": 5.0,
}
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
    "layer_decay": 1.0,
    "layer_scale_init_value": None,
    "init_scale": 1.0,
    "model_ema": True,
    "model_ema_decay": 0.9999,
    "model_ema_warmup_epochs": 20,
}
FINETUNE_CONVNEXT_TINY = FINETUNE_CONVNEXT | {"epochs": 400, "lr": 4e-4, "weight_decay": 0.01, "layer_decay": 0.7}
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
FINETUNE_A2_AVERAGED = FINETUNE_A2 | {"model_ema": True, "model_ema_decay": 0.9999, "model_ema_warmup_epochs": 20}
# ResNet-50 as Swin is fine-tuned, and with crops, flips and cross entropy alone
FINETUNE_RESNET_AS_SWIN = FINETUNE_A3 | {
    "warmup_epochs": 20,
    "warmup_ratio": 0.0,
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
    "drop_path": 0.1,
    "layer_scale_init_value": None,
    "model_ema": False,
    "model_ema_decay": None,
    "model_ema_warmup_epochs": None,
}
FINETUNE_MIM_TINY = FINETUNE_TINY | {"lr_schedule": "stepfix_cosine", "disable_weight_decay_on_rel_pos_bias": True}

MIM_NOTE = "Unverified: how the published effective batch of 2048 was shared among GPUs."
MIM_SWIN_NOTE = f"{MIM_NOTE} Unverified: no stochastic depth."
MIM_IN100_NOTE = f"For ImageNet-100, on which this is the accuracy. {MIM_NOTE}"
MIM_OTHER_IN100_NOTE = f"For ImageNet-100. {MIM_NOTE}"
MIM_SWIN_IN100_NOTE = f"{MIM_OTHER_IN100_NOTE} Unverified: no stochastic depth."
MIM_CIFAR_NOTE = f"For CIFAR-100. {MIM_NOTE} Unverified: crops, mean and std."
MIM_FINETUNE_NOTE = "Unverified: how the published effective batch of 1024 was shared among GPUs."
MIM_CNN_NOTE = "Unverified: how the published effective batch of {} was shared among GPUs, and the head's start."
MIM_SWIN_800_NOTE = f"{MIM_CNN_NOTE.format(2048)} Unverified: that this accuracy is for 224 px."
MIM_DEIT_NOTE = f"For ImageNet-100, on which this is the accuracy. {MIM_FINETUNE_NOTE} Unverified: 224 px."


def _mae(size: str, patch: int, published: float, finetune: Mapping[str, Any]) -> tuple[Recipe, Recipe]:
    """Pre-training for 1600 epochs with normalised pixels, and the fine-tuning after it."""
    model, note = f"{size}_patch{patch}_224", SPLIT_NOTE
    return (
        Recipe(
            f"mae_{size}_pretrain", "pretrain", f"mae_{model}", 64, PRETRAIN_MAE, MAE_README, published,
            note.format(4096),
        ),
        Recipe(
            f"mae_{size}_finetune", "finetune", f"vit_{model}", 32, finetune, MAE_README, published, note.format(1024)
        ),
    )  # fmt: skip


def _semmae(name: str, patch: int, published: float) -> tuple[Recipe, Recipe]:
    """Pre-training on part maps for 800 epochs, and MAE's fine-tuning after it."""
    model, source = f"base_patch{patch}_224", f"{SEMMAE_README}; {SEMMAE_PAPER}"
    return (
        Recipe(
            f"semmae_{name}_pretrain", "pretrain", f"semmae_{model}", 16, PRETRAIN_SEMMAE, source, published, PARTS_NOTE
        ),
        Recipe(
            f"semmae_{name}_finetune", "finetune", f"vit_{model}", 32, FINETUNE_MAE_BASE, SEMMAE_README, published,
            SPLIT_NOTE.format(1024),
        ),
    )  # fmt: skip


def _semaim(name: str, model: str, size: str, published: float, flags: Mapping[str, Any], note: str = ""):
    """Pre-training on 32 GPUs and fine-tuning on 16, as published for ViT-B."""
    finetune = FINETUNE_SEMAIM if size == "base" else FINETUNE_SEMAIM_LARGE
    return (
        Recipe(
            f"{name}_{size}_pretrain", "pretrain", f"{model}_{size}_patch16_224", 32, flags, SEMAIM_README, published,
            note,
        ),
        Recipe(
            f"{name}_{size}_finetune", "finetune", f"vit_{size}_patch16_224", 16, finetune, SEMAIM_README, published,
            note,
        ),
    )  # fmt: skip


def _beit(size: str, gpus: int, published: float, flags: Mapping, finetune: Mapping, notes: tuple[str, str]):
    """BEiT's pre-training on ImageNet-1K, its fine-tuning, and a probe that is not BEiT's own."""
    model, sources = f"beit_{size}_patch16_224", f"{BEIT_DOCS}; {PAPER}"
    return (
        Recipe(
            f"beit_{size}_pretrain", "pretrain", f"{model}_8k_vocab", gpus, flags, sources, published, notes[0]
        ),
        Recipe(f"beit_{size}_finetune", "finetune", model, 8, finetune, sources, published, notes[1]),
        Recipe(f"beit_{size}_linear", "linear", model, 8, LINEAR_SEMANTIC, SEMANTICMIM, note=BORROWED_NOTE),
    )  # fmt: skip


def _semantic(name: str, classifier: str, flags: Mapping, finetune: Mapping, published: float | None, *notes: str):
    """SemanticMIM or a baseline of ViT-B on 8 GPUs; notes for pre-training, fine-tuning and probing."""
    model, source = f"{name}_base_patch16_224", SEMANTICMIM if published is None else f"{SEMANTICMIM}; {MMPRETRAIN}"
    return (
        Recipe(f"{name}_base_pretrain", "pretrain", model, 8, flags, source, published, notes[0]),
        Recipe(f"{name}_base_finetune", "finetune", classifier, 8, finetune, source, published, notes[1]),
        Recipe(f"{name}_base_linear", "linear", classifier, 8, LINEAR_SEMANTIC, SEMANTICMIM, note=notes[2]),
    )


def _mim(
    name: str, model: str, published: float | None, flags: Mapping[str, Any], source: str, note: str = MIM_NOTE
) -> Recipe:
    """Pre-training with 2048 images a step."""
    return Recipe(f"{name}_pretrain", "pretrain", model, 2048 // flags["batch_size"], flags, source, published, note)


def _mim_vit(method: str, size: str, epochs: int, published: float, source: str) -> tuple[Recipe, Recipe]:
    """Pre-training of a ViT for 800 epochs, and its fine-tuning."""
    pretrain = PRETRAIN_MIM_VIT_LARGE if size == "large" else PRETRAIN_MIM_VIT
    finetune = {"small": FINETUNE_MIM, "base": FINETUNE_MIM_AVERAGED, "large": FINETUNE_MIM_LARGE}[size]
    model = f"vit_{size}_patch16_224"
    return (
        _mim(f"{method}_vit_{size}", f"{method}_{model}", published, pretrain, source),
        Recipe(
            f"{method}_vit_{size}_finetune", "finetune", f"mim_{model}", 8, finetune | {"epochs": epochs}, source,
            published, MIM_FINETUNE_NOTE,
        ),
    )  # fmt: skip


def _tuned(name: str, model: str, published: float | None, flags: Mapping[str, Any], source: str, **changes) -> Recipe:
    """Fine-tuning of a network of timm's on 8 GPUs."""
    note = MIM_CNN_NOTE.format(8 * flags["batch_size"] * flags["update_freq"])
    return Recipe(name, "finetune", model, 8, flags | changes, source, published, note)


def _linear(
    name: str, gpus: int, flags: Mapping[str, Any], source: str, published: float | None = None, note: str = ""
) -> Recipe:
    """Linear probing of the model that `name`_pretrain makes."""
    size = name.rpartition("_")[2]
    return Recipe(f"{name}_linear", "linear", f"vit_{size}_patch16_224", gpus, flags, source, published, note)


def _own(name: str, stage: str, model: str, flags: Mapping[str, Any], suffix: str = "") -> Recipe:
    return Recipe(f"{name}_{stage}", stage, f"{model}_patch16_224{suffix}", 1, flags, OURS, note=MAE_TINY_NOTE)


_RECIPES = (
    Recipe("conmim_tiny_pretrain", "pretrain", "conmim_tiny_patch16_224", 1, PRETRAIN_TINY, OURS, note=TINY_NOTE),
    Recipe(
        name="conmim_small_pretrain",
        stage="pretrain",
        model="conmim_small_patch16_224",
        gpus=16,
        flags=PRETRAIN_SMALL,
        source=f"{README}; {MC_BEIT}",
        published=IMAGENET_TOP1["small"][300][224],
        note=PRETRAIN_NOTE,
    ),
    Recipe(
        name="conmim_base_pretrain",
        stage="pretrain",
        model="conmim_base_patch16_224",
        gpus=16,
        flags=PRETRAIN_BASE,
        source=f"{README}; {MC_BEIT}",
        published=IMAGENET_TOP1["base"][800][224],
        note=PRETRAIN_NOTE,
    ),
    Recipe(
        name="conmim_large_pretrain",
        stage="pretrain",
        model="conmim_large_patch16_224",
        gpus=32,
        flags=PRETRAIN_LARGE,
        source=README,
        published=IMAGENET_TOP1["large"][1600][224],
    ),
    Recipe("conmim_tiny_finetune", "finetune", "beit_tiny_patch16_224", 1, FINETUNE_TINY, OURS, note=TINY_NOTE),
    Recipe("conmim_tiny_finetune_384", "finetune", "beit_tiny_patch16_384", 1, FINETUNE_TINY_384, OURS, note=TINY_NOTE),
    Recipe(
        name="conmim_small_finetune",
        stage="finetune",
        model="beit_small_patch16_224",
        gpus=8,
        flags=FINETUNE_BASE,
        source=README,
        published=IMAGENET_TOP1["small"][300][224],
        note="Unverified: every setting is the README's for ViT-B.",
    ),
    Recipe(
        name="conmim_small_finetune_384",
        stage="finetune",
        model="beit_small_patch16_384",
        gpus=8,
        flags=FINETUNE_BASE_384,
        source=f"{PAPER}; {BEIT_DOCS}",
        published=IMAGENET_TOP1["small"][300][384],
        note=f"{NOTE_384} All of it is BEiT's for ViT-B.",
    ),
    Recipe(
        name="conmim_base_finetune",
        stage="finetune",
        model="beit_base_patch16_224",
        gpus=8,
        flags=FINETUNE_BASE,
        source=README,
        published=IMAGENET_TOP1["base"][800][224],
        note=DEEPSPEED_NOTE,
    ),
    Recipe(
        name="conmim_base_finetune_384",
        stage="finetune",
        model="beit_base_patch16_384",
        gpus=8,
        flags=FINETUNE_BASE_384,
        source=f"{PAPER}; {BEIT_DOCS}",
        published=IMAGENET_TOP1["base"][800][384],
        note=NOTE_384,
    ),
    Recipe(
        name="conmim_large_finetune",
        stage="finetune",
        model="beit_large_patch16_224",
        gpus=8,
        flags=FINETUNE_LARGE,
        source=BEIT_DOCS,
        published=IMAGENET_TOP1["large"][1600][224],
        note=f"Unverified: the settings are BEiT's for its own ViT-L, the mean and std ConMIM's. {DEEPSPEED_NOTE}",
    ),
    Recipe(
        name="conmim_large_finetune_384",
        stage="finetune",
        model="beit_large_patch16_384",
        gpus=8,
        flags=FINETUNE_LARGE_384,
        source=f"{PAPER}; {BEIT_DOCS}",
        published=IMAGENET_TOP1["large"][1600][384],
        note=NOTE_384,
    ),
    *_mae("base", 16, 83.6, FINETUNE_MAE_BASE),
    *_mae("large", 16, 85.9, FINETUNE_MAE_LARGE),
    *_mae("huge", 14, 86.9, FINETUNE_MAE_HUGE),
    *_semmae("base", 16, 83.352),
    *_semmae("base_patch8", 8, 84.444),
    *(_own(f"mae_{size}", "pretrain", f"mae_{size}", PRETRAIN_MAE_TINY) for size in ("tiny", "small")),
    *(_own(f"semmae_{size}", "pretrain", f"semmae_{size}", PRETRAIN_SEMMAE_TINY) for size in ("tiny", "small")),
    *_semaim("semaim", "semaim", "base", 84.1, PRETRAIN_SEMAIM),
    *_semaim("semaim", "semaim", "large", 85.8, PRETRAIN_SEMAIM, SEMAIM_LARGE_NOTE),
    *_semaim("semaim_clip", "semaim_clip", "base", 85.3, PRETRAIN_SEMAIM_CLIP, SEMAIM_CLIP_NOTE),
    *_semaim("semaim_clip", "semaim_clip", "large", 86.5, PRETRAIN_SEMAIM_CLIP, SEMAIM_CLIP_NOTE),
    Recipe("saim_base_pretrain", "pretrain", "saim_base_patch16_224", 32, PRETRAIN_SAIM, SAIM_README, 83.9),
    Recipe("saim_base_finetune", "finetune", "vit_base_patch16_224", 32, FINETUNE_SAIM, SAIM_README, 83.9),
    Recipe("igpt_base_pretrain", "pretrain", "igpt_base_patch16_224", 32, PRETRAIN_IGPT, SAIM_README, 82.7, IGPT_NOTE),
    _linear("mae_base", 32, LINEAR_MAE, MAE_README, 67.8, SPLIT_NOTE.format(16384)),
    _linear("mae_large", 32, LINEAR_MAE_LARGE, MAE_README, 76.0, SPLIT_NOTE.format(16384)),
    _linear("semaim_base", 8, LINEAR_SEMAIM, SEMAIM_README),
    _linear("saim_base", 32, LINEAR_SAIM, SAIM_README, 62.5),
    Recipe("semaim_large_knn", "knn", "vit_large_patch16_224", 8, KNN_SEMAIM, SEMAIM_README, note=KNN_NOTE),
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
        (BEIT_LARGE_NOTE, "Unverified: mean and std; the figure is from ConMIM's table 1."),
    ),
    *_semantic(
        "semanticmim_beit",
        "beit_base_patch16_224_abs_pos",
        PRETRAIN_SEMANTIC_BEIT,
        FINETUNE_SEMANTIC_BEIT,
        None,
        CLS_NOTE,
        MEAN_STD_NOTE,
        MEAN_STD_NOTE,
    ),
    Recipe(
        "beit_abs_pos_base_pretrain",
        "pretrain",
        "semanticmim_beit_base_patch16_224",
        8,
        PRETRAIN_BEIT_ABS_POS,
        SEMANTICMIM,
        note=ABS_POS_NOTE,
    ),
    *_semantic(
        "maskfeat", "vit_base_patch16_224", PRETRAIN_MASKFEAT, FINETUNE_MASKFEAT, 83.4, MASKFEAT_NOTE, JITTER_NOTE, ""
    ),
    *_semantic(
        "semanticmim_maskfeat",
        "vit_base_patch16_224",
        PRETRAIN_SEMANTIC_MASKFEAT,
        FINETUNE_MASKFEAT,
        None,
        "The published warm-up starts from a millionth of the peak, here from 0.",
        JITTER_NOTE,
        "",
    ),
    *(
        _own(name.format(size), "pretrain", name.format(size), flags, suffix)
        for name, flags, suffix in (
            ("beit_{}", PRETRAIN_BEIT_TINY, "_8k_vocab"),
            ("semanticmim_beit_{}", PRETRAIN_SEMANTIC_BEIT_TINY, ""),
            ("maskfeat_{}", PRETRAIN_MASKFEAT_TINY, ""),
            ("semanticmim_maskfeat_{}", PRETRAIN_SEMANTIC_MASKFEAT_TINY, ""),
        )
        for size in ("tiny", "small")
    ),
    *(_own(f"semaim_{size}", "pretrain", f"semaim_{size}", PRETRAIN_SEMAIM_TINY) for size in ("tiny", "small")),
    *_mim_vit("a2mim", "small", 200, 82.1, A2MIM_README),
    *_mim_vit("a2mim", "base", 100, 84.2, A2MIM_README),
    *_mim_vit("a2mim", "large", 150, 86.1, A2MIM_README),
    *_mim_vit("simmim", "small", 100, 81.7, OPENMIXUP),
    *_mim_vit("simmim", "base", 100, 83.8, OPENMIXUP),
    *_mim_vit("simmim", "large", 100, 85.6, OPENMIXUP),
    *(
        _mim(f"a2mim_resnet{depth}", f"a2mim_resnet{depth}", published, PRETRAIN_A2MIM_RESNET, A2MIM_README)
        for depth, published in ((50, 80.4), (101, 81.9), (152, 82.5), (200, 83.0))
    ),
    _mim("a2mim_resnet50_100", "a2mim_resnet50", 78.8, PRETRAIN_A2MIM_RESNET_100, A2MIM_README),
    _mim("a2mim_resnet50_in100", "a2mim_resnet50", 89.32, PRETRAIN_A2MIM_RESNET_IN100, A2MIM_README, MIM_IN100_NOTE),
    _mim("a2mim_resnet50_l3_100", "a2mim_resnet50", None, PRETRAIN_A2MIM_RESNET_L3, A2MIM_README),
    _mim("a2mim_resnet50_l0_100", "a2mim_resnet50", None, PRETRAIN_A2MIM_RESNET_L0, A2MIM_README),
    _mim("a2mim_resnet50_cifar100", "a2mim_resnet50", None, PRETRAIN_A2MIM_RESNET_CIFAR, A2MIM_README, MIM_CIFAR_NOTE),
    _mim(
        "a2mim_vit_small_cifar100",
        "a2mim_vit_small_patch16_224",
        None,
        PRETRAIN_A2MIM_VIT_CIFAR,
        A2MIM_README,
        MIM_CIFAR_NOTE,
    ),
    *(
        _mim(f"a2mim_convnext_{size}", f"a2mim_convnext_{size}", published, PRETRAIN_A2MIM_CNN, A2MIM_README)
        for size, published in (("small", 83.7), ("base", 84.1), ("tiny", None))
    ),
    _mim(
        "a2mim_deit_small_in100",
        "a2mim_deit_small_patch16_224",
        87.24,
        PRETRAIN_A2MIM_DEIT,
        A2MIM_README,
        MIM_IN100_NOTE,
    ),
    _mim(
        "a2mim_deit_small_l8_in100",
        "a2mim_deit_small_patch16_224",
        None,
        PRETRAIN_A2MIM_DEIT_DEEP,
        A2MIM_README,
        MIM_OTHER_IN100_NOTE,
    ),
    *(
        _mim(f"simmim_resnet{depth}", f"simmim_resnet{depth}", published, PRETRAIN_SIMMIM_RESNET, OPENMIXUP)
        for depth, published in ((50, 79.9), (101, 81.3), (152, 81.9), (200, 82.2))
    ),
    *(
        _mim(f"simmim_convnext_{size}", f"simmim_convnext_{size}", published, PRETRAIN_MIM, OPENMIXUP)
        for size, published in (("small", 83.2), ("base", 83.6), ("tiny", None))
    ),
    _mim("simmim_swin_base", "simmim_swin_base", 84.0, PRETRAIN_SIMMIM_SWIN, OPENMIXUP, MIM_SWIN_NOTE),
    _mim("simmim_swin_base_100", "simmim_swin_base", 82.9, PRETRAIN_SIMMIM_SWIN_100, OPENMIXUP, MIM_SWIN_NOTE),
    _mim(
        "simmim_resnet50_in100",
        "simmim_resnet50",
        None,
        PRETRAIN_SIMMIM_IN100 | {"sync_bn": True},
        A2MIM_README,
        MIM_OTHER_IN100_NOTE,
    ),
    _mim("simmim_swin_tiny_in100", "simmim_swin_tiny", None, PRETRAIN_SIMMIM_IN100, A2MIM_README, MIM_SWIN_IN100_NOTE),
    *(
        _tuned(f"a2mim_{name}_finetune_a3", model, published, FINETUNE_A3, A2MIM_README)
        for name, model, published in (
            ("resnet50", "resnet50", 78.9),
            ("resnet50_100", "resnet50", 78.8),
            ("resnet101", "resnet101", 80.3),
            ("resnet152", "resnet152", 80.9),
        )
    ),
    _tuned("a2mim_resnet50_finetune_a2", "resnet50", 80.4, FINETUNE_A2_AVERAGED, A2MIM_README),
    _tuned("a2mim_resnet101_finetune_a2", "resnet101", 81.9, FINETUNE_A2, A2MIM_README),
    _tuned("a2mim_resnet152_finetune_a2", "resnet152", 82.5, FINETUNE_A2, A2MIM_README),
    _tuned("a2mim_resnet200_finetune_a2", "resnet200", 83.0, FINETUNE_A2, A2MIM_README, drop_path=0.2),
    _tuned("simmim_resnet50_finetune_a2", "resnet50", 79.9, FINETUNE_A2_AVERAGED, OPENMIXUP),
    _tuned("simmim_resnet101_finetune_a2", "resnet101", 81.3, FINETUNE_A2, OPENMIXUP, drop_path=0.1),
    _tuned("simmim_resnet152_finetune_a2", "resnet152", 81.9, FINETUNE_A2, OPENMIXUP, drop_path=0.15),
    _tuned("simmim_resnet200_finetune_a2", "resnet200", 82.2, FINETUNE_A2, OPENMIXUP, drop_path=0.2),
    _tuned("a2mim_convnext_tiny_finetune", "convnext_tiny", None, FINETUNE_CONVNEXT_TINY, A2MIM_README),
    _tuned("a2mim_convnext_tiny_finetune_a3", "convnext_tiny", None, FINETUNE_CONVNEXT_TINY_A3, A2MIM_README),
    _tuned("simmim_convnext_tiny_finetune", "convnext_tiny", None, FINETUNE_CONVNEXT_TINY, OPENMIXUP),
    _tuned("a2mim_resnet50_finetune_swin", "resnet50", None, FINETUNE_RESNET_AS_SWIN, A2MIM_README),
    _tuned("a2mim_resnet50_finetune_plain", "resnet50", None, FINETUNE_RESNET_PLAIN, A2MIM_README),
    _tuned("a2mim_convnext_small_finetune", "convnext_small", 83.7, FINETUNE_CONVNEXT, A2MIM_README, drop_path=0.4),
    _tuned("a2mim_convnext_base_finetune", "convnext_base", 84.1, FINETUNE_CONVNEXT, A2MIM_README, drop_path=0.5),
    _tuned("simmim_convnext_small_finetune", "convnext_small", 83.2, FINETUNE_CONVNEXT, OPENMIXUP, drop_path=0.4),
    _tuned("simmim_convnext_base_finetune", "convnext_base", 83.6, FINETUNE_CONVNEXT, OPENMIXUP, drop_path=0.5),
    Recipe("simmim_swin_base_finetune", "finetune", "swin_base", 8, FINETUNE_SWIN, OPENMIXUP, 84.0, MIM_SWIN_800_NOTE),
    _tuned("simmim_swin_base_100_finetune", "swin_base", 82.9, FINETUNE_SWIN, OPENMIXUP, input_size=192),
    _tuned("simmim_swin_base_100_finetune_224", "swin_base", 83.5, FINETUNE_SWIN, OPENMIXUP),
    Recipe(
        "a2mim_deit_small_in100_finetune",
        "finetune",
        "mim_deit_small_patch16_224",
        8,
        FINETUNE_MIM_DEIT,
        A2MIM_README,
        87.24,
        MIM_DEIT_NOTE,
    ),
    Recipe(
        "a2mim_resnet50_linear",
        "linear",
        "resnet50",
        8,
        LINEAR_A2MIM_CNN,
        A2MIM_README,
        note=LINEAR_A2MIM_NOTE.format(256, ""),
    ),
    Recipe(
        "a2mim_vit_small_linear",
        "linear",
        "mim_vit_small_patch16_224",
        8,
        LINEAR_A2MIM_VIT,
        A2MIM_README,
        note=LINEAR_A2MIM_NOTE.format(1024, STEPS_NOTE),
    ),
    *(
        _own(f"{method}_vit_tiny", "pretrain", f"{method}_vit_tiny", PRETRAIN_MIM_TINY)
        for method in ("a2mim", "simmim")
    ),
    _own("mim_vit_tiny", "finetune", "mim_vit_tiny", FINETUNE_MIM_TINY),
    *(_own(f"mae_{size}", "finetune", f"vit_{size}", FINETUNE_MAE_TINY) for size in ("tiny", "small")),
)

# of several recipes for a model and stage, which differ in their values only, the first; scripts pass all of them
_BY_MODEL = {(recipe.model, recipe.stage): recipe for recipe in reversed(_RECIPES)}

# for models without a recipe of their own: the first whose name theirs begins with
_FAMILIES = tuple(
    Recipe(f"{family}*_{stage}", stage, f"{family}*", 8, flags, OURS)
    for stage, family, flags in (
        ("pretrain", "a2mim_resnet", PRETRAIN_A2MIM_RESNET),
        ("pretrain", "a2mim_swin_", PRETRAIN_SIMMIM_SWIN),
        ("pretrain", "a2mim_", PRETRAIN_A2MIM_CNN),
        ("pretrain", "simmim_resnet", PRETRAIN_SIMMIM_RESNET),
        ("pretrain", "simmim_swin_", PRETRAIN_SIMMIM_SWIN),
        ("pretrain", "simmim_deit_", PRETRAIN_MIM_VIT),
        ("pretrain", "simmim_", PRETRAIN_MIM),
        ("finetune", "swin_", FINETUNE_SWIN),
    )
)


def all_recipes() -> tuple[Recipe, ...]:
    """Every recipe, the published ones and our tiny ones."""
    return _RECIPES


def recipe_for(model: str, stage: str) -> Recipe | None:
    """The recipe whose flags are the defaults of `model` in `stage` (one of STAGES); None for a model without one.

    Names of SimMIM and A2MIM go on with any of timm's: a network without a recipe has that of its relatives.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    related = (recipe for recipe in _FAMILIES if recipe.stage == stage and model.startswith(recipe.model[:-1]))
    return _BY_MODEL.get((model, stage)) or next(related, None)
