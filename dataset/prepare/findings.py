"""The findings of `scripts.check_data`: counted by kind, the first few in memory, all of them in files if wanted."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.errors import DataError

ERROR, WARNING, NOTE = LEVELS = ("error", "warning", "note")


class Finding(NamedTuple):
    """One line about the data. `level`: training would stop at an "error"; `kind`: the heading it belongs under."""

    level: str
    kind: str
    message: str


class Findings:
    """Findings by level and kind, in the order in which they come, each once.

    Of each kind the first `shown` messages stay in memory (None: all), and 8 bytes for each further one. With a
    `folder`, files in it keep all of them; they have no name there, so nothing is left behind.
    """

    def __init__(self, shown: int | None = None, folder: str | Path | None = None) -> None:
        self._shown, self._folder = shown, folder
        self._kinds: dict[str, dict[str, _Kind]] = {level: {} for level in LEVELS}

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings in. Raises DataError if the folder cannot take them."""
        for level, kind, message in findings:
            kinds = self._kinds[level]
            try:
                if kind not in kinds:
                    kinds[kind] = _Kind(self._shown, self._folder)
                kinds[kind].add(message)
            except OSError as error:
                reason = f"findings cannot be written to this folder: {error.strerror or error}"
                raise DataError(f"{self._folder}: {reason}; choose another one") from None

    def kinds(self, level: str) -> list[str]:
        """The kinds of a level of which there is a finding."""
        return list(self._kinds[level])

    def first(self, level: str, kind: str) -> list[str]:
        """The messages of a kind that stayed in memory."""
        return list(self._kinds[level][kind].first)

    def count(self, level: str, kind: str) -> int:
        """How many messages of a kind there are."""
        return int(self._kinds[level][kind].is_new().sum())

    def messages(self, level: str, kind: str) -> Iterator[str]:
        """All messages of a kind, where a folder keeps them; otherwise the first ones."""
        return self._kinds[level][kind].messages()


class _Kind:
    def __init__(self, shown: int | None, folder: str | Path | None) -> None:
        self._shown, self.first = shown, {}
        self._hashes = array("q")  # of ten million messages two have the same in one case of 400 thousand
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, message: str) -> None:
        if self._shown is None or len(self.first) < self._shown:
            self.first[message] = None
        self._hashes.append(hash(message))
        if self._file:
            self._file.write(message.replace("\n", "\\n").encode("utf-8", "surrogateescape") + b"\n")

    def is_new(self) -> np.ndarray:
        """Of each message whether it came for the first time: bool (N,)."""
        new = np.zeros(len(self._hashes), bool)
        new[np.unique(np.frombuffer(self._hashes, np.int64), return_index=True)[1]] = True
        return new

    def messages(self) -> Iterator[str]:
        if self._file is None:
            yield from self.first
            return
        self._file.seek(0)
        for line, new in zip(self._file, self.is_new(), strict=True):
            if new:
                yield line[:-1].decode("utf-8", "surrogateescape")
