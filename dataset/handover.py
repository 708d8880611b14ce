"""A DataLoader that ends with one line where a loading process cannot hand its batch over, and waits no longer."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from dataset.errors import DataError, one_line

SHARED_MEMORY = Path("/dev/shm")
SECONDS = 1800  # without a batch, after which the loading processes have failed
CHECK = 30  # seconds between two looks at whether they live; torch looks after each time-out only
PINNING_ENDED = "the thread that takes their batches and pins them ended with the error above"
WAY_OUT = (
    "lower workers or prefetch, give a container more shared memory by --shm-size, raise the limit on open files "
    "(ulimit -n), set TMPDIR to a folder with a short path that can be written to, or set workers: 0"
)


class HandingLoader(DataLoader):
    """A DataLoader that says in one line why its loading processes give no more batches. Raises DataError."""

    def __iter__(self) -> Iterator[Any]:
        batches, waited, said = self._start(), 0.0, False
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except DataError:
                raise
            except (RuntimeError, OSError, EOFError) as error:
                timed_out = "DataLoader timed out" in str(error)
                if timed_out and _pinning_ended(batches):
                    raise DataError(f"loading processes: {PINNING_ENDED}; {WAY_OUT}") from None
                if timed_out and waited + self.timeout < SECONDS:
                    waited += self.timeout  # they all live; the next call goes on waiting for the same batch
                    if not said:
                        line = f"note: no batch came for {waited:g} s: still waiting for the loading processes"
                        print(f"{line}, {SECONDS} s at most", file=sys.stderr, flush=True)
                        said = True
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


def _pinning_ended(batches: Iterator[Any]) -> bool:
    """Whether torch's thread that pins the batches is gone, at which torch looks only if there is no time-out."""
    thread = getattr(batches, "_pin_memory_thread", None)
    return thread is not None and not thread.is_alive()


def check_handover(workers: int) -> None:
    """Raise DataError if there are to be loading processes, but no shared memory for the locks between them."""
    if workers:
        try:
            multiprocessing.Lock()
        except OSError as error:
            raise _no_start(error) from None


@contextlib.contextmanager
def starting(name: str) -> Iterator[None]:
    """Around the start of a tool's processes: what the system refuses is a DataError."""
    try:
        yield
    except OSError as error:
        raise _no_start(error, name, "--workers 1 needs none") from None


def check_temporary_folder() -> None:
    """Raise DataError where there is no folder for temporary files."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise DataError("no folder for temporary files can be written to: set TMPDIR to one that can") from None


def _no_start(error: OSError, name: str = "loading processes", way_out: str = WAY_OUT) -> DataError:
    """The fault of processes that the system refuses to start."""
    where = "" if os.access(SHARED_MEMORY, os.W_OK) else f"{SHARED_MEMORY} cannot be written to: "
    return DataError(f"{name}: they cannot be started: {where}{error.strerror or error}; {way_out}")


def handover_fault(error: Exception) -> str | None:
    """Why no batch comes, if `error` is torch's or the system's about the way between the processes."""
    text = str(error)
    if "killed by signal: Bus error" in text or "shared memory" in text or "/torch_" in text:
        return "/dev/shm, the shared memory in which batches travel, is full or cannot be used"
    if "DataLoader worker" in text and "killed by signal" in text:
        return "one was killed, perhaps because memory ran out"
    if "DataLoader worker" in text and "exited unexpectedly" in text:
        return "one could not hand its batch over, or was killed"
    if "DataLoader timed out" in text:
        return f"none gave a batch for {SECONDS} s"
    if "Too many open files" in text or "items of ancillary data" in text:
        return "too many open files"
    if "in DataLoader worker process" in text:  # an error of the data's own
        return None
    if isinstance(error, (ConnectionError, EOFError)):
        return "one broke off while it handed its batch over; it may have been killed"
    if isinstance(error, FileNotFoundError):
        return "a socket of theirs in the folder for temporary files is gone"
    return None


def give_up_where_nothing_can_be_handed_over() -> None:
    """In a loading process: end where a batch cannot be sent, for which the training process would wait for ever."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)


def _give_up(error: Exception, _: Any) -> None:
    print(f"note: a loading process cannot hand its batch over: {one_line(error)}", file=sys.stderr, flush=True)
    os._exit(1)
