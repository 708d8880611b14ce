"""util/train/optimizer_step.py: what fp16's gradient scaler leaves out is counted, and only that."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers import assert_same
from util.log import RunLog
from util.teacher import Teacher
from util.train.optimizer_step import OptimizerStep


def _step(
    tmp_path, amp: str, on_nonfinite: str = "stop", accumulate: int = 1, teacher: bool = False
) -> tuple[OptimizerStep, nn.Module, list[str]]:
    lines: list[str] = []
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    cfg = SimpleNamespace(
        amp=amp, on_nonfinite=on_nonfinite, nonfinite_limit=10, accumulate=accumulate, cuda_graphs=False
    )
    log = RunLog(tmp_path, active=False)
    log.info = lines.append
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), log=log)

    def train_step(batch, backward):
        loss = (model(torch.ones(1, 3)) * batch).sum()
        backward(loss)
        return {"loss": loss.detach()}

    return OptimizerStep(run, model, optimizer, train_step, Teacher(model) if teacher else None), model, lines


def test_steps_that_the_scaler_leaves_out_change_nothing_and_are_counted(tmp_path):
    step, model, lines = _step(tmp_path, "fp16")
    scale = step.state_dict()["scaler"]["scale"]
    for factor in (1.0, float("inf"), 1.0, float("nan")):
        before = model.weight.detach().clone()
        step.run([torch.tensor(factor)])
        assert torch.equal(before, model.weight) == (factor != 1.0)
    step.report(4)
    step.report(4)
    assert lines == ["2 steps left out by the gradient scaler, which lowers its scale, up to iteration 4"]
    assert step.state_dict()["scaler"]["scale"] == scale / 4


@pytest.mark.parametrize("factors", [(1.0, 2.0), (float("inf"), 1.0, 2.0)])
def test_with_fp16_the_first_steps_are_those_without_it_also_where_the_scaler_leaves_one_out(
    tmp_path, monkeypatch, factors
):
    """Memory that is not filled holds what is no number here."""
    allocate = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: allocate(*args, **options).fill_(torch.nan))
    results = []
    for amp in ("fp16", "none"):
        torch.manual_seed(0)
        step, model, _ = _step(tmp_path, amp)
        step.optimizer.param_groups[0]["weight_decay"] = 0.01
        for factor in factors:
            if amp == "fp16" or factor != float("inf"):
                step.run([torch.tensor(factor)])
        results.append([model.weight.detach(), step.optimizer.state_dict()["state"]])
    assert_same(*results)


def test_without_fp16_sgd_makes_its_momenta_itself(tmp_path):
    assert not _step(tmp_path, "none")[0].optimizer.state


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_steps_that_the_scaler_leaves_out_leave_the_teacher_alone(tmp_path, on_nonfinite):
    step, model, _ = _step(tmp_path, "fp16", on_nonfinite, teacher=True)
    students = []
    for factor in (1.0, float("inf"), 1.0, float("nan")):
        before = copy.deepcopy(step.teacher.state_dict())
        step.run([torch.tensor(factor)])
        if factor == 1.0:
            students.append(model.weight.detach().clone())
        else:
            assert_same(before, step.teacher.state_dict())
    assert step.teacher.state_dict()["teacher_updates"] == 2
    torch.testing.assert_close(step.teacher.model.weight, sum(students) / 2)


def test_the_scaler_s_steps_are_not_those_that_the_guard_undoes(tmp_path):
    step, _, lines = _step(tmp_path, "fp16", on_nonfinite="skip")
    step.run([torch.tensor(1.0)])
    step.run([torch.tensor(float("inf"))])
    step.report(2)
    assert lines[0].startswith("1 step left out by the gradient scaler")


def test_without_fp16_there_is_no_scaler_and_nothing_to_tell(tmp_path):
    step, model, lines = _step(tmp_path, "none")
    step.run([torch.tensor(1.0)])
    assert "scaler" not in step.state_dict() and model.weight.grad.eq(1).all()
    step.report(1)
    assert not lines


def test_the_scale_is_taken_up_from_a_checkpoint(tmp_path):
    step, _, _ = _step(tmp_path, "fp16")
    step.run([torch.tensor(float("inf"))])
    step.run([torch.tensor(1.0)])
    again, _, _ = _step(tmp_path, "fp16")
    again.load_state_dict(step.state_dict(), tmp_path / "latest.pth")
    assert again.state_dict()["scaler"] == step.state_dict()["scaler"]


def test_accumulated_batches_make_one_step_with_the_mean_of_their_gradients_and_metrics(tmp_path):
    step, model, _ = _step(tmp_path, "none", accumulate=3)
    single, twin, _ = _step(tmp_path, "none")
    twin.load_state_dict(model.state_dict())
    factors = [torch.tensor(factor) for factor in (1.0, 2.0, 6.0)]
    metrics, _ = step.run(iter(factors))
    expected, _ = single.run([torch.tensor(3.0)])
    torch.testing.assert_close(metrics["loss"], expected["loss"])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
