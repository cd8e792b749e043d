"""Build parameter groups with layer-wise lr decay for a segmentor or detector."""

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
    """Return optimizer groups whose lr is `lr` * `layer_decay` ** (last - layer).

    Heads and necks are the last layer; the backbone's `num_layers` and `get_layer_id(name)` give
    the layer of its parameters. One-dimensional parameters, names that end in `.bias`, and names
    (relative to the backbone) in `no_decay_names` are not decayed; positions and class tokens are
    by default, as published.
    """
    last = model.backbone.num_layers + 1
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # heads and necks are not in the backbone
        inner = name.removeprefix("backbone.")
        layer = model.backbone.get_layer_id(inner) if inner != name else last
        decays = parameter.ndim > 1 and not name.endswith(".bias") and inner not in no_decay_names

        # one group for each layer and kind
        key = f"layer_{layer}_{'decay' if decays else 'no_decay'}"
        scale = layer_decay ** (last - layer)
        new = {
            "params": [],
            "param_names": [],
            "group_name": key,
            "lr_scale": scale,
            "lr": lr * scale,
            "weight_decay": weight_decay if decays else 0.0,
        }
        group = groups.setdefault(key, new)
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Use `layer_groups` in mmengine: paramwise_cfg=dict(layer_decay=0.65, no_decay_names=())."""

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs) -> None:
        """Append the groups of `module` to `params`."""
        params += layer_groups(module, self.base_lr, self.base_wd or 0.0, **self.paramwise_cfg)
