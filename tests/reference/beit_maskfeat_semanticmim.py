"""Adapters of the cases of BEiT, MaskFeat and SemanticMIM, and of their targets."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers import block_outputs
from torch import Tensor, nn

from modeling_finetune import VisionTransformer
from modeling_pretrain import BEiT, MaskFeat, SemanticBEiT, SemanticMIM
from modeling_targets import HOG, VisualTokenizer, dalle_pixels, load_tokenizer
from reference.case import Case
from reference.common import gradients, load_weights, position_options, set_norms, vit_options
from unimim.checkpoint.loading import class_tokens, load_pretrained
from unimim.checkpoint.names import from_mmpretrain
from unimim.checkpoint.resizing import interpolate_pos_embed
from unimim.evaluation.attention import class_maps, patch_maps
from unimim.sizes import to_pair


def hog(case: Case) -> dict[str, Tensor]:
    config, images = case.config, case.inputs()["image"]
    grid = to_pair(config["grid"])
    patch = tuple(side // cells for side, cells in zip(images.shape[-2:], grid, strict=True))
    target = HOG(grid, patch, config["nbins"], config["pool"], config["gaussian_window"])
    return {"hog_map": target.histograms(images), "target": target(images)}


def tokenizer_of(weights: dict[str, Tensor], folder: Path) -> VisualTokenizer:
    """By the file that a user would have."""
    torch.save({"state_dict": weights}, folder / "encoder.pth")
    return load_tokenizer(str(folder / "encoder.pth"))


def dalle_encoder(case: Case) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(case.inputs("weights/"), Path(folder))
    pictures = case.inputs()["image_uint8"]
    mapped = dalle_pixels(pictures)
    features = tokenizer.encoder(mapped)
    logits = tokenizer.encoder.logits(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return {"mapped": mapped, "logits": logits, "ids": tokenizer(pictures)}


def beit_pretrain(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    model = BEiT(
        **vit_options(config), in_chans=config.get("in_chans", 3), vocab_size=config["vocab_size"]
    )
    set_norms(model, config)
    load_weights(model, case.inputs("weights/"))
    mask = inputs["bool_masked_pos"].bool()
    out = model({"image": inputs["image"], "mask": mask, "target_ids": inputs["target_ids"]})
    out["loss"].backward()
    tokens = model.encode_masked(inputs["image"], mask)
    return {
        **out,
        "tokens": tokens,
        "logits": logits_of(model, tokens[:, 1:][mask.flatten(1)]),
        **gradients(model),
    }


def logits_of(model: BEiT | SemanticBEiT, tokens: Tensor) -> Tensor:
    return F.linear(tokens, model.lm_head.weight, model.lm_head.bias)


def semanticmim_model(case: Case, form: type[SemanticMIM], **own) -> SemanticMIM:
    """The case's network with its weights, which come in OpenMMLab's names, for the image's
    size."""
    config, size = case.config, tuple(case.inputs()["image"].shape[-2:])
    options = {
        key: value
        for key, value in vit_options(config).items()
        if key not in position_options(config)
    }
    options |= {
        key: config[key]
        for key in ("num_cls_tokens", "use_bottleneck", "in_chans")
        if key in config
    }
    model = form(
        **options | {"input_size": size}, init_values=config["layer_scale_init_value"], **own
    )
    if not config.get("final_norm", True):
        model.norm = nn.Identity()
    set_norms(model, config)
    weights = {
        k: v for k, v in case.inputs("weights/").items() if not k.startswith("target_generator.")
    }
    native = from_mmpretrain(weights)
    if to_pair(options["input_size"]) != size:
        grid, extra = model.patch_embed.grid_size, model.num_prefix_tokens
        native["pos_embed"] = interpolate_pos_embed(native["pos_embed"], grid, extra)
    load_weights(model, native)
    return model


def semanticmim_outputs(model: SemanticMIM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step and what happens on its way; of the bottleneck's stream the class tokens first."""
    seen: dict[str, Tensor] = {}
    keep = {"stream_layer0": model.blocks[0], "mask_features": model.norm}
    keep |= {} if model.mask_blocks is None else {"mask_stream_layer0": model.mask_blocks[0]}
    for name, module in keep.items():
        module.register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: out, f"{name}_of": given[0]})
        )
    out = model(batch)
    out["loss"].backward()
    with torch.no_grad():  # a block that is the last computes no more than what is looked at
        seen["stream_layer0"] = model.blocks[0].forward(seen["stream_layer0_of"])
    if model.mask_blocks is not None:
        seen["stream_layer0"] = seen["stream_layer0"].roll(model.num_prefix_tokens, 1)
    return out | seen | published_gradients(model)


def published_gradients(model: SemanticMIM) -> dict[str, Tensor]:
    """Under OpenMMLab's names."""
    names = {
        "backbone.norm.": "backbone.ln1.", "mask_blocks.": "extra_layers.", "blocks.": "layers.",
        ".norm": ".ln", ".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1.",
        "patch_embed.proj.": "patch_embed.projection.",
    }  # fmt: skip
    heads = {"grad/lm_head.": "grad/head.cls_head.", "grad/hog_head.": "grad/neck.fc."}
    found = {}
    for name, value in gradients(model).items():
        head = next((head for head in heads if name.startswith(head)), None)
        theirs = (
            name.replace(head, heads[head]) if head else name.replace("grad/", "grad/backbone.")
        )
        for old, new in names.items():
            theirs = theirs.replace(old, new)
        if ".attn.qkv." in theirs:
            part = "_proj" if isinstance(model, SemanticBEiT) else ""
            width = len(value) // 3
            for short, own in zip(("q", "kv"), value.split((width, 2 * width)), strict=True):
                found[theirs.replace(".qkv.", f".{short}{part}.")] = own
        found[theirs] = value
    return found


def semanticmim_batch(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "image": inputs["image"],
        "mask": ~inputs["img_index"].bool(),
        "target_mask": inputs["mask_index"].bool(),
    }


def semanticmim_beit(case: Case) -> dict[str, Tensor]:
    inputs, config = case.inputs(), case.config
    model = semanticmim_model(case, SemanticBEiT, vocab_size=config["vocab_size"])
    batch = semanticmim_batch(inputs)
    computed = {}
    if "target_image" in inputs:
        with tempfile.TemporaryDirectory() as folder:
            model.target.tokenizer = tokenizer_of(case.inputs("weights/"), Path(folder))
        batch["image_second"] = inputs["target_image"]
        computed["target_ids"] = model.target.tokenizer(inputs["target_image"])
    else:
        batch["target_ids"] = inputs["target_ids"]
    computed |= semanticmim_outputs(model, batch)
    return computed | {"logits": logits_of(model, computed["mask_features"].flatten(0, 1))}


def semanticmim_maskfeat(case: Case) -> dict[str, Tensor]:
    names = ("hog_nbins", "hog_pool")
    own = {name: case.config[name] for name in names if name in case.config}
    model = semanticmim_model(case, MaskFeat, hog_window=case.config["hog_gaussian_window"], **own)
    batch = semanticmim_batch(case.inputs())
    computed = semanticmim_outputs(model, batch)
    predicted = model.patch_positions(batch)[1]
    target = model.target.of(batch, predicted)
    return computed | {"pred": model.hog_head(computed["mask_features"]), "target": target}


def semanticmim_attention(case: Case) -> dict[str, Tensor]:
    """The encoder of a published checkpoint in a classifier, as evaluation loads it, at the image's
    size."""
    config, images = case.config, case.inputs()["image"]
    weights = {"state_dict": case.inputs("weights/")}
    beit = config["form"] == "beit"
    model = VisionTransformer(
        **{
            key: config[key]
            for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans")
        },
        input_size=tuple(images.shape[-2:]),
        num_cls_tokens=class_tokens(weights) or 1,
        init_values=config["layer_scale_init_value"],
        k_bias=not beit,
        qkv_bias=config.get("qkv_bias", True),
        pos_embed="learned",
        num_classes=0,
    )
    model.norm = nn.LayerNorm(config["embed_dim"])
    set_norms(model, config)
    report = load_pretrained(model, weights, min_matched=1.0)
    if not config["final_norm"]:
        model.norm = nn.Identity()
    assert "fc_norm.weight" in report.loaded
    num_cls, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    layers = block_outputs(model, images)
    layers[-1] = model.norm(layers[-1])
    featmaps = [tokens[:, num_cls:].mT.unflatten(2, grid) for tokens in layers]
    computed = {
        f"featmap_layer{layer}": featmaps[layer] for layer in range(-len(featmaps), len(featmaps))
    }
    computed["avg_featmap"] = model.fc_norm(layers[-1][:, num_cls:].mean(1))
    computed["cls_token"] = model.fc_norm(layers[-1][:, :num_cls].mean(1))
    cells = config["token_indices"]
    for layer in config["layer_indices"]:
        attention = model.attention_maps(images, layer)
        computed |= {
            f"attn_layer{layer}": attention,
            f"vis_cls_layer{layer}": class_maps(attention[0], num_cls, grid),
            f"vis_patch_layer{layer}": patch_maps(attention[0], num_cls, grid, cells),
            f"vis_patch_reduced_layer{layer}": patch_maps(
                attention[0], num_cls, grid, cells, reduce_mean=True
            ),
        }
    return computed


# the folder of cases: its adapter
ADAPTERS = {
    "hog": hog,
    "dalle_encoder": dalle_encoder,
    "beit_pretrain": beit_pretrain,
    "semanticmim_beit": semanticmim_beit,
    "semanticmim_maskfeat": semanticmim_maskfeat,
    "semanticmim_attention": semanticmim_attention,
}
