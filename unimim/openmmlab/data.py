"""Make image order and randomness functions of (seed, position), so that runs resume exactly.

mmengine reloads everything that a resumed run has seen, with other random numbers. Here a sampler
yields keys, which are indices that carry their position in the run, and the first step of the
pipeline seeds the following ones with it.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dist import get_rank, get_world_size, sync_random_seed
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import Sampler

from unimim.engine.distributed import seed_step


class Key(int):
    """An image's index that carries its position in the run (over all processes) and the seed."""

    position: int
    seed: int

    @classmethod
    def make(cls, index: int, position: int, seed: int) -> "Key":
        """Return the key of image `index`."""
        key = cls(index)
        key.position = position
        key.seed = seed
        return key


class PositionSampler(Sampler):
    """Yield keys of this process's images; pass n over the data is a permutation by (seed, n).

    If `endless`, for iteration-based training, it begins at image `start` of this process.
    Otherwise it yields one epoch, padded so that all processes have the same number of images.
    """

    def __init__(self, dataset, seed: int | None = None, endless: bool = True):
        self.dataset = dataset
        self.endless = endless
        self.seed = sync_random_seed() if seed is None else seed
        self.rank = get_rank()
        self.world = get_world_size()
        self.start = 0
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world)

    def __iter__(self) -> Iterator[Key]:
        first = self.start if self.endless else self.epoch * len(self)
        count = 0
        current_pass = order = None
        while self.endless or count < len(self):
            position = (first + count) * self.world + self.rank
            data_pass, offset = divmod(position, self.period())
            if data_pass != current_pass:
                current_pass = data_pass
                rng = np.random.default_rng([self.seed, data_pass])
                order = rng.permutation(len(self.dataset))
            yield Key.make(int(order[offset % len(order)]), position, self.seed)
            count += 1

    def period(self) -> int:
        """Return the number of positions per permutation, including the padding of an epoch."""
        return len(self.dataset) if self.endless else len(self) * self.world


class SeedSample(BaseTransform):
    """Seed the following steps of a training pipeline with the run's seed and the position."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Seed all global generators, and replace the key by a plain index."""
        key = results["sample_idx"]
        if isinstance(key, Key):  # a replacement of a broken image continues the random stream
            state = np.random.SeedSequence([key.seed, 1, key.position]).generate_state(3)
            random.seed(int(state[0]))
            np.random.seed(int(state[1]))
            torch.manual_seed(int(state[2]))
            results["sample_idx"] = int(key)
        return results


class SeedStepHook(Hook):
    """Seed stochastic depth and dropout with the run's seed, the process and the iteration."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the iteration."""
        seed_step(runner.seed, runner.rank, runner.iter)


class PositionLoop(IterBasedTrainLoop):
    """Train by iterations with a `PositionSampler`, which a resumed run moves to its position."""

    def run(self):
        """Train, and return the model."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self.dataloader.sampler.start = self._iter * self.dataloader.batch_size
        self.dataloader_iterator = None  # the base class's, which began at 0
        batches = iter(self.dataloader)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
            if self.runner.val_loop is not None and self._iter >= self.val_begin and due:
                self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model
