"""Unreadable images that were replaced in training: named, counted, and limited."""

from __future__ import annotations

from dataset import DataError
from dataset.replacement import ReplacingLoader
from util.distributed.collectives import gather_objects
from util.log import RunLog


class BadImages:
    """Names each unreadable file of `loader` once in the log, counts the replaced samples, and stops at a limit."""

    def __init__(self, loader: ReplacingLoader, limit: int, log: RunLog) -> None:
        self._loader, self._limit, self._log = loader, limit, log
        self._samples, self._known = 0, set[str]()

    def report(self) -> None:
        """Log what was replaced on all processes since the last call; call it on all of them.

        Raises DataError, on every process, once more different files than the limit were unreadable.
        """
        faults = [fault for own in gather_objects(self._loader.faults) for fault in own]
        self._loader.faults.clear()
        if not faults:
            return
        self._samples += len(faults)
        for fault in dict.fromkeys(faults):
            if fault not in self._known:
                self._log.info(f"skipped: {fault}")
                self._known.add(fault)
        count = f"{len(self._known)} unreadable image{'s' * (len(self._known) > 1)}"
        samples = f"{self._samples} sample{'s' * (self._samples > 1)}"
        self._log.info(f"{samples} replaced so far, {count} (bad_image_limit: {self._limit})")
        if len(self._known) > self._limit:
            raise DataError(f"{faults[-1]}; {count}, more than bad_image_limit {self._limit}")
