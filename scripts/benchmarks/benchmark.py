"""Speed, always as A against B in one process: interleaved, medians of ratios.

`benchmark.py step` measures a training step as a share of the machine's matrix-multiplication peak,
against the straightforward form of the same computation. `benchmark.py masks` measures SemMAE's
masks, `benchmark.py targets` HOG and the loss of visual tokens with their memory, `benchmark.py
spectra` A2MIM's loss of spectra, `benchmark.py data` the loading of images, `benchmark.py
attention`, `windows` and `roi_align` what segmentation and detection add.
"""

import argparse
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine_for_finetuning import Classification
from masking_generator import semantic_mask
from modeling_finetune import create_model
from modeling_losses import ReconstructionLoss
from modeling_pretrain import PretrainMethod, VisualTokenHead
from modeling_targets import HOG
from optim_factory import param_groups
from scripts.benchmarks import data as bench_data
from scripts.benchmarks import transfer as bench_transfer
from scripts.benchmarks.published import (
    make_straightforward,
    one_hot_histograms,
    semantic_mask_of_one,
    whole_spectra,
)
from unimim.cli.options import model_kwargs
from unimim.engine.compiling import compile_blocks
from unimim.engine.monitor import count_flops, keep_freed_memory
from unimim.engine.runner import AUTOCAST_DTYPES, TorchRunner

GEMMS = 4  # in a row


@dataclass
class Variant:
    """One way to do the step, and what was measured of it."""

    name: str
    step: Callable[[], object]
    precision: str
    keeps_memory: bool = True
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)
    memory_mib: float = 0.0

    def run(self, device: torch.device) -> None:
        keep_freed_memory(self.keeps_memory)
        if device.type == "cpu":  # once without the clock: the heap fills, or empties
            self.step()
        synchronize(device)
        begin = time.perf_counter()
        self.step()
        synchronize(device)
        self.seconds.append(time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(variants: list[Variant], rounds: int, device: torch.device) -> None:
    """Runs every variant once a round, in alternating order, after one round that does not
    count."""
    for variant in variants:
        variant.step()
    for k in range(rounds):
        for variant in variants if k % 2 == 0 else reversed(variants):
            variant.run(device)


def speedup(base: Variant, other: Variant) -> float:
    """Median over rounds of base time / other time."""
    return statistics.median(a / b for a, b in zip(base.seconds, other.seconds, strict=True))


def gemm(device: torch.device, precision: str, size: int | None = None) -> Variant:
    """A few large matrix products: what the machine can do at best, and at the time of each
    round."""
    if size is None:
        size = 8192 if device.type == "cuda" else 2048
    dtype = ({"fp32": torch.float32} | AUTOCAST_DTYPES)[precision]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def step() -> None:
        for _ in range(GEMMS):
            torch.mm(a, b)

    return Variant(f"GEMM {precision}", step, precision, flops=2.0 * size**3 * GEMMS)


class LivingBytes(TorchDispatchMode):
    """The largest sum of the storages made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            given = {
                t.untyped_storage()._cdata
                for t in tree_leaves((args, kwargs))
                if isinstance(t, Tensor)
            }
            if storage is not None and storage._cdata not in self.seen | given:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def step_memory(step: Callable[[], Tensor], device: torch.device) -> float:
    """MiB: on a GPU the peak of the step, on a CPU what autograd keeps for the backward pass
    (unique storages)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) / 2**20
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 2**20


def make_variant(
    name: str,
    model: PretrainMethod | Classification,
    batch: dict,
    precision: str,
    *,
    fused: bool,
    keeps_memory: bool = True,
    groups: list[dict] | None = None,
) -> Variant:
    """A whole training step through the product's runner: forward, backward, norm, optimizer,
    moving average.

    `groups` are the optimizer's, by default those of pre-training.
    """
    groups = param_groups(model, 0.05) if groups is None else groups
    optimizer = torch.optim.AdamW(
        groups, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=fused or None
    )
    runner = TorchRunner(
        model,
        optimizer,
        device=batch["image"].device,
        precision=precision,
        update_freq=1,
        clip_grad=None,
    )
    runner.watch(model, model.ema and model.ema.module)

    def step() -> Tensor:
        loss = runner.micro_step(batch, last=True)["loss"]
        applied = runner.step()["applied"]
        model.after_step(0.5, float(applied) if applied.device.type == "cpu" else applied)
        return loss

    return Variant(name, step, precision, keeps_memory)


def random_batch(
    model: PretrainMethod, size: int, device: torch.device, mask_ratio: float = 0.75
) -> dict[str, Tensor]:
    """Normalized images, a share of masked patches, parts and pictures for a tokenizer, at
    random."""
    sides = zip(model.image_size, model.cell_size, strict=True)
    shape, grid = (size, 3, *model.image_size), tuple(side // cell for side, cell in sides)
    noise = torch.rand(size, math.prod(grid))
    count = round(mask_ratio * noise.shape[1])
    mask = noise.argsort(1).argsort(1) < count
    views = {
        "image": torch.randn(shape),
        "image_strong": torch.randn(shape),
        "mask": mask.view(size, *grid),
        "noise": torch.rand(size, model.noise_size),
        "part_ids": torch.randint(getattr(model, "num_parts", 1), (size, *grid)),
        "image_second": torch.randint(
            256, (size, 3, *getattr(model, "second_size", (1, 1))), dtype=torch.uint8
        ),
        "target_ids": torch.randint(
            getattr(getattr(model, "lm_head", None), "out_features", 1), noise.shape
        ),
    }
    counts = {"max_masked": count, "mask_counts": (count, count)}
    return {name: views[name].to(device) for name in model.views} | counts


def build_model(args: argparse.Namespace, device: torch.device, **options) -> PretrainMethod:
    model = create_model(args.model, **model_kwargs(args), **options).to(device)
    if model.teacher is not None:
        model.teacher.to(device)
    return model


def build_variants(args: argparse.Namespace, device: torch.device) -> list[Variant]:
    """The straightforward form first, on a CPU with libc's own use of memory; then ours in each
    precision asked for."""
    torch.manual_seed(0)
    plain = build_model(args, device, attn="eager")
    make_straightforward(plain)
    batch, first = random_batch(plain, args.batch_size, device, args.mask_ratio), args.precision[0]
    variants = [
        make_variant(
            f"straightforward {first}", plain, batch, first, fused=False, keeps_memory=False
        )
    ]
    if device.type == "cpu":
        name = f"straightforward {first}, memory kept"
        variants.append(make_variant(name, plain, batch, first, fused=False))
    for precision in args.precision:
        variants.append(
            make_variant(
                f"ours {precision}", build_model(args, device), batch, precision, fused=True
            )
        )
    if args.compile:
        model, last = build_model(args, device), args.precision[-1]
        compile_blocks(model, model.teacher)
        variants.append(make_variant(f"ours {last} compiled", model, batch, last, fused=True))
    return variants


def run_step(args: argparse.Namespace) -> None:
    """Prints peak, FLOPs, and a row for each variant."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    peaks = {precision: gemm(device, precision) for precision in args.precision}
    variants = build_variants(args, device)
    for variant in variants:
        variant.flops = count_flops(variant.step)
    interleave([*peaks.values(), *variants], args.rounds, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"{args.model}, {args.input_size} px, batch {args.batch_size}, torch {torch.__version__}, {name}"
    )
    rates = {
        precision: peak.flops / statistics.median(peak.seconds) / 1e9
        for precision, peak in peaks.items()
    }
    print(
        "GEMM peak: "
        + ", ".join(f"{precision} {rate:.0f} GFLOP/s" for precision, rate in rates.items())
    )
    print(
        f"{'variant':36s} {'GFLOP':>8s} {'s/step':>8s} {'img/s':>8s} {'of peak':>8s} {'speed-up':>9s} {'MiB':>8s}"
    )
    for variant in variants:
        variant.memory_mib = step_memory(variant.step, device)
        median = statistics.median(variant.seconds)
        peak, ratio = peaks[variant.precision], speedup(variants[0], variant)
        share = variant.flops / peak.flops * speedup(peak, variant)
        print(
            f"{variant.name:36s} {variant.flops / 1e9:8.0f} {median:8.3f} {args.batch_size / median:8.2f} "
            f"{share:8.2f} {ratio:9.2f} {variant.memory_mib:8.0f}"
        )


def run_targets(args: argparse.Namespace) -> None:
    """Prints time and peak memory of HOG and of the loss of visual tokens, against their
    straightforward forms."""
    torch.set_num_threads(args.threads)
    hog = HOG((args.input_size // 16,) * 2, (16, 16))
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size)
    head, rows = (
        VisualTokenHead(args.width, 8192),
        round(args.mask_ratio * args.batch_size * (args.input_size // 16) ** 2),
    )
    tokens, words = (
        torch.randn(1, rows, args.width, requires_grad=True),
        torch.randint(8192, (1, rows)),
    )

    def whole() -> None:
        F.cross_entropy(
            F.linear(tokens, head.weight, head.bias).flatten(0, 1), words.flatten()
        ).backward()

    pairs = {
        "HOG": (lambda: one_hot_histograms(images, 9, 8, 16), lambda: hog.histograms(images)),
        f"{rows} words, with gradients": (whole, lambda: head(tokens, words)[0].backward()),
    }
    print(
        f"batch {args.batch_size}, {args.input_size} px, torch {torch.__version__}, CPU, {args.threads} threads"
    )
    for name, steps in pairs.items():
        variants = [
            Variant(form, step, "fp32")
            for form, step in zip(("straightforward", "ours"), steps, strict=True)
        ]
        interleave(variants, args.rounds, torch.device("cpu"))
        for variant in variants:
            with LivingBytes() as living:
                variant.step()
            median = statistics.median(variant.seconds)
            print(
                f"{name:32s} {variant.name:16s} {median:8.3f} s {living.peak / 2**20:10.1f} MiB at the peak"
            )


def run_masks(args: argparse.Namespace) -> None:
    """Prints the time of SemMAE's masks for a batch, and for one image after another."""
    torch.set_num_threads(1)
    parts = torch.randint(args.num_parts, (args.batch_size, args.tokens))
    noise = torch.rand(args.batch_size, args.tokens), torch.rand(args.batch_size, args.num_parts)

    def each() -> None:
        for row in range(args.batch_size):
            semantic_mask_of_one(parts[row], 0.75, 0.5, noise[0][row], noise[1][row])

    plain = Variant("image by image", each, "fp32")
    ours = Variant("ours", lambda: semantic_mask(parts, 0.75, 0.5, args.num_parts, *noise), "fp32")
    interleave([plain, ours], args.rounds, torch.device("cpu"))
    print(
        f"SemMAE masks, {args.batch_size} x {args.tokens} tokens, {args.num_parts} parts, one CPU thread"
    )
    for variant in (plain, ours):
        median = 1e3 * statistics.median(variant.seconds)
        print(f"{variant.name:16s} {median:9.2f} ms {speedup(plain, variant):9.1f}x")


def run_spectra(args: argparse.Namespace) -> None:
    """Prints time and memory of the loss of spectra and of its gradient, ours as a share of the
    whole complex form."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    shape = (args.batch_size, 3, args.input_size, args.input_size)
    predicted, target = (
        torch.randn(shape, device=device, requires_grad=True),
        torch.randn(shape, device=device),
    )
    mask = torch.ones(args.batch_size, 1, *shape[2:], device=device)
    criterion = ReconstructionLoss(fft_weight=0.5, fft_unmask_weight=1e-3)

    def whole() -> Tensor:
        return whole_spectra(criterion, predicted, target, mask)

    def half() -> Tensor:
        return criterion.frequency_loss(criterion.seen(predicted, target, mask) - target)

    steps = [partial(gradient_of, form, predicted) for form in (whole, half)]
    plain, ours = (
        Variant(name, step, "fp32") for name, step in zip(("whole", "ours"), steps, strict=True)
    )
    interleave([plain, ours], args.rounds, device)
    print(f"loss of spectra, {args.batch_size} x {args.input_size} px, {args.threads} threads")
    for variant in (plain, ours):
        variant.memory_mib = step_memory(variant.step, device)
        median, share = 1e3 * statistics.median(variant.seconds), 1 / speedup(plain, variant)
        memory = variant.memory_mib / plain.memory_mib
        print(
            f"{variant.name:8s} {median:9.2f} ms {share:6.2f}x {variant.memory_mib:9.1f} MiB {memory:6.2f}x"
        )


def gradient_of(loss: Callable[[], Tensor], value: Tensor) -> Tensor:
    found = loss()
    torch.autograd.grad(found, value)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser(
        "step",
        help="a training step of ConMIM, MAE, SemAIM, MaskFeat, SemanticMIM or A2MIM",
        formatter_class=parser.formatter_class,
    )
    step.add_argument("--model", default="conmim_small_patch16_224")
    step.add_argument("--input_size", type=int, default=224)
    step.add_argument("--patch_size", type=int, default=None, help="None: the model's own")
    step.add_argument(
        "--model_kwargs",
        nargs="*",
        default=[],
        metavar="K=V",
        help="constructor options of the model",
    )
    step.add_argument("--batch_size", type=int, default=8)
    step.add_argument(
        "--mask_ratio",
        type=float,
        default=0.75,
        help="share of masked patches; MAE's is its own option",
    )
    step.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16")
    )
    step.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
    step.add_argument("--threads", type=int, default=2)
    step.add_argument("--rounds", type=int, default=7)
    step.set_defaults(run=run_step)
    masks = commands.add_parser(
        "masks", help="SemMAE's masks of a batch", formatter_class=parser.formatter_class
    )
    masks.add_argument("--batch_size", type=int, default=256)
    masks.add_argument("--tokens", type=int, default=196)
    masks.add_argument("--num_parts", type=int, default=7)
    masks.add_argument("--rounds", type=int, default=15)
    masks.set_defaults(run=run_masks)
    spectra = commands.add_parser(
        "spectra", help="A2MIM's loss of spectra alone", formatter_class=parser.formatter_class
    )
    spectra.add_argument("--batch_size", type=int, default=4)
    spectra.add_argument("--input_size", type=int, default=224)
    spectra.add_argument("--threads", type=int, default=2)
    spectra.add_argument("--rounds", type=int, default=15)
    spectra.set_defaults(run=run_spectra)
    targets = commands.add_parser(
        "targets", help="HOG and the word loss", formatter_class=parser.formatter_class
    )
    targets.add_argument("--batch_size", type=int, default=256)
    targets.add_argument("--input_size", type=int, default=224)
    targets.add_argument("--width", type=int, default=384, help="of the encoder")
    targets.add_argument("--mask_ratio", type=float, default=0.6)
    targets.add_argument("--threads", type=int, default=2)
    targets.add_argument("--rounds", type=int, default=3)
    targets.set_defaults(run=run_targets)
    data = commands.add_parser(
        "data", help="two-view and one-view loading", formatter_class=parser.formatter_class
    )
    bench_data.add_arguments(data)
    data.set_defaults(run=bench_data.run)
    bench_transfer.add_parsers(commands, parser.formatter_class)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
