"""Evaluation at native size: whole images, sliding windows or a centre crop, as the releases of V1 and V2 evaluate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dataset.transform import IMAGENET, Normalization, normalize
from model.semseg import resize
from util.distributed.collectives import all_reduce_sum
from util.losses import slices
from util.metrics import confusion_matrix, iou_per_class, mean_iou

# Windows of equal size go through the model together, up to so many pixels; so do images of equal size.
CPU_PIXELS, DEVICE_PIXELS = 2**20, 2**21
MAX_WAITING = 32  # images that wait for others of their size


class Result(NamedTuple):
    """mIoU and IoU per class (C,) in percent, NaN for an absent class, and the confusion matrix int64 (C, C)."""

    miou: float
    iou: torch.Tensor
    confusion: torch.Tensor


class Scores(NamedTuple):
    """Scores (B, C, H, W) of the classes: logits, or probabilities that are summed over windows and views."""

    values: torch.Tensor
    are_logits: bool

    def classes(self) -> torch.Tensor:
        """The class of the largest score, int64 (B, H, W)."""
        # By rows, and by max: argmax alone takes several times as long on a CPU.
        return torch.cat([part.max(dim=1).indices for part in slices(self.values)], dim=1)

    def probabilities(self) -> torch.Tensor:
        """(B, C, H, W), which sum to 1 over the classes."""
        return self.values.softmax(dim=1) if self.are_logits else self.values / self.values.sum(dim=1, keepdim=True)


# Called with the scores, the labels (B, H, W) and what a batch has after its label, of each batch.
Observer = Callable[[Scores, torch.Tensor, Sequence[Any]], None]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    mode: str,
    crop_size: int,
    nclass: int,
    device: torch.device | str,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    observe: Observer | None = None,
    by: Normalization = IMAGENET,
) -> Result:
    """Evaluate on batches `(image, label)`: images (1, 3, H, W), 8-bit or normalised, labels (1, H, W), 255 ignored.

    Each process goes through its own share; counts are summed once, so every process returns the whole result.
    With sliding windows, images of equal size are evaluated together, and their order is another. `scales` and `flip`:
    see `class_scores`. 8-bit images are normalised `by` these values.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros(nclass, nclass, dtype=torch.int64, device=device)
    batches = _of_equal_size(loader, _pixels(device)) if mode == "sliding_window" else loader
    for image, label, *rest in batches:
        image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
        if image.dtype == torch.uint8:
            image = normalize(image, by)
        if mode == "center_crop":
            image, label = center_crop(image, crop_size), center_crop(label, crop_size)
        scores = class_scores(model, image, mode, crop_size, scales, flip)
        confusion += confusion_matrix(scores.classes(), label, nclass)
        if observe is not None:
            observe(scores, label, rest)
    model.train(was_training)
    confusion = all_reduce_sum(confusion).cpu()
    iou = iou_per_class(confusion)
    return Result(mean_iou(iou), iou, confusion)


def predict(model: nn.Module, image: torch.Tensor, mode: str, crop_size: int) -> torch.Tensor:
    """Classes (B, H, W) int64 of normalised images (B, 3, H, W) by a model in eval mode."""
    return class_scores(model, image, mode, crop_size).classes()


def class_scores(
    model: nn.Module,
    image: torch.Tensor,
    mode: str,
    crop_size: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Scores:
    """Scores of normalised images (B, 3, H, W) by a model in eval mode.

    With several `scales`, or with `flip`, the image is seen at each scale, mirrored too, and the probabilities of all
    views, brought back to the image's size, are summed: test-time augmentation.
    """
    size, total = image.shape[-2:], None
    views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
    for scale, mirrored in views:
        view = image.flip(-1) if mirrored else image
        if mode == "sliding_window":
            values = sliding_window(model, _resize(view, seen_size(size, scale)), crop_size)
            if len(views) == 1 and values.shape[-2:] == size:
                return Scores(values, False)
            values = _resize(Scores(values, False).probabilities(), size)
        else:
            values = whole(model, view, scale)
            if len(views) == 1:
                return Scores(values, True)
            values = values.softmax(dim=1)
        values = values.flip(-1) if mirrored else values
        total = values if total is None else total.add_(values)
    return Scores(total, False)


def whole(model: nn.Module, image: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Logits (B, C, H, W) of whole images seen at `scale`. Networks of patches see the nearest size of whole patches.

    UniMatch V2: each side is rounded by itself, halves up; below half a patch it becomes one (the release fails).
    """
    size = image.shape[-2:]
    return _resize(model(_resize(image, seen_size(size, scale, getattr(model, "size_multiple", 1)))), size)


def seen_size(size: Sequence[int], scale: float, multiple: int = 1) -> tuple[int, ...]:
    """The multiples of `multiple` nearest to `size` times `scale`, halves rounded up, at least one of it."""
    return tuple(multiple * max(1, math.floor(side * scale / multiple + 0.5)) for side in size)


def _resize(values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if values.shape[-2:] == tuple(size):
        return values
    return resize(values, tuple(size))


def sliding_window(model: nn.Module, image: torch.Tensor, size: int) -> torch.Tensor:
    """Softmax scores (B, C, H, W), summed over windows of `size` at stride int(size * 2 / 3).

    Windows start while the start is inside the image and are cut off at its border, so those at the edges are smaller.
    For a network of patches the last window is moved back to end at the border instead, as in UniMatch V2; a side of
    the image that is shorter than the window is seen as a whole, as `whole` does (the release fails).
    """
    height, width = image.shape[-2:]
    moved_back = getattr(model, "size_multiple", 1) > 1
    windows = defaultdict(list)
    for y in window_starts(height, size, moved_back):
        for x in window_starts(width, size, moved_back):
            place = (..., slice(y, min(y + size, height)), slice(x, min(x + size, width)))
            windows[image[place].shape].append(place)
    scores = None
    for shape, places in windows.items():
        at_once = max(1, _pixels(image.device) // (len(image) * shape[-2] * shape[-1]))
        for i in range(0, len(places), at_once):
            part = places[i : i + at_once]
            probs = whole(model, torch.cat([image[place] for place in part])).softmax(dim=1)
            if scores is None:
                scores = probs.new_zeros(len(image), probs.shape[1], height, width)
            for place, prob in zip(part, probs.split(len(image)), strict=True):
                scores[place] += prob
    return scores


def window_starts(length: int, size: int, moved_back: bool) -> list[int]:
    """Where the windows of `size` begin on a side of `length`."""
    stride = int(size * 2 / 3)
    if not moved_back:
        return list(range(0, length, stride))
    return [*range(0, length - size, stride), max(0, length - size)]


def _of_equal_size(loader: Iterable[Any], pixels: int) -> Iterator[tuple[Any, ...]]:
    """The loader's batches, those of equal size in one, of `pixels` at most where it holds several."""
    waiting: dict[Any, list[tuple[Any, ...]]] = defaultdict(list)

    def batch(size: Any) -> tuple[Any, ...]:
        return tuple(torch.cat(parts) for parts in zip(*waiting.pop(size), strict=True))

    for image, *rest in loader:
        size = (image.dtype, *image.shape[1:])
        waiting[size].append((image, *rest))
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
