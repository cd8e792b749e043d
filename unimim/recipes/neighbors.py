"""Neighbors of the published methods in the space mask x form x target (docs/methods/space.md).

Each is ours, after the paper that it names, and is not checked against that paper's code; settings
are those of the published recipe of the same encoder form. No numbers are known of them.
"""

from collections.abc import Mapping
from typing import Any

from unimim.recipes.beit import PRETRAIN_BEIT
from unimim.recipes.mae import PRETRAIN_MAE
from unimim.recipes.mim import PRETRAIN_MIM, PRETRAIN_SIMMIM_RESNET
from unimim.recipes.recipe import OURS, Recipe

NOTE = "Ours, after {paper}; not checked against its code. {what}"
TEACHER = {"target_model": ("TARGET_MODEL", "vit_base_patch16_clip_224.openai")}
CLUSTERS = {
    "discrete_vae_weight_path": ("TOKENIZER", "output/tokenizer_clusters/tokenizer.safetensors")
}


def _neighbor(
    name: str,
    model: str,
    method: str,
    network: str,
    flags: Mapping[str, Any],
    paper: str,
    what: str,
    files: Mapping[str, tuple[str, str]] | None = None,
    gpus: int = 8,
) -> Recipe:
    """Return the recipe of a neighbor, after a paper, and what differs from it."""
    return Recipe(
        name=f"{name}_pretrain", stage="pretrain", model=model, gpus=gpus, flags=flags, source=OURS,
        note=NOTE.format(paper=paper, what=what), method=method, network=network,
        files=files or {},
    )  # fmt: skip


MASKFEAT = "MaskFeat (arXiv 2112.09133)"
HOG_NOTE = (
    "The mask token goes in between stages, as SimMIM's, and the histograms are those of squares "
    "as large as the stride there."
)
RECIPES = (
    _neighbor(
        "maskfeat_convnext_tiny", "simmim_convnext_tiny", "MaskFeat on CNNs", "ConvNeXt-T",
        PRETRAIN_MIM | {"target": "hog", "model_kwargs": ("mask_layer=2",)}, MASKFEAT, HOG_NOTE,
    ),
    _neighbor(
        "maskfeat_resnet50", "simmim_resnet50", "MaskFeat on CNNs", "ResNet-50",
        PRETRAIN_SIMMIM_RESNET | {"target": "hog", "model_kwargs": ("mask_layer=3",)}, MASKFEAT,
        HOG_NOTE,
    ),
    _neighbor(
        "mae_clip_base", "mae_base_patch16_224", "MAE on CLIP", "ViT-B/16",
        PRETRAIN_MAE | {"target": "clip", "target_mean_std": "own"},
        "MILAN (arXiv 2208.06049) and EVA (arXiv 2211.07636)",
        "MILAN's prompting decoder is not here, nor is EVA's encoder, which sees mask tokens; "
        "--mask_type attention_high with --mask_teacher comes near MILAN's masks.",
        TEACHER, gpus=64,
    ),
    _neighbor(
        "beit_clusters_base", "beit_base_patch16_224_8k_vocab", "BEiT on clusters", "ViT-B/16",
        PRETRAIN_BEIT, "BEiT v2 (arXiv 2208.06366)",
        "The visual tokens are the nearest of centers that k-means finds once in the features of a "
        "frozen network (run_tokenizer.py --kind kmeans --kmeans_teacher), not a quantizer that is "
        "trained to reconstruct them; there is no patch aggregation.",
        CLUSTERS, gpus=16,
    ),
    _neighbor(
        "beit_ema_base", "beit_base_patch16_224_8k_vocab", "BEiT on its ema", "ViT-B/16",
        PRETRAIN_BEIT | {"target": "ema", "feature_loss": "smooth_l1", "t_momentum": 0.9998},
        "data2vec (arXiv 2202.03555)",
        "The target is the last block's output in layer norm, not the mean of several blocks.",
        gpus=16,
    ),
)  # fmt: skip
