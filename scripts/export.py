"""Export a checkpoint as one file that needs none of this code: .pt2 (torch.export) or .onnx.

    python -m scripts.export --checkpoint exp/.../best.pth --out model.onnx

The number of images and their height and width are free. Classes, palette and normalisation are inside. The file is
read back, and compared with the model at three sizes, before it takes its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from util.cli import run_main
from util.exported import SUFFIXES, check, describe, load, require_packages, save, trace
from util.outputs import check_suffix, check_targets, replacing
from util.trained import add_model_arguments, open_trained


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.export", description=__doc__.split("\n", 1)[0])
    add_model_arguments(parser)
    parser.add_argument("--out", required=True, metavar="F", help="model.pt2 or model.onnx")
    args = parser.parse_args(argv)
    out = Path(args.out)
    check_suffix("--out", out, SUFFIXES)
    suffix = out.suffix.lower()
    if suffix == ".onnx":
        require_packages(f"--out {out}")

    trained = open_trained(args)
    # Computed in float32 and eagerly, however it was trained.
    trained = replace(trained, cfg=replace(trained.cfg, amp="none", compile=False, checkpoint_activations="none"))
    check_targets([out], trained.files(args))
    for note in trained.notes:
        print(note)
    model = trained.build().eval()
    print("tracing the model, which takes up to some minutes")
    program, metadata = trace(model, trained.cfg.channels), describe(trained, model)
    with replacing(out) as temporary:
        save(program, metadata, suffix, temporary)
        results = check(model, load(suffix, temporary), trained.cfg.crop_size, trained.cfg.channels)
    print(f"logits of {out} and of the model differ by at most")
    for shape, absolute, relative in results:
        print(f"  {absolute:.2g}, {relative:.2g} of the largest logit, for {' x '.join(map(str, shape))}")


if __name__ == "__main__":
    run_main(main)
