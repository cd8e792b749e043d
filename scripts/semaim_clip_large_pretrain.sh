#!/usr/bin/env bash
# SemAIM pre-training of ViT-L/16 with CLIP targets, 800 epochs.
# Source:    SemAIM README (skyoux/SemAIM ade770f6)
# Hardware:  32 GPUs x batch 64 x update_freq 1 = 2048 images a step; --blr follows the batch when NNODES or NPROC
#            differ
# Published: 86.5 top-1 on ImageNet-1K after fine-tuning at 224 px
# Note:      Unverified: every setting but epochs and target; the rest is as for pixels.
# Command:   DATA_PATH=/data/imagenet TARGET_MODEL=FILE scripts/semaim_clip_large_pretrain.sh on each of 4 machines,
#            with NODE_RANK and MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/semaim_clip_large_pretrain}
TARGET_MODEL=${TARGET_MODEL:-vit_base_patch16_clip_quickgelu_224.openai}
export NNODES=${NNODES:-4} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model semaim_clip_large_patch16_224 --target_model "$TARGET_MODEL" \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 64 --update_freq 1 --epochs 800 --warmup_epochs 30 \
  --blr 2e-4 --lr_schedule mae --min_lr 0.0 --weight_decay 0.05 --opt_betas 0.9 0.95 --clip_grad 3.0 \
  --permutation_type attention_center --query_depth 12 --prediction_head_type MLP --predict_feature clip \
  --crop_scale 0.2 1.0 --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
