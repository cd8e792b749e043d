#!/usr/bin/env bash
# SemanticMIM on MaskFeat: fine-tuning of ViT-B/16, 100 epochs.
# Source:    SemanticMIM code (yyk-wew/SemanticMIM)
# Hardware:  8 GPUs x batch 256 x update_freq 1 = 2048 images a step; keep the product when NNODES or NPROC differ
# Published: no figure
# Note:      Published with a colour jitter after RandAugment and bilinear test images, which are not made here.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/semanticmim_maskfeat_base_finetune.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/semanticmim_maskfeat_base_finetune}
CHECKPOINT=${CHECKPOINT:-output/semanticmim_maskfeat_base_pretrain/encoder-299.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model vit_base_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 256 --update_freq 1 --epochs 100 --warmup_epochs 20 \
  --lr 8e-3 --lr_schedule cosine --min_lr 1e-6 --weight_decay 0.05 --layer_decay 0.65 --opt_betas 0.9 0.999 \
  --drop_path 0.1 \
  --mixup 0.8 --cutmix 1 --smoothing 0.1 \
  --imagenet_default_mean_and_std \
  "$@"
