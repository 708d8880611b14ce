"""The data path: samples of a loading worker, an epoch of the loader, and the checks at the start."""

from __future__ import annotations

import collections
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from dataset.cache import ImageCache
from dataset.check import check_samples
from dataset.files import read_image, read_label
from dataset.loader import LoaderOptions, train_loader
from dataset.packing import collate, to_device
from dataset.semi import EpochSampler, Key, TrainDataset
from dataset.source import DataSource
from dataset.transform import IMAGENET_MEAN, IMAGENET_STD
from scripts.benchmark.inputs import Inputs, Kind
from scripts.benchmark.naive import paste_partner
from scripts.benchmark.naive_data import NaiveDataset, collate_naive
from scripts.benchmark.rows import Row, alternate, threads, verdict


def measure_data(inputs: Inputs) -> Iterator[Row]:
    """Samples as one loading worker makes them, on one thread; and the bytes that it sends."""
    with threads(1):
        for kind in inputs.kinds:
            caches = {"disk": ImageCache(inputs.root / "cache", 10**10)}
            if Path("/dev/shm").is_dir():
                caches["ram"] = ImageCache(Path(tempfile.mkdtemp(dir="/dev/shm")), 10**10)
            keys = [Key(epoch, i, i, i) for epoch in range(2) for i in range(kind.count)]
            slow, fast = _datasets(inputs.root, kind)
            equality = _compare_labeled(slow, fast, keys)
            yield _samples(f"labelled sample, {kind.name}", slow._labeled, fast._labeled, keys, inputs.rounds, equality)
            for place, cache in caches.items():
                _, cached = _datasets(inputs.root, kind, cache=cache)
                same = all(map(torch.equal, _tensors(map(fast._labeled, keys)), _tensors(map(cached._labeled, keys))))
                title = f"labelled sample, {kind.name}, from the {place} cache"
                yield _samples(
                    title, slow._labeled, cached._labeled, keys, inputs.rounds, f"{verdict(same)} to no cache"
                )
            for method, strong_views in (("UniMatch", 2), ("FixMatch", 1)):
                _, fast = _datasets(inputs.root, kind, strong_views)
                equality = _compare_pairs(slow, fast, keys)
                title = f"{method}'s unlabelled pair, {kind.name}"
                yield _samples(title, slow.pair, fast._unlabeled, keys, inputs.rounds, equality)
                bytes_naive = [_size(slow.pair(key)) for key in keys]
                bytes_ours = [_size(collate([fast[key]])[1]) for key in keys]
                mean = [[statistics.mean(sizes) / 1e6] for sizes in (bytes_naive, bytes_ours)]
                yield Row(f"{method}'s unlabelled sample, {kind.name}, as it is sent", *mean, "MB", "the same batches")
            for cache in caches.values():
                cache.close()
                shutil.rmtree(cache.folder)


def measure_loader(inputs: Inputs) -> Iterator[Row]:
    """An epoch of UniMatch whose step takes no time: all of it is waiting for data."""
    workers, kind = len(os.sched_getaffinity(0)), replace(inputs.kinds[0], samples=4 * inputs.kinds[0].samples)
    slow, fast = _datasets(inputs.root, kind)
    sampler, options = EpochSampler(len(kind.samples), len(kind.samples), 2, 0), LoaderOptions(workers)
    slow_loader = options.build(slow, batch_size=2, sampler=sampler, collate_fn=collate_naive, drop_last=True)
    fast_loader = train_loader(fast, sampler, options)

    def ours() -> None:
        for batch in fast_loader:
            to_device(batch, torch.device("cpu"))

    with threads(1):  # the cores are the workers'
        times = alternate(lambda: collections.deque(slow_loader, maxlen=0), ours, inputs.rounds)
    equality = f"{len(slow_loader)} and {len(fast_loader)} batches of the same samples"
    yield Row(f"waiting for an epoch's data, {kind.name}, {workers} workers", *times, "s", equality)


def measure_startup(inputs: Inputs) -> Iterator[Row]:
    """The checks before training, against decoding every image and label one after the other."""
    source = DataSource(inputs.root)
    for kind in inputs.kinds:

        def decode_all(kind: Kind = kind) -> None:
            for sample in kind.samples:
                image, label = read_image(inputs.root / sample.image), read_label(inputs.root / sample.label)
                assert image.size == label.size and np.asarray(label).max() < 19

        times = alternate(decode_all, lambda kind=kind: check_samples(kind.samples, source, 19), inputs.rounds)
        yield Row(f"checks at the start, {kind.name}", *times, "s", "images only to their ends, labels in full")


def _samples(
    title: str,
    naive_way: Callable[[Key], Any],
    our_way: Callable[[Key], Any],
    keys: Sequence[Key],
    rounds: int,
    equality: str,
) -> Row:
    """Milliseconds a sample, by the mean over `keys` in each round."""
    times = alternate(lambda: [naive_way(key) for key in keys], lambda: [our_way(key) for key in keys], rounds)
    return Row(title, *([1000 * x / len(keys) for x in way] for way in times), "ms", equality)


def _datasets(
    root: Path, kind: Kind, strong_views: int = 2, cache: ImageCache | None = None
) -> tuple[NaiveDataset, TrainDataset]:
    unlabeled = [sample._replace(label=None) for sample in kind.samples]
    slow = NaiveDataset(kind.samples, unlabeled, DataSource(root), kind.crop, 0)
    return slow, TrainDataset(kind.samples, unlabeled, DataSource(root, cache=cache), kind.crop, 0, strong_views)


def _compare_labeled(slow: TrainDataset, fast: TrainDataset, keys: Sequence[Key]) -> str:
    """Labels exactly; images by the pixels of which any channel differs."""
    off, most, labels = [], 0, True
    for key in keys:
        (image, label), (pixels, own_label) = slow._labeled(key), fast._labeled(key)
        difference = (_levels(image) - pixels.int()).abs().amax(-1)
        off.append((difference > 0).double().mean().item())
        most, labels = max(most, int(difference.max())), labels and torch.equal(label, own_label.long())
    return f"labels {verdict(labels)}, {100 * statistics.mean(off):.2f}% of pixels off by <= {most}"


def _compare_pairs(slow: TrainDataset, fast: TrainDataset, keys: Sequence[Key]) -> str:
    """What a step makes of both: weak views and their masks, and strong views after CutMix."""
    off, masks, mean = [], True, []
    for key in keys:
        _, u, _ = to_device(collate([fast[key]]), torch.device("cpu"))
        _, slow_u, slow_mix = collate_naive([slow[key]])
        off.append((_levels(u.weak[0]) != _levels(slow_u.weak[0])).any(-1).double().mean().item())
        masks &= torch.equal(u.ignore_mask.long(), slow_u.ignore_mask) and torch.equal(u.box1.long(), slow_u.box1)
        mixed = paste_partner(slow_u, slow_mix).strong1
        mean.append((_levels(u.strong1[0]) - _levels(mixed[0])).abs().double().mean().item())
    return (
        f"masks {verdict(masks)}, {100 * statistics.mean(off):.2f}% of weak pixels off, strong views by "
        f"{statistics.mean(mean):.1g} levels in the mean"
    )


def _levels(image: torch.Tensor) -> torch.Tensor:
    """8-bit values, int32 (H, W, 3), of a normalised image (3, H, W)."""
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_STD, IMAGENET_MEAN))
    return (255 * (image * std + mean)).round().int().permute(1, 2, 0)


def _size(batch: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(batch))


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
