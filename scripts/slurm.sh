#!/usr/bin/env bash
# Runs one of this repository's scripts as a Slurm job, one task for each GPU, on any number of machines.
# Command:   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 scripts/slurm.sh run_pretraining.py --model ...
#            from the checkout; options of sbatch win over those below. VENV names the environment (.venv).
# Signals:   Five minutes before the time limit the ranks get SIGUSR1, save and end; so they do at a preemption by
#            SIGTERM. Scripts that train are told to end with 75 then, for which the job is queued again: it goes on
#            from the newest checkpoint in --output_dir.
#SBATCH --job-name=unimim --cpus-per-task=12 --time=24:00:00
#SBATCH --signal=USR1@300 --requeue --open-mode=append
set -euo pipefail

: "${SLURM_JOB_ID:?is not set: start this script by sbatch}"
[ $# -gt 0 ] || { echo "name a script and its flags: sbatch scripts/slurm.sh run_pretraining.py ..." >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this file
source "${VENV:-.venv}/bin/activate"

# The ranks find the first machine of the step by themselves; one that fails ends the others.
case ${1##*/} in
  run_pretraining.py | run_class_finetuning.py | run_linear_probing.py | run_part_learning.py | run_tokenizer.py | \
    voc_linear_probe.py) set -- "$@" --stop_status 75 ;;
esac
status=0
srun --kill-on-bad-exit=1 python "$@" || status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
