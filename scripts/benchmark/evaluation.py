"""Evaluation of four images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dataset.loader import LoaderOptions, val_loader
from dataset.source import DataSource
from scripts.benchmark import naive
from scripts.benchmark.inputs import Inputs, noise_images
from scripts.benchmark.model import make_model, make_naive_model
from scripts.benchmark.rows import Row, alternate
from util.evaluate import evaluate
from util.precision import evaluation_copy


def measure_evaluate(inputs: Inputs) -> Iterator[Row]:
    """Evaluation of four images of the first kind."""
    device, samples, crop = torch.device("cpu"), list(inputs.kinds[0].samples[:4]), inputs.crop
    loader = list(val_loader(samples, DataSource(inputs.root), LoaderOptions()))
    model = make_naive_model(inputs.backbone, crop)
    with torch.no_grad():  # statistics that fit, so that predictions vary
        model.train()(noise_images(0, 4, crop))
    for mode in ("original", "sliding_window"):
        expected = naive.evaluate(model, loader, mode, crop, 19)
        for title, options in (("float32", {}), ("bf16 + channels_last", {"amp": "bf16"})):
            # Once for all images of an evaluation.
            fast_model = make_model(inputs.backbone, crop, **options)
            fast_model.load_state_dict(model.state_dict())
            fast_model = evaluation_copy(fast_model)

            def ours(fast_model: torch.nn.Module = fast_model, mode: str = mode) -> Any:
                return evaluate(fast_model, loader, mode, crop, 19, device)

            difference = (ours().iou - expected).abs().nan_to_num().max().item()
            times = alternate(lambda mode=mode: naive.evaluate(model, loader, mode, crop, 19), ours, inputs.rounds)
            yield Row(
                f"evaluation, {inputs.backbone}, {mode}, {title}",
                *times,
                "s",
                f"IoU of a class differs by {difference:.2g} at most",
            )
