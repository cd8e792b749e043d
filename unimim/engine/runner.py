"""Runs a step: plain torch and DDP behind one small interface."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unimim.engine.batch_norm import BatchStatistics
from unimim.engine.distributed import in_group, is_first_rank, reduce_sum
from unimim.engine.optimizer_state import Named, by_name, by_number, group_names
from unimim.engine.writing import on_host
from unimim.logs import log

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Raise a ValueError if the hardware cannot compute in this precision."""
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; on a CPU take bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not has_bf16():
        raise ValueError("--precision bf16 is not supported by this GPU; take fp16 or fp32")


def has_bf16() -> bool:
    """Return whether this GPU computes in bf16; older ones emulate it, slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Runner:
    """What plain, DDP and DeepSpeed runs share: `network` is the module itself, `model` its
    wrapper."""

    network: nn.Module
    engine: dict[str, Any]  # its kind, for the checkpoint

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        update_freq: int,
        clip_grad: float | None,
    ):
        self.network = network
        self.optimizer = optimizer
        # before an engine puts shards into the groups
        self.names = group_names(network, optimizer)
        self.update_freq = update_freq
        self.clip_grad = clip_grad
        self.statistics = BatchStatistics()
        self.dtype: torch.dtype | None = None  # of autocast
        self.gradients = GradientCheck(network)

    def watch(self, *modules: nn.Module | None) -> None:
        """Put batch statistics of these modules back after a skipped step."""
        self.statistics = BatchStatistics(*modules)

    def micro_step(self, batch: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """Run forward and backward of one micro-batch; `last` marks the last of an optimizer
        step."""
        raise NotImplementedError

    def step(self) -> dict[str, Tensor]:
        """Apply the gradients.

        Returns {"grad_norm": 2-norm before clipping, "applied": 1.0, or 0.0 for a skipped step}.
        """
        result = self.apply_gradients()
        self.statistics.put_back_unless(result["applied"])
        self.statistics.kept = []
        self.gradients.after_step(result["applied"])
        return result

    def apply_gradients(self) -> dict[str, Tensor]:
        """Change the weights for `step`, and return what `step` returns."""
        raise NotImplementedError

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state with whole float32 weights on the host of rank 0.

        All ranks call; the others get nothing.
        """
        return on_host(self.network.state_dict()) if is_first_rank() else {}

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's named state and of the loss scale on the host of rank 0.

        All ranks call; the others get nothing.
        """
        return {"optimizer": self.optimizer_state(), "scaler": self.scaler_state()}

    def optimizer_state(self) -> Named:
        """Return the optimizer's named state, as `state_dict` does."""
        if not is_first_rank():
            return {}
        return on_host(by_name(self.optimizer.state_dict(), self.names))

    def load_optimizer_state(self, saved: Named) -> None:
        """Go on from the optimizer's state that any engine saved."""
        groups = self.optimizer.param_groups
        self.optimizer.load_state_dict(by_number(saved, self.names, groups))

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Give the optimizer the float32 `weights` by name, where it has weights of its own."""

    def scaler_state(self) -> dict[str, Any]:
        """Return the loss scale and for how many steps it has been good; empty without one."""
        return {}

    def load_scaler_state(self, saved: dict[str, Any]) -> None:
        """Go on with the loss scale that any engine saved, if both runs have one."""

    def count_steps(self, done: int, skipped: int) -> None:
        """Tell the engine how many steps the run has done before it was resumed."""

    def whole(self, parameters: list[Tensor]):
        """Return a context that yields whole float32 values of the network's parameters."""
        return nullcontext(parameters)


class GradientCheck:
    """Finds trainable tensors without a gradient that is not zero in the first applied steps.

    A single such tensor may be meant, and is named in the log; most of a network never is, and is
    an error. It takes several steps, because before a head that starts at zero all gradients are
    zero in the first ones.
    """

    steps = 5

    def __init__(self, network: nn.Module):
        named = [
            (name, p) for name, p in network.named_parameters() if p.requires_grad and p.numel() > 1
        ]
        self.names = [name for name, _ in named]
        self.seen = torch.zeros(len(named), device=named[0][1].device if named else None)
        self.done = torch.zeros((), device=self.seen.device)
        self.asked = 0
        self.counts: Tensor | None = None  # applied steps and `seen`, on their way to the host
        self.arrived: torch.cuda.Event | None = None
        self.hooks = [
            p.register_hook(partial(self._note, number)) for number, (_, p) in enumerate(named)
        ]

    @torch.no_grad()
    def _note(self, number: int, gradient: Tensor) -> None:
        """Note a gradient before reduction and sharding, where all engines look the same."""
        largest = torch.linalg.vector_norm(gradient.detach(), math.inf)
        self.seen[number] += ((largest > 0) & largest.isfinite()).to(self.seen)

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        """Judge once, after enough applied steps; on a GPU one step later, when the counts have
        long arrived on the host."""
        if not self.hooks:
            return
        if self.counts is not None and self._read_counts():
            return
        self.done += applied.to(self.done)
        self.asked += 1
        if self.asked < self.steps:
            return
        counts = torch.cat([self.done.view(1), reduce_sum(self.seen.clone())])
        self.counts = counts.to("cpu", non_blocking=True)
        if counts.is_cuda:
            self.arrived = torch.cuda.current_stream().record_event()
        else:
            self._read_counts()

    def _read_counts(self) -> bool:
        """Judge what the last step sent to the host; False if too few steps were applied."""
        if self.arrived is not None:
            self.arrived.synchronize()
        done, *counts = self.counts.tolist()
        self.counts = self.arrived = None
        if done < self.steps:
            return False
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self._judge([name for name, count in zip(self.names, counts, strict=True) if not count])
        return True

    def _judge(self, untouched: list[str]) -> None:
        if not untouched:
            return
        shown = ", ".join(untouched[:5]) + (", ..." if len(untouched) > 5 else "")
        text = (
            f"{len(untouched)} of {len(self.names)} trainable tensors had no gradient in "
            f"{self.steps} steps: {shown}"
        )
        if 2 * len(untouched) > len(self.names):
            raise ValueError(
                f"{text}. Most of the network is not trained: run without --compile or "
                "--enable_deepspeed"
            )
        log.warning("%s", text)


def spoil_if_nonfinite(loss: Tensor) -> Tensor:
    """Return the same loss; if it is not finite, neither are the gradients that come from it."""
    return loss * (1.0 + 0.0 * loss.detach())


def step_unless_nonfinite(
    optimizer: torch.optim.Optimizer, applied: Tensor, revocable: "RevocableStep | None" = None
) -> None:
    """Step where `applied` is 1, if possible without a wait for the device.

    There fused optimizers skip the step by themselves, and `revocable` takes back that of others.
    The host looks before a first step: it would leave state behind, and a fused SGD that skips it
    leaves its momentum uninitialized.
    """
    on_device = applied.device.type != "cpu"
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if on_device and fused and optimizer.state:
        step_on_device(optimizer, applied)
    elif on_device and not fused and revocable is not None and revocable.is_possible():
        revocable.take(applied)
    elif applied:
        optimizer.step()


def step_on_device(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Step with fused kernels, which read the gradient scaler's flag and skip where it is set."""
    optimizer.grad_scale, optimizer.found_inf = None, 1.0 - applied
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


class RevocableStep:
    """Takes the steps of an optimizer without a fused form, and takes back those that are not
    applied, without a wait for the device.

    What lies on the device is copied before the step and chosen from afterwards: weights and state
    are held twice for that long. What lies on the host, such as a counter, is put back by `settle`
    before the next step or a save, when the flag has long arrived there.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.holder = getattr(optimizer, "_base_optimizer", optimizer)  # Lookahead's state is there
        self.undo: list[tuple[dict, Any, Any]] = []  # a dict, its key and what was there before
        self.flag: Tensor | None = None  # of the last step, on the host
        self.arrived: torch.cuda.Event | None = None

    def is_possible(self) -> bool:
        """Whether all parameters with a gradient have state, and no more than can be put back."""
        if getattr(self.optimizer, "is_second_order", False):  # it draws random numbers of its own
            return False
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [self.holder.state.get(p) for p in weights if p.grad is not None]
        plain = Tensor | int | float | bool | str | None
        return all(states) and all(
            isinstance(value, plain) for state in states for value in state.values()
        )

    @torch.no_grad()
    def take(self, applied: Tensor) -> None:
        """One step, undone where the flag `applied` [] on the device is 0."""
        self.settle()
        groups = self.optimizer.param_groups
        weights = [p for group in groups for p in group["params"]]
        states = [self.holder.state[p] for p in weights if p in self.holder.state]
        places = [(state, key) for state in states for key in state]
        places = [(state, key) for state, key in places if _lies_on(applied.device, state[key])]
        held = [*weights, *(state[key] for state, key in places)]
        copies = [torch.empty_like(value) for value in held]
        torch._foreach_copy_(copies, held)
        before = [{key: _host_copy(value) for key, value in d.items()} for d in (*states, *groups)]

        self.optimizer.step()

        # where(): what a step made of a gradient that is not finite must not enter a sum
        for value, copy in zip([*weights, *(d[key] for d, key in places)], copies, strict=True):
            torch.where(applied > 0, value, copy, out=value)
        chosen = {(id(state), key) for state, key in places}
        self.undo = [
            (now, key, then.get(key, _MISSING))
            for now, then in zip((*states, *groups), before, strict=True)
            for key in now.keys() | then.keys()
            if (id(now), key) not in chosen
            and now.get(key, _MISSING) is not then.get(key, _MISSING)
        ]
        self.flag = applied.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream().record_event() if applied.is_cuda else None

    def settle(self) -> None:
        """Put back what the last step did on the host, if it was not applied."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.flag is not None and not self.flag:
            for each, key, value in self.undo:
                if value is _MISSING:
                    each.pop(key, None)
                else:
                    each[key] = value
        self.undo = []
        self.flag = self.arrived = None


_MISSING = object()


def _lies_on(device: torch.device, value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _host_copy(value: Any) -> Any:
    """A copy of a tensor on the host, anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.device.type == "cpu" else value


class TorchRunner(Runner):
    """Runs steps in one process, or with DDP where there are several."""

    def __init__(self, network, optimizer, *, device, precision, update_freq, clip_grad):
        super().__init__(network, optimizer, update_freq=update_freq, clip_grad=clip_grad)
        self.engine = {"kind": "torch"}
        self.device = device
        self.revocable = RevocableStep(optimizer)
        self.dtype = AUTOCAST_DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.model = network
        if in_group() and dist.get_world_size() > 1:
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
        # not the scaler's step, which would not guard a first one
        step_unless_nonfinite(self.optimizer, applied, self.revocable)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "applied": applied}

    def optimizer_state(self):
        self.revocable.settle()
        return super().optimizer_state()

    def load_optimizer_state(self, saved):
        self.revocable.settle()
        super().load_optimizer_state(saved)

    def scaler_state(self):
        if not self.scaler.is_enabled():
            return {}
        state = self.scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}

    def load_scaler_state(self, saved):
        if not saved or not self.scaler.is_enabled():
            return
        good = good_steps(saved) % self.scaler.get_growth_interval()
        own = {"scale": saved["scale"], "_growth_tracker": good}
        self.scaler.load_state_dict(self.scaler.state_dict() | own)


def good_steps(saved: dict[str, Any]) -> int:
    """Return for how many steps a saved loss scale was good; older files have torch's word."""
    return int(saved.get("good_steps", saved.get("_growth_tracker", 0)))
