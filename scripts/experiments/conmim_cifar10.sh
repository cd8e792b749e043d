#!/usr/bin/env bash
# A tiny ConMIM on 20,000 CIFAR-10 images, then fine-tuning on 10 % of the labels, from the
# pre-trained teacher and from random weights.
# Source:   ours (docs/results.md has the numbers)
# Hardware: one CPU core, about an hour per seed
# Usage:    scripts/experiments/conmim_cifar10.sh SEED DATA_PATH OUTPUT_DIR
#           (DATA_PATH holds train.zip, val.zip and their map files)
set -euo pipefail
seed=$1 data=$2 out=$3
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

common=(--data_set IMNET --data_path "$data" --input_size 32 --patch_size 4 --layer_scale_init_value 0.1
  --imagenet_default_mean_and_std --batch_size 64 --precision bf16 --num_workers 0 --seed "$seed" --stop_status 75)
size=(embed_dim=128 depth=4 num_heads=4)

"$python" run_pretraining.py --model conmim_tiny_patch16_224 "${common[@]}" --model_kwargs "${size[@]}" \
  projector_hidden_dim=256 --mask_type random --mask_ratio 0.5 --crop_scale 0.2 1.0 --lr 2e-3 --clip_grad 3.0 \
  --t_momentum 0.999 --epochs 40 --warmup_epochs 2 --save_ckpt_freq 10 --output_dir "$out/pretrain-$seed"

finetune=(--model beit_tiny_patch16_224 "${common[@]}" --model_kwargs "${size[@]}" --label_fraction 0.1 --epochs 20
  --warmup_epochs 2 --lr 1e-3 --layer_decay 1.0 --drop_path 0 --aa "" --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0
  --smoothing 0 --init_scale 1.0 --save_ckpt_freq 20)
"$python" run_class_finetuning.py "${finetune[@]}" --finetune "$out/pretrain-$seed/checkpoint-39.pth" \
  --output_dir "$out/finetune-pretrained-$seed"
"$python" run_class_finetuning.py "${finetune[@]}" --output_dir "$out/finetune-random-$seed"
