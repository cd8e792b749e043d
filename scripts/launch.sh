#!/usr/bin/env bash
# Runs one of this repository's scripts on NNODES x NPROC processes; recipe.sh beside it calls it.
# Command:   scripts/launch.sh run_pretraining.py --model ...   (torchrun must be on the PATH: activate the environment)
#            On several machines call it once on each, with that machine's NODE_RANK and the first one's MASTER_ADDR.
# Signals:   SIGTERM, SIGINT and SIGUSR1 are passed on: the ranks save and stop. What still runs after 30 seconds is
#            killed.
set -euo pipefail

if [ "${NNODES:-1}" -gt 1 ]; then
  : "${NODE_RANK:?must be the number of this machine, from 0, as NNODES is $NNODES}"
  : "${MASTER_ADDR:?must be the address of machine 0, as NNODES is $NNODES}"
fi

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec torchrun \
  --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${NPROC:-1}" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  "$repository/$1" "${@:2}"
