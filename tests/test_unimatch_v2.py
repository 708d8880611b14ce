"""UniMatch V2's step, and FixMatch's and the supervised one beside it, against the reference figures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dataset.semi import UnlabeledViews
from fixmatch import fixmatch_step
from model import build_model
from supervised import supervised_step
from tests.reference import formulas
from tests.reference.weights import check_summary, reference_state_v2
from unimatch_v2 import unimatch_v2_step
from util.config import Criterion
from util.losses import build_criterion
from util.schedule import build_optimizer, set_poly_lr
from util.teacher import Teacher

FIGURES = json.loads((Path(__file__).parent / "reference" / "figures_v2.json").read_text())
SEED, STEPS = FIGURES["seed"], 8


def _model(nclass: int = 5) -> nn.Module:
    return build_model(SimpleNamespace(model="dpt", backbone="dinov2_small", nclass=nclass, pretrained=False))


def _batch(i: int, batch: int = 3, size: int = 56, dtype: torch.dtype = torch.float64):
    image, label = (torch.from_numpy(part) for part in formulas.labeled(SEED + 10 + i, batch, size, 5))
    views = [torch.from_numpy(part) for part in formulas.unlabeled(SEED + 100 + i, batch, size)]
    views = UnlabeledViews(*(part.to(dtype) if part.ndim == 4 else part for part in views))
    return (image.to(dtype), label), views


def _run(method: str, model, teacher, batch, criterion, conf_thresh, backward=torch.Tensor.backward):
    if method == "supervised":
        return supervised_step(model, batch[0], criterion, backward)
    if method == "fixmatch":
        return fixmatch_step(model, batch, criterion, conf_thresh, backward, teacher)
    return unimatch_v2_step(model, teacher, batch, criterion, conf_thresh, backward)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIGURES["steps"]))
def test_eight_steps_equal_the_reference_figures(name):
    method, criterion_name, *locked = name.split("/")
    expected = FIGURES["steps"][name]
    model = _model()
    start = reference_state_v2(model)
    model.load_state_dict(start)
    model.double()
    model.backbone.requires_grad_(not locked)
    teacher = Teacher(model)
    criterion = build_criterion(SimpleNamespace(criterion=Criterion(criterion_name, thresh=0.3, min_kept=1500)))
    optimizer = build_optimizer(model, lr=1e-4, lr_multi=5, kind="adamw")
    torch.manual_seed(SEED)
    seen = {curve: [] for curve in expected["scalars"]}
    for i in range(STEPS):
        set_poly_lr(optimizer, i, STEPS)
        optimizer.zero_grad()
        metrics = _run(method, model, teacher, _batch(i), criterion, expected["conf_thresh"])
        optimizer.step()
        teacher.update(model)
        for key, value in metrics.items():
            assert value.ndim == 0 and not value.requires_grad
            seen[f"train/{'loss_all' if key == 'loss' else key}"].append(float(value))
    for curve, values in expected["scalars"].items():
        assert seen[curve] == pytest.approx(values, rel=1e-5), curve
    set_poly_lr(optimizer, STEPS, STEPS)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected["lr_groups_after"], rel=1e-12)
    assert len(optimizer.state) == expected["with_optimizer_state"]
    for network, part in ((model, ""), (teacher.model, "ema")):
        if part and "ema" not in expected:
            continue
        state = network.state_dict()
        for tensor_name, summary in expected[part or "final"].items():
            check_summary(state[tensor_name], summary, rtol=1e-5)
            change = (state[tensor_name].double() - start[tensor_name].double()).norm()
            assert float(change) == pytest.approx(summary["update_l2"], rel=1e-5), tensor_name
        squares = sum(float((state[key].double() - start[key].double()).square().sum()) for key in start)
        assert squares**0.5 == pytest.approx(expected[f"{part}_update_l2_all".removeprefix("_")], rel=1e-5)
