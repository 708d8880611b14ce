"""The errors that end a run with one line for the user, and the exit statuses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from dataset import DataError
from model import WeightsError

EXIT_CONSEQUENCE = 1  # another process failed; the launchers look for another status first
EXIT_USER_ERROR = 2  # something to correct: the line on stderr says what
EXIT_STOPPED = 3  # training stopped itself, for instance at a loss that is not finite
EXIT_SIGNAL = 128  # plus the signal's number: 129 SIGHUP, 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM; training saves before


class ConfigError(ValueError):
    """A mistake in a config file or on the command line; the message is one line for the user."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or continued; the message is one line for the user."""


class SavePathError(ValueError):
    """The save path is in use by another run, or cannot be written; the message is one line for the user."""


EARLIER_KEPT = (
    "checkpoints of earlier epochs are kept (too high an lr, or data with extreme values, are the usual causes)"
)
USER_ERRORS = (ConfigError, DataError, WeightsError, CheckpointError, SavePathError)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


class Interrupted(BaseException):
    """A signal ended the run, whose state is saved; the message is one line for the user.

    Raised anywhere, as KeyboardInterrupt is: no `except Exception` may take it for a damaged file.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Silenced(BaseException):
    """This process ends because another one failed, and that one reports it; the message is the failure.

    Raised anywhere too.
    """


def error_line(error: Exception) -> str:
    """The message in one line: an error out of a loading process comes wrapped in that process's traceback."""
    lines = str(error).strip().splitlines()
    # Elsewhere a line break can only come out of a name or value in the message.
    line = lines[-1] if "Original Traceback" in str(error) else " ".join(lines)
    for kind in USER_ERRORS:
        line = line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
    return line


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word nearest to a mistyped one; empty if none is near."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word)[:80].lower(), lower, n=1)
    return f" (did you mean '{lower[near[0]]}'?)" if near else ""


def quoted(value: Any) -> str:
    """A value as a message shows it, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
