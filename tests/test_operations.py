"""What a step and a batch's way to the device are made of: no value is read back, and no draw changes the operations.

On a GPU the host waits for every value that it reads, and a captured graph repeats the same kernels on other numbers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dataset.packing import collate, to_device
from dataset.transform import Box, Extent, Photometry, draw_photometry
from dataset.views import PartnerSample, UnlabeledSample
from fixmatch import fixmatch_step
from model import DPT
from model.backbone.dinov2 import DINOv2
from supervised import supervised_step
from tests.helpers import make_model
from unimatch import unimatch_step
from unimatch_v2 import unimatch_v2_step
from util.losses import CrossEntropy, OhemCrossEntropy
from util.teacher import Teacher

SIZE = 28
CPU = torch.device("cpu")
READING = {"_local_scalar_dense", "item", "equal", "is_nonzero"}
SHAPED_BY_VALUES = {"nonzero", "masked_select", "unique", "unique2", "_unique2", "bincount"}
NO_BOX = (None, None)
ALL_BOXES = (Box(3, 4, 10, 9), Box(0, 0, 28, 5))


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


def _packed(method: str, boxes: list[tuple[Box | None, Box | None]], photometry: str, seed: int = 0) -> Any:
    """A collated batch whose samples have these boxes; images, extents and colours are drawn from `seed`."""
    rng = np.random.default_rng(seed)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, (SIZE, SIZE, *shape), dtype=np.uint8))

    def colours() -> tuple[Photometry, ...]:
        return draw_photometry(rng), draw_photometry(rng)

    samples = []
    for pair in boxes:
        labeled = pixels(3), pixels() % 5
        if method == "supervised":
            samples.append(labeled)
            continue
        extent = Extent(*(int(n) for n in rng.integers(8, SIZE, 2)), bool(seed % 2))
        reversed_batch = method in ("unimatch_v2", "fixmatch with a teacher")
        partner = PartnerSample(pixels(3), extent, colours()) if any(pair) and not reversed_batch else None
        strong = (pixels(3), pixels(3)) if photometry == "worker" else ()
        sample = UnlabeledSample(pixels(3), strong, extent, pair, colours(), partner, not reversed_batch)
        samples.append((labeled, sample))
    return collate(samples)


def _step(method: str, model: Any, batch: Any, criterion: Any, backward: Any = torch.Tensor.backward) -> Any:
    if method == "supervised":
        return supervised_step(model, batch, criterion, backward)
    if method == "unimatch":
        return unimatch_step(model, batch, criterion, 0.3, backward)
    if method == "fixmatch":
        return fixmatch_step(model, batch, criterion, 0.3, backward)
    teacher = Teacher(model)
    if method == "unimatch_v2":
        return unimatch_v2_step(model, teacher, batch, criterion, 0.3, backward)
    return fixmatch_step(model, batch, criterion, 0.3, backward, teacher)


@pytest.mark.parametrize("method", ["unimatch", "fixmatch", "fixmatch with a teacher", "unimatch_v2", "supervised"])
def test_a_step_is_the_same_operations_whatever_was_drawn(method):
    model, counts = make_model(), []
    if method == "unimatch_v2":
        model = DPT(DINOv2(width=24, depth=4, heads=3, taps=(0, 1, 2, 3)), 5, 6, (4, 5, 6, 7))
        model(torch.zeros(1, 3, SIZE, SIZE))  # the positional embedding is interpolated once
    for seed, boxes in enumerate(([NO_BOX] * 2, [NO_BOX, ALL_BOXES])):
        batch = to_device(_packed(method, boxes, "worker", seed), CPU, fixed_shapes=True)
        model.zero_grad(set_to_none=True)
        with Operations() as operations:
            _step(method, model, batch, CrossEntropy())
        counts.append(operations.count)
    assert counts[0] == counts[1] and counts[0]["convolution_backward"] > 10


def test_without_fixed_shapes_a_batch_without_a_box_saves_the_partners_forward_and_others_are_alike():
    model, counts = make_model(), []
    for boxes in ([NO_BOX] * 2, [NO_BOX, ALL_BOXES], [ALL_BOXES] * 2):
        model.zero_grad(set_to_none=True)
        batch = to_device(_packed("fixmatch", boxes, "worker"), CPU)
        with Operations() as operations:
            _step("fixmatch", model, batch, CrossEntropy())
        counts.append(operations.count)
    assert counts[0]["convolution"] < counts[1]["convolution"] and counts[1] == counts[2]


@pytest.mark.parametrize("photometry", ["worker", "device"])
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_batch_goes_to_the_device_by_the_same_operations_whatever_was_drawn(photometry, fixed_shapes):
    counts = []
    for seed, boxes in enumerate(([NO_BOX] * 3, [ALL_BOXES, NO_BOX, ALL_BOXES], [ALL_BOXES] * 3)):
        packed = _packed("unimatch", boxes, photometry, seed)
        with Operations() as operations:
            to_device(packed, CPU, fixed_shapes)
        counts.append(operations.count)
    assert counts[0] == counts[1] == counts[2]


def test_photometry_of_many_images_is_as_many_operations_as_of_one():
    counts = []
    for count in (1, 8):
        packed = _packed("unimatch", [ALL_BOXES] * count, "device")
        with Operations() as operations:
            to_device(packed, CPU)
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", ["unimatch", "supervised"])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_hard_pixels_are_found_on_a_gpu_without_a_value_being_read(method):
    batch = to_device(_packed(method, [ALL_BOXES] * 2, "worker"), CPU)
    with FakeTensorMode() as mode:
        batch = tree_map_only(torch.Tensor, lambda x: mode.from_tensor(x).to("cuda"), batch)
        with torch.device("cuda"):
            model = make_model()
            with Operations() as operations:
                _step(method, model, batch, OhemCrossEntropy(min_kept=100), lambda part: None)
    assert operations.count["topk"] == 1
