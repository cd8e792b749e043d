"""The recipes hold the published numbers, and each shell script passes exactly what its recipe says."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import run_knn
import run_linear_probing
from options import parse
from recipes import IMAGENET_TOP1, STAGES, Recipe, all_recipes, recipe_for

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = [recipe for recipe in all_recipes() if recipe.has_script]
PROGRAMS = {
    "pretrain": "run_pretraining.py", "finetune": "run_class_finetuning.py", "linear": "run_linear_probing.py",
    "knn": "run_knn.py",
}  # fmt: skip
# What a script adds to its recipe: where things are, and what they are.
PLACES = {
    "pretrain": {
        "model",
        "data_set",
        "data_path",
        "output_dir",
        "log_dir",
        "part_maps",
        "target_model",
        "discrete_vae_weight_path",
    },
    "finetune": {"model", "data_set", "data_path", "output_dir", "log_dir", "finetune", "nb_classes"},
    "linear": {"model", "data_set", "data_path", "output_dir", "log_dir", "finetune", "nb_classes"},
    "knn": {"model", "data_set", "data_path", "output_dir", "finetune", "nb_classes"},
}
# The published command lines, and --update_freq, which ours has for pre-training too.
COMMON_FLAGS = {
    "batch_size", "update_freq", "epochs", "warmup_epochs", "input_size", "lr", "min_lr", "weight_decay", "opt_betas",
    "clip_grad", "drop_path", "layer_scale_init_value", "imagenet_default_mean_and_std", "save_ckpt_freq", "blr",
    "lr_schedule", "lr_steps", "warmup_ratio",
}  # fmt: skip
METHOD_FLAGS = {
    "mask_type", "mask_ratio", "temp", "t_momentum", "norm_pix_loss", "mask_lambda_power", "crop_scale",
    "permutation_type", "attention_type", "query_depth", "prediction_head_type", "gaussian_kernel_size",
    "gaussian_sigma", "predict_feature", "mask_patch_size", "train_interpolation", "sync_bn", "model_kwargs",
    "color_jitter", "num_cls_tokens", "use_bottleneck",
}  # fmt: skip
STAGE_FLAGS = {
    "pretrain": COMMON_FLAGS | METHOD_FLAGS,
    "finetune": COMMON_FLAGS
    | {"layer_decay", "mixup", "cutmix", "smoothing", "use_mean_pooling", "model_ema", "model_ema_decay"}
    | {"disable_weight_decay_on_rel_pos_bias", "model_ema_warmup_epochs", "aug_repeats", "init_scale", "bce_loss"}
    | {"eval_input_size", "crop_pct", "opt", "opt_eps", "aa", "reprob", "color_jitter"},
}
OFF = {  # what switches a flag off that is on by default
    "use_mean_pooling": "use_cls", "use_bottleneck": "no_bottleneck", "batch_norm": "no_batch_norm",
    "bce_loss": "no_bce_loss", "model_ema": "no_model_ema",
}  # fmt: skip

each_published = pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda recipe: recipe.name)
Launch = Callable[..., subprocess.CompletedProcess[str]]


def script_of(recipe: Recipe) -> Path:
    return ROOT / "scripts" / f"{recipe.name}.sh"


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Runs a recipe's script with a torchrun that only prints its arguments, one a line."""
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    torchrun.chmod(0o755)

    def run(recipe: Recipe, *extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{torchrun.parent}{os.pathsep}{os.defpath}"
        command = [str(script_of(recipe)), *extra]
        return subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True)

    return run


def launched(launch: Launch, recipe: Recipe, *extra: str, **environment: str) -> tuple[dict, str, dict]:
    """(torchrun's options, the program, the program's options) of a script; an option's value is a list of words."""
    several_machines = {"NODE_RANK": "0", "MASTER_ADDR": "node0"}
    result = launch(recipe, *extra, **({"DATA_PATH": "/data"} | several_machines | environment))
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    (at,) = (i for i, word in enumerate(words) if word.endswith(".py"))
    return options(words[:at]), words[at], options(words[at + 1 :])


def options(words: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            assert name not in found, f"--{name} is given twice"
            found[name] = []
        else:
            found[name].append(word)
    return found


def as_words(value: object) -> list[object]:
    """A recipe's value as a command line has it: True is a flag without a word."""
    if value is True:
        return []
    return list(value) if isinstance(value, tuple) else [value]


def as_values(words: list[str]) -> list[object]:
    def value(word: str) -> object:
        try:
            return float(word)
        except ValueError:
            return word

    return [value(word) for word in words]


def test_every_published_recipe_has_a_script_and_every_script_a_recipe() -> None:
    scripts = {path.stem for stage in PROGRAMS for path in (ROOT / "scripts").glob(f"*_{stage}*.sh")}
    assert scripts == {recipe.name for recipe in PUBLISHED}
    assert len(scripts) == 9 + 6 + 4 + 11 + 4 + 1 + 16 + 38 + 25 + 2


@each_published
def test_script_passes_the_flags_of_its_recipe(launch: Launch, recipe: Recipe) -> None:
    _, program, passed = launched(launch, recipe)
    assert Path(program) == ROOT / PROGRAMS[recipe.stage]
    assert passed["model"] == [recipe.model]
    switched = {OFF[name] if value is False else name: value is False or value for name, value in recipe.flags.items()}
    flags = {name: as_words(value) for name, value in switched.items() if value is not None}
    assert {name: as_values(words) for name, words in passed.items() if name not in PLACES[recipe.stage]} == flags
    own = {
        "part_maps": recipe.model.startswith("semmae"),
        "target_model": recipe.model.startswith("semaim_clip"),
        "discrete_vae_weight_path": recipe.model.endswith("8k_vocab") or recipe.model.startswith("semanticmim_beit"),
    }
    assert passed.keys() - flags.keys() == PLACES[recipe.stage] - {name for name, needed in own.items() if not needed}


@each_published
def test_script_starts_the_published_number_of_processes(launch: Launch, recipe: Recipe) -> None:
    torchrun, _, passed = launched(launch, recipe)
    processes = int(torchrun["nnodes"][0]) * int(torchrun["nproc_per_node"][0])
    assert processes == recipe.gpus
    update_freq = int(passed.get("update_freq", ["1"])[0])
    assert processes * int(passed["batch_size"][0]) * update_freq == recipe.effective_batch


@each_published
def test_script_header_says_what_the_recipe_says(recipe: Recipe) -> None:
    comments = [line.lstrip("# ") for line in script_of(recipe).read_text().splitlines() if line.startswith("#")]
    header = " ".join(" ".join(comments).split())
    published = "no figure" if recipe.published is None else f"{recipe.published} top-1"
    for fact in (recipe.source, recipe.hardware, published, recipe.note, script_of(recipe).name):
        assert fact in header
    for word in ("Source:", "Hardware:", "Published:", "Command:"):
        assert word in header


@each_published
def test_script_takes_places_from_the_environment_and_hands_on_arguments(launch: Launch, recipe: Recipe) -> None:
    environment = {"DATA_PATH": "/my data", "OUTPUT_DIR": "/my runs/1", "NNODES": "1", "NPROC": "3"}
    torchrun, _, passed = launched(launch, recipe, "--seed", "a b", CHECKPOINT="/my file.pth", **environment)
    assert (torchrun["nnodes"], torchrun["nproc_per_node"]) == (["1"], ["3"])
    assert (passed["data_path"], passed["output_dir"]) == (["/my data"], ["/my runs/1"])
    assert passed.get("finetune", ["/my file.pth"]) == ["/my file.pth"]
    assert list(passed)[-1] == "seed", "an argument that comes before the recipe's could not override it"
    assert passed["seed"] == ["a b"]


@each_published
def test_script_names_what_it_misses(launch: Launch, recipe: Recipe) -> None:
    without_data = launch(recipe)
    assert without_data.returncode != 0
    assert "DATA_PATH" in without_data.stderr
    without_rank = launch(recipe, DATA_PATH="/data", NNODES="2")
    assert without_rank.returncode != 0
    assert "NODE_RANK" in without_rank.stderr
    without_address = launch(recipe, DATA_PATH="/data", NNODES="2", NODE_RANK="1")
    assert without_address.returncode != 0
    assert "MASTER_ADDR" in without_address.stderr


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_scripts_hand_their_checkpoints_on(launch: Launch, size: str) -> None:
    pretrain = recipe_for(f"conmim_{size}_patch16_224", "pretrain")
    finetune = recipe_for(f"beit_{size}_patch16_224", "finetune")
    finer = recipe_for(f"beit_{size}_patch16_384", "finetune")
    runs = [launched(launch, recipe)[2] for recipe in (pretrain, finetune, finer)]
    last_epoch = pretrain.flags["epochs"] - 1
    assert runs[1]["finetune"] == [f"{runs[0]['output_dir'][0]}/encoder-{last_epoch}.safetensors"]
    assert runs[2]["finetune"] == [f"{runs[1]['output_dir'][0]}/checkpoint-best.pth"]


BEIT = ("beit_base", "beit_large")
SEMANTICMIM = ("maskfeat_base", "semanticmim_maskfeat_base", "semanticmim_beit_base")
SEMAIM = ("semaim_base", "semaim_large", "semaim_clip_base", "semaim_clip_large", "saim_base")


@pytest.mark.parametrize(
    "name",
    ["mae_base", "mae_large", "mae_huge", "semmae_base", "semmae_base_patch8", *SEMAIM, *BEIT, *SEMANTICMIM],
)
def test_pre_trained_models_hand_their_checkpoints_on(launch: Launch, name: str) -> None:
    pretrain, finetune = (next(recipe for recipe in PUBLISHED if recipe.name == f"{name}_{stage}") for stage in STAGES)
    first, second = (launched(launch, recipe)[2] for recipe in (pretrain, finetune))
    last_epoch = pretrain.flags["epochs"] - 1
    assert second["finetune"] == [f"{first['output_dir'][0]}/encoder-{last_epoch}.safetensors"]
    assert pretrain.published == finetune.published
    assert same_size(pretrain.model, finetune.model)


def same_size(pretrained: str, classifier: str) -> bool:
    """Of `semanticmim_beit_base_patch16_224` and `beit_base_patch16_224_abs_pos`: base_patch16_224, or resnet50."""
    sizes = [re.search(r"_([a-z]+_patch\d+_\d+)|(resnet\d+)", name)[0] for name in (pretrained, classifier)]
    return sizes[0] == sizes[1]


PROBES = [recipe.name for recipe in PUBLISHED if recipe.stage not in STAGES]


@pytest.mark.parametrize("name", PROBES)
def test_probes_take_the_checkpoints_of_pre_training_and_their_programs_take_their_flags(
    launch: Launch, name: str
) -> None:
    probe = next(recipe for recipe in PUBLISHED if recipe.name == name)
    before = next(recipe for recipe in PUBLISHED if recipe.name == f"{name.rpartition('_')[0]}_pretrain")
    first, second = (launched(launch, recipe)[2] for recipe in (before, probe))
    assert second["finetune"] == [f"{first['output_dir'][0]}/encoder-{before.flags['epochs'] - 1}.safetensors"]
    assert same_size(before.model, probe.model)
    program = {"linear": run_linear_probing, "knn": run_knn}[probe.stage]
    args = program.parse([word for flag, words in second.items() for word in (f"--{flag}", *words)])
    assert len(PROBES) == 5 + 5 + 2
    same = probe.flags.keys() - {"cls_token", "global_pool"}
    found = {flag: getattr(args, flag) for flag in same if probe.flags[flag] is not None}
    assert {flag: value[0] if flag == "temperature" else value for flag, value in found.items()} == {
        flag: list(probe.flags[flag]) if isinstance(probe.flags[flag], tuple) else probe.flags[flag] for flag in found
    }
    assert args.pool == ("avg" if probe.flags.get("global_pool") else "cls")


def test_what_is_published_of_probing() -> None:
    """specs/semmae.md A.10, semaim.md 9, 10, 12."""
    values = {
        "mae_base": (16384, 90, 10, "lars", "area", 67.8),
        "mae_large": (16384, 50, 10, "lars", "area", 76.0),
        "semaim_base": (4096, 90, 0, "momentum", "short_side", None),
        "saim_base": (2048, 90, 0, "momentum", "area", 62.5),
    }
    names = ("epochs", "warmup_epochs", "opt", "train_crop")
    for name, expected in values.items():
        recipe = next(recipe for recipe in PUBLISHED if recipe.name == f"{name}_linear")
        own = (recipe.effective_batch, *(recipe.flags[flag] for flag in names), recipe.published)
        assert own == expected
        assert (recipe.flags["blr"], recipe.flags["weight_decay"], recipe.flags["min_lr"]) == (0.1, 0.0, 0.0)
    nearest = next(recipe for recipe in PUBLISHED if recipe.name == "semaim_large_knn")
    assert (nearest.model, nearest.flags["batch_size"]) == ("vit_large_patch16_224", 512)
    assert (sorted(nearest.flags["knn_k"]), nearest.flags["temperature"]) == ([10, 20, 30], 0.07)
    for name, expected in {"resnet50": (256, 100, 30.0), "vit_small": (1024, 90, 12.0)}.items():  # specs/a2mim.md 4.5
        probe = next(recipe for recipe in PUBLISHED if recipe.name == f"a2mim_{name}_linear")
        assert (probe.effective_batch, probe.flags["epochs"], probe.flags["lr"]) == expected
        assert (probe.flags["lr_steps"], probe.flags["batch_norm"]) == ((60, 80), False)


def test_what_is_published_of_semaim_and_its_ancestors() -> None:
    """specs/semaim.md 7.2 and 12."""
    shared = {
        "warmup_epochs": 30, "blr": 2e-4, "min_lr": 0.0, "opt_betas": (0.9, 0.95), "crop_scale": (0.2, 1.0),
        "query_depth": 12, "prediction_head_type": "MLP",
    }  # fmt: skip
    own = {
        "semaim": (800, 0.05, 3.0, "attention_center", None),
        "saim": (800, 0.5, None, "stochastic", None),
        "igpt": (300, 0.5, None, "zigzag", None),
        "semaim_clip": (800, 0.05, 3.0, "attention_center", "clip"),
    }
    names = ("epochs", "weight_decay", "clip_grad", "permutation_type", "predict_feature")
    for method, expected in own.items():
        recipe = recipe_for(f"{method}_base_patch16_224", "pretrain")
        assert (recipe.gpus, recipe.effective_batch) == (32, 2048)
        assert tuple(recipe.flags.get(name) for name in names) == expected
        assert {name: recipe.flags[name] for name in shared} == shared
        blur = (recipe.flags["gaussian_kernel_size"], recipe.flags["gaussian_sigma"], recipe.flags["norm_pix_loss"])
        assert blur == ((None, None, None) if method == "semaim_clip" else (9, 1.0, True))
    for name, gpus, pooled in (("semaim", 16, None), ("saim", 32, False)):
        recipe = next(recipe for recipe in PUBLISHED if recipe.name == f"{name}_base_finetune")
        values = tuple(recipe.flags[name] for name in ("epochs", "warmup_epochs", "blr", "layer_decay", "drop_path"))
        assert (recipe.gpus, recipe.effective_batch, values) == (gpus, 1024, (100, 20, 5e-4, 0.65, 0.1))
        assert recipe.flags.get("use_mean_pooling") is pooled


def test_what_is_published_of_semanticmim_and_its_baselines() -> None:
    """specs/semanticmim.md 1.7, 3.1 to 3.3."""
    names = ("mask_ratio", "num_cls_tokens", "lr", "warmup_epochs", "min_lr", "clip_grad", "drop_path")
    names = (*names, "layer_scale_init_value", "use_bottleneck", "color_jitter", "crop_scale")
    beit, maskfeat = (1.5e-3, 10, 1e-5, 3.0, 0.1, 0.1), (1.6e-3, 30, 1e-6, 0.02, 0.0, None)
    expected = {
        "beit_abs_pos_base": (0.4, 1, *beit, False, 0.4, None),
        "semanticmim_beit_base": (0.6, 1, *beit, None, 0.4, None),
        "maskfeat_base": (0.4, 1, *maskfeat, None, 0.0, (0.5, 1.0)),
        "semanticmim_maskfeat_base": (0.8, 8, *maskfeat, None, 0.0, (0.5, 1.0)),
    }
    recipes = {recipe.name: recipe for recipe in PUBLISHED}
    for name, values in expected.items():
        recipe = recipes[f"{name}_pretrain"]
        assert (recipe.gpus, recipe.effective_batch, recipe.flags["epochs"]) == (8, 2048, 300)
        assert (recipe.flags["mask_type"], recipe.flags["mask_patch_size"]) == ("random_mps32", 16)
        assert tuple(recipe.flags.get(flag) for flag in names) == values
    for size, layer_scale in (("base", 0.1), ("large", 1e-5)):
        recipe = recipes[f"beit_{size}_pretrain"]
        assert (recipe.effective_batch, recipe.flags["epochs"], recipe.flags["mask_type"]) == (2048, 800, "block")
        assert tuple(recipe.flags.get(flag) for flag in names[2:8]) == (*beit[:-1], layer_scale)
    for name, batch, lr, scale in (("beit", 1024, 4e-3, 1.0), ("maskfeat", 2048, 8e-3, None)):
        recipe, probe = (recipes[f"semanticmim_{name}_base_{stage}"] for stage in ("finetune", "linear"))
        assert (recipe.effective_batch, recipe.flags["lr"], recipe.flags.get("init_scale")) == (batch, lr, scale)
        values = tuple(recipe.flags[flag] for flag in ("epochs", "warmup_epochs", "layer_decay", "drop_path", "min_lr"))
        assert values == (100, 20, 0.65, 0.1, 1e-6)
        assert (probe.effective_batch, probe.flags["lr"], probe.flags["weight_decay"]) == (1024, 4e-3, 1e-4)


MIM_VITS = [f"{method}_vit_{size}" for method in ("a2mim", "simmim") for size in ("small", "base", "large")]


@pytest.mark.parametrize("name", MIM_VITS)
def test_masked_vits_hand_their_checkpoints_on(launch: Launch, name: str) -> None:
    pretrain, finetune = (next(recipe for recipe in PUBLISHED if recipe.name == f"{name}_{stage}") for stage in STAGES)
    first, second = (launched(launch, recipe)[2] for recipe in (pretrain, finetune))
    assert second["finetune"] == [f"{first['output_dir'][0]}/encoder-{pretrain.flags['epochs'] - 1}.safetensors"]
    assert finetune.model.removeprefix("mim") == pretrain.model.removeprefix(name.partition("_")[0])


def test_what_is_published_of_simmim_and_a2mim() -> None:
    """specs/a2mim.md 1.4, 4.3 and 4.4."""
    names = ("epochs", "lr", "lr_schedule", "min_lr", "warmup_epochs", "clip_grad")
    expected = {
        "a2mim_resnet50": (300, 1.2e-3, "stepfix_cosine", 1e-5, 10, None),
        "a2mim_resnet50_100": (100, 1.2e-3, "stepfix_cosine", 1e-5, 10, None),
        "a2mim_convnext_base": (300, 1.2e-3, "stepfix_cosine", 1e-5, 10, None),
        "simmim_resnet200": (300, 8e-4, "stepfix_cosine", 1e-5, 10, None),
        "a2mim_vit_base": (800, 4e-4, "step", 0.0, 10, 5.0),
        "simmim_vit_large": (800, 4e-4, "step", 0.0, 10, 5.0),
        "simmim_swin_base": (800, 4e-4, "step", 0.0, 10, 5.0),
        "simmim_swin_base_100": (100, 8e-4, "cosine_iters", 4e-5, 10, 5.0),
        "a2mim_deit_small_in100": (800, 8e-4, "stepfix_cosine", 1e-5, 10, 5.0),
        "a2mim_resnet50_in100": (800, 1.2e-3, "stepfix_cosine", 1e-5, 10, None),
        "a2mim_deit_small_l8_in100": (800, 8e-4, "stepfix_cosine", 1e-5, 10, 5.0),
        "a2mim_resnet50_l3_100": (100, 1.2e-3, "stepfix_cosine", 1e-5, 10, None),
        "a2mim_resnet50_l0_100": (100, 1.2e-3, "stepfix_cosine", 1e-5, 10, None),
        "a2mim_resnet50_cifar100": (1000, 1.2e-3, "stepfix_cosine", 1e-5, 10, None),
        "a2mim_vit_small_cifar100": (1000, 8e-4, "cosine_iters", 4e-5, 10, 5.0),
        "simmim_resnet50_in100": (800, 8e-4, "cosine_iters", 4e-5, 10, 5.0),
        "simmim_swin_tiny_in100": (800, 8e-4, "cosine_iters", 4e-5, 10, 5.0),
    }
    recipes = {recipe.name: recipe for recipe in PUBLISHED}
    for name, values in expected.items():
        recipe = recipes[f"{name}_pretrain"]
        assert recipe.effective_batch == 2048
        assert tuple(recipe.flags[flag] for flag in names) == values, name
        assert recipe.flags["crop_scale"][0] == (0.8 if "a2mim_resnet" in name or "a2mim_conv" in name else 0.67)
        assert recipe.flags.get("sync_bn", False) is ("resnet" in name)
        assert recipe.flags.get("input_size", 224) == (192 if "swin" in name or "in100" in name else 224)
    tokens = {"resnet50_l3_100": ("mask_init=0",), "resnet50_l0_100": ("mask_layer=0", "mask_init=0")}
    tokens |= {"resnet50_cifar100": ("mask_init=0",), "deit_small_l8_in100": ("mask_layer=8",)}
    tokens |= {"vit_small_cifar100": ("fft_weight=0",)}
    for name, kwargs in tokens.items():
        assert recipes[f"a2mim_{name}_pretrain"].flags["model_kwargs"] == kwargs
    for name, epochs in zip(MIM_VITS, (200, 100, 150, 100, 100, 100), strict=True):
        recipe = recipes[f"{name}_finetune"]
        assert (recipe.effective_batch, recipe.flags["epochs"], recipe.flags["lr"]) == (1024, epochs, 1e-2)
        assert (recipe.flags["layer_decay"], recipe.flags.get("model_ema", False)) == (0.65, "small" not in name)


OTHER_NETWORKS = [
    recipe
    for recipe in PUBLISHED
    if recipe.stage == "finetune" and recipe.name.startswith(("a2mim", "simmim")) and "_vit_" not in recipe.name
]


@pytest.mark.parametrize("recipe", OTHER_NETWORKS, ids=lambda recipe: recipe.name)
def test_other_networks_take_the_checkpoints_of_their_pre_training(launch: Launch, recipe: Recipe) -> None:
    """Of the same network and, for the shorter runs, of as many epochs; the program takes the script's flags."""
    before = next(r for r in PUBLISHED if r.name == f"{recipe.name.partition('_finetune')[0]}_pretrain")
    first, second = (launched(launch, which)[2] for which in (before, recipe))
    assert second["finetune"] == [f"{first['output_dir'][0]}/encoder-{before.flags['epochs'] - 1}.safetensors"]
    assert before.model.partition("_")[2] == recipe.model.removeprefix("mim_")
    args = parse("finetune", [word for flag, words in second.items() for word in (f"--{flag}", *words)])
    flags = {name: value for name, value in recipe.flags.items() if value is not None}
    assert {name: tuple(found) if isinstance(found := getattr(args, name), list) else found for name in flags} == flags


def test_what_is_published_of_fine_tuning_other_networks() -> None:
    """specs/a2mim.md 4.4 and 4.6."""
    names = ("epochs", "lr", "weight_decay", "layer_decay", "drop_path", "warmup_epochs", "clip_grad")
    expected = {
        "a2mim_resnet50_finetune_a3": (2048, 100, 8e-3, 0.02, 1.0, 0.0, 5, None),
        "a2mim_resnet101_finetune_a2": (2048, 300, 5e-3, 0.02, 1.0, 0.05, 5, None),
        "simmim_resnet152_finetune_a2": (2048, 300, 5e-3, 0.02, 1.0, 0.15, 5, None),
        "a2mim_convnext_tiny_finetune": (4096, 400, 4e-4, 0.01, 0.7, 0.1, 5, None),
        "a2mim_convnext_base_finetune": (4096, 300, 4e-3, 0.05, 1.0, 0.5, 5, None),
        "simmim_swin_base_finetune": (2048, 100, 5e-3, 0.05, 0.9, 0.1, 20, 5.0),
        "a2mim_deit_small_in100_finetune": (1024, 100, 8e-3, 0.05, 0.65, 0.1, 5, 5.0),
        "a2mim_resnet50_finetune_swin": (2048, 100, 5e-3, 0.05, 1.0, 0.0, 20, None),
        "a2mim_resnet50_finetune_plain": (2048, 100, 5e-3, 0.05, 1.0, 0.0, 20, None),
        "a2mim_convnext_tiny_finetune_a3": (2048, 100, 8e-3, 0.02, 1.0, 0.1, 5, None),
        "simmim_convnext_tiny_finetune": (4096, 400, 4e-4, 0.01, 0.7, 0.1, 5, None),
    }
    recipes = {recipe.name: recipe for recipe in OTHER_NETWORKS}
    for name, values in expected.items():
        recipe = recipes[name]
        assert (recipe.effective_batch, *(recipe.flags[flag] for flag in names)) == values, name
    for name, recipe in recipes.items():
        is_rsb, flags = name.endswith(("_a2", "_a3")), recipe.flags
        assert flags.get("bce_loss", False) is is_rsb and (flags.get("opt") == "lamb") is is_rsb
        assert flags.get("aug_repeats", 1) == (3 if name.endswith("_a2") else 1)
        averaged = not is_rsb if "convnext" in name else name.endswith("resnet50_finetune_a2")
        assert flags.get("model_ema", False) is averaged
        if name.endswith("_plain"):
            assert not any(flags[flag] for flag in ("mixup", "cutmix", "smoothing", "aa", "color_jitter", "reprob"))
        if is_rsb:
            sizes = (flags["input_size"], flags["eval_input_size"], int(224 / flags["crop_pct"]))
            assert sizes == (160 if name.endswith("_a3") else 224, 224, 236)


def test_what_is_published_of_the_masked_autoencoders() -> None:
    """specs/semmae.md A.8, A.9 and B.6."""
    for model in ("mae_base_patch16_224", "mae_large_patch16_224", "mae_huge_patch14_224"):
        recipe = recipe_for(model, "pretrain")
        assert recipe.effective_batch == 4096
        assert {name: recipe.flags[name] for name in ("epochs", "warmup_epochs", "blr", "min_lr", "weight_decay")} == {
            "epochs": 1600, "warmup_epochs": 40, "blr": 1.5e-4, "min_lr": 0.0, "weight_decay": 0.05,
        }  # fmt: skip
        assert (recipe.flags["opt_betas"], recipe.flags["crop_scale"]) == ((0.9, 0.95), (0.2, 1.0))
        assert (recipe.flags["mask_ratio"], recipe.flags["norm_pix_loss"]) == (0.75, True)
    for model in ("semmae_base_patch16_224", "semmae_base_patch8_224"):
        recipe = recipe_for(model, "pretrain")
        assert (recipe.effective_batch, recipe.flags["epochs"], recipe.flags["mask_lambda_power"]) == (4096, 800, 2.0)
    settings = {"base_patch16": (100, 5e-4, 0.65, 0.1), "large_patch16": (50, 1e-3, 0.75, 0.2)}
    settings |= {"huge_patch14": (50, 1e-3, 0.75, 0.3), "base_patch8": (100, 5e-4, 0.65, 0.1)}
    for size, expected in settings.items():
        recipe = recipe_for(f"vit_{size}_224", "finetune")
        assert tuple(recipe.flags[name] for name in ("epochs", "blr", "layer_decay", "drop_path")) == expected
        assert (recipe.effective_batch, recipe.flags["min_lr"], recipe.flags["warmup_epochs"]) == (1024, 1e-6, 5)


def test_the_published_commands() -> None:
    """ConMIM's README (ViT-L pre-training, ViT-B fine-tuning) and BEiT's documentation (ViT-L fine-tuning)."""
    pretrain = recipe_for("conmim_large_patch16_224", "pretrain")
    assert (pretrain.gpus, pretrain.effective_batch) == (32, 2048)
    assert pretrain.flags == {
        "batch_size": 64, "update_freq": 1, "epochs": 1600, "warmup_epochs": 10, "lr": 7.5e-4, "min_lr": 1e-5,
        "weight_decay": 0.05, "opt_betas": (0.9, 0.98), "clip_grad": 1.0, "drop_path": 0,
        "layer_scale_init_value": 1e-5, "mask_type": "random_mps32", "mask_ratio": 0.75, "temp": 0.1,
        "t_momentum": 0.996, "imagenet_default_mean_and_std": True, "save_ckpt_freq": 20,
    }  # fmt: skip
    base = recipe_for("beit_base_patch16_224", "finetune")
    assert (base.gpus, base.effective_batch) == (8, 1024)
    assert base.flags == {
        "batch_size": 128, "update_freq": 1, "epochs": 100, "warmup_epochs": 20, "lr": 4e-3, "min_lr": 1e-6,
        "weight_decay": 0.05, "layer_decay": 0.65, "opt_betas": (0.9, 0.999), "clip_grad": None, "drop_path": 0.1,
        "layer_scale_init_value": 0.1, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
        "imagenet_default_mean_and_std": True,
    }  # fmt: skip
    large = recipe_for("beit_large_patch16_224", "finetune")
    assert (large.gpus, large.effective_batch) == (8, 1024)
    assert large.flags == {
        "batch_size": 64, "update_freq": 2, "epochs": 50, "warmup_epochs": 5, "lr": 1e-3, "min_lr": 1e-6,
        "weight_decay": 0.05, "layer_decay": 0.75, "opt_betas": (0.9, 0.999), "clip_grad": None, "drop_path": 0.2,
        "layer_scale_init_value": 1e-5, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
        "imagenet_default_mean_and_std": True,
    }  # fmt: skip


def test_what_is_known_of_the_other_recipes() -> None:
    small, base = (recipe_for(f"conmim_{size}_patch16_224", "pretrain") for size in ("small", "base"))
    assert (small.flags["epochs"], base.flags["epochs"]) == (300, 800)
    assert (small.effective_batch, base.effective_batch) == (2048, 2048)
    assert small.flags["layer_scale_init_value"] == base.flags["layer_scale_init_value"] == 0.1
    for size, (layer_decay, drop_path) in {"small": (0.85, 0.1), "base": (0.85, 0.1), "large": (0.9, 0.4)}.items():
        at_224, at_384 = (recipe_for(f"beit_{size}_patch16_{pixels}", "finetune") for pixels in (224, 384))
        assert at_384.flags["epochs"] * 10 == at_224.flags["epochs"]
        assert at_384.effective_batch == at_224.effective_batch == 1024
        assert (at_384.flags["layer_decay"], at_384.flags["drop_path"]) == (layer_decay, drop_path)
        assert (at_384.flags["input_size"], at_384.flags["lr"], at_384.flags["weight_decay"]) == (384, 2e-5, 1e-8)


def test_published_accuracies() -> None:
    assert IMAGENET_TOP1["base"] == {300: {224: 83.5}, 800: {224: 83.7, 384: 85.3}}
    assert {recipe.name: recipe.published for recipe in PUBLISHED} == {
        "conmim_small_pretrain": 82.0,
        "conmim_small_finetune": 82.0,
        "conmim_small_finetune_384": 83.9,
        "conmim_base_pretrain": 83.7,
        "conmim_base_finetune": 83.7,
        "conmim_base_finetune_384": 85.3,
        "conmim_large_pretrain": 85.5,
        "conmim_large_finetune": 85.5,
        "conmim_large_finetune_384": 86.5,
        "mae_base_pretrain": 83.6,
        "mae_base_finetune": 83.6,
        "mae_large_pretrain": 85.9,
        "mae_large_finetune": 85.9,
        "mae_huge_pretrain": 86.9,
        "mae_huge_finetune": 86.9,
        "semmae_base_pretrain": 83.352,
        "semmae_base_finetune": 83.352,
        "semmae_base_patch8_pretrain": 84.444,
        "semmae_base_patch8_finetune": 84.444,
        "semaim_base_pretrain": 84.1,
        "semaim_base_finetune": 84.1,
        "semaim_large_pretrain": 85.8,
        "semaim_large_finetune": 85.8,
        "semaim_clip_base_pretrain": 85.3,
        "semaim_clip_base_finetune": 85.3,
        "semaim_clip_large_pretrain": 86.5,
        "semaim_clip_large_finetune": 86.5,
        "saim_base_pretrain": 83.9,
        "saim_base_finetune": 83.9,
        "igpt_base_pretrain": 82.7,
        "mae_base_linear": 67.8,
        "mae_large_linear": 76.0,
        "semaim_base_linear": None,
        "saim_base_linear": 62.5,
        "semaim_large_knn": None,
        "a2mim_resnet50_linear": None,
        "a2mim_resnet50_l3_100_pretrain": None,
        "a2mim_resnet50_l0_100_pretrain": None,
        "a2mim_resnet50_cifar100_pretrain": None,
        "a2mim_vit_small_cifar100_pretrain": None,
        "a2mim_deit_small_l8_in100_pretrain": None,
        "simmim_resnet50_in100_pretrain": None,
        "simmim_swin_tiny_in100_pretrain": None,
        "a2mim_resnet50_finetune_swin": None,
        "a2mim_resnet50_finetune_plain": None,
        "a2mim_convnext_tiny_finetune_a3": None,
        "simmim_convnext_tiny_finetune": None,
        "a2mim_vit_small_linear": None,
        "beit_base_pretrain": 83.2,
        "beit_base_finetune": 83.2,
        "beit_large_pretrain": 85.2,
        "beit_large_finetune": 85.2,
        "maskfeat_base_pretrain": 83.4,
        "maskfeat_base_finetune": 83.4,
        "beit_abs_pos_base_pretrain": None,
        **{f"semanticmim_{form}_base_{stage}": None for form in ("beit", "maskfeat") for stage in STAGES},
        **{f"{name}_linear": None for name in (*BEIT, *SEMANTICMIM)},
        "a2mim_vit_small_pretrain": 82.1,
        "a2mim_vit_small_finetune": 82.1,
        "a2mim_vit_base_pretrain": 84.2,
        "a2mim_vit_base_finetune": 84.2,
        "a2mim_vit_large_pretrain": 86.1,
        "a2mim_vit_large_finetune": 86.1,
        "simmim_vit_small_pretrain": 81.7,
        "simmim_vit_small_finetune": 81.7,
        "simmim_vit_base_pretrain": 83.8,
        "simmim_vit_base_finetune": 83.8,
        "simmim_vit_large_pretrain": 85.6,
        "simmim_vit_large_finetune": 85.6,
        "a2mim_resnet50_pretrain": 80.4,
        "a2mim_resnet101_pretrain": 81.9,
        "a2mim_resnet152_pretrain": 82.5,
        "a2mim_resnet200_pretrain": 83.0,
        "a2mim_resnet50_100_pretrain": 78.8,
        "a2mim_resnet50_in100_pretrain": 89.32,
        "a2mim_convnext_tiny_pretrain": None,
        "simmim_convnext_tiny_pretrain": None,
        "a2mim_convnext_small_pretrain": 83.7,
        "a2mim_convnext_base_pretrain": 84.1,
        "a2mim_deit_small_in100_pretrain": 87.24,
        "simmim_resnet50_pretrain": 79.9,
        "simmim_resnet101_pretrain": 81.3,
        "simmim_resnet152_pretrain": 81.9,
        "simmim_resnet200_pretrain": 82.2,
        "simmim_convnext_small_pretrain": 83.2,
        "simmim_convnext_base_pretrain": 83.6,
        "simmim_swin_base_pretrain": 84.0,
        "simmim_swin_base_100_pretrain": 82.9,
        "a2mim_resnet50_finetune_a3": 78.9,
        "a2mim_resnet50_100_finetune_a3": 78.8,
        "a2mim_resnet101_finetune_a3": 80.3,
        "a2mim_resnet152_finetune_a3": 80.9,
        "a2mim_resnet50_finetune_a2": 80.4,
        "a2mim_resnet101_finetune_a2": 81.9,
        "a2mim_resnet152_finetune_a2": 82.5,
        "a2mim_resnet200_finetune_a2": 83.0,
        "simmim_resnet50_finetune_a2": 79.9,
        "simmim_resnet101_finetune_a2": 81.3,
        "simmim_resnet152_finetune_a2": 81.9,
        "simmim_resnet200_finetune_a2": 82.2,
        "a2mim_convnext_tiny_finetune": None,
        "a2mim_convnext_small_finetune": 83.7,
        "a2mim_convnext_base_finetune": 84.1,
        "simmim_convnext_small_finetune": 83.2,
        "simmim_convnext_base_finetune": 83.6,
        "simmim_swin_base_finetune": 84.0,
        "simmim_swin_base_100_finetune": 82.9,
        "simmim_swin_base_100_finetune_224": 83.5,
        "a2mim_deit_small_in100_finetune": 87.24,
    }


def test_only_the_recipes_of_the_readmes_are_free_of_guesses() -> None:
    verified = {
        recipe.name for recipe in all_recipes() if "Unverified" not in recipe.note and "Ours" not in recipe.note
    }
    semaim = {f"{name}_base_{stage}" for name in ("semaim", "saim") for stage in (*STAGES, "linear")}
    semantic = {f"semanticmim_{form}_base_{stage}" for form in ("beit", "maskfeat") for stage in (*STAGES, "linear")}
    semantic |= {"beit_abs_pos_base_pretrain", "maskfeat_base_finetune", "maskfeat_base_linear"}
    assert verified == {"conmim_large_pretrain", "conmim_base_finetune"} | semaim | semantic


# Fine-tuning of a ViT is MAE's unless a script says otherwise, which says all of it.
ONLY_BY_SCRIPT = {f"{name}_finetune" for name in (*SEMAIM, *SEMANTICMIM)} | {"beit_abs_pos_base_pretrain"}
ONLY_BY_SCRIPT |= {f"simmim_vit_{size}_finetune" for size in ("small", "large")}
# Of a backbone's recipes one gives the defaults.
ONLY_BY_SCRIPT |= {f"simmim_convnext_{size}_finetune" for size in ("small", "base")}
ONLY_BY_SCRIPT |= {f"simmim_resnet{depth}_finetune_a2" for depth in (50, 101, 152, 200)}
ONLY_BY_SCRIPT |= {f"a2mim_resnet{depth}_finetune_a2" for depth in (50, 101, 152)} | {"simmim_swin_base_100_finetune"}
ONLY_BY_SCRIPT |= {f"a2mim_resnet50_finetune_{which}" for which in ("swin", "plain")}
ONLY_BY_SCRIPT |= {"a2mim_convnext_tiny_finetune_a3", "a2mim_vit_small_cifar100_pretrain"}
ONLY_BY_SCRIPT |= {"a2mim_deit_small_l8_in100_pretrain", "simmim_resnet50_in100_pretrain"}
ONLY_BY_SCRIPT |= {f"a2mim_resnet50_{which}_pretrain" for which in ("100", "l3_100", "l0_100", "in100", "cifar100")}
ONLY_BY_SCRIPT |= {"simmim_swin_base_100_pretrain"}


@pytest.mark.parametrize("recipe", [r for r in all_recipes() if r.stage in STAGES], ids=lambda recipe: recipe.name)
def test_recipe_is_found_by_model_and_uses_known_flags(recipe: Recipe) -> None:
    first = recipe_for(recipe.model, recipe.stage)
    same = first.flags == recipe.flags
    assert same or (recipe.name in ONLY_BY_SCRIPT and first.flags.keys() - {"blr"} <= recipe.flags.keys())
    assert recipe.flags.keys() <= STAGE_FLAGS[recipe.stage]
    assert recipe.flags["warmup_epochs"] < recipe.flags["epochs"]
    assert recipe.flags["min_lr"] < (recipe.flags["lr"] or recipe.flags["blr"])
    assert recipe.flags["lr"] is None or "blr" not in recipe.flags


def test_networks_of_timm_have_the_settings_of_their_relatives() -> None:
    for name, relative in {
        "a2mim_resnet18": "a2mim_resnet200",
        "a2mim_regnety_008": "a2mim_convnext_tiny",
        "a2mim_swin_tiny": "simmim_swin_base",
        "simmim_resnet34": "simmim_resnet50",
        "simmim_regnety_008": "simmim_convnext_tiny",
        "simmim_deit_small_patch16_224": "simmim_vit_base_patch16_224",
    }.items():
        assert recipe_for(name, "pretrain").flags == recipe_for(relative, "pretrain").flags
    assert recipe_for("swin_tiny", "finetune").flags == recipe_for("swin_base", "finetune").flags
    assert recipe_for("regnety_008", "finetune") is None


def test_recipe_for_a_model_without_one_and_for_a_wrong_stage() -> None:
    assert recipe_for("resnet18", "finetune") is None
    assert recipe_for("conmim_base_patch16_224", "finetune") is None
    with pytest.raises(ValueError, match="stage 'train' is not one of pretrain, finetune"):
        recipe_for("conmim_base_patch16_224", "train")


def test_recipes_do_not_know_torch() -> None:
    code = "import sys, recipes; sys.exit(bool({'torch', 'numpy', 'timm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
