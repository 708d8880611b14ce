"""Counting unreadable images that were replaced in training."""

from __future__ import annotations

from collections.abc import Sequence

from dataset import DataError
from util.distributed.collectives import gather_objects
from util.log import RunLog


class BadImages:
    """Names each unreadable file once in the log, counts the samples that were replaced, and stops beyond a limit."""

    def __init__(self, limit: int, log: RunLog) -> None:
        self._limit, self._log = limit, log
        self._samples, self._known = 0, set[str]()

    def count(self, faults: Sequence[str]) -> None:
        """Count `faults`, messages of this process, and those of all others; every process calls this alike.

        Raises DataError, on every process, when there have been more different ones than the limit.
        """
        faults = [fault for own in gather_objects(list(faults)) for fault in own]
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
