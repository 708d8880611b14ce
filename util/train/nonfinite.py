"""Steps whose loss, gradients or weights are not finite: undone, counted, and limited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from util.distributed.collectives import all_reduce_sum
from util.errors import TrainingStopped
from util.log import RunLog


class NonFiniteGuard:
    """Undoes steps that leave anything not finite: loss, gradient, weight, buffer, momentum. The host does not wait.

    Call `keep` before a step's forward and `undo` after the optimiser's step. Weights, buffers (a broken forward spoils
    BatchNorm's statistics too) and the optimiser's state are then as they were before the step, on all processes. This
    costs one copy of them all, in memory and in time.

    With a GradScaler pass `check_gradients=False`: the scaler leaves out a step whose gradients are not finite, and
    lowers its scale.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizer: torch.optim.Optimizer,
        limit: int,
        log: RunLog,
        check_gradients: bool = True,
    ) -> None:
        modules = list(modules)
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        self._tensors = [*self._parameters, *(buffer for module in modules for buffer in module.buffers())]
        self._check_gradients, self._optimizer = check_gradients, optimizer
        self._kept = [tensor.detach().clone() for tensor in self._tensors]
        self._kept_state: dict[tuple[int, str], torch.Tensor] = {}
        self._limit, self._log, self._count = limit, log, 0
        # Undone steps that were not reported yet; on the device, so that counting does not wait for it.
        self._unreported = torch.zeros((), dtype=torch.int64, device=self._tensors[0].device)

    @torch.no_grad()
    def keep(self) -> None:
        """Copy everything that a step changes."""
        for kept, tensor in zip(self._kept, self._tensors, strict=True):
            kept.copy_(tensor)
        for key, tensor in self._state():
            self._kept_state.setdefault(key, torch.empty_like(tensor)).copy_(tensor)

    @torch.no_grad()
    def undo(self, metrics: Iterable[torch.Tensor]) -> torch.Tensor:
        """Undo the step if it, or one of its `metrics`, is not finite on any process.

        Returns whether it did, a 0-dim bool on the device.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None] if self._check_gradients else []
        # AdamW's squares overflow before its weights do.
        checked = [*metrics, *gradients, *self._tensors, *(tensor for _, tensor in self._state())]
        checked = [tensor for tensor in checked if tensor.is_floating_point()]
        finite = torch.stack([tensor.isfinite().all() for tensor in checked]).all()
        undone = all_reduce_sum((~finite).float()) > 0
        for kept, tensor in zip(self._kept, self._tensors, strict=True):
            tensor.copy_(torch.where(undone, kept, tensor))
        for key, tensor in self._state():
            # The first step makes the state. Undone, it is zeros, from which the next step makes what the first would.
            kept = self._kept_state.get(key)
            tensor.copy_(torch.where(undone, torch.zeros_like(tensor) if kept is None else kept, tensor))
        self._unreported += undone
        return undone

    def report(self, iteration: int) -> None:
        """Log the steps undone up to `iteration` (from 1), if any are new. Raises TrainingStopped beyond the limit."""
        new = self.unreported
        if not new:
            return
        self._count += new
        self._unreported.zero_()
        steps = "1 step was" if self._count == 1 else f"{self._count} steps were"
        text = f"{steps} not finite and undone up to iteration {iteration}"
        self._log.info(f"{text} (nonfinite_limit: {self._limit})")
        if self._count > self._limit:
            raise TrainingStopped(f"{text}, more than nonfinite_limit {self._limit}; earlier checkpoints are kept")

    @property
    def unreported(self) -> int:
        """Undone steps that `report` has not counted yet. The host waits for the device."""
        return int(self._unreported)

    @unreported.setter
    def unreported(self, count: int) -> None:
        self._unreported.fill_(count)

    def _state(self) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
        for index, state in enumerate(self._optimizer.state.values()):
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield (index, name), value
