#!/usr/bin/env bash
# Fine-tuning of ConMIM's ViT-B/16 at 384 px, from the model fine-tuned at 224 px, 10 epochs.
# Source:    ConMIM, arXiv 2205.09616; BEiT documentation (microsoft/unilm 768a3c87)
# Hardware:  8 GPUs x batch 32 x update_freq 4 = 1024 images a step; keep the product when NNODES or NPROC differ
# Published: 85.3 top-1 on ImageNet-1K, 800 epochs pre-trained
# Note:      A tenth of the 224 px epochs is published. Unverified: lr, weight_decay, layer_decay and drop_path are
#            BEiT's after its ImageNet-22K stage; batch and warm-up are ours; mixup, cutmix and smoothing stay as at
#            224 px.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/conmim_base_finetune_384.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/conmim_base_finetune_384}
CHECKPOINT=${CHECKPOINT:-output/conmim_base_finetune/checkpoint-best.pth}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model beit_base_patch16_384 --finetune "$CHECKPOINT" --nb_classes 1000 --input_size 384 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 32 --update_freq 4 --epochs 10 --warmup_epochs 2 \
  --lr 2e-5 --min_lr 1e-6 --weight_decay 1e-8 --layer_decay 0.85 --opt_betas 0.9 0.999 \
  --drop_path 0.1 --layer_scale_init_value 0.1 \
  --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
  --imagenet_default_mean_and_std \
  "$@"
