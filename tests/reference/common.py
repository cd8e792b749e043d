"""What the adapters of several methods share: weights, gradients, published options."""

import torch
from torch import Tensor, nn

from modeling_finetune import VisionTransformer
from unimim.data.views import MEAN_STD


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Published weights must fit by name and shape; the index buffers of BEiT are computed here,
    not loaded."""
    model.load_state_dict(
        {k: v for k, v in weights.items() if "relative_position_index" not in k}, strict=True
    )


def set_norms(model: nn.Module, config: dict) -> None:
    """The published constants of norms, which have one value each here."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.get("norm_eps", config.get("ln_eps", 1e-6))
        elif isinstance(module, nn.BatchNorm1d):
            module.eps, module.momentum = config.get("bn_eps", 1e-5), config.get("bn_momentum", 0.1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter: zeros of one that the loss does not come from or that is not trained."""
    found = {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
    }
    return {f"grad/{name}": grad for name, grad in found.items()}


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio from which int() makes `hidden` of `width` again: that of the quotient is one too
    small at times."""
    return (hidden + 0.5) / width


def position_options(config: dict) -> dict:
    """The published switches of a ViT's positions in this repository's words."""
    tables = bool(config.get("use_shared_rel_pos_bias")), bool(config.get("use_rel_pos_bias"))
    kinds = {
        (False, False): "none",
        (True, False): "shared",
        (False, True): "per_block",
        (True, True): "both",
    }
    return {
        "pos_embed": "learned"
        if config.get("use_abs_pos_emb", config.get("use_abs_pos_embed"))
        else "none",
        "rel_pos_bias": kinds[tables],
    }


def vit_options(config: dict) -> dict:
    names = (
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "init_values",
        "qkv_bias",
    )
    config = config | {"qkv_bias": bool(config.get("qkv_bias", True))}
    size = config["img_size"]
    size = size if isinstance(size, int) else tuple(size)
    return {
        "input_size": size,
        **{k: config[k] for k in names if k in config},
        **position_options(config),
    }


def normalized(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] as the models see it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD["imagenet"])
    return (images.float() / 255 - mean) / std


def mae_classifier(config: dict, pos_embed: str = "sincos_trainable") -> VisionTransformer:
    options = {
        key: value
        for key, value in vit_options(config).items()
        if key not in position_options(config)
    }
    pool = "avg" if config["global_pool"] else "token"
    return VisionTransformer(
        **options,
        num_classes=config["num_classes"],
        k_bias=True,
        pos_embed=pos_embed,
        global_pool=pool,
    )
