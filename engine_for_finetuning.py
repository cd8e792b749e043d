"""Classification: the task that the loop of engine_for_pretraining.py trains, and its
evaluation."""

from argparse import Namespace
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from unimim.engine.distributed import reduce_sum
from unimim.engine.ema import MovingAverage
from unimim.engine.state import RunContext
from unimim.engine.task import Task
from unimim.evaluation.accuracy import averages, tally


class Classification(Task):
    """A classifier with its criterion, mixup, random erasing and moving average."""

    ema_key = "model_ema"

    def __init__(self, model: nn.Module, args: Namespace, device: torch.device):
        super().__init__()
        self.model = model
        mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        self.mixup = make_mixup(args) if mixing else None
        self.erase = None
        if args.reprob and not args.no_aug:
            self.erase = RandomErasing(
                args.reprob, mode=args.remode, max_count=args.recount, device=str(device)
            )
        self.criterion = make_criterion(args, mixing)
        self.ema_decay = args.model_ema_decay
        self.ema_warmup = args.model_ema_warmup_epochs / args.epochs
        if args.model_ema:
            self.ema = MovingAverage(model, copy_buffers=True)
            if args.model_ema_force_cpu:
                self.ema.module.to("cpu")

    @property
    def network(self) -> nn.Module:
        return self.model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, targets = batch["image"], batch["label"]
        if self.erase is not None:
            images = self.erase(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        logits = self.model(images).float()
        out = {"loss": self.criterion(logits, targets)}
        if self.mixup is None:
            out["class_acc"] = (logits.detach().argmax(-1) == targets).float().mean()
        return out

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Update the ema; its decay rises from nine tenths to the whole during the warm-up."""
        if self.ema is not None:
            risen = min(progress / self.ema_warmup, 1.0) if self.ema_warmup else 1.0
            self.ema.update(self.ema_decay * (0.9 + 0.1 * risen), applied)


class BinaryCrossEntropy(nn.Module):
    """Computes binary cross entropy, summed over classes: targets are labels [B] or fractions [B,
    classes]."""

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            hot = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
            targets = hot * (1 - self.smoothing) + self.smoothing / logits.shape[-1]
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


def make_criterion(args: Namespace, mixing: bool) -> nn.Module:
    """Return the criterion of logits [B, classes] and labels [B] or, where images are mixed,
    fractions [B, classes]."""
    if args.bce_loss:
        return BinaryCrossEntropy(args.smoothing)
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def make_mixup(args: Namespace) -> Mixup:
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.nb_classes,
    )


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    loader: Iterable[dict[str, Tensor]],
    context: RunContext,
    *,
    dtype: torch.dtype | None = None,
    shared: bool = False,
) -> dict[str, float]:
    """Return {"loss", "acc1", "acc5"} (percent) over a loader; padding (a negative index) does not
    count.

    `shared`: each process saw a part of the images, and the sums are added up over processes.
    """
    was_training = model.training
    model.eval()
    device = context.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in loader:
        counts = (batch["index"] >= 0).to(device)
        moved = context.normalize(batch)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = model(moved["image"]).float()
        sums += tally(logits, moved["label"], counts)
    model.train(was_training)
    if shared:
        reduce_sum(sums)
    return averages(sums)
