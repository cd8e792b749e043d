"""The repository's ViT as a backbone of several maps (specs/downstream.md 4.1, 5).

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
    """What turns the 2 src - 1 offsets of a bias table's axis into 2 dst - 1: float64 [2 dst - 1, 2
    src - 1]."""
    return torch.from_numpy(resample(np.eye(2 * src - 1), 0, src, dst))


@lru_cache(maxsize=8)
def index_of(grid: Grid, device: torch.device) -> Tensor:
    """`relative_position_index` of a grid, kept for the next image of that size."""
    return relative_position_index(grid).to(device)


def resized_table(table: Tensor, src: Grid, dst: Grid) -> Tensor:
    """A bias table [rows, h] at another grid, with its gradient:
    `checkpoint.interpolate_rel_pos_bias` as a product."""
    offsets, extra = table.split([len(table) - 3, 3])
    y, x = (resampling_matrix(a, b).to(table) for a, b in zip(src, dst, strict=True))
    offsets = offsets.unflatten(0, (2 * src[0] - 1, 2 * src[1] - 1))
    return torch.cat([torch.einsum("ya,xb,abh->yxh", y, x, offsets).flatten(0, 1), extra])


def resized_positions(pos_embed: Tensor, src: Grid, dst: Grid) -> Tensor:
    """Absolute positions [1, n + rows * columns, C] at another grid, bicubic; the n class tokens
    keep theirs."""
    prefix, patches = pos_embed.split(
        [pos_embed.shape[1] - src[0] * src[1], src[0] * src[1]], dim=1
    )
    grid = patches.transpose(1, 2).unflatten(2, src)
    resized = F.interpolate(grid.float(), size=dst, mode="bicubic", align_corners=False).to(
        pos_embed
    )
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2)], dim=1)


class GridAttention(Attention):
    """Attention whose own bias table fits itself to the `grid` at hand."""

    def __init__(self, *args, grid: Grid | None = None, **options):
        super().__init__(*args, grid=grid, **options)
        self.own_grid = self.grid = grid

    def position_bias(self, shared: Tensor | None) -> Tensor | None:
        if self.relative_position_bias_table is None:
            return shared
        own = bias_at(self.relative_position_bias_table, self.own_grid, self.grid)
        return own if shared is None else own + shared


def bias_at(table: Tensor, src: Grid, dst: Grid) -> Tensor:
    """The bias [h, T, T] of a table that was made for the grid `src`."""
    index = index_of(dst, table.device)
    if src != dst:
        table = resized_table(table, src, dst)
    if torch.is_grad_enabled():
        return bias_of(table, index)
    # in the order of the scores, which a fused kernel would otherwise copy it to
    return table.t().contiguous().index_select(1, index.flatten()).view(-1, *index.shape)


class GridBlock(Block):
    attention = GridAttention


class VisionTransformerBackbone(VisionTransformer):
    """Images [B, 3, H, W] to maps [B, C, H / p, W / p] behind the blocks `out_indices`, contiguous,
    without a norm.

    size: one of `VIT_SIZES`, which other options override. Positions and bias tables fit themselves
    to the images' size; sides are padded with zeros to whole patches. final_norm: the last map is
    normed, as SemanticMIM's MaskFeat form does. pretrained: a checkpoint for `init_weights`; it may
    lack parameters whose names contain one of `may_be_new`.
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
                f"model.backbone.size={size} is unknown; take one of {', '.join(VIT_SIZES)}"
            )
        form = {"num_classes": 0, "global_pool": "token"}
        super().__init__(**VIT_SIZES[size] | form | options)
        if list(out_indices) != sorted(set(out_indices)) or out_indices[-1] != len(self.blocks) - 1:
            raise ValueError(
                f"model.backbone.out_indices={tuple(out_indices)} must ascend to the last block, {len(self.blocks) - 1}"
            )
        if not final_norm:
            self.norm = nn.Identity()
        self.out_indices, self.pretrained, self.may_be_new = (
            tuple(out_indices),
            pretrained,
            tuple(may_be_new),
        )

    def init_weights(self, init_scale: float | None = None) -> None:
        """The constructor draws the weights; mmengine's call, without an argument, then loads
        `pretrained`."""
        if init_scale is not None:
            super().init_weights(init_scale)
        elif self.pretrained:
            load_backbone(self, self.pretrained, new=self.may_be_new)

    # -- what the optimizer asks

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def get_layer_id(self, name: str) -> int:
        """Layer of one of its parameters: 0 is the embedding, `num_layers` + 1 comes behind the
        blocks."""
        return layer_id(name, self.num_layers)

    # -- forward

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        ph, pw = self.patch_embed.patch_size
        images = F.pad(images, (0, -images.shape[3] % pw, 0, -images.shape[2] % ph))
        patches = self.patch_embed.proj(images)
        grid = tuple(patches.shape[2:])
        x, bias = (
            self.embed(patches.flatten(2).transpose(1, 2), self.positions(grid)),
            self.shared_bias(grid),
        )
        maps = []
        for number, block in enumerate(self.blocks):
            block.attn.grid = grid
            x = self._run_block(block, x, bias)
            if number in self.out_indices:
                maps.append(self.to_map(self.norm(x) if block is self.blocks[-1] else x, grid))
        return tuple(maps)

    def to_map(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, T, C] to [B, C, rows, columns]. Compiled RoIAlign misreads any other order in
        memory."""
        return x[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).contiguous()

    def positions(self, grid: Grid) -> Tensor | None:
        own = self.patch_embed.grid_size
        if self.pos_embed is None or grid == own:
            return self.pos_embed
        return resized_positions(self.pos_embed, own, grid)

    def shared_bias(self, grid: Grid) -> Tensor | None:
        if self.rel_pos_bias is None:
            return None
        return bias_at(
            self.rel_pos_bias.relative_position_bias_table, self.patch_embed.grid_size, grid
        )
