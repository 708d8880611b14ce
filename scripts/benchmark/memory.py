"""Peak memory of a training step, measured in a process of its own."""

from __future__ import annotations

import gc
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.config import PROJECT_ROOT

# Freed memory goes back to the system at once, so that the resident set is what is in use.
_GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_memory(prepare: Callable[..., tuple[nn.Module, Callable[[], Any]]], *arguments: Any) -> float:
    """Peak resident memory in GB of a step above that of the loaded model with its optimiser's state.

    `prepare(*arguments)`, a function at the top of its module, gives the model and what does a step with it; the
    arguments are strings, numbers or containers of them.
    """
    call = (prepare.__module__, prepare.__name__, arguments, torch.get_num_threads())
    command = [sys.executable, "-c", f"from scripts.benchmark import memory; memory.print_peak(*{call!r})"]
    environment = {**os.environ, **_GIVING_BACK}
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(module: str, name: str, arguments: tuple[Any, ...], threads: int) -> None:
    """What the process of its own does."""
    torch.set_num_threads(threads)
    model, step = getattr(importlib.import_module(module), name)(*arguments)
    step()  # the optimiser's state, and what libraries keep from their first call
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    step()
    print(resident("VmHWM") - before)


def resident(field: str, process: int | str = "self", file: str = "status") -> float:
    """A process's memory in GB, by a field of a file of /proc: resident now (VmRSS) or at its peak (VmHWM)."""
    kilobytes = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/{file}").read_text(), re.MULTILINE)
    return int(kilobytes[1]) * 1024 / 1e9
