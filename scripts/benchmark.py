"""Speed, always as A against B in one process: interleaved, medians of ratios.

`benchmark.py step` measures a training step as a share of the machine's matrix-multiplication peak, against the
straightforward form of the same computation. `benchmark.py data` measures the loading of images.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from modeling_finetune import Block, create_model
from modeling_pretrain import ConMIM
from optim_factory import param_groups
from parallel import AUTOCAST_DTYPES, TorchRunner
from scripts import bench_data

# ---------------------------------------------------------------------------------------------------------------------
# The straightforward form, kept here and not in the product


class Straightforward(ConMIM):
    """ConMIM as the published loop computes it: explicit attention, all N x N logits, then a choice of rows."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["mask"].flatten(1)
        with torch.no_grad():
            keys = self.teacher.project(batch["image_strong"], None)
        queries = self.project(batch["image"], mask)
        logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).transpose(1, 2) / self.temperature
        labels = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return {"loss": F.cross_entropy(logits[mask].float(), labels[mask])}

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """One multiplication and one addition for each parameter, with the names matched anew at each step."""
        teacher, student = dict(self.teacher.named_parameters()), dict(self.named_parameters())
        with torch.no_grad():
            for name in teacher.keys() & student.keys():
                teacher[name].mul_(self.t_momentum).add_(student[name], alpha=1 - self.t_momentum)


def product_optimizer(model: ConMIM, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def straightforward_optimizer(model: ConMIM, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass
class Variant:
    """One way to do the step, and what was measured of it."""

    name: str
    step: Callable[[], Tensor]
    seconds: list[float] = field(default_factory=list)
    memory_mib: float = 0.0

    def run(self, device: torch.device) -> None:
        synchronize(device)
        begin = time.perf_counter()
        self.step()
        synchronize(device)
        self.seconds.append(time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(variants: list[Variant], rounds: int, device: torch.device) -> None:
    """Runs every variant once a round, in alternating order, after one round that does not count."""
    for variant in variants:
        variant.step()
    for k in range(rounds):
        for variant in variants if k % 2 == 0 else reversed(variants):
            variant.run(device)


def speedup(base: Variant, other: Variant) -> float:
    """Median over rounds of base time / other time."""
    return statistics.median(a / b for a, b in zip(base.seconds, other.seconds, strict=True))


def gemm_peak(device: torch.device, dtype: torch.dtype, size: int, rounds: int = 5) -> float:
    """Best rate of one large matrix product in FLOP/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times[1:])


def step_memory(step: Callable[[], Tensor], device: torch.device) -> float:
    """MiB: on a GPU the peak of the step, on a CPU what autograd keeps for the backward pass (unique storages)."""
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


def make_variant(name: str, model: ConMIM, optimizer: torch.optim.Optimizer, batch: dict, precision: str) -> Variant:
    """A whole training step through the product's runner: forward, backward, norm, optimizer, moving average."""
    runner = TorchRunner(
        model, optimizer, device=batch["image"].device, precision=precision, update_freq=1, clip_grad=None
    )
    runner.watch(model, model.teacher)

    def step() -> Tensor:
        loss = runner.micro_step(batch, last=True)["loss"]
        applied = runner.step()["applied"]
        model.after_step(0.5, float(applied) if applied.device.type == "cpu" else applied)
        return loss

    return Variant(name, step)


def random_batch(model: ConMIM, size: int, device: torch.device) -> dict[str, Tensor]:
    """Normalised images and the published recipe's share of masked patches, at random."""
    shape, patches = (size, 3, *model.patch_embed.img_size), model.patch_embed.num_patches
    count = round(0.75 * patches)
    order = torch.rand(size, patches).argsort(1)
    mask = (order < count).view(size, *model.patch_embed.grid_size)
    batch = {"image": torch.randn(shape), "image_strong": torch.randn(shape), "mask": mask}
    return {name: value.to(device) for name, value in batch.items()} | {"max_masked": count}


def build_variants(args: argparse.Namespace, device: torch.device) -> list[Variant]:
    """The straightforward form first, then ours in each precision asked for."""
    torch.manual_seed(0)
    options = {"input_size": args.input_size}
    plain = create_model(args.model, attn="eager", **options)
    plain.__class__ = Straightforward
    batch, variants = None, []
    jobs = [(f"straightforward {args.precision[0]}", plain, straightforward_optimizer, args.precision[0], False)]
    jobs += [(f"ours {precision}", None, product_optimizer, precision, False) for precision in args.precision]
    if args.compile:
        jobs.append((f"ours {args.precision[-1]} compiled", None, product_optimizer, args.precision[-1], True))
    for name, model, optimizer, precision, compiled in jobs:
        model = model or create_model(args.model, **options)
        model.to(device)
        model.teacher.to(device)
        if compiled:
            compile_all(model)
        batch = batch or random_batch(model, args.batch_size, device)
        variants.append(make_variant(name, model, optimizer(model, device), batch, precision))
    return variants


def compile_all(model: ConMIM) -> None:
    for block in (*model.modules(), *model.teacher.modules()):
        if isinstance(block, Block):
            block.compile(dynamic=False)


def run_step(args: argparse.Namespace) -> None:
    """Prints peak, FLOPs, and a row for each variant."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    size = 8192 if device.type == "cuda" else 2048
    dtypes = {"fp32": torch.float32} | AUTOCAST_DTYPES
    peaks = {p: gemm_peak(device, dtypes[p], size) for p in args.precision}
    variants = build_variants(args, device)
    flops = utils.count_flops(variants[1].step)
    interleave(variants, args.rounds, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"{args.model}, {args.input_size} px, batch {args.batch_size}, torch {torch.__version__}, {name}")
    print("GEMM peak: " + ", ".join(f"{p} {rate / 1e9:.0f} GFLOP/s" for p, rate in peaks.items()))
    print(f"{flops / 1e9:.0f} GFLOP per step of {variants[1].name}")
    print(f"{'variant':28s} {'s/step':>8s} {'img/s':>8s} {'of peak':>8s} {'speed-up':>9s} {'MiB':>8s}")
    for variant in variants:
        variant.memory_mib = step_memory(variant.step, device)
        precision = next(p for p in args.precision if p in variant.name)
        median = statistics.median(variant.seconds)
        share, ratio = flops / median / peaks[precision], speedup(variants[0], variant)
        print(
            f"{variant.name:28s} {median:8.3f} {args.batch_size / median:8.2f} {share:8.2f} {ratio:9.2f} "
            f"{variant.memory_mib:8.0f}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a ConMIM training step", formatter_class=parser.formatter_class)
    step.add_argument("--model", default="conmim_small_patch16_224")
    step.add_argument("--input_size", type=int, default=224)
    step.add_argument("--batch_size", type=int, default=8)
    step.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"))
    step.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
    step.add_argument("--threads", type=int, default=2)
    step.add_argument("--rounds", type=int, default=7)
    step.set_defaults(run=run_step)
    data = commands.add_parser("data", help="two-view and one-view loading", formatter_class=parser.formatter_class)
    bench_data.add_arguments(data)
    data.set_defaults(run=bench_data.run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
