"""Standard output and standard error that never end a run, and the progress of what takes long before training."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class SteadyStream:
    """A text stream whose writes cannot fail: a closed pipe, terminal or file, or a full disk, swallow the text.

    What its encoding lacks is written in ASCII.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # what its encoding lacks is written as \\u0444
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as far as that works; what is left in the buffer must not fail at the interpreter's end either."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                descriptor = self._stream.fileno()
                void = os.open(os.devnull, os.O_WRONLY)
                os.dup2(void, descriptor)
                os.close(void)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Have `print` and progress bars never fail in here."""
    # Where descriptor 1 is closed, the next file that is opened would get it, and with it what others print there.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (SteadyStream(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def show_progress(what: str, unit: str, items: Iterator[Any], total: int | None) -> Iterator[Any]:
    """The items; meanwhile a bar on a terminal, else a line after 10 s and then every minute.

    `total`: how many there are, if that is known.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit=unit, delay=3, leave=False, dynamic_ncols=True)
        return
    due = time.monotonic() + 10
    for number, item in enumerate(items, 1):
        if (now := time.monotonic()) >= due:
            due = now + 60
            count = f"{number} {unit} so far" if total is None else f"{number} of {total} {unit}"
            print(f"{what}: {count}", file=sys.stderr, flush=True)
        yield item
