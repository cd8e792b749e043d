"""Measure multi-order interactions: how two patches act together on a classifier, by context size.

    python analysis/interaction.py --checkpoint out/finetuned/checkpoint-best.pth \\
        --data_path DATA --precision auto

The image is a grid of players; absent players have the mean color. The interaction I(i, j) of order
m is the mean of v(S+i+j) - v(S+i) - v(S+j) + v(S) over contexts S of m other players, where v
rewards the true class (A2MIM, arXiv 2205.13943; docs/methods/simmim_a2mim.md#analysis).

The published setting takes a million forward passes per image of 224 px. Finished orders are kept
in --output_dir and read again, ranks of torchrun divide the images, and --precision bf16 is faster,
but its rounding adds to weak interactions. Writes interaction.csv, one row per ratio, and
interaction.png.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from analysis import common
from datasets import ImageDataset
from modeling_backbones import enlarged
from unimim.checkpoint.files import load_checkpoint, save_checkpoint
from unimim.data.preparation import DROP
from unimim.data.sources import build_source
from unimim.data.views import MEAN_STD
from unimim.engine.distributed import barrier
from unimim.engine.monitor import Progress
from unimim.engine.setup import launch, set_up
from unimim.engine.state import Normalize
from unimim.logs import log

RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
REWARDS = ("modified", "normal", "yi")
# flags that stored results depend on, besides weights and image
_SETTINGS = (
    "grid",
    "pairs",
    "contexts",
    "reach",
    "reward",
    "seed",
    "precision",
    "crop_pct",
    "data_set",
    "data_path",
    "eval_data_path",
)


@dataclass(frozen=True)
class Strength:
    """One row of interaction.csv.

    `strength` is the mean of |I|, `share` its ratio to the mean strength of all ratios.
    """

    label: str
    ratio: float
    order: int
    strength: float
    share: float
    images: int
    pairs: int
    contexts: int


# --------------------------------------------------------------------------------------------------
# Random pairs and contexts


def order_of(ratio: float, players: int) -> int:
    """Return the size of a context that is the fraction `ratio` of the players except i and j."""
    return int((players - 2) * ratio)


def draw_pairs(grid: int, count: int, reach: int, rng: np.random.Generator) -> Tensor:
    """Draw distinct unordered pairs of nearby players of a grid x grid: int64 [count, 2].

    i is uniform; j is at a uniform offset of at most `reach` rows and columns, clamped to the grid.

    Raises:
        ValueError: there are fewer pairs than `count`.
    """
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    near = np.maximum(abs(rows[:, None] - rows), abs(columns[:, None] - columns)) <= reach
    available = (int(near.sum()) - grid * grid) // 2
    if count > available:
        raise ValueError(
            f"--pairs {count} is more than the {available} pairs that --grid {grid} has "
            f"in --reach {reach}; use --pairs {available} or a larger --reach"
        )
    pairs: dict[frozenset[int], tuple[int, int]] = {}
    while len(pairs) < count:
        i = int(rng.integers(grid * grid))
        neighbor = np.array(divmod(i, grid)) + rng.integers(-reach, reach + 1, 2)
        row, column = np.clip(neighbor, 0, grid - 1).tolist()
        j = row * grid + column
        if j != i:
            pairs.setdefault(frozenset((i, j)), (i, j))
    return torch.tensor(list(pairs.values()))


def draw_contexts(
    pairs: Tensor, players: int, order: int, samples: int, rng: np.random.Generator
) -> Tensor:
    """Draw contexts of `order` other players for each of pairs [P, 2]: int64 [P, S, order].

    S is `samples`, or 1 if there is only one such context.
    """
    if order in (0, players - 2):
        samples = 1
    contexts = np.stack([rng.random((samples, players - 2)).argsort(1)[:, :order] for _ in pairs])
    others = torch.from_numpy(contexts)
    # numbers among the players except i and j: skip the lower of the two, then the higher
    low, high = pairs.sort(1).values[:, :, None, None].unbind(1)
    others = others + (others >= low)
    return others + (others >= high)


def coalitions(pairs: Tensor, contexts: Tensor, players: int) -> Tensor:
    """Return who is present in S+i+j, S+i, S+j and S: bool [P, S, 4, players].

    `pairs` is [P, 2], `contexts` is [P, S, m].
    """
    present = torch.zeros(*contexts.shape[:2], players, dtype=torch.bool)
    present = present.scatter_(2, contexts, True).unsqueeze(2).repeat(1, 1, 4, 1)
    shape = (-1, present.shape[1], 2, -1)
    i = pairs[:, 0].view(-1, 1, 1, 1).expand(shape)
    j = pairs[:, 1].view(-1, 1, 1, 1).expand(shape)
    present[:, :, (0, 1)] = present[:, :, (0, 1)].scatter(3, i, True)
    present[:, :, (0, 2)] = present[:, :, (0, 2)].scatter(3, j, True)
    return present


# --------------------------------------------------------------------------------------------------
# Interactions


@torch.no_grad()
def masked_logits(model: nn.Module, image: Tensor, present: Tensor, batch_size: int) -> Tensor:
    """Return logits, float32 [K, classes], of an image [C, H, W] with only some players present.

    `present` is bool [K, g * g].
    """
    grid = round(present.shape[1] ** 0.5)
    logits = []
    for batch in present.to(image.device).split(batch_size):
        pixels = enlarged(batch.unflatten(1, (grid, grid)), image.shape[-2:]).unsqueeze(1)
        logits.append(model(image * pixels).float())
    return torch.cat(logits)


def reward(logits: Tensor, label: int, kind: str) -> Tensor:
    """Return the reward of the true class, float64 [...], from logits [..., classes].

    "modified" is its logit minus the logsumexp of the others, "normal" its log probability, "yi"
    its logit.
    """
    logits = logits.double()
    if kind == "normal":
        return logits.log_softmax(-1)[..., label]
    if kind == "yi":
        return logits[..., label]
    others = torch.cat((logits[..., :label], logits[..., label + 1 :]), dim=-1)
    return logits[..., label] - others.logsumexp(-1)


def second_difference(values: Tensor) -> Tensor:
    """Return v(S+i+j) - v(S+i) - v(S+j) + v(S) of values [..., 4] in that order."""
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
    """Return the interactions, float64 [P, S], of pairs [P, 2] in contexts [P, S, m]."""
    present = coalitions(pairs, contexts, players)
    logits = masked_logits(model, image, present.flatten(0, 2), batch_size)
    return second_difference(reward(logits, label, kind).view(present.shape[:3])).cpu()


def normalized(strengths: Tensor) -> Tensor:
    """Return the published curve J: the strengths of all ratios [R] divided by their mean."""
    return strengths / strengths.mean()


# --------------------------------------------------------------------------------------------------
# Images


def chosen_images(
    args: Namespace, network: common.Network, dataset: ImageDataset, normalize: Normalize
):
    """Yield (index, image [C, H, W], label) of --images random images.

    With --correct_only they are drawn among the correctly classified ones.

    Raises:
        ValueError: no image is classified correctly.
    """
    count = 0
    for number in np.random.default_rng(args.seed).permutation(len(dataset)).tolist():
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
            f"--correct_only leaves no images: {network.label} classifies none of them correctly"
        )


@torch.no_grad()
def predicted(model: nn.Module, image: Tensor) -> int:
    """Return the predicted class of one image [1, C, H, W]."""
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
    """Add |I| [P] of every missing order to `done`, and call `keep` after each."""
    players = args.grid**2
    rng = np.random.default_rng((args.seed, number))
    pairs = draw_pairs(args.grid, args.pairs, args.reach, rng)
    for order in orders(args):
        if order in done:
            continue
        rng = np.random.default_rng((args.seed, number, order + 1))
        contexts = draw_contexts(pairs, players, order, args.contexts, rng)
        with common.autocast(args, image.device):
            values = interactions(
                network.model, image, label, pairs, contexts, players, args.reward, args.batch_size
            )
        done[order] = values.mean(1).abs()
        keep()


def orders(args: Namespace) -> list[int]:
    """Return the orders of --ratios, each once: on a small grid several ratios share an order."""
    return sorted({order_of(ratio, args.grid**2) for ratio in args.ratios})


# --------------------------------------------------------------------------------------------------
# Stored results


def description(args: Namespace, network: common.Network) -> dict[str, str]:
    """Return all that stored results depend on, except the image."""
    weights = hashlib.sha256()
    for value in network.model.state_dict().values():
        weights.update(value.cpu().contiguous().numpy().data)
    about = {name: str(getattr(args, name)) for name in _SETTINGS}
    if args.exif_orientation or args.alpha != DROP:
        about["images"] = f"exif_orientation {args.exif_orientation}, alpha {args.alpha}"
    names = [name for name, values in MEAN_STD.items() if values == network.mean_std]
    return about | {
        "weights": weights.hexdigest(),
        "size": str(network.size),
        "mean and deviation": names[0] if names else str(network.mean_std),
    }


def read_done(path: Path, about: dict[str, str]) -> dict[int, Tensor]:
    """Return the finished orders of an image; raise ValueError if they are of another run."""
    if not path.is_file():
        return {}
    stored = load_checkpoint(path)
    for name, value in about.items():
        there = stored["about"].get(name)
        if there != value:
            raise ValueError(
                f"--output_dir: {path} holds interactions of another run: {name} {there} there, "
                f"{value} now; use another folder"
            )
    return stored["orders"]


def strengths_of(
    args: Namespace, network: common.Network, device: torch.device
) -> dict[int, Tensor]:
    """Return |I| of every order, [images, P].

    The ranks divide the images among them, and every rank returns the results of all images.
    """
    dataset = common.image_set(args, network, need_labels=True)
    network.model.to(device)
    about = description(args, network)
    folder = Path(args.output_dir) / "interaction" / network.label.replace("/", "_")
    normalize = Normalize(network.mean_std, device)
    progress = Progress(network.label, args.images, 0, every=1, rank=args.rank)
    files = []
    for turn, (number, image, label) in enumerate(chosen_images(args, network, dataset, normalize)):
        path = (
            folder / f"image-{number}" / "orders.pth"
        )  # a folder of its own: one writer per folder
        files.append(path)
        if turn % args.world_size == args.rank:
            done = read_done(path, about)
            keep = partial(save_checkpoint, path, {"about": about, "orders": done})
            image_strengths(args, network, image, label, number, done, keep)
        progress.advance()
        progress.show(turn + 1, {})
    progress.close()
    barrier()
    per_image = [read_done(path, about) for path in files]
    strengths = {}
    for order in orders(args):
        strengths[order] = torch.stack([done[order] for done in per_image])
    return strengths


def tabulate(args: Namespace, label: str, by_order: dict[int, Tensor]) -> list[Strength]:
    """Return one row per ratio, given |I| of every order, [images, P]."""
    ratio_orders = [order_of(ratio, args.grid**2) for ratio in args.ratios]
    strengths = torch.stack([by_order[order].mean() for order in ratio_orders])
    images, pairs = next(iter(by_order.values())).shape
    values = zip(strengths.tolist(), normalized(strengths).tolist(), strict=True)
    rows = []
    for ratio, order, (strength, share) in zip(args.ratios, ratio_orders, values, strict=True):
        rows.append(Strength(label, ratio, order, strength, share, images, pairs, args.contexts))
    return rows


def draw(rows: Sequence[Strength]) -> Figure:
    """Plot the published curve J of each network, and the strengths."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, value in ((left, "share"), (right, "strength")):
        common.draw_lines(axis, rows, "ratio", value)
    left.set(xlabel="order (n)", ylabel="relative strength J", ylim=(0, None))
    right.set(xlabel="order (n)", ylabel="strength, mean |I|", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = common.build_parser(__doc__.splitlines()[0], "interaction", images=50, batch_size=256)
    group = parser.add_argument_group("interactions")
    group.add_argument(
        "--grid", type=int, default=14, help="players along a side; published for 32 px: 16"
    )
    group.add_argument(
        "--pairs", type=int, default=200, help="pairs per image; published for 32 px: 50"
    )
    group.add_argument(
        "--contexts",
        type=int,
        default=100,
        help="contexts per pair and order; published for 32 px: 50",
    )
    group.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=RATIOS,
        help="orders, as fractions of the other players",
    )
    group.add_argument(
        "--reach",
        type=int,
        default=2,
        help="largest distance between the two players, in rows and columns",
    )
    group.add_argument(
        "--reward", choices=REWARDS, default="modified", help="what v(S) is of the logits"
    )
    group.add_argument(
        "--nb_classes",
        type=int,
        default=None,
        help="number of classes of --model (default: the data set's)",
    )
    group.add_argument(
        "--correct_only",
        action="store_true",
        help="use correctly classified images only, as published for 32 px",
    )
    return common.parse(parser, argv, check_flags)


def check_flags(args: Namespace) -> None:
    """Raise ValueError if a flag is out of range."""
    for name in ("grid", "pairs", "contexts", "reach"):
        common.check_positive(args, name)
    if not all(0 <= ratio <= 1 for ratio in args.ratios):
        raise ValueError(f"--ratios are from 0 to 1, not {' '.join(map(str, args.ratios))}")


def check_network(args: Namespace, network: common.Network) -> None:
    """Raise ValueError unless the network classifies and its images divide into the grid."""
    if not network.classifies:
        raise ValueError(
            f"{network.label} has no trained classifier; use a fine-tuned --checkpoint"
        )
    if any(side % args.grid for side in network.size):
        fitting = [n for n in range(2, 17) if not any(side % n for side in network.size)]
        raise ValueError(
            f"--grid {args.grid} does not divide the images of {network.label}, "
            f"{network.size} pixels; use one of {', '.join(map(str, fitting))}"
        )


def main(args: Namespace) -> list[Strength]:
    """Measure all networks, write table and figure, and return the rows."""
    device = set_up(args).device
    source = build_source(
        args.data_set, args.eval_data_path or args.data_path, train=False, need_labels=True
    )
    networks = common.load_networks(args, args.nb_classes or len(source.classes))
    for network in networks:
        check_network(args, network)
    sets = sum(1 if order in (0, args.grid**2 - 2) else args.contexts for order in orders(args))
    passes = 4 * args.pairs * sets
    log.info("%d orders, %d forward passes per image", len(orders(args)), passes)
    rows = []
    for network in networks:
        rows += tabulate(args, network.label, strengths_of(args, network, device))
    if args.rank == 0:
        common.save(args, "interaction", rows, draw(rows))
    return rows


if __name__ == "__main__":
    launch(main, parse())
