"""Parameter groups with layer-wise learning-rate decay, optimizers by name, and per-step cosine schedules."""

import difflib
import importlib
import math
import re
from argparse import Namespace
from collections.abc import Collection
from typing import Any

import numpy as np
import timm.optim
import torch
from torch import nn

Groups = list[dict[str, Any]]
LR_SCHEDULES = ("cosine", "mae", "step")

_EMBEDDING_NAMES = {"cls_token", "mask_token", "pos_embed"}
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def layer_id(name: str, num_layers: int) -> int:
    """Depth of parameter `name` in a transformer of `num_layers` blocks (spec ConMIM 5.2; MAE's rule is the same).

    0 = patch embedding, class and mask tokens, positions; i + 1 = block i with its own bias table;
    num_layers + 1 = everything else: a shared bias table, the last norms, the head.
    """
    if name in _EMBEDDING_NAMES or name.startswith("patch_embed."):
        return 0
    block = _BLOCK.match(name)
    return int(block.group(1)) + 1 if block else num_layers + 1


def layer_scales(layer_decay: float, num_layers: int) -> np.ndarray:
    """Learning-rate factor of layers 0 ... num_layers + 1, float64: layer_decay ** (num_layers + 1 - layer), last 1."""
    return layer_decay ** np.arange(num_layers + 1, -1, -1, dtype=np.float64)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float | None = None,
    no_decay_names: Collection[str] = (),
) -> Groups:
    """Optimizer groups of the trainable parameters of `model`, in order of first appearance (spec ConMIM 5.1, 5.2).

    One-dimensional parameters, names that end in `.bias`, and those in `model.no_weight_decay()` or `no_decay_names`
    are not decayed. So a model whose `no_weight_decay()` is empty follows MAE's rule for pre-training, where class and
    mask tokens decay; with the class token and the positions in it, BEiT's rule and MAE's for fine-tuning.
    With `layer_decay` < 1 a parameter's lr_scale is that of its layer among `layer_scales`, otherwise 1.

    A group holds `params`, `weight_decay`, `lr_scale`, `group_name`, and `decay`, which tells the decayed groups from
    the others also where the weight decay is 0 at present.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"--layer_decay is a factor in (0, 1], got {layer_decay}")
    layered = layer_decay is not None and layer_decay < 1
    num_layers = model.get_num_layers() if layered else 0
    skipped = model.no_weight_decay() | set(no_decay_names)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim > 1 and not name.endswith(".bias") and name not in skipped
        group = _empty_group(weight_decay if decay else 0.0, decay)
        if layered:
            layer = layer_id(name, num_layers)
            group["group_name"] = f"layer_{layer}_{group['group_name']}"
            group["lr_scale"] = float(layer_scales(layer_decay, num_layers)[layer])
        groups.setdefault(group["group_name"], group)["params"].append(parameter)
    return list(groups.values())


def _empty_group(weight_decay: float, decay: bool) -> dict[str, Any]:
    name = "decay" if decay else "no_decay"
    return {"params": [], "weight_decay": float(weight_decay), "lr_scale": 1.0, "group_name": name, "decay": decay}


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Write this step's values into every group: lr * lr_scale, and the weight decay where the group is decayed."""
    lr, weight_decay = float(lr), float(weight_decay)  # numpy's numbers would end up in checkpoints
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group.get("decay", group["weight_decay"] > 0):
            group["weight_decay"] = weight_decay


def cosine_schedule(
    base: float,
    final: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    start_warmup: float = 0.0,
    warmup_steps: int = -1,
) -> np.ndarray:
    """One float64 value for each of the epochs * steps_per_epoch steps (spec ConMIM 5.4).

    A linear ramp from `start_warmup` to `base`, both included, over `warmup_steps` steps if positive, else over
    `warmup_epochs`; then half a cosine from `base` towards `final`, which is approached but not reached.
    A ramp as long as the run leaves no cosine; a longer one is a ValueError.
    """
    steps = epochs * steps_per_epoch
    ramp_steps = warmup_steps if warmup_steps > 0 else warmup_epochs * steps_per_epoch
    if ramp_steps > steps:
        raise ValueError(
            f"the warm-up ({ramp_steps} steps) is longer than the run ({steps} steps): "
            "lower --warmup_epochs / --warmup_steps or raise --epochs"
        )
    ramp = np.linspace(start_warmup, base, ramp_steps)
    progress = np.arange(steps - ramp_steps) / max(steps - ramp_steps, 1)
    return np.concatenate([ramp, final + 0.5 * (base - final) * (1 + np.cos(math.pi * progress))])


def step_at(epoch: np.ndarray, base: float, final: float, every: int) -> np.ndarray:
    """A tenth of `base`, though not less than `final`, for each `every` whole epochs that have gone by, float64."""
    return np.maximum(base * 0.1 ** (np.asarray(epoch, dtype=np.float64) // every), final)


def cosine_at(epoch: np.ndarray, base: float, final: float, epochs: float, warmup_epochs: float = 0.0) -> np.ndarray:
    """MAE's learning rate at fractional epochs, float64 (spec SemMAE A.8).

    From 0 straight up to `base`, which is reached after `warmup_epochs`, then half a cosine to `final`, reached after
    `epochs`. `cosine_schedule` ends its warm-up one step earlier.
    """
    if warmup_epochs >= epochs:
        raise ValueError(f"--warmup_epochs {warmup_epochs:g} leaves nothing of --epochs {epochs:g}: lower it")
    epoch = np.asarray(epoch, dtype=np.float64)
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    falling = final + 0.5 * (base - final) * (1 + np.cos(math.pi * progress))
    return np.where(epoch < warmup_epochs, base * epoch / max(warmup_epochs, 1e-9), falling)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose gradients are rescaled, per matrix, to the size of the weights (spec SemMAE A.10).

    For parameters of more than one dimension: g <- g + wd * w, then g <- g * trust_coefficient * |w| / |g|, unscaled
    where either norm is 0. One-dimensional parameters are neither decayed nor rescaled. timm's `lars` differs: it adds
    the decay after taking the gradient's norm.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust_coefficient=0.001):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; `closure`, if given, re-evaluates the loss with gradients and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        if parameter.ndim > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            weight_norm, gradient_norm = parameter.norm(), gradient.norm()
            trust = group["trust_coefficient"] * weight_norm / gradient_norm
            # where(), not if: no host synchronisation
            gradient = gradient * torch.where((weight_norm > 0) & (gradient_norm > 0), trust, 1.0)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])


# name -> (class of apex.optimizers, its fixed options, the optimizer to use where apex is not installed)
_APEX = {
    "fusedsgd": ("FusedSGD", {"nesterov": True}, "sgd"),
    "fusedmomentum": ("FusedSGD", {"nesterov": False}, "momentum"),
    "fusedadam": ("FusedAdam", {"adam_w_mode": False}, "adam"),
    "fusedadamw": ("FusedAdam", {"adam_w_mode": True}, "adamw"),
    "fusedlamb": ("FusedLAMB", {}, "lamb"),
    "fusednovograd": ("FusedNovoGrad", {"betas": (0.95, 0.98)}, "novograd"),
}
_ALIASES = {"nvnovograd": "novograd", "fusedmomentum": "fusedsgd"}  # names that timm has under another one
_SGD = ("sgd", "nesterov", "momentum")
_LOOKAHEAD = "lookahead_"
_ELEMENTWISE = {"adam", "adamw", *_SGD, "nadam", "radam", "rmsprop", "adadelta", "adagrad", "fusedadam", "fusedadamw"}


def create_optimizer(args: Namespace, groups: Groups, device: torch.device | str) -> torch.optim.Optimizer:
    """The optimizer named by `args.opt` (any case) over `groups`, whose keys survive; decay is the groups' affair.

    adamw, adam, sgd / nesterov (Nesterov momentum) and momentum are torch's, in their fused form where `device` has
    one; lars is the class above; fused* are apex's; every other name is timm's. `lookahead_` before a name wraps it.
    Reads args.lr, momentum, opt_eps and opt_betas: eps is passed where the optimizer has one, None means its default.

    Raises ValueError for an unknown name, for betas that the optimizer does not take, and where apex is missing.
    """
    name = args.opt.lower()
    if name.startswith(_LOOKAHEAD):
        return timm.optim.Lookahead(_create(name.removeprefix(_LOOKAHEAD), args, groups, device))
    return _create(name, args, groups, device)


def takes_betas(name: str, count: int) -> bool:
    """Whether the optimizer has betas, `count` of them; an unknown name has (and is refused when it is built)."""
    name = name.lower().removeprefix(_LOOKAHEAD)
    if _ALIASES.get(name, name) not in timm.optim.list_optimizers():
        return True
    info = timm.optim.get_optimizer_info(_ALIASES.get(name, name))
    return bool(info.has_betas) and info.num_betas == count


def works_on_shards(name: str) -> bool:
    """Whether the optimizer treats every number alike: ZeRO stages 1 to 3 hand it flat shards, not whole matrices."""
    return name.lower() in _ELEMENTWISE


def needs_create_graph(optimizer: torch.optim.Optimizer) -> bool:
    """Whether backward() must keep the graph (`create_graph=True`): second-order optimizers such as adahessian."""
    return getattr(optimizer, "is_second_order", False)


def _create(name: str, args: Namespace, groups: Groups, device: torch.device | str) -> torch.optim.Optimizer:
    options = _options(name, args)
    fused = torch.device(device).type in ("cpu", "cuda")
    if name in ("adam", "adamw"):
        return (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)(groups, fused=fused, **options)
    if name in _SGD:
        # torch refuses Nesterov without momentum, where both forms are the same plain SGD
        nesterov = name != "momentum" and args.momentum > 0
        return torch.optim.SGD(groups, nesterov=nesterov, fused=fused, **options)
    if name == "lars":
        options.pop("eps", None)  # timm's form has one, this one needs none
        return LARS(groups, **options)
    if name in _APEX:
        return _apex_class(name)(groups, **_APEX[name][1] | options)
    if name == "adafactor" and not args.lr:
        options["lr"] = None  # it then finds its own step size
    return timm.optim.create_optimizer_v2(groups, opt=_ALIASES.get(name, name), **options)


def _options(name: str, args: Namespace) -> dict[str, Any]:
    """The constructor arguments that the flags give to optimizer `name`."""
    known = {*timm.optim.list_optimizers(), *_APEX, *_ALIASES}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5) or ["adamw", "sgd", "lamb", "lars"]
        raise ValueError(f"--opt {args.opt} is unknown; close matches: {', '.join(close)}")
    info = timm.optim.get_optimizer_info(_ALIASES.get(name, name))
    options = {"lr": args.lr, "weight_decay": 0.0}
    if info.has_momentum:
        options["momentum"] = args.momentum
    if info.has_eps and args.opt_eps is not None:
        options["eps"] = args.opt_eps
    if args.opt_betas is not None:
        if not info.has_betas or len(args.opt_betas) != info.num_betas:
            takes = f"takes {info.num_betas} betas" if info.has_betas else "has no betas; its flag is --momentum"
            raise ValueError(f"--opt_betas {args.opt_betas}: --opt {args.opt} {takes}")
        options["betas"] = tuple(args.opt_betas)
    return options


def _apex_class(name: str) -> type[torch.optim.Optimizer]:
    class_name, _, substitute = _APEX[name]
    try:
        return getattr(importlib.import_module("apex.optimizers"), class_name)
    except ImportError as error:
        raise ValueError(
            f"--opt {name} needs NVIDIA apex, which is not installed: --opt {substitute} is the same without it"
        ) from error
