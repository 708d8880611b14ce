"""The order of an epoch: which labelled, unlabelled and partner image each sample has, and its random streams."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

# What a random stream is for: part of its seed, so that no two purposes share one.
ORDER_X, ORDER_U, VIEW_X, VIEW_U, REPLACEMENT = range(5)


class Key(NamedTuple):
    """One sample of an epoch. `labeled` counts on through repetitions of the labelled set: each has its own draws.

    `unlabeled` and `partner` are indices of unlabelled images, -1 for none.
    """

    epoch: int
    labeled: int
    unlabeled: int = -1
    partner: int = -1


def stream(seed: int, *purpose: int) -> np.random.Generator:
    """An independent generator for each tuple of non-negative integers below 2**32, among tuples of one length."""
    return np.random.default_rng(np.array([seed, *purpose], np.uint32))  # faster than from a list


class EpochSampler(Sampler[Key]):
    """The keys of one process for one epoch: a pass over the unlabelled set, shuffled each time, as in the release.

    Each of the `processes` gets ceil(N / processes) images, the last few repeated, cut to whole batches. Position p of
    the epoch's order goes to process p mod `processes`, so a step's images are the same at any number of processes.
    The labelled set is repeated to the unlabelled one's length; if it is longer, each epoch takes the first part of a
    fresh permutation. Without unlabelled images (`num_unlabeled` None) it is one pass over the labelled set, which is
    repeated first to `repeat_labeled_to` samples if it has fewer (UniMatch V2's supervised baseline).

    With `accumulate`, that many batches make a step, and the epoch is cut to whole steps. Where a run began on another
    number of processes, an epoch may have other `steps`.

    `partner` says where CutMix pastes from: another view of the `same_image`, a view of an `other_image`, or the
    `reversed_batch`, for which a key has no partner. For this one the second half of a process's batch comes from the
    positions of its mirror image, process P - 1 - rank: each process then finds in its own batch, reversed, what one
    process with all images would find in all of them. (But for the middle of an odd batch, which is its own partner.)
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
        steps: int | None = None,
    ) -> None:
        self.per_step, self.steps = batch_size * accumulate, steps
        self.num_labeled, self.num_unlabeled, self.batch_size, self.seed = num_labeled, num_unlabeled, batch_size, seed
        self.rank, self.processes, self.partner = rank, processes, partner
        self.length = max(num_labeled, repeat_labeled_to or 0) if num_unlabeled is None else num_unlabeled
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and how many of its samples it leaves out."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        steps = math.ceil(self.length / self.processes) // self.per_step if self.steps is None else self.steps
        return steps * self.per_step

    def __iter__(self) -> Iterator[Key]:
        pool = max(self.num_labeled, self.length)
        own_x = self._own_share(stream(self.seed, ORDER_X, self.epoch).permutation(pool)[: self.length])
        if self.num_unlabeled is None:
            yield from (Key(self.epoch, int(x)) for x in own_x)
            return
        order_u = stream(self.seed, ORDER_U, self.epoch).permutation(self.length)
        own_u = self._own_share(order_u)
        if self.partner == "same_image":
            own_mix = own_u
        elif self.partner == "other_image":
            own_mix = self._own_share(np.roll(order_u, -1))  # the next in the epoch's order, so never the image itself
        else:
            own_mix = np.full_like(own_u, -1)
        del order_u  # it may be of millions of images
        for x, u, mix in zip(own_x, own_u, own_mix, strict=True):
            yield Key(self.epoch, int(x), int(u), int(mix))

    def _own_share(self, order: np.ndarray) -> np.ndarray:
        """What is left of this process's part of the order, which is repeated until all parts are equally long."""
        own = self._share(order, self.rank)
        if self.partner == "reversed_batch":
            mirrored = 2 * (np.arange(self.start, len(self)) % self.batch_size) >= self.batch_size
            own[mirrored] = self._share(order, self.processes - 1 - self.rank)[mirrored]
        return own

    def _share(self, order: np.ndarray, first: int) -> np.ndarray:
        """Every `processes`-th of the order from position `first` on, without what was left out."""
        positions = range(first + self.start * self.processes, len(self) * self.processes, self.processes)
        listed = order[positions.start : positions.stop : self.processes]
        repeated = [order[position % len(order)] for position in positions[len(listed) :]]
        # Half the memory of the order itself, of which nothing is kept.
        return np.concatenate([listed, np.array(repeated, order.dtype)], dtype=np.int32, casting="same_kind")
