"""What an evaluation reports besides IoU: accuracies, calibration of the confidences, boundaries, and IoU per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from dataset.files import IGNORE_INDEX
from util.distributed.collectives import all_reduce_sum
from util.evaluate import Scores
from util.metrics import confusion_matrix, iou_per_class, mean_iou

BINS = 20  # of confidence, equal, from 0 to 1
BOUNDARY_SHARE = 0.02  # of the image's diagonal, as in Cheng et al.


class Numbered(Dataset):
    """The samples of `dataset`, each followed by its number: `first`, `first + step` and so on."""

    def __init__(self, dataset: Dataset, first: int = 0, step: int = 1) -> None:
        self.dataset, self.numbers = dataset, range(first, first + step * len(dataset), step)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.dataset[index], self.numbers[index])


class Calibration(NamedTuple):
    """Counts of pixels by confidence, (BINS,) each: all, those predicted rightly, and the sum of their confidences."""

    counts: torch.Tensor
    right: torch.Tensor
    confidence: torch.Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error, 0 to 1: the mean over pixels of |share that is right - confidence| of their bin.

        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599).
        """
        gap = (self.right - self.confidence).abs().sum() / self.counts.sum()
        return float(gap)


class Analysis:
    """Observes an evaluation of `images` images (`evaluate(observe=...)`), whose batches end with the images' numbers.

    Each process observes its share; `finish` sums them up.
    """

    def __init__(self, nclass: int, images: int, conf_thresh: float, device: torch.device) -> None:
        self.nclass, self.conf_thresh = nclass, conf_thresh
        counts = {"dtype": torch.float64, "device": device}
        self._bins = torch.zeros(3, BINS, **counts)
        self._sure = torch.zeros(2, **counts)  # pixels with confidence >= conf_thresh: all, right
        self._boundary = torch.zeros(2, nclass, **counts)  # intersection, union
        self._images = torch.zeros(images, **counts)  # mIoU of each

    def __call__(self, scores: Scores, label: torch.Tensor, rest: Sequence[Any]) -> None:
        """Take in a batch: scores (B, C, H, W), labels (B, H, W), and the numbers (B,) of its images."""
        (numbers,) = rest
        classes, confidence = scores.classes(), scores.probabilities().amax(dim=1)
        self._calibrate(classes, confidence, label)
        for one, true, number in zip(classes, label, numbers.tolist(), strict=True):
            self._boundary += boundary_counts(one, true, self.nclass)
            self._images[number] = mean_iou(iou_per_class(confusion_matrix(one, true, self.nclass)))

    def _calibrate(self, classes: torch.Tensor, confidence: torch.Tensor, label: torch.Tensor) -> None:
        valid = label != IGNORE_INDEX
        confidence, right = confidence[valid].double(), (classes == label)[valid].double()
        place = (confidence * BINS).long().clamp(0, BINS - 1)
        for row, weight in enumerate((torch.ones_like(right), right, confidence)):
            self._bins[row] += torch.bincount(place, weight, BINS)
        sure = confidence >= self.conf_thresh
        self._sure += torch.stack([sure.sum(), right[sure].sum()])

    def finish(self) -> None:
        """Sum over the processes; afterwards each has the whole result."""
        for name in ("_bins", "_sure", "_boundary", "_images"):
            setattr(self, name, all_reduce_sum(getattr(self, name)).cpu())

    @property
    def calibration(self) -> Calibration:
        return Calibration(*self._bins)

    @property
    def confident(self) -> dict[str, float]:
        """Share of the pixels with a confidence of at least `conf_thresh`, and the share of these that is right."""
        sure, right = self._sure.tolist()
        return {"share": sure / float(self._bins[0].sum()), "accuracy": right / sure if sure else math.nan}

    @property
    def boundary_iou(self) -> torch.Tensor:
        """float64 (C,) in percent, NaN for an absent class."""
        return 100 * self._boundary[0] / self._boundary[1]

    def worst(self, count: int) -> list[tuple[int, float]]:
        """Number and mIoU of the images with the lowest mIoU, the worst first; images without a labelled pixel last."""
        values = self._images.nan_to_num(nan=math.inf)
        return [(number, float(values[number])) for number in values.argsort(stable=True)[:count].tolist()]


def boundary_counts(classes: torch.Tensor, label: torch.Tensor, nclass: int) -> torch.Tensor:
    """float64 (2, C): pixels in intersection and union of the boundary regions of one image's prediction and label.

    The boundary region of a class are its pixels at most d from a pixel of another class or from the image's border, d
    being 2 % of the diagonal, in steps to any of eight neighbours. Where the label is ignored there is neither.
    Cheng et al., "Boundary IoU", CVPR 2021 (arXiv 2103.16562).
    """
    counts = torch.zeros(2, nclass, dtype=torch.float64, device=label.device)
    height, width = label.shape
    distance = max(1, round(BOUNDARY_SHARE * math.hypot(height, width)))
    label, ignored = label.long(), label == IGNORE_INDEX
    present = torch.cat([classes[~ignored], label[~ignored]]).unique()
    if len(present) == 0:
        return counts
    regions = []
    for values in (classes.masked_fill(ignored, IGNORE_INDEX), label):
        inside = values == present[:, None, None]
        others = (~inside & ~ignored).float()
        regions.append(inside & _near(others, distance))
    counts[0, present] = (regions[0] & regions[1]).sum(dim=(1, 2)).double()
    counts[1, present] = (regions[0] | regions[1]).sum(dim=(1, 2)).double()
    return counts


def _near(others: torch.Tensor, distance: int) -> torch.Tensor:
    """Whether a pixel of `others` (N, H, W), or the outside, is at most `distance` away in both directions."""
    size = 2 * distance + 1
    padded = F.pad(others[None], (distance,) * 4, value=1.0)
    rows = F.max_pool2d(padded, (size, 1), stride=1)
    return F.max_pool2d(rows, (1, size), stride=1)[0] > 0
