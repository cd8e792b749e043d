"""Measure segmentation and detection: attention with a bias table, sliding windows, RoIAlign.

Called by `benchmark.py attention`, `benchmark.py windows` and `benchmark.py roi_align`.
"""

import argparse
import ctypes
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.benchmarks.timing import Variant, interleave, speedup
from unimim.engine.monitor import keep_freed_memory
from unimim.openmmlab.vit_backbone import GridAttention

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "semantic_segmentation/configs/beit/beit_upernet_base_512_160k_ade20k.py"


def add_parsers(commands: argparse._SubParsersAction, formatter: type) -> None:
    """Add the three subcommands of `benchmark.py`."""
    attention = commands.add_parser(
        "attention",
        help="attention with a bias table of its own, fused against explicit",
        formatter_class=formatter,
    )
    attention.add_argument("--input_size", type=int, default=640)
    attention.add_argument("--patch_size", type=int, default=16)
    attention.add_argument("--width", type=int, default=768)
    attention.add_argument("--heads", type=int, default=12)
    attention.add_argument("--batch_size", type=int, default=1)
    attention.add_argument("--train", action="store_true", help="include the backward pass")
    attention.set_defaults(run=run_attention)
    windows = commands.add_parser(
        "windows", help="sliding windows of a segmentor", formatter_class=formatter
    )
    windows.add_argument("--config", type=Path, default=CONFIG)
    windows.add_argument("--image", type=int, nargs=2, default=(512, 853), metavar=("H", "W"))
    windows.add_argument("--window_batch", type=int, default=4)
    windows.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    windows.set_defaults(run=run_windows)
    roi_align = commands.add_parser(
        "roi_align",
        help="torchvision's operator against mmcv's, if that is compiled",
        formatter_class=formatter,
    )
    roi_align.set_defaults(run=run_roi_align)
    for parser in (attention, windows, roi_align):
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--rounds", type=int, default=5)


def peak_memory(step: Callable[[], object], device: torch.device) -> float:
    """Return by how many MiB a step raises the peak of memory.

    On a GPU this is torch's memory, on a CPU the resident memory of the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    keep_freed_memory(False)
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(kind: str) -> float:
    """Return this process's resident memory in MiB: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 2**10


def measure(
    title: str,
    steps: dict[str, Callable[[], object]],
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Print time and peak memory of each step, absolute and relative to the first."""
    variants = [Variant(name, step, "fp32") for name, step in steps.items()]
    interleave(variants, args.rounds, device)
    print(f"{title}, torch {torch.__version__}, {args.threads} threads")
    memory = [peak_memory(variant.step, device) for variant in variants]
    for variant, mib in zip(variants, memory, strict=True):
        median = 1e3 * statistics.median(variant.seconds)
        times = f"{median:9.1f} ms {1 / speedup(variants[0], variant):5.2f}x"
        print(f"{variant.name:16s} {times} {mib:9.1f} MiB peak memory {mib / memory[0]:5.2f}x")


def pick_device(threads: int) -> torch.device:
    """Return the GPU if there is one, else the CPU with this number of threads."""
    torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_attention(args: argparse.Namespace) -> None:
    """Measure explicit and fused attention with a bias table."""
    device = pick_device(args.threads)
    grid = (args.input_size // args.patch_size,) * 2
    tokens = torch.randn(args.batch_size, 1 + grid[0] * grid[1], args.width, device=device)
    run = with_gradient if args.train else without_gradient
    steps = {}
    for name, kernel in (("explicit", "eager"), ("fused", "sdpa")):
        layer = GridAttention(
            args.width,
            args.heads,
            qkv_bias=True,
            k_bias=False,
            attn_drop=0.0,
            proj_drop=0.0,
            grid=grid,
            kernel=kernel,
        )
        steps[name] = partial(run, layer.to(device), tokens)
    shape = f"{args.batch_size} x {tokens.shape[1]} tokens, {args.heads} heads"
    measure(f"attention, {args.input_size} px, {shape}", steps, args, device)


@torch.no_grad()
def without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    """Run the forward pass alone."""
    return layer(x)


def with_gradient(layer: nn.Module, x: Tensor) -> None:
    """Run forward and backward pass."""
    layer(x).sum().backward()
    layer.zero_grad(set_to_none=True)


def run_windows(args: argparse.Namespace) -> None:
    """Measure sliding-window inference, one window and several at a time."""
    from semantic_segmentation.task import TASK
    from unimim.openmmlab import runner

    runner.prepare(TASK, "none")
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    flags = argparse.Namespace(
        config=args.config,
        cfg_options=args.cfg_options,
        launcher="none",
        work_dir="",
        data_root=None,
    )
    device = pick_device(args.threads)
    cfg = runner.load_config(flags)
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device).eval()
    image = torch.randn(1, 3, *args.image, device=device)

    @torch.no_grad()
    def windows(batch_size: int) -> Tensor:
        model.test_cfg.window_batch = batch_size
        return model.slide_inference(image, [{}])

    torch.testing.assert_close(windows(1), windows(args.window_batch), atol=1e-3, rtol=1e-3)
    steps = {f"{number} at a time": partial(windows, number) for number in (1, args.window_batch)}
    title = f"{args.config.stem}, one image of {args.image[0]} x {args.image[1]}"
    measure(title, steps, args, device)


def run_roi_align(args: argparse.Namespace) -> None:
    """Measure mmcv's and torchvision's RoIAlign."""
    from unimim.openmmlab import compat

    compat.require("mmcv")
    if not compat.has_compiled_operators():
        print("this mmcv has no compiled operators to compare torchvision's with")
        return
    from mmcv.ops import RoIAlign

    device = pick_device(args.threads)
    maps = torch.randn(2, 256, 64, 64, device=device)
    corners = torch.rand(512, 2, device=device) * 400
    rois = torch.cat([torch.arange(512, device=device)[:, None] % 2, corners, corners + 80], dim=1)
    steps = {
        "mmcv": partial(RoIAlign(7, 0.125, 0, use_torchvision=False), maps, rois),
        "torchvision": partial(RoIAlign(7, 0.125, 0, use_torchvision=True), maps, rois),
    }
    assert torch.allclose(steps["mmcv"](), steps["torchvision"](), atol=1e-4)
    measure("RoIAlign, 512 boxes", steps, args, device)
