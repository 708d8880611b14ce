"""model/weights.py: ImageNet weights and checkpoints: what loads, and what each mistake says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from model import BACKBONES, build_model, load_checkpoint_state, read_checkpoint
from tests.helpers import assert_loaded, filled, filled_backbone, model_config, weights_error

STATE_DICTS = json.loads((Path(__file__).parent / "reference" / "state_dicts.json").read_text())


def make(backbone="resnet18", nclass=5, pretrained=False, load=True):
    return build_model(model_config(backbone=backbone, nclass=nclass, pretrained=pretrained), pretrained=load)


# ---- ImageNet weights that load


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_weights_are_read_from_the_project_whatever_the_current_folder(project, monkeypatch, tmp_path, name):
    state = {k: v for k, v in filled_backbone(name).items() if not k.endswith("num_batches_tracked")}
    extra = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(state | extra, project / f"{name}.pth")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_loaded(make(name, pretrained=True).backbone, state)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_and_prefixed_weights_load(project, wrapper, prefix):
    state = filled_backbone()
    content = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, project / "resnet18.pth")
    assert_loaded(make(pretrained=True).backbone, state)


def test_training_counters_in_xception_weights_are_left_out(project):
    state = {k: v for k, v in filled_backbone("xception").items() if "track" not in k}
    counters = {
        "bn1.running_mean_tmp": torch.zeros(32),
        "itr": torch.zeros(1),
        "bn1.num_batches_tracked": torch.ones(1),
    }
    torch.save(state | counters, project / "xception.pth")
    loaded = make("xception", pretrained=True)
    assert_loaded(loaded.backbone, state)
    assert loaded.backbone.bn1.num_batches_tracked == 0


def test_a_path_is_taken_from_the_current_folder_else_from_the_project(project, monkeypatch, tmp_path):
    here, there = filled_backbone(), {name: tensor + 1 for name, tensor in filled_backbone().items()}
    torch.save(there, project / "mine.pth")
    (tmp_path / "elsewhere" / "pretrained").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_loaded(make(pretrained="pretrained/mine.pth").backbone, there)
    torch.save(here, "pretrained/mine.pth")
    assert_loaded(make(pretrained="pretrained/mine.pth").backbone, here)
    assert_loaded(make(pretrained=str(project / "mine.pth")).backbone, there)
    assert "~nobody-of-this-name/x.pth: no such file" in weights_error(make, pretrained="~nobody-of-this-name/x.pth")


def test_no_file_is_touched_unless_argument_and_config_ask_for_weights(project):
    make(pretrained=False)
    make(pretrained=True, load=False)
    assert "no such file" in weights_error(make, pretrained=True)


# ---- ImageNet weights that do not


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "resnet101", "xception", "resnet50_tv", "resnet101_tv"])
def test_missing_weights_say_which_file_what_it_is_and_where_to_get_it(project, name):
    message = weights_error(make, name, pretrained=True)
    assert str(project / f"{name}.pth") in message
    assert f"no such file; expected ImageNet weights of {name}" in message
    assert "pretrained/README.md" in message
    assert "`pretrained: false`" in message


def test_a_backbone_without_published_weights_says_so(project):
    assert "none are published, or set `pretrained: false`" in weights_error(make, "resnet18", pretrained=True)


@pytest.mark.slow
def test_unreadable_weights_are_named(project):
    path = project / "resnet50.pth"
    torch.save(filled_backbone("resnet50"), path)
    whole = path.read_bytes()
    for content in (b"", b"<!DOCTYPE html><html>Too many requests</html>\n", whole[: len(whole) // 2], whole[:-20]):
        path.write_bytes(content)
        message = weights_error(make, "resnet50", pretrained=True)
        assert f"{path}: not a PyTorch checkpoint" in message
        assert "expected ImageNet weights of resnet50" in message
        assert "pretrained/README.md" in message
    path.unlink()
    path.mkdir()
    assert f"{path}: cannot be read (Is a directory)" in weights_error(make, "resnet50", pretrained=True)


@pytest.mark.slow
@pytest.mark.parametrize("content", [torch.zeros(3), {}, [1, 2], {"epoch": 3}, {"model": {"a": 1}}])
def test_a_file_without_a_state_dict_is_refused(project, content):
    torch.save(content, project / "resnet50.pth")
    assert "resnet50.pth: holds no state dict" in weights_error(make, "resnet50", pretrained=True)


def torchvision_state(name):
    """In the form of torchvision's official files."""
    with torch.device("meta"):
        own = getattr(torchvision.models, name)(weights=None).state_dict()
    return filled((key, tensor.shape) for key, tensor in own.items() if not key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_torchvision_s_file_loads_as_it_is(project, name):
    state = torchvision_state(name)
    torch.save(state, project / f"{name}_tv.pth")
    del state["fc.weight"], state["fc.bias"]
    assert_loaded(make(f"{name}_tv", pretrained=True).backbone, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_torchvision_s_stem_and_the_deep_one_are_told_apart(project, name):
    torch.save(torchvision_state(name), project / f"{name}.pth")
    message = weights_error(make, name, pretrained=True)
    assert (
        f"{name}.pth: weights of {name}_tv, a ResNet with another stem, one 7x7 convolution (conv1.weight)" in message
    )
    assert f": set `backbone: {name}_tv` to use them; expected ImageNet weights of {name} with a deep stem" in message
    assert "pretrained/README.md" in message

    torch.save(filled_backbone(name), project / f"{name}_tv.pth")
    message = weights_error(make, f"{name}_tv", pretrained=True)
    assert f"{name}_tv.pth: weights of {name}, a ResNet with another stem, a deep stem of three 3x3" in message
    assert f": set `backbone: {name}` to use them; expected ImageNet weights of {name}_tv with one 7x7" in message


def test_the_stem_of_a_resnet_that_is_no_backbone_here_is_told_too(project):
    torch.save(torchvision_state("resnet34"), project / "resnet50.pth")
    message = weights_error(make, "resnet50", pretrained=True)
    assert "resnet50.pth: a ResNet with another stem, one 7x7 convolution (conv1.weight) as torchvision's" in message


def test_weights_of_another_backbone_are_recognised(project):
    torch.save(filled_backbone("resnet101"), project / "resnet50.pth")
    assert "resnet50.pth: weights of resnet101; expected" in weights_error(make, "resnet50", pretrained=True)
    torch.save(filled_backbone("resnet50"), project / "xception.pth")
    assert "xception.pth: weights of resnet50; expected" in weights_error(make, "xception", pretrained=True)


def test_missing_unexpected_and_misshapen_weights_are_named_and_counted(project):
    state = filled_backbone()
    del state["layer4.1.conv2.weight"]
    del state["layer4.1.bn2.bias"]
    state["head.weight"] = torch.zeros(3)
    state["bn1.weight"] = torch.zeros(7)
    torch.save(state, project / "resnet18.pth")
    message = weights_error(make, pretrained=True)
    assert "missing layer4.1.conv2.weight and 1 more, unexpected head.weight, " in message
    assert "wrong shape bn1.weight (7,) instead of (64,)" in message


def test_counters_are_not_left_out_for_a_resnet(project):
    torch.save(filled_backbone() | {"bn1.itr": torch.zeros(1)}, project / "resnet18.pth")
    assert "unexpected bn1.itr" in weights_error(make, pretrained=True)


# ---- checkpoints of whole models


@pytest.mark.slow
@pytest.mark.parametrize("backbone", STATE_DICTS)
def test_published_checkpoints_load_bare_and_under_model(backbone):
    published = {f"module.{name}": tensor for name, tensor in filled(STATE_DICTS[backbone]).items()}
    expected = filled(STATE_DICTS[backbone])
    segmenter = make(backbone, nclass=len(expected["classifier.bias"]))
    for checkpoint in (published, {"model": published, "optimizer": {}, "epoch": 79, "previous_best": 78.5}):
        with torch.no_grad():
            segmenter.classifier.weight.zero_()
        load_checkpoint_state(segmenter, checkpoint, "best.pth")
        assert_loaded(segmenter, expected)


def test_a_checkpoint_of_other_classes_says_both_numbers():
    message = weights_error(load_checkpoint_state, make(nclass=19), make(nclass=21).state_dict(), "best.pth")
    assert message == "best.pth: its classifier has 21 classes, the config has 19"


def test_a_checkpoint_of_another_backbone_says_both_names():
    message = weights_error(load_checkpoint_state, make(), filled(STATE_DICTS["resnet50"]), "best.pth")
    assert message == "best.pth: its backbone is resnet50, the config's is resnet18"


def test_a_checkpoint_that_differs_leaves_the_model_as_it_was():
    segmenter = make()
    before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["fuse.0.weight"]
    state["aux.bias"] = torch.zeros(1)
    message = weights_error(load_checkpoint_state, segmenter, {"model": state}, "best.pth")
    assert message == "best.pth: not a checkpoint of this model: missing fuse.0.weight, unexpected aux.bias"
    assert_loaded(segmenter, before)


@pytest.mark.parametrize("checkpoint", [None, [], {}, {"model": None}, {"optimizer": {}}])
def test_a_checkpoint_without_weights_is_refused(checkpoint):
    assert "best.pth: holds no state dict" in weights_error(load_checkpoint_state, make(), checkpoint, "best.pth")


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_numpy_number_in_a_checkpoint_is_read_whichever_numpy_wrote_it(tmp_path, module):
    path = tmp_path / "best.pth"
    torch.save({"previous_best": np.float64(78.25), "epoch": np.int64(7)}, path, _use_new_zipfile_serialization=False)
    written = np.float64(0).__reduce__()[0].__module__.encode()
    assert written in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"c" + written + b"\n", b"c" + module + b"\n"))
    assert read_checkpoint(path) == {"previous_best": 78.25, "epoch": 7}


class Runs:
    """Unpickling an instance touches the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model": Runs(tmp_path / "touched")}, tmp_path / "best.pth")
    assert "best.pth: not a PyTorch checkpoint of tensors" in weights_error(read_checkpoint, tmp_path / "best.pth")
    assert not (tmp_path / "touched").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    assert weights_error(read_checkpoint, tmp_path / "best.pth") == f"{tmp_path / 'best.pth'}: no such file"
