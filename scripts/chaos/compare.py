"""What a finished run left, and where two such ends differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import read_checkpoint
from scripts.chaos.run import LINE
from util.run_files import LATEST, LOG_FILE


def end_state(path: Path) -> dict[str, Any]:
    """What a finished run left: its checkpoint, its logged losses and its curves."""
    state = read_checkpoint(path / LATEST)
    log = (path / LOG_FILE).read_text(encoding="utf-8")
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    curves = {tag: curve for tag, curve in curves.items() if tag != "eval/memory_gb" and not tag.startswith("machine/")}
    losses = {(epoch, iteration): values for epoch, iteration, _, values in LINE.findall(log)}
    return {**state, "losses": losses, "curves": dict(sorted(curves.items()))}


def difference(first: Any, second: Any, where: str = "") -> str | None:
    """Where two nested containers differ, tensors bit for bit; None if nowhere."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return None if same else where
    if type(first) is not type(second):
        return where
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f"{where} keys"
        pairs = [(first[key], second[key], f"{where}[{key!r}]") for key in first]
    elif isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return f"{where} length"
        pairs = [(*pair, f"{where}[{index}]") for index, pair in enumerate(zip(first, second, strict=True))]
    else:
        return None if first == second else where
    return next((found for pair in pairs if (found := difference(*pair))), None)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """How far apart two models' weights and statistics are: the norm of the difference over that of the first."""
    pairs = [(first[name].double(), second[name].double()) for name in first]
    total = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    return (total / sum(float((a**2).sum()) for a, _ in pairs)) ** 0.5
