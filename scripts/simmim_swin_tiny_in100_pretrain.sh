#!/usr/bin/env bash
# SimMIM pre-training of Swin-T on ImageNet-100 at 192 px, 800 epochs.
# Source:    A2MIM README and configurations (Westlake-AI/A2MIM ccca6dc)
# Hardware:  8 GPUs x batch 256 x update_freq 1 = 2048 images a step; --lr is for this batch
# Published: no figure
# Note:      For ImageNet-100. Unverified: how the published effective batch of 2048 was shared among GPUs. Unverified:
#            no stochastic depth.
# Command:   DATA_PATH=/data/imagenet scripts/simmim_swin_tiny_in100_pretrain.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/simmim_swin_tiny_in100_pretrain}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model simmim_swin_tiny \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 256 --update_freq 1 --epochs 800 --warmup_epochs 10 --lr 0.0008 --lr_schedule cosine_iters \
  --min_lr 4e-05 --weight_decay 0.05 --opt_betas 0.9 0.999 --clip_grad 5.0 --drop_path 0.0 --mask_type random_mps32 \
  --mask_ratio 0.6 --mask_patch_size 32 --crop_scale 0.67 1.0 --train_interpolation bilinear \
  --imagenet_default_mean_and_std --save_ckpt_freq 10 --input_size 192 \
  "$@"
