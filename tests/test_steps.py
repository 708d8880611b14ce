"""Eight steps of each method against the reference figures, and what else a step promises."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from dataset.lists import read_list
from dataset.loader import LoaderOptions, train_loader
from dataset.packing import to_device
from dataset.sampler import EpochSampler
from dataset.semi import TrainDataset
from dataset.source import DataSource
from dataset.views import UnlabeledViews
from fixmatch import fixmatch_step
from scripts.benchmark import naive
from scripts.benchmark.naive_data import NaiveDataset, collate_naive
from supervised import supervised_step
from tests.helpers import TinyData, make_dataset, make_model, reference_batch
from tests.reference.weights import check_summary, reference_state
from tests.steps import run_step
from unimatch import unimatch_step
from util.config import Criterion
from util.losses import build_criterion
from util.schedule import build_optimizer, set_poly_lr

FIGURES = json.loads((Path(__file__).parent / "reference" / "figures.json").read_text())
SEED = FIGURES["seed"]
STEPS = 8
STEP = {"unimatch": unimatch_step, "fixmatch": fixmatch_step, "supervised": supervised_step}
CURVES = {"loss": "loss_all", "loss_fp": "loss_w_fp"}


def _batch(i: int, **sizes):
    return reference_batch(SEED, i, **sizes)


def _run(method: str, model, batch, criterion, conf_thresh: float, backward=torch.Tensor.backward):
    batch = batch[0] if method == "supervised" else batch
    return run_step(method, model, batch, criterion, backward, conf_thresh=conf_thresh)


@pytest.mark.usefixtures("draws_of_the_cpu")
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIGURES["steps"]))
def test_steps_equal_the_reference_figures(name, device):
    """All eight of UniMatch's, to the weights at the end; of the others, on a CPU, the first three."""
    steps = STEPS if name == "unimatch/CELoss" or torch.device(device).type != "cpu" else 3
    method, criterion_name = name.split("/")
    expected = FIGURES["steps"][name]
    model = make_model(backbone="resnet50")
    start = reference_state(model)
    model.load_state_dict(start)
    # float64 convolutions are faster so on the CPU
    model.to(device, torch.float64).to(memory_format=torch.channels_last)
    criterion = build_criterion(SimpleNamespace(criterion=Criterion(criterion_name, thresh=0.3, min_kept=1500)))
    optimizer = build_optimizer(model, lr=1e-4, lr_multi=5)
    assert [len(group["params"]) for group in optimizer.param_groups] == expected["groups"]
    torch.manual_seed(SEED)
    seen = {curve: [] for curve in expected["scalars"]}
    for i in range(steps):
        set_poly_lr(optimizer, i, STEPS)
        optimizer.zero_grad()
        batch = tree_map_only(torch.Tensor, lambda x: x.to(device), _batch(i))
        metrics = _run(method, model, batch, criterion, 0.35)
        optimizer.step()
        for key, value in metrics.items():
            assert value.ndim == 0 and not value.requires_grad
            seen[f"train/{CURVES.get(key, key)}"].append(float(value))
    for curve, values in expected["scalars"].items():
        assert seen[curve] == pytest.approx(values[:steps], rel=1e-5), curve
    if steps < STEPS:
        return
    set_poly_lr(optimizer, STEPS, STEPS)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected["lr_groups_after"], rel=1e-12)
    state = model.state_dict()
    for tensor_name, summary in expected["final"].items():
        check_summary(state[tensor_name], summary, rtol=1e-5)
        change = (state[tensor_name].double().cpu() - start[tensor_name].double()).norm()
        assert float(change) == pytest.approx(summary["update_l2"], rel=1e-5), tensor_name


@pytest.mark.parametrize("method", ["unimatch", "fixmatch"])
def test_gradients_of_the_parts_equal_those_of_the_whole_loss(method):
    def gradients(whole: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = make_model().double()
        parts = []
        torch.manual_seed(1)
        _run(
            method,
            model,
            _batch(0, batch=2, size=33),
            build_criterion(SimpleNamespace(criterion=Criterion())),
            0.3,
            backward=parts.append if whole else torch.Tensor.backward,
        )
        if whole:
            sum(parts).backward()
        return [p.grad for p in model.parameters()]

    for in_parts, in_one in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(in_parts, in_one, rtol=1e-10, atol=1e-14)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TinyData:
    return make_dataset(tmp_path_factory.mktemp("data"), labeled=3, unlabeled=4)


@pytest.mark.parametrize(
    ("method", "partner"), [("unimatch", "other_image"), ("fixmatch", "same_image"), ("supervised", "same_image")]
)
def test_a_step_on_the_loaders_batch_equals_the_naive_step_on_the_naive_loaders(data, method, partner):
    """From the files to the gradients, in float64; in a part of the batches only some samples have a CutMix box."""
    labeled, unlabeled = read_list(data.labeled), read_list(data.unlabeled, labels=False)
    if method == "supervised":
        unlabeled = None
    arguments = labeled, unlabeled, DataSource(data.root), 33, 1
    sampler = EpochSampler(len(labeled), unlabeled and len(unlabeled), 2, 1, partner=partner)
    loader = train_loader(TrainDataset(*arguments, strong_views=1 + (method == "unimatch")), sampler, LoaderOptions())
    naive_loader = DataLoader(NaiveDataset(*arguments), 2, sampler=sampler, drop_last=True, collate_fn=collate_naive)
    criterion, used, ratios = build_criterion(SimpleNamespace(criterion=Criterion())), set(), []

    def gradients(step, batch, *rest) -> tuple[float, list[torch.Tensor]]:
        model = make_model(nclass=3).double()
        torch.manual_seed(1)  # the feature perturbation's dropout
        batch = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
        result = step(model, batch, *rest)
        if isinstance(result, dict):
            ratios.append(float(result.get("mask_ratio", 0.5)))
            result = result["loss"]
        return float(result), [p.grad for p in model.parameters()]

    thresh = () if method == "supervised" else (0.4,)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for packed, naive_batch in zip(loader, naive_loader, strict=True):
            batch = to_device(packed, torch.device("cpu"))
            used.add(2 if method == "supervised" else len(batch[2].used))
            loss, ours = gradients(STEP[method], batch, criterion, *thresh, torch.Tensor.backward)
            naive_step = getattr(naive, f"{method}_step")
            naive_loss, theirs = gradients(naive_step, naive_batch, naive.cross_entropy, *thresh)
            assert loss == pytest.approx(naive_loss, rel=1e-12)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    assert len(used) > 1 or method == "supervised"
    assert all(0 < ratio < 1 for ratio in ratios)  # else pseudo-labels would not matter, or thresholds


@pytest.mark.parametrize("method", ["unimatch", "fixmatch"])
def test_the_first_part_is_back_propagated_before_the_strong_forward(method):
    model = make_model()
    events = []
    model.register_forward_pre_hook(lambda module, args: events.append("train" if module.training else "eval"))

    def backward(part):
        events.append("backward")
        part.backward()

    batch = _batch(0, batch=2, size=33, dtype=torch.float32)
    _run(method, model, batch, build_criterion(SimpleNamespace(criterion=Criterion())), 0.3, backward)
    assert events == ["eval", "train", "backward", "train", "backward"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unimatch", "fixmatch", "supervised"])
@pytest.mark.parametrize("criterion_name", ["CELoss", "OHEM"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_step_mixes_no_devices_and_reads_no_value_back(method, criterion_name, device):
    # Fake tensors raise on operations between devices and on reading a value, which on a GPU waits for it.
    # Autograd cannot run on fake CUDA tensors where there is no GPU: there the backward passes are the fake CPU's.
    parts = []

    def backward(part: torch.Tensor) -> None:
        assert part.ndim == 0 and part.device.type == device
        parts.append(part)
        if device == "cpu" or torch.cuda.is_available():
            part.backward()

    with FakeTensorMode(), torch.device(device):
        model = make_model()
        criterion = build_criterion(SimpleNamespace(criterion=Criterion(criterion_name, min_kept=1500)))
        optimizer = build_optimizer(model, lr=1e-3, lr_multi=1)
        metrics = _run(method, model, _fake_batch(), criterion, 0.95, backward)
        optimizer.step()
    assert len(parts) == (1 if method == "supervised" else 2)
    assert {value.device.type for value in metrics.values()} == {device}
    if device == "cpu":
        assert all(p.grad is not None for p in model.parameters())


def _fake_batch(batch: int = 2, size: int = 49):
    def views() -> UnlabeledViews:
        images = [torch.empty(batch, 3, size, size) for _ in range(3)]
        mask = torch.empty(batch, size, size, dtype=torch.uint8)
        boxes = [torch.empty(batch, size, size, dtype=torch.bool) for _ in range(2)]
        return UnlabeledViews(*images, mask, *boxes)

    image = torch.empty(batch, 3, size, size)
    label = torch.empty(batch, size, size, dtype=torch.int64)
    return (image, label), views(), views()


def test_a_batch_without_a_valid_pixel_gives_zero_losses_and_finite_gradients():
    model = make_model()
    (image, label), u, u_mix = _batch(0, batch=2, size=33, dtype=torch.float32)
    all_ignored = torch.full_like(u.ignore_mask, 255)
    batch = (
        (image, torch.full_like(label, 255)),
        u._replace(ignore_mask=all_ignored),
        u_mix._replace(ignore_mask=all_ignored),
    )
    metrics = _run("unimatch", model, batch, build_criterion(SimpleNamespace(criterion=Criterion())), 0.0)
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)
    assert all(p.grad.isfinite().all() for p in model.parameters())
