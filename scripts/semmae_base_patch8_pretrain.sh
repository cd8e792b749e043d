#!/usr/bin/env bash
# SemMAE pre-training of ViT-B/8, 800 epochs.
# Source:    SemMAE README (ucasligang/SemMAE 95b39ff); SemMAE, arXiv 2206.10207
# Hardware:  16 GPUs x batch 256 x update_freq 1 = 4096 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: 84.444 top-1 on ImageNet-1K after fine-tuning at 224 px
# Note:      Unverified: crops, which the published code has none of. The part maps come from run_part_learning.py.
# Command:   DATA_PATH=/data/imagenet PART_MAPS=FOLDER scripts/semmae_base_patch8_pretrain.sh on each of 2 machines,
#            with NODE_RANK and MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/semmae_base_patch8_pretrain}
PART_MAPS=${PART_MAPS:-output/part_maps}
export NNODES=${NNODES:-2} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model semmae_base_patch8_224 --part_maps "$PART_MAPS" \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 256 --update_freq 1 --epochs 800 --warmup_epochs 40 \
  --blr 1.5e-4 --lr_schedule mae --min_lr 0.0 --weight_decay 0.05 --opt_betas 0.9 0.95 \
  --mask_ratio 0.75 --norm_pix_loss --mask_lambda_power 2 \
  --crop_scale 0.2 1.0 --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
