"""util/trained.py: the tools use the checkpoint's own config, and say where another one is given."""

from __future__ import annotations

import argparse
import hashlib

import pytest
import torch
import yaml

from model import build_model
from scripts import evaluate, predict
from tests.helpers import make_dataset
from util.config import load_config, to_dict
from util.errors import ConfigError
from util.trained import add_model_arguments, open_trained


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), val=1)


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    cfg = load_config(data.config, ["dilations=[3,6,9]", "classes=[a,b,c]", "device=cuda", "workers=7"])
    path = tmp_path_factory.mktemp("exp") / "best.pth"
    state = build_model(cfg).state_dict()
    torch.save({"model": state, "config": to_dict(cfg)}, path)
    return path


def _parse(checkpoint, *argv, config=None):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    argv = [*argv, *(["--config", str(config)] if config else [])]
    return parser.parse_args(["--checkpoint", str(checkpoint), *argv])


def _open(checkpoint, *argv, config=None):
    return open_trained(_parse(checkpoint, *argv, config=config))


def _open_on_cpu(*argv, config=None):
    args = _parse(*argv, config=config)
    return open_trained(args).on(torch.device("cpu"), args)


def _config(data, tmp_path, **changes):
    values = {**data.settings(), "dilations": [3, 6, 9], "classes": ["a", "b", "c"], **changes}
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_without_a_config_the_checkpoints_is_used_but_for_the_machine_it_ran_on(data, checkpoint):
    trained = _open(checkpoint)
    assert trained.cfg.dilations == (3, 6, 9) and trained.cfg.val_id_path == str(data.val)
    assert trained.cfg.device == "auto" and trained.cfg.workers is None
    assert trained.notes == ()
    assert trained.sha256() == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert _open(checkpoint, "--set", "device=cpu").cfg.device == "cpu"


@pytest.mark.parametrize("key", ["cuda_graphs", "compile"])
def test_ways_of_training_that_no_tool_uses_ask_nothing_of_the_machine(data, tmp_path, monkeypatch, key):
    monkeypatch.setattr("util.precision.shutil.which", lambda _: None)  # no compiler
    config = to_dict(load_config(data.config, {key: True}))
    torch.save({"model": {}, "config": config}, tmp_path / "own.pth")
    torch.save({"model": {}}, tmp_path / "published.pth")
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(config))
    for trained in (
        _open_on_cpu(tmp_path / "own.pth"),
        _open_on_cpu(tmp_path / "published.pth", config=tmp_path / "given.yaml"),
    ):
        assert getattr(trained.cfg, key) is False and trained.notes == ()


@pytest.mark.parametrize("tool", [evaluate, predict])
def test_on_a_cpu_a_checkpoint_trained_in_fp16_is_used_in_float32_with_a_note(data, tmp_path, tool, capsys):
    cfg = load_config(data.config, {"amp": "fp16", "cuda_graphs": True})
    torch.save({"model": build_model(cfg).state_dict(), "config": to_dict(cfg)}, tmp_path / "c.pth")
    argv = ["--checkpoint", str(tmp_path / "c.pth"), "--set", "device=cpu", "workers=0"]
    if tool is predict:
        argv = [str(data.root / "images"), "--out", str(tmp_path / "out"), *argv]
    tool.main(argv)
    note = "note: amp: fp16 needs a GPU: computed in float32 (amp: none) here"
    assert capsys.readouterr().out.splitlines().count(note) == 1


def test_fp16_that_the_command_line_asks_for_is_refused_on_a_cpu_and_kept_on_a_gpu(data, tmp_path):
    config = to_dict(load_config(data.config, {"amp": "fp16"}))
    torch.save({"model": {}, "config": config}, tmp_path / "c.pth")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        _open_on_cpu(tmp_path / "c.pth", "--set", "amp=fp16")
    args = _parse(tmp_path / "c.pth")
    trained = open_trained(args).on(torch.device("cuda"), args)
    assert (trained.cfg.amp, trained.notes) == ("fp16", ())


def test_predictions_with_other_rounding_are_another_model_s(checkpoint):
    default, ours = (_open(checkpoint, *argv).identity() for argv in ((), ("--set", "tf32=false")))
    assert ours == {**default, "tf32": False} and "tf32" not in default  # as in the marks of earlier predictions


def test_the_same_config_is_used_without_a_word(data, checkpoint, tmp_path):
    assert _open(checkpoint, config=_config(data, tmp_path)).notes == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dilations": [6, 12, 18]}, r"dilations is \[6, 12, 18\].*trained with \[3, 6, 9\]"),
        ({"replace_stride_with_dilation": [False, True, True]}, "replace_stride_with_dilation is"),
        ({"backbone": "resnet50"}, "backbone is resnet50.*trained with resnet10"),
        ({"classes": ["a", "c", "b"]}, "class 1 is 'c' here and was 'b' in training; .*another order"),
        ({"classes": ["a", "b", "c", "d"]}, "nclass is 4.*trained with 3"),
    ],
)
def test_a_config_file_of_another_model_is_refused(data, checkpoint, tmp_path, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        _open(checkpoint, config=_config(data, tmp_path, **changes))


@pytest.mark.parametrize("setting", ["dilations=[6,12,18]", "classes=[c,b,a]"])
def test_what_the_command_line_changes_is_warned_of(data, checkpoint, tmp_path, setting):
    (note,) = _open(checkpoint, "--set", setting, config=_config(data, tmp_path)).notes
    assert note.startswith("warning: ") and setting.partition("=")[0] in note
    (note,) = _open(checkpoint, "--set", setting).notes
    assert note.startswith("warning: ")


def test_renamed_classes_and_another_evaluation_are_told(data, checkpoint, tmp_path):
    config = _config(data, tmp_path, classes=["a", "b", "leaf"], eval_mode="sliding_window")
    assert [note.split(":")[0] for note in _open(checkpoint, config=config).notes] == ["warning", "note"]


@pytest.mark.parametrize("key", ["teacher", "model_ema"])
def test_of_two_networks_the_teacher_is_taken_unless_told_otherwise(data, checkpoint, tmp_path, key):
    state = torch.load(checkpoint, weights_only=True)
    both = tmp_path / "both.pth"
    torch.save({**state, key: {f"module.{name}": value + 1 for name, value in state["model"].items()}}, both)
    opened = {argv: _open(both, *argv) for argv in ((), ("--weights", "teacher"), ("--weights", "student"))}
    bias = {argv: trained.build().classifier.bias for argv, trained in opened.items()}
    student = state["model"]["classifier.bias"]
    assert [torch.equal(value, student + 1) for value in bias.values()] == [True, True, False]
    assert torch.equal(bias["--weights", "student"], student)
    assert [trained.weights for trained in opened.values()] == ["teacher", "teacher", "student"]
    assert [len(trained.notes) for trained in opened.values()] == [1, 0, 0]
    torch.save({"model": {}}, tmp_path / "one.pth")
    with pytest.raises(ConfigError, match="has no weights of a teacher"):
        _open(tmp_path / "one.pth", "--weights", "teacher", config=data.config)


def test_a_checkpoint_without_a_config_needs_one(data, tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "published.pth")
    with pytest.raises(ConfigError, match=r"carries no config.*--config"):
        _open(tmp_path / "published.pth")
    assert _open(tmp_path / "published.pth", config=data.config).notes == ()


def test_a_config_in_the_checkpoint_that_cannot_be_used_is_one_line(data, tmp_path):
    for config in ({"dataset": "x", 3: torch.zeros(2)}, {"unknown": "key"}, {"dataset": torch.zeros(2)}):
        torch.save({"model": {}, "config": config}, tmp_path / "odd.pth")
        with pytest.raises(ConfigError, match=r"odd\.pth \(its config\).*--config"):
            _open(tmp_path / "odd.pth")
        (note,) = _open(tmp_path / "odd.pth", config=data.config).notes
        assert "not compared" in note and len(note.splitlines()) == 1
