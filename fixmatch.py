"""FixMatch for segmentation: one strong view learns from the weak view's confident pseudo-labels (arXiv 2001.07685).

    loss = (loss_x + loss_s) / 2

    method=fixmatch sh scripts/train.sh 4        # 4 processes: GPUs where there are any
    python fixmatch.py --config configs/toy.yaml --labeled-id-path data/toy/labeled.txt --save-path exp/toy-fixmatch

The baseline of the UniMatch paper (section 3.1), with CutMix; the suffixes are those of unimatch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dataset.views import Partner, UnlabeledViews
from util.cli import parse_args, run_main
from util.distributed.ddp import distribute, no_sync
from util.losses import build_criterion
from util.run import open_run
from util.semi import consistency_loss, cutmix, cutmix_reversed, mask_ratio, predict_pseudo_label, pseudo_label
from util.teacher import Teacher
from util.train.loop import fit


def fixmatch_step(
    model: nn.Module,
    batch: tuple[tuple[torch.Tensor, torch.Tensor], UnlabeledViews, Partner],
    criterion: nn.Module,
    conf_thresh: float,
    backward: Callable[[torch.Tensor], None],
    teacher: Teacher | None = None,
) -> dict[str, torch.Tensor]:
    """One step's forward and backward passes; the optimiser steps outside.

    `batch` = ((image, label), views, CutMix partner) as in unimatch.py; only the first strong view and box are used.
    With a `teacher`, the FixMatch of UniMatch V2: `batch` = ((image, label), views) as in unimatch_v2.py.
    `backward` gets each part of the loss as soon as it is complete. Returns 0-dim detached metrics.
    """
    if teacher is not None:
        return _teacher_step(model, batch, criterion, conf_thresh, backward, teacher)
    (image_x, label_x), u, u_mix = batch
    label_mix, conf_mix = predict_pseudo_label(model, u_mix)

    model.train()
    with no_sync(model):
        logits_x, logits_w = model(torch.cat([image_x, u.weak])).split([len(image_x), len(u.weak)])
        label_w, conf_w = pseudo_label(logits_w)
        loss_x = criterion(logits_x, label_x)
        del logits_x, logits_w  # without a name they are freed as early as they can be
        backward(loss_x / 2)

    label = cutmix(label_w, label_mix, u.box1)
    conf = cutmix(conf_w, conf_mix, u.box1)
    ignore_mask = cutmix(u.ignore_mask, u_mix.ignore_mask, u.box1)
    loss_s = consistency_loss(model(u.strong1), label, conf, ignore_mask, conf_thresh)
    backward(loss_s / 2)

    return _metrics(loss_x, loss_s, mask_ratio(conf_w, u.ignore_mask, conf_thresh))


def _teacher_step(model, batch, criterion, conf_thresh, backward, teacher) -> dict[str, torch.Tensor]:
    """FixMatch of UniMatch V2: the teacher's pseudo-labels, [x; s] in one forward, CutMix from the reversed batch."""
    (image_x, label_x), u = batch
    with torch.no_grad():
        label_w, conf_w = pseudo_label(teacher.model(u.weak))
    image_s, label, conf, ignore_mask = (
        cutmix_reversed(own, u.box1) for own in (u.strong1, label_w, conf_w, u.ignore_mask)
    )
    model.train()
    # In one forward, as in the release: for DINOv2 it makes no difference, but BatchNorm normalises over both.
    logits_x, logits_s = model(torch.cat([image_x, image_s])).split([len(image_x), len(image_s)])
    loss_x, loss_s = criterion(logits_x, label_x), consistency_loss(logits_s, label, conf, ignore_mask, conf_thresh)
    backward((loss_x + loss_s) / 2)
    return _metrics(loss_x, loss_s, mask_ratio(conf_w, u.ignore_mask, conf_thresh))


def _metrics(loss_x: torch.Tensor, loss_s: torch.Tensor, ratio: torch.Tensor) -> dict[str, torch.Tensor]:
    values = {"loss": (loss_x + loss_s) / 2, "loss_x": loss_x, "loss_s": loss_s, "mask_ratio": ratio}
    return {name: value.detach() for name, value in values.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Train FixMatch as the command line says."""
    with open_run("fixmatch", parse_args("fixmatch", argv)) as run:
        cfg = run.cfg
        model = distribute(run.build_model(), run.device)
        criterion = build_criterion(cfg)
        teacher, optimizer = run.build_teacher(model), run.build_optimizer(model)

        def train_step(batch, backward):
            return fixmatch_step(model, batch, criterion, cfg.conf_thresh, backward, teacher)

        fit(run, model, optimizer, run.train_loader(strong_views=1), run.val_loader(), train_step, teacher)


if __name__ == "__main__":
    run_main(main)
