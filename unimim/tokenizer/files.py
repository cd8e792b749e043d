"""Files of tokenizers: tensors as safetensors, and what must be known of them as metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from unimim.checkpoint.names import StateDict
from unimim.checkpoint.tensor_files import write_tensors
from unimim.sizes import Pair

KINDS = ("dvae", "kmeans")
KEY = "tokenizer"  # of the metadata


@dataclass(frozen=True)
class TokenizerInfo:
    """What a tokenizer's file says of it.

    kind: "dvae", the encoder of a discrete VAE, or "kmeans", centers of patches.
    patch_size, image_size: (height, width) of what a token stands for, and of the images that the
        tokenizer was trained on.
    mean, std: what the network or the centers expect images in [0, 1] to be normalized by.
    teacher: the frozen network whose features the centers are of; "" for centers of pixels.
    """

    kind: str
    vocab_size: int
    patch_size: Pair
    image_size: Pair
    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher: str = ""

    @property
    def grid(self) -> Pair:
        """Tokens of an image along each side."""
        height, width = self.image_size
        return height // self.patch_size[0], width // self.patch_size[1]

    def as_metadata(self) -> dict[str, str]:
        """Return what `from_metadata` reads: one string, as safetensors keeps no order of many."""
        return {KEY: json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "TokenizerInfo | None":
        """Return None for a file that was not written here.

        Raises:
            ValueError: a kind that is unknown, or a value that is missing or damaged.
        """
        if KEY not in metadata:
            return None
        try:
            held = json.loads(metadata[KEY])
            held = {"teacher": ""} | held  # older files have no such entry
            values = {name: held[name] for name in cls.__dataclass_fields__}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"has metadata that cannot be read ({error})") from error
        if values["kind"] not in KINDS:
            raise ValueError(f"is of kind {values['kind']}; use one of {', '.join(KINDS)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def save_tokenizer(path: str | Path, tensors: StateDict, info: TokenizerInfo) -> None:
    """Replace `path` by a file that `modeling_targets.load_tokenizer` reads, in one step, with a
    checksum."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_tensors(path, plain, info.as_metadata())
