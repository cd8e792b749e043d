"""Look up published recipes by name; there is one module per family of methods.

`python -m unimim.recipes --list` lists them, `scripts/recipe.sh NAME` runs one, and `--recipe NAME`
in a run script sets the model and all its flags. Values that no source states are named in the
recipe's `note`. Nothing here imports torch.
"""

import difflib
from collections.abc import Mapping, Sequence
from types import ModuleType

from unimim.recipes import beit, conmim, mae, mim, neighbors, nepa, pixio, semaim, small
from unimim.recipes.recipe import OURS, PROGRAMS, WITHOUT_LABELS, Recipe

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

FAMILIES: tuple[ModuleType, ...] = (conmim, mae, pixio, semaim, nepa, beit, mim, neighbors, small)
STAGES = ("pretrain", "finetune")  # their scripts use the model's recipe if none is named

_RECIPES: tuple[Recipe, ...] = tuple(recipe for family in FAMILIES for recipe in family.RECIPES)
_BY_NAME = {recipe.name: recipe for recipe in (*_RECIPES, *mim.RELATIVES)}

GPUS_PER_MACHINE = 8
_CLASS_FOLDERS = "the folder with train and val, each of class folders"
# data set -> values of --data_set and --nb_classes, and what DATA_PATH must name
_DATA_SETS = {
    "ImageNet-1K": ("IMNET", "1000", "the folder that holds {}"),
    "ImageNet-21K": ("IMNET", None, "the folder that holds {}"),
    "ImageNet-100": ("IMNET", "100", "the folder that holds {}"),
    "CIFAR-10": ("CIFAR10", "10", "the folder where torchvision keeps CIFAR-10"),
    "CIFAR-100": ("CIFAR", "100", "the folder where torchvision keeps CIFAR-100"),
    "iNaturalist 2017": ("image_folder", "5089", _CLASS_FOLDERS),
    "iNaturalist 2018": ("image_folder", "8142", _CLASS_FOLDERS),
    "iNaturalist 2019": ("image_folder", "1010", _CLASS_FOLDERS),
    "Places205": ("image_folder", "205", _CLASS_FOLDERS),
    "Places365": ("image_folder", "365", _CLASS_FOLDERS),
    "CUB-200-2011": ("image_folder", "200", _CLASS_FOLDERS),
    "Stanford Cars": ("image_folder", "196", _CLASS_FOLDERS),
    "class folders": ("image_folder", None, _CLASS_FOLDERS),
    "Pascal VOC": (None, None, "VOC's folder VOC2012"),
}


def all_recipes() -> tuple[Recipe, ...]:
    """Return all recipes, published and ours."""
    return _RECIPES


def by_name(name: str) -> Recipe:
    """Return the recipe `name`; raise ValueError, suggesting similar names, if there is none."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    similar = difflib.get_close_matches(name, [recipe.name for recipe in _RECIPES], n=3)
    hint = f"use {' or '.join(similar)}" if similar else "scripts/recipe.sh --list shows the names"
    raise ValueError(f"--recipe {name} is not a recipe; {hint}")


def recipe_for(model: str, stage: str) -> Recipe | None:
    """Return the recipe that sets the defaults of `model` in `stage` (one of STAGES), if any.

    If there are several, it is the first; `names_for` returns all. SimMIM and A2MIM take any of
    timm's networks by name; one without a recipe uses that of its family.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    for recipe in _RECIPES:
        if recipe in neighbors.RECIPES:  # of another target than the model's own
            continue
        # a recipe that names a data set is taken by its own name only
        if (recipe.model, recipe.stage) == (model, stage) and "data_set" not in recipe.flags:
            return recipe
    for recipe in mim.RELATIVES:
        if recipe.stage == stage and model.startswith(recipe.model.rstrip("*")):
            return recipe
    return None


def names_for(model: str, stage: str, without: str | None = None) -> tuple[str, ...]:
    """Return the names of all recipes of `model` in `stage`, except `without`."""
    recipes = (recipe for recipe in _RECIPES if (recipe.model, recipe.stage) == (model, stage))
    return tuple(recipe.name for recipe in recipes if recipe.name != without)


# --------------------------------------------------------------------------------------------------
# Commands


def processes(recipe: Recipe) -> tuple[int, int]:
    """Return (machines, processes per machine) for the published number of GPUs."""
    return -(-recipe.gpus // GPUS_PER_MACHINE), min(recipe.gpus, GPUS_PER_MACHINE)


def checkpoint_of(recipe: Recipe) -> str | None:
    """Return the checkpoint that the preceding recipe writes by default; None if there is none."""
    if recipe.starts_from not in _BY_NAME:
        return None
    before = by_name(recipe.starts_from)
    if before.stage == "pretrain":
        return f"output/{before.name}/encoder-{before.epochs - 1}.safetensors"
    return f"output/{before.name}/checkpoint-best.pth"


def launch_command(
    recipe: Recipe, environment: Mapping[str, str], extra: Sequence[str] = ()
) -> list[str]:
    """Return the program and its arguments: `--recipe NAME`, paths, and `extra`.

    Paths come from `environment`: DATA_PATH, OUTPUT_DIR, CHECKPOINT, PART_MAPS, TOKENIZER and
    TARGET_MODEL.
    """
    paths = _path_flags(recipe, environment, extra)
    return [recipe.program, "--recipe", recipe.name, *paths, *extra]


def command(recipe: Recipe, environment: Mapping[str, str], extra: Sequence[str] = ()) -> list[str]:
    """Return `launch_command` with every flag of the recipe spelled out instead of its name."""
    paths = _path_flags(recipe, environment, extra)
    model = (f"--{recipe.model_flag}", recipe.model)
    return [recipe.program, *model, *paths, *recipe.words(), *extra]


def _path_flags(recipe: Recipe, environment: Mapping[str, str], extra: Sequence[str]) -> list[str]:
    """Return the flags that locate data, checkpoints and output."""
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
    elif not (_has(extra, "data_path", "data_set") or "data_set" in recipe.flags):
        unlabeled = recipe.stage in WITHOUT_LABELS
        maps = "train_map.txt" if unlabeled else "train_map.txt and val_map.txt"
        raise ValueError(f"DATA_PATH is not set; it must name {path.format(maps)}")
    output = environment.get("OUTPUT_DIR") or f"output/{recipe.name}"
    words += ["--output_dir", output]
    return words if recipe.stage == "knn" else [*words, "--log_dir", output]


def _checkpoint(recipe: Recipe, environment: Mapping[str, str], extra: Sequence[str]) -> str:
    """Return the value of --finetune; raise ValueError if nothing names a checkpoint."""
    path = environment.get("CHECKPOINT") or checkpoint_of(recipe)
    if path is None and not _has(extra, "finetune"):
        raise ValueError("CHECKPOINT is not set; it must name the pre-trained weights")
    return path or ""


def _has(words: Sequence[str], *flags: str) -> bool:
    """Tell whether one of the flags is among the words of a command line."""
    given = {word.partition("=")[0] for word in words}
    return any(f"--{flag}" in given for flag in flags)
