"""scripts/predict.py: kinds of output, tiles, test-time augmentation, pseudo-labels, going on after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.transform import normalize
from model import build_model
from scripts import predict as predict_script
from tests.faults import deep_png
from tests.helpers import PROJECT_ROOT, make_dataset
from util.config import load_config
from util.errors import ConfigError
from util.outputs import read_mark
from util.palette import OKABE_ITO, colorblind_palette, perceived
from util.prediction import Options, Predictor
from util.tiles import predict_bands, tile_spans


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set, and a checkpoint of a network whose predictions are spread over the classes."""
    data = make_dataset(tmp_path_factory.mktemp("data"), val=3)
    torch.manual_seed(0)
    model = build_model(load_config(data.config)).eval()
    with torch.no_grad():
        model.classifier.weight *= 30
        model.classifier.bias -= model(torch.randn(4, 3, 32, 40)).mean((0, 2, 3))
    torch.save(model.state_dict(), data.root / "model.pth")
    arguments = ["--config", str(data.config), "--checkpoint", str(data.root / "model.pth")]
    return SimpleNamespace(data=data, model=model, arguments=arguments, images=data.root / "images")


def _run(trained, *argv) -> None:
    predict_script.main([*map(str, argv), *trained.arguments])


@torch.no_grad()
def _probabilities(trained, pixels: np.ndarray, scales=(1.0,), flip=False) -> np.ndarray:
    """(C, H, W) by the definition: the mean softmax over scales and mirrored views."""
    image = normalize(pixels)[None]
    height, width = pixels.shape[:2]
    total, views = 0, 0
    for scale in scales:
        for mirrored in (False, True)[: 1 + flip]:
            size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
            view = torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=True)
            logits = trained.model(view.flip(3) if mirrored else view)
            logits = torch.nn.functional.interpolate(logits, (height, width), mode="bilinear", align_corners=True)
            total = total + (logits.flip(3) if mirrored else logits).softmax(1)
            views += 1
    return (total / views)[0].numpy()


def test_every_kind_of_output_follows_from_the_probabilities(trained, tmp_path):
    kinds = ("index", "overlay", "confidence", "probabilities")
    tta = ("--scales", "0.5", "1", "1.5", "--flip")
    _run(trained, trained.images, "--out", tmp_path, "--save", *kinds, *tta)
    pixels = np.asarray(Image.open(trained.images / "val1.jpg").convert("RGB"))
    expected = _probabilities(trained, pixels, (0.5, 1, 1.5), flip=True)
    with np.load(tmp_path / "probabilities/val1.npz") as file:
        assert file["probabilities"].dtype == np.float16
        np.testing.assert_allclose(file["probabilities"], expected.transpose(1, 2, 0), atol=1e-3)
    sure = np.diff(np.sort(expected, axis=0)[-2:], axis=0)[0] > 1e-4  # where rounding cannot choose another class
    index = np.asarray(Image.open(tmp_path / "val1.png"))
    np.testing.assert_array_equal(index[sure], expected.argmax(0)[sure])
    assert sure.mean() > 0.95 and len(np.unique(index)) > 1
    confidence = np.asarray(Image.open(tmp_path / "confidence/val1.png"))
    np.testing.assert_allclose(confidence, 255 * expected.max(0), atol=0.6)
    palette = np.asarray(load_config(trained.data.config).palette)
    mixed = (pixels.astype(int) + palette[index] + 1) // 2
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "overlay/val1.png")), mixed)


def test_unsure_pixels_are_ignored_and_the_output_is_a_label_folder(trained, tmp_path):
    _run(trained, trained.images / "val0.jpg", "--out", tmp_path / "all", "--save", "index", "probabilities")
    with np.load(tmp_path / "all/probabilities/val0.npz") as file:
        confidence = file["probabilities"].max(2)
    threshold = float(np.median(confidence.astype(np.float64))) + 1e-4
    _run(trained, trained.images / "val0.jpg", "--out", tmp_path / "sure", "--min-confidence", threshold)
    whole, sure = (np.asarray(Image.open(tmp_path / name / "val0.png")) for name in ("all", "sure"))
    clear = np.abs(confidence - threshold) > 1e-3
    np.testing.assert_array_equal(sure[clear], np.where(confidence >= threshold, whole, 255)[clear])
    assert 0.2 < (sure == 255).mean() < 0.8
    assert [path.name for path in (tmp_path / "sure").rglob("*")] == ["val0.png"]


def _of_four_classes(image):
    return image.new_zeros(len(image), 4, *image.shape[2:])


@pytest.mark.parametrize(("threshold", "expected"), [(0.25, 0), (0.26, 255)])
def test_a_pixel_as_sure_as_the_threshold_counts(threshold, expected):
    options = Options("original", 33, ((0, 0, 0),) * 4, min_confidence=threshold)
    predictor = Predictor(_of_four_classes, torch.device("cpu"), options, {})
    assert (predictor.kinds_of(np.zeros((5, 6, 3), np.uint8))["index"] == expected).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_large_image_in_tiles_is_what_its_tiles_are_alone(trained, tmp_path, suffix, capsys):
    path = tmp_path / f"large.{suffix}"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).resize((140, 100)).save(path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    _run(trained, path, "--out", tmp_path / "out", "--tile", 64, "--overlap", 16, "--tile-above", 1000)
    index = np.asarray(Image.open(tmp_path / "out/large.png"))
    agree = 0
    for row in tile_spans(100, 64, 16):
        for column in tile_spans(140, 64, 16):
            tile = pixels[row.start : row.stop, column.start : column.stop]
            place = (slice(row.first - row.start, row.last - row.start),
                     slice(column.first - column.start, column.last - column.start))  # fmt: skip
            expected = _probabilities(trained, tile).argmax(0)[place]
            agree += (index[row.first : row.last, column.first : column.last] == expected).sum()
    assert agree >= 0.999 * index.size  # rounding may choose another class where two are equal
    assert "1 large images were predicted in tiles of 64 pixels that share 16" in capsys.readouterr().out


def test_the_mark_of_a_finished_prediction_is_read_once_to_refuse_and_once_to_skip(trained, tmp_path, monkeypatch):
    image = trained.images / "val0.jpg"
    _run(trained, image, "--out", tmp_path)
    read = []
    for module in ("util.outputs", "util.prediction", "scripts.predict"):
        monkeypatch.setattr(
            f"{module}.read_mark", lambda path: read.append(str(path)) or read_mark(path), raising=False
        )
    _run(trained, image, "--out", tmp_path)
    assert read == 2 * [str(tmp_path / "val0.png")]


def test_what_is_done_is_left_alone_and_other_options_make_it_anew(trained, tmp_path, capsys):
    def changed() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    _run(trained, trained.images, "--out", tmp_path)
    (tmp_path / "val1.png").unlink()
    before = changed()
    _run(trained, trained.images, "--out", tmp_path)
    assert "1 predictions" in capsys.readouterr().out
    assert {name: time for name, time in changed().items() if name != "val1.png"} == before
    _run(trained, trained.images, "--out", tmp_path, "--flip")
    assert all(changed()[name] != time for name, time in before.items())


def test_an_image_that_was_changed_in_place_is_predicted_anew_even_where_its_size_is_the_same(tmp_path):
    predictor = Predictor(None, torch.device("cpu"), Options("original", 33, ((0, 0, 0),) * 4), {})
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    os.utime(path, ns=(0, 1))
    before = predictor.fingerprint(path)
    assert predictor.fingerprint(path) == before
    os.utime(path, ns=(0, 2))
    assert predictor.fingerprint(path) != before
    path.write_bytes(b"longer")
    os.utime(path, ns=(0, 1))
    assert predictor.fingerprint(path) != before


def test_what_is_kept_for_the_pages_keeps_no_band_in_memory(tmp_path, monkeypatch):
    bands = []

    def watched(*how):
        for band in predict_bands(*how):
            assert all(earlier() is None for earlier in bands)
            bands.append(weakref.ref(band["index"]))
            yield band

    monkeypatch.setattr("util.prediction.predict_bands", watched)
    Image.new("RGB", (40, 200)).save(tmp_path / "a.png")
    options = Options("original", 33, ((0, 0, 0),) * 4, tile=32, overlap=0, tile_above=1000)
    predictor = Predictor(_of_four_classes, torch.device("cpu"), options, {})
    preview = predictor.write(tmp_path / "a.png", {"index": tmp_path / "out.png"})
    assert len(bands) == 7 and preview.index.shape == (200, 40)


def test_two_images_of_one_name_are_never_predicted_into_one_file(trained, tmp_path):
    for folder, name in (("a", "val0"), ("b", "val1")):
        (tmp_path / folder).mkdir()
        shutil.copy(trained.images / f"{name}.jpg", tmp_path / folder / "photo.jpg")
    _run(trained, tmp_path / "a", "--out", tmp_path / "out")
    before = (tmp_path / "out/photo.png").read_bytes()
    with pytest.raises(ConfigError, match=r"photo\.png: was not made from .*b/photo\.jpg, .*another --out.*--keep-suf"):
        _run(trained, tmp_path / "b", "--out", tmp_path / "out")
    assert (tmp_path / "out/photo.png").read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "a")
    _run(trained, tmp_path / "link/photo.jpg", "--out", tmp_path / "out", "--flip")


def test_pages_and_predictions_are_not_written_into_one_file(trained, tmp_path):
    pytest.importorskip("matplotlib")
    inputs = (trained.images / "val0.jpg", "--out", tmp_path / "out")
    for pages in (
        ("--panel", tmp_path / "out/../out/val0.png"),
        ("--contact-sheet", tmp_path / "a.png", "--panel", tmp_path / "a.png"),
    ):
        with pytest.raises(ConfigError, match="also a prediction or the other page"):
            _run(trained, *inputs, *pages)
    _run(trained, *inputs, "--contact-sheet")
    assert (tmp_path / "out/contact-sheet.png").exists()
    with pytest.raises(ConfigError, match="also a prediction"):
        _run(trained, trained.images / "val1.jpg", "--out", tmp_path / "out", "--panel", tmp_path / "out/val0.png")
    shutil.copy(trained.images / "val0.jpg", tmp_path / "contact-sheet.jpg")
    with pytest.raises(ConfigError, match="was not made from"):
        _run(trained, tmp_path / "contact-sheet.jpg", "--out", tmp_path / "out")


def test_images_of_16_bits_are_told_of_once(trained, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(deep_png(np.full((8, 9, 3), 300)))
    _run(trained, tmp_path, "--out", tmp_path / "out")
    assert capsys.readouterr().out.count("a.png: the upper 8 are used (value_range") == 1


@pytest.mark.slow
def test_a_run_that_was_killed_and_continued_leaves_the_same_files(trained, tmp_path):
    folder = tmp_path / "photos"
    for index in range(60):
        path = folder / f"part{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    arguments = [folder, "--save", "index", "probabilities", *trained.arguments]
    command = [sys.executable, "-m", "scripts.predict", *map(str, arguments), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while len(list((tmp_path / "killed").rglob("*.png"))) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(list((tmp_path / "killed").rglob("*.png"))) < 60
    (tmp_path / "killed/part0/.9.png.part").write_bytes(b"half a file, as the kill may leave one")
    _run(trained, *arguments[:-4], "--out", tmp_path / "killed")
    _run(trained, *arguments[:-4], "--out", tmp_path / "whole")
    contents = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("killed", "whole")
    ]
    contents[0].pop(next((path for path in contents[0] if path.name == ".9.png.part"), None), None)
    assert len(contents[1]) == 120 and contents[0] == contents[1]


@pytest.mark.slow
def test_pages_show_what_was_predicted(trained, tmp_path):
    pytest.importorskip("matplotlib")
    argv = (trained.images, "--out", tmp_path / "out", "--contact-sheet", tmp_path / "sheet.jpg", "--sheet-images", 4)
    _run(trained, *argv)
    once = np.asarray(Image.open(tmp_path / "sheet.jpg"))
    assert once.shape[1] > 500 and len(np.unique(once.reshape(-1, 3), axis=0)) > 100
    _run(trained, *argv)  # everything was done; the page shows it all the same
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.jpg")), once)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--contact-sheet", "page.gif"], r"--contact-sheet page\.gif: the suffix must be one of"),
        (["--min-confidence", "95"], "--min-confidence 95.0: must be from 0 to 1"),
        (["--tile", "64", "--overlap", "33"], "--overlap 33: must be from 0 to half of --tile: 32"),
        (["--scales", "0"], "--scales 0: must be from"),
        (["--scales", "1", "1"], "one is there twice"),
        (["--panel-rows", "0"], "--panel-rows 0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(options, expected):
    with pytest.raises(ValueError, match=expected):
        predict_script.main(["x.jpg", "--out", "o", "--checkpoint", "no-such-file.pth", *options])


def test_without_matplotlib_the_contact_sheet_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"--contact-sheet needs matplotlib: pip install -r requirements-tools\.txt"):
        predict_script.main(["x.jpg", "--out", "o", "--checkpoint", "f.pth", "--contact-sheet", "a.png"])


def test_geotiff_in_and_out_keeps_the_place_on_the_earth(trained, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    place = rasterio.transform.from_origin(500_000, 4_600_000, 10, 10)
    pixels = np.asarray(Image.open(trained.images / "val0.jpg").convert("RGB"))
    shape = {"width": 40, "height": 32, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", crs="EPSG:32633", transform=place, **shape) as file:
        file.write(pixels.transpose(2, 0, 1))
    for _ in range(2):  # the second time it is done
        _run(trained, tmp_path / "a.tif", "--out", tmp_path / "out", "--geotiff")
    with rasterio.open(tmp_path / "out/a.tif") as found:
        assert found.crs.to_epsg() == 32633 and found.transform == place
        index = found.read(1)
    _run(trained, tmp_path / "a.tif", "--out", tmp_path / "plain")
    np.testing.assert_array_equal(index, np.asarray(Image.open(tmp_path / "plain/a.png")))


@pytest.mark.parametrize("count", [2, 8, 21, 81, 255])
def test_colours_for_all_kinds_of_vision_are_apart(count):
    colours = colorblind_palette(count)
    assert len(set(colours)) == count and colours[: min(count, 8)] == OKABE_ITO[:count]
    seen = perceived(np.array(colours))
    distances = np.linalg.norm(seen[:, :, None] - seen[:, None], axis=-1).min(axis=0)
    nearest = distances[~np.eye(count, dtype=bool)].min()
    # CIELAB: 2.3 is just noticed. Random colours are 0.2 apart at 81, and Pascal VOC's palette 1.3 at 21.
    assert nearest > {2: 30, 8: 9, 21: 9, 81: 4, 255: 1.5}[count]


def test_an_image_whose_place_rasterio_cannot_read_is_skipped(trained, tmp_path, capsys):
    pytest.importorskip("rasterio")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", "ICO", sizes=[(32, 32)])
    shutil.copy(trained.images / "val0.jpg", tmp_path / "b.jpg")
    _run(trained, tmp_path / "a.png", tmp_path / "b.jpg", "--out", tmp_path / "out", "--geotiff")
    told = capsys.readouterr()
    assert "1 unreadable images were skipped" in told.out and "a.png: --geotiff: rasterio cannot read" in told.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.tif"]
