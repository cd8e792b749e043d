"""What a run knows of its surroundings, and what one run of the training loop holds."""

from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from optim_factory import LayerWarmups
from unimim.data.views import LUMINANCE, image_mean_std
from unimim.engine.distributed import StopSignal
from unimim.engine.monitor import RunLog, StepMonitor, Throughput
from unimim.engine.runner import Runner
from unimim.engine.session import Session
from unimim.engine.task import Task

Batch = dict[str, Any]  # tensors by their names, and numbers of the whole batch


class Normalize:
    """Moves a batch to the device and turns its uint8 images [B, 3, H, W] into normalized floats.

    With one mean and std they become gray images [B, 1, H, W]. Views of images that are floats
    already [B, N, H, W] are normalized as they are. Images under the keys `raw` stay as
    they are: the network normalizes them itself. "index", the numbers of the images, stays on the
    host.
    """

    def __init__(
        self,
        mean_std: tuple[tuple[float, ...], tuple[float, ...]],
        device: torch.device,
        raw: Collection[str] = (),
    ):
        mean, std = mean_std
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.luminance = torch.tensor(LUMINANCE, device=device).view(3, 1, 1)
        self.raw = raw

    def __call__(self, batch: Batch) -> Batch:
        prepared = {}
        for name, value in batch.items():
            if name == "index":
                continue
            if isinstance(value, Tensor):
                value = value.to(self.mean.device, non_blocking=True)
                is_image = value.ndim == 4 and name not in self.raw
                if is_image and value.dtype == torch.uint8:
                    value = self.normalized(value.float().div_(255))
                elif is_image and name == "image" and value.is_floating_point():
                    value = value.sub(self.mean).div_(self.std)
            prepared[name] = value
        return prepared

    def normalized(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] normalized; their memory is written to."""
        if len(self.mean) == 1:
            images = images.mul_(self.luminance).sum(1, keepdim=True)
        return images.sub_(self.mean).div_(self.std)


def with_mask_counts(batch: Batch) -> Batch:
    """Add how many patches of an image are masked, the fewest and the most of the batch.

    They are counted on the host, as the batch comes from the loader: no step waits for the device.
    "mask" [B, gh, gw] gives "mask_counts", a pair of ints, and "max_masked", the larger of them;
    "target_mask" gives "target_mask_counts".
    """
    batch = dict(batch)
    for name in ("mask", "target_mask"):
        if name in batch:
            counts = batch[name].flatten(1).sum(1)
            batch[f"{name}_counts"] = int(counts.min()), int(counts.max())
    if "mask" in batch:
        batch["max_masked"] = batch["mask_counts"][1]
    return batch


@dataclass(frozen=True)
class RunContext:
    """What every part of a run may know: its flags, its device, its rank among the processes."""

    args: Namespace
    device: torch.device
    rank: int
    world_size: int

    @cached_property
    def normalize(self) -> Normalize:
        """Make a batch of the loader what a network takes, by the mean and std of the flags."""
        return Normalize(image_mean_std(self.args), self.device)


@dataclass
class Training:
    """Everything that one run of the loop needs."""

    context: RunContext
    runner: Runner
    task: Task
    normalize: Normalize
    decode: Callable[[Batch], Batch]
    loader: DataLoader
    steps_per_epoch: int
    n_parameters: int
    lr: np.ndarray | LayerWarmups
    weight_decay: np.ndarray
    monitor: StepMonitor
    throughput: Throughput
    session: Session
    run_log: RunLog
    stop: StopSignal

    @property
    def args(self) -> Namespace:
        return self.context.args

    @property
    def total_steps(self) -> int:
        return self.args.epochs * self.steps_per_epoch

    def prepare(self, batch: Batch) -> Batch:
        """Make a batch of the loader what the task takes."""
        return self.normalize(with_mask_counts(self.decode(batch)))


class Stopped(Exception):
    """A signal asked the run to stop; everything is saved."""


class Interrupted(Stopped):
    """A signal asked the run to stop while it evaluates: nothing of the evaluation is kept."""


class Interruptible:
    """The batches of an evaluation, until a signal asks all ranks to stop: Interrupted.

    All ranks go through as many batches.
    """

    def __init__(self, loader: DataLoader, stop: StopSignal):
        self.loader = loader
        self.dataset = loader.dataset
        self.stop = stop

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield batch
            self._ask(last=False)
        self._ask(last=True)

    def _ask(self, *, last: bool) -> None:
        if self.stop.agreed(last=last):
            raise Interrupted(f"{self.stop.reason} during an evaluation")
