"""Print the command of this repository for a configuration of SemanticMIM, A2MIM or OpenMixup.

    python scripts/tools/translate_config.py CONFIG.py

CONFIG.py is a file for mmengine (SemanticMIM's and mmpretrain's) or for mmcv (A2MIM's and
OpenMixup's), for pre-training, fine-tuning or linear probing. Its values are read, and those of the
files under `_base_`, but nothing is executed: what is not a plain value, and what has no flag here,
is listed in comments below the command.
"""

import argparse
import ast
import operator
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.recipes import PROGRAMS

IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
HALF = ([127.5, 127.5, 127.5], [127.5, 127.5, 127.5])
# keys that say nothing about the training: logs, hooks, hardware, evaluation
SILENT = (
    "_base_", "auto_scale_lr", "checkpoint_config", "cudnn_benchmark", "custom_hooks",
    "custom_imports", "dataset_type", "data_settings", "default_hooks", "default_scope",
    "dist_params", "env_cfg", "evaluation", "fp16", "img_norm_cfg", "launcher", "load_from",
    "log_config", "log_level", "log_processor", "resume", "resume_from", "test_cfg",
    "test_dataloader", "test_evaluator", "test_pipeline", "use_fp16", "val_cfg", "val_dataloader",
    "val_evaluator", "vis_backends", "visualizer", "work_dir", "workflow", "prefetch",
    "train_pipeline", "update_interval",
)  # fmt: skip
SILENT_BELOW = (
    "data.val", "data.test", "data.train.type", "data.train.prefetch", "data.train.data_source.",
    "data.train_dataloader", "data.prefetch", "data.num_gpus", "data.drop_last",
    "train_dataloader.sampler", "train_dataloader.persistent_workers",
    "train_dataloader.collate_fn", "train_dataloader.dataset.", "train_dataloader.pin_memory",
    "optimizer_config.", "optim_wrapper.loss_scale", "lr_config.warmup", "randomness.",
    "model.data_preprocessor.", "data_preprocessor.",
)  # fmt: skip
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip
LARGEST_POWER = 64

# --------------------------------------------------------------------------------------------------
# Reading


class NotPlainError(ValueError):
    """An expression is not a plain value."""


@dataclass
class Config:
    """A file's values with those of its bases, and what of them is not a plain value."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read(path: Path, above: tuple[Path, ...] = ()) -> Config:
    """Return the values of a configuration file; nothing in it is executed.

    Raises:
        ValueError: there is no such file, or it is not Python.
    """
    try:
        text = path.read_text()
        tree = ast.parse(text)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    own = Config()
    evaluate = Evaluator(own.values, own.problems, text)
    for statement in tree.body:
        _read_statement(statement, evaluate, path)
    bases = own.values.pop("_base_", [])
    whole = Config()
    for name in [bases] if isinstance(bases, str) else bases:
        _add_base(whole, path.parent / name, (*above, path.resolve()))
    whole.values = merged(whole.values, own.values)
    whole.problems += own.problems
    return whole


def _read_statement(statement: ast.stmt, evaluate: "Evaluator", path: Path) -> None:
    """Set the variable of an assignment; note any other statement."""
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if len(targets) == 1 and isinstance(targets[0], ast.Name):
        try:
            evaluate.known[targets[0].id] = evaluate(statement.value)
        except NotPlainError as error:
            evaluate.problems.append(f"{targets[0].id} = {error}")
    elif not is_text:
        evaluate.problems.append(f"{path.name}:{statement.lineno}: {evaluate.source(statement)}")


def _add_base(config: Config, path: Path, above: tuple[Path, ...]) -> None:
    """Merge the file of a `_base_` into the configuration; note a missing one."""
    if path.resolve() in above:
        config.problems.append(f"_base_ {path}: it inherits itself")
    elif not path.is_file():
        config.problems.append(f"_base_ {path}: there is no such file")
    else:
        base = read(path, above)
        config.values = merged(config.values, base.values)
        config.problems += base.problems


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `own` over `base`, dictionaries key by key unless they say `_delete_`."""
    result = dict(base)
    for key, value in own.items():
        if isinstance(value, dict):
            fresh = value.get("_delete_", False) or not isinstance(base.get(key), dict)
            rest = {name: item for name, item in value.items() if name != "_delete_"}
            result[key] = merged({} if fresh else base[key], rest)
        else:
            result[key] = value
    return result


class Evaluator:
    """Evaluates plain values: literals, dict(...), known variables, arithmetic on them.

    An item of a dictionary or list that is not plain is left out and noted in `problems`.
    """

    def __init__(self, known: dict[str, Any], problems: list[str], text: str):
        self.known = known
        self.problems = problems
        self.text = text

    def source(self, node: ast.AST) -> str:
        """Return the node's source in one short line."""
        text = " ".join((ast.get_source_segment(self.text, node) or "").split())
        return text if len(text) <= 80 else f"{text[:77]}..."

    def __call__(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.known:
            return self.known[node.id]
        if isinstance(node, ast.List | ast.Tuple):
            return [value for _, value in self.items((str(i), n) for i, n in enumerate(node.elts))]
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return dict(self.items((None if k is None else self(k), v) for k, v in pairs))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args:
            return dict(self.items((item.arg, item.value) for item in node.keywords))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.number(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self.operation(node)
        if isinstance(node, ast.Subscript):
            return self.element(node)
        raise NotPlainError(self.source(node))

    def items(self, pairs: Iterator[tuple[Any, ast.expr]]) -> Iterator[tuple[Any, Any]]:
        """Yield the plain items; a key None stands for **mapping."""
        for key, node in pairs:
            try:
                value = self(node)
            except NotPlainError as error:
                self.problems.append(f"{key or '**'} = {error}")
                continue
            if key is not None:
                yield key, value
            elif isinstance(value, dict):
                yield from value.items()

    def number(self, node: ast.expr) -> int | float:
        value = self(node)
        if not isinstance(value, int | float):
            raise NotPlainError(self.source(node))
        return value

    def operation(self, node: ast.BinOp) -> Any:
        """Return the result of an operation on numbers, or a sum of two lists or texts."""
        left = self(node.left)
        right = self(node.right)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        joined = isinstance(node.op, ast.Add) and type(left) is type(right)
        too_large = isinstance(node.op, ast.Pow) and (not numbers or abs(right) > LARGEST_POWER)
        if too_large or not (numbers or (joined and isinstance(left, list | str))):
            raise NotPlainError(self.source(node))
        try:
            return _OPERATORS[type(node.op)](left, right)
        except (ArithmeticError, ValueError) as error:
            raise NotPlainError(self.source(node)) from error

    def element(self, node: ast.Subscript) -> Any:
        """Return an element of a known list or dictionary."""
        try:
            return self(node.value)[self(node.slice)]
        except (KeyError, IndexError, TypeError) as error:
            raise NotPlainError(self.source(node)) from error


# --------------------------------------------------------------------------------------------------
# What has been asked for


class Values:
    """A configuration's values by dotted names, and which of them nobody has asked for."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.read: set[str] = set()

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of the values that is there; all these names count as read."""
        self.read |= set(names)
        for name in names:
            value: Any = self.values
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                return value
        return default

    def unread(self) -> Iterator[str]:
        """Yield "name = value" of everything that was not read, top-level hooks and logs aside."""
        yield from self._unread(self.values, "")

    def _unread(self, values: dict[str, Any], above: str) -> Iterator[str]:
        for key, value in values.items():
            name = f"{above}{key}"
            if name in self.read or name in SILENT or name.startswith(SILENT_BELOW):
                continue
            if isinstance(value, dict):
                yield from self._unread(value, f"{name}.")
            else:
                yield f"{name} = {value!r}"


@dataclass
class Command:
    """A command of this repository: a stage, flags in order, and remarks."""

    stage: str
    model: str
    flags: dict[str, Any] = field(default_factory=dict)
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def set(self, flag: str, value: Any) -> None:
        """Set the flag unless there is no value."""
        if value is not None:
            self.flags[flag] = value

    def words(self) -> list[list[str]]:
        """Return the flags with their values."""
        groups = [["--model", self.model]]
        for flag, value in self.flags.items():
            if isinstance(value, bool):
                groups.append([f"--{flag}" if value else f"--no_{flag}"])
            else:
                several = value if isinstance(value, list | tuple) else [value]
                groups.append([f"--{flag}", *map(_shown, several)])
        if self.model_kwargs:
            pairs = [f"{name}={_shown(value)}" for name, value in self.model_kwargs.items()]
            groups.append(["--model_kwargs", *pairs])
        return groups


def _shown(value: Any) -> str:
    """Return a value as a word of a command line or of YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.10g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------------
# The network

SIZES = {
    "t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "deit-s": "deit_small",
    "deit-small": "deit_small", "mae_vit_b": "base",
}  # fmt: skip
# what a classifier's backbone is called -> our name, in which {} is its size or depth
CLASSIFIERS = {
    "BEiTViTOurs": "beit_{}_patch16_224_abs_pos",
    "VisionTransformerOurs": "vit_{}_patch16_224",
    "BEiTViT": "beit_{}_patch16_224",
    "BEiTTransformer": "mim_vit_{}_patch16_224",
    "VisionTransformer": "vit_{}_patch16_224",
    "SwinTransformer": "swin_{}",
    "ConvNeXt": "convnext_{}",
    "ResNet": "resnet{}",
    "ResNet_Mix": "resnet{}",
    "SimMIMViT": "mim_vit_{}_patch16_224",
    "MIMVisionTransformer": "mim_vit_{}_patch16_224",
}
# options of A2MIM's and SimMIM's models that have the same name here
SAME_OPTIONS = (
    "mask_layer", "mask_token", "mask_init", "replace", "detach", "fft_weight", "fft_focal",
    "fft_unmask_weight", "fft_unmask_replace", "unmask_weight",
)  # fmt: skip


def network_of(values: Values) -> tuple[str, str]:
    """Return the stage and our name of the model.

    Raises:
        ValueError: it is a model of another task, or one that is not here.
    """
    kind = values.get("model.type", default="")
    backbone = values.get("model.backbone.type", default="")
    size = str(values.get("model.backbone.arch", "model.backbone.depth", default="base"))
    size = SIZES.get(size.lower(), size.lower())
    if kind in ("EncoderDecoder", "MaskRCNN"):
        raise ValueError(
            f"model.type {kind} is for semantic_segmentation/configs or detection/configs"
        )
    if kind in ("A2MIM", "SimMIM"):
        return "pretrain", f"{kind.lower()}_{_mim_backbone(backbone, size)}"
    target = str(values.get("model.target_generator.type", default=""))
    if target.startswith("HOG") or kind.startswith("MaskFeat"):
        return "pretrain", f"semanticmim_maskfeat_{size}_patch16_224"
    if "DALL" in target.upper() or kind.startswith("BEiT"):
        return "pretrain", f"semanticmim_beit_{size}_patch16_224"
    if kind == "MAE":
        patch = 14 if size == "huge" else 16
        return "pretrain", f"mae_{size}_patch{patch}_224"
    if backbone in CLASSIFIERS:
        frozen = values.get("model.backbone.frozen_stages", default=-1)
        linear = frozen > 4 or (frozen == 4 and backbone.startswith("ResNet"))
        return "linear" if linear else "finetune", CLASSIFIERS[backbone].format(size)
    raise ValueError(
        f"model.type {kind!r} with backbone {backbone!r} is not a model of this project"
    )


def _mim_backbone(backbone: str, size: str) -> str:
    """Return the end of our name of A2MIM's or SimMIM's network."""
    if "ResNet" in backbone:
        return f"resnet{size}"
    for family in ("ConvNeXt", "Swin"):
        if family in backbone:
            return f"{family.lower()}_{size}"
    if "Transformer" in backbone or "ViT" in backbone:
        return f"{size if size.startswith('deit') else f'vit_{size}'}_patch16_224"
    raise ValueError(f"model.backbone.type {backbone!r} is not a backbone of this project")


def set_network(values: Values, command: Command) -> None:
    """Set the flags and options of the network, its mask token and its head."""
    backbone = "model.backbone."
    command.set("input_size", values.get(f"{backbone}img_size"))
    drop_path = values.get(f"{backbone}drop_path_rate")
    init = values.get(f"{backbone}layer_scale_init_value", f"{backbone}init_values")
    if command.stage != "linear":  # a frozen network has neither
        command.set("drop_path", drop_path)
        command.set("layer_scale_init_value", None if init is None else float(init))
    tokens = values.get(f"{backbone}num_cls_tokens")
    if command.stage == "pretrain" and "semanticmim" in command.model:
        command.set("num_cls_tokens", tokens)
        command.set(
            "use_bottleneck", values.get(f"{backbone}use_bottleneck", "model.use_bottleneck")
        )
        if "use_bottleneck" not in command.flags:
            command.remarks.append(
                "use_bottleneck is not said: --no_bottleneck trains the baseline"
            )
        elif not command.flags["use_bottleneck"]:
            command.flags["no_bottleneck"] = True
            del command.flags["use_bottleneck"]
    for part in (backbone, "model.head.", "model.head.loss."):
        for name in SAME_OPTIONS:
            if (value := values.get(f"{part}{name}")) is not None and "mim_" in command.model:
                command.model_kwargs[name] = value
    if command.stage == "pretrain":
        return
    command.set("nb_classes", values.get("model.head.num_classes"))
    if command.stage == "finetune":
        command.set("smoothing", values.get("model.head.loss.label_smooth_val"))
        command.set("bce_loss", values.get("model.head.loss.use_sigmoid"))
    else:
        _set_probe(values, command)
    start = values.get(f"{backbone}init_cfg.checkpoint", "model.pretrained", "load_from")
    command.set("finetune", start)
    values.get(f"{backbone}init_cfg.type", f"{backbone}init_cfg.prefix", "model.head.in_channels")


def _set_probe(values: Values, command: Command) -> None:
    """Set the features and the head of a linear probe."""
    pooled = values.get("model.backbone.out_type", default="avg_featmap")
    if pooled != "cls_token":
        command.set("global_pool", True)
    if pooled == "avg_featmap" and command.model.startswith(("vit_", "beit_")):
        command.set("feature_norm", "plain")  # of the published norm, which is frozen as it is new
    if "BatchNorm" not in str(values.get("model.neck.type")):
        command.set("batch_norm", False)


# --------------------------------------------------------------------------------------------------
# The data


def set_data(values: Values, command: Command, prefix: str, pipeline: Any) -> None:
    """Set the flags of data, crops, masks and augmentation from the training pipeline."""
    command.set("data_path", values.get(f"{prefix}data_root", "data_root"))
    for step in pipeline if isinstance(pipeline, list) else []:
        if isinstance(step, dict):
            _set_step(step, command)


def _set_step(step: dict[str, Any], command: Command) -> None:
    """Set the flags of one step of a pipeline."""
    kind = str(step.get("type", ""))
    pretrain = command.stage == "pretrain"
    if "ResizedCrop" in kind:
        scale = step.get("crop_ratio_range") or (
            step["scale"] if isinstance(step.get("scale"), list) else None
        )
        size = step.get("size") or (step["scale"] if isinstance(step.get("scale"), int) else None)
        command.set("input_size", size)
        if command.stage != "finetune":
            command.set("crop_scale", scale)
        if isinstance(step.get("interpolation"), str):
            command.set("train_interpolation", step["interpolation"])
        command.set("second_input_size", step.get("second_size"))
        if isinstance(step.get("second_interpolation"), str):
            command.set("second_interpolation", step["second_interpolation"])
    elif kind == "ColorJitter" and pretrain:
        command.set("color_jitter", step.get("brightness"))
    elif "mask_ratio" in step:
        unit = step.get("mask_patch_size", step.get("mask_unit"))
        command.set("mask_type", "random_mps32")
        command.set("mask_ratio", step["mask_ratio"])
        command.set("mask_patch_size", unit)
        if step.get("use_separate_mask"):
            command.set("separate_mask_ratio", step.get("separate_mask_ratio"))
    elif "num_masking_patches" in step:
        command.set("mask_type", "block")
        command.set("num_mask_patches", step["num_masking_patches"])
        command.set("max_mask_patches_per_block", step.get("max_num_patches"))
        command.set("min_mask_patches_per_block", step.get("min_num_patches"))
    elif "RandAugment" in kind and command.stage == "finetune":
        level = step.get("magnitude_level", step.get("magnitude", 9))
        std = step.get("magnitude_std", 0.5)
        command.set("aa", f"rand-m{level}-mstd{_shown(std)}-inc1")
    elif "RandomErasing" in kind and command.stage == "finetune":
        command.set("reprob", step.get("erase_prob"))
    elif kind not in ("", *_PLAIN_STEPS):
        command.remarks.append(f"step of the pipeline: {kind}")


_PLAIN_STEPS = (
    "LoadImageFromFile", "RandomFlip", "RandomHorizontalFlip", "PackInputs", "ToTensor",
    "Normalize", "Collect", "ImageToTensor",
)  # fmt: skip


def set_statistics(mean: Any, std: Any, command: Command) -> None:
    """Set the flags of mean and std, which the file gives in units of 255 or of 1."""
    if not mean or not std:
        return
    unit = 255 if max(std) > 2 else 1
    given = ([value * 255 / unit for value in mean], [value * 255 / unit for value in std])
    for known, flag in ((IMAGENET, True), (HALF, False)):
        if all(_close(a, b) for a, b in zip(given, known, strict=True)):
            command.set("imagenet_default_mean_and_std", flag)
            return
    command.set("mean", [value / 255 for value in given[0]])
    command.set("std", [value / 255 for value in given[1]])


def _close(found: Sequence[float], known: Sequence[float]) -> bool:
    return len(found) == len(known) and all(
        abs(a - b) < 0.5 for a, b in zip(found, known, strict=True)
    )


# --------------------------------------------------------------------------------------------------
# mmengine


def set_mmengine(values: Values, command: Command) -> None:
    """Set the flags of a configuration for mmengine."""
    loader = "train_dataloader."
    command.set("batch_size", values.get(f"{loader}batch_size"))
    command.set("num_workers", values.get(f"{loader}num_workers"))
    set_optimizer(values, command, "optim_wrapper.optimizer.")
    command.set("update_freq", values.get("optim_wrapper.accumulative_counts"))
    if values.get("optim_wrapper.type", default="").startswith("Amp"):
        command.set("precision", "fp16")
    command.set("clip_grad", values.get("optim_wrapper.clip_grad.max_norm"))
    command.set("epochs", values.get("train_cfg.max_epochs"))
    values.get("train_cfg.type", "train_cfg.by_epoch", "train_cfg.val_interval")
    for schedule in values.get("param_scheduler", default=[]):
        _set_schedule(schedule, command)
    pipeline = values.get(f"{loader}dataset.pipeline")
    set_data(values, command, f"{loader}dataset.", pipeline)
    preprocessor = [f"{at}data_preprocessor." for at in ("", "model.")]
    mean, std = (values.get(*(f"{at}{name}" for at in preprocessor)) for name in ("mean", "std"))
    set_statistics(mean, std, command)
    command.set("seed", values.get("randomness.seed"))
    command.set("save_ckpt_freq", values.get("default_hooks.checkpoint.interval"))
    command.set("keep_checkpoints", values.get("default_hooks.checkpoint.max_keep_ckpts"))
    if command.stage == "finetune":
        for mix in values.get("model.train_cfg.augments", default=[]):
            command.set(str(mix.get("type", "")).lower(), mix.get("alpha"))


def _set_schedule(schedule: dict[str, Any], command: Command) -> None:
    """Set the flags of one entry of `param_scheduler`."""
    kind = schedule.get("type")
    if kind == "LinearLR":
        command.set("warmup_epochs", schedule.get("end"))
        factor = schedule.get("start_factor")
        command.remarks.append(
            f"the warm-up starts from {_shown(factor)} of the peak, here it starts from 0"
        )
    elif kind == "CosineAnnealingLR":
        command.set("lr_schedule", "cosine")
        command.set("min_lr", float(schedule.get("eta_min", 0.0)))
        command.flags.setdefault("warmup_epochs", 0)
    elif kind == "MultiStepLR":
        command.set("lr_schedule", "step")
        command.set("lr_steps", schedule.get("milestones"))
        command.set("lr_gamma", schedule.get("gamma"))
    else:
        command.remarks.append(f"param_scheduler: {kind}")


# --------------------------------------------------------------------------------------------------
# mmcv

POLICIES = {"StepFixCosineAnnealing": "stepfix_cosine", "step": "step"}


def set_mmcv(values: Values, command: Command) -> None:
    """Set the flags of a configuration for mmcv, as OpenMixup has them."""
    command.set("batch_size", values.get("data.imgs_per_gpu", "data.samples_per_gpu"))
    command.set("num_workers", values.get("data.workers_per_gpu"))
    set_optimizer(values, command, "optimizer.")
    interval = values.get("optimizer_config.update_interval", "update_interval")
    command.set("update_freq", interval)
    command.set("clip_grad", values.get("optimizer_config.grad_clip.max_norm"))
    if values.get("use_fp16", "optimizer_config.use_fp16"):
        command.set("precision", "fp16")
    command.set("epochs", values.get("runner.max_epochs", "total_epochs"))
    values.get("runner.type")
    _set_policy(values, command)
    pipeline = values.get("data.train.pipeline", "train_pipeline")
    set_data(values, command, "data.train.data_source.", pipeline)
    command.set("data_path", values.get("data.train.data_source.root"))
    statistics = values.get("img_norm_cfg", default={})
    set_statistics(statistics.get("mean"), statistics.get("std"), command)
    command.set("save_ckpt_freq", values.get("checkpoint_config.interval"))
    if command.stage == "finetune":
        _set_mixing(values, command)
        for hook in values.get("custom_hooks", default=[]):
            if isinstance(hook, dict) and hook.get("type") == "EMAHook":
                command.set("model_ema", True)
                command.set("model_ema_decay", hook.get("momentum"))


def _set_policy(values: Values, command: Command) -> None:
    """Set the flags of `lr_config`."""
    names = ("policy", "by_epoch", "min_lr", "step", "gamma", "warmup", "warmup_iters")
    config = {name: values.get(f"lr_config.{name}") for name in names}
    ratio = values.get("lr_config.warmup_ratio")
    values.get("lr_config.warmup_by_epoch")
    policy = config["policy"]
    if policy == "CosineAnnealing":
        command.set("lr_schedule", "cosine_epochs" if config["by_epoch"] else "cosine_iters")
    elif policy in POLICIES:
        command.set("lr_schedule", POLICIES[policy])
    elif policy is not None:
        command.remarks.append(f"lr_config.policy = {policy!r}")
    if policy == "step":
        steps = config["step"]
        command.set("lr_steps", steps if isinstance(steps, list) else [steps])
        command.set("lr_gamma", config["gamma"])
    command.set("min_lr", config["min_lr"] if policy != "step" else 0.0)
    command.set("warmup_epochs", config["warmup_iters"] if config["warmup"] else 0)
    if config["warmup"] and policy != "StepFixCosineAnnealing":
        command.set("warmup_ratio", ratio)


def _set_mixing(values: Values, command: Command) -> None:
    """Set Mixup and CutMix, which OpenMixup lists with their alphas."""
    modes = values.get("model.mix_mode", default=[])
    alphas = values.get("model.alpha", default=[])
    values.get("model.mix_prob", "model.mix_args")
    modes = [modes] if isinstance(modes, str) else modes
    alphas = alphas if isinstance(alphas, list) else [alphas] * len(modes)
    for mode, alpha in zip(modes, alphas, strict=False):
        if mode in ("mixup", "cutmix"):
            command.set(mode, alpha)
        elif mode != "vanilla":
            command.remarks.append(f"model.mix_mode: {mode}")


# --------------------------------------------------------------------------------------------------


OPTIMIZERS = {"AdamW": "adamw", "SGD": "sgd", "LAMB": "lamb", "LARS": "lars", "Adam": "adam"}


def set_optimizer(values: Values, command: Command, at: str) -> None:
    """Set the flags of the optimizer that is described at `at`."""
    kind = values.get(f"{at}type")
    if kind is not None:
        command.set("opt", OPTIMIZERS.get(kind, kind.lower()))
    if kind == "SGD" and not values.get(f"{at}nesterov"):
        command.set("opt", "momentum")
    command.set("lr", values.get(f"{at}lr"))
    command.set("weight_decay", values.get(f"{at}weight_decay"))
    command.set("opt_betas", values.get(f"{at}betas"))
    command.set("opt_eps", values.get(f"{at}eps"))
    command.set("momentum", values.get(f"{at}momentum"))
    decay = values.get(f"{at}layer_decay_rate", f"{at}layer_decay", f"{at}paramwise_cfg.decay_rate")
    if command.stage == "finetune":
        command.set("layer_decay", 1.0 if decay is None else decay)


def translate(config: Config) -> tuple[Command, list[str]]:
    """Return the command of a configuration, and what of it is not translated.

    Raises:
        ValueError: the configuration is of neither form, or of a model that is not here.
    """
    values = Values(config.values)
    stage, model = network_of(values)
    command = Command(stage, model)
    set_network(values, command)
    if "optim_wrapper" in config.values or "train_dataloader" in config.values:
        set_mmengine(values, command)
    elif "optimizer" in config.values or "lr_config" in config.values:
        set_mmcv(values, command)
    else:
        raise ValueError("there is neither optim_wrapper (mmengine) nor optimizer (mmcv)")
    return command, [*config.problems, *command.remarks, *values.unread()]


def shown(command: Command, left: Sequence[str], source: str) -> str:
    """Return the command as shell text with comments."""
    lines = [
        f"# {source}: what it leaves out is as in the model's recipe here. --lr is not scaled: run",
        "# it on as many GPUs as the published one.",
        f"python {PROGRAMS[command.stage]}",
    ]
    for group in command.words():
        text = shlex.join(group)
        if len(lines[-1]) + len(text) > 96:
            lines[-1] += " \\"
            lines.append(" ")
        lines[-1] += f" {text}"
    if left:
        lines += ["# not translated:", *(f"#   {item}" for item in left)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a configuration file of mmengine or mmcv")
    args = parser.parse_args()
    try:
        command, left = translate(read(args.config))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(shown(command, left, args.config.name))


if __name__ == "__main__":
    main()
