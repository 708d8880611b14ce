"""The key-value store through which the processes of a run meet; every call to it ends, even on a dead network."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class StoreLost(RuntimeError):
    """The store cannot be reached any more. `answered`: it (or its machine) refused, rather than said nothing."""

    def __init__(self, message: str, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class NoAnswer(Exception):
    """A call gave no answer in its time."""


class Helper:
    """A thread that makes blocking calls for others. They wait no longer than they want, and signals still reach them.

    A call that never returns occupies the thread, but the process can still end.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name=name).start()

    def call(self, function: Callable[[], Result], seconds: float) -> Result:
        """The function's result, or its exception. Raises NoAnswer after `seconds`."""
        return self.start(function)(seconds)

    def start(self, function: Callable[[], Result]) -> Callable[[float], Result]:
        """Begin a call; returns what waits for it, as often as one likes until it has its result."""
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._calls.put((function, answer))

        def wait(seconds: float) -> Result:
            # Counted in short waits, not timed: a process that was suspended has not waited meanwhile.
            for _ in range(max(1, round(10 * seconds))):
                try:
                    result, error = answer.get(timeout=0.1)
                except queue.Empty:
                    continue
                if error is not None:
                    raise error
                return result
            raise NoAnswer

        return wait

    def _work(self) -> None:
        while True:
            function, answer = self._calls.get()
            try:
                answer.put((function(), None))
            except BaseException as error:  # whoever called handles it
                answer.put((None, error))


class BoundedStore:
    """A connection to the TCPStore at `address`:`port` whose calls take at most `seconds`, then raise StoreLost.

    torch's own timeouts do not help where a connection is dead: its client waits for an answer until the system gives
    the connection up, after a quarter of an hour. Once lost, every further call raises at once.
    """

    def __init__(self, address: str, port: int, seconds: float) -> None:
        self.seconds, self._place = seconds, f"{address}:{port}"
        self._lost: StoreLost | None = None
        self._helper = Helper("store")
        wait = timedelta(seconds=seconds)
        self._store = self._call(
            lambda: dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)
        )

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> str | None:
        """The value of a key; None if it is not set."""
        return self._call(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def set_first(self, key: str, value: str) -> str:
        """Set a key unless it is set; its value then."""
        return self._call(lambda: self._store.compare_set(key, "", value)).decode()

    def _call(self, function: Callable[[], Result]) -> Result:
        if self._lost is not None:
            raise self._lost
        try:
            return self._helper.call(function, self.seconds)
        except NoAnswer:
            self._lost = StoreLost(f"{self._place} does not answer", answered=False)
        except RuntimeError as error:
            self._lost = StoreLost(f"{self._place}: {str(error).strip().splitlines()[0]}", answered=True)
        raise self._lost from None
