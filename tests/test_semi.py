"""util/semi.py: pseudo-labels, CutMix and the consistency loss against loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dataset.views import Partner, UnlabeledViews
from util.semi import consistency_loss, cutmix, cutmix_reversed, mask_ratio, predict_pseudo_label, pseudo_label

THRESHOLDS = [0.0, 0.5, 0.95, 1.0]


def _random(seed: int, ignored: float = 0.3):
    """logits (2, 4, 5, 6) float64, pseudo-label, confidence and ignore mask (2, 5, 6)."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(2 * rng.standard_normal((2, 4, 5, 6))).requires_grad_()
    label = torch.from_numpy(rng.integers(0, 4, (2, 5, 6)))
    conf = torch.from_numpy(rng.random((2, 5, 6)))
    conf[0, 0, :3] = torch.tensor([0.5, 0.95, 1.0])  # at a threshold a pixel counts
    ignore_mask = torch.from_numpy(np.where(rng.random((2, 5, 6)) < ignored, 255, 0)).to(torch.uint8)
    ignore_mask[0, 0, :3] = 0 if ignored < 1 else 255
    return logits, label, conf, ignore_mask


def _slow(logits, label, conf, ignore_mask, conf_thresh) -> tuple[float, float]:
    """Consistency loss and mask ratio, pixel by pixel."""
    total, confident, valid = 0.0, 0, 0
    for b, y, x in np.ndindex(*label.shape):
        if ignore_mask[b, y, x] == 255:
            continue
        valid += 1
        if conf[b, y, x] >= conf_thresh:
            row = logits[b, :, y, x].tolist()
            total += math.log(sum(math.exp(value) for value in row)) - row[label[b, y, x]]
            confident += 1
    return (total / valid, confident / valid) if valid else (0.0, 0.0)


@pytest.mark.parametrize("conf_thresh", THRESHOLDS)
def test_loss_and_mask_ratio_equal_a_loop_over_pixels(conf_thresh):
    for seed in range(4):
        logits, label, conf, ignore_mask = _random(seed)
        loss, ratio = _slow(logits, label, conf, ignore_mask, conf_thresh)
        assert consistency_loss(logits, label, conf, ignore_mask, conf_thresh).item() == pytest.approx(loss, rel=1e-12)
        assert mask_ratio(conf, ignore_mask, conf_thresh).item() == pytest.approx(ratio, rel=1e-6)
        assert 0 < ratio <= 1 and (ratio == 1) == (conf_thresh == 0)


def test_only_confident_valid_pixels_have_a_gradient():
    logits, label, conf, ignore_mask = _random(0)
    consistency_loss(logits, label, conf, ignore_mask, 0.5).backward()
    has_gradient = logits.grad.abs().sum(dim=1) > 0
    assert torch.equal(has_gradient, (conf >= 0.5) & (ignore_mask == 0))


def test_ignored_pixels_do_not_change_loss_or_ratio():
    logits, label, conf, ignore_mask = _random(1)
    ignored = ignore_mask == 255
    before = consistency_loss(logits, label, conf, ignore_mask, 0.5), mask_ratio(conf, ignore_mask, 0.5)
    logits = torch.where(ignored.unsqueeze(1), 5 - 3 * logits.detach(), logits.detach())
    label, conf = torch.where(ignored, 3 - label, label), torch.where(ignored, 1 - conf, conf)
    after = consistency_loss(logits, label, conf, ignore_mask, 0.5), mask_ratio(conf, ignore_mask, 0.5)
    assert before[0].item() == after[0].item() and before[1].item() == after[1].item()


def test_unconfident_pixels_count_in_the_denominator():
    logits, label, _, ignore_mask = _random(2, ignored=0.0)
    everything = consistency_loss(logits, label, torch.ones_like(label).double(), ignore_mask, 0.95)
    conf = torch.zeros_like(label).double()
    conf[0] = 1
    first = consistency_loss(logits, label, conf, ignore_mask, 0.95)
    conf = 1 - conf
    second = consistency_loss(logits, label, conf, ignore_mask, 0.95)
    assert (first + second).item() == pytest.approx(everything.item(), rel=1e-12)


def test_without_a_valid_pixel_loss_ratio_and_gradients_are_zero():
    logits, label, conf, ignore_mask = _random(3, ignored=1.0)
    loss = consistency_loss(logits, label, conf, ignore_mask, 0.0)
    loss.backward()
    assert loss.item() == 0 and mask_ratio(conf, ignore_mask, 0.0).item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_without_a_confident_pixel_the_loss_is_zero():
    logits, label, conf, ignore_mask = _random(3)
    loss = consistency_loss(logits, label, conf, ignore_mask, 1.5)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("box_dtype", [torch.bool, torch.float32, torch.uint8])
def test_cutmix_takes_the_partners_values_inside_the_box_only(box_dtype):
    rng = np.random.default_rng(0)
    box = torch.zeros(3, 5, 6, dtype=box_dtype)
    box[0, 1:3, 2:6] = 1
    box[1, :, :2] = 1  # the third sample has no box
    for shape in ((3, 3, 5, 6), (3, 5, 6)):
        own, partner = (torch.from_numpy(rng.integers(0, 255, shape)) for _ in range(2))
        mixed = cutmix(own, partner, box)
        for index in np.ndindex(*shape):
            inside = box[index[0], index[-2], index[-1]] == 1
            assert mixed[index] == (partner if inside else own)[index]


def test_the_reversed_batch_pairs_the_first_sample_with_the_last():
    """Of three: in batches of two, rolling by one would be the same."""
    own, box = torch.arange(3).view(3, 1, 1).expand(3, 1, 2), torch.tensor([[[True, False]]] * 3)
    assert cutmix_reversed(own, box).tolist() == [[[2, 0]], [[1, 1]], [[0, 2]]]


def test_cutmix_keeps_the_type_of_maps_and_leaves_its_inputs_alone():
    own, partner = torch.zeros(1, 2, 2, dtype=torch.uint8), torch.full((1, 2, 2), 255, dtype=torch.uint8)
    mixed = cutmix(own, partner, torch.tensor([[[True, False], [False, False]]]))
    assert mixed.dtype == torch.uint8 and mixed.tolist() == [[[255, 0], [0, 0]]]
    assert not own.any() and (partner == 255).all()


def test_a_pseudo_label_is_the_argmax_its_confidence_the_softmax_and_both_are_detached():
    logits, *_ = _random(4)
    label, conf = pseudo_label(logits)
    assert label.dtype == torch.int64 and not label.requires_grad and not conf.requires_grad
    for b, y, x in np.ndindex(*label.shape):
        exponentials = [math.exp(value) for value in logits[b, :, y, x].tolist()]
        assert exponentials[label[b, y, x]] == max(exponentials)
        assert conf[b, y, x].item() == pytest.approx(max(exponentials) / sum(exponentials), rel=1e-12)


def test_predicting_pseudo_labels_uses_eval_mode_without_gradients_or_a_change_of_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    image = torch.randn(2, 3, 5, 6, generator=torch.manual_seed(0))
    graph = []
    model.register_forward_hook(lambda module, args, output: graph.append((module.training, output.requires_grad)))
    statistics = model[1].running_mean.clone()
    label, conf = predict_pseudo_label(model, _views(image))
    assert graph == [(False, False)] and not conf.requires_grad
    assert not model.training and not model[1].training
    assert torch.equal(model[1].running_mean, statistics) and model[1].num_batches_tracked == 0
    expected = model(image).softmax(dim=1).max(dim=1)
    assert torch.equal(label, expected.indices)
    torch.testing.assert_close(conf, expected.values)


@pytest.mark.parametrize("used", [[0, 1, 2], [2], [0, 2], []])
def test_pseudo_labels_of_the_samples_in_use_are_those_of_the_whole_batch(used):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double().eval()
    image, unused = torch.randn(3, 3, 5, 6).double(), [index for index in range(3) if index not in used]
    everything = predict_pseudo_label(model, _views(image))
    ignore_mask = torch.zeros_like(image[:, 0], dtype=torch.uint8)
    found = predict_pseudo_label(model, Partner(image[used], ignore_mask, torch.tensor(used, dtype=torch.int64)))
    whole = predict_pseudo_label(model, Partner(image, ignore_mask))
    assert all(map(torch.equal, everything, whole))
    for whole, part in zip(everything, found, strict=True):
        assert part.dtype == whole.dtype and part.shape == whole.shape
        # Up to the order in which a convolution sums, which depends on the size of the batch.
        torch.testing.assert_close(part[used], whole[used], rtol=1e-12, atol=0)
        assert not part[unused].any()


def _views(image: torch.Tensor) -> UnlabeledViews:
    """Whole views as CutMix partners, of which only the weak one matters."""
    return UnlabeledViews(image, image, None, torch.zeros_like(image[:, 0], dtype=torch.uint8), None, None)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_nothing_here_reads_a_value_back_from_the_device(device):
    with FakeTensorMode(), torch.device(device):
        logits = torch.empty(2, 4, 5, 6, requires_grad=True)
        ignore_mask, box = torch.empty(2, 5, 6, dtype=torch.uint8), torch.empty(2, 5, 6, dtype=torch.bool)
        label, conf = pseudo_label(logits)
        loss = consistency_loss(logits, cutmix(label, label, box), conf, ignore_mask, 0.95)
        ratio = mask_ratio(conf, ignore_mask, 0.95)
        if device == "cpu" or torch.cuda.is_available():  # autograd needs the real device, even for fake tensors
            loss.backward()
            assert logits.grad.shape == logits.shape
    assert {loss.device.type, ratio.device.type} == {device}


def test_the_consistency_loss_is_one_graph_to_the_compiler():
    def mixed_loss(logits, ignore_mask, box):
        label, conf = pseudo_label(logits)
        label, conf = cutmix(label, label.flip(0), box), cutmix(conf, conf.flip(0), box)
        return consistency_loss(logits, label, conf, ignore_mask, 0.5) + mask_ratio(conf, ignore_mask, 0.5)

    logits, _, conf, ignore_mask = _random(5)
    compiled = torch.compile(mixed_loss, fullgraph=True, backend="eager")
    assert compiled(logits, ignore_mask, conf > 0.5).item() == mixed_loss(logits, ignore_mask, conf > 0.5).item()
