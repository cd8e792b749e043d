"""Wires a run: processes, device, runner, schedules, resume; all between flags and first step."""

import json
import os
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets import BadImagesError
from optim_factory import (
    ANNEALINGS,
    LayerWarmups,
    annealing,
    cosine_at,
    cosine_schedule,
    create_optimizer,
    needs_create_graph,
    works_on_shards,
)
from unimim.checkpoint.initial import load_initial
from unimim.cli.flags import options_as_flags
from unimim.cli.options import (
    as_config,
    check_outputs,
    effective_batch,
    log_notes,
    resolve_lr,
    resolve_matmul_precision,
    resolve_precision,
    resolve_workers,
    warmup_steps,
)
from unimim.data.device_decode import batch_decoder
from unimim.data.pretraining import steps_per_epoch
from unimim.data.views import image_mean_std
from unimim.early import UNFINISHED, follow_launcher
from unimim.engine.batch_norm import BatchStatistics, synchronize_batch_norm
from unimim.engine.compiling import compile_blocks, recompute_gelu
from unimim.engine.deepspeed import DeepSpeedRunner, deepspeed_config
from unimim.engine.distributed import (
    StopSignal,
    exit_at_once,
    from_first_rank,
    has_peers,
    init_distributed,
    leave_process_group,
)
from unimim.engine.lock import lock_folder, locks_allowed, lost_folder
from unimim.engine.monitor import (
    NonFiniteError,
    RunLog,
    StepMonitor,
    Throughput,
    count_flops,
    count_parameters,
    keep_freed_memory,
    peak_flops,
)
from unimim.engine.peers import leave_peers, wait_for_news, watch_peers
from unimim.engine.runner import Runner, TorchRunner, check_precision
from unimim.engine.session import Origin, Position, Session
from unimim.engine.state import Normalize, RunContext, Stopped, Training, with_mask_counts
from unimim.engine.task import Task
from unimim.errors import explain
from unimim.files import write_text
from unimim.logs import log, setup_logging

# Flags that not every script which trains has, with what the others run with.
OPTIONAL_FLAGS = {"compile": False, "recompute_gelu": "auto", "resume_copy": "", "init": ""}


def build_optimizer(
    args: Namespace, groups: list[dict], device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer that the flags ask for; ValueError if the engine cannot run it."""
    optimizer = create_optimizer(args, groups, device)
    if needs_create_graph(optimizer):
        raise ValueError(
            f"--opt {args.opt} needs second derivatives, which these engines do not compute; "
            "use another"
        )
    # refuses what cannot work
    config = deepspeed_config(args) if args.enable_deepspeed else None
    if config and config["zero_optimization"]["stage"] and not works_on_shards(args.opt):
        raise ValueError(
            f"--opt {args.opt} needs whole matrices: use --zero_stage 0, or adamw or sgd with ZeRO"
        )
    return optimizer


def build_runner(
    args: Namespace, network: nn.Module, groups: list[dict], device: torch.device
) -> Runner:
    """Return the plain, DDP or DeepSpeed runner; DeepSpeed's configuration is also written."""
    optimizer = build_optimizer(args, groups, device)
    if args.enable_deepspeed:
        config = deepspeed_config(args, count_parameters(network))
        if args.output_dir and args.rank == 0:
            write_text(
                Path(args.output_dir) / "deepspeed_config.json", json.dumps(config, indent=2) + "\n"
            )
        return DeepSpeedRunner(network, optimizer, config=config, device=device)
    return TorchRunner(
        network,
        optimizer,
        device=device,
        precision=args.precision,
        update_freq=args.update_freq,
        clip_grad=args.clip_grad,
    )


def lr_schedule(args: Namespace, steps_per_epoch: int, warmup: int) -> np.ndarray:
    """Return the learning rate of every step, after a warm-up of so many steps."""
    if args.lr_schedule == "mae":
        epoch = np.arange(args.epochs * steps_per_epoch) / steps_per_epoch
        return cosine_at(epoch, args.lr, args.min_lr, args.epochs, warmup / steps_per_epoch)
    if args.lr_schedule in ANNEALINGS:
        return annealing(
            args.lr_schedule, args.lr, args.min_lr, args.epochs, steps_per_epoch, warmup,
            warmup_ratio=args.warmup_ratio, milestones=args.lr_steps, gamma=args.lr_gamma,
        )  # fmt: skip
    return cosine_schedule(args.lr, args.min_lr, args.epochs, steps_per_epoch, warmup_steps=warmup)


def schedules(args: Namespace, steps_per_epoch: int, groups: Sequence[dict] = ()):
    """Return the learning rate and the weight decay of every step; `groups` of parameters warm up
    by themselves with --layer_warmup."""
    warmup = warmup_steps(args, steps_per_epoch)
    if getattr(args, "layer_warmup", False):
        lr = LayerWarmups(partial(lr_schedule, args, steps_per_epoch), warmup, groups)
    else:
        lr = lr_schedule(args, steps_per_epoch, warmup)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    return lr, cosine_schedule(args.weight_decay, end, args.epochs, steps_per_epoch)


def dry_run(
    args: Namespace, groups: list[dict], steps_per_epoch: int, device: torch.device
) -> None:
    """Raise what a run would raise when it starts."""
    schedules(args, steps_per_epoch, groups)
    build_optimizer(args, groups, device)


def flops_per_image(task: Task, dataset: Dataset, normalize: Normalize) -> float:
    """Count the FLOPs of one training step on two images, and puts batch statistics back.

    --grad_checkpointing does not count: what is computed twice is needed once.
    """
    batch = normalize(with_mask_counts(default_collate([dataset[0, 0], dataset[0, 1]])))
    statistics = BatchStatistics(task, None if task.ema is None else task.ema.module)
    statistics.keep()
    with without_grad_checkpointing(task):
        flops = count_flops(lambda: task(batch)["loss"].backward())
    statistics.put_back_unless(torch.zeros(()))
    task.zero_grad(set_to_none=True)
    return flops / 2


@contextmanager
def without_grad_checkpointing(task: nn.Module) -> Iterator[None]:
    """Keep all activations of a forward pass inside the context."""
    recomputing = [
        module for module in task.modules() if getattr(module, "grad_checkpointing", False)
    ]
    for module in recomputing:
        module.grad_checkpointing = False
    try:
        yield
    finally:
        for module in recomputing:
            module.grad_checkpointing = True


def start_training(
    context: RunContext, task: Task, loader: DataLoader, groups: list[dict]
) -> tuple[Training, Position]:
    """Return the state of a run before its first step, and the position it goes on from.

    Resumes the weights, wraps the task in its engine and resumes the rest. `groups` are those of
    the optimizer.
    """
    args = context.args
    flags = OPTIONAL_FLAGS | vars(args)
    ema_module = None if task.ema is None else task.ema.module
    steps = steps_per_epoch(args, loader)
    lr, weight_decay = schedules(args, steps, groups)
    stop = StopSignal()

    # weights come first: an engine may shard or round the network's own
    origin = Origin.find(args)
    if origin is not None:
        origin.load_weights(task.network, task.ema, task.ema_key, flags["resume_copy"])
    elif flags["init"]:
        log.info("%s", load_initial(task.network, ema_module, flags["init"]))

    # FLOPs and parameters are those of the network as it was built
    peak = peak_flops(context.device, args.precision)
    n_parameters = count_parameters(task.network)
    normalize = Normalize(image_mean_std(args), context.device, task.raw_views)
    flops = flops_per_image(task, loader.dataset, normalize) if peak else None

    recompute_gelu(task.network, flags["recompute_gelu"])
    if flags["compile"]:
        compile_blocks(task.network, ema_module, task.frozen)
    if args.sync_bn:
        synchronize_batch_norm(task.network, context.device)
    runner = build_runner(args, task, groups, context.device)
    runner.watch(task.network, ema_module)
    if task.ema is not None:
        task.ema.read_by(runner.whole)

    monitor = StepMonitor(
        folder=args.output_dir,
        rank=context.rank,
        max_nonfinite=args.max_nonfinite,
        scaled=args.precision == "fp16",
    )
    session = Session(args, runner, task, monitor, steps_per_epoch=steps, dataset=loader.dataset)
    run = Training(
        context=context,
        runner=runner,
        task=task,
        normalize=normalize,
        decode=batch_decoder(loader.dataset, context.device),
        loader=loader,
        steps_per_epoch=steps,
        n_parameters=n_parameters,
        lr=lr,
        weight_decay=weight_decay,
        monitor=monitor,
        throughput=Throughput(effective_batch(args), flops, peak),
        session=session,
        run_log=RunLog(args, as_config(args)),
        stop=stop,
    )
    return run, session.resume(origin)


def set_float32_products(precision: str, device: torch.device) -> None:
    """Set how exact float32 products and convolutions are.

    On a GPU cuDNN's kernels are also chosen by measuring them.
    """
    torch.set_float32_matmul_precision(precision)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision == "high"
        torch.backends.cudnn.benchmark = True


def set_up(args: Namespace) -> RunContext:
    """Join the other processes, start the log, settle device and precision."""
    device = init_distributed(args)
    setup_logging(args.rank)
    log_notes(args)
    watch_peers(stop_status(args))
    claim_outputs(args)
    resolve_workers(args)
    if device.type == "cpu":
        keep_freed_memory()
    resolve_precision(args, device)
    resolve_lr(args)
    check_precision(args.precision, device)
    set_float32_products(resolve_matmul_precision(args, device), device)
    return RunContext(args, device, args.rank, args.world_size)


def claim_outputs(args: Namespace) -> None:
    """Make the output folders, and lock --output_dir where checkpoints are written to it.

    ValueError on every rank if rank 0 cannot.
    """
    refusal = None
    if args.rank == 0:
        try:
            check_outputs(args)
            flags = vars(args)
            only_reads = flags.get("eval") or flags.get("dry_run")
            if flags.get("output_dir") and flags.get("save_ckpt") and not only_reads:
                lock_folder(args.output_dir)
        except ValueError as error:
            refusal = str(error)
    if refusal := from_first_rank(refusal):
        raise ValueError(refusal)


def launch(main_function: Callable[[Namespace], Any], args: Namespace) -> None:
    """Run a script; users' mistakes, full disks and orderly stops end in one line, not in a
    traceback.

    Only orderly ends, of which all ranks know, leave the process group: after an error the others
    may be waiting in it.
    """
    code = 0
    follow_launcher()
    try:
        with end_on_early_signals(stop_status(args)), options_as_flags(), locks_allowed():
            try:
                main_function(args)
            except Stopped:
                if lost_folder():
                    code = 1  # said already
                else:
                    raise
    except Stopped as stopped:
        saved = args.output_dir and args.save_ckpt
        then = "run the same command to go on" if saved else "nothing was saved, as the flags say"
        log.info("stopped by %s; %s", stopped, then)
        code = stop_status(args)
    except (ValueError, NonFiniteError, BadImagesError) as error:
        # an error in a loader worker comes with the worker's traceback, its message comes last
        code = end_with(str(error).rstrip().rpartition("\n")[2])
    except Exception as error:
        if has_peers():
            wait_for_news()
        if sentence := explain(error):
            # half-made objects, such as a loader without all its workers, complain when freed
            sys.unraisablehook = lambda _: None
            code = end_with(sentence)
        elif has_peers():
            traceback.print_exc()
            exit_at_once(1)
        else:
            leave_process_group()
            raise
    leave_process_group()
    if code:
        sys.exit(code)


def stop_status(args: Namespace) -> int:
    """Return the exit status of a script that a signal stops: --stop_status if it trains, else
    75."""
    flags = vars(args)
    trains = "stop_status" in flags and not flags.get("eval")
    return args.stop_status if trains else UNFINISHED


@contextmanager
def end_on_early_signals(status: int) -> Iterator[None]:
    """Let a signal end this process in one line with `status` before `StopSignal` takes over, and
    after it is released.

    A thread does so: the main thread may wait for other processes, where no handler is called.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _early) for number in StopSignal.signals}
    thread = threading.Thread(target=_end_early, args=(reader, status), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in handlers.items():
            if signal.getsignal(number) is _early:
                signal.signal(number, handler or signal.SIG_DFL)
        os.write(writer, b"\0")  # ends the thread; workers may hold the pipe open
        thread.join()
        os.close(reader)
        os.close(writer)


def _early(_number: int, _frame: Any) -> None:
    """Leave the signal to `_end_early`."""


def _end_early(reader: int, status: int) -> None:
    while number := os.read(reader, 1)[0]:
        if number in StopSignal.signals and signal.getsignal(number) is _early:
            when = "after the last step" if StopSignal.began else "before the first step"
            log.error("stopped by %s %s", signal.Signals(number).name, when)
            leave_peers("stopped")
            exit_at_once(status)


def end_with(sentence: str) -> int:
    """Log what ends this process, and return its exit status; among several ranks end at once."""
    log.error("error: %s", sentence)
    if has_peers():
        leave_peers("failed")
        exit_at_once(1)
    return 1
