"""Training speed, time spent waiting for data, and time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple


class Lap(NamedTuple):
    """Images per second and the share of time spent waiting for data since the last lap, and the seconds left."""

    speed: float
    waiting: float
    left: float

    def __str__(self) -> str:
        left = timedelta(seconds=round(self.left))
        return f"{self.speed:.1f} images/s  data {100 * self.waiting:.0f}%  ETA {left}"


class Clock:
    """Times a run that has done `done` of its `total` steps."""

    def __init__(self, done: int, total: int) -> None:
        self._first, self._total = done, total
        self._start = self._lap_start = time.perf_counter()
        self._lap_iteration, self._waited = done, 0.0

    def time_waits(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches and add up the time that each was waited for."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def lap(self, done: int, images: int) -> Lap:
        """What happened since the last lap; `done` steps are done by now, each of `images` images."""
        now = time.perf_counter()
        seconds = max(now - self._lap_start, 1e-9)
        speed = (done - self._lap_iteration) * images / seconds
        # Right after resuming no step is done yet, and the time left is unknown: it shows as 0.
        left = (now - self._start) / max(done - self._first, 1) * (self._total - done)
        lap = Lap(speed, self._waited / seconds, left)
        self._lap_start, self._lap_iteration, self._waited = now, done, 0.0
        return lap
