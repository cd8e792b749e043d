"""A ViT for detection: windowed attention in most blocks, global attention in four.

It follows "Benchmarking Detection Transfer Learning with Vision Transformers", arXiv 2111.11429.
Shapes in comments: B images, C channels, g x g tokens of an image, w x w of a window, n windows, h
heads.
"""

from functools import partial

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from det_ext import loading
from det_ext.offset_bias import OffsetBias
from modeling_finetune import (
    MAE_SIZES,
    Block,
    PatchEmbed,
    check_choice,
    drop_path_rates,
    patchify,
    sincos_pos_embed,
    unpatchify,
)
from unimim.checkpoint.names import StateDict
from unimim.checkpoint.resizing import interpolate_pos_embed
from unimim.openmmlab.checkpoint import log

GROUPS = 4
POSITIONS = ("none", "sincos", "sincos_trainable", "learned")


@MODELS.register_module()
class WindowViT(nn.Module):
    """Map images [B, 3, H, W] of at most `input_size` to four maps [B, C, g, g].

    The blocks form four groups. The last block of a group attends to the whole map, which is
    returned after it; the others attend to windows of `window` x `window` tokens. With
    `rel_pos_bias`, global blocks share one table of relative positions, windowed blocks another.

    Args:
        size: a name in MAE_SIZES; `overrides` replace its values.
        pos_embed: as in `VisionTransformer`; a checkpoint's positions are used if it has any.
            "sincos" is fixed, the others are trained (published: not stated, and transposed).
        k_bias, init_values: True and None for MAE, False and a number for BEiT.
        table_resize: how a checkpoint's table is resized, "bicubic" as published or "geometric" as
            by BEiT.
    """

    def __init__(
        self,
        size: str = "base",
        *,
        input_size: int = 1024,
        patch_size: int = 16,
        window: int = 16,
        mlp_ratio: float = 4.0,
        pos_embed: str = "sincos",
        rel_pos_bias: bool = True,
        k_bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.1,
        table_resize: str = "bicubic",
        attn: str = "auto",
        grad_checkpointing: bool = False,
        pretrained: str = "",
        **overrides: int,
    ):
        super().__init__()
        check_choice("pos_embed", pos_embed, POSITIONS)
        check_choice("table_resize", table_resize, ("bicubic", "geometric"))
        vit = MAE_SIZES[size] | overrides
        dim, depth, heads = vit["embed_dim"], vit["depth"], vit["num_heads"]
        if depth % GROUPS:
            raise ValueError(f"depth {depth}: the blocks form {GROUPS} groups of one size")

        # each group ends with a block of global attention; the others attend within windows
        self.patch_embed = PatchEmbed(input_size, patch_size, 3, dim)
        self.grid = self.patch_embed.grid_size
        self.window = window
        self.group = depth // GROUPS
        if self.grid[0] % window:
            raise ValueError(
                f"window {window} does not divide the {self.grid[0]} tokens along the side of "
                "input_size"
            )

        # the blocks have the names and shapes of pre-training
        self.pos_embed = make_positions(pos_embed, dim, self.grid)
        block = partial(
            Block,
            dim,
            heads,
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

        # one bias for all windows, one for all global blocks
        self.window_bias = OffsetBias(window, heads) if rel_pos_bias and self.group > 1 else None
        self.global_bias = OffsetBias(self.grid[0], heads) if rel_pos_bias else None
        self.table_resize = table_resize
        self.grad_checkpointing = grad_checkpointing
        self.pretrained = pretrained
        self.apply(init_linear)

    def is_global(self, block: int) -> bool:
        """Tell whether a block is the last of its group."""
        return (block + 1) % self.group == 0

    # -- weights

    def init_weights(self) -> None:
        """Load the pre-trained weights; mmengine calls this after construction."""
        if self.pretrained:
            self.load(self.pretrained)

    def load(self, path: str) -> None:
        """Load a file; raise ValueError if it does not fit this model."""
        state = self.shared_tables(loading.weights_without_class(path))
        if self.pos_embed is not None and "pos_embed" in state:
            state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], self.grid, 0)
        elif self.pos_embed is not None:
            log.warning("%s has no positions: they keep their initial values", path)
        names = ("patch_embed", "blocks", "pos_embed", "window_bias", "global_bias")
        loading.load(loading.view_of(self, names), state, path)

    def shared_tables(self, state: StateDict) -> StateDict:
        """Replace a checkpoint's tables by a windowed and a global one: means over their blocks."""
        tables = {name: value for name, value in state.items() if name.endswith(loading.TABLE)}
        state = {name: value for name, value in state.items() if name not in tables}
        for name, bias, wanted in (
            ("window_bias", self.window_bias, False),
            ("global_bias", self.global_bias, True),
        ):
            chosen = [value for key, value in tables.items() if self.shares(key, wanted)]
            if bias is not None and chosen:
                state[f"{name}.{loading.TABLE}"] = self.resized(
                    torch.stack(chosen).mean(0), bias.side
                )
        return state

    def shares(self, key: str, wanted: bool) -> bool:
        """Tell whether a table is for global (or windowed) blocks; a shared one is for both."""
        return not key.startswith("blocks.") or self.is_global(int(key.split(".")[1])) == wanted

    def resized(self, table: Tensor, side: int) -> Tensor:
        """Resize a table [(2 s - 1)^2, h] for a map of `side` x `side`.

        "geometric" is left to the loader.
        """
        if self.table_resize == "geometric":
            return table
        return interpolate_pos_embed(table.unsqueeze(0), 2 * side - 1, 0).squeeze(0)

    # -- forward

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.patch_embed(fit(images, self.patch_embed.img_size))
        x = x if self.pos_embed is None else x + self.pos_embed
        window_bias = None if self.window_bias is None else self.window_bias()
        global_bias = None if self.global_bias is None else self.global_bias()
        maps = []
        for number, block in enumerate(self.blocks):
            if self.is_global(number):
                x = self.run_block(block, x, global_bias)
                maps.append(x.transpose(1, 2).unflatten(2, self.grid).contiguous())
            else:
                x = self.join(self.run_block(block, self.cut(x), window_bias))
        return tuple(maps)

    def run_block(self, block: Block, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, bias, use_reentrant=False)
        return block(x, bias)

    def cut(self, x: Tensor) -> Tensor:
        """Split tokens [B, g * g, C] into windows [B * n, w * w, C]."""
        image = x.transpose(1, 2).unflatten(2, self.grid)
        windows = patchify(image, (self.window, self.window))
        return windows.unflatten(2, (-1, x.shape[-1])).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """Undo `cut`."""
        windows = tuple(side // self.window for side in self.grid)
        patches = x.flatten(1).unflatten(0, (-1, windows[0] * windows[1]))
        return unpatchify(patches, windows, (self.window, self.window)).flatten(2).transpose(1, 2)


def make_positions(kind: str, dim: int, grid: tuple[int, int]) -> nn.Parameter | None:
    """Return positions [1, g * g, C] without a row for a class token; None for "none"."""
    if kind == "none":
        return None
    table = sincos_pos_embed(dim, grid)[:, 1:].clone()
    if kind == "learned":
        nn.init.trunc_normal_(table, std=0.02)
    return nn.Parameter(table, requires_grad=kind != "sincos")


def fit(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad images at the bottom and right with 0, the mean color; raise ValueError if too large."""
    height, width = images.shape[2:]
    if height > size[0] or width > size[1]:
        raise ValueError(
            f"images of {(height, width)} pixels, the backbone was built for input_size={size[0]}"
        )
    return F.pad(images, (0, size[1] - width, 0, size[0] - height))


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
