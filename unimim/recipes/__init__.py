"""Published recipes by name, one module for each family of methods; no torch is imported here.

`python -m unimim.recipes --list` shows them, `scripts/recipe.sh NAME` runs one, `--recipe NAME` in
a run script sets the model and all its flags. A value that no source states is named in the
recipe's `note`.
"""

import difflib
from collections.abc import Mapping, Sequence
from types import ModuleType

from unimim.recipes import beit, conmim, mae, mim, semaim
from unimim.recipes.recipe import OURS, PROGRAMS, Recipe

__all__ = [
    "FAMILIES",
    "OURS",
    "PROGRAMS",
    "STAGES",
    "Recipe",
    "all_recipes",
    "by_name",
    "checkpoint_of",
    "command",
    "launch_command",
    "names_for",
    "processes",
    "recipe_for",
]

FAMILIES: tuple[ModuleType, ...] = (conmim, mae, semaim, beit, mim)
STAGES = ("pretrain", "finetune")  # whose scripts take a model's recipe without being told to

_RECIPES: tuple[Recipe, ...] = tuple(recipe for family in FAMILIES for recipe in family.RECIPES)
_BY_NAME = {recipe.name: recipe for recipe in (*_RECIPES, *mim.RELATIVES)}

GPUS_PER_MACHINE = 8
# The value of --data_set and of --nb_classes, and what DATA_PATH must name.
_DATA_SETS = {
    "ImageNet-1K": ("IMNET", "1000", "the folder that holds {}"),
    "ImageNet-100": ("IMNET", "100", "the folder that holds {}"),
    "CIFAR-100": ("CIFAR", "100", "the folder where torchvision keeps CIFAR-100"),
    "Pascal VOC": (None, None, "VOC's folder VOC2012"),
}


def all_recipes() -> tuple[Recipe, ...]:
    """Returns every recipe, the published ones and our own."""
    return _RECIPES


def by_name(name: str) -> Recipe:
    """Returns the recipe of that name; ValueError with similar names for an unknown one."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    similar = difflib.get_close_matches(name, [recipe.name for recipe in _RECIPES], n=3)
    hint = f"use {' or '.join(similar)}" if similar else "scripts/recipe.sh --list shows the names"
    raise ValueError(f"--recipe {name} is not a recipe; {hint}")


def recipe_for(model: str, stage: str) -> Recipe | None:
    """Returns the recipe whose flags are the defaults of `model` in `stage` (one of STAGES), None
    for a model without.

    Of several, it is the first; `names_for` has them all. Names of SimMIM and A2MIM go on with any
    of timm's: a network without a recipe has that of its relatives.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    own = (recipe for recipe in _RECIPES if (recipe.model, recipe.stage) == (model, stage))
    related = (
        recipe
        for recipe in mim.RELATIVES
        if recipe.stage == stage and model.startswith(recipe.model.rstrip("*"))
    )
    return next(own, None) or next(related, None)


def names_for(model: str, stage: str, without: str | None = None) -> tuple[str, ...]:
    """Returns the names of the recipes of `model` in `stage`, but for the one named `without`."""
    recipes = (recipe for recipe in _RECIPES if (recipe.model, recipe.stage) == (model, stage))
    return tuple(recipe.name for recipe in recipes if recipe.name != without)


# --------------------------------------------------------------------------------------------------
# Commands


def processes(recipe: Recipe) -> tuple[int, int]:
    """Returns (machines, processes on each) of the published number of GPUs."""
    return -(-recipe.gpus // GPUS_PER_MACHINE), min(recipe.gpus, GPUS_PER_MACHINE)


def checkpoint_of(recipe: Recipe) -> str | None:
    """Returns the file that the recipe starts from, where the recipe before it leaves it; None if
    there is none."""
    if recipe.starts_from not in _BY_NAME:
        return None
    before = by_name(recipe.starts_from)
    file = (
        f"encoder-{before.epochs - 1}.safetensors"
        if before.stage == "pretrain"
        else "checkpoint-best.pth"
    )
    return f"output/{before.name}/{file}"


def launch_command(
    recipe: Recipe, environment: Mapping[str, str], extra: Sequence[str] = ()
) -> list[str]:
    """Returns the program and its words: `--recipe NAME`, where things are, and `extra`.

    `environment` names the places: DATA_PATH, OUTPUT_DIR, CHECKPOINT, PART_MAPS, TOKENIZER,
    TARGET_MODEL.
    """
    return [recipe.program, "--recipe", recipe.name, *_places(recipe, environment, extra), *extra]


def command(recipe: Recipe, environment: Mapping[str, str], extra: Sequence[str] = ()) -> list[str]:
    """Returns what `launch_command` does with every flag of the recipe spelled out in place of its
    name."""
    model = "--teacher" if recipe.stage == "parts" else "--model"
    places = _places(recipe, environment, extra)
    return [recipe.program, model, recipe.model, *places, *recipe.words(), *extra]


def _places(recipe: Recipe, environment: Mapping[str, str], extra: Sequence[str]) -> list[str]:
    """The words that say where data, checkpoints and output are."""
    data_set, classes, path = _DATA_SETS[recipe.data]
    words = []
    for flag, (variable, default) in recipe.files.items():
        words += [f"--{flag}", environment.get(variable) or default]
    if recipe.starts_from:
        words += ["--finetune", _checkpoint(recipe, environment, extra)]
        if classes and recipe.is_published:
            words += ["--nb_classes", classes]
    if data_set and recipe.is_published:
        words += ["--data_set", data_set]
    if environment.get("DATA_PATH"):
        words += ["--data_path", environment["DATA_PATH"]]
    elif not _has(extra, "data_path", "data_set"):
        maps = (
            "train_map.txt"
            if recipe.stage in ("pretrain", "parts")
            else "train_map.txt and val_map.txt"
        )
        raise ValueError(f"DATA_PATH is not set; it must name {path.format(maps)}")
    output = environment.get("OUTPUT_DIR") or f"output/{recipe.name}"
    words += ["--output_dir", output]
    return words if recipe.stage == "knn" else [*words, "--log_dir", output]


def _checkpoint(recipe: Recipe, environment: Mapping[str, str], extra: Sequence[str]) -> str:
    path = environment.get("CHECKPOINT") or checkpoint_of(recipe)
    if path is None and not _has(extra, "finetune"):
        raise ValueError("CHECKPOINT is not set; it must name the pre-trained weights")
    return path or ""


def _has(words: Sequence[str], *flags: str) -> bool:
    """Whether one of the flags is among the words of a command line."""
    return any(word.partition("=")[0] == f"--{flag}" for word in words for flag in flags)
