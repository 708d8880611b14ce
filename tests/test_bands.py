"""dataset/bands.py and what follows: images of many channels, from the file to training, evaluation and prediction."""

from __future__ import annotations

import importlib.util
import weakref

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fixmatch
from dataset.bands import Bands, band_rows, bands_size, read_bands, scale
from dataset.cache import ImageCache
from dataset.source import DataSource
from dataset.transform import normalize
from dataset.windows import open_rows
from model import build_model
from model.input_channels import inflate_input
from scripts import check_data, evaluate, predict
from tests.faults import deep_png
from tests.helpers import complaint, load_checkpoint, make_dataset, model_config
from util.config import load_config
from util.errors import ConfigError

FIVE = Bands(5, (2, 1, 0), (100, 1100))


def _values(height=32, width=40, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1300, (height, width, 5)).astype(np.uint16)


def test_stored_values_become_8_bits_by_the_stated_range(tmp_path):
    values = _values()
    for name, stored in (("a.npy", values), ("b.npy", values.transpose(2, 0, 1)), ("c.npy", values.astype(np.float32))):
        np.save(tmp_path / name, stored)
        found = read_bands(tmp_path / name, FIVE)
        for (y, x, c), value in np.ndenumerate(found[:3, :3]):
            assert value == round(min(max((int(values[y, x, c]) - 100) * 255 / 1000, 0), 255))
    with band_rows(tmp_path / "a.npy", FIVE) as (width, height, blocks, whole):
        assert (width, height, whole) == (40, 32, "")
        np.testing.assert_array_equal(np.concatenate(list(blocks)), found)


@pytest.fixture(params=["rasterio", "tifffile"])
def package(request, monkeypatch):
    """What reads TIFFs; rasterio first, with tifffile for what it does not read."""
    pytest.importorskip(request.param)
    if request.param == "tifffile":
        monkeypatch.setattr("dataset.bands.find_rasterio", lambda: None)
    return request.param


def test_multi_band_tiffs_are_read_where_a_package_for_them_is_installed(tmp_path, package):
    """Also several pages, which rasterio alone does not take for channels, and rows in blocks."""
    tifffile = pytest.importorskip("tifffile")
    values = _values(height=150)
    for stored, options in (
        (values, {"planarconfig": "contig"}),
        (values, {"planarconfig": "contig", "compression": "zlib"}),
        (values, {"planarconfig": "contig", "compression": "zlib", "tile": (32, 48)}),
        (values.transpose(2, 0, 1), {"planarconfig": "separate"}),
        (values.transpose(2, 0, 1), {}),
    ):
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", **options)
        bands = Bands(5, value_range=(0, 255))
        np.testing.assert_array_equal(read_bands(tmp_path / "a.tif", bands), values.clip(0, 255))
        assert bands_size(tmp_path / "a.tif", bands) == (40, 150)
        with band_rows(tmp_path / "a.tif", bands) as (width, height, blocks, whole):
            assert (width, height) == (40, 150)
            np.testing.assert_array_equal(np.concatenate(list(blocks)), values.clip(0, 255))
        assert bool(whole) == (package == "tifffile" and "compression" in options)


def test_a_compressed_tiff_is_decoded_once_and_not_for_its_size(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr("dataset.bands.find_rasterio", lambda: None)
    tifffile.imwrite(tmp_path / "a.tif", _values(), photometric="minisblack", compression="zlib")
    decode, decoded = tifffile.imread, []
    monkeypatch.setattr(tifffile, "imread", lambda path: (decoded.append(path), decode(path))[1])
    assert bands_size(tmp_path / "a.tif", FIVE) == (40, 32) and not decoded
    with open_rows(tmp_path / "a.tif", bands=FIVE) as rows:
        assert rows.window(0, 32).shape == (32, 40, 5) and len(decoded) == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "max_image_pixels is 1000" in complaint(bands_size, tmp_path / "a.tif", FIVE) and len(decoded) == 1


def test_a_compression_that_tifffile_cannot_undo_alone_names_the_packages(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr("dataset.bands.find_rasterio", lambda: None)

    def refuse(path):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile, "imread", refuse)
    Image.fromarray(_values()[..., :3].astype(np.uint8)).save(tmp_path / "a.tif", compression="tiff_lzw")
    assert "needs rasterio, or imagecodecs" in complaint(read_bands, tmp_path / "a.tif", Bands(3, value_range=(0, 255)))


@pytest.mark.parametrize("channels_first", [False, True])
def test_blocks_of_a_mapped_file_let_go_of_what_was_read(tmp_path, monkeypatch, channels_first):
    values = _values(height=300)
    np.save(tmp_path / "a.npy", values.transpose(2, 0, 1) if channels_first else values)
    load, maps = np.load, []

    def watched(*args, **options):
        found = load(*args, **options)
        maps.append(weakref.ref(found))
        return found

    monkeypatch.setattr(np, "load", watched)
    with band_rows(tmp_path / "a.npy", FIVE) as (_, _, blocks, _):
        for _ in blocks:
            assert sum(found() is not None for found in maps) <= 1
    assert len(maps) > 4


def test_colours_of_16_bits_are_scaled_from_all_of_them_or_refused(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**16, (6, 5, 3))
    (tmp_path / "a.png").write_bytes(deep_png(values))
    bands = Bands(3, value_range=(1000, 30_000))
    if importlib.util.find_spec("rasterio"):
        np.testing.assert_array_equal(read_bands(tmp_path / "a.png", bands), scale(values, bands))
        assert "value_range: [low, high]" in complaint(read_bands, tmp_path / "a.png", Bands(3))
    monkeypatch.setattr("dataset.bands.find_rasterio", lambda: None)
    assert "of its 16 bits per channel Pillow gives the upper 8" in complaint(read_bands, tmp_path / "a.png", bands)


def test_files_of_another_kind_are_refused_with_the_way_out(tmp_path):
    np.save(tmp_path / "deep.npy", _values())
    assert "value_range: [low, high]" in complaint(read_bands, tmp_path / "deep.npy", Bands(5))
    assert "32 x 40 x 5; channels: 4 needs" in complaint(
        read_bands, tmp_path / "deep.npy", Bands(4, value_range=(0, 1))
    )
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    assert "not numbers" in complaint(read_bands, tmp_path / "text.npy", Bands(1))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "unreadable image" in complaint(read_bands, tmp_path / "objects.npy", Bands(1))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "deep.npy").read_bytes()[:500])
    assert "cut.npy: unreadable image" in complaint(read_bands, tmp_path / "cut.npy", FIVE)
    assert "no such image" in complaint(read_bands, tmp_path / "none.npy", FIVE)
    Image.new("P", (4, 4)).save(tmp_path / "palette.png")
    assert "no plain list of channels" in complaint(read_bands, tmp_path / "palette.png", Bands(4))


def test_a_tiff_without_a_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.bands.find_rasterio", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.tif").write_bytes(b"II*\0 no Pillow can read this")
    assert "needs rasterio or tifffile: pip install -r requirements-tools.txt" in complaint(
        read_bands, tmp_path / "a.tif", FIVE
    )


def test_four_plain_channels_need_no_package(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_bands(tmp_path / "a.png", Bands(4)), pixels)


def test_the_cache_keeps_channels_and_tells_ranges_apart(tmp_path):
    np.save(tmp_path / "a.npy", _values())
    cache = ImageCache(tmp_path / "cache", 10**7)
    for bands in (FIVE, FIVE._replace(value_range=(0, 2000)), FIVE):
        source = DataSource(tmp_path, cache=cache, bands=bands)
        for _ in range(2):
            with source.open_image("a.npy") as found:
                np.testing.assert_array_equal(found, read_bands(tmp_path / "a.npy", bands))
    cache.close()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet10", "resnet50_tv", "xception"])
def test_the_first_convolution_is_inflated_from_that_of_three_channels(backbone):
    torch.manual_seed(0)
    plain = build_model(model_config(backbone=backbone))
    torch.manual_seed(0)
    wide = build_model(model_config(backbone=backbone, channels=5, rgb_channels=(2, 1, 0)))
    name = next(name for name, value in plain.backbone.state_dict().items() if value.ndim == 4)
    three, five = plain.backbone.state_dict()[name], wide.backbone.state_dict()[name]
    for channel in range(5):
        expected = three[:, {2: 0, 1: 1, 0: 2}[channel]] if channel < 3 else three.mean(1)
        torch.testing.assert_close(five[:, channel], expected * 3 / 5)
    others = [key for key in plain.state_dict() if key != f"backbone.{name}"]
    assert all(torch.equal(plain.state_dict()[key], wide.state_dict()[key]) for key in others)
    assert wide(torch.zeros(2, 5, 33, 33)).shape == (2, 5, 33, 33)


def test_a_vision_transformers_patches_are_inflated_with_their_bias():
    with torch.device("meta"):
        model = build_model(model_config(model="dpt", backbone="dinov2_small"))
    conv = torch.nn.Conv2d(3, 4, 14, 14)
    part = torch.nn.ModuleDict({"patch_embed": torch.nn.ModuleDict({"proj": conv})})
    inflate_input(part, 6, (0, 1, 2))
    alike = torch.randn(1, 1, 14, 14)
    torch.testing.assert_close(
        part["patch_embed"]["proj"](alike.expand(-1, 6, -1, -1)), conv(alike.expand(-1, 3, -1, -1))
    )
    first = next(name for name, part in model.backbone.named_modules() if isinstance(part, torch.nn.Conv2d))
    assert first == "patch_embed.proj"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"channels": 2}, "channels: 2 must be at least 3"),
        ({"channels": 5, "mean": [0.5]}, "mean: 1 values for channels: 5"),
        ({"channels": 5, "rgb_channels": [0, 1, 5]}, "rgb_channels: .* from 0 to 4"),
        ({"channels": 5, "rgb_channels": [0, 1, 1]}, "rgb_channels: .* three different"),
        ({"value_range": [9, 9]}, "value_range: .*less than"),
        ({"channels": 5, "photometry": "device"}, "photometry: device is for"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean and std go together"),
        ({"channels": 5, "std": [1, 1, 1, 1, 0]}, "std: 0.0 must be greater"),
    ],
)
def test_wrong_values_are_refused(tmp_path, changes, expected):
    data = make_dataset(tmp_path)
    data.configure(**changes)
    with pytest.raises(ConfigError, match=expected):
        load_config(data.config)


def test_normalisation_by_the_given_values():
    image = torch.randint(0, 256, (2, 5, 3, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (1.0, 2.0, 3.0, 4.0, 5.0)
    expected = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalize(image, (mean, std)), expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set whose images are five 16-bit channels in .npy files; blue, green, red come first."""
    data = make_dataset(tmp_path_factory.mktemp("data"), labeled=2, unlabeled=4, val=2)
    rng = np.random.default_rng(0)
    for path in (data.root / "images").iterdir():
        rgb = np.asarray(Image.open(path)).astype(np.uint16)
        others = rng.integers(0, 256, (*rgb.shape[:2], 2), dtype=np.uint16)
        np.save(path.with_suffix(".npy"), 100 + 4 * np.concatenate([rgb[..., ::-1], others], axis=2))
        path.unlink()
    for path in (data.labeled, data.unlabeled, data.val):
        path.write_text(path.read_text().replace(".jpg", ".npy"))
    settings = {"channels": 5, "rgb_channels": [2, 1, 0], "value_range": [100, 1120], "backbone": "resnet10"}
    data.configure(**settings, unlabeled_id_path="images")
    return data


@pytest.mark.slow
def test_a_run_on_five_channels_from_the_check_to_the_prediction(data, tmp_path, capsys):
    arguments = data.arguments(tmp_path / "exp")
    with pytest.raises(ConfigError, match=r"mean and std of the 5 channels are missing.*--channel-statistics"):
        fixmatch.main(arguments)
    checked = ["--config", str(data.config), "--labeled-id-path", str(data.labeled), "--channel-statistics"]
    check_data.main([*checked, "--workers", "1"])
    lines = yaml.safe_load("\n".join(capsys.readouterr().out.splitlines()[-2:]))
    pixels = np.stack([read_bands(path, FIVE._replace(value_range=(100, 1120))) for path in _trained(data)]) / 255
    np.testing.assert_allclose(lines["mean"], pixels.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(lines["std"], pixels.std((0, 1, 2)), atol=1e-4)
    data.configure(**lines)

    fixmatch.main(arguments)
    trained = load_checkpoint(tmp_path / "exp")["model"]["backbone.conv1.0.weight"]
    assert trained.shape[1] == 5
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(tmp_path / "exp/best.pth"), "--out", str(tmp_path / "scores")])
    assert "IoU" in capsys.readouterr().out
    predict.main(
        [str(data.root / "images"), "--checkpoint", str(tmp_path / "exp/best.pth"), "--out", str(tmp_path / "out")]
        + ["--save", "index", "overlay", "--tile-above", "500", "--tile", "32", "--overlap", "8"]
        + ["--contact-sheet", str(tmp_path / "sheet.png")]
    )
    assert len(list((tmp_path / "out").glob("*.png"))) == 8
    with Image.open(tmp_path / "out/overlay/val0.png") as overlay:
        assert overlay.mode == "RGB" and overlay.size == (40, 32)


def _trained(data):
    return sorted((data.root / "images").iterdir())


def test_a_damaged_tiff_is_told_by_the_package_that_says_more(tmp_path, package):
    (tmp_path / "a.tif").write_bytes(b"II*\0junk")
    said = complaint(read_bands, tmp_path / "a.tif", FIVE)
    assert said.startswith(f"{tmp_path / 'a.tif'}: unreadable image")
    assert ("no picture in it" in said) == (package == "tifffile")
