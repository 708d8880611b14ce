"""util/metrics.py against loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scripts.benchmark import naive
from util.metrics import confusion_matrix, iou_per_class, iou_table, mean_iou


def _random(seed: int, nclass: int, shape=(2, 13, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    label = np.where(rng.random(shape) < 0.2, 255, rng.integers(0, nclass, shape))
    return torch.from_numpy(rng.integers(0, nclass, shape)), torch.from_numpy(label)


def _slow(prediction: torch.Tensor, label: torch.Tensor, nclass: int) -> list[list[int]]:
    counts = [[0] * nclass for _ in range(nclass)]
    for predicted, true_class in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True):
        if true_class != 255:
            counts[true_class][predicted] += 1
    return counts


@pytest.mark.parametrize("nclass", [2, 7, 81, 255])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64])
def test_the_confusion_matrix_equals_a_loop_over_pixels(nclass, label_dtype):
    for seed in range(3):
        prediction, label = _random(seed, nclass)
        confusion = confusion_matrix(prediction, label.to(label_dtype), nclass)
        assert confusion.dtype == torch.int64
        assert confusion.tolist() == _slow(prediction, label, nclass)


def test_the_confusion_matrix_has_the_sums_of_three_histograms():
    prediction, label = _random(4, 7)
    confusion = confusion_matrix(prediction, label, 7)
    hits, predicted, true = naive.histograms(prediction.numpy(), label.numpy(), 7)
    assert confusion.diagonal().tolist() == hits.tolist()
    assert (confusion.sum(0).tolist(), confusion.sum(1).tolist()) == (predicted.tolist(), true.tolist())


def test_what_is_predicted_on_ignored_pixels_does_not_count():
    prediction, label = _random(0, 5)
    other = torch.where(label == 255, 4 - prediction, prediction)
    assert torch.equal(confusion_matrix(prediction, label, 5), confusion_matrix(other, label, 5))
    assert not confusion_matrix(prediction, torch.full_like(label, 255), 5).any()


@pytest.mark.parametrize("predicted", [0, 4])
def test_a_label_beyond_the_classes_is_not_taken_for_an_ignored_one(predicted):
    with pytest.raises(RuntimeError):
        confusion_matrix(torch.full((1, 2, 2), predicted), torch.full((1, 2, 2), 5), 5)


def test_iou_is_intersection_over_union_of_pixel_sets():
    prediction, label = _random(1, 6)
    iou = iou_per_class(confusion_matrix(prediction, label, 6))
    valid = {i for i, value in enumerate(label.flatten().tolist()) if value != 255}
    for c in range(6):
        predicted = valid & {i for i, value in enumerate(prediction.flatten().tolist()) if value == c}
        true = valid & {i for i, value in enumerate(label.flatten().tolist()) if value == c}
        assert iou[c].item() == pytest.approx(100 * len(predicted & true) / len(predicted | true), rel=1e-12)
    assert mean_iou(iou) == pytest.approx(sum(iou.tolist()) / 6, rel=1e-12)


def test_a_class_in_neither_labels_nor_predictions_is_left_out_of_the_mean():
    # Class 0: 3 of 4 right, one taken for class 1. Class 2 is absent, class 3 only predicted.
    confusion = torch.tensor([[3, 1, 0, 0], [0, 5, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = iou_per_class(confusion)
    assert iou.tolist()[:2] == pytest.approx([75, 500 / 7]) and math.isnan(iou[2]) and iou[3] == 0
    assert mean_iou(iou) == pytest.approx((75 + 500 / 7 + 0) / 3)


def test_counts_beyond_float32_stay_exact():
    confusion = torch.tensor([[2**40 + 1, 0], [1, 2**40]])
    assert iou_per_class(confusion).tolist() == [100 * (2**40 + 1) / (2**40 + 2), 100 * 2**40 / (2**40 + 1)]


def test_without_any_labelled_pixel_nothing_is_reported():
    assert math.isnan(mean_iou(iou_per_class(torch.zeros(3, 3, dtype=torch.int64))))


def test_the_table_has_a_line_per_class_and_marks_absent_ones():
    table = iou_table(torch.tensor([12.345, math.nan, 100.0]), ["road", "traffic light", "sky"])
    lines = [line.split() for line in table.splitlines()]
    assert lines == [["road", "12.35"], ["traffic", "light", "absent"], ["sky", "100.00"], ["mIoU", "56.17"]]
    with pytest.raises(ValueError):
        iou_table(torch.tensor([1.0, 2.0]), ["only one name"])
