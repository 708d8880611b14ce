"""UniMatch V2's training step with batch 2 + 2, and its peak memory, against one backward and attention by formula."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dataset.views import UnlabeledViews
from model import build_model
from scripts.benchmark import naive, naive_v2
from scripts.benchmark.inputs import Inputs, noise_batch
from scripts.benchmark.memory import peak_memory
from scripts.benchmark.rows import Row, alternate, relative_difference
from util.config import load_config
from util.losses import CrossEntropy
from util.precision import set_precision
from util.schedule import build_optimizer
from util.teacher import Teacher

# By name, since the method is what is measured, not a part of this script.
unimatch_v2_step = importlib.import_module("unimatch_v2").unimatch_v2_step
WAYS = {"naive": {}, "float32": {}, "bf16": {"amp": "bf16"}}


def measure_step_v2(inputs: Inputs) -> Iterator[Row]:
    """UniMatch V2's step with batch 2 + 2, and its peak memory above the loaded student and teacher."""
    backbone, crop = inputs.backbone_v2, inputs.crop_v2
    exact = _gradient_difference(backbone)
    _, naive_step = prepare_step_v2("naive", backbone, crop)
    peaks = {way: peak_memory(prepare_step_v2, way, backbone, crop) for way in WAYS}
    for way in ("float32", "bf16"):
        _, our_step = prepare_step_v2(way, backbone, crop)
        times = alternate(naive_step, our_step, inputs.rounds)
        equality = exact if way == "float32" else "16-bit forward passes, by choice"
        yield Row(f"UniMatch V2 step, {backbone}, crop {crop}, {way}", *times, "s", equality)
        yield Row(f"peak memory of the V2 step, {way}", [peaks["naive"]], [peaks[way]], "GB", equality)


def prepare_step_v2(
    way: str, backbone: str, crop: int, device: str | torch.device = "cpu", batches: Sequence[Any] | None = None
) -> tuple[nn.Module, Callable[[], None]]:
    """The model of one of WAYS on `device`, and what does a step with it: gradients, optimiser, teacher.

    `batches` are used in turn; by default two of noise.
    """
    model = _make_model(backbone, crop, device, **WAYS[way])
    batches = itertools.cycle(batches or [_batch(seed, crop) for seed in range(2)])
    optimizer = build_optimizer(model, 5e-6, 40.0, "adamw")
    compute_gradients, teacher = _way(way == "naive", model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        compute_gradients(next(batches))
        optimizer.step()
        teacher.update(model)

    return model, step


def _way(is_naive: bool, model: nn.Module, threshold: float = 0.95) -> tuple[Callable[[Any], Any], Any]:
    """What computes the gradients of a batch, and the teacher."""
    if is_naive:
        naive_v2.with_naive_attention(model)
        teacher = naive_v2.NaiveTeacher(Teacher(model).model)
        return lambda batch: naive_v2.unimatch_v2_step(model, teacher, batch, naive.cross_entropy, threshold), teacher
    teacher = Teacher(model)
    backward = torch.Tensor.backward
    return lambda batch: unimatch_v2_step(model, teacher, batch, CrossEntropy(), threshold, backward), teacher


def _make_model(backbone: str, crop: int, device: str | torch.device = "cpu", **options: Any) -> nn.Module:
    """The model of V2's recipe with random weights; the same each time."""
    settings = {"backbone": backbone, "pretrained": False, "crop_size": crop, "device": "cpu", **options}
    cfg = load_config("configs/v2/pascal.yaml", settings)
    torch.manual_seed(0)
    return set_precision(build_model(cfg).to(device), cfg)


def _batch(seed: int, size: int, dtype: torch.dtype = torch.float32) -> Any:
    """Two labelled and two unlabelled images with CutMix boxes as often and as large as in training."""
    images, boxes, label, ignore_mask = noise_batch(seed, 4, size, 21, dtype)
    return (images[0], label), UnlabeledViews(*images[1:4], ignore_mask, *boxes)


def _gradient_difference(backbone: str) -> str:
    """Between the two ways, over all parameters, in float64 on a small batch."""
    gradients = []
    for is_naive in (True, False):
        model = _make_model(backbone, 42).double()
        compute_gradients, _ = _way(is_naive, model, threshold=0.0)  # all pixels count
        torch.manual_seed(0)
        compute_gradients(_batch(1, 42, torch.float64))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return f"gradients in float64 {relative_difference(*gradients)}"
