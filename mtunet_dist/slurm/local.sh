#!/bin/bash
# Run a batch script without Slurm, with this machine as its only node: bash local.sh SCRIPT [words...]
set -euo pipefail
script=$1
shift

# Count GPUs as torch does: CUDA_VISIBLE_DEVICES if it is set, else the GPUs without the parts of a divided GPU.
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  gpus=${CUDA_VISIBLE_DEVICES//,/$'\n'}
else
  gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
fi
export SLURM_JOB_ID=$$ SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=localhost SLURM_NODEID=0 SLURM_SUBMIT_DIR=$PWD
export SLURM_CPUS_ON_NODE SLURM_GPUS_ON_NODE
SLURM_CPUS_ON_NODE=$(nproc)
SLURM_GPUS_ON_NODE=$(grep -c . <<<"$gpus" || true)
log=$(dirname "$script")/local-$$.log

srun() {
  while [[ $1 == -* ]]; do shift; done
  "$@"
}

scontrol() {
  case "$1 $2" in
    "show hostnames") echo localhost ;;
    "show job") echo "   StdOut=$log" ;;
    *) return 1 ;; # there is no queue
  esac
}

# shellcheck source=/dev/null
. "$script"
