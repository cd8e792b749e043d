"""Parameter groups with layer-wise learning-rate decay or by rules, optimizers by name, and
per-step schedules."""

import difflib
import importlib
import math
import re
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import timm.optim
import torch
from torch import nn

Groups = list[dict[str, Any]]
Rules = Mapping[
    str, Mapping[str, float]
]  # what is searched for in names -> {"weight_decay": ..., "lr_mult": ...}
ANNEALINGS = ("stepfix_cosine", "cosine_iters", "cosine_epochs", "step")
LR_SCHEDULES = ("cosine", "mae", *ANNEALINGS)

_EMBEDDING_NAMES = {"cls_token", "mask_token", "pos_embed"}
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def layer_id(name: str, num_layers: int) -> int:
    """Depth of parameter `name` in a transformer of `num_layers` blocks (spec ConMIM 5.2; MAE's
    rule is the same).

    0 = patch embedding, class and mask tokens, positions; i + 1 = block i with its own bias table;
    num_layers + 1 = everything else: a shared bias table, the last norms, the head.
    """
    if name in _EMBEDDING_NAMES or name.startswith("patch_embed."):
        return 0
    block = _BLOCK.match(name)
    return int(block.group(1)) + 1 if block else num_layers + 1


def layers_of(names: Collection[str], depths: Sequence[int] = ()) -> tuple[dict[str, int], int]:
    """The layer of each parameter of a ViT, or of timm's Swin or ConvNeXt, by its name, and the
    last layer's number.

    0 is nearest to the image, the last layer is the head's (spec ConMIM 5.2, A2MIM 4.4). `depths`:
    blocks in each stage, by default those that the names tell of; a ViT is a single stage.

    Raises:
        ValueError: another network.
    """
    depths = depths or depths_of(names)
    in_stages = any(name.startswith("stages.") for name in names)
    known = any(name.startswith("stem." if in_stages else "patch_embed.") for name in names)
    if known and len(depths) == 1:
        return {name: layer_id(name, depths[0]) for name in names}, depths[0] + 1
    if not known or len(depths) != 4:
        raise ValueError(
            "--layer_decay is for ViT, Swin and ConvNeXt: give --layer_decay 1 for this network"
        )
    last = (12 if depths[2] > 9 else 6) + 1 if in_stages else sum(depths) + 1
    rule = _convnext_layer if in_stages else _swin_layer
    return {name: rule(name, depths, last) for name in names}, last


def depths_of(names: Collection[str]) -> tuple[int, ...]:
    """Blocks in each stage."""
    depths: dict[int, int] = {}
    for name in names:
        if found := re.match(r"(?:(?:layers|stages)\.(\d+)\.)?blocks\.(\d+)\.", name):
            stage = int(found[1] or 0)
            depths[stage] = max(depths.get(stage, 0), int(found[2]) + 1)
    return tuple(depths[stage] for stage in sorted(depths))


def _swin_layer(name: str, depths: Sequence[int], last: int) -> int:
    """Every block is a layer; patch merging belongs to the block before it."""
    if name.startswith("patch_embed."):
        return 0
    found = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if found is None:
        return last
    before = sum(depths[: int(found[1])])
    return before if found[2] is None else before + int(found[2]) + 1


def _convnext_layer(name: str, depths: Sequence[int], last: int) -> int:
    """Three blocks of the third stage are a layer, every other stage is one."""
    if name.startswith("stem."):
        return 0
    found = re.match(r"stages\.(\d)\.(?:blocks\.(\d+)|downsample)\.", name)
    if found is None:
        return last
    if found[1] == "2" and found[2] is not None:
        return 3 + int(found[2]) // 3
    return (1, 2, 3, last - 1)[int(found[1])]


def layer_scales(layer_decay: float, num_layers: int) -> np.ndarray:
    """Learning-rate factor of layers 0 ... num_layers + 1, float64: layer_decay ** (num_layers + 1
    - layer), last 1."""
    return layer_decay ** np.arange(num_layers + 1, -1, -1, dtype=np.float64)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float | None = None,
    no_decay_names: Collection[str] = (),
) -> Groups:
    """Optimizer groups of the trainable parameters of `model`, in order of first appearance (spec
    ConMIM 5.1, 5.2).

    One-dimensional parameters, names that end in `.bias`, and those in `model.no_weight_decay()` or `no_decay_names`
    are not decayed. So a model whose `no_weight_decay()` is empty follows MAE's rule for pre-training, where class and
    mask tokens decay; with the class token and the positions in it, BEiT's rule and MAE's for fine-tuning.
    With `layer_decay` < 1 a parameter's lr_scale is that of its layer among `layer_scales`, see `layers_of`, otherwise
    1. A model with `param_rules()` is grouped by these in place of all that, see `by_rules`.

    A group holds `params`, `weight_decay`, `lr_scale`, `group_name`, and `decay`, which tells the
    decayed groups from the others also where the weight decay is 0 at present.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"--layer_decay is a factor in (0, 1], got {layer_decay}")
    if hasattr(model, "param_rules"):
        return _groups_by_rules(model, weight_decay, model.param_rules())
    layered = layer_decay is not None and layer_decay < 1
    layers, last = layers_of([name for name, _ in model.named_parameters()]) if layered else ({}, 0)
    skipped = getattr(model, "no_weight_decay", set)() | set(no_decay_names)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim > 1 and not name.endswith(".bias") and name not in skipped
        group = _empty_group(weight_decay if decay else 0.0, decay)
        if layered:
            group["group_name"] = f"layer_{layers[name]}_{group['group_name']}"
            group["lr_scale"] = float(layer_scales(layer_decay, last - 1)[layers[name]])
        groups.setdefault(group["group_name"], group)["params"].append(parameter)
    return list(groups.values())


def by_rules(name: str, rules: Rules, lr: float, weight_decay: float) -> tuple[float, float]:
    """Learning rate and weight decay of parameter `name` (spec A2MIM 4.1).

    Every rule whose pattern is found in the name applies, later ones over earlier ones;
    `<value>_mult` multiplies what is given here.
    """
    base = {"lr": lr, "weight_decay": weight_decay}
    found = dict(base)
    for pattern, values in rules.items():
        if re.search(pattern, name):
            for key, value in values.items():
                of = key.removesuffix("_mult")
                found[of] = value if key == of else base[of] * value
    return found["lr"], found["weight_decay"]


def _groups_by_rules(model: nn.Module, weight_decay: float, rules: Rules) -> Groups:
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_scale, decay_scale = by_rules(name, rules, 1.0, 1.0)
        group = _empty_group(weight_decay * decay_scale, decay_scale > 0)
        if lr_scale != 1:
            group |= {"lr_scale": lr_scale, "group_name": f"lr_{lr_scale:g}_{group['group_name']}"}
        groups.setdefault(group["group_name"], group)["params"].append(parameter)
    return list(groups.values())


def _empty_group(weight_decay: float, decay: bool) -> dict[str, Any]:
    name = "decay" if decay else "no_decay"
    return {
        "params": [],
        "weight_decay": float(weight_decay),
        "lr_scale": 1.0,
        "group_name": name,
        "decay": decay,
    }


def set_schedule(
    optimizer: torch.optim.Optimizer, lr: float | np.ndarray, weight_decay: float
) -> None:
    """Write this step's values into every group: lr * lr_scale, and the weight decay where the
    group is decayed.

    Of a pair (lr, floor) only what is above the floor is scaled: every group ends at the same rate.
    """
    # numpy's numbers would end up in checkpoints
    (lr, floor), weight_decay = (
        map(float, lr) if np.ndim(lr) else (float(lr), 0.0),
        float(weight_decay),
    )
    for group in optimizer.param_groups:
        group["lr"] = (lr - floor) * group.get("lr_scale", 1.0) + floor
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

    A linear ramp from `start_warmup` to `base`, both included, over `warmup_steps` steps if
    positive, else over `warmup_epochs`; then half a cosine from `base` towards `final`, which is
    approached but not reached. A ramp as long as the run leaves no cosine; a longer one is a
    ValueError.
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


def cosine_at(
    epoch: np.ndarray, base: float, final: float, epochs: float, warmup_epochs: float = 0.0
) -> np.ndarray:
    """MAE's learning rate at fractional epochs, float64 (spec SemMAE A.8).

    From 0 straight up to `base`, which is reached after `warmup_epochs`, then half a cosine to
    `final`, reached after `epochs`. `cosine_schedule` ends its warm-up one step earlier.
    """
    if warmup_epochs >= epochs:
        raise ValueError(
            f"--warmup_epochs {warmup_epochs:g} leaves nothing of --epochs {epochs:g}: lower it"
        )
    epoch = np.asarray(epoch, dtype=np.float64)
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    falling = final + 0.5 * (base - final) * (1 + np.cos(math.pi * progress))
    return np.where(epoch < warmup_epochs, base * epoch / max(warmup_epochs, 1e-9), falling)


def annealing(
    kind: str,
    base: float,
    final: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_steps: int,
    *,
    warmup_ratio: float = 0.0,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> np.ndarray:
    """A2MIM's learning rates and their floors for `set_schedule`, float64 [steps, 2] (spec A2MIM
    4.2).

    "stepfix_cosine": half a cosine after the warm-up, in which the same cosine runs backwards, from
    0. The others let the warm-up scale what the whole run's schedule says, from `warmup_ratio` on:
    "cosine_iters" and "cosine_epochs" are half a cosine by steps or by epochs, "step" is `base`,
    times `gamma` at each milestone (in epochs), without floor.

    Raises:
        ValueError: a warm-up longer than the run.
    """
    steps = epochs * steps_per_epoch
    if warmup_steps >= steps:
        raise ValueError(
            f"the warm-up ({warmup_steps} steps) leaves nothing of the run ({steps} steps)"
        )
    step = np.arange(steps, dtype=np.float64)
    if kind == "step":
        share, final = (
            gamma ** np.searchsorted(sorted(milestones), step // steps_per_epoch, side="right"),
            0.0,
        )
    else:
        progress = {
            "stepfix_cosine": (step - warmup_steps) / (steps - warmup_steps),
            "cosine_iters": step / steps,
            "cosine_epochs": step // steps_per_epoch / epochs,
        }[kind]
        share = 0.5 * (1 + np.cos(math.pi * progress))
    start = 0.0 if kind == "stepfix_cosine" else warmup_ratio
    warm = (
        np.minimum(1 - (1 - step / max(warmup_steps, 1)) * (1 - start), 1.0)
        if warmup_steps
        else np.ones(steps)
    )
    floor = warm * final * (1 - share)
    return np.stack((warm * base * share + floor, floor), axis=1)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose gradients are rescaled, per matrix, to the size of the weights (spec
    SemMAE A.10).

    For parameters of more than one dimension: g <- g + wd * w, then g <- g * trust_coefficient *
    |w| / |g|, unscaled where either norm is 0. One-dimensional parameters are neither decayed nor
    rescaled. timm's `lars` differs: it adds the decay after taking the gradient's norm.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient=0.001,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; `closure`, if given, re-evaluates the loss with gradients and its value is
        returned."""
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
            # where(), not if: no host synchronization
            gradient = gradient * torch.where((weight_norm > 0) & (gradient_norm > 0), trust, 1.0)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])


# name -> (class of apex.optimizers, its fixed options, the optimizer to use where apex is not
# installed)
_APEX = {
    "fusedsgd": ("FusedSGD", {"nesterov": True}, "sgd"),
    "fusedmomentum": ("FusedSGD", {"nesterov": False}, "momentum"),
    "fusedadam": ("FusedAdam", {"adam_w_mode": False}, "adam"),
    "fusedadamw": ("FusedAdam", {"adam_w_mode": True}, "adamw"),
    "fusedlamb": ("FusedLAMB", {}, "lamb"),
    "fusednovograd": ("FusedNovoGrad", {"betas": (0.95, 0.98)}, "novograd"),
}
_ALIASES = {
    "nvnovograd": "novograd",
    "fusedmomentum": "fusedsgd",
}  # names that timm has under another one
_SGD = ("sgd", "nesterov", "momentum")
_LOOKAHEAD = "lookahead_"
_ELEMENTWISE = {
    "adam",
    "adamw",
    *_SGD,
    "nadam",
    "radam",
    "rmsprop",
    "adadelta",
    "adagrad",
    "fusedadam",
    "fusedadamw",
}


def create_optimizer(
    args: Namespace, groups: Groups, device: torch.device | str
) -> torch.optim.Optimizer:
    """The optimizer named by `args.opt` (any case) over `groups`, whose keys survive; decay is the
    groups' affair.

    adamw, adam, sgd / nesterov (Nesterov momentum) and momentum are torch's, in their fused form
    where `device` has one; lars is the class above; fused* are apex's; every other name is timm's.
    `lookahead_` before a name wraps it. Reads args.lr, momentum, opt_eps and opt_betas: eps is
    passed where the optimizer has one, None means its default.

    Raises ValueError for an unknown name, for betas that the optimizer does not take, and where
    apex is missing.
    """
    name = args.opt.lower()
    if name.startswith(_LOOKAHEAD):
        return timm.optim.Lookahead(_create(name.removeprefix(_LOOKAHEAD), args, groups, device))
    return _create(name, args, groups, device)


def takes_betas(name: str, count: int) -> bool:
    """Whether the optimizer has betas, `count` of them; an unknown name has (and is refused when it
    is built)."""
    name = name.lower().removeprefix(_LOOKAHEAD)
    if _ALIASES.get(name, name) not in timm.optim.list_optimizers():
        return True
    info = timm.optim.get_optimizer_info(_ALIASES.get(name, name))
    return bool(info.has_betas) and info.num_betas == count


def works_on_shards(name: str) -> bool:
    """Whether the optimizer treats every number alike: ZeRO stages 1 to 3 hand it flat shards, not
    whole matrices."""
    return name.lower() in _ELEMENTWISE


def needs_create_graph(optimizer: torch.optim.Optimizer) -> bool:
    """Whether backward() must keep the graph (`create_graph=True`): second-order optimizers such as
    adahessian."""
    return getattr(optimizer, "is_second_order", False)


def _create(
    name: str, args: Namespace, groups: Groups, device: torch.device | str
) -> torch.optim.Optimizer:
    options = _options(name, args)
    fused = torch.device(device).type in ("cpu", "cuda")
    if name in ("adam", "adamw"):
        return (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)(
            groups, fused=fused, **options
        )
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
            takes = (
                f"takes {info.num_betas} betas"
                if info.has_betas
                else "has no betas; its flag is --momentum"
            )
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
