"""The thorough look at a run's lists: every file decoded, every fault kept, the pixels of each class counted.

`dataset.check.check_samples` is the quick one at the start of a run, which stops at the first fault; both share what
they say about a sample.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dataset.bands import read_bands
from dataset.check import TWO_WAYS, bounded_map, can_be_read_two_ways, check_root, label_faults, mask_fault, mixed_fault
from dataset.errors import DataError
from dataset.files import (
    IGNORE_INDEX,
    gives_upper_bits,
    image_pixel_limit,
    limit_image_pixels,
    open_image,
    orientation,
    read_label,
)
from dataset.handover import check_temporary_folder, starting
from dataset.lists import Progress, Sample, is_hidden, no_progress, shared_images
from dataset.prepare.duplicates import UNREAD, copies, repetitions
from dataset.prepare.findings import ERROR, NOTE, WARNING, Finding, Findings
from dataset.prepare.jpeg import jpeg_complaint
from dataset.source import DataSource

GREY = "grey images: read as RGB with three equal channels"
PALETTE = "palette images: read as the colours of their palette"
TRANSPARENT = "images with transparent pixels: transparency is dropped, the colours stored below it are used"
OPAQUE = "images with an alpha channel, opaque everywhere: it is dropped"
DEEP = "images of 16 bits per channel: the upper 8 are used"
ROTATED = "images with an EXIF orientation: used as they are stored, not as a viewer turns them; labels must fit that"
TURNED = "images with an orientation tag: turned as it says; labels must fit the turned image"
FRAMES = "files of several pictures: the first is used"
DAMAGED = "images damaged inside: read without an error, some of their pixels wrong"
LOSSY = "labels in JPEG files: compression changes class indices; use PNG"
EMPTY = "labels of ignored pixels alone: nothing is learnt from them"
SMALL = "training images smaller than the crop: padded where scaling leaves them so"
TWICE = "images more than once in a list"
COPIES = "byte-identical images under different names"
HIDDEN = "copies that a program keeps for itself are rarely meant"
LEAK = "mIoU will say little about new images"
LEAKED_COPIES = f"training images that are byte-identical to a validation image: {LEAK}"


class Look(NamedTuple):
    """What one sample's files show: findings, a digest of the image file, its size, the label's pixels of each value.

    The last three are None where the image or the label cannot be read, or there is no label; `pixels` is int64 (256,).
    `two_ways`: the label's values may mean other ones (`dataset.check.can_be_read_two_ways`).
    """

    findings: list[Finding]
    digest: bytes | None
    size: tuple[int, int] | None
    pixels: np.ndarray | None
    two_ways: bool = False


@dataclass(frozen=True)
class Inspection:
    """All findings, and for each list with labels how often each value 0..255 occurs after `label_map`.

    `pixels` and `images` (in how many labels a value occurs) are int64 (256,), keyed by the list's name.
    """

    findings: Findings
    pixels: dict[str, np.ndarray]
    images: dict[str, np.ndarray]


def inspect_lists(
    labeled: Sequence[Sample],
    unlabeled: Sequence[Sample],
    val: Sequence[Sample],
    source: DataSource,
    classes: Sequence[str],
    crop_size: int,
    workers: int = 1,
    progress: Progress = no_progress,
    findings: Findings | None = None,
) -> Inspection:
    """Open every file of the lists in `workers` processes (1: in this one); `labeled` and `unlabeled` may be empty.

    `progress` wraps the iterator of samples. `findings`, an empty one, says what becomes of
    very many (default: all stay in memory). Raises DataError if the source has no root.
    """
    findings = findings or Findings()
    root, label_map = Path(source.root), source.label_map
    check_root(root)
    check_temporary_folder()
    lists = {"labelled": labeled, "unlabelled": unlabeled, "validation": val}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the same faults in other words
        work = functools.partial(inspect_sample, source=source, nclass=len(classes))
        looks = _map(work, itertools.chain.from_iterable(lists.values()), workers)
        looks = iter(progress("checking data", "samples", looks, sum(map(len, lists.values()))))
        totals = {}
        for name, listed in lists.items():
            totals[name] = _Totals(label_map, crop_size)
            for sample, look in zip(listed, looks, strict=False):  # the other lists' looks follow
                findings.add(look.findings)
                totals[name].add(sample, look)
        next(looks, None)  # ends the progress
    pixels, images = {}, {}
    for name, total in totals.items():
        if not total.labels:
            continue
        if fault := mask_fault(root / total.first, total.labels, total.values, label_map):
            findings.add([_error(fault)])
        if fault := mixed_fault([root / label for label in total.two_ways], total.values):
            findings.add([_error(fault)])
        pixels[name], images[name] = total.pixels, total.images
        findings.add(_absent_classes(name, pixels[name], classes))
    for name, listed in lists.items():
        findings.add(_repetition(name, path, labels) for path, labels in repetitions(listed, root))
    findings.add(overlaps(labeled, unlabeled, val, root))
    for name, listed in lists.items():
        kind = f"{name} images that are hidden or in a hidden folder: {HIDDEN}"
        findings.add(Finding(WARNING, kind, sample.image) for sample in listed if is_hidden(sample.image))
    findings.add(map(_copy, copies(lists, b"".join(total.digests for total in totals.values()), root)))
    trained = totals["labelled"], totals["unlabelled"]
    if small := sum(total.small for total in trained):
        sized = sum(total.sized for total in trained)
        message = f"{small} of {sized} have a side shorter than {crop_size} pixels"
        findings.add([Finding(NOTE, SMALL, message)])
    return Inspection(findings, pixels, images)


class _Totals:
    """What is kept of a list's looks: sums, and a digest for each image."""

    def __init__(self, label_map: Mapping[int, int] | None, crop_size: int) -> None:
        self._label_map, self._crop_size = label_map or {}, crop_size
        self.pixels, self.images = np.zeros(256, np.int64), np.zeros(256, np.int64)  # of values after label_map
        self.values: set[int] = set()  # before it
        self.labels = self.small = self.sized = 0
        self.first, self.two_ways = "", []  # labels: the first one, the first that can be read two ways
        self.digests = bytearray()

    def add(self, sample: Sample, look: Look) -> None:
        self.digests += look.digest or UNREAD
        if look.size:
            self.sized += 1
            self.small += min(look.size) < self._crop_size
        if look.two_ways and not self.two_ways:
            self.two_ways = [sample.label]
        if look.pixels is None:
            return
        self.labels, self.first = self.labels + 1, self.first or sample.label
        found = np.flatnonzero(look.pixels).tolist()
        self.values.update(found)
        mapped = [self._label_map.get(value, value) for value in found]
        np.add.at(self.pixels, mapped, look.pixels[found])
        self.images[list(set(mapped))] += 1


def overlaps(
    labeled: Sequence[Sample], unlabeled: Sequence[Sample], val: Sequence[Sample], data_root: str | Path
) -> list[Finding]:
    """Validation images that are trained on too, a finding each; paths are compared, no file is opened."""
    return [
        Finding(WARNING, f"validation images that are among the {name} ones too: {LEAK}", image)
        for name, listed in (("labelled", labeled), ("unlabelled", unlabeled))
        for image in shared_images(val, listed, data_root)
    ]


def inspect_sample(sample: Sample, source: DataSource, nclass: int) -> Look:
    """Decode a sample's files and say everything there is to say about them, in the order of the files."""
    findings, digest, size = [], None, None
    root, label_map = Path(source.root), source.label_map
    path = root / sample.image
    try:
        if source.bands:
            size = read_bands(path, source.bands).shape[1::-1]
        else:
            with open_image(path) as image:
                findings = [Finding(level, kind, f"{path}{detail}") for level, kind, detail in _traits(image)]
                size = image.size
        data = path.read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if complaint := jpeg_complaint(data):
            findings.append(Finding(WARNING, DAMAGED, f"{path}: {complaint}"))
    except DataError as error:
        findings = [_error(error)]
    if sample.label is None:
        return Look(findings, digest, size, None)
    path = root / sample.label
    try:
        label = read_label(path, source.label_colors)
        pixels = np.array(label.histogram())
        found = np.flatnonzero(pixels).tolist()
        findings += map(_error, label_faults(sample, root, size, label, found, nclass, label_map))
    except DataError as error:
        return Look([*findings, _error(error)], digest, size, None)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        findings.append(Finding(WARNING, LOSSY, str(path)))
    if {(label_map or {}).get(value, value) for value in found} == {IGNORE_INDEX}:
        findings.append(Finding(WARNING, EMPTY, str(path)))
    reported = any(finding.kind == TWO_WAYS for finding in findings)  # of this file alone, so not of the list as well
    two_ways = not reported and can_be_read_two_ways(found, label.info["shown"], nclass, label_map)
    return Look(findings, digest, size, pixels, two_ways)


def _error(fault: DataError) -> Finding:
    return Finding(ERROR, fault.kind, str(fault))


def _traits(image: Image.Image) -> list[tuple[str, str, str]]:
    """(level, kind, detail) of each way in which an open image is not plain 8-bit RGB; decodes it as training does."""
    deep = gives_upper_bits(image)
    tagged = orientation(image) if image.format == "TIFF" else 1
    image.load()
    image.convert("RGB")
    traits = []
    if image.mode in ("1", "L", "LA"):
        traits.append((NOTE, GREY, ""))
    elif image.mode in ("P", "PA"):
        traits.append((NOTE, PALETTE, ""))
    elif image.mode not in ("RGB", "RGBA"):
        kind = f"{image.mode} images: converted to RGB by a plain formula without their colour profile; colours differ"
        traits.append((WARNING, kind, ""))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        transparent = image.convert("RGBA").getchannel("A").getextrema()[0] < 255
        traits.append((WARNING, TRANSPARENT, "") if transparent else (NOTE, OPAQUE, ""))
    if deep:
        traits.append((WARNING, DEEP, ""))
    left = orientation(image)
    if left != 1:
        traits.append((WARNING, ROTATED, f": orientation {left}"))
    elif tagged != 1:
        traits.append((NOTE, TURNED, f": orientation {tagged}"))
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo and its preview, from a phone
        traits.append((WARNING, FRAMES, ""))
    return traits


def _map(work: Callable[[Sample], Look], samples: Iterator[Sample], workers: int) -> Iterator[Look]:
    if workers <= 1:
        yield from map(work, samples)
        return
    several = iter(lambda: list(itertools.islice(samples, 8)), [])  # a message for each would take longer
    with starting("checking processes"):
        pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(image_pixel_limit(),))
        pool.submit(int)
    try:
        for looks in bounded_map(pool, functools.partial(_look_at, work), several):
            yield from looks
    except BrokenProcessPool:
        raise DataError("a checking process was killed, perhaps as memory ran out; fewer workers need less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _look_at(work: Callable[[Sample], Look], samples: list[Sample]) -> list[Look]:
    return [work(sample) for sample in samples]


def _start_worker(max_image_pixels: int) -> None:
    limit_image_pixels(max_image_pixels)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the others
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _absent_classes(name: str, pixels: np.ndarray, classes: Sequence[str]) -> list[Finding]:
    level, effect = (WARNING, "never learnt from a label") if name == "labelled" else (NOTE, "not part of mIoU")
    kind = f"classes without a pixel in the {name} list: {effect}"
    return [Finding(level, kind, f"{i} {label}") for i, label in enumerate(classes) if not pixels[i]]


def _repetition(name: str, path: str, labels: Sequence[str | None]) -> Finding:
    differ = ", with different labels" if len(set(labels)) > 1 else ""
    return Finding(WARNING, TWICE, f"{path}: {len(labels)} times in the {name} list{differ}")


def _copy(paths: Mapping[str, Sequence[str]]) -> Finding:
    names = {name for group in paths.values() for name in group}
    kind = LEAKED_COPIES if "validation" in names and len(names) > 1 else COPIES
    return Finding(WARNING, kind, " = ".join(f"{path} ({', '.join(group)})" for path, group in paths.items()))
