#!/usr/bin/env bash
# SemanticMIM on MaskFeat: pre-training of ViT-B/16, 300 epochs.
# Source:    SemanticMIM code (yyk-wew/SemanticMIM)
# Hardware:  8 GPUs x batch 256 x update_freq 1 = 2048 images a step; keep the product when NNODES or NPROC differ
# Published: no figure
# Note:      The published warm-up starts from a millionth of the peak, here from 0.
# Command:   DATA_PATH=/data/imagenet scripts/semanticmim_maskfeat_base_pretrain.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/semanticmim_maskfeat_base_pretrain}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model semanticmim_maskfeat_base_patch16_224 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 256 --update_freq 1 --epochs 300 --warmup_epochs 30 \
  --lr 1.6e-3 --min_lr 1e-6 --weight_decay 0.05 --opt_betas 0.9 0.999 --clip_grad 0.02 \
  --drop_path 0 \
  --mask_type random_mps32 --mask_ratio 0.8 --mask_patch_size 16 --num_cls_tokens 8 \
  --crop_scale 0.5 1 --color_jitter 0 \
  --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
