"""util/schedule.py: the poly schedule with its two equal first steps, and the two parameter groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from util.schedule import build_optimizer, poly_lr, set_poly_lr


class _Net(nn.Module):
    """Names as the segmentation model has them, one of which only looks like the backbone's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.backbone_like = nn.Linear(2, 2)
        self.classifier = nn.Conv2d(4, 2, 1)


def test_the_rate_follows_the_release_which_sets_it_after_the_step():
    lr, total = 0.004, 8
    rates, rate = [], lr
    for iteration in range(total):
        rates.append(rate)
        rate = lr * (1 - iteration / total) ** 0.9  # the release's line, after the optimiser's step
    assert [poly_lr(lr, k, total) for k in range(total)] == pytest.approx(rates, rel=1e-15)
    assert poly_lr(lr, total, total) == pytest.approx(rate, rel=1e-15)


def test_steps_0_and_1_share_the_rate_and_it_falls_from_then_on():
    rates = [poly_lr(0.1, k, 1000) for k in range(1000)]
    assert rates[0] == rates[1] == 0.1
    assert all(later < earlier for earlier, later in pairwise(rates[1:]))
    assert 0 < rates[-1] < 0.001


@pytest.mark.parametrize("total", [1, 2])
def test_a_run_of_one_or_two_steps_has_the_full_rate(total):
    assert [poly_lr(0.1, k, total) for k in range(total)] == [0.1] * total


def test_the_backbone_and_the_rest_have_a_group_each():
    model = _Net()
    optimizer = build_optimizer(model, lr=0.01, lr_multi=10)
    backbone, rest = optimizer.param_groups
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    assert len(backbone["params"]) == 4 and len(rest["params"]) == 4
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert (backbone["lr"], rest["lr"]) == (0.01, 0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)


def test_adamw_decays_by_a_hundredth_unless_told_otherwise():
    optimizer = build_optimizer(_Net(), lr=0.01, lr_multi=40, kind="adamw")
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.4]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)
    (group, _) = build_optimizer(_Net(), 1, 1, weight_decay=0.0, kind="adamw", betas=(0.5, 0.6)).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_needs_no_gradient_neither_learns_nor_decays(kind):
    """A locked backbone's group is there, empty."""
    model = _Net()
    model.backbone.requires_grad_(False)
    before = [parameter.clone() for parameter in model.backbone.parameters()]
    optimizer = build_optimizer(model, lr=0.1, lr_multi=10, weight_decay=0.5, kind=kind)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 4]
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    set_poly_lr(optimizer, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True))


def test_a_wrapper_around_the_model_does_not_change_the_groups():
    bare, wrapped = (build_optimizer(m, 0.01, 10) for m in (_Net(), nn.ModuleDict({"module": _Net()})))
    assert [len(g["params"]) for g in wrapped.param_groups] == [len(g["params"]) for g in bare.param_groups]


def test_setting_the_rate_keeps_the_multiple_and_the_start():
    optimizer = build_optimizer(_Net(), lr=0.01, lr_multi=10)
    for iteration in (5, 3, 0, 8):
        set_poly_lr(optimizer, iteration, 8)
        expected = 0.01 * (1 - max(iteration - 1, 0) / 8) ** 0.9
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([expected, 10 * expected], rel=1e-14)


def test_a_restored_optimizer_goes_on_at_the_same_rates():
    first, second = (build_optimizer(_Net(), lr=0.01, lr_multi=10) for _ in range(2))
    set_poly_lr(first, 6, 8)
    second.load_state_dict(first.state_dict())
    set_poly_lr(first, 7, 8)
    set_poly_lr(second, 7, 8)
    assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in first.param_groups]
