"""Linear probing: heads trained side by side on the features of a frozen backbone, and their
evaluation."""

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
    """Features [B, C] to logits [B, classes]: batch normalization without weights, unless it is
    left out, then a linear layer.

    Its names, `0.running_mean` and `1.weight`, are the published ones after `head.`
    (specs/semaim.md 9).
    """

    def __init__(self, dim: int, num_classes: int, batch_norm: bool = True):
        normalize = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        super().__init__(normalize, nn.Linear(dim, num_classes))
        nn.init.trunc_normal_(self[1].weight, std=0.01)
        nn.init.zeros_(self[1].bias)


def head_names(rates: Sequence[float]) -> list[str]:
    """`head`, as published, for a single one; of several each is called after its learning rate."""
    if len(rates) == 1:
        return ["head"]
    return [f"lr_{rate:g}".replace(".", "p") for rate in rates]


def side_by_side(
    rates: Sequence[float], dim: int, num_classes: int, seed: int, batch_norm: bool = True
) -> nn.ModuleDict:
    """A head for each learning rate; all start as a single one with this seed would."""
    heads = nn.ModuleDict()
    for name in head_names(rates):
        torch.manual_seed(seed)
        heads[name] = LinearHead(dim, num_classes, batch_norm)
    return heads


def head_groups(heads: Iterable[LinearHead], rates: Sequence[float], weight_decay: float) -> Groups:
    """An optimizer group for each head, whose learning rate is its own of `rates`, as a share of
    the largest.

    The bias decays too, as published, unless the optimizer leaves it out (LARS).
    """
    return [
        {
            "params": list(head.parameters()),
            "weight_decay": weight_decay,
            "lr_scale": rate / max(rates),
            "group_name": f"lr_{rate:g}",
            "decay": True,
        }
        for head, rate in zip(heads, rates, strict=True)
    ]


class Probe(Task):
    """What the engine trains: batches of images, or of features, to the sum of the heads' losses.

    No head sees another: each has the gradients that it would have alone. The backbone is no
    submodule, so that it is neither wrapped nor optimized nor saved, and stays in eval mode.
    """

    def __init__(self, heads: nn.ModuleDict, backbone: Backbone):
        super().__init__()
        self.heads, self._backbone = heads, (backbone,)

    @property
    def network(self) -> nn.Module:
        return self.heads

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Those of the batch [B, C], or the backbone's of its images."""
        return batch["features"] if "features" in batch else self._backbone[0](batch["image"])

    def logits(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Of every head, float32 [B, classes]."""
        features = self.features(batch)
        with torch.autocast(features.device.type, enabled=False):
            return [head(features.float()) for head in self.heads.values()]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = self.logits(batch), batch["label"]
        losses = [F.cross_entropy(own, labels) for own in logits]
        accuracies = [(own.detach().argmax(-1) == labels).float().mean() for own in logits]
        figures = {"loss": torch.stack(losses).sum(), "class_acc": torch.stack(accuracies).amax()}
        if len(losses) > 1:
            figures |= {
                f"loss_{name}": loss.detach() for name, loss in zip(self.heads, losses, strict=True)
            }
        return figures

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Each rank normalizes its own batches; the running statistics are those of all, and equal
        on all ranks."""
        average_batch_statistics(self.heads, next(self.heads.parameters()).device)


@torch.no_grad()
def evaluate_heads(
    probe: Probe,
    loader: Iterable[dict[str, Tensor]],
    context: RunContext,
    dtype: torch.dtype | None,
) -> list[dict[str, float]]:
    """{"loss", "acc1", "acc5"} of each head over a loader that is shared among the ranks; every
    image counts once."""
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
