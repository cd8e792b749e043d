"""What one run of the training loop holds."""

from argparse import Namespace
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unimim.engine.distributed import StopSignal
from unimim.engine.monitor import RunLog, StepMonitor, Throughput
from unimim.engine.runner import Runner
from unimim.engine.session import Session


class Normalize:
    """Moves a batch to the device and turns its uint8 images [B, 3, H, W] into normalized floats.

    "image_second" stays as it is: it is for a network that normalizes in its own way.
    """

    def __init__(self, mean_std: tuple[tuple[float, ...], tuple[float, ...]], device: torch.device):
        self.device = device
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in mean_std)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if k != "index"}
        for name, value in moved.items():
            if value.dtype == torch.uint8 and value.ndim == 4 and name != "image_second":
                moved[name] = value.float().div_(255).sub_(self.mean).div_(self.std)
        for name in {
            "mask",
            "target_mask",
        } & batch.keys():  # counted on the host: no wait for the device
            counts = batch[name].flatten(1).sum(1)
            moved[f"{name}_counts"] = int(counts.min()), int(counts.max())
        if "mask" in batch:
            moved["max_masked"] = moved["mask_counts"][1]
        return moved


@dataclass
class Training:
    """Everything that one run of the loop needs."""

    args: Namespace
    runner: Runner
    task: torch.nn.Module
    normalize: Normalize
    loader: DataLoader
    n_parameters: int
    lr: np.ndarray
    weight_decay: np.ndarray
    monitor: StepMonitor
    throughput: Throughput
    session: Session
    run_log: RunLog
    stop: StopSignal

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.args.epochs * self.steps_per_epoch


class Stopped(Exception):
    """A signal asked the run to stop; everything is saved."""
