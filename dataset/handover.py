"""Loading processes that cannot hand their batch over: one line instead of a traceback or a wait without end."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from dataset.errors import DataError

SHARED_MEMORY = Path("/dev/shm")
SECONDS = 1800  # without a batch, after which the loading processes have failed
CHECK = 30  # seconds between two looks at whether they live; torch looks after each time-out only
WAY_OUT = (
    "lower workers or prefetch, give a container more shared memory by --shm-size, raise the limit on open files "
    "(ulimit -n), or set workers: 0"
)


class HandingLoader(DataLoader):
    """A DataLoader that says in one line why its loading processes give no more batches. Raises DataError."""

    def __iter__(self) -> Iterator[Any]:
        batches, waited = self._start(), 0.0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except DataError:
                raise
            except (RuntimeError, OSError) as error:
                if "DataLoader timed out" in str(error) and waited + self.timeout < SECONDS:
                    waited += self.timeout  # they all live; the next call goes on waiting for the same batch
                    continue
                reason = handover_fault(error) if self.num_workers else None
                if reason is None:
                    raise
                raise DataError(f"loading processes: {reason}; {WAY_OUT}") from None
            waited = 0.0
            yield batch

    def _start(self) -> Iterator[Any]:
        check_handover(self.num_workers)  # torch's iterator, half made, would complain
        try:
            return super().__iter__()
        except OSError as error:
            raise (_no_start(error) if self.num_workers else error) from None


def check_handover(workers: int) -> None:
    """Raise DataError if there are to be loading processes, but no shared memory for the locks between them."""
    if workers:
        try:
            multiprocessing.Lock()
        except OSError as error:
            raise _no_start(error) from None


def _no_start(error: OSError) -> DataError:
    where = "" if os.access(SHARED_MEMORY, os.W_OK) else f"{SHARED_MEMORY} cannot be written to: "
    return DataError(f"loading processes: they cannot be started: {where}{error.strerror or error}; {WAY_OUT}")


def handover_fault(error: Exception) -> str | None:
    """Why no batch comes, if `error` is torch's or the system's about the way between the processes."""
    text = str(error)
    if "killed by signal: Bus error" in text or "shared memory" in text or "/torch_" in text:
        return "/dev/shm, the shared memory in which batches travel, is full or cannot be used"
    if "DataLoader worker" in text and "killed by signal" in text:
        return "one was killed, perhaps for want of memory"
    if "DataLoader worker" in text and "exited unexpectedly" in text:
        return "one could not hand its batch over, or was killed"
    if "DataLoader timed out" in text:
        return f"none gave a batch for {SECONDS} s"
    if "Too many open files" in text:
        return "too many open files"
    return None


def give_up_where_nothing_can_be_handed_over() -> None:
    """In a loading process: end where a batch cannot be sent, for which the training process would wait for ever."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))
