#!/bin/sh
# Train on this machine, or on several: one process per GPU, or gloo processes on the CPU where there is no GPU.
set -eu

# What to train. Environment variables of the same names override.
dataset=${dataset:-pascal}
method=${method:-unimatch}
exp=${exp:-r101}
split=${split:-732}

usage() {
    echo "usage: [NAME=VALUE ...] sh scripts/train.sh <num_gpu> [port] [arguments of METHOD.py ...]"
    variables
    echo "Also max_restarts (default 0): how often to start all processes again, from the last checkpoint, when one fails."
    echo 'Also seeds, such as "0 1 2": a run for each, in turn, in SAVED/seedN; those that are finished are left alone.'
    echo "On several machines: run it on each, with NNODES, their number, NODE_RANK, from 0, MASTER_ADDR, the first one's"
    echo "name or address, and the same port; num_gpu is the number on each machine."
    echo "example: dataset=cityscapes split=1_16 sh scripts/train.sh 4 29500 --set epochs=2"
}

CDPATH='' cd -- "$(dirname -- "$0")/.."
. ./scripts/common.sh

case ${1:-} in
    -h | --help) usage && exit ;;
esac
check_number num_gpu "${1:-}"
num_gpu=$1
shift
port=
case ${1:-} in
    '' | -*) ;;
    *) check_number port "$1" && port=$1 && shift ;;
esac
max_restarts=${max_restarts:-0} restarts='' nodes=''
case $max_restarts in
    *[!0-9]* | ????*) wrong "max_restarts must be a number, not '$max_restarts'" ;;
    *[1-9]*) restarts=yes ;;
esac
seeds=${seeds:-}
case $seeds in
    *[0-9]* | '') ;;
    *) wrong "seeds must be numbers with spaces between them, not '$seeds'" ;;
esac
for seed in $seeds; do
    case $seed in
        *[!0-9]*) wrong "seeds must be numbers with spaces between them, not '$seeds'" ;;
    esac
done
if [ "${NNODES:-1}" != 1 ]; then
    check_number NNODES "$NNODES"
    case ${NODE_RANK:-} in
        '' | *[!0-9]* | ?????*) wrong "NODE_RANK must be a number from 0 to $((NNODES - 1)), not '${NODE_RANK:-}'" ;;
    esac
    [ "$NODE_RANK" -lt "$NNODES" ] || wrong "NODE_RANK must be a number from 0 to $((NNODES - 1)), not '$NODE_RANK'"
    [ -n "${MASTER_ADDR:-}" ] || wrong "MASTER_ADDR is missing: the name or address of the machine with NODE_RANK=0"
    [ -n "$port" ] || wrong "port is missing: any free one of $MASTER_ADDR, the same on all $NNODES machines"
    nodes=$NNODES
fi
check_run
find_python

launch() { # <save path> [arguments of METHOD.py ...]
    save=$1
    shift
    set -- --processes "$num_gpu" ${port:+--port "$port"} \
        ${restarts:+--max-restarts "$max_restarts"} \
        ${nodes:+--nodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"} "$method.py" --config "$config" --labeled-id-path "$labeled" \
        ${unlabeled:+--unlabeled-id-path "$unlabeled"} \
        --save-path "$save" ${double:+--double-batch} "$@"
    if [ -z "$seeds" ]; then
        # exec: a signal to this script reaches the launcher, which passes it on to all processes.
        exec "$PYTHON" -m scripts.launch "$@"
    fi
    "$PYTHON" -m scripts.launch "$@" &
    # Ctrl-C reaches the launcher without us, and a second one would end it before it has saved.
    wait_for "$!" USR1 TERM HUP
    trap - USR1 TERM HUP
}

[ -n "$seeds" ] || launch "$save" "$@"
trap : INT
folder=$save
for seed in $seeds; do
    echo "seed $seed, in $folder/seed$seed"
    launch "$folder/seed$seed" "$@" --set "seed=$seed"
    [ "$status" -eq 0 ] || exit "$status"
done
