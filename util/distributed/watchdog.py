"""What happens when one process of several fails: the others end soon, and one line names the process and the cause.

The processes report failures through the key-value store at which they met. In each a thread sends a heartbeat every
second, watches that of the next process, and ends its own process once a failure is reported: so nobody waits for a
process that is gone, not even inside a GPU's collective operation, which no exception can interrupt.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from util.distributed.launch import LEFT_OVER, Processes, launcher_keeps_store, local_process_count, master_address
from util.distributed.store import BoundedStore, StoreLost
from util.errors import EXIT_CONSEQUENCE, EXIT_STOPPED, Interrupted, Silenced, TrainingStopped, error_line
from util.signals import StopSignals, keep_error

PERIOD = 1.0  # seconds between two heartbeats
PATIENCE = 6.0  # seconds that a process which lost its connection waits for another one's report
ANSWER = 5.0  # seconds for the store to answer a process that has failed


class Report(NamedTuple):
    """A process's failure, as the others read it."""

    rank: int
    machine: str
    line: str


class Watchdog:
    """Watches this process and the next one, from `start` to `stop`; a process alone needs none.

    A process without a heartbeat for `seconds` has failed, and so has a store that does not answer for as long.
    `on_failure` gets the line about another process's failure, before this process ends.
    """

    watching = False  # whether this process has one that was not stopped

    def __init__(self, processes: Processes, seconds: float, on_failure: Callable[[str], None]) -> None:
        self._rank, self._count, self._seconds = processes.rank, processes.count, seconds
        # Without the store nobody can agree on who reports: then one process of each machine does.
        self._speaks_alone = processes.local_rank == 0 or (processes.rank == 1 and not launcher_keeps_store())
        # Without srun each machine has a terminal of its own, and gets a line of its own.
        self._machine = _machine()
        several = processes.count > local_process_count()
        # torchrun's store ends with the first machine's processes; on one machine torchrun ends all.
        self._store_ends_with_it = several and self._machine == "0" if launcher_keeps_store() else processes.rank == 0
        self._speaks_here = processes.local_rank == 0
        self._on_failure = on_failure
        self._closing, self._stopped, self._failed = (threading.Event() for _ in range(3))
        self._ending, self._telling = threading.Lock(), threading.Lock()
        # Connections of its own, one for each thread: torch's is taken while a collective operation is set up.
        self._thread_store = BoundedStore(*master_address(), seconds)
        self._store = BoundedStore(*master_address(), max(ANSWER, min(seconds, 30)))
        self._prefix = f"failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        """Begin to send heartbeats. A process that has not sent one yet is not missed."""
        Watchdog.watching = True
        self._thread.start()

    def meet(self, value: str, patience: float = 7200) -> list[str]:
        """Wait until all processes have called this: their values, by rank. Raises TrainingStopped after `patience`."""
        self._store.set(f"{self._prefix}here{self._rank}", value)
        values: dict[int, str] = {}
        started, noted = time.monotonic(), False
        while True:
            for rank in range(self._count):
                if rank not in values and (found := self._store.get(f"{self._prefix}here{rank}")) is not None:
                    values[rank] = found
            missing = [rank for rank in range(self._count) if rank not in values]
            if not missing:
                return [values[rank] for rank in range(self._count)]
            waited = time.monotonic() - started
            if waited > patience:
                raise TrainingStopped(f"process {_some(missing)} did not come within {waited / 60:.0f} minutes")
            if waited > 10 and not noted and self._rank == min(values):
                noted = True
                why = "the data are checked first" if 0 in missing else LEFT_OVER
                line = f"note: waiting for process {_some(missing)} of {self._count} to start ({why})"
                print(line, file=sys.stderr, flush=True)
            time.sleep(min(1.0, 0.02 + waited / 10))

    def close(self) -> None:
        """From now on a store that is lost is no failure: its process may have ended before this one."""
        self._closing.set()

    def stop(self) -> None:
        """Stop watching: the process is going to end."""
        Watchdog.watching = False
        self._stopped.set()
        self._thread.join(3 * PERIOD)

    def explain(self, error: BaseException) -> BaseException:
        """What this process ends with after `error`: the error to show, or Silenced where another process shows one.

        The first process that fails by itself shows its error. One that lost its connection waits for that, and shows
        its own error where no other comes within seconds.
        """
        self._failed.set()
        self._store.seconds = ANSWER
        if isinstance(error, (Interrupted, Silenced)):  # all agreed on it, or will learn of it elsewhere
            return error
        keep_error()
        disconnected = _is_disconnection(error)
        try:
            if disconnected:
                self._store.set(f"{self._prefix}disconnected{self._rank}", "")
            # Training stops itself on every process alike: the main one is the one to say so.
            waits = disconnected or (isinstance(error, TrainingStopped) and self._rank > 0)
            if waits and (report := self._wait_for_report()):
                self._tell_here(report)
                return Silenced(report.line)
            if disconnected:
                error = TrainingStopped(self._missing())
            first = self._report(error_line(error))
        except StoreLost as lost:
            if disconnected:
                error = TrainingStopped(self._loss(lost))
            first = not disconnected or self._may_speak_alone()
        if self._store_ends_with_it:
            time.sleep(3 * PERIOD)  # the others read it there
        return error if first else Silenced(error_line(error))

    def _report(self, line: str, store: BoundedStore | None = None) -> bool:
        """Report a failure to the others; whether it is the first one. Otherwise that one is shown on this machine."""
        line = f"{self._rank}:{self._machine}:{line}"
        first = (store or self._store).set_first(self._prefix + "report", line)
        if first != line:
            self._tell_here(_parse(first))
        return first == line

    def _missing(self) -> str:
        """A line about the processes that are missing: those that have not lost a connection themselves."""
        ranks = range(self._count)
        missing = [rank for rank in ranks if self._store.get(f"{self._prefix}disconnected{rank}") is None]
        if not missing:
            return "the connection between the processes is lost"
        return f"process {_some(missing)} hangs or is gone: the others waited for it in vain"

    def _wait_for_report(self) -> Report | None:
        """The failure that another process reports within seconds, or a launcher that ends this one because of it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if report := self._read_report(self._store):
                return report
            if StopSignals.last and launcher_keeps_store():  # torchrun, which says what failed
                return Report(self._rank, self._machine, "ended by the launcher, after another process failed")
            time.sleep(0.1)
        return None

    def _read_report(self, store: BoundedStore) -> Report | None:
        """The failure that is reported."""
        text = store.get(self._prefix + "report")
        return None if text is None else _parse(text)

    def _tell_here(self, report: Report) -> None:
        """Show another machine's failure on this one's terminal, once."""
        if self._speaks_here and report.machine != self._machine and self._telling.acquire(blocking=False):
            print(f"error: {report.line}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """The thread: heartbeats, the next process's heartbeats, and failures reported."""
        other, last, missed, number = (self._rank + 1) % self._count, None, 0, 0
        limit = max(2, round(self._seconds / PERIOD))
        store = self._thread_store
        try:
            while True:
                store.set(f"{self._prefix}{self._rank}", str(number))
                number += 1
                report = self._read_report(store)
                if report and report.rank != self._rank and not self._failed.wait(PERIOD):
                    self._tell_here(report)
                    self._end(report.line)
                heartbeat = store.get(f"{self._prefix}{other}")
                # Counted, not timed: where all were suspended together nobody has missed anything.
                missed = missed + 1 if heartbeat == last and heartbeat is not None else 0
                last = heartbeat
                # A process that has failed itself speaks elsewhere.
                if missed >= limit and not self._failed.is_set():
                    line = (
                        f"process {other} sent no heartbeat for {missed * PERIOD:.0f} s (dist_timeout): it was killed "
                        "or stopped, or its machine or network is gone"
                    )
                    self._end(line, speak=self._report(line, store))
                if self._stopped.wait(PERIOD):
                    return
        except StoreLost as lost:
            # No process can be reached any more. One that has failed itself speaks elsewhere, if it still can.
            if not self._closing.is_set() and not self._failed.wait(3 * PERIOD):
                speak = self._may_speak_alone()
                if speak or not self._failed.is_set():
                    self._end(self._loss(lost), speak)

    def _may_speak_alone(self) -> bool:
        """Whether this process reports that the store is lost: of those on a machine one does, once."""
        return self._speaks_alone and self._ending.acquire(blocking=False)

    def _loss(self, lost: StoreLost) -> str:
        """What to say when the store is lost."""
        address, port = master_address()
        keeper = f"torchrun on {address}" if launcher_keeps_store() else "process 0"
        if lost.answered:
            return f"{keeper}, which held the processes together at port {port}, is gone: it was killed or has failed"
        return (
            f"{keeper} has not answered at {address}:{port} for {self._seconds:.0f} s (dist_timeout): its machine or "
            "the network in between is gone"
        )

    def _end(self, line: str, speak: bool = False) -> None:
        """End this process."""
        try:
            if speak:
                print(f"error: {line}", file=sys.stderr, flush=True)
            self._on_failure(line)
        finally:
            os._exit(EXIT_STOPPED if speak else EXIT_CONSEQUENCE)


def _machine() -> str:
    """Which terminal this machine has: torchrun's number of it, or its name; srun has one terminal for all."""
    if launcher_keeps_store():
        return os.environ.get("GROUP_RANK", "0")
    return socket.gethostname() if os.environ.get("RANK") else "0"


def _parse(text: str) -> Report:
    """A report as it is in the store."""
    rank, machine, line = text.split(":", 2)
    return Report(int(rank), machine, f"process {rank}: {line}")


def _some(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown


def _is_disconnection(error: Exception) -> bool:
    """Whether an operation between processes failed because another one is gone; torch has no one type for that."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")
    by_torch = isinstance(error, RuntimeError) and not isinstance(error, TrainingStopped)
    return isinstance(error, StoreLost) or (by_torch and any(word in text for word in words))
