"""Saving within an epoch, and ending there when a signal asks for it; what a checkpoint holds."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

from torch import nn

from util.checkpoint import MIDWAY, save_checkpoint
from util.config import to_dict
from util.distributed.collectives import Agreement
from util.distributed.ddp import unwrap
from util.errors import Interrupted, TrainingStopped
from util.run import Run
from util.signals import StopSignals
from util.train.optimizer_step import Update

if TYPE_CHECKING:
    from util.train.step_metrics import StepMetrics

KEPT = "checkpoints of earlier epochs are kept (too high an lr, or data with extreme values, are the usual causes)"


class Midway:
    """Saves within an epoch: every `checkpoint_minutes`, and when a signal asks the run to end.

    `metrics` that are not read yet, those of each process, are saved as well, so that a run that continues logs what
    one without interruption does. `done` says what epochs are done; `steps` is an epoch's length.
    """

    SAVE = 1  # a process's wish; numbers of signals are greater

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        update: Update,
        metrics: StepMetrics,
        done: dict[str, Any],
        steps: int,
        signals: StopSignals,
    ) -> None:
        self._run, self._model, self._update = run, model, update
        self._metrics, self._done, self._steps, self._signals = metrics, done, steps, signals
        self._agreement = Agreement(run.cfg.dist_timeout)
        self._last = metrics.state()  # after an epoch's last step; a run that continues may have no other before it
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the minutes to the next save from now."""
        self._saved = time.monotonic()

    def after_step(self, position: int) -> None:
        """Save if it is time after `position` steps of the epoch. Raises Interrupted if a signal came, after saving."""
        minutes = self._run.cfg.checkpoint_minutes
        wish = self._signals.received
        if not wish and self._run.processes.is_main and minutes and time.monotonic() - self._saved >= 60 * minutes:
            wish = self.SAVE
            self.restart_clock()
        agreed = self._agreement.exchange(wish)
        if position == self._steps:  # nothing is left on its way while the processes evaluate
            agreed = max(agreed, self._agreement.settle())
            self._last = self._metrics.state()
        if agreed:
            self._save(position, agreed, self._metrics.state())

    def stop_if_asked(self) -> None:
        """After the epoch's steps: save and raise Interrupted if a signal came to any process.

        What is saved is the state after the last step, before its metrics were read: they will be logged again.
        """
        agreed = max(self._agreement.exchange(self._signals.received), self._agreement.settle())
        if agreed:
            self._save(self._steps, agreed, self._last)

    def _save(self, position: int, wish: int, metrics: dict[str, Any]) -> None:
        run, epoch = self._run, self._done["epoch"]
        where = f"iteration {position}/{self._steps} of epoch {epoch + 1}"
        check_finite(self._model, where)
        if run.processes.is_main:
            state = checkpoint_state(run, self._model, self._update, self._done)
            state["iteration"] = epoch * self._steps + position
            extra = {"position": position, "metrics": metrics, "processes": run.processes.count}
            save_checkpoint({**state, **extra}, run.save_path / MIDWAY)
        if wish > self.SAVE:
            self._agreement.wait_for_all()  # a launcher may end the others when the first has ended
            raise Interrupted(
                wish,
                f"ended by {signal.Signals(wish).name} after {where}, saved in {run.save_path / MIDWAY}: "
                "the same command continues from there",
            )


def checkpoint_state(run: Run, model: nn.Module, update: Update, done: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "model": unwrap(model).state_dict(),
        **update.state(),
        **done,
        "config": to_dict(run.cfg),
        "run": run.identity,
    }


def check_finite(model: nn.Module, where: str) -> None:
    """Raise TrainingStopped if an update, which no loss has seen yet, broke the weights."""
    broken = [name for name, tensor in unwrap(model).state_dict().items() if not tensor.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise TrainingStopped(f"weights are not finite after {where}: {broken[0]}{more}; {KEPT}")
