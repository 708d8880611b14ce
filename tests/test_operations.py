"""What a step and a batch's way to the device are made of: no value is read back, and no draw changes the operations.

On a GPU the host waits for every value that it reads, and a captured graph repeats the same kernels on other numbers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dataset.packing import to_device
from model import DPT
from model.backbone.dinov2 import DINOv2
from tests.helpers import make_model
from tests.steps import ALL_BOXES, METHODS, NO_BOX, SIZE, packed_batch, run_step
from util.losses import CrossEntropy, OhemCrossEntropy

CPU = torch.device("cpu")
READING = {"_local_scalar_dense", "item", "equal", "is_nonzero"}
SHAPED_BY_VALUES = {"nonzero", "masked_select", "unique", "unique2", "_unique2", "bincount"}


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations, backward passes' too; refuses those that a GPU's host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READING | SHAPED_BY_VALUES, f"{name}: the host would wait for it"
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a boolean index"
        self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_operations_whatever_was_drawn(method):
    model, counts = make_model(), []
    if method == "unimatch_v2":
        model = DPT(DINOv2(width=24, depth=4, heads=3, taps=(0, 1, 2, 3)), 5, 6, (4, 5, 6, 7))
        model(torch.zeros(1, 3, SIZE, SIZE))  # the positional embedding is interpolated once
    for seed, boxes in enumerate(([NO_BOX] * 2, [NO_BOX, ALL_BOXES])):
        batch = to_device(packed_batch(method, boxes, "worker", seed), CPU, fixed_shapes=True)
        model.zero_grad(set_to_none=True)
        with Operations() as operations:
            run_step(method, model, batch, CrossEntropy())
        counts.append(operations.count)
    assert counts[0] == counts[1] and counts[0]["convolution_backward"] > 10


def test_without_fixed_shapes_a_batch_without_a_box_saves_the_partners_forward_and_others_are_alike():
    model, counts = make_model(), []
    for boxes in ([NO_BOX] * 2, [NO_BOX, ALL_BOXES], [ALL_BOXES] * 2):
        model.zero_grad(set_to_none=True)
        batch = to_device(packed_batch("fixmatch", boxes, "worker"), CPU)
        with Operations() as operations:
            run_step("fixmatch", model, batch, CrossEntropy())
        counts.append(operations.count)
    assert counts[0]["convolution"] < counts[1]["convolution"] and counts[1] == counts[2]


@pytest.mark.parametrize("photometry", ["worker", "device"])
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_batch_goes_to_the_device_by_the_same_operations_whatever_was_drawn(photometry, fixed_shapes):
    counts = []
    for seed, boxes in enumerate(([NO_BOX] * 3, [ALL_BOXES, NO_BOX, ALL_BOXES], [ALL_BOXES] * 3)):
        packed = packed_batch("unimatch", boxes, photometry, seed)
        with Operations() as operations:
            to_device(packed, CPU, fixed_shapes)
        counts.append(operations.count)
    assert counts[0] == counts[1] == counts[2]


def test_photometry_of_many_images_is_as_many_operations_as_of_one():
    counts = []
    for count in (1, 8):
        packed = packed_batch("unimatch", [ALL_BOXES] * count, "device")
        with Operations() as operations:
            to_device(packed, CPU)
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", ["unimatch", "supervised"])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_hard_pixels_are_found_on_a_gpu_without_a_value_being_read(method):
    batch = to_device(packed_batch(method, [ALL_BOXES] * 2, "worker"), CPU)
    with FakeTensorMode() as mode:
        batch = tree_map_only(torch.Tensor, lambda x: mode.from_tensor(x).to("cuda"), batch)
        with torch.device("cuda"):
            model = make_model()
            with Operations() as operations:
                run_step(method, model, batch, OhemCrossEntropy(min_kept=100), lambda part: None)
    assert operations.count["topk"] == 1
