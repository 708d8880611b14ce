"""Whole runs of UniMatch V2's methods: the teacher in checkpoints, in evaluation and after interruptions."""

from __future__ import annotations

import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import fixmatch
import supervised
import unimatch
import unimatch_v2
from model import build_model
from tests.helpers import PROJECT_ROOT, TinyData, assert_same, load_checkpoint, make_dataset, run_script
from util.config import load_config
from util.errors import Interrupted
from util.evaluate import Result
from util.run import Run
from util.teacher import Teacher
from util.train import loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two epochs of three iterations."""
    data = make_dataset(tmp_path_factory.mktemp("v2"))
    data.configure(epochs=2, conf_thresh=0.4, optimizer="adamw")
    return data


def _signal_at(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """Send this process SIGTERM at the start of a step."""
    set_poly_lr = loop.set_poly_lr

    def hit(optimizer, step: int, total: int) -> None:
        if step == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        set_poly_lr(optimizer, step, total)

    monkeypatch.setattr(loop, "set_poly_lr", hit)


@pytest.mark.parametrize(("main", "extra"), [(unimatch_v2.main, []), (fixmatch.main, ["teacher=ema"])])
def test_a_run_with_a_teacher_that_a_signal_ended_goes_on_to_the_same_end(data, main, extra, tmp_path, monkeypatch):
    arguments = ["--set", *extra, "log_interval=1"]
    main([*data.arguments(tmp_path / "whole"), *arguments])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        _signal_at(patch, 4)  # the second of the second epoch
        main([*data.arguments(tmp_path / "run"), *arguments])
    assert load_checkpoint(tmp_path / "run", "midway.pth")["teacher_updates"] == 5
    main([*data.arguments(tmp_path / "run"), *arguments])
    expected, state = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "run")
    assert state["teacher_updates"] == 6
    assert_same(expected, state)


IN_FLOAT64 = """
import unimatch_v2
from util.cli import run_main
from util.run import Run

build_model = Run.build_model

def in_float64(run):
    model = build_model(run).double()
    model.register_forward_pre_hook(lambda module, images: tuple(image.double() for image in images))
    return model

Run.build_model = in_float64
"""


def test_from_the_middle_of_an_epoch_two_processes_go_on_to_the_end_of_one(tmp_path, monkeypatch):
    """Where all pixels are valid, since each process divides its losses by its own; in float64."""
    data = make_dataset(tmp_path / "data", unlabeled=8, size=(72, 72))  # no crop is larger than an image
    for path in (data.root / "labels").iterdir():
        label = np.array(Image.open(path))
        Image.fromarray(np.where(label == 255, 0, label).astype(np.uint8)).save(path)
    data.configure(epochs=2, conf_thresh=0.4, optimizer="adamw", batch_size=4)
    monkeypatch.setattr(Run, "build_model", Run.build_model)  # so that it is set back at the end
    exec(IN_FLOAT64, {})
    unimatch_v2.main(data.arguments(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        _signal_at(patch, 0)
        unimatch_v2.main(data.arguments(tmp_path / "run"))
    script = tmp_path / "script.py"
    script.write_text(f"{IN_FLOAT64}\nrun_main(unimatch_v2.main)\n")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2")
    arguments = [*data.arguments(tmp_path / "run"), "--set", "batch_size=2"]
    result = run_script(*launcher, script, *arguments, env={"PYTHONPATH": str(PROJECT_ROOT)})
    assert result.returncode == 0, result.stderr
    expected, state = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "run")
    assert state["iteration"] == expected["iteration"] == 4
    for part in ("model", "teacher"):
        for name, tensor in expected[part].items():
            torch.testing.assert_close(state[part][name], tensor, rtol=1e-9, atol=1e-12)


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


def test_where_both_are_evaluated_best_pth_follows_the_teacher(data, tmp_path, monkeypatch):
    found = iter([30.0, 40.0, 20.0, 50.0])  # teacher, student, teacher, student
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Result(next(found), torch.zeros(3), torch.zeros(3, 3)))
    unimatch_v2.main([*data.arguments(tmp_path / "run"), "--set", "evaluate=both"])
    best = load_checkpoint(tmp_path / "run", "best.pth")
    assert (best["epoch"], best["previous_best"]) == (1, 30.0)


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
    for method, extra in ((unimatch_v2, []), (fixmatch, []), (unimatch, []), (supervised, ["supervised_epoch=6"])):
        path = tmp_path / method.__name__
        method.main([*data.arguments(path), "--set", "epochs=1", *extra])
        state, fresh = load_checkpoint(path), build_model(load_config(data.config), pretrained=False)
        assert ("teacher" in state) == (method in (unimatch_v2, fixmatch))
        assert set(state["model"]) == set(fresh.state_dict())
        assert not [group for group in state["optimizer"]["param_groups"][:1] if group["params"]]
        assert re.search(r"iteration 3/3", (path / "train.log").read_text())
