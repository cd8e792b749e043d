#!/usr/bin/env bash
# Runs a recipe by its name on NNODES x NPROC processes, as published unless these are set.
# Command:   DATA_PATH=/data/imagenet scripts/recipe.sh NAME [flags of the run script, which win]
#            scripts/recipe.sh --list            names, models, stages and published top-1
#            scripts/recipe.sh --print NAME      the whole command, its source, hardware and what is unverified
# Reads:     DATA_PATH, OUTPUT_DIR, CHECKPOINT (to start from), PART_MAPS, TOKENIZER, TARGET_MODEL; NNODES, NPROC and, on
#            several machines, NODE_RANK and MASTER_ADDR
set -euo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipes() {
  PYTHONPATH="$scripts/..${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" -m unimim.recipes "$@"
}

case ${1:---help} in
  -*) recipes "$@" ;;
  *)
    lines=$(recipes --launch "$@")
    mapfile -t words <<<"$lines"
    export NNODES=${NNODES:-${words[0]}} NPROC=${NPROC:-${words[1]}}
    exec "$scripts/launch.sh" "${words[@]:2}" "${@:2}"
    ;;
esac
