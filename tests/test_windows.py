"""dataset/windows.py: rows of large images are those of the whole image, and memory stays bounded."""

from __future__ import annotations

import contextlib
import importlib.util

import numpy as np
import pytest
from PIL import Image

from dataset import DataError
from dataset.files import limit_image_pixels, read_image
from dataset.windows import _chunks, open_rows, read_header
from tests.faults import deep_png, grey_png


@pytest.fixture
def picture():
    """150 rows, so that blocks of 64 end within; smooth with some noise, so that a PNG uses all its filters."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:150, :203]
    smooth = np.stack([x + y, 2 * x, 255 - y], axis=-1) % 256
    noisy = (smooth + rng.integers(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    noisy[40:80] = rng.integers(0, 256, noisy[40:80].shape)
    return Image.fromarray(noisy)


def _in_windows(path, **options):
    """The image put together from overlapping windows, and why it was decoded whole."""
    with open_rows(path, **options) as rows:
        assert (rows.width, rows.height) == (203, 150)
        parts = [rows.window(0, 10), rows.window(7, 90)[3:], rows.window(90, 91), rows.window(100, 150)]
        middle = parts.pop()
        return np.concatenate(parts), middle, rows.whole


def _check(path, in_windows: bool) -> None:
    expected = np.asarray(read_image(path))
    top, bottom, whole = _in_windows(path)
    np.testing.assert_array_equal(top, expected[:91])
    np.testing.assert_array_equal(bottom, expected[100:])
    assert bool(whole) != in_windows


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "P4", "P with transparency"])
def test_rows_of_a_png_are_those_of_the_image(picture, tmp_path, mode):
    options = {}
    if mode == "P4":
        image, options = picture.quantize(13), {"bits": 4}
    elif mode == "P with transparency":
        image, options = picture.quantize(50), {"transparency": 3}
    else:
        image = picture.quantize(200) if mode == "P" else picture.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.arange(150 * 203, dtype=np.uint32).astype(np.uint8).reshape(150, 203)))
    image.save(tmp_path / "a.png", **options)
    _check(tmp_path / "a.png", in_windows=True)


def test_a_png_of_16_bits_is_decoded_whole(picture, tmp_path):
    (tmp_path / "a.png").write_bytes(deep_png(np.asarray(picture).astype(np.uint16) * 257))
    assert read_header(tmp_path / "a.png") == (203, 150, True)
    _check(tmp_path / "a.png", in_windows=False)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_rows_of_a_striped_tiff_are_those_of_the_image(picture, tmp_path, compression, mode):
    if mode == "P" and compression == "jpeg":
        pytest.skip("a palette has no JPEG")
    image = picture.quantize(200) if mode == "P" else picture.convert(mode)
    image.save(tmp_path / "a.tif", compression=compression, tiffinfo={278: 16})
    _check(tmp_path / "a.tif", in_windows=True)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_an_uncompressed_tiff_of_one_strip_as_pillow_writes_it_is_read_row_by_row(picture, tmp_path, mode):
    image = picture.quantize(200) if mode == "P" else picture.convert(mode)
    image.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as opened:
        assert len(opened.tag_v2[273]) == 1
    _check(tmp_path / "a.tif", in_windows=True)


def test_a_tiff_that_does_not_say_how_long_its_strips_are_is_decoded_whole(picture, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.windows.find_rasterio", lambda: None)
    picture.save(tmp_path / "a.tif", tiffinfo={278: 16})
    data = (tmp_path / "a.tif").read_bytes()
    assert data.count(b"\x17\x01\x04\x00") == 1
    (tmp_path / "a.tif").write_bytes(data.replace(b"\x17\x01\x04\x00", b"\x17\xf1\x04\x00"))
    _check(tmp_path / "a.tif", in_windows=False)


def test_whatever_opening_for_rows_raises_names_the_image(picture, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def broken(path, *_):
        raise KeyError(279)
        yield

    monkeypatch.setattr("dataset.windows._png_blocks", broken)
    picture.save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: unreadable image"), open_rows(tmp_path / "a.png"):
        pass


def test_a_compressed_tiff_of_one_strip_beyond_the_limit_is_refused_with_the_ways_out(picture, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.windows.find_rasterio", lambda: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    picture.save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={278: 150})
    with (
        pytest.raises(DataError, match=r"30450 pixels, max_image_pixels.*in tiles of a TIFF, or install rasterio"),
        open_rows(tmp_path / "a.tif"),
    ):
        pass


def test_the_data_of_a_png_come_in_pieces_though_they_are_one_chunk(picture, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.windows.PIECE", 1000)
    (tmp_path / "a.png").write_bytes(grey_png(np.asarray(picture.convert("L")), 8))
    with open(tmp_path / "a.png", "rb") as file:
        sizes = [len(data) for kind, data in _chunks(file) if kind == b"IDAT"]
    assert len(sizes) > 5 and max(sizes) == 1000
    _check(tmp_path / "a.png", in_windows=True)


@pytest.mark.skipif(importlib.util.find_spec("rasterio") is None, reason="needs rasterio")
@pytest.mark.parametrize("options", [{}, {"compress": "deflate", "predictor": 2}, {"BIGTIFF": "YES"}])
def test_rows_of_a_tiled_tiff_are_those_of_the_image(picture, tmp_path, options):
    import rasterio

    shape = {"width": 203, "height": 150, "count": 3, "dtype": "uint8"}
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 48, "interleave": "pixel", "photometric": "RGB"}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", **shape, **tiles, **options) as file:
        file.write(np.asarray(picture).transpose(2, 0, 1))
    _check(tmp_path / "a.tif", in_windows=True)


@pytest.mark.parametrize("options", [{"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_a_compressed_tiff_of_one_strip_is_read_row_by_row_by_rasterio(picture, tmp_path, mode, options):
    """Modes of which GDAL gives other values are decoded whole."""
    pytest.importorskip("rasterio")
    image = picture.quantize(200) if mode == "P" else picture.convert(mode)
    image.save(tmp_path / "a.tif", tiffinfo={278: 150}, **options)
    _check(tmp_path / "a.tif", in_windows=mode not in ("1", "CMYK"))


def test_a_jpeg_is_read_row_by_row_by_rasterio(picture, tmp_path):
    pytest.importorskip("rasterio")
    for mode in ("RGB", "L"):
        picture.convert(mode).save(tmp_path / "a.jpg", subsampling=0)
        top, bottom, whole = _in_windows(tmp_path / "a.jpg")
        expected = np.asarray(read_image(tmp_path / "a.jpg")).astype(int)
        assert not whole and abs(top - expected[:91]).max() < 8 and abs(bottom - expected[100:]).max() < 8
    picture.convert("CMYK").save(tmp_path / "a.jpg")
    _check(tmp_path / "a.jpg", in_windows=False)


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "webp", "gif", "ppm"])
def test_other_kinds_are_decoded_whole_and_say_so(picture, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("dataset.windows.find_rasterio", lambda: None)
    picture.save(tmp_path / f"a.{suffix}")
    _check(tmp_path / f"a.{suffix}", in_windows=False)


def test_a_turned_image_comes_as_a_viewer_shows_it(picture, tmp_path):
    for number, turn in {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}.items():
        exif = Image.Exif()
        exif[0x0112] = number
        picture.save(tmp_path / "a.png", exif=exif)
        for whole in (False, True):
            with open_rows(tmp_path / "a.png", upright=True, whole=whole) as rows:
                shown = picture if turn is None else picture.transpose(turn)
                np.testing.assert_array_equal(rows.window(0, rows.height), np.asarray(shown))
        with open_rows(tmp_path / "a.png") as rows:
            np.testing.assert_array_equal(rows.window(0, 150), np.asarray(picture))


@pytest.mark.parametrize("cut", [20, 300, 20_000])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_damaged_file_is_a_data_error_that_names_it(picture, tmp_path, suffix, cut):
    path = tmp_path / f"a.{suffix}"
    picture.save(path, **({"tiffinfo": {278: 16}} if suffix == "tif" else {}))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"a\.{suffix}: "), open_rows(path) as rows:
        rows.window(0, 150)


def test_images_of_16_bits_are_refused_as_elsewhere(tmp_path):
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="more than 8 bits"), open_rows(tmp_path / "a.png"):
        pass


def test_what_is_used_of_the_rows_may_fail_without_blaming_the_image(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    with pytest.raises(OSError, match="disk full"), open_rows(tmp_path / "a.png"):
        raise OSError("disk full")


def test_the_limit_of_pixels_is_for_images_that_are_decoded_whole(picture, tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    try:
        for suffix in ("png", "bmp"):
            picture.save(tmp_path / f"a.{suffix}")
            limit_image_pixels(10_000)
            assert read_header(tmp_path / f"a.{suffix}") == (203, 150, False)
            if suffix == "png":
                with open_rows(tmp_path / "a.png") as rows:
                    assert rows.window(0, 150).shape == (150, 203, 3)
            else:
                with pytest.raises(DataError, match="max_image_pixels"), open_rows(tmp_path / "a.bmp"):
                    pass
            assert 2 * Image.MAX_IMAGE_PIXELS == 10_000
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_rows_that_were_left_behind_are_not_held(tmp_path):
    Image.new("RGB", (50, 4000), "red").save(tmp_path / "a.png")
    with open_rows(tmp_path / "a.png") as rows:
        for top in range(0, 3900, 100):
            assert rows.window(top, top + 100).shape == (100, 50, 3)
            assert len(rows._held) <= 100 + 64
