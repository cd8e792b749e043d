"""Linear probing: heads trained side by side on features of a frozen backbone."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim_factory import Groups
from unimim.engine.batch_norm import average_batch_statistics
from unimim.engine.distributed import reduce_sum
from unimim.engine.state import RunContext
from unimim.engine.task import Task
from unimim.evaluation.accuracy import averages, tally
from unimim.evaluation.features import Backbone


class LinearHead(nn.Sequential):
    """A linear layer after batch normalization without weights: features [B, C] to logits [B,
    classes].

    Its names, `0.running_mean` and `1.weight`, are the published ones after `head.`
    (docs/methods/semaim.md#k-nn-and-linear-probe).
    """

    def __init__(self, dim: int, num_classes: int, batch_norm: bool = True):
        normalize = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        super().__init__(normalize, nn.Linear(dim, num_classes))
        nn.init.trunc_normal_(self[1].weight, std=0.01)
        nn.init.zeros_(self[1].bias)


def head_names(lrs: Sequence[float]) -> list[str]:
    """Return `head`, as published, for a single lr, else a name for each lr."""
    if len(lrs) == 1:
        return ["head"]
    return [f"lr_{lr:g}".replace(".", "p") for lr in lrs]


def side_by_side(
    lrs: Sequence[float], dim: int, num_classes: int, seed: int, batch_norm: bool = True
) -> nn.ModuleDict:
    """Return a head for each lr; all start as a single one with this seed would."""
    heads = nn.ModuleDict()
    for name in head_names(lrs):
        torch.manual_seed(seed)
        heads[name] = LinearHead(dim, num_classes, batch_norm)
    return heads


def head_groups(heads: Iterable[LinearHead], lrs: Sequence[float], weight_decay: float) -> Groups:
    """Return an optimizer group for each head, its lr as a fraction of the largest.

    The bias decays too, as published, unless the optimizer leaves it out (LARS).
    """
    return [
        {
            "params": list(head.parameters()),
            "weight_decay": weight_decay,
            "lr_scale": lr / max(lrs),
            "group_name": f"lr_{lr:g}",
            "decay": True,
        }
        for head, lr in zip(heads, lrs, strict=True)
    ]


class Probe(Task):
    """The task: batches of images, or of features, to the sum of the heads' losses.

    No head sees another: each has the gradients that it would have alone. The backbone is no
    submodule, so that it is neither wrapped nor optimized nor saved, and stays in eval mode.
    """

    def __init__(self, heads: nn.ModuleDict, backbone: Backbone):
        super().__init__()
        self.heads = heads
        self._backbone = (backbone,)

    @property
    def network(self) -> nn.Module:
        return self.heads

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the batch's features [B, C] if it has them, else the backbone's of its images."""
        return batch["features"] if "features" in batch else self._backbone[0](batch["image"])

    def logits(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return the logits of every head, float32 [B, classes]."""
        features = self.features(batch)
        with torch.autocast(features.device.type, enabled=False):
            return [head(features.float()) for head in self.heads.values()]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = self.logits(batch), batch["label"]
        losses = [F.cross_entropy(own, labels) for own in logits]
        accuracies = [(own.detach().argmax(-1) == labels).float().mean() for own in logits]
        metrics = {"loss": torch.stack(losses).sum(), "class_acc": torch.stack(accuracies).amax()}
        if len(losses) > 1:
            metrics |= {
                f"loss_{name}": loss.detach() for name, loss in zip(self.heads, losses, strict=True)
            }
        return metrics

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Make the running statistics equal on all ranks, each of which normalizes its own
        batches."""
        average_batch_statistics(self.heads, next(self.heads.parameters()).device)


@torch.no_grad()
def evaluate_heads(
    probe: Probe,
    loader: Iterable[dict[str, Tensor]],
    context: RunContext,
    dtype: torch.dtype | None,
) -> list[dict[str, float]]:
    """Return {"loss", "acc1", "acc5"} of each head over a loader that the ranks share.

    Every image counts once.
    """
    was_training = probe.training
    device = context.device
    probe.eval()
    sums = torch.zeros(len(probe.heads), 4, dtype=torch.float64, device=device)
    for batch in loader:
        counts = (batch["index"] >= 0).to(device)
        moved = context.normalize(batch)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = probe.logits(moved)
        sums += torch.stack([tally(own, moved["label"], counts) for own in logits])
    probe.train(was_training)
    return [averages(own) for own in reduce_sum(sums)]
