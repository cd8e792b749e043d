#!/usr/bin/env bash
# Linear probing of SAIM's ViT-B/16, 90 epochs.
# Source:    SAIM README (qiy20/SAIM 08d36c3e)
# Hardware:  32 GPUs x batch 64 x update_freq 1 = 2048 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: 62.5 top-1 on ImageNet-1K, 800 epochs pre-trained
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/saim_base_linear.sh on each of 4 machines, with
#            NODE_RANK and MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/saim_base_linear}
CHECKPOINT=${CHECKPOINT:-output/saim_base_pretrain/encoder-799.safetensors}
export NNODES=${NNODES:-4} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_linear_probing.py \
  --model vit_base_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 64 --update_freq 1 --epochs 90 --warmup_epochs 0 \
  --blr 0.1 --lr_schedule mae --min_lr 0 --weight_decay 0 --opt momentum --momentum 0.9 \
  --cls_token --train_crop area --crop_scale 0.08 1 \
  --imagenet_default_mean_and_std \
  "$@"
