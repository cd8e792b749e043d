#!/usr/bin/env bash
# Fine-tuning of MAE's ViT-H/14, 50 epochs.
# Source:    MAE README (facebookresearch/mae efb2a80)
# Hardware:  32 GPUs x batch 32 x update_freq 1 = 1024 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: 86.9 top-1 on ImageNet-1K, 1600 epochs pre-trained
# Note:      Unverified: how the published effective batch of 1024 was shared among GPUs.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/mae_huge_finetune.sh on each of 4 machines, with
#            NODE_RANK and MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/mae_huge_finetune}
CHECKPOINT=${CHECKPOINT:-output/mae_huge_pretrain/encoder-1599.safetensors}
export NNODES=${NNODES:-4} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model vit_huge_patch14_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 32 --update_freq 1 --epochs 50 --warmup_epochs 5 \
  --blr 1e-3 --lr_schedule mae --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.75 --opt_betas 0.9 0.999 \
  --drop_path 0.3 \
  --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
  --imagenet_default_mean_and_std \
  "$@"
