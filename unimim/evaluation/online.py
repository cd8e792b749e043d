"""Judges the encoder while it is pre-trained (--eval_every): k-NN, a linear probe, effective rank,
attention entropy, and pictures. Training goes on as if nothing had happened: no random number is
drawn from its stream, and every module gets its mode back.
"""

import io
import math
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datasets import ImageDataset
from modeling_backbones import map_of
from modeling_finetune import VisionTransformer
from unimim.data.channels import kept_channels
from unimim.data.preparation import preparation
from unimim.data.sources import PartSource, Source, build_source, detect, is_divided
from unimim.data.views import EvalTransform
from unimim.engine.deepspeed import deepspeed_config
from unimim.engine.ema import MovingAverage
from unimim.engine.samples import PICTURES, is_evaluated, sample_images, unchanged
from unimim.engine.session import Position
from unimim.engine.state import RunContext, Training
from unimim.evaluation.features import Backbone, Features, NotFiniteError, extract
from unimim.evaluation.knn import evaluate_knn
from unimim.evaluation.rank import Moments, effective_rank
from unimim.files import write_atomically
from unimim.logs import log

NEIGHBORS, TEMPERATURE = 20, 0.07
HELD_OUT_EVERY = 5  # of each class, where there are no validation images
ENTROPY_IMAGES = 128
ENTROPY_BATCH = 16
PROBE_STEPS = 100
PROBE_DECAY = 1e-4  # of the sum of squared weights


class EncoderInTraining(Backbone):
    """The encoder of a pre-training method as it is now; not a submodule, and never frozen.

    The feature of a ViT is the mean of its normed patch tokens, of any other network that of its
    last map.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self._network = (network,)
        self.image_size = network.image_size
        is_vit = isinstance(network, VisionTransformer)
        self.dim = network.embed_dim if is_vit else map_of(network.backbone)[0]

    @property
    def network(self) -> nn.Module:
        return self._network[0]

    def features(self, images: Tensor) -> Tensor:
        network = self.network
        if isinstance(network, VisionTransformer):
            tokens = network.norm(network.forward_features(images))
            return tokens[:, network.num_prefix_tokens :].mean(1)
        return network.features(images, None).mean((2, 3))


class OnlineEvaluation:
    """What training calls after each epoch; the metrics go where those of training go.

    It is built before an engine takes the method's weights, and `follow` tells it of the run.
    """

    def __init__(self, context: RunContext, method: nn.Module):
        args = context.args
        self.context, self.method = context, method
        self.bank, self.queries = labeled_images(args, method.image_size)
        self.classes = len(self.bank.source.classes)
        self.run: Training | None = None
        self.copy: MovingAverage | None = None  # whole weights, where the method's are sharded
        # --deepspeed_config may name another stage than --zero_stage
        if args.enable_deepspeed and deepspeed_config(args)["zero_optimization"]["stage"] == 3:
            self.copy = MovingAverage(method, copy_buffers=True)
            self.copy.module.ema = method.ema

    def follow(self, run: Training) -> None:
        """Judge the method of this run, whose engine has its weights now."""
        self.run = run
        if self.copy is not None:
            self.copy.module.to(self.context.device)
            self.copy.read_by(run.runner.whole)

    def after_epoch(self, position: Position) -> dict[str, float]:
        """Return the metrics of the encoder, and of its teacher, every --eval_every epochs and
        after the last; else nothing. Pictures are drawn at the same time."""
        if not is_evaluated(self.context.args, position.epoch):
            return {}
        start = time.perf_counter()
        network = self.method
        if self.copy is not None:
            self.copy.update(0.0)
            network = self.copy.module
        metrics = self.metrics(network)
        if self.method.teacher is not None:
            found = self.metrics(self.method.teacher)
            metrics |= {f"teacher_{name}": value for name, value in found.items()}
        self.draw(position, network)
        metrics["eval_seconds"] = time.perf_counter() - start
        return metrics

    def draw(self, position: Position, network: nn.Module) -> None:
        """Write the pictures of this epoch to the output folder and send them to the trackers."""
        run = self.run
        is_shown = self.context.args.output_dir or run.run_log.shows_images
        if self.context.rank != 0 or not is_shown:
            return
        images = sample_images(run, network)
        if images is None:
            return
        run.run_log.images(PICTURES, images, (position.epoch + 1) * run.steps_per_epoch)
        if self.context.args.output_dir:
            png = io.BytesIO()
            Image.fromarray(images.permute(1, 2, 0).numpy()).save(png, format="PNG")
            folder = Path(self.context.args.output_dir) / "pictures"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"epoch-{position.epoch}.png"
            write_atomically(path, lambda file: file.write(png.getvalue()))

    def metrics(self, network: nn.Module) -> dict[str, float]:
        """Return the metrics of one network; nothing where its features are not finite."""
        context = self.context
        with unchanged(network):
            backbone = EncoderInTraining(network)
            try:
                stop = self.run.stop
                bank = extract(context, self.bank, backbone, "training", stop)
                queries = extract(context, self.queries, backbone, "validation", stop)
            except NotFiniteError as error:
                log.warning("--eval_every: %s", error)
                return {}
            found = evaluate_knn(
                bank, queries, [min(NEIGHBORS, len(bank))], [TEMPERATURE], self.classes,
                rank=context.rank, world_size=context.world_size,
            )  # fmt: skip
            moments = Moments()
            moments.add(queries.vectors)
            metrics = {
                "knn_acc1": found[0].acc1,
                "linear_acc1": linear_accuracy(bank, queries, self.classes),
                "effective_rank": effective_rank(moments.spectrum()),
            }
            if isinstance(network, VisionTransformer):
                metrics["attention_entropy"] = self.attention_entropy(network)
        return metrics

    def attention_entropy(self, network: VisionTransformer) -> float:
        """Return the entropy of the last block's attention over that of even attention, mean over
        tokens, heads and the first validation images: 1 looks everywhere, 0 at one token."""
        count = min(ENTROPY_IMAGES, len(self.queries))
        entropies = []
        for first in range(0, count, ENTROPY_BATCH):
            samples = [self.queries[0, k] for k in range(first, min(first + ENTROPY_BATCH, count))]
            images = torch.stack([sample["image"] for sample in samples])
            images = self.context.normalize({"image": images})["image"]
            maps = network.attention_maps(images).float()
            entropies.append(torch.special.entr(maps).sum(-1).mean((1, 2)))
        return float(torch.cat(entropies).mean()) / math.log(maps.shape[-1])


@torch.enable_grad()
def linear_accuracy(bank: Features, queries: Features, classes: int) -> float:
    """Return the top-1 accuracy in percent of a logistic regression on standardized features.

    It is fitted to all of `bank` at once, from zeros, so that nothing is random.
    """
    mean, std = bank.vectors.mean(0), bank.vectors.std(0).clamp(min=1e-6)
    known, asked = ((found.vectors - mean) / std for found in (bank, queries))
    weight = torch.zeros(classes, known.shape[1], device=known.device, requires_grad=True)
    bias = torch.zeros(classes, device=known.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(known, weight, bias), bank.labels)
        value = value + PROBE_DECAY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        hits = F.linear(asked, weight, bias).argmax(1) == queries.labels
    return 100 * float(hits.float().mean())


# --------------------------------------------------------------------------------------------------
# The images


def labeled_images(args: Namespace, size: tuple[int, int]) -> tuple[ImageDataset, ImageDataset]:
    """Return the images that are known and those that are asked about, each as for evaluation.

    They come from --eval_data_path, else from the data of training; without validation images every
    fifth image of each class is asked about. Each has at most --eval_images, spread evenly.
    """
    path = args.eval_data_path or args.data_path
    outside = getattr(args, "allow_outside", False)
    try:
        kind = (None if args.eval_data_path else args.data_set) or detect(path)
        known = build_source(kind, path, train=True, need_labels=True, allow_outside=outside)
        if is_divided(kind, path):
            asked = build_source(
                kind, path, train=False, need_labels=True, train_path=path, allow_outside=outside
            )
        else:
            known, asked = held_out(known)
    except ValueError as error:
        reason = str(error)
        if args.eval_data_path:
            reason = reason.replace("--data_path", "--eval_data_path")
        raise ValueError(
            f"--eval_every needs labeled images, which --eval_data_path can name: {reason}"
        ) from error
    transform = EvalTransform(size, None, kept_channels(args))
    limits = {"seed": args.seed, "max_bad_images": args.max_bad_images, "strict": args.strict_data}
    limits["prepare"] = preparation(args)
    return tuple(
        ImageDataset(spread(source, args.eval_images), transform, **limits)
        for source in (known, asked)
    )


def held_out(source: Source) -> tuple[PartSource, PartSource]:
    """Return a source without, and with only, every fifth image of each class."""
    labels = np.asarray(source.labels)
    asked = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        asked[np.flatnonzero(labels == label)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    if not asked.any():
        raise ValueError(f"no class has {HELD_OUT_EVERY} images")
    return PartSource(source, np.flatnonzero(~asked)), PartSource(source, np.flatnonzero(asked))


def spread(source: Source, most: int) -> Source:
    """Return at most `most` images, evenly spread over the source."""
    if len(source) <= most:
        return source
    return PartSource(source, np.linspace(0, len(source) - 1, most).round().astype(np.int64))
