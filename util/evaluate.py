"""Evaluation at native size: whole images, sliding windows or a centre crop, as the release evaluates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from dataset.transform import normalize
from util.distributed.collectives import all_reduce_sum
from util.losses import slices
from util.metrics import confusion_matrix, iou_per_class, mean_iou

# Windows of equal size go through the model together up to so many pixels, and images of equal size likewise.
CPU_PIXELS, DEVICE_PIXELS = 2**20, 2**21
MAX_WAITING = 32  # images that wait for others of their size


class Result(NamedTuple):
    """mIoU and IoU per class (C,) in percent, NaN for an absent class, and the confusion matrix int64 (C, C)."""

    miou: float
    iou: torch.Tensor
    confusion: torch.Tensor


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[Any], mode: str, crop_size: int, nclass: int, device: torch.device | str
) -> Result:
    """Evaluate on batches `(image, label)`: images (1, 3, H, W), 8-bit or normalised, labels (1, H, W), 255 ignored.

    Each process goes through its own share; counts are summed once, so every process returns the whole result.
    With sliding windows, images of equal size are evaluated together, and their order is another.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros(nclass, nclass, dtype=torch.int64, device=device)
    batches = _of_equal_size(loader, _pixels(device)) if mode == "sliding_window" else loader
    for image, label, *_ in batches:
        image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
        if image.dtype == torch.uint8:
            image = normalize(image)
        if mode == "center_crop":
            image, label = center_crop(image, crop_size), center_crop(label, crop_size)
        confusion += confusion_matrix(predict(model, image, mode, crop_size), label, nclass)
    model.train(was_training)
    confusion = all_reduce_sum(confusion).cpu()
    iou = iou_per_class(confusion)
    return Result(mean_iou(iou), iou, confusion)


def predict(model: nn.Module, image: torch.Tensor, mode: str, crop_size: int) -> torch.Tensor:
    """Classes (B, H, W) int64 of normalised images (B, 3, H, W) by a model in eval mode."""
    scores = sliding_window(model, image, crop_size) if mode == "sliding_window" else model(image)
    # By rows, and by max: argmax alone takes several times as long on a CPU.
    return torch.cat([part.max(dim=1).indices for part in slices(scores)], dim=1)


def sliding_window(model: nn.Module, image: torch.Tensor, size: int) -> torch.Tensor:
    """Softmax scores (B, C, H, W), summed over windows of `size` at stride int(size * 2 / 3).

    Windows start while the start is inside the image and are cut off at its border, so those at the edges are smaller.
    """
    height, width = image.shape[-2:]
    stride = int(size * 2 / 3)
    windows = defaultdict(list)
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            place = (..., slice(y, min(y + size, height)), slice(x, min(x + size, width)))
            windows[image[place].shape].append(place)
    scores = None
    for shape, places in windows.items():
        at_once = max(1, _pixels(image.device) // (len(image) * shape[-2] * shape[-1]))
        for i in range(0, len(places), at_once):
            part = places[i : i + at_once]
            probs = model(torch.cat([image[place] for place in part])).softmax(dim=1)
            if scores is None:
                scores = probs.new_zeros(len(image), probs.shape[1], height, width)
            for place, prob in zip(part, probs.split(len(image)), strict=True):
                scores[place] += prob
    return scores


def _of_equal_size(loader: Iterable[Any], pixels: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loader's images and labels, those of equal size in one batch, of `pixels` at most where it holds several."""
    waiting: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def batch(size: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*waiting.pop(size), strict=True)
        return torch.cat(images), torch.cat(labels)

    for image, label, *_ in loader:
        size = (image.dtype, *image.shape[1:])
        waiting[size].append((image, label))
        if (len(waiting[size]) + 1) * image[0, 0].numel() > pixels:
            yield batch(size)
        elif sum(map(len, waiting.values())) > MAX_WAITING:
            yield batch(next(iter(waiting)))
    for size in list(waiting):
        yield batch(size)


def _pixels(device: torch.device | str) -> int:
    return CPU_PIXELS if torch.device(device).type == "cpu" else DEVICE_PIXELS


def center_crop(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The central `size` x `size` pixels of (..., H, W); a side shorter than that is kept whole."""
    height, width = tensor.shape[-2:]
    y, x = max((height - size) // 2, 0), max((width - size) // 2, 0)
    return tensor[..., y : y + size, x : x + size]
