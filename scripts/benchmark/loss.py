"""Losses, pseudo-labels and the confusion matrix on a batch like those of the recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from scripts.benchmark import naive
from scripts.benchmark.inputs import Inputs
from scripts.benchmark.rows import Row, alternate, relative_difference, verdict
from util.losses import OhemCrossEntropy
from util.metrics import confusion_matrix
from util.semi import consistency_loss, pseudo_label


def measure_loss(inputs: Inputs) -> Iterator[Row]:
    """Losses, confidence and the confusion matrix, on a batch like those of the recipes."""
    generator = torch.Generator().manual_seed(0)
    size, rounds = inputs.loss_size, inputs.rounds
    kept = 200_000 * size**2 // 801**2
    label = torch.randint(0, 19, (2, size, size), generator=generator)
    label[:, : size // 10] = 255
    noise = torch.randn(2, 19, size, size, generator=generator)
    shape = f"2 x 19 x {size} x {size}"
    for name, margin in (("many", 2.0), ("few", 9.0)):
        logits = noise + margin * torch.nn.functional.one_hot(label % 19, 19).permute(0, 3, 1, 2)
        criterion = OhemCrossEntropy(255, 0.7, kept)
        needing = logits.clone().requires_grad_()
        criterion(needing, label).backward()
        same = torch.equal(needing.grad.abs().sum(1) > 0, naive.ohem(logits, label, 0.7, kept)[1])
        times = alternate(
            lambda logits=logits: naive.ohem(logits, label, 0.7, kept),
            lambda logits=logits, criterion=criterion: criterion(logits, label),
            rounds,
        )
        yield Row(f"OHEM forward, {shape}, {name} hard pixels", *times, "s", f"kept pixels {verdict(same)}")

    pseudo, conf = naive.pseudo_label(logits)
    ignore_mask = torch.where(label == 255, 255, 0)
    ways = (naive.consistency_loss, consistency_loss)

    def step(loss: Callable[..., torch.Tensor]) -> torch.Tensor:
        needing = logits.detach().requires_grad_()
        loss(needing, pseudo, conf, ignore_mask, 0.95).backward()
        return needing.grad

    difference = relative_difference(step(ways[0]), step(ways[1]))
    times = alternate(lambda: step(ways[0]), lambda: step(ways[1]), rounds)
    yield Row(f"consistency loss and its gradient, {shape}", *times, "s", f"gradients {difference}")

    ours = pseudo_label(logits)
    same = torch.equal(ours[0], pseudo) and torch.allclose(ours[1], conf, rtol=1e-5)
    times = alternate(lambda: naive.pseudo_label(logits), lambda: pseudo_label(logits), rounds)
    yield Row(f"pseudo-label and confidence, {shape}", *times, "s", f"{verdict(same)} (confidence to 1e-5)")

    truth = torch.randint(0, 19, (1, 1024, 2048), generator=generator)
    guess = torch.where(torch.rand(truth.shape, generator=generator) < 0.8, truth, truth.flip(1))
    truth[:, :64] = 255
    areas = naive.histograms(guess.numpy(), truth.numpy(), 19)
    confusion = confusion_matrix(guess, truth, 19)
    counts = (confusion.diagonal(), confusion.sum(0), confusion.sum(1))
    same = all(np.array_equal(area, count) for area, count in zip(areas, counts, strict=True))
    times = alternate(
        lambda: naive.histograms(guess.numpy(), truth.numpy(), 19), lambda: confusion_matrix(guess, truth, 19), rounds
    )
    yield Row("confusion matrix, 19 classes, 1024 x 2048", *times, "s", f"counts {verdict(same)}")
