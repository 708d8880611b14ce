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
# The cluster: GPUs to take on a node, at most, their type where there are several, and CPU cores for each.
gpus_per_node=${gpus_per_node:-8}
gpu_type=${gpu_type:-}
cpus_per_task=${cpus_per_task:-5}

usage() {
    echo "usage: [NAME=VALUE ...] sh scripts/slurm_train.sh <num_gpu> <port> <partition> [arguments of METHOD.py ...]"
    variables
    echo "Also gpus_per_node (default 8, at most), cpus_per_task (default 5) and gpu_type (such as a100)."
    echo "Where the partition declares no GPUs, or with --set device=cpu, num_gpu is the number of processes."
    echo "As a batch job: sbatch --nodes=N --ntasks-per-node=G --cpus-per-task=C --gres=gpu:G [...] \\"
    echo "    scripts/slurm_train.sh <num_gpu> <port> <partition> ..."
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

# How many nodes the partition has, CPU cores and GPUs (of gpu_type) of the node that comes nearest to what is needed,
# and how many nodes have both; no line if there is no such partition. GPUs that no node declares are not needed.
node_limits() {
    sinfo -h -N -p "$partition" -o '%c %G' | awk -v type="$gpu_type" -v cores="$needed" -v gpus="${gres:+$gpus_per_node}" '
        { cores_of[NR] = $1 + 0
          gsub(/\([^)]*\)/, "", $2) # sockets, such as (S:0-1)
          count = split($2, kinds, ","); found = 0
          for (i = 1; i <= count; i++) {
              parts = split(kinds[i], part, ":") # gpu:4 or gpu:a100:4
              if (part[1] == "gpu" && (type == "" || part[2] == type)) found += part[parts]
          }
          gpus_of[NR] = found
          if (found > most) most = found }
        END { if (!NR) exit
          gpus = most ? gpus + 0 : 0
          best = 1; nearest = -1
          for (i = 1; i <= NR; i++) {
              useful = gpus_of[i] < gpus ? gpus_of[i] : gpus
              if (useful > nearest || (useful == nearest && cores_of[i] > cores_of[best])) { best = i; nearest = useful }
              if (useful == gpus && cores_of[i] >= cores) enough++
          }
          print NR, cores_of[best], gpus_of[best], enough + 0 }'
}

first_number() { # of 16(x2),8
    printf '%s' "${1%%[!0-9]*}"
}

device_is_cpu() { # whether the arguments of METHOD.py say so; the last one counts
    device=
    for word in "$@"; do
        case $word in device=* | --set=device=*) device=${word#*device=} ;; esac
    done
    [ "$device" = cpu ]
}

gres=gpu
if device_is_cpu "$@"; then
    gres=
fi
needed=$((gpus_per_node * cpus_per_task))
if command -v sinfo >/dev/null && limits=$(node_limits 2>/dev/null) && { [ -n "$limits" ] || sinfo -h >/dev/null 2>&1; }; then
    [ -n "$limits" ] || wrong "partition $partition: no such partition; there are: $(sinfo -h -o %R | tr "\n" " ")"
    read -r all_nodes cores gpus enough <<EOF
$limits
EOF
    [ "$nodes" -le "$all_nodes" ] ||
        wrong "$num_gpu processes with gpus_per_node=$gpus_per_node need $nodes nodes; partition $partition has $all_nodes"
    if [ -n "$gres" ] && [ "$gpus" -eq 0 ]; then
        [ -z "$gpu_type" ] || wrong "gpu_type=$gpu_type: partition $partition has no such GPUs; sinfo -o '%P %G' lists them"
        gres= # none are declared: the nodes have none, or a job has all of them
    fi
    [ "$needed" -le "$cores" ] ||
        wrong "$gpus_per_node processes on a node with cpus_per_task=$cpus_per_task need $needed CPU cores;" \
            "partition $partition has $cores on a node${gres:+ with $gpus GPUs}: lower cpus_per_task or gpus_per_node"
    if [ -n "$gres" ] && [ "$gpus_per_node" -gt "$gpus" ]; then
        wrong "a node of partition $partition has $gpus GPUs at most, not $gpus_per_node: set gpus_per_node=$gpus"
    fi
    [ "$nodes" -le "$enough" ] ||
        wrong "$num_gpu processes need $nodes nodes with $needed CPU cores${gres:+ and $gpus_per_node GPUs};" \
            "partition $partition has $enough: change cpus_per_task or gpus_per_node"
fi
if [ -n "${SLURM_JOB_ID:-}" ]; then # what sbatch, salloc or srun took
    [ "${SLURM_JOB_NUM_NODES:-$nodes}" -ge "$nodes" ] ||
        wrong "job $SLURM_JOB_ID has $SLURM_JOB_NUM_NODES nodes, not the $nodes that $num_gpu processes need:" \
            "ask for --nodes=$nodes, or set gpus_per_node"
    cores=$(first_number "${SLURM_JOB_CPUS_PER_NODE:-$needed}")
    [ "$needed" -le "$cores" ] ||
        wrong "job $SLURM_JOB_ID has $cores CPU cores on a node, and $gpus_per_node processes with" \
            "cpus_per_task=$cpus_per_task need $needed: ask for --ntasks-per-node=$gpus_per_node" \
            "--cpus-per-task=$cpus_per_task, or lower cpus_per_task"
    if [ -n "$gres" ] && [ "${SLURM_GPUS_ON_NODE:-0}" -lt "$gpus_per_node" ]; then
        wrong "job $SLURM_JOB_ID has ${SLURM_GPUS_ON_NODE:-0} GPUs on a node, not $gpus_per_node:" \
            "ask for --gres=gpu:${gpu_type:+$gpu_type:}$gpus_per_node"
    fi
fi

for word in "$@"; do # the last one counts, as for METHOD.py
    case $word in --save-path=*) save=${word#*=} ;; esac
    [ "${before:-}" != --save-path ] || save=$word
    before=$word
done

# The processes meet at the job's first node, unless MASTER_ADDR names another.
export MASTER_PORT="$port"
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # its warnings bury the one line that says what failed
# If a process ends with an error, srun ends the others by SIGTERM. One that still imports torch would die of it, and that
# would be srun's status: the signal is held back until the process can say how it ends (util/signals.py).
hold='import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])'
hold="$hold; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
set -- --partition="$partition" --job-name="$method-$dataset-$exp-$split" \
    --nodes="$nodes" --ntasks="$num_gpu" --ntasks-per-node="$gpus_per_node" \
    ${gres:+--gres="$gres:${gpu_type:+$gpu_type:}$gpus_per_node"} \
    --cpus-per-task="$cpus_per_task" --kill-on-bad-exit=1 --export=ALL \
    ${SLURM_STEP_ID:+--overlap} \
    "$PYTHON" -c "$hold" -u "$method.py" --config "$config" --labeled-id-path "$labeled" \
    ${unlabeled:+--unlabeled-id-path "$unlabeled"} --save-path "$save" --port "$port" ${double:+--double-batch} "$@"
# Outside a batch job, which alone has SLURM_JOB_ID but no SLURM_STEP_ID, there is nothing to queue again. In a shell
# that srun started, --overlap shares the resources that the shell itself holds.
if [ -z "${SLURM_JOB_ID:-}" ] || [ -n "${SLURM_STEP_ID:-}" ]; then
    exec srun "$@"
fi

mkdir -p "$save"
started=$save/.started-$SLURM_JOB_ID # on the file system of the checkpoints, whose clock decides which are newer
: >"$started"
srun "$@" &
# With `--signal=B:...` the batch script gets the signal; otherwise srun's processes do.
wait_for "$!" USR1 TERM INT
saved=$(find "$save/." ! -name . -prune -name '*.pth' -newer "$started")
rm -f "$started"
if [ "$status" -eq 138 ] && [ -z "$saved" ]; then # ended by SIGUSR1 before anything was saved
    echo "error: job $SLURM_JOB_ID was signalled before training had saved anything: its time limit is too short" \
        "(check_data: false shortens the start); it does not queue itself again" >&2
    exit 2
fi
if [ "$status" -eq 138 ]; then # ended by SIGUSR1, after saving
    echo "saved before the time limit; job $SLURM_JOB_ID queues itself again" >&2
    for pause in 5 10 20 30 ''; do # a busy controller may not answer in time
        scontrol requeue "$SLURM_JOB_ID" && exit "$status"
        [ -z "$pause" ] || sleep "$pause"
    done
    echo "error: job $SLURM_JOB_ID could not queue itself again; submitted again, it continues from what was saved" >&2
fi
exit "$status"
