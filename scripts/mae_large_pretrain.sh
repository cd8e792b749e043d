#!/usr/bin/env bash
# MAE pre-training of ViT-L/16, 1600 epochs.
# Source:    MAE README (facebookresearch/mae efb2a80)
# Hardware:  64 GPUs x batch 64 x update_freq 1 = 4096 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: 85.9 top-1 on ImageNet-1K after fine-tuning at 224 px (85.5 with --epochs 800)
# Note:      Unverified: how the published effective batch of 4096 was shared among GPUs.
# Command:   DATA_PATH=/data/imagenet scripts/mae_large_pretrain.sh on each of 8 machines, with NODE_RANK and
#            MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/mae_large_pretrain}
export NNODES=${NNODES:-8} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model mae_large_patch16_224 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 64 --update_freq 1 --epochs 1600 --warmup_epochs 40 \
  --blr 1.5e-4 --lr_schedule mae --min_lr 0.0 --weight_decay 0.05 --opt_betas 0.9 0.95 \
  --mask_ratio 0.75 --norm_pix_loss \
  --crop_scale 0.2 1.0 --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
