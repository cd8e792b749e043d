"""How a step is run: plain torch, DDP or DeepSpeed ZeRO behind one small interface, so that the engines hold one loop.

A runner's `micro_step` computes a loss and its gradients, its `step` applies them once per `update_freq` micro-steps.
A loss or gradient that is not finite on any rank leaves weights, optimizer state and batch statistics on every rank as
they were: a non-finite loss makes all gradients of its rank non-finite, the reduction carries that to the other ranks,
and the optimizer is told, on the device, to skip.
"""

import json
import math
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import utils
from utils import log

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What DeepSpeed reads at the top level; it ignores a misspelt key without a word, so we do not (specs/engine.md 1.8).
DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "torch_autocast", "bf16",
    "fp16", "steps_per_print", "wall_clock_breakdown", "dump_state", "prescale_gradients", "gradient_predivide_factor",
    "communication_data_type", "seq_parallel_communication_data_type", "activation_checkpointing", "aio",
    "flops_profiler", "comms_logger", "checkpoint", "data_types", "tensorboard", "wandb", "csv_monitor", "autotuning",
    "compile", "sparse_gradients", "disable_allgather", "memory_breakdown", "dataloader_drop_last",
}  # fmt: skip


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses what the hardware cannot do, in one sentence."""
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; on a CPU take bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not has_bf16():
        raise ValueError("--precision bf16 is not supported by this GPU; take fp16 or fp32")


def has_bf16() -> bool:
    """Whether this GPU computes in bf16; older ones emulate it, slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Runner:
    """What plain, DDP and DeepSpeed runs share. `network` is the module itself, `model` the wrapped one."""

    network: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, network: nn.Module, *, update_freq: int, clip_grad: float | None):
        self.network, self.update_freq, self.clip_grad = network, update_freq, clip_grad
        self.statistics = BatchStatistics()
        self.dtype: torch.dtype | None = None  # of autocast
        self.gradients = GradientCheck(network)

    def watch(self, *modules: nn.Module | None) -> None:
        """Batch statistics of these modules are put back after a skipped step."""
        self.statistics = BatchStatistics(*modules)

    def micro_step(self, batch: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; `last` of the `update_freq` ones that make a step."""
        raise NotImplementedError

    def step(self) -> dict[str, Tensor]:
        """Applies the gradients: {"grad_norm": 2-norm before clipping, "applied": 1.0, or 0.0 for a skipped step}."""
        result = self.apply_gradients()
        self.statistics.put_back_unless(result["applied"])
        self.statistics.kept = []
        self.gradients.after_step(result["applied"])
        return result

    def apply_gradients(self) -> dict[str, Tensor]:
        """What `step` does to the weights, and returns."""
        raise NotImplementedError

    def full_state_dict(self) -> dict[str, Tensor]:
        """The network's state with whole float32 weights; every rank must call, and rank 0 gets it."""
        return self.network.state_dict()

    def whole(self, parameters: list[Tensor]):
        """A context that yields whole float32 values of the network's parameters."""
        return nullcontext(parameters)


class GradientCheck:
    """Finds trainable tensors that training leaves alone: in the first applied steps of a run no rank has a gradient
    for them that is not zero.

    A single such tensor may be meant, and is named in the log; most of a network never is, and is an error. It takes
    several steps, because behind a head that starts at zero all gradients are zero in the first ones.
    """

    steps = 5

    def __init__(self, network: nn.Module):
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad and p.numel() > 1]
        self.names = [name for name, _ in named]
        self.seen = torch.zeros(len(named), device=named[0][1].device if named else None)
        self.done = torch.zeros((), device=self.seen.device)
        self.asked = 0
        self.hooks = [p.register_hook(partial(self._note, number)) for number, (_, p) in enumerate(named)]

    @torch.no_grad()
    def _note(self, number: int, gradient: Tensor) -> None:
        """Before reduction and sharding: all engines look the same here. What is not finite says nothing."""
        largest = torch.linalg.vector_norm(gradient.detach(), math.inf)
        self.seen[number] += ((largest > 0) & largest.isfinite()).to(self.seen)

    def after_step(self, applied: Tensor) -> None:
        """Judges once, after enough applied steps; waits for the device then, and not before `steps` steps."""
        if not self.hooks:
            return
        self.done += applied.to(self.done)
        self.asked += 1
        if self.asked < self.steps or self.done < self.steps:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        counts = utils.reduce_sum(self.seen).tolist()
        self._judge([name for name, count in zip(self.names, counts, strict=True) if not count])

    def _judge(self, untouched: list[str]) -> None:
        if not untouched:
            return
        shown = ", ".join(untouched[:5]) + (", ..." if len(untouched) > 5 else "")
        text = f"{len(untouched)} of {len(self.names)} trainable tensors had no gradient in {self.steps} steps: {shown}"
        if 2 * len(untouched) > len(self.names):
            raise ValueError(f"{text}. Most of the network is not trained: run without --compile or --enable_deepspeed")
        log.warning("%s", text)


class BatchStatistics:
    """Remembers the running statistics of batch normalisation so that a skipped step leaves no trace in them."""

    def __init__(self, *modules: nn.Module | None):
        norms = [m for module in modules if module is not None for m in module.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        self.kept = [buffer.clone() for buffer in self.buffers]

    def put_back_unless(self, applied: Tensor) -> None:
        """A module on another device than the flag (an average kept on the host) waits for it once."""
        flags = {device: applied.to(device) > 0 for device in {buffer.device for buffer in self.buffers}}
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(flags[buffer.device], buffer, kept))


@torch.no_grad()
def average_batch_statistics(module: nn.Module, device: torch.device) -> None:
    """Replaces the running statistics of each process by their mean over all, sent from `device`; all ranks call.

    In float64, so that statistics which are equal on all ranks stay as they are to the last bit.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    if not buffers or not utils.in_group():
        return
    means = utils.mean_over_ranks(torch.cat([buffer.double().flatten() for buffer in buffers]).to(device))
    parts = means.split([buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, parts, strict=True):
        buffer.copy_(mean.view_as(buffer))


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> None:
    """From now on batch normalisation takes its statistics from the batches of all processes, not of its own alone.

    On GPUs these are torch's modules, which know no CPU, where each norm gets a `forward` of ours.
    """
    if not utils.in_group() or dist.get_world_size() == 1:
        return
    if device.type != "cpu":
        convert_sync_batchnorm(network)
        return
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            norm.forward = partial(synchronised_batch_norm, norm)


def synchronised_batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Batch normalisation of x [B, C, ...] in float32 by mean and variance over all processes."""
    if not norm.training:
        return activated(norm, batch_norm_in_float32(norm, x).to(x.dtype))
    values, space = x.float(), [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    sums = all_reduce(torch.cat((values.sum(space), values.new_tensor([values[:, 0].numel()]))))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    centred = values - mean.view(shape)
    variance = all_reduce(centred.square().sum(space)) / count
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
    normed = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normed = normed * norm.weight.float().view(shape) + norm.bias.float().view(shape)
    return activated(norm, normed.to(x.dtype))


def activated(norm: _BatchNorm, x: Tensor) -> Tensor:
    """timm has norms with dropout and activation in one module."""
    for name in ("drop", "act"):
        x = getattr(norm, name, nn.Identity())(x)
    return x


def spoil_if_nonfinite(loss: Tensor) -> Tensor:
    """The same loss; but if it is not finite, so is every gradient that comes from it."""
    return loss * (1.0 + 0.0 * loss.detach())


def step_unless_nonfinite(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Steps where `applied` is 1. Fused optimizers skip on the device; for others the host has to look.

    It looks before a first step too: a fused SGD that skips that one leaves its momentum uninitialised.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if fused and optimizer.state and applied.device.type != "cpu":
        step_on_device(optimizer, applied)
    elif applied:
        optimizer.step()


def step_on_device(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """The fused kernels read the gradient scaler's flag, and leave everything as it is where it is set."""
    optimizer.grad_scale, optimizer.found_inf = None, 1.0 - applied
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


class TorchRunner(Runner):
    """One process, or DDP where there are several."""

    def __init__(self, network, optimizer, *, device, precision, update_freq, clip_grad):
        super().__init__(network, update_freq=update_freq, clip_grad=clip_grad)
        self.optimizer, self.device = optimizer, device
        self.dtype = AUTOCAST_DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.model = network
        if utils.in_group() and dist.get_world_size() > 1:
            ids = None if device.type == "cpu" else [device]
            self.model = DistributedDataParallel(
                network, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def micro_step(self, batch, *, last):
        if not self.statistics.kept:
            self.statistics.keep()
        accumulating = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if accumulating else nullcontext():
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                out = self.model(batch)
            self.scaler.scale(spoil_if_nonfinite(out["loss"]) / self.update_freq).backward()
        return out

    def apply_gradients(self):
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = norm.isfinite().float()
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        step_unless_nonfinite(self.optimizer, applied)  # not the scaler's step, which would not guard a first one
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "applied": applied}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed


def deepspeed_config(args: Namespace, parameters: int = 0) -> dict[str, Any]:
    """The configuration that the flags ask for, or --deepspeed_config with what it leaves open filled in from them.

    `gradient_clipping` is always written: DeepSpeed's default clips at 1.0 (specs/engine.md 0.1).
    bf16 takes the `torch_autocast` section: float32 weights and the same numbers as DDP. fp16 takes the section of its
    own, with BEiT's values: DeepSpeed 0.19 neither lowers nor undoes the scale of autocast's fp16 under ZeRO.
    `parameters`, the number of trainable ones, sizes the buckets.
    """
    config = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.update_freq,
        "gradient_clipping": args.clip_grad or 0.0,
        "zero_optimization": zero_section(args, parameters),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    given = read_deepspeed_config(args.deepspeed_config) if args.deepspeed_config else {}
    check_deepspeed_config(given, config, args)
    given["zero_optimization"] = config["zero_optimization"] | given.get("zero_optimization", {})
    if not {"torch_autocast", "bf16", "fp16"} & given.keys():
        config |= precision_section(args.precision)
    config |= given
    check_zero_section(config["zero_optimization"], args)
    if offloads(config["zero_optimization"]):  # or DeepSpeed refuses every optimizer but its own, which it compiles
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def zero_section(args: Namespace, parameters: int) -> dict[str, Any]:
    """Of the flags. DeepSpeed's own buckets take 2 GB and hold a whole ViT: nothing is sent before backward ends."""
    section: dict[str, Any] = {"stage": args.zero_stage}
    if parameters:
        bucket = min(500_000_000, math.ceil(parameters / 8 / 2**20) * 2**20)
        section |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if args.device == "cuda":
        section["overlap_comm"] = True
    if args.offload == "optimizer":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": args.device == "cuda"}
    return section


def offloads(zero_section: dict[str, Any]) -> bool:
    """Whether the optimizer's state lives outside the device."""
    return (zero_section.get("offload_optimizer") or {}).get("device", "none") != "none"


def check_zero_section(section: dict[str, Any], args: Namespace) -> None:
    """Refuses what does not work with the stage, wherever that comes from."""
    if getattr(args, "compile", False) and section["stage"] == 3:
        raise ValueError(
            "--compile does not work with ZeRO stage 3, whose gather hooks cut the gradients: use --zero_stage 2"
        )
    if args.precision == "fp16" and section["stage"] == 0:
        raise ValueError(
            "--precision fp16 does not work with ZeRO stage 0, whose float32 weights DeepSpeed keeps to itself: "
            "use --zero_stage 1, or leave out --enable_deepspeed"
        )
    if offloads(section) and section["stage"] == 0:
        raise ValueError("--offload optimizer needs a sharded optimizer: use --zero_stage 1, 2 or 3")


def precision_section(precision: str) -> dict[str, Any]:
    if precision == "fp16":
        return {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 7, "loss_scale_window": 128}}
    if precision == "bf16":  # no module is named whose gradients and shards could be sent in bf16, as DDP sends none
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
    return {}


def read_deepspeed_config(path: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"--deepspeed_config {path} must hold one JSON object")
    return given


def check_deepspeed_config(given: dict, ours: dict, args: Namespace) -> None:
    name = f"--deepspeed_config {args.deepspeed_config}"
    if named := {"optimizer", "scheduler"} & given.keys():
        raise ValueError(f"{name} has the section {min(named)}, which comes from the flags here: leave it out")
    if unknown := given.keys() - DEEPSPEED_KEYS:
        raise ValueError(f"{name}: DeepSpeed does not know the keys {sorted(unknown)}, and would ignore them silently")
    batches = {"train_batch_size": args.batch_size * args.update_freq * args.world_size, **ours}
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
        if given.get(key, batches[key]) != batches[key]:
            raise ValueError(f"{name} says {key} {given[key]}, the flags say {batches[key]}: make them equal")
    if args.clip_grad and given.get("gradient_clipping", args.clip_grad) != args.clip_grad:
        raise ValueError(f"{name} says gradient_clipping {given['gradient_clipping']}, --clip_grad {args.clip_grad}")
    stage = given.get("zero_optimization", {}).get("stage", args.zero_stage)
    if given.get("bf16", {}).get("enabled") and stage == 0:
        raise ValueError(f"{name}: bf16 with ZeRO stage 0 takes a wrong first step in DeepSpeed; use stage 1 or more")
    if given.get("torch_autocast", {}).get("dtype") in ("fp16", "float16"):
        raise ValueError(f"{name}: torch_autocast with fp16 clips scaled gradients in DeepSpeed; use the section fp16")


class DeepSpeedRunner(Runner):
    """DeepSpeed ZeRO 0 to 3. The configuration written is kept in `config`."""

    def __init__(self, network, optimizer, *, config: dict[str, Any], device: torch.device):
        super().__init__(
            network, update_freq=config["gradient_accumulation_steps"], clip_grad=config["gradient_clipping"] or None
        )
        deepspeed = import_deepspeed(device)
        self.config, self.device = config, device
        self.optimizer = optimizer
        self.guard = StepGuard(optimizer, device)
        reduced = [dtype for name, dtype in AUTOCAST_DTYPES.items() if config.get(name, {}).get("enabled")]
        if reduced:
            run_with_rounded_weights(network, device, reduced[0])
        self.model, _, _, _ = deepspeed.initialize(model=network, optimizer=optimizer, config=dict(config))
        self.stage = self.model.zero_optimization_stage()
        self.gathered_parameters = deepspeed.zero.GatheredParameters
        autocast = self.model.torch_autocast_dtype() if self.model.torch_autocast_enabled() else None
        self.dtype = reduced[0] if reduced else autocast
        # the weights themselves, or stage 3's gathered copies of them, may then be rounded
        self.rounded = bool(reduced) or (autocast is not None and self.stage == 3)

    def micro_step(self, batch, *, last):
        if not self.statistics.kept:
            self.statistics.keep()
        out = self.model(batch)
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(spoil_if_nonfinite(out["loss"]))  # divides by the accumulation count itself
        if not last:
            self.model.step()
        return out

    def apply_gradients(self):
        norm = self._whole_norm() if self.stage == 0 else None
        self.guard.reset()
        self.model.step()
        applied = self.guard.applied * float(self.model.was_step_applied())
        if norm is None:
            known = self.model.get_global_grad_norm()  # not where the user's configuration switches it off
            norm = torch.as_tensor(float("nan") if known is None else known, device=self.device)
        return {"grad_norm": norm.float(), "applied": applied}

    def _whole_norm(self) -> Tensor:
        """Stage 0 keeps whole gradients and reports no norm in float32."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])

    def full_state_dict(self):
        """One parameter at a time, whole on every rank for that long; only rank 0 keeps them, on the host."""
        state, keeps = {}, dist.get_rank() == 0
        for name, value in self.network.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                with self.whole([value]) as (tensor,):
                    if keeps:
                        state[name] = tensor.detach().to("cpu", torch.float32, copy=True)
            elif keeps:
                state[name] = value.detach().clone()
        return state

    @contextmanager
    def whole(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        with self.gathered_parameters(parameters, enabled=self.stage == 3):
            yield [self._master(p) if self.rounded and p.requires_grad else p for p in parameters]

    def _master(self, parameter: Tensor) -> Tensor:
        """Returns the whole float32 value of which the engine trains a rounded copy."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def save(self, folder: str, tag: str) -> None:
        """Writes the sharded state for an exact resume; every rank must call."""
        self.model.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, folder: str, tag: str) -> None:
        self.model.load_checkpoint(folder, tag=tag)


def run_with_rounded_weights(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Lets weights that DeepSpeed keeps in bf16 or fp16 meet float32 images and batch statistics."""
    # inside the network, because DeepSpeed ends an autocast around it
    network.forward = torch.autocast(device.type, dtype)(network.forward)
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            synchronised = isinstance(norm, nn.SyncBatchNorm) or "forward" in vars(norm)
            norm.forward = partial(synchronised_batch_norm if synchronised else batch_norm_in_float32, norm)


def batch_norm_in_float32(norm: _BatchNorm, x: Tensor) -> Tensor:
    """torch takes a norm's weights and statistics in one dtype only."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    own = norm.training or norm.running_mean is None
    return F.batch_norm(x.float(), norm.running_mean, norm.running_var, weight, bias, own, norm.momentum, norm.eps)


class StepGuard:
    """Stands before optimizer.step: skips it on every rank where a gradient on any rank is not finite.

    ZeRO-3 calls it for each of its sub-groups, after it has looked at the gradients of all.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer, self.device = optimizer, device
        self.reset()
        self._step = optimizer.step
        optimizer.step = self

    def reset(self) -> None:
        self.applied = torch.ones((), device=self.device)

    def __call__(self, closure=None):
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.nn.utils.get_total_norm(gradients).isfinite().float() if gradients else self.applied.clone()
        place = finite.device  # the host's under ZeRO-Offload, from where NCCL sends nothing
        finite = finite.to(self.device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self.applied = torch.minimum(self.applied, finite)
        self.optimizer.step = self._step
        try:
            step_unless_nonfinite(self.optimizer, self.applied.to(place))
        finally:
            self.optimizer.step = self


def import_deepspeed(device: torch.device):
    """Imports DeepSpeed so that it needs no compiler on a CPU (specs/engine.md 1.3)."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it takes a GPU unasked, also under --device cpu
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("--enable_deepspeed needs the package deepspeed: pip install -r requirements.txt") from error
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if device.type == "cpu" and isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False  # gloo alone does; the helper would be compiled at each first start
    return deepspeed
