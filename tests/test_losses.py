"""util/losses.py against the reference figures and slow, obvious versions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts.benchmark import naive
from tests.reference import formulas
from util import losses
from util.config import Criterion
from util.losses import CrossEntropy, OhemCrossEntropy, build_criterion, pixel_cross_entropy

FIGURES = json.loads((Path(__file__).parent / "reference" / "figures.json").read_text())
SEED = FIGURES["seed"]


def _random(seed: int, shape=(2, 5, 4, 6), ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C, H, W) float64 that want a gradient, and a label with a share of ignored pixels."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(3 * rng.standard_normal(shape)).requires_grad_()
    label = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    label[rng.random(label.shape) < ignored] = 255
    return logits, torch.from_numpy(label)


def _slow_ohem(logits: torch.Tensor, label: torch.Tensor, thresh: float, min_kept: int) -> tuple[float, set[int]]:
    """OHEM pixel by pixel: the loss and the flat indices of the kept pixels."""
    values = logits.detach().movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    truth = label.flatten().tolist()
    prob = {}
    for i, (row, true_class) in enumerate(zip(values, truth, strict=True)):
        if true_class != 255:
            prob[i] = math.exp(row[true_class] - max(row)) / sum(math.exp(v - max(row)) for v in row)
    kept = set(prob)
    if 0 < min_kept <= len(prob):
        q = sorted([*prob.values(), *[1.0] * (len(truth) - len(prob))])[min_kept - 1]
        # A relative margin far below any gap between different values: p comes by another formula here.
        kept = {i for i, p in prob.items() if p <= max(thresh, q) * (1 + 1e-12)}
    return (sum(-math.log(prob[i]) for i in kept) / len(kept) if kept else 0.0), kept


def _kept(logits: torch.Tensor) -> set[int]:
    """Flat indices of the pixels with a gradient."""
    return set((logits.grad.abs().sum(dim=1).flatten() > 0).nonzero().flatten().tolist())


@pytest.mark.parametrize("name", FIGURES["ohem"])
def test_ohem_gives_the_reference_figures(name, device):
    case = FIGURES["ohem"][name]
    logits = torch.from_numpy(2 * formulas.image(SEED + 3, 2, 23, 31, 7)).double().to(device).requires_grad_()
    label = torch.from_numpy(formulas.mask(SEED + 4, 2, 23, 31, 7)).to(device)
    loss = OhemCrossEntropy(255, **case["kwargs"])(logits, label)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    assert logits.grad.norm().item() == pytest.approx(case["grad_l2"], rel=1e-6)
    assert len(_kept(logits)) == case["kept_pixels"]


@pytest.mark.parametrize("min_kept", [0, 1, 10, 30, 48, 49, 1000])
@pytest.mark.parametrize("thresh", [0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.95, 1.0])
def test_ohem_equals_a_slow_reference(thresh, min_kept, ignored):
    for seed in range(3):
        logits, label = _random(seed, ignored=ignored)
        loss = OhemCrossEntropy(255, thresh, min_kept)(logits, label)
        loss.backward()
        expected, kept = _slow_ohem(logits, label, thresh, min_kept)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert _kept(logits) == kept


def test_pixels_that_tie_at_the_min_kept_th_place_are_all_kept():
    # Three kinds of pixels, of equal probability within each kind: 6 hard, 10 medium, 8 easy.
    rows = torch.tensor([[0.0, 3.0], [1.0, 0.5], [4.0, 0.0]], dtype=torch.float64)
    kinds = torch.tensor([0] * 6 + [1] * 10 + [2] * 8)[torch.randperm(24, generator=torch.manual_seed(0))]
    for min_kept, expected in ((1, 6), (6, 6), (7, 16), (16, 16), (17, 24), (24, 24)):
        logits = rows[kinds].T.reshape(1, 2, 4, 6).clone().requires_grad_()
        label = torch.zeros(1, 4, 6, dtype=torch.int64)
        loss = OhemCrossEntropy(255, 1e-6, min_kept)(logits, label)
        loss.backward()
        assert len(_kept(logits)) == expected
        assert loss.item() == pytest.approx(_slow_ohem(logits, label, 1e-6, min_kept)[0], rel=1e-12)


def test_ohem_over_more_pixels_than_there_are_is_plain_cross_entropy():
    logits, label = _random(0)
    for min_kept in (label.numel(), label.numel() + 1, 200_000):
        loss = OhemCrossEntropy(255, 0.1, min_kept)(logits, label)
        assert loss.item() == pytest.approx(F.cross_entropy(logits, label, ignore_index=255).item(), rel=1e-12)


def test_cross_entropy_is_torchs_mean_over_the_pixels_that_count():
    for seed in range(5):
        logits, label = _random(seed)
        ours, torchs = CrossEntropy()(logits, label), F.cross_entropy(logits, label, ignore_index=255)
        assert ours.item() == pytest.approx(torchs.item(), rel=1e-12)
        (ours_grad,), (torchs_grad,) = torch.autograd.grad(ours, logits), torch.autograd.grad(torchs, logits)
        torch.testing.assert_close(ours_grad, torchs_grad, rtol=1e-12, atol=1e-15)


CRITERIA = [CrossEntropy(), OhemCrossEntropy(min_kept=0), OhemCrossEntropy(min_kept=10), OhemCrossEntropy()]


@pytest.mark.parametrize("criterion", CRITERIA, ids=["CELoss", "OHEM-0", "OHEM-10", "OHEM-200000"])
def test_a_batch_without_a_valid_pixel_has_zero_loss_and_zero_gradients(criterion):
    logits, label = _random(0, ignored=1.0)
    loss = criterion(logits, label)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("criterion", CRITERIA, ids=["CELoss", "OHEM-0", "OHEM-10", "OHEM-200000"])
def test_ignored_pixels_do_not_change_the_loss(criterion):
    logits, label = _random(1)
    changed = torch.where((label == 255).unsqueeze(1), -7 * logits.detach() + 1, logits.detach())
    assert criterion(changed, label).item() == criterion(logits, label).item()


@pytest.mark.parametrize("criterion", CRITERIA, ids=["CELoss", "OHEM-0", "OHEM-10", "OHEM-200000"])
def test_extreme_logits_give_a_finite_loss(criterion):
    label = torch.tensor([[[0, 1], [255, 0]]])
    logits = torch.tensor([[[[1e4, 1e4], [0, -1e4]], [[-1e4, -1e4], [0, 1e4]]]]).requires_grad_()
    loss = criterion(logits, label)
    loss.backward()
    assert loss.item() == pytest.approx(4e4 / 3) and logits.grad.isfinite().all()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("criterion", CRITERIA, ids=["CELoss", "OHEM-0", "OHEM-10", "OHEM-200000"])
def test_a_loss_reads_no_value_back_from_the_device(criterion, device):
    with FakeTensorMode():
        logits = torch.empty(2, 5, 8, 8, device=device, requires_grad=True)
        loss = criterion(logits, torch.empty(2, 8, 8, dtype=torch.int64, device=device))
        if device == "cpu" or torch.cuda.is_available():  # autograd needs the real device, even for fake tensors
            loss.backward()
            assert logits.grad.shape == logits.shape
    assert loss.device.type == device and loss.ndim == 0


@pytest.mark.parametrize("criterion", CRITERIA, ids=["CELoss", "OHEM-0", "OHEM-10", "OHEM-200000"])
def test_a_loss_is_one_graph_to_the_compiler(criterion):
    logits, label = _random(2)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    assert compiled(logits, label).item() == criterion(logits, label).item()


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("others", [0, 5])
def test_a_pixel_exactly_at_the_threshold_is_kept(monkeypatch, free, others):
    """`p <= thresh`, in the branch that reads values and in the one that does not, with more pixels hard than not."""
    monkeypatch.setattr(losses, "reading_is_free", lambda _: free)
    # Equal logits give p = 1 / 2 exactly; the others are harder, the last is easier.
    rows = [[0.0, 0.0]] * 3 + [[-3.0, 0.0]] * others + [[9.0, 0.0]]
    logits = torch.tensor(rows, dtype=torch.float64).T.reshape(1, 2, 1, -1).clone().requires_grad_()
    label = torch.zeros(1, 1, len(rows), dtype=torch.int64)
    assert torch.exp(-pixel_cross_entropy(logits, label))[0, 0, 0] == 0.5
    for min_kept in range(1, 4 + others):
        logits.grad = None
        OhemCrossEntropy(255, 0.5, min_kept)(logits, label).backward()
        assert _kept(logits) == set(range(3 + others))


@pytest.mark.parametrize("min_kept", [1, 30, 700, 1400])
@pytest.mark.parametrize("thresh", [0.05, 0.7])
def test_what_devices_and_the_compiler_compute_keeps_the_same_pixels_as_a_sort(monkeypatch, thresh, min_kept):
    logits, label = _random(3, shape=(2, 5, 31, 33))
    results = []
    for free in (True, False):  # on a device no branch looks at values
        monkeypatch.setattr(losses, "reading_is_free", lambda _, free=free: free)
        results.append(OhemCrossEntropy(255, thresh, min_kept)(logits, label))
    expected, kept = naive.ohem(logits, label, thresh, min_kept)
    results[1].backward()
    assert _kept(logits) == set(kept.flatten().nonzero().flatten().tolist())
    assert torch.equal(*results) and results[0].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cross_entropy_in_slices_is_torchs_with_its_gradient(monkeypatch, memory_format):
    monkeypatch.setattr(losses, "CPU_SLICE", 5 * 2 * 6 * 3)  # three rows of four
    logits, label = _random(4, shape=(2, 5, 4, 6))
    logits = logits.detach().to(memory_format=memory_format).requires_grad_()
    assert [len(part[0, 0]) for part in losses.slices(logits)] == [3, 1]
    weight = torch.rand(2, 4, 6, dtype=torch.float64)
    ours = pixel_cross_entropy(logits, label)
    torchs = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-15)
    gradients = [torch.autograd.grad((loss * weight).sum(), logits)[0] for loss in (ours, torchs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_the_gradient_of_a_slice_of_logits_stays_in_its_slice():
    logits, label = _random(5, ignored=0.0)
    first, _ = logits.split(1)
    pixel_cross_entropy(first, label[:1]).sum().backward()
    assert logits.grad[0].abs().sum() > 0 and not logits.grad[1].any()


def test_the_criterion_is_the_configs():
    loss = build_criterion(SimpleNamespace(criterion=Criterion("OHEM", thresh=0.4, min_kept=77)))
    assert (type(loss), loss.ignore_index, loss.thresh, loss.min_kept) == (OhemCrossEntropy, 255, 0.4, 77)
    loss = build_criterion(SimpleNamespace(criterion=Criterion()))
    assert (type(loss), loss.ignore_index) == (CrossEntropy, 255)
