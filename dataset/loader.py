"""DataLoaders for training and validation, their loading processes, and replacing unreadable samples."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dataset.cache import ImageCache
from dataset.errors import DataError
from dataset.files import (
    image_pixel_limit,
    limit_image_pixels,
)
from dataset.lists import Sample
from dataset.packing import collate
from dataset.semi import EpochSampler, TrainDataset, ValDataset


class LoaderOptions(NamedTuple):
    """How a DataLoader works: processes, batches that each has ready, whether they outlive an epoch, pinned memory."""

    workers: int = 0
    prefetch: int = 2
    persistent: bool = True
    pin_memory: bool = False

    def build(self, dataset: Dataset, kind: type[DataLoader] = DataLoader, **arguments: Any) -> DataLoader:
        """A DataLoader of `dataset` that works so."""
        if self.workers:  # torch refuses these for a loader that works in the training process
            arguments |= {"prefetch_factor": self.prefetch, "persistent_workers": self.persistent}
        start = partial(_start_worker, image_pixel_limit())
        return kind(dataset, num_workers=self.workers, pin_memory=self.pin_memory, worker_init_fn=start, **arguments)


def _start_worker(max_image_pixels: int, _: int) -> None:
    """A loading process takes over the limit of image sizes, not being a copy of its parent everywhere."""
    limit_image_pixels(max_image_pixels)
    outlive_signals()
    sys.excepthook = _tell_unless_orphaned


def _tell_unless_orphaned(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The thread that hands tensors over tells its errors here: nothing of a parent that was killed meanwhile."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def train_loader(
    dataset: TrainDataset, sampler: EpochSampler, options: LoaderOptions, skip_bad: bool = False
) -> DataLoader:
    """Batches of `dataset` in the sampler's order; set the epoch on `loader.sampler`.

    An unreadable image raises DataError or, with `skip_bad`, another sample takes its place.
    """
    kind = ReplacingLoader if skip_bad else DataLoader
    batches = {"batch_size": sampler.batch_size, "sampler": sampler, "drop_last": True}
    return options.build(dataset, kind, collate_fn=collate, **batches)


def val_loader(
    samples: Sequence[Sample],
    data_root: str | Path,
    options: LoaderOptions,
    rank: int = 0,
    processes: int = 1,
    label_map: Mapping[int, int] | None = None,
    cache: ImageCache | None = None,
) -> DataLoader:
    """One validation image at a time; each image goes to exactly one process, so shares may differ by one image."""
    return options.build(ValDataset(samples[rank::processes], data_root, label_map, cache), batch_size=1)


def outlive_signals() -> None:
    """Keep a loading process at work while its parent, which got the same signal, finishes its step and saves.

    Ctrl-C, Slurm and torchrun signal all processes of a run, loading ones too.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The interpreter's end and DataLoader may end a loading process by SIGTERM and wait for it: it ends, but later.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def default_workers(processes: int) -> int:
    """A fair share of this machine's usable cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes))


TRIES = 10
REPLACEMENT = 4  # a purpose of random streams beside those of dataset.semi


class ReplacingDataset(Dataset):
    """`(sample, faults)`: the training set's sample of a key or, if it is unreadable, of another key of the epoch.

    That key is a function of the seed and the key, so it depends neither on workers nor on what ran before. Labelled
    image, unlabelled image and partner are replaced together. `faults` are the messages of what was unreadable.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> tuple[Any, list[str]]:
        faults: list[str] = []
        for attempt in range(TRIES):
            try:
                return self.dataset[self._drawn(key, attempt)], faults
            except DataError as error:
                faults.append(str(error))
        raise DataError(f"{faults[-1]} ({TRIES} samples in a row were unreadable)")

    def _drawn(self, key: Any, attempt: int) -> Any:
        if attempt == 0:
            return key
        purpose = (REPLACEMENT, key.epoch, key.labeled, key.unlabeled + 1, attempt)  # without one, `unlabeled` is -1
        rng = np.random.default_rng((self.dataset.seed, *purpose))
        labeled = int(rng.integers(len(self.dataset.labeled)))
        if self.dataset.unlabeled is None:
            return key._replace(labeled=labeled)
        unlabeled, partner = map(int, rng.integers(len(self.dataset.unlabeled), size=2))
        own = key.partner == key.unlabeled
        return key._replace(labeled=labeled, unlabeled=unlabeled, partner=unlabeled if own else partner)


class ReplacingLoader(DataLoader):
    """A DataLoader of `ReplacingDataset(dataset)` whose batches are those of a loader of `dataset`.

    `faults` has a message for each sample that was replaced in the batches taken so far; take them out of there.
    """

    def __init__(self, dataset: Any, *args: Any, collate_fn: Callable[[Sequence[Any]], Any], **options: Any) -> None:
        super().__init__(ReplacingDataset(dataset), *args, collate_fn=partial(_collate, collate_fn), **options)
        self.faults: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        for batch, faults in super().__iter__():
            self.faults += faults
            yield batch


def _collate(
    collate: Callable[[Sequence[Any]], Any], samples: Sequence[tuple[Any, list[str]]]
) -> tuple[Any, list[str]]:
    parts, faults = zip(*samples, strict=True)
    return collate(parts), [fault for own in faults for fault in own]
