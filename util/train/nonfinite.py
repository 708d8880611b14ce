"""Undoing steps whose loss, gradients or weights are not finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from util.distributed.collectives import all_reduce_sum
from util.errors import TrainingStopped
from util.log import RunLog

SKIPPED = "skipped"


class NonFiniteGuard:
    """Undoes steps with a loss, gradient, weight or buffer that is not finite, without waiting for the device.

    `keep` before a step's forward, `undo` after the optimiser's step: weights, BatchNorm's statistics (which a broken
    forward spoils too) and the optimiser's state are then what they were before the step, on all processes alike. It
    costs a copy of all these, in memory and in time.

    With a GradScaler, gradients that are not finite are the scaler's: it leaves such steps out and lowers its scale,
    as it should, so `check_gradients=False` neither undoes nor counts them.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, limit: int, log: RunLog, check_gradients: bool = True
    ) -> None:
        self._tensors, self._optimizer = [*model.parameters(), *model.buffers()], optimizer
        self._parameters = list(model.parameters()) if check_gradients else []
        self._limit, self._log, self._count = limit, log, 0
        self._kept = [tensor.detach().clone() for tensor in self._tensors]
        self._kept_state: dict[tuple[int, str], torch.Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Remember everything that a step changes."""
        for kept, tensor in zip(self._kept, self._tensors, strict=True):
            kept.copy_(tensor)
        for key, tensor in self._state():
            self._kept_state.setdefault(key, torch.empty_like(tensor)).copy_(tensor)

    @torch.no_grad()
    def undo(self, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Undo the step if it was not finite on any process.

        Returns its `metrics` and one more, `skipped`: 1 if it was undone, else 0.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        checked = [tensor for tensor in (*metrics.values(), *gradients, *self._tensors) if tensor.is_floating_point()]
        finite = torch.stack([tensor.isfinite().all() for tensor in checked]).all()
        broken = all_reduce_sum((~finite).float()) > 0
        for kept, tensor in zip(self._kept, self._tensors, strict=True):
            tensor.copy_(torch.where(broken, kept, tensor))
        for key, tensor in self._state():
            # State that the first step has made was nothing before: zeros, from which the next step makes the same.
            kept = self._kept_state.get(key)
            tensor.copy_(torch.where(broken, torch.zeros_like(tensor) if kept is None else kept, tensor))
        return {**metrics, SKIPPED: broken.float()}

    def count(self, skipped: float, iteration: int) -> None:
        """Count steps that were undone up to `iteration` and log them. Raises TrainingStopped beyond the limit."""
        if not skipped:
            return
        self._count += round(skipped)
        steps = "1 step was" if self._count == 1 else f"{self._count} steps were"
        text = f"{steps} not finite and undone up to iteration {iteration}"
        self._log.info(f"{text} (nonfinite_limit: {self._limit})")
        if self._count > self._limit:
            raise TrainingStopped(f"{text}, more than nonfinite_limit {self._limit}; earlier checkpoints are kept")

    def _state(self) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
        for index, state in enumerate(self._optimizer.state.values()):
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield (index, name), value
