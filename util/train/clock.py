"""Training speed, time spent waiting for data, and time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any


class Clock:
    """Speed, share of time spent waiting for data, and what is left."""

    def __init__(self, steps: int, epochs: int, first_epoch: int, position: int = 0) -> None:
        self._total, self._first = steps * epochs, steps * first_epoch + position
        self._start = self._lap_start = time.perf_counter()
        self._lap_iteration, self._waited = self._first, 0.0

    def waits(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, with the time that each was waited for."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def lap(self, iteration: int, images: int) -> str:
        """`iteration` steps are done, each of `images` images: speed since the last lap, and the time to the end."""
        now = time.perf_counter()
        seconds = max(now - self._lap_start, 1e-9)
        speed = (iteration - self._lap_iteration) * images / seconds
        # Right after continuing no step is done yet: nothing is known of the time that one takes.
        left = (now - self._start) / max(iteration - self._first, 1) * (self._total - iteration)
        text = f"{speed:.1f} images/s  data {100 * self._waited / seconds:.0f}%  ETA {timedelta(seconds=round(left))}"
        self._lap_start, self._lap_iteration, self._waited = now, iteration, 0.0
        return text
