"""The values of the flags: defaults < recipe < --config FILE.yaml < command line, then checks."""

import argparse
import contextlib
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from modeling_finetune import entry_of, models_by_purpose
from optim_factory import takes_betas
from unimim.cli.flags import LEFTOVERS, NUM_WORKERS, build_parser
from unimim.cli.published import translate
from unimim.cli.space import table
from unimim.data.channels import leave_colors
from unimim.engine.runner import has_bf16
from unimim.files import check_output_folder, write_text
from unimim.logs import log
from unimim.recipes import Recipe, by_name, names_for, recipe_for

# flags with a default that `adapt_defaults` takes away, so that config.yaml has them without one
UNSETTABLE = ("opt_betas", "eval_input_size", "lr", "blr")


def parse(stage: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line with recipe and config file as defaults. Exits with argparse's message
    on bad flags."""
    parser = build_parser(stage)
    argv, notes, published = in_our_words(stage, argv, parser)
    first, _ = parser.parse_known_args(argv)
    if first.list_models:
        print(models_by_purpose())
        parser.exit()
    if getattr(first, "list_space", False):
        print(table())
        parser.exit()
    try:
        overlay = read_config(first.config, parser) if first.config else {}
        parser.set_defaults(**overlay)
        first, _ = parser.parse_known_args(argv)
        recipe = named_recipe(first.recipe, stage) or recipe_for(first.model, stage)
        values = recipe_values(recipe, parser) if recipe else {}
        parser.set_defaults(**{**values, **published, **overlay})
        args = parser.parse_args(argv)
        typed = explicit_flags(stage, argv)
        given = typed | overlay.keys()
        adapt_defaults(args, given=given, has_recipe=recipe is not None)
        leave_colors(args, given)
        # a file may hold the default of a model that did not ask for it
        if "mask_type" in args and args.mask_type == "block" and "mask_type" not in typed:
            args.mask_type = own_mask(args.model)
        validate(args)
    except ValueError as error:
        parser.error(str(error))
    args.notes = notes
    named = {"mean", "std", "imagenet_default_mean_and_std"}
    args.mean_std_given = bool(first.recipe or named & (given | published.keys()))
    args.recipe = recipe.name if recipe else None
    args.other_recipes = () if first.recipe else names_for(args.model, stage, args.recipe)
    return args


def parse_flags(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    *checks: Callable[[argparse.Namespace], None],
    stage: str | None = None,
) -> argparse.Namespace:
    """Read the flags of a script whose model has no recipe by itself: defaults < --recipe <
    --config < command line, then the checks.

    `stage` is that of the recipes which --recipe may name, None without that flag. Exits with
    argparse's message on bad flags.
    """
    argv, notes, published = in_our_words(stage, argv, parser)
    config = parser.parse_known_args(argv)[0].config
    try:
        overlay = read_config(config, parser) if config else {}
        parser.set_defaults(**{**published, **overlay})
        first, _ = parser.parse_known_args(argv)
        recipe = named_recipe(first.recipe, stage) if stage else None
        if recipe:
            parser.set_defaults(**{**recipe_values(recipe, parser), **overlay})
        args = parser.parse_args(argv)
        for check in checks:
            check(args)
    except ValueError as error:
        parser.error(str(error))
    args.notes = notes
    if stage and recipe is None:
        args.other_recipes = names_for(getattr(args, "model", ""), stage)
    return args


def in_our_words(
    stage: str | None, argv: list[str] | None, parser: argparse.ArgumentParser
) -> tuple[list[str], tuple[str, ...], dict[str, Any]]:
    """Return the command line without published names, what the log says of them, and the defaults
    of the script that has them."""
    words = sys.argv[1:] if argv is None else argv
    command = translate(stage, words, parser._option_string_actions)
    return command.words, tuple(command.notes), command.defaults


def named_recipe(name: str | None, stage: str) -> Recipe | None:
    """Return the recipe of that name, which must be of this stage; None for None."""
    recipe = by_name(name) if name else None
    if recipe and recipe.stage != stage:
        raise ValueError(f"--recipe {name} is not for this script; use it with {recipe.program}")
    return recipe


def recipe_values(recipe: Recipe, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the values that the recipe's model and flags have for this parser, as if they stood
    on the command line."""
    bare = copy.deepcopy(parser)
    bare._defaults.clear()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    values = vars(bare.parse_args(recipe.words()))
    if not recipe.model.endswith("*"):  # of a whole family of networks
        values[recipe.model_flag] = recipe.model
    return values


def explicit_flags(stage: str, argv: list[str] | None) -> set[str]:
    """Return the names of the flags that stand on the command line."""
    parser = build_parser(stage)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def adapt_defaults(args: argparse.Namespace, given: set[str], has_recipe: bool) -> None:
    """Replace defaults that do not fit what was asked for; what the user gave stays, and may be
    refused later."""
    entry = entry_of(args.model)
    # the defaults of these two are for ViTs; few other networks take them
    if "layer_decay" in args and not has_recipe and entry and entry.kind == "timm":
        args.layer_decay = args.layer_decay if "layer_decay" in given else 1.0
        args.drop_path = args.drop_path if "drop_path" in given else 0.0
    if "warmup_epochs" not in given and args.warmup_epochs >= args.epochs:
        args.warmup_epochs = args.epochs // 5
    if "eval_input_size" in args and "input_size" in given and "eval_input_size" not in given:
        args.eval_input_size = None
    if (
        "opt_betas" not in given
        and args.opt_betas is not None
        and not takes_betas(args.opt, len(args.opt_betas))
    ):
        args.opt_betas = None


def own_mask(model: str) -> str:
    """Return the --mask_type that a model has by default."""
    entry = entry_of(model)
    return getattr(entry.classes[0], "own_mask", "block") if entry and entry.classes else "block"


def read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the values of a YAML file, which must all be flags of this script."""
    text = read_text("--config", path)
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold lines of the form flag: value")
    if ("lr" in values) != ("blr" in values):  # one of them replaces what the recipe says of either
        values = {"lr": None, "blr": None} | values
    actions = {action.dest: action for action in parser._actions}
    if unknown := values.keys() - actions.keys():
        names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"--config {path} contains unknown options: {names}")
    for name, value in values.items():
        try:
            values[name] = config_value(parser, actions[name], value)
        except (argparse.ArgumentError, ValueError) as error:
            reason = getattr(error, "message", None) or error
            raise ValueError(f"--config {path}: --{name}: {reason}") from error
    return values


def read_text(flag: str, path: str) -> str:
    """Return a text file that a flag names; ValueError if there is none, or it is no text."""
    if not Path(path).is_file():
        raise ValueError(f"{flag} {path} does not exist")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path} is no text in UTF-8: {error.reason}") from error
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror}") from error


def config_value(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """Return what the flag of `action` makes of a value in YAML, as of the same on a command line.

    Raises argparse's error or ValueError where the flag does not take it.
    """
    if value is None:
        if action.default is not None and action.dest not in UNSETTABLE:
            raise ValueError("it has no value; leave the line out for the default")
        return None
    if action.nargs == 0:
        # flags that each stand for a word, such as --global_pool, or a switch
        words = [other.const for other in parser._actions if other.dest == action.dest]
        words = [word for word in words if isinstance(word, str)]
        if words and value not in words:
            raise ValueError(f"{value!r} is not {' or '.join(words)}")
        if not words and not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return value
    if isinstance(value, (list, tuple)) and action.nargs in (None, "?"):
        raise ValueError(f"{value} is a list; it takes one value")
    items = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(action.nargs, int) and len(items) != action.nargs:
        raise ValueError(f"{value} is not {action.nargs} values")
    if action.nargs == "+" and not items:
        raise ValueError("it is an empty list")
    if wrong := [item for item in items if not isinstance(item, (str, int, float))]:
        raise ValueError(f"{wrong[0]!r} is no text or number")
    found = argparse.Namespace()
    action(parser, found, parser._get_values(action, [str(item) for item in items]))
    return getattr(found, action.dest)


def validate(args: argparse.Namespace) -> None:
    """Refuse combinations that cannot work, each in one sentence."""
    for name in (
        "batch_size",
        "update_freq",
        "epochs",
        "log_every",
        "save_ckpt_freq",
        "aug_repeats",
        "eval_images",
    ):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if getattr(args, "eval_every", 0) < 0:
        raise ValueError(f"--eval_every must be at least 0, which is never, not {args.eval_every}")
    if args.enable_deepspeed and not args.output_dir and args.save_ckpt:
        raise ValueError(
            "--enable_deepspeed writes its configuration and checkpoints: give --output_dir"
        )
    if getattr(args, "layer_decay", 0) == 1:
        for name in ("full_last_block", "layer_warmup"):
            if getattr(args, name):
                raise ValueError(f"--{name} is about --layer_decay, which is 1: lower that")
    if getattr(args, "head_lr", None) is not None and args.head_lr < 0:
        raise ValueError(f"--head_lr {args.head_lr} must not be negative")
    separate = getattr(args, "separate_mask_ratio", None)
    if separate is not None and (not 0 < separate < 1 or not args.mask_type.startswith("random")):
        raise ValueError(
            f"--separate_mask_ratio {separate} must lie between 0 and 1 and needs a random "
            "--mask_type"
        )
    for name in ("deepspeed_config", "offload", "deepspeed_shards"):
        if getattr(args, name) and not args.enable_deepspeed:
            raise ValueError(f"--{name} needs --enable_deepspeed")
    if args.deepspeed_config and not Path(args.deepspeed_config).is_file():
        raise ValueError(f"--deepspeed_config {args.deepspeed_config} does not exist")
    if args.keep_checkpoints is not None and args.keep_checkpoints < 1:
        raise ValueError(f"--keep_checkpoints must be at least 1, not {args.keep_checkpoints}")
    if getattr(args, "lr_schedule", "") == "step" and not args.lr_steps:
        raise ValueError("--lr_schedule step needs --lr_steps, the epochs after which the lr falls")
    scale = getattr(args, "crop_scale", None)
    if scale is not None and not 0 < scale[0] <= scale[-1]:
        raise ValueError(
            f"--crop_scale {' '.join(map(str, scale))} must be the smallest and the largest "
            "fraction of an image's area, above 0"
        )
    mixing = (
        getattr(args, "mixup", 0)
        or getattr(args, "cutmix", 0)
        or getattr(args, "cutmix_minmax", None)
    )
    if mixing and args.batch_size % 2:
        raise ValueError(
            f"--mixup and --cutmix pair images up: --batch_size must be even, not {args.batch_size}"
        )


def model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return constructor options from --model_kwargs (YAML values) and from the flags of sizes."""
    options = {
        name: getattr(args, name)
        for name in ("input_size", "patch_size", "in_chans")
        if getattr(args, name, None) is not None
    }
    for item in args.model_kwargs:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--model_kwargs takes K=V pairs, not {item!r}")
        if key == "in_chans":  # the data must know it, too
            raise ValueError(f"--model_kwargs {item}: use --in_chans {value}")
        try:
            options[key] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            reason = getattr(error, "problem", None) or type(error).__name__
            raise ValueError(f"--model_kwargs {item!r} is not YAML: {reason}") from error
        with contextlib.suppress(ValueError):  # YAML takes 1e-6 for a word
            options[key] = float(options[key]) if isinstance(options[key], str) else options[key]
    return options


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that have a value; for the others the model's own holds."""
    return {name: value for name, value in flags.items() if value is not None}


def resolve_lr(args: argparse.Namespace) -> None:
    """Set --lr by --blr, which is for 256 images a step and grows with the effective batch."""
    if "lr" in args and args.lr is None:
        args.lr = args.blr * effective_batch(args) / 256


def resolve_workers(args: argparse.Namespace) -> None:
    """Reduce the default --num_workers to this process's part of the CPUs; another number
    stays."""
    if getattr(args, "num_workers", None) != NUM_WORKERS:
        return
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cpus = len(os.sched_getaffinity(0))
    args.num_workers = min(NUM_WORKERS, max(1, cpus // local_ranks))
    if args.num_workers < NUM_WORKERS:
        log.info(
            "--num_workers %d: the default %d is reduced to this process's part of %d CPUs",
            args.num_workers, NUM_WORKERS, cpus,
        )  # fmt: skip


def log_notes(args: argparse.Namespace) -> None:
    """Log what the flags' published names became."""
    for note in getattr(args, "notes", ()):
        log.info("%s", note)


def check_outputs(args: argparse.Namespace) -> None:
    """Make the folders that the flags name, before anything is read; ValueError if it fails."""
    for name in ("output_dir", "log_dir"):
        if getattr(args, name, None):
            check_output_folder(f"--{name}", getattr(args, name))


def resolve_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Settle --precision auto: bf16 on a GPU that has it, fp32 on a CPU (whose bf16 is only
    sometimes faster)."""
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" and has_bf16() else "fp32"


def resolve_matmul_precision(args: argparse.Namespace, device: torch.device) -> str:
    """Settle --matmul_precision auto. Scripts without training do not have the flag: they stay
    exact."""
    if getattr(args, "matmul_precision", "highest") == "auto":
        args.matmul_precision = "high" if device.type == "cuda" else "highest"
    return getattr(args, "matmul_precision", "highest")


def report(args: argparse.Namespace, derived: dict[str, Any]) -> None:
    """Print the recipe and the derived quantities, and saves the whole configuration as
    config.yaml."""
    for name in LEFTOVERS["pretrain"] + LEFTOVERS["finetune"]:
        if getattr(args, name, None):
            log.info(
                "--%s is accepted for old commands and has no effect, as in the published code",
                name,
            )
    others = getattr(args, "other_recipes", ())
    choose = f"; --recipe takes for this model also {', '.join(others)}" if others else ""
    log.info("recipe: %s%s", args.recipe or "none, the flags' defaults", choose)
    for name, value in derived.items():
        log.info("  %-22s %s", name, value)
    if not args.output_dir and not args.dry_run:
        log.warning("no --output_dir: nothing is kept of this run, neither weights nor log.txt")
    if args.output_dir and args.rank == 0:
        write_text(
            Path(args.output_dir) / "config.yaml", yaml.safe_dump(as_config(args), sort_keys=True)
        )


def as_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the effective configuration in plain types; it can be given to --config again."""
    skipped = {
        "rank",
        "world_size",
        "local_rank",
        "config",
        "dry_run",
        "list_models",
        "list_space",
        "deepspeed",
        "other_recipes",
        "notes",
        "mean_std_given",
    }
    leftovers = {*LEFTOVERS["pretrain"], *LEFTOVERS["finetune"]}
    values = {k: v for k, v in vars(args).items() if k not in skipped | leftovers}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def effective_batch(args: argparse.Namespace) -> int:
    """Return the images per optimizer step over all processes."""
    return args.batch_size * args.update_freq * args.world_size


def warmup_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Return the length of the warm-up: --warmup_steps if given, else --warmup_epochs."""
    return args.warmup_steps if args.warmup_steps > 0 else args.warmup_epochs * steps_per_epoch


def default_warmup(args: argparse.Namespace, steps: int) -> None:
    """Warm up for a twentieth of a run of `steps`, unless the flags say for how long."""
    if args.warmup_steps < 0 and not args.warmup_epochs:
        args.warmup_steps = max(1, round(0.05 * steps))


def derived(args: argparse.Namespace, steps_per_epoch: int) -> dict[str, Any]:
    """Return the derived quantities of a run: effective batch, steps, warm-up, learning rates."""
    warmup = warmup_steps(args, steps_per_epoch)
    scaled = (
        f"--blr {args.blr:g} x {effective_batch(args)} / 256"
        if args.blr
        else "not scaled by the batch size"
    )
    rises = f"0 -> {args.lr:g} in {warmup} steps" if warmup else f"{args.lr:g}, no warm-up"
    falls = f"cosine to {args.min_lr:g}"
    if args.lr_schedule == "step":
        falls = (
            f"times {args.lr_gamma:g} after epochs {', '.join(map(str, args.lr_steps)) or 'none'}"
        )
    return {
        "effective batch": f"{args.batch_size} x {args.update_freq} x {args.world_size}"
        f" = {effective_batch(args)}",
        "steps": f"{args.epochs} epochs x {steps_per_epoch} = {args.epochs * steps_per_epoch}",
        "lr": f"{rises}, {falls}; {scaled}",
        "weight decay": f"{args.weight_decay:g} -> {args.weight_decay_end or args.weight_decay:g}",
        "precision": args.precision,
        "float32 products": {"high": "in TF32", "highest": "exact"}[
            getattr(args, "matmul_precision", "highest")
        ],
    }
