"""UniMatch: weak-to-strong consistency with two strong views and a feature-perturbed one (CVPR 2023, arXiv 2208.09910).

    loss = (loss_x + 0.25 loss_s1 + 0.25 loss_s2 + 0.5 loss_fp) / 2

    sh scripts/train.sh 4                        # 4 processes: GPUs where there are any
    python unimatch.py --config configs/toy.yaml --labeled-id-path data/toy/labeled.txt --save-path exp/toy-unimatch

B batch, C classes, H W crop;
_x labelled, _w weak view, _s1/_s2 strong views, _fp feature-perturbed, _mix CutMix partner.
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
from util.semi import consistency_loss, cutmix, mask_ratio, predict_pseudo_label, pseudo_label
from util.train.loop import fit


def unimatch_step(
    model: nn.Module,
    batch: tuple[tuple[torch.Tensor, torch.Tensor], UnlabeledViews, Partner],
    criterion: nn.Module,
    conf_thresh: float,
    backward: Callable[[torch.Tensor], None],
) -> dict[str, torch.Tensor]:
    """One step's forward and backward passes (section 3 of the paper); the optimiser steps outside.

    `batch` = ((image, label), views, CutMix partner): normalised images (B, 3, H, W), label (B, H, W) int64. The strong
    views are mixed already; their pseudo-labels, confidences and ignore masks are mixed here.
    `backward` gets each part of the loss as soon as it is complete. Returns 0-dim detached metrics.
    """
    (image_x, label_x), u, u_mix = batch
    label_mix, conf_mix = predict_pseudo_label(model, u_mix)

    # [x; w] in one forward: this grouping sets the BatchNorm statistics.
    model.train()
    with no_sync(model):
        logits, logits_fp = model(torch.cat([image_x, u.weak]), need_fp=True)
        logits_x, logits_w = logits.split([len(image_x), len(u.weak)])
        logits_fp = logits_fp[len(image_x) :]
        label_w, conf_w = pseudo_label(logits_w)
        loss_x = criterion(logits_x, label_x)
        loss_fp = consistency_loss(logits_fp, label_w, conf_w, u.ignore_mask, conf_thresh)
        # The pseudo-labels are detached, so this part can be back-propagated and its activations freed before the
        # strong views' forward begins. Without a name the logits are freed as early as they can be.
        del logits, logits_x, logits_w, logits_fp
        backward((loss_x + 0.5 * loss_fp) / 2)

    def strong_loss(logits_s: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
        label = cutmix(label_w, label_mix, box)
        conf = cutmix(conf_w, conf_mix, box)
        ignore_mask = cutmix(u.ignore_mask, u_mix.ignore_mask, box)
        return consistency_loss(logits_s, label, conf, ignore_mask, conf_thresh)

    logits_s1, logits_s2 = model(torch.cat([u.strong1, u.strong2])).chunk(2)
    loss_s1, loss_s2 = strong_loss(logits_s1, u.box1), strong_loss(logits_s2, u.box2)
    backward((0.25 * loss_s1 + 0.25 * loss_s2) / 2)

    loss = (loss_x + 0.25 * loss_s1 + 0.25 * loss_s2 + 0.5 * loss_fp) / 2
    metrics = {"loss": loss, "loss_x": loss_x, "loss_s": (loss_s1 + loss_s2) / 2, "loss_fp": loss_fp}
    metrics["mask_ratio"] = mask_ratio(conf_w, u.ignore_mask, conf_thresh)
    return {name: value.detach() for name, value in metrics.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Train UniMatch as the command line says."""
    with open_run("unimatch", parse_args("unimatch", argv)) as run:
        cfg = run.cfg
        model = distribute(run.build_model(), run.device)
        criterion = build_criterion(cfg)
        optimizer = run.build_optimizer(model)

        def train_step(batch, backward):
            return unimatch_step(model, batch, criterion, cfg.conf_thresh, backward)

        fit(run, model, optimizer, run.train_loader(strong_views=2), run.val_loader(), train_step)


if __name__ == "__main__":
    run_main(main)
