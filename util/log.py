"""What a run reports: lines on screen and in `train.log`, a progress bar on a terminal, curves and pictures to loggers.

Every process has a log; that of the main process writes, the others' are mute.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dataset.errors import one_line
from util.errors import SavePathError
from util.lock import check_lock
from util.loggers import Logger, Place, open_logger
from util.run_files import LOG_FILE


class RunLog:
    """Lines, bars and curves of one run in `save_path`; mute unless `active`. Use it as a context manager.

    `loggers` are names of util/loggers.py, which get the curves and pictures; `hyperparameters` head them.
    """

    def __init__(
        self,
        save_path: Path,
        active: bool,
        first_step: int = 0,
        loggers: Sequence[str] = ("tensorboard",),
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.active = active
        self._folder = save_path
        self.interactive = active and sys.stderr.isatty()
        self._loggers: list[Logger] = []
        if not active:
            return
        with self._writing(LOG_FILE):
            self._file = open(save_path / LOG_FILE, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        threading.excepthook = _leave_writing_to_us
        try:
            for name in loggers:
                with self._writing(f"the file of logger {name}"):
                    self._loggers.append(open_logger(name, Place(save_path, first_step, hyperparameters or {})))
        except Exception as error:
            self.__exit__(type(error), error, None)
            raise

    @property
    def has_loggers(self) -> bool:
        """Whether anybody gets curves and pictures here."""
        return bool(self._loggers)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:  # the entry script shows it on screen
            self.stopped(str(error) or kind.__name__)
        if self.active:
            refused = (OSError, SavePathError)
            with contextlib.suppress(*refused) if error is not None else contextlib.nullcontext():
                self._to_all(lambda logger: logger.close(failed=error is not None))
                self._file.close()

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
        """Points of curves, on their way to the disk at once: a run that is killed has them."""
        if self._loggers:
            check_lock(self._folder)
            self._to_all(lambda logger: logger.scalars(values, step))

    def pictures(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        """RGB pictures by name."""
        if self._loggers:
            check_lock(self._folder)
            self._to_all(lambda logger: logger.pictures(pictures, step))

    def finish(self) -> None:
        """Say that the run came to its end."""
        self._to_all(lambda logger: logger.finish())

    def _to_all(self, call: Callable[[Logger], None]) -> None:
        """Hand on to every logger. One whose server fails is left out from then on: training is worth more."""
        for logger in list(self._loggers):
            if not logger.remote:
                with self._writing(logger.name):
                    call(logger)
                continue
            try:
                call(logger)
            except Exception as error:  # whatever the network or the server is about
                self._loggers.remove(logger)
                reason = one_line(error)
                self.info(f"warning: {logger.name}: {reason}: this run sends nothing more there")

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


def peak_memory_gb(device: torch.device, reset: bool = True) -> float:
    """Peak memory in GB (1e9 bytes): of tensors on a GPU since the last call with `reset`, else of this process so far.

    The host does not wait for the GPU.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
