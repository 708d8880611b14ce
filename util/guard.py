"""What a run does at a fault that it is told to outlive: steps that are not finite, and images that are unreadable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset import DataError
from util.cli import TrainingStopped
from util.distributed import all_reduce_sum, gather_objects
from util.log import RunLog
from util.run import Run

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


class BadImages:
    """Names each unreadable file once in the log, counts the samples that were replaced, and stops beyond a limit."""

    def __init__(self, limit: int, log: RunLog) -> None:
        self._limit, self._log = limit, log
        self._samples, self._known = 0, set[str]()

    def count(self, faults: Sequence[str]) -> None:
        """Count `faults`, messages of this process, and those of all others; every process calls this alike.

        Raises DataError, on every process, when there have been more different ones than the limit.
        """
        faults = [fault for own in gather_objects(list(faults)) for fault in own]
        if not faults:
            return
        self._samples += len(faults)
        for fault in dict.fromkeys(faults):
            if fault not in self._known:
                self._log.info(f"skipped: {fault}")
                self._known.add(fault)
        count = f"{len(self._known)} unreadable image{'s' * (len(self._known) > 1)}"
        samples = f"{self._samples} sample{'s' * (self._samples > 1)}"
        self._log.info(f"{samples} replaced so far, {count} (bad_image_limit: {self._limit})")
        if len(self._known) > self._limit:
            raise DataError(f"{faults[-1]}; {count}, more than bad_image_limit {self._limit}")


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
