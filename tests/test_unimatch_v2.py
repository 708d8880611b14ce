"""UniMatch V2's step, and FixMatch's and the supervised one beside it, against the reference figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from dataset.views import UnlabeledViews
from model import build_model, complementary_dropout
from scripts.benchmark import naive, naive_v2
from tests.helpers import make_model
from tests.reference import formulas
from tests.reference.weights import check_summary, reference_state_v2
from tests.steps import run_step
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
    batch = batch[0] if method == "supervised" else batch
    method = "fixmatch with a teacher" if method == "fixmatch" else method
    return run_step(method, model, batch, criterion, backward, teacher, conf_thresh)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIGURES["steps"]))
def test_steps_equal_the_reference_figures(name, device):
    """All eight steps, to the weights at the end; with OHEM, and of the baseline without a teacher, three on a CPU."""
    shorter = name in ("unimatch_v2/OHEM", "supervised/CELoss") and torch.device(device).type == "cpu"
    steps = 3 if shorter else STEPS
    method, criterion_name, *locked = name.split("/")
    expected = FIGURES["steps"][name]
    model = _model()
    start = reference_state_v2(model)
    model.load_state_dict(start)
    model.to(device, torch.float64)
    model.backbone.requires_grad_(not locked)
    teacher = Teacher(model)
    criterion = build_criterion(SimpleNamespace(criterion=Criterion(criterion_name, thresh=0.3, min_kept=1500)))
    optimizer = build_optimizer(model, lr=1e-4, lr_multi=5, kind="adamw")
    torch.manual_seed(SEED)
    seen = {curve: [] for curve in expected["scalars"]}
    for i in range(steps):
        set_poly_lr(optimizer, i, STEPS)
        optimizer.zero_grad()
        batch = tree_map_only(torch.Tensor, lambda x: x.to(device), _batch(i))
        metrics = _run(method, model, teacher, batch, criterion, expected["conf_thresh"])
        optimizer.step()
        teacher.update(model)
        for key, value in metrics.items():
            assert value.ndim == 0 and not value.requires_grad
            seen[f"train/{'loss_all' if key == 'loss' else key}"].append(float(value))
    for curve, values in expected["scalars"].items():
        assert seen[curve] == pytest.approx(values[:steps], rel=1e-5), curve
    if steps < STEPS:
        return
    set_poly_lr(optimizer, STEPS, STEPS)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected["lr_groups_after"], rel=1e-12)
    assert len(optimizer.state) == expected["with_optimizer_state"]
    for network, part in ((model, ""), (teacher.model, "ema")):
        if part and "ema" not in expected:
            continue
        state = {key: tensor.cpu() for key, tensor in network.state_dict().items()}
        for tensor_name, summary in expected[part or "final"].items():
            check_summary(state[tensor_name], summary, rtol=1e-5)
            change = (state[tensor_name].double() - start[tensor_name].double()).norm()
            assert float(change) == pytest.approx(summary["update_l2"], rel=1e-5), tensor_name
        squares = sum(float((state[key].double() - start[key].double()).square().sum()) for key in start)
        assert squares**0.5 == pytest.approx(expected[f"{part}_update_l2_all".removeprefix("_")], rel=1e-5)


def _tiny_batch(batch: int = 4, size: int = 28, dtype: torch.dtype = torch.float64):
    (image, label), u = _batch(0, batch, size, dtype)
    torch.manual_seed(2)
    boxes = torch.rand(2, batch, size, size) < 0.4  # no rectangles: more is pasted from everywhere
    return (image, label), u._replace(box1=boxes[0], box2=boxes[1])


def _step_of(function, model: nn.Module, teacher, *arguments) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(1)
    result = function(model, teacher, *arguments)
    loss = result["loss"] if isinstance(result, dict) else result
    return float(loss), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpt", "deeplabv3plus"])
def test_a_step_equals_the_naive_one(name):
    def model() -> nn.Module:
        torch.manual_seed(0)
        return (_model() if name == "dpt" else make_model()).double()

    student = model()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    weights = student.state_dict()
    criterion = build_criterion(SimpleNamespace(criterion=Criterion()))
    batch = _tiny_batch() if name == "dpt" else _tiny_batch(size=33)
    loss, gradients = _step_of(
        unimatch_v2_step, student, Teacher(model()), batch, criterion, 0.0, torch.Tensor.backward
    )
    other = model()
    other.load_state_dict(weights)
    teacher = naive_v2.NaiveTeacher(naive_v2.with_naive_attention(model()).eval())
    other = naive_v2.with_naive_attention(other)
    expected, expected_gradients = _step_of(naive_v2.unimatch_v2_step, other, teacher, batch, naive.cross_entropy, 0.0)
    assert loss == pytest.approx(expected, rel=1e-11)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_a_teacher_equals_the_naive_one_over_many_updates():
    torch.manual_seed(0)
    student = make_model().double()
    ours, theirs = Teacher(student), naive_v2.NaiveTeacher(copy.deepcopy(student))
    for _ in range(5):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        ours.update(student)
        theirs.update(student)
    for own, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pairs", [1, 2, 3, 5])
def test_complementary_dropout_equals_the_naive_one(pairs):
    torch.manual_seed(3)
    ours = complementary_dropout(pairs, 11).tolist()
    torch.manual_seed(3)
    first, second = naive_v2.complementary_dropout(pairs, 11)
    assert ours == first + second


@pytest.mark.parametrize("method", ["unimatch_v2", "fixmatch"])
def test_the_student_never_sees_the_weak_view_and_each_part_is_back_propagated_when_complete(method):
    torch.manual_seed(0)
    model = make_model().double()
    teacher, events = Teacher(model), []
    model.register_forward_pre_hook(lambda module, args: events.append(("student", len(args[0]), module.training)))
    teacher.model.register_forward_pre_hook(
        lambda module, args: events.append(("teacher", len(args[0]), module.training))
    )

    def backward(part: torch.Tensor) -> None:
        events.append("backward")
        part.backward()

    batch = _tiny_batch(batch=2, size=33)
    _run(method, model, teacher, batch, build_criterion(SimpleNamespace(criterion=Criterion())), 0.3, backward)
    seen = [("student", 2, True), "backward", ("student", 4, True), "backward"]
    assert events == [("teacher", 2, False), *(seen if method == "unimatch_v2" else seen[2:])]
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unimatch_v2", "fixmatch"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_step_and_the_teachers_update_mix_no_devices_and_read_no_value_back(method, device):
    def backward(part: torch.Tensor) -> None:
        if device == "cpu" or torch.cuda.is_available():  # autograd cannot run on fake CUDA tensors without a GPU
            part.backward()

    with FakeTensorMode(), torch.device(device):
        model = _model()
        teacher = Teacher(model)
        images = [torch.empty(2, 3, 42, 42) for _ in range(3)]
        mask = torch.empty(2, 42, 42, dtype=torch.uint8)
        views = UnlabeledViews(*images, mask, *(torch.empty(2, 42, 42, dtype=torch.bool) for _ in range(2)))
        labeled = torch.empty(2, 3, 42, 42), torch.empty(2, 42, 42, dtype=torch.int64)
        criterion = build_criterion(SimpleNamespace(criterion=Criterion("OHEM", min_kept=500)))
        optimizer = build_optimizer(model, lr=1e-3, lr_multi=1, kind="adamw")
        metrics = _run(method, model, teacher, (labeled, views), criterion, 0.95, backward)
        optimizer.step()
        teacher.update(model)
    assert {value.device.type for value in metrics.values()} == {device}


def test_a_batch_without_a_valid_pixel_gives_zero_losses():
    model = make_model()
    (image, label), u = _tiny_batch(batch=2, size=33, dtype=torch.float32)
    batch = (image, torch.full_like(label, 255)), u._replace(ignore_mask=torch.full_like(u.ignore_mask, 255))
    metrics = _run(
        "unimatch_v2", model, Teacher(model), batch, build_criterion(SimpleNamespace(criterion=Criterion())), 0.3
    )
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(
        ("loss", "loss_x", "loss_s", "mask_ratio"), 0.0
    )
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("model", ["deeplabv3plus", "dpt"])
def test_a_process_drops_of_its_samples_what_one_process_with_all_would(model):
    keys = {"replace_stride_with_dilation": (False, False, True), "dilations": (6, 12, 18), "pretrained": False}
    backbone, size = ("resnet10", 33) if model == "deeplabv3plus" else ("dinov2_small", 28)
    network = build_model(SimpleNamespace(model=model, backbone=backbone, nclass=3, **keys)).double().eval()
    image = torch.randn(8, 3, size, size, dtype=torch.float64)

    @torch.no_grad()
    def perturbed(rows, share):
        network.share = share
        torch.manual_seed(3)
        return network(image[rows], need_fp=True)[1], network(image[rows], comp_drop=True)

    whole = perturbed(list(range(8)), (0, 1))
    for rank in range(2):
        for index, rows in enumerate(([rank, rank + 2, 4 + rank, 6 + rank], [rank, 3 - rank, 4 + rank, 7 - rank])):
            own = perturbed(rows, (rank, 2))[index]  # complementary dropout goes with CutMix from the reversed batch
            assert (own - whole[index][rows]).abs().max() < 1e-12
