#!/usr/bin/env bash
# ConMIM pre-training of ViT-B/16, 800 epochs.
# Source:    ConMIM README (TencentARC/ConMIM 4263955f); mc-BEiT (lixiaotong97/mc-BEiT 37489a1e)
# Hardware:  16 GPUs x batch 128 x update_freq 1 = 2048 images a step; keep the product when NNODES or NPROC differ
# Published: 83.7 top-1 on ImageNet-1K after fine-tuning at 224 px (83.5 with --epochs 300)
# Note:      Epochs and layer scale are published. Unverified: lr, batch, warm-up and clip_grad are mc-BEiT's for
#            ViT-B, all else is ConMIM's for ViT-L.
# Command:   DATA_PATH=/data/imagenet scripts/conmim_base_pretrain.sh on each of 2 machines, with NODE_RANK and
#            MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/conmim_base_pretrain}
export NNODES=${NNODES:-2} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model conmim_base_patch16_224 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 128 --update_freq 1 --epochs 800 --warmup_epochs 10 \
  --lr 1.5e-3 --min_lr 1e-5 --weight_decay 0.05 --opt_betas 0.9 0.98 --clip_grad 3.0 \
  --drop_path 0.0 --layer_scale_init_value 0.1 \
  --mask_type random_mps32 --mask_ratio 0.75 --temp 0.1 --t_momentum 0.996 \
  --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
