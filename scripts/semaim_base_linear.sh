#!/usr/bin/env bash
# Linear probing of SemAIM's ViT-B/16, 90 epochs.
# Source:    SemAIM README (skyoux/SemAIM ade770f6)
# Hardware:  8 GPUs x batch 512 x update_freq 1 = 4096 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: no figure
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/semaim_base_linear.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/semaim_base_linear}
CHECKPOINT=${CHECKPOINT:-output/semaim_base_pretrain/encoder-799.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_linear_probing.py \
  --model vit_base_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 512 --update_freq 1 --epochs 90 --warmup_epochs 0 \
  --blr 0.1 --lr_schedule mae --min_lr 0 --weight_decay 0 --opt momentum --momentum 0.9 \
  --cls_token --train_crop short_side \
  --imagenet_default_mean_and_std \
  "$@"
