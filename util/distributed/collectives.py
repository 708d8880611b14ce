"""Collectives: sums and gathers over all processes, and a delayed max all-reduce."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

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


class Agreement:
    """What all processes agree on: the greatest of their wishes, numbers from 0.

    The answer comes one call late. So it is on its way during a step, and nobody waits for it, nor for a GPU: the
    numbers go between the processors, in a gloo group of their own. Make it on all processes alike.
    """

    def __init__(self, seconds: float) -> None:
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds)) if process_count() > 1 else None
        )
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, wish: int) -> int:
        """Send this call's wish; the answer to those of the call before (with one process, to this one)."""
        if self._group is None:
            return wish
        answer = self.settle()
        tensor = torch.tensor([wish])
        self._pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True), tensor
        return answer

    def settle(self) -> int:
        """The answer that is still on its way, 0 if none is."""
        if self._pending is None:
            return 0
        (work, tensor), self._pending = self._pending, None
        work.wait()
        return int(tensor)

    def wait_for_all(self) -> None:
        """Return when all processes have called this."""
        if self._group is not None:
            dist.barrier(self._group)
