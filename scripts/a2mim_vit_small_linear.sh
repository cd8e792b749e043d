#!/usr/bin/env bash
# A2MIM: linear probing of ViT-S/16, 90 epochs.
# Source:    A2MIM README and configurations (Westlake-AI/A2MIM ccca6dc)
# Hardware:  8 GPUs x batch 128 x update_freq 1 = 1024 images a step; keep the product when NNODES or NPROC differ
# Published: no figure
# Note:      Unverified: how the published batch of 1024 was shared among GPUs. No accuracy is published. The published
#            setting names a cosine and steps, and inherits Mixup, which a probe does without.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/a2mim_vit_small_linear.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/a2mim_vit_small_linear}
CHECKPOINT=${CHECKPOINT:-output/a2mim_vit_small_pretrain/encoder-799.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_linear_probing.py \
  --model mim_vit_small_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 128 --update_freq 1 --epochs 90 --warmup_epochs 0 \
  --lr 12 --lr_schedule step --lr_steps 60 80 --weight_decay 0 --opt momentum --momentum 0.9 \
  --global_pool --no_batch_norm --crop_scale 0.08 1 \
  --imagenet_default_mean_and_std \
  "$@"
