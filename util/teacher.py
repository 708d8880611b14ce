"""The EMA teacher: a moving average of the student, which gives the pseudo-labels (UniMatch V2, section 3).

    teacher = decay * teacher + (1 - decay) * student,  decay = min(1 - 1 / (updates + 1), 0.996)

So the first update copies the student; up to update 250 the teacher is the plain mean of the students, then a moving
average. BatchNorm's running statistics, where a model has any, are averaged like the weights; weights that are not
trained (`lock_backbone`) and counts of batches are the student's own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import load_checkpoint_state
from util.distributed.ddp import unwrap
from util.errors import CheckpointError


class Teacher:
    """A copy of the student in eval mode without gradients; `update` it after each optimiser step, which it counts.

    Every process keeps its own: students are equal, so teachers stay equal without communication.
    """

    def __init__(self, model: nn.Module, decay: float = 0.996) -> None:
        student = unwrap(model)
        # Tensors are copied beforehand: deepcopy would copy the FakeTensorMode, where there is one, with each of them.
        memo = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in student.parameters()}
        memo |= {id(buffer): buffer.detach().clone() for buffer in student.buffers()}
        self.model = copy.deepcopy(student, memo).eval()
        self.decay = decay
        device = next(self.model.parameters()).device
        # On the device: whether a step counts may be known only there, and the host is not to wait for it.
        self._updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, model: nn.Module, skipped: Tensor | None = None) -> None:
        """Average the student's weights in. Where `skipped` (0-dim bool) is True the step did not count: no change."""
        counts = torch.ones_like(self._updates, dtype=torch.bool) if skipped is None else ~skipped
        decay = (1 - 1 / (self._updates.double() + 1)).clamp(max=self.decay)
        decay = torch.where(counts, decay, 1)
        student, copied = unwrap(model), []
        averaged: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for own, new in zip(self.model.parameters(), student.parameters(), strict=True):
            # A mean of equal numbers may differ from them in the last digit.
            (averaged[own.dtype] if new.requires_grad else copied).append((own, new))
        for own, new in zip(self.model.buffers(), student.buffers(), strict=True):
            if skipped is not None:  # it may have left inf in BatchNorm's statistics, and inf * 0 is NaN
                new = torch.where(counts, new, own)
            (averaged[own.dtype] if own.is_floating_point() else copied).append((own, new))
        for kind, pairs in averaged.items():
            own, new = map(list, zip(*pairs, strict=True))
            # The formula by its letter: with decay 0 or 1 one of the two comes out to the last bit.
            torch._foreach_mul_(own, decay.to(kind))
            torch._foreach_add_(own, torch._foreach_mul(new, (1 - decay).to(kind)))
        if copied:
            torch._foreach_copy_(*map(list, zip(*copied, strict=True)))
        self._updates += counts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"teacher": self.model.state_dict(), "teacher_updates": self._updates.cpu()}

    def load_state_dict(self, state: Mapping[str, Any], path: Path) -> None:
        """Take up what `state_dict` gave; raises CheckpointError or WeightsError, which name the file `path`."""
        updates = state.get("teacher_updates")
        if "teacher" not in state or not isinstance(updates, Tensor) or updates.ndim or updates.is_floating_point():
            raise CheckpointError(f"{path}: holds no teacher: it comes from a run without one")
        load_checkpoint_state(self.model, state["teacher"], f"{path} (its teacher)")
        self._updates.copy_(updates)
