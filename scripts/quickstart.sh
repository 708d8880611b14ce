#!/bin/sh
# From a fresh clone to a trained model: environment, toy set, UniMatch on it, scores, and a picture of predictions.
# PYTHON=PATH uses an interpreter that has the requirements; otherwise .venv is made and they are installed there.
set -eu

CDPATH='' cd -- "$(dirname -- "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    sh scripts/setup_env.sh requirements.txt
    PYTHON=.venv/bin/python
fi
run=exp/toy/unimatch/quickstart

echo "1. The toy set: generated scenes, 8 of them labelled"
"$PYTHON" -m scripts.make_toy --root data/toy

echo "2. UniMatch on it"
"$PYTHON" unimatch.py --config configs/toy.yaml --labeled-id-path data/toy/labeled.txt --save-path "$run"

echo "3. The best checkpoint's scores on the validation images"
"$PYTHON" -m scripts.evaluate --config configs/toy.yaml --checkpoint "$run/best.pth"

echo "4. Its predictions"
"$PYTHON" -m scripts.predict --config configs/toy.yaml --checkpoint "$run/best.pth" --images data/toy/val.txt \
    --output "$run/predictions" --panel "$run/examples.png"

cat <<TEXT

Done. In $run:
  examples.png    input | truth | prediction
  predictions/    a label image for every validation image
  best.pth        the checkpoint with the best mIoU; latest.pth is the last one, with the log file beside it
Next:
  for comparison  the commands for FixMatch and the supervised baseline are at the top of configs/toy.yaml
  your own data   copy configs/custom.yaml, which explains every key
  the published benchmarks are described in README.md
TEXT
