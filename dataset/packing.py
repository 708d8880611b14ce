"""What travels from a loading process to the device: 8-bit pixels and numbers, unpacked on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from dataset.semi import UnlabeledViews
from dataset.transform import (
    apply_photometry_tensor,
    box_mask,
    normalize,
    padding_mask,
)


class PackedViews(NamedTuple):
    """What workers send of B unlabelled samples: 8-bit pixels, and numbers instead of maps. S = crop size.

    Two tensors in all, since each takes a message and a file of shared memory: pixels (N, S, S, 3), one kind of view
    after the other, and numbers, int64. `photometry` has the draws of each sample's strong views, of its own and of
    its partner's, where these views are made on the device; else it is empty.
    """

    pixels: torch.Tensor
    numbers: torch.Tensor
    count: int  # B
    views: int  # V, strong views of a sample
    photometry: tuple[Any, ...]

    @property
    def weak(self) -> torch.Tensor:
        """(B, S, S, 3)."""
        return self.pixels[: self.count]

    @property
    def strong(self) -> tuple[torch.Tensor, ...]:
        """V times (B, S, S, 3), the partner's pixels inside its box; none with `photometry`."""
        views = 0 if self.photometry else self.views
        return tuple(self.pixels[self.count * view : self.count * (view + 1)] for view in range(1, 1 + views))

    @property
    def partner(self) -> torch.Tensor:
        """(U, S, S, 3), weak views of the partners of the U samples that have a CutMix box."""
        return self.pixels[len(self.pixels) - len(self.used) :]

    @property
    def extent(self) -> torch.Tensor:
        """(B, 2, 3), the numbers of Extent for view and partner."""
        return self.numbers[: 6 * self.count].view(self.count, 2, 3)

    @property
    def boxes(self) -> torch.Tensor:
        """(B, V, 4), those of Box, 0 without one."""
        start, length = 6 * self.count, 4 * self.views * self.count
        return self.numbers[start : start + length].view(self.count, self.views, 4)

    @property
    def used(self) -> torch.Tensor:
        """(U,), which of the samples have a CutMix box."""
        return self.numbers[(6 + 4 * self.views) * self.count :]


def collate(samples: Sequence[Any]) -> Any:
    """A batch of samples: stacked tensors and, of unlabelled samples, PackedViews."""
    if isinstance(samples[0][1], torch.Tensor):
        return default_collate(samples)
    labeled, unlabeled = zip(*samples, strict=True)
    used = [index for index, sample in enumerate(unlabeled) if sample.partner is not None]
    pixels = [sample.weak for sample in unlabeled]
    pixels += [view for views in zip(*(sample.strong for sample in unlabeled), strict=True) for view in views]
    pixels += [unlabeled[index].partner for index in used]
    extents = [number for sample in unlabeled for extent in sample.extent for number in extent]
    boxes = [number for sample in unlabeled for box in sample.boxes for number in box or (0, 0, 0, 0)]
    return default_collate(labeled), PackedViews(
        default_collate(pixels),
        torch.tensor([*extents, *boxes, *used], dtype=torch.int64),
        len(unlabeled),
        len(unlabeled[0].boxes),
        tuple(sample.photometry for sample in unlabeled if sample.photometry),
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """A collated batch as a step takes it: images normalised floats, labels int64, on `device`. Copies do not block."""
    first, second = batch
    if isinstance(second, PackedViews):
        return to_device(first, device), *_unpack(second, device)
    return _images(first.to(device, non_blocking=True)), second.to(device, non_blocking=True).long()


def _unpack(packed: PackedViews, device: torch.device) -> tuple[UnlabeledViews, UnlabeledViews]:
    """The views and those of their CutMix partners, whose strong views are the same: they have been pasted already."""
    moved = packed._replace(
        pixels=packed.pixels.to(device, non_blocking=True), numbers=packed.numbers.to(device, non_blocking=True)
    )
    size = packed.pixels.shape[1]
    boxes = [box_mask(box, size) for box in moved.boxes.unbind(1)]
    strong = [_images(view) for view in moved.strong or _strong_views(moved, boxes)]
    strong, boxes = (*strong, None)[:2], (*boxes, None)[:2]
    ignore_mask, ignore_mask_mix = (padding_mask(extent, size) for extent in moved.extent.unbind(1))
    return (
        UnlabeledViews(_images(moved.weak), *strong, ignore_mask, *boxes),
        UnlabeledViews(_images(moved.partner), *strong, ignore_mask_mix, None, None, moved.used),
    )


def _strong_views(packed: PackedViews, boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The strong views, with the partner's inside the boxes, made where the weak ones are."""
    own, partner = packed.weak.permute(0, 3, 1, 2), packed.partner.permute(0, 3, 1, 2)
    used = [index for index, (_, mix) in enumerate(packed.photometry) if mix[0] is not None]
    views = []
    for view, box in enumerate(boxes):
        strong = torch.stack(
            [apply_photometry_tensor(x, draws[0][view]) for x, draws in zip(own, packed.photometry, strict=True)]
        )
        for x, index in zip(partner, used, strict=True):
            mix = apply_photometry_tensor(x, packed.photometry[index][1][view])
            strong[index] = torch.where(box[index], mix, strong[index])
        views.append(strong.permute(0, 2, 3, 1))
    return views


def _images(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised (B, 3, H, W) of 8-bit (B, H, W, 3)."""
    return normalize(pixels.permute(0, 3, 1, 2))
