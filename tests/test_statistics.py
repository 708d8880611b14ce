"""dataset/prepare/statistics.py: mean and standard deviation over all pixels."""

from __future__ import annotations

import numpy as np
import pytest

from dataset.prepare.statistics import channel_statistics
from tests.helpers import photo, save


def test_statistics_are_those_of_all_pixels_together(tmp_path):
    images = [photo(size=(9, 7)), photo(seed=1, size=(20, 5))]
    for index, pixels in enumerate(images):
        save(tmp_path / f"{index}.png", pixels)
    (tmp_path / "bad.png").write_bytes(b"none")
    mean, std = channel_statistics(sorted(tmp_path.iterdir()), 3, None)
    values = np.concatenate([pixels.reshape(-1, 3) for pixels in images]) / 255
    assert mean == pytest.approx(values.mean(0)) and std == pytest.approx(values.std(0))
    assert channel_statistics([tmp_path / "bad.png"], 3, None) is None
    save(tmp_path / "grey.png", np.full((2, 2, 3), 51, np.uint8))
    assert channel_statistics([tmp_path / "grey.png"], 3, None) == ((0.2,) * 3, (1 / 255,) * 3)
