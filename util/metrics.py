"""Segmentation metrics: one confusion matrix, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dataset.files import IGNORE_INDEX


def confusion_matrix(prediction: torch.Tensor, label: torch.Tensor, nclass: int) -> torch.Tensor:
    """int64 (C, C) counts of pixels, rows the true class, columns the predicted one; ignored pixels left out.

    `prediction` and `label` are integer maps of one shape, on one device. Raises RuntimeError for a label that is
    neither a class nor 255.
    """
    # 255 gets counted in a row like the classes, and is cut off: cheaper than selecting the valid pixels.
    cell = torch.add(prediction.int(), label.int(), alpha=nclass)
    counts = torch.bincount(cell.flatten(), minlength=nclass * (IGNORE_INDEX + 1)).view(IGNORE_INDEX + 1, nclass)
    if counts[nclass:IGNORE_INDEX].any():
        raise RuntimeError(f"a label beyond the {nclass} classes is not {IGNORE_INDEX}")
    return counts[:nclass]


def iou_per_class(confusion: torch.Tensor) -> torch.Tensor:
    """float64 (C,) in percent; NaN for a class in neither labels nor predictions."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return 100 * intersection / union  # 0 / 0 is NaN


def mean_iou(iou: torch.Tensor) -> float:
    """Mean over the classes that occur, in percent."""
    return float(iou.nanmean())


def iou_table(iou: torch.Tensor, classes: Sequence[str]) -> str:
    """A line per class, absent ones marked, then the mean."""
    width = max(len("mIoU"), *map(len, classes))
    lines = [
        f"  {name:<{width}}  " + ("absent" if value != value else f"{value:6.2f}")
        for name, value in zip(classes, iou.tolist(), strict=True)
    ]
    return "\n".join([*lines, f"  {'mIoU':<{width}}  {mean_iou(iou):6.2f}"])
