"""Segmentation metrics: one confusion matrix, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dataset.files import IGNORE_INDEX


def confusion_matrix(prediction: torch.Tensor, label: torch.Tensor, nclass: int) -> torch.Tensor:
    """int64 (C, C) counts of pixels, rows the true class, columns the predicted one; ignored pixels left out.

    `prediction` and `label` are integer maps of one shape, on one device.
    """
    valid = label != IGNORE_INDEX
    # Ignored pixels go to a cell of their own, which is cut off: cheaper than selecting the valid ones. As it is the
    # first, a label beyond the classes cannot fall into it: the counts get too long, and the view fails.
    cell = torch.where(valid, label.long() * nclass + prediction.long() + 1, 0)
    counts = torch.bincount(cell.flatten(), minlength=nclass * nclass + 1)
    return counts[1:].view(nclass, nclass)


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
