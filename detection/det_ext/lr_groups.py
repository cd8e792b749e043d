"""Build parameter groups whose lr depends on the part of the detector."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


def prefix_groups(
    model: nn.Module, lr: float, weight_decay: float, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Return optimizer groups; `rates` maps prefixes of parameter names to factors of `lr`.

    The longest matching prefix counts. One-dimensional parameters and biases are not decayed.

    Raises:
        ValueError: no parameter matches a prefix, or no prefix matches a parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in rates:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"paramwise_cfg.rates: no parameter's name begins with '{prefix}'")
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = longest_prefix(name, rates)
        decays = parameter.ndim > 1 and not name.endswith(".bias")
        key = f"{prefix.rstrip('.') or 'rest'}_{'decay' if decays else 'no_decay'}"
        values = {"lr": lr * rates[prefix], "weight_decay": weight_decay if decays else 0.0}
        group = groups.setdefault(
            key, {"params": [], "param_names": [], "group_name": key, **values}
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def longest_prefix(name: str, rates: dict[str, float]) -> str:
    """Return the longest prefix in `rates` of a parameter's name."""
    matching = [prefix for prefix in rates if name.startswith(prefix)]
    if not matching:
        raise ValueError(f"paramwise_cfg.rates: none is given for {name}; '' stands for all others")
    return max(matching, key=len)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PrefixRates(DefaultOptimWrapperConstructor):
    """Use `prefix_groups` in mmengine: paramwise_cfg=dict(rates={"backbone.": 0.5, "": 2.0})."""

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs) -> None:
        params += prefix_groups(module, self.base_lr, self.base_wd or 0.0, **self.paramwise_cfg)
