"""DataLoaders for training and validation, and what their loading processes do at signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from dataset.files import image_pixel_limit, jpeg_decoder, limit_image_pixels
from dataset.handover import CHECK, HandingLoader, give_up_where_nothing_can_be_handed_over
from dataset.lists import Sample
from dataset.packing import collate
from dataset.replacement import ReplacingLoader
from dataset.sampler import EpochSampler
from dataset.semi import TrainDataset, ValDataset
from dataset.source import DataSource


class LoaderOptions(NamedTuple):
    """How a DataLoader works: processes, batches that each has ready, whether processes stay, pinned memory."""

    workers: int = 0
    prefetch: int = 2
    persistent: bool = True
    pin_memory: bool = False

    def build(self, dataset: Dataset, kind: type[DataLoader] = HandingLoader, **arguments: Any) -> DataLoader:
        """A DataLoader of `dataset` that works so."""
        if self.workers:  # torch refuses these for a loader that works in the training process
            arguments |= {"prefetch_factor": self.prefetch, "persistent_workers": self.persistent, "timeout": CHECK}
            jpeg_decoder()  # its library takes seconds to import: forked processes have it from here
            if sys.platform == "linux":  # forked ones share the lists; from Python 3.14 on each would get a copy
                arguments.setdefault("multiprocessing_context", "fork")
        start = partial(_start_worker, image_pixel_limit())
        return kind(dataset, num_workers=self.workers, pin_memory=self.pin_memory, worker_init_fn=start, **arguments)


def _start_worker(max_image_pixels: int, _: int) -> None:
    """A loading process takes over the limit of image sizes, not being a copy of its parent everywhere."""
    limit_image_pixels(max_image_pixels)
    ignore_signals()
    give_up_where_nothing_can_be_handed_over()
    sys.excepthook = _tell_unless_orphaned


def _tell_unless_orphaned(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The thread that hands tensors over reports its errors here; a parent that was killed meanwhile is no error."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def train_loader(
    dataset: TrainDataset, sampler: EpochSampler, options: LoaderOptions, skip_bad: bool = False
) -> DataLoader:
    """Batches of `dataset` in the sampler's order; set the epoch on `loader.sampler`.

    An unreadable image raises DataError or, with `skip_bad`, another sample takes its place.
    """
    kind = ReplacingLoader if skip_bad else HandingLoader
    batches = {"batch_size": sampler.batch_size, "sampler": sampler, "drop_last": True}
    return options.build(dataset, kind, collate_fn=collate, **batches)


def val_loader(
    samples: Sequence[Sample], source: DataSource, options: LoaderOptions, rank: int = 0, processes: int = 1
) -> DataLoader:
    """One validation image at a time; each image goes to exactly one process, so shares may differ by one image."""
    return options.build(ValDataset(samples[rank::processes], source), batch_size=1)


def ignore_signals() -> None:
    """Keep a loading process at work while its parent, which got the same signal, finishes its step and saves.

    Ctrl-C, Slurm and torchrun signal all processes of a run, loading ones too.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The interpreter's end and DataLoader may end a loading process by SIGTERM and wait for it: it ends, but later.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def default_workers(processes: int) -> int:
    """A fair share of this machine's usable cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes))
