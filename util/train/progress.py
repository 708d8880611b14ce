"""How far a run has come: the epochs and steps done, and the best mIoU so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """`epoch` epochs are done, and `position` of the `steps` of the next one. mIoU is in percent."""

    steps: int
    epoch: int = 0
    position: int = 0
    previous_best: float = -math.inf
    best_epoch: int = 0
    last_miou: float = math.nan

    @property
    def iteration(self) -> int:
        """The steps done, over all epochs."""
        return self.epoch * self.steps + self.position

    def finish_epoch(self, miou: float | None) -> bool:
        """Count an epoch, whose evaluation gave `miou` (None: it had none). Returns whether this is the best so far."""
        self.epoch, self.position = self.epoch + 1, 0
        if miou is None:
            return False
        self.last_miou = miou
        improved = miou > self.previous_best
        if improved:
            self.previous_best, self.best_epoch = miou, self.epoch
        return improved

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint's keys; only one from within an epoch has a `position`."""
        names = ("epoch", "iteration", "previous_best", "best_epoch", "last_miou")
        state = {name: getattr(self, name) for name in (*names, "steps")}
        return {**state, "position": self.position} if self.position else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the place where `state` was saved; `steps` stays, so `iteration` is counted in today's epochs."""
        for name in ("epoch", "position", "previous_best", "best_epoch", "last_miou"):
            setattr(self, name, state.get(name, getattr(self, name)))
