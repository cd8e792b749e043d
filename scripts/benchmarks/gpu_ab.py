"""Ways of the engine against each other on a GPU, each question in a process of its own.

    python -m scripts.benchmarks.gpu_ab flex flex_steps --output out/gpu

`orders`: how many places of SemAIM's orders stay where TF32 or autocast makes their map;
    --data_path is a folder of folders of images with train_map.txt or val_map.txt.
`flex`: attention under a trained bias by FlexAttention, for several sizes of its tiles.
`flex_steps`: whole training steps with the fastest of these.

Every result is a line of OUTPUT/results.jsonl. On a CPU all of it runs with tiny sizes, but nothing
is compiled.
"""

import argparse
import faulthandler
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as pictures

import modeling_finetune
from modeling_finetune import attention_under_bias
from modeling_pretrain import SemAIM
from scripts.benchmarks.benchmark import gemm, make_variant
from scripts.benchmarks.gpu_fast import (
    CASES,
    PRECISION,
    Bench,
    add_run_arguments,
    build,
    counted_flops,
    make_batch,
    measure_step,
    step_times,
    wait_for,
)
from scripts.benchmarks.timing import Variant, synchronize
from scripts.gpu_check import Checks
from unimim.data.sources import map_source
from unimim.data.views import image_mean_std
from unimim.engine.monitor import peak_flops
from unimim.engine.state import Normalize
from unimim.files import write_text

TRAINED = 120  # steps of SemAIM before its orders are compared again
TILES: dict[str, dict[str, int]] = {  # options of FlexAttention's kernels
    "as it is": {"num_stages": 1},
    "32 x 32": {"num_stages": 1, "BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32},
    "32 x 64": {"num_stages": 1, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32},
    "64 x 64, 2 stages": {
        "num_stages": 2, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32,
    },
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# SemAIM's orders


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Float32 products of this precision for a while; convolutions are alike."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def read_images(root: Path, count: int, side: int) -> Tensor:
    """The first `count` images of a folder with train_map.txt or val_map.txt, uint8
    [N, 3, side, side]: the middle square of each, resized."""
    split = next(name for name in ("train", "val") if (root / f"{name}_map.txt").exists())
    source = map_source(root, split)
    images = []
    for index in range(min(count, len(source))):
        image = Image.open(io.BytesIO(source.read(index))).convert("RGB")
        image = pictures.pil_to_tensor(image)
        image = pictures.center_crop(image, [min(image.shape[1:])] * 2)
        images.append(pictures.resize(image, [side, side], antialias=True))
    return torch.stack(images)


def map_of_order(network: SemAIM, images: Tensor, precision: str) -> Tensor:
    """The map [B, N] that orders follow, made in float64, float32 ("highest"), TF32 ("high") or
    under autocast in bf16."""
    network.order_precision = "auto" if precision == PRECISION else "fp32"
    exact = precision == "fp64"
    with products("highest" if exact or precision == PRECISION else precision), torch.no_grad():
        if exact:
            network.double().eval()
            found = network.own_attention(images.double())
            network.float().train()
            return found
        with torch.autocast(images.device.type, torch.bfloat16):
            return network.attention_map(images)


def compare_orders(found: Tensor, reference: Tensor) -> dict[str, float]:
    """Two orders of [B, N]: what fraction of places holds the same patch, with and without places
    where the reference is tied, and what fraction of pairs of patches keeps its order."""
    found, reference = found.double(), reference.double()
    places = reference.argsort(dim=1, stable=True)
    same = places == found.argsort(dim=1, stable=True)
    values = reference.gather(1, places)
    gap = values.diff(dim=1)
    tied = F.pad(gap == 0, (1, 0)) | F.pad(gap == 0, (0, 1))
    before = (reference.unsqueeze(2) - reference.unsqueeze(1)).sign()
    after = (found.unsqueeze(2) - found.unsqueeze(1)).sign()
    ordered = before != 0
    error = (found - reference).abs().mean() / reference.std(1).mean()
    return {
        "equal_places": float(same.double().mean()),
        "equal_places_without_ties": float(same[~tied].double().mean()),
        "tied": float(tied.double().mean()),
        "equal_pairs": float((before == after)[ordered].double().mean()),
        "error_by_std": float(error),
    }


def orders(bench: Bench, args: argparse.Namespace) -> None:
    """SemAIM's orders of real images, with random weights and after some training."""
    device = bench.device
    case = CASES["SemAIM B"]
    flags = case.args(tiny=bench.tiny)
    network = build(case, device, flags)
    side = network.image_size[0]
    normalize = Normalize(image_mean_std(flags), device)
    folders = sorted(path.parent for path in args.data_path.glob("*/*_map.txt"))
    sets = {folder.name: folder for folder in dict.fromkeys(folders)}
    count, size = (4, 4) if bench.tiny else (96, 32)
    images = {
        name: normalize({"image": read_images(folder, count, side)})["image"]
        for name, folder in sets.items()
    }

    def compare(when: str) -> None:
        for name, some in images.items():
            reference = map_of_order(network, some, "highest")
            for precision in ("fp64", "high", PRECISION):
                found = map_of_order(network, some, precision)
                row = compare_orders(found, reference)
                bench.checks.record(
                    f"orders of {name}, {when}: {precision} against fp32", **row, images=len(some)
                )

    compare("random weights")
    batch = {"image": torch.cat(list(images.values()))[:size].contiguous()}
    batch |= {
        name: value
        for name, value in make_batch(network, flags, size, device).items()
        if name != "image"
    }
    step = make_variant(case.name, network, batch, PRECISION, fused=True).step
    for number in range(2 if bench.tiny else TRAINED):
        some = list(images.values())[number % len(images)]
        start = number * size % max(len(some) - size, 1)
        batch["image"].copy_(some[start : start + size].roll(number, 3))
        step()
    network.order_precision = "fp32"
    compare(f"{TRAINED} steps")


# --------------------------------------------------------------------------------------------------
# FlexAttention


def attention_step(kernel: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Forward and backward of attention with all gradients."""
    out = kernel(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """What `--attn sdpa` calls."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).unsqueeze(0))


def flex(bench: Bench, args: argparse.Namespace) -> None:
    """One layer of ViT-B under a trained bias; the fastest tiles are kept in OUTPUT/flex.json."""
    device = bench.device
    shape = (2, 2, 17, 16) if bench.tiny else (256, 12, 197, 64)
    q, k, v = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3))
    bias = torch.randn(shape[1], shape[2], shape[2], device=device).requires_grad_()
    inputs = (q, k, v, bias)
    kernels: dict[str, Callable[..., Tensor]] = {"sdpa": fused}
    expected = torch.autograd.grad(fused(*inputs).float().square().sum(), inputs)
    best: dict[str, Any] = {}

    def one(name: str) -> dict[str, Any]:
        begin = time.monotonic()
        kernel = kernels[name]
        found = torch.autograd.grad(kernel(*inputs).float().square().sum(), inputs)
        first_s = time.monotonic() - begin
        errors = [
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(found, expected, strict=True)
        ]
        step = partial(attention_step, kernel, inputs)
        step_times(step, device, 1, 3)
        times = step_times(step, device, 5, 5)
        row = {"ms": 1e3 * statistics.median(times), "first_s": first_s, "errors": errors}
        if name != "sdpa" and row["ms"] < best.get("ms", float("inf")):
            best.update(row, name=name)
            write_text(args.output / "flex.json", json.dumps(best))
        return row | {"ok": max(errors) < 0.05}

    bench.checks.attempt("attention under a bias: sdpa", partial(one, "sdpa"))
    for name, options in TILES.items() if device.type == "cuda" else ():
        torch._dynamo.reset()
        modeling_finetune.FLEX_OPTIONS = options
        kernels[name] = torch.compile(attention_under_bias, dynamic=False)
        bench.checks.attempt(f"attention under a bias: flex, {name}", partial(one, name), seconds=5)


def flex_steps(bench: Bench, args: argparse.Namespace) -> None:
    """Measure steps with `--attn flex`, in the tiles that `flex` found fastest, and `sdpa`."""
    path = args.output / "flex.json"
    if path.exists():
        modeling_finetune.FLEX_OPTIONS = TILES[json.loads(path.read_text())["name"]]
    kernels = ("sdpa", "flex") if bench.device.type == "cuda" else ("sdpa",)
    variants = ("eager",) if bench.tiny else ("eager", "compiled")
    for name, variant, kernel in itertools.product(("BEiT B", "ConMIM B"), variants, kernels):
        if variant == "compiled" and kernel == "sdpa":
            continue  # measured with the other rows
        case = replace(CASES[name], flags=("--attn", kernel))
        size = 4 if bench.tiny else case.batch
        run = partial(measure_step, bench, case, variant, size)
        check = f"{name}, {variant}, {kernel}"
        bench.checks.attempt(
            check, lambda run=run, kernel=kernel: {"attn": kernel} | run(), seconds=8
        )


QUESTIONS: dict[str, Callable[[Bench, argparse.Namespace], None]] = {
    "orders": orders,
    "flex": flex,
    "flex_steps": flex_steps,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="+", choices=QUESTIONS)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    faulthandler.enable()
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    checks = Checks(device, args.output, deadline=0.0, tiny=device.type == "cpu", section="ab")
    wait_for(args.gate)
    checks.deadline = time.monotonic() + args.seconds
    product: Variant = gemm(device, PRECISION, 256 if checks.tiny else None)
    bench = Bench(checks, product, args.output, peak_flops(device, PRECISION))
    bench.flops |= counted_flops(args.output)
    for name in args.questions:
        checks.attempt(name, partial(QUESTIONS[name], bench, args))
        synchronize(device)


if __name__ == "__main__":
    main()
