#!/usr/bin/env bash
# Fine-tuning of A2MIM's ConvNeXt-T as RSB A3, at 160 px, 100 epochs.
# Source:    A2MIM README and configurations (Westlake-AI/A2MIM ccca6dc)
# Hardware:  8 GPUs x batch 256 x update_freq 1 = 2048 images a step; --lr is for this batch
# Published: no figure
# Note:      Unverified: how the published effective batch of 2048 was shared among GPUs, and the head's start.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/a2mim_convnext_tiny_finetune_a3.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/a2mim_convnext_tiny_finetune_a3}
CHECKPOINT=${CHECKPOINT:-output/a2mim_convnext_tiny_pretrain/encoder-299.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model convnext_tiny --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 256 --update_freq 1 --epochs 100 --warmup_epochs 5 --warmup_ratio 1e-05 --input_size 160 \
  --eval_input_size 224 --crop_pct 0.949 --opt lamb --opt_eps 1e-06 --opt_betas 0.9 0.999 --lr 0.008 \
  --lr_schedule cosine_epochs --min_lr 1e-06 --weight_decay 0.02 --layer_decay 1.0 --drop_path 0.1 --init_scale 1.0 \
  --bce_loss --smoothing 0.0 --mixup 0.1 --cutmix 1.0 --aa rand-m6-mstd0.5-inc1 --reprob 0.0 \
  --imagenet_default_mean_and_std --no_model_ema \
  "$@"
