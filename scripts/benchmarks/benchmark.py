"""Measure speed, always as A against B in one process: interleaved, medians of ratios.

- `benchmark.py step`: a training step, as a fraction of the machine's matrix-multiplication peak
  and against the straightforward variant of the same computation;
- `masks`: SemMAE's masks;
- `targets`: HOG and the loss on visual tokens, with their memory;
- `spectra`: A2MIM's frequency loss;
- `data`: the loading of images;
- `index`: a list of ten million images: seconds, bytes an image, memory of workers;
- `attention`, `windows`, `roi_align`: what segmentation and detection add.
"""

import argparse
import math
import statistics
import sys
import weakref
from collections.abc import Callable
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
from modeling_pretrain import PretrainMethod
from modeling_targets import HOG, ReconstructionLoss, VisualTokenHead
from optim_factory import param_groups
from scripts.benchmarks import data as bench_data
from scripts.benchmarks import index as bench_index
from scripts.benchmarks import transfer as bench_transfer
from scripts.benchmarks.published import (
    make_straightforward,
    one_hot_histograms,
    semantic_mask_of_one,
    whole_spectra,
)
from scripts.benchmarks.timing import Variant, interleave, speedup
from unimim.cli.options import model_kwargs
from unimim.engine.compiling import compile_blocks
from unimim.engine.monitor import count_flops
from unimim.engine.runner import AUTOCAST_DTYPES, TorchRunner

GEMMS = 4  # matrix products per step


def gemm(device: torch.device, precision: str, size: int | None = None) -> Variant:
    """Return a step of a few large matrix products: the peak of the machine in each round."""
    if size is None:
        size = 8192 if device.type == "cuda" else 2048
    dtype = ({"fp32": torch.float32} | AUTOCAST_DTYPES)[precision]
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)

    def step() -> None:
        for _ in range(GEMMS):
            torch.mm(a, b)

    return Variant(f"GEMM {precision}", step, precision, flops=2.0 * size**3 * GEMMS)


class LivingBytes(TorchDispatchMode):
    """Record the peak of the bytes in storages that were created inside and are still alive."""

    def __init__(self):
        super().__init__()
        self.seen = set()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = self.seen | {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def release(self, key: int, size: int) -> None:
        """Subtract a storage that is freed."""
        self.seen.discard(key)
        self.now -= size


def step_memory(step: Callable[[], Tensor], device: torch.device) -> float:
    """Return the memory of a step in MiB.

    On a GPU it is the peak, on a CPU the unique storages that autograd saves for backward.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) / 2**20
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        step()
    return sum(saved.values()) / 2**20


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
    """Return a whole training step: forward, backward, gradient norm, optimizer, moving average.

    `groups` are the optimizer's parameter groups, by default those of pre-training.
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
    """Return a random batch of `size` samples with the model's views."""
    height, width = model.image_size
    patch_height, patch_width = model.cell_size
    shape = (size, 3, height, width)
    grid = (height // patch_height, width // patch_width)
    noise = torch.rand(size, math.prod(grid))
    count = round(mask_ratio * noise.shape[1])
    mask = noise.argsort(1).argsort(1) < count
    second_size = getattr(model, "second_size", (1, 1))
    vocabulary = getattr(getattr(model, "lm_head", None), "out_features", 1)
    views = {
        "image": torch.randn(shape),
        "image_strong": torch.randn(shape),
        "mask": mask.view(size, *grid),
        "noise": torch.rand(size, model.noise_size),
        "part_ids": torch.randint(getattr(model, "num_parts", 1), (size, *grid)),
        "image_second": torch.randint(256, (size, 3, *second_size), dtype=torch.uint8),
        "target_ids": torch.randint(vocabulary, noise.shape),
    }
    counts = {"max_masked": count, "mask_counts": (count, count)}
    return {name: views[name].to(device) for name in model.views} | counts


def build_model(args: argparse.Namespace, device: torch.device, **options) -> PretrainMethod:
    """Return the model of the flags, with its teacher, on the device."""
    model = create_model(args.model, **model_kwargs(args), **options).to(device)
    if model.teacher is not None:
        model.teacher.to(device)
    return model


def build_variants(args: argparse.Namespace, device: torch.device) -> list[Variant]:
    """Return the straightforward variant, then ours in each requested precision.

    On a CPU the straightforward variant runs with libc's default use of memory, then as ours.
    """
    torch.manual_seed(0)
    plain = build_model(args, device, attn="eager")
    make_straightforward(plain)
    batch = random_batch(plain, args.batch_size, device, args.mask_ratio)
    first = args.precision[0]
    name = f"straightforward {first}"
    variants = [make_variant(name, plain, batch, first, fused=False, keeps_memory=False)]
    if device.type == "cpu":
        variants.append(make_variant(f"{name}, memory kept", plain, batch, first, fused=False))
    for precision in args.precision:
        model = build_model(args, device)
        variants.append(make_variant(f"ours {precision}", model, batch, precision, fused=True))
    if args.compile:
        model = build_model(args, device)
        last = args.precision[-1]
        compile_blocks(model, model.teacher)
        variants.append(make_variant(f"ours {last} compiled", model, batch, last, fused=True))
    return variants


def run_step(args: argparse.Namespace) -> None:
    """Print the peak, and a row with FLOPs, time and memory for each variant."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    peaks = {precision: gemm(device, precision) for precision in args.precision}
    variants = build_variants(args, device)
    for variant in variants:
        variant.flops = count_flops(variant.step)
    interleave([*peaks.values(), *variants], args.rounds, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"{args.model}, {args.input_size} px, batch {args.batch_size}, "
        f"torch {torch.__version__}, {name}"
    )
    speeds = []
    for precision, peak in peaks.items():
        gflops = peak.flops / statistics.median(peak.seconds) / 1e9
        speeds.append(f"{precision} {gflops:.0f} GFLOP/s")
    print(f"GEMM peak: {', '.join(speeds)}")
    print(
        f"{'variant':36s} {'GFLOP':>8s} {'s/step':>8s} {'img/s':>8s} "
        f"{'of peak':>8s} {'speed-up':>9s} {'MiB':>8s}"
    )
    for variant in variants:
        variant.memory_mib = step_memory(variant.step, device)
        median = statistics.median(variant.seconds)
        peak = peaks[variant.precision]
        utilization = variant.flops / peak.flops * speedup(peak, variant)
        print(
            f"{variant.name:36s} {variant.flops / 1e9:8.0f} {median:8.3f} "
            f"{args.batch_size / median:8.2f} {utilization:8.2f} "
            f"{speedup(variants[0], variant):9.2f} {variant.memory_mib:8.0f}"
        )


def run_targets(args: argparse.Namespace) -> None:
    """Print time and peak memory of HOG and of the loss on visual tokens, plain and ours."""
    torch.set_num_threads(args.threads)
    hog = HOG((args.input_size // 16,) * 2, (16, 16))
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size)
    head = VisualTokenHead(args.width, 8192)
    rows = round(args.mask_ratio * args.batch_size * (args.input_size // 16) ** 2)
    tokens = torch.randn(1, rows, args.width, requires_grad=True)
    visual_tokens = torch.randint(8192, (1, rows))

    def plain_loss() -> None:
        logits = F.linear(tokens, head.weight, head.bias).flatten(0, 1)
        F.cross_entropy(logits, visual_tokens.flatten()).backward()

    def our_loss() -> None:
        head(tokens, visual_tokens)[0].backward()

    pairs = {
        "HOG": (lambda: one_hot_histograms(images, 9, 8, 16), lambda: hog.histograms(images)),
        f"{rows} visual tokens, with gradients": (plain_loss, our_loss),
    }
    print(
        f"batch {args.batch_size}, {args.input_size} px, torch {torch.__version__}, "
        f"CPU, {args.threads} threads"
    )
    for name, (plain, ours) in pairs.items():
        variants = [Variant("straightforward", plain, "fp32"), Variant("ours", ours, "fp32")]
        interleave(variants, args.rounds, torch.device("cpu"))
        for variant in variants:
            with LivingBytes() as living:
                variant.step()
            median = statistics.median(variant.seconds)
            peak = living.peak / 2**20
            print(f"{name:38s} {variant.name:16s} {median:8.3f} s {peak:10.1f} MiB peak memory")


def run_masks(args: argparse.Namespace) -> None:
    """Print the time of SemMAE's masks, image by image and for the batch at once."""
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
        f"SemMAE masks, {args.batch_size} x {args.tokens} tokens, {args.num_parts} parts, "
        "one CPU thread"
    )
    for variant in (plain, ours):
        median = 1e3 * statistics.median(variant.seconds)
        print(f"{variant.name:16s} {median:9.2f} ms {speedup(plain, variant):9.1f}x")


def run_spectra(args: argparse.Namespace) -> None:
    """Print time and memory of A2MIM's frequency loss, ours relative to full spectra."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    shape = (args.batch_size, 3, args.input_size, args.input_size)
    predicted = torch.randn(shape, device=device, requires_grad=True)
    target = torch.randn(shape, device=device)
    mask = torch.ones(args.batch_size, 1, *shape[2:], device=device)
    criterion = ReconstructionLoss(fft_weight=0.5, fft_unmask_weight=1e-3)

    def whole() -> Tensor:
        return whole_spectra(criterion, predicted, target, mask)

    def half() -> Tensor:
        return criterion.frequency_loss(criterion.seen(predicted, target, mask) - target)

    plain = Variant("whole", partial(with_gradient, whole, predicted), "fp32")
    ours = Variant("ours", partial(with_gradient, half, predicted), "fp32")
    interleave([plain, ours], args.rounds, device)
    print(f"frequency loss, {args.batch_size} x {args.input_size} px, {args.threads} threads")
    for variant in (plain, ours):
        variant.memory_mib = step_memory(variant.step, device)
        median = 1e3 * statistics.median(variant.seconds)
        time_ratio = 1 / speedup(plain, variant)
        memory_ratio = variant.memory_mib / plain.memory_mib
        print(
            f"{variant.name:8s} {median:9.2f} ms {time_ratio:6.2f}x "
            f"{variant.memory_mib:9.1f} MiB {memory_ratio:6.2f}x"
        )


def with_gradient(loss: Callable[[], Tensor], variable: Tensor) -> Tensor:
    """Return the loss after computing its gradient."""
    value = loss()
    torch.autograd.grad(value, variable)
    return value


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark that the command line names."""
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
    step.add_argument("--patch_size", type=int, default=None, help="default: the model's")
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
        help="fraction of masked patches; MAE has its own option",
    )
    step.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16")
    )
    step.add_argument(
        "--compile", action="store_true", help="also measure ours with compiled blocks"
    )
    step.add_argument("--threads", type=int, default=2)
    step.add_argument("--rounds", type=int, default=7)
    step.set_defaults(run=run_step)
    masks = commands.add_parser(
        "masks", help="SemMAE's masks of a batch", formatter_class=parser.formatter_class
    )
    masks.add_argument("--batch_size", type=int, default=256)
    masks.add_argument("--tokens", type=int, default=14**2)
    masks.add_argument("--num_parts", type=int, default=7)
    masks.add_argument("--rounds", type=int, default=15)
    masks.set_defaults(run=run_masks)
    spectra = commands.add_parser(
        "spectra", help="A2MIM's frequency loss", formatter_class=parser.formatter_class
    )
    spectra.add_argument("--batch_size", type=int, default=4)
    spectra.add_argument("--input_size", type=int, default=224)
    spectra.add_argument("--threads", type=int, default=2)
    spectra.add_argument("--rounds", type=int, default=15)
    spectra.set_defaults(run=run_spectra)
    targets = commands.add_parser(
        "targets",
        help="HOG and the loss on visual tokens",
        formatter_class=parser.formatter_class,
    )
    targets.add_argument("--batch_size", type=int, default=256)
    targets.add_argument("--input_size", type=int, default=224)
    targets.add_argument("--width", type=int, default=384, help="width of the encoder")
    targets.add_argument("--mask_ratio", type=float, default=0.6)
    targets.add_argument("--threads", type=int, default=2)
    targets.add_argument("--rounds", type=int, default=3)
    targets.set_defaults(run=run_targets)
    data = commands.add_parser(
        "data", help="two-view and one-view loading", formatter_class=parser.formatter_class
    )
    bench_data.add_arguments(data)
    data.set_defaults(run=bench_data.run)
    index = commands.add_parser(
        "index", help="a long list of images", formatter_class=parser.formatter_class
    )
    bench_index.add_arguments(index)
    index.set_defaults(run=bench_index.run)
    bench_transfer.add_parsers(commands, parser.formatter_class)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
