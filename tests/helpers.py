"""Tiny runs for tests: in this process, in spawned ranks, or as subprocesses."""

import io
import os
import signal
import struct
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image
from tensorboardX.proto import event_pb2
from torch import Tensor

import modeling_pretrain  # noqa: F401  (registers the methods)
from datasets import build_dataset
from engine_for_finetuning import Classification
from engine_for_pretraining import grouped, train_one_step
from modeling_finetune import VisionTransformer, entry_of
from optim_factory import param_groups
from unimim.cli.models import build_classifier, build_method
from unimim.cli.options import parse
from unimim.data.pretraining import build_data, train_loader
from unimim.data.sources import digits_source
from unimim.data.views import MEAN_STD, build_finetune_transform
from unimim.engine.distributed import StopSignal, free_port, leave_process_group
from unimim.engine.session import Position
from unimim.engine.setup import set_up, start_training
from unimim.engine.state import Training

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests/reference_cases/dalle_encoder/tiny_hid8/tensors.safetensors"

TINY = [
    "--input_size", "16", "--patch_size", "4", "--data_set", "digits", "--num_workers", "0",
    "--device", "cpu",
]  # fmt: skip
SIZE = ["embed_dim=32", "depth=2", "num_heads=2"]
DECODER = ["decoder_embed_dim=24", "decoder_depth=2", "decoder_num_heads=2"]
PRETRAIN = [
    *("--model", "conmim_tiny_patch16_224", *TINY, "--mask_type", "random", "--mask_ratio", "0.5"),
    *("--model_kwargs", *SIZE, "projector_hidden_dim=32", "projector_out_dim=16"),
    "--batch_size", "8", "--epochs", "2", "--warmup_epochs", "0", "--lr", "1e-3",
    "--clip_grad", "3.0",
]  # fmt: skip
FINETUNE = [
    *("--model", "beit_tiny_patch16_224", *TINY, "--model_kwargs", *SIZE, "init_scale=1.0"),
    "--batch_size", "8", "--epochs", "2", "--warmup_epochs", "0", "--lr", "1e-3",
    "--layer_decay", "0.75",
]  # fmt: skip


class Payload:
    """An object whose unpickling makes a file: it shows that code of a checkpoint ran."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _flags(text: str, *model_kwargs: str) -> tuple[str, ...]:
    return (*text.split(), "--model_kwargs", *model_kwargs)


WITH_TOKENIZER = f"--discrete_vae_weight_path {TOKENIZER} --color_jitter 0.4"
METHODS = {  # flags over those of PRETRAIN
    "mae": _flags("--model mae_tiny_patch16_224", *SIZE, *DECODER),
    "semmae": _flags(
        "--model semmae_tiny_patch16_224 --mask_type parts --part_source random --num_parts 3",
        *(*SIZE, *DECODER),
    ),
    "pixio": _flags(
        "--model pixio_tiny_patch16_256 --num_cls_tokens 2 --mask_grid 2", *SIZE, *DECODER
    ),
    "nepa": _flags("--model nepa_tiny_patch14_224 --use_ema_model", *SIZE),
    "semaim": _flags(
        "--model semaim_tiny_patch16_224 --mask_type none --use_ema_model", *SIZE, "query_depth=2"
    ),
    "saim": _flags(
        "--model semaim_tiny_patch16_224 --mask_type none --permutation_type stochastic "
        "--share_weight",
        *(*SIZE, "query_depth=2"),
    ),
    "a2mim_vit": _flags(
        "--model a2mim_vit_tiny_patch16_224", *SIZE, "mask_layer=1", "mask_init=1e-6"
    ),
    "a2mim_resnet": _flags(
        "--model a2mim_resnet18 --input_size 64 --sync_bn --lr_schedule stepfix_cosine "
        "--mask_type random_mps32 --mask_patch_size 32",
        *("patch_size=null", "channels=[8,8,16,16]"),
        "fft_focal=False",  # its mean spectrum depends on the batch, so on the number of ranks
    ),
    "beit": _flags(
        f"--model beit_tiny_patch16_224_8k_vocab --mask_type block {WITH_TOKENIZER}",
        *(*SIZE, "vocab_size=64"),
    ),
    "maskfeat": _flags("--model maskfeat_tiny_patch16_224", *SIZE),
    "semanticmim_beit": _flags(
        "--model semanticmim_beit_tiny_patch16_224 --num_cls_tokens 3 --separate_mask_ratio 0.6 "
        + WITH_TOKENIZER,
        *(*SIZE, "vocab_size=64"),
    ),
    "semanticmim_maskfeat": _flags("--model semanticmim_maskfeat_tiny_patch16_224", *SIZE),
}

# --------------------------------------------------------------------------------------------------
# Runs in this process


def base_flags(stage: str, flags: tuple[str, ...]) -> list[str]:
    """Return the flags that `flags` are given over; a method that hides parts, or nothing, keeps
    its own masks."""
    if stage == "finetune":
        return FINETUNE
    entry = entry_of(flags[flags.index("--model") + 1]) if "--model" in flags else None
    own = getattr(entry.classes[0], "own_mask", "") if entry and entry.classes else ""
    return [*PRETRAIN, "--mask_type", own] if own in ("none", "parts") else PRETRAIN


def arguments(stage: str, folder: Path | str, *flags: str) -> Namespace:
    """Return the options of a tiny "pretrain" or "finetune" run that writes to `folder`."""
    base = base_flags(stage, flags)
    return parse(stage, [*base, "--output_dir", str(folder), *flags])


@contextmanager
def own_signals() -> Iterator[None]:
    """Give pytest its signal handlers back after a run has set its own."""
    before = {number: signal.getsignal(number) for number in (*StopSignal.signals, signal.SIGCHLD)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(stage: str, folder: Path | str, *flags: str) -> tuple[Training, Position]:
    """Return a run as the script's main() has it before the first step, and its position."""
    args = arguments(stage, folder, *flags)
    args.nb_classes = 10
    with own_signals():
        return (_start_pretraining if stage == "pretrain" else _start_finetuning)(args)


def _start_pretraining(args: Namespace) -> tuple[Training, Position]:
    context = set_up(args)
    method = build_method(args)
    loader = build_data(args, method)
    return start_training(context, method, loader, param_groups(method, args.weight_decay))


def _start_finetuning(args: Namespace) -> tuple[Training, Position]:
    context = set_up(args)
    model = build_classifier(args)
    transform = build_finetune_transform(args, train=not args.no_aug)
    dataset = build_dataset(args, train=True, transform=transform, need_labels=True)
    loader = train_loader(args, dataset)
    task = Classification(model, args, context.device)
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    return start_training(context, task, loader, groups)


def train_steps(
    run: Training, first: int, last: int, spoil: Callable[[int, list], None] | None = None
) -> list[dict]:
    """Take updates first ... last - 1 of epoch 0 and returns the metrics of each.

    `spoil(update, micro_batches)` may damage a batch.
    """
    run.task.train()
    run.loader.batch_sampler.set_position(0, first * run.args.update_freq)
    metrics = []
    for update, micro_batches in zip(
        range(first, last), grouped(run.loader, run.args.update_freq), strict=False
    ):
        if spoil is not None:
            spoil(update, micro_batches)
        train_one_step(run, update, micro_batches)
        metrics.append(dict(run.monitor.recent))
    return metrics


def column(metrics: list[dict], name: str) -> list[float]:
    return [row[name] for row in metrics]


def whole_weights(run: Training) -> dict[str, Tensor]:
    """Gather the network's float32 weights and buffers on every rank; every rank must call it."""
    network = run.runner.network
    weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        with run.runner.whole([parameter]) as (whole,):
            weights[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return weights


def average_weights(run: Training) -> dict[str, Tensor]:
    """Return the weights of the teacher or of the ema; empty if there is none."""
    average = run.task.ema
    return (
        {}
        if average is None
        else {name: value.clone() for name, value in average.module.state_dict().items()}
    )


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest absolute difference between the parameters of two networks.

    Left out are parameters whose gradient is rounding noise, which AdamW turns into whole steps:
    ConMIM's `norm.bias` (a constant added to every token cancels in the projector's batch norm,
    docs/methods/conmim.md#projector) and the bias of the keys (a constant added to every logit of
    a softmax). Running statistics differ between processes and are left out too.
    """
    assert ours.keys() == theirs.keys()
    kept_apart = ("running_mean", "running_var", "num_batches_tracked")
    is_conmim = any(name.startswith("projectors.") for name in ours)
    largest = 0.0
    for name in ours:
        if name.endswith(kept_apart) or (is_conmim and name == "norm.bias"):
            continue
        apart = (ours[name].double() - theirs[name].double()).abs()
        if name.endswith("attn.k.bias"):
            continue
        if name.endswith("attn.qkv.bias"):
            apart = apart.unflatten(0, (3, -1))[::2]  # queries and values
        largest = max(largest, float(apart.max()))
    return largest


def differing(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Lists the places at which two nested states are not equal to the last bit."""
    if isinstance(ours, Tensor):
        same = (
            isinstance(theirs, Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        )
        return [] if same else [place]
    if isinstance(ours, dict):
        if not isinstance(theirs, dict) or ours.keys() != theirs.keys():
            return [place]
        return [
            where for key in ours for where in differing(ours[key], theirs[key], f"{place}/{key}")
        ]
    if isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return [place]
        pairs = zip(ours, theirs, strict=True)
        return [where for k, pair in enumerate(pairs) for where in differing(*pair, f"{place}/{k}")]
    return [] if ours == theirs else [place]


# --------------------------------------------------------------------------------------------------
# Spawned ranks


def png(value: int) -> bytes:
    """Return a PNG of 16 x 16 pixels of one red."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def imagenet_stand_in(folder: Path) -> None:
    """Write thirty images in ImageNet's layout: map files beside train/ and val/."""
    source = digits_source(train=True)
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(30):
            Image.fromarray(source.read(i)).save(folder / split / f"{i}.png")
        (folder / f"{split}_map.txt").write_text("".join(f"{i}.png {i % 10}\n" for i in range(30)))


def in_ranks(ranks: int, function: Callable[..., Any], folder: Path, *arguments) -> list[Any]:
    """Call function(folder, *arguments) in `ranks` fresh processes, under the variables that a
    launcher sets, and return what each returned."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(
        _rank, (ranks, free_port(), function, folder, arguments), nprocs=ranks, start_method="spawn"
    )
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, port: int, function: Callable, folder: Path, arguments: tuple
) -> None:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_SIZE": ranks,  # as DeepSpeed's launcher sets it; else each step calls numactl
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    torch.save(function(folder, *arguments), folder / f"result-{rank}.pt")
    leave_process_group()


def gloo_threads() -> int:
    """Count this process's gloo threads, which may abort it while the interpreter shuts down."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")].count(
        "pt_gloo_runloop"
    )


def board(folder: Path) -> dict[str, list[Any]]:
    """Return the images and scalars in a folder of tensorboard, by their names."""
    (file,) = folder.glob("events*")
    content, found, at = file.read_bytes(), {}, 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        for value in event.summary.value:
            shown = value.simple_value
            if value.HasField("image"):
                shown = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
            found.setdefault(value.tag, []).append(shown)
        at += length + 16
    return found


# --------------------------------------------------------------------------------------------------
# Subprocesses


def environment() -> dict[str, str]:
    """Return this process's environment without the variables of a launcher."""
    hidden = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONUNBUFFERED": "1"}


def script(
    stage: str, folder: Path | str, *flags: str, launcher: tuple[str, ...] = (sys.executable,)
) -> list[str]:
    """Return the command line of a tiny run."""
    name = {"pretrain": "run_pretraining.py", "finetune": "run_class_finetuning.py"}[stage]
    base = base_flags(stage, flags)
    return [*launcher, str(ROOT / name), *base, "--output_dir", str(folder), *flags]


def run_command(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )


def start_command(command: list[str], output: Any = subprocess.PIPE) -> subprocess.Popen:
    """Start a command in a session of its own: a signal to its group reaches its loader workers
    and nothing else."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def launcher(processes: int) -> list[str]:
    """Return the command that starts a script of the repository on several processes here."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    where = [f"PATH={path}", f"NPROC={processes}", f"MASTER_PORT={free_port()}"]
    return ["env", *where, str(ROOT / "scripts/launch.sh")]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, timeout: float = 120) -> None:
    """Wait until the condition holds; fails if the process ends first."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, (
            f"ended with {process.returncode}:\n{process.stdout and process.stdout.read()}"
        )
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def block_outputs(vit: VisionTransformer, images: Tensor) -> list[Tensor]:
    """What each block of a ViT returns, [B, T, C], without the final norm."""
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        for block in vit.blocks
    ]
    vit.forward_features(images)
    for hook in hooks:
        hook.remove()
    return outputs


def packed_table(image: np.ndarray, parts: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """A packed sample of `image` [S, S, 3] uint8, made independently of the reader: row by row, by
    its definition."""
    side, patch = len(parts), len(image) // len(parts)
    mean, std = MEAN_STD["imagenet"]
    pixels = (image / 255 - mean) / std
    sizes = np.bincount(parts.ravel()[cells], minlength=7)
    rows = []
    for cell in cells:
        y, x = divmod(cell, side)
        square = pixels[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].ravel()
        rows.append(np.concatenate([sizes, np.eye(7)[parts[y, x]], [cell], square]))
    return np.stack(rows).astype(np.float32)


def write_packed(folder: Path, names: Sequence[str]) -> None:
    """Write packed samples that list 3 of 14 x 14 patches, each of its own noise."""
    rng = np.random.default_rng(0)
    for name in names:
        image = rng.integers(0, 256, (224, 224, 3)).astype(np.uint8)
        table = packed_table(image, rng.integers(0, 7, (14, 14)), rng.permutation(196)[:3])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", table)
