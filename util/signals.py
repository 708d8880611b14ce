"""Signals that ask a run to end: it finishes the step, saves, and says so. A second Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from util.errors import EXIT_CONSEQUENCE, Interrupted, Silenced

Item = TypeVar("Item")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # and SIGHUP, unless it is ignored


def hangup_is_ignored() -> bool:
    """Whether this process was started to go on after its terminal is closed, as by nohup."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def expect_end_by_srun(rank: int, under_srun: bool) -> None:
    """From now on, unless something else is installed, SIGTERM ends srun's processes but the first one silently.

    srun sends it once a process has ended with an error. Their own end by that signal would be srun's status, in place
    of that process's. slurm_train.sh holds the signal back until this is called, while torch is imported.
    """
    if rank > 0 and under_srun:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(EXIT_CONSEQUENCE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


@contextlib.contextmanager
def outside_training(rank: int, under_srun: bool) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGHUP (unless ignored) end the process with one line, having nothing to save.

    `StopSignals` takes precedence.

    Once a process has failed, srun ends the others by SIGTERM, and its own status is the highest of theirs. So those
    end with a lower status than the one that failed. If all get SIGTERM, process 0 ends with that signal's status.
    """

    def end(number: int, _: FrameType | None) -> None:
        StopSignals.unheard = number
        if number == signal.SIGTERM and rank > 0 and under_srun:
            raise Silenced("ended by srun, after another process failed")
        raise Interrupted(number, f"ended by {signal.Signals(number).name} while it was not training: nothing to save")

    before = {number: signal.signal(number, end) for number in _not_ignored(signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        StopSignals.unheard = 0
        for number, handler in before.items():
            if signal.getsignal(number) == end:  # unless `keep_error` has come since
                signal.signal(number, handler)


def keep_error() -> None:
    """From now on those signals only leave their number: this process ends, with an error of its own to show.

    srun sends SIGTERM as soon as another process has ended because of that error.
    """
    for number in _not_ignored(signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, StopSignals.note)


def _not_ignored(*numbers: int) -> list[int]:
    """These signals, and SIGHUP unless it is ignored."""
    return [*numbers, *([] if hangup_is_ignored() else [signal.SIGHUP])]


class StopSignals:
    """While it is entered, SIGINT, SIGTERM, SIGUSR1 and SIGHUP only leave their number in `received` (0: none came).

    SIGHUP stays ignored where it is, as under nohup. A second SIGINT raises KeyboardInterrupt. Works in the main
    thread only, as Python's handlers do. `last` is what any instance received last.
    """

    last = 0
    unheard = 0  # what came before, and Python dropped: out of a finaliser, say, nothing can be raised

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received = StopSignals.unheard
        self._before = {number: signal.signal(number, self._note) for number in _not_ignored(*STOP_SIGNALS)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def cut(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items up to the moment at which a signal comes."""
        for item in items:
            if self.received:
                return
            yield item

    @staticmethod
    def note(number: int, _: FrameType | None) -> None:
        StopSignals.last = number

    def _note(self, number: int, _: FrameType | None) -> None:
        # torchrun passes the first Ctrl-C on as SIGINT, and the second as SIGTERM.
        if self.received == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        self.received = StopSignals.last = number
