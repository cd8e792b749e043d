"""MIMDet: a pre-trained ViT as a stage of a detector, fed by a convolutional stem
(specs/downstream.md 6).

In training only a random part of the tokens passes the encoder; a decoder, which is a pre-trained
one too, completes the map. Shapes in comments: B images, C channels, h x w cells of 16 x 16 pixels,
L = h * w, K of them sampled.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmdet.models.detectors import MaskRCNN
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from det_ext import loading
from det_ext.offset_bias import bias_between, bias_of_map
from modeling_finetune import (
    MAE_SIZES,
    Attention,
    Block,
    check_choice,
    drop_path_rates,
    sincos_pos_embed,
    take,
)
from unimim.checkpoint.resizing import interpolate_pos_embed
from unimim.openmmlab.checkpoint import log

STRIDE = 16  # of the stem, whatever patches the ViT was trained on
PADDING = 100.0  # noise of cells without a pixel: they are sampled last

Sizes = Sequence[tuple[int, int]]


class ConvStem(nn.Module):
    """Images [B, 3, H, W] to maps of strides 4, 8 and 16 with C/4, C/2 and C channels
    (specs/downstream.md 6.2)."""

    def __init__(self, width: int):
        super().__init__()
        if width % 8:
            raise ValueError(f"embed_dim {width} is not a multiple of 8, which the stem needs")
        widths = (3, width // 8, width // 4, width // 2, width)
        self.proj = nn.ModuleList(stem_stage(*widths[stage : stage + 2]) for stage in range(4))
        self.proj[3].append(nn.Conv2d(width, width, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = images, []
        for stage in self.proj:
            maps.append(x := stage(x))
        return maps[1:]


def stem_stage(width: int, out: int) -> nn.Sequential:
    convolution = nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(1, out, eps=1e-6), nn.GELU())


class BiasedAttention(Attention):
    """Its own table has no rows for a class token: the encoder looks it up and hands the bias
    over."""

    def position_bias(self, shared: Tensor | None) -> Tensor | None:
        return shared


class BiasedBlock(Block):
    attention = BiasedAttention


# --------------------------------------------------------------------------------------------------
# Sampling


def sampling_order(noise: Tensor, sizes: Sizes) -> Tensor:
    """Noise [B, h, w] to the order of cells int64 [B, L], ascending; those wholly in the padding of
    an image come last.

    sizes: height and width in pixels of each image without its padding.
    """
    noise = noise.clone()
    for image, (height, width) in zip(noise, sizes, strict=True):
        image[math.ceil(height / STRIDE) :] = PADDING
        image[:, math.ceil(width / STRIDE) :] = PADDING
    return noise.flatten(1).argsort(dim=1, stable=True)


# --------------------------------------------------------------------------------------------------
# The parts


class SampledViT(nn.Module):
    """The encoder: a stem, fixed positions, and the blocks of a ViT without class token.

    pos_embed: "sincos" or "none"; of a checkpoint its own are taken. They are never trained, and
    are resized to the map at each forward. rel_pos_bias: "per_block" gives each block a table for
    offsets of up to `img_size` pixels, beyond which the last entry holds (BEiT's form, as
    `k_bias=False` and `init_values` are; published is MAE's alone).
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        img_size: int = 800,
        pos_embed: str = "sincos",
        rel_pos_bias: str = "none",
        k_bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.1,
        norm_eps: float = 1e-5,
        attn: str = "auto",
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        check_choice("pos_embed", pos_embed, ("sincos", "none"))
        check_choice("rel_pos_bias", rel_pos_bias, ("per_block", "none"))
        self.grid, self.grad_checkpointing = (
            (img_size // STRIDE, img_size // STRIDE),
            grad_checkpointing,
        )
        self.patch_embed = ConvStem(embed_dim)
        self.pos_embed = fixed_positions(embed_dim, self.grid) if pos_embed == "sincos" else None
        block = partial(
            BiasedBlock, embed_dim, num_heads, mlp_ratio=mlp_ratio, drop=0.0, init_values=init_values, qkv_bias=True,
            k_bias=k_bias, attn_drop=0.0, kernel=attn,
        )  # fmt: skip
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(block(drop_path=rate) for rate in rates)
        for each in self.blocks if rel_pos_bias == "per_block" else ():
            rows = (2 * self.grid[0] - 1) ** 2
            each.attn.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.norm = nn.LayerNorm(embed_dim)
        init_linear(self, norm_eps)

    def forward(self, features: Tensor, ids: Tensor | None = None) -> Tensor:
        """The stem's last map [B, C, h, w] to the tokens [B, K, C] of the cells int64 [B, K], of
        all cells in order."""
        grid = tuple(features.shape[2:])
        x = tokens_of(features)
        if self.pos_embed is not None:
            x = x + interpolate_pos_embed(self.pos_embed, grid, 1)[:, 1:]
        x = x if ids is None else take(x, ids)
        for block in self.blocks:
            x = self.run_block(block, x, ids, grid)
        return self.norm(x)

    def run_block(
        self, block: Block, x: Tensor, ids: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self.apply_block, block, x, ids, grid, use_reentrant=False)
        return self.apply_block(block, x, ids, grid)

    def apply_block(
        self, block: Block, x: Tensor, ids: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        table = block.attn.relative_position_bias_table
        if table is None:
            return block(x)
        return block(x, bias_of_map(table, grid) if ids is None else bias_between(table, ids, grid))


class Completion(nn.Module):
    """The decoder: sampled tokens [B, K, C] and, for the rest, the stem's features, to a map [B, D,
    h, w].

    Names are those of MAE's decoder, whose first blocks these are (specs/downstream.md 6.4).
    """

    def __init__(
        self, width: int, *, dim: int, depth: int, num_heads: int, grid: tuple[int, int], attn: str
    ):
        super().__init__()
        self.decoder_embed, self.conv_feat_proj = nn.Linear(width, dim), nn.Linear(width, dim)
        self.decoder_pos_embed = fixed_positions(dim, grid)
        block = partial(
            Block, dim, num_heads, mlp_ratio=4.0, drop=0.0, drop_path=0.0, init_values=None, qkv_bias=True, k_bias=True,
            attn_drop=0.0, kernel=attn,
        )  # fmt: skip
        self.decoder_blocks = nn.ModuleList(block() for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim)
        init_linear(self, norm_eps=1e-5)

    def forward(self, sampled: Tensor, features: Tensor, order: Tensor | None) -> Tensor:
        """features [B, C, h, w]: of the stem, before positions; order int64 [B, L]: the sampled
        cells come first."""
        grid, kept = tuple(features.shape[2:]), sampled.shape[1]
        others = tokens_of(features)
        others = (others if order is None else take(others, order))[
            :, kept:
        ]  # may be none: DDP wants the gradient
        x = torch.cat((self.decoder_embed(sampled), self.conv_feat_proj(others)), dim=1)
        x = x if order is None else take(x, order.argsort(1))
        x = x + interpolate_pos_embed(self.decoder_pos_embed, grid, 1)[:, 1:]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x).transpose(1, 2).unflatten(2, grid).contiguous()


def tokens_of(features: Tensor) -> Tensor:
    """[B, C, h, w] to [B, L, C]."""
    return features.flatten(2).transpose(1, 2)


def fixed_positions(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(sincos_pos_embed(dim, grid), requires_grad=False)


def init_linear(module: nn.Module, norm_eps: float) -> None:
    """Xavier for linear layers, torch's own for convolutions; the released code's LayerNorms have
    another eps."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias) if part.bias is not None else None
        elif isinstance(part, nn.LayerNorm):
            part.eps = norm_eps


# --------------------------------------------------------------------------------------------------
# Backbone and detector


@MODELS.register_module()
class MIMDet(nn.Module):
    """Images [B, 3, H, W] to maps of strides 4, 8, 16, 32 with C/4, C/2, D, D channels.

    size: a name in MAE_SIZES; `vit` overrides it and takes the options of `SampledViT`.
    train_sample_ratio, test_sample_ratio: share of the tokens that the encoder sees in training and
    evaluation; the published code has one ratio for both, the published numbers are of 0.5 and 1.
    pretrained: file or address of a checkpoint, best one that has MAE's decoder.
    """

    def __init__(
        self,
        size: str = "base",
        *,
        train_sample_ratio: float = 0.5,
        test_sample_ratio: float = 1.0,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        decoder_num_heads: int = 16,
        pretrained: str = "",
        **vit,
    ):
        super().__init__()
        for name, ratio in (
            ("train_sample_ratio", train_sample_ratio),
            ("test_sample_ratio", test_sample_ratio),
        ):
            if not 0 < ratio <= 1:
                raise ValueError(f"{name} is a share in (0, 1], not {ratio}")
        self.sample_ratios = {True: train_sample_ratio, False: test_sample_ratio}
        vit = MAE_SIZES[size] | vit
        self.encoder = SampledViT(**vit)
        self.decoder = Completion(
            vit["embed_dim"], dim=decoder_dim, depth=decoder_depth, num_heads=decoder_num_heads, grid=self.encoder.grid,
            attn=vit.get("attn", "auto"),
        )  # fmt: skip
        self.pretrained = pretrained
        self.image_sizes: Sizes | None = (
            None  # of the next batch; a detector that knows them sets them
        )

    def init_weights(self) -> None:
        """mmengine's call after construction, which has drawn weights."""
        if self.pretrained:
            self.load(self.pretrained)

    def load(self, path: str) -> None:
        """Encoder, and decoder if the file has one. ValueError: the file is not for this model."""
        state = loading.weights_without_class(path, prefix=1)
        positions = () if self.encoder.pos_embed is None else ("pos_embed",)
        grid = self.encoder.grid
        loading.load_parts(
            self.encoder, ("blocks", "norm", *positions), state, grid, f"{path} (encoder)"
        )
        if loading.has_decoder(state):
            names = ("decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm")
            loading.load_parts(self.decoder, names, state, grid, f"{path} (decoder)")
        else:
            log.warning(
                "%s has no decoder: MIMDet's starts from random weights, which the published recipe is not made for "
                "(users met NaN). Take MAE's whole checkpoint, or a lower rate or a longer warm-up", path,
            )  # fmt: skip

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """noise [B, h, w], by which cells are sampled, is drawn if it is not given and not all are
        kept."""
        sizes = self.image_sizes or [tuple(images.shape[2:])] * len(images)
        self.image_sizes = None
        images = F.pad(images, [part for side in images.shape[:1:-1] for part in (0, -side % 32)])
        *fine, features = self.encoder.patch_embed(images)
        order, kept = self.sample(features, noise, sizes)
        sampled = self.encoder(features, None if order is None else order[:, :kept])
        coarse = self.decoder(sampled, features, order)
        maps = (*fine, coarse, F.max_pool2d(coarse, 2))
        return tuple(level.contiguous() for level in maps)

    def sample(
        self, features: Tensor, noise: Tensor | None, sizes: Sizes
    ) -> tuple[Tensor | None, int]:
        """The order of the cells int64 [B, L], the first K of which are sampled, and K; None is
        their own order."""
        batch, _, *grid = features.shape
        ratio = self.sample_ratios[self.training]
        if noise is None and ratio == 1:
            return None, math.prod(grid)
        noise = torch.rand(batch, *grid, device=features.device) if noise is None else noise
        return sampling_order(noise, sizes), max(int(math.prod(grid) * ratio), 1)


@MODELS.register_module()
class SizedMaskRCNN(MaskRCNN):
    """Mask R-CNN that tells its backbone how much of each image in a batch is no padding."""

    def loss(self, batch_inputs, batch_data_samples):
        self.tell_sizes(batch_data_samples)
        return super().loss(batch_inputs, batch_data_samples)

    def predict(self, batch_inputs, batch_data_samples, rescale=True):
        self.tell_sizes(batch_data_samples)
        return super().predict(batch_inputs, batch_data_samples, rescale)

    def _forward(self, batch_inputs, batch_data_samples):
        self.tell_sizes(batch_data_samples)
        return super()._forward(batch_inputs, batch_data_samples)

    def tell_sizes(self, samples) -> None:
        self.backbone.image_sizes = [tuple(sample.img_shape[:2]) for sample in samples]
