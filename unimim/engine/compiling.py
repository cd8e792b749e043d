"""Compiles networks block by block with torch.compile; equal blocks share one graph."""

from collections.abc import Callable
from functools import partial
from types import FunctionType

import timm
import torch
from torch import nn

from modeling_backbones import REPEATED_BLOCKS
from modeling_finetune import ActivatedLinear, Block, DropPath
from modeling_targets import EncoderBlock
from unimim.logs import log


def recompute_gelu(network: nn.Module, when: str) -> None:
    """Set --recompute_gelu in all blocks."""
    for module in network.modules():
        if isinstance(module, ActivatedLinear):
            module.recompute = when


COMPILED = (Block, EncoderBlock, *REPEATED_BLOCKS)


class SharedGraphs:
    """The compiled forward pass that blocks of one type in one list of a network share.

    With and without gradient, in training and evaluation there are separate compilations: torch
    keeps the graphs of a function together, looks through all of them and gives up at the eighth.
    """

    def __init__(self, forward: Callable, backend: str | Callable):
        self.forward = forward
        self.backend = backend
        self.roles: dict[tuple[bool, bool], Callable] = {}

    def __call__(self, block: nn.Module, x: torch.Tensor, *args, **options) -> torch.Tensor:
        role = torch.is_grad_enabled(), block.training
        if role not in self.roles:
            self.roles[role] = torch.compile(
                own_code(self.forward, role), dynamic=False, backend=self.backend
            )
        if role == (False, False):  # the last batch of an evaluation is smaller
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.roles[role](block, x, *args, **options)


def own_code(function: Callable, role: tuple[bool, bool]) -> Callable:
    """Return the same function with code of its own, by which torch keeps its graphs."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{'_'.join(map(str, role))}")
    copy = FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def compile_blocks(*modules: nn.Module | None, backend: str | Callable = "inductor") -> None:
    """Compile the blocks of these networks; blocks of one list and one type share their graphs.

    Hooks stay outside.
    """
    places: dict[tuple[int, str, type], list[nn.Module]] = {}
    for number, module in enumerate(modules):
        for name, part in module.named_modules() if module is not None else ():
            if isinstance(part, COMPILED):
                places.setdefault((number, name.rpartition(".")[0], type(part)), []).append(part)
    if not places:
        log.warning("--compile: this --model has no blocks of equal shape, nothing is compiled")
    for (_, _, kind), blocks in places.items():
        share_stochastic_depth(blocks)
        graphs = SharedGraphs(kind.forward, backend)
        for block in blocks:
            block.forward = partial(graphs, block)


def share_stochastic_depth(blocks: list[nn.Module]) -> None:
    """Give blocks that differ in their drop path rate alone equal graphs."""
    for block in blocks:
        for name, part in list(block.named_modules()):
            if isinstance(part, timm.layers.DropPath):
                block.set_submodule(name, DropPath(part.drop_prob))
    paths = [part for block in blocks for part in block.modules() if isinstance(part, DropPath)]
    if any(path.drop_prob for path in paths):
        device = next(blocks[0].parameters()).device
        for path in paths:
            path.share_graph(device)
