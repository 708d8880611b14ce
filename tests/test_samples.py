"""dataset/samples.py: samples in one buffer behave as a list of them, in little memory."""

import hashlib
import os
import pickle

import numpy as np
import pytest

from dataset.samples import CHUNK, Sample, Samples

SAMPLES = [
    Sample("a.jpg", "a.png"),
    Sample("my photo.jpg", None),
    Sample("straße/ü.jpg", "straße/ü.png"),
    Sample("tab\tand\nfeed.jpg", None),
    Sample("no\udce4utf.jpg", None),
    Sample("a.jpg", "a.png"),
]


def test_samples_are_a_sequence_like_a_list_of_them():
    samples = Samples.of(iter(SAMPLES))
    assert list(samples) == SAMPLES and samples == SAMPLES and len(samples) == 6
    assert [samples[k] for k in range(-6, 6)] == [*SAMPLES, *SAMPLES]
    for part in (slice(2), slice(1, None, 2), slice(None, None, -1)):
        assert list(samples[part]) == SAMPLES[part] and samples[part] == Samples.of(SAMPLES[part])
    assert samples != SAMPLES[:5] and samples != [*SAMPLES[:5], Sample("a.jpg", None)] and not Samples.of([])
    assert pickle.loads(pickle.dumps(samples)) == samples and Samples.of(samples) is samples
    with pytest.raises(IndexError):
        samples[6]


def test_keep_leaves_out_what_is_false():
    kept = np.array([True, False, True, True, False, True])
    assert Samples.of(SAMPLES).keep(kept) == [sample for sample, keep in zip(SAMPLES, kept, strict=True) if keep]


@pytest.mark.parametrize("part", [slice(None), slice(0, 4), slice(None, None, 2), slice(0)])
def test_the_digest_is_that_of_the_lines_joined(part):
    text = "\n".join(f"{image}\t{label or ''}" for image, label in SAMPLES[part])
    expected = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
    assert Samples.of(SAMPLES)[part].digest == expected


def test_places_are_the_same_however_a_path_is_written():
    root = os.path.abspath("data/root")
    written = ["a/b.jpg", "./a/b.jpg", "a//b.jpg", "a/./b.jpg", "a/c/../b.jpg", f"{root}/a/b.jpg", "../root/a/b.jpg"]
    for path in written:
        assert list(Samples.of([Sample(path, "x")]).places(root)) == [b"a/b.jpg"]
    others = ["../b.jpg", "/b.jpg", "a/b.jpg/c", "b.jpg/", "b.jpg/.", "..", "b./c.jpg"]
    expected = [os.path.abspath(os.path.join(root, path)).removeprefix(f"{root}/").encode() for path in others]
    assert [next(Samples.of([Sample(path, None)]).places(root)) for path in others] == expected


def test_many_samples_are_looked_at_in_chunks():
    many = [Sample(f"{k}.jpg", None) for k in range(CHUNK + 2)]
    samples = Samples.of(many)
    assert samples == many and list(samples.places("/data"))[-1] == f"{CHUNK + 1}.jpg".encode()
    text = "\n".join(f"{image}\t" for image, _ in many)
    assert samples.digest == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_names_with_feeds_are_told_apart_from_two_samples():
    samples = [Sample("x\t\ny.jpg", None), Sample("b.jpg", "b.png"), Sample("z\n.jpg", None)]
    for part in (samples, samples[:2], samples[::2], samples[1:2]):
        assert list(Samples.of(part).places("/data")) == [sample.image.encode() for sample in part]
