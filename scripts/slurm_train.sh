#!/bin/sh
# Train on a SLURM cluster: srun starts one process per GPU, on as many nodes as that takes.
# srun's own variables serve for more, such as SLURM_ACCOUNT, SLURM_TIMELIMIT or SLURM_QOS.
#
# `sbatch [options] scripts/slurm_train.sh ...`, from the project's root, makes it a batch job that trains through time
# limits: two minutes before the limit the processes get SIGUSR1, save and end, and the job queues itself again.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

# What to train. Environment variables of the same names override.
dataset=${dataset:-pascal}
method=${method:-unimatch}
exp=${exp:-r101}
split=${split:-732}
# The cluster: GPUs to take on a node, at most, and CPU cores for each.
gpus_per_node=${gpus_per_node:-8}
cpus_per_task=${cpus_per_task:-5}

usage() {
    echo "usage: [NAME=VALUE ...] sh scripts/slurm_train.sh <num_gpu> <port> <partition> [arguments of METHOD.py ...]"
    variables
    echo "Also gpus_per_node (default 8, at most) and cpus_per_task (default 5)."
    echo "As a batch job: sbatch --nodes=N --gres=gpu:G [...] scripts/slurm_train.sh <num_gpu> <port> <partition> ..."
    echo "example: dataset=cityscapes split=1_16 sh scripts/slurm_train.sh 16 29500 gpu --set scale_lr=true"
}

root=$(dirname -- "$0")/..
if [ -n "${SLURM_JOB_ID:-}" ] && [ ! -f "$root/scripts/common.sh" ]; then
    root=${SLURM_SUBMIT_DIR:-.} # sbatch runs a copy of this script that lies elsewhere
fi
CDPATH='' cd -- "$root"
. ./scripts/common.sh

case ${1:-} in
    -h | --help) usage && exit ;;
esac
check_number num_gpu "${1:-}"
check_number port "${2:-}"
if [ "$2" -lt 1024 ] || [ "$2" -gt 65535 ]; then
    wrong "port must be a number from 1024 to 65535, not '$2'"
fi
case ${3:-} in
    '' | -*) wrong "partition is missing; sinfo lists them" ;;
esac
check_number gpus_per_node "$gpus_per_node"
check_number cpus_per_task "$cpus_per_task"
num_gpu=$1 port=$2 partition=$3
shift 3

if [ "$num_gpu" -lt "$gpus_per_node" ]; then
    gpus_per_node=$num_gpu
fi
nodes=$((num_gpu / gpus_per_node))
if [ $((nodes * gpus_per_node)) -ne "$num_gpu" ]; then
    wrong "$num_gpu GPUs do not divide into nodes of $gpus_per_node; choose a multiple, or set gpus_per_node"
fi
command -v srun >/dev/null || wrong "srun not found: there is no SLURM here; scripts/train.sh trains on one machine"
check_run
find_python

# The processes meet at the job's first node, unless MASTER_ADDR names another.
export MASTER_PORT="$port"
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # its warnings bury the one line that tells what failed
set -- --partition="$partition" --job-name="$method-$dataset-$exp-$split" \
    --nodes="$nodes" --ntasks="$num_gpu" --ntasks-per-node="$gpus_per_node" \
    --gres="gpu:$gpus_per_node" --cpus-per-task="$cpus_per_task" --kill-on-bad-exit=1 --export=ALL \
    "$PYTHON" -u "$method.py" --config "$config" --labeled-id-path "$labeled" \
    ${unlabeled:+--unlabeled-id-path "$unlabeled"} --save-path "$save" --port "$port" ${double:+--double-batch} "$@"
# Outside a batch job, which alone has SLURM_JOB_ID but no SLURM_STEP_ID, there is nothing to queue again.
if [ -z "${SLURM_JOB_ID:-}" ] || [ -n "${SLURM_STEP_ID:-}" ]; then
    exec srun "$@"
fi

srun "$@" &
# With `--signal=B:...` the batch script gets the signal; otherwise srun's processes do.
wait_for "$!" USR1 TERM INT
if [ "$status" -eq 138 ]; then # ended by SIGUSR1, after saving: see Resuming in README.md
    echo "saved before the time limit; job $SLURM_JOB_ID queues itself again" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
