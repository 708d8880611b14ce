"""The tools besides training: evaluate and predict, on a model with known weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from model import build_model
from scripts import evaluate as evaluate_script
from scripts import make_splits
from scripts import predict as predict_script
from tests.helpers import make_dataset
from util.cli import run_main
from util.config import load_config
from util.outputs import save_picture
from util.visualize import IGNORED_COLOUR, colorize, panel


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), val=3)


@pytest.fixture(scope="module")
def model(data):
    """A network whose predictions are spread over the classes, so that a wrong pixel shows."""
    torch.manual_seed(0)
    model = build_model(load_config(data.config)).eval()
    with torch.no_grad():
        model.classifier.weight *= 30
        model.classifier.bias -= model(torch.randn(4, 3, 32, 40)).mean((0, 2, 3))
    return model


def _published(model) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", ["ours", "published bare", "published under model"])
def test_evaluate_prints_the_same_table_for_every_form_of_checkpoint(data, model, tmp_path, capsys, form):
    checkpoint = {
        "ours": {"model": model.state_dict(), "epoch": 3},
        "published bare": _published(model),
        "published under model": {"model": _published(model), "epoch": 3},
    }[form]
    torch.save(checkpoint, tmp_path / "model.pth")
    evaluate_script.main(["--config", str(data.config), "--checkpoint", str(tmp_path / "model.pth")])
    rows = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    confusion = np.zeros((3, 3), np.int64)
    for line in data.val.read_text().split("\n")[:3]:
        image, label = (data.root / part for part in line.split())
        classes = _predict_slowly(model, image)
        truth = np.asarray(Image.open(label))
        for true, predicted in zip(truth.ravel(), classes.ravel(), strict=True):
            if true != 255:
                confusion[true, predicted] += 1
    for i in range(3):
        union = confusion[i].sum() + confusion[:, i].sum() - confusion[i, i]
        assert float(rows[f"  class {i}"]) == pytest.approx(100 * confusion[i, i] / union, abs=0.005)


def _predict_slowly(model, path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.float32) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1))[None])
    return logits[0].argmax(0).numpy()


def test_evaluate_uses_the_mode_that_is_asked_for(data, model, tmp_path, capsys):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    args = ["--config", str(data.config), "--checkpoint", str(tmp_path / "model.pth")]
    tables = {}
    for mode in ("original", "sliding_window", "center_crop"):
        evaluate_script.main([*args, "--mode", mode, "--set", "crop_size=20"])
        header, *rows = capsys.readouterr().out.splitlines()
        assert mode in header
        tables[mode] = tuple(rows)
    assert len(set(tables.values())) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"not a checkpoint", "not a PyTorch checkpoint"),
        ({"model": {"classifier.bias": torch.zeros(7)}}, "7 classes"),
    ],
)
def test_a_bad_checkpoint_is_one_line(data, tmp_path, capsys, content, expected):
    path = tmp_path / "bad.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as end:
        run_main(lambda: evaluate_script.main(["--config", str(data.config), "--checkpoint", str(path)]))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(path) in line and expected in line


@pytest.mark.parametrize("source", ["image", "folder", "list"])
def test_predictions_are_index_images_of_the_input_size(data, model, tmp_path, source):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    images = {"image": data.root / "images/val0.jpg", "folder": data.root / "images", "list": data.val}[source]
    output = tmp_path / "out"
    arguments = ["--config", str(data.config), "--checkpoint", str(tmp_path / "model.pth"), "--output", str(output)]
    predict_script.main([*arguments, "--images", str(images), "--panel", str(tmp_path / "panel.png")])
    written = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.png"))
    folder = "images/" if source == "list" else ""
    names = ["val0"] if source == "image" else ["val0", "val1", "val2"]
    if source == "folder":
        names = sorted(path.stem for path in images.iterdir())
    assert written == [f"{folder}{name}.png" for name in names]
    with Image.open(output / f"{folder}val0.png") as prediction:
        assert prediction.mode == "P" and prediction.size == (40, 32)
        np.testing.assert_array_equal(np.asarray(prediction), _predict_slowly(model, data.root / "images/val0.jpg"))
    with Image.open(tmp_path / "panel.png") as sheet:
        columns = 3 if source == "list" else 2
        assert sheet.size == (columns * 44 + 4, min(len(names), 6) * 36 + 4)


def test_two_images_of_one_name_are_refused_before_anything_is_written(data, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    for suffix in ("jpg", "png"):
        Image.new("RGB", (40, 32)).save(tmp_path / f"same.{suffix}")
    arguments = ["--config", str(data.config), "--checkpoint", str(tmp_path / "model.pth"), "--images", str(tmp_path)]
    with pytest.raises(ValueError, match=r"same\.png"):
        predict_script.main([*arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def _arguments(data, model, tmp_path) -> list[str]:
    torch.save(model.state_dict(), tmp_path / "model.pth")
    return ["--config", str(data.config), "--checkpoint", str(tmp_path / "model.pth")]


def test_predicting_into_the_folder_of_the_images_leaves_them_alone_and_out_of_the_next_run(data, model, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, suffix in enumerate(("jpg", "gif", "jfif")):
        Image.new("RGB", (20, 16), (80 * index, 90, 90)).save(
            folder / f"{index}.{suffix}", "GIF" if suffix == "gif" else "JPEG"
        )
    before = {path: path.read_bytes() for path in folder.iterdir()}
    arguments = _arguments(data, model, tmp_path)
    for _ in range(2):
        predict_script.main([*arguments, str(folder), "--out", str(folder)])
        assert {path: path.read_bytes() for path in before} == before
        assert sorted(path.name for path in folder.glob("*.png")) == ["0.png", "1.png", "2.png"]
    (folder / "photo.png").write_bytes((folder / "0.jpg").read_bytes())  # now one input is a PNG
    with pytest.raises(ValueError, match=r"photo\.png: is the image"):
        predict_script.main([*arguments, str(folder), "--out", str(folder)])
    with pytest.raises(ValueError, match=r"photo\.png: is the image"):
        predict_script.main([*arguments, str(folder), "--out", str(tmp_path / "o"), "--panel", f"{folder}/photo.png"])


def test_predictions_below_the_images_are_no_images_of_make_splits_but_may_be_its_labels(tmp_path, capsys):
    for number in range(4):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / f"images/out/{number}.png")
        save_picture(Image.fromarray(np.eye(8, dtype=np.uint8)), tmp_path / f"pseudo/{number}.png")
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/{number}.png")
    places = ["--images", tmp_path / "images", "--labels", tmp_path / "pseudo", "--output", tmp_path / "lists"]
    make_splits.main([*map(str, places), "--val", "1", "--labeled", "1"])
    assert (tmp_path / "lists/train.txt").read_text().count("\n") == 3
    line = f"note: predictions by this project in {tmp_path}/images were left out: 4, such as out/0.png"
    assert line in capsys.readouterr().out.splitlines()


def test_predictions_never_replace_labels_that_lie_in_the_output_folder(data, model, tmp_path):
    labels = {path: path.read_bytes() for path in (data.root / "labels").iterdir()}
    with pytest.raises(ValueError, match=r"labels/.*did not write it"):
        predict_script.main([*_arguments(data, model, tmp_path), f"{data.root}/images", "--out", f"{data.root}/labels"])
    assert {path: path.read_bytes() for path in labels} == labels


def test_an_unreadable_image_is_told_and_the_others_are_predicted(data, model, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (20, 16)).save(folder / "a.png")
    (folder / "b.jpg").write_bytes((data.root / "images/val0.jpg").read_bytes()[:300])
    (folder / "c.png").write_bytes((data.root / "images/val0.jpg").read_bytes())
    arguments = _arguments(data, model, tmp_path)
    predict_script.main([*arguments, str(folder), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    out, err = capsys.readouterr()
    assert "1 unreadable images were skipped" in out and "b.jpg" in out
    assert "warning: " in err and "b.jpg" in err and "Traceback" not in err
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        predict_script.main([*arguments, str(folder / "b.jpg"), "--out", str(tmp_path / "out2")])


def test_a_coloured_label_keeps_its_indices_and_shows_ignored_pixels():
    label = np.array([[0, 1], [2, 255]], np.uint8)
    image = colorize(label, [(10, 20, 30), (40, 50, 60), (70, 80, 90)])
    np.testing.assert_array_equal(np.asarray(image), label)
    assert [image.convert("RGB").getpixel(xy) for xy in ((0, 0), (1, 0), (0, 1))] == [
        (10, 20, 30),
        (40, 50, 60),
        (70, 80, 90),
    ]
    assert image.convert("RGB").getpixel((1, 1)) == IGNORED_COLOUR


def test_a_panel_makes_room_for_the_largest_of_each_row_and_column():
    small, large = Image.new("RGB", (10, 5), "red"), Image.new("RGB", (20, 8), "blue")
    sheet = panel([[small, large], [large, small]])
    assert sheet.size == (20 + 20 + 12, 8 + 8 + 12)
    assert sheet.getpixel((4, 4)) == (255, 0, 0) and sheet.getpixel((28, 4)) == (0, 0, 255)
