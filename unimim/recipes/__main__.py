"""Print the recipes: their names, one of them as a command, or all of them as docs/recipes.md."""

import argparse
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType

from unimim.recipes import (
    FAMILIES,
    Recipe,
    all_recipes,
    by_name,
    checkpoint_of,
    command,
    launch_command,
    processes,
)

# paths that --print shows where the environment names none
EXAMPLE = {"DATA_PATH": "/data"}


def listing() -> str:
    """Return one line per recipe: name, model, stage and published top-1."""
    recipes = all_recipes()
    name_width = max(len(recipe.name) for recipe in recipes)
    model_width = max(len(recipe.model) for recipe in recipes)
    lines = []
    for recipe in recipes:
        name = f"{recipe.name:{name_width}}"
        model = f"{recipe.model:{model_width}}"
        lines.append(f"{name}  {model}  {recipe.stage:8}  {_top1(recipe)}")
    return "\n".join(lines)


def _top1(recipe: Recipe) -> str:
    """Return the published top-1 or "none"."""
    return "none" if recipe.published is None else str(recipe.published)


# --------------------------------------------------------------------------------------------------
# One recipe


def header(recipe: Recipe) -> str:
    """Return title, source, hardware, published top-1, note and call as shell comments."""
    rows = {
        "Source": recipe.source,
        "Hardware": _hardware(recipe),
        "Published": published(recipe),
        "Note": recipe.note,
        "Call": _call(recipe),
    }
    lines = [recipe.title]
    for name, text in rows.items():
        lines += textwrap.wrap(
            text,
            width=98,
            initial_indent=f"{name + ':':11}",
            subsequent_indent=" " * 11,
            break_on_hyphens=False,
        )
    return "\n".join(f"# {line}" for line in lines)


def published(recipe: Recipe) -> str:
    """Describe the published top-1: the data, the training, and what other settings reach."""
    if recipe.published is None:
        return "no accuracy"
    also = f" ({recipe.also})" if recipe.also else ""
    top1 = f"{recipe.published} top-1 on {recipe.data}"
    if recipe.stage == "pretrain":
        return f"{top1} after fine-tuning at {recipe.flags.get('input_size', 224)} px{also}"
    before = recipe
    while before.starts_from:
        before = by_name(before.starts_from)
    return f"{top1} after {before.epochs} epochs of pre-training{also}"


def _hardware(recipe: Recipe) -> str:
    """Describe GPUs and batch, and what happens to the lr if their number changes."""
    if recipe.epochs is None:
        return f"{recipe.hardware} images at a time"
    if recipe.flags.get("blr") is not None:
        scaling = "the lr, from --blr, scales with the batch if NNODES or NPROC differ"
    else:
        scaling = (
            "--lr is for this batch and is not scaled: keep the batch if NNODES or NPROC differ"
        )
    return f"{recipe.hardware} images per step; {scaling}"


def _call(recipe: Recipe) -> str:
    """Return an example of how to run the recipe."""
    files = "".join(f" {variable}=FILE" for variable, _ in recipe.files.values())
    checkpoint = " CHECKPOINT=FILE" if recipe.starts_from else ""
    data = "" if _has_data(recipe) else "DATA_PATH=/data/imagenet"
    call = f"{data}{files}{checkpoint} scripts/recipe.sh {recipe.name}".lstrip()
    machines, _ = processes(recipe)
    if machines == 1:
        return call
    return f"{call} on each of {machines} machines, with NODE_RANK and MASTER_ADDR"


def _has_data(recipe: Recipe) -> bool:
    """Whether the recipe names a data set, so that it needs no DATA_PATH."""
    return "data_set" in recipe.flags


def script(recipe: Recipe, extra: list[str]) -> str:
    """Return the recipe as shell text: its header and a command with every flag."""
    environment = ({} if _has_data(recipe) else EXAMPLE) | os.environ
    if recipe.starts_from and checkpoint_of(recipe) is None:
        environment = {"CHECKPOINT": "CHECKPOINT"} | environment
    program, *words = command(recipe, environment, extra)
    machines, each = processes(recipe)
    launch = [
        f"NNODES={os.environ.get('NNODES', machines)}",
        f"NPROC={os.environ.get('NPROC', each)}",
    ]
    lines = [" ".join([*launch, "scripts/launch.sh", program])]
    for flag in _by_flag(words):
        text = shlex.join(flag)
        if len(lines[-1]) + len(text) > 96:
            lines.append(" ")
        lines[-1] += f" {text}"
    return header(recipe) + "\n" + " \\\n".join(lines)


def _by_flag(words: list[str]) -> Iterator[list[str]]:
    """Yield each flag with its values."""
    flag: list[str] = []
    for word in words:
        if word.startswith("--") and flag:
            yield flag
            flag = []
        flag.append(word)
    yield flag


# --------------------------------------------------------------------------------------------------
# docs/recipes.md

INTRODUCTION = """\
# Recipes

Generated from `unimim/recipes/` by `python -m unimim.recipes --markdown`.
`scripts/recipe.sh NAME [flags]` runs a recipe on NNODES x NPROC processes,
`scripts/recipe.sh --print NAME` shows its whole command with its source, its hardware and what is
unverified, and `--recipe NAME` in a run script sets the model and all its flags. Top-1 is on
ImageNet-1K unless the recipe names other data, as published by the authors, not measured here: for
pre-training after fine-tuning, for linear probing with the linear head. No source names the type of
GPU.
"""


def markdown() -> str:
    """Return docs/recipes.md: a table per family, what is unverified, and the sources."""
    sources: list[str] = []
    parts = [INTRODUCTION]
    for family in FAMILIES:
        parts.append(_section(family, sources))
    footnotes = "\n".join(f"{number}. {source}" for number, source in enumerate(sources, start=1))
    parts.append(f"## Sources\n\n{footnotes}\n\nRecipes without a source are ours.\n")
    return "\n".join(parts)


def _section(family: ModuleType, sources: list[str]) -> str:
    """Return a family's section: its module's docstring, its table, and the notes.

    New sources are appended to `sources`.
    """
    title, _, about = family.__doc__.strip().partition("\n\n")
    title = " ".join(title.split())
    rows = "\n".join(_row(recipe, sources) for recipe in family.RECIPES)
    notes: dict[str, list[str]] = {}
    for recipe in family.RECIPES:
        if recipe.note:
            notes.setdefault(recipe.note, []).append(f"`{recipe.name}`")
    remarks = "\n".join(f"- {', '.join(names)}: {note}" for note, names in notes.items())
    heads = ("recipe", "what", "images per step", "peak lr", "top-1, %", "source")
    table = f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n{rows}"
    return f"## {title.rstrip('.')}\n\n{about}\n\n{table}\n\n{remarks}\n"


def _row(recipe: Recipe, sources: list[str]) -> str:
    """Return a recipe's row of the table."""
    numbers = []
    for source in recipe.source.split("; ") if recipe.is_published else ():
        if source not in sources:
            sources.append(source)
        numbers.append(str(sources.index(source) + 1))
    lr = "" if recipe.peak_lr is None else f"{recipe.peak_lr:g}"
    also = f" ({recipe.also})" if recipe.also else ""
    cells = (
        f"`{recipe.name}`",
        recipe.title,
        recipe.hardware,
        lr,
        f"{_top1(recipe)}{also}",
        ", ".join(numbers),
    )
    return f"| {' | '.join(cells)} |"


# --------------------------------------------------------------------------------------------------


def launch_lines(recipe: Recipe, extra: list[str]) -> str:
    """Return what scripts/recipe.sh reads, one word per line.

    These are the machines, the processes per machine, and the command without `extra`, which the
    script appends itself.
    """
    words = launch_command(recipe, os.environ, extra)
    return "\n".join(map(str, (*processes(recipe), *words[: len(words) - len(extra)])))


def main(argv: list[str] | None = None) -> None:
    """Print what the flag asks for."""
    parser = argparse.ArgumentParser(
        prog="recipe.sh",
        description="Run a published recipe by its name.",
        usage="recipe.sh NAME [flags] | --list | --print NAME [flags] | --markdown",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--list", action="store_true", help="list names, models, stages and published top-1"
    )
    what.add_argument("--print", metavar="NAME", help="print the whole command without running it")
    what.add_argument("--markdown", action="store_true", help="print docs/recipes.md")
    what.add_argument("--launch", metavar="NAME", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv[:2])  # the words after the name are for the run script
    extra = argv[2:]
    try:
        if args.list:
            print(listing())
        elif args.markdown:
            print(markdown(), end="")
        elif args.print:
            print(script(by_name(args.print), extra))
        else:
            print(launch_lines(by_name(args.launch), extra))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
