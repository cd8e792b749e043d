#!/usr/bin/env bash
# SAIM pre-training of ViT-B/16, 800 epochs.
# Source:    SAIM README (qiy20/SAIM 08d36c3e)
# Hardware:  32 GPUs x batch 64 x update_freq 1 = 2048 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: 83.9 top-1 on ImageNet-1K after fine-tuning at 224 px
# Command:   DATA_PATH=/data/imagenet scripts/saim_base_pretrain.sh on each of 4 machines, with NODE_RANK and
#            MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/saim_base_pretrain}
export NNODES=${NNODES:-4} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model saim_base_patch16_224 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 64 --update_freq 1 --epochs 800 --warmup_epochs 30 \
  --blr 2e-4 --lr_schedule mae --min_lr 0.0 --weight_decay 0.5 --opt_betas 0.9 0.95 \
  --permutation_type stochastic --query_depth 12 --prediction_head_type MLP \
  --gaussian_kernel_size 9 --gaussian_sigma 1 --norm_pix_loss \
  --crop_scale 0.2 1.0 --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
