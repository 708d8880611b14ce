"""One training step: the method's losses and gradients, then the optimiser, fp16's gradient scaler and the guard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import load_checkpoint_state
from util.checkpoint import load_optimizer
from util.distributed.ddp import no_sync, unwrap
from util.precision import build_scaler
from util.release import without_frozen
from util.run import Run
from util.teacher import Teacher
from util.train.graph import GraphedStep
from util.train.nonfinite import NonFiniteGuard

# A method's step gets a batch on the device and the function that back-propagates a part of the loss. It returns its
# metrics, 0-dim tensors.
TrainStep = Callable[[Any, Callable[[torch.Tensor], None]], dict[str, torch.Tensor]]


class OptimizerStep:
    """The model, its optimiser, and what the config puts around them: everything that a step changes.

    `run` does not wait for the device, but for one case: on several GPUs torch's SyncBatchNorm does, in each forward.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_step: TrainStep,
        teacher: Teacher | None = None,
    ) -> None:
        self.teacher = teacher
        if run.cfg.cuda_graphs:
            train_step = GraphedStep(train_step, model.parameters())
        self.model, self.optimizer, self._train_step, self._log = model, optimizer, train_step, run.log
        self._accumulate = run.cfg.accumulate
        self._scaler = build_scaler(run.cfg, run.device)
        self._left_out: list[torch.Tensor] = []  # one flag per step since the last report
        if self._scaler.is_enabled():
            optimizer.register_step_pre_hook(self._note_left_out)
            _start_momenta(optimizer)
        self._guard = None
        if run.cfg.on_nonfinite == "skip":
            check_gradients = not self._scaler.is_enabled()
            self._guard = NonFiniteGuard([model], optimizer, run.cfg.nonfinite_limit, run.log, check_gradients)

    def run(self, batches: Iterable[Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Take a step on `accumulate` batches that are on the device; its gradient is the mean of theirs.

        Returns its metrics, means over the batches, and whether it was undone (None: no).
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self._guard:
            self._guard.keep()
        rows = []
        for number, batch in enumerate(batches, 1):
            # DDP adds up the processes' gradients once, in the last batch's backward pass.
            with no_sync(self.model) if number < self._accumulate else contextlib.nullcontext():
                rows.append(self._train_step(batch, self._backward))
        metrics = rows[0]
        if len(rows) > 1:
            metrics = {name: torch.stack([row[name] for row in rows]).mean(0) for name in metrics}
        self._scaler.step(self.optimizer)
        self._scaler.update()
        undone = self._guard.undo(metrics.values()) if self._guard else None
        if self.teacher:
            self.teacher.update(self.model, self._did_not_count(undone))
        return metrics, undone

    def report(self, iteration: int) -> None:
        """Log what was left out or undone up to `iteration` (from 1). Raises TrainingStopped beyond nonfinite_limit."""
        if self._left_out and (count := int(torch.stack(self._left_out).sum())):
            steps = f"{count} step{'s' * (count > 1)}"
            self._log.info(
                f"{steps} left out by the gradient scaler, which lowers its scale, up to iteration {iteration}"
            )
        self._left_out.clear()
        if self._guard:
            self._guard.report(iteration)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        scaler = {"scaler": self._scaler.state_dict()} if self._scaler.is_enabled() else {}
        teacher = self.teacher.state_dict() if self.teacher else {}
        return {"model": unwrap(self.model).state_dict(), "optimizer": self.optimizer.state_dict(), **scaler, **teacher}

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Take up what `state` holds. Raises WeightsError or CheckpointError, which name the file `path`."""
        load_checkpoint_state(unwrap(self.model), state, path)
        load_optimizer(self.optimizer, without_frozen(state["optimizer"], unwrap(self.model)), path)
        if "scaler" in state:
            self._scaler.load_state_dict(state["scaler"])
        if self.teacher:
            self.teacher.load_state_dict(state, path)

    def unreported(self) -> dict[str, int]:
        """What `report` has not counted yet, for a mid-epoch checkpoint."""
        return {"undone": self._guard.unreported} if self._guard else {}

    def load_unreported(self, state: dict[str, Any]) -> None:
        """Count what `state` holds in the next report."""
        if self._guard:
            self._guard.unreported = state.get("undone", 0)

    def _backward(self, part: torch.Tensor) -> None:
        self._scaler.scale(part if self._accumulate == 1 else part / self._accumulate).backward()

    def _did_not_count(self, undone: torch.Tensor | None) -> torch.Tensor | None:
        """Whether the guard undid the step or the scaler left it out, a 0-dim bool on the device; None: neither can."""
        if not self._left_out:
            return undone
        left_out = self._left_out[-1].bool().squeeze()
        return left_out if undone is None else left_out | undone

    def _note_left_out(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # An optimiser that takes a scaler, as the fused one does, learns from it whether to leave this step out.
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self._left_out.append(found.detach().clone())


def _start_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Zeros as SGD's momenta before the first step, from which it makes what it would make without any.

    By itself torch allocates them in the first step. Where the scaler leaves that one out, which is common as its scale
    starts high, the fused kernel does not fill them, and the next step would go on from whatever the memory holds.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
