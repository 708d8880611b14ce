"""util/train/feed.py: on a GPU a batch goes its way beside the step, in a safe order; elsewhere nothing changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dataset.packing import to_device
from tests.steps import ALL_BOXES, NO_BOX, packed_batch
from util.train import feed
from util.train.feed import Feed

CPU = torch.device("cpu")


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_on_the_cpu_it_is_to_device_and_touches_no_gpu(monkeypatch, fixed_shapes):
    monkeypatch.delattr(torch.cuda, "Stream")
    batch = packed_batch("unimatch", [ALL_BOXES, NO_BOX])
    ways = (Feed(CPU, fixed_shapes)(batch), to_device(batch, CPU, fixed_shapes))
    for found, expected in zip(*map(tree_leaves, ways), strict=True):
        assert found is expected is None or torch.equal(found, expected)


def test_with_fixed_shapes_a_batch_has_a_whole_partner_whatever_its_boxes():
    for boxes in ([NO_BOX, NO_BOX], [NO_BOX, ALL_BOXES], [ALL_BOXES, ALL_BOXES]):
        packed = packed_batch("unimatch", boxes)
        whole, own = (to_device(packed, CPU, fixed_shapes)[2] for fixed_shapes in (True, False))
        assert whole.used is None and whole.weak.shape == (2, 3, 28, 28)
        assert torch.equal(whole.weak[own.used], own.weak) and torch.equal(whole.ignore_mask, own.ignore_mask)


def test_on_a_gpu_the_step_waits_for_the_side_stream_and_keeps_the_batchs_memory(monkeypatch):
    """With stand-ins for CUDA's streams: what happens, in which order, and on which stream."""
    events: list[Any] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        events.append(("on", stream.name))
        yield
        events.append(("off", stream.name))

    class Tensor(torch.Tensor):
        def record_stream(self, stream: Stream) -> None:
            events.append(("kept for", stream.name))

    class Device:
        type = "cuda"

    def moved(batch: Any, device: Any, fixed_shapes: bool, *_: Any) -> Any:
        events.append(f"moved {batch} with fixed_shapes={fixed_shapes}")
        return torch.zeros(2).as_subclass(Tensor), (torch.zeros(1).as_subclass(Tensor), None)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(feed, "to_device", moved)
    Feed(Device(), True)("batch")
    assert events == [
        ("on", "side"),
        "moved batch with fixed_shapes=True",
        ("off", "side"),
        ("main", "waits for", "side"),
        ("kept for", "main"),
        ("kept for", "main"),
    ]
