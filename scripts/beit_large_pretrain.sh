#!/usr/bin/env bash
# BEiT: pre-training of ViT-L/16, 800 epochs.
# Source:    BEiT documentation (microsoft/unilm 768a3c87); ConMIM, arXiv 2205.09616
# Hardware:  32 GPUs x batch 64 x update_freq 1 = 2048 images a step; keep the product when NNODES or NPROC differ
# Published: 85.2 top-1 on ImageNet-1K after fine-tuning at 224 px
# Note:      Published are the figure, from ConMIM's table 1, 800 epochs and layer scale. Unverified: all else is
#            ViT-B's.
# Command:   DATA_PATH=/data/imagenet TOKENIZER=FILE scripts/beit_large_pretrain.sh on each of 4 machines, with
#            NODE_RANK and MASTER_ADDR
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/beit_large_pretrain}
TOKENIZER=${TOKENIZER:-encoder.pkl}
export NNODES=${NNODES:-4} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model beit_large_patch16_224_8k_vocab --discrete_vae_weight_path "$TOKENIZER" \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 64 --update_freq 1 --epochs 800 --warmup_epochs 10 \
  --lr 1.5e-3 --min_lr 1e-5 --weight_decay 0.05 --opt_betas 0.9 0.999 --clip_grad 3 \
  --drop_path 0.1 --layer_scale_init_value 1e-5 \
  --mask_type block \
  --color_jitter 0.4 \
  --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
