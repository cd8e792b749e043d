"""Measure classifiers on images unlike their training images: ImageNet-A, -R, -Sketch, -V2 and -C.

    python run_robustness.py --checkpoint out/finetuned/checkpoint-best.pth \\
        --suite imagenet_a imagenet_r imagenet_sketch imagenet_v2 imagenet_c --data_path ROOT

ROOT holds a folder for each suite (imagenet_a or imagenet-a, ...), or is the folder of the only
suite. Its class folders are WordNet ids, or ImageNet-V2's numbers; they are mapped to the model's
classes, which are ImageNet's unless --class_map lists others. A folder that is not a class is an
error. On ImageNet-A and -R only the logits of their 200 classes count. ImageNet-C is read as
CORRUPTION/SEVERITY/CLASS; its corruption error is the error by AlexNet's, mCE their mean (Hendrycks
and Dietterich 2019, arXiv 1903.12261). The suite occlusion hides random patches of the validation
images in ROOT/val (A2MIM, figure 1). Writes robustness.csv and robustness.png.

All of this is in unimim/evaluation/robustness.py; here are flags and figure.
"""

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import common
from unimim.data.class_lists import IMAGENET, read_classes
from unimim.engine.setup import launch
from unimim.evaluation.robustness import FOLDERS, RATIOS, Row, corruption_errors, measure

# --------------------------------------------------------------------------------------------------
# Figure


def draw(rows: Sequence[Row]) -> Figure:
    """Plot the accuracy on each set, the error under each corruption, and the occlusion curves."""
    panels = {
        "accuracy": [row for row in rows if row.suite not in ("imagenet_c", "occlusion")],
        "corruption": [row for row in rows if row.suite == "imagenet_c"],
        "occlusion": [row for row in rows if row.suite == "occlusion"],
    }
    shown = {name: own for name, own in panels.items() if own}
    figure = Figure(figsize=(4.2 * len(shown), 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (name, own) in zip(axes, shown.items(), strict=True):
        if name == "occlusion":
            common.draw_lines(axis, own, "value", "acc1")
            axis.set(xlabel="ratio of hidden patches", ylabel="top-1 accuracy (%)", ylim=(0, None))
        else:
            draw_bars(axis, own, name)
        axis.legend(frameon=False, fontsize=8)
    return figure


def draw_bars(axis: Axes, rows: Sequence[Row], panel: str) -> None:
    """Draw a group of bars for each set or corruption, with a bar for each network."""
    groups = list(common.by_network(rows))
    for number, (own, style) in enumerate(groups):
        heights = {row.suite: row.acc1 for row in own}
        if panel == "corruption":
            heights = corruption_errors(own)
        places = np.arange(len(heights)) + 0.8 * number / len(groups)
        color = {key: style[key] for key in ("label", "color")}
        axis.bar(places, [*heights.values()], width=0.8 / len(groups), **color)
        axis.set_xticks(np.arange(len(heights)) + 0.4 - 0.4 / len(groups), [*heights])
    axis.tick_params(axis="x", rotation=60, labelsize=7)
    axis.set_ylabel("corruption error (%)" if panel == "corruption" else "top-1 accuracy (%)")


# --------------------------------------------------------------------------------------------------
# Command line


def check(args: Namespace) -> None:
    if args.data_path is None:
        raise ValueError("--data_path is missing; it is the folder that holds the suites")
    if not all(0 <= ratio < 1 for ratio in args.ratios):
        raise ValueError(f"--ratios lie between 0 and 1, not {args.ratios}")
    common.check_positive(args, "grid")


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = common.build_parser(
        __doc__.splitlines()[0], "robustness", images=50_000, batch_size=64
    )
    group = parser.add_argument_group("robustness")
    group.add_argument(
        "--suite", nargs="+", choices=FOLDERS, required=True, help="what is measured"
    )
    group.add_argument(
        "--class_map", default=IMAGENET, metavar="FILE",
        help="the model's classes in their order, names of class folders, one a line; the word "
        f"{IMAGENET} is its 1,000 WordNet ids",
    )  # fmt: skip
    group.add_argument(
        "--ratios", type=float, nargs="+", default=RATIOS, help="occlusion: of hidden patches"
    )
    group.add_argument("--grid", type=int, default=14, help="occlusion: patches along a side")
    return common.parse(parser, argv, check)


def main(args: Namespace) -> list[Row]:
    """Measure all networks on all suites, write table and figure, and return the rows."""
    device = common.set_up(args)
    classes = read_classes("--class_map", args.class_map)
    rows: list[Row] = []
    for network in common.load_networks(args, len(classes)):
        if not network.classifies:
            raise ValueError(f"{network.label} has no trained classifier; use a fine-tuned one")
        network.model.to(device)
        image = torch.zeros(1, len(network.mean_std[0]), *network.size, device=device)
        outputs = network.model(image).shape[-1]
        if outputs != len(classes):
            raise ValueError(
                f"{network.label} has {outputs} classes, --class_map {args.class_map} lists "
                f"{len(classes)}; use the list of its classes"
            )
        rows += measure(args, network, classes, device)
    common.save(args, "robustness", rows, draw(rows))
    return rows


if __name__ == "__main__":
    launch(main, parse())
