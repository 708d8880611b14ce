"""Anything at all as config, list, image, label, checkpoint or weights: only documented errors of one line come out.

The examples are the same in every run; `FUZZ=long` in the environment tries many more, others each time.
"""

from __future__ import annotations

import functools
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.check import check_samples
from dataset.files import limit_image_pixels, read_image, read_label, read_pixels
from dataset.lists import Sample, find_unlabeled, read_list
from dataset.source import DataSource
from model import WeightsError, build_model, load_checkpoint_state, read_checkpoint
from model.backbone import create_backbone
from model.weights import read_pretrained
from tests.fuzzing import documented, in_file, mutated
from tests.helpers import PROJECT_ROOT
from util.checkpoint import load_optimizer
from util.config import Config, for_method, load_config, to_dict
from util.errors import CheckpointError
from util.resume import find_checkpoint
from util.schedule import build_optimizer
from util.teacher import Teacher


@pytest.fixture(autouse=True)
def quiet_and_quick(monkeypatch):
    """Pillow and torch warn of much that is odd in a file. An error's message compares it with all backbones, anew."""
    monkeypatch.setattr("model.weights.create_backbone", functools.cache(create_backbone))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- configs

BASES = [PROJECT_ROOT / "configs" / name for name in ("custom.yaml", "custom_v2.yaml")]
METHODS = ("unimatch", "unimatch_v2", "fixmatch", "supervised")
WORDS = "pascal OHEM resnet50 1e5 yes skip .. / dpt dinov2_small ema none adamw sgd both student reversed_batch"
KEYS = st.sampled_from([*Config.__dataclass_fields__, "criterion.thresh", "criterion.name", "unknown", ""])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-300, 300)
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from([*WORDS.split(), "0x" + "f" * 900, "\0"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SCALARS.filter(lambda x: x == x), inner, max_size=4),
    max_leaves=8,
)


def _load(path: Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> None:
    """A config as the methods take it."""
    cfg = load_config(path, overrides)
    for method in METHODS:
        documented(lambda method=method: for_method(cfg, method))


@given(st.binary(max_size=300) | st.sampled_from(BASES).flatmap(lambda path: mutated(path.read_bytes())))
def test_any_bytes_as_config(content):
    in_file(content, "recipe.yaml", _load)


@given(st.text(st.sampled_from("a:b -[]{}#&*!|>'\"%@`,?<0e1.\n\t~="), max_size=60))
def test_any_yaml_as_config(text):
    in_file(text.encode(), "recipe.yaml", _load)


@given(st.sampled_from(BASES), st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_values_in_a_config(base, changes):
    text = yaml.safe_dump({**yaml.safe_load(base.read_bytes()), **changes})
    in_file(text.encode("utf-8", "ignore"), "recipe.yaml", _load)
    documented(lambda: _load(base, changes))


@given(
    st.sampled_from(BASES),
    st.lists(st.text(max_size=20) | st.builds("{}={}".format, KEYS, st.text(max_size=20) | SCALARS), max_size=3),
)
def test_any_override(base, overrides):
    documented(lambda: _load(base, overrides))


# --- lists

LINES = st.lists(st.text(max_size=20) | st.sampled_from(["a.jpg a.png", "../a.jpg a.png", "/a\t/b", "# a"]), max_size=5)


@given(st.binary(max_size=100) | LINES.map(lambda lines: "\n".join(lines).encode("utf-8", "ignore")))
def test_any_bytes_as_list(content):
    def use(path: Path) -> None:
        samples = read_list(path, inside=path.parent)
        for sample in samples:
            for name in sample:
                assert Path(os.path.abspath(path.parent / (name or ""))).is_relative_to(path.parent)
        check_samples(samples, DataSource(path.parent), 3)

    in_file(content, "list.txt", use)
    in_file(content, "list.txt", lambda path: find_unlabeled(path, path.parent, []))


# --- images and labels


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _samples() -> tuple[list[bytes], list[bytes]]:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    label = Image.fromarray(rng.integers(0, 3, (9, 13), dtype=np.uint8))
    palette = label.convert("P")
    images = [_saved(photo, "JPEG", quality=50), _saved(photo, "JPEG", progressive=True), _saved(photo, "PNG")]
    images += [_saved(photo, kind) for kind in ("BMP", "GIF", "TIFF", "PPM")]
    labels = [_saved(label, "PNG"), _saved(palette, "PNG"), _saved(label.convert("1"), "PNG"), _saved(palette, "GIF")]
    return images, [*labels, _saved(label, "TIFF", compression="tiff_lzw"), _saved(label, "BMP")]


IMAGES, LABELS = _samples()


@pytest.fixture(autouse=True)
def small_images():
    limit = Image.MAX_IMAGE_PIXELS
    limit_image_pixels(10**6)  # a changed byte makes an image huge
    yield
    Image.MAX_IMAGE_PIXELS = limit


@given(st.sampled_from(IMAGES).flatmap(mutated) | st.binary(max_size=50))
def test_any_bytes_as_image(content):
    in_file(content, "image.jpg", read_image)
    in_file(content, "image.jpg", read_pixels)
    in_file(content, "a.jpg", lambda path: check_samples([Sample("a.jpg", None)], DataSource(path.parent), 3))


@given(st.sampled_from(LABELS).flatmap(mutated) | st.binary(max_size=50))
def test_any_bytes_as_label(content):
    in_file(content, "label.png", read_label)

    def check(path: Path) -> None:
        (path.parent / "a.jpg").write_bytes(IMAGES[0])
        check_samples([Sample("a.jpg", "a.png")], DataSource(path.parent), 3)

    in_file(content, "a.png", check)


# --- weights and checkpoints


@functools.cache
def _config() -> Config:
    changes = {"backbone": "resnet18", "pretrained": False}
    return load_config(PROJECT_ROOT / "configs/custom.yaml", changes)


@functools.cache
def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(_config())


def _checkpoint() -> dict:
    """A checkpoint with everything but big tensors: the optimiser knows one parameter."""
    state = {"epoch": 1, "iteration": 2, "previous_best": 1.5, "best_epoch": 1, "last_miou": 1.5}
    layer, optimizer = _layer()
    return {
        **state,
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "teacher": layer.state_dict(),
        "teacher_updates": torch.tensor(2),
        "config": json.loads(json.dumps(to_dict(_config()))),
        "run": {"a": "b"},
    }


def _layer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    layer = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 2)})
    optimizer = build_optimizer(layer, 0.1, 10.0)
    sum(parameter.sum() for parameter in layer.parameters()).backward()
    optimizer.step()
    return layer, optimizer


def _torch_saved(state: object, new: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def _use_checkpoint(path: Path) -> None:
    """What resuming and evaluating do with the file."""
    documented(lambda: _resume(path), path)
    for network in ("teacher", "student"):
        documented(lambda network=network: load_checkpoint_state(_model(), read_checkpoint(path), path, network), path)


def _resume(path: Path) -> None:
    find_checkpoint(path.parent, _config(), {"a": "b"})
    layer, optimizer = _layer()
    state = read_checkpoint(path)
    if isinstance(state, dict):
        documented(lambda: Teacher(layer).load_state_dict(state, path), path)
    if isinstance(state, dict) and isinstance(state.get("optimizer"), dict):
        load_optimizer(optimizer, state["optimizer"], path)
        optimizer.step()


CHECKPOINTS = [_torch_saved(_checkpoint()), _torch_saved(_checkpoint(), new=False)]


@given(st.sampled_from(CHECKPOINTS).flatmap(mutated) | st.binary(max_size=50))
def test_any_bytes_as_checkpoint(content):
    in_file(content, "latest.pth", _use_checkpoint)


TENSORS = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(2, 2),
        torch.zeros(64, 3, 7, 7),
        torch.zeros(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ]
)
LEAVES = TENSORS | st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5)
OBJECTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
PLACES = ["model", "optimizer", "epoch", "iteration", "previous_best", "best_epoch", "last_miou", "config", "run"]
PLACES += ["teacher", "teacher_updates"]
NAMES_INSIDE = ["backbone.weight", "classifier.bias", "conv1.weight"]
INNER = {"model": NAMES_INSIDE, "teacher": NAMES_INSIDE, "optimizer": ["state", "param_groups"]}


@given(st.sampled_from(PLACES), st.booleans(), OBJECTS, st.integers(0, 3))
def test_any_object_in_a_checkpoint(place, whole, value, number):
    state = _checkpoint()
    if whole or not isinstance(state[place], dict):
        state[place] = value
    elif place == "optimizer" and number < 2:
        state[place]["state"][number] = {"momentum_buffer": value}
    elif place == "optimizer" and number == 2:
        state[place]["param_groups"][0]["lr"] = value
    else:
        inner = INNER.get(place, ["lr", "a", "b"])
        state[place] = {**state[place], inner[number % len(inner)]: value}
    in_file(_torch_saved(state), "latest.pth", _use_checkpoint)


NAMES = st.sampled_from(
    ["conv1.weight", "fc.weight", "bn1.weight", "layer1.0.conv1.weight", "model", "state_dict", "a"]
)


@given(st.dictionaries(NAMES | st.integers(), OBJECTS, max_size=4) | OBJECTS, st.sampled_from(["resnet50", "resnet18"]))
def test_any_object_as_weights(state, name):
    with torch.device("meta"):
        backbone = create_backbone(name)
    in_file(_torch_saved(state), "weights.pth", lambda path: read_pretrained(backbone, name, path))
    whole = {f"backbone.{key}": value for key, value in state.items()} if isinstance(state, dict) else state
    content = _torch_saved(whole)
    in_file(content, "weights.pth", lambda path: load_checkpoint_state(_model(), read_checkpoint(path), path))


# --- what was found so


@pytest.mark.parametrize("place", ["config", "run"])
def test_a_tensor_among_a_checkpoints_settings_is_refused(tmp_path, place):
    """Comparing it with the config has no truth value, and its text many lines."""
    state = _checkpoint()
    state[place]["lr"] = torch.zeros(2, 2)
    (tmp_path / "latest.pth").write_bytes(_torch_saved(state))
    with pytest.raises(CheckpointError, match=f"its {place} holds more than text and numbers"):
        find_checkpoint(tmp_path, _config(), {"a": "b"})


@pytest.mark.parametrize("name", ["backbone.conv1.weight", "classifier.bias"])
@pytest.mark.parametrize("tensor", [torch.zeros(()), torch.eye(2).to_sparse(), torch.zeros(2, device="meta")], ids=str)
def test_a_tensor_without_a_shape_or_values_is_refused(tmp_path, name, tensor):
    path = tmp_path / "a.pth"
    path.write_bytes(_torch_saved({name: tensor}))
    with pytest.raises(WeightsError, match=r"a\.pth"):
        load_checkpoint_state(_model(), read_checkpoint(path), path)


def test_a_momentum_of_another_shape_is_refused(tmp_path):
    state = _checkpoint()
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="its optimizer is not the state of this model's"):
        load_optimizer(_layer()[1], state["optimizer"], tmp_path / "latest.pth")
