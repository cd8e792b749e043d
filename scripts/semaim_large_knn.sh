#!/usr/bin/env bash
# k-NN on the features of SemAIM's ViT-L/16.
# Source:    SemAIM README (skyoux/SemAIM ade770f6)
# Hardware:  8 GPUs x batch 512 = 4096 images at once
# Published: no figure
# Note:      Unverified: the number of GPUs, which does not change the result.
# Command:   DATA_PATH=/data/imagenet CHECKPOINT=FILE scripts/semaim_large_knn.sh
set -euo pipefail

: "${DATA_PATH:?must name the folder that holds train_map.txt and val_map.txt}"
OUTPUT_DIR=${OUTPUT_DIR:-output/semaim_large_knn}
CHECKPOINT=${CHECKPOINT:-output/semaim_large_pretrain/encoder-799.safetensors}
export NNODES=${NNODES:-1} NPROC=${NPROC:-8}

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run_knn.py \
  --model vit_large_patch16_224 --finetune "$CHECKPOINT" --nb_classes 1000 \
  --data_set IMNET --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
  --batch_size 512 --knn_k 10 20 30 --temperature 0.07 --global_pool --feature_norm plain --precision fp32 \
  --imagenet_default_mean_and_std \
  "$@"
