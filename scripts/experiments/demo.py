"""The demo: a tiny ConMIM on handwritten digits, from a zip of images to fine-tuned accuracies, in
one report.

    python scripts/experiments/demo.py [--output output/demo] [--fast]

scikit-learn's digits are packed as zip and map file; a tiny ConMIM is pre-trained on them; its
teacher and the same model from random weights are fine-tuned alike on a tenth of the labels, with
several seeds, and evaluated; a tiny MAE learns to complete them. All of that is done by the command
lines that the report lists. `--fast` shows in a minute that the parts fit together; nothing is
learned then.
"""

import argparse
import html
import io
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from scripts.tools.make_map_file import write_map_files
from unimim import report
from unimim.data.sources import Source, digits_source, first_of_each_class

INPUT_SIZE, PATCH_SIZE = 32, 8
PATCHES = (INPUT_SIZE // PATCH_SIZE) ** 2
LABEL_FRACTION = 0.1
MODEL = f"--input_size {INPUT_SIZE} --patch_size {PATCH_SIZE} --layer_scale_init_value 1.0"
SIZE = "embed_dim=128 depth=4 num_heads=4"
PRETRAIN = (
    "--batch_size 64 --lr 1e-3 --mask_type random --mask_ratio 0.5 --crop_scale 0.5 1.0 "
    "--t_momentum 0.99 --clip_grad 3.0 --num_workers 0 --save_ckpt_freq 1000 --log_every 22"
)
FINETUNE = (
    f"--label_fraction {LABEL_FRACTION} --batch_size 16 --lr 5e-4 --layer_decay 1.0 "
    "--init_scale 1.0 --smoothing 0 --no_aug --num_workers 0 --save_ckpt_freq 1000 --log_every 8"
)
MAE = (
    f"--model mae_tiny_patch16_224 --input_size {INPUT_SIZE} --patch_size 4 --model_kwargs {SIZE} "
    "--batch_size 64 --lr 2e-3 --crop_scale 0.5 1.0 --no_norm_pix_loss --num_workers 0 "
    "--save_ckpt_freq 1000 --log_every 22"
)
ARMS = {"pretrained": "pre-trained teacher", "random": "random weights"}


@dataclass(frozen=True)
class Plan:
    """How long each part is."""

    pretrain_epochs: int
    finetune_epochs: int
    seeds: tuple[int, ...]


FULL = Plan(pretrain_epochs=40, finetune_epochs=20, seeds=(0, 1, 2))
FAST = Plan(pretrain_epochs=2, finetune_epochs=2, seeds=(0,))


# --------------------------------------------------------------------------------------------------
# Data


def export(source: Source, folder: Path, split: str) -> None:
    """Writes the images of a source as stored PNGs into <split>.zip, in folders named after their
    classes."""
    with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_STORED) as archive:
        for index, label in enumerate(source.labels):
            encoded = io.BytesIO()
            Image.fromarray(source.read(index)).save(encoded, format="PNG")
            archive.writestr(f"{source.classes[label]}/{index:04d}.png", encoded.getvalue())


def export_digits(folder: Path) -> None:
    """train.zip and val.zip with their map files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        export(digits_source(train=split == "train"), folder, split)
    write_map_files(folder, ["train", "val"])


def accuracy_on_pixels() -> float:
    """What a linear classifier makes of the raw pixels of the same labelled images, in percent."""
    from sklearn.linear_model import LogisticRegression

    train, val = digits_source(train=True), digits_source(train=False)
    chosen = first_of_each_class(train.labels, LABEL_FRACTION)
    classifier = LogisticRegression(max_iter=1000).fit(
        flat_pixels(train, chosen), train.labels[chosen]
    )
    return 100 * classifier.score(flat_pixels(val, range(len(val))), val.labels)


def flat_pixels(source: Source, indices) -> np.ndarray:
    return np.stack([source.read(index).ravel() / 255 for index in indices])


# --------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Run:
    """A finished command."""

    command: str
    output: str
    seconds: float


def run(name: str, command: str) -> Run:
    """Runs `python COMMAND` in the repository on one core, shows its output line by line; its
    failure is the demo's."""
    print(f"$ python {command}", flush=True)
    start, lines = time.perf_counter(), []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout:
            print(f"{name} | {line}", end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{name} failed with exit status {process.returncode}")
    return Run(f"python {command}", "".join(lines), time.perf_counter() - start)


def length(epochs: int) -> str:
    return f"--epochs {epochs} --warmup_epochs {max(1, epochs // 20)}"


class Demo:
    """The commands of the demo; folders are written relative to the repository where they lie in
    it."""

    def __init__(self, output: Path, plan: Plan):
        self.output, self.plan, self.cores = output, plan, len(os.sched_getaffinity(0))
        short = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
        self.folder = shlex.quote(str(short))
        self.data = f"--data_set IMNET --data_path {self.folder}/data"

    def pretrain(self) -> Run:
        command = (
            f"run_pretraining.py --model conmim_tiny_patch16_224 {MODEL} --model_kwargs {SIZE} "
            f"projector_hidden_dim=256 {self.data} {PRETRAIN} {length(self.plan.pretrain_epochs)} "
            f"--no_auto_resume --output_dir {self.folder}/pretrain"
        )
        return run("pre-training", command)

    def pretrain_mae(self) -> Run:
        flags = f"{MAE} {self.data} {length(self.plan.pretrain_epochs)}"
        return run(
            "MAE", f"run_pretraining.py {flags} --no_auto_resume --output_dir {self.folder}/mae"
        )

    @property
    def teacher(self) -> str:
        return f"{self.folder}/pretrain/{self.last_checkpoint}"

    @property
    def last_checkpoint(self) -> str:
        return f"checkpoint-{self.plan.pretrain_epochs - 1}.pth"

    def finetune(self, arm: str, seed: int) -> tuple[Run, Run]:
        """Fine-tune from the teacher or from random weights, then evaluate the best checkpoint."""
        base = (
            f"run_class_finetuning.py --model beit_tiny_patch16_224 {MODEL} "
            f"--model_kwargs {SIZE} {self.data}"
        )
        start = f"--finetune {self.teacher} " if arm == "pretrained" else ""
        folder = f"{self.folder}/{arm}-{seed}"
        train = (
            f"{base} {start}{FINETUNE} {length(self.plan.finetune_epochs)} --seed {seed} "
            f"--no_auto_resume --output_dir {folder}"
        )
        trained = run(f"{arm} {seed}", train)
        return trained, run(
            f"{arm} {seed}", f"{base} --num_workers 0 --eval --resume {folder}/checkpoint-best.pth"
        )

    def draw(self, kind: str, flags: str) -> Run:
        return run(kind, f"analysis/visualize.py {kind} {flags} --output {self.folder}/{kind}.png")

    def execute(self) -> tuple[Run, dict[str, list[tuple[Run, Run]]], list[Run]]:
        """Pre-training, each arm's fine-tunings with their evaluations, MAE and pictures: one
        process on each core.

        The random starts do not wait for the pre-training, so that no core is idle meanwhile.
        """
        with ThreadPoolExecutor(self.cores) as pool:
            pretraining, mae = pool.submit(self.pretrain), pool.submit(self.pretrain_mae)
            jobs = {
                "random": [pool.submit(self.finetune, "random", seed) for seed in self.plan.seeds]
            }
            pretraining.result()
            jobs["pretrained"] = [
                pool.submit(self.finetune, "pretrained", seed) for seed in self.plan.seeds
            ]
            mae.result()
            checkpoint = f"{self.folder}/mae/{self.last_checkpoint}"
            pictures = [
                pool.submit(self.draw, "masks", f"--config {self.folder}/pretrain/config.yaml"),
                pool.submit(self.draw, "attention", f"--checkpoint {self.teacher}"),
                pool.submit(self.draw, "reconstruct", f"--checkpoint {checkpoint}"),
            ]
            arms = {arm: [job.result() for job in jobs[arm]] for arm in ARMS}
            return pretraining.result(), arms, [mae.result(), *(job.result() for job in pictures)]


# --------------------------------------------------------------------------------------------------
# Report


@dataclass(frozen=True)
class Finetuned:
    """One fine-tuning: its log.txt, and the accuracy of its best checkpoint by --eval in
    percent."""

    seed: int
    log: list[dict]
    evaluated: float
    run: Run


def read_finetuned(folder: Path, seed: int, trained: Run, evaluated: Run) -> Finetuned:
    accuracy = float(re.search(r"acc1 ([\d.]+)", evaluated.output).group(1))
    return Finetuned(seed, report.read_log(folder), accuracy, trained)


def accuracy_table(arms: dict[str, list[Finetuned]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: accuracy in percent of best and last epoch over the seeds, and of each
    seed's best."""
    seeds = [one.seed for one in arms["random"]]
    header = ["start", "best epoch, %", "last epoch, %", *(f"seed {seed}, best" for seed in seeds)]
    rows = []
    for arm, runs in arms.items():
        best, last = [one.evaluated for one in runs], [one.log[-1]["test_acc1"] for one in runs]
        rows.append(
            [
                ARMS[arm],
                report.spread(best),
                report.spread(last),
                *(f"{value:.1f}" for value in best),
            ]
        )
    return header, rows


def verdict(arms: dict[str, list[Finetuned]], pixels: float) -> str:
    pairs = zip(arms["pretrained"], arms["random"], strict=True)
    gains = [with_it.evaluated - without.evaluated for with_it, without in pairs]
    won = sum(value > 0 for value in gains)
    gain = statistics.mean(gains)
    helps = gain > 0 and won == len(gains)
    words = "Pre-training helps" if helps else "Pre-training does not win clearly"
    return (
        f"{words}: {gain:+.1f} points on average, ahead with {won} of {len(gains)} seeds. For "
        "comparison, a linear classifier on the pixels of the same labeled images, without "
        f"augmentation: {pixels:.1f} %."
    )


def images_per_second(run: Run) -> float:
    """Return the median of the throughputs that a run logged."""
    logged = re.findall(r"img/s ([\d.]+)", run.output)
    return statistics.median(float(value) for value in logged)


def facts_table(pretraining: Run, log: list[dict], arms: dict[str, list[Finetuned]], total: float):
    """Header and rows: what was trained, how fast, how long."""
    finetunings = [one.run for runs in arms.values() for one in runs]
    seconds = statistics.mean(run.seconds for run in finetunings)
    return ["", "value"], [
        [
            "contrast loss, last epoch",
            f"{log[-1]['train_loss']:.3f} (guessing: {math.log(PATCHES):.3f})",
        ],
        [
            "right patch picked, last epoch",
            f"{100 * log[-1]['train_contrast_acc']:.1f} % (guessing: {100 / PATCHES:.1f} %)",
        ],
        [
            "pre-training",
            f"{len(log)} epochs, {pretraining.seconds:.0f} s, "
            f"{images_per_second(pretraining):.0f} images/s",
        ],
        ["each fine-tuning", f"{len(arms['random'][0].log)} epochs, {seconds:.0f} s"],
        [
            "everything",
            f"{total:.0f} s on {len(os.sched_getaffinity(0))} cores, one process on each",
        ],
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "demo", help="folder to write"
    )
    parser.add_argument("--fast", action="store_true", help="a few steps of everything")
    options = parser.parse_args(argv)
    start, plan = time.perf_counter(), FAST if options.fast else FULL
    output = options.output.resolve()
    demo = Demo(output, plan)

    export_digits(output / "data")
    pretraining, finetunings, drawings = demo.execute()
    arms = {
        arm: [
            read_finetuned(output / f"{arm}-{seed}", seed, *pair)
            for seed, pair in zip(plan.seeds, pairs, strict=True)
        ]
        for arm, pairs in finetunings.items()
    }
    log = report.read_log(output / "pretrain")
    accuracies, outcome = accuracy_table(arms), verdict(arms, accuracy_on_pixels())
    facts = facts_table(pretraining, log, arms, time.perf_counter() - start)
    commands = [
        pretraining,
        *(run for pairs in finetunings.values() for pair in pairs for run in pair),
        *drawings,
    ]
    text = build_page(output, plan, log, arms, accuracies, facts, outcome, commands)
    (output / "report.html").write_text(text)
    tables = f"{report.text_table(*accuracies)}\n\n{report.text_table(*facts)}"
    print(f"\n{tables}\n\n{outcome}\n\nwrote {output / 'report.html'}")


def build_page(output, plan, log, arms, accuracies, facts, outcome, commands) -> str:
    """Return the report as one HTML document."""
    labelled = f"{LABEL_FRACTION:.0%} of the labels"
    return report.page(
        "UniMIM demo: ConMIM on handwritten digits",
        [
            f"<p>{html.escape(outcome)}</p>",
            report.html_table(*accuracies),
            f"<p>Accuracy on the validation images after fine-tuning on {labelled} with the same "
            "flags. The best epoch is selected on these images for both alike; the last epoch is "
            f"not selected. ± is the std over {len(plan.seeds)} seeds.</p>",
            report.html_table(*facts),
            "<h2>Pre-training</h2>",
            report.picture(
                report.contrast_curves(log, PATCHES), "loss and accuracy of the contrast by epoch"
            ),
            "<p>Each masked patch has to identify its teacher feature among those of the "
            f"{PATCHES} patches of its image.</p>",
            report.picture(output / "masks.png", "what student and teacher see"),
            "<h2>Fine-tuning</h2>",
            report.picture(
                report.accuracy_curves(
                    {ARMS[arm]: [one.log for one in runs] for arm, runs in arms.items()}
                ),
                "validation accuracy by epoch",
            ),
            "<h2>Attention of the teacher</h2>",
            "<p>Attention of the class token in the last block, on validation images. Each map has "
            "its own color scale.</p>",
            report.picture(output / "attention.png", "attention maps of the teacher's class token"),
            "<h2>A masked autoencoder</h2>",
            "<p>MAE's reconstruction from a quarter of the patches, after training for as long on "
            "the same images.</p>",
            report.picture(output / "reconstruct.png", "image, visible patches, prediction, both"),
            "<h2>Commands</h2>",
            f"<pre>{html.escape(chr(10).join(run.command for run in commands))}</pre>",
        ],
    )


if __name__ == "__main__":
    main()
