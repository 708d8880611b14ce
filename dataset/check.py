"""The quick check of a run's images and labels before training starts."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.bands import bands_size
from dataset.errors import DataError
from dataset.files import (
    IGNORE_INDEX,
    check_depth,
    errors_named,
    gives_upper_bits,
    read_image,
    read_label,
    size_fault,
)
from dataset.lists import Progress, Sample, no_progress
from dataset.source import DataSource

# The last bytes of a whole file. A file without them may still be whole (some cameras append data): then it is decoded.
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
TWO_WAYS = "labels that can be read two ways"  # the heading of such faults


def check_samples(
    samples: Sequence[Sample],
    source: DataSource,
    nclass: int,
    threads: int = 8,
    progress: Progress = no_progress,
) -> Path | None:
    """Check every file of a list in `source`; the first fault in list order is raised as DataError.

    Returns the first image of 16 bits per channel, of which the upper 8 are used.

    `progress` wraps the iterator over the checked samples.

    Images: present, a readable header, not truncated. Labels: present, of the image's size, values after `label_map`
    below `nclass` or 255. Images are decoded only where their last bytes look cut off; labels always.
    """
    root, label_map = Path(source.root), source.label_map
    check_root(root)
    found: set[int] = set()
    two_ways, first, labels, deep = [], None, 0, None  # nothing that grows with the list
    with ThreadPoolExecutor(threads) as pool:  # reading and Pillow's decoders release the interpreter lock
        checked = bounded_map(pool, lambda sample: check_sample(sample, source, nclass), samples)
        checked = progress("checking data", "samples", checked, len(samples))
        for sample, (values, shown, upper_bits) in zip(samples, checked, strict=True):
            found |= values
            if not two_ways and can_be_read_two_ways(values, shown, nclass, label_map):
                two_ways = [root / sample.label]
            first, labels = first or sample.label, labels + bool(sample.label)
            deep = deep or (root / sample.image if upper_bits else None)
    if first and (fault := mask_fault(root / first, labels, found, label_map)):
        raise fault
    if fault := mixed_fault(two_ways, found):
        raise fault
    return deep


def bounded_map(pool: Executor, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The results in order. Few are asked for in advance: a million pending ones take 1.6 GB."""
    pending: deque[Future] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 1024:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def check_root(root: Path) -> None:
    """Raise DataError unless `root`, the config's data_root, is a folder."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data_root must hold the images that the lists name")


def mask_fault(first: Path, count: int, found: Set[int], label_map: Mapping[int, int] | None) -> DataError | None:
    """The fault of a list in whose `count` labels, the `first` among them, there are just 255 and perhaps 0."""
    if label_map or IGNORE_INDEX not in found or not found <= {0, IGNORE_INDEX}:
        return None
    return DataError(
        f"{first}: values found over all {count} labels of the list: {_few(sorted(found))}, so no class but 0 occurs; "
        f"{mask_hint()}",
        "lists of labels without a class",
    )


def can_be_read_two_ways(
    found: Collection[int], shown: Sequence[int] | None, nclass: int, label_map: Mapping[int, int] | None
) -> bool:
    """Whether the values found in a label of few bits, or a palette of black and white, may also be 255 and classes.

    A program that makes files smaller without loss keeps what is shown, and stores 255 in one bit as 1. `shown`: of
    each stored value, as `read_label` gives it; None if values are stored as they are shown.
    """
    if shown is None or IGNORE_INDEX not in (values := [shown[value] for value in found]):
        return False
    label_map = label_map or {}
    classes = [label_map.get(value, value) for value in values]
    differ = classes != [label_map.get(value, value) for value in found]
    return differ and all(value < nclass or value == IGNORE_INDEX for value in classes)


def mixed_fault(two_ways: Sequence[Path], found: Set[int]) -> DataError | None:
    """The fault of a list with labels that can be read two ways while others have 255, of all the values `found`."""
    return _two_ways_fault(two_ways[0]) if two_ways and IGNORE_INDEX in found else None


def _two_ways_fault(path: Path, bits: str = "few bits") -> DataError:
    return DataError(
        f"{path}: a label of {bits} per pixel, whose white may mean a class or 255 (ignored): store 8 bits per pixel",
        TWO_WAYS,
    )


def mask_hint(value: int = 255) -> str:
    """What to do about labels in which 0 and `value` mean background and object."""
    return (
        f"it looks like a 0/255 mask: set label_map: {{0: 0, {value}: 1}}, "
        "or store class indices, 0 for background and 1 for the object"
    )


def check_sample(sample: Sample, source: DataSource, nclass: int) -> tuple[set[int], Sequence[int] | None, bool]:
    """The values found in the sample's label (none without one), as what they are shown, and of the image whether
    its upper bits alone are used.
    """
    root = Path(source.root)
    path = root / sample.image
    size, upper_bits = (bands_size(path, source.bands, whole=True), False) if source.bands else _check_image(path)
    if sample.label is None:
        return set(), None, upper_bits
    label = read_label(root / sample.label, source.label_colors)
    found = np.flatnonzero(label.histogram()).tolist()
    for fault in label_faults(sample, root, size, label, found, nclass, source.label_map):
        raise fault
    return set(found), label.info["shown"], upper_bits


def label_faults(
    sample: Sample,
    root: Path,
    image_size: tuple[int, int] | None,
    label: Image.Image,
    found: Sequence[int],
    nclass: int,
    label_map: Mapping[int, int] | None,
) -> Iterator[DataError]:
    """What is wrong with a `label`, as `read_label` gives it, that holds the values `found`: its size, its values.

    An unreadable image's `image_size`, else (width, height), is None and fits every label.
    """
    path, label_map = root / sample.label, label_map or {}
    if fault := size_fault(root / sample.image, path, image_size or label.size, label.size):
        yield fault
    shown = label.info["shown"]
    # As many classes as values fit: then all labels may be meant so.
    if can_be_read_two_ways(found, shown, nclass, label_map) and nclass != len(shown):
        yield _two_ways_fault(path, f"{(len(shown) - 1).bit_length()}-bit")
    if any(nclass <= label_map.get(value, value) != IGNORE_INDEX for value in found):
        mask = not label_map and len(found) == 2 and found[0] == 0 and found[1] >= 128
        named = f", and those in label_map ({_few(sorted(label_map))})" if label_map else ""
        yield DataError(
            f"{path}: label values found: {_few(found)}; allowed are 0..{nclass - 1}, and 255 for ignored pixels"
            f"{named}{f'; {mask_hint(found[1])}' if mask else ''}",
            "label values outside the classes",
        )


def _check_image(path: Path) -> tuple[tuple[int, int], bool]:
    """The (width, height) of an image that seems whole, and whether its upper bits alone are used."""
    with errors_named(path, "image"), open(path, "rb") as file, Image.open(file) as image:
        check_depth(path, image)
        size, mark, upper_bits = image.size, _END_MARKS.get(image.format), gives_upper_bits(image)
        file.seek(0, os.SEEK_END)
        file.seek(-min(64, file.tell()), os.SEEK_END)
        whole = mark is not None and mark in file.read()
    if not whole:
        read_image(path)
    return size, upper_bits


def _few(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return f"{shown}, ... ({len(values)} values)" if len(values) > 8 else shown
