#!/usr/bin/env bash
# Both stages of SemMAE on the generated `shapes` scenes: teacher, parts, their quality, pre-training.
# Source:   ours (docs/results.md has the numbers); the teacher is a small MAE, because no published
#           one is for 64 pixels
# Hardware: one CPU core, about 24 minutes
# Data:     SHAPES=FOLDER for other scenes than the cache's; the numbers are of make_shapes.py --cluttered
# Usage:    scripts/experiments/semmae_shapes.sh [OUTPUT_DIR] [flags of the last pre-training]
# Writes:   OUTPUT_DIR/parts.csv (agreement with objects), parts.png (contact sheet), parts/ (part
#           maps), semmae/
set -euo pipefail
out=${1:-output/semmae_shapes}
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

common=(--data_set shapes ${SHAPES:+--data_path "$SHAPES"} --input_size 64 --num_workers 0 --imagenet_default_mean_and_std
  --stop_status 75)
autoencoder=(--patch_size 8 --batch_size 64 --epochs 30 --warmup_epochs 3 --lr 2e-3 --norm_pix_loss --crop_scale 0.2 1.0
  --model_kwargs embed_dim=192 depth=6 num_heads=3 decoder_embed_dim=96 decoder_depth=2 decoder_num_heads=3
  --save_ckpt_freq 1000)

# 1. a teacher trained without labels
"$python" run_pretraining.py --model mae_tiny_patch16_224 "${common[@]}" "${autoencoder[@]}" --output_dir "$out/teacher"

# 2. stage 1: parts, their agreement with the objects, and a map for each training image
"$python" run_part_learning.py --teacher "$out/teacher/encoder-29.safetensors" "${common[@]}" \
  --batch_size 64 --decoder_widths 64 48 32 24 --epochs 8 --part_grid 16 --output_dir "$out/stage1" \
  --extract "$out/parts" --evaluate "$out/parts.csv" --visualize "$out/parts.png"

# 3. stage 2: from masking a fraction of each part to masking whole parts
"$python" run_pretraining.py --model semmae_tiny_patch16_224 "${common[@]}" "${autoencoder[@]}" \
  --part_maps "$out/parts" --output_dir "$out/semmae" "${@:2}"
