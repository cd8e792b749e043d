"""An exponential moving average of a network: a method's teacher, or an averaged classifier."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn

Reader = Callable[[list[Tensor]], AbstractContextManager[list[Tensor]]]


class MovingAverage:
    """A float32 copy of `source` that follows its parameters: ema <- m * ema + (1 - m) * source.

    With `copy_buffers` the buffers are the source's and never averaged; otherwise the copy keeps
    buffers of its own, as ConMIM's teacher does (docs/methods/conmim.md#teacher).
    """

    def __init__(self, source: nn.Module, *, copy_buffers: bool = False):
        self.module = copy.deepcopy(source).float().requires_grad_(False)
        follows = {name: p for name, p in source.named_parameters() if p.requires_grad}
        mine = dict(self.module.named_parameters())
        self._blocks: list[tuple[list[Tensor], list[Tensor]]] = []
        for _, group in groupby(follows, key=_block_of):
            names = list(group)
            self._blocks.append(([mine[name] for name in names], [follows[name] for name in names]))
        self._buffers_of = source if copy_buffers else None
        self._read: Reader = nullcontext

    def read_by(self, reader: Reader) -> None:
        """Let `reader` turn lists of the source's parameters into whole float32 tensors.

        An engine that shards or rounds the parameters needs it. It is called block by block, so
        that no more than one block is ever gathered.
        """
        self._read = reader

    @torch.no_grad()
    def update(self, momentum: float, applied: float | Tensor = 1.0) -> None:
        """Make one update; `applied` 0, after a skipped optimizer step, changes nothing."""
        weight = (1.0 - momentum) * applied
        for mine, theirs in self._blocks:
            with self._read(theirs) as whole:
                _lerp(mine, whole, weight)
        if self._buffers_of is not None:
            # looked up each time: a move to another device or dtype replaces buffers
            for mine, theirs in zip(self.module.buffers(), self._buffers_of.buffers(), strict=True):
                mine.copy_(theirs)


def _lerp(mine, theirs, weight: float | Tensor) -> None:
    """Move `mine` toward `theirs` by `weight`.

    A weight on the device, where the host does not know yet whether the step was skipped, has no
    fused form of this call.

    There three fused ones do the same, up to a rounding of the last bit.
    """
    mine = list(mine)
    theirs = [t.to(m.device, m.dtype) for m, t in zip(mine, theirs, strict=True)]
    if not isinstance(weight, Tensor):
        torch._foreach_lerp_(mine, theirs, weight)
        return
    steps = torch._foreach_sub(theirs, mine)
    torch._foreach_mul_(steps, weight.to(mine[0].device, mine[0].dtype))
    torch._foreach_add_(mine, steps)


def _block_of(name: str) -> str:
    """Return `blocks.3` of `blocks.3.attn.qkv.weight`, and "" for names outside a block."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else ""
