"""An optimizer's state by the names of the parameters, which every engine writes and reads.

A named state is {"state": {name: {key: value}}, "groups": [{"names": [...], key: value}]}: of each
parameter what its optimizer keeps, whole, and of each group its settings and counters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Named = dict[str, Any]

# How an optimizer computes on a device, not what: this run's, whatever the file says.
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def group_names(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each group of the optimizer that has any."""
    names = {id(p): name for name, p in network.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        if group["params"]:
            found.append([names[id(p)] for p in group["params"]])
    return found


def by_name(state: dict[str, Any], names: list[list[str]]) -> Named:
    """Return the `state_dict()` of an optimizer, which goes by number, by the parameters' names."""
    named = {}
    groups = []
    for own, group in zip(names, state["param_groups"], strict=True):
        for name, number in zip(own, group["params"], strict=True):
            if state["state"].get(number):
                named[name] = state["state"][number]
        groups.append({"names": own, **without_params(group)})
    return {"state": named, "groups": groups}


def by_number(saved: Named, names: list[list[str]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a named state as a `state_dict()` over this run's groups of `names`, in memory of its
    own."""
    state = {}
    arranged = []
    first = 0
    for own, group in zip(names, merged_groups(saved, names, groups), strict=True):
        numbers = list(range(first, first + len(own)))
        for name, number in zip(own, numbers, strict=True):
            if name in saved["state"]:
                state[number] = in_own_memory(saved["state"][name])
        arranged.append({**group, "params": numbers})
        first += len(own)
    return {"state": state, "param_groups": arranged}


def merged_groups(
    saved: Named, names: list[list[str]], groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return what each group keeps: what the file has for its first known name, else this run's."""
    place = {name: group for group in saved["groups"] for name in group["names"]}
    merged = []
    for own, group in zip(names, groups, strict=True):
        base = next((place[name] for name in own if name in place), group)
        ours = {key: group[key] for key in IMPLEMENTATION if key in group}
        merged.append(without_params({**base, **ours}))
    return merged


def without_params(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's settings and counters."""
    return {key: value for key, value in group.items() if key not in ("params", "names")}


def elementwise_keys(saved: Named, shapes: dict[str, torch.Size]) -> set[str]:
    """Return the keys that hold a number for each number of a parameter, such as a moment."""
    found: set[str] = set()
    others: set[str] = set()
    for name, state in saved["state"].items():
        for key, value in state.items():
            fits = isinstance(value, Tensor) and value.shape == shapes.get(name, value.shape)
            (found if fits and value.ndim else others).add(key)
    return found - others


def misshapen(saved: Named, shapes: dict[str, torch.Size]) -> str:
    """Return a key and a parameter whose value there has another shape than the parameter, where
    those of others have the same; empty if there is none."""
    fitting: set[str] = set()
    others: dict[str, str] = {}
    for name, shape in shapes.items():
        for key, value in saved["state"].get(name, {}).items():
            if isinstance(value, Tensor) and value.ndim:
                if value.shape == shape:
                    fitting.add(key)
                else:
                    others[key] = name
    wrong = [f"{key} of {name}" for key, name in others.items() if key in fitting]
    return wrong[0] if wrong else ""


def latest(states: Sequence[dict[str, Any]], keys: set[str]) -> dict[str, Any]:
    """Return what the state with the most steps holds beside `keys`; empty without any state."""
    best = max(states, key=lambda state: float(state.get("step", 0)), default={})
    return {key: in_own_memory(value) for key, value in best.items() if key not in keys}


def renamed(saved: Named, names: dict[str, str]) -> Named:
    """Return a named state under other names; those that `names` lacks stay."""
    state = {names.get(name, name): value for name, value in saved["state"].items()}
    groups = []
    for group in saved["groups"]:
        groups.append({**group, "names": [names.get(name, name) for name in group["names"]]})
    return {"state": state, "groups": groups}


def in_own_memory(value: Any) -> Any:
    """Return a copy of nested dicts and lists whose tensors are not mapped from a file."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: in_own_memory(item) for key, item in value.items()}
    return [in_own_memory(item) for item in value] if isinstance(value, list) else value
