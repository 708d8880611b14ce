"""Measure what makes this project fast and small, against the naive way of doing the same.

    python -m scripts.benchmark all --json benchmark.json
    python -m scripts.benchmark data

Both ways run in turn, in one process, on synthetic images: JPEG of 500 x 375 pixels, as in Pascal VOC, and PNG of
2048 x 1024, as in Cityscapes, of the same size as those files. Each line gives the median of the naive way
(scripts/benchmark/naive.py, naive_data.py) and of this project's, with the middle half of the measurements in
brackets, their ratio, and how their results compare. Times are good for ratios within one run, not across machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import PIL
import torch

from scripts.benchmark.data import measure_data, measure_loader, measure_startup
from scripts.benchmark.evaluation import measure_evaluate
from scripts.benchmark.inputs import write_inputs
from scripts.benchmark.loss import measure_loss
from scripts.benchmark.monitor import measure_monitor
from scripts.benchmark.rows import line
from scripts.benchmark.step import measure_step
from scripts.benchmark.step_v2 import measure_step_v2
from util.cli import run_main
from util.outputs import MARK, check_suffix, check_targets, replacing

GROUPS = {
    "data": measure_data,
    "loader": measure_loader,
    "loss": measure_loss,
    "step": measure_step,
    "step_v2": measure_step_v2,
    "evaluate": measure_evaluate,
    "monitor": measure_monitor,
    "startup": measure_startup,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the groups that the command line names; print a table, and write the figures if asked to."""
    parser = argparse.ArgumentParser(
        prog="scripts.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=(*GROUPS, "all"), help="what to measure")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each way (default: 7)")
    parser.add_argument("--threads", type=int, help="threads of losses, steps and evaluation (default: the cores)")
    parser.add_argument("--json", metavar="F", type=Path, help="write all measurements to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.json:
        check_suffix("--json", args.json, (".json",))
        check_targets([args.json], [])
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))

    versions = f"torch {torch.__version__}, Pillow {PIL.__version__}, Python {platform.python_version()}"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {versions}"
    print(f"{machine}; {args.rounds} rounds", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder), args.rounds)
        for name in GROUPS if "all" in args.groups else dict.fromkeys(args.groups):
            for row in GROUPS[name](inputs):
                print(line(row), flush=True)
                rows.append(row)
    if args.json:
        figures = [{**asdict(row), "ratio": row.ratio} for row in rows]
        text = json.dumps({"tool": MARK, "machine": machine, "rounds": args.rounds, "rows": figures}, indent=1)
        with replacing(args.json) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
