"""The naive way of what this project does faster or in less memory: what tests and the benchmark compare to.

Written to be obviously right: everything at once, nothing skipped, one image at a time. No training run uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataset.files import IGNORE_INDEX
from dataset.transform import normalize
from dataset.views import UnlabeledViews
from model.semseg.atrous import AtrousConv2d


def ohem(logits: torch.Tensor, label: torch.Tensor, thresh: float, min_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """OHEM by a softmax, a sort of all pixels and a cross entropy: the loss, and which pixels (B, H, W) were kept."""
    valid = label != IGNORE_INDEX
    kept = valid
    if 0 < min_kept <= valid.sum():
        prob = logits.softmax(dim=1).gather(1, torch.where(valid, label, 0).unsqueeze(1)).squeeze(1)
        prob = torch.where(valid, prob, 1)
        kept = valid & (prob <= prob.flatten().sort().values[min_kept - 1].clamp(min=thresh))
    label = torch.where(kept, label, IGNORE_INDEX)
    total = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / kept.sum().clamp(min=1), kept


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean over the valid pixels -> scalar."""
    return F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX)


def pseudo_label(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes and confidences (B, H, W) by a softmax of everything."""
    prob = logits.detach().softmax(dim=1)
    return prob.argmax(dim=1), prob.amax(dim=1)


def consistency_loss(
    logits: torch.Tensor, label: torch.Tensor, conf: torch.Tensor, ignore_mask: torch.Tensor, conf_thresh: float
) -> torch.Tensor:
    """As util.semi.consistency_loss."""
    loss = F.cross_entropy(logits, label, reduction="none")
    valid = ignore_mask != IGNORE_INDEX
    return (loss * ((conf >= conf_thresh) & valid)).sum() / valid.sum().clamp(min=1)


def histograms(prediction: np.ndarray, label: np.ndarray, nclass: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intersection, predicted and true area (C,) of one image's int64 maps, a histogram each."""
    prediction, label = prediction.reshape(-1).copy(), label.reshape(-1)
    prediction[label == IGNORE_INDEX] = IGNORE_INDEX  # beyond the last bin
    hits = prediction[prediction == label]
    return tuple(
        np.histogram(values, np.append(np.arange(nclass), nclass - 0.5))[0] for values in (hits, prediction, label)
    )


def with_plain_convolutions(model: nn.Module) -> nn.Module:
    """The same model, whose atrous convolutions are PyTorch's."""
    for module in model.modules():
        if isinstance(module, AtrousConv2d):
            module.__class__ = nn.Conv2d
    return model


def unimatch_step(
    model: nn.Module,
    batch: tuple[tuple[torch.Tensor, torch.Tensor], UnlabeledViews, UnlabeledViews],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    conf_thresh: float,
) -> torch.Tensor:
    """UniMatch's step with both forwards before one backward of the whole loss -> the loss, detached.

    The strong views of `batch` are not mixed, and the partner has strong views too, as NaiveDataset gives them.
    """
    (image_x, label_x), u, u_mix = batch
    u = paste_partner(u, u_mix)
    model.eval()
    with torch.no_grad():
        label_mix, conf_mix = pseudo_label(model(u_mix.weak))
    model.train()
    logits, logits_fp = model(torch.cat([image_x, u.weak]), need_fp=True)
    logits_x, logits_w = logits.split([len(image_x), len(u.weak)])
    logits_s1, logits_s2 = model(torch.cat([u.strong1, u.strong2])).chunk(2)
    label_w, conf_w = pseudo_label(logits_w)

    def strong_loss(logits_s: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
        label, conf = _paste(label_w, label_mix, box), _paste(conf_w, conf_mix, box)
        return consistency_loss(logits_s, label, conf, _paste(u.ignore_mask, u_mix.ignore_mask, box), conf_thresh)

    loss_x = criterion(logits_x, label_x)
    loss_fp = consistency_loss(logits_fp[len(image_x) :], label_w, conf_w, u.ignore_mask, conf_thresh)
    loss_s = 0.25 * strong_loss(logits_s1, u.box1) + 0.25 * strong_loss(logits_s2, u.box2)
    loss = (loss_x + loss_s + 0.5 * loss_fp) / 2
    loss.backward()
    return loss.detach()


def fixmatch_step(
    model: nn.Module,
    batch: tuple[tuple[torch.Tensor, torch.Tensor], UnlabeledViews, UnlabeledViews],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    conf_thresh: float,
) -> torch.Tensor:
    """FixMatch's step, with the first strong view."""
    (image_x, label_x), u, u_mix = batch
    u = paste_partner(u, u_mix)
    model.eval()
    with torch.no_grad():
        label_mix, conf_mix = pseudo_label(model(u_mix.weak))
    model.train()
    logits_x, logits_w = model(torch.cat([image_x, u.weak])).split([len(image_x), len(u.weak)])
    logits_s = model(u.strong1)
    label_w, conf_w = pseudo_label(logits_w)
    label, conf = _paste(label_w, label_mix, u.box1), _paste(conf_w, conf_mix, u.box1)
    ignore_mask = _paste(u.ignore_mask, u_mix.ignore_mask, u.box1)
    loss = (criterion(logits_x, label_x) + consistency_loss(logits_s, label, conf, ignore_mask, conf_thresh)) / 2
    loss.backward()
    return loss.detach()


def supervised_step(
    model: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The supervised baseline's step -> the loss, detached."""
    image, label = batch
    loss = criterion(model.train()(image), label)
    loss.backward()
    return loss.detach()


def paste_partner(u: UnlabeledViews, u_mix: UnlabeledViews) -> UnlabeledViews:
    """CutMix of images: `u` with the partner's strong views inside its boxes, where it has such views."""
    strong = [
        None if own is None else _paste(own, partner, box)
        for own, partner, box in ((u.strong1, u_mix.strong1, u.box1), (u.strong2, u_mix.strong2, u.box2))
    ]
    return u._replace(strong1=strong[0], strong2=strong[1])


def _paste(own: torch.Tensor, partner: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    own, inside = own.clone(), box.bool()
    if own.ndim == 4:
        inside = inside.unsqueeze(1).expand_as(own)
    own[inside] = partner[inside]
    return own


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], mode: str, crop_size: int, nclass: int) -> torch.Tensor:
    """IoU per class (C,) float64 in percent: a window at a time, a softmax of each, three histograms an image."""
    model.eval()
    areas = np.zeros((3, nclass), np.int64)
    for image, label, *_ in loader:
        image = normalize(image) if image.dtype == torch.uint8 else image
        height, width = image.shape[-2:]
        if mode == "sliding_window":
            scores, stride = torch.zeros(1, nclass, height, width, dtype=image.dtype), int(crop_size * 2 / 3)
            for y in range(0, height, stride):
                for x in range(0, width, stride):
                    window = image[..., y : y + crop_size, x : x + crop_size]
                    scores[..., y : y + crop_size, x : x + crop_size] += model(window).softmax(dim=1)
        else:
            if mode == "center_crop":
                y, x = max((height - crop_size) // 2, 0), max((width - crop_size) // 2, 0)
                image, label = (t[..., y : y + crop_size, x : x + crop_size] for t in (image, label))
            scores = model(image).softmax(dim=1)
        areas += histograms(scores.argmax(dim=1).numpy(), label.long().numpy(), nclass)
    hits, predicted, true = torch.from_numpy(areas).double()
    return 100 * hits / (predicted + true - hits)
