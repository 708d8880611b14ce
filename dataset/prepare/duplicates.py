"""Images that are listed or stored twice, found in a few bytes for each: only those of equal keys are compared."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dataset.lists import location
from dataset.samples import Sample, Samples

DIGEST = 16  # bytes
UNREAD = bytes(DIGEST)  # in place of the digest of an image that cannot be read


def repetitions(listed: Sequence[Sample], root: Path) -> Iterator[tuple[str, list[str | None]]]:
    """(path, labels) of each image that a list names more than once, however it writes the path."""
    places = Samples.of(listed).places(os.path.abspath(root))
    labels = defaultdict(list)
    for k in _repeated(np.fromiter(map(hash, places), np.int64, len(listed))).tolist():
        labels[location(root, listed[k].image)].append(listed[k].label)
    yield from ((path, named) for path, named in labels.items() if len(named) > 1)


def copies(lists: Mapping[str, Sequence[Sample]], digests: bytes, root: Path) -> Iterator[dict[str, list[str]]]:
    """{path: lists' names} of the images that hold the same bytes, for each such content.

    `digests`: DIGEST bytes for each image of the lists, one list after the other.
    """
    repeated, start = _repeated(np.frombuffer(digests, np.int64)[:: DIGEST // 8]), 0
    named: dict[bytes, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, listed in lists.items():
        own = repeated[(repeated >= start) & (repeated < start + len(listed))].tolist()
        found = ((listed[k - start], digests[DIGEST * k : DIGEST * (k + 1)]) for k in own)
        for sample, digest in dict.fromkeys(found):
            if digest != UNREAD:
                named[digest][location(root, sample.image)].append(name)
        start += len(listed)
    yield from (dict(paths) for paths in named.values() if len(paths) > 1)


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Where the keys, int64 (N,), are that occur more than once, ascending."""
    order = np.argsort(keys, kind="stable")
    equal = np.diff(keys[order]) == 0
    among = np.zeros(len(keys), bool)
    among[order[1:][equal]] = among[order[:-1][equal]] = True
    return np.flatnonzero(among)
