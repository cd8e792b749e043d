"""Runs a step with DeepSpeed ZeRO, and writes DeepSpeed's configuration."""

import json
import math
import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unimim.checkpoint.files import load_plain
from unimim.engine.batch_norm import batch_norm_in_float32, synchronized_batch_norm
from unimim.engine.runner import (
    AUTOCAST_DTYPES,
    Runner,
    good_steps,
    spoil_if_nonfinite,
    step_unless_nonfinite,
)
from unimim.engine.shards import ZeroShards
from unimim.files import file_sha256

# What DeepSpeed reads at the top level; it ignores a misspelled key without a word, so we refuse it
# (docs/engine.md#deepspeeds-configuration).
DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "zero_optimization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "torch_autocast", "bf16", "fp16", "steps_per_print",
    "wall_clock_breakdown", "dump_state", "prescale_gradients", "gradient_predivide_factor",
    "communication_data_type", "seq_parallel_communication_data_type", "activation_checkpointing",
    "aio", "flops_profiler", "comms_logger", "checkpoint", "data_types", "tensorboard", "wandb",
    "csv_monitor", "autotuning", "compile", "sparse_gradients", "disable_allgather",
    "memory_breakdown", "dataloader_drop_last",
}  # fmt: skip


def deepspeed_config(args: Namespace, parameters: int = 0) -> dict[str, Any]:
    """Return DeepSpeed's configuration: that of the flags, over which --deepspeed_config wins.

    `gradient_clipping` is always written: DeepSpeed's default clips at 1.0
    (docs/engine.md#gradient-clipping). bf16 takes the `torch_autocast` section: float32 weights and
    the same numbers as DDP. fp16 takes the section of its own, with BEiT's values: DeepSpeed 0.19
    neither lowers nor undoes the scale of autocast's fp16 under ZeRO. `parameters`, the number of
    trainable ones, sizes the buckets.
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
    # else DeepSpeed refuses every optimizer but its own, which it compiles
    if offloads(config["zero_optimization"]):
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def zero_section(args: Namespace, parameters: int) -> dict[str, Any]:
    """Return the zero_optimization section that the flags ask for.

    DeepSpeed's default buckets of 2 GB hold a whole ViT, so that nothing is sent before the
    backward pass ends; here they are an eighth of the parameters.
    """
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
    """Return whether the optimizer's state is kept outside the device."""
    return (zero_section.get("offload_optimizer") or {}).get("device", "none") != "none"


def check_zero_section(section: dict[str, Any], args: Namespace) -> None:
    """Raise a ValueError for settings that do not work with the ZeRO stage."""
    # probes and part learning have no --compile
    if getattr(args, "compile", False) and section["stage"] == 3:
        raise ValueError(
            "--compile does not work with ZeRO stage 3, whose gather hooks cut the gradients: "
            "use --zero_stage 2"
        )
    if args.precision == "fp16" and section["stage"] == 0:
        raise ValueError(
            "--precision fp16 does not work with ZeRO stage 0, whose float32 weights DeepSpeed "
            "keeps to itself: use --zero_stage 1, or leave out --enable_deepspeed"
        )
    if offloads(section) and section["stage"] == 0:
        raise ValueError(
            "--offload optimizer needs a sharded optimizer: use --zero_stage 1, 2 or 3"
        )
    place = section.get("offload_optimizer") or {}
    if not args.deepspeed_shards and (place.get("device") == "nvme" or place.get("ratio", 1) < 1):
        raise ValueError(
            f"--deepspeed_config {args.deepspeed_config} keeps the optimizer's state on a disk or "
            "in two places, from where only DeepSpeed itself saves it: add --deepspeed_shards"
        )


def precision_section(precision: str) -> dict[str, Any]:
    if precision == "fp16":
        return {
            "fp16": {
                "enabled": True,
                "loss_scale": 0,
                "initial_scale_power": 7,
                "loss_scale_window": 128,
            }
        }
    # no module is named whose gradients and shards could be sent in bf16, as DDP sends none
    if precision == "bf16":
        return {
            "torch_autocast": {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        }
    return {}


def read_deepspeed_config(path: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # also for what is no UTF-8
        raise ValueError(f"--deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"--deepspeed_config {path} must hold one JSON object")
    return given


def check_deepspeed_config(given: dict, ours: dict, args: Namespace) -> None:
    name = f"--deepspeed_config {args.deepspeed_config}"
    if named := {"optimizer", "scheduler"} & given.keys():
        raise ValueError(
            f"{name} has the section {min(named)}, which comes from the flags here: leave it out"
        )
    if unknown := given.keys() - DEEPSPEED_KEYS:
        raise ValueError(
            f"{name}: DeepSpeed does not know the keys {sorted(unknown)}, and would ignore them "
            "silently; leave them out"
        )
    batches = {"train_batch_size": args.batch_size * args.update_freq * args.world_size, **ours}
    for key in (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "train_batch_size",
    ):
        if given.get(key, batches[key]) != batches[key]:
            raise ValueError(
                f"{name} says {key} {given[key]}, the flags say {batches[key]}: make them equal"
            )
    if args.clip_grad and given.get("gradient_clipping", args.clip_grad) != args.clip_grad:
        raise ValueError(
            f"{name} says gradient_clipping {given['gradient_clipping']}, --clip_grad is "
            f"{args.clip_grad}: make them equal"
        )
    stage = given.get("zero_optimization", {}).get("stage", args.zero_stage)
    if given.get("bf16", {}).get("enabled") and stage == 0:
        raise ValueError(
            f"{name}: bf16 with ZeRO stage 0 takes a wrong first step in DeepSpeed; "
            "use stage 1 or more"
        )
    if given.get("fp16", {}).get("enabled") and stage == 0:
        raise ValueError(
            f"{name}: fp16 with ZeRO stage 0 keeps its float32 weights to itself; use stage 1 or "
            "more"
        )
    if given.get("torch_autocast", {}).get("dtype") in ("fp16", "float16"):
        raise ValueError(
            f"{name}: torch_autocast with fp16 clips scaled gradients in DeepSpeed; "
            "use the section fp16"
        )


class DeepSpeedRunner(Runner):
    """Runs steps with DeepSpeed ZeRO 0 to 3; `config` keeps the configuration that is used."""

    def __init__(self, network, optimizer, *, config: dict[str, Any], device: torch.device):
        super().__init__(
            network,
            optimizer,
            update_freq=config["gradient_accumulation_steps"],
            clip_grad=config["gradient_clipping"] or None,
        )
        deepspeed = import_deepspeed(device)
        self.config = config
        self.device = device
        self.guard = StepGuard(optimizer, device)
        reduced = [
            dtype for name, dtype in AUTOCAST_DTYPES.items() if config.get(name, {}).get("enabled")
        ]
        if reduced:
            run_with_rounded_weights(network, device, reduced[0])
        self.model, _, _, _ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=dict(config)
        )
        self.stage = self.model.zero_optimization_stage()
        self.engine = {"kind": "deepspeed", "zero_stage": self.stage}
        # None where the optimizer steps the parameters themselves
        self.shards = (
            ZeroShards(self.model.optimizer, network, self.names, device) if self.stage else None
        )
        self.gathered_parameters = deepspeed.zero.GatheredParameters
        autocast = (
            self.model.torch_autocast_dtype() if self.model.torch_autocast_enabled() else None
        )
        self.dtype = reduced[0] if reduced else autocast
        # the weights themselves, or stage 3's gathered copies of them, may then be rounded
        self.rounded = bool(reduced) or (autocast is not None and self.stage == 3)

    def micro_step(self, batch, *, last):
        if not self.statistics.kept:
            self.statistics.keep()
        out = self.model(batch)
        self.model.set_gradient_accumulation_boundary(last)
        # divides by the accumulation count itself
        self.model.backward(spoil_if_nonfinite(out["loss"]))
        if not last:
            self.model.step()
        return out

    def apply_gradients(self):
        norm = self._whole_norm() if self.stage == 0 else None
        self.guard.reset()
        self.model.step()
        applied = self.guard.applied * float(self.model.was_step_applied())
        if norm is None:
            # None where the user's configuration switches it off
            known = self.model.get_global_grad_norm()
            norm = torch.as_tensor(float("nan") if known is None else known, device=self.device)
        return {"grad_norm": norm.float(), "applied": applied}

    def _whole_norm(self) -> Tensor:
        """Return the gradients' norm for stage 0, which keeps whole gradients and reports none."""
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.network.parameters() if p.grad is not None]
        )

    def full_state_dict(self):
        """Gather one parameter at a time on every rank; rank 0 keeps them all, on the host."""
        state = {}
        keeps = dist.get_rank() == 0
        for name, value in self.network.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                with self.whole([value]) as (tensor,):
                    if keeps:
                        state[name] = tensor.detach().to("cpu", torch.float32, copy=True)
            elif keeps:
                state[name] = value.detach().to("cpu", copy=True)
        return state

    def optimizer_state(self):
        return super().optimizer_state() if self.shards is None else self.shards.whole_state()

    def load_optimizer_state(self, saved):
        if self.shards is None:
            super().load_optimizer_state(saved)
        else:
            self.shards.load_state(saved)

    def load_weights(self, weights):
        if self.shards is not None:
            self.shards.load_weights(weights)

    def scaler_state(self):
        scaler = getattr(self.model.optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        good = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {
            "scale": float(scaler.cur_scale),
            "good_steps": good,
            "hysteresis": scaler.cur_hysteresis,
        }

    def load_scaler_state(self, saved):
        scaler = getattr(self.model.optimizer, "loss_scaler", None)
        if not saved or not getattr(scaler, "dynamic", False):
            return
        scaler.cur_scale = saved["scale"]
        # it counts the good steps as those since the last overflow
        scaler.last_overflow_iter = -1
        scaler.cur_iter = good_steps(saved)
        scaler.cur_hysteresis = saved.get("hysteresis", scaler.delayed_shift)

    def count_steps(self, done, skipped):
        self.model.global_steps = done
        self.model.global_samples = done * self.model.train_batch_size()
        self.model.skipped_steps = skipped

    @contextmanager
    def whole(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield whole float32 values of the parameters, gathered in one exchange."""
        rounded = [self.rounded and p.requires_grad for p in parameters]
        masters = iter(self._masters([p for p, r in zip(parameters, rounded, strict=True) if r]))
        others = [p for p, r in zip(parameters, rounded, strict=True) if not r]
        with self.gathered_parameters(others, enabled=self.stage == 3 and bool(others)):
            yield [next(masters) if r else p for p, r in zip(parameters, rounded, strict=True)]

    def _masters(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return whole float32 values of parameters of which the engine trains rounded copies."""
        if not parameters:
            return []
        return _joined_partitions(parameters) if self.stage == 3 else _joined_fragments(parameters)

    def save(self, folder: str, tag: str) -> None:
        """Write the sharded state for an exact resume; all ranks call."""
        self.model.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, folder: str, tag: str) -> None:
        """Go on from the sharded state; all ranks call.

        DeepSpeed would unpickle its files: they are read here, and run no code.
        """
        self.model.checkpoint_engine.load = read_shard
        try:
            self.model.load_checkpoint(folder, tag=tag)
        finally:
            del self.model.checkpoint_engine.load


def read_shard(path: str, map_location: Any = None) -> dict[str, Any]:
    """Read one of DeepSpeed's files onto the CPU; ValueError for one that would run code."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: str) -> ZeroStageEnum:
        if kind is not ZeroStageEnum:
            raise pickle.UnpicklingError("GLOBAL getattr")
        return kind[name]

    classes = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
    # Python before 3.11.4 pickles a member of an enum as getattr of its class
    return load_plain(path, (*classes, (member, "builtins.getattr")))


def wrong_shard(folder: Path, checksums: dict[str, str], rank: int, ranks: int) -> str:
    """Return what is wrong with one of the shards that fall to this rank; empty if all are whole.

    `checksums` by file name are empty for an older checkpoint.
    """
    names = sorted(checksums or [shard.name for shard in folder.glob("*_states.pt")])
    for name in names[rank::ranks]:
        try:
            if checksums and file_sha256(folder / name) != checksums[name]:
                return (
                    f"{folder / name} is not the file that was saved: it is damaged; resume from "
                    "an older checkpoint"
                )
            read_shard(str(folder / name))
        except ValueError as error:
            return str(error)
    return ""


def _joined_fragments(parameters: list[Tensor]) -> list[Tensor]:
    """Return the masters of stages 1 and 2, of which each rank holds a span or nothing."""
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    for whole, p in zip(flat.split(sizes), parameters, strict=True):
        if p._hp_mapping is not None:
            span = p._hp_mapping.lp_fragment_address
            whole.narrow(0, span.start, span.numel).copy_(p._hp_mapping.get_hp_fragment().detach())
    dist.all_reduce(flat, group=parameters[0]._dp_group)
    return [w.view_as(p) for w, p in zip(flat.split(sizes), parameters, strict=True)]


def _joined_partitions(parameters: list[Tensor]) -> list[Tensor]:
    """Return the masters of stage 3, of which each rank holds an equal part, padded at the end."""
    from deepspeed.utils import safe_get_local_fp32_param

    # copies, because a state that is swapped to disk lends its memory for a moment only
    mine = [safe_get_local_fp32_param(p).detach().clone() for p in parameters]
    group = getattr(parameters[0], "ds_process_group", None)
    ranks = dist.get_world_size(group)
    flat = torch.cat(mine)
    gathered = flat.new_empty(ranks * flat.numel())
    dist.all_gather_into_tensor(gathered, flat, group=group)
    columns = gathered.view(ranks, -1).split([part.numel() for part in mine], dim=1)
    return [
        column.reshape(-1)[: p.ds_numel].view(p.ds_shape)
        for column, p in zip(columns, parameters, strict=True)
    ]


def run_with_rounded_weights(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let a network whose weights DeepSpeed keeps in bf16 or fp16 take float32 images and
    norms."""
    # inside the network, because DeepSpeed ends an autocast around it
    network.forward = torch.autocast(device.type, dtype)(network.forward)
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            synchronized = isinstance(norm, nn.SyncBatchNorm) or "forward" in vars(norm)
            norm.forward = partial(
                synchronized_batch_norm if synchronized else batch_norm_in_float32, norm
            )


class StepGuard:
    """Wraps `optimizer.step`: no rank steps where a gradient on any rank is not finite.

    ZeRO-3 calls it for each of its sub-groups, after it has looked at the gradients of all.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer = optimizer
        self.device = device
        self.reset()
        self._step = optimizer.step
        optimizer.step = self

    def reset(self) -> None:
        self.applied = torch.ones((), device=self.device)

    def __call__(self, closure=None):
        gradients = [
            p.grad
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        finite = (
            torch.nn.utils.get_total_norm(gradients).isfinite().float()
            if gradients
            else self.applied.clone()
        )
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
    """Import DeepSpeed so that it needs no compiler on a CPU
    (docs/engine.md#no-compiler-on-a-cpu)."""
    # it takes a GPU unasked, also under --device cpu
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "--enable_deepspeed needs the package deepspeed: pip install -r requirements.txt"
        ) from error
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if device.type == "cpu" and isinstance(compatible, dict):
        # gloo alone does; the helper would be compiled at each first start
        compatible["deepspeed_shm_comm"] = False
    return deepspeed
