"""Batch normalization across processes: synchronized, in float32, undone after a skipped step."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from unimim.engine.distributed import in_group, mean_over_ranks


class BatchStatistics:
    """Remembers running statistics of batch normalization, so that a skipped step leaves no
    trace."""

    def __init__(self, *modules: nn.Module | None):
        norms = [
            m
            for module in modules
            if module is not None
            for m in module.modules()
            if isinstance(m, _BatchNorm)
        ]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        self.kept = [buffer.clone() for buffer in self.buffers]

    def put_back_unless(self, applied: Tensor) -> None:
        """Restore the statistics if `applied` is 0.

        A module on another device than the flag, such as an ema on the host, waits for it once.
        """
        flags: dict[torch.device, Tensor] = {}
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            if buffer.device not in flags:
                flags[buffer.device] = applied.to(buffer.device) > 0
            buffer.copy_(torch.where(flags[buffer.device], buffer, kept))


@torch.no_grad()
def average_batch_statistics(module: nn.Module, device: torch.device) -> None:
    """Replace the running statistics of each process by their mean over all processes.

    The mean is sent from `device`; all ranks call.

    In float64, so that statistics which are equal on all ranks stay as they are to the last bit.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    if not buffers or not in_group():
        return
    means = mean_over_ranks(torch.cat([buffer.double().flatten() for buffer in buffers]).to(device))
    parts = means.split([buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, parts, strict=True):
        buffer.copy_(mean.view_as(buffer))


def synchronize_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Make batch normalization take its statistics from the batches of all processes.

    On GPUs these are torch's modules, which know no CPU, where each norm gets a `forward` of ours.
    """
    if not in_group() or dist.get_world_size() == 1:
        return
    if device.type != "cpu":
        convert_sync_batchnorm(network)
        return
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            norm.forward = partial(synchronized_batch_norm, norm)


def synchronized_batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Normalize x [B, C, ...] in float32 by its mean and variance over all processes."""
    if not norm.training:
        return activated(norm, batch_norm_in_float32(norm, x).to(x.dtype))
    values = x.float()
    space = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    sums = all_reduce(torch.cat((values.sum(space), values.new_tensor([values[:, 0].numel()]))))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    centered = values - mean.view(shape)
    variance = all_reduce(centered.square().sum(space)) / count
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
    normed = centered * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normed = normed * norm.weight.float().view(shape) + norm.bias.float().view(shape)
    return activated(norm, normed.to(x.dtype))


def activated(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Apply the dropout and the activation that some of timm's norms contain."""
    for name in ("drop", "act"):
        x = getattr(norm, name, nn.Identity())(x)
    return x


def batch_norm_in_float32(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Normalize in float32: torch takes a norm's weights and statistics in one dtype only."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    own = norm.training or norm.running_mean is None
    return F.batch_norm(
        x.float(), norm.running_mean, norm.running_var, weight, bias, own, norm.momentum, norm.eps
    )
