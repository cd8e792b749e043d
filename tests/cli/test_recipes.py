"""The recipes hold the published numbers, run by their names, and are listed in docs/recipes.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT, TOKENIZER, own_signals
from torch.overrides import TorchFunctionMode

import run_class_finetuning
import run_knn
import run_linear_probing
import run_part_learning
import run_pretraining
import run_tokenizer
from semantic_segmentation import voc_linear_probe
from unimim.checkpoint.files import save_encoder
from unimim.cli.models import build_method
from unimim.cli.options import parse, report
from unimim.data.shapes import write_shapes
from unimim.data.views import image_mean_std
from unimim.evaluation.features import build_network
from unimim.evaluation.flags import parse_knn, parse_linear
from unimim.parts.flags import parse_parts
from unimim.recipes import (
    STAGES,
    Recipe,
    all_recipes,
    by_name,
    checkpoint_of,
    command,
    launch_command,
    names_for,
    processes,
    recipe_for,
    small,
)
from unimim.recipes.__main__ import markdown, published
from unimim.tokenizer.flags import parse_tokenizer

PARSE = {
    "pretrain": lambda words: parse("pretrain", words),
    "finetune": lambda words: parse("finetune", words),
    "linear": parse_linear,
    "knn": parse_knn,
    "parts": parse_parts,
    "tokenizer": parse_tokenizer,
    "voc": voc_linear_probe.parse,
}
MAIN = {
    "pretrain": run_pretraining.main,
    "finetune": run_class_finetuning.main,
    "linear": run_linear_probing.main,
    "knn": run_knn.main,
    "parts": run_part_learning.main,
    "tokenizer": run_tokenizer.main,
    "voc": voc_linear_probe.main,
}
PUBLISHED = [recipe for recipe in all_recipes() if recipe.is_published]
PLACES = {"DATA_PATH": "/data", "CHECKPOINT": "weights.pth"}


# --------------------------------------------------------------------------------------------------
# Every recipe runs


class NoDraws(TorchFunctionMode):
    """Leaves large weights as they were allocated: a dry run needs their shapes, not their
    values."""

    FILLS = (
        "normal_",
        "uniform_",
        "trunc_normal_",
        "erfinv_",
        "mul_",
        "add_",
        "clamp_",
        "kaiming_uniform_",
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        weight = args[0] if args else kwargs.get("tensor")
        if (
            getattr(func, "__name__", "") in self.FILLS
            and torch.is_tensor(weight)
            and weight.numel() > 1000
        ):
            return weight
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Stand-ins, by environment variable, for what the recipes read: a small CLIP, VOC's folder."""
    folder = tmp_path_factory.mktemp("files")
    clip = timm.models.VisionTransformer(
        embed_dim=64, depth=1, num_heads=1, num_classes=24, pre_norm=True, global_pool="token"
    )
    torch.save(clip.state_dict(), folder / "clip.pth")
    write_shapes(folder / "VOC2012", train=61, val=5, voc=True)
    return {"TARGET_MODEL": str(folder / "clip.pth"), "VOC": str(folder / "VOC2012")}


@pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.name)
def test_recipe_dry_runs(
    recipe: Recipe, files: dict[str, str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"DATA_PATH": files["VOC"]} if recipe.stage == "voc" else {}
    environment = files | data | {"CHECKPOINT": "none", "TOKENIZER": str(TOKENIZER)}
    extra = [] if recipe.stage == "voc" else ["--data_set", "digits"]
    extra += ["--num_workers", "0", "--device", "cpu", "--dry_run"]
    extra += ["--finetune", ""] if recipe.starts_from else []
    extra += ["--part_source", "random"] if "part_maps" in recipe.files else []
    extra += ["--allow_random_teacher"] if recipe.stage == "parts" else []
    if "discrete_vae_weight_path" in recipe.files:  # of a small tokenizer
        extra += ["--model_kwargs", *recipe.flags.get("model_kwargs", ()), "vocab_size=64"]
    args = PARSE[recipe.stage](launch_command(recipe, environment, extra)[1:])
    with own_signals(), NoDraws():
        MAIN[recipe.stage](args)
    assert args.recipe == recipe.name


@pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.name)
def test_name_means_the_same_as_the_whole_command(recipe: Recipe) -> None:
    named, whole = (
        vars(PARSE[recipe.stage](words(recipe, PLACES)[1:])) for words in (launch_command, command)
    )
    # without a name, a value that the recipe leaves alone is that of another recipe of the model
    open_values = {"recipe", "other_recipes"} | {
        name for name, value in recipe.flags.items() if value is None
    }
    compared = named.keys() - (open_values - {"lr", "blr"})
    assert {name: named[name] for name in compared} == {name: whole[name] for name in compared}
    assert named[recipe.model_flag] == recipe.model
    for name, value in recipe.flags.items():
        found = named.get(name)
        if value is not None and name not in ("cls_token", "global_pool", "temperature"):
            assert (tuple(found) if isinstance(found, list) else found) == value, name


# --------------------------------------------------------------------------------------------------
# Names on the command line


def test_recipe_sets_the_model_and_gives_way_to_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: maskfeat_base_finetune\nepochs: 7\nmixup: 0.5\n")
    args = parse("finetune", ["--config", str(file), "--mixup", "0.25"])
    assert (args.recipe, args.model) == ("maskfeat_base_finetune", "vit_base_patch16_224")
    assert (args.lr, args.blr, args.epochs, args.mixup) == (8e-3, None, 7, 0.25)
    args = parse(
        "finetune",
        ["--recipe", "saim_base_finetune", "--lr", "1e-3", "--model", "vit_tiny_patch16_224"],
    )
    assert (args.lr, args.blr, args.use_mean_pooling, args.model) == (
        1e-3,
        None,
        False,
        "vit_tiny_patch16_224",
    )
    args = parse_linear(["--recipe", "a2mim_resnet50_linear", "--blr", "0.2"])
    assert (args.model, args.pool, args.lr, args.blr, args.lr_steps) == (
        "resnet50",
        "avg",
        None,
        0.2,
        [60, 80],
    )


def test_recipes_that_were_not_taken_are_named(caplog) -> None:
    others = names_for("vit_base_patch16_224", "finetune", without="mae_base_finetune")
    assert {"semmae_base_finetune", "maskfeat_base_finetune"} < set(others)
    assert {"mae_base_finetune_inat18", "semmae_base_finetune"} < set(others)
    with caplog.at_level("INFO", logger="unimim"):
        for words in (["--model", "vit_base_patch16_224"], ["--recipe", "saim_base_finetune"]):
            report(parse("finetune", [*words, "--dry_run"]), {})
    first, second = (record.getMessage() for record in caplog.records)
    assert (
        first
        == f"recipe: mae_base_finetune; --recipe takes for this model also {', '.join(others)}"
    )
    assert second == "recipe: saim_base_finetune"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("conmim_base_pretrian", "is not a recipe; use conmim_base_pretrain"),
        ("xyz", "is not a recipe; scripts/recipe.sh --list shows the names"),
        ("mae_base_linear", "is not for this script; use it with run_linear_probing.py"),
    ],
)
def test_wrong_name_is_refused(name: str, said: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse("pretrain", ["--recipe", name])
    assert f"--recipe {name} {said}" in capsys.readouterr().err


def test_recipe_of_a_model() -> None:
    assert recipe_for("vit_base_patch16_224", "finetune").name == "mae_base_finetune"
    assert recipe_for("conmim_base_patch16_224", "finetune") is None
    assert recipe_for("regnety_008", "finetune") is None
    with pytest.raises(ValueError, match="stage 'train' is not one of pretrain, finetune"):
        recipe_for("conmim_base_patch16_224", "train")
    for name, relative in {
        "a2mim_resnet18": "a2mim_resnet200",
        "a2mim_regnety_008": "a2mim_convnext_tiny",
        "a2mim_swin_tiny": "simmim_swin_base",
        "simmim_swinv2_base": "simmim_swin_base",
        "simmim_resnet34": "simmim_resnet50",
        "simmim_regnety_008": "simmim_convnext_tiny",
        "simmim_deit_small_patch16_224": "simmim_vit_base_patch16_224",
    }.items():
        assert recipe_for(name, "pretrain").flags == recipe_for(relative, "pretrain").flags
    assert recipe_for("swin_tiny", "finetune").flags == recipe_for("swin_base", "finetune").flags


# --------------------------------------------------------------------------------------------------
# scripts/recipe.sh


def recipe_sh(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/recipe.sh with a torchrun that only prints its arguments, one a line."""
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir(exist_ok=True)
    torchrun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    torchrun.chmod(0o755)
    environment |= {"PATH": f"{torchrun.parent}{os.pathsep}{os.defpath}", "PYTHON": sys.executable}
    script = [str(ROOT / "scripts" / "recipe.sh"), *words]
    return subprocess.run(script, env=environment, capture_output=True, text=True)


def test_launcher_takes_places_from_the_environment_and_hands_on_arguments(tmp_path: Path) -> None:
    environment = {
        "DATA_PATH": "/my data",
        "OUTPUT_DIR": "/my runs/1",
        "CHECKPOINT": "/my file.pth",
        "NPROC": "3",
    }
    result = recipe_sh(tmp_path, "conmim_base_finetune", "--seed", "a b", "--aa", "", **environment)
    words = result.stdout.splitlines()
    at = words.index(str(ROOT / "run_class_finetuning.py"))
    torchrun = dict(zip(words[:at:2], words[1:at:2], strict=True))
    assert (torchrun["--nnodes"], torchrun["--nproc_per_node"]) == ("1", "3")
    assert words[at + 1 :] == [
        *("--recipe", "conmim_base_finetune", "--finetune", "/my file.pth", "--nb_classes", "1000"),
        *(
            "--data_set",
            "IMNET",
            "--data_path",
            "/my data",
            "--output_dir",
            "/my runs/1",
            "--log_dir",
            "/my runs/1",
        ),
        *("--seed", "a b", "--aa", ""),
    ]


def test_launcher_names_what_it_misses(tmp_path: Path) -> None:
    missing = {
        "DATA_PATH is not set": {},
        "NODE_RANK": {"DATA_PATH": "/data"},
        "MASTER_ADDR": {"DATA_PATH": "/data", "NODE_RANK": "1"},
    }
    for said, environment in missing.items():
        result = recipe_sh(tmp_path, "conmim_base_pretrain", **environment)
        assert result.returncode != 0 and said in result.stderr and "Traceback" not in result.stderr
    unknown = recipe_sh(tmp_path, "conmim_bas_pretrain")
    assert unknown.returncode != 0 and "use conmim_base_pretrain" in unknown.stderr


def test_launcher_lists_and_prints(tmp_path: Path) -> None:
    listed = recipe_sh(tmp_path, "--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [recipe.name for recipe in all_recipes()]
    assert len(listed) >= 116
    (line,) = (line.split() for line in listed if line.startswith("conmim_large_finetune_384"))
    assert line[1:] == ["beit_large_patch16_384", "finetune", "86.5"]
    printed = recipe_sh(tmp_path, "--print", "mae_large_pretrain", "--seed", "3").stdout
    header = " ".join(line.lstrip("# ") for line in printed.splitlines() if line.startswith("#"))
    recipe = by_name("mae_large_pretrain")
    for fact in (
        recipe.title,
        recipe.source,
        recipe.hardware,
        published(recipe),
        recipe.note,
        "each of 8 machines",
    ):
        assert fact in header
    words = printed.partition("run_pretraining.py")[2].replace("\\\n", "").split()
    assert words == command(recipe, {"DATA_PATH": "/data"}, ["--seed", "3"])[1:]
    assert "NNODES=8 NPROC=8 scripts/launch.sh" in printed
    brings_data = recipe_sh(tmp_path, "--print", "nepa_tiny_mnist5k_pretrain").stdout
    assert "--data_set mnist5k" in brings_data
    assert "data_path" not in brings_data.lower()


def test_page_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page == markdown(), "python -m unimim.recipes --markdown > docs/recipes.md"


def test_recipes_do_not_know_torch() -> None:
    heavy = "{'torch', 'numpy', 'timm'}"
    code = "import sys, unimim.recipes.__main__; "
    code += f"sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --------------------------------------------------------------------------------------------------
# One recipe leads to the next


@pytest.mark.parametrize(
    "recipe", [r for r in PUBLISHED if r.starts_from], ids=lambda recipe: recipe.name
)
def test_recipe_takes_the_checkpoint_of_the_one_before(recipe: Recipe) -> None:
    before = by_name(recipe.starts_from)
    last = (
        f"encoder-{before.epochs - 1}.safetensors"
        if before.stage == "pretrain"
        else "checkpoint-best.pth"
    )
    assert checkpoint_of(recipe) == f"output/{before.name}/{last}"
    # base_patch16_224 of semanticmim_beit_base_patch16_224 and beit_base_patch16_224_abs_pos, or
    # resnet50
    network = re.compile(r"((?:tiny|small|base|large|huge)(?:_patch\d+)?|resnet\d+)")
    assert network.search(before.model)[0] == network.search(recipe.model)[0]


@pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.name)
def test_recipe_is_sound(recipe: Recipe) -> None:
    machines, each = processes(recipe)
    assert machines * each == recipe.gpus
    assert recipe.method and recipe.network
    if recipe.epochs is not None:
        assert recipe.flags["warmup_epochs"] < recipe.epochs
        assert recipe.flags.get("min_lr", 0) < recipe.peak_lr
        assert recipe.flags["lr"] is None or "blr" not in recipe.flags


# --------------------------------------------------------------------------------------------------
# Small networks on the digits

SMALL = [recipe for recipe in small.RECIPES if recipe.stage == "pretrain"]


def test_every_method_has_a_small_recipe() -> None:
    methods = {recipe.method.partition(" on ")[0] for recipe in PUBLISHED}
    assert methods - {recipe.method for recipe in SMALL} <= {"SemanticMIM's baseline of BEiT"}


@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: recipe.name)
def test_small_probes_read_every_weight_of_the_small_encoder(recipe: Recipe, tmp_path) -> None:
    words = ["--recipe", recipe.name, "--device", "cpu"]
    words += ["--part_source", "random"] if "part_maps" in recipe.files else []
    if "discrete_vae_weight_path" in recipe.files:
        words += ["--discrete_vae_weight_path", str(TOKENIZER)]
        words += ["--model_kwargs", *recipe.flags["model_kwargs"], "vocab_size=64"]
    encoder = {
        name: torch.randn_like(weight) if weight.is_floating_point() else weight
        for name, weight in build_method(parse("pretrain", words)).encoder_state_dict().items()
    }
    file = tmp_path / "encoder.safetensors"
    save_encoder(file, encoder, {})
    for stage in ("knn", "linear"):
        judges = [other for other in small.RECIPES if other.stage == stage]
        (probe,) = (other for other in judges if other.network == recipe.network)
        network = build_network(PARSE[stage](["--recipe", probe.name, "--finetune", str(file)]))
        loaded = network.state_dict()
        for name in loaded.keys() - encoder.keys() - {"fc_norm.weight", "fc_norm.bias"}:
            # BEiT's biases of positions: the blocks have one table, each has a copy of it here
            table = encoder[f"rel_pos_bias.{name.rpartition('.')[2]}"]
            torch.testing.assert_close(loaded[name], table, rtol=0, atol=0)
        for name in loaded.keys() & encoder.keys():
            torch.testing.assert_close(loaded[name], encoder[name], rtol=0, atol=0)
        assert {name.partition(".")[0] for name in encoder.keys() - loaded.keys()} <= {
            "rel_pos_bias"
        }


# --------------------------------------------------------------------------------------------------
# What is published


def facts(name: str, *flags: str) -> tuple:
    """(images a step, the values of the flags)."""
    recipe = by_name(name)
    return (recipe.effective_batch, *(recipe.flags.get(flag) for flag in flags))


def test_published_accuracies() -> None:
    """ConMIM's tables 1 to 3 and the READMEs of MAE, SemMAE, SemAIM, SAIM and A2MIM."""
    expected = {
        "conmim_small_finetune": 82.0, "conmim_small_finetune_384": 83.9,
        "conmim_base_finetune": 83.7, "conmim_base_finetune_384": 85.3,
        "conmim_large_finetune": 85.5, "conmim_large_finetune_384": 86.5,
        "beit_base_finetune": 83.2, "beit_large_finetune": 85.2, "mae_base_finetune": 83.6,
        "mae_large_finetune": 85.9, "mae_huge_finetune": 86.9, "mae_base_linear": 67.8,
        "mae_large_linear": 76.0, "semmae_base_finetune": 83.352,
        "semmae_base_patch8_finetune": 84.444, "semaim_base_finetune": 84.1,
        "semaim_large_finetune": 85.8, "semaim_clip_base_finetune": 85.3,
        "semaim_clip_large_finetune": 86.5, "saim_base_finetune": 83.9, "saim_base_linear": 62.5,
        "igpt_base_pretrain": 82.7, "maskfeat_base_finetune": 83.4,
        "semanticmim_beit_base_finetune": None, "a2mim_vit_base_finetune": 84.2,
        "simmim_vit_base_finetune": 83.8, "a2mim_resnet50_finetune_a2": 80.4,
        "simmim_resnet50_finetune_a2": 79.9, "a2mim_resnet50_in100_pretrain": 89.32,
        "simmim_swin_base_finetune": 84.0,
    }  # fmt: skip
    assert {name: by_name(name).published for name in expected} == expected
    assert "83.5 with --epochs 300" in published(by_name("conmim_base_pretrain"))
    assert "ImageNet-100 after fine-tuning at 192 px" in published(
        by_name("a2mim_resnet50_in100_pretrain")
    )


def test_what_is_published_of_conmim() -> None:
    """The README's commands: ViT-L's pre-training on 32 GPUs, ViT-B's fine-tuning on 8."""
    assert by_name("conmim_large_pretrain").gpus == 32 and by_name("conmim_base_finetune").gpus == 8
    rates = ("epochs", "warmup_epochs", "lr", "clip_grad", "drop_path", "layer_scale_init_value")
    assert facts("conmim_large_pretrain", *rates) == (2048, 1600, 10, 7.5e-4, 1.0, 0.0, 1e-5)
    masks = ("mask_type", "mask_ratio", "temp", "t_momentum", "opt_betas", "weight_decay")
    assert facts("conmim_large_pretrain", *masks)[1:] == (
        "random_mps32",
        0.75,
        0.1,
        0.996,
        (0.9, 0.98),
        0.05,
    )
    assert facts("conmim_base_pretrain", "epochs", "layer_scale_init_value") == (2048, 800, 0.1)
    tuned = ("epochs", "warmup_epochs", "lr", "layer_decay", "drop_path", "mixup", "cutmix")
    assert facts("conmim_base_finetune", *tuned) == (1024, 100, 20, 4e-3, 0.65, 0.1, 0.8, 1.0)
    assert facts("conmim_large_finetune", *tuned) == (1024, 50, 5, 1e-3, 0.75, 0.2, 0.8, 1.0)
    assert facts("conmim_large_finetune_384", "input_size", "epochs") == (1024, 384, 5)


def test_what_is_published_of_mae_and_semmae() -> None:
    """MAE's appendix A.1 and its README's commands."""
    rates = (
        "epochs",
        "warmup_epochs",
        "blr",
        "weight_decay",
        "opt_betas",
        "crop_scale",
        "norm_pix_loss",
    )
    expected = (4096, 1600, 40, 1.5e-4, 0.05, (0.9, 0.95), (0.2, 1.0), True)
    assert facts("mae_huge_pretrain", *rates) == expected
    assert facts("semmae_base_pretrain", "epochs", "mask_lambda_power") == (4096, 800, 2.0)
    tuned = ("epochs", "blr", "layer_decay", "drop_path")
    assert facts("mae_base_finetune", *tuned) == (1024, 100, 5e-4, 0.65, 0.1)
    assert facts("mae_large_finetune", *tuned) == (1024, 50, 1e-3, 0.75, 0.2)
    assert facts("mae_huge_finetune", *tuned) == (1024, 50, 1e-3, 0.75, 0.3)
    probe = ("epochs", "warmup_epochs", "blr", "opt", "weight_decay")
    assert facts("mae_base_linear", *probe) == (16384, 90, 10, 0.1, "lars", 0.0)
    assert facts("mae_large_linear", *probe) == (16384, 50, 10, 0.1, "lars", 0.0)


def test_what_is_published_of_semaim_and_its_ancestors() -> None:
    names = (
        "epochs",
        "warmup_epochs",
        "blr",
        "weight_decay",
        "clip_grad",
        "permutation_type",
        "query_depth",
    )
    assert facts("semaim_base_pretrain", *names) == (
        2048,
        800,
        30,
        2e-4,
        0.05,
        3.0,
        "attention_center",
        12,
    )
    assert facts("saim_base_pretrain", *names) == (2048, 800, 30, 2e-4, 0.5, None, "stochastic", 12)
    assert facts("igpt_base_pretrain", "epochs", "permutation_type") == (2048, 300, "zigzag")
    assert facts("semaim_clip_base_pretrain", "predict_feature", "gaussian_sigma") == (
        2048,
        "clip",
        None,
    )
    assert facts("semaim_base_finetune", "warmup_epochs", "use_mean_pooling") == (1024, 20, None)
    assert facts("saim_base_finetune", "warmup_epochs", "use_mean_pooling") == (1024, 20, False)
    assert facts("semaim_base_linear", "epochs", "opt", "train_crop") == (
        4096,
        90,
        "momentum",
        "short_side",
    )
    assert facts("saim_base_linear", "epochs", "opt", "train_crop") == (
        2048,
        90,
        "momentum",
        "area",
    )
    assert facts("semaim_large_knn", "knn_k", "temperature")[1:] == ((10, 20, 30), 0.07)


def test_what_is_published_of_beit_and_semanticmim() -> None:
    names = (
        "mask_type",
        "mask_ratio",
        "lr",
        "warmup_epochs",
        "clip_grad",
        "num_cls_tokens",
        "use_bottleneck",
    )
    assert facts("beit_base_pretrain", *names) == (2048, "block", None, 1.5e-3, 10, 3.0, None, None)
    baseline = (2048, "random_mps32", 0.4, 1.5e-3, 10, 3.0, 1, False)
    assert facts("beit_abs_pos_base_pretrain", *names) == baseline
    assert facts("semanticmim_beit_base_pretrain", *names) == (
        2048,
        "random_mps32",
        0.6,
        *baseline[3:7],
        None,
    )
    assert facts("maskfeat_base_pretrain", *names)[2:7] == (0.4, 1.6e-3, 30, 0.02, 1)
    assert facts("semanticmim_maskfeat_base_pretrain", *names)[2:7] == (0.8, 1.6e-3, 30, 0.02, 8)
    assert facts("semanticmim_beit_base_finetune", "epochs", "lr", "init_scale") == (
        1024,
        100,
        4e-3,
        1.0,
    )
    assert facts("semanticmim_maskfeat_base_finetune", "epochs", "lr") == (2048, 100, 8e-3)
    assert facts("semanticmim_beit_base_linear", "epochs", "lr", "weight_decay") == (
        1024,
        100,
        4e-3,
        1e-4,
    )
    assert by_name("semanticmim_maskfeat_base_voc").peak_lr == pytest.approx(0.08)


def test_what_is_published_of_simmim_and_a2mim() -> None:
    names = ("epochs", "lr", "lr_schedule", "clip_grad", "crop_scale", "sync_bn", "input_size")
    crops = (0.67, 1.0)
    for name, expected in {
        "a2mim_resnet50": (300, 1.2e-3, "stepfix_cosine", None, (0.8, 1.0), True, None),
        "simmim_resnet200": (300, 8e-4, "stepfix_cosine", None, crops, True, None),
        "a2mim_vit_base": (800, 4e-4, "step", 5.0, crops, None, None),
        "simmim_swin_base_100": (100, 8e-4, "cosine_iters", 5.0, crops, None, 192),
        "a2mim_deit_small_in100": (800, 8e-4, "stepfix_cosine", 5.0, crops, None, 192),
        "a2mim_vit_small_cifar100": (1000, 8e-4, "cosine_iters", 5.0, crops, None, None),
    }.items():
        assert facts(f"{name}_pretrain", *names) == (2048, *expected), name
    tuned = ("epochs", "lr", "weight_decay", "layer_decay", "drop_path")
    for name, expected in {
        "a2mim_vit_small_finetune": (1024, 200, 1e-2, 0.05, 0.65, 0.1),
        "simmim_vit_large_finetune": (1024, 100, 1e-2, 0.05, 0.65, 0.1),
        "a2mim_resnet50_finetune_a3": (2048, 100, 8e-3, 0.02, 1.0, 0.0),
        "simmim_resnet152_finetune_a2": (2048, 300, 5e-3, 0.02, 1.0, 0.15),
        "a2mim_convnext_tiny_finetune": (4096, 400, 4e-4, 0.01, 0.7, 0.1),
        "a2mim_convnext_base_finetune": (4096, 300, 4e-3, 0.05, 1.0, 0.5),
        "simmim_swin_base_finetune": (2048, 100, 5e-3, 0.05, 0.9, 0.1),
    }.items():
        assert facts(name, *tuned) == expected, name
    for recipe in PUBLISHED:  # "ResNet strikes back", tables 1 and 2
        if recipe.name.endswith(("_a2", "_a3")):
            assert (recipe.flags["opt"], recipe.flags["bce_loss"], recipe.flags["crop_pct"]) == (
                "lamb",
                True,
                0.949,
            )
            assert recipe.flags.get("aug_repeats", 1) == (3 if recipe.name.endswith("_a2") else 1)
            assert recipe.flags["input_size"] == (160 if recipe.name.endswith("_a3") else 224)
    assert facts("a2mim_resnet50_linear", "epochs", "lr", "lr_steps") == (256, 100, 30.0, (60, 80))
    assert facts("a2mim_vit_small_linear", "epochs", "lr", "batch_norm") == (1024, 90, 12.0, False)


def test_configurations_for_cifar() -> None:
    """OpenMixup's configs/selfsup/a2mim/cifar100 and their data sets."""
    statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))
    names = ("mean", "std", "crop_scale", "epochs", "warmup_ratio")
    crops = (0.67, 1.0)
    assert facts("a2mim_resnet50_cifar100_pretrain", *names) == (
        2048,
        *statistics,
        crops,
        1000,
        None,
    )
    assert facts("a2mim_vit_small_cifar100_pretrain", *names) == (
        2048, *statistics, crops, 1000, 4e-6,
    )  # fmt: skip
    for name in ("a2mim_resnet50_cifar100_pretrain", "simmim_swin_base_cifar10_pretrain"):
        recipe = by_name(name)
        assert "openmixup" in recipe.source and "mask_init=0" not in str(recipe.flags)
        args = parse("pretrain", launch_command(recipe, PLACES)[1:])
        assert image_mean_std(args) == statistics
        assert args.data_set == ("CIFAR10" if name.endswith("10_pretrain") else "CIFAR")
    assert "64 images for each GPU" in by_name("a2mim_resnet50_cifar100_pretrain").note


def test_values_on_which_published_sources_disagree_are_noted() -> None:
    for name, said in {
        "semmae_base_pretrain": "8 machines x 8 GPUs x 128, which is 8192",
        "simmim_convnext_base_pretrain": "which is 4096 images a step",
        "a2mim_resnet152_pretrain": "0.1 in A2MIM's file and 0 in OpenMixup's",
        "a2mim_resnet50_finetune_a3": "77.98 was reported in place of 78.9",
        "mae_base_finetune_inat18": "adjusts lr and epochs to each data set",
    }.items():
        assert said in by_name(name).note
    assert "256" not in by_name("simmim_convnext_small_pretrain").note


def test_accuracy_of_deit_is_that_of_the_linked_file() -> None:
    deep, shallow = (f"a2mim_deit_small_{token}in100" for token in ("l8_", ""))
    for stage in ("pretrain", "finetune"):
        assert by_name(f"{deep}_{stage}").published == 87.24
        assert by_name(f"{shallow}_{stage}").published is None
    assert by_name(f"{deep}_finetune").starts_from == f"{deep}_pretrain"


def test_schedules_and_warm_ups_of_a2mims_classifiers() -> None:
    names = ("lr_schedule", "warmup_ratio")
    for name, expected in {
        "a2mim_convnext_tiny_finetune_a3": ("cosine_iters", 1e-5),
        "a2mim_resnet50_finetune_a3": ("cosine_epochs", 1e-5),
        "a2mim_resnet50_finetune_swin": ("cosine_iters", 2e-4),
        "a2mim_resnet50_finetune_plain": ("cosine_iters", 2e-4),
        "a2mim_convnext_base_finetune": ("cosine_iters", 1e-5),
        "simmim_swin_tiny_in100_pretrain": ("cosine_iters", 4e-6),
        "simmim_resnet50_in100_pretrain": ("cosine_iters", None),
    }.items():
        assert facts(name, *names)[1:] == expected, name
    assert facts("a2mim_resnet200_finetune_a3", "epochs", "input_size", "drop_path") == (
        2048, 100, 160, 0.0,
    )  # fmt: skip
    tuned = ("epochs", "lr", "warmup_epochs", "layer_decay", "clip_grad", "layer_scale_init_value")
    assert facts("mae_base_finetune_a2mim", *tuned) == (1024, 100, 4e-3, 5, 0.65, 5.0, None)
    assert facts("mae_large_finetune_a2mim", *tuned) == (1024, 100, 2e-3, 5, 0.65, 5.0, None)
    assert facts("beit_base_finetune_a2mim", *tuned)[1:3] == (100, 4e-3)
    assert by_name("mae_base_finetune_a2mim").starts_from == "mae_base_pretrain"


def test_other_data_sets_of_mae() -> None:
    recipe = by_name("mae_huge_linear")
    assert (recipe.model, recipe.published, recipe.epochs) == ("vit_huge_patch14_224", 77.2, 50)
    words = launch_command(by_name("mae_large_finetune_inat18"), PLACES)
    assert words[words.index("--nb_classes") + 1] == "8142"
    assert by_name("mae_large_finetune_inat18").starts_from == "mae_large_pretrain"
    own = by_name("semmae_base_patch8_finetune_cub")
    assert not own.is_published and own.starts_from == "semmae_base_patch8_pretrain"
    small = by_name("finetune_small_dataset")
    assert small.flags == own.flags and "--nb_classes" not in launch_command(small, PLACES)
    assert "86.5 on CUB" in own.note and "86.5" not in by_name("mae_base_finetune_cars").note


def test_only_the_recipes_of_the_readmes_are_free_of_guesses() -> None:
    verified = {
        recipe.name for recipe in all_recipes() if not re.search("Unverified|Ours", recipe.note)
    }
    semaim = {
        f"{name}_base_{stage}" for name in ("semaim", "saim") for stage in (*STAGES, "linear")
    }
    semantic = {
        f"semanticmim_{form}_base_{stage}"
        for form in ("beit", "maskfeat")
        for stage in (*STAGES, "linear")
    }
    semantic |= {"beit_abs_pos_base_pretrain", "maskfeat_base_finetune", "maskfeat_base_linear"}
    others = {"conmim_large_pretrain", "conmim_base_finetune", "pixio_huge_pretrain"}
    mae = {
        f"mae_{size}_{stage}" for size in ("base", "large", "huge") for stage in (*STAGES, "linear")
    }
    assert verified == others | mae | semaim | semantic
