"""Naive reference implementation of UniMatch V2's step: loops over samples, attention by its formula, one backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataset.views import UnlabeledViews
from model.backbone.dinov2 import Attention
from scripts.benchmark.naive import consistency_loss, pseudo_label


class NaiveAttention(Attention):
    """Attention that holds the matrix of tokens x tokens of every head."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


def with_naive_attention(model: nn.Module) -> nn.Module:
    """The same model, whose attention is by the formula."""
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = NaiveAttention
    return model


class NaiveTeacher:
    """The EMA teacher, tensor by tensor."""

    def __init__(self, network: nn.Module) -> None:
        self.model, self.updates = network, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average the student's weights in."""
        decay = min(1 - 1 / (self.updates + 1), 0.996)
        student = model.state_dict()
        for name, own in self.model.state_dict().items():
            own.copy_(own * decay + student[name] * (1 - decay))
        self.updates += 1


def unimatch_v2_step(
    model: nn.Module,
    teacher: NaiveTeacher,
    batch: tuple[tuple[Tensor, Tensor], UnlabeledViews],
    criterion: Callable[[Tensor, Tensor], Tensor],
    conf_thresh: float,
) -> Tensor:
    """UniMatch V2's step with both forwards before one backward of the whole loss -> the loss, detached."""
    (image_x, label_x), u = batch
    with torch.no_grad():
        label_w, conf_w = pseudo_label(teacher.model(u.weak))
    model.train()
    logits_x = model(image_x)
    images = torch.cat([reverse_pasted(u.strong1, u.box1), reverse_pasted(u.strong2, u.box2)])
    losses = []
    for logits_s, box in zip(model(images, comp_drop=True).chunk(2), (u.box1, u.box2), strict=True):
        targets = [reverse_pasted(own, box) for own in (label_w, conf_w, u.ignore_mask)]
        losses.append(consistency_loss(logits_s, *targets, conf_thresh))
    loss = (criterion(logits_x, label_x) + sum(losses) / 2) / 2
    loss.backward()
    return loss.detach()


def reverse_pasted(own: Tensor, box: Tensor) -> Tensor:
    """CutMix by reversal, sample by sample: inside its box, sample k gets what sample B - 1 - k has."""
    mixed = own.clone()
    for k in range(len(own)):
        inside = box[k].bool()
        mixed[k, ..., inside] = own[len(own) - 1 - k, ..., inside]
    return mixed


def complementary_dropout(pairs: int, width: int) -> tuple[list[list[float]], list[list[float]]]:
    """The factors for both strong views, number by number, from torch's CPU generator."""
    kept = torch.binomial(torch.ones(pairs, width), torch.full((pairs, width), 0.5)).tolist()
    alone = torch.randperm(pairs).tolist()[: pairs // 2]
    first, second = [], []
    for k in range(pairs):
        first.append([1.0 if k in alone else 2.0 * value for value in kept[k]])
        second.append([2.0 - value for value in first[k]])
    return first, second
