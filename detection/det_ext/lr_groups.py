"""Parameter groups whose rate depends on where a parameter is in the detector (specs/downstream.md 6.7)."""

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PrefixRates:
    """paramwise_cfg["rates"] maps beginnings of names to factors of the optimizer's rate; the longest one counts.

    One-dimensional parameters and biases are not decayed.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict):
        self.config, self.rates = dict(optim_wrapper_cfg), dict(paramwise_cfg["rates"])

    def __call__(self, model: nn.Module) -> OptimWrapper:
        optimizer = dict(self.config.pop("optimizer"))
        optimizer["params"] = prefix_groups(model, optimizer["lr"], optimizer.get("weight_decay", 0.0), self.rates)
        return OPTIM_WRAPPERS.build(self.config, default_args={"optimizer": OPTIMIZERS.build(optimizer)})


def prefix_groups(model: nn.Module, lr: float, weight_decay: float, rates: dict[str, float]) -> list[dict]:
    """Groups of the trainable parameters, each with its lr and weight decay.

    Raises:
        ValueError: a beginning that no parameter has, or a parameter that has none of them.
    """
    model = getattr(model, "module", model)  # of DistributedDataParallel
    groups: dict[str, dict] = {}
    names = [name for name, _ in model.named_parameters()]
    for prefix in rates:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"paramwise_cfg: no parameter's name begins with '{prefix}'")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = longest_prefix(name, rates)
            decay = parameter.ndim > 1 and not name.endswith(".bias")
            group_name = f"{prefix or 'rest'}_{'decay' if decay else 'no_decay'}"
            group = {"lr": lr * rates[prefix], "weight_decay": weight_decay * decay, "group_name": group_name}
            groups.setdefault(group_name, group | {"params": []})["params"].append(parameter)
    return list(groups.values())


def longest_prefix(name: str, rates: dict[str, float]) -> str:
    found = [prefix for prefix in rates if name.startswith(prefix)]
    if not found:
        raise ValueError(f"paramwise_cfg: no rate is given for {name}; '' stands for all others")
    return max(found, key=len)
