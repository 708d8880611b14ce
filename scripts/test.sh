#!/bin/sh
# Run the tests, three at a time as many wait: sh scripts/test.sh [pytest's arguments]; -n 0 runs them one by one.
# PYTHON=PATH uses an interpreter that has requirements-dev.txt; otherwise .venv is made and they are installed there.
# The exit status is pytest's.
set -eu

CDPATH='' cd -- "$(dirname -- "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    sh scripts/setup_env.sh requirements-dev.txt
    PYTHON=.venv/bin/python
fi
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest --color=no --numprocesses=3 --dist=worksteal "$@"
