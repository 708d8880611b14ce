"""Whole runs of UniMatch V2's methods: the teacher in checkpoints, in evaluation and after interruptions."""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch

import fixmatch
import supervised
import unimatch_v2
from model import build_model
from tests.helpers import TinyData, assert_same, load_checkpoint, make_dataset
from util.config import load_config
from util.errors import Interrupted
from util.teacher import Teacher
from util.train import loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two epochs of three iterations."""
    data = make_dataset(tmp_path_factory.mktemp("v2"))
    data.configure(epochs=2, conf_thresh=0.4, optimizer="adamw")
    return data


@pytest.mark.parametrize(("main", "extra"), [(unimatch_v2.main, []), (fixmatch.main, ["teacher=ema"])])
def test_a_run_with_a_teacher_that_a_signal_ended_goes_on_to_the_same_end(data, main, extra, tmp_path, monkeypatch):
    arguments = ["--set", *extra, "log_interval=1"]
    main([*data.arguments(tmp_path / "whole"), *arguments])
    set_poly_lr = loop.set_poly_lr

    def hit(optimizer, iteration: int, total: int) -> None:
        if iteration == 4:  # the second of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        set_poly_lr(optimizer, iteration, total)

    monkeypatch.setattr(loop, "set_poly_lr", hit)
    with pytest.raises(Interrupted):
        main([*data.arguments(tmp_path / "run"), *arguments])
    assert load_checkpoint(tmp_path / "run", "midway.pth")["teacher_updates"] == 5
    monkeypatch.undo()
    main([*data.arguments(tmp_path / "run"), *arguments])
    expected, state = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "run")
    assert state["teacher_updates"] == 6
    assert_same(expected, state)


def test_the_checkpoint_s_teacher_is_the_average_of_the_students(data, tmp_path, monkeypatch):
    students, update = [], Teacher.update

    def seen(self, model, skipped=None) -> None:
        students.append({name: tensor.clone() for name, tensor in model.named_parameters()})
        update(self, model, skipped)

    monkeypatch.setattr(Teacher, "update", seen)
    unimatch_v2.main(data.arguments(tmp_path / "run"))
    state = load_checkpoint(tmp_path / "run")
    assert len(students) == state["teacher_updates"] == 6
    for name in students[0]:
        mean = torch.stack([student[name].double() for student in students]).mean(0)
        torch.testing.assert_close(state["teacher"][name].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("whose", "tables"), [(None, ["teacher's "]), ("student", [""]), ("both", ["teacher's ", "student's "])]
)
def test_the_log_says_whose_miou_it_is(data, whose, tables, tmp_path):
    extra = ["--set", "epochs=1", *([f"evaluate={whose}"] if whose else [])]
    unimatch_v2.main([*data.arguments(tmp_path / "run"), *extra])
    log = (tmp_path / "run/train.log").read_text()
    assert re.findall(r"epoch 1/1: (.*)IoU in percent", log) == tables


def test_undone_steps_leave_the_teacher_alone(data, tmp_path, monkeypatch):
    step, calls = unimatch_v2.unimatch_v2_step, []

    def broken(model, teacher, batch, criterion, conf_thresh, backward):
        calls.append({name: tensor.clone() for name, tensor in teacher.model.state_dict().items()})
        nan = float("nan") if len(calls) == 2 else 1.0
        return step(model, teacher, batch, criterion, conf_thresh, lambda part: backward(part * nan))

    monkeypatch.setattr(unimatch_v2, "unimatch_v2_step", broken)
    unimatch_v2.main([*data.arguments(tmp_path / "run"), "--set", "on_nonfinite=skip"])
    assert_same(calls[1], calls[2])  # before the second step and before the third
    assert load_checkpoint(tmp_path / "run")["teacher_updates"] == 5


def test_every_method_trains_dinov2_and_dpt(tmp_path):
    data = make_dataset(tmp_path / "data", size=(45, 38))
    data.configure(crop_size=28, model="dpt", backbone="dinov2_small", lock_backbone=True, eval_mode="sliding_window")
    for main, extra in ((unimatch_v2.main, []), (fixmatch.main, []), (supervised.main, ["supervised_epoch=6"])):
        path = tmp_path / main.__module__
        main([*data.arguments(path), "--set", "epochs=1", *extra])
        state, fresh = load_checkpoint(path), build_model(load_config(data.config), pretrained=False)
        assert ("teacher" in state) == (main is not supervised.main)
        assert set(state["model"]) == set(fresh.state_dict())
        assert not [group for group in state["optimizer"]["param_groups"][:1] if group["params"]]
        assert re.search(r"iteration 3/3", (path / "train.log").read_text())
