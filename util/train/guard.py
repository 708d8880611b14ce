"""Both guards of a training step: non-finite values and unreadable images."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from util.run import Run
from util.train.bad_images import BadImages
from util.train.nonfinite import SKIPPED, NonFiniteGuard


class Guard:
    """What the training loop calls for both: nothing happens, nor costs anything, unless the config asks for it."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader,
        check_gradients: bool = True,
    ) -> None:
        """`check_gradients` as NonFiniteGuard has it: False with a GradScaler."""
        cfg = run.cfg
        self._steps = self._images = None
        if cfg.on_nonfinite == "skip":
            self._steps = NonFiniteGuard(model, optimizer, cfg.nonfinite_limit, run.log, check_gradients)
        if cfg.on_bad_image == "skip":
            self._images, self._loader = BadImages(cfg.bad_image_limit, run.log), loader

    def keep(self) -> None:
        """Before a step's forward."""
        if self._steps:
            self._steps.keep()

    def undo(self, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """After the optimiser's step; returns the step's metrics for StepMetrics."""
        return self._steps.undo(metrics) if self._steps else metrics

    def report(self, means: dict[str, float], iteration: int) -> None:
        """Log what was skipped since the last reading, up to iteration `iteration` (from 1).

        Takes `skipped` out of `means`. Raises TrainingStopped or DataError, on every process, beyond a limit.
        """
        skipped = means.pop(SKIPPED, 0.0)
        if self._steps:
            self._steps.count(skipped, iteration)
        if self._images:
            self._images.count(self._loader.faults)
            self._loader.faults.clear()
