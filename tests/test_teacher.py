"""The EMA teacher against the formula, step by step."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import assert_same
from util.errors import CheckpointError
from util.teacher import Teacher

FIGURES = json.loads((Path(__file__).parent / "reference" / "figures_v2.json").read_text())["ema_decay"]


def _student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double()


def _change(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)


def test_the_teacher_follows_the_formula_at_the_published_decays():
    student = nn.Linear(1, 1, bias=False).double()
    teacher = Teacher(student)
    with torch.no_grad():
        for k in range(1001):
            # From 1 to 0: what is left of the 1 is the decay.
            teacher.model.weight.fill_(1)
            student.weight.fill_(0)
            teacher.update(student)
            if k in FIGURES["iterations"]:
                expected = FIGURES["decay"][FIGURES["iterations"].index(k)]
                assert teacher.model.weight.item() == pytest.approx(expected, abs=1e-10)


def test_the_first_update_copies_the_student_and_the_next_ones_average_all_students():
    student = _student()
    teacher = Teacher(student)
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    seen = []
    for k in range(5):
        _change(student)
        seen.append([t.clone() for t in (*student.parameters(), *student.buffers())])
        teacher.update(student)
        own = [*teacher.model.parameters(), *teacher.model.buffers()]
        if k == 0:
            assert all(map(torch.equal, own, seen[0]))
    for i, tensor in enumerate(own):
        students = torch.stack([tensors[i] for tensors in seen])
        # The count of batches is the student's own.
        expected = students.mean(0) if tensor.is_floating_point() else students[-1]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)


def test_a_step_that_did_not_count_leaves_the_teacher_and_its_count_alone():
    student = _student()
    teacher, other = Teacher(student), Teacher(student)
    for k in range(6):
        _change(student)
        if k == 3:
            before, statistics = copy.deepcopy(teacher.state_dict()), student[1].running_var.clone()
            student[1].running_var.fill_(float("inf"))
            teacher.update(student, torch.tensor(True))
            assert_same(before, teacher.state_dict())
            student[1].running_var.copy_(statistics)
        else:
            teacher.update(student, torch.tensor(False))
            other.update(student)
    for own, expected in zip(teacher.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_a_teacher_that_was_saved_goes_on_bit_for_bit(tmp_path):
    student = _student()
    teacher = Teacher(student)
    for _ in range(3):
        _change(student)
        teacher.update(student)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    again = Teacher(student)
    again.load_state_dict(torch.load(tmp_path / "teacher.pth", weights_only=True), tmp_path / "teacher.pth")
    _change(student)
    teacher.update(student)
    again.update(student)
    for key, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[key])


@pytest.mark.parametrize("state", [{}, {"teacher": {}}, {"teacher": {}, "teacher_updates": torch.tensor(0.5)}])
def test_a_checkpoint_without_a_teacher_is_named(state):
    with pytest.raises(CheckpointError, match=r"^run/latest\.pth: holds no teacher"):
        Teacher(nn.Linear(1, 1)).load_state_dict(state, Path("run/latest.pth"))


def test_an_update_reads_nothing_back_from_the_device():
    with FakeTensorMode(), torch.device("cuda"):
        student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        student[0].bias.requires_grad_(False)
        teacher = Teacher(student)
        teacher.update(student)
        teacher.update(student, torch.zeros((), dtype=torch.bool))
        assert not {id(tensor) for tensor in student.state_dict().values()} & set(map(id, teacher.model.parameters()))


def test_weights_that_are_not_trained_stay_the_student_s_to_the_bit():
    student = _student()
    student[0].requires_grad_(False)
    teacher = Teacher(student)
    for _ in range(5):
        with torch.no_grad():
            student[2].weight.add_(torch.randn_like(student[2].weight))
        teacher.update(student)
    assert torch.equal(teacher.model[0].weight, student[0].weight)
    assert not torch.equal(teacher.model[2].weight, student[2].weight)
