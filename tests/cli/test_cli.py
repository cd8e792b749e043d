"""Flags: which there are, which value wins, what a mistake says; launchers."""

import argparse
import contextlib
import os
import re
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers import (
    FINETUNE,
    METHODS,
    PRETRAIN,
    arguments,
    imagenet_stand_in,
    own_signals,
    run_command,
    script,
    start_command,
)

import run_class_finetuning
import run_pretraining
from modeling_finetune import entry_of, list_models
from unimim.checkpoint.files import load_checkpoint, save_checkpoint, save_encoder
from unimim.cli.flags import build_parser
from unimim.cli.models import build_method
from unimim.cli.options import (
    as_config,
    derived,
    model_kwargs,
    parse,
    report,
    resolve_workers,
)
from unimim.engine.distributed import Place, find_place, first_host, free_port, leave_process_group
from unimim.engine.setup import launch, set_up
from unimim.evaluation.flags import knn_parser, linear_parser
from unimim.logs import log, setup_logging
from unimim.parts.flags import build_parser as part_parser
from unimim.recipes import all_recipes, recipe_for

# Names and defaults are what users' commands stand on: a change of them is a decision.
BOTH = {
    "list_models": False, "input_size": None, "patch_size": None, "model_kwargs": [],
    "layer_scale_init_value": None, "abs_pos_emb": False, "rel_pos_bias": None,
    "disable_rel_pos_bias": None, "attn": "auto", "grad_checkpointing": False, "compile": False,
    "data_set": None, "data_path": None, "imagenet_default_mean_and_std": False,
    "no_imagenet_default_mean_and_std": False, "train_interpolation": "bicubic", "num_workers": 10,
    "pin_mem": True, "no_pin_mem": True, "max_bad_images": 100, "strict_data": False,
    "max_image_pixels": 178_956_970, "allow_outside": False,
    "batch_size": 64, "update_freq": 1, "opt": "adamw", "opt_eps": 1e-08, "momentum": 0.9,
    "clip_grad": None, "weight_decay": 0.05, "weight_decay_end": None, "lr": 0.0005,
    "warmup_epochs": 5, "warmup_steps": -1, "device": "cuda", "precision": "auto",
    "enable_deepspeed": False, "zero_stage": 1, "deepspeed_config": None, "offload": None,
    "deepspeed_shards": False, "stop_status": 0,
    "deepspeed": False, "max_nonfinite": 3, "dist_on_itp": False, "dist_url": "env://",
    "dist_timeout": 60.0, "world_size": 1, "local_rank": -1, "local-rank": -1, "config": None,
    "output_dir": "", "log_dir": None, "wandb": None, "tracker": None, "log_every": 50, "seed": 0,
    "start_epoch": 0, "resume": "", "auto_resume": True, "no_auto_resume": True, "save_ckpt": True,
    "no_save_ckpt": True, "save_ckpt_freq": 20, "save_ckpt_steps": 0, "keep_checkpoints": None,
    "dry_run": False, "warmup_lr": None, "blr": None, "lr_schedule": "cosine", "recipe": None,
    "sync_bn": False, "no_sync_bn": False, "matmul_precision": "auto", "recompute_gelu": "auto",
    "lr_steps": (), "lr_gamma": 0.1, "warmup_ratio": 0.0, "in_chans": None, "mean": None,
    "std": None, "keep_channels": False, "exif_orientation": False,
    "alpha": "drop",
}  # fmt: skip
PRETRAIN_ONLY = {
    "model": "conmim_base_patch16_224", "drop_path": 0.0, "crop_scale": (0.08, 1.0),
    "data_pipeline": "fast", "epochs": 300, "opt_betas": (0.9, 0.98), "min_lr": 1e-05,
    "decode": "cpu", "mask_type": "block", "mask_ratio": 0.75, "mask_patch_size": None,
    "num_mask_patches": None,
    "max_mask_patches_per_block": None, "min_mask_patches_per_block": 16, "temp": None,
    "t_momentum": None, "resume_copy": "", "norm_pix_loss": None, "no_norm_pix_loss": None,
    "part_maps": None, "part_source": "maps", "num_parts": None, "mask_lambda": None,
    "mask_lambda_power": None, "permutation_type": None, "attention_type": None,
    "order_precision": None, "query_depth": None, "share_weight": None, "no_share_weight": None,
    "prediction_head_type": None, "gaussian_kernel_size": None, "gaussian_sigma": None,
    "loss_type": None, "predict_feature": None, "target_model": None, "target_precision": None,
    "target_mean_std": "images", "use_ema_model": None, "no_use_ema_model": None,
    "discrete_vae_weight_path": None, "discrete_vae_type": None, "second_input_size": None,
    "second_interpolation": "lanczos", "no_loss_masked": None, "color_jitter": 0.0,
    "separate_mask_ratio": None, "num_cls_tokens": None, "use_bottleneck": None,
    "no_bottleneck": None, "hflip": 0.5, "mask_grid": None, "list_space": False, "target": None,
    "fft_weight": None, "feature_loss": None, "attention_noise": None, "mask_teacher": None,
    "init": "", "eval_every": 0, "eval_data_path": None, "eval_images": 10000,
}  # fmt: skip
FINETUNE_ONLY = {
    "model": "beit_base_patch16_224", "drop_path": 0.1, "eval_data_path": None, "nb_classes": None,
    "label_fraction": 1.0, "label_list": None, "class_map": None, "epochs": 30, "opt_betas": None,
    "min_lr": 1e-06, "layer_decay": 0.9,
    "disable_weight_decay_on_rel_pos_bias": False, "finetune": "", "model_key": "model|module",
    "model_prefix": "", "init_scale": 0.001, "use_mean_pooling": True, "use_cls": True, "drop": 0.0,
    "attn_drop_rate": 0.0, "smoothing": 0.1, "color_jitter": 0.4, "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25, "remode": "pixel", "recount": 1, "no_aug": False, "bce_loss": False,
    "no_bce_loss": False, "aug_repeats": 1, "eval_input_size": None, "model_ema_warmup_epochs": 0,
    "mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5,
    "mixup_mode": "batch", "model_ema": False, "no_model_ema": False, "model_ema_decay": 0.9999,
    "model_ema_force_cpu": False, "eval": False, "dist_eval": True, "no_dist_eval": True,
    "disable_eval_during_finetuning": False, "crop_pct": None, "resplit": None,
    "freeze_blocks": 0, "full_last_block": False, "head_lr": None, "layer_warmup": False,
    "squash": False,
}  # fmt: skip
# What ConMIM's published commands pass (docs/coming_from.md#coming-from-conmim)
PUBLISHED_PRETRAIN = """
--batch_size 64 --epochs 300 --save_ckpt_freq 20 --discrete_vae_weight_path x --discrete_vae_type
dall-e --model conmim_base_patch16_224 --rel_pos_bias --disable_rel_pos_bias --abs_pos_emb
--layer_scale_init_value 0.1 --temp 0.1 --num_mask_patches 75 --max_mask_patches_per_block 80
--min_mask_patches_per_block 16 --mask_ratio 0.75 --mask_type block --input_size 224
--second_input_size 112 --drop_path 0 --opt adamw --opt_eps 1e-8 --opt_betas 0.9 0.98 --clip_grad 3
--momentum 0.9 --weight_decay 0.05 --weight_decay_end 0.1 --lr 5e-4 --warmup_lr 1e-6 --min_lr 1e-5
--warmup_epochs 5 --warmup_steps -1 --no_loss_masked --t_momentum 0.996 --train_interpolation
bicubic --second_interpolation lanczos --data_path /data --imagenet_default_mean_and_std --data_set
IMNET --output_dir out --log_dir out --device cuda --seed 0 --resume a --resume_copy b --auto_resume
--no_auto_resume --start_epoch 0 --num_workers 10 --pin_mem --no_pin_mem --world_size 1 --local_rank
-1 --dist_on_itp --dist_url env://
"""
PUBLISHED_FINETUNE = """
--batch_size 64 --epochs 30 --update_freq 1 --save_ckpt_freq 20 --model beit_base_patch16_224
--rel_pos_bias --disable_rel_pos_bias --abs_pos_emb --layer_scale_init_value 0.1 --input_size 224
--drop 0 --attn_drop_rate 0 --drop_path 0.1 --disable_eval_during_finetuning --model_ema
--model_ema_decay 0.9999 --model_ema_force_cpu --opt adamw --opt_eps 1e-8 --opt_betas 0.9 0.999
--clip_grad 1 --momentum 0.9 --weight_decay 0.05 --weight_decay_end 0.1 --lr 5e-4 --layer_decay 0.9
--warmup_lr 1e-6 --min_lr 1e-6 --warmup_epochs 5 --warmup_steps -1 --color_jitter 0.4 --aa
rand-m9-mstd0.5-inc1 --smoothing 0.1 --train_interpolation bicubic --crop_pct 0.9 --reprob 0.25
--remode pixel --recount 1 --resplit --mixup 0 --cutmix 0 --cutmix_minmax 0.2 0.8 --mixup_prob 1
--mixup_switch_prob 0.5 --mixup_mode batch --finetune x --model_key model|module --model_prefix p
--init_scale 0.001 --use_mean_pooling --use_cls --disable_weight_decay_on_rel_pos_bias --data_path
/data --eval_data_path /val --nb_classes 1000 --imagenet_default_mean_and_std --data_set IMNET
--output_dir out --log_dir out --device cuda --seed 0 --resume a --auto_resume --no_auto_resume
--save_ckpt --no_save_ckpt --start_epoch 0 --eval --dist_eval --num_workers 10 --pin_mem
--no_pin_mem --world_size 1 --local_rank -1 --dist_on_itp --dist_url env:// --enable_deepspeed
"""
MAINS = {"pretrain": run_pretraining.main, "finetune": run_class_finetuning.main}


def flags_of(stage: str) -> dict:
    actions = build_parser(stage)._actions
    return {
        name.removeprefix("--"): a.default
        for a in actions
        for name in a.option_strings
        if a.dest != "help"
    }


@pytest.mark.parametrize(
    ("stage", "own"), [("pretrain", PRETRAIN_ONLY), ("finetune", FINETUNE_ONLY)]
)
def test_flags_and_defaults_are_frozen(stage, own):
    assert flags_of(stage) == BOTH | own


@pytest.mark.parametrize(
    ("stage", "command"), [("pretrain", PUBLISHED_PRETRAIN), ("finetune", PUBLISHED_FINETUNE)]
)
def test_published_flags_are_accepted(stage, command):
    args = parse(stage, command.split())
    assert args.rel_pos_bias is False and args.auto_resume is False and args.weight_decay_end == 0.1
    if stage == "finetune":
        assert (
            args.cutmix_minmax == [0.2, 0.8]
            and args.use_mean_pooling is False
            and args.save_ckpt is False
        )


# --------------------------------------------------------------------------------------------------
# Which value wins


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("epochs: 1.5", r"--epochs: invalid int value: '1\.5'"),
        ("epochs: true", "--epochs: invalid int value"),
        ("batch_size: [8]", r"--batch_size: \[8\] is a list; it takes one value"),
        ("crop_scale: null", "--crop_scale: it has no value"),
        ("crop_scale: 3", "--crop_scale: 3 is not 2 values"),
        ("crop_scale: [0.9, 0.1]", r"--crop_scale 0\.9 0\.1 must be the smallest"),
        ("model: null", "--model: it has no value"),
        ("model: {a: 1}", "--model: {'a': 1} is no text or number"),
        ("model_kwargs: 5", "--model_kwargs takes K=V pairs, not '5'"),
        ("strict_data: 3", "--strict_data: 3 is not true or false"),
        ("mask_type: zigzag", "--mask_type: invalid choice: 'zigzag'"),
        ("input_size: huge", "--input_size: huge is not a size"),
        ("1: 2", "contains unknown options: 1"),
        ("epochs: [", "is not YAML"),
        (b"epochs: \xff\xfe", "is no text in UTF-8"),
        ("[" * 3000, "is not YAML"),
    ],
)
def test_what_a_config_file_may_not_say_is_named_with_the_file(tmp_path, capsys, line, says):
    path = tmp_path / "config.yaml"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises((SystemExit, ValueError)) as raised:
        build_method(parse("pretrain", ["--config", str(path)]))
    said = str(raised.value) + capsys.readouterr().err
    assert re.search(says, said), said
    assert "config.yaml" in said or says.startswith(("--crop_scale 0", "--model_kwargs takes"))


def test_model_kwargs_that_are_no_yaml_are_named():
    with pytest.raises(ValueError, match=r"--model_kwargs 'depth=\[2' is not YAML"):
        build_method(parse("pretrain", ["--model_kwargs", "depth=[2"]))


def test_defaults_recipe_file_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-2\nepochs: 7\nmask_ratio: 0.6\n")
    base = parse("pretrain", ["--model", "conmim_base_patch16_224"])
    plain = parse("pretrain", ["--model", "beit_tiny_patch16_224"])
    assert (plain.lr, plain.epochs, plain.recipe) == (5e-4, 300, None)
    assert (base.lr, base.epochs, base.clip_grad, base.recipe) == (
        1.5e-3,
        800,
        3.0,
        "conmim_base_pretrain",
    )
    overlaid = parse("pretrain", ["--config", str(file), "--epochs", "9"])
    assert (overlaid.lr, overlaid.epochs, overlaid.mask_ratio, overlaid.clip_grad) == (
        1e-2,
        9,
        0.6,
        3.0,
    )


def test_model_of_the_file_chooses_the_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: conmim_large_patch16_224\nclip_grad: null\n")
    args = parse("pretrain", ["--config", str(file)])
    assert args.recipe == "conmim_large_pretrain" and args.clip_grad is None
    assert args.lr == recipe_for("conmim_large_patch16_224", "pretrain").flags["lr"]
    args = parse("pretrain", ["--config", str(file), "--model", "conmim_small_patch16_224"])
    assert args.recipe == "conmim_small_pretrain"


@pytest.mark.parametrize(("stage", "base"), [("pretrain", PRETRAIN), ("finetune", FINETUNE)])
def test_saved_configuration_gives_the_same_run(tmp_path, stage, base):
    flags = [
        "--opt_betas",
        "0.8",
        "0.9",
        "--no_pin_mem",
        "--save_ckpt_steps",
        "5",
        "--output_dir",
        str(tmp_path),
    ]
    with dry_run_folder(tmp_path):
        args = parse(stage, [*base, *flags, "--dry_run"])
        MAINS[stage](args)
        saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
        again = parse(stage, ["--config", str(tmp_path / "config.yaml"), "--dry_run"])
        MAINS[stage](again)
    assert (
        saved["opt_betas"] == [0.8, 0.9]
        and saved["precision"] == "fp32"
        and saved["pin_mem"] is False
    )
    assert as_config(again) == as_config(args) == saved
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == saved


# --------------------------------------------------------------------------------------------------
# What is said


def test_models_are_listed_by_purpose(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("pretrain", ["--list_models"])
    said = capsys.readouterr()
    assert stopped.value.code == 0 and not said.err
    methods, classifiers = said.out.split("\n\n")[:2]
    pairs = [line.split() for line in methods.splitlines()[1:]]
    names = classifiers.split()
    assert {name for name, _ in pairs} == {
        name for name in list_models() if entry_of(name).kind == "method"
    }
    assert ["mae_tiny_patch16_224", "vit_tiny_patch16_224"] in pairs
    assert ["a2mim_resnet50", "resnet50"] in pairs
    assert {classifier for _, classifier in pairs} < set(names) and "mae_tiny" not in classifiers


def test_a_methods_classifier_is_that_of_its_recipes():
    pretrained = {r.name: r.model for r in all_recipes() if r.stage == "pretrain"}
    compared = 0
    for recipe in all_recipes():
        if recipe.stage == "finetune" and recipe.starts_from in pretrained:
            assert entry_of(pretrained[recipe.starts_from]).classifier == recipe.model
            compared += 1
    assert compared > 40
    for name in list_models():
        entry = entry_of(name)
        assert bool(entry.classifier) == (entry.kind == "method")
        assert not entry.classifier or not entry_of(entry.classifier).classifier


@pytest.mark.parametrize("make", [*(partial(build_parser, s) for s in MAINS), knn_parser,
                                  linear_parser, part_parser])  # fmt: skip
def test_every_flag_is_explained(make):
    shown = [action for action in make()._actions if action.help != argparse.SUPPRESS]
    assert not [action.dest for action in shown if not action.help]


@pytest.mark.parametrize(
    ("words", "size"),
    [("32", 32), ("32 64", [32, 64]), ("32x64", [32, 64]), ("48X48", 48), ("48 48", 48)],
)
def test_sizes_of_images(words, size):
    args = parse("pretrain", [*PRETRAIN, "--input_size", *words.split()])
    assert args.input_size == size and model_kwargs(args)["input_size"] == size


def test_a_method_of_oblong_images(tmp_path):
    flags = ["--input_size", "16", "32", "--output_dir", str(tmp_path), "--dry_run"]
    with dry_run_folder(tmp_path):
        args = parse("pretrain", [*PRETRAIN, *flags])
        run_pretraining.main(args)
    assert build_method(args).patch_embed.grid_size == (4, 8)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["input_size"] == [16, 32]


def test_default_workers_fit_the_cpus(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    setup_logging(0)
    for ranks, given, taken in ((1, 10, 6), (2, 10, 3), (8, 10, 1), (1, 12, 12), (1, 0, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        args = Namespace(num_workers=given)
        resolve_workers(args)
        resolve_workers(args)
        assert args.num_workers == taken
        assert capfd.readouterr().out.count("is reduced to") == (taken not in (12, 0))


def test_a_run_says_what_it_keeps_and_does(tmp_path, capfd):
    args = parse("pretrain", [*PRETRAIN, "--lr", "0.01"])
    args.rank, args.world_size, args.matmul_precision = 0, 1, "highest"
    setup_logging(0)
    report(args, derived(args, 10))
    said = capfd.readouterr().out
    assert "no --output_dir: nothing is kept of this run" in said
    assert "0.01, no warm-up, cosine to" in said and "in 0 steps" not in said


@pytest.mark.parametrize(
    ("method", "model", "use"),
    [
        ("conmim", "vit_tiny_patch16_224", "beit_tiny_patch16_224"),
        ("mae", "beit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("mae", "vit_tiny_patch16_224", None),
    ],
)
def test_the_variant_of_a_checkpoint_is_named(tmp_path, capfd, method, model, use):
    network = build_method(parse("pretrain", [*PRETRAIN, *METHODS.get(method, ())]))
    held = f"{method}_tiny_patch16_224"
    save_checkpoint(tmp_path / "c.pth", {"model": network.state_dict(), "args": {"model": held}})
    save_encoder(tmp_path / "e.safetensors", network.encoder_state_dict(), {"model": held})
    for name in ("c.pth", "e.safetensors"):
        flags = ("--model", model, "--finetune", str(tmp_path / name), "--dry_run")
        with dry_run_folder(tmp_path), contextlib.suppress(SystemExit):
            launch(run_class_finetuning.main, parse("finetune", [*FINETUNE, *flags]))
        said = capfd.readouterr().out
        assert ("variant: use" in said) == (use is not None)
        assert use is None or f"holds {held}, which is the" in said
        assert use is None or f"use --model {use} instead of {model}" in said


# --------------------------------------------------------------------------------------------------
# Mistakes

RESNET_32 = "--model a2mim_resnet18 --input_size 32 --mask_type random_mps32 --mask_ratio 0.6"
MISTAKES = [
    ("pretrain", "--model nope", "--model nope"),
    ("pretrain", "--model_kwargs depth", "--model_kwargs"),
    ("pretrain", "--model_kwargs deph=3", "deph"),
    ("pretrain", "--data_set IMNET --data_path {tmp}/missing", "{tmp}/missing"),
    ("pretrain", "--data_set image_folder --data_path {tmp}/missing", "{tmp}/missing"),
    ("pretrain", "--data_set IMNET", "--data_path"),
    ("pretrain", "--patch_size 5", "--patch_size"),
    ("pretrain", "--warmup_epochs 9", "--warmup_epochs"),
    ("pretrain", "--precision fp16", "--precision fp16"),
    ("pretrain", "--mask_ratio 0.01", "--mask_ratio"),
    ("pretrain", "--opt adamv", "--opt adamv"),
    ("pretrain", "--opt lamb --enable_deepspeed", "--zero_stage"),
    ("pretrain", "--compile --enable_deepspeed --zero_stage 3 --dry_run", "use --zero_stage 2"),
    ("finetune", "--compile --enable_deepspeed --zero_stage 3", "use --zero_stage 2"),
    ("pretrain", "--offload optimizer", "--enable_deepspeed"),
    ("pretrain", "--deepspeed_shards", "--deepspeed_shards needs --enable_deepspeed"),
    (
        "pretrain",
        "--offload optimizer --enable_deepspeed --zero_stage 0",
        "use --zero_stage 1, 2 or 3",
    ),
    ("pretrain", "--opt adahessian", "--opt adahessian"),
    ("pretrain", "--batch_size 0", "--batch_size"),
    ("pretrain", "--batch_size 5000", "--batch_size"),
    ("pretrain", "--batch_sise 4", "--batch_sise"),
    ("pretrain", "--zero_stage 4", "--zero_stage"),
    ("pretrain", "--deepspeed_config x.json", "--enable_deepspeed"),
    ("pretrain", "--enable_deepspeed --deepspeed_config x.json", "x.json"),
    ("pretrain", "--keep_checkpoints 0", "--keep_checkpoints"),
    ("pretrain", "--config {tmp}/missing.yaml", "--config"),
    ("pretrain", "--config {tmp}/unknown.yaml", "learning_rate"),
    ("pretrain", "--config {tmp}/broken.yaml", "--config"),
    ("pretrain", "--config {tmp}/choice.yaml", "--mask_type"),
    ("pretrain", "--config {tmp}/type.yaml", "--opt_eps"),
    (
        "pretrain",
        "--model semaim_tiny_patch16_224 --mask_type none --model_kwargs --predict_feature clip",
        "--target_model",
    ),
    (
        "pretrain",
        "--model semaim_clip_tiny_patch16_224 --mask_type none --model_kwargs "
        "--target_model {tmp}/no.pt",
        "{tmp}/no.pt",
    ),
    (
        "pretrain",
        "--model semaim_tiny_patch16_224 --mask_type none --model_kwargs --query_depth 5",
        "--query_depth",
    ),
    ("pretrain", "--model mae_tinny_patch16_224", "did you mean mae_tiny_patch16_224"),
    ("pretrain", "--model beit_tiny_patch16_224", "is a classifier, not a pre-training method"),
    ("finetune", "--model mae_tiny_patch16_224", "evaluated as --model vit_tiny_patch16_224"),
    ("pretrain", "--mask_ration 0.5", "did you mean --mask_ratio"),
    ("pretrain", "--learning_rate 1", "did you mean --lr?"),
    ("finetune", "--epoch 1", "did you mean --epochs"),
    ("finetune", "--model_kwargs dept=2", "--model_kwargs dept=2 is not an option of beit_tiny"),
    ("finetune", "--model_kwargs dept=2", "did you mean depth? there are: attn, attn_drop, depth"),
    ("pretrain", "--input_size 16 16 16", "16 16 16 is not a size; use S, H W or HxW"),
    ("pretrain", "--input_size 16x", "16x is not a size"),
    (
        "pretrain",
        "--output_dir {tmp}/choice.yaml",
        "--output_dir {tmp}/choice.yaml is not a folder",
    ),
    ("finetune", "--output_dir {tmp}/choice.yaml/a", "choice.yaml/a is not a folder that can be"),
    ("pretrain", "--log_dir {tmp}/choice.yaml", "--log_dir {tmp}/choice.yaml is not a folder"),
    (
        "pretrain",
        "--output_dir /proc/none --data_set image_folder --data_path {tmp}/missing",
        "--output_dir /proc/none",  # outputs come first
    ),
    (
        "pretrain",
        f"{RESNET_32} --model_kwargs patch_size=null",
        "--model_kwargs output_stride=8 makes it 8x8",
    ),
    (
        "pretrain",
        f"{RESNET_32} --mask_patch_size 8 --model_kwargs patch_size=null",
        "output_stride=8 makes it 8x8",
    ),
    (
        "pretrain",
        f"{RESNET_32} --model_kwargs patch_size=null output_stride=4",
        "output_stride=4 is not possible for resnet18; use one of 8, 16, 32",
    ),
    (
        "pretrain",
        "--input_size 40 --patch_size 8 --mask_type random_mps32",
        "which is the default; use --mask_patch_size 8, one patch",
    ),
    ("finetune", "--finetune {tmp}/missing.pth", "{tmp}/missing.pth"),
    ("finetune", "--nb_classes 3", "--nb_classes"),
    ("finetune", "--mixup 0.8 --batch_size 7", "--batch_size"),
    ("finetune", "--eval", "--resume"),
    ("finetune", "--opt_betas 0.9", "--opt_betas"),
    ("finetune", "--label_fraction 0", "--label_fraction"),
]


@pytest.mark.parametrize(("stage", "flags", "named"), MISTAKES)
def test_mistake_is_named_in_one_line(tmp_path, capfd, stage, flags, named):
    files = {
        "unknown": "learning_rate: 1\n",
        "broken": "a: [1\nb: }\n",
        "choice": "mask_type: x\n",
        "type": "opt_eps: abc\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    argv = [
        *(PRETRAIN if stage == "pretrain" else FINETUNE),
        "--output_dir",
        str(tmp_path / "out"),
        "--dry_run",
    ]
    with dry_run_folder(tmp_path), pytest.raises(SystemExit) as stopped:
        argv += flags.format(tmp=tmp_path).split()
        launch(MAINS[stage], parse(stage, argv))
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "error: " in line]
    assert stopped.value.code in (1, 2)
    assert len(lines) == 1 and named.format(tmp=tmp_path) in lines[0]
    assert "Traceback" not in said.out + said.err


@contextlib.contextmanager
def dry_run_folder(folder: Path):
    """Works in `folder`, and takes back what a lone DeepSpeed process puts into the environment."""
    before, there = dict(os.environ), Path.cwd()
    os.chdir(folder)
    try:
        with own_signals():
            yield
    finally:
        os.chdir(there)
        os.environ.clear()
        os.environ.update(before)


def test_error_in_a_loader_worker_is_one_line(tmp_path, capfd):
    """It arrives with the worker's traceback."""
    imagenet_stand_in(tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes(b"no image")
    flags = (
        "--data_set",
        "IMNET",
        "--data_path",
        str(tmp_path / "data"),
        "--strict_data",
        "--num_workers",
        "2",
    )
    with own_signals(), pytest.raises(SystemExit) as stopped:
        launch(run_pretraining.main, arguments("pretrain", tmp_path, *flags))
    said = capfd.readouterr().out
    assert stopped.value.code == 1 and "Traceback" not in said
    assert re.search(r"^error: .*1 of 30 images are broken.*3\.png$", said, re.MULTILINE)


def test_unforeseen_error_ends_the_process(tmp_path):
    """Its traceback keeps the loader alive, whose workers leave signals to their parent; no rank
    may hang on them."""
    program = "import engine_for_pretraining as e, run_pretraining as r, sys\n"
    program += "from unimim.cli import options\nfrom unimim.engine import setup\n"
    program += "e.train_one_step = lambda *args: 1 / 0\n"
    program += "setup.launch(r.main, options.parse('pretrain', sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        program,
        *PRETRAIN,
        "--output_dir",
        str(tmp_path),
        "--num_workers",
        "2",
    ]
    result = run_command(command)
    assert result.returncode == 1 and result.stdout.rstrip().endswith(
        "ZeroDivisionError: division by zero"
    )


def test_steps_of_the_rate_must_be_given(capsys):
    with pytest.raises(SystemExit):
        parse("pretrain", ["--lr_schedule", "step"])
    assert "--lr_schedule step needs --lr_steps" in capsys.readouterr().err
    assert parse("pretrain", ["--lr_schedule", "step", "--lr_steps", "3"]).lr_steps == [3]


def test_leftovers_are_named(tmp_path, capfd):
    with dry_run_folder(tmp_path):
        run_pretraining.main(parse("pretrain", [*PRETRAIN, "--warmup_lr", "1e-6", "--dry_run"]))
    assert "--warmup_lr is accepted" in capfd.readouterr().out


def test_error_of_any_rank_is_printed(tmp_path, capfd):
    """Ranks above 0 are silent but for errors."""
    args = arguments("pretrain", tmp_path, "--patch_size", "5")
    setup_logging(1)
    log.info("quiet")

    def main(_):
        raise ValueError("--patch_size is wrong")

    with own_signals(), pytest.raises(SystemExit):
        launch(main, args)
    assert capfd.readouterr().out == "[rank 1] error: --patch_size is wrong\n"


# --------------------------------------------------------------------------------------------------
# Launchers

STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
}
CYCLIC = STEP | {"SLURM_PROCID": "2", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}


def test_tasks_of_srun_find_each_other():
    """Placed in turn on two machines: rank 2 is the second process of the first one."""
    place = find_place(CYCLIC)
    assert place == Place(2, 8, 1, "gpu07", place.port)
    assert find_place(CYCLIC | {"SLURM_PROCID": "3"}) == Place(3, 8, 1, "gpu07", place.port)
    ports = {
        find_place(CYCLIC | {name: "78"}).port for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    } | {place.port}
    assert len(ports) == 3 and all(10000 <= port < 30000 for port in ports)
    assert find_place(CYCLIC | {"CUDA_VISIBLE_DEVICES": "3"}).local_rank == 0
    assert find_place(CYCLIC | {"CUDA_VISIBLE_DEVICES": "2,3"}).local_rank == 1
    assert find_place(CYCLIC | {"MASTER_ADDR": "there"}).address == "there"
    elsewhere = {**CYCLIC, "SLURM_STEP_NODELIST": "", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"}
    assert find_place(elsewhere).address == "10.0.0.3"


def test_tasks_of_srun_without_a_place_to_meet_are_refused():
    env = {name: value for name, value in CYCLIC.items() if name != "SLURM_STEP_NODELIST"}
    with pytest.raises(ValueError, match=r"srun started 8 tasks.*MASTER_ADDR"):
        find_place(env)


def test_other_processes_of_a_slurm_job_are_alone_or_of_their_launcher():
    batch_script = {
        "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_JOB_NODELIST": "gpu07",
    }
    assert (
        find_place(batch_script)
        == find_place(CYCLIC | {"SLURM_STEP_NUM_TASKS": "1"})
        == find_place({})
        == Place()
    )
    assert find_place(CYCLIC | {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "4"}) == Place(
        5, 16, 4
    )


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("host", "host"),
        ("b2,a1", "b2"),
        ("gpu[007-012,15],login", "gpu007"),
        ("rack[2,4]-node[01-03]", "rack2-node01"),
        ("n.example.org,x[1-2]", "n.example.org"),
    ],
)
def test_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first


def test_deepspeed_takes_the_device_of_the_flags(tmp_path, monkeypatch):
    """On a machine with GPUs it would take one of them under a model on the CPU."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with dry_run_folder(tmp_path):
        set_up(arguments("pretrain", tmp_path, "--enable_deepspeed"))
        leave_process_group()
        assert os.environ["DS_ACCELERATOR"] == "cpu"


TASK_OF_SRUN = """
import os, sys, time
import modeling_pretrain
import torch.distributed as dist
from unimim.cli import options
from unimim.engine import distributed, setup
rank, port = sys.argv[1:]
place = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
place |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
os.environ.update(place, MASTER_PORT=port)
dist.destroy_process_group = lambda: time.sleep(600)

def main(args):
    setup.set_up(args)
    if args.rank == 1:
        1 / 0
    distributed.barrier()

setup.launch(main, options.parse("pretrain", ["--device", "cpu"]))
"""


@pytest.mark.slow
def test_error_on_one_rank_ends_all(tmp_path):
    """Not by way of the group's destruction, which on GPUs waits for those who wait for us."""
    port = str(free_port())
    ranks = [
        start_command([sys.executable, "-c", TASK_OF_SRUN, str(rank), port]) for rank in range(2)
    ]
    waiting, failing = (process.communicate(timeout=120)[0] for process in ranks)
    assert [process.returncode for process in ranks] == [1, 1]
    assert failing.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "rank 1 (" in waiting and "has ended, so this one ends too" in waiting
    assert "Traceback" not in waiting


LAUNCHERS = {
    "python": (sys.executable,),
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
    "launch": (sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2"),
    "launch_use_env": (
        sys.executable,
        "-m",
        "torch.distributed.launch",
        "--use_env",
        "--nproc_per_node=2",
    ),
    "deepspeed": (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_starts_the_script(tmp_path, name):
    """An epoch of two steps; DeepSpeed under its own launcher and in a lone process."""
    stage, ranks = "finetune" if name == "launch" else "pretrain", 1 if name == "python" else 2
    flags = ["--epochs", "1", "--batch_size", str(700 // ranks)]
    if stage == "finetune":
        flags += ["--disable_eval_during_finetuning"]
    if name in ("deepspeed", "python"):
        flags += ["--enable_deepspeed", "--zero_stage", "2"]
    port = () if ranks == 1 else (f"--master_port={free_port()}",)
    result = run_command(script(stage, tmp_path, *flags, launcher=LAUNCHERS[name] + port))
    assert result.returncode == 0, result.stdout
    assert "epoch 0 [2/2]" in result.stdout
    state = load_checkpoint(tmp_path / "checkpoint-0.pth")
    assert state["engine"]["world_size"] == ranks and state["rng"]["updates"] == 2
    assert (tmp_path / "deepspeed_config.json").exists() == ("--enable_deepspeed" in flags)
