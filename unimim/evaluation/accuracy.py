"""Accuracy, counted over batches and ranks, each image once."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def tally(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Return sums over a batch's images that count (bool [B]), float64 [4]: loss, top-1 hits,
    top-5 hits, images."""
    # not row[counts], whose shape the host would have to wait for
    rows = [row.double().where(counts, 0.0).sum() for row in scores(logits, labels)]
    return torch.stack([*rows, counts.sum()])


def averages(sums: Tensor) -> dict[str, float]:
    """Return {"loss", "acc1", "acc5"} (percent) from sums of `tally`."""
    loss, top1, top5, images = sums.tolist()
    return {"loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}


def published_lines(accuracy: Mapping[str, float], images: int, of: str = "network") -> list[str]:
    """Return the two lines that MAE's and BEiT's scripts print of an evaluation, which tools and
    papers quote."""
    acc1, acc5, loss = (accuracy[name] for name in ("acc1", "acc5", "loss"))
    return [
        f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}",
        f"Accuracy of the {of} on the {images} test images: {acc1:.1f}%",
    ]


def scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return per image the cross entropy, and whether the label is first or among the first five;
    each [B]."""
    guesses = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hits = guesses == labels[:, None]
    return F.cross_entropy(logits, labels, reduction="none"), hits[:, 0], hits.any(-1)
