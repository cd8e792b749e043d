"""Starts a new pre-training run from weights of another shape: what fits is loaded, the rest stays
fresh."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from timm.layers import resample_patch_embed
from torch import Tensor, nn

from unimim.checkpoint.files import load_checkpoint
from unimim.checkpoint.loading import (
    _counted,
    _examples,
    _expand_to_blocks,
    _fold_blocks,
    _resize,
    unwrapped,
)
from unimim.checkpoint.names import _TABLE, StateDict, to_native
from unimim.checkpoint.resizing import interpolate_pos_embed

_KEYS = ("model", "module", "state_dict", "teacher")
_WRAPPERS = ("module.", "_orig_mod.")
MOST_NAMES = 12  # of tensors in a line; of more, the modules that they are of
_BACKBONE = "backbone."  # what the names of SimMIM's and A2MIM's encoder begin with


@dataclass
class InitialReport:
    """What `load_initial` did; names are the network's, in `ignored` the file's.

    loaded: every tensor copied; resized: those of them that were brought into another shape; fresh:
    the network's tensors that stayed as they were; ignored: the file's that were not used.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"starting from {self.source}: {len(self.loaded)} tensors loaded"]
        for kind in ("resized", "fresh", "ignored"):
            if names := getattr(self, kind):
                folded = _fold_blocks(names)
                shown = folded if len(folded) <= MOST_NAMES else _counted(names)
                lines.append(f"  {kind} ({len(names)}): {', '.join(shown)}")
        return "\n".join(lines)


def load_initial(network: nn.Module, ema_network: nn.Module | None, path: str) -> InitialReport:
    """Copy what fits of a file or https address into a pre-training method and into its ema.

    The file may be whole or an encoder alone, published or of this repository, for another input
    size, patch size or number of channels. An ema takes the file's, else the network's weights.
    ValueError: less than half of the encoder's tensors fit.
    """
    checkpoint = load_checkpoint(path)
    report = InitialReport(f"--init {path}")
    fill(network, unwrapped(checkpoint, _KEYS, _WRAPPERS), report)
    encoder = [key for key in network.state_dict() if not key.startswith(network.not_exported)]
    missing = sorted(set(encoder) - set(report.loaded))
    if 2 * len(missing) > len(encoder):
        raise ValueError(
            f"--init {path} fits {len(encoder) - len(missing)} of the encoder's {len(encoder)} "
            f"tensors: the model has {_examples(missing)}; the file has "
            f"{_examples(report.ignored)}; is it for this --model?"
        )
    if ema_network is not None:
        ema_network.load_state_dict(network.state_dict(), strict=False)
        if isinstance(checkpoint.get("teacher"), dict):
            weights = unwrapped(checkpoint, ("teacher",), _WRAPPERS)
            fill(ema_network, weights, InitialReport(report.source))
    return report


def fill(network: nn.Module, weights: StateDict, report: InitialReport) -> None:
    """Copy into the network what fits of the weights, in any naming; fill the report's lists."""
    target = network.state_dict()
    state = native(weights, target)
    state = _expand_to_blocks(state, target, report)
    vit = getattr(network, "backbone", network)
    classes = state["cls_token"].shape[1] if "cls_token" in state else 1
    fitted = {}
    for key, value in state.items():
        brought = fit(key, value, target[key], vit, classes) if key in target else None
        if brought is None:
            report.ignored.append(key)
            continue
        fitted[key] = brought
        if brought is not value:
            report.resized.append(key)
    report.loaded = list(fitted)
    report.fresh = [key for key in target if key not in fitted]
    network.load_state_dict(fitted, strict=False)


def native(weights: StateDict, target: Collection[str]) -> StateDict:
    """Return the weights under the network's names, those of a backbone inside it too."""
    inside = {key.removeprefix(_BACKBONE): key for key in target if key.startswith(_BACKBONE)}
    state = to_native(weights, target)
    if not inside or any(key in target for key in state if key.startswith(_BACKBONE)):
        return state
    state = to_native(weights, inside)
    return {inside.get(key, key): value for key, value in state.items()}


def fit(key: str, value: Tensor, own: Tensor, vit: nn.Module, classes: int) -> Tensor | None:
    """Return the value in the shape of the network's `own` tensor; None if no rule gives it that.

    `classes`: the number of the file's class tokens.
    """
    if value.shape == own.shape:
        return value
    if value.ndim != own.ndim:
        return None
    if key.endswith("pos_embed") and value.shape[2] == own.shape[2]:
        return resized_positions(value, own, vit, classes)
    if key.endswith("cls_token") and value.shape[2] == own.shape[2]:
        return first_rows(value, own, min(value.shape[1], own.shape[1]))
    if key.endswith("patch_embed.proj.weight") and len(value) == len(own):
        return resized_projection(value, own)
    if key.endswith(_TABLE) and value.shape[1] == own.shape[1]:
        try:
            return _resize(key, value, own.shape, vit)
        except ValueError:  # of no square window
            return None
    return None


def resized_positions(value: Tensor, own: Tensor, vit: nn.Module, classes: int) -> Tensor | None:
    """Return positions [1, k + g * g, C] for the network's grid and class tokens; None if they are
    of no square grid. Class tokens that the file lacks keep the network's rows."""
    prefixes = (count for count in (classes, 1, 0) if is_square(value.shape[1] - count))
    prefix = next(prefixes, None)
    if prefix is None:
        return None
    resized = interpolate_pos_embed(value, vit.patch_embed.grid_size, prefix)
    count = vit.num_prefix_tokens
    brought = first_rows(resized, own, min(prefix, count))
    brought[:, count:] = resized[:, prefix:].to(own)
    return brought


def is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def first_rows(value: Tensor, own: Tensor, count: int) -> Tensor:
    """Return a copy of `own` whose first `count` rows are those of `value`."""
    brought = own.detach().clone()
    brought[:, :count] = value[:, :count].to(own)
    return brought


def resized_projection(value: Tensor, own: Tensor) -> Tensor:
    """Return the projection of patches [C, c, ph, pw] for patches of another size, by the inverse
    of the bilinear resizing of an image, and for other channels, each their mean: a gray image
    gives the same token."""
    channels = own.shape[1]
    if channels != value.shape[1]:
        scale = value.shape[1] / channels
        value = value.mean(1, keepdim=True).repeat(1, channels, 1, 1) * scale
    if value.shape[2:] != own.shape[2:]:
        value = resample_patch_embed(value, list(own.shape[2:]), interpolation="bilinear")
    return value.to(own)
