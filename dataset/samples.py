"""The samples of a list in compact form: one buffer of text instead of millions of Python strings."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

CHUNK = 65536  # samples that are looked at together
# In a chunk without these, each path is written in the one way that abspath would write it. They occur in other ones
# too, which only costs time.
_OTHER_SPELLINGS = (b"//", b"./", b"/\t", b".\t", b"\n/")


class Sample(NamedTuple):
    """One line of a list: paths relative to the data root; an unlabelled line may have no label."""

    image: str
    label: str | None


class Samples(Sequence[Sample]):
    """A read-only sequence of Sample that takes the bytes of its text and 8 more for each.

    Sample k is `data[starts[k] : ends[k]]`: the image, a tab, the label (empty: none), a line feed. Loading processes
    that are forked share all of it: there is no object per sample whose reference count they would write to.
    """

    def __init__(self, data: bytes, starts: np.ndarray, ends: np.ndarray) -> None:
        self._data, self._starts, self._ends = data, starts, ends

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        """The same samples in this form; no label may have a tab in it."""
        if isinstance(samples, cls):
            return samples
        writer = SamplesWriter()
        samples = iter(samples)
        while chunk := list(islice(samples, CHUNK)):
            writer.write(chunk)
        return writer.finish()

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """For pickle, whose protocol 5 can hand out the three buffers without a copy."""
        data = pickle.PickleBuffer(self._data) if protocol >= 5 else self._data
        return _restored, (data, self._starts, self._ends)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self._selected(index)
        return _sample(self._data[self._starts[index] : self._ends[index]])

    def __iter__(self) -> Iterator[Sample]:
        return (_sample(record) for chunk in self._chunks() for record in self._records_of(*chunk))

    def __eq__(self, other: object) -> bool:
        """Whether `other`, any sequence, has the same samples in the same order."""
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return len(self) == len(other) and all(own == its for own, its in zip(self, other, strict=True))

    __hash__ = None

    def __add__(self, other: Iterable[Sample]) -> Samples:
        """These samples, then the `other` ones."""
        return Samples.of([*self, *other])

    def __repr__(self) -> str:
        return f"<{len(self)} samples>"

    def keep(self, kept: np.ndarray) -> Samples:
        """The samples at which `kept`, bool (N,), is true."""
        return self if kept.all() else self._selected(kept)

    def places(self, root: str) -> Iterator[bytes]:
        """Each image's path, the same bytes however the list writes it, relative to the absolute `root` if in it."""
        for starts, ends in self._chunks():
            text = self._text(starts, ends)
            if text.count(b"\t\n") == text.count(b"\t") == len(starts):  # none has a label
                images = text[:-2].split(b"\t\n")  # faster than one by one
            else:
                images = (record[:-1].rpartition(b"\t")[0] for record in self._records_of(starts, ends))
            if any(part in b"\n" + text for part in _OTHER_SPELLINGS):
                images = (_place(image, os.fsencode(root)) for image in images)
            yield from images

    @cached_property
    def digest(self) -> str:
        """A short fingerprint of the content."""
        found, rest = hashlib.sha256(), b""
        for starts, ends in self._chunks():
            found.update(rest)
            text = self._text(starts, ends)
            if not text.isascii():  # file names may be no UTF-8
                text = text.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace")
            found.update(text[:-1])
            rest = b"\n"  # between two samples, not after the last
        return found.hexdigest()[:16]

    def _selected(self, which: slice | np.ndarray) -> Samples:
        return Samples(self._data, self._starts[which], self._ends[which])

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(self), CHUNK):
            yield self._starts[first : first + CHUNK], self._ends[first : first + CHUNK]

    def _text(self, starts: np.ndarray, ends: np.ndarray) -> bytes:
        """The records one after the other."""
        if (starts[1:] == ends[:-1]).all():
            return self._data[starts[0] : ends[-1]]
        return b"".join(self._records_of(starts, ends))

    def _records_of(self, starts: np.ndarray, ends: np.ndarray) -> Iterator[bytes]:
        return (self._data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


class SamplesWriter:
    """Puts samples together; `count` of them so far."""

    def __init__(self) -> None:
        self.count, self._text, self._lengths = 0, io.BytesIO(), []

    def write(self, samples: Iterable[Sample | tuple[str, str | None]]) -> None:
        """Add samples one by one."""
        records = [f"{image}\t{label or ''}\n".encode("utf-8", "surrogateescape") for image, label in samples]
        self.write_records(b"".join(records), np.fromiter(map(len, records), np.int32, len(records)))

    def write_records(self, text: bytes, lengths: np.ndarray) -> None:
        """Add records as Samples has them, of these `lengths` in bytes."""
        self._text.write(text)
        self._lengths.append(lengths.astype(np.int32))
        self.count += len(lengths)

    def finish(self) -> Samples:
        """All that was written; the writer is empty then."""
        bounds = np.zeros(self.count + 1, np.int64)
        np.cumsum(np.concatenate([np.zeros(0, np.int32), *self._lengths]), out=bounds[1:])
        data = self._text.getvalue()
        self.__init__()
        return Samples(data, bounds[:-1], bounds[1:])


def _restored(data: bytes | np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Samples:
    return Samples(bytes(data), starts, ends)


def _sample(record: bytes) -> Sample:
    image, _, label = record[:-1].decode("utf-8", "surrogateescape").rpartition("\t")
    return Sample(image, label or None)


def _place(image: bytes, root: bytes) -> bytes:
    return os.path.abspath(os.path.join(root, image)).removeprefix(os.path.join(root, b""))
