"""Reads what published projects keep beside the weights: how far a training came, its optimizer."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from unimim.checkpoint.loading import RUN_KEYS, unwrapped
from unimim.checkpoint.names import StateDict, to_native

ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}
# what groups of other optimizers with a state like AdamW's have beside its settings
_OF_OTHERS = ("bias_correction", "grad_averaging", "max_grad_norm", "always_adapt")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def finished_epochs(checkpoint: dict[str, Any]) -> int:
    """Return how many epochs a published training had done.

    OpenMMLab's files and SemAIM's count them; the others hold the index of the last one.
    """
    meta = checkpoint.get("meta")
    if isinstance(meta, dict) and "epoch" in meta:
        return int(meta["epoch"])
    counted = isinstance(checkpoint.get("model"), str)  # SemAIM: the name of the network
    return int(checkpoint.get("epoch", -1)) + (0 if counted else 1)


def optimizer_names(
    checkpoint: dict[str, Any], own: StateDict, decayed: dict[str, bool]
) -> list[list[str]] | None:
    """Return our parameters' names in each group of a published AdamW's state, in its order.

    Published optimizers number the parameters in the order of the network, those that decay apart
    from the others. `own` is our network's state dict, `decayed` says of each parameter that is
    trained whether it decays. None: the file has no such state, or numbers, shapes or values do
    not agree.
    """
    saved = checkpoint.get("optimizer")
    if not _is_adamw(saved):
        return None
    weights = unwrapped(checkpoint, RUN_KEYS, ("module.",))
    names = _renamed(weights, to_native(weights, own))
    candidates = []
    for key, value in weights.items():
        name = names.get(key)
        if name in decayed:
            candidates.append((name, decayed[name]))
        # of parameters that only the published network has, by the rule of all of these projects
        elif name not in own and value.is_floating_point() and not key.endswith(_BUFFERS):
            candidates.append((f"{key} (theirs)", value.ndim > 1 and not key.endswith(".bias")))
    ours = [pair for pair in candidates if pair[0] in decayed]
    if len(ours) < len(decayed):  # some are computed from the file's, or not in it
        return None
    for chosen in (candidates, ours):
        arranged = _arranged(saved["param_groups"], chosen)
        if arranged is not None and _fits(saved, arranged, own, decayed):
            return arranged
    return None


def _is_adamw(saved: Any) -> bool:
    if not isinstance(saved, dict) or not saved.get("state") or not saved.get("param_groups"):
        return False
    groups = saved["param_groups"]
    return all("betas" in group for group in groups) and not any(
        name in group for group in groups for name in _OF_OTHERS
    )


def _renamed(weights: StateDict, native: StateDict) -> dict[str, str]:
    """Return our name of each tensor that is taken as it is, not computed from others, once."""
    ours: dict[int, list[str]] = {}
    for name, value in native.items():
        ours.setdefault(id(value), []).append(name)
    found = {key: ours.get(id(value), []) for key, value in weights.items()}
    return {key: names[0] for key, names in found.items() if len(names) == 1}


def _arranged(
    groups: list[dict[str, Any]], chosen: list[tuple[str, bool]]
) -> list[list[str]] | None:
    """Return the names of each group: one group a parameter, or one each with and without decay."""
    counts = [len(group["params"]) for group in groups]
    if sum(counts) != len(chosen):
        return None
    if set(counts) == {1}:
        return [[name] for name, _ in chosen]
    arranged = []
    for group in groups:
        decays = group["weight_decay"] > 0
        arranged.append([name for name, decayed in chosen if decayed == decays])
    return arranged if [len(names) for names in arranged] == counts else None


def _fits(
    saved: dict[str, Any], arranged: list[list[str]], own: StateDict, decayed: Collection[str]
) -> bool:
    """Tell whether every parameter of ours has a state of AdamW's in its own shape."""
    for group, names in zip(saved["param_groups"], arranged, strict=True):
        for number, name in zip(group["params"], names, strict=True):
            if name not in decayed:
                continue
            state = saved["state"].get(number)
            if not isinstance(state, dict) or state.keys() != ADAM_STATE:
                return False
            moments: list[Tensor] = [state["exp_avg"], state["exp_avg_sq"]]
            if any(moment.shape != own[name].shape for moment in moments):
                return False
    return True
