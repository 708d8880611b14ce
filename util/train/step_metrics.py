"""Means of the steps' metrics, which stay on the device until they are logged."""

from __future__ import annotations

from typing import Any

import torch

from util.distributed.collectives import all_reduce_sum, gather, process_count
from util.errors import EARLIER_KEPT, TrainingStopped


class StepMetrics:
    """One row of 0-dim metrics per step, kept on the device. The host waits for it in `read` and `state_dict` only."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._first, self._names = 0, ()

    def append(self, iteration: int, metrics: dict[str, torch.Tensor], undone: torch.Tensor | None = None) -> None:
        """Keep the metrics of step `iteration` (from 0), which follows the one before.

        `undone`: 0-dim bool; if true the step does not count, and its metrics may be anything.
        """
        if not self._rows:
            self._first, self._names = iteration, tuple(metrics)
        values = [metrics[name].float() for name in self._names]
        flag = torch.zeros_like(values[0]) if undone is None else undone.float()
        self._rows.append(torch.stack([*values, flag]))

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reading and over all processes; undone steps are left out.

        Empty if no step counted. Raises TrainingStopped, on every process, if a value of a step that counts is not
        finite.
        """
        rows = all_reduce_sum(torch.stack(self._rows)) / process_count()
        self._rows = []
        *columns, flag = rows.cpu().unbind(1)
        values, counts = torch.stack(columns, dim=1), flag != 1
        broken = ~values.isfinite() & counts[:, None]
        if broken.any():
            step = int(broken.any(dim=1).nonzero()[0])
            terms = ", ".join(f"{name} {values[step, i]:.4g}" for i, name in enumerate(self._names) if broken[step, i])
            raise TrainingStopped(
                f"the loss is not finite at iteration {self._first + step + 1}: {terms}; {EARLIER_KEPT}"
            )
        if not counts.any():
            return {}
        return dict(zip(self._names, values[counts].double().mean(dim=0).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What is not read yet, of all processes, for a checkpoint. `rows` is (processes, steps, names and flag)."""
        rows = gather(torch.stack(self._rows)).cpu() if self._rows else None
        return {"first": self._first, "names": list(self._names), "rows": rows}

    def load_state_dict(self, state: dict[str, Any], rank: int, device: torch.device) -> None:
        """Go on from where `state` was taken."""
        self._first, self._names = state["first"], tuple(state["names"])
        if state["rows"] is None:
            self._rows = []
            return
        # With another number of processes each has their mean.
        rows = state["rows"] if len(state["rows"]) == process_count() else state["rows"].mean(0, keepdim=True)
        self._rows = list(rows[rank % len(rows)].to(device))
