#!/usr/bin/env bash
# Fine-tuning of SimMIM's ConvNeXt-T, 400 epochs.
# Source:    OpenMixup configurations (Westlake-AI/openmixup 37e1372)
# Hardware:  8 GPUs x batch 128 x update_freq 4 = 4096 images a step; --lr is for this batch
# Published: no figure
# Note:      Unverified: how the published effective batch of 4096 was shared among GPUs, and the head's start.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/simmim_convnext_tiny_finetune.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/simmim_convnext_tiny_finetune}
CHECKPOINT=${CHECKPOINT:-output/simmim_convnext_tiny_pretrain/encoder-299.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model convnext_tiny --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 128 --update_freq 4 --epochs 400 --warmup_epochs 5 --lr 0.0004 --min_lr 1e-06 --weight_decay 0.01 \
  --layer_decay 0.7 --opt_betas 0.9 0.999 --drop_path 0.1 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
  --imagenet_default_mean_and_std --lr_schedule cosine_iters --init_scale 1.0 --model_ema --model_ema_decay 0.9999 \
  --model_ema_warmup_epochs 20 \
  "$@"
