"""Loads pre-trained weights into a model and reports what became of every key."""

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimim.checkpoint.files import load_checkpoint, log
from unimim.checkpoint.names import (
    _SHARED_TABLE,
    _TABLE,
    StateDict,
    _expand_shared_table,
    to_native,
)
from unimim.checkpoint.resizing import interpolate_pos_embed, interpolate_rel_pos_bias

PUBLISHED_KEYS = "model|module"  # the published default of --model_key
RUN_KEYS = ("model", "module", "state_dict")  # of the network that was trained, not its average
# head.norm is ConvNeXt's last norm, which pre-training trains too
_HEADS = ("head.", "fc.", "classifier.")
_NO_BACKBONE = (*_HEADS, "neck.", "ema_", "inject.", "mask_token", "mask_gamma")


@dataclass
class LoadReport:
    """What `load_pretrained` did; names are the model's, in `ignored` the checkpoint's.

    loaded: every tensor copied; expanded: those of them that came from the shared bias table;
    interpolated: those resized; rechanneled: a first layer made for another number of channels;
    ignored: checkpoint tensors not used; missing: model tensors left
    as they were; matched: fraction of the encoder's parameter tensors that were loaded.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    rechanneled: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    matched: float = 0.0

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {self.matched:.0%} of the encoder matched"]
        kinds = ("loaded", "expanded", "interpolated", "rechanneled", "ignored", "missing")
        for kind in kinds:
            names = getattr(self, kind)
            if names and kind == "loaded":
                lines.append(f"  {kind} ({len(names)}): {', '.join(_counted(names))}")
            elif names:
                lines.append(f"  {kind} ({len(names)}): {_examples(names, limit=12)}")
        return "\n".join(lines)


def load_pretrained(
    model: nn.Module,
    path_or_state: str | Path | dict[str, Any],
    *,
    model_key: str = PUBLISHED_KEYS,
    prefix: str = "",
    min_matched: float = 0.9,
    new: Collection[str] = (),
) -> LoadReport:
    """Copy the pre-trained weights of a file, https address or loaded dict into `model`.

    Which weights: the first key of `model_key` (split at "|") that the checkpoint has, else the
    checkpoint itself. With the default key a checkpoint of this repository that has a `teacher`
    gives the teacher, which is what the published recipe fine-tunes, and SemAIM's "state_dict" is a
    key too. `prefix` selects the keys under it. The naming is recognized by content; a shared bias
    table is copied into every block, bias tables and positions are resized, a head of another shape
    is left out.

    Raises ValueError, with the model untouched, for a shape that no rule repairs and where less
    than `min_matched` of the encoder's parameter tensors (all but head.*, fc.*, classifier.*,
    fc_norm.*, norm.*) are found. Those whose names contain one of `new` need not be: they may start
    as they are.
    """
    from_file = not isinstance(path_or_state, dict)
    checkpoint = load_checkpoint(path_or_state) if from_file else path_or_state
    name = str(path_or_state) if from_file else "a state dict"
    key, state = _select_weights(checkpoint, model_key, name)
    report = LoadReport(source=f"{name}[{key}]" if key else name)
    target = model.state_dict()
    state = to_native(_below(state, prefix, report), target)
    if "pos_embed" in state and "pos_embed" not in target:
        log.warning(
            "the positions in %s are not used: this --model has none, --abs_pos_emb gives it some",
            report.source,
        )
    fitted = _fit(_expand_to_blocks(state, target, report), model, target, report)
    _check_matched(model, state, min_matched, new, report)
    lost = [
        key
        for key in report.ignored
        if key.startswith("blocks.") and not key.endswith("relative_position_index")
    ]
    if lost:
        log.warning(
            "parts of the blocks in %s have no place in this --model, which computes something "
            "else: %s",
            report.source,
            _examples(lost),
        )
    model.load_state_dict(fitted, strict=False)
    return report


def class_tokens(
    path_or_state: str | Path | dict[str, Any], *, model_key: str = PUBLISHED_KEYS, prefix: str = ""
) -> int | None:
    """Return how many class tokens these weights have, for a model that is to load them.

    None: one, as usual, or none.

    A model with fewer would lose them and the positions. Arguments and
    errors are those of `load_pretrained`.
    """
    from_file = not isinstance(path_or_state, dict)
    name = str(path_or_state) if from_file else "a state dict"
    checkpoint = load_checkpoint(path_or_state, mmap=True) if from_file else path_or_state
    _, state = _select_weights(checkpoint, model_key, name)
    token = to_native(_below(state, prefix, LoadReport(name)), ()).get("cls_token")
    return token.shape[1] if token is not None and token.ndim == 3 and token.shape[1] > 1 else None


def unwrapped(
    checkpoint: dict[str, Any], keys: Sequence[str], prefixes: Sequence[str] = ()
) -> StateDict:
    """Return the tensors of a loaded checkpoint by their names, without what is around them.

    The state dict lies under the first of `keys` that holds one, else it is the checkpoint itself.
    Where names begin with one of `prefixes`, only those names stay, without the prefix; this is
    repeated until no name begins with any.
    """
    key = next((key for key in keys if isinstance(checkpoint.get(key), dict)), None)
    state = checkpoint if key is None else checkpoint[key]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    while any(name.startswith(tuple(prefixes)) for name in tensors):
        prefix = next(p for p in prefixes if any(name.startswith(p) for name in tensors))
        tensors = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
    return tensors


def check_finite(network: nn.Module, name: str | Path) -> None:
    """Raise ValueError if a weight that the file `name` gave a network is not finite."""
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"{name} holds values that are not finite, such as in {key}: its training had "
                "failed; take an earlier checkpoint"
            )


def restore(
    module: nn.Module,
    state: dict[str, Any],
    name: str,
    *,
    published: bool = False,
    whole: bool = False,
) -> None:
    """Load every tensor of a module from a checkpoint or its weights; other names are left out.

    Names of `published` files become ours. Raises ValueError if a tensor is missing or has another
    shape or type, or if with `whole` the file has more.
    """
    weights = unwrapped(state, RUN_KEYS, ("module.",))
    own = module.state_dict()
    if published:
        weights = to_native(weights, own)
    if wrong := [k for k in own if k not in weights or not _alike(own[k], weights[k])]:
        raise ValueError(
            f"{name} does not fit the model that these flags build: {len(wrong)} of its tensors "
            f"are missing there or have another shape or type, among them {', '.join(wrong[:3])}"
        )
    if whole and (left := [k for k in weights if k not in own]):
        raise ValueError(
            f"{name} does not fit the model that these flags build: {len(left)} of its tensors "
            f"have no place in it, among them {', '.join(left[:3])}"
        )
    module.load_state_dict({k: weights[k] for k in own})


def _alike(own: Tensor, there: Tensor) -> bool:
    return own.shape == there.shape and own.is_floating_point() == there.is_floating_point()


def _select_weights(
    checkpoint: dict[str, Any], model_key: str, name: str
) -> tuple[str, dict[str, Any]]:
    """Return the key of the weights that --model_key names, "" for a bare state dict, and them."""
    keys = model_key.split("|")
    if model_key == PUBLISHED_KEYS:
        # a teacher is what the published recipe fine-tunes; SemAIM's files say state_dict
        keys = ["teacher", *keys, "state_dict"]
    for key in keys:
        if isinstance(checkpoint.get(key), dict):
            return key, checkpoint[key]
    if not any(isinstance(value, Tensor) for value in checkpoint.values()):
        found = ", ".join(map(str, checkpoint)) or "nothing"
        raise ValueError(f"{name} has no weights under --model_key {model_key}; it holds {found}")
    return "", checkpoint


def backbone_weights(
    checkpoint: dict[str, Any], name: str, model_key: str = PUBLISHED_KEYS
) -> StateDict:
    """Return a loaded checkpoint's backbone under native names: no classifier, neck or decoder.

    Of OpenMixup's files and of classifiers; of a pre-training method's it is what the method
    exports itself. ValueError: there is nothing else.
    """
    _, state = _select_weights(checkpoint, model_key, name)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    inside = {
        key: value for key, value in tensors.items() if re.match(r"(module\.)?backbone\.", key)
    }
    native = to_native(inside or tensors, ())
    kept = {
        key: v
        for key, v in native.items()
        if key.startswith("head.norm.") or not key.startswith(_NO_BACKBONE)
    }
    if not kept:
        raise ValueError(f"{name} holds no backbone, only {_examples(sorted(native))}")
    return kept


def _below(state: dict[str, Any], prefix: str, report: LoadReport) -> StateDict:
    """Return the tensors whose names begin with `prefix`, without it."""
    inside = [
        key for key, value in state.items() if key.startswith(prefix) and isinstance(value, Tensor)
    ]
    if not inside:
        raise ValueError(f"{report.source} has no tensor under --model_prefix '{prefix}'")
    report.ignored += [key for key in state if key not in inside]
    return {key.removeprefix(prefix): state[key] for key in inside}


def _expand_to_blocks(state: StateDict, target: StateDict, report: LoadReport) -> StateDict:
    """Put the shared bias table into every block of a model that has one table a block."""
    tables = [key for key in target if key.startswith("blocks.") and key.endswith(_TABLE)]
    if _SHARED_TABLE not in state or _SHARED_TABLE in target or not tables:
        return state
    report.expanded = tables
    return _expand_shared_table(state, len(tables))


def _fit(state: StateDict, model: nn.Module, target: StateDict, report: LoadReport) -> StateDict:
    """Return the tensors that the model has a place for, in its shapes; fill the report's
    lists."""
    fitted = {}
    for key, value in state.items():
        if key not in target or (key.startswith(_HEADS) and value.shape != target[key].shape):
            report.ignored.append(key)
            continue
        fitted[key] = _resize(key, value, target[key].shape, model)
        if fitted[key] is not value:
            report.interpolated.append(key)
        channels = target[key].shape[1] if value.ndim == 4 and target[key].ndim == 4 else 0
        if channels and value.shape[1] == 3 and channels != 3:
            fitted[key] = with_channels(value, channels)
            report.rechanneled.append(key)
            way = "summed" if channels == 1 else "repeated, times 3 / the number of channels"
            log.info("%s: %s of 3 channels is %s for %d", report.source, key, way, channels)
        if fitted[key].shape != target[key].shape:
            raise ValueError(
                f"{report.source}: {key} has shape {tuple(value.shape)}, the model wants "
                f"{tuple(target[key].shape)}; is it for this --model and its sizes?"
            )
    report.loaded = list(fitted)
    report.missing = [key for key in target if key not in fitted]
    return fitted


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a first convolution's weight [O, 3, h, w] for images of `channels` channels.

    That of one channel answers to a gray image as the whole weight answers to three equal channels;
    of several channels, the three are repeated, times 3 / `channels`.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


def _resize(key: str, value: Tensor, shape: torch.Size, model: nn.Module) -> Tensor:
    model = model.backbone if key.startswith("backbone.") else model
    if key.endswith(_TABLE) and value.shape[0] != shape[0]:
        # rows of a ViT's class token; a Swin has none
        extra = 3 if hasattr(model, "cls_token") else 0
        side = math.isqrt(value.shape[0] - extra)
        if side**2 + extra != value.shape[0] or side % 2 == 0:
            raise ValueError(
                f"{key} with {value.shape[0]} rows is not of a square window and cannot be resized"
            )
        window = model.patch_embed.grid_size if extra else (math.isqrt(shape[0]) + 1) // 2
        return interpolate_rel_pos_bias(value, (side + 1) // 2, window, extra)
    if key.endswith("pos_embed") and value.shape[1] != shape[1]:  # the decoder's too
        return interpolate_pos_embed(value, model.patch_embed.grid_size, model.num_prefix_tokens)
    return value


def _check_matched(
    model: nn.Module, state: StateDict, min_matched: float, new: Collection[str], report: LoadReport
) -> None:
    outside = (*_HEADS, "fc_norm.", "norm.")
    new = (*new, *getattr(model, "may_be_missing", ()))
    encoder = [key for key, _ in model.named_parameters() if not key.startswith(outside)]
    encoder = [
        key for key in encoder if key in report.loaded or not any(part in key for part in new)
    ]
    unmatched = sorted(set(encoder) - set(report.loaded))
    report.matched = 1 - len(unmatched) / len(encoder)
    if report.matched < min_matched:
        ignored = sorted(set(state) - set(report.loaded))
        raise ValueError(
            f"{report.source} matches only {report.matched:.0%} of the encoder, {min_matched:.0%} "
            f"are needed: the model has {_examples(unmatched)}; the file has "
            f"{_examples(ignored)}; is it for this --model, --model_prefix and --model_key?"
        )


def _examples(names: list[str], limit: int = 4) -> str:
    folded = _fold_blocks(names)
    return ", ".join(folded[:limit]) + (", ..." if len(folded) > limit else "") or "nothing else"


def _counted(names: Collection[str]) -> list[str]:
    """Return the modules that the names begin with, each with the number of its tensors."""
    counts = Counter(re.match(r"(?:backbone\.)?[^.]+", name)[0] for name in names)
    return [f"{start} ({count})" if count > 1 else start for start, count in counts.items()]


def _fold_blocks(names: Collection[str]) -> list[str]:
    """Turn blocks.0.x, blocks.1.x, blocks.2.x, blocks.5.x into blocks.0-2,5.x."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"blocks\.(\d+)\.", name)
        pattern = name if found is None else f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}"
        numbers.setdefault(pattern, []).extend([] if found is None else [int(found.group(1))])
    return [
        pattern.format(_ranges(blocks)) if blocks else pattern
        for pattern, blocks in numbers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
