"""What a sample is: the order of an epoch, and the training and validation datasets.

A sample is a function of its key (epoch, indices): its draws are seeded by (seed, epoch, index, view). So two runs see
the same data whatever the number of workers, and N processes together see what one process would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from dataset.files import IGNORE_INDEX, decode_image, decoded_size
from dataset.lists import Sample
from dataset.source import DataSource
from dataset.transform import (
    Box,
    Extent,
    Geometry,
    Photometry,
    crop_pixels,
    draw_cutmix_box,
    draw_geometry,
    draw_photometry,
    rows_needed,
    strong_view,
    to_tensor,
    visible_extent,
)

Pixels = Image.Image | np.ndarray  # 8-bit RGB, as the decoder gives them
# What a random stream is for: part of its seed, so that no two purposes share one.
ORDER_X, ORDER_U, VIEW_X, VIEW_U, REPLACEMENT = range(5)


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

    ignore_mask: (B, H, W) as in UnlabeledViews. weak: normalised (U, 3, H, W), of the samples `used`, (U,) int64, only:
    where a sample has no box, nothing of its partner's pseudo-label is used, so no forward is needed. With `used` None
    it holds all B. A step reads nothing else of a partner, so whole UnlabeledViews serve as one, too.
    """

    weak: torch.Tensor
    ignore_mask: torch.Tensor
    used: torch.Tensor | None = None


class Key(NamedTuple):
    """One sample of an epoch. `labeled` counts through the repeated labelled set, so each repetition has own draws.

    `unlabeled` and `partner` are indices of unlabelled images, -1 for none.
    """

    epoch: int
    labeled: int
    unlabeled: int = -1
    partner: int = -1


def stream(seed: int, *purpose: int) -> np.random.Generator:
    """An independent generator for each tuple of non-negative integers below 2**32, among tuples of one length."""
    return np.random.default_rng(np.array([seed, *purpose], np.uint32))  # sooner than from a list


class EpochSampler(Sampler[Key]):
    """The keys of one process for one epoch: a pass over the unlabelled set, shuffled anew, as in the release.

    Each of the `processes` gets ceil(N / processes) images, the last few repeated, cut to whole batches. Position p of
    the epoch's order goes to process p mod `processes`, so a step's images are the same at any number of processes.
    The labelled set is repeated to the unlabelled one's length; if it is longer, each epoch takes the first part of a
    fresh permutation. Without unlabelled images (`num_unlabeled` None) it is one pass over the labelled set, which is
    repeated first to `repeat_labeled_to` samples if it has fewer (UniMatch V2's supervised baseline).

    With `accumulate`, that many batches make a step, and the epoch is cut to whole steps.

    `partner` says where CutMix pastes from: another view of the `same_image`, a view of an `other_image`, or the
    `reversed_batch`, for which a key has no partner.
    """

    def __init__(
        self,
        num_labeled: int,
        num_unlabeled: int | None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        partner: str = "same_image",
        repeat_labeled_to: int | None = None,
        accumulate: int = 1,
    ) -> None:
        self.per_step = batch_size * accumulate
        self.num_labeled, self.num_unlabeled, self.batch_size, self.seed = num_labeled, num_unlabeled, batch_size, seed
        self.rank, self.processes, self.partner = rank, processes, partner
        self.length = max(num_labeled, repeat_labeled_to or 0) if num_unlabeled is None else num_unlabeled
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and how many of its samples it leaves out."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return math.ceil(self.length / self.processes) // self.per_step * self.per_step

    def __iter__(self) -> Iterator[Key]:
        return islice(self._keys(), self.start, None)

    def _keys(self) -> Iterator[Key]:
        pool = max(self.num_labeled, self.length)
        order_x = self._own_share(stream(self.seed, ORDER_X, self.epoch).permutation(pool)[: self.length])
        if self.num_unlabeled is None:
            yield from (Key(self.epoch, int(x)) for x in order_x)
            return
        order_u = stream(self.seed, ORDER_U, self.epoch).permutation(self.length)
        order_mix = {
            "same_image": order_u,
            "other_image": np.roll(order_u, -1),  # the next one in the epoch's order, so never the image itself
            "reversed_batch": np.full_like(order_u, -1),
        }[self.partner]
        for x, u, mix in zip(order_x, self._own_share(order_u), self._own_share(order_mix), strict=True):
            yield Key(self.epoch, int(x), int(u), int(mix))

    def _own_share(self, order: np.ndarray) -> np.ndarray:
        padded = np.resize(order, math.ceil(len(order) / self.processes) * self.processes)
        return padded[self.rank :: self.processes][: len(self)]


class ViewDraws(NamedTuple):
    """What is drawn for one view of an unlabelled image, and what follows from that before the image is decoded."""

    geometry: Geometry
    rows: int  # of the image, from the top, that the view needs
    extent: Extent
    photometry: tuple[Photometry, ...]  # of each strong view
    boxes: tuple[Box | None, ...]


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


class TrainDataset(Dataset):
    """`(image, label)` of a labelled sample; with unlabelled images `((image, label), UnlabeledSample)`.

    8-bit tensors: images (S, S, 3), label (S, S), S = crop_size; `collate` and `to_device` make of them what a step
    takes. `strong_views` is 1 or 2. `photometry` is "worker", or "device" where `to_device` is to make the strong
    views.
    """

    def __init__(
        self,
        labeled: Sequence[Sample],
        unlabeled: Sequence[Sample] | None,
        source: DataSource,
        crop_size: int,
        seed: int,
        strong_views: int = 2,
        photometry: str = "worker",
    ) -> None:
        self.labeled, self.unlabeled, self.source = labeled, unlabeled, source
        self.crop_size, self.seed, self.strong_views, self.photometry = crop_size, seed, strong_views, photometry

    def __getitem__(self, key: Key) -> Any:
        labeled = self._labeled(key)
        return labeled if self.unlabeled is None else (labeled, self._unlabeled(key))

    def _labeled(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        size, sample = self.crop_size, self.labeled[key.labeled % len(self.labeled)]
        with self.source.open_image(sample.image) as image, self.source.open_label(sample.label) as label:
            width, height = decoded_size(image)
            geometry = draw_geometry(width, height, size, stream(self.seed, VIEW_X, key.epoch, key.labeled))
            image, label = self.source.decode_pair(sample, image, label, rows_needed(width, height, geometry, size))
        crop = crop_pixels(image, geometry, size, 0, Image.Resampling.BILINEAR)
        label_crop = crop_pixels(label, geometry, size, IGNORE_INDEX, Image.Resampling.NEAREST)
        return torch.from_numpy(crop), torch.from_numpy(label_crop)

    def _unlabeled(self, key: Key) -> UnlabeledSample:
        (image, own), (image_mix, mix) = self._decode(key)
        weak = self._crop(image, own)
        weak_mix = self._crop(image_mix, mix) if mix else None
        return UnlabeledSample(
            torch.from_numpy(weak),
            self._strong_views(weak, own, weak_mix, mix) if self.photometry == "worker" else (),
            own.extent,
            own.boxes,
            own.photometry,
            PartnerSample(torch.from_numpy(weak_mix), mix.extent, mix.photometry) if mix else None,
            pasted=key.partner >= 0,
        )

    def _strong_views(
        self, weak: np.ndarray, own: ViewDraws, weak_mix: np.ndarray | None, mix: ViewDraws | None
    ) -> tuple[torch.Tensor, ...]:
        image = Image.fromarray(weak)
        if mix is None:
            views = [strong_view(image, draw) for draw in own.photometry]
        else:
            partner, draws = Image.fromarray(weak_mix), zip(own.photometry, own.boxes, mix.photometry, strict=True)
            views = [strong_view(image, draw, box, partner, draw_mix) for draw, box, draw_mix in draws]
        return tuple(torch.from_numpy(np.array(view)) for view in views)

    def _decode(self, key: Key) -> tuple[tuple[Pixels, ViewDraws], tuple[Pixels, ViewDraws] | tuple[None, None]]:
        """The image and its CutMix partner, if any box needs one, each decoded as far as the draws for its view say."""
        with self.source.open_image(self.unlabeled[key.unlabeled].image) as opened:
            own = self._draw(key, 0, *decoded_size(opened))
            if key.partner < 0 or not any(own.boxes):
                return (decode_image(opened, own.rows), own), (None, None)
            if key.partner == key.unlabeled:  # decoded once
                mix = self._draw(key, 1, *decoded_size(opened))
                image = decode_image(opened, max(own.rows, mix.rows))
                return (image, own), (image, mix)
            image = decode_image(opened, own.rows)
        with self.source.open_image(self.unlabeled[key.partner].image) as opened:
            mix = self._draw(key, 1, *decoded_size(opened))
            return (image, own), (decode_image(opened, mix.rows), mix)

    def _draw(self, key: Key, view: int, width: int, height: int) -> ViewDraws:
        """All that is drawn for a view of an image of `width` x `height`: 0 is the sample's own, 1 its partner's."""
        rng, size = stream(self.seed, VIEW_U, key.epoch, key.unlabeled, view), self.crop_size
        geometry = draw_geometry(width, height, size, rng)
        draws = [(draw_photometry(rng), draw_cutmix_box(size, rng)) for _ in range(self.strong_views)]
        photometry, boxes = zip(*draws, strict=True)
        rows, extent = rows_needed(width, height, geometry, size), visible_extent(width, height, geometry, size)
        return ViewDraws(geometry, rows, extent, photometry, boxes)

    def _crop(self, image: Pixels, draws: ViewDraws) -> np.ndarray:
        return crop_pixels(image, draws.geometry, self.crop_size, 0, Image.Resampling.BILINEAR)


class ValDataset(Dataset):
    """`(image, label)` at native size: 8-bit tensors (3, H, W) and (H, W)."""

    def __init__(self, samples: Sequence[Sample], source: DataSource) -> None:
        self.samples, self.source = samples, source

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.source.load(self.samples[index])
        return to_tensor(image), to_tensor(label)
