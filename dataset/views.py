"""What a sample of unlabelled images and a batch of them hold, on their way from a loading process to a step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dataset.transform import Box, Extent, Photometry


class UnlabeledViews(NamedTuple):
    """Views of a batch of B unlabelled images, as a step takes them.

    weak, strong1, strong2: normalised (B, 3, H, W); ignore_mask: (B, H, W), 255 on padding, else 0; box1, box2:
    (B, H, W), nonzero inside the CutMix box of the strong view. strong2 and box2 are None where a method has one only.

    The strong views are mixed already: the CutMix partner's pixels are inside the box. Only with the partner
    `reversed_batch` are they not: there the step pastes from the batch itself.
    """

    weak: torch.Tensor
    strong1: torch.Tensor
    strong2: torch.Tensor | None
    ignore_mask: torch.Tensor
    box1: torch.Tensor | None
    box2: torch.Tensor | None


class Partner(NamedTuple):
    """The CutMix partners of a batch of B unlabelled images: what their pseudo-labels are made of.

    ignore_mask: (B, H, W) as in UnlabeledViews. weak: normalised (U, 3, H, W), of the samples `used`, (U,) int64:
    a sample without a box uses nothing of its partner's pseudo-label, so its partner needs no forward. If `used` is
    None, weak holds all B. A step reads nothing else of a partner, so whole UnlabeledViews serve as one, too.
    """

    weak: torch.Tensor
    ignore_mask: torch.Tensor
    used: torch.Tensor | None = None


class PartnerSample(NamedTuple):
    """The CutMix partner of one sample: its weak view (S, S, 3), and as in UnlabeledSample."""

    weak: torch.Tensor
    extent: Extent
    photometry: tuple[Photometry, ...]


class UnlabeledSample(NamedTuple):
    """One sample's part of PackedViews: 8-bit views (S, S, 3), and numbers. V strong views.

    `pasted` is False where the partner is the `reversed_batch`; else the strong views have their partner's pixels in
    the boxes, and `partner` is None where no box needs it.
    """

    weak: torch.Tensor
    strong: tuple[torch.Tensor, ...]  # V, or none where the device makes them
    extent: Extent
    boxes: tuple[Box | None, ...]  # V
    photometry: tuple[Photometry, ...]  # V
    partner: PartnerSample | None
    pasted: bool
