"""Of how many patches' company two patches need to act on a classifier together: multi-order
interaction strength.

    python analysis/interaction.py --checkpoint out/finetuned/checkpoint-best.pth --data_path DATA --precision auto

The image is a grid of players; those left out have the mean color. I(i, j) of order m is the mean of v(S+i+j) - v(S+i)
- v(S+j) + v(S) over contexts S of m others, where v rewards the true class (specs/a2mim.md 7.1, arXiv 2205.13943). The
published setting needs a million forward passes for each image of 224 px: finished orders are kept in --output_dir and
read again, ranks of torchrun share the images, and --precision bf16 is faster, but its rounding adds to weak
interactions. Writes interaction.csv, a row for each ratio, and interaction.png.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from analysis import common
from datasets import ImageDataset
from modeling_losses import enlarged
from unimim.checkpoint.files import load_checkpoint, save_checkpoint
from unimim.data.sources import build_source
from unimim.data.views import MEAN_STD
from unimim.engine.distributed import barrier
from unimim.engine.monitor import Progress
from unimim.engine.setup import launch, set_up
from unimim.engine.state import Normalize
from unimim.logs import log

RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
REWARDS = ("modified", "normal", "yi")
# what stored results depend on, beside weights and image
_SETTINGS = (
    "grid", "pairs", "contexts", "reach", "reward", "seed", "precision", "crop_pct", "data_set", "data_path",
    "eval_data_path",
)  # fmt: skip


@dataclass(frozen=True)
class Strength:
    """One row of interaction.csv. strength: the mean of |I|; share: strength over its mean over all
    ratios."""

    label: str
    ratio: float
    order: int
    strength: float
    share: float
    images: int
    pairs: int
    contexts: int


# --------------------------------------------------------------------------------------------------
# Draws


def order_of(ratio: float, players: int) -> int:
    """How many of the players that are not i or j a context of that ratio has."""
    return int((players - 2) * ratio)


def draw_pairs(grid: int, count: int, reach: int, rng: np.random.Generator) -> Tensor:
    """Different unordered pairs of neighbors among grid * grid cells: int64 [count, 2].

    i is uniform, j at a uniform offset of at most `reach` rows and columns, clamped to the grid.
    Raises:
        ValueError: there are fewer.
    """
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    near = np.maximum(abs(rows[:, None] - rows), abs(columns[:, None] - columns)) <= reach
    if count > (available := (int(near.sum()) - grid * grid) // 2):
        raise ValueError(
            f"--pairs {count} is more than the {available} pairs that --grid {grid} has in --reach {reach}"
        )
    pairs: dict[frozenset[int], tuple[int, int]] = {}
    while len(pairs) < count:
        i = int(rng.integers(grid * grid))
        row, column = np.clip(
            np.array(divmod(i, grid)) + rng.integers(-reach, reach + 1, 2), 0, grid - 1
        ).tolist()
        if (j := row * grid + column) != i:
            pairs.setdefault(frozenset((i, j)), (i, j))
    return torch.tensor(list(pairs.values()))


def draw_contexts(
    pairs: Tensor, players: int, order: int, samples: int, rng: np.random.Generator
) -> Tensor:
    """For each of pairs [P, 2] sets of `order` of the other players: int64 [P, S, order].

    S is `samples`, or 1 where there is only one such set.
    """
    if order in (0, players - 2):
        samples = 1
    drawn = np.stack([rng.random((samples, players - 2)).argsort(1)[:, :order] for _ in pairs])
    others = torch.from_numpy(drawn)
    low, high = pairs.sort(1).values[:, :, None, None].unbind(1)
    others = others + (others >= low)  # counted past the lower of i and j, then past the higher
    return others + (others >= high)


def coalitions(pairs: Tensor, contexts: Tensor, players: int) -> Tensor:
    """Who takes part in S+i+j, S+i, S+j and S, for pairs [P, 2] and contexts [P, S, m]: bool [P, S,
    4, players]."""
    present = torch.zeros(*contexts.shape[:2], players, dtype=torch.bool).scatter_(
        2, contexts, True
    )
    present = present.unsqueeze(2).repeat(1, 1, 4, 1)
    i, j = (
        player.view(-1, 1, 1, 1).expand(-1, present.shape[1], 2, -1) for player in pairs.unbind(1)
    )
    present[:, :, (0, 1)] = present[:, :, (0, 1)].scatter(3, i, True)
    present[:, :, (0, 2)] = present[:, :, (0, 2)].scatter(3, j, True)
    return present


# --------------------------------------------------------------------------------------------------
# Interactions


@torch.no_grad()
def masked_logits(model: nn.Module, image: Tensor, present: Tensor, batch_size: int) -> Tensor:
    """Logits, float32 [K, classes], of an image [C, H, W] of which only those players are there:
    bool [K, g * g]."""
    grid = round(present.shape[1] ** 0.5)
    logits = []
    for some in present.to(image.device).split(batch_size):
        pixels = enlarged(some.unflatten(1, (grid, grid)), image.shape[-2:]).unsqueeze(1)
        logits.append(model(image * pixels).float())
    return torch.cat(logits)


def reward(logits: Tensor, label: int, kind: str) -> Tensor:
    """Of the true class, float64 [...], from logits [..., classes].

    "modified": its logit less the logarithm of the sum of the others' exponentials; "normal": its
    log probability; "yi": its logit.
    """
    logits = logits.double()
    if kind == "normal":
        return logits.log_softmax(-1)[..., label]
    if kind == "yi":
        return logits[..., label]
    others = torch.cat((logits[..., :label], logits[..., label + 1 :]), dim=-1)
    return logits[..., label] - others.logsumexp(-1)


def second_difference(values: Tensor) -> Tensor:
    """v(S+i+j) - v(S+i) - v(S+j) + v(S) of values [..., 4] in that order."""
    both, only_i, only_j, neither = values.unbind(-1)
    return both - only_i - only_j + neither


def interactions(
    model: nn.Module,
    image: Tensor,
    label: int,
    pairs: Tensor,
    contexts: Tensor,
    players: int,
    kind: str,
    batch_size: int,
) -> Tensor:
    """Second differences of the reward, float64 [P, S], of pairs [P, 2] in contexts [P, S, m]."""
    present = coalitions(pairs, contexts, players)
    logits = masked_logits(model, image, present.flatten(0, 2), batch_size)
    return second_difference(reward(logits, label, kind).view(present.shape[:3])).cpu()


def shares(strengths: Tensor) -> Tensor:
    """The published curve J from the strengths of all ratios [R]: each over their mean."""
    return strengths / strengths.mean()


# --------------------------------------------------------------------------------------------------
# Images


def chosen_images(
    args: Namespace, network: common.Network, dataset: ImageDataset, normalize: Normalize
):
    """(number, image [C, H, W], label) of --images random ones, with --correct_only of those that
    are classified right.

    Raises:
        ValueError: there is none.
    """
    order, count = np.random.default_rng(args.seed).permutation(len(dataset)).tolist(), 0
    for number in order:
        if count == args.images:
            return
        sample = dataset[0, number]
        image = normalize({"image": sample["image"][None]})["image"]
        if args.correct_only and predicted(network.model, image) != sample["label"]:
            continue
        count += 1
        yield number, image[0], sample["label"]
    if count == 0:
        raise ValueError(
            f"--correct_only leaves none of the images: {network.label} classifies none of them right"
        )


@torch.no_grad()
def predicted(model: nn.Module, image: Tensor) -> int:
    return int(model(image).argmax())


def image_strengths(
    args: Namespace,
    network: common.Network,
    image: Tensor,
    label: int,
    number: int,
    done: dict[int, Tensor],
    keep,
) -> None:
    """Fills `done` with |I| [P] of every order that it lacks, and calls `keep` after each."""
    players, device = args.grid**2, image.device
    pairs = draw_pairs(
        args.grid, args.pairs, args.reach, np.random.default_rng((args.seed, number))
    )
    for order in orders(args):
        if order in done:
            continue
        rng = np.random.default_rng((args.seed, number, order + 1))
        contexts = draw_contexts(pairs, players, order, args.contexts, rng)
        with common.autocast(args, device):
            found = interactions(
                network.model, image, label, pairs, contexts, players, args.reward, args.batch_size
            )
        done[order] = found.mean(1).abs()
        keep()


def orders(args: Namespace) -> list[int]:
    """Those of --ratios, each once: on a small grid several ratios are of the same order."""
    return sorted({order_of(ratio, args.grid**2) for ratio in args.ratios})


# --------------------------------------------------------------------------------------------------
# Stored results


def description(args: Namespace, network: common.Network) -> dict[str, str]:
    """What stored results depend on, the image apart."""
    weights = hashlib.sha256()
    for value in network.model.state_dict().values():
        weights.update(value.cpu().contiguous().numpy().data)
    about = {name: str(getattr(args, name)) for name in _SETTINGS}
    return about | {
        "weights": weights.hexdigest(),
        "size": str(network.size),
        "mean and deviation": network.mean_std,
    }


def read_done(path: Path, about: dict[str, str]) -> dict[int, Tensor]:
    """Finished orders of an image, none without the file. ValueError: it is of something else."""
    if not path.is_file():
        return {}
    held = load_checkpoint(path)
    for name, value in about.items():
        if (there := held["about"].get(name)) != value:
            raise ValueError(
                f"--output_dir: {path} holds interactions of another run: {name} {there} there, {value} now; name "
                "another folder"
            )
    return held["orders"]


def strengths_of(
    args: Namespace, network: common.Network, device: torch.device
) -> dict[int, Tensor]:
    """|I| of every order [images, P], of all images on every rank; each rank computes its share of them."""
    dataset = common.image_set(args, network, need_labels=True)
    network.model.to(device)
    about, folder = (
        description(args, network),
        Path(args.output_dir) / "interaction" / network.label.replace("/", "_"),
    )
    normalize = Normalize(MEAN_STD[network.mean_std], device)
    progress = Progress(network.label, args.images, 0, every=1, rank=args.rank)
    files = []
    for turn, (number, image, label) in enumerate(chosen_images(args, network, dataset, normalize)):
        files.append(
            path := folder / f"image-{number}" / "orders.pth"
        )  # one rank writes in a folder
        if turn % args.world_size == args.rank:
            done = read_done(path, about)
            image_strengths(
                args, network, image, label, number, done,
                lambda path=path, done=done: save_checkpoint(path, {"about": about, "orders": done}),
            )  # fmt: skip
        progress.advance()
        progress.show(turn + 1, {})
    progress.close()
    barrier()
    found = [read_done(path, about) for path in files]
    return {order: torch.stack([done[order] for done in found]) for order in orders(args)}


def tabulate(args: Namespace, label: str, found: dict[int, Tensor]) -> list[Strength]:
    """A row for each ratio, from |I| of every order [images, P]."""
    each = [order_of(ratio, args.grid**2) for ratio in args.ratios]
    strengths = torch.stack([found[order].mean() for order in each])
    images, pairs = next(iter(found.values())).shape
    return [
        Strength(label, ratio, order, strength, share, images, pairs, args.contexts)
        for ratio, order, strength, share in zip(
            args.ratios, each, strengths.tolist(), shares(strengths).tolist(), strict=True
        )
    ]


def draw(rows: Sequence[Strength]) -> Figure:
    """The published curve of each network, and beside it the strengths themselves."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, value in ((left, "share"), (right, "strength")):
        common.draw_lines(axis, rows, "ratio", value)
    left.set(xlabel="order (n)", ylabel="share of the strength J", ylim=(0, None))
    right.set(xlabel="order (n)", ylabel="strength, mean |I|", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    parser = common.build_parser(__doc__.splitlines()[0], "interaction", images=50, batch_size=256)
    group = parser.add_argument_group("interactions")
    group.add_argument(
        "--grid", type=int, default=14, help="players along a side; for 32 px 16 is published"
    )
    group.add_argument(
        "--pairs", type=int, default=200, help="of each image; for 32 px 50 is published"
    )
    group.add_argument(
        "--contexts",
        type=int,
        default=100,
        help="of each pair and order; for 32 px 50 is published",
    )
    group.add_argument(
        "--ratios", type=float, nargs="+", default=RATIOS, help="orders, as shares of all players"
    )
    group.add_argument(
        "--reach", type=int, default=2, help="rows and columns between the two players at most"
    )
    group.add_argument("--reward", choices=REWARDS, default="modified")
    group.add_argument(
        "--nb_classes", type=int, default=None, help="of --model; None is the data set's"
    )
    group.add_argument(
        "--correct_only", action="store_true", help="images that are classified right, as for 32 px"
    )
    return common.parse(parser, argv, check_flags)


def check_flags(args: Namespace) -> None:
    for name in ("grid", "pairs", "contexts", "reach"):
        common.check_positive(args, name)
    if not all(0 <= ratio <= 1 for ratio in args.ratios):
        raise ValueError(f"--ratios are from 0 to 1, not {' '.join(map(str, args.ratios))}")


def check_network(args: Namespace, network: common.Network) -> None:
    if not network.classifies:
        raise ValueError(
            f"{network.label} has no trained classifier: give a fine-tuned --checkpoint"
        )
    if any(side % args.grid for side in network.size):
        raise ValueError(
            f"--grid {args.grid} does not divide the images of {network.label}, {network.size} pixels"
        )


def main(args: Namespace) -> list[Strength]:
    device = set_up(args).device
    source = build_source(
        args.data_set, args.eval_data_path or args.data_path, train=False, need_labels=True
    )
    networks = common.load_networks(args, args.nb_classes or len(source.classes))
    for network in networks:
        check_network(args, network)
    sets = sum(1 if order in (0, args.grid**2 - 2) else args.contexts for order in orders(args))
    log.info(
        "%d orders, %d forward passes for each image", len(orders(args)), 4 * args.pairs * sets
    )
    rows = [
        row
        for network in networks
        for row in tabulate(args, network.label, strengths_of(args, network, device))
    ]
    if args.rank == 0:
        common.save(args, "interaction", rows, draw(rows))
    return rows


if __name__ == "__main__":
    launch(main, parse())
