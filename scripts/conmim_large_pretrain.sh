#!/usr/bin/env bash
# ConMIM pre-training of ViT-L/16, 1600 epochs.
# Source:    ConMIM README (TencentARC/ConMIM 4263955f)
# Hardware:  32 GPUs x batch 64 x update_freq 1 = 2048 images a step; keep the product when NNODES or NPROC differ
# Published: 85.5 top-1 on ImageNet-1K after fine-tuning at 224 px (85.2 with --epochs 800, 84.6 with 400)
# Command:   DATA_PATH=/data/imagenet scripts/conmim_large_pretrain.sh on each of 4 machines, with NODE_RANK and
#            MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/conmim_large_pretrain}
export NNODES=${NNODES:-4} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model conmim_large_patch16_224 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 64 --update_freq 1 --epochs 1600 --warmup_epochs 10 \
  --lr 7.5e-4 --min_lr 1e-5 --weight_decay 0.05 --opt_betas 0.9 0.98 --clip_grad 1.0 \
  --drop_path 0.0 --layer_scale_init_value 1e-5 \
  --mask_type random_mps32 --mask_ratio 0.75 --temp 0.1 --t_momentum 0.996 \
  --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
