"""Take the backbone out of a checkpoint and write it under timm's names: safetensors, or a pickle
for detectron2.

    python scripts/tools/extract_backbone.py CHECKPOINT OUTPUT.safetensors
    python scripts/tools/extract_backbone.py CHECKPOINT OUTPUT.pkl

CHECKPOINT is any of this repository, of pre-training (then the teacher is taken where there is one)
or fine-tuning, or one of OpenMixup's and A2MIM's published files, whole or the backbone alone. timm
reads the first form by timm.create_model("resnet50", num_classes=0,
checkpoint_path="OUTPUT.safetensors"), strictly. A .pkl holds the ResNet that CHECKPOINT must then
be, as NumPy arrays under detectron2's names.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import modeling_pretrain  # noqa: F401  (registers the methods)
from unimim.checkpoint.files import load_checkpoint, save_encoder
from unimim.checkpoint.loading import PUBLISHED_KEYS, backbone_weights
from unimim.checkpoint.names import StateDict
from unimim.checkpoint.runs import is_pretraining, rebuild
from unimim.files import write_atomically

# one after another (specs/a2mim.md 6)
DETECTRON2_NAMES = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def extract(path: str, model_key: str = PUBLISHED_KEYS) -> tuple[StateDict, str]:
    """The backbone's weights under native names, and the name of the model that the file says it
    holds, if it does."""
    loaded = load_checkpoint(path)
    saved = loaded.get("args") or {}
    if is_pretraining(saved):
        method, args = rebuild(path)
        weights = loaded.get("teacher") or loaded["model"]
        return method.encoder_state_dict(weights), args.model
    return backbone_weights(loaded, path, model_key), saved.get("model", "")


def to_detectron2(weights: StateDict) -> StateDict:
    """A ResNet under detectron2's names. ValueError: another network."""
    if "layer1.0.conv1.weight" not in weights:
        raise ValueError(
            "detectron2's names are for ResNet: give an output that ends in .safetensors"
        )
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in DETECTRON2_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def write(path: Path, weights: StateDict, model: str) -> None:
    if path.suffix == ".safetensors":
        return save_encoder(path, weights, {"model": model, "format": "timm"})
    if path.suffix != ".pkl":
        raise ValueError(f"{path} must end in .safetensors or .pkl")
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
    print(
        f"{args.output}: {len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} numbers"
    )


if __name__ == "__main__":
    main()
