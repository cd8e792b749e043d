"""Time variants of a computation against each other: interleaved, medians of ratios."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from unimim.engine.monitor import keep_freed_memory


@dataclass
class Variant:
    """One way to do a step, and what was measured of it."""

    name: str
    step: Callable[[], object]
    precision: str
    keeps_memory: bool = True
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)
    memory_mib: float = 0.0

    def run(self, device: torch.device) -> None:
        """Time one step."""
        keep_freed_memory(self.keeps_memory)
        if device.type == "cpu":  # an untimed step lets the heap fill, or empty
            self.step()
        synchronize(device)
        begin = time.perf_counter()
        self.step()
        synchronize(device)
        self.seconds.append(time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(variants: list[Variant], rounds: int, device: torch.device) -> None:
    """Run every variant once per round, in alternating order, after one untimed round."""
    for variant in variants:
        variant.step()
    for k in range(rounds):
        for variant in variants if k % 2 == 0 else reversed(variants):
            variant.run(device)


def speedup(base: Variant, other: Variant) -> float:
    """Return the median over rounds of base time / other time."""
    return statistics.median(a / b for a, b in zip(base.seconds, other.seconds, strict=True))
