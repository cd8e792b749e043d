"""MIMDet (arXiv 2204.02964): a pre-trained ViT as a detector's stage, fed by a convolutional stem.

In training only a random subset of the tokens passes the encoder; a decoder, which is pre-trained,
too, completes the map. Shapes in comments: B images, C channels, h x w patches of 16 x 16 pixels,
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

STRIDE = 16  # of the stem, whatever the patch size of the ViT
PADDING = 100.0  # noise of patches that are all padding: they are sampled last

Sizes = Sequence[tuple[int, int]]


class ConvStem(nn.Module):
    """Map images [B, 3, H, W] to maps of strides 4, 8 and 16 with C/4, C/2 and C channels."""

    def __init__(self, width: int):
        super().__init__()
        if width % 8:
            raise ValueError(f"embed_dim {width} is not a multiple of 8, which the stem needs")
        widths = (3, width // 8, width // 4, width // 2, width)
        self.proj = nn.ModuleList(stem_stage(*widths[stage : stage + 2]) for stage in range(4))
        self.proj[3].append(nn.Conv2d(width, width, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = images
        maps = []
        for stage in self.proj:
            x = stage(x)
            maps.append(x)
        return maps[1:]


def stem_stage(width: int, out: int) -> nn.Sequential:
    """Return a stage that halves the resolution."""
    convolution = nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(1, out, eps=1e-6), nn.GELU())


class BiasedAttention(Attention):
    """Attention whose bias comes from the encoder: its table has no rows for a class token."""

    def position_bias(self, shared: Tensor | None) -> Tensor | None:
        return shared


class BiasedBlock(Block):
    """A block with `BiasedAttention`."""

    attention = BiasedAttention


# --------------------------------------------------------------------------------------------------
# Sampling


def sampling_order(noise: Tensor, sizes: Sizes) -> Tensor:
    """Return the order of the patches, int64 [B, L], by ascending noise [B, h, w].

    `sizes` holds each image's height and width in pixels without padding; patches that are all
    padding come last.
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

    Args:
        pos_embed: "sincos" or "none"; a checkpoint's positions are used if it has any. They are not
            trained, and are resized to the map in every forward pass.
        rel_pos_bias: "per_block" gives each block a table for offsets of up to `img_size` pixels;
            larger offsets use its last entry. This, `k_bias=False` and `init_values` are BEiT's
            variant; only MAE's is published.
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

        # a convolutional stem takes the place of the patch embedding
        self.grid = (img_size // STRIDE, img_size // STRIDE)
        self.grad_checkpointing = grad_checkpointing
        self.patch_embed = ConvStem(embed_dim)
        self.pos_embed = fixed_positions(embed_dim, self.grid) if pos_embed == "sincos" else None
        block = partial(
            BiasedBlock,
            embed_dim,
            num_heads,
            mlp_ratio=mlp_ratio,
            drop=0.0,
            init_values=init_values,
            qkv_bias=True,
            k_bias=k_bias,
            attn_drop=0.0,
            kernel=attn,
        )
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(block(drop_path=rate) for rate in rates)

        # a table of its own for each block, for every offset between two patches
        if rel_pos_bias == "per_block":
            rows = (2 * self.grid[0] - 1) ** 2
            for block in self.blocks:
                table = nn.Parameter(torch.zeros(rows, num_heads))
                block.attn.relative_position_bias_table = table
        self.norm = nn.LayerNorm(embed_dim)
        init_linear(self, norm_eps)

    def forward(self, features: Tensor, ids: Tensor | None = None) -> Tensor:
        """Encode the stem's last map [B, C, h, w] to tokens [B, K, C].

        `ids`, int64 [B, K], are the patches to encode; None means all.
        """
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
    """The decoder: sampled tokens [B, K, C], and the stem's features for the rest, to [B, D, h, w].

    Its parameters have the names of MAE's decoder, whose first blocks it consists of.
    """

    def __init__(
        self, width: int, *, dim: int, depth: int, num_heads: int, grid: tuple[int, int], attn: str
    ):
        super().__init__()
        self.decoder_embed = nn.Linear(width, dim)
        self.conv_feat_proj = nn.Linear(width, dim)
        self.decoder_pos_embed = fixed_positions(dim, grid)
        block = partial(
            Block,
            dim,
            num_heads,
            mlp_ratio=4.0,
            drop=0.0,
            drop_path=0.0,
            init_values=None,
            qkv_bias=True,
            k_bias=True,
            attn_drop=0.0,
            kernel=attn,
        )
        self.decoder_blocks = nn.ModuleList(block() for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim)
        init_linear(self, norm_eps=1e-5)

    def forward(self, sampled: Tensor, features: Tensor, order: Tensor | None) -> Tensor:
        """Complete the map.

        `features` [B, C, h, w] are the stem's, before positions; `order`, int64 [B, L], lists the
        sampled patches first.
        """
        grid = tuple(features.shape[2:])
        kept = sampled.shape[1]
        others = tokens_of(features)
        # may be empty; it is projected all the same, because DDP needs the gradient
        others = (others if order is None else take(others, order))[:, kept:]
        x = torch.cat((self.decoder_embed(sampled), self.conv_feat_proj(others)), dim=1)
        x = x if order is None else take(x, order.argsort(1))
        x = x + interpolate_pos_embed(self.decoder_pos_embed, grid, 1)[:, 1:]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x).transpose(1, 2).unflatten(2, grid).contiguous()


def tokens_of(features: Tensor) -> Tensor:
    """Return a map [B, C, h, w] as tokens [B, L, C]."""
    return features.flatten(2).transpose(1, 2)


def fixed_positions(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    """Return sine-cosine positions that are not trained."""
    return nn.Parameter(sincos_pos_embed(dim, grid), requires_grad=False)


def init_linear(module: nn.Module, norm_eps: float) -> None:
    """Initialize linear layers (Xavier) and set the eps of LayerNorms; keep convolutions."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.eps = norm_eps


# --------------------------------------------------------------------------------------------------
# Backbone and detector


@MODELS.register_module()
class MIMDet(nn.Module):
    """Map images [B, 3, H, W] to maps of strides 4, 8, 16, 32 with C/4, C/2, D, D channels.

    Args:
        size: a name in MAE_SIZES; `vit` overrides it and takes the options of `SampledViT`.
        train_sample_ratio, test_sample_ratio: fraction of the tokens that the encoder sees in
            training and evaluation. The published code has one ratio for both; the published
            results are with 0.5 and 1.
        pretrained: file or URL of a checkpoint, preferably with MAE's decoder.
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
        ratios = {"train_sample_ratio": train_sample_ratio, "test_sample_ratio": test_sample_ratio}
        for name, ratio in ratios.items():
            if not 0 < ratio <= 1:
                raise ValueError(f"{name} is {ratio}; it must lie in (0, 1]")
        self.sample_ratios = {True: train_sample_ratio, False: test_sample_ratio}
        vit = MAE_SIZES[size] | vit
        self.encoder = SampledViT(**vit)
        self.decoder = Completion(
            vit["embed_dim"],
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            grid=self.encoder.grid,
            attn=vit.get("attn", "auto"),
        )
        self.pretrained = pretrained
        # sizes of the next batch without padding, set by a detector that knows them
        self.image_sizes: Sizes | None = None

    def init_weights(self) -> None:
        """Load the pre-trained weights; mmengine calls this after construction."""
        if self.pretrained:
            self.load(self.pretrained)

    def load(self, path: str) -> None:
        """Load the encoder, and the decoder if the file has it; raise ValueError on a misfit."""
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
                "%s has no decoder: MIMDet's starts from random weights, for which the published "
                "recipe was not made (users report NaN). Use MAE's whole checkpoint, a lower lr, "
                "or a longer warm-up",
                path,
            )

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the four maps; `noise` [B, h, w] selects patches and is drawn if needed."""
        sizes = self.image_sizes or [tuple(images.shape[2:])] * len(images)
        self.image_sizes = None
        images = F.pad(images, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))
        *fine, features = self.encoder.patch_embed(images)
        order, kept = self.sample(features, noise, sizes)
        sampled = self.encoder(features, None if order is None else order[:, :kept])
        coarse = self.decoder(sampled, features, order)
        maps = (*fine, coarse, F.max_pool2d(coarse, 2))
        return tuple(level.contiguous() for level in maps)

    def sample(
        self, features: Tensor, noise: Tensor | None, sizes: Sizes
    ) -> tuple[Tensor | None, int]:
        """Return the order of the patches, int64 [B, L], and how many of the first are sampled.

        The order is None if all patches are kept.
        """
        batch, _, *grid = features.shape
        ratio = self.sample_ratios[self.training]
        if noise is None and ratio == 1:
            return None, math.prod(grid)
        noise = torch.rand(batch, *grid, device=features.device) if noise is None else noise
        return sampling_order(noise, sizes), max(int(math.prod(grid) * ratio), 1)


@MODELS.register_module()
class SizedMaskRCNN(MaskRCNN):
    """Mask R-CNN that passes the images' sizes without padding to its backbone."""

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
