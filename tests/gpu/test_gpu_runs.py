"""Whole runs on a GPU: compiled, recorded, repeated, killed and resumed, out of memory, and on two GPUs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import PROJECT_ROOT, TinyData, assert_same, load_checkpoint, make_dataset, run_script

pytestmark = pytest.mark.gpu
ON_GPU = ("--set", "device=cuda")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Four steps of UniMatch an epoch."""
    return make_dataset(tmp_path_factory.mktemp("data"), labeled=4, unlabeled=8)


def train(data: TinyData, save_path: Path, *settings: str, method: str = "unimatch") -> list[float]:
    """The losses of a run's steps, as its log has them."""
    done = run_script(f"{method}.py", *data.arguments(save_path), *ON_GPU, "conf_thresh=0.3", *settings)
    assert done.returncode == 0, done.stderr
    return losses(save_path)


def losses(save_path: Path) -> list[float]:
    """Of every logged step."""
    return [float(value) for value in re.findall(r"  loss ([\d.]+)", (save_path / "train.log").read_text())]


@pytest.mark.last
def test_compiled_and_recorded_runs_reach_their_end_with_the_same_losses(tiny, tmp_path):
    expected = train(tiny, tmp_path / "eager")
    assert len(expected) == 4
    for keys in (["compile=true"], ["cuda_graphs=true"], ["compile=true", "cuda_graphs=true"]):
        found = train(tiny, tmp_path / "-".join(keys), *keys)
        assert found == pytest.approx(expected, rel=0.02, abs=2e-3), keys


DETERMINISTIC = ("deterministic=true", "epochs=3")


@pytest.fixture(scope="module")
def whole(tiny: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a deterministic run that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole")
    train(tiny, path, *DETERMINISTIC)
    return load_checkpoint(path)


@pytest.mark.parametrize("end", [None, signal.SIGTERM, signal.SIGKILL])
def test_deterministic_runs_are_the_same_bit_for_bit_also_after_a_signal(tiny, whole, tmp_path, end):
    """SIGTERM saves and ends the run in its first epoch; SIGKILL loses the second epoch's steps, which are repeated."""
    if end:
        command = [sys.executable, "unimatch.py", *tiny.arguments(tmp_path), *ON_GPU, "conf_thresh=0.3", *DETERMINISTIC]
        reached = "epoch 1/3  iteration 2/4" if end == signal.SIGTERM else "epoch 2/3  iteration 2/4"
        with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            log = tmp_path / "train.log"
            for _ in range(3000):
                if process.poll() is not None or (log.exists() and reached in log.read_text()):
                    break
                time.sleep(0.02)
            process.send_signal(end)
            status = 128 + end if end == signal.SIGTERM else -end
            assert process.wait(60) == status, process.stderr.read()
    train(tiny, tmp_path, *DETERMINISTIC)
    found = load_checkpoint(tmp_path)
    for part in ("model", "optimizer"):
        assert_same(found[part], whole[part])


def test_too_little_memory_is_one_line_that_says_what_to_lower(tiny, tmp_path):
    code = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(1e-3); import unimatch; "
        "from util.cli import run_main; run_main(unimatch.main)"
    )
    done = run_script("-c", code, *tiny.arguments(tmp_path / "run"), *ON_GPU, "crop_size=513")
    assert done.returncode == 3
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("error: out of GPU memory: lower batch_size or crop_size")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_with_synchronised_batchnorm_are_one_of_twice_the_batch(tmp_path):
    data = make_dataset(tmp_path / "data", labeled=4, unlabeled=8)
    # Dropout and OHEM differ between processes: the supervised loss does not.
    expected = train(data, tmp_path / "one", "batch_size=4", "epochs=3", method="supervised")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "supervised.py", *data.arguments(tmp_path / "two"), *ON_GPU]
    done = subprocess.run(
        [*command, "batch_size=2", "epochs=3"], cwd=PROJECT_ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=0.02, abs=2e-3)
