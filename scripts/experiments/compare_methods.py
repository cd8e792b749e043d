"""Pre-training methods against each other and against random weights, on the same small data sets.

    python scripts/experiments/compare_methods.py --data_path DATA [--methods mae semmae]
    python scripts/experiments/compare_methods.py --data_path DATA --quick

DATA holds the images of "cifar10": zips and map files as scripts/tools/make_cifar10_subset.py
writes them, or any others of 32 x 32 pixels. All methods are pre-trained for the same steps, on
`shapes` for as long as their steps allow, with an encoder of the same size; its averaged tokens are
classified by k-NN and a linear probe, and it is fine-tuned by the same recipe. Runs that are
finished below --output are kept; interrupted ones go on. Writes results.csv there and prints a
Markdown table for each data set; plot_comparison.py draws it. Another method is one more line of
METHODS. "semmae_strong" takes its parts from the frozen ViT of --teacher, as
scripts/tools/teacher_from_onnx.py writes one.
"""

import argparse
import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from unimim import report
from unimim.files import write_rows

ENCODER = "embed_dim=192 depth=6 num_heads=3"
DECODER = "decoder_embed_dim=96 decoder_depth=2 decoder_num_heads=3"


@dataclass(frozen=True)
class Method:
    """What is trained first: no `pretrain` flags are random weights; `parts` names the source of
    part maps, which --teacher gives if `strong_teacher`, else MAE.

    `classifier` are the flags of the network that is evaluated. "{patch}" and "{cell}" in flags are
    the data set's. `length` is the name of a schedule below: on `shapes` methods whose step takes
    much longer get fewer epochs. `words`: it needs visual tokens, which only the data on the device
    of scripts/benchmarks/gpu_learns.py come with.
    """

    label: str
    pretrain: str = ""
    classifier: str = (
        f"--model vit_tiny_patch16_224 --model_kwargs {ENCODER} --patch_size {{patch}}"
    )
    parts: str = ""
    strong_teacher: bool = False
    length: str = "long"
    words: bool = False


MAE = (
    f"--model_kwargs {ENCODER} {DECODER} --patch_size {{patch}} --norm_pix_loss --lr 2e-3 "
    "--opt_betas 0.9 0.95"
)
SEMAIM = (
    f"--model semaim_tiny_patch16_224 --model_kwargs {ENCODER} --patch_size {{patch}} "
    "--query_depth 6 --norm_pix_loss --lr 5e-4 --opt_betas 0.9 0.95 --clip_grad 3 "
    "--permutation_type"
)
CONMIM = (
    f"--model conmim_tiny_patch16_224 --model_kwargs {ENCODER} projector_hidden_dim=256 "
    "--patch_size {patch} --layer_scale_init_value 0.1 --mask_type random --mask_ratio 0.5 "
    "--t_momentum 0.999 --lr 2e-3 --clip_grad 3"
)
CONMIM_CLASSIFIER = f"--model beit_tiny_patch16_224 --model_kwargs {ENCODER} --patch_size {{patch}}"
MASKFEAT = (
    f"maskfeat_tiny_patch16_224 --model_kwargs {ENCODER} --patch_size {{patch}} "
    "--mask_type random --lr 2e-3 --opt_betas 0.9 0.95"
)
# the visual tokens are as many as scripts/benchmarks/gpu_learns.py makes of patches; published are
# 8192, of a network
BEIT = (
    f"--model_kwargs {ENCODER} vocab_size=512 --patch_size {{patch}} --color_jitter 0.4 "
    "--lr 1.5e-3 --opt_betas 0.9 0.999 --clip_grad 3"
)
ABS_POS_CLASSIFIER = (
    f"--model beit_tiny_patch16_224_abs_pos --model_kwargs {ENCODER} --patch_size {{patch}}"
)
# pixels are masked by the cells of {cell}, a quarter of the image's side; the ResNet's last map has
# as many places
MIM = (
    "--mask_type random_mps32 --mask_ratio 0.6 --mask_patch_size {cell} --lr 1e-3 "
    "--lr_schedule stepfix_cosine"
)
MIM_VIT = f"{MIM} --model_kwargs {ENCODER} --patch_size {{patch}}"
MIM_CLASSIFIER = f"--model mim_vit_tiny_patch16_224 --model_kwargs {ENCODER} --patch_size {{patch}}"
MIM_RESNET = (
    f"{MIM} --model_kwargs output_stride={{cell}} --no_sync_bn --opt_betas 0.9 0.98 "
    "--train_interpolation bicubic"
)
RESNET = "--model resnet18 --model_kwargs output_stride={cell}"
# squares of 2 x 2 patches: an image of 8 x 8 patches has 16, as many as Pixio's of 256 px has of
# 4 x 4; the paper pairs such squares with 4 class tokens. As published the decoder is as deep as
# the encoder and images are never mirrored. lr, and a drop path of 0, are MAE's of this table
PIXIO = (
    f"--model pixio_tiny_patch16_256 --model_kwargs {ENCODER} decoder_embed_dim=96 decoder_depth=6 "
    "decoder_num_heads=3 --patch_size {patch} --mask_grid 2 --num_cls_tokens 4 --norm_pix_loss "
    "--hflip 0 --lr 2e-3 --opt_betas 0.9 0.95"
)
PIXIO_CLASSIFIER = (
    f"--model vit_tiny_patch16_224 --model_kwargs {ENCODER} num_cls_tokens=4 pos_embed=learned "
    "--patch_size {patch}"
)
# the ema of its recipe would still be the random weights after so few steps: 0.9999^546 is 0.95
NEPA = (
    f"--model nepa_tiny_patch14_224 --model_kwargs {ENCODER} --patch_size {{patch}} --lr 2e-3 "
    "--opt_betas 0.9 0.95 --clip_grad 1 --train_interpolation bilinear"
)
NEPA_CLASSIFIER = (
    f"--model rope_vit_tiny_patch14_224 --model_kwargs {ENCODER} --patch_size {{patch}}"
)
METHODS = {
    "random": Method("random weights"),
    "conmim": Method("ConMIM", CONMIM, CONMIM_CLASSIFIER, length="small_batches"),
    "mae": Method("MAE", f"--model mae_tiny_patch16_224 {MAE}"),
    "semmae": Method(
        "SemMAE, learned parts", f"--model semmae_tiny_patch16_224 {MAE}", parts="learned"
    ),
    "semmae_kmeans": Method(
        "SemMAE, k-means parts", f"--model semmae_tiny_patch16_224 {MAE}", parts="kmeans"
    ),
    "semmae_random": Method(
        "SemMAE, random parts", f"--model semmae_tiny_patch16_224 {MAE}", parts="random"
    ),
    "semmae_strong": Method(
        "SemMAE, strong teacher's parts",
        f"--model semmae_tiny_patch16_224 {MAE}",
        parts="kmeans",
        strong_teacher=True,
    ),
    "semaim": Method("SemAIM, semantic order", f"{SEMAIM} attention_center", length="short"),
    "semaim_raster": Method("SemAIM, raster order", f"{SEMAIM} raster", length="short"),
    "saim": Method("SAIM, random order", f"{SEMAIM} stochastic", length="short"),
    "igpt": Method("ViT-iGPT, row-major order", f"{SEMAIM} zigzag", length="short"),
    "beit": Method(
        "BEiT",
        f"--model beit_tiny_patch16_224_8k_vocab {BEIT} --mask_type block",
        CONMIM_CLASSIFIER,
        length="medium",
        words=True,
    ),
    "semanticmim_beit": Method(
        "SemanticMIM in BEiT's form",
        f"--model semanticmim_beit_tiny_patch16_224 {BEIT} --mask_type random --mask_ratio 0.6 "
        "--num_cls_tokens 1",
        ABS_POS_CLASSIFIER,
        length="medium",
        words=True,
    ),
    "random_beit": Method("random weights, BEiT's ViT", classifier=CONMIM_CLASSIFIER),
    "random_semanticmim_beit": Method(
        "random weights, BEiT's ViT with absolute positions", classifier=ABS_POS_CLASSIFIER
    ),
    "maskfeat": Method(
        "MaskFeat", f"--model {MASKFEAT} --mask_ratio 0.4 --num_cls_tokens 1", length="medium"
    ),
    "semanticmim_maskfeat": Method(
        "SemanticMIM in MaskFeat's form",
        f"--model semanticmim_{MASKFEAT} --mask_ratio 0.8 --num_cls_tokens 8",
        length="medium",
    ),
    "simmim_vit": Method(
        "SimMIM, ViT",
        f"--model simmim_vit_tiny_patch16_224 {MIM_VIT}",
        MIM_CLASSIFIER,
        length="mim",
    ),
    "a2mim_vit": Method(
        "A2MIM, ViT", f"--model a2mim_vit_tiny_patch16_224 {MIM_VIT}", MIM_CLASSIFIER, length="mim"
    ),
    "random_mim_vit": Method("random weights, A2MIM's ViT", classifier=MIM_CLASSIFIER),
    "random_resnet18": Method("random weights, ResNet-18", classifier=RESNET),
    "simmim_resnet18": Method(
        "SimMIM, ResNet-18", f"--model simmim_resnet18 {MIM_RESNET}", RESNET, length="mim"
    ),
    "a2mim_resnet18": Method(
        "A2MIM, ResNet-18", f"--model a2mim_resnet18 {MIM_RESNET}", RESNET, length="mim"
    ),
    "random_pixio": Method(
        "random weights, Pixio's ViT of 4 class tokens", classifier=PIXIO_CLASSIFIER
    ),
    "pixio": Method("Pixio, squares of 2 x 2 patches", PIXIO, PIXIO_CLASSIFIER),
    "random_nepa": Method("random weights, NEPA's rotary ViT", classifier=NEPA_CLASSIFIER),
    "nepa": Method("NEPA", NEPA, NEPA_CLASSIFIER),
}


# points of the space mask x form x target (docs/methods/space.md) that nobody has published
UNPUBLISHED = {
    "mae_hog": Method("MAE, HOG", f"--model mae_tiny_patch16_224 {MAE} --target hog"),
    "mae_contrast": Method(
        "MAE, contrast",
        f"--model mae_tiny_patch16_224 {MAE} --target contrast --t_momentum 0.999 "
        f"--model_kwargs {ENCODER} {DECODER} projector_hidden_dim=256",
    ),
    "mae_attention": Method(
        "MAE, highest attention hidden",
        f"--model mae_tiny_patch16_224 {MAE} --mask_type attention_high --t_momentum 0.999",
    ),
    "mae_spectra": Method("MAE, spectra", f"--model mae_tiny_patch16_224 {MAE} --fft_weight 0.1"),
    "semanticmim_pixels": Method(
        "SemanticMIM in MaskFeat's form, pixels",
        f"--model semanticmim_{MASKFEAT} --mask_ratio 0.8 --num_cls_tokens 8 --target pixels "
        "--norm_pix_loss",
        length="medium",
    ),
    "semmae_hog": Method(
        "SemMAE, strong teacher's parts, HOG",
        f"--model semmae_tiny_patch16_224 {MAE} --target hog",
        parts="kmeans",
        strong_teacher=True,
    ),
}
ALL_METHODS = METHODS | UNPUBLISHED


COMMON = "--imagenet_default_mean_and_std --num_workers 0"


@dataclass(frozen=True)
class Schedule:
    """The length of a pre-training."""

    epochs: int
    warmup_steps: int

    def flags(self, epochs: int | None = None) -> str:
        """Return the flags of this length, or of another one with the same part of warm-up."""
        epochs = self.epochs if epochs is None else epochs
        warmup_steps = max(1, round(self.warmup_steps * epochs / self.epochs))
        return f"--epochs {epochs} --warmup_steps {warmup_steps}"


@dataclass(frozen=True)
class Data:
    """Flags of a data set, and the length of each stage on it. "{data_path}" is the command's.

    `strong_parts` are those of parts from --teacher, over `parts`: enough patches of 14 pixels for
    the grid of the method.
    """

    source: str
    patch: int
    cell: int
    pretrain: str
    schedules: dict[str, Schedule]
    finetune: str
    parts: str
    strong_parts: str


LENGTHS = ("long", "short", "medium", "mim", "small_batches")
DATA = {
    "cifar10": Data(
        source=f"--data_set IMNET --data_path {{data_path}} --input_size 32 {COMMON}",
        patch=4,
        cell=8,
        pretrain="--min_lr 0 --batch_size 256 --crop_scale 0.2 1",
        schedules=dict.fromkeys(LENGTHS, Schedule(7, 54)),
        finetune="--batch_size 64 --epochs 5 --warmup_epochs 1",
        parts="--batch_size 128 --epochs 3 --decoder_widths 64 48 32",
        strong_parts="--input_size 112 --batch_size 50",
    ),
    "shapes": Data(
        source=f"--data_set shapes {{shapes}} --input_size 64 {COMMON}",
        patch=8,
        cell=16,
        pretrain="--min_lr 0 --batch_size 64 --crop_scale 0.2 1",
        schedules={
            "long": Schedule(12, 37),
            "short": Schedule(2, 6),
            "medium": Schedule(8, 25),
            "mim": Schedule(2, 6),
            "small_batches": Schedule(8, 25),
        },
        finetune="--batch_size 64 --epochs 6 --warmup_epochs 1 --label_fraction 1",
        parts="--batch_size 64 --epochs 3 --decoder_widths 64 48 32 24 --part_grid 16",
        strong_parts="--input_size 224 --batch_size 16",
    ),
}
PROBE = "--global_pool --batch_size 256"
LINEAR = "--no_aug --epochs 30 --warmup_epochs 0 --lr 0.1"
QUICK_LINEAR, QUICK_STAGE = "--epochs 5", "--epochs 1 --warmup_epochs 0"  # of --quick
FINETUNE = (
    "--label_fraction 0.1 --lr 5e-4 --layer_decay 1 --drop_path 0 --init_scale 1e-3 --aa= "
    "--color_jitter 0 --reprob 0 --smoothing 0 --weight_decay 0.05 --min_lr 1e-6"
)


@dataclass(frozen=True)
class Result:
    """One row of results.csv: accuracies in percent, of last epochs; nan where nothing was
    pre-trained."""

    data: str
    method: str
    seed: int
    pretrain_loss: float
    knn_acc1: float
    linear_acc1: float
    finetune_acc1: float


# --------------------------------------------------------------------------------------------------
# Runs


class Comparison:
    """The runs of one data set and seed, each in a folder of its own below `folder`."""

    def __init__(
        self,
        name: str,
        seed: int,
        output: Path,
        precision: str,
        threads: int,
        *,
        data_path: Path | None = None,
        shapes_path: Path | None = None,
        teacher: Path | None = None,
        epochs: int | None = None,
        quick: bool = False,
    ):
        data = DATA[name]
        path = shlex.quote(str(data_path))
        shapes = f"--data_path {shlex.quote(str(shapes_path))}" if shapes_path else ""
        self.data = replace(data, source=data.source.format(data_path=path, shapes=shapes))
        self.name = name
        self.seed = seed
        self.teacher = teacher
        self.epochs = epochs
        self.linear = LINEAR
        if quick:
            self.linear = f"{LINEAR} {QUICK_LINEAR}"
            finetune = f"{data.finetune} {QUICK_STAGE}"
            parts = f"{data.parts} {QUICK_STAGE}"
            self.data = replace(self.data, finetune=finetune, parts=parts)
        self.folder = output / name / f"seed{seed}"
        self.threads = threads
        self.precision = precision
        self.common = f"--save_ckpt_freq 1000 --precision {precision} --seed {seed}"

    def run(self, command: str, folder: Path) -> Path:
        """Run a script of the repository unless it has finished in `folder`; its output goes to
        output.txt there."""
        done = folder / "finished"
        if not done.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{folder}: python {command}", flush=True)
            arguments = [*shlex.split(command), "--output_dir", str(folder)]
            with (folder / "output.txt").open("a") as log:
                environment = {"OMP_NUM_THREADS": str(self.threads)} | os.environ
                ended = subprocess.run(
                    [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
                )
            last_line = (folder / "output.txt").read_text().rstrip().rpartition("\n")[2]
            if ended.returncode or "stopped by" in last_line:
                raise SystemExit(f"{folder}: not finished: {last_line}")
            done.touch()
        return folder

    def pretrain(self, key: str) -> Path:
        method = ALL_METHODS[key]
        length = self.data.schedules[method.length].flags(self.epochs)
        schedule = f"{self.data.pretrain} {length}"
        own = self.fitted(method.pretrain)
        command = f"run_pretraining.py {self.data.source} {schedule} {self.common} {own}"
        if method.parts == "random":
            command += " --part_source random"
        elif method.parts:
            command += f" --part_maps {shlex.quote(str(self.part_maps(method) / 'maps'))}"
            command += " --part_source kmeans" if method.parts == "kmeans" else ""
        return self.run(command, self.folder / key / "pretrain")

    def fitted(self, flags: str) -> str:
        """A method's flags with this data set's sizes."""
        return flags.format(patch=self.data.patch, cell=self.data.cell)

    def part_maps(self, method: Method) -> Path:
        """Stage 1 of SemMAE; its teacher is --teacher, or MAE, pre-trained with this seed."""
        folder = self.folder / f"parts_{method.parts}{'_strong' * method.strong_teacher}"
        teacher = self.teacher if method.strong_teacher else encoder_of(self.pretrain("mae"))
        own = self.data.strong_parts if method.strong_teacher else ""
        command = (
            f"run_part_learning.py {self.data.source} {self.common} {self.data.parts} {own} "
            f"--teacher {shlex.quote(str(teacher))} --part_source {method.parts} "
            f"--extract {shlex.quote(str(folder / 'maps'))}"
        )
        return self.run(command, folder)

    def evaluate(self, key: str) -> Result:
        method = ALL_METHODS[key]
        loss = float("nan")
        start = ""
        if method.pretrain:
            pretrained = self.pretrain(key)
            loss = report.read_log(pretrained)[-1]["train_loss"]
            start = f"--finetune {shlex.quote(str(encoder_of(pretrained)))}"
        network = f"{self.fitted(method.classifier)} {self.data.source} {start}"
        knn, linear = self.probe(key, network)
        command = f"run_class_finetuning.py {network} {FINETUNE} {self.data.finetune}"
        finetuned = self.accuracy(command, key, "finetune")
        return Result(self.name, key, self.seed, loss, knn, linear, finetuned)

    def probe(self, key: str, network: str) -> tuple[float, float]:
        """k-NN and linear accuracy of the same features."""
        features = (
            f"{network} {PROBE} --feature_cache {shlex.quote(str(self.folder / key / 'features'))}"
        )
        knn = f"run_knn.py {features} --knn_k 20 --seed {self.seed} --precision {self.precision}"
        rows = list(csv.DictReader((self.run(knn, self.folder / key / "knn") / "knn.csv").open()))
        return float(rows[0]["acc1"]), self.accuracy(
            f"run_linear_probing.py {features} {self.linear}", key, "linear"
        )

    def accuracy(self, command: str, key: str, stage: str) -> float:
        """Return the accuracy of a run's last epoch."""
        folder = self.run(f"{command} {self.common}", self.folder / key / stage)
        return report.read_log(folder)[-1]["test_acc1"]

    def results(self, keys: Iterable[str]) -> list[Result]:
        return [self.evaluate(key) for key in keys]


def encoder_of(folder: Path) -> Path:
    """The last epoch's encoder of a pre-training; interrupted ones leave others beside it."""
    return folder / f"encoder-{report.read_log(folder)[-1]['epoch']}.safetensors"


# --------------------------------------------------------------------------------------------------
# Tables


def table(results: Sequence[Result], data: str) -> str:
    """Markdown: a row for each method with mean and deviation over the seeds, then each seed."""
    rows = [result for result in results if result.data == data]
    seeds = sorted({row.seed for row in rows})
    lines = [
        f"| {data} | pre-training loss | k-NN, % | linear, % | fine-tuned, % | "
        + " | ".join(f"seed {seed}, fine-tuned" for seed in seeds)
        + " |",
        "|---" * (5 + len(seeds)) + "|",
    ]
    for key, method in ALL_METHODS.items():
        own = {row.seed: row for row in rows if row.method == key}
        if own:
            losses = (
                report.spread([row.pretrain_loss for row in own.values()], digits=3)
                if method.pretrain
                else ""
            )
            kinds = ("knn_acc1", "linear_acc1", "finetune_acc1")
            means = " | ".join(
                report.spread([getattr(row, kind) for row in own.values()]) for kind in kinds
            )
            each = [f"{own[seed].finetune_acc1:.1f}" if seed in own else "" for seed in seeds]
            lines.append(f"| {method.label} | {losses} | {means} | {' | '.join(each)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=["cifar10"])
    parser.add_argument("--data_path", type=Path, help="folder of the images of cifar10")
    parser.add_argument(
        "--shapes_path",
        type=Path,
        help="folder of other shapes, as make_shapes.py --cluttered writes (default: the cache)",
    )
    without_visual_tokens = [key for key, method in METHODS.items() if not method.words]
    strong = [key for key, method in ALL_METHODS.items() if method.strong_teacher]
    parser.add_argument(
        "--methods", nargs="+", choices=(*without_visual_tokens, *UNPUBLISHED),
        default=[key for key in without_visual_tokens if key not in strong],
        help="default: the published ones that need no --teacher; not published are "
        f"{', '.join(UNPUBLISHED)}",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", type=Path, help=f"frozen ViT with patches of 14 pixels, of {', '.join(strong)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, help="of every pre-training, in place of the table's")
    parser.add_argument(
        "--quick", action="store_true", help="one epoch of everything, one seed: does it run?"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="folder of all runs (default: output/compare)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of all runs")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="seeds at a time"
    )
    args = parser.parse_args(argv)
    if "cifar10" in args.data and (args.data_path is None or not args.data_path.is_dir()):
        found = "missing" if args.data_path is None else f"{args.data_path}, which is no folder"
        parser.error(
            f"--data_path is {found}; scripts/tools/make_cifar10_subset.py writes one, or use "
            "--data shapes"
        )
    asked = [key for key in args.methods if key in strong]
    if asked and not (args.teacher and args.teacher.is_file()):
        parser.error(
            f"--methods {' '.join(asked)} needs --teacher FILE; "
            "scripts/tools/teacher_from_onnx.py writes one"
        )
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    default_folder = "compare_quick" if args.quick else "compare"
    output = (args.output or ROOT / "output" / default_folder).resolve()
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    length = {"epochs": args.epochs or (1 if args.quick else None), "quick": args.quick}
    length["data_path"] = args.data_path and args.data_path.resolve()
    length["teacher"] = args.teacher and args.teacher.resolve()
    length["shapes_path"] = args.shapes_path and args.shapes_path.resolve()
    chains = [
        Comparison(name, seed, output, args.precision, threads, **length)
        for name in args.data
        for seed in seeds
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = [
            row
            for rows in pool.map(lambda chain: chain.results(args.methods), chains)
            for row in rows
        ]
    write_rows(output / "results.csv", results)
    print("\n\n".join(table(results, name) for name in args.data))


if __name__ == "__main__":
    main()
