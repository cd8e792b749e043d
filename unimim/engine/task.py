"""What the training loop asks of anything that it trains."""

from typing import Any

from torch import Tensor, nn

from unimim.engine.ema import MovingAverage


class Task(nn.Module):
    """A pre-training method, a classifier with its criterion, a probe: whatever one run trains.

    A task computes the loss of a batch. Everything else has a default here, and a task overrides
    what it needs:

    network: the part of the task whose weights checkpoints hold; the task itself.
    ema: a moving average of the network; None. It is not a submodule, so that no engine wraps,
        casts or optimizes it, but it is saved and resumed.
    ema_key: the key of a checkpoint under which the average is saved; the key is always written,
        with None where there is no average.
    teacher: what makes the targets and is not trained, such as the ema's network; None.
    frozen: a network that only makes targets, and whose blocks --compile compiles too; None.
    raw_views: keys of a batch whose images the task normalizes itself.
    """

    ema: MovingAverage | None = None
    ema_key: str = "average"
    teacher: Any = None
    frozen: nn.Module | None = None
    raw_views: tuple[str, ...] = ()

    @property
    def network(self) -> nn.Module:
        return self

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss": scalar, ...}; further entries are detached metrics for the log."""
        raise NotImplementedError

    def before_epoch(self, epoch: int, epochs: int) -> None:
        """Called when epoch number `epoch`, from 0, of a run of `epochs` begins or is resumed."""

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Called after each optimizer step.

        `progress` is the fraction of the run before the step, in [0, 1); `applied` is 0 where the
        step was skipped because its gradients were not finite, else 1.
        """
