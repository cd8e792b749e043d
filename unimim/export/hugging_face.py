"""Folders that Hugging Face's transformers, or timm where no class of these fits, load as they are.

Names in model.safetensors are those that transformers has always written to files; releases that
name their modules otherwise translate them.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from unimim.checkpoint.names import StateDict, to_timm
from unimim.data.views import SMALL_IMAGE, EvalTransform
from unimim.export.source import Source
from unimim.export.upstream import class_tokens, is_beit_form, is_mae_form, renamed
from unimim.files import write_text

EPS = 1e-6  # of the norms of every ViT and ConvNeXt here

_VIT_NAMES = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^rel_pos_bias\.", "encoder.relative_position_bias."), (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
    (r"\.gamma_(\d)$", r".lambda_\1"), (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."), (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.relative_position_bias_table",
     ".attention.attention.relative_position_bias.relative_position_bias_table"),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."), (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", "pooler.layernorm."),
)  # fmt: skip
_RESNET_NAMES = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    (r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."), (r"^fc\.", "head."),
)  # fmt: skip
_CONVNEXT_NAMES = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."), (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d+)\.blocks\.", r"encoder.stages.\1.layers."), (r"\.conv_dw\.", ".dwconv."),
    (r"(\.layers\.\d+)\.norm\.", r"\1.layernorm."), (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.gamma$", ".layer_scale_parameter"), (r"^head\.norm\.", "layernorm."),
    (r"^head\.fc\.", "head."),
)  # fmt: skip
_SWIN_NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"encoder.layers.{int(m[1]) - 1}.downsample."),
    (r"^layers\.", "encoder.layers."), (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."), (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.(query|key|value|relative_position_bias_table)", r".attention.self.\1"),
    (r"^norm\.", "layernorm."), (r"^head\.fc\.", "head."),
)  # fmt: skip


class Fit(NamedTuple):
    """A class of transformers that computes what a network does, its config and its weights."""

    architecture: str
    config: dict[str, Any]
    state: StateDict


def fit(source: Source) -> Fit | None:
    """Return the class of transformers that fits; None: timm has to load it.

    Raises:
        ValueError: the whole pre-training network is asked for, and transformers has none.
    """
    if source.full and source.is_method:
        return pretraining_fit(source)
    backbone = source.backbone
    if source.is_vit:
        return _vit_fit(source)
    options = set(source.timm_arguments()) - {"model_name", "num_classes"}
    height, width = source.image_size
    if isinstance(backbone, ResNet) and options <= {"channels"}:
        return _resnet_fit(source, backbone)
    if isinstance(backbone, ConvNeXt) and options <= {"dims", "depths"}:
        return _convnext_fit(source, backbone)
    swin_options = {"img_size", "window_size", "embed_dim", "depths", "num_heads"}
    if isinstance(backbone, SwinTransformer) and options <= swin_options and height == width:
        return _swin_fit(source, backbone)
    return None


def _finished(
    source: Source, classes: tuple[str, str, str], config: dict[str, Any], named: StateDict
) -> Fit:
    """Return the fit to the model or, with a head, to the classifier; `classes` are these and the
    prefix of the model inside the classifier."""
    model, classifier, prefix = classes
    if not source.num_classes:
        return Fit(model, config, named)
    labels = {str(index): f"LABEL_{index}" for index in range(source.num_classes)}
    config = config | {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    head = "classifier.1." if prefix == "resnet" else "classifier."
    state = {}
    for name, value in named.items():
        is_head = name.startswith("head.")
        state[name.replace("head.", head) if is_head else f"{prefix}.{name}"] = value
    return Fit(classifier, config, state)


# --------------------------------------------------------------------------------------------------
# ViTs


def split_projections(state: StateDict) -> StateDict:
    """Return the state with queries, keys and values apart, and BEiT's biases at their layers."""
    split = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attn\.)qkv\.(weight|bias)", name)
        if found:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                split[f"{found[1]}{part}.{found[2]}"] = rows
        else:
            name = name.replace(".attn.q_bias", ".attn.query.bias")
            split[name.replace(".attn.v_bias", ".attn.value.bias")] = value
    return split


def _is_square(source: Source) -> bool:
    height, width = source.image_size
    rows, columns = source.backbone.patch_embed.patch_size
    return height == width and rows == columns


def vit_config(source: Source, model_type: str) -> dict[str, Any]:
    vit = source.backbone
    return {
        "model_type": model_type,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.blocks[0].attn.num_heads,
        "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
        "layer_norm_eps": EPS,
        "image_size": source.image_size[0],
        "patch_size": vit.patch_embed.patch_size[0],
        "num_channels": vit.patch_embed.proj.in_channels,
    }


def beit_config(source: Source) -> dict[str, Any]:
    vit = source.backbone
    block = vit.blocks[0]
    return vit_config(source, "beit") | {
        "use_absolute_position_embeddings": vit.pos_embed is not None,
        "use_relative_position_bias": block.attn.relative_position_bias_table is not None,
        "use_shared_relative_position_bias": vit.rel_pos_bias is not None,
        "layer_scale_init_value": 0.1 if block.gamma_1 is not None else 0,
        "use_mean_pooling": isinstance(vit.fc_norm, nn.LayerNorm),
        "drop_path_rate": 0.0,
    }


def _vit_fit(source: Source) -> Fit | None:
    vit = source.backbone
    if class_tokens(source) != 1 or not _is_square(source):
        return None
    named = renamed(split_projections(source.state()), _VIT_NAMES)
    if is_mae_form(source) and isinstance(vit.norm, nn.LayerNorm):
        classes = ("ViTModel", "ViTForImageClassification", "vit")
        return _finished(source, classes, vit_config(source, "vit"), named)
    if is_beit_form(source) and vit.blocks[0].attn.q_bias is not None:
        classes = ("BeitModel", "BeitForImageClassification", "beit")
        return _finished(source, classes, beit_config(source), named)
    return None


def pretraining_fit(source: Source) -> Fit:
    """Return the fit of a whole pre-training network: MAE's or BEiT's.

    Raises:
        ValueError: it is another's.
    """
    network = source.network
    if hasattr(network, "decoder_embed") and is_mae_form(source) and _is_square(source):
        return _mae_fit(source)
    is_beit = hasattr(network, "lm_head") and not hasattr(network, "mask_blocks")
    if is_beit and is_beit_form(source) and _is_square(source):
        return _masked_beit_fit(source)
    raise ValueError(
        f"--to hf --full holds MAE's or BEiT's pre-training network of square images, and "
        f"{source.args.model} is another; leave --full out for the encoder"
    )


def _mae_fit(source: Source) -> Fit:
    mae = source.network
    named: StateDict = {}
    own = ("decoder_", "mask_token")
    state = split_projections(source.whole())
    encoder = {name: value for name, value in state.items() if not name.startswith(own)}
    for name, value in renamed(encoder, _VIT_NAMES).items():
        named[f"vit.{name}"] = value
    for name, value in state.items():
        if name.startswith("decoder_blocks."):
            block = renamed({name.removeprefix("decoder_"): value}, _VIT_NAMES)
            inner = next(iter(block)).removeprefix("encoder.layer.")
            named[f"decoder.decoder_encoder.layer.{inner}"] = value
        elif name.startswith(own):
            named[f"decoder.{name}"] = value
    config = vit_config(source, "vit_mae") | {
        "decoder_num_attention_heads": mae.decoder_blocks[0].attn.num_heads,
        "decoder_hidden_size": mae.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(mae.decoder_blocks),
        "decoder_intermediate_size": mae.decoder_blocks[0].mlp.fc1.out_features,
        "mask_ratio": mae.mask_ratio,
        "norm_pix_loss": mae.target.norm_pix_loss,
    }
    return Fit("ViTMAEForPreTraining", config, named)


def _masked_beit_fit(source: Source) -> Fit:
    named = renamed(split_projections(source.whole()), _VIT_NAMES)
    outside = ("lm_head.", "layernorm.")  # this class has the last norm outside of its encoder
    state = {n if n.startswith(outside) else f"beit.{n}": v for n, v in named.items()}
    config = beit_config(source) | {
        "use_mask_token": True,
        "use_mean_pooling": True,
        "vocab_size": source.network.lm_head.out_features,
    }
    return Fit("BeitForMaskedImageModeling", config, state)


# --------------------------------------------------------------------------------------------------
# Other networks


def _resnet_fit(source: Source, resnet: ResNet) -> Fit:
    stages = [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
    is_basic = isinstance(resnet.layer1[0], BasicBlock)
    config = {
        "model_type": "resnet",
        "embedding_size": resnet.conv1.out_channels,
        "hidden_sizes": [info["num_chs"] for info in resnet.feature_info[1:]],
        "depths": [len(stage) for stage in stages],
        "layer_type": "basic" if is_basic else "bottleneck",
    }
    named = renamed(source.state(), _RESNET_NAMES)
    return _finished(
        source, ("ResNetModel", "ResNetForImageClassification", "resnet"), config, named
    )


def _convnext_fit(source: Source, convnext: ConvNeXt) -> Fit:
    config = {
        "model_type": "convnext",
        "hidden_sizes": [info["num_chs"] for info in convnext.feature_info],
        "depths": [len(stage.blocks) for stage in convnext.stages],
        "patch_size": convnext.stem[0].kernel_size[0],
        "image_size": source.image_size[0],
        "layer_norm_eps": EPS,
    }
    named = renamed(source.state(), _CONVNEXT_NAMES)
    classes = ("ConvNextModel", "ConvNextForImageClassification", "convnext")
    return _finished(source, classes, config, named)


def _swin_fit(source: Source, swin: SwinTransformer) -> Fit:
    first = swin.layers[0].blocks[0]
    config = {
        "model_type": "swin",
        "image_size": source.image_size[0],
        "patch_size": swin.patch_embed.patch_size[0],
        "embed_dim": swin.patch_embed.proj.out_channels,
        "depths": [len(layer.blocks) for layer in swin.layers],
        "num_heads": [layer.blocks[0].attn.num_heads for layer in swin.layers],
        "window_size": swin.timm_arguments.get("window_size", max(first.window_size)),
        "drop_path_rate": 0.0,
        "layer_norm_eps": first.norm1.eps,
    }
    named = renamed(split_projections(source.state()), _SWIN_NAMES)
    return _finished(source, ("SwinModel", "SwinForImageClassification", "swin"), config, named)


# --------------------------------------------------------------------------------------------------
# Folders


def write_weights(folder: Path, state: StateDict) -> None:
    """Write model.safetensors; clones, because tensors that share memory are refused."""
    tensors = {name: value.detach().contiguous().clone() for name, value in state.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def crop_pct(source: Source) -> float:
    """Return the part of a side that evaluation keeps of an image."""
    return EvalTransform(source.image_size, None).crop_pct


def preprocessor(source: Source) -> dict[str, Any]:
    """Return preprocessor_config.json: the evaluation images of this repository."""
    mean, std = source.mean_std
    height, width = source.image_size
    is_small = max(height, width) <= SMALL_IMAGE  # such images are not cropped
    size: dict[str, int] = {"height": height, "width": width}
    if not is_small:
        size = {"shortest_edge": int(min(height, width) / crop_pct(source))}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": not is_small,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def timm_model(source: Source) -> nn.Module:
    """Return timm's model of the encoder or classifier, with its weights, in eval mode."""
    model = timm.create_model(**source.timm_arguments())
    model.load_state_dict(timm_state(source))
    return model.eval()


def timm_state(source: Source) -> StateDict:
    """Return the weights under timm's names."""
    if source.full and source.is_method:
        raise ValueError(
            "timm has encoders and classifiers, no pre-training networks; leave --full out"
        )
    return to_timm(source.state())


def write_folder(source: Source, folder: Path, card: str) -> str:
    """Write the folder and return the class that loads it: of transformers, or "timm"."""
    found = fit(source)
    if found is None:
        write_timm_folder(source, folder)
        architecture = "timm"
    else:
        config = {"architectures": [found.architecture], "torch_dtype": "float32"} | found.config
        write_weights(folder, found.state)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        architecture = found.architecture
    described = json.dumps(preprocessor(source), indent=2)
    write_text(folder / "preprocessor_config.json", described + "\n")
    write_text(folder / "README.md", card)
    return architecture


def write_timm_folder(source: Source, folder: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    arguments = source.timm_arguments()
    model = timm_model(source)
    mean, std = source.mean_std
    height, width = source.image_size
    name = arguments.pop("model_name")
    write_weights(folder, timm_state(source))
    config = {
        "architecture": name,
        "num_classes": source.num_classes,
        "num_features": model.num_features,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": bool(source.is_vit or "img_size" in arguments),
            "interpolation": "bicubic",
            "crop_pct": crop_pct(source),
            "mean": list(mean),
            "std": list(std),
            "num_classes": source.num_classes,
            "first_conv": model.pretrained_cfg.get("first_conv"),
            "classifier": model.pretrained_cfg.get("classifier"),
        },
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_folder(folder: Path, architecture: str) -> nn.Module:
    """Return the model of a folder as its library loads it; ValueError if that is not installed."""
    if architecture == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    try:
        import transformers
    except ImportError as error:
        raise ValueError("--to hf is checked by transformers: pip install transformers") from error
    return getattr(transformers, architecture).from_pretrained(folder).eval()
