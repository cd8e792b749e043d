"""The section `fast` of gpu_check.py: how fast training steps are, as a share of what the device
can do.

Every step is measured on made images that lie on the device: images/s, TFLOP/s and model FLOPs
utilization by the FLOPs that torch counts, the share of a large matrix product timed right after
it, and the peak of the memory. A row is recorded as soon as it is there; OUTPUT/fast.md holds them
as tables.

    python -m scripts.benchmarks.gpu_fast compile "ConMIM B" --batch_size 256 512
    python -m scripts.benchmarks.gpu_fast run enlarge_batches --models "ConMIM L" --output out/gpu

The first compiles the blocks of one row's model and leaves the kernels in torch's cache on disk.
The section runs several of these beside each other before anything is timed: compiled one after
another they would take most of its time. The second runs some of the section's phases by
themselves.
"""

import argparse
import faulthandler
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from datasets import ImageDataset, TrainBatchSampler, build_loader
from engine_for_finetuning import Classification
from modeling_finetune import Block
from modeling_pretrain import PretrainMethod
from modeling_targets import DalleEncoder, VisualTokenizer, VisualTokens
from optim_factory import param_groups
from scripts.benchmarks.benchmark import gemm, make_variant, random_batch
from scripts.benchmarks.data import write_stand_in
from scripts.benchmarks.published import make_straightforward
from scripts.benchmarks.timing import Variant, synchronize
from scripts.gpu_check import Checks
from unimim.cli.models import build_classifier, build_method
from unimim.cli.options import parse
from unimim.data.device_decode import UndecodedImages, batch_decoder
from unimim.data.sources import PartSource, map_source
from unimim.data.views import build_pretrain_transform, image_mean_std
from unimim.engine.compiling import compile_blocks
from unimim.engine.monitor import count_flops, memory_gib, peak_flops
from unimim.engine.runner import GradientCheck
from unimim.engine.state import Normalize, with_mask_counts
from unimim.files import write_text

ROOT = Path(__file__).resolve().parents[2]
PRECISION = "bf16"
COUNTED = 2  # images that FLOPs are counted on
PIXELS = ("--input_size", "32", "--patch_size", "4")
VIT = ("embed_dim=32", "depth=2", "num_heads=2")
DECODER = ("decoder_embed_dim=32", "decoder_depth=2", "decoder_num_heads=2")
CONMIM = (*VIT, "projector_hidden_dim=32", "projector_out_dim=16")
SWIN = ("embed_dim=8", "depths=[1,1,1,1]", "num_heads=[1,2,2,4]")
RESNET = ("channels=[8,8,16,16]",)
VOCABULARY = ("vocab_size=64",)


@dataclass(frozen=True)
class Case:
    """A model to measure: its batch on a GPU, and what makes it tiny for a CPU."""

    name: str
    model: str
    batch: int
    tiny: tuple[str, ...] = VIT  # options of the model
    pixels: tuple[str, ...] = PIXELS
    stage: str = "pretrain"
    flags: tuple[str, ...] = ()
    short: tuple[str, ...] = ("depth=2",)  # as deep as it takes to have a block of every kind

    def args(self, *, tiny: bool, shorten: bool = False) -> Namespace:
        """The flags of a run of this model, with its recipe."""
        flags = [*self.flags, *(self.pixels if tiny else ())]
        sizes = (*(self.tiny if tiny else ()), *(self.short if shorten else ()))
        if sizes:
            flags += ["--model_kwargs", *sizes]
        if self.stage == "finetune":
            flags += ["--nb_classes", "10" if tiny else "1000"]
        return parse(self.stage, ["--model", self.model, *flags])


_mae = partial(Case, tiny=(*VIT, *DECODER), short=("depth=2", "decoder_depth=2"))
_semaim = partial(Case, tiny=(*VIT, "query_depth=2"), short=("depth=2", "query_depth=2"))
_tokens = partial(Case, tiny=(*VIT, *VOCABULARY))
CASES = {
    case.name: case
    for case in (  # in the order of their worth
        Case("ConMIM B", "conmim_base_patch16_224", 256, CONMIM),
        _mae("MAE B", "mae_base_patch16_224", 512),
        _semaim("SemAIM B", "semaim_base_patch16_224", 256),
        _tokens("SemanticMIM B, visual tokens", "semanticmim_beit_base_patch16_224", 256),
        Case("A2MIM ResNet-50", "a2mim_resnet50", 256, RESNET, ("--input_size", "64")),
        Case("ConMIM L", "conmim_large_patch16_224", 128, CONMIM),
        _mae("MAE L", "mae_large_patch16_224", 256),
        _semaim("SemAIM L", "semaim_large_patch16_224", 128),
        Case("Fine-tuning BEiT's ViT-B", "beit_base_patch16_224", 256, stage="finetune"),
        Case("Fine-tuning MAE's ViT-B", "vit_base_patch16_224", 256, stage="finetune"),
        Case(
            "Fine-tuning, drop_path 0",
            "vit_base_patch16_224",
            256,
            stage="finetune",
            flags=("--drop_path", "0"),
        ),
        _mae("SemMAE B", "semmae_base_patch16_224", 512),
        _tokens("BEiT B", "beit_base_patch16_224_8k_vocab", 256),
        Case("SemanticMIM B, HOG", "semanticmim_maskfeat_base_patch16_224", 256),
        Case("MaskFeat B", "maskfeat_base_patch16_224", 256),
        Case("SimMIM ViT-B", "simmim_vit_base_patch16_224", 256),
        Case("SimMIM Swin-B", "simmim_swin_base", 256, SWIN, ("--input_size", "64")),
        Case("A2MIM ViT-B", "a2mim_vit_base_patch16_224", 256),
        _mae("SemMAE L", "semmae_large_patch16_224", 256),
        _tokens("SemanticMIM L, visual tokens", "semanticmim_beit_large_patch16_224", 128),
        Case("SemanticMIM L, HOG", "semanticmim_maskfeat_large_patch16_224", 128),
        _tokens("BEiT L", "beit_large_patch16_224_8k_vocab", 128),
        Case("MaskFeat L", "maskfeat_large_patch16_224", 128),
    )
}
# whole, but of 32 pixels everywhere: many small kernels
LAUNCHES = Case("MAE Ti, 32 px", "mae_tiny_patch16_224", 256, ())
COMPILED = (
    "ConMIM B", "MAE B", "SemAIM B", "SemanticMIM B, HOG", "ConMIM L", "MAE L", "BEiT B",
    "Fine-tuning MAE's ViT-B", "MaskFeat B", "Fine-tuning BEiT's ViT-B", "SimMIM ViT-B",
    "A2MIM ViT-B",
)  # fmt: skip
LATER = ("SemMAE L", "SemanticMIM L, visual tokens", "SemanticMIM L, HOG", "BEiT L", "MaskFeat L")
PLAIN = ("ConMIM B", "MAE B", "SemAIM B", "SemanticMIM B, visual tokens", "A2MIM ResNet-50")
PROFILED = ("ConMIM B", "MAE B", "SemAIM B")
ENLARGED = ("ConMIM B", "MAE B", "SemAIM B", "ConMIM L", "MAE L")
SLOW = ("ConMIM L", "MAE L", "SemAIM L", *LATER)  # one step a round is enough
KINDS = {  # of kernels, by what is found in their names; the first that fits
    "compiled": ("triton_",),
    "optimizer and norms of gradients": ("multi_tensor", "foreach", "fused_adam", "FusedAdam"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "normalization": ("layer_norm", "LayerNorm", "GammaBeta", "batch_norm", "bn_"),
    "matrix products": (
        "gemm",
        "nvjet",
        "splitK",
        "cutlass",
        "xmma",
        "cublas",
        "cudnn",
        "fprop",
        "dgrad",
        "wgrad",
    ),
    "softmax": ("softmax", "SoftMax"),
    "reductions": ("reduce",),
    "copies": ("copy", "Copy", "Memcpy", "Memset"),
    "elementwise": ("elementwise",),
}


@dataclass
class Bench:
    """What the measurements share."""

    checks: Checks
    gemm: Variant
    images: Path  # a folder for made JPEGs
    peak: float | None  # FLOP/s by the data sheet
    flops: dict[tuple[str, bool], float] = field(
        default_factory=dict
    )  # of an image, by case and whether plain
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # further tables, by title

    @property
    def device(self) -> torch.device:
        return self.checks.device

    @property
    def tiny(self) -> bool:
        return self.checks.tiny

    def of(self, names: tuple[str, ...]) -> list[Case]:
        """The cases of these names, as far as --models asks for them."""
        asked = self.checks.models or tuple(CASES)
        return [CASES[name] for name in names if name in asked]


def run(checks: Checks) -> None:
    """Run the section: peak, FLOPs while kernels are compiled, then rows in the order of their
    worth."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            checks,
            gemm(checks.device, PRECISION, 256 if checks.tiny else None),
            Path(folder),
            peak_flops(checks.device, PRECISION),
        )
        phases = (
            measure_gemm, prepare, measure_eager, measure_compiled, profile_steps, measure_plain,
            measure_loading, measure_matmul_precision, enlarge_batches, measure_later,
            measure_launches,
        )  # fmt: skip
        try:
            for phase in phases:
                checks.attempt(phase.__name__, partial(phase, bench))
                write_tables(bench)
        finally:
            torch.set_float32_matmul_precision(precision)
            release(checks.device)


# --------------------------------------------------------------------------------------------------
# Models and their steps


def build(case: Case, device: torch.device, args: Namespace, plain: bool = False) -> nn.Module:
    """The task of a case on the device; a method that predicts words has a tokenizer with random
    weights."""
    args.attn = "eager" if plain else args.attn
    network = make_on(
        device, partial(build_classifier if case.stage == "finetune" else build_method, args)
    )
    if case.stage == "finetune":
        return Classification(network, args, device)
    if isinstance(getattr(network, "target", None), VisualTokens):
        give_tokenizer(network, device)
    if plain:
        make_straightforward(network)
    return network


def make_on(device: torch.device, make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` makes, on the device at once: random numbers for its weights take a CPU
    seconds."""
    try:
        with torch.device(device):
            module = make()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # a constructor that mixes devices
        module = make()
    average = getattr(module, "average", None)
    if average is not None:
        average.module.to(device)
    return module.to(device)


def give_tokenizer(method: PretrainMethod, device: torch.device) -> None:
    """A tokenizer as from a file, whose words mean nothing."""
    sizes = {"n_hid": 8 if device.type == "cpu" else 256, "vocab_size": method.lm_head.out_features}
    method.target.tokenizer = VisualTokenizer(make_on(device, partial(DalleEncoder, **sizes)))
    method.views = ("image", "image_second", *method.views[2:])


def make_batch(task: nn.Module, args: Namespace, size: int, device: torch.device) -> dict[str, Any]:
    """Random images on the device, with labels for a classifier and masks by the recipe for a
    method."""
    with torch.device(device):
        if isinstance(task, PretrainMethod):
            return random_batch(task, size, device, mask_share(args))
        side = args.input_size or task.model.patch_embed.img_size[0]
        return {
            "image": torch.randn(size, 3, side, side),
            "label": torch.randint(args.nb_classes, (size,)),
        }


def mask_share(args: Namespace) -> float:
    """What share of the patches the recipe masks."""
    return 75 / 196 if args.mask_type == "block" else args.mask_ratio


def make_step(
    case: Case,
    size: int,
    device: torch.device,
    *,
    tiny: bool,
    variant: str = "eager",
    shorten: bool = False,
) -> Variant:
    """A training step of a case with a batch of `size`; variants are eager, compiled, graphs,
    captured and plain."""
    args = case.args(tiny=tiny, shorten=shorten)
    plain = variant == "plain"
    task = build(case, device, args, plain)
    groups = None
    if case.stage == "finetune":
        groups = param_groups(task.model, args.weight_decay, args.layer_decay)
    if variant == "captured":
        groups = [group | {"capturable": True} for group in param_groups(task, args.weight_decay)]
    if variant == "compiled":
        compile_blocks(task, task.ema and task.ema.module, task.frozen)
    if variant == "graphs":
        for block in task.modules():
            if isinstance(block, Block):
                block.compile(dynamic=False, mode="reduce-overhead")
    made = make_variant(
        case.name,
        task,
        make_batch(task, args, size, device),
        PRECISION,
        fused=not plain,
        groups=groups,
    )
    if variant == "graphs":
        made.step = partial(step_of_graphs, made.step)
    if variant == "captured":
        made.step = captured(made.step)
    return made


def step_of_graphs(step: Callable[[], object]) -> object:
    """A step whose graphs may write over what those of the step before gave."""
    torch.compiler.cudagraph_mark_step_begin()
    return step()


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The whole step as one CUDA graph, whose replay takes a single launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GradientCheck.steps + 2):  # whose hooks are gone by then
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def release(device: torch.device) -> None:
    """Give back what the last model held: memory and compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_times(
    step: Callable[[], object], device: torch.device, rounds: int, steps: int
) -> list[float]:
    """Seconds of a step, one number a round of several in a row, as in training."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        times.append((time.perf_counter() - begin) / steps)
    return times


def measure_step(
    bench: Bench, case: Case, variant: str, size: int, *, steps: int = 2, tiny: bool | None = None
) -> dict[str, Any]:
    """One row: a variant of a case with a batch of `size`. What does not fit the memory raises."""
    device = bench.device
    release(device)
    torch._dynamo.utils.counters.clear()
    made = make_step(case, size, device, tiny=bench.tiny if tiny is None else tiny, variant=variant)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = step_times(made.step, device, 1, 1)[0]
    step_times(made.step, device, 1, 1 if bench.tiny else 3)
    times = step_times(made.step, device, 2 if bench.tiny else 5, 1 if bench.tiny else steps)
    peak_gib = memory_gib(device)
    seconds = statistics.median(times)
    row = {
        "model": case.name, "variant": variant, "batch": size, "ms_per_step": 1e3 * seconds,
        "spread": (max(times) - min(times)) / seconds, "images_per_s": size / seconds,
        "peak_gib": peak_gib, "first_step_s": first,
    }  # fmt: skip
    row |= rates(bench, bench.flops.get((case.name, variant == "plain")), row["images_per_s"])
    if variant in ("compiled", "graphs"):
        row |= compilation()
    return row


def rates(bench: Bench, flops: float | None, images_per_s: float) -> dict[str, float | None]:
    """What images/s come to where an image takes `flops`; the matrix product is timed now, at the
    same clock."""
    now = bench.gemm.flops / statistics.median(step_times(bench.gemm.step, bench.device, 5, 1))
    if flops is None:
        return {
            "gflop_per_image": None,
            "tflops": None,
            "mfu": None,
            "gemm_tflops": now / 1e12,
            "gemm_share": None,
        }
    return {
        "gflop_per_image": flops / 1e9,
        "tflops": images_per_s * flops / 1e12,
        "mfu": None if bench.peak is None else images_per_s * flops / bench.peak,
        "gemm_tflops": now / 1e12,
        "gemm_share": images_per_s * flops / now,
    }


def compilation() -> dict[str, int]:
    """How many graphs were compiled since the counters were cleared, and how many of them lay in
    the cache."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "cache_hits": counters["inductor"]["fxgraph_cache_hit"],
        "cache_misses": counters["inductor"]["fxgraph_cache_miss"],
    }


def fitting(bench: Bench, case: Case, variant: str, size: int, **options) -> dict[str, Any]:
    """The row of the largest batch that fits the memory: `size`, or a half of it, or a quarter
    ..."""
    while True:
        try:
            return measure_step(bench, case, variant, size, **options)
        except torch.OutOfMemoryError:
            if size < 16:
                raise
        size //= 2  # out here, where nothing holds the failed step's memory any more


def batch_of(bench: Bench, case: Case) -> int:
    """The batch of the case's eager row, or what it starts from."""
    found = [
        row["batch"] for row in bench.rows if (row["model"], row["variant"]) == (case.name, "eager")
    ]
    return found[0] if found else 4 if bench.tiny else case.batch


def measure_row(bench: Bench, case: Case, variant: str, seconds: float) -> None:
    """Record a row of the main table."""

    def one() -> dict[str, Any]:
        steps = 1 if case.name in SLOW else 2
        row = fitting(bench, case, variant, batch_of(bench, case), steps=steps)
        bench.rows.append(row)
        return row

    bench.checks.attempt(f"{case.name}, {variant}", one, seconds=seconds)


# --------------------------------------------------------------------------------------------------
# Phases


def measure_gemm(bench: Bench) -> dict[str, float]:
    """The peak that shares are of: a large matrix product, for a second or so."""
    step_times(bench.gemm.step, bench.device, 1, 3)
    times = step_times(bench.gemm.step, bench.device, 5 if bench.tiny else 40, 1)
    rate = bench.gemm.flops / statistics.median(times) / 1e12
    peak = None if bench.peak is None else bench.peak / 1e12
    bench.notes["Peak"] = [
        {"matrix product, TFLOP/s": rate, "best, TFLOP/s": bench.gemm.flops / min(times) / 1e12}
    ]
    return {"tflops": rate, "best": bench.gemm.flops / min(times) / 1e12, "data_sheet": peak}


def prepare(bench: Bench) -> None:
    """Count FLOPs and make JPEGs while other processes fill the cache of compiled kernels."""
    checks, begin = bench.checks, time.monotonic()
    processes = {}
    if not bench.tiny and checks.time_left() > 5 * len(CASES):
        processes = {
            name: compile_ahead(bench, name, len(COMPILED))
            for name in COMPILED
            if CASES[name] in bench.of(COMPILED)
        }
    try:
        for case in early_cases(bench):
            forms = (False, True) if case.name in PLAIN else (False,)
            for plain in forms:
                checks.attempt(f"{case.name}, FLOPs", partial(count, bench, case, plain), seconds=2)
        checks.attempt("JPEGs", partial(write_stand_in, bench.images), seconds=10)
        end = time.monotonic() + 0.3 * checks.time_left()
        for process in processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
    finally:
        for name, process in processes.items():
            code = process.poll()
            if code is None:  # with its own workers
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            checks.record(
                f"{name}, compiled ahead",
                exit_code=code,
                seconds=round(time.monotonic() - begin, 1),
            )


def compile_ahead(bench: Bench, name: str, processes: int) -> subprocess.Popen:
    """Start a process that compiles one case's blocks."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [
        sys.executable,
        "-m",
        "scripts.benchmarks.gpu_fast",
        "compile",
        name,
        "--device",
        str(bench.device),
    ]
    with open(bench.checks.output / f"compile-{file_name(name)}.log", "w") as log:
        return subprocess.Popen(
            [
                *command,
                "--batch_size",
                str(batch_of(bench, CASES[name])),
                *(["--tiny"] if bench.tiny else []),
            ],
            cwd=ROOT,
            env=os.environ
            | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def file_name(name: str) -> str:
    """The name of a case as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in name)


def early_cases(bench: Bench) -> list[Case]:
    """The cases that are worth the first minutes; with tiny sizes all of them."""
    return bench.of(tuple(name for name in CASES if bench.tiny or name not in LATER))


def count(bench: Bench, case: Case, plain: bool, tiny: bool | None = None) -> None:
    """FLOPs of an image in a whole step, counted on a few images: they are in proportion to the
    images."""
    release(bench.device)
    tiny = bench.tiny if tiny is None else tiny
    made = make_step(case, COUNTED, bench.device, tiny=tiny, variant="plain" if plain else "eager")
    bench.flops[case.name, plain] = count_flops(made.step) / COUNTED


def count_flops_of_rows(bench: Bench) -> None:
    """Count the rows' FLOPs and keep them in OUTPUT/flops.json for other processes."""
    path = bench.checks.output / "flops.json"
    for case in bench.of(tuple(CASES)):
        bench.checks.attempt(f"{case.name}, FLOPs", partial(count, bench, case, False), seconds=3)
        kept = {name: flops for (name, plain), flops in bench.flops.items() if not plain}
        write_text(path, json.dumps(kept))


def counted_flops(output: Path) -> dict[tuple[str, bool], float]:
    """What `count_flops_of_rows` has kept."""
    path = output / "flops.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {(name, False): flops for name, flops in kept.items()}


def measure_eager(bench: Bench) -> None:
    for case in early_cases(bench):
        measure_row(bench, case, "eager", seconds=5)


def measure_later(bench: Bench) -> None:
    """The cases that the first minutes left out."""
    for case in bench.of(() if bench.tiny else LATER):
        if (case.name, False) not in bench.flops:
            check = f"{case.name}, FLOPs"
            bench.checks.attempt(check, partial(count, bench, case, False), seconds=8)
        measure_row(bench, case, "eager", seconds=6)


def measure_compiled(bench: Bench) -> None:
    """Not with tiny sizes: a CPU compiles for longer than all else takes."""
    for case in bench.of(() if bench.tiny else COMPILED):
        measure_row(bench, case, "compiled", seconds=12)


def measure_plain(bench: Bench) -> None:
    for case in bench.of(PLAIN):
        measure_row(bench, case, "plain", seconds=6)


def profile_steps(bench: Bench) -> None:
    """Plain steps and, on a GPU, compiled ones: what is left there is what to work on."""
    for variant in ("eager",) if bench.tiny else ("compiled", "eager"):
        for case in bench.of(PROFILED):
            run = partial(profile_step, bench, case, variant)
            bench.checks.attempt(f"{case.name}, {variant}, profile", run, seconds=8)


def profile_step(bench: Bench, case: Case, variant: str) -> dict[str, Any]:
    """Where the time of one step goes: the ten longest kernels, the kinds of kernels, the share
    without any."""
    device = bench.device
    release(device)
    step = make_step(case, batch_of(bench, case), device, tiny=bench.tiny, variant=variant).step
    step_times(step, device, 1, 3)
    seconds = statistics.median(step_times(step, device, 3, 1))
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        synchronize(device)
    averages = profiler.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    path = bench.checks.output / f"profile-{file_name(case.name)}-{variant}.txt"
    path.write_text(averages.table(sort_by=order, row_limit=30, max_name_column_width=100))
    # a kernel and what launched it both come with its time: only kernels count, no ranges that the
    # profiler adds
    kernels = [
        (event.key, getattr(event, order) / 1e3, event.count)
        for event in averages
        if not on_gpu
        or (
            event.device_type == DeviceType.CUDA
            and not event.is_user_annotation
            and "#" not in event.key
        )
    ]
    kernels.sort(key=lambda kernel: -kernel[1])
    whole = sum(milliseconds for _, milliseconds, _ in kernels)
    kinds = dict.fromkeys([*KINDS, "others"], 0.0)
    for name, milliseconds, _ in kernels:
        kinds[kind_of(name)] += 100 * milliseconds / whole
    top = [
        {
            "kernel": name[:120],
            "ms": round(ms, 3),
            "percent": round(100 * ms / whole, 1),
            "calls": calls,
        }
        for name, ms, calls in kernels[:10]
    ]
    shares = {kind: round(share, 1) for kind, share in kinds.items() if share >= 0.05}
    bench.notes[f"Kernels of a step: {case.name}, {variant}"] = top
    bench.notes.setdefault("Kinds of kernels, percent of their time", []).append(
        {"step": f"{case.name}, {variant}", **shares}
    )
    idle = 1 - whole / 1e3 / seconds
    return {
        "kernel_ms": whole,
        "ms_per_step": 1e3 * seconds,
        "idle_share": idle,
        "kinds": shares,
        "top": top,
    }


def kind_of(kernel: str) -> str:
    """The kind of a kernel of this name."""
    return next(
        (kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "others"
    )


def enlarge_batches(bench: Bench) -> None:
    """Double batches as long as that gains something and the next one should fit the memory."""
    variants = ("eager",) if bench.tiny else ("eager", "compiled")
    for case in bench.of(ENLARGED[:1] if bench.tiny else ENLARGED):
        for variant in variants:
            enlarge(bench, case, variant)


def enlarge(bench: Bench, case: Case, variant: str) -> None:
    """Record rows of one variant with twice the batch of the one before, from that of the main
    table on."""
    memory = float("inf")
    if bench.device.type == "cuda":
        memory = torch.cuda.get_device_properties(bench.device).total_memory / 2**30
    if not rows_of(bench, case, variant):
        measure_row(bench, case, variant, seconds=8)
    found = rows_of(bench, case, variant)
    doublings = 1 if bench.tiny else 3
    while found and len(found) <= doublings and 1.95 * found[-1]["peak_gib"] < memory:
        before = len(found)
        check = f"{case.name}, {variant}, twice the batch"
        bench.checks.attempt(check, partial(double, bench, case, variant, found), seconds=10)
        if len(found) == before or found[-1]["images_per_s"] < 1.01 * found[-2]["images_per_s"]:
            break


def rows_of(bench: Bench, case: Case, variant: str) -> list[dict[str, Any]]:
    """What the main table has of one variant of a case."""
    return [row for row in bench.rows if (row["model"], row["variant"]) == (case.name, variant)]


def double(bench: Bench, case: Case, variant: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """A row with twice the batch of the last one of `found`, appended to it; none if that does not
    fit the memory."""
    size = 2 * found[-1]["batch"]
    try:
        row = measure_step(bench, case, variant, size, steps=1)
    except torch.OutOfMemoryError:
        return {"model": case.name, "variant": variant, "batch": size, "fits": False}
    found.append(row)
    bench.notes.setdefault("Larger batches", []).append(row)
    return row


def measure_matmul_precision(bench: Bench) -> None:
    """What float32 products with and without TF32, and an autocast map of the order, cost
    SemAIM."""
    case = CASES["SemAIM B"]
    rows = bench.notes.setdefault("Precision of float32 products", [])

    def one(products: str, order: str) -> dict[str, Any]:
        made = replace(case, flags=("--order_precision", order))
        torch.set_float32_matmul_precision(products)
        try:
            row = fitting(bench, made, "eager", batch_of(bench, case))
        finally:
            torch.set_float32_matmul_precision("high")
        rows.append(row | {"float32_matmul": products, "order_precision": order})
        return rows[-1]

    for products, order in (("high", "fp32"), ("highest", "fp32"), ("high", "auto")):
        check = f"{case.name}, float32 products {products}, order {order}"
        bench.checks.attempt(check, partial(one, products, order), seconds=6)


def measure_launches(bench: Bench) -> None:
    """A model so small that launching kernels takes longer than they do: eager, compiled, each
    block as a CUDA graph, the whole step as one."""
    rows = bench.notes.setdefault("Small kernels", [])
    variants = ("eager",) if bench.tiny else ("eager", "captured", "compiled", "graphs")
    bench.checks.attempt(
        f"{LAUNCHES.name}, FLOPs", partial(count, bench, LAUNCHES, False, tiny=True), seconds=2
    )
    size = 4 if bench.tiny else LAUNCHES.batch

    def one(variant: str) -> dict[str, Any]:
        rows.append(measure_step(bench, LAUNCHES, variant, size, steps=10, tiny=True))
        return rows[-1]

    for variant in variants:
        wanted = 5 if variant in ("eager", "captured") else 12
        bench.checks.attempt(f"{LAUNCHES.name}, {variant}", partial(one, variant), seconds=wanted)


# --------------------------------------------------------------------------------------------------
# Loading


def measure_loading(bench: Bench) -> None:
    """JPEGs through the loader of a pre-training run, decoded by the CPU and by the device, alone
    and into MAE's training step."""
    for decode, train in itertools.product(("cpu", "gpu"), (False, True)):
        check = "JPEGs into MAE B" if train else "JPEGs alone"
        check += ", --decode gpu" if decode == "gpu" else ""
        run = partial(load_images, bench, train=train, decode=decode)
        bench.checks.attempt(check, run, seconds=15 if train else 12)


def load_images(bench: Bench, *, train: bool, decode: str) -> dict[str, Any]:
    """Images/s from JPEGs, made ones of 500 x 375 pixels unless `run` was given others, to
    normalized batches on the device; with `train`, through a step too."""
    case, device = CASES["MAE B"], bench.device
    release(device)
    workers = 2 if bench.tiny else len(os.sched_getaffinity(0))
    size = 4 if bench.tiny else 128
    args = case.args(tiny=bench.tiny)
    task = build(case, device, args)
    batch = make_batch(task, args, size, device)
    step = make_variant(case.name, task, batch, PRECISION, fused=True).step
    loader = jpeg_loader(bench.images, task, size, workers, decode)
    normalize = Normalize(image_mean_std(args), device, task.raw_views)
    try:
        decoded = batch_decoder(loader.dataset, device)
    except ValueError as error:  # no nvJPEG here
        return {"skipped": str(error)}
    step()
    eaten = None
    if (
        train
    ):  # by the same step where nothing is loaded: a batch as small as this may be launch-bound
        rounds = step_times(step, device, 3, 1 if bench.tiny else 4)
        eaten = size / statistics.median(rounds)
    batches, ready = iter(loader), 2 * workers  # what workers had made before they had to keep up
    begin, done = time.perf_counter(), 0
    for number, loaded in enumerate(itertools.islice(batches, 24 if bench.tiny else None)):
        if number == ready:
            synchronize(device)
            begin = time.perf_counter()
        batch.update(normalize(with_mask_counts(decoded(loaded))))
        if train:
            step()
        done = number + 1 - ready
        if done >= workers and time.perf_counter() - begin > (0.0 if bench.tiny else 4.0):
            break
    synchronize(device)
    seconds = time.perf_counter() - begin
    del batches, loader  # ends the workers
    result = {
        "loading": "into MAE B's step" if train else "alone", "decode": decode,
        "workers": workers, "batch": size,
        "images_per_s": done * size / seconds,
        "images_per_s_per_worker": done * size / seconds / workers, "model_eats": eaten,
    }  # fmt: skip
    bench.notes.setdefault("JPEGs of 500 x 375 pixels", []).append(result)
    return result


def jpeg_loader(
    root: Path, method: PretrainMethod, size: int, workers: int, decode: str
) -> DataLoader:
    """Endless enough batches of a few JPEGs, each crop another."""
    if not (root / "train_map.txt").is_file():
        write_stand_in(root)
    transform = build_pretrain_transform(
        method.views,
        input_size=method.image_size,
        grid=method.patch_embed.grid_size,
        noise_size=method.noise_size,
        crop_scale=(0.2, 1.0),
    )
    source = map_source(root, "train")
    images = size * 4096
    dataset_class = {"cpu": ImageDataset, "gpu": UndecodedImages}[decode]
    dataset = dataset_class(PartSource(source, np.arange(images) % len(source)), transform, seed=0)
    return build_loader(dataset, TrainBatchSampler(images, size), num_workers=workers, pin_mem=True)


# --------------------------------------------------------------------------------------------------
# Tables


def write_tables(bench: Bench) -> None:
    """Replace OUTPUT/fast.md by what is known so far."""
    lines = [f"## {heading(bench.device)}", "", *main_table(bench)]
    for title, rows in bench.notes.items():
        lines += ["", f"### {title}", "", *table(rows)]
    write_text(bench.checks.output / "fast.md", "\n".join(lines) + "\n")


def heading(device: torch.device) -> str:
    """Device, driver and versions."""
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    if device.type != "cuda":
        return f"A training step on a CPU, {torch.get_num_threads()} threads, {versions}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=10
        ).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    name = torch.cuda.get_device_name(device)
    return f"A training step on {name}, driver {driver}, CUDA {torch.version.cuda}, {versions}"


def main_table(bench: Bench) -> list[str]:
    """A row for each model: images/s of each variant, then the rates of the fastest one of ours,
    and memory."""
    found = {(row["model"], row["variant"]): row for row in bench.rows}
    rows = []
    for case in CASES.values():
        ours = [
            found[case.name, variant]
            for variant in ("eager", "compiled")
            if (case.name, variant) in found
        ]
        best = max(ours, key=lambda row: row["images_per_s"], default={})
        row = {
            "model": case.name,
            "batch": best.get("batch"),
            "GFLOP an image": best.get("gflop_per_image"),
        }
        for variant in ("plain", "eager", "compiled"):
            row[f"{variant}, images/s"] = found.get((case.name, variant), {}).get("images_per_s")
        row |= {
            "TFLOP/s": best.get("tflops"),
            "MFU": best.get("mfu"),
            "of the product": best.get("gemm_share"),
        }
        for variant in ("plain", "eager", "compiled"):
            row[f"{variant}, GiB"] = found.get((case.name, variant), {}).get("peak_gib")
        rows.append(row)
    return table(rows)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table, with the columns of all rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(cell(row.get(name)) for name in columns)} |" for row in rows]


def cell(value: Any) -> str:
    """A value as a table shows it: three digits or all before the point."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value).replace("|", "/")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


STEPS = (
    count_flops_of_rows, measure_eager, measure_compiled, measure_plain, measure_loading,
    measure_matmul_precision, enlarge_batches, measure_later, measure_launches,
)  # fmt: skip
PHASES = {phase.__name__: phase for phase in STEPS}


def compile_case(args: argparse.Namespace) -> None:
    """Compile one case: two steps of a model as short as it can be, whose blocks are those of the
    whole one."""
    device = torch.device(args.device)
    case = (CASES | {LAUNCHES.name: LAUNCHES})[args.case]
    tiny = args.tiny or case is LAUNCHES
    for size in args.batch_size:
        release(device)
        torch._dynamo.utils.counters.clear()
        begin = time.monotonic()
        made = make_step(
            case, size, device, tiny=tiny, variant=args.variant, shorten=case is not LAUNCHES
        )
        step_times(made.step, device, 2, 1)
        print(f"{case.name}, {size}: {compilation()}, {time.monotonic() - begin:.1f} s", flush=True)


def run_phases(args: argparse.Namespace) -> None:
    """Run phases by themselves, with the FLOPs that an earlier process counted."""
    device = torch.device(args.device)
    checks = Checks(
        device, args.output, deadline=0.0, tiny=device.type == "cpu", section="fast",
        models=tuple(args.models),
    )  # fmt: skip
    wait_for(args.gate)
    checks.deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        product = gemm(device, PRECISION, 256 if checks.tiny else None)
        images = args.data_path or Path(folder)
        bench = Bench(checks, product, images, peak_flops(device, PRECISION))
        bench.flops |= counted_flops(args.output)
        for name in args.phases:
            checks.attempt(name, partial(PHASES[name], bench))


def wait_for(gate: Path | None) -> None:
    """Return when the file `gate` exists: what is imported by then does not disturb what another
    process measures."""
    while gate is not None and not gate.exists():
        time.sleep(0.05)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a process that measures by itself."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--seconds", type=float, default=120.0, help="what it may take")
    parser.add_argument("--data_path", type=Path, help="a folder with train_map.txt: its images")
    parser.add_argument("--gate", type=Path, help="begins when this file exists")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    ahead = commands.add_parser("compile", help="compiles one row's model")
    ahead.add_argument("case", choices=[*CASES, LAUNCHES.name])
    ahead.add_argument("--device", default="cuda")
    ahead.add_argument("--batch_size", type=int, nargs="+", default=[256])
    ahead.add_argument("--variant", choices=("compiled", "graphs"), default="compiled")
    ahead.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    ahead.set_defaults(run=compile_case)
    phases = commands.add_parser("run", help="runs phases by themselves")
    phases.add_argument("phases", nargs="+", choices=PHASES)
    phases.add_argument("--models", nargs="+", default=[], help="rows; without: all")
    add_run_arguments(phases)
    phases.set_defaults(run=run_phases)
    args = parser.parse_args(argv)
    faulthandler.enable()
    torch.set_float32_matmul_precision("high")
    args.run(args)


if __name__ == "__main__":
    main()
