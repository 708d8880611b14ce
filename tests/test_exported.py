"""util/exported.py: models as files of their own, of free size, and the lines in docs/tools.md that load them."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from model import DPT
from model.backbone.dinov2 import DINOv2
from scripts import export
from tests.documents import blocks
from tests.helpers import PROJECT_ROOT, make_model, photo
from util.config import load_config
from util.errors import ConfigError
from util.exported import check, describe, load, min_size, save, trace
from util.outputs import is_own
from util.trained import Trained


@pytest.fixture(scope="module")
def deeplab():
    """A network whose predictions are spread over the classes."""
    model = make_model(backbone="resnet10", nclass=3).eval()
    with torch.no_grad():
        model.classifier.weight *= 30
        model.classifier.bias -= model(torch.randn(4, 3, 32, 40)).mean((0, 2, 3))
    return model


@pytest.fixture(scope="module")
def checkpoint(deeplab, tmp_path_factory):
    path = tmp_path_factory.mktemp("exp") / "best.pth"
    config = {"dataset": "tiny", "data_root": ".", "val_id_path": "val.txt", "classes": ["sky", "Grün", "木"]}
    config |= {"crop_size": 48, "epochs": 1, "batch_size": 2, "lr": 0.001, "backbone": "resnet10", "amp": "bf16"}
    torch.save({"model": deeplab.state_dict(), "config": config}, path)
    return path


@pytest.fixture(scope="module")
def program(deeplab):
    return trace(deeplab)


@pytest.mark.slow
def test_the_lines_in_the_docs_predict_with_either_file_without_this_project(
    deeplab, checkpoint, program, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(export, "trace", lambda *_: program)
    (lines,) = blocks((PROJECT_ROOT / "docs/tools.md").read_text(encoding="utf-8"), "python")
    assert sum(map(bool, lines.splitlines())) == 20
    (tmp_path / "run.py").write_text(lines, encoding="utf-8")
    pixels = photo(size=(52, 39))
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    values = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = deeplab(torch.from_numpy(values.transpose(2, 0, 1)[None]).float())[0].argmax(0).numpy()
    assert len(np.unique(expected)) == 3
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    for suffix in (".pt2", ".onnx"):
        file = tmp_path / f"model{suffix}"
        export.main(["--checkpoint", str(checkpoint), "--out", str(file)])
        said = capsys.readouterr().out
        assert all(shape in said for shape in ("1 x 3 x 66 x 66", "2 x 3 x 32 x 65", "3 x 3 x 65 x 32"))
        assert is_own(file)
        command = [sys.executable, "-I", "run.py", file.name, "photo.png", "classes.png"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
        with Image.open(tmp_path / "classes.png") as found:
            assert np.mean(np.asarray(found) == expected) > 0.999
            assert found.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("model", "."))) == [
        "model.onnx",
        "model.pt2",
    ]


@pytest.mark.slow
def test_a_vision_transformer_is_exported_for_every_grid_of_patches(tmp_path):
    torch.manual_seed(0)
    model = DPT(DINOv2(8, 4, 2, (0, 1, 2, 3)), 3, 8, (8, 8, 8, 8)).eval()
    program = trace(model)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    for suffix in (".pt2", ".onnx"):
        save(program, {"size_multiple": 14}, suffix, tmp_path / "model")
        loaded = load(suffix, tmp_path / "model")
        # 518 x 518 is the size at which the positional embedding is not interpolated.
        assert [tuple(shape) for shape, *_ in check(model, loaded, 518)] == [
            (1, 3, 518, 518),
            (2, 3, 42, 70),
            (3, 3, 70, 42),
        ]


def test_the_metadata_say_how_an_image_becomes_the_input(deeplab, checkpoint):
    cfg = load_config(PROJECT_ROOT / "configs/toy.yaml")
    about = json.loads(json.dumps(describe(Trained(checkpoint, cfg, {}, "teacher", ()), deeplab)))
    assert about["classes"] == list(cfg.classes) and len(about["palette"]) == cfg.nclass
    assert about["mean"] == [0.485, 0.456, 0.406] and about["std"] == [0.229, 0.224, 0.225]
    assert (about["size_multiple"], about["min_size"], about["weights"]) == (1, 32, "teacher")
    assert min_size(14) == 42


class Line(nn.Module):
    size_multiple = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * x


def test_a_file_that_computes_something_else_is_refused():
    model = Line()
    assert all(found == [0, 0] for _, *found in check(model, model, 40))
    ((_, absolute, relative), *_) = check(model, lambda image: 5 * image + 5e-5, 40)
    assert absolute == pytest.approx(5e-5, rel=0.1) and relative == pytest.approx(absolute / 20, rel=0.5)
    with pytest.raises(ConfigError, match=r"logits differ by .* on 66 x 66 pixels"):
        check(model, lambda image: 5.01 * image, 40)
    with pytest.raises(ConfigError, match="differ by nan"):
        check(model, lambda image: image * float("nan"), 40)
    with pytest.raises(ConfigError, match="fails on 66 x 66 pixels: only 32"):
        check(model, lambda image: (_ for _ in ()).throw(RuntimeError("only 32")), 40)


def test_a_model_that_an_onnx_file_cannot_hold_is_refused(tmp_path):
    huge = SimpleNamespace(state_dict={"weight": torch.empty(2**30, device="meta")})
    with pytest.raises(ConfigError, match=r"2 GB.*\.pt2"):
        save(huge, {}, ".onnx", tmp_path / "model")
    assert not list(tmp_path.iterdir())


class Scaled(Line):
    """Ten thousand times the input, in two steps, and a little more."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 3.0) * (1e4 / 3) + self.more


class LargeLine(Line):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e4 * x


def test_large_logits_are_compared_in_float64_where_that_can_be():
    for found in (check(LargeLine(), Scaled(0), 40), check(LargeLine(), lambda image: Scaled(0)(image), 40)):
        assert all(absolute > 1e-4 > relative for _, absolute, relative in found)
    check(LargeLine(), lambda image: Scaled(2e-4)(image), 40)
    with pytest.raises(ConfigError, match=r"logits differ by 0\.0002 on 66 x 66 pixels, more than 0\.0001"):
        check(LargeLine(), Scaled(2e-4), 40)
