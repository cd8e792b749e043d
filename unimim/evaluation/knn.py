"""k-NN classification with votes weighted by similarity
(docs/methods/semaim.md#k-nn-and-linear-probe)."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from unimim.data.classes import settle_classes
from unimim.engine.distributed import reduce_sum
from unimim.engine.setup import set_up
from unimim.evaluation.features import Features, build_backbone, evaluation_images, features_of
from unimim.files import write_rows
from unimim.logs import log

SIMILARITIES_AT_ONCE = 2**26  # 256 MiB of float32


@dataclass(frozen=True)
class Accuracy:
    """The top-1 and top-5 accuracy in percent of one evaluation."""

    k: int
    temperature: float
    acc1: float
    acc5: float


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k rows of bank [N, C] with the largest dot products with queries [m, C].

    Similarity and index, both [m, k].

    The most similar comes first, and of equally similar ones the one with the lower index.
    """
    similarity = queries @ bank.T
    values, indices = similarity.topk(k)
    tied = (similarity >= values[:, -1:]).sum(1) > k  # topk then takes any of the equal ones
    if tied.any():
        ordered = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], indices[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    indices, order = indices.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def votes(
    similarity: Tensor, labels: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> Iterator:
    """Yield (k, scores float64 [m, num_classes]) for each k.

    The first k neighbors each add exp(similarity / T) to their class.

    `similarity` and `labels` [m, K] are those of the K nearest, in descending order. Scores are
    given up to a factor for each query, so that no temperature is too low for them. The tensor that
    is yielded changes afterwards.
    """
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    scores = torch.zeros(len(labels), num_classes, dtype=torch.float64, device=labels.device)
    for number in range(
        max(ks)
    ):  # one after another: the same sum in the same order on every device
        scores.scatter_add_(1, labels[:, number, None], weights[:, number, None])
        if number + 1 in ks:
            yield number + 1, scores


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Return whether the label [m] is first, and among the first five, by score [m, C]: bool [m,
    2].

    Of equal scores the lower class comes first. A class without votes is not among the guesses.
    """
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    place = ((scores > own) | ((scores == own) & lower)).sum(1, keepdim=True)
    return (place < place.new_tensor([1, 5])) & (own > 0)


def evaluate_knn(
    bank: Features,
    queries: Features,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> list[Accuracy]:
    """Return an accuracy for each k and temperature.

    Every rank holds all features and answers every world_size-th query.
    """
    if max(ks) > len(bank):
        raise ValueError(f"--knn_k {max(ks)} is more than the {len(bank)} training images")
    settings = [(k, temperature) for k in ks for temperature in temperatures]
    counts = dict.fromkeys(settings, torch.zeros(2, dtype=torch.float64, device=bank.labels.device))

    # cosine similarity is the product of unit vectors
    known = F.normalize(bank.vectors, dim=1)
    vectors = F.normalize(queries.vectors[rank::world_size], dim=1)
    labels = queries.labels[rank::world_size]

    # the nearest max(ks) serve every k
    rows = max(1, SIMILARITIES_AT_ONCE // len(bank))
    for part, truth in zip(vectors.split(rows), labels.split(rows), strict=True):
        similarity, index = nearest(part, known, max(ks))
        for temperature in temperatures:
            for k, scores in votes(similarity, bank.labels[index], ks, temperature, num_classes):
                counts[k, temperature] = counts[k, temperature] + hits(scores, truth).sum(0)

    # add up the hits of all ranks
    hits_of_all = reduce_sum(torch.stack([counts[setting] for setting in settings]))
    fractions = 100 * hits_of_all / len(queries)
    return [
        Accuracy(*setting, *fraction)
        for setting, fraction in zip(settings, fractions.tolist(), strict=True)
    ]


# --- a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnnRow(Accuracy):
    """A row of knn.csv: an evaluation and what it was made with."""

    model: str
    finetune: str
    pool: str
    feature_norm: str
    train_images: int
    val_images: int
    seed: int


def evaluate_features(args: Namespace) -> list[KnnRow]:
    """Return the k-NN accuracies that the flags of run_knn.py ask for, and write knn.csv."""
    context = set_up(args)
    backbone = build_backbone(args).to(context.device)
    images = {
        name: evaluation_images(args, backbone, train=name == "train") for name in ("train", "val")
    }
    for dataset in images.values():
        settle_classes(args, dataset)
    if args.dry_run:
        return []
    bank, queries = (
        features_of(context, dataset, backbone, name) for name, dataset in images.items()
    )
    accuracies = evaluate_knn(
        bank,
        queries,
        args.knn_k,
        args.temperature,
        args.nb_classes,
        rank=args.rank,
        world_size=args.world_size,
    )
    sizes = {"train_images": len(bank), "val_images": len(queries)}
    about = {
        name: getattr(args, name) for name in ("model", "finetune", "pool", "feature_norm", "seed")
    }
    results = [KnnRow(**vars(accuracy), **about, **sizes) for accuracy in accuracies]
    for r in results:
        log.info("k %d  temperature %g: top-1 %.3f  top-5 %.3f", r.k, r.temperature, r.acc1, r.acc5)
    if args.output_dir and args.rank == 0:
        write_rows(Path(args.output_dir) / "knn.csv", results)
    return results
