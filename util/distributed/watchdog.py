"""What happens when one process of several fails: the others end soon, and one error names the process and the cause.

The processes tell faults through the key-value store at which they met. A thread of each says every second that its
process is alive, watches the next process, and ends its own when any has told a fault: so nobody waits for a process
that is gone, not even within a GPU's collective operation, which no exception can interrupt.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from util.errors import EXIT_CONSEQUENCE, EXIT_STOPPED, Interrupted, Silenced, TrainingStopped, error_line
from util.signals import StopSignals

GONE = "the process that held the others together (torchrun, or else the first one) is gone"
PERIOD = 1.0  # seconds between two signs of life
PATIENCE = 10.0  # seconds that a process which lost another one waits for the fault to be told


class Watch:
    """Watches over this process and the next one, from `start` to `stop`; alone a process has nothing to watch.

    `seconds` without a sign of life mean that a process has failed. `on_fault` gets the line that tells another
    process's fault, before this process ends.
    """

    def __init__(self, rank: int, count: int, seconds: float, on_fault: Callable[[str], None]) -> None:
        self._rank, self._count, self._limit = rank, count, max(2, round(seconds / PERIOD))
        self._on_fault = on_fault
        self._stopped, self._failed = threading.Event(), threading.Event()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: that of torch is taken while a collective operation is being set up.
        timeout = timedelta(seconds=30)
        self._store, self._main_store = (
            dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout) for _ in range(2)
        )
        self._prefix = f"fault/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")

    def start(self) -> None:
        """Begin to give signs of life; call it on all processes."""
        self._beat(0)
        self._thread.start()

    def stop(self) -> None:
        """End watching, as the process will be gone soon."""
        self._stopped.set()
        self._thread.join()

    def settle(self, error: Exception) -> Exception:
        """What this process ends with after `error`: the error, to be told on screen, or Silenced.

        One process tells its error: the first whose own it is. One that lost the connection to another waits for that
        one's error, and tells its own where none comes within seconds.
        """
        self._failed.set()
        if isinstance(error, Interrupted):  # all agreed on it
            return error
        lost = _is_lost_connection(error)
        if lost:
            with contextlib.suppress(RuntimeError):
                self._main_store.set(f"{self._prefix}lost{self._rank}", "")
        # Training stops itself on every process alike: the main one is the one to say so.
        if lost or (isinstance(error, TrainingStopped) and self._rank > 0):
            fault = self._wait_for_fault()
            if fault is not None:
                return Silenced(fault)
        if lost:
            error = TrainingStopped(f"{self._missing()} ({_first_line(error)})")
        first = self._tell(error_line(error))
        if self._rank == 0 and not _launcher_keeps_store():
            time.sleep(3 * PERIOD)  # the others read it in this process's store
        return error if first else Silenced(error_line(error))

    def _tell(self, line: str) -> bool:
        """Tell the others a fault; whether it is the first that is told."""
        try:
            told = self._main_store.compare_set(self._prefix + "told", "", f"{self._rank}:{line}")
        except RuntimeError:  # the store is gone with its process
            return self._speaks_without_store()
        return told.decode() == f"{self._rank}:{line}"

    def _missing(self) -> str:
        """Which processes others waited for in vain: those that have not found out as well."""
        try:
            others = range(self._count)
            missing = [rank for rank in others if not self._main_store.check([f"{self._prefix}lost{rank}"])]
        except RuntimeError:
            missing = []
        if not missing:
            return "the connection among the processes is lost"
        return f"process {', '.join(map(str, missing))} hangs or is gone: the others waited for it in vain"

    def _wait_for_fault(self) -> str | None:
        """The fault that another process tells within seconds, or a launcher that ends this one because of it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if self._main_store.check([self._prefix + "told"]):
                    rank, _, line = self._main_store.get(self._prefix + "told").decode().partition(":")
                    return f"process {rank}: {line}"
            except RuntimeError:
                return None if self._speaks_without_store() else GONE
            if StopSignals.last:
                return "ended by the launcher, after another process failed"
            time.sleep(0.1)
        return None

    def _look(self) -> None:
        """The thread: signs of life, the next process's signs, and faults told."""
        other, last, missed, number = (self._rank + 1) % self._count, None, 0, 0
        try:
            while not self._stopped.wait(PERIOD):
                number += 1
                self._beat(number)
                if self._store.check([self._prefix + "told"]):
                    rank, _, line = self._store.get(self._prefix + "told").decode().partition(":")
                    if int(rank) != self._rank and not self._failed.wait(PERIOD):
                        self._end(f"process {rank}: {line}")
                key = f"{self._prefix}{other}"
                sign = self._store.get(key) if self._store.check([key]) else None
                # Counted, not timed: where all were suspended together nobody has missed anything.
                missed = missed + 1 if sign == last else 0
                last = sign
                # A process that has failed itself speaks elsewhere.
                if missed >= self._limit and not self._failed.is_set():
                    line = (
                        f"process {other} has given no sign of life for {missed * PERIOD:.0f} s (dist_timeout): it was "
                        "killed or stopped, or its machine or network is gone"
                    )
                    if self._tell(line):
                        print(f"error: {line}", file=sys.stderr, flush=True)
                        self._end(line, EXIT_STOPPED)
                    self._end(line)
        except RuntimeError:
            # Nobody can be told any more. Under torchrun the store belongs to the launcher, else to the first process.
            if not self._stopped.is_set() and not self._failed.wait(3 * PERIOD):
                if self._speaks_without_store():
                    print(f"error: {GONE}", file=sys.stderr, flush=True)
                self._end(GONE)

    def _speaks_without_store(self) -> bool:
        return self._rank == (0 if _launcher_keeps_store() else 1)

    def _beat(self, number: int) -> None:
        self._store.set(f"{self._prefix}{self._rank}", str(number))

    def _end(self, line: str, status: int = EXIT_CONSEQUENCE) -> None:
        try:
            self._on_fault(line)
        finally:
            os._exit(status)


def _launcher_keeps_store() -> bool:
    """Whether the store is torchrun's; otherwise it is the first process's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_lost_connection(error: Exception) -> bool:
    """Whether an operation among processes failed for want of another one; torch has no one type for that."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
