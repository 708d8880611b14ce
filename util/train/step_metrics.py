"""Metrics of the training steps, kept on the device until they are read."""

from __future__ import annotations

from typing import Any

import torch

from util.distributed.collectives import all_reduce_sum, gather, process_count
from util.errors import TrainingStopped
from util.train.nonfinite import SKIPPED
from util.train.saving import KEPT


class StepMetrics:
    """0-dim metrics of each step, kept on the device; reading them is the only time the host waits for it."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._first, self._names = 0, ()

    def append(self, iteration: int, metrics: dict[str, torch.Tensor]) -> None:
        """Keep the metrics of step `iteration`; steps come one after the other. Among them may be `skipped`."""
        names = tuple(name for name in metrics if name != SKIPPED)
        row = [metrics[name] for name in names] + [metrics.get(SKIPPED, torch.zeros_like(metrics[names[0]]))]
        if not self._rows:
            self._first, self._names = iteration, names
        self._rows.append(torch.stack([value.float() for value in row]))

    def state(self) -> dict[str, Any]:
        """What is kept, of all processes, for a checkpoint; `load_state` takes it."""
        rows = gather(torch.stack(self._rows)).cpu() if self._rows else None
        return {"first": self._first, "names": list(self._names), "rows": rows}

    def load_state(self, state: dict[str, Any], rank: int, device: torch.device) -> None:
        """Go on from where `state` was taken."""
        self._first, self._names = state["first"], tuple(state["names"])
        self._rows = [] if state["rows"] is None else list(state["rows"][rank].to(device))

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reading and over all processes.

        Steps that the guard has undone are left out; `skipped` is their number, if there are any.
        Raises TrainingStopped, on every process alike, if a value of any other step was not finite.
        """
        rows = all_reduce_sum(torch.stack(self._rows)) / process_count()
        self._rows = []
        *columns, skipped = rows.cpu().unbind(1)
        values, undone = torch.stack(columns, dim=1), skipped == 1
        finite = values.isfinite() | undone[:, None]
        if not finite.all():
            step = int((~finite.all(dim=1)).nonzero()[0])
            terms = ", ".join(
                f"{name} {values[step, i]:.4g}" for i, name in enumerate(self._names) if not finite[step, i]
            )
            raise TrainingStopped(f"the loss is not finite at iteration {self._first + step + 1}: {terms}; {KEPT}")
        if undone.all():
            return {SKIPPED: float(len(undone))}
        means = dict(zip(self._names, values[~undone].double().mean(dim=0).tolist(), strict=True))
        return means | ({SKIPPED: float(undone.sum())} if undone.any() else {})
