"""Layer-wise learning rates of a segmentor or detector by its backbone's structure
(specs/downstream.md 4.4)."""

from collections.abc import Collection
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn


def layer_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    no_decay_names: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Optimizer groups: factor `layer_decay` ** (last - layer) of `lr`, where heads and necks are
    the last layer.

    The backbone says with `num_layers` and `get_layer_id(name)` where a parameter is.
    One-dimensional parameters, names that end in `.bias`, and names below the backbone in
    `no_decay_names` are not decayed: by default positions and class tokens are, as published.
    """
    last = model.backbone.num_layers + 1
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = name.removeprefix("backbone.")
        layer = model.backbone.get_layer_id(inner) if inner != name else last
        decays = parameter.ndim > 1 and not name.endswith(".bias") and inner not in no_decay_names
        key = f"layer_{layer}_{'decay' if decays else 'no_decay'}"
        scale = layer_decay ** (last - layer)
        group = groups.setdefault(
            key,
            {
                "params": [], "param_names": [], "group_name": key, "lr_scale": scale, "lr": lr * scale,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )  # fmt: skip
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """mmengine's way to `layer_groups`: paramwise_cfg = dict(layer_decay=0.65,
    no_decay_names=())."""

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs) -> None:
        params += layer_groups(module, self.base_lr, self.base_wd or 0.0, **self.paramwise_cfg)
