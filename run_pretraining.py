"""Pre-trains a masked-image-modelling method; `--help` lists the flags, README.md has examples."""

import sys
from argparse import Namespace

import torch
from torch import nn

import options
import utils
from datasets import BadImagesError, TrainBatchSampler, build_dataset, build_loader
from engine_for_pretraining import Normalize, Stopped, Training, train
from masking_generator import build_mask_generator
from modeling_finetune import Block, create_model
from modeling_pretrain import MaskedImageModel
from optim_factory import cosine_schedule, create_optimizer, param_groups
from parallel import DeepSpeedRunner, Runner, TorchRunner, check_precision, deepspeed_config
from session import Origin, Session
from transforms import MEAN_STD, build_pretrain_transform
from utils import NonFiniteError, RunLog, StepMonitor, StopSignal, Throughput, log


def build_method(args: Namespace) -> MaskedImageModel:
    """The method that --model names; a flag that its constructor has is passed on."""
    given = options.model_kwargs(args)
    defaults = {
        "init_values": args.layer_scale_init_value,
        "drop_path": args.drop_path,
        "pos_embed": "learned" if args.abs_pos_emb else "none",
        "rel_pos_bias": "shared" if args.rel_pos_bias else "none",
        "temperature": args.temp,
        "t_momentum": args.t_momentum,
        "attn": args.attn,
        "grad_checkpointing": args.grad_checkpointing,
    }
    torch.manual_seed(args.seed)
    return create_model(args.model, **{**defaults, **given})


def build_data(args: Namespace, method: MaskedImageModel):
    """The loader of what the method reads, and the optimizer steps that an epoch has."""
    input_size, patch_size = method.patch_embed.img_size, method.patch_embed.patch_size
    generator = build_mask_generator(
        args.mask_type,
        input_size=input_size,
        patch_size=patch_size,
        mask_ratio=args.mask_ratio,
        num_mask_patches=args.num_mask_patches,
        min_mask_patches_per_block=args.min_mask_patches_per_block,
        max_mask_patches_per_block=args.max_mask_patches_per_block,
        mask_patch_size=args.mask_patch_size,
    )
    transform = build_pretrain_transform(
        method.views,
        input_size=input_size,
        interpolation=args.train_interpolation,
        pipeline=args.data_pipeline,
        mask_generator=generator,
        crop_scale=tuple(args.crop_scale),
    )
    dataset = build_dataset(args, train=True, transform=transform, need_labels=False)
    return train_loader(args, dataset)


def train_loader(args: Namespace, dataset):
    """Whole optimizer steps only: what is left over of an epoch is dropped."""
    steps = len(dataset) // (args.batch_size * args.update_freq * args.world_size)
    sampler = TrainBatchSampler(
        len(dataset), args.batch_size, batches_per_epoch=steps * args.update_freq, rank=args.rank,
        world_size=args.world_size, seed=args.seed,
    )  # fmt: skip
    return build_loader(dataset, sampler, num_workers=args.num_workers, pin_mem=args.pin_mem), steps


def build_runner(args: Namespace, network: nn.Module, groups: list[dict], device: torch.device) -> Runner:
    """Plain, DDP or DeepSpeed, with the optimizer that the flags ask for."""
    optimizer = create_optimizer(args, groups, device)
    if args.enable_deepspeed:
        return DeepSpeedRunner(network, optimizer, config=deepspeed_config(args), device=device)
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
    lr = cosine_schedule(
        args.lr, args.min_lr, args.epochs, steps_per_epoch, args.warmup_epochs, warmup_steps=args.warmup_steps
    )
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    return lr, cosine_schedule(args.weight_decay, end, args.epochs, steps_per_epoch)


def compile_blocks(*modules: nn.Module | None) -> None:
    """Equal blocks share one compilation (specs/engine.md 2)."""
    for module in modules:
        for block in module.modules() if module is not None else ():
            if isinstance(block, Block):
                block.compile(dynamic=False)


def main(args: Namespace) -> None:
    device = utils.init_distributed(args)
    utils.setup_logging(args.rank)
    options.resolve_precision(args, device)
    check_precision(args.precision, device)
    stop = StopSignal()

    method = build_method(args)
    loader, steps_per_epoch = build_data(args, method)
    lr, weight_decay = schedules(args, steps_per_epoch)
    options.report(args, options.schedule_summary(args, steps_per_epoch) | {"images": len(loader.dataset)})
    if args.dry_run:
        return

    origin = Origin.find(args)
    if origin is not None:
        origin.load_weights(method, method.average, "teacher", args.resume_copy)
    normalize = Normalize(MEAN_STD["imagenet" if args.imagenet_default_mean_and_std else "inception"], device)
    method.to(device)
    if method.teacher is not None:
        method.teacher.to(device)
    if args.compile:
        compile_blocks(method, method.teacher)
    runner = build_runner(args, method, param_groups(method, args.weight_decay), device)
    runner.watch(method, method.teacher)
    if method.average is not None:
        method.average.read = runner.whole
    monitor = StepMonitor(
        folder=args.output_dir, rank=args.rank, max_nonfinite=args.max_nonfinite, scaled=args.precision == "fp16"
    )
    session = Session(
        args, runner, method, monitor, average=method.average, average_key="teacher", steps_per_epoch=steps_per_epoch
    )
    peak = utils.peak_flops(device, args.precision)
    run = Training(
        args=args, runner=runner, task=method, normalize=normalize, loader=loader, steps_per_epoch=steps_per_epoch,
        lr=lr, weight_decay=weight_decay, monitor=monitor, session=session, stop=stop,
        throughput=Throughput(args.batch_size * args.update_freq * args.world_size, None, peak),
        run_log=RunLog(args, options.as_config(args)),
    )  # fmt: skip
    train(run, session.resume(origin), after_epoch=lambda position: {})
    run.run_log.close()


def launch(main_function, args: Namespace) -> None:
    """Users' mistakes and orderly stops end in one line, not in a traceback."""
    try:
        main_function(args)
    except Stopped as stopped:
        log.info("stopped by %s; run the same command to go on", stopped)
    except (ValueError, NonFiniteError, BadImagesError) as error:
        log.error("error: %s", error)
        sys.exit(1)
    finally:
        utils.leave_process_group()


if __name__ == "__main__":
    launch(main, options.parse("pretrain"))
