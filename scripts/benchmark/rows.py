"""One line of the benchmark: timing two ways in turn, and saying how their results compare."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One comparison: measurements of the naive way and of this project's, in `unit`."""

    name: str
    naive: list[float]
    ours: list[float]
    unit: str
    equality: str

    @property
    def ratio(self) -> float:
        """How many times as much the naive way takes, by the medians."""
        return statistics.median(self.naive) / statistics.median(self.ours)


def alternate(naive_way: Callable[[], Any], our_way: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each way, one after the other in turn, after one unmeasured call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for measured in range(-1, rounds):
        for way, seconds in zip((naive_way, our_way), times, strict=True):
            started = time.perf_counter()
            way()
            if measured >= 0:
                seconds.append(time.perf_counter() - started)
    return times


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch inside the `with`."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def line(row: Row) -> str:
    """One line of the printed table."""
    ways = "  ".join(_figure(values, row.unit) for values in (row.naive, row.ours))
    return f"{row.name:<58} {ways}  {row.ratio:5.2f} x  {row.equality}"


def _figure(values: Sequence[float], unit: str) -> str:
    """The median and, in brackets, the middle half."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return f"{statistics.median(values):8.3g} {unit} [{low:.3g}, {high:.3g}]"


def verdict(same: bool) -> str:
    """How two results compare that should be equal."""
    return "equal" if same else "NOT EQUAL"


def relative_difference(expected: torch.Tensor, found: torch.Tensor) -> str:
    """How two results compare that should be close."""
    return f"differ by {((expected - found).norm() / expected.norm()).item():.1e} of their norm"
