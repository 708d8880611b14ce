"""dataset/prepare/duplicates.py: what is listed or stored twice, as a comparison of all with all finds it."""

import random
from pathlib import Path

from dataset.lists import location
from dataset.prepare.duplicates import UNREAD, copies, repetitions
from dataset.samples import Sample

ROOT = Path("/data")


def test_repetitions_are_those_of_comparing_all_paths():
    rng = random.Random(0)
    spellings = ("{}.jpg", "./{}.jpg", "x/../{}.jpg", "/data/{}.jpg")
    listed = [Sample(rng.choice(spellings).format(rng.randrange(40)), rng.choice("ab")) for _ in range(60)]
    paths = [location(ROOT, sample.image) for sample in listed]
    expected = [
        (path, [sample.label for sample, other in zip(listed, paths, strict=True) if other == path])
        for path in dict.fromkeys(paths)
        if paths.count(path) > 1
    ]
    assert list(repetitions(listed, ROOT)) == expected and len(expected) > 5
    assert list(repetitions([], ROOT)) == []


def test_copies_are_told_with_all_paths_and_lists_in_their_order():
    lists = {
        "labelled": [Sample("a.jpg", "a.png"), Sample("b.jpg", "b.png"), Sample("a.jpg", "a.png")],
        "unlabelled": [Sample("c.jpg", None), Sample("./a.jpg", None), Sample("d.jpg", None)],
        "validation": [Sample("e.jpg", "e.png"), Sample("f.jpg", "f.png")],
    }
    same, half = b"s" * 16, b"s" * 8 + b"t" * 8  # the halves that are compared first are equal
    digests = [same, UNREAD, same, half, same, UNREAD, same, half]
    assert list(copies(lists, b"".join(digests), ROOT)) == [
        {"/data/a.jpg": ["labelled", "unlabelled"], "/data/e.jpg": ["validation"]},
        {"/data/c.jpg": ["unlabelled"], "/data/f.jpg": ["validation"]},
    ]
    alone = [bytes([k]) * 16 for k in range(1, 9)]
    assert list(copies(lists, b"".join(alone), ROOT)) == []
