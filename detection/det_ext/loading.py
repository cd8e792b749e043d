"""Load pre-trained weights into detectors' backbones, which have no class token.

All weights go through the repository's loader, which resizes, reports, and refuses files that leave
most of a model random.
"""

import math
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn

from unimim.checkpoint.files import load_checkpoint
from unimim.checkpoint.loading import backbone_weights, load_pretrained
from unimim.checkpoint.names import StateDict
from unimim.openmmlab.checkpoint import log

TABLE = "relative_position_bias_table"
_CLASS_ROWS = 3


def weights_without_class(path: str | Path, *, prefix: int = 0) -> StateDict:
    """Return a file's encoder weights under native names, for a model without class tokens.

    Bias tables [R, h] lose the rows of the class token; positions [1, n + N, C] keep `prefix` of
    the n rows of class tokens.
    """
    state = backbone_weights(load_checkpoint(path), str(path))
    tokens = sum(state[name].shape[1] for name in ("cls_token", "reg_token") if name in state)
    for name, value in state.items():
        if name.endswith(TABLE):
            state[name] = without_class_rows(value)
        elif name.endswith("pos_embed"):
            state[name] = value[:, max(tokens - prefix, 0) :]
    return state


def without_class_rows(table: Tensor) -> Tensor:
    """Remove a bias table's rows of the class token: [(2 s - 1)^2 + 3, h] to [(2 s - 1)^2, h].

    A table without such rows is returned as it is.
    """
    side = math.isqrt(len(table) - _CLASS_ROWS)
    return table[:-_CLASS_ROWS] if side**2 == len(table) - _CLASS_ROWS else table


def has_decoder(state: StateDict) -> bool:
    """Tell whether the weights include MAE's decoder."""
    return any(name.startswith("decoder_blocks.") for name in state)


def load_parts(
    owner: nn.Module, names: tuple[str, ...], state: StateDict, grid: tuple[int, int], source: str
) -> None:
    """Load weights into the named parts of `owner`, ignoring its other parts.

    `grid` is the grid of its positions, which follow one row for a class token.

    Raises:
        ValueError: `state` has less than 90 % of these parts, or a shape does not fit.
    """
    view = view_of(owner, names)
    view.patch_embed, view.num_prefix_tokens = SimpleNamespace(grid_size=grid), 1
    load(view, state, source)


def view_of(owner: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Return a module of the named parts only, so that the loader's 90 % rule refers to them."""
    view = nn.Module()
    for name in names:
        setattr(view, name, getattr(owner, name))
    return view


def load(model: nn.Module, state: StateDict, source: str) -> None:
    """Load weights and log the report; raise ValueError if less than 90 % of `model` match."""
    try:
        report = load_pretrained(model, state)
    except ValueError as error:
        raise ValueError(f"--pretrained {source}: {error}") from error
    report.source = source
    log.info("%s", report)
