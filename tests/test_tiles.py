"""util/tiles.py and util/streams.py: tiles against an obvious version, streams against Pillow and NumPy."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dataset.windows import Rows
from util.outputs import read_mark
from util.streams import NpzStream, PngStream
from util.tiles import predict_bands, tile_spans


@pytest.mark.parametrize("length, tile, overlap", [(100, 30, 10), (31, 30, 10), (30, 30, 29), (7, 30, 0), (95, 32, 31)])
def test_tiles_cover_a_side_once_each_pixel_deep_in_its_tile(length, tile, overlap):
    spans = tile_spans(length, tile, overlap)
    taken = [pixel for span in spans for pixel in range(span.first, span.last)]
    assert taken == list(range(length))
    for span in spans:
        assert span.stop - span.start == min(tile, length)
        assert span.start == 0 or span.first - span.start >= overlap // 2
        assert span.stop == length or span.stop - span.last >= overlap // 2


def _forward(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Depends on the whole tile, so that it shows from which tile a pixel is."""
    total = pixels.astype(np.int64).sum()
    return {
        "index": (pixels[..., 0] + total).astype(np.uint8),
        "probabilities": pixels[..., :2] * np.float16(total % 7),
    }


@pytest.mark.parametrize("tile, overlap", [(16, 4), (16, 0), (40, 10), (100, 10)])
def test_bands_of_tiles_equal_an_obvious_loop(tile, overlap):
    image = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    expected = {"index": np.zeros((50, 37), np.uint8), "probabilities": np.zeros((50, 37, 2), np.float16)}
    for y in range(50):
        for x in range(37):
            # Of all tiles with this pixel, the one in which the nearest inner border is farthest away.
            spans = []
            for position, length in ((y, 50), (x, 37)):
                found = [span for span in tile_spans(length, tile, overlap) if span.first <= position < span.last]
                assert len(found) == 1
                spans += found
            rows, columns = spans
            part = _forward(image[rows.start : rows.stop, columns.start : columns.stop])
            for name, values in part.items():
                expected[name][y, x] = values[y - rows.start, x - columns.start]
    rows = Rows("a.png", 37, 50, (image[top : top + 7] for top in range(0, 50, 7)))
    bands = list(predict_bands(rows, tile, overlap, _forward))
    for name, values in {**expected, "image": image}.items():
        np.testing.assert_array_equal(np.concatenate([band[name] for band in bands]), values)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_png_written_in_bands_is_the_picture(tmp_path, mode):
    rng = np.random.default_rng(0)
    shape = (61, 43, 3) if mode == "RGB" else (61, 43)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    pixels[20:40] = 7
    palette = rng.integers(0, 256, 768, dtype=np.uint8).tobytes() if mode == "P" else None
    with open(tmp_path / "a.png", "wb") as file:
        stream = PngStream(file, (43, 61), mode, "made of this", palette)
        for part in (pixels[:1], pixels[1:30], pixels[30:]):
            stream.write(part)
        stream.close()
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image), pixels)
        if palette:
            assert bytes(image.getpalette()) == palette
    assert read_mark(tmp_path / "a.png") == "made of this"


def test_an_npz_written_in_bands_is_the_array_and_the_same_file_each_time(tmp_path):
    values = np.random.default_rng(0).random((9, 5, 3)).astype(np.float16)
    contents = []
    for _ in range(2):
        file = io.BytesIO()
        stream = NpzStream(file, "probabilities", values.shape, np.float16, "made of this")
        stream.write(values[:4])
        stream.write(values[4:])
        stream.close()
        contents.append(file.getvalue())
    assert contents[0] == contents[1]
    (tmp_path / "a.npz").write_bytes(contents[0])
    with np.load(tmp_path / "a.npz") as found:
        np.testing.assert_array_equal(found["probabilities"], values)
    assert read_mark(tmp_path / "a.npz") == "made of this"
