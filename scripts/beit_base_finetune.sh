#!/usr/bin/env bash
# BEiT: fine-tuning of ViT-B/16, 100 epochs.
# Source:    BEiT documentation (microsoft/unilm 768a3c87); ConMIM, arXiv 2205.09616
# Hardware:  8 GPUs x batch 128 x update_freq 1 = 1024 images a step; keep the product when NNODES or NPROC differ
# Published: 83.2 top-1 on ImageNet-1K, 800 epochs pre-trained
# Note:      Unverified: every setting is that of ConMIM's README for ViT-B.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/beit_base_finetune.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/beit_base_finetune}
CHECKPOINT=${CHECKPOINT:-output/beit_base_pretrain/encoder-799.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model beit_base_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 128 --update_freq 1 --epochs 100 --warmup_epochs 20 \
  --lr 4e-3 --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.65 --opt_betas 0.9 0.999 \
  --drop_path 0.1 --layer_scale_init_value 0.1 \
  --mixup 0.8 --cutmix 1 --smoothing 0.1 \
  --imagenet_default_mean_and_std \
  "$@"
