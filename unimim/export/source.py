"""The network of a checkpoint as exporters see it: whole, its encoder, the encoder's features."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling_backbones import family_of
from modeling_finetune import VisionTransformer
from unimim.checkpoint.files import load_checkpoint
from unimim.checkpoint.loading import PUBLISHED_KEYS, load_pretrained
from unimim.checkpoint.names import StateDict, fuse_qkv, timm_vit_arguments, to_timm
from unimim.checkpoint.runs import rebuild
from unimim.data.views import image_mean_std
from unimim.sizes import to_pair

# of a network without its classifier; head.norm is ConvNeXt's last norm
_HEADS = ("head.", "fc.")
_NOT_SAVED = ("tokenizer.", "target.", "hog.")  # frozen networks of a method's targets


class Encoder(nn.Module):
    """Images [B, 3, H, W] to tokens [B, T, C] after the last norm, or to the last map [B, C, h, w].

    A classifier that pools patches before its norm has un-normed tokens, as in timm.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        network = getattr(self.network, "backbone", self.network)
        if isinstance(network, VisionTransformer):
            return network.norm(network.forward_features(images))
        return family_of(network).feature_map(network, images)


@dataclass
class Source:
    """A network in eval mode with the weights of a checkpoint.

    network: a method or a classifier; of a method with a teacher it has the teacher's weights
        unless `full`. teacher: the teacher's weights by their names, where `full` and there is one.
    full: whether the whole network is asked for, not the encoder. args: flags of its run.
    """

    path: str
    network: nn.Module
    args: Namespace
    full: bool = False
    teacher: StateDict | None = None

    @property
    def is_method(self) -> bool:
        return hasattr(self.network, "encoder_state_dict")

    @property
    def backbone(self) -> nn.Module:
        """Return the network that computes features; SimMIM's and A2MIM's is inside."""
        return getattr(self.network, "backbone", self.network)

    @property
    def is_vit(self) -> bool:
        return isinstance(self.backbone, VisionTransformer)

    @property
    def image_size(self) -> tuple[int, int]:
        if self.is_vit:
            return tuple(self.backbone.patch_embed.img_size)
        return tuple(to_pair(self.args.input_size or getattr(self.network, "image_size", 224)))

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return image_mean_std(self.args)

    @property
    def num_classes(self) -> int:
        """Return the number of classes of a whole classifier, else 0."""
        return self.args.nb_classes if self.full and not self.is_method else 0

    def whole(self) -> StateDict:
        """Return the whole network's weights under native names."""
        state = self.network.state_dict()
        return {name: value for name, value in state.items() if not name.startswith(_NOT_SAVED)}

    def encoder(self) -> StateDict:
        """Return the encoder's weights under native names, SAIM's projections joined."""
        if self.is_method:
            return fuse_qkv(self.network.encoder_state_dict(self.whole()))
        kept = {}
        for name, value in self.whole().items():
            if name.startswith("head.norm.") or not name.startswith(_HEADS):
                kept[name] = value
        return kept

    def state(self) -> StateDict:
        """Return the weights that were asked for: the whole network's or the encoder's."""
        return self.whole() if self.full else self.encoder()

    def computes(self) -> nn.Module:
        """Return the module whose output is compared: logits of a whole classifier, else
        features."""
        if self.full and not self.is_method:
            return self.network
        return Encoder(self.network).eval()

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments with which `timm.create_model` builds the encoder or classifier."""
        if self.is_vit:
            heads = self.backbone.blocks[0].attn.num_heads
            found = timm_vit_arguments(to_timm(self.encoder()), self.image_size, heads)
        else:
            dropped = ("drop_path_rate", "drop_rate", "attn_drop_rate")
            found = {}
            for name, value in self.backbone.timm_arguments.items():
                if name not in dropped and value is not None:
                    found[name] = value
        return found | {"num_classes": self.num_classes}

    def images(self, count: int = 2) -> Tensor:
        """Return random images, always the same, as normalized ones are distributed."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, 3, *self.image_size, generator=generator)


def load_source(
    path: str | Path,
    *,
    full: bool = False,
    model_key: str = PUBLISHED_KEYS,
    flags: Sequence[str] = (),
) -> Source:
    """Return the network of a checkpoint; `flags` describe that of a file without flags of its run.

    A pre-training method's teacher is what its encoder is taken from, as published recipes do.
    """
    network, args = rebuild(path, flags, model_key=model_key)
    loaded = load_checkpoint(path)
    teacher = loaded.get("teacher")
    key = "model" if full and teacher else model_key
    load_pretrained(network, loaded, model_key=key)
    network.eval().requires_grad_(False)
    return Source(str(path), network, args, full, teacher if full else None)
