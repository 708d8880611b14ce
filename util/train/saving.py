"""When a checkpoint is written and what it holds: after each epoch, within one, and when a signal ends the run."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
from torch import nn

from model import read_checkpoint
from util.checkpoint import save_checkpoint, save_epoch
from util.config import to_dict
from util.distributed.collectives import DelayedMax, all_reduce_sum, gather
from util.distributed.ddp import unwrap
from util.errors import EARLIER_KEPT, CheckpointError, Interrupted, TrainingStopped
from util.resume import as_ours
from util.run import Run
from util.run_files import MID_EPOCH
from util.signals import StopSignals
from util.train.optimizer_step import OptimizerStep
from util.train.progress import Progress
from util.train.step_metrics import StepMetrics


class Saver:
    """Writes a run's checkpoints, and loads the one that it continues from.

    A mid-epoch checkpoint is written every `checkpoint_minutes`, and when a signal asks the run to end. It also holds
    what has not been logged yet, so that a resumed run logs what an uninterrupted one does.
    """

    SAVE = 1  # what a process asks for: this or, to end as well, a signal's number more (SIGHUP's is 1)

    def __init__(
        self, run: Run, step: OptimizerStep, metrics: StepMetrics, progress: Progress, signals: StopSignals
    ) -> None:
        self._run, self._step, self._metrics, self._progress, self._signals = run, step, metrics, progress, signals
        self._requests = DelayedMax()
        self._unlogged: dict[str, Any] = {}  # after an epoch's last step, before it is logged
        self._saved: tuple[int, int] | None = None  # epoch and position of the mid-epoch checkpoint
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Load the run's checkpoint, if there is one, and say where training stands."""
        run, progress = self._run, self._progress
        state = None
        if run.checkpoint and run.checkpoint.exists():  # the main process has read it
            state = as_ours(read_checkpoint(run.checkpoint), run.cfg, run.identity, progress.steps)
        iterations = gather(torch.tensor(state["iteration"] if state else 0, device=run.device))
        if len(iterations.unique()) > 1:
            raise CheckpointError(
                f"{run.save_path}: the processes see different checkpoints there (after {iterations.tolist()} "
                "iterations): it must be one folder on all machines"
            )
        if state is None:
            return
        self._step.load_state_dict(state, run.checkpoint)
        progress.load_state_dict(state)
        if run.checkpoint.name == MID_EPOCH:
            self._saved = progress.epoch, progress.position
        if metrics := state.get("metrics"):
            self._metrics.load_state_dict(metrics, run.processes.rank, run.device)
            # Earlier versions did not save the number of undone steps, only the rows' flags.
            undone = 0 if metrics["rows"] is None else int(metrics["rows"][0, :, -1].sum())
            self._step.load_unreported({"undone": undone, **state})
        self._unlogged = self._collect_unlogged()  # the run may take no other step before it evaluates
        within = f" and {progress.position} of {progress.steps} iterations of the next" if progress.position else ""
        best = f"best mIoU {progress.previous_best:.2f}" if progress.best_epoch else "none was evaluated"
        run.log.info(
            f"continuing from {run.checkpoint}: {progress.epoch} of {run.cfg.epochs} epochs are done{within}, {best}"
        )
        if state["iteration"] != progress.iteration:
            run.log.info(
                f"note: an epoch had {state['iteration'] // progress.epoch} iterations and has {progress.steps} now, "
                "since the number of processes changed; the schedule goes on from the same epoch"
            )

    def save_epoch(self, improved: bool) -> None:
        """Save after an epoch; as the best one too if it `improved`."""
        if self._run.processes.is_main:
            save_epoch(self._state(), self._run.save_path, improved, self._run.cfg.keep_last)
        self._saved_at = time.monotonic()

    def after_step(self) -> None:
        """Save within the epoch if it is time to. If a signal came to any process, save and raise Interrupted."""
        minutes = self._run.cfg.checkpoint_minutes
        request = self._asked_to_end()
        if (
            not request
            and self._run.processes.is_main
            and minutes
            and time.monotonic() - self._saved_at >= 60 * minutes
        ):
            request = self.SAVE
            self._saved_at = time.monotonic()
        agreed = self._requests.reduce(request)
        if self._progress.position == self._progress.steps:
            # No request may be pending while the processes evaluate.
            agreed = max(agreed, self._requests.finish())
            self._unlogged = self._collect_unlogged()
        if agreed:
            self._save_mid_epoch(agreed, self._collect_unlogged())

    def stop_if_asked(self) -> None:
        """After the epoch's evaluation: if a signal came to any process, save and raise Interrupted.

        The state saved is that of the last step before its metrics were logged: a resumed run logs them again.
        """
        agreed = max(self._requests.reduce(self._asked_to_end()), self._requests.finish())
        if agreed:
            self._save_mid_epoch(agreed, self._unlogged)

    def _asked_to_end(self) -> int:
        return self.SAVE + self._signals.received if self._signals.received else 0

    def _state(self) -> dict[str, Any]:
        """A checkpoint: weights, optimiser and progress, and the settings and lists that they belong to."""
        return {
            **self._step.state_dict(),
            **self._progress.state_dict(),
            "config": to_dict(self._run.cfg),
            "run": self._run.identity,
            "processes": self._run.processes.count,
        }

    def _collect_unlogged(self) -> dict[str, Any]:
        return {"metrics": self._metrics.state_dict(), **self._step.unreported()}

    def _save_mid_epoch(self, request: int, unlogged: dict[str, Any]) -> None:
        run, progress = self._run, self._progress
        where = f"iteration {progress.position}/{progress.steps} of epoch {progress.epoch + 1}"
        check_finite(self._step.model, where)
        place = progress.epoch, progress.position
        # Not the same again: a job whose evaluation is longer than its time limit would seem to make progress.
        if run.processes.is_main and place != self._saved:
            save_checkpoint({**self._state(), **unlogged}, run.save_path / MID_EPOCH)
            self._saved = place
        if request > self.SAVE:
            all_reduce_sum(torch.zeros(1))  # all have come: a launcher may end the others as soon as the first one ends
            number = request - self.SAVE
            raise Interrupted(
                number,
                f"ended by {signal.Signals(number).name} after {where}, saved in {run.save_path / MID_EPOCH}: "
                "the same command continues from there",
            )


def check_finite(model: nn.Module, where: str) -> None:
    """Raise TrainingStopped if weights or statistics are not finite: no loss has seen the last update yet."""
    broken = [name for name, tensor in unwrap(model).state_dict().items() if not tensor.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise TrainingStopped(f"weights are not finite after {where}: {broken[0]}{more}; {EARLIER_KEPT}")
