"""From the command to the first step with lists of many entries: seconds, and memory of the processes.

    python -m scripts.benchmark.start 100000 1000000 10000000

Each number is a run of its own: UniMatch on two processes that load, `check_data: false`, an unlabelled list of so many
entries. Only the images that are read exist.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.sampler import EpochSampler
from scripts.benchmark.memory import resident
from util.config import PROJECT_ROOT

LABELED, WORKERS, BATCH, READ = 4, 2, 2, 64  # READ: samples that may be loaded until the first step is done
CONFIG = f"""\
dataset: many
data_root: .
classes: [background, object]
val_id_path: val.txt
crop_size: 33
epochs: 1
batch_size: {BATCH}
lr: 0.01
backbone: resnet10
pretrained: false
device: cpu
workers: {WORKERS}
eval_mode: original
log_interval: 1
check_data: false
"""


class Start(NamedTuple):
    """Seconds to the first step, and those of them in which the training process computed; its peak memory and what
    one loading process has to itself, in GB."""

    seconds: float
    computed: float
    peak: float
    worker: float


def image_name(number: int) -> str:
    """The path of an entry's image."""
    return f"images/{number // 1000:05d}/photo_{number:08d}.jpg"


def write_data(root: Path, entries: int) -> None:
    """Lists, a config and the images that the first steps read, in `root`."""
    rng = np.random.default_rng(0)
    picture, label = rng.integers(0, 256, (48, 64, 3), np.uint8), rng.integers(0, 2, (48, 64), np.uint8)
    names = [f"labeled{k}.png" for k in range(LABELED)]
    for name in names:
        Image.fromarray(picture).save(root / name)
        Image.fromarray(label).save(root / f"label_{name}")
    text = "".join(f"{name} label_{name}\n" for name in names)
    for name in ("labeled.txt", "val.txt"):
        (root / name).write_text(text, encoding="utf-8")
    (root / "config.yaml").write_text(CONFIG.replace("data_root: .", f"data_root: {root}"), encoding="utf-8")
    with open(root / "unlabeled.txt", "w", encoding="utf-8") as file:
        for first in range(0, entries, 100_000):
            numbers = range(first, min(first + 100_000, entries))
            file.write("".join(f"{image_name(number)}\n" for number in numbers))
    for key in islice(EpochSampler(LABELED, entries, BATCH, 0), READ):
        path = root / image_name(key.unlabeled)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)


def measure_start(entries: int, project: Path = PROJECT_ROOT) -> Start:
    """Start a run of the code in `project` on so many entries, and end it after its first step."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root, entries)
        command = [sys.executable, "unimatch.py", "--config", root / "config.yaml", "--save-path", root / "run"]
        command += ["--labeled-id-path", root / "labeled.txt", "--unlabeled-id-path", root / "unlabeled.txt"]
        command += ["--set", f"val_id_path={root / 'val.txt'}"]
        started = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.DEVNULL) as process:
            try:
                while not any(
                    "iteration 1/" in log.read_text(encoding="utf-8") for log in (root / "run").glob("train.log")
                ):
                    if process.poll() is not None:
                        raise RuntimeError(f"the run ended with {process.returncode}")
                    time.sleep(0.05)
                seconds = time.monotonic() - started
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                computed = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # in user and in system mode
                peak = resident("VmHWM", process.pid)
                worker = max(private_memory(child) for child in _children(process.pid))
            finally:
                process.send_signal(signal.SIGKILL)
        return Start(seconds, computed, peak, worker)


def _children(process: int) -> Iterator[int]:
    yield from map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())


def private_memory(process: int) -> float:
    """GB of a process that it shares with no other."""
    return sum(resident(name, process, "smaps_rollup") for name in ("Private_Clean", "Private_Dirty"))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each number of entries on the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts.benchmark.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entries", type=int, nargs="+", help="lines of the unlabelled list")
    parser.add_argument("--project", type=Path, default=PROJECT_ROOT, help="folder of another version of the code")
    args = parser.parse_args(argv)
    for entries in args.entries:
        start = measure_start(entries, args.project)
        print(
            f"{entries} entries: {start.seconds:.1f} s to the first step ({start.computed:.1f} s of them computing), "
            f"main process {start.peak:.2f} GB at its peak, a loading process {start.worker:.2f} GB of its own",
            flush=True,
        )


if __name__ == "__main__":
    main()
