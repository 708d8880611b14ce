"""Batches on their way to the device: they are copied and unpacked while the step before them runs there."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dataset.packing import to_device
from dataset.transform import IMAGENET, Normalization


class Feed:
    """Gives collated batches as a step takes them, on `device`; `fixed_shapes` and `by` as for `to_device`.

    On a GPU this runs on a stream of its own. The host is ahead of the device, so a batch is copied (from pinned
    memory) and unpacked while the steps before it still run. Elsewhere it is `to_device` and nothing else.
    """

    def __init__(self, device: torch.device, fixed_shapes: bool = False, by: Normalization = IMAGENET) -> None:
        self._device, self._options = device, (fixed_shapes, by)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Any) -> Any:
        """The batch on the device, ready for the current stream; the host does not wait."""
        if self._stream is None:
            return to_device(batch, self._device, *self._options)
        with torch.cuda.stream(self._stream):
            moved = to_device(batch, self._device, *self._options)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in tree_leaves(moved):
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(current)  # else its memory could go to the next batch before the step has read it
        return moved
