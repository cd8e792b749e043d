"""The flags in labelled groups; names are the published ones."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from masking_generator import MASKS
from modeling_finetune import ATTENTION_KERNELS, registered_flags
from optim_factory import LR_SCHEDULES
from unimim.cli.parser import FlagParser, ImageSize
from unimim.data.crops import INTERPOLATIONS
from unimim.data.jpeg import MAX_IMAGE_PIXELS
from unimim.data.preparation import ALPHAS, DROP
from unimim.data.sources import DATA_SETS
from unimim.errors import OptionError
from unimim.flag import Flag

# Accepted because published commands carry them; they had no effect there either.
LEFTOVERS = {
    "pretrain": ("discrete_vae_type", "warmup_lr", "no_loss_masked"),
    "finetune": ("warmup_lr", "resplit"),
}  # fmt: skip
NUM_WORKERS = 10  # the published default
_LEFTOVER_SWITCHES = ("no_loss_masked", "resplit")
# The flags behind what models report errors of; a method's own flags come from its class.
_FLAGS_OF_OPTIONS = {
    "model": "model", "backbone": "model", "input_size": "input_size", "patch_size": "patch_size",
    "num_classes": "nb_classes", "attn": "attn", "grad_checkpointing": "grad_checkpointing",
    "drop_path": "drop_path", "init_values": "layer_scale_init_value", "mask_type": "mask_type",
    "layer": "layer", "permutation_type": "permutation_type", "in_chans": "in_chans",
    "kmeans_teacher": "kmeans_teacher",
}  # fmt: skip


def build_parser(stage: str) -> argparse.ArgumentParser:
    """Return the parser of `stage`: "pretrain" or "finetune"."""
    titles = {
        "pretrain": "Masked-image-modeling pre-training",
        "finetune": "Fine-tuning and evaluation for classification",
    }
    parser = FlagParser(
        description=f"{titles[stage]}. The recipe of --model replaces the defaults below; "
        "--dry_run prints what a run takes, and config.yaml in --output_dir holds it.",
    )
    stage_flags = {"pretrain": _pretrain_flags, "finetune": _finetune_flags}
    for add in (
        _model_flags,
        add_data_flags,
        add_optimizer_flags,
        stage_flags[stage],
        add_engine_flags,
        add_run_flags,
    ):
        add(parser, stage)
    group = parser.add_argument_group("published flags without effect")
    for name in LEFTOVERS[stage]:
        switch = {"action": "store_true"} if name in _LEFTOVER_SWITCHES else {}
        group.add_argument(f"--{name}", default=None, help=argparse.SUPPRESS, **switch)
    return parser


@contextmanager
def options_as_flags() -> Iterator[None]:
    """Raise a ValueError in the command line's words in place of a model's OptionError."""
    try:
        yield
    except OptionError as error:
        raise ValueError(in_flags(error)) from error


def in_flags(error: OptionError) -> str:
    """Return an error's message in the command line's words."""
    flags = {flag.option or flag.name: flag.name for flag in registered_flags()}
    return error.in_flags(flags | _FLAGS_OF_OPTIONS)


class _LearningRate(argparse.Action):
    """--lr and --blr replace each other: the one that comes later counts."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.lr = namespace.blr = None
        setattr(namespace, self.dest, values)


def exit_status(text: str) -> int:
    """Return the number of an exit status; argparse's error for any other text."""
    if not text.isdecimal() or int(text) > 255:
        raise argparse.ArgumentTypeError(f"{text} is not an exit status; use 0 to 255")
    return int(text)


def _switch(group, name: str, off: str, *, default: bool | None = True, help: str) -> None:
    group.add_argument(f"--{name}", dest=name, action="store_true", default=default, help=help)
    group.add_argument(
        f"--{off}", dest=name, action="store_false", default=default, help=f"switches --{name} off"
    )


def _model_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    group = parser.add_argument_group("model")
    name = {"pretrain": "conmim_base_patch16_224", "finetune": "beit_base_patch16_224"}[stage]
    group.add_argument("--model", default=name, help="a registered model; --list_models shows them")
    group.add_argument(
        "--list_models", action="store_true",
        help="print the registered models, by what they are for, and exit",
    )  # fmt: skip
    if stage == "pretrain":
        group.add_argument(
            "--list_space", action="store_true",
            help="print which masks, encoder forms and targets go together, and exit",
        )  # fmt: skip
    add_size_flags(group)
    group.add_argument(
        "--layer_scale_init_value",
        type=float,
        default=None,
        help="0 disables layer scale; None: the model's own",
    )
    group.add_argument(
        "--drop_path", type=float, default={"pretrain": 0.0, "finetune": 0.1}[stage],
        help="stochastic depth: rate of the last block, from 0 in the first",
    )  # fmt: skip
    group.add_argument("--abs_pos_emb", action="store_true", help="learned absolute positions")
    placement = {"pretrain": "one shared table", "finetune": "one table per block"}[stage]
    _switch(
        group, "rel_pos_bias", "disable_rel_pos_bias", default=None,
        help=f"relative position bias, {placement}; None: the model's own",
    )  # fmt: skip
    group.add_argument(
        "--attn",
        choices=ATTENTION_KERNELS,
        default="auto",
        help="attention kernel; flex: GPUs only",
    )
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="recompute activations: less memory, 1.3x time",
    )
    group.add_argument(
        "--recompute_gelu", choices=("auto", "on", "off"), default="auto",
        help="a fifth less memory by making the GELU again in the backward pass; auto: on a CPU, "
        "where it is free",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="torch.compile, block by block")


def add_size_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of sizes and channels, and --model_kwargs."""
    group.add_argument(
        "--input_size", action=ImageSize, default=None,
        help="size of the images in pixels: S, H W or HxW; None is the model's own",
    )  # fmt: skip
    group.add_argument(
        "--patch_size", type=int, default=None, help="patch side in pixels; None is the model's own"
    )
    group.add_argument(
        "--in_chans", type=int, default=None, metavar="N",
        help="channels of the images that the model sees; 1: gray ones; None is 3; others: kept "
        "as the files have them",
    )  # fmt: skip
    group.add_argument(
        "--keep_channels",
        action="store_true",
        help="read every channel at its own depth (16 bits, .npy, TIFF) instead of 8-bit RGB; so "
        "it is where --in_chans is neither 1 nor 3",
    )
    group.add_argument(
        "--model_kwargs",
        nargs="*",
        default=[],
        metavar="K=V",
        help="any constructor option of the model",
    )


def add_data_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Add where the images come from and how they are read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_set", default=None,
        choices=DATA_SETS,
        help="IMNET: map files beside folders or zips; tar: WebDataset's shards; hf: parquet or "
        "arrow files of the Hugging Face hub; packed: SemMAE's .npy samples; None: inferred from "
        "--data_path; digits without one",
    )  # fmt: skip
    group.add_argument(
        "--data_path",
        default=None,
        help="root folder of the data, or USER/NAME, which is in the Hugging Face hub's cache",
    )
    if stage not in ("knn", "analysis"):
        group.add_argument(
            "--train_interpolation", default="bicubic", choices=INTERPOLATIONS,
            help="how training crops are resized",
        )  # fmt: skip
    add_loader_flags(group)
    group.add_argument(
        "--exif_orientation", action="store_true", help="turn images as their EXIF data say"
    )
    group.add_argument(
        "--alpha", choices=ALPHAS, default=DROP,
        help="what becomes of an alpha channel: dropped, as in the published code, or the image is "
        "composited over white or black",
    )  # fmt: skip
    if stage == "pretrain":
        group.add_argument(
            "--crop_scale",
            type=float,
            nargs=2,
            default=(0.08, 1.0),
            metavar=("MIN", "MAX"),
            help="fraction of the area that a crop keeps",
        )
        group.add_argument(
            "--hflip", type=float, default=0.5, help="probability that an image is mirrored"
        )
        group.add_argument(
            "--color_jitter", type=float, default=0.0,
            help="range of brightness, contrast and saturation of the whole image, before the "
            "crop; BEiT: 0.4",
        )  # fmt: skip
        group.add_argument(
            "--data_pipeline",
            choices=("fast", "reference"),
            default="fast",
            help="reference: PIL, as published",
        )
        group.add_argument(
            "--decode", choices=("cpu", "gpu"), default="cpu",
            help="where JPEGs are decoded, cropped, resized and colored; gpu: by nvJPEG, with the "
            "same crops and masks",
        )  # fmt: skip
        return
    group.add_argument(
        "--eval_data_path",
        default=None,
        help="validation folder, where --data_path holds only training images",
    )
    if stage == "analysis":
        return
    group.add_argument(
        "--nb_classes", type=int, default=None, help="number of classes; None is the data set's"
    )
    group.add_argument(
        "--class_map", default=None, metavar="FILE",
        help="class folders in the order of the model's classes, one a line; the word imagenet is "
        "ImageNet's WordNet ids; None: sorted",
    )  # fmt: skip
    group.add_argument(
        "--label_list", default=None, metavar="FILE",
        help="train on the images that the file lists, one name a line; "
        "scripts/tools/make_subset.py writes such files",
    )  # fmt: skip
    group.add_argument(
        "--label_fraction",
        type=float,
        default=1.0,
        help="train on this fraction of each class, the first images",
    )


def add_loader_flags(group: argparse._ArgumentGroup) -> None:
    """Add how images are normalized and read, and what becomes of unreadable ones."""
    _switch(
        group, "imagenet_default_mean_and_std", "no_imagenet_default_mean_and_std", default=False,
        help="ImageNet mean and std instead of 0.5",
    )  # fmt: skip
    group.add_argument(
        "--mean", type=float, nargs="+", default=None, metavar="R G B",
        help="mean of each channel of images in [0, 1], in place of these two",
    )  # fmt: skip
    group.add_argument(
        "--std", type=float, nargs="+", default=None, metavar="R G B", help="std of each channel"
    )
    group.add_argument(
        "--num_workers", type=int, default=NUM_WORKERS,
        help=f"processes that load images; the default is at most {NUM_WORKERS} and reduced to the "
        "CPUs",
    )  # fmt: skip
    _switch(group, "pin_mem", "no_pin_mem", help="pinned host memory for faster copies to a GPU")
    group.add_argument(
        "--max_bad_images",
        type=int,
        default=100,
        help="unreadable images that are replaced before the run stops",
    )
    group.add_argument(
        "--strict_data", action="store_true", help="stop at the first unreadable image"
    )
    group.add_argument(
        "--max_image_pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        help="images of more pixels are unreadable, whatever their file's size",
    )
    group.add_argument(
        "--allow_outside",
        action="store_true",
        help="read absolute paths and '..' in map files",
    )


def add_optimizer_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Add the flags of batch, optimizer and schedules."""
    pretrain = stage == "pretrain"
    group = parser.add_argument_group("optimizer and schedule")
    group.add_argument(
        "--batch_size", type=int, default=64, help="images per process and micro-step"
    )
    group.add_argument(
        "--update_freq",
        type=int,
        default=1,
        help="micro-steps per optimizer step (gradient accumulation)",
    )
    group.add_argument(
        "--epochs", type=int, default=300 if pretrain else 30, help="passes over the training data"
    )
    group.add_argument("--opt", default="adamw", help="adamw, sgd, lamb, lars, ... (timm's names)")
    group.add_argument("--opt_eps", type=float, default=1e-8, help="epsilon of the optimizer")
    group.add_argument(
        "--opt_betas",
        type=float,
        nargs="+",
        default=(0.9, 0.98) if pretrain else None,
        help="None: the optimizer's",
    )
    group.add_argument("--momentum", type=float, default=0.9, help="of SGD's family")
    group.add_argument(
        "--clip_grad",
        type=float,
        default=None,
        help="largest 2-norm of the gradients; None: no clipping",
    )
    group.add_argument("--weight_decay", type=float, default=0.05, help="at the first step")
    group.add_argument(
        "--weight_decay_end", type=float, default=None, help="cosine to this value; None: constant"
    )
    group.add_argument(
        "--lr",
        type=float,
        default=5e-4,
        action=_LearningRate,
        help="peak learning rate, not scaled by the batch size",
    )
    group.add_argument(
        "--blr",
        type=float,
        default=None,
        action=_LearningRate,
        help="in place of --lr: the peak for 256 images a step",
    )
    group.add_argument(
        "--lr_schedule", choices=LR_SCHEDULES, default="cosine",
        help="mae: its warm-up reaches the peak one step later, as in MAE's code; the others are "
        "A2MIM's",
    )  # fmt: skip
    group.add_argument(
        "--lr_steps",
        type=int,
        nargs="*",
        default=(),
        help="of --lr_schedule step: epochs of its steps",
    )
    group.add_argument(
        "--lr_gamma", type=float, default=0.1, help="of --lr_schedule step: factor of each step"
    )
    group.add_argument(
        "--warmup_ratio", type=float, default=0.0,
        help="of --lr_schedule step, cosine_iters, cosine_epochs: ratio of the lr that the warm-up "
        "begins with",
    )  # fmt: skip
    group.add_argument(
        "--min_lr", type=float, default=1e-5 if pretrain else 1e-6, help="lr of the last step"
    )
    group.add_argument(
        "--warmup_epochs", type=int, default=5, help="epochs in which the lr rises to its peak"
    )
    group.add_argument(
        "--warmup_steps", type=int, default=-1, help="overrides --warmup_epochs if positive"
    )
    if not pretrain:
        group.add_argument(
            "--layer_decay", type=float, default=0.9,
            help="factor of the lr from a block to the one before it",
        )  # fmt: skip
        group.add_argument(
            "--full_last_block", action="store_true",
            help="--layer_decay begins with the last block but one; the last has the head's lr",
        )  # fmt: skip
        group.add_argument(
            "--head_lr", type=float, default=None,
            help="peak lr of the head and of the norm before it, never scaled; None: --lr",
        )  # fmt: skip
        group.add_argument(
            "--layer_warmup", action="store_true",
            help="each layer warms up by itself: one whose lr has the factor f in 1 - f of the "
            "warm-up, at least one step",
        )  # fmt: skip
        group.add_argument(
            "--disable_weight_decay_on_rel_pos_bias", action="store_true",
            help="no weight decay of the tables of relative positions",
        )  # fmt: skip


def _pretrain_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    group = parser.add_argument_group("masks")
    group.add_argument(
        "--mask_type", choices=tuple(MASKS), default="block",
        help="blocks of patches (BEiT), coarse squares (SimMIM), single patches, semantic parts "
        "(SemMAE), what is attended to most or least, or, for prediction in an order, none; the "
        "default is the model's own",
    )  # fmt: skip
    group.add_argument("--mask_ratio", type=float, default=0.75, help="of all but block")
    group.add_argument(
        "--mask_patch_size",
        type=int,
        default=None,
        help="random_mps32: side of a masked square in pixels; None: two patches",
    )
    group.add_argument(
        "--num_mask_patches",
        type=int,
        default=None,
        help="block: patches to mask; None: 75 of 196, scaled",
    )
    group.add_argument(
        "--max_mask_patches_per_block", type=int, default=None,
        help="block: largest block; None: --num_mask_patches",
    )  # fmt: skip
    group.add_argument(
        "--min_mask_patches_per_block", type=int, default=16, help="block: smallest block"
    )
    group.add_argument(
        "--separate_mask_ratio", type=float, default=None, metavar="RATIO",
        help="SemanticMIM: predict this ratio of the patches, drawn separately; None: masked ones",
    )  # fmt: skip
    group = parser.add_argument_group("evaluation of the encoder while it trains")
    group.add_argument(
        "--eval_every", type=int, default=0, metavar="EPOCHS",
        help="k-NN, a linear probe, effective rank and attention entropy, every so many epochs and "
        "after the last; 0: never",
    )  # fmt: skip
    group.add_argument(
        "--eval_data_path",
        default=None,
        help="labeled images for --eval_every; None: those of the training data",
    )
    group.add_argument(
        "--eval_images",
        type=int,
        default=10000,
        help="most images of training and of validation for --eval_every",
    )
    group = parser.add_argument_group("parts (SemMAE)")
    group.add_argument(
        "--part_maps",
        default=None,
        metavar="PATH",
        help="folder, zip or array of the images' part maps",
    )
    group.add_argument(
        "--part_source", choices=("maps", "attention_heads", "kmeans", "random"), default="maps",
        help="maps: any that --part_maps holds; attention_heads, kmeans: maps of that kind; "
        "random: without meaning",
    )  # fmt: skip
    group = parser.add_argument_group("images of the tokenizer (BEiT, SemanticBEiT)")
    group.add_argument(
        "--second_input_size",
        type=int,
        default=None,
        help="side of the tokenizer's images; None: one visual token for each patch",
    )
    group.add_argument(
        "--second_interpolation", choices=INTERPOLATIONS, default="lanczos",
        help="how the tokenizer's images are resized",
    )  # fmt: skip
    _method_flags(parser)


def _method_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that the classes of the registered methods list, in groups of those that the
    same classes take."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag, classes in registered_flags().items():
        if f"--{flag.name}" in parser._option_string_actions:  # the data take it too
            continue
        title = flag.group or ", ".join(classes)
        if title not in groups:
            groups[title] = parser.add_argument_group(title, "None: the model's own value")
        _add_flag(groups[title], flag)


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    if flag.off:
        _switch(group, flag.name, flag.off, default=flag.default, help=flag.help)
        return
    group.add_argument(
        f"--{flag.name}", type=flag.type, choices=flag.choices, default=flag.default,
        metavar=flag.metavar, help=flag.help,
    )  # fmt: skip


def _finetune_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    group = parser.add_argument_group("starting point")
    group.add_argument(
        "--finetune", default="", help="pre-trained checkpoint: file or https address"
    )
    group.add_argument(
        "--model_key", default="model|module", help="where the weights are in that file"
    )
    group.add_argument(
        "--model_prefix", default="", help="prefix of the weights' names in that file"
    )
    group.add_argument("--init_scale", type=float, default=0.001, help="of the new head")
    group.add_argument(
        "--freeze_blocks", type=int, default=0, metavar="K",
        help="partial fine-tuning: the embedding of the patches and the first K blocks stay as "
        "they are",
    )  # fmt: skip
    _switch(
        group, "use_mean_pooling", "use_cls", help="mean of patch tokens instead of the class token"
    )
    group = parser.add_argument_group("regularization")
    group.add_argument("--drop", type=float, default=0.0, help="dropout")
    group.add_argument(
        "--attn_drop_rate", type=float, default=0.0, help="dropout of attention probabilities"
    )
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    _switch(
        group, "bce_loss", "no_bce_loss", default=False,
        help="binary cross entropy, summed over the classes, in place of softmax's",
    )  # fmt: skip
    group.add_argument("--color_jitter", type=float, default=0.4, help="only with an empty --aa")
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help='RandAugment or AutoAugment policy; "" for none',
    )
    group.add_argument("--reprob", type=float, default=0.25, help="random erasing")
    group.add_argument(
        "--remode", default="pixel", choices=("const", "rand", "pixel"),
        help="what random erasing fills in: black, one random color, or noise",
    )  # fmt: skip
    group.add_argument("--recount", type=int, default=1, help="most rectangles of random erasing")
    group.add_argument(
        "--aug_repeats", type=int, default=1, metavar="N",
        help="repeated augmentation: each image N times in a step, so that an epoch shows one in N",
    )  # fmt: skip
    group.add_argument(
        "--no_aug",
        action="store_true",
        help="no crop, flip, --aa, --color_jitter, --reprob: images as for evaluation",
    )
    group.add_argument("--mixup", type=float, default=0.0, help="mixup's alpha; 0: none")
    group.add_argument("--cutmix", type=float, default=0.0, help="CutMix's alpha; 0: none")
    group.add_argument(
        "--cutmix_minmax", type=float, nargs=2, default=None, metavar=("MIN", "MAX"),
        help="CutMix with sides in this range, in place of --cutmix",
    )  # fmt: skip
    group.add_argument(
        "--mixup_prob", type=float, default=1.0, help="probability that a batch is mixed"
    )
    group.add_argument(
        "--mixup_switch_prob", type=float, default=0.5,
        help="probability of CutMix where mixup is given too",
    )  # fmt: skip
    group.add_argument(
        "--mixup_mode", default="batch", choices=("batch", "pair", "elem"),
        help="one mixing ratio for each batch, pair or image",
    )  # fmt: skip
    _switch(
        group,
        "model_ema",
        "no_model_ema",
        default=False,
        help="keep and evaluate an ema of the weights",
    )
    group.add_argument(
        "--model_ema_decay", type=float, default=0.9999, help="how much of the ema a step keeps"
    )
    group.add_argument(
        "--model_ema_warmup_epochs",
        type=int,
        default=0,
        help="epochs in which the decay rises, from nine tenths",
    )
    group.add_argument("--model_ema_force_cpu", action="store_true", help="keep the ema on the CPU")
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval", action="store_true", help="evaluate --resume (or --finetune) and exit"
    )
    _switch(group, "dist_eval", "no_dist_eval", help="share the validation images among processes")
    group.add_argument(
        "--disable_eval_during_finetuning", action="store_true", help="train without evaluation"
    )
    group.add_argument(
        "--crop_pct", type=float, default=None,
        help="fraction of the side that the central crop keeps; None: 0.875, 1 from 384 px",
    )  # fmt: skip
    group.add_argument(
        "--squash", action="store_true",
        help="before that crop images get its aspect ratio, in place of their own",
    )  # fmt: skip
    group.add_argument(
        "--eval_input_size",
        action=ImageSize,
        default=None,
        help="size of validation images; None: that of training images",
    )


def add_process_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of device, precision and processes, all that a script without training needs
    of the engine."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--device", default="cuda", help="cuda (falls back to cpu where there is none) or cpu"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 where the hardware has it",
    )
    group.add_argument(
        "--dist_on_itp", action="store_true", help="read the process's rank from OpenMPI"
    )
    group.add_argument("--dist_url", default="env://", help="where the processes meet")
    group.add_argument(
        "--dist_timeout",
        type=float,
        default=60.0,
        metavar="MINUTES",
        help="how long a process waits for the others",
    )
    group.add_argument("--world_size", type=int, default=1, help=argparse.SUPPRESS)
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return group


def add_engine_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Add the flags of device, precision, DeepSpeed and processes."""
    group = add_process_flags(parser)
    group.add_argument(
        "--matmul_precision",
        choices=("auto", "highest", "high"),
        default="auto",
        help="of float32 products and convolutions: high takes TF32 on a GPU; auto: high on a GPU, "
        "highest on a CPU",
    )
    _switch(
        group,
        "sync_bn",
        "no_sync_bn",
        default=False,
        help="batch normalization over the batches of all processes",
    )
    group.add_argument("--enable_deepspeed", action="store_true", help="train with DeepSpeed")
    group.add_argument(
        "--zero_stage", type=int, choices=(0, 1, 2, 3), default=1,
        help="DeepSpeed: shard nothing, optimizer state, gradients too, weights too",
    )  # fmt: skip
    group.add_argument(
        "--deepspeed_config",
        default=None,
        metavar="FILE.json",
        help="overrides what the flags would generate",
    )
    group.add_argument(
        "--offload",
        choices=("optimizer",),
        default=None,
        help="keep the optimizer's state and step on the host",
    )
    group.add_argument(
        "--deepspeed_shards",
        action="store_true",
        help="save DeepSpeed's own shards beside a checkpoint, for very large models; only the "
        "same --zero_stage and number of processes resume them",
    )
    group.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    group.add_argument(
        "--max_nonfinite",
        type=int,
        default=3,
        help="steps in a row that may be skipped for a non-finite loss or gradient",
    )


def add_default_flags(group: argparse._ArgumentGroup) -> None:
    """Add --recipe and --config, whose values `parse` and `parse_flags` take as defaults."""
    group.add_argument(
        "--recipe", default=None, metavar="NAME",
        help="published settings, --model too; scripts/recipe.sh --list shows them. None: those of "
        "the model, if any",
    )  # fmt: skip
    group.add_argument(
        "--config",
        default=None,
        metavar="FILE.yaml",
        help="flag values; flags on the command line win",
    )


def add_run_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Add the flags of output, log, checkpoints and resuming."""
    group = parser.add_argument_group("run")
    add_default_flags(group)
    group.add_argument("--output_dir", default="", help="empty: nothing is saved")
    group.add_argument("--log_dir", default=None, help="tensorboard folder")
    group.add_argument("--wandb", default=None, metavar="PROJECT", help="log to Weights & Biases")
    group.add_argument(
        "--tracker", default=None, choices=("wandb", "trackio", "tensorboard"),
        help="log there, to the project of --wandb or to the folder --log_dir; both have defaults",
    )  # fmt: skip
    group.add_argument("--log_every", type=int, default=50, help="steps between lines of the log")
    group.add_argument(
        "--seed", type=int, default=0, help="of weights, order, augmentation, masks and dropout"
    )
    group.add_argument("--start_epoch", type=int, default=0, help="first epoch of a new run")
    group.add_argument(
        "--resume",
        default="",
        help="checkpoint to go on from; SIGTERM, SIGINT and SIGUSR1 let a run save one and end",
    )
    group.add_argument(
        "--stop_status", type=exit_status, default=0, metavar="N",
        help="exit status of a run that a signal stopped, as its log's last line says; "
        "75 keeps `pretrain && finetune` from going on, and lets scripts/slurm.sh requeue it",
    )  # fmt: skip
    if stage == "pretrain":
        group.add_argument(
            "--init",
            default="",
            metavar="FILE",
            help="weights to begin a new run with, whole or an encoder alone, of any input size, "
            "patch size and naming: what fits is loaded, the rest stays fresh",
        )
        group.add_argument(
            "--resume_copy",
            default="",
            help="published checkpoint_copy-*.pth: the teacher that belongs to --resume",
        )
    _switch(
        group,
        "auto_resume",
        "no_auto_resume",
        help="go on from the newest whole checkpoint in --output_dir",
    )
    _switch(group, "save_ckpt", "no_save_ckpt", help="save checkpoints")
    group.add_argument("--save_ckpt_freq", type=int, default=20, help="epochs between checkpoints")
    group.add_argument(
        "--save_ckpt_steps",
        type=int,
        default=0,
        help="optimizer steps between checkpoints within an epoch; 0: none",
    )
    group.add_argument(
        "--keep_checkpoints", type=int, default=None, metavar="K", help="keep the last K; None: all"
    )
    group.add_argument(
        "--dry_run", action="store_true", help="check the flags, print the configuration and exit"
    )
