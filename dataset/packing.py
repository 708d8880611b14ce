"""What travels from a loading process to the device: 8-bit pixels and numbers, unpacked on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from dataset.transform import Photometry, apply_photometry_tensor, box_mask, normalize, padding_mask
from dataset.views import Partner, UnlabeledSample, UnlabeledViews


class PackedViews(NamedTuple):
    """What workers send of B unlabelled samples: 8-bit pixels, and numbers instead of maps. S = crop size.

    Two tensors in all, since each takes a message and a file of shared memory: pixels (N, S, S, 3), one kind of view
    after the other, and numbers, int64. `pasted`: whether the strong views hold their partners' pixels (else the step
    pastes, and nothing is sent of partners).
    """

    pixels: torch.Tensor
    numbers: torch.Tensor
    count: int  # B
    views: int  # V, strong views of a sample
    pasted: bool
    photometry: tuple[PhotometryDraws, ...]  # B, where the device makes the strong views; else empty

    @property
    def weak(self) -> torch.Tensor:
        """(B, S, S, 3)."""
        return self.pixels[: self.count]

    @property
    def strong(self) -> tuple[torch.Tensor, ...]:
        """V times (B, S, S, 3); none with `photometry`."""
        views = 0 if self.photometry else self.views
        return tuple(self.pixels[self.count * view : self.count * (view + 1)] for view in range(1, 1 + views))

    @property
    def partner(self) -> torch.Tensor:
        """(U, S, S, 3), the partners' weak views of the U samples that have a CutMix box."""
        return self.pixels[len(self.pixels) - len(self.used) :]

    @property
    def extent(self) -> torch.Tensor:
        """(B, 3), the numbers of Extent."""
        return self._split()[0].view(self.count, 3)

    @property
    def extent_mix(self) -> torch.Tensor:
        """(B, 3), the partners' likewise, where they are `pasted`."""
        return self._split()[1].view(self.count, 3)

    @property
    def boxes(self) -> torch.Tensor:
        """(B, V, 4), those of Box, 0 without one."""
        return self._split()[2].view(self.count, self.views, 4)

    @property
    def used(self) -> torch.Tensor:
        """(U,), which of the samples have a partner that is used."""
        return self._split()[3]

    def _split(self) -> tuple[torch.Tensor, ...]:
        known = [3 * self.count, 3 * self.count * self.pasted, 4 * self.views * self.count]
        return self.numbers.split([*known, len(self.numbers) - sum(known)])


class PhotometryDraws(NamedTuple):
    """What is drawn for a sample's V strong views and for those of its partner, if that is used."""

    own: tuple[Photometry, ...]
    partner: tuple[Photometry, ...] | None


def collate(samples: Sequence[Any]) -> Any:
    """A batch of samples: stacked tensors and, of unlabelled samples, PackedViews."""
    if isinstance(samples[0][1], torch.Tensor):
        return default_collate(samples)
    labeled, unlabeled = zip(*samples, strict=True)
    return default_collate(labeled), _pack(unlabeled)


def _pack(samples: Sequence[UnlabeledSample]) -> PackedViews:
    first = samples[0]
    used = [index for index, sample in enumerate(samples) if sample.partner]
    pixels = [sample.weak for sample in samples]
    pixels += [view for views in zip(*(sample.strong for sample in samples), strict=True) for view in views]
    pixels += [samples[index].partner.weak for index in used]
    numbers = [number for sample in samples for number in sample.extent]
    if first.pasted:  # a partner that is not used may have any extent
        numbers += [number for sample in samples for number in (sample.partner or sample).extent]
    numbers += [number for sample in samples for box in sample.boxes for number in box or (0, 0, 0, 0)]
    draws = [PhotometryDraws(sample.photometry, sample.partner and sample.partner.photometry) for sample in samples]
    return PackedViews(
        default_collate(pixels),
        torch.tensor(numbers + used, dtype=torch.int64),
        len(samples),
        len(first.boxes),
        first.pasted,
        () if first.strong else tuple(draws),
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """A collated batch as a step takes it: images normalised floats, labels int64, on `device`. Copies do not block.

    `(image, label)`; with unlabelled images `((image, label), UnlabeledViews, Partner)`, without the Partner where the
    step takes it from the reversed batch.
    """
    first, second = batch
    if isinstance(second, PackedViews):
        return to_device(first, device), *_unpack(second, device)
    return _images(first.to(device, non_blocking=True)), second.to(device, non_blocking=True).long()


def _unpack(packed: PackedViews, device: torch.device) -> tuple[UnlabeledViews] | tuple[UnlabeledViews, Partner]:
    packed = packed._replace(
        pixels=packed.pixels.to(device, non_blocking=True), numbers=packed.numbers.to(device, non_blocking=True)
    )
    size = packed.pixels.shape[1]
    boxes = [box_mask(box, size) for box in packed.boxes.unbind(1)]
    strong = [_images(view) for view in packed.strong or _strong_views(packed, boxes)]
    (strong1, strong2), (box1, box2) = (*strong, None)[:2], (*boxes, None)[:2]
    views = UnlabeledViews(_images(packed.weak), strong1, strong2, padding_mask(packed.extent, size), box1, box2)
    if not packed.pasted:
        return (views,)
    return views, Partner(_images(packed.partner), padding_mask(packed.extent_mix, size), packed.used)


def _strong_views(packed: PackedViews, boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The strong views, made where the weak ones are, with the partner's inside the boxes if there is one."""
    own, partner = packed.weak.permute(0, 3, 1, 2), packed.partner.permute(0, 3, 1, 2)
    used = [index for index, draws in enumerate(packed.photometry) if draws.partner]
    views = []
    for view, box in enumerate(boxes):
        strong = torch.stack(
            [apply_photometry_tensor(x, draws.own[view]) for x, draws in zip(own, packed.photometry, strict=True)]
        )
        for x, index in zip(partner, used, strict=True):
            mix = apply_photometry_tensor(x, packed.photometry[index].partner[view])
            strong[index] = torch.where(box[index], mix, strong[index])
        views.append(strong.permute(0, 2, 3, 1))
    return views


def _images(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised (B, 3, H, W) of 8-bit (B, H, W, 3)."""
    return normalize(pixels.permute(0, 3, 1, 2))
