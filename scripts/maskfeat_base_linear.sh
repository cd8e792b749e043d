#!/usr/bin/env bash
# MaskFeat: linear probing of ViT-B/16, 100 epochs.
# Source:    SemanticMIM code (yyk-wew/SemanticMIM)
# Hardware:  8 GPUs x batch 128 x update_freq 1 = 1024 images a step; keep the product when NNODES or NPROC differ
# Published: no figure
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/maskfeat_base_linear.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/maskfeat_base_linear}
CHECKPOINT=${CHECKPOINT:-output/maskfeat_base_pretrain/encoder-299.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_linear_probing.py \
  --model vit_base_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 128 --update_freq 1 --epochs 100 --warmup_epochs 0 \
  --lr 4e-3 --lr_schedule cosine --min_lr 0 --weight_decay 1e-4 --opt adamw \
  --global_pool --feature_norm plain --no_batch_norm --crop_scale 0.08 1 \
  --imagenet_default_mean_and_std \
  "$@"
