"""Write a checkpoint's backbone under timm's names as safetensors, or as a pickle for detectron2.

    python scripts/tools/extract_backbone.py CHECKPOINT OUTPUT.safetensors
    python scripts/tools/extract_backbone.py CHECKPOINT OUTPUT.pth
    python scripts/tools/extract_backbone.py CHECKPOINT OUTPUT.pkl

CHECKPOINT is a checkpoint of this repository, from pre-training (its teacher, if it has one) or
fine-tuning, or any published file (docs/engine.md#published-files), whole or the backbone alone.
timm reads the safetensors strictly, with timm.create_model("resnet50", num_classes=0,
checkpoint_path="OUTPUT.safetensors"). A .pkl holds a ResNet as NumPy arrays under detectron2's
names, a .pth the same as the safetensors under "state_dict", as OpenMixup's script of this purpose
writes it.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm
import torch

import modeling_pretrain  # noqa: F401  (registers the methods)
from modeling_finetune import entry_of, list_models
from unimim.checkpoint.files import load_checkpoint, save_checkpoint, save_encoder
from unimim.checkpoint.loading import PUBLISHED_KEYS, backbone_weights
from unimim.checkpoint.names import StateDict, timm_vit_arguments, to_timm
from unimim.checkpoint.runs import is_pretraining, known_flags, rebuild
from unimim.files import write_atomically

# a tensor of timm's Swin, ConvNeXt and ResNet -> how the names of all their tensors begin
TIMM_PARTS = {
    "layers.0.blocks.0.norm1.weight": ("patch_embed.", "layers.", "norm."),
    "stages.0.blocks.0.norm.weight": ("stem.", "stages.", "head.norm."),
    "layer1.0.conv1.weight": ("conv1.", "bn1.", "layer"),
}
# applied in this order (docs/methods/simmim_a2mim.md#checkpoints-of-openmixup)
DETECTRON2_NAMES = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def extract(path: str, model_key: str = PUBLISHED_KEYS) -> tuple[StateDict, str]:
    """Return the backbone's weights under native names, and the model's name if the file has it."""
    loaded = load_checkpoint(path)
    saved = known_flags(loaded)
    if "engine" in loaded and is_pretraining(saved):
        method, args = rebuild(path)
        weights = loaded.get("teacher") or loaded["model"]
        return method.encoder_state_dict(weights), args.model
    others = parts_of_methods()
    weights = backbone_weights(loaded, path, model_key)
    encoder = {name: v for name, v in weights.items() if not name.startswith(others)}
    check_is_timms(encoder, path)
    return encoder, saved.get("model", "")


def parts_of_methods() -> tuple[str, ...]:
    """Return the beginnings of the names of what pre-training adds to an encoder."""
    parts = {"target_generator.", "rel_pos_bias2."}  # of published networks only
    for name in list_models():
        for cls in entry_of(name).classes:
            parts |= set(getattr(cls, "not_exported", ()))
    return tuple(parts)


def check_is_timms(weights: StateDict, path: str) -> None:
    """Raise ValueError if there are tensors that timm's network of this kind does not have, or, of
    a ViT, lacks."""
    state = to_timm(weights)
    has_positions = any("pos_embed" in name or "position" in name for name in state)
    if "blocks.0.norm1.weight" in weights and not has_positions:
        return  # rotary ones: timm's Eva, whose sizes the tensors do not tell
    if "blocks.0.norm1.weight" in weights:
        with torch.device("meta"):
            arguments = timm_vit_arguments(state, (224, 224), 1)
            expected = timm.create_model(**arguments).state_dict().keys()
        unknown, missing = sorted(state.keys() - expected), sorted(expected - state.keys())
    else:
        own = next((own for mark, own in TIMM_PARTS.items() if mark in weights), ("",))
        unknown, missing = [name for name in weights if not name.startswith(own)], []
    if unknown or missing:
        raise ValueError(
            f"{path} cannot be written for timm, whose network has no {', '.join(unknown[:3])}"
            if unknown
            else f"{path} cannot be written for timm: it has no {', '.join(missing[:3])}"
        )


def to_detectron2(weights: StateDict) -> StateDict:
    """Rename a ResNet for detectron2; raise ValueError if it is another network."""
    if "layer1.0.conv1.weight" not in weights:
        raise ValueError(
            "detectron2's names are for ResNet; use an output that ends in .safetensors"
        )
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in DETECTRON2_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def write(path: Path, weights: StateDict, model: str) -> None:
    """Write the weights in the format of the suffix."""
    if path.suffix == ".safetensors":
        return save_encoder(path, weights, {"model": model, "format": "timm"})
    if path.suffix == ".pth":
        return save_checkpoint(path, {"state_dict": weights, "author": "UniMIM"})
    if path.suffix != ".pkl":
        raise ValueError(f"{path} must end in .safetensors, .pth or .pkl")
    arrays = {name: value.numpy() for name, value in to_detectron2(weights).items()}
    content = {"model": arrays, "__author__": "UniMIM", "matching_heuristics": True}
    write_atomically(path, lambda file: pickle.dump(content, file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="file or https address")
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--model_key", default=PUBLISHED_KEYS, help="where the weights are in the file"
    )
    args = parser.parse_args()
    try:
        weights, model = extract(args.checkpoint, args.model_key)
        write(args.output, weights, model)
    except ValueError as error:
        sys.exit(f"error: {error}")
    count = sum(value.numel() for value in weights.values())
    print(f"{args.output}: {len(weights)} tensors, {count:,} numbers")


if __name__ == "__main__":
    main()
