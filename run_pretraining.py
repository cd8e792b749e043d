"""Pre-trains a masked-image-modelling method; `--help` lists the flags, README.md has examples."""

import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import default_collate

import options
import utils
from backbones import REPEATED_BLOCKS
from datasets import BadImagesError, RandomParts, TrainBatchSampler, build_dataset, build_loader
from engine_for_pretraining import Normalize, Stopped, Training, train
from masking_generator import build_mask_generator
from modeling_finetune import ActivatedLinear, Block, DropPath, create_model, options_of
from modeling_pretrain import PretrainMethod
from modeling_targets import EncoderBlock
from optim_factory import (
    ANNEALINGS,
    annealing,
    cosine_at,
    cosine_schedule,
    create_optimizer,
    needs_create_graph,
    param_groups,
    works_on_shards,
)
from parallel import (
    BatchStatistics,
    DeepSpeedRunner,
    Runner,
    TorchRunner,
    check_precision,
    deepspeed_config,
    synchronise_batch_norm,
)
from part_maps import PartMaps, image_names
from session import Origin, Position, Session
from transforms import MEAN_STD, build_pretrain_transform
from utils import NonFiniteError, RunLog, StepMonitor, StopSignal, Throughput, log

STOPPED = os.EX_TEMPFAIL  # the exit status of a run that a signal stopped and the same command goes on with: 75
SEMAIM_FLAGS = (  # named as the options of the model
    "permutation_type", "attention_type", "order_precision", "query_depth", "share_weight", "prediction_head_type",
    "gaussian_kernel_size", "gaussian_sigma", "loss_type", "predict_feature", "target_model", "target_precision",
    "use_ema_model",
)  # fmt: skip


def build_method(args: Namespace) -> PretrainMethod:
    """The method that --model names, with the flags that were given."""
    flags = {
        "init_values": args.layer_scale_init_value,
        "drop_path": args.drop_path,
        "pos_embed": "learned" if args.abs_pos_emb else None,
        "rel_pos_bias": {None: None, True: "shared", False: "none"}[args.rel_pos_bias],
        "temperature": args.temp,
        "t_momentum": args.t_momentum,
        "mask_ratio": args.mask_ratio if "mask_ratio" in options_of(args.model) else None,
        "norm_pix_loss": args.norm_pix_loss,
        "num_parts": args.num_parts,
        "mask_lambda": args.mask_lambda,
        "mask_lambda_power": args.mask_lambda_power,
        **{name: getattr(args, name) for name in SEMAIM_FLAGS},
        "num_cls_tokens": args.num_cls_tokens,
        "use_bottleneck": args.use_bottleneck,
        "separate_mask": None if args.separate_mask_ratio is None else True,
        "discrete_vae_weight_path": args.discrete_vae_weight_path if takes_words(args) else None,
        "image_mean_std": image_mean_std(args) if args.target_mean_std == "own" else None,
        "attn": args.attn,
        "grad_checkpointing": args.grad_checkpointing,
    }
    torch.manual_seed(args.seed)
    method = create_model(args.model, **{**options.given(flags), **options.model_kwargs(args)})
    if not isinstance(method, PretrainMethod):
        raise ValueError(f"--model {args.model} is a classifier, not a pre-training method: see --list_models")
    return method


def takes_words(args: Namespace) -> bool:
    """Whether the method predicts visual words; published commands of others name a tokenizer too."""
    return "discrete_vae_weight_path" in options_of(args.model)


def mask_generator(args: Namespace, method: PretrainMethod, view: str):
    """The masks that come with the data, None for a method that does not read this view."""
    if view not in method.views:
        return None
    return build_mask_generator(
        args.mask_type,
        input_size=method.image_size,
        patch_size=method.cell_size,
        mask_ratio=args.mask_ratio if view == "mask" else args.separate_mask_ratio,
        num_mask_patches=args.num_mask_patches,
        min_mask_patches_per_block=args.min_mask_patches_per_block,
        max_mask_patches_per_block=args.max_mask_patches_per_block,
        mask_patch_size=args.mask_patch_size,
    )


def build_data(args: Namespace, method: PretrainMethod):
    """The loader of what the method reads."""
    if "target_ids" in method.views:
        raise ValueError(f"--model {args.model} needs --discrete_vae_weight_path: DALL-E's encoder, encoder.pkl")
    sides = zip(method.image_size, method.cell_size, strict=True)
    transform = build_pretrain_transform(
        method.views,
        input_size=method.image_size,
        grid=tuple(side // cell for side, cell in sides),
        noise_size=method.noise_size,
        interpolation=args.train_interpolation,
        pipeline=args.data_pipeline,
        mask_generator=mask_generator(args, method, "mask"),
        target_mask_generator=mask_generator(args, method, "target_mask"),
        crop_scale=tuple(args.crop_scale),
        color_jitter=args.color_jitter,
        second_size=second_size(args, method),
        second_interpolation=args.second_interpolation,
    )
    dataset = build_dataset(args, train=True, transform=transform, need_labels=False)
    if "part_ids" in method.views:
        parts = open_parts(args, dataset.source, method)
        readers = {"part_ids": parts.read, "part_scores": parts.read_scores}
        dataset.maps = {view: read for view, read in readers.items() if view in method.views}
    return train_loader(args, dataset)


def second_size(args: Namespace, method: PretrainMethod) -> tuple[int, int] | None:
    """(height, width) of the pictures for the tokenizer: one word for each patch."""
    if "image_second" not in method.views:
        return None
    if args.second_input_size is not None and {args.second_input_size} != {*method.second_size}:
        raise ValueError(
            f"--second_input_size {args.second_input_size}: with one word a patch it is {method.second_size}"
        )
    return method.second_size


def open_parts(args: Namespace, source, method: PretrainMethod) -> PartMaps | RandomParts:
    """The part maps of the images in `source`, of the kind and with as many parts as the flags and the method say."""
    if args.part_source == "random":
        log.warning("--part_source random: the parts have no meaning; this is a run for comparison")
        return RandomParts(method.num_parts, method.patch_embed.grid_size, args.seed)
    if args.part_maps is None:
        raise ValueError(f"--model {args.model} needs --part_maps, as run_part_learning.py writes them")
    map_file = Path(args.data_path or "", "train_map.txt")
    parts = PartMaps.open(
        args.part_maps, paths=image_names(source), map_file=map_file if args.data_path and map_file.is_file() else None
    )
    if args.part_source not in ("maps", parts.meta.part_source):
        raise ValueError(
            f"--part_maps {args.part_maps} holds {parts.meta.part_source} parts, not {args.part_source}: "
            f"run_part_learning.py --part_source {args.part_source} --extract FOLDER makes these"
        )
    log.info("part maps: %s, %d parts", parts.meta.part_source, parts.num_parts)
    if parts.num_parts > method.num_parts:
        raise ValueError(
            f"--part_maps {args.part_maps} has {parts.num_parts} parts: give --num_parts {parts.num_parts}"
        )
    return parts


def train_loader(args: Namespace, dataset):
    """A loader of whole optimizer steps, `steps_per_epoch` of them; what is left over of an epoch is dropped."""
    steps = len(dataset) // options.effective_batch(args)
    if steps == 0:
        raise ValueError(
            f"{len(dataset)} images do not fill one step of {options.effective_batch(args)}: "
            "lower --batch_size, --update_freq or the number of processes"
        )
    sampler = TrainBatchSampler(
        len(dataset),
        args.batch_size,
        batches_per_epoch=steps * args.update_freq,
        rank=args.rank,
        world_size=args.world_size,
        seed=args.seed,
        repeats=getattr(args, "aug_repeats", 1),
        step_batches=args.update_freq * args.world_size,
    )
    loader = build_loader(dataset, sampler, num_workers=args.num_workers, pin_mem=args.pin_mem)
    loader.steps_per_epoch = steps
    return loader


def build_optimizer(args: Namespace, groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the flags ask for, if the engine can run it."""
    optimizer = create_optimizer(args, groups, device)
    if needs_create_graph(optimizer):
        raise ValueError(f"--opt {args.opt} needs second derivatives, which these engines do not compute; take another")
    config = deepspeed_config(args) if args.enable_deepspeed else None  # which refuses what cannot work
    if config and config["zero_optimization"]["stage"] and not works_on_shards(args.opt):
        raise ValueError(f"--opt {args.opt} needs whole matrices: use --zero_stage 0, or adamw or sgd with ZeRO")
    return optimizer


def build_runner(args: Namespace, network: nn.Module, groups: list[dict], device: torch.device) -> Runner:
    """Plain, DDP or DeepSpeed, whose configuration is also written to the output folder."""
    optimizer = build_optimizer(args, groups, device)
    if args.enable_deepspeed:
        config = deepspeed_config(args, utils.count_parameters(network))
        if args.output_dir and args.rank == 0:
            utils.write_text(Path(args.output_dir) / "deepspeed_config.json", json.dumps(config, indent=2) + "\n")
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
    warmup = options.warmup_steps(args, steps_per_epoch)
    if args.lr_schedule == "mae":
        epoch = np.arange(args.epochs * steps_per_epoch) / steps_per_epoch
        lr = cosine_at(epoch, args.lr, args.min_lr, args.epochs, warmup / steps_per_epoch)
    elif args.lr_schedule in ANNEALINGS:
        lr = annealing(
            args.lr_schedule, args.lr, args.min_lr, args.epochs, steps_per_epoch, warmup,
            warmup_ratio=args.warmup_ratio, milestones=args.lr_steps, gamma=args.lr_gamma,
        )  # fmt: skip
    else:
        lr = cosine_schedule(args.lr, args.min_lr, args.epochs, steps_per_epoch, warmup_steps=warmup)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    return lr, cosine_schedule(args.weight_decay, end, args.epochs, steps_per_epoch)


def dry_run(args: Namespace, groups: list[dict], steps_per_epoch: int, device: torch.device) -> None:
    """Refuses what a run would refuse when it starts."""
    schedules(args, steps_per_epoch)
    build_optimizer(args, groups, device)


def recompute_gelu(network: nn.Module, when: str) -> None:
    """Settles --recompute_gelu of all blocks."""
    for module in network.modules():
        if isinstance(module, ActivatedLinear):
            module.recompute = when


COMPILED = (Block, EncoderBlock, *REPEATED_BLOCKS)


class SharedGraphs:
    """The compiled forward of blocks of one type at one place of a network, which share their graphs.

    With and without gradient, in training and evaluation there are separate compilations: torch keeps the graphs of a
    function together, looks through all of them and gives up at the eighth.
    """

    def __init__(self, forward: Callable, backend: str | Callable):
        self.forward, self.backend = forward, backend
        self.roles: dict[tuple[bool, bool], Callable] = {}

    def __call__(self, block: nn.Module, x: torch.Tensor, *args, **options) -> torch.Tensor:
        role = torch.is_grad_enabled(), block.training
        if role not in self.roles:
            self.roles[role] = torch.compile(own_code(self.forward, role), dynamic=False, backend=self.backend)
        if role == (False, False):  # the last batch of an evaluation is smaller
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.roles[role](block, x, *args, **options)


def own_code(function: Callable, role: tuple[bool, bool]) -> Callable:
    """The same function with code of its own, by which torch keeps its graphs."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{'_'.join(map(str, role))}")
    copy = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def compile_blocks(*modules: nn.Module | None, backend: str | Callable = "inductor") -> None:
    """Compiles the blocks of these networks; those of one list and type share their graphs. Hooks stay outside."""
    places: dict[tuple[int, str, type], list[nn.Module]] = {}
    for number, module in enumerate(modules):
        for name, part in module.named_modules() if module is not None else ():
            if isinstance(part, COMPILED):
                places.setdefault((number, name.rpartition(".")[0], type(part)), []).append(part)
    if not places:
        log.warning("--compile: this --model has no blocks of equal shape, nothing is compiled")
    for (_, _, kind), blocks in places.items():
        share_stochastic_depth(blocks)
        graphs = SharedGraphs(kind.forward, backend)
        for block in blocks:
            block.forward = partial(graphs, block)


def share_stochastic_depth(blocks: list[nn.Module]) -> None:
    """Blocks that differ in its rate alone get equal graphs."""
    for block in blocks:
        for name, part in list(block.named_modules()):
            if isinstance(part, timm.layers.DropPath):
                block.set_submodule(name, DropPath(part.drop_prob))
    paths = [part for block in blocks for part in block.modules() if isinstance(part, DropPath)]
    if any(path.drop_prob for path in paths):
        device = next(blocks[0].parameters()).device
        for path in paths:
            path.share_graph(device)


def flops_per_image(task: nn.Module, loader, normalize: Normalize) -> float:
    """FLOPs of one training step, counted on two images; what that changes in batch statistics is put back.

    --grad_checkpointing does not count: what is computed twice is needed once.
    """
    recomputing = [module for module in task.modules() if getattr(module, "grad_checkpointing", False)]
    for module in recomputing:
        module.grad_checkpointing = False
    batch = normalize(default_collate([loader.dataset[0, index] for index in (0, 1)]))
    statistics = BatchStatistics(task, getattr(task, "teacher", None))
    statistics.keep()
    flops = utils.count_flops(lambda: task(batch)["loss"].backward())
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
    """Resumes weights, wraps the task in its engine, resumes the rest: everything between data and the first step.

    `task` is what is trained, `network` the part of it that checkpoints hold; `average_key` names its average there.
    """
    device, average, stop = normalize.device, task.average, StopSignal()
    lr, weight_decay = schedules(args, loader.steps_per_epoch)
    origin = Origin.find(args)
    if origin is not None:
        origin.load_weights(network, average, average_key, getattr(args, "resume_copy", ""))
    peak, n_parameters = utils.peak_flops(device, args.precision), utils.count_parameters(network)
    flops = flops_per_image(task, loader, normalize) if peak else None
    recompute_gelu(network, getattr(args, "recompute_gelu", "auto"))
    if getattr(args, "compile", False):
        compile_blocks(network, average and average.module, getattr(task, "frozen", None))
    if getattr(args, "sync_bn", False):
        synchronise_batch_norm(network, device)
    runner = build_runner(args, task, groups, device)
    runner.watch(network, average and average.module)
    if average is not None:
        average.read = runner.whole
    monitor = StepMonitor(
        folder=args.output_dir, rank=args.rank, max_nonfinite=args.max_nonfinite, scaled=args.precision == "fp16"
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
        throughput=Throughput(options.effective_batch(args), flops, peak),
        session=session,
        run_log=RunLog(args, options.as_config(args)),
        stop=stop,
    )
    return run, session.resume(origin)


def image_mean_std(args: Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return MEAN_STD["imagenet" if args.imagenet_default_mean_and_std else "inception"]


def set_float32_products(precision: str, device: torch.device) -> None:
    """How exact float32 products and convolutions are; on a GPU cuDNN's kernels are also chosen by measuring them."""
    torch.set_float32_matmul_precision(precision)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision == "high"
        torch.backends.cudnn.benchmark = True


def set_up(args: Namespace) -> Normalize:
    """Joins the other processes, starts the log, settles device and precision."""
    device = utils.init_distributed(args)
    utils.setup_logging(args.rank)
    if device.type == "cpu":
        utils.keep_freed_memory()
    options.resolve_precision(args, device)
    options.resolve_lr(args)
    check_precision(args.precision, device)
    set_float32_products(options.resolve_matmul_precision(args, device), device)
    return Normalize(image_mean_std(args), device)


def main(args: Namespace) -> None:
    normalize = set_up(args)
    method = build_method(args)
    loader = build_data(args, method)
    options.report(args, options.derived(args, loader.steps_per_epoch) | {"images": len(loader.dataset)})
    groups = param_groups(method, args.weight_decay)
    if args.dry_run:
        return dry_run(args, groups, loader.steps_per_epoch, normalize.device)
    if args.compile and (masks := mask_generator(args, method, "mask")) is not None:
        method.most_masked = masks.most
    method.to(normalize.device)
    if method.teacher is not None:
        method.teacher.to(normalize.device)
    run, position = start_training(args, method, method, loader, groups, normalize, "teacher")
    train(run, position, after_epoch=lambda position: {})


def launch(main_function, args: Namespace) -> None:
    """Users' mistakes and orderly stops end in one line, not in a traceback.

    Only orderly ends, of which all ranks know, leave the process group: after an error the others may be waiting in it.
    """
    code = 0
    try:
        main_function(args)
    except Stopped as stopped:
        log.info("stopped by %s; run the same command to go on", stopped)
        code = STOPPED
    except (ValueError, NonFiniteError, BadImagesError) as error:
        # an error in a loader worker comes with the worker's traceback: the last line is what it says
        log.error("error: %s", str(error).rstrip().rpartition("\n")[2])
        code = 1
        if utils.has_peers():
            utils.exit_at_once(code)
    except BaseException:
        if utils.has_peers():
            traceback.print_exc()
            utils.exit_at_once(1)
        utils.leave_process_group()
        raise
    utils.leave_process_group()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    launch(main, options.parse("pretrain"))
