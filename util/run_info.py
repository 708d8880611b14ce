"""How a run was started, in a file of its save path, from which `scripts.report` gives the command that repeats it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from util.checkpoint import writing
from util.config import Config
from util.lock import start_time
from util.run_files import INFO_FILE


def write_info(save_path: Path, values: Mapping[str, Any], device: torch.device) -> None:
    """Write `values`, the versions and the `device` over what an earlier start wrote. Raises CheckpointError."""
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": _machine(device)}
    with writing(save_path / INFO_FILE) as temporary:
        temporary.write_text(
            json.dumps({**values, "device": device.type, **machine}, indent=1) + "\n", encoding="utf-8"
        )


def read_info(save_path: Path) -> dict[str, Any]:
    """What `write_info` wrote; empty for a run of an earlier version, or where the file is none of ours."""
    try:
        values = json.loads((save_path / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def is_started_again(save_path: Path) -> bool:
    """Whether what started the last run there has now started this one: a job queued again, or torchrun's restart."""
    restarts = (os.environ.get(name) or "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if all(count == "0" for count in restarts):
        return False
    return launch() is not None and read_info(save_path).get("launch") == launch()


def launch() -> str | None:
    """What started this process, the same after a restart: a job of Slurm, or torchrun. None: neither."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"job {job}"
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        return f"torchrun {os.getppid()}, {start_time(os.getppid())}"
    return None


def hyperparameters(method: str, cfg: Config, processes: int, lr: float) -> dict[str, Any]:
    """What heads a run in the loggers: its config, and what follows from it and the processes."""
    left_out = ("classes", "palette", "logger")
    values = {key: value for key, value in vars(cfg).items() if value is not None and key not in left_out}
    return {**values, "criterion": cfg.criterion.name, "method": method, "processes": processes, "scaled_lr": lr}


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} x {torch.cuda.device_count()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
