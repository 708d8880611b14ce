"""Datasets, their order in an epoch, and loaders for semi-supervised and supervised training and for validation.

A sample is a function of its key (epoch, indices): its draws are seeded by (seed, epoch, index, view). So two runs see
the same data whatever the number of workers, and N processes together see what one process would.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dataset.files import IGNORE_INDEX, Sample, map_label, read_image, read_label
from dataset.transform import (
    apply_geometry,
    apply_photometry,
    box_mask,
    draw_cutmix_box,
    draw_geometry,
    draw_photometry,
    normalize,
    padding_mask,
    to_tensor,
)

# What a random stream is for: part of its seed, so that no two purposes share one.
ORDER_X, ORDER_U, VIEW_X, VIEW_U = range(4)


class UnlabeledViews(NamedTuple):
    """Views of unlabelled images: of one sample in the dataset, with a leading batch dimension B in a step.

    weak, strong1, strong2: (B, 3, H, W); ignore_mask: (B, H, W), 255 on padding, else 0; box1, box2: (B, H, W), nonzero
    inside the CutMix box of the strong view. The second strong view is None where the method has one only.
    """

    weak: torch.Tensor
    strong1: torch.Tensor
    strong2: torch.Tensor | None
    ignore_mask: torch.Tensor
    box1: torch.Tensor
    box2: torch.Tensor | None


class Key(NamedTuple):
    """One sample of an epoch. `labeled` counts through the repeated labelled set, so each repetition has own draws."""

    epoch: int
    labeled: int
    unlabeled: int = -1
    partner: int = -1


def stream(seed: int, *purpose: int) -> np.random.Generator:
    """An independent generator for each tuple of non-negative integers below 2**32, among tuples of one length."""
    return np.random.default_rng([seed, *purpose])


class EpochSampler(Sampler[Key]):
    """The keys of one process for one epoch: a pass over the unlabelled set, shuffled anew, as in the release.

    Each of the `processes` gets ceil(N / processes) images, the last few repeated, cut to whole batches. Position p of
    the epoch's order goes to process p mod `processes`, so a step's images are the same at any number of processes.
    The labelled set is repeated to the unlabelled one's length; if it is longer, each epoch takes the first part of a
    fresh permutation. Without unlabelled images (`num_unlabeled` None) it is one pass over the labelled set.
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
    ) -> None:
        self.num_labeled, self.num_unlabeled, self.batch_size, self.seed = num_labeled, num_unlabeled, batch_size, seed
        self.rank, self.processes, self.partner = rank, processes, partner
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        length = self.num_labeled if self.num_unlabeled is None else self.num_unlabeled
        return math.ceil(length / self.processes) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        if self.num_unlabeled is None:
            order = stream(self.seed, ORDER_X, self.epoch).permutation(self.num_labeled)
            yield from (Key(self.epoch, int(x)) for x in self._own_share(order))
            return
        pool = max(self.num_labeled, self.num_unlabeled)
        order_x = stream(self.seed, ORDER_X, self.epoch).permutation(pool)[: self.num_unlabeled]
        order_u = stream(self.seed, ORDER_U, self.epoch).permutation(self.num_unlabeled)
        # Another image as partner: the next one in the epoch's order, so never the image itself.
        order_mix = np.roll(order_u, -1) if self.partner == "other_image" else order_u
        shares = (self._own_share(order) for order in (order_x, order_u, order_mix))
        for x, u, mix in zip(*shares, strict=True):
            yield Key(self.epoch, int(x), int(u), int(mix))

    def _own_share(self, order: np.ndarray) -> np.ndarray:
        padded = np.resize(order, math.ceil(len(order) / self.processes) * self.processes)
        return padded[self.rank :: self.processes][: len(self)]


class TrainDataset(Dataset):
    """`(image, label)` of a labelled sample; with unlabelled images `((image, label), views, partner's views)`.

    8-bit tensors: images (3, S, S), label and ignore mask (S, S), S = crop_size. `strong_views` is 1 or 2. `label_map`
    gives the class of values in the label files that are no class themselves.
    """

    def __init__(
        self,
        labeled: Sequence[Sample],
        unlabeled: Sequence[Sample] | None,
        data_root: str | Path,
        crop_size: int,
        seed: int,
        strong_views: int = 2,
        label_map: Mapping[int, int] | None = None,
    ) -> None:
        self.labeled, self.unlabeled, self.data_root = labeled, unlabeled, Path(data_root)
        self.label_map = label_map
        self.crop_size, self.seed, self.strong_views = crop_size, seed, strong_views

    def __getitem__(self, key: Key) -> Any:
        labeled = self._labeled(key)
        if self.unlabeled is None:
            return labeled
        image = read_image(self.data_root / self.unlabeled[key.unlabeled].image)
        # An image that is its own partner is decoded once.
        own = key.partner == key.unlabeled
        other = image if own else read_image(self.data_root / self.unlabeled[key.partner].image)
        return labeled, self._views(image, key, view=0), self._views(other, key, view=1)

    def _labeled(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.labeled[key.labeled % len(self.labeled)]
        image = read_image(self.data_root / sample.image)
        label = map_label(read_label(self.data_root / sample.label), self.label_map)
        geometry = draw_geometry(*image.size, self.crop_size, stream(self.seed, VIEW_X, key.epoch, key.labeled))
        image = apply_geometry(image, geometry, self.crop_size, 0, Image.Resampling.BILINEAR)
        label = apply_geometry(label, geometry, self.crop_size, IGNORE_INDEX, Image.Resampling.NEAREST)
        return to_tensor(image), to_tensor(label)

    def _views(self, image: Image.Image, key: Key, view: int) -> UnlabeledViews:
        rng = stream(self.seed, VIEW_U, key.epoch, key.unlabeled, view)
        size = self.crop_size
        geometry = draw_geometry(*image.size, size, rng)
        weak = apply_geometry(image, geometry, size, 0, Image.Resampling.BILINEAR)
        ignore_mask = padding_mask(*image.size, geometry, size)
        strong = [
            (to_tensor(apply_photometry(weak, draw_photometry(rng))), box_mask(draw_cutmix_box(size, rng), size))
            for _ in range(self.strong_views)
        ]
        (strong1, box1), (strong2, box2) = (*strong, (None, None))[:2]
        return UnlabeledViews(to_tensor(weak), strong1, strong2, ignore_mask, box1, box2)


class ValDataset(Dataset):
    """`(image, label)` at native size: 8-bit tensors (3, H, W) and (H, W). `label_map` as in TrainDataset."""

    def __init__(
        self, samples: Sequence[Sample], data_root: str | Path, label_map: Mapping[int, int] | None = None
    ) -> None:
        self.samples, self.data_root, self.label_map = samples, Path(data_root), label_map

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.samples[index]
        image, label = read_image(self.data_root / sample.image), read_label(self.data_root / sample.label)
        return to_tensor(image), to_tensor(map_label(label, self.label_map))


def train_loader(dataset: TrainDataset, sampler: EpochSampler, workers: int | None, pin_memory: bool) -> DataLoader:
    """Batches of `dataset` in the sampler's order; set the epoch on `loader.sampler`."""
    workers = default_workers(sampler.processes) if workers is None else workers
    return DataLoader(
        dataset,
        sampler.batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        persistent_workers=workers > 0,
        drop_last=True,
    )


def val_loader(
    samples: Sequence[Sample],
    data_root: str | Path,
    workers: int | None,
    pin_memory: bool,
    rank: int = 0,
    processes: int = 1,
    label_map: Mapping[int, int] | None = None,
) -> DataLoader:
    """One validation image at a time; each image goes to exactly one process, so shares may differ by one image."""
    workers = default_workers(processes) if workers is None else workers
    dataset = ValDataset(samples[rank::processes], data_root, label_map)
    return DataLoader(dataset, batch_size=1, num_workers=workers, pin_memory=pin_memory)


def default_workers(processes: int) -> int:
    """A fair share of this machine's usable cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes))


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples, leaving out the strong view that a method does not use."""
    if not isinstance(samples[0][1], UnlabeledViews):
        return default_collate(samples)
    labeled, *views = zip(*samples, strict=True)
    return default_collate(labeled), *(
        UnlabeledViews(*(None if parts[0] is None else torch.stack(parts) for parts in zip(*view, strict=True)))
        for view in views
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """A collated batch as a step takes it: images normalised floats, labels int64, on `device`. Copies do not block."""
    if len(batch) == 3:
        labeled, *views = batch
        return to_device(labeled, device), *(_views_to_device(view, device) for view in views)
    image, label = batch
    return normalize(image.to(device, non_blocking=True)), label.to(device, non_blocking=True).long()


def _views_to_device(views: UnlabeledViews, device: torch.device) -> UnlabeledViews:
    moved = [None if part is None else part.to(device, non_blocking=True) for part in views]
    return UnlabeledViews(*(part if part is None or part.ndim < 4 else normalize(part) for part in moved))
