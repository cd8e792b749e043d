"""What the analyses share: flags, networks of any checkpoint, images, features, tables, plots.

Shapes in comments: B images, C channels of a map of h x w places.
"""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from timm.models.beit import Block as BeitBlock
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from datasets import ImageDataset, build_dataset, build_loader
from modeling_backbones import feature_places
from modeling_finetune import Block, create_model, entry_of
from modeling_pretrain import PretrainMethod
from unimim.checkpoint.loading import PUBLISHED_KEYS, class_tokens, load_pretrained
from unimim.checkpoint.runs import MEAN_STD_FLAGS, flags_of, rebuild, trained_mean_std
from unimim.cli.flags import add_data_flags, add_process_flags, add_size_flags
from unimim.cli.options import given, model_kwargs, parse_flags
from unimim.cli.parser import FlagParser
from unimim.data.channels import kept_channels
from unimim.data.views import EvalTransform, MeanStd, image_mean_std
from unimim.engine import setup
from unimim.engine.runner import AUTOCAST_DTYPES
from unimim.engine.state import Normalize
from unimim.files import write_rows
from unimim.logs import log
from unimim.report import COLORS
from unimim.sizes import to_pair

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RANDOM = "random"  # in the place of a checkpoint
_HEADS = ("head.", "fc.")

# --------------------------------------------------------------------------------------------------
# Flags


def build_parser(
    description: str, name: str, *, images: int, batch_size: int = 32
) -> argparse.ArgumentParser:
    """Return a parser with the flags of every analysis; `name` is that of the files it writes."""
    parser = FlagParser(description=description)
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--checkpoint", nargs="+", default=[RANDOM], metavar="FILE",
        help=f"those to compare; the word {RANDOM} is random weights",
    )  # fmt: skip
    group.add_argument(
        "--model", nargs="+", default=[], metavar="NAME",
        help="a model of this repository or of timm, for all checkpoints or one for each; not "
        "needed, or '', for a checkpoint that carries the flags of its run",
    )  # fmt: skip
    group.add_argument(
        "--labels",
        nargs="+",
        default=[],
        help="what the checkpoints are called in tables and figures",
    )
    group.add_argument(
        "--model_key", default=PUBLISHED_KEYS, help="where the weights are in the files"
    )
    group.add_argument(
        "--model_prefix", default="", help="prefix of the weights' names in the files"
    )
    add_size_flags(group)
    add_data_flags(parser, "analysis")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--images", type=int, default=images, help="how many of the validation images"
    )
    group.add_argument(
        "--batch_size", type=int, default=batch_size, help="images in a forward pass"
    )
    group.add_argument(
        "--crop_pct", type=float, default=None, help="of the images; None: 0.875, 1 from 384 px"
    )
    add_process_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--config",
        default=None,
        metavar="FILE.yaml",
        help="flag values; flags on the command line win",
    )
    group.add_argument(
        "--output_dir", default="output/analysis", help=f"folder of {name}.csv and {name}.png"
    )
    group.add_argument("--seed", type=int, default=0, help="of random weights and noise")
    # None: as in the checkpoint's run, or ImageNet's
    parser.set_defaults(
        precision="fp32", imagenet_default_mean_and_std=None, enable_deepspeed=False
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, *checks: Callable[[Namespace], None]
) -> argparse.Namespace:
    """Return the flags: defaults < --config < command line."""
    return parse_flags(parser, argv, check_flags, *checks)


def check_flags(args: Namespace) -> None:
    if kept_channels(args) is not None:
        raise ValueError("analyses read 8-bit RGB: leave out --keep_channels, and other --in_chans")
    for name in ("images", "batch_size"):
        check_positive(args, name)
    count = len(args.checkpoint)
    if len(args.model) not in (0, 1, count):
        raise ValueError(
            f"--model takes one name or one for each of the {count} checkpoints, not "
            f"{len(args.model)}"
        )
    if any(
        path == RANDOM and not name
        for path, name in zip(args.checkpoint, models(args), strict=True)
    ):
        raise ValueError("random weights need --model; or give --checkpoint")
    if args.labels and len(args.labels) != count:
        raise ValueError(
            f"--labels must be one for each of the {count} checkpoints, not {len(args.labels)}"
        )
    if len(set(labels(args))) != count:
        raise ValueError(f"--labels must differ: {', '.join(labels(args))}")


def check_positive(args: Namespace, name: str) -> None:
    if getattr(args, name) < 1:
        raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")


def labels(args: Namespace) -> list[str]:
    """Return --labels, or the checkpoints' shortest names that differ, or the models' names."""
    if args.labels:
        return args.labels
    for parts in range(2, 9):
        found = [
            f"{model} ({RANDOM})"
            if path == RANDOM
            else "/".join(Path(path).with_suffix("").parts[-parts:])
            for path, model in zip(args.checkpoint, models(args), strict=True)
        ]
        if len(set(found)) == len(found):
            break
    return found


def models(args: Namespace) -> list[str]:
    """Return a name for each checkpoint; empty: the name that its file carries."""
    return (
        args.model
        if len(args.model) == len(args.checkpoint)
        else (args.model or [""]) * len(args.checkpoint)
    )


# --------------------------------------------------------------------------------------------------
# Networks


@dataclass
class Network:
    """A frozen network in eval mode.

    `features.forward_features` takes images; `model` gives logits if it `classifies`.

    size: (height, width) of its images. mean_std: what they are normalized by.
    """

    label: str
    model: nn.Module
    size: tuple[int, int]
    mean_std: MeanStd
    classifies: bool

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @property
    def features(self) -> nn.Module:
        """Return the network that computes features; SimMIM's and A2MIM's is their backbone."""
        return getattr(self.model, "backbone", self.model)


def load_networks(args: Namespace, num_classes: int = 0) -> list[Network]:
    """Return all networks that the flags name; named models get `num_classes` classes."""
    rows = zip(labels(args), args.checkpoint, models(args), strict=True)
    return [load_network(args, *row, num_classes) for row in rows]


def load_network(args: Namespace, label: str, path: str, name: str, num_classes: int) -> Network:
    """Return a network, built as in the checkpoint's own run unless it is named.

    Raises:
        ValueError: the file carries no flags and no name is given; or its weights are of another
            network.
    """
    run = {} if path == RANDOM else flags_of(path)
    torch.manual_seed(args.seed)
    if name:
        options = given({"num_cls_tokens": None if path == RANDOM else tokens_in(args, path)})
        model = named_model(name, options | model_kwargs(args), num_classes)
    elif run:
        model = model_of_run(path, run, args)
    else:
        raise ValueError(f"{path} does not say which model it holds: name it with --model")
    is_method, missing = isinstance(model, PretrainMethod), []
    if path != RANDOM:
        whole = 0.9 if is_method else 1.0  # a teacher may have fewer parts than the method
        found = load_pretrained(
            model, path, model_key=args.model_key, prefix=args.model_prefix, min_matched=whole
        )
        log.info("%s", found)
        missing = found.missing
    classifies = (
        not is_method
        and bool(num_classes or run)
        and not any(key.startswith(_HEADS) for key in missing)
    )
    network = Network(label, model, image_size(model, args, run), mean_std(args, path), classifies)
    log.info(
        "%s: images of %d x %d, normalized by mean %s and std %s",
        label, *network.size, *network.mean_std,
    )  # fmt: skip
    return network


def tokens_in(args: Namespace, path: str) -> int | None:
    """Return how many class tokens the weights have, if several."""
    return class_tokens(path, model_key=args.model_key, prefix=args.model_prefix)


def named_model(name: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    """Return a model of this repository, or else of timm; ValueError if there is none."""
    entry = entry_of(name)
    if entry is None:
        raise ValueError(f"--model {name} is neither a model of this repository nor of timm")
    own = {} if entry.kind == "method" else {"num_classes": num_classes}
    return create_model(name, **own | options)


def model_of_run(path: str, run: dict[str, Any], args: Namespace) -> nn.Module:
    """Return the method or classifier of a checkpoint; flags of the command line win over those of
    its run."""
    changes = given({"input_size": args.input_size, "patch_size": args.patch_size})
    changes["model_kwargs"] = [*run.get("model_kwargs", []), *args.model_kwargs]
    return rebuild(path, model_key=args.model_key, **changes)[0]


def image_size(model: nn.Module, args: Namespace, run: dict[str, Any]) -> tuple[int, int]:
    if isinstance(model, PretrainMethod):
        return model.image_size
    if (size := getattr(getattr(model, "patch_embed", None), "img_size", None)) is not None:
        return tuple(size)
    own = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return to_pair(args.input_size or run.get("input_size") or own[-2:])


def mean_std(args: Namespace, path: str) -> MeanStd:
    """Return mean and std by the flags, else by what the file says, else ImageNet's."""
    chosen = any(getattr(args, name) is not None for name in MEAN_STD_FLAGS)
    said = None if chosen or path == RANDOM else trained_mean_std(path)
    if said is not None:
        return said
    imagenet = args.imagenet_default_mean_and_std is not False
    return image_mean_std(Namespace(**vars(args) | {"imagenet_default_mean_and_std": imagenet}))


# --------------------------------------------------------------------------------------------------
# Images


def set_up(args: Namespace) -> torch.device:
    """Start the log and return the device; an analysis runs in one process."""
    device = setup.set_up(args).device
    if args.world_size > 1:
        raise ValueError("this analysis runs in one process")
    return device


def image_set(args: Namespace, network: Network, *, need_labels: bool = False) -> ImageDataset:
    """Return the validation images as the network sees them."""
    transform = EvalTransform(network.size, args.crop_pct)
    return build_dataset(args, train=False, transform=transform, need_labels=need_labels)


def batches(args: Namespace, network: Network, device: torch.device) -> Iterator[Tensor]:
    """Yield normalized images [B, 3, H, W], evenly spaced over the data set."""
    dataset = image_set(args, network)
    chosen = (
        np.linspace(0, len(dataset) - 1, min(args.images, len(dataset)))
        .round()
        .astype(int)
        .tolist()
    )
    keys = []
    for first in range(0, len(chosen), args.batch_size):
        keys.append([(0, index) for index in chosen[first : first + args.batch_size]])
    normalize = Normalize(network.mean_std, device)
    for batch in build_loader(dataset, keys, num_workers=args.num_workers, pin_mem=args.pin_mem):
        yield normalize(batch)["image"]


def autocast(args: Namespace, device: torch.device):
    dtype = AUTOCAST_DTYPES.get(args.precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


# --------------------------------------------------------------------------------------------------
# Layers


class Layer(NamedTuple):
    """A point of a network whose features are looked at: the input or the output of a module.

    axis: of the channels of a map; -1 means [B, h, w, C]. grid: of the patches where the features
    are tokens [B, T, C].
    """

    name: str
    module: str
    before: bool
    axis: int = 1
    grid: tuple[int, int] | None = None

    def as_map(self, features: Tensor) -> Tensor:
        """Return [B, C, h, w] in float32, without the tokens before the patches."""
        if features.ndim == 3:
            features = features[:, -math.prod(self.grid) :].unflatten(1, self.grid)
            return features.movedim(-1, 1).float()
        return features.movedim(self.axis, 1).float()


TRANSFORMER_BLOCKS = (Block, TimmBlock, BeitBlock, SwinTransformerBlock)
_CONVOLUTION_BLOCKS = (BasicBlock, Bottleneck, ConvNeXtBlock)


def layers_of(network: nn.Module) -> list[Layer]:
    """Return the embedding or stem, then every block; transformers' after attention and MLP.

    Of an unknown network what timm lists as its features. ValueError: nothing is listed either.
    """
    layers: list[Layer] = []
    for name, module in network.named_modules():
        if isinstance(module, TRANSFORMER_BLOCKS):
            grid = getattr(module, "input_resolution", None) or network.patch_embed.grid_size
            # the second norm sees the sum after the attention, layer scale included
            layers += [Layer(name, name, True, -1, grid)] * (not layers)
            layers += [
                Layer(f"{name}.attn", f"{name}.norm2", True, -1, grid),
                Layer(name, name, False, -1, grid),
            ]
        elif isinstance(module, _CONVOLUTION_BLOCKS):
            layers += [Layer(name, name, True)] * (not layers) + [Layer(name, name, False)]
    if layers:
        return [layers[0]._replace(name="embedding"), *layers[1:]]
    if not getattr(network, "feature_info", None):
        raise ValueError(
            f"--model: {type(network).__name__} has no blocks or features that are known here"
        )
    return [Layer(place.module, place.module, place.before) for place in feature_places(network)]


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, bool, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Call `see` with the input or the output of each module of (module, before, see)."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, see=see: see(inputs[0]))
        if before
        else module.register_forward_hook(lambda _, inputs, output, see=see: see(output))
        for module, before, see in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def look(
    network: nn.Module, images: Tensor, layers: Sequence[Layer], reduce: Callable[[Tensor], Any]
) -> dict[str, Any]:
    """Return `reduce` of the map [B, C, h, w] of every layer, by name."""
    found: dict[str, Any] = {}

    def see(layer: Layer, features: Tensor) -> None:
        found[layer.name] = reduce(layer.as_map(features))

    with hooked(
        [
            (network.get_submodule(layer.module), layer.before, partial(see, layer))
            for layer in layers
        ]
    ):
        network.forward_features(images)
    return found


def depths(count: int) -> list[float]:
    """Return the relative depths of so many layers, from 0 to 1."""
    return np.linspace(0, 1, count).tolist()


# --------------------------------------------------------------------------------------------------
# Tables and figures


def by_network(rows: Sequence[Any]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yield the rows of each network, and the style of its lines."""
    for number, name in enumerate(dict.fromkeys(row.label for row in rows)):
        line = ("-", "--", ":", "-.")[number // len(COLORS) % 4]
        style = {"label": name, "color": COLORS[number % len(COLORS)], "linestyle": line}
        yield [row for row in rows if row.label == name], style


def draw_lines(axis: Axes, rows: Sequence[Any], x: str, y: str) -> None:
    """Draw field `y` of the rows over field `x`, a line for each network."""
    for own, style in by_network(rows):
        axis.plot(
            [getattr(row, x) for row in own], [getattr(row, y) for row in own], marker=".", **style
        )


def save(args: Namespace, name: str, rows: Sequence[Any], figure: Figure) -> None:
    """Write name.csv and name.png in --output_dir."""
    folder = Path(args.output_dir)
    write_rows(folder / f"{name}.csv", rows)
    figure.savefig(folder / f"{name}.png", dpi=150)
    log.info("wrote %s and .png", folder / f"{name}.csv")
