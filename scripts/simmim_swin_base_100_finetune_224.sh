#!/usr/bin/env bash
# Fine-tuning of SimMIM's Swin-B at 224 px, 100 epochs.
# Source:    OpenMixup configurations (Westlake-AI/openmixup 37e1372)
# Hardware:  8 GPUs x batch 256 x update_freq 1 = 2048 images a step; --lr is for this batch
# Published: 83.5 top-1 on ImageNet-1K, 100 epochs pre-trained
# Note:      Unverified: how the published effective batch of 2048 was shared among GPUs, and the head's start.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/simmim_swin_base_100_finetune_224.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/simmim_swin_base_100_finetune_224}
CHECKPOINT=${CHECKPOINT:-output/simmim_swin_base_100_pretrain/encoder-99.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_class_finetuning.py \
  --model swin_base --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR" \
  --batch_size 256 --update_freq 1 --epochs 100 --warmup_epochs 20 --lr 0.005 --min_lr 1e-06 --weight_decay 0.05 \
  --layer_decay 0.9 --opt_betas 0.9 0.999 --clip_grad 5.0 --drop_path 0.1 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
  --imagenet_default_mean_and_std --lr_schedule cosine_iters --disable_weight_decay_on_rel_pos_bias --input_size 224 \
  --warmup_ratio 0.0002 --init_scale 1.0 \
  "$@"
