"""The commands of the published READMEs, with nothing changed but the script's name."""

import contextlib
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, own_signals, run_command, write_packed
from torch.overrides import TorchFunctionMode

import run_class_finetuning
import run_knn
import run_linear_probing
import run_pretraining
from modeling_finetune import create_model, entry_of
from scripts.tools import extract_backbone
from semantic_segmentation import voc_linear_probe
from unimim.checkpoint.files import load_checkpoint, save_checkpoint
from unimim.cli.flags import build_parser
from unimim.cli.options import parse, resolve_lr
from unimim.cli.published import FLAGS, MODELS, MODELS_WITH_FLAG, translate
from unimim.data.shapes import write_shapes
from unimim.engine.setup import launch
from unimim.evaluation.accuracy import published_lines
from unimim.evaluation.flags import knn_parser, linear_parser, parse_knn, parse_linear

PARSE = {
    "pretrain": lambda words: parse("pretrain", words),
    "finetune": lambda words: parse("finetune", words),
    "linear": parse_linear,
    "knn": parse_knn,
    "voc": voc_linear_probe.parse,
}
MAIN = {
    "pretrain": run_pretraining.main,
    "finetune": run_class_finetuning.main,
    "linear": run_linear_probing.main,
    "knn": run_knn.main,
    "voc": voc_linear_probe.main,
}
PARSERS = {
    "pretrain": lambda: build_parser("pretrain"),
    "finetune": lambda: build_parser("finetune"),
    "linear": linear_parser,
    "knn": knn_parser,
    "voc": voc_linear_probe.build_parser,
}

# name -> (stage, the flags as they are published, what the run must take)
COMMANDS = {
    "ConMIM, pre-training of ViT-L": (
        "pretrain",
        """--data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR} --model conmim_large_patch16_224
        --batch_size 64 --lr 7.5e-4 --warmup_epochs 10 --epochs 1600 --clip_grad 1.0 --drop_path 0
        --layer_scale_init_value 1e-5 --mask_type random_mps32 --mask_ratio 0.75
        --imagenet_default_mean_and_std""",
        {"recipe": "conmim_large_pretrain", "lr": 7.5e-4, "notes": ()},
    ),
    "ConMIM, fine-tuning of ViT-B": (
        "finetune",
        """--model beit_base_patch16_224 --data_path ${DATA_PATH} --finetune ${CKPT}
        --output_dir ${OUTPUT_DIR} --batch_size 128 --lr 4e-3 --update_freq 1 --warmup_epochs 20
        --epochs 100 --layer_decay 0.65 --drop_path 0.1 --weight_decay 0.05 --mixup 0.8
        --cutmix 1.0 --imagenet_default_mean_and_std --enable_deepspeed""",
        {"recipe": "conmim_base_finetune", "lr": 4e-3, "enable_deepspeed": True, "notes": ()},
    ),
    "SemMAE, evaluation of ViT-B/16": (
        "finetune",
        """--eval --resume ${CKPT} --model vit_base_patch16 --batch_size 16
        --data_path ${DATA_PATH}""",
        {"model": "vit_base_patch16_224", "batch_size": 16, "use_mean_pooling": True},
    ),
    "SemMAE, evaluation of ViT-B/8": (
        "finetune",
        """--eval --resume ${CKPT} --model vit_base_patch8 --batch_size 8
        --data_path ${DATA_PATH}""",
        {"model": "vit_base_patch8_224", "batch_size": 8},
    ),
    "SemMAE, pre-training": (
        "pretrain",
        """--batch_size 128 --model mae_vit_base_patch16 --norm_pix_loss --mask_ratio 0.75
        --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --setting 3
        --data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR} --log_dir ${OUTPUT_DIR}""",
        {"model": "semmae_base_patch16_224", "recipe": "semmae_base_pretrain", "epochs": 800},
    ),
    "SemAIM, pre-training of ViT-B": (
        "pretrain",
        """--batch_size 64 --accum_iter 1 --model aim_base --norm_pix_loss --epochs 800
        --warmup_epochs 30 --blr 2e-4 --weight_decay 0.05 --clip_grad 3 --query_depth 12
        --prediction_head_type MLP --gaussian_kernel_size 9 --gaussian_sigma 1
        --permutation_type attention_center --attention_type cls --experiment exp0
        --data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR} --log_dir ${OUTPUT_DIR}""",
        {
            "model": "semaim_base_patch16_224", "update_freq": 1, "blr": 2e-4, "clip_grad": 3.0,
            "output_dir": "out/exp0", "log_dir": "out/exp0", "norm_pix_loss": True,
            "gaussian_sigma": 1.0, "permutation_type": "attention_center",
        },
    ),
    "SemAIM, fine-tuning of ViT-B": (
        "finetune",
        """--batch_size 64 --accum_iter 1 --model vit_base_patch16 --finetune ${CKPT}
        --blr 5e-4 --layer_decay 0.65 --epochs 100 --warmup_epochs 20 --weight_decay 0.05
        --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval --experiment exp
        --data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR} --log_dir ${OUTPUT_DIR}""",
        {
            "model": "vit_base_patch16_224", "blr": 5e-4, "layer_decay": 0.65, "epochs": 100,
            "warmup_epochs": 20, "mixup": 0.8, "lr_schedule": "mae", "use_mean_pooling": True,
        },
    ),
    "SemAIM, linear probe of ViT-B": (
        "linear",
        """--batch_size 512 --accum_iter 1 --model vit_base_patch16 --cls_token
        --finetune ${CKPT} --epochs 90 --warmup_epochs 0 --blr 0.1 --weight_decay 0.0 --dist_eval
        --experiment exp --data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR}
        --log_dir ${OUTPUT_DIR}""",
        {
            "opt": "momentum", "train_crop": "short_side", "pool": "cls", "warmup_epochs": 0,
            "feature_norm": "trained",
        },
    ),
    "SemAIM, k-NN of ViT-L": (
        "knn",
        """--model vit_large_patch16 --global_pool --batch_size_per_gpu 512
        --checkpoint_key state_dict --use_cuda --pretrained_weights ${CKPT}
        --data_path ${DATA_PATH}""",
        {
            "model": "vit_large_patch16_224", "batch_size": 512, "model_key": "state_dict",
            "knn_k": [10, 20, 30], "feature_norm": "plain", "pool": "avg", "temperature": [0.07],
        },
    ),
    "SemanticMIM, segmentation probe": (
        "voc",
        """--pretrained_weights ${CKPT} --output_dir ${OUTPUT_DIR}""",
        {
            "batch_size": 60, "layer_indices": -5, "nb_classes": 21, "notes": (),
            "data_path": "data/VOCdevkit/VOC2012",
        },
    ),
    "SemanticMIM, segmentation probe with every flag": (
        "voc",
        """--pretrained_weights ${CKPT} --output_dir ${OUTPUT_DIR} --data_path ${VOC}
        --batch_size_per_gpu 60 --num_classes 21 --num_cls_tokens 8 --head_type linear
        --layer_indices -5 --train_mask_size 100 --eval_size 448""",
        {"batch_size": 60, "nb_classes": 21},
    ),
    "MAE, pre-training of ViT-L": (
        "pretrain",
        """--job_dir ${OUTPUT_DIR} --nodes 8 --use_volta32 --batch_size 64
        --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 800
        --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path ${DATA_PATH}""",
        {"model": "mae_large_patch16_224", "output_dir": "out", "norm_pix_loss": True},
    ),
    "MAE, pre-training of ViT-H": (
        "pretrain",
        """--job_dir ${OUTPUT_DIR} --nodes 8 --use_volta32 --batch_size 64
        --model mae_vit_huge_patch14 --norm_pix_loss --mask_ratio 0.75 --epochs 800
        --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path ${DATA_PATH}""",
        {"model": "mae_huge_patch14_224", "blr": 1.5e-4, "opt_betas": [0.9, 0.95]},
    ),
    "MAE, fine-tuning of ViT-B on one machine": (
        "finetune",
        """--accum_iter 4 --batch_size 32 --model vit_base_patch16 --finetune ${CKPT}
        --epochs 100 --blr 5e-4 --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1
        --mixup 0.8 --cutmix 1.0 --reprob 0.25 --dist_eval --data_path ${DATA_PATH}""",
        {
            "update_freq": 4, "blr": 5e-4, "epochs": 100, "warmup_epochs": 5, "min_lr": 1e-6,
            "output_dir": "output_dir", "auto_resume": False,
        },
    ),
    "MAE, fine-tuning of ViT-B": (
        "finetune",
        """--job_dir ${OUTPUT_DIR} --nodes 4 --batch_size 32 --model vit_base_patch16
        --finetune ${CKPT} --epochs 100 --blr 5e-4 --layer_decay 0.65 --weight_decay 0.05
        --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval
        --data_path ${DATA_PATH}""",
        {"update_freq": 1, "output_dir": "out", "auto_resume": True, "clip_grad": None},
    ),
    "MAE, fine-tuning of ViT-L": (
        "finetune",
        """--job_dir ${OUTPUT_DIR} --nodes 4 --use_volta32 --batch_size 32
        --model vit_large_patch16 --finetune ${CKPT} --epochs 50 --blr 1e-3 --layer_decay 0.75
        --weight_decay 0.05 --drop_path 0.2 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval
        --data_path ${DATA_PATH}""",
        {"model": "vit_large_patch16_224", "drop_path": 0.2, "warmup_epochs": 5},
    ),
    "MAE, fine-tuning of ViT-H": (
        "finetune",
        """--job_dir ${OUTPUT_DIR} --nodes 8 --use_volta32 --batch_size 16
        --model vit_huge_patch14 --finetune ${CKPT} --epochs 50 --blr 1e-3 --layer_decay 0.75
        --weight_decay 0.05 --drop_path 0.3 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval
        --data_path ${DATA_PATH}""",
        {"model": "vit_huge_patch14_224", "drop_path": 0.3, "layer_decay": 0.75},
    ),
    "MAE, evaluation of ViT-B": (
        "finetune",
        """--eval --resume ${CKPT} --model vit_base_patch16 --batch_size 16
        --data_path ${DATA_PATH}""",
        {
            "model": "vit_base_patch16_224", "imagenet_default_mean_and_std": True,
            "output_dir": "",
        },
    ),
    "MAE, evaluation of ViT-L": (
        "finetune",
        """--eval --resume ${CKPT} --model vit_large_patch16 --batch_size 16
        --data_path ${DATA_PATH}""",
        {"model": "vit_large_patch16_224", "use_mean_pooling": True},
    ),
    "MAE, evaluation of ViT-H": (
        "finetune",
        """--eval --resume ${CKPT} --model vit_huge_patch14 --batch_size 16
        --data_path ${DATA_PATH}""",
        {"model": "vit_huge_patch14_224", "use_mean_pooling": True},
    ),
    "MAE, linear probe of ViT-B": (
        "linear",
        """--job_dir ${OUTPUT_DIR} --nodes 4 --batch_size 512 --model vit_base_patch16
        --cls_token --finetune ${CKPT} --epochs 90 --blr 0.1 --weight_decay 0.0 --dist_eval
        --data_path ${DATA_PATH}""",
        {"opt": "lars", "warmup_epochs": 10, "train_crop": "area", "pool": "cls"},
    ),
}  # fmt: skip
# the flags that the published scripts have, whether their READMEs use them or not
_RUN = """batch_size epochs accum_iter model weight_decay lr blr min_lr warmup_epochs data_path
    output_dir log_dir device seed resume start_epoch num_workers pin_mem no_pin_mem world_size
    local_rank dist_on_itp dist_url"""
_SEMAIM = "saveckp_freq experiment dist_backend"
_PROBE = "finetune global_pool cls_token nb_classes eval dist_eval"
_TUNE = f"""{_PROBE} input_size drop_path clip_grad layer_decay color_jitter aa smoothing reprob
    remode recount resplit mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode"""
_CLUSTER = "job_dir nodes ngpus timeout partition use_volta32 comment"
SCRIPTS = {
    "MAE's main_pretrain.py": (
        "pretrain", f"{_RUN} {_CLUSTER} input_size mask_ratio norm_pix_loss",
    ),
    "MAE's main_finetune.py": ("finetune", f"{_RUN} {_CLUSTER} {_TUNE}"),
    "MAE's main_linprobe.py": ("linear", f"{_RUN} {_CLUSTER} {_PROBE}"),
    "SemMAE's main_pretrain_setting3.py": (
        "pretrain", f"{_RUN} input_size mask_ratio norm_pix_loss mask_lambda setting",
    ),
    "SemAIM's main_pretrain.py": (
        "pretrain",
        f"""{_RUN} {_SEMAIM} input_size query_depth share_weight prediction_head_type
        gaussian_kernel_size gaussian_sigma loss_type norm_pix_loss permutation_type use_ema_model
        predict_feature attention_type clip_grad not_use_fp16""",
    ),
    "SemAIM's main_finetune.py": ("finetune", f"{_RUN} {_SEMAIM} {_TUNE}"),
    "SemAIM's main_linprobe.py": ("linear", f"{_RUN} {_PROBE} experiment dist_backend"),
    "SemAIM's main_knn.py": (
        "knn",
        """input_size batch_size_per_gpu nb_knn nb_classes temperature pretrained_weights use_cuda
        model checkpoint_key patch_size avgpool_patchtokens global_pool dump_features
        load_features num_workers dist_url dist_backend dist_on_itp local_rank data_path method""",
    ),
    "SemanticMIM's seg_linear_probing.py": (
        "voc",
        """pretrained_weights output_dir data_path num_cls_tokens layer_indices input_size eval_size
        train_mask_size head_type val_freq batch_size_per_gpu num_classes evaluate""",
    ),
}  # fmt: skip
LAUNCHED = (sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=1")


class NoDraws(TorchFunctionMode):
    """Leaves large weights as they were allocated: a dry run needs only their shapes."""

    FILLS = ("normal_", "uniform_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        weight = args[0] if args else (kwargs or {}).get("tensor")
        if func.__name__ in self.FILLS and torch.is_tensor(weight) and weight.numel() > 1000:
            return weight
        return func(*args, **(kwargs or {}))


def words_of(command: str, **files: str) -> list[str]:
    """Return a command's words, with `files` in place of its variables."""
    places = {"DATA_PATH": "data", "OUTPUT_DIR": "out", "CKPT": "weights.pth", "VOC": "voc"} | files
    return [re.sub(r"\$\{(\w+)\}", lambda found: places[found[1]], w) for w in command.split()]


def notes_of(args: Namespace) -> str:
    return "\n".join(args.notes)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Return folders of images, of SemMAE's packed samples and like VOC's, by their variables."""
    folder = tmp_path_factory.mktemp("data")
    write_shapes(folder / "images", train=520, val=20)
    write_shapes(folder / "VOC2012", train=61, val=5, voc=True)
    write_packed(folder / "packed/train", [f"n01440764/{number}" for number in range(130)])
    return {
        "DATA_PATH": str(folder / "images"),
        "PACKED": str(folder / "packed"),
        "VOC": str(folder / "VOC2012"),
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_taken_as_it_is_published(name: str) -> None:
    stage, command, expected = COMMANDS[name]
    args = PARSE[stage](words_of(command))
    assert {key: getattr(args, key) for key in expected} == expected
    # every word is one of ours or is named in the log
    known = PARSERS[stage]()._option_string_actions
    for word in re.findall(r"--\w+", command):
        assert word in known or f"{word} " in notes_of(args)


@pytest.mark.parametrize(
    "name",
    ["SemMAE, pre-training", "SemAIM, pre-training of ViT-B", "SemAIM, fine-tuning of ViT-B",
     "SemAIM, linear probe of ViT-B", "SemAIM, k-NN of ViT-L", "MAE, linear probe of ViT-B",
     "SemanticMIM, segmentation probe", "SemanticMIM, segmentation probe with every flag"],
)  # fmt: skip
def test_command_dry_runs(
    name: str, data: dict[str, str], tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/VOCdevkit").mkdir(parents=True)
    Path("data/VOCdevkit/VOC2012").symlink_to(data["VOC"])
    stage, command, _ = COMMANDS[name]
    if name == "SemMAE, pre-training":
        data = data | {"DATA_PATH": data["PACKED"]}
    words = [*words_of(command, **data), "--device", "cpu", "--num_workers", "0", "--dry_run"]
    # the checkpoint is not there
    if "${CKPT}" in command:
        words += ["--finetune", ""]
    args = PARSE[stage](words)
    with own_signals(), NoDraws():
        MAIN[stage](args)
    said = capfd.readouterr().out
    for note in args.notes:
        assert note in said


def test_log_says_what_each_name_became() -> None:
    _, command, _ = COMMANDS["SemAIM, k-NN of ViT-L"]
    notes = PARSE["knn"](words_of(command)).notes
    assert notes == (
        "--model vit_large_patch16 is vit_large_patch16_224 here",
        "--batch_size_per_gpu 512 is --batch_size 512 here",
        "--checkpoint_key state_dict is --model_key state_dict here",
        "--use_cuda is accepted and changes nothing here: the features stay on the device of "
        "--device",
        "left out, so as in SemAIM's main_knn.py: knn_k [10, 20, 30]",
        "left out, so as in SemAIM's main_knn.py: feature_norm plain",
    )


# --------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_published_script_is_taken(script: str) -> None:
    stage, flags = SCRIPTS[script]
    known = PARSERS[stage]()._option_string_actions
    refused = []
    for flag in flags.split():
        if f"--{flag}" not in known and (flag not in FLAGS or stage not in FLAGS[flag].stages):
            refused.append(flag)
    assert refused == []


def test_every_name_leads_to_one_of_ours_and_none_is_shown() -> None:
    for stage, make in PARSERS.items():
        parser = make()
        shown = parser.format_help()
        for flag, alias in FLAGS.items():
            if stage not in alias.stages or f"--{flag}" in parser._option_string_actions:
                continue
            assert not re.search(rf"--{flag}\b", shown)
            for word in re.findall(r"--\w+", alias.becomes):
                assert word in parser._option_string_actions
            assert alias.becomes or alias.why
    for stage, models in (*MODELS.items(), *(("pretrain", m) for m in MODELS_WITH_FLAG.values())):
        for name, ours in models.items():
            assert entry_of(name) is None
            assert (entry_of(ours).kind == "method") == (stage == "pretrain")


def test_values_that_look_like_flags_and_ours_stay() -> None:
    known = ("--model", "--data_path", "--dist_eval")
    words = ["--dist_eval", "--data_path=--cls_token", "--accum_iter=2", "--seed", "-1"]
    command = translate("finetune", words, known)
    assert command.words == [
        "--dist_eval", "--data_path", "--cls_token", "--update_freq", "2", "--seed", "-1"
    ]  # fmt: skip
    assert command.notes == ["--accum_iter 2 is --update_freq 2 here"]
    # without a place for the run there is none for the experiment
    assert translate("pretrain", ["--experiment", "a"], known).words == []


def test_lr_counts_accumulation() -> None:
    args = parse("finetune", words_of(COMMANDS["MAE, fine-tuning of ViT-B on one machine"][1]))
    args.world_size = 8
    resolve_lr(args)
    assert args.lr == pytest.approx(5e-4 * 32 * 4 * 8 / 256)


def test_left_out_flags_are_those_of_the_published_script(tmp_path: Path) -> None:
    args = parse("finetune", ["--model", "vit_base_patch16"])
    assert (args.epochs, args.blr, args.layer_decay, args.mixup) == (50, 1e-3, 0.75, 0.0)
    args = parse("finetune", ["--model", "vit_base_patch16", "--lr", "0.1"])
    assert (args.lr, args.blr) == (0.1, None)
    args = parse("pretrain", ["--model", "mae_vit_base_patch16"])
    assert (args.epochs, args.norm_pix_loss) == (400, False)
    args = parse("pretrain", ["--model", "mae_vit_base_patch16", "--setting", "3"])
    assert (args.model, args.mask_ratio, args.batch_size) == ("semmae_base_patch16_224", 0.6, 32)
    args = parse("pretrain", ["--model", "saim_base"])
    assert (args.permutation_type, args.weight_decay, args.clip_grad) == ("stochastic", 0.05, None)
    # ours, and recipes and files that say otherwise, are left alone
    assert parse("finetune", ["--model", "vit_base_patch16_224"]).epochs == 100
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 7\n")
    args = parse("finetune", ["--model", "vit_base_patch16", "--config", str(file)])
    assert (args.epochs, args.mixup) == (7, 0.0)
    args = parse_linear(["--recipe", "semaim_base_linear", "--dist_eval"])
    assert (args.opt, args.train_crop) == ("momentum", "short_side")


def test_pools_of_the_probes() -> None:
    model = ["--model", "vit_base_patch16"]
    args = parse_linear([*model, "--experiment", "a"])
    assert (args.pool, args.feature_norm, args.opt) == ("avg", "plain", "momentum")
    args = parse_linear([*model, "--global_pool"])
    assert (args.pool, args.feature_norm, args.opt) == ("avg", "plain", "lars")
    args = parse_linear(model)
    assert (args.pool, args.feature_norm, args.opt) == ("cls", "trained", "lars")
    args = parse("finetune", [*model, "--cls_token"])
    assert args.use_mean_pooling is False


def test_unknown_model_suggests_the_nearest(capfd) -> None:
    for stage, name, nearest in (
        ("finetune", "vit_base_patch_16", "vit_base_patch16"),
        ("finetune", "resnet_50", "resnet50"),
        ("pretrain", "semaim_base_patch16", "semaim_base_patch16_224"),
        ("pretrain", "mae_vit_base_patch_16", "mae_vit_base_patch16"),
        ("pretrain", "a2mim_resnet-50", "a2mim_resnet50"),
    ):
        words = ["--model", name, "--data_set", "digits", "--device", "cpu", "--dry_run"]
        with own_signals(), contextlib.suppress(SystemExit):
            launch(MAIN[stage], parse(stage, words))
        said = capfd.readouterr().out
        assert f"--model {name} is unknown here; did you mean {nearest} or " in said


# --------------------------------------------------------------------------------------------------
# Runs


def semaim_file(path: Path) -> str:
    """Write the file that SemAIM's pre-training of a tiny ViT would have saved."""
    torch.manual_seed(0)
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "input_size": 16, "patch_size": 4}
    vit = create_model("vit_base_patch16_224", **size, num_classes=0, global_pool="token")
    torch.nn.init.normal_(vit.norm.weight)
    state = {f"module.{name}": value for name, value in vit.state_dict().items()}
    save_checkpoint(path, {"epoch": 1, "state_dict": state, "model": "aim_base"})
    return str(path)


def test_knn_gives_semaims_number(data: dict[str, str], tmp_path: Path) -> None:
    _, command, _ = COMMANDS["SemAIM, k-NN of ViT-L"]
    file = semaim_file(tmp_path / "aim.pth")
    tiny = [
        "--device", "cpu", "--num_workers", "0", "--input_size", "16", "--patch_size", "4",
        "--model_kwargs", "embed_dim=32", "depth=2", "num_heads=2",
    ]  # fmt: skip
    tiny += ["--data_path", data["DATA_PATH"]]
    ours = ["--model", "vit_large_patch16_224", "--finetune", file, "--global_pool", *tiny]
    plain = ["--knn_k", "10", "20", "30", "--feature_norm", "plain"]
    with own_signals():
        published = run_knn.main(parse_knn([*words_of(command, CKPT=file), *tiny]))
        same = run_knn.main(parse_knn([*ours, *plain]))
        trained = run_knn.main(parse_knn(ours))
    assert published == same and [row.k for row in published] == [10, 20, 30]
    assert published[0].acc1 != trained[0].acc1 and trained[0].k == 10


def test_command_of_semmae_trains_on_packed_samples(
    data: dict[str, str], tmp_path: Path, capfd
) -> None:
    _, command, _ = COMMANDS["SemMAE, pre-training"]
    words = words_of(command, OUTPUT_DIR=str(tmp_path), DATA_PATH=data["PACKED"])
    words += [
        "--device", "cpu", "--num_workers", "0", "--input_size", "16", "--patch_size", "4",
        "--model_kwargs", "embed_dim=32", "depth=2", "num_heads=2", "--epochs", "1",
        "--warmup_epochs", "0", "--no_save_ckpt",
    ]  # fmt: skip
    with own_signals():
        run_pretraining.main(parse("pretrain", words))
    said = capfd.readouterr().out
    assert "130 packed samples of 14 x 14 patches are read in place" in said
    assert "part maps: packed, 7 parts" in said
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "log.txt").open()]
    assert len(losses) == 1 and losses[0] > 0


@pytest.mark.slow
def test_command_of_semaim_under_its_launcher(data: dict[str, str], tmp_path: Path) -> None:
    _, command, _ = COMMANDS["SemAIM, pre-training of ViT-B"]
    words = words_of(command, OUTPUT_DIR=str(tmp_path), DATA_PATH=data["DATA_PATH"])
    words += [
        "--device", "cpu", "--input_size", "16", "--patch_size", "4",
        "--model_kwargs", "embed_dim=32", "depth=2", "num_heads=2", "--query_depth", "2",
        "--dry_run",
    ]  # fmt: skip
    result = run_command([*LAUNCHED, str(ROOT / "run_pretraining.py"), *words])
    assert result.returncode == 0, result.stdout
    assert "--model aim_base is semaim_base_patch16_224 here" in result.stdout
    assert (tmp_path / "exp0" / "config.yaml").is_file()


def test_evaluation_is_printed_as_published(data: dict[str, str], tmp_path: Path, capfd) -> None:
    accuracy = {"acc1": 83.35192, "acc5": 96.494, "loss": 0.7449}
    assert published_lines(accuracy, 50000) == [
        "* Acc@1 83.352 Acc@5 96.494 loss 0.745",
        "Accuracy of the network on the 50000 test images: 83.4%",
    ]
    size = {"embed_dim": 32, "depth": 1, "num_heads": 2, "input_size": 16, "patch_size": 4}
    vit = create_model("vit_base_patch16_224", **size, num_classes=10, global_pool="avg")
    save_checkpoint(tmp_path / "classifier.pth", {"model": vit.state_dict()})
    files = {"CKPT": str(tmp_path / "classifier.pth"), "DATA_PATH": data["DATA_PATH"]}
    words = words_of(COMMANDS["MAE, evaluation of ViT-B"][1], **files)
    words += [
        "--device", "cpu", "--num_workers", "0", "--input_size", "16",
        "--patch_size", "4", "--model_kwargs", "embed_dim=32", "depth=1", "num_heads=2",
    ]  # fmt: skip
    with own_signals():
        run_class_finetuning.main(parse("finetune", words))
    said = capfd.readouterr().out
    found = re.search(r"^\* Acc@1 (\d+\.\d{3}) Acc@5 \d+\.\d{3} loss \d+\.\d{3}$", said, re.M)
    assert f"on the 20 test images: {float(found[1]):.1f}%" in said


def test_backbone_is_extracted_into_a_pth(tmp_path: Path, monkeypatch) -> None:
    """`extract_backbone_weights.py IN OUT` of A2MIM's README."""
    backbone = create_model("resnet18", num_classes=0)
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    save_checkpoint(tmp_path / "latest.pth", {"meta": {}, "state_dict": state})
    words = [str(tmp_path / "latest.pth"), str(tmp_path / "backbone.pth")]
    monkeypatch.setattr(sys, "argv", ["extract_backbone.py", *words])
    extract_backbone.main()
    held = load_checkpoint(str(tmp_path / "backbone.pth"))["state_dict"]
    assert held.keys() == backbone.state_dict().keys()
    assert all(torch.equal(held[name], value) for name, value in backbone.state_dict().items())
