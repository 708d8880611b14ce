#!/bin/sh
# Prove on a GPU that everything works and is fast there: sh scripts/gpu_check.sh [--out DIR]. Takes at most 8 minutes.
set -eu

CDPATH='' cd -- "$(dirname -- "$0")/.."
. ./scripts/common.sh
find_python
exec "$PYTHON" -m scripts.gpu_check "$@"
