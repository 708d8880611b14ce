"""UniMatch's training step with batch 2 + 2, and its peak memory."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dataset.views import Partner, UnlabeledViews
from scripts.benchmark import naive
from scripts.benchmark.inputs import Inputs, noise_batch
from scripts.benchmark.memory import peak_memory
from scripts.benchmark.model import make_model, make_naive_model
from scripts.benchmark.rows import Row, alternate, relative_difference
from util.losses import CrossEntropy
from util.schedule import build_optimizer

# By name, since the method is what is measured, not a part of this script.
unimatch_step = importlib.import_module("unimatch").unimatch_step
MEMORY_WAYS = {
    "naive": None,
    "float32": {},
    "checkpoint_activations: backbone": {"checkpoint_activations": "backbone"},
    "checkpoint_activations: all": {"checkpoint_activations": "all"},
}


def measure_step(inputs: Inputs) -> Iterator[Row]:
    """UniMatch's step with batch 2 + 2, and its peak memory above the loaded model."""
    backbone, crop = inputs.backbone, inputs.crop
    exact = _gradient_difference(backbone)
    batches = [_naive_batch(seed, crop) for seed in range(4)]
    naive_step = _endless(batches, _naive_stepper(make_naive_model(backbone, crop)))
    for title, options in (
        ("float32", {}),  # channels_last, the default on a CPU
        ("float32, contiguous", {"channels_last": False}),
        ("bf16 + channels_last", {"amp": "bf16"}),
    ):
        our_step = _endless(map(_packed, batches), _our_stepper(make_model(backbone, crop, **options)))
        times = alternate(naive_step, our_step, inputs.rounds)
        equality = exact if "amp" not in options else "16-bit forward passes, by choice"
        yield Row(f"UniMatch step, {backbone}, crop {crop}, {title}", *times, "s", equality)
    peaks = {way: peak_memory(prepare_step, way, backbone, crop) for way in MEMORY_WAYS}
    for way, peak in peaks.items():
        if way != "naive":
            yield Row(f"peak memory of the step, {way}", [peaks["naive"]], [peak], "GB", exact)


def _naive_batch(seed: int, size: int, dtype: torch.dtype = torch.float32) -> Any:
    """Two labelled and two unlabelled images with CutMix boxes as often and as large as in training."""
    images, boxes, label, ignore_mask = noise_batch(seed, 7, size, 19, dtype)
    return (
        (images[0], label),
        UnlabeledViews(*images[1:4], ignore_mask, *boxes),
        UnlabeledViews(*images[4:7], ignore_mask, None, None),
    )


def _packed(batch: Any) -> Any:
    """The batch as the loader gives it: strong views mixed, the partners' weak views only where there is a box."""
    labeled, u, u_mix = batch
    used = (u.box1 | u.box2).flatten(1).any(1).nonzero()[:, 0]
    return labeled, naive.paste_partner(u, u_mix), Partner(u_mix.weak[used], u_mix.ignore_mask, used)


def _naive_stepper(model: nn.Module, threshold: float = 0.95) -> Callable[[Any], None]:
    """A function that does a whole training step on a batch, the naive way."""
    return _stepper(model, lambda batch: naive.unimatch_step(model, batch, naive.cross_entropy, threshold))


def _our_stepper(model: nn.Module, threshold: float = 0.95) -> Callable[[Any], None]:
    """A function that does a whole training step on a packed batch, our way."""
    return _stepper(model, lambda batch: unimatch_step(model, batch, CrossEntropy(), threshold, torch.Tensor.backward))


def _stepper(model: nn.Module, compute_gradients: Callable[[Any], Any]) -> Callable[[Any], None]:
    optimizer = build_optimizer(model, 0.001, 10.0)

    def step(batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        compute_gradients(batch)
        optimizer.step()

    return step


def _endless(batches: Iterable[Any], step: Callable[[Any], None]) -> Callable[[], None]:
    """A function that does `step` on the next of `batches`, from the first again after the last."""
    endless = itertools.cycle(list(batches))
    return lambda: step(next(endless))


def _gradient_difference(backbone: str) -> str:
    """Between the two ways, over all parameters, in float64 on a small batch."""
    batch, gradients = _naive_batch(1, 65, torch.float64), []
    for make, stepper, ready in (
        (make_naive_model, _naive_stepper, batch),
        (make_model, _our_stepper, _packed(batch)),
    ):
        model = make(backbone, 65).double()
        stepper(model, threshold=0.0)(ready)  # all pixels count
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return f"gradients in float64 {relative_difference(*gradients)}"


def prepare_step(way: str, backbone: str, crop: int) -> tuple[nn.Module, Callable[[], None]]:
    """The model of one of MEMORY_WAYS, and what does a step with it."""
    options, batch = MEMORY_WAYS[way], _naive_batch(1, crop)
    if options is None:
        model = make_naive_model(backbone, crop)
        return model, _endless([batch], _naive_stepper(model))
    model = make_model(backbone, crop, **options)
    return model, _endless([_packed(batch)], _our_stepper(model))
