"""Use the repository's ViT as a backbone that returns several feature maps.

Shapes in comments: B images, T tokens, C channels, h heads; a grid is (rows, columns) of patches.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_finetune import (
    VIT_SIZES,
    Attention,
    Block,
    VisionTransformer,
    bias_of,
    relative_position_index,
)
from optim_factory import layer_id
from unimim.checkpoint.resizing import resample
from unimim.openmmlab.checkpoint import load_backbone

Grid = tuple[int, int]


@lru_cache(maxsize=8)
def resampling_matrix(src: int, dst: int) -> Tensor:
    """Return the matrix that resamples one axis of a bias table, [2 dst - 1, 2 src - 1] float64."""
    return torch.from_numpy(resample(np.eye(2 * src - 1), 0, src, dst))


@lru_cache(maxsize=8)
def index_of(grid: Grid, device: torch.device) -> Tensor:
    """Return `relative_position_index` of a grid, cached for the next image of that size."""
    return relative_position_index(grid).to(device)


def resized_table(table: Tensor, src: Grid, dst: Grid) -> Tensor:
    """Resize a bias table [rows, h] to another grid, differentiably.

    This is `interpolate_rel_pos_bias` as a matrix product.
    """
    offsets, extra = table.split([len(table) - 3, 3])
    y = resampling_matrix(src[0], dst[0]).to(table)
    x = resampling_matrix(src[1], dst[1]).to(table)
    offsets = offsets.unflatten(0, (2 * src[0] - 1, 2 * src[1] - 1))
    return torch.cat([torch.einsum("ya,xb,abh->yxh", y, x, offsets).flatten(0, 1), extra])


def resized_positions(pos_embed: Tensor, src: Grid, dst: Grid) -> Tensor:
    """Resize absolute positions [1, n + rows * columns, C] to another grid, bicubically.

    The positions of the n class tokens are kept.
    """
    count = src[0] * src[1]
    prefix, patches = pos_embed.split([pos_embed.shape[1] - count, count], dim=1)
    grid = patches.transpose(1, 2).unflatten(2, src)
    resized = F.interpolate(grid.float(), size=dst, mode="bicubic", align_corners=False)
    resized = resized.to(pos_embed).flatten(2).transpose(1, 2)
    return torch.cat([prefix, resized], dim=1)


class GridAttention(Attention):
    """Attention whose bias table is resized to the current `grid`."""

    def __init__(self, *args, grid: Grid | None = None, **options):
        super().__init__(*args, grid=grid, **options)
        self.own_grid = self.grid = grid

    def position_bias(self, shared: Tensor | None) -> Tensor | None:
        if self.relative_position_bias_table is None:
            return shared
        bias = bias_at(self.relative_position_bias_table, self.own_grid, self.grid)
        return bias if shared is None else bias + shared


def bias_at(table: Tensor, src: Grid, dst: Grid) -> Tensor:
    """Return the bias [h, T, T] on the grid `dst` of a table made for the grid `src`."""
    index = index_of(dst, table.device)
    if src != dst:
        table = resized_table(table, src, dst)
    if torch.is_grad_enabled():
        return bias_of(table, index)
    # contiguous in the order of the scores; a fused kernel would otherwise copy it
    return table.t().contiguous().index_select(1, index.flatten()).view(-1, *index.shape)


class GridBlock(Block):
    """A block whose attention adapts to the current grid."""

    attention = GridAttention


class VisionTransformerBackbone(VisionTransformer):
    """Map images [B, 3, H, W] to contiguous feature maps [B, C, H / p, W / p] after some blocks.

    Positions and bias tables are resized to the images' size; images are padded with zeros to whole
    patches.

    Args:
        size: one of `VIT_SIZES`, which other options override.
        out_indices: blocks whose maps are returned, without a norm.
        final_norm: whether the last map passes the final norm, as in SemanticMIM with MaskFeat.
        pretrained: a checkpoint for `init_weights`.
        may_be_new: parameters whose names contain one of these may be missing in the checkpoint.
    """

    block = GridBlock

    def __init__(
        self,
        *,
        size: str = "base",
        out_indices: Sequence[int] = (3, 5, 7, 11),
        final_norm: bool = False,
        pretrained: str | None = None,
        may_be_new: Collection[str] = (),
        **options,
    ):
        if size not in VIT_SIZES:
            raise ValueError(
                f"model.backbone.size={size} is unknown; use one of {', '.join(VIT_SIZES)}"
            )
        headless = {"num_classes": 0, "global_pool": "token"}
        super().__init__(**VIT_SIZES[size] | headless | options)
        if list(out_indices) != sorted(set(out_indices)) or out_indices[-1] != len(self.blocks) - 1:
            raise ValueError(
                f"model.backbone.out_indices={tuple(out_indices)} must ascend to the last block, "
                f"{len(self.blocks) - 1}"
            )
        if not final_norm:
            self.norm = nn.Identity()
        self.out_indices = tuple(out_indices)
        self.pretrained = pretrained
        self.may_be_new = tuple(may_be_new)

    def init_weights(self, init_scale: float | None = None) -> None:
        """Draw the weights, or, called by mmengine without an argument, load `pretrained`."""
        if init_scale is not None:
            super().init_weights(init_scale)
        elif self.pretrained:
            load_backbone(self, self.pretrained, new=self.may_be_new)

    # -- for layer-wise lr decay

    @property
    def num_layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def get_layer_id(self, name: str) -> int:
        """Return a parameter's layer: 0 for the embedding, `num_layers` + 1 after the blocks."""
        return layer_id(name, self.num_layers)

    # -- forward

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps after the blocks `out_indices`."""
        ph, pw = self.patch_embed.patch_size
        images = F.pad(images, (0, -images.shape[3] % pw, 0, -images.shape[2] % ph))
        patches = self.patch_embed.proj(images)
        grid = tuple(patches.shape[2:])
        x = self.embed(patches.flatten(2).transpose(1, 2), self.positions(grid))
        bias = self.shared_bias(grid)
        maps = []
        for number, block in enumerate(self.blocks):
            block.attn.grid = grid
            x = self._run_block(block, x, bias)
            if number in self.out_indices:
                maps.append(self.to_map(self.norm(x) if block is self.blocks[-1] else x, grid))
        return tuple(maps)

    def to_map(self, x: Tensor, grid: Grid) -> Tensor:
        """Return tokens [B, T, C] as a contiguous map [B, C, rows, columns].

        Compiled RoIAlign misreads any other memory layout.
        """
        return x[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).contiguous()

    def positions(self, grid: Grid) -> Tensor | None:
        """Return the absolute positions for a grid."""
        trained_grid = self.patch_embed.grid_size
        if self.pos_embed is None or grid == trained_grid:
            return self.pos_embed
        return resized_positions(self.pos_embed, trained_grid, grid)

    def shared_bias(self, grid: Grid) -> Tensor | None:
        """Return the bias that all blocks share for a grid."""
        if self.rel_pos_bias is None:
            return None
        table = self.rel_pos_bias.relative_position_bias_table
        return bias_at(table, self.patch_embed.grid_size, grid)
