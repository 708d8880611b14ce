"""What a run tells: lines on screen and in `train.log`, a progress bar on a terminal, curves in TensorBoard.

Every process has a log; that of the main process writes, the others' are mute.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.errors import SavePathError
from util.lock import check_lock
from util.run_files import LOG_FILE


class RunLog:
    """Lines, bars and curves of one run in `save_path`; mute unless `active`. Use it as a context manager."""

    def __init__(self, save_path: Path, active: bool, first_step: int = 0) -> None:
        self.active = active
        self._folder = save_path
        self.interactive = active and sys.stderr.isatty()
        if not active:
            return
        with self._writing(LOG_FILE):
            self._file = open(save_path / LOG_FILE, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        with self._writing("TensorBoard's file"):
            # Curves of an interrupted run: what it wrote from `first_step` on, beyond its checkpoint, is hidden.
            self._writer = SummaryWriter(str(save_path), purge_step=first_step)
        threading.excepthook = _leave_writing_to_us

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:  # the entry script tells it on screen
            self.stopped(str(error) or kind.__name__)
        if self.active:
            with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
                self._file.close()
                self._writer.close()

    def stopped(self, reason: str) -> None:
        """Keep the reason why the run ends, in the file; where the disk is full it goes on screen only."""
        with contextlib.suppress(SavePathError):
            self._write(f"stopped: {reason}", on_screen=False)

    def info(self, text: str) -> None:
        """A line (or several) on screen and in the file."""
        self._write(text, on_screen=True)

    def progress(self, text: str) -> None:
        """A line in the file, and on screen where no bar is shown."""
        self._write(text, on_screen=not self.interactive)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points of TensorBoard curves, on their way to the disk at once: a run that is killed has them."""
        if self.active:
            check_lock(self._folder)
            with self._writing("TensorBoard's file"):
                for tag, value in values.items():
                    self._writer.add_scalar(tag.encode("utf-8", "backslashreplace").decode(), value, step)
                self._writer.flush()

    def bar(self, total: int, title: str) -> tqdm:
        """A progress bar over an epoch's iterations; invisible unless on a terminal."""
        return tqdm(total=total, desc=title, disable=not self.interactive, dynamic_ncols=True, leave=False)

    def _write(self, text: str, on_screen: bool) -> None:
        if not self.active:
            return
        check_lock(self._folder)
        with self._writing(LOG_FILE):
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}", file=self._file, flush=True)
        if on_screen:
            tqdm.write(text)
            sys.stdout.flush()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Raises SavePathError if the disk refuses."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise SavePathError(
                f"{self._folder}: {name} cannot be written ({reason}); checkpoints are intact"
            ) from None


def _leave_writing_to_us(fault: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread shows a traceback of what the disk refuses, though the next call to the writer raises it."""
    if not (isinstance(fault.exc_value, OSError) and type(fault.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(fault)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): of tensors on a GPU since the last call, else of this process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
