"""Starting from another checkpoint's weights, and longer runs: what is taken over, what initialised, what is said."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import supervised
from model import WeightsError, build_model
from tests.helpers import TinyData, make_dataset
from util.cli import run_main
from util.config import Config, load_config
from util.errors import EXIT_USER_ERROR
from util.init_from import check_start, load_start, read_start
from util.schedule import poly_lr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two iterations an epoch for the supervised baseline."""
    return make_dataset(tmp_path_factory.mktemp("data"), labeled=4, unlabeled=1, val=1)


@pytest.fixture
def cfg(data: TinyData) -> Config:
    return load_config(data.config)


def _named(prefix: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module."], ids=["ours", "of the release"])
def test_all_that_fits_is_loaded_and_a_head_of_other_classes_starts_anew(cfg, data, tmp_path, prefix):
    other = build_model(load_config(data.config, {"classes": ["a", "b", "c", "d", "e"]}))
    path = tmp_path / "other.pth"
    torch.save({"model": _named(prefix, other), "epoch": 7}, path)
    model = build_model(cfg)
    before = _named("", model)
    load_start(model, str(path))
    for name, tensor in model.state_dict().items():
        head = name.startswith("classifier.")
        assert torch.equal(tensor, before[name] if head else other.state_dict()[name]), name
    width = before["classifier.weight"].shape[1]
    count = len(before)
    assert read_start(model, str(path)).note == (
        f"starting from the weights of {path} (init_from): {count - 2} of {count} tensors; new are classifier.weight "
        f"((5, {width}, 1, 1) instead of (3, {width}, 1, 1)), classifier.bias ((5,) instead of (3,))"
    )


@pytest.mark.parametrize("key", ["model_ema", "teacher"])
def test_of_a_file_with_two_networks_the_one_that_is_taken_is_named(cfg, tmp_path, key):
    trained, path = build_model(cfg), tmp_path / "two.pth"
    torch.save({"model": _named("", trained), key: _named("", build_model(cfg))}, path)
    start = read_start(build_model(cfg), str(path))
    assert start.note.endswith(" tensors of the student, the trained one of the file's two networks")
    assert torch.equal(start.weights["classifier.weight"], trained.classifier.weight)


def test_another_backbone_is_named_by_its_first_tensors_and_a_count(cfg, data, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(_named("", build_model(cfg)), path)
    note = check_start(load_config(data.config, {"backbone": "resnet50", "init_from": str(path)}))
    assert re.search(r"new are (\S+( \(.*?\) instead of \(.*?\)\))?(, | and )){6}\d+ more", note)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ({"encoder.weight": torch.ones(2)}, "none of its tensors fits this model"),
        ({"backbone.conv1.0.weight": torch.ones(2)}, "none of its tensors fits this model"),
        ([1], "holds no state dict"),
    ],
)
def test_a_file_that_cannot_be_started_from_is_named(cfg, tmp_path, content, words):
    path = tmp_path / "other.pth"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=rf"^init_from: {path}: {words}"):
        read_start(build_model(cfg), str(path))


def test_a_run_starts_from_the_file_and_when_it_is_continued_longer_says_what_changes(data, tmp_path, capsys):
    torch.manual_seed(5)
    start, path = tmp_path / "start.pth", tmp_path / "run"
    weights = _named("", build_model(load_config(data.config)))
    torch.save({"model": weights}, start)
    arguments = [*data.arguments(path), "--set", f"init_from={start}", "pretrained=true"]
    supervised.main([*arguments, "lr=1e-9"])  # pretrained/resnet18.pth is not there, and is not read
    assert f"starting from the weights of {start} (init_from)" in capsys.readouterr().out
    trained = torch.load(path / "latest.pth", weights_only=True)["model"]
    for name, tensor in trained.items():
        if name.endswith("weight"):
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)

    supervised.main([*arguments, "lr=1e-9", "epochs=3"])
    out = capsys.readouterr().out
    assert f"init_from: {start} is not read, since the run continues from {path}/latest.pth" in out
    assert "note: epochs is raised from 1 to 3: from here on the learning rate follows the longer schedule" in out
    rates = [float(rate) for rate in re.findall(r"iteration \d/2 .* lr (\S+)", out)]
    assert rates == pytest.approx([poly_lr(1e-9, step, 6) for step in (2, 3, 4, 5)], rel=1e-2)
    assert torch.load(path / "latest.pth", weights_only=True)["config"]["epochs"] == 3

    with pytest.raises(SystemExit) as exited:
        run_main(lambda: supervised.main([*arguments, "lr=1e-9", "epochs=2"]))
    assert exited.value.code == EXIT_USER_ERROR and "(epochs: 3 -> 2)" in capsys.readouterr().err
    shutil.rmtree(path)


def test_a_missing_file_ends_a_run_with_one_line(data, tmp_path, capsys):
    arguments = [*data.arguments(tmp_path / "run"), "--set", f"init_from={tmp_path / 'none.pth'}"]
    with pytest.raises(SystemExit) as exited:
        run_main(lambda: supervised.main(arguments))
    assert exited.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: init_from: {tmp_path / 'none.pth'}: no such file\n"


def test_the_path_is_looked_for_in_the_project_too(cfg):
    with pytest.raises(WeightsError, match=r"^init_from: README\.md: not a PyTorch checkpoint"):
        read_start(build_model(cfg), str(Path("README.md")))
