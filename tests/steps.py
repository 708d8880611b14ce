"""The methods' steps under one call, and collated batches for them whose boxes are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dataset.packing import collate
from dataset.transform import Box, Extent, Photometry, draw_photometry
from dataset.views import PartnerSample, UnlabeledSample
from fixmatch import fixmatch_step
from supervised import supervised_step
from unimatch import unimatch_step
from unimatch_v2 import unimatch_v2_step
from util.teacher import Teacher

METHODS = ("unimatch", "fixmatch", "fixmatch with a teacher", "unimatch_v2", "supervised")
SIZE = 28
NO_BOX = (None, None)
ALL_BOXES = (Box(3, 4, 10, 9), Box(0, 0, SIZE, 5))


def packed_batch(
    method: str,
    boxes: Sequence[tuple[Box | None, Box | None]],
    photometry: str = "worker",
    seed: int = 0,
    size: int = SIZE,
) -> Any:
    """A collated batch whose samples have these boxes; images, extents and colours are drawn from `seed`. 5 classes."""
    rng = np.random.default_rng(seed)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, (size, size, *shape), dtype=np.uint8))

    def colours() -> tuple[Photometry, ...]:
        return draw_photometry(rng), draw_photometry(rng)

    samples = []
    for pair in boxes:
        labeled = pixels(3), pixels() % 5
        if method == "supervised":
            samples.append(labeled)
            continue
        extent = Extent(*(int(n) for n in rng.integers(8, size, 2)), bool(seed % 2))
        reversed_batch = method in ("unimatch_v2", "fixmatch with a teacher")
        partner = PartnerSample(pixels(3), extent, colours()) if any(pair) and not reversed_batch else None
        strong = (pixels(3), pixels(3)) if photometry == "worker" else ()
        sample = UnlabeledSample(pixels(3), strong, extent, pair, colours(), partner, not reversed_batch)
        samples.append((labeled, sample))
    return collate(samples)


def run_step(
    method: str,
    model: nn.Module,
    batch: Any,
    criterion: nn.Module,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    teacher: Teacher | None = None,
    conf_thresh: float = 0.3,
) -> dict[str, torch.Tensor]:
    """One step of a method of METHODS, on a batch that is on the device; a teacher is made if one is needed."""
    if method == "supervised":
        return supervised_step(model, batch, criterion, backward)
    if method == "unimatch":
        return unimatch_step(model, batch, criterion, conf_thresh, backward)
    if method == "fixmatch":
        return fixmatch_step(model, batch, criterion, conf_thresh, backward)
    teacher = teacher or Teacher(model)
    if method == "unimatch_v2":
        return unimatch_v2_step(model, teacher, batch, criterion, conf_thresh, backward)
    return fixmatch_step(model, batch, criterion, conf_thresh, backward, teacher)
