#!/usr/bin/env bash
# SemanticMIM's baseline of BEiT: pre-training of ViT-B/16, 300 epochs.
# Source:    SemanticMIM code (yyk-wew/SemanticMIM)
# Hardware:  8 GPUs x batch 256 x update_freq 1 = 2048 images a step; keep the product when NNODES or NPROC differ
# Published: no figure
# Note:      SemanticMIM's baseline in BEiT's form: scripts/semanticmim_beit_base_finetune.sh fine-tunes it. The
#            published warm-up starts from 1/10000 of the peak, here it starts from 0.
# Command:   DATA_PATH=/data/imagenet TOKENIZER=FILE scripts/beit_abs_pos_base_pretrain.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/beit_abs_pos_base_pretrain}
TOKENIZER=${TOKENIZER:-encoder.pkl}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_pretraining.py \
  --model semanticmim_beit_base_patch16_224 --discrete_vae_weight_path "$TOKENIZER" \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 256 --update_freq 1 --epochs 300 --warmup_epochs 10 \
  --lr 1.5e-3 --min_lr 1e-5 --weight_decay 0.05 --opt_betas 0.9 0.999 --clip_grad 3 \
  --drop_path 0.1 --layer_scale_init_value 0.1 \
  --mask_type random_mps32 --mask_ratio 0.4 --mask_patch_size 16 --num_cls_tokens 1 --no_bottleneck \
  --color_jitter 0.4 \
  --imagenet_default_mean_and_std --save_ckpt_freq 20 \
  "$@"
