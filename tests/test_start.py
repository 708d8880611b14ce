"""scripts/benchmark/start.py: a list of any length whose first images exist, and memory as the system tells it."""

import os
from itertools import islice

from dataset.lists import read_list
from dataset.sampler import EpochSampler
from scripts.benchmark.memory import resident
from scripts.benchmark.start import BATCH, LABELED, READ, private_memory, write_data


def test_the_images_that_the_first_steps_read_exist_and_no_others(tmp_path):
    write_data(tmp_path, 5000)
    entries = read_list(tmp_path / "unlabeled.txt", labels=False)
    assert len(entries) == 5000
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("images/*/*")}
    assert found == {entries[key.unlabeled].image for key in islice(EpochSampler(LABELED, 5000, BATCH, 0), READ)}
    for image, label in read_list(tmp_path / "labeled.txt"):
        assert (tmp_path / image).is_file() and (tmp_path / label).is_file()


def test_a_processs_own_memory_is_no_more_than_its_peak():
    assert 0 < private_memory(os.getpid()) <= resident("VmHWM", os.getpid()) * 1.1
