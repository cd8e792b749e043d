#!/usr/bin/env bash
# Linear probing of MAE's ViT-L/16, 50 epochs.
# Source:    MAE README (facebookresearch/mae efb2a80)
# Hardware:  32 GPUs x batch 512 x update_freq 1 = 16384 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: 76.0 top-1 on ImageNet-1K, 1600 epochs pre-trained
# Note:      Unverified: how the published effective batch of 16384 was shared among GPUs.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/mae_large_linear.sh on each of 4 machines, with
#            NODE_RANK and MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/mae_large_linear}
CHECKPOINT=${CHECKPOINT:-output/mae_large_pretrain/encoder-1599.safetensors}
export NNODES=${NNODES:-4} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_linear_probing.py \
  --model vit_large_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 512 --update_freq 1 --epochs 50 --warmup_epochs 10 \
  --blr 0.1 --lr_schedule mae --min_lr 0 --weight_decay 0 --opt lars --momentum 0.9 \
  --cls_token --train_crop area --crop_scale 0.08 1 \
  --imagenet_default_mean_and_std \
  "$@"
