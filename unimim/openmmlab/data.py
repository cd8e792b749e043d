"""The order of images and all randomness of a training step as functions of (seed, position): runs
resume exactly.

mmengine loads everything again that a resumed run had seen, with other random numbers. Here a
sampler hands out keys, indices that carry their position in the run; the pipeline's first step
seeds what follows by it.
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
    """An image's index that knows the position in the run (over all processes) and the seed of the
    run."""

    position: int
    seed: int

    @classmethod
    def make(cls, index: int, position: int, seed: int) -> "Key":
        key = cls(index)
        key.position, key.seed = position, seed
        return key


class PositionSampler(Sampler):
    """Keys of this process's images: every pass over the data is a permutation by (seed, number of
    the pass).

    endless: for iteration-based training, from `start`, a number of this process's images.
    Otherwise one epoch, whose end is filled up so that all processes have as many images.
    """

    def __init__(self, dataset, seed: int | None = None, endless: bool = True):
        self.dataset, self.endless = dataset, endless
        self.seed = sync_random_seed() if seed is None else seed
        self.rank, self.world, self.start, self.epoch = get_rank(), get_world_size(), 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world)

    def __iter__(self) -> Iterator[Key]:
        first = self.start if self.endless else self.epoch * len(self)
        count, order, current = 0, None, None
        while self.endless or count < len(self):
            position = (first + count) * self.world + self.rank
            number, place = divmod(position, self.period())
            if number != current:
                current, order = (
                    number,
                    np.random.default_rng([self.seed, number]).permutation(len(self.dataset)),
                )
            yield Key.make(int(order[place % len(order)]), position, self.seed)
            count += 1

    def period(self) -> int:
        """Positions of one permutation: an epoch of all processes has its fill at the end."""
        return len(self.dataset) if self.endless else len(self) * self.world


class SeedSample(BaseTransform):
    """The first step of a training pipeline: what it draws from here on depends on the seed and
    position alone."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        key = results["sample_idx"]
        if isinstance(key, Key):  # an image that replaces another goes on with the other's numbers
            state = np.random.SeedSequence([key.seed, 1, key.position]).generate_state(3)
            random.seed(int(state[0]))
            np.random.seed(int(state[1]))
            torch.manual_seed(int(state[2]))
            results["sample_idx"] = int(key)
        return results


class SeedStepHook(Hook):
    """Stochastic depth and dropout of each iteration depend on the seed, the process and the
    iteration alone."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_step(runner.seed, runner.rank, runner.iter)


class PositionLoop(IterBasedTrainLoop):
    """Iteration-based training with a `PositionSampler`, which a resumed run sets to its position
    at once."""

    def run(self):
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
