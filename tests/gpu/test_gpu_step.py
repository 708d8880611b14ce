"""Whole steps on a GPU: nothing waits for it; 16 bits, memory formats and the fused optimiser give what they should."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from dataset.photometry import apply_photometry_batch, photometry_numbers
from dataset.transform import draw_photometry
from tests.helpers import make_model, model_config
from tests.steps import ALL_BOXES, METHODS, NO_BOX, packed_batch, run_step
from util.checkpoint import load_optimizer
from util.log import RunLog
from util.losses import CrossEntropy, OhemCrossEntropy
from util.precision import evaluation_copy, set_precision
from util.schedule import build_optimizer
from util.teacher import Teacher
from util.train.feed import Feed
from util.train.optimizer_step import OptimizerStep

GPU_ONLY = [pytest.param("cuda", marks=pytest.mark.gpu)]


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Inside, an operation that makes the host wait for a GPU raises."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Training:
    """A method's model, optimiser and teacher on a device; `step` takes a step on a batch of the loader's kind."""

    def __init__(self, method: str, device: torch.device, criterion: nn.Module | None = None, **changes: Any) -> None:
        network = {"model": "dpt", "backbone": "dinov2_small"} if method == "unimatch_v2" else {}
        precision = {key: changes.pop(key) for key in ("amp", "channels_last") if key in changes}
        settings = {"on_nonfinite": "stop", "nonfinite_limit": 10, "accumulate": 1, **changes}
        self.cfg = model_config(**network, **precision, **settings)
        self.model = set_precision(make_model(**network).to(device), self.cfg)
        with_teacher = method in ("unimatch_v2", "fixmatch with a teacher")
        teacher = Teacher(self.model) if with_teacher else None
        criterion, self.lines, self.factor = criterion or CrossEntropy(), [], 1.0
        self.method, self.device, self.feed = method, device, Feed(device)

        def train_step(batch: Any, backward: Callable[[torch.Tensor], None]) -> dict[str, torch.Tensor]:
            scaled = lambda part: backward(part * self.factor)  # noqa: E731
            return run_step(method, self.model, batch, criterion, scaled, teacher)

        kind = "adamw" if method == "unimatch_v2" else "sgd"
        self.optimizer = build_optimizer(self.model, 0.01, 1.0, kind)
        log = RunLog.__new__(RunLog)
        log.info = self.lines.append
        run = SimpleNamespace(cfg=self.cfg, device=device, log=log)
        self.optimizer_step = OptimizerStep(run, self.model, self.optimizer, train_step, teacher)

    def batch(self, seed: int) -> Any:
        """A batch in pinned memory, where there is a GPU."""
        boxes = [ALL_BOXES, NO_BOX] if seed else [ALL_BOXES, ALL_BOXES]
        packed = packed_batch(self.method, boxes, "device", seed)
        return packed if self.device.type == "cpu" else tree_map_only(torch.Tensor, torch.Tensor.pin_memory, packed)

    def step(self, batch: Any, seed: int = 0) -> dict[str, torch.Tensor]:
        """The metrics of one step."""
        torch.manual_seed(seed)
        return self.optimizer_step.run(iter([self.feed(batch)]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guarded", ["stop", "skip"])
def test_from_the_batch_to_the_new_weights_nothing_waits(method, guarded, device):
    if device.type == "cpu" and (guarded == "skip" or method == "unimatch_v2"):
        pytest.skip("the others show that the body works")
    training = Training(method, device, OhemCrossEntropy(min_kept=100), on_nonfinite=guarded)
    batches = [training.batch(seed) for seed in range(3)]
    for seed, batch in enumerate(batches):  # the first makes the optimiser's state, and cuDNN's choices
        with waiting_is_an_error(device) if seed else contextlib.nullcontext():
            metrics = training.step(batch, seed)
    assert all(value.isfinite() and value.device.type == device.type for value in metrics.values())


@pytest.mark.parametrize("device", GPU_ONLY)
def test_with_fp16_an_overflow_leaves_a_step_out_and_training_goes_on(device):
    training = Training("unimatch", torch.device(device), amp="fp16")
    batches = [training.batch(seed) for seed in range(4)]
    scale = training.optimizer_step.state_dict()["scaler"]["scale"]
    changed = []
    for seed, batch in enumerate(batches):
        before = training.model.classifier.weight.detach().clone()
        training.factor = float("inf") if seed == 1 else 2.0**-8
        with waiting_is_an_error(training.device) if seed > 1 else contextlib.nullcontext():
            training.step(batch, seed)
        changed.append(not torch.equal(before, training.model.classifier.weight))
    assert changed == [True, False, True, True]
    assert training.optimizer_step.state_dict()["scaler"]["scale"] == scale / 2
    training.optimizer_step.report(4)
    assert training.lines[0].startswith("1 step left out by the gradient scaler")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"amp": "bf16"}, {"channels_last": True}, {"amp": "bf16", "channels_last": True}])
def test_other_precisions_and_memory_formats_give_nearly_the_same_losses(changes, device):
    if device.type == "cpu" and len(changes) == 1:
        pytest.skip("both together show that the body works")
    losses = []
    for options in ({"channels_last": False}, {"channels_last": False, **changes}):
        training = Training("supervised", device, **options)
        losses.append(torch.stack([training.step(training.batch(seed), seed)["loss"] for seed in range(2)]))
    torch.testing.assert_close(*losses, rtol=0.03 if "amp" in changes else 1e-3, atol=0)


def _order(tensor: torch.Tensor) -> list[int]:
    """How far apart in memory neighbours are, along the sides that have any."""
    return [stride for stride, side in zip(tensor.stride(), tensor.shape, strict=True) if side > 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_fused_optimiser_takes_the_steps_of_the_plain_one_in_any_memory_format(kind, device, tmp_path):
    """Its kernels walk through memory: gradients and momenta must lie there as their weights do, loaded ones too."""
    weights = []
    for fused in (False, True):
        state = {}
        for memory_format in (torch.contiguous_format, torch.channels_last):
            model = make_model().to(device).to(memory_format=memory_format)
            optimizer = build_optimizer(model, 0.1, 2.0, kind)
            for group in optimizer.param_groups:
                group.update(fused=fused, foreach=False)
            if state:
                load_optimizer(optimizer, state, tmp_path)
            generator = torch.Generator().manual_seed(len(state))
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                noise = [torch.randn(p.shape, generator=generator).to(device) for p in model.parameters()]
                sum((p * factor).sum() for p, factor in zip(model.parameters(), noise, strict=True)).backward()
                assert all(_order(p.grad) == _order(p) for p in model.parameters())
                optimizer.step()
            state = optimizer.state_dict()
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


def test_photometry_on_the_device_is_the_cpu_s(device):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (16, 3, 40, 33), dtype=np.uint8))
    numbers = torch.tensor([photometry_numbers(draw_photometry(rng)) for _ in images])
    expected = apply_photometry_batch(images, numbers).int()
    found = apply_photometry_batch(images.to(device), numbers.to(device)).int().cpu()
    assert (found - expected).abs().max() <= 1 and (found != expected).double().mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["none", "bf16"])
@torch.no_grad()
def test_the_copy_for_evaluation_gives_nearly_what_the_model_gives(amp, device):
    model = set_precision(make_model().to(device), model_config(amp=amp))
    image = torch.randn(2, 3, 65, 65, device=device)
    model.train()(image)  # statistics that are not those of the start
    logits, expected = evaluation_copy(model)(image), model.eval()(image)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < (0.05 if amp == "bf16" else 1e-2) * expected.norm()
