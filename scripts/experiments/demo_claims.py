"""Measures two claims on the demo's digits: A2MIM's spectra, and SemanticMIM's class tokens.

    python scripts/experiments/demo_claims.py [--output output/claims] [--arms ARM ...]

Each arm differs from its baseline in one flag, and pre-trains by its `*_tiny_mnist5k_pretrain`
recipe, for as many epochs as in the demo, with three seeds; k-NN and a linear probe judge its
frozen features. Prints the accuracies and the differences, paired by seed, with standard errors of
the mean, as Markdown. One process on one core, half a minute for each of the twelve pre-trainings;
runs that have finished below --output are kept. --csv writes the rows, of which
docs/results/claims_mnist5k.csv is a copy.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from scripts.experiments.demo import SYSTEMS, Job, execute, read_finished, recipe_of
from scripts.experiments.plot_comparison import mean_and_error
from unimim import report
from unimim.files import write_rows
from unimim.recipes import by_name

SEEDS = (0, 1, 2)
COLUMNS = {"knn": "k-NN", "linear": "linear"}
# the random weights that class tokens are judged against: of a network with as many
CLASS_TOKENS = by_name(recipe_of("semanticmim_maskfeat", "pretrain")).flags["num_cls_tokens"]
WIDER = " ".join(by_name(recipe_of("vit", "knn")).flags["model_kwargs"])


@dataclass(frozen=True)
class Arm:
    """A system of the demo with another flag, the network whose features are judged, and how.

    Without a system it is random weights of the network.
    """

    label: str
    network: str
    judged: str = ""  # flags of the probes
    system: str = ""
    flags: str = ""


CLS = "--cls_token"
ARMS = {
    "random_resnet": Arm("random weights, ResNet-18", "resnet"),
    "a2mim": Arm("A2MIM", "resnet", system="a2mim"),
    "a2mim_no_spectra": Arm(
        "A2MIM without spectra", "resnet", system="a2mim", flags="--fft_weight 0"
    ),
    "random_vit": Arm(
        "random weights, ViT", "vit", f"{CLS} --model_kwargs {WIDER} num_cls_tokens={CLASS_TOKENS}"
    ),
    "semanticmim": Arm("SemanticMIM, class tokens", "vit", CLS, "semanticmim"),
    "maskfeat": Arm("MaskFeat, class tokens", "vit", CLS, "semanticmim", "--no_bottleneck"),
}
# what a claim says is better, and than what
CLAIMS = (
    ("a2mim", "a2mim_no_spectra"),
    ("a2mim", "random_resnet"),
    ("a2mim_no_spectra", "random_resnet"),
    ("semanticmim", "maskfeat"),
    ("semanticmim", "random_vit"),
    ("maskfeat", "random_vit"),
)


@dataclass(frozen=True)
class Row:
    """Accuracies of one arm and seed, in percent."""

    arm: str
    seed: int
    pretrain_loss: float
    knn: float
    linear: float
    cpu_s: float  # of the pre-training


# --------------------------------------------------------------------------------------------------
# Runs


def commands(folder: Path, arm: Arm, seed: int) -> dict[Path, str]:
    """Return the commands of one arm and seed by the folder that each writes."""
    found, start = {}, ""
    if arm.system:
        system, run = SYSTEMS[arm.system], folder / "pretrain"
        own = f"{arm.flags} " if arm.flags else ""
        found[run] = (
            f"run_pretraining.py --recipe {recipe_of(system.recipe, 'pretrain')} {own}"
            f"--epochs {system.epochs} --seed {seed} --no_auto_resume --output_dir '{run}'"
        )
        start = f"--finetune '{run}/encoder-{system.epochs - 1}.safetensors' "
    for stage, program in (("knn", "run_knn.py"), ("linear", "run_linear_probing.py")):
        found[folder / stage] = (
            f"{program} --recipe {recipe_of(arm.network, stage)} {start}{arm.judged} --seed {seed} "
            f"--feature_cache '{folder}/knn/features' --output_dir '{folder / stage}'"
        )
    return found


def collect(output: Path, arms: Sequence[str]) -> list[Row]:
    """Run what has not finished below `output`, and return the rows."""
    rows = []
    for key in arms:
        for seed in SEEDS:
            folder = output / f"{key}-{seed}"
            execute(Job(f"{key}, seed {seed}", commands(folder, ARMS[key], seed)))
            rows.append(row_of(folder, key, seed))
            print(f"{key}, seed {seed}: {rows[-1].linear:.1f} % linear", flush=True)
    return rows


def row_of(folder: Path, key: str, seed: int) -> Row:
    """Return the row of a finished arm and seed."""
    loss, seconds = float("nan"), 0.0
    if ARMS[key].system:
        loss = report.read_log(folder / "pretrain")[-1]["train_loss"]
        seconds = read_finished(folder / "pretrain")["seconds"]
    accuracies = {stage: round(read_finished(folder / stage)["acc1"], 2) for stage in COLUMNS}
    return Row(key, seed, loss, **accuracies, cpu_s=round(seconds, 1))


# --------------------------------------------------------------------------------------------------
# Tables


def values(rows: Sequence[Row], arm: str, column: str) -> list[float]:
    """Return an arm's accuracies in the order of the seeds."""
    own = sorted((row for row in rows if row.arm == arm), key=lambda row: row.seed)
    return [getattr(row, column) for row in own]


def tables(rows: Sequence[Row]) -> str:
    """Return the accuracies and the differences, bold beyond two standard errors, as Markdown."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    heads = " | ".join(COLUMNS.values())
    lines = [f"| features of | {heads} |", "|---|---|---|"]
    for key in arms:
        cells = []
        for column in COLUMNS:
            mean, error = mean_and_error(values(rows, key, column))
            cells.append(f"{mean:.1f} ± {error:.1f}")
        lines.append(f"| {ARMS[key].label} | {' | '.join(cells)} |")
    lines += ["", f"| | against | {heads} |", "|---|---|---|---|"]
    for key, other in (pair for pair in CLAIMS if set(pair) <= set(arms)):
        cells = [difference(rows, key, other, column) for column in COLUMNS]
        lines.append(f"| {ARMS[key].label} | {ARMS[other].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(rows: Sequence[Row], arm: str, other: str, column: str) -> str:
    """Return by how much an arm is above another, paired by seed."""
    pairs = zip(values(rows, arm, column), values(rows, other, column), strict=True)
    mean, error = mean_and_error([ours - theirs for ours, theirs in pairs])
    text = f"{mean:+.1f} ± {error:.1f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "claims", help="folder of the runs"
    )
    parser.add_argument("--csv", type=Path, default=None, help="file of the rows to write")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="some of them")
    options = parser.parse_args(argv)
    try:
        rows = collect(options.output.resolve(), options.arms)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_rows(options.csv or options.output / "claims.csv", rows)
    print(f"\n{tables(rows)}")


if __name__ == "__main__":
    main()
