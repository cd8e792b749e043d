"""Write a checkpoint's network as other projects and libraries read it, and compare its features.

    python scripts/tools/export.py CHECKPOINT --to TARGET OUT
    python scripts/tools/export.py CHECKPOINT --full --to TARGET OUT

The encoder is written (of ConMIM the teacher's), or with --full the whole network: the pre-training
network, or a classifier with its head. What was written is read again and computes features of
random images: the largest difference is printed, and above 1e-5 the exit status is 1. Further
flags describe the network of a file that has no flags of its run, e.g. --model
vit_base_patch16_224.
"""

import argparse
import copy
import importlib
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from masking_generator import num_visible
from modeling_backbones import family_of
from modeling_finetune import ActivatedLinear, VisionTransformer, take
from modeling_pretrain import put  # and registers the methods
from unimim.checkpoint.files import save_checkpoint, save_encoder
from unimim.checkpoint.loading import PUBLISHED_KEYS, load_pretrained
from unimim.checkpoint.runs import rebuild
from unimim.export import hugging_face, upstream
from unimim.export.model_card import write_card
from unimim.export.source import Encoder, Source, load_source
from unimim.files import write_atomically

TOLERANCE = 1e-5
OPSET = 20  # of ONNX


class Target(NamedTuple):
    """What --to names: write(source, out) writes it, compare(source, out) returns the largest
    difference of features.

    writes, full, check: the columns of the table in docs/export.md; `full` is what --full writes.
    """

    write: Callable[[Source, Path], Any]
    compare: Callable[[Source, Path], float]
    writes: str
    full: str
    check: str


def largest(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference; infinite for another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max())


@torch.no_grad()
def expected(source: Source, images: Tensor) -> Tensor:
    """Return the logits or features of this repository's network, in the images' precision."""
    return copy.deepcopy(source.computes()).to(images.dtype)(images)


@torch.no_grad()
def difference(source: Source, theirs: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference in double precision, where kernels' rounding plays no part."""
    images = source.images().double()
    module = theirs.double() if isinstance(theirs, nn.Module) else theirs
    return largest(expected(source, images), module(images))


# --------------------------------------------------------------------------------------------------
# Files of the published projects


def write_upstream(source: Source, out: Path) -> None:
    """Write the project's file, or files: the second's name has a suffix before the ending."""
    for suffix, contents in upstream.WRITERS[source.args.to](source).items():
        plain = {}
        for key, value in contents.items():
            is_state = isinstance(value, dict)
            plain[key] = {n: v.detach().clone() for n, v in value.items()} if is_state else value
        save_checkpoint(out.with_name(f"{out.stem}{suffix}{out.suffix}"), plain)


@torch.no_grad()
def compare_upstream(source: Source, out: Path) -> float:
    """Compare with a fresh network that loads the file as any published one."""
    network = fresh_network(source)
    found = load_pretrained(network, out, min_matched=0.0)
    lost = set(source.encoder()) & set(found.missing)
    assert not lost, f"{out} does not give {sorted(lost)}"
    is_classifier = source.full and not source.is_method
    module = network if is_classifier else Encoder(network)
    return difference(source, module.eval())


def fresh_network(source: Source) -> nn.Module:
    """Return a network with random weights that takes the written file's encoder or classifier."""
    if not source.is_method:
        return rebuild(source.path, source.args.flags, model_key=source.args.model_key)[0]
    if not source.is_vit:
        fresh = rebuild(source.path, source.args.flags, model_key=source.args.model_key)[0]
        return fresh.backbone
    vit = source.backbone
    block = vit.blocks[0]
    has_tables = block.attn.relative_position_bias_table is not None
    return VisionTransformer(
        input_size=vit.patch_embed.img_size, patch_size=vit.patch_embed.patch_size,
        embed_dim=vit.embed_dim, depth=len(vit.blocks), num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim, num_classes=0, global_pool="token",
        num_cls_tokens=vit.num_prefix_tokens, k_bias=block.attn.q_bias is None,
        init_values=None if block.gamma_1 is None else 0.1,
        pos_embed="none" if vit.pos_embed is None else "learned",
        rel_pos_bias="per_block" if has_tables or vit.rel_pos_bias is not None else "none",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# timm and transformers


def write_timm(source: Source, out: Path) -> None:
    """Write a .safetensors file, whose metadata say how timm builds the model."""
    mean, std = source.mean_std
    about = {"model": source.args.model, "format": "timm"}
    about |= {"timm": json.dumps(source.timm_arguments(), default=str)}
    about |= {"mean": json.dumps(mean), "std": json.dumps(std)}
    save_encoder(out, hugging_face.timm_state(source), about)


@torch.no_grad()
def compare_timm(source: Source, out: Path) -> float:
    """Compare with the model that timm builds and loads strictly."""
    model = timm.create_model(**source.timm_arguments(), checkpoint_path=str(out)).eval()
    return difference(source, timm_features(source, model))


def timm_features(source: Source, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what computes in timm's model, in double precision, the source's features or
    logits."""
    model.double()
    if source.num_classes:
        return model
    if source.is_vit:
        return model.forward_features
    return partial(family_of(model).feature_map, model)


def write_hf(source: Source, out: Path) -> None:
    """Write the folder; the card names the class that loads it."""
    found = hugging_face.fit(source)
    name = "timm" if found is None else found.architecture
    lines = ["import transformers", f'model = transformers.{name}.from_pretrained("{out}")']
    if name == "timm":
        lines = ["import timm", f'model = timm.create_model("local-dir:{out}", pretrained=True)']
    out.mkdir(parents=True, exist_ok=True)
    card = write_card(source, source.args.command, "\n".join(lines))
    hugging_face.write_folder(source, out, card)


@torch.no_grad()
def compare_hf(source: Source, out: Path) -> float:
    """Compare with the model that transformers, or timm, loads from the folder."""
    found = hugging_face.fit(source)
    model = hugging_face.load_folder(out, "timm" if found is None else found.architecture)
    if found is None:
        return difference(source, timm_features(source, model))
    model.double()
    if source.full and source.is_method:
        return compare_masked(source, model)
    if source.num_classes:
        return difference(source, lambda images: model(images).logits)
    if source.is_vit:
        return difference(source, lambda images: model(images).last_hidden_state)
    images = source.images().double()
    maps = copy.deepcopy(source.backbone).double().forward_features(images)
    if maps.shape[1] != source.backbone.num_features:  # Swin's channels are last
        maps = maps.flatten(1, 2)
    return largest(maps, model(images).last_hidden_state)


@torch.no_grad()
def compare_masked(source: Source, model: nn.Module) -> float:
    """Compare what pre-training networks predict of masked images: MAE's pixels, BEiT's tokens."""
    network = copy.deepcopy(source.network).double()
    images = source.images().double()
    patches = network.patch_embed.num_patches
    noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(0))
    if hasattr(network, "decoder_embed"):
        order = noise.argsort(dim=1, stable=True)
        seen = order[:, : num_visible(patches, network.mask_ratio)]
        latent = network.forward_encoder(take(network.patch_embed.cut(images), seen), seen)
        predicted = network.forward_decoder(latent, order, patches)
        ours = put(torch.zeros_like(predicted), order, predicted)
        return largest(ours, model(images, noise=noise).logits)
    mask = noise > 0.5
    tokens = network.encode_masked(images, mask.unflatten(1, network.patch_embed.grid_size))
    ours = nn.functional.linear(tokens[:, 1:], network.lm_head.weight, network.lm_head.bias)
    return largest(ours, model(images, bool_masked_pos=mask).logits)


# --------------------------------------------------------------------------------------------------
# Traced graphs


@contextmanager
def traceable(network: nn.Module):
    """Keep what only training on a CPU needs out of the graph."""
    layers = [layer for layer in network.modules() if isinstance(layer, ActivatedLinear)]
    before = [layer.recompute for layer in layers]
    for layer in layers:
        layer.recompute = "off"
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.recompute = value


def traced(source: Source) -> torch.export.ExportedProgram:
    """Return the graph of the logits or features, for any number of images."""
    if source.full and source.is_method:
        raise ValueError(
            f"--to {source.args.to} holds encoders and classifiers; leave --full out, or use the "
            "published project's name for the pre-training network"
        )
    module = source.computes()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), traceable(module):
        return torch.export.export(
            module, (source.images(),), dynamic_shapes=({0: batch},), strict=False
        )


def write_torch_export(source: Source, out: Path) -> None:
    program = traced(source)
    write_atomically(out, lambda file: torch.export.save(program, file))


@torch.no_grad()
def compare_torch_export(source: Source, out: Path) -> float:
    """Compare for two numbers of images, neither of which is one that was traced."""
    module = torch.export.load(out).module()
    return max(difference_at_scale(source, module, count) for count in (1, 3))


@torch.no_grad()
def difference_at_scale(source: Source, theirs: Callable[[Tensor], Tensor], count: int) -> float:
    """Return the largest difference in single precision; where features exceed 1, as a part of the
    largest."""
    images = source.images(count)
    ours = expected(source, images)
    return largest(ours, theirs(images)) / max(1.0, float(ours.abs().max()))


def write_onnx(source: Source, out: Path) -> None:
    """Write the graph with the input "images" and the output "features" or "logits"."""
    needed("onnx", "onnxscript")
    name = "logits" if source.num_classes else "features"
    program = torch.onnx.export(
        traced(source), input_names=["images"], output_names=[name], opset_version=OPSET,
        dynamo=True, verbose=False,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(out))


def compare_onnx(source: Source, out: Path) -> float:
    """Compare with onnxruntime for two numbers of images."""
    (onnxruntime,) = needed("onnxruntime")
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])

    def compute(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return max(difference_at_scale(source, compute, count) for count in (1, 3))


def needed(*names: str) -> list[Any]:
    """Return the modules of these packages; ValueError if one is not installed."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ValueError(f"this target needs packages: pip install {' '.join(names)}") from error


# --------------------------------------------------------------------------------------------------
# Targets


def _published(writes: str, full: str) -> Target:
    check = "loaded again like a published file: features; names against the project's key lists"
    return Target(write_upstream, compare_upstream, writes, full, check)


TARGETS = {
    "timm": Target(
        write_timm, compare_timm, "safetensors of any encoder or classifier", "classifiers",
        "`timm.create_model` loads it strictly: features, logits",
    ),
    "conmim": _published(
        '.pth, `{"model"}`: ViTs in BEiT\'s form; of ConMIM the teacher',
        "ConMIM: student, and the teacher in `..._copy`; classifiers",
    ),
    "beit": _published('.pth, `{"model"}`: ViTs in BEiT\'s form', "BEiT; classifiers"),
    "mae": _published('.pth, `{"model"}`: plain ViTs', "MAE, SemMAE; classifiers"),
    "semaim": _published(
        '.pth, `{"state_dict"}`: plain ViTs', "SemAIM, SAIM, with their ema; classifiers"
    ),
    "simmim": _published(
        '.pth, `{"model"}`, names below `encoder.`: Swin, ViTs in BEiT\'s form',
        "SimMIM with the token after the patch embedding; classifiers",
    ),
    "openmixup": _published(
        '.pth, `{"state_dict"}`, names below `backbone.`: ViT, Swin, ConvNeXt, ResNet',
        "SimMIM, A2MIM; classifiers",
    ),
    "mmpretrain": _published(
        '.pth, `{"state_dict"}`, names below `backbone.`: ViT, Swin, ConvNeXt, ResNet',
        "SemanticMIM, SimMIM, A2MIM; classifiers",
    ),
    "hf": Target(
        write_hf, compare_hf,
        "folder: ViT, BEiT, ResNet, ConvNeXt, Swin of transformers; else a timm hub folder",
        "MAE (ViTMAE), BEiT; classifiers",
        "transformers loads it without remote code, or timm: features, logits, predictions",
    ),
    "onnx": Target(
        write_onnx, compare_onnx, f".onnx, opset {OPSET}, any number of images", "classifiers",
        "onnxruntime, 1 and 3 images: features, logits",
    ),
    "torch_export": Target(
        write_torch_export, compare_torch_export, ".pt2, any number of images", "classifiers",
        "`torch.export.load`, 1 and 3 images: features, logits",
    ),
}  # fmt: skip


def table() -> str:
    """Return the table of docs/export.md."""
    lines = ["| `--to` | writes | `--full` | check |", "|---|---|---|---|"]
    for name, target in TARGETS.items():
        lines.append(f"| `{name}` | {target.writes} | {target.full} | {target.check} |")
    return "\n".join(lines) + "\n"


def export(argv: list[str] | None = None) -> float:
    """Write what the flags ask for and return the largest difference of features."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("checkpoint", help="file or https address")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what is written")
    parser.add_argument("out", type=Path, help="file to write; of hf a folder")
    parser.add_argument(
        "--full", action="store_true", help="the whole network, with what only training needs"
    )
    parser.add_argument(
        "--model_key", default=PUBLISHED_KEYS, help="where the weights are in the file"
    )
    own, flags = parser.parse_known_args(argv)
    source = load_source(own.checkpoint, full=own.full, model_key=own.model_key, flags=flags)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "scripts/tools/export.py", *words])
    for name, value in (("to", own.to), ("flags", flags), ("command", command)):
        setattr(source.args, name, value)
    source.args.model_key = own.model_key
    target = TARGETS[own.to]
    target.write(source, own.out)
    return target.compare(source, own.out)


def main() -> None:
    try:
        difference = export()
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"largest difference of the features: {difference:.2g} (at most {TOLERANCE:g})")
    if not difference <= TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
