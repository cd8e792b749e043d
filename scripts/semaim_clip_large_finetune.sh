#!/usr/bin/env bash
# Fine-tuning of SemAIM's ViT-L/16 of CLIP targets, 50 epochs.
# Source:    SemAIM README (skyoux/SemAIM ade770f6)
# Hardware:  16 GPUs x batch 64 x update_freq 1 = 1024 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: 86.5 top-1 on ImageNet-1K, 800 epochs pre-trained
# Note:      Unverified: every setting but epochs and target; the rest is as for pixels.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/semaim_clip_large_finetune.sh on each of 2 machines, with
#            NODE_RANK and MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/semaim_clip_large_finetune}
CHECKPOINT=${CHECKPOINT:-output/semaim_clip_large_pretrain/encoder-799.safetensors}
export NNODES=${NNODES:-2} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model vit_large_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 64 --update_freq 1 --epochs 50 --warmup_epochs 5 \
  --blr 1e-3 --lr_schedule mae --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.75 --opt_betas 0.9 0.999 \
  --drop_path 0.2 \
  --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
  --imagenet_default_mean_and_std \
  "$@"
