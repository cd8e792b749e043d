"""Wiring of a run: processes, device, runner, schedules, resume; everything between flags and the
first step."""

import json
import os
import sys
import traceback
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from datasets import BadImagesError
from optim_factory import (
    ANNEALINGS,
    annealing,
    cosine_at,
    cosine_schedule,
    create_optimizer,
    needs_create_graph,
    works_on_shards,
)
from unimim.cli.flags import options_as_flags
from unimim.cli.options import (
    as_config,
    effective_batch,
    resolve_lr,
    resolve_matmul_precision,
    resolve_precision,
    warmup_steps,
)
from unimim.data.views import MEAN_STD
from unimim.engine.batch_norm import BatchStatistics, synchronize_batch_norm
from unimim.engine.compiling import compile_blocks, recompute_gelu
from unimim.engine.deepspeed import DeepSpeedRunner, deepspeed_config
from unimim.engine.distributed import (
    StopSignal,
    exit_at_once,
    has_peers,
    init_distributed,
    leave_process_group,
)
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
from unimim.engine.runner import Runner, TorchRunner, check_precision
from unimim.engine.session import Origin, Position, Session
from unimim.engine.state import Normalize, Stopped, Training
from unimim.files import write_text
from unimim.logs import log, setup_logging

STOPPED = (
    os.EX_TEMPFAIL
)  # the exit status of a run that a signal stopped and the same command goes on with: 75


def build_optimizer(
    args: Namespace, groups: list[dict], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that the flags ask for, if the engine can run it."""
    optimizer = create_optimizer(args, groups, device)
    if needs_create_graph(optimizer):
        raise ValueError(
            f"--opt {args.opt} needs second derivatives, which these engines do not compute; take another"
        )
    config = (
        deepspeed_config(args) if args.enable_deepspeed else None
    )  # which refuses what cannot work
    if config and config["zero_optimization"]["stage"] and not works_on_shards(args.opt):
        raise ValueError(
            f"--opt {args.opt} needs whole matrices: use --zero_stage 0, or adamw or sgd with ZeRO"
        )
    return optimizer


def build_runner(
    args: Namespace, network: nn.Module, groups: list[dict], device: torch.device
) -> Runner:
    """Plain, DDP or DeepSpeed, whose configuration is also written to the output folder."""
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


def schedules(args: Namespace, steps_per_epoch: int):
    """Learning rate and weight decay of every step."""
    warmup = warmup_steps(args, steps_per_epoch)
    if args.lr_schedule == "mae":
        epoch = np.arange(args.epochs * steps_per_epoch) / steps_per_epoch
        lr = cosine_at(epoch, args.lr, args.min_lr, args.epochs, warmup / steps_per_epoch)
    elif args.lr_schedule in ANNEALINGS:
        lr = annealing(
            args.lr_schedule, args.lr, args.min_lr, args.epochs, steps_per_epoch, warmup,
            warmup_ratio=args.warmup_ratio, milestones=args.lr_steps, gamma=args.lr_gamma,
        )  # fmt: skip
    else:
        lr = cosine_schedule(
            args.lr, args.min_lr, args.epochs, steps_per_epoch, warmup_steps=warmup
        )
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    return lr, cosine_schedule(args.weight_decay, end, args.epochs, steps_per_epoch)


def dry_run(
    args: Namespace, groups: list[dict], steps_per_epoch: int, device: torch.device
) -> None:
    """Refuses what a run would refuse when it starts."""
    schedules(args, steps_per_epoch)
    build_optimizer(args, groups, device)


def flops_per_image(task: nn.Module, loader, normalize: Normalize) -> float:
    """FLOPs of one training step, counted on two images; what that changes in batch statistics is
    put back.

    --grad_checkpointing does not count: what is computed twice is needed once.
    """
    recomputing = [
        module for module in task.modules() if getattr(module, "grad_checkpointing", False)
    ]
    for module in recomputing:
        module.grad_checkpointing = False
    batch = normalize(default_collate([loader.dataset[0, index] for index in (0, 1)]))
    statistics = BatchStatistics(task, getattr(task, "teacher", None))
    statistics.keep()
    flops = count_flops(lambda: task(batch)["loss"].backward())
    statistics.put_back_unless(torch.zeros((), device=normalize.device))
    task.zero_grad(set_to_none=True)
    for module in recomputing:
        module.grad_checkpointing = True
    return flops / 2


def start_training(
    args: Namespace,
    task: nn.Module,
    network: nn.Module,
    loader,
    groups: list[dict],
    normalize: Normalize,
    average_key: str,
) -> tuple[Training, Position]:
    """Resumes weights, wraps the task in its engine, resumes the rest: everything between data and
    the first step.

    `task` is what is trained, `network` the part of it that checkpoints hold; `average_key` names
    its average there.
    """
    device, average, stop = normalize.device, task.average, StopSignal()
    lr, weight_decay = schedules(args, loader.steps_per_epoch)
    origin = Origin.find(args)
    if origin is not None:
        origin.load_weights(network, average, average_key, getattr(args, "resume_copy", ""))
    peak, n_parameters = peak_flops(device, args.precision), count_parameters(network)
    flops = flops_per_image(task, loader, normalize) if peak else None
    recompute_gelu(network, getattr(args, "recompute_gelu", "auto"))
    if getattr(args, "compile", False):
        compile_blocks(network, average and average.module, getattr(task, "frozen", None))
    if getattr(args, "sync_bn", False):
        synchronize_batch_norm(network, device)
    runner = build_runner(args, task, groups, device)
    runner.watch(network, average and average.module)
    if average is not None:
        average.read = runner.whole
    monitor = StepMonitor(
        folder=args.output_dir,
        rank=args.rank,
        max_nonfinite=args.max_nonfinite,
        scaled=args.precision == "fp16",
    )
    session = Session(
        args,
        runner,
        network,
        monitor,
        average=average,
        average_key=average_key,
        steps_per_epoch=loader.steps_per_epoch,
        dataset=loader.dataset,
    )
    run = Training(
        args=args,
        runner=runner,
        task=task,
        normalize=normalize,
        loader=loader,
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


def image_mean_std(args: Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return MEAN_STD["imagenet" if args.imagenet_default_mean_and_std else "inception"]


def set_float32_products(precision: str, device: torch.device) -> None:
    """How exact float32 products and convolutions are; on a GPU cuDNN's kernels are also chosen by
    measuring them."""
    torch.set_float32_matmul_precision(precision)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision == "high"
        torch.backends.cudnn.benchmark = True


def set_up(args: Namespace) -> Normalize:
    """Joins the other processes, starts the log, settles device and precision."""
    device = init_distributed(args)
    setup_logging(args.rank)
    if device.type == "cpu":
        keep_freed_memory()
    resolve_precision(args, device)
    resolve_lr(args)
    check_precision(args.precision, device)
    set_float32_products(resolve_matmul_precision(args, device), device)
    return Normalize(image_mean_std(args), device)


def launch(main_function, args: Namespace) -> None:
    """Users' mistakes and orderly stops end in one line, not in a traceback.

    Only orderly ends, of which all ranks know, leave the process group: after an error the others
    may be waiting in it.
    """
    code = 0
    try:
        with options_as_flags():
            main_function(args)
    except Stopped as stopped:
        log.info("stopped by %s; run the same command to go on", stopped)
        code = STOPPED
    except (ValueError, NonFiniteError, BadImagesError) as error:
        # an error in a loader worker comes with the worker's traceback: the last line is what it
        # says
        log.error("error: %s", str(error).rstrip().rpartition("\n")[2])
        code = 1
        if has_peers():
            exit_at_once(code)
    except BaseException:
        if has_peers():
            traceback.print_exc()
            exit_at_once(1)
        leave_process_group()
        raise
    leave_process_group()
    if code:
        sys.exit(code)
