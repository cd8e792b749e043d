"""Configurations in the form of SemanticMIM (mmengine) and of A2MIM and OpenMixup (mmcv)."""

import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import ROOT

from scripts.tools.translate_config import read, shown, translate
from unimim.cli.options import parse
from unimim.data.views import MEAN_STD, image_mean_std
from unimim.evaluation.flags import parse_linear

PARSE = {
    "run_pretraining.py": lambda words: parse("pretrain", words),
    "run_class_finetuning.py": lambda words: parse("finetune", words),
    "run_linear_probing.py": parse_linear,
}

MMENGINE_BASE = """
# dataset settings
data_settings = dict(data_root='/data/imagenet', mean=[123.675, 116.28, 103.53])
data_preprocessor = dict(
    type='SelfSupDataPreprocessor', mean=data_settings['mean'], std=[58.395, 57.12, 57.375],
    to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, crop_ratio_range=(0.5, 1.0), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='SemanticMaskGenerator', input_size=224, mask_patch_size=16, model_patch_size=16,
         mask_ratio=0.8, use_separate_mask=False, separate_mask_ratio=0.6),
    dict(type='PackInputs', algorithm_keys=['mask'])
]
train_dataloader = dict(
    batch_size=256, num_workers=8, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ImageNet', data_root=data_settings['data_root'], pipeline=train_pipeline))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3))
env_cfg = dict(cudnn_benchmark=False)
"""
SEMANTICMIM = """
_base_ = ['./_base_/imagenet.py', './_base_/missing.py']
model = dict(
    type='MaskFeat',
    backbone=dict(type='MaskFeatViTOurs', arch='b', patch_size=16, drop_path_rate=0.,
                  num_cls_tokens=8, use_bottleneck=True),
    neck=dict(type='LinearNeck', in_channels=768, out_channels=108),
    target_generator=dict(type='HOGGenerator', nbins=9, pool=8, gaussian_window=16))
optim_wrapper = dict(
    type='AmpOptimWrapper', loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=2e-4 * 8, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=0.02))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=30,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=270, eta_min=1e-6, by_epoch=True, begin=30, end=300,
         convert_to_iter_based=True)]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300)
randomness = dict(seed=0, diff_rank_seed=True)
import os
os.system('touch {touched}')
work_dir = os.path.join('a', 'b')
"""
SEMANTICMIM_LINEAR = """
_base_ = './_base_/imagenet.py'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VisionTransformerOurs', arch='base', frozen_stages=12, drop_path_rate=0.1,
                  init_cfg=dict(type='Pretrained', checkpoint='epoch_300.pth', prefix='backbone.')),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=768))
train_pipeline = [dict(type='RandomResizedCrop', scale=224, crop_ratio_range=(0.08, 1.0))]
train_dataloader = dict(batch_size=128, dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=4e-3, weight_decay=1e-4))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=0.0, T_max=100)]
train_cfg = dict(max_epochs=100)
"""
OPENMIXUP_BASE = """
model = dict(
    type='A2MIM',
    backbone=dict(type='MIMResNet', depth=50, mask_layer=3, mask_token='learnable', mask_init=0),
    neck=dict(type='NonLinearMIMNeck', encoder_stride=32),
    head=dict(type='A2MIMHead', loss=dict(type='RegressionLoss', mode='focal_l1_loss'),
              fft_weight=0., fft_focal=True))
data = dict(imgs_per_gpu=64, workers_per_gpu=4, train=dict(
    type='MaskedImageDataset', data_source=dict(type='ImageNet', list_file='a.txt', root='/data'),
    pipeline=[dict(type='RandomResizedCrop', size=224, scale=(0.8, 1.0), ratio=(3/4, 4/3)),
              dict(type='RandomHorizontalFlip'),
              dict(type='BlockwiseMaskGenerator', input_size=224, mask_patch_size=32,
                   model_patch_size=32, mask_ratio=0.6, mask_color='mean')]))
img_norm_cfg = dict(mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.201])
checkpoint_config = dict(interval=10)
"""
A2MIM = """
_base_ = ['./_base_/r50.py']
model = dict(backbone=dict(mask_init=1e-6), head=dict(fft_weight=0.5))
data = dict(imgs_per_gpu=256, workers_per_gpu=8)
update_interval = 1
optimizer = dict(
    type='AdamW', lr=1.2e-3, betas=(0.9, 0.999), weight_decay=0.05, eps=1e-8,
    paramwise_options={'(bn|ln|gn)(\\\\d+)?.(weight|bias)': dict(weight_decay=0.)})
use_fp16 = False
optimizer_config = dict(update_interval=update_interval, grad_clip=dict(max_norm=5.0))
lr_config = dict(policy='StepFixCosineAnnealing', min_lr=1e-5, warmup='linear', warmup_iters=10,
                 warmup_ratio=1e-6, warmup_by_epoch=True, by_epoch=False)
runner = dict(type='EpochBasedRunner', max_epochs=300)
"""
OPENMIXUP_FINETUNE = """
model = dict(
    type='MixUpClassification', pretrained='backbone.pth', alpha=[0.1, 1.0],
    mix_mode=['mixup', 'cutmix'],
    backbone=dict(type='ResNet', depth=50),
    head=dict(type='ClsMixupHead', num_classes=1000, loss=dict(type='CrossEntropyLoss')))
data = dict(imgs_per_gpu=256, train=dict(pipeline=[
    dict(type='RandomResizedCrop', size=160, interpolation=3),
    dict(type='RandAugment_timm', num_policies=2, magnitude_level=6, magnitude_std=0.5)]))
optimizer = dict(type='LAMB', lr=0.008, weight_decay=0.02)
lr_config = dict(policy='CosineAnnealing', by_epoch=True, min_lr=1e-6, warmup='linear',
                 warmup_iters=5, warmup_ratio=1e-5)
runner = dict(type='EpochBasedRunner', max_epochs=100)
custom_hooks = [dict(type='EMAHook', momentum=0.9999)]
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    (tmp_path / "_base_").mkdir()
    files = {
        "_base_/imagenet.py": MMENGINE_BASE,
        "semanticmim.py": SEMANTICMIM.replace("{touched}", str(tmp_path / "touched")),
        "linear.py": SEMANTICMIM_LINEAR,
        "_base_/r50.py": OPENMIXUP_BASE,
        "a2mim.py": A2MIM,
        "finetune.py": OPENMIXUP_FINETUNE,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def translated(path: Path) -> tuple[Namespace, list[str]]:
    """Return the flags that the printed command gives, and the lines of what is left."""
    command, left = translate(read(path))
    text = shown(command, left, path.name)
    python, script, *words = shlex.split(text.replace("\\\n", ""), comments=True)
    assert python == "python"
    return PARSE[script](words), left


def values(args: Namespace, *names: str) -> tuple:
    return tuple(getattr(args, name) for name in names)


def test_pretraining_of_semanticmim(configs: Path) -> None:
    args, left = translated(configs / "semanticmim.py")
    assert args.model == "semanticmim_maskfeat_base_patch16_224"
    names = ("lr", "weight_decay", "clip_grad", "epochs", "warmup_epochs", "min_lr", "lr_schedule")
    assert values(args, *names) == (1.6e-3, 0.05, 0.02, 300, 30, 1e-6, "cosine")
    names = ("batch_size", "num_workers", "mask_ratio", "mask_patch_size", "crop_scale", "seed")
    assert values(args, *names) == (256, 8, 0.8, 16, [0.5, 1.0], 0)
    assert values(args, "num_cls_tokens", "use_bottleneck", "precision") == (8, True, "fp16")
    assert values(args, "separate_mask_ratio", "data_path") == (None, "/data/imagenet")
    assert image_mean_std(args) == MEAN_STD["imagenet"]
    listed = "\n".join(left)
    assert "missing.py: there is no such file" in listed and "os.system" in listed
    assert "model.neck.in_channels = 768" in listed and "work_dir = os.path.join" in listed
    assert "starts from 1e-06 of the peak" in listed
    assert "env_cfg" not in listed and "sampler" not in listed
    assert not (configs / "touched").exists()


def test_linear_probe_of_semanticmim(configs: Path) -> None:
    args, _ = translated(configs / "linear.py")
    names = ("model", "finetune", "batch_size", "lr", "weight_decay", "warmup_epochs", "epochs")
    expected = ("vit_base_patch16_224", "epoch_300.pth", 128, 4e-3, 1e-4, 0, 100)
    assert values(args, *names) == expected
    recipe = parse_linear(["--recipe", "semanticmim_maskfeat_base_linear"])
    names = ("pool", "feature_norm", "batch_norm", "opt", "lr_schedule", "crop_scale", "lr")
    assert values(args, *names[:5]) == values(recipe, *names[:5])


def test_pretraining_of_a2mim(configs: Path) -> None:
    args, left = translated(configs / "a2mim.py")
    names = ("model", "batch_size", "lr", "clip_grad", "epochs", "lr_schedule", "warmup_epochs")
    expected = ("a2mim_resnet50", 256, 1.2e-3, 5.0, 300, "stepfix_cosine", 10)
    assert values(args, *names) == expected
    kwargs = {"mask_layer=3", "mask_token=learnable", "mask_init=1e-06", "fft_weight=0.5"}
    assert kwargs <= set(args.model_kwargs) and "fft_focal=true" in args.model_kwargs
    assert values(args, "mask_ratio", "mask_patch_size", "crop_scale") == (0.6, 32, [0.8, 1.0])
    assert image_mean_std(args)[0] == pytest.approx((0.4914, 0.4822, 0.4465))
    assert any("paramwise_options" in item for item in left)
    assert any("model.neck.encoder_stride = 32" in item for item in left)


def test_finetuning_of_openmixup(configs: Path) -> None:
    args, _ = translated(configs / "finetune.py")
    names = ("model", "finetune", "opt", "lr", "weight_decay", "mixup", "cutmix", "input_size")
    expected = ("resnet50", "backbone.pth", "lamb", 8e-3, 0.02, 0.1, 1.0, 160)
    assert values(args, *names) == expected
    names = ("lr_schedule", "warmup_ratio", "aa", "model_ema", "layer_decay", "nb_classes")
    expected = ("cosine_epochs", 1e-5, "rand-m6-mstd0.5-inc1", True, 1.0, 1000)
    assert values(args, *names) == expected


def test_bases_are_merged_and_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = dict(a=1, b=dict(c=2))\ny = [1, 2] + [3]\n")
    (tmp_path / "b.py").write_text(
        "_base_ = 'a.py'\nx = dict(b=dict(_delete_=True, d=-2 ** 2))\nz = y[0]\nw = 9 ** 9999\n"
    )
    config = read(tmp_path / "b.py")
    assert config.values == {"x": {"a": 1, "b": {"d": -4}}, "y": [1, 2, 3]}
    assert config.problems == ["z = y", "w = 9 ** 9999"]
    (tmp_path / "a.py").write_text("_base_ = 'b.py'\n")
    assert "inherits itself" in read(tmp_path / "b.py").problems[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = dict(type='EncoderDecoder')", "is for semantic_segmentation/configs"),
        ("model = dict(type='X', backbone=dict(type='Y'))", "is not a model of this project"),
        ("x = (", "cannot be read"),
    ],
)
def test_what_is_no_configuration_of_theirs_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "c.py").write_text(text)
    command = [sys.executable, str(ROOT / "scripts/tools/translate_config.py")]
    result = subprocess.run([*command, str(tmp_path / "c.py")], capture_output=True, text=True)
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr
