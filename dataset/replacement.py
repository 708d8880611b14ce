"""Replacing samples that cannot be read in mid-training by others (`on_bad_image: skip`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from dataset.errors import DataError
from dataset.handover import HandingLoader
from dataset.sampler import REPLACEMENT, stream

TRIES = 10


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
                return self.dataset[self.key_for(key, attempt)], faults
            except DataError as error:
                faults.append(str(error))
        raise DataError(f"{faults[-1]} ({TRIES} samples in a row were unreadable)")

    def key_for(self, key: Any, attempt: int) -> Any:
        """The key to read at this attempt: `key` itself at first, then others of its epoch."""
        if attempt == 0:
            return key
        purpose = (REPLACEMENT, key.epoch, key.labeled, key.unlabeled + 1, attempt)  # without one, `unlabeled` is -1
        rng = stream(self.dataset.seed, *purpose)
        labeled = int(rng.integers(len(self.dataset.labeled)))
        if self.dataset.unlabeled is None:
            return key._replace(labeled=labeled)
        unlabeled, partner = map(int, rng.integers(len(self.dataset.unlabeled), size=2))
        if key.partner in (-1, key.unlabeled):  # none, or the image itself
            partner = -1 if key.partner == -1 else unlabeled
        return key._replace(labeled=labeled, unlabeled=unlabeled, partner=partner)


def training_set(loader: DataLoader) -> Dataset:
    """The dataset of a training loader, whether it replaces samples or not."""
    dataset = loader.dataset
    return dataset.dataset if isinstance(dataset, ReplacingDataset) else dataset


class ReplacingLoader(HandingLoader):
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
