#!/usr/bin/env bash
# A2MIM: linear probing of ResNet-50, 100 epochs.
# Source:    A2MIM README and configurations (Westlake-AI/A2MIM ccca6dc)
# Hardware:  8 GPUs x batch 32 x update_freq 1 = 256 images a step; keep the product when NNODES or NPROC differ
# Published: no figure
# Note:      Unverified: how the published batch of 256 was shared among GPUs. No accuracy is published.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/a2mim_resnet50_linear.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/a2mim_resnet50_linear}
CHECKPOINT=${CHECKPOINT:-output/a2mim_resnet50_pretrain/encoder-299.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_linear_probing.py \
  --model resnet50 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 32 --update_freq 1 --epochs 100 --warmup_epochs 0 \
  --lr 30 --lr_schedule step --lr_steps 60 80 --weight_decay 0 --opt momentum --momentum 0.9 \
  --global_pool --no_batch_norm --crop_scale 0.08 1 \
  --imagenet_default_mean_and_std \
  "$@"
