"""Backbones that are masked between their stages: the repository's ViT and timm's networks, none of
them changed.

A `Place` names a module of a backbone; `MaskToken` hooks itself in there. One rule for every
network, as long as it says where its places are. Shapes in comments: B images, C channels of a map,
h x w its places, T tokens.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.regnet import Bottleneck as RegNetBlock
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from modeling_finetune import (
    MIM_VIT_SIZES,
    UnknownOptionError,
    VisionTransformer,
    check_choice,
    own_options,
    register,
    register_family,
)
from unimim.errors import OptionError, refused
from unimim.sizes import to_pair

# timm's networks that have recipes, under the names that these give them
TIMM_BACKBONES = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152, 200)},
    **{f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base")},
    **{f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "base")},
    "swinv2_tiny": "swinv2_tiny_window8_256",
    "swinv2_base": "swinv2_base_window12_192",
}
# what timm's networks repeat within a stage
REPEATED_BLOCKS = (
    BasicBlock, Bottleneck, ConvNeXtBlock, SwinTransformerBlock, SwinTransformerV2Block,
    RegNetBlock,
)  # fmt: skip
OUTPUT_STRIDES = (8, 16, 32)  # of timm's ResNets, RegNets and ConvNeXts
MASK_TOKENS = ("learnable", "randn", "zero", "mean", "instance_mean", "none")


class MapViT(VisionTransformer):
    """BEiT's blocks under learned positions, which end in a map [B, C, h, w]
    (docs/methods/simmim_a2mim.md#vits-sizes)."""

    def __init__(
        self, *, rel_pos_bias: str = "per_block", pos_embed: str = "learned", init_values=0.1, **vit
    ):
        form = {"rel_pos_bias": rel_pos_bias, "pos_embed": pos_embed, "init_values": init_values}
        super().__init__(**form, **vit, num_classes=0, global_pool="token")

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.forward_features(images))[:, self.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, self.patch_embed.grid_size)

    def init_weights(self, init_scale: float) -> None:
        """Without BEiT's rescaling of deeper blocks."""
        self.apply(self._init_module)
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                self._init_token(token)


# --------------------------------------------------------------------------------------------------
# Places


class Place(NamedTuple):
    """Where a mask token goes in: before or after the module of that name, among `width` channels.

    stride: pixels along the side of one place there. axis: of the channels; -1 means [B, ..., C].
    grid: of the patches where the features are tokens [B, T, C].
    """

    module: str
    before: bool
    width: int
    stride: int
    axis: int = 1
    grid: tuple[int, int] | None = None


def vit_places(vit: VisionTransformer) -> list[Place]:
    """After the patch embedding, then before each block but the last: layer 1 is before the
    first."""
    names = [("patch_embed", False)] + [(f"blocks.{k}", True) for k in range(len(vit.blocks) - 1)]
    embed = vit.patch_embed
    return [Place(*name, vit.embed_dim, embed.patch_size[0], -1, embed.grid_size) for name in names]


def resnet_places(resnet: ResNet) -> list[Place]:
    """Before each of the four stages; at its first block, as checkpointing of activations goes past
    the stage."""
    info = resnet.feature_info
    return [
        Place(f"layer{k + 1}.0", True, info[k]["num_chs"], info[max(k, 1)]["reduction"])
        for k in range(len(info) - 1)
    ]


def swin_places(swin: SwinTransformer | SwinTransformerV2) -> list[Place]:
    """After the patch embedding, then before the blocks of each stage."""
    stages = [
        Place(f"layers.{k}.downsample", False, info["num_chs"], info["reduction"], -1)
        for k, info in enumerate(swin.feature_info)
    ]
    return [stages[0]._replace(module="patch_embed"), *stages]


def convnext_places(convnext: ConvNeXt) -> list[Place]:
    """Before the blocks of each stage."""
    return [
        Place(f"stages.{k}.downsample", False, info["num_chs"], info["reduction"])
        for k, info in enumerate(convnext.feature_info)
    ]


def feature_places(network: nn.Module) -> list[Place]:
    """After each module that timm lists as a feature of the network."""
    return [
        Place(
            info["module"],
            info.get("hook_type") == "forward_pre",
            info["num_chs"],
            info["reduction"],
        )
        for info in network.feature_info
    ]


def inner_places(network: nn.Module) -> list[Place]:
    """All feature layers except the last: a token inserted there could not attend to its
    neighbors."""
    return feature_places(network)[:-1]


def features_last(network: nn.Module, images: Tensor) -> Tensor:
    return network.forward_features(images).permute(0, 3, 1, 2)


class Family(NamedTuple):
    """places: of a network, by `mask_layer`. feature_map: images [B, 3, H, W] to the last map [B,
    C, h, w].

    rules: the name of the published optimizers' rules. channels_last: where maps [B, h, w, C] are
    faster.
    """

    places: Callable[[nn.Module], list[Place]]
    feature_map: Callable[[nn.Module, Tensor], Tensor]
    rules: str
    channels_last: tuple[str, ...] = ()


# timm's ConvNeXt has the last norm in its head, after the pooling; pre-training norms every place
# of the map
_FAMILIES: dict[type[nn.Module], Family] = {
    VisionTransformer: Family(vit_places, lambda vit, images: vit(images), "vit"),
    ResNet: Family(
        resnet_places,
        lambda resnet, images: resnet.forward_features(images),
        "cnn",
        ("cpu", "cuda"),
    ),
    SwinTransformer: Family(swin_places, features_last, "swin"),
    SwinTransformerV2: Family(swin_places, features_last, "swin"),
    ConvNeXt: Family(
        convnext_places,
        lambda net, images: net.head.norm(net.forward_features(images)),
        "convnext",
        ("cuda",),
    ),
    nn.Module: Family(
        inner_places, lambda network, images: network.forward_features(images), "cnn", ("cuda",)
    ),
}


def family_of(backbone: nn.Module) -> Family:
    return next(family for cls, family in _FAMILIES.items() if isinstance(backbone, cls))


def is_listed_by_timm(backbone: nn.Module) -> bool:
    """Whether nothing is known here of the backbone but the features that timm lists: it may not
    fit."""
    return family_of(backbone) is _FAMILIES[nn.Module]


def place_of(backbone: nn.Module, mask_layer: int) -> Place:
    """The place number `mask_layer`, -1 for the last. ValueError: the backbone has no such
    place."""
    places = family_of(backbone).places(backbone)
    if not -1 <= mask_layer < len(places):
        raise OptionError(
            "mask_layer", mask_layer, f"is none of this backbone's; use 0 to {len(places) - 1}"
        )
    return places[mask_layer]


# --------------------------------------------------------------------------------------------------
# Building


def build_backbone(
    name: str,
    input_size: tuple[int, int],
    *,
    drop_path: float,
    attn: str,
    grad_checkpointing: bool,
    **options,
) -> nn.Module:
    """One of `MIM_VIT_SIZES`, or timm's network of that name with random weights and without
    classifier.

    Raises:
        ValueError: neither, or a network that gives no features or no map.
    """
    if name in MIM_VIT_SIZES:
        given = {"attn": attn, "grad_checkpointing": grad_checkpointing, "drop_path": drop_path}
        try:
            return MapViT(input_size=input_size, **MIM_VIT_SIZES[name] | given | options)
        except TypeError as error:
            raise UnknownOptionError(error, own_options(MapViT)) from error
    backbone = timm_network(
        name,
        input_size,
        num_classes=0,
        drop_path=drop_path,
        grad_checkpointing=grad_checkpointing,
        **options,
    )
    if len(getattr(backbone, "feature_info", None) or ()) < 2:
        raise OptionError(
            "backbone",
            None,
            f"timm lists too few features of {name}; it has no place for a mask token",
        )
    if is_listed_by_timm(backbone):
        freeze_unused(backbone, name, input_size, options.get("in_chans", 3))
    return backbone


def timm_network(
    name: str, input_size: tuple[int, int], *, drop_path: float, grad_checkpointing: bool, **options
) -> nn.Module:
    """timm's network of that name with random weights; `options` are its own.

    Swin is told the images' size, and those with recipes a window as large as their last map, of
    version 2 twice as large (docs/methods/simmim_a2mim.md#places-of-the-token).

    Raises:
        ValueError: what the network does not have.
    """
    if name.startswith(("swin_", "swinv2_")):
        options = {"img_size": input_size, "drop_path_rate": drop_path} | options
        if name in TIMM_BACKBONES.values():
            window = window_of(input_size) * (2 if name.startswith("swinv2_") else 1)
            options = {"window_size": window} | options
    elif drop_path:  # not every network of timm takes it; Swin has a rate by default
        options["drop_path_rate"] = drop_path
    try:
        network = timm.create_model(name, **options)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise OptionError(
                "drop_path", drop_path, f"is not possible: {name} has no stochastic depth; use 0"
            ) from error
        raise UnknownOptionError(error, own_options(class_of_timm(name))) from error
    except AssertionError as error:
        stride = options.get("output_stride")
        if stride not in (None, *OUTPUT_STRIDES):
            raise OptionError(
                "output_stride",
                stride,
                f"is not possible for {name}; use one of {', '.join(map(str, OUTPUT_STRIDES))}",
            ) from error
        raise OptionError(
            "model_kwargs", None, f"timm's {name} refuses these options: {options}"
        ) from error
    if grad_checkpointing:
        with refused(OptionError("grad_checkpointing", None, f"timm's {name} has none")):
            network.set_grad_checkpointing()
    put_in_order(network, family_of(network).channels_last)
    # what timm.create_model needs for a network of these weights
    network.timm_arguments = {"model_name": name, **options}
    return network


def class_of_timm(name: str) -> type[nn.Module]:
    """Return the class of timm's network of that name."""
    with torch.device("meta"):
        return type(timm.create_model(name))


def window_of(input_size: tuple[int, int]) -> int:
    if min(input_size) < 32:
        raise OptionError("input_size", input_size, "is too small: Swin needs 32 pixels a side")
    return min(input_size) // 32


def put_in_order(network: nn.Module, devices: tuple[str, ...]) -> None:
    """Map follow the images' order in memory: channels last on these devices.

    Weights keep theirs, as DeepSpeed and optimizer states of other engines know no other.
    """

    def reorder(_, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *rest = inputs
        if images.ndim == 4 and images.device.type in devices:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, *rest

    if devices:
        next(network.children()).register_forward_pre_hook(reorder)


def freeze_unused(
    backbone: nn.Module, name: str, input_size: tuple[int, int], channels: int = 3
) -> None:
    """Engines wait for a gradient of every parameter: what the map does not come from is not
    trained."""
    training = backbone.training
    with refused(OptionError("input_size", input_size, f"does not suit timm's {name}")):
        images = torch.zeros(1, channels, *input_size)
        features = family_of(backbone).feature_map(backbone.eval(), images)
    if (
        not isinstance(features, Tensor)
        or features.ndim != 4
        or features.shape[1] != backbone.num_features
    ):
        raise OptionError(
            "backbone", None, f"timm's {name} ends in no map of {backbone.num_features} channels"
        )
    features.sum().backward()
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    backbone.zero_grad(set_to_none=True)
    backbone.train(training)


def map_of(backbone: nn.Module) -> tuple[int, int]:
    """Channels and stride of the last map."""
    if isinstance(backbone, VisionTransformer):
        return backbone.embed_dim, backbone.patch_embed.patch_size[0]
    return backbone.num_features, backbone.feature_info[-1]["reduction"]


# --------------------------------------------------------------------------------------------------
# Mask token and neck


def enlarged(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask [B, h, w] of any dtype at `size`, [B, H, W]: repeated, or by the nearest
    element where the size is not a multiple."""
    (rows, columns), (height, width) = mask.shape[-2:], size
    if height % rows == 0 and width % columns == 0:
        return mask.repeat_interleave(height // rows, dim=-2).repeat_interleave(
            width // columns, dim=-1
        )
    return F.interpolate(mask.unsqueeze(1).float(), size, mode="nearest").squeeze(1).to(mask.dtype)


def mean_filled(images: Tensor, mask: Tensor) -> Tensor:
    """Return images [B, c, H, W] whose masked pixels have the mean of all pixels, of each image
    and color by itself (docs/methods/simmim_a2mim.md#filling)."""
    hidden = enlarged(mask, images.shape[-2:]).unsqueeze(1).bool()
    return torch.where(hidden, images.mean((2, 3), keepdim=True), images)


class MaskToken(nn.Module):
    """Puts a token in at one place of a backbone, where `mask` says so
    (docs/methods/simmim_a2mim.md#token).

    kind: "learnable"; "randn" and "zero" are never trained; "mean" is that of the features of the
    batch, without their gradient, "instance_mean" that of each image; "none" leaves the features as
    they are. replace: in place of the features; else it is added to them, and what there is of them
    at masked positions is scaled by `mask_gamma`, which begins at `mask_init` and exists only if
    that is positive. detach: and has no gradient.
    """

    def __init__(
        self,
        place: Place,
        *,
        kind: str,
        replace: bool,
        mask_init: float,
        detach: bool,
        token_std: float = 0.02,
    ):
        super().__init__()
        check_choice("mask_token", kind, MASK_TOKENS)
        self.place, self.kind, self.replace, self.detach = place, kind, replace, detach
        self.mask: Tensor | None = None
        shape = (1, place.width, 1, 1) if place.axis == 1 else (1, 1, place.width)
        self.mask_token = self.mask_gamma = None
        if kind in ("learnable", "randn", "zero"):
            self.mask_token = nn.Parameter(torch.zeros(shape), requires_grad=kind == "learnable")
        if kind == "learnable" and token_std:
            nn.init.trunc_normal_(self.mask_token, std=token_std)
        if kind == "randn":
            nn.init.normal_(self.mask_token)
        if mask_init > 0 and not replace:
            self.mask_gamma = nn.Parameter(
                torch.full(shape if place.axis == 1 else shape[-1:], float(mask_init))
            )

    def attach(self, backbone: nn.Module) -> None:
        """From now on the backbone's features go through here."""
        module = backbone.get_submodule(self.place.module)
        if self.place.before:
            module.register_forward_pre_hook(self.before)
        else:
            module.register_forward_hook(self.after)

    # bound methods: in a copy of the backbone they are those of the copied token

    def before(self, _, inputs: tuple) -> tuple:
        return self(inputs[0]), *inputs[1:]

    def after(self, _, inputs: tuple, output: Tensor) -> Tensor:
        return self(output)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C, h, w], [B, h, w, C] or [B, T, C]; `mask` [B, rows, columns], 1 = masked,
        is set before."""
        if self.mask is None or self.kind == "none":
            return x
        hidden, token = self.hidden(x), self.token(x).to(x.dtype)
        if self.replace:
            return torch.where(hidden, token, x)
        if self.detach:
            x = torch.where(hidden, x.detach(), x)
        if self.mask_gamma is not None:
            x = torch.where(hidden, x * self.mask_gamma.to(x.dtype), x)
        return torch.where(hidden, x + token, x)

    def hidden(self, x: Tensor) -> Tensor:
        """The mask as bool [B, 1, h, w], [B, h, w, 1] or [B, T, 1]; tokens in front of the patches
        are never masked."""
        grid = self.place.grid
        size = grid or (x.shape[2:] if self.place.axis == 1 else x.shape[1:3])
        assert self.mask.shape[-2] <= size[0] and self.mask.shape[-1] <= size[1], (
            "the mask is finer than the features"
        )
        mask = enlarged(self.mask.bool(), tuple(size))
        if grid:
            mask = F.pad(mask.flatten(1), (x.shape[1] - math.prod(grid), 0))
        return mask.unsqueeze(self.place.axis)

    def token(self, x: Tensor) -> Tensor:
        if self.mask_token is not None:
            return self.mask_token
        if self.place.grid:
            x = x[:, -math.prod(self.place.grid) :]
        space = (2, 3) if self.place.axis == 1 else tuple(range(1, x.ndim - 1))
        return (
            x.detach().mean((0, *space), keepdim=True)
            if self.kind == "mean"
            else x.mean(space, keepdim=True)
        )


class PixelNeck(nn.Module):
    """A map [B, C, h, w] to pixels [B, channels, h * stride, w * stride] by one convolution
    (docs/methods/simmim_a2mim.md#options).

    decoder_kernel: of a depth-wise convolution with norm and GELU in front of it; None is without.
    """

    def __init__(
        self,
        width: int,
        stride: int,
        *,
        channels: int = 3,
        kernel: int = 1,
        decoder_kernel: int | None = None,
    ):
        super().__init__()
        self.stride = stride
        self.decoder = (
            nn.Identity() if decoder_kernel is None else depthwise_layer(width, decoder_kernel)
        )
        self.pred = nn.Conv2d(width, channels * stride**2, kernel, padding=kernel // 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(self.pred.bias)

    def forward(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(self.pred(self.decoder(features)), self.stride)


class CellNeck(nn.Module):
    """Makes of a map [B, C, h, w] a token of each patch that a mask hides or shows, [B, N, D].

    These are `finer` times as many as the map's positions along each side; where they are as many,
    the tokens are the map's features.
    """

    def __init__(self, width: int, finer: int):
        super().__init__()
        self.width = self.width_of(width, finer)
        self.finer = finer
        self.lift = nn.Identity() if finer == 1 else nn.Conv2d(width, self.width * finer**2, 1)
        if finer > 1:
            nn.init.trunc_normal_(self.lift.weight, std=0.02)
            nn.init.zeros_(self.lift.bias)

    @staticmethod
    def ratio(stride: int, cell: int) -> int:
        """Return how many patches of `cell` pixels there are along `stride` pixels."""
        assert stride % cell == 0, (stride, cell)
        return stride // cell

    @staticmethod
    def width_of(width: int, finer: int) -> int:
        """Return D, the numbers of a token, of maps with `width` channels."""
        return max(width // finer, 1)

    def forward(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(self.lift(features), self.finer).flatten(2).transpose(1, 2)


def depthwise_layer(width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
    return nn.Sequential(
        OrderedDict(conv=convolution, ln=LayerNorm2d(width, eps=1e-5), act=nn.GELU())
    )


# --------------------------------------------------------------------------------------------------
# Classifiers


def classifier(
    *,
    backbone: str,
    input_size=224,
    num_classes: int = 1000,
    drop: float = 0.0,
    attn_drop: float = 0.0,
    drop_path: float = 0.0,
    init_scale: float = 1.0,
    attn: str = "auto",
    global_pool: str = "avg",
    grad_checkpointing: bool = False,
    **options,
) -> nn.Module:
    """timm's network of the name `backbone` to fine-tune, unchanged but for the factor `init_scale`
    of its head.

    `attn` and `global_pool` choose among what only the repository's ViT has: any value does.
    """
    rates = {"drop_rate": drop, "attn_drop_rate": attn_drop}
    options |= {name: rate for name, rate in rates.items() if rate}
    network = timm_network(
        backbone, to_pair(input_size), num_classes=num_classes, drop_path=drop_path,
        grad_checkpointing=grad_checkpointing, **options,
    )  # fmt: skip
    for parameter in network.get_classifier().parameters():
        parameter.data.mul_(init_scale)
    return network


for _name, _timm_name in TIMM_BACKBONES.items():
    register(_name, classifier, backbone=_timm_name)
register_family("", classifier)  # and any other of timm's by its name
