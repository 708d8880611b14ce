"""Collectives: sums and gathers over all processes, what the main one sends, and a delayed max all-reduce."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks, on each of them. The host waits for it."""
    values = [value] * process_count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The main process's `value`, of any kind that can be pickled, on each process; the others' is ignored.

    Large buffers in it, as those of a list of images, are sent without being copied. The host waits for it.
    """
    if process_count() == 1:
        return value
    is_main, buffers = dist.get_rank() == 0, []
    packed = pickle.dumps(value, 5, buffer_callback=buffers.append) if is_main else None
    buffers = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
    head = [packed, [len(buffer) for buffer in buffers]]
    dist.broadcast_object_list(head, device=torch.device("cpu"))
    if not is_main:
        buffers = [np.empty(size, np.uint8) for size in head[1]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable|The given NumPy array is not writable")
        for buffer in buffers:
            dist.broadcast(torch.from_numpy(buffer), 0)
    return value if is_main else pickle.loads(head[0], buffers=buffers)


def process_count() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes, of one shape, along a new first dimension, on each of them."""
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(process_count())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


class DelayedMax:
    """The greatest of all processes' numbers (from 0), one call late: for requests such as "stop" and "save".

    The delay hides the all-reduce behind a training step, so that no process waits for it, nor for a GPU: it runs on
    the CPU.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def reduce(self, number: int) -> int:
        """Send this call's number; returns the maximum of the call before (a process alone: of this call)."""
        if process_count() == 1:
            return number
        maximum = self.finish()
        tensor = torch.tensor([number])
        self._pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True), tensor
        return maximum

    def finish(self) -> int:
        """Wait for the pending all-reduce: its maximum, or 0 if none is pending."""
        if self._pending is None:
            return 0
        (work, tensor), self._pending = self._pending, None
        work.wait()
        return int(tensor)
