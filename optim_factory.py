"""Build parameter groups (layer-wise lr decay, rules), optimizers by name, per-step schedules."""

import difflib
import importlib
import math
import re
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import timm.optim
import torch
from torch import nn

Groups = list[dict[str, Any]]
# pattern searched for in parameter names -> {"weight_decay": ..., "lr_mult": ...}
Rules = Mapping[str, Mapping[str, float]]
ANNEALINGS = ("stepfix_cosine", "cosine_iters", "cosine_epochs", "step")
LR_SCHEDULES = ("cosine", "mae", *ANNEALINGS)

_EMBEDDING_NAMES = {"cls_token", "mask_token", "pos_embed"}
_ONE_BLOCK = re.compile(r"(?:(?:layers|stages)\.\d+\.)?blocks\.\d+\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_HEAD = re.compile(r"(?:head|norm)\.")


def layer_id(name: str, num_layers: int) -> int:
    """Return the depth of parameter `name` in a ViT of `num_layers` blocks, as BEiT and MAE do.

    0 = patch embedding, class and mask tokens, positions; i + 1 = block i with its own bias table;
    num_layers + 1 = everything else: a shared bias table, the final norms, the head.
    """
    if name in _EMBEDDING_NAMES or name.startswith("patch_embed."):
        return 0
    block = _BLOCK.match(name)
    return int(block.group(1)) + 1 if block else num_layers + 1


def layers_of(names: Collection[str], depths: Sequence[int] = ()) -> tuple[dict[str, int], int]:
    """Return the layer of each parameter of a ViT, Swin or ConvNeXt by name, and the last layer.

    Layer 0 is nearest to the image, the last layer is the head's. `depths` is the number of blocks
    in each stage, by default counted in the names; a ViT is a single stage. Names are timm's
    (docs/methods/simmim_a2mim.md#classifiers).

    Raises:
        ValueError: the network is of another kind.
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
    """Count the blocks in each stage from the parameters' names."""
    depths: dict[int, int] = {}
    for name in names:
        if match := re.match(r"(?:(?:layers|stages)\.(\d+)\.)?blocks\.(\d+)\.", name):
            stage = int(match[1] or 0)
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
    return tuple(depths[stage] for stage in sorted(depths))


def _swin_layer(name: str, depths: Sequence[int], last: int) -> int:
    """Return the layer of a Swin parameter: one per block; patch merging joins the block before."""
    if name.startswith("patch_embed."):
        return 0
    match = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if match is None:
        return last
    stage, block = match.groups()
    before = sum(depths[: int(stage)])
    return before if block is None else before + int(block) + 1


def _convnext_layer(name: str, depths: Sequence[int], last: int) -> int:
    """Return the layer of a ConvNeXt parameter: one per stage, but three blocks in the third."""
    if name.startswith("stem."):
        return 0
    match = re.match(r"stages\.(\d)\.(?:blocks\.(\d+)|downsample)\.", name)
    if match is None:
        return last
    stage, block = match.groups()
    if stage == "2" and block is not None:
        return 3 + int(block) // 3
    return (1, 2, 3, last - 1)[int(stage)]


def layer_scales(
    layer_decay: float, num_layers: int, *, full_last_block: bool = False
) -> np.ndarray:
    """Return the lr factor of layers 0 ... num_layers + 1, float64.

    The factor is layer_decay ** (num_layers + 1 - layer), hence 1 for the last layer. With
    `full_last_block` it is 1 for the last block as well, and one power higher for all before it.
    """
    powers = np.arange(num_layers + 1, -1, -1, dtype=np.float64)
    return layer_decay ** np.maximum(powers - full_last_block, 0)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float | None = None,
    no_decay_names: Collection[str] = (),
    *,
    full_last_block: bool = False,
    head_scale: float | None = None,
) -> Groups:
    """Return optimizer groups of the model's trainable parameters, in order of first appearance.

    Not decayed are one-dimensional parameters, names that end in `.bias`, and names in
    `model.no_weight_decay()` or `no_decay_names`. A model whose `no_weight_decay()` is empty thus
    follows MAE's rule for pre-training, where class and mask tokens decay; one that lists the class
    token and the positions follows BEiT's rule, which is MAE's for fine-tuning, too.

    With `layer_decay` < 1, `lr_scale` is the `layer_scales` factor of the parameter's layer (see
    `layers_of`), otherwise 1; that of the head and of the norm before it is `head_scale`, if
    given, and they warm up as the last layer does (`warmup_scale`). A model with `param_rules()` is
    grouped by those instead, see `by_rules`.

    A group holds `params`, `weight_decay`, `lr_scale`, `group_name` and `decay`; the last tells
    decayed groups from the others while the scheduled weight decay is 0.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"--layer_decay is a factor in (0, 1], got {layer_decay}")
    if hasattr(model, "param_rules"):
        return _groups_by_rules(model, weight_decay, model.param_rules())
    layered = layer_decay is not None and layer_decay < 1
    if layered:
        layers, last = layers_of([name for name, _ in model.named_parameters()])
        scales = layer_scales(layer_decay, last - 1, full_last_block=full_last_block)
    skipped = getattr(model, "no_weight_decay", set)() | set(no_decay_names)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim > 1 and not name.endswith(".bias") and name not in skipped
        group = _empty_group(weight_decay if decay else 0.0, decay)
        if layered:
            group["group_name"] = f"layer_{layers[name]}_{group['group_name']}"
            group["lr_scale"] = float(scales[layers[name]])
        if head_scale is not None and _HEAD.match(name):
            group |= {"lr_scale": head_scale, "warmup_scale": 1.0}
            group["group_name"] = f"head_{'decay' if decay else 'no_decay'}"
        groups.setdefault(group["group_name"], group)["params"].append(parameter)
    return list(groups.values())


def freeze_blocks(model: nn.Module, blocks: int) -> None:
    """Freeze the patch embedding, tokens and positions and the first `blocks` blocks of a ViT, Swin
    or ConvNeXt; the other blocks, the norms after them and the head are trained.

    A ConvNeXt's blocks are counted as for layer decay, three of its third stage as one. Frozen
    blocks have neither stochastic depth nor dropout.

    Raises:
        ValueError: the network has fewer blocks, or is of another kind.
    """
    names = [name for name, _ in model.named_parameters()]
    try:
        layers, last = layers_of(names)
    except ValueError as error:
        problem = "is for ViT, Swin and ConvNeXt, not for this network"
        raise ValueError(f"--freeze_blocks {blocks} {problem}") from error
    if not 0 < blocks < last:
        raise ValueError(f"--freeze_blocks {blocks}: the model has {last - 1} blocks")
    frozen = [name for name in names if layers[name] <= blocks]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    whole = {found[0] for name in frozen if (found := _ONE_BLOCK.match(name))}
    for name, module in model.named_modules():
        found = _ONE_BLOCK.match(f"{name}.")
        if found and found[0] in whole:
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "drop_prob"):
                module.drop_prob = 0.0


def by_rules(name: str, rules: Rules, lr: float, weight_decay: float) -> tuple[float, float]:
    """Return the lr and weight decay of parameter `name` under OpenMixup's `paramwise_options`.

    Every rule whose pattern occurs in the name applies, later rules over earlier ones; a key
    `<value>_mult` multiplies the base value (docs/methods/simmim_a2mim.md#weight-decay).
    """
    base = {"lr": lr, "weight_decay": weight_decay}
    result = dict(base)
    for pattern, values in rules.items():
        if re.search(pattern, name):
            for key, value in values.items():
                target = key.removesuffix("_mult")
                result[target] = value if key == target else base[target] * value
    return result["lr"], result["weight_decay"]


def _groups_by_rules(model: nn.Module, weight_decay: float, rules: Rules) -> Groups:
    """Return groups of equal lr and decay factors, in order of first appearance."""
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


def warmup_scale(group: Mapping[str, Any]) -> float:
    """Return the factor that a group's own warm-up follows, by default that of its lr."""
    return group.get("warmup_scale", group.get("lr_scale", 1.0))


class LayerWarmups:
    """The lr of every step where each group of parameters warms up for itself: NEPA's fine-tuning
    (docs/methods/nepa.md#fine-tuning).

    A group whose `warmup_scale` is f, at most 1, warms up in W - round(W * f) of W steps, at least
    in one: the lower its lr, the longer. `curve(steps)` is the schedule with a warm-up of `steps`.
    """

    def __init__(self, curve: Callable[[int], np.ndarray], warmup_steps: int, groups: Groups):
        scales = {warmup_scale(group) for group in groups}
        lengths = {f: max(warmup_steps - round(warmup_steps * min(f, 1.0)), 1) for f in scales}
        curves = {steps: curve(steps) for steps in set(lengths.values())}
        self.curves = {f: curves[steps] for f, steps in lengths.items()}

    def __getitem__(self, step: int) -> dict[float, Any]:
        """Return the lr of a step, or its pair with the floor, by `warmup_scale`."""
        return {f: curve[step] for f, curve in self.curves.items()}


def set_schedule(
    optimizer: torch.optim.Optimizer,
    lr: float | np.ndarray | Mapping[float, Any],
    weight_decay: float,
) -> None:
    """Set every group's lr to lr * lr_scale, and the weight decay of the decayed groups.

    If `lr` is a pair (lr, floor), only the part above the floor is scaled, so that all groups end
    at the same lr. A mapping holds one or the other for each `warmup_scale`.
    """
    # float(): numpy scalars would end up in checkpoints
    weight_decay = float(weight_decay)
    for group in optimizer.param_groups:
        own = lr[warmup_scale(group)] if isinstance(lr, Mapping) else lr
        peak, floor = map(float, own) if np.ndim(own) else (float(own), 0.0)
        group["lr"] = (peak - floor) * group.get("lr_scale", 1.0) + floor
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
    """Return BEiT's cosine schedule, one float64 value per step.

    A linear ramp from `start_warmup` to `base`, both included, takes `warmup_steps` steps if that
    is positive, else `warmup_epochs`. Half a cosine from `base` follows, which approaches `final`
    but does not reach it. A ramp as long as the run leaves no cosine.

    Raises:
        ValueError: the ramp is longer than the run.
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
    """Return MAE's lr at fractional epochs, float64.

    It rises linearly from 0 to `base` at `warmup_epochs`, then falls along half a cosine to `final`
    at `epochs`. `cosine_schedule` ends its warm-up one step earlier.
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
    """Return OpenMixup's lr and its floor for `set_schedule`, float64 [steps, 2].

    "stepfix_cosine" is half a cosine that starts after the warm-up; the warm-up, from 0, scales the
    same cosine continued backwards. The other kinds let the warm-up scale a schedule that spans the
    whole run, starting from the factor `warmup_ratio`: "cosine_iters" and "cosine_epochs" are half
    a cosine by steps or by epochs; "step" is `base`, multiplied by `gamma` at each milestone (in
    epochs), and has no floor. See docs/methods/simmim_a2mim.md#schedules.

    Raises:
        ValueError: the warm-up is as long as the run or longer.
    """
    steps = epochs * steps_per_epoch
    if warmup_steps >= steps:
        raise ValueError(
            f"the warm-up ({warmup_steps} steps) leaves nothing of the run ({steps} steps)"
        )
    step = np.arange(steps, dtype=np.float64)
    epoch = step // steps_per_epoch

    # The factor between `base` (1) and `final` (0), without the warm-up.
    if kind == "step":
        decay = gamma ** np.searchsorted(sorted(milestones), epoch, side="right")
        final = 0.0
    else:
        progress = {
            "stepfix_cosine": (step - warmup_steps) / (steps - warmup_steps),
            "cosine_iters": step / steps,
            "cosine_epochs": epoch / epochs,
        }[kind]
        decay = 0.5 * (1 + np.cos(math.pi * progress))

    # The warm-up's factor, from `start` to 1.
    start = 0.0 if kind == "stepfix_cosine" else warmup_ratio
    warmup = np.ones(steps)
    if warmup_steps:
        warmup = np.minimum(1 - (1 - step / warmup_steps) * (1 - start), 1.0)

    floor = warmup * final * (1 - decay)
    return np.stack((warmup * base * decay + floor, floor), axis=1)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose gradients are rescaled per matrix to the norm of the weights.

    This is MAE's variant for linear probing. For parameters of more than one dimension:
    g <- g + wd * w, then g <- g * trust_coefficient * |w| / |g|, unscaled where either norm is 0.
    One-dimensional parameters are neither decayed nor rescaled. timm's `lars` differs: it adds the
    weight decay after taking the gradient's norm (docs/methods/mae_semmae.md#linear-probe).
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
        """Update the parameters; return the value of `closure`, which re-evaluates the loss."""
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
            # where() instead of if: no host synchronization
            gradient = gradient * torch.where((weight_norm > 0) & (gradient_norm > 0), trust, 1.0)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])


# name -> (class of apex.optimizers, its fixed options, the equivalent without apex)
_APEX = {
    "fusedsgd": ("FusedSGD", {"nesterov": True}, "sgd"),
    "fusedmomentum": ("FusedSGD", {"nesterov": False}, "momentum"),
    "fusedadam": ("FusedAdam", {"adam_w_mode": False}, "adam"),
    "fusedadamw": ("FusedAdam", {"adam_w_mode": True}, "adamw"),
    "fusedlamb": ("FusedLAMB", {}, "lamb"),
    "fusednovograd": ("FusedNovoGrad", {"betas": (0.95, 0.98)}, "novograd"),
}
# our name -> timm's name
_ALIASES = {"nvnovograd": "novograd", "fusedmomentum": "fusedsgd"}
_SGD = ("sgd", "nesterov", "momentum")
_LOOKAHEAD = "lookahead_"
# optimizers whose update of one number does not depend on the others
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
    """Return the optimizer `args.opt` (in any case) over `groups`, which set the weight decay.

    adamw, adam, sgd / nesterov (Nesterov momentum) and momentum are torch's, fused where `device`
    supports it; lars is the class above; fused* are apex's; every other name is timm's. The prefix
    `lookahead_` wraps an optimizer. Reads `lr`, `momentum`, `opt_eps` and `opt_betas`; None means
    the optimizer's default.

    Raises:
        ValueError: the name is unknown, the optimizer does not take these betas, or apex is
            missing.
    """
    name = args.opt.lower()
    if name.startswith(_LOOKAHEAD):
        return timm.optim.Lookahead(_create(name.removeprefix(_LOOKAHEAD), args, groups, device))
    return _create(name, args, groups, device)


def takes_betas(name: str, count: int) -> bool:
    """Tell whether optimizer `name` takes `count` betas; True for unknown names, refused later."""
    name = name.lower().removeprefix(_LOOKAHEAD)
    if _ALIASES.get(name, name) not in timm.optim.list_optimizers():
        return True
    info = timm.optim.get_optimizer_info(_ALIASES.get(name, name))
    return bool(info.has_betas) and info.num_betas == count


def works_on_shards(name: str) -> bool:
    """Tell whether the optimizer is elementwise: ZeRO stages 1 to 3 pass it flat shards."""
    return name.lower() in _ELEMENTWISE


def needs_create_graph(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether backward() needs `create_graph=True`: second-order ones such as adahessian."""
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
        # torch refuses Nesterov without momentum, where both are plain SGD
        nesterov = name != "momentum" and args.momentum > 0
        return torch.optim.SGD(groups, nesterov=nesterov, fused=fused, **options)
    if name == "lars":
        options.pop("eps", None)  # timm's variant has one
        return LARS(groups, **options)
    if name in _APEX:
        return _apex_class(name)(groups, **_APEX[name][1] | options)
    if name == "adafactor" and not args.lr:
        options["lr"] = None  # it then sets its own step size
    return timm.optim.create_optimizer_v2(groups, opt=_ALIASES.get(name, name), **options)


def _options(name: str, args: Namespace) -> dict[str, Any]:
    """Return the constructor arguments of optimizer `name` that the flags set."""
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
            f"--opt {name} needs NVIDIA apex, which is not installed; use --opt {substitute}, "
            "which is equivalent"
        ) from error
