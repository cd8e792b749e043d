#!/usr/bin/env bash
# Fine-tuning of A2MIM's ResNet-50 as Swin is fine-tuned, 100 epochs.
# Source:    A2MIM README and configurations (Westlake-AI/A2MIM ccca6dc)
# Hardware:  8 GPUs x batch 256 x update_freq 1 = 2048 images a step; --lr is for this batch
# Published: no figure
# Note:      Unverified: how the published effective batch of 2048 was shared among GPUs, and the head's start.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/a2mim_resnet50_finetune_swin.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/a2mim_resnet50_finetune_swin}
CHECKPOINT=${CHECKPOINT:-output/a2mim_resnet50_pretrain/encoder-299.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model resnet50 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 256 --update_freq 1 --epochs 100 --warmup_epochs 20 --warmup_ratio 0.0 --input_size 224 \
  --eval_input_size 224 --crop_pct 0.875 --opt adamw --opt_eps 1e-08 --opt_betas 0.9 0.999 --lr 0.005 \
  --lr_schedule cosine_iters --min_lr 1e-06 --weight_decay 0.05 --layer_decay 1.0 --drop_path 0.0 --init_scale 1.0 \
  --no_bce_loss --smoothing 0.1 --mixup 0.8 --cutmix 1.0 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
  --imagenet_default_mean_and_std \
  "$@"
