"""How a step changes the weights: the optimiser, fp16's gradient scaler, and the guard against bad numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from util.checkpoint import load_optimizer
from util.precision import build_scaler
from util.run import Run
from util.train.guard import Guard

# A step gets a batch on the device and the function that back-propagates a part of the loss; it returns its metrics.
TrainStep = Callable[[Any, Callable[[torch.Tensor], None]], dict[str, torch.Tensor]]


class Update:
    """The optimiser with what the config puts around it; nothing here waits for the device but `report`."""

    def __init__(
        self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, train_step: TrainStep
    ) -> None:
        self.optimizer, self._train_step, self._log = optimizer, train_step, run.log
        self._scaler = build_scaler(run.cfg, run.device)
        self._guard = Guard(run, model, optimizer, loader, check_gradients=not self._scaler.is_enabled())
        self._left_out: list[torch.Tensor] = []
        if self._scaler.is_enabled():
            optimizer.register_step_pre_hook(self._note_left_out)

    def step(self, batch: Any) -> dict[str, torch.Tensor]:
        """One training step on a batch that is on the device; returns its metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        self._guard.keep()
        metrics = self._train_step(batch, self._backward)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return self._guard.undo(metrics)

    def report(self, means: dict[str, float], iteration: int) -> None:
        """Log what was left out, undone or replaced up to `iteration` (from 1), and take it out of the `means`.

        Raises TrainingStopped or DataError, on every process, beyond the config's limits.
        """
        if self._left_out and (count := int(torch.stack(self._left_out).sum())):
            steps = f"{count} step{'s' * (count > 1)}"
            self._log.info(
                f"{steps} left out by the gradient scaler, which lowers its scale, up to iteration {iteration}"
            )
        self._left_out.clear()
        self._guard.report(means, iteration)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        scaler = {"scaler": self._scaler.state_dict()} if self._scaler.is_enabled() else {}
        return {"optimizer": self.optimizer.state_dict(), **scaler}

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Take up what `state` holds; raises CheckpointError, which names the file `path`."""
        load_optimizer(self.optimizer, state["optimizer"], path)
        if "scaler" in state:
            self._scaler.load_state_dict(state["scaler"])

    def _backward(self, part: torch.Tensor) -> None:
        self._scaler.scale(part).backward()

    def _note_left_out(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # An optimiser that knows of the scaler, as the fused one does, is told whether this step is to be left out.
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self._left_out.append(found.detach().clone())
