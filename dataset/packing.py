"""What travels from a loading process to the device: 8-bit pixels and numbers, unpacked on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from dataset.photometry import apply_photometry_batch, photometry_numbers
from dataset.transform import IMAGENET, Normalization, box_mask, normalize, padding_mask
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
    # Where the device makes the strong views, what is drawn for them, float32 (V * (B + U), NUMBERS); else None.
    photometry: torch.Tensor | None

    @property
    def weak(self) -> torch.Tensor:
        """(B, S, S, 3)."""
        return self.pixels[: self.count]

    @property
    def strong(self) -> tuple[torch.Tensor, ...]:
        """V times (B, S, S, 3); none with `photometry`."""
        views = self.views if self.photometry is None else 0
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
        """(B, 3), the same of the partners, where they are `pasted`."""
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
    return PackedViews(
        default_collate(pixels),
        torch.tensor(numbers + used, dtype=torch.int64),
        len(samples),
        len(first.boxes),
        first.pasted,
        None if first.strong else _draws(samples),
    )


def _draws(samples: Sequence[UnlabeledSample]) -> torch.Tensor:
    """Of each strong view: its own photometry of all samples, then that of the partners that are used."""
    partners = [sample.partner for sample in samples if sample.partner]
    views = zip(*(sample.photometry for sample in [*samples, *partners]), strict=True)
    return torch.tensor([photometry_numbers(draw) for view in views for draw in view])


def to_device(batch: Any, device: torch.device, fixed_shapes: bool = False, by: Normalization = IMAGENET) -> Any:
    """A collated batch as a step takes it: images normalised floats, labels int64, on `device`. Copies do not block.

    `(image, label)`; with unlabelled images `((image, label), UnlabeledViews, Partner)`, without the Partner where the
    step takes it from the reversed batch. `fixed_shapes`: the Partner is whole, with black images where none is used,
    so that all batches have the same shapes.
    """
    first, second = batch
    if isinstance(second, PackedViews):
        return to_device(first, device, by=by), *_unpack(second, device, fixed_shapes, by)
    return _images(first.to(device, non_blocking=True), by), second.to(device, non_blocking=True).long()


def _unpack(
    packed: PackedViews, device: torch.device, fixed_shapes: bool, by: Normalization
) -> tuple[UnlabeledViews] | tuple[UnlabeledViews, Partner]:
    packed = packed._replace(
        pixels=packed.pixels.to(device, non_blocking=True),
        numbers=packed.numbers.to(device, non_blocking=True),
        photometry=None if packed.photometry is None else packed.photometry.to(device, non_blocking=True),
    )
    size = packed.pixels.shape[1]
    boxes = [box_mask(box, size) for box in packed.boxes.unbind(1)]
    strong = [_images(view, by) for view in packed.strong or _strong_views(packed, boxes)]
    (strong1, strong2), (box1, box2) = (*strong, None)[:2], (*boxes, None)[:2]
    views = UnlabeledViews(_images(packed.weak, by), strong1, strong2, padding_mask(packed.extent, size), box1, box2)
    if not packed.pasted:
        return (views,)
    partner, used = (_whole_batch(packed, packed.partner), None) if fixed_shapes else (packed.partner, packed.used)
    return views, Partner(_images(partner, by), padding_mask(packed.extent_mix, size), used)


def _whole_batch(packed: PackedViews, partner: torch.Tensor) -> torch.Tensor:
    """The partners' images (U, ...) at their places among B, the others black."""
    return partner.new_zeros(packed.count, *partner.shape[1:]).index_copy(0, packed.used, partner)


def _strong_views(packed: PackedViews, boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The strong views, made where the weak ones are, with the partner's inside the boxes if there is one."""
    weak = torch.cat([packed.weak, packed.partner]).permute(0, 3, 1, 2)
    strong = apply_photometry_batch(weak.repeat(packed.views, 1, 1, 1), packed.photometry)
    views = []
    for view, box in zip(strong.chunk(packed.views), boxes, strict=True):
        own, partner = view.split([packed.count, len(packed.used)])
        if packed.pasted:
            own = torch.where(box.unsqueeze(1), _whole_batch(packed, partner), own)
        views.append(own.permute(0, 2, 3, 1))
    return views


def _images(pixels: torch.Tensor, by: Normalization) -> torch.Tensor:
    """Normalised (B, C, H, W) of 8-bit (B, H, W, C)."""
    return normalize(pixels.permute(0, 3, 1, 2), by)
