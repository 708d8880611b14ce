"""UniMatch V2: one stream of strong views with complementary dropout learns from an EMA teacher (arXiv 2410.10777).

    loss = (loss_x + (loss_s1 + loss_s2) / 2) / 2

    method=unimatch_v2 config=configs/v2/pascal.yaml split=92 sh scripts/train.sh 4
    python unimatch_v2.py --config configs/custom_v2.yaml --labeled-id-path F --save-path D

B batch, C classes, H W crop; _x labelled, _w weak view, _s1/_s2 strong views, _mix CutMix partner: the reversed batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dataset.views import UnlabeledViews
from util.cli import parse_args, run_main
from util.distributed.ddp import distribute, no_sync
from util.losses import build_criterion
from util.run import open_run
from util.semi import consistency_loss, cutmix_reversed, mask_ratio, pseudo_label
from util.teacher import Teacher
from util.train.loop import fit


def unimatch_v2_step(
    model: nn.Module,
    teacher: Teacher,
    batch: tuple[tuple[torch.Tensor, torch.Tensor], UnlabeledViews],
    criterion: nn.Module,
    conf_thresh: float,
    backward: Callable[[torch.Tensor], None],
) -> dict[str, torch.Tensor]:
    """One step's forward and backward passes (section 3 of the paper); the optimiser and the teacher step outside.

    `batch` = ((image, label), views): normalised images (B, 3, H, W), label (B, H, W) int64, strong views not mixed.
    `backward` gets each part of the loss as soon as it is complete. Returns 0-dim detached metrics.
    """
    (image_x, label_x), u = batch
    with torch.no_grad():
        label_w, conf_w = pseudo_label(teacher.model(u.weak))
    image_s1, image_s2 = cutmix_reversed(u.strong1, u.box1), cutmix_reversed(u.strong2, u.box2)

    model.train()
    with no_sync(model):
        loss_x = criterion(model(image_x), label_x)
        backward(loss_x / 2)

    def strong_loss(logits_s: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
        label, conf, ignore_mask = (cutmix_reversed(own, box) for own in (label_w, conf_w, u.ignore_mask))
        return consistency_loss(logits_s, label, conf, ignore_mask, conf_thresh)

    logits_s1, logits_s2 = model(torch.cat([image_s1, image_s2]), comp_drop=True).chunk(2)
    loss_s = (strong_loss(logits_s1, u.box1) + strong_loss(logits_s2, u.box2)) / 2
    backward(loss_s / 2)

    metrics = {"loss": (loss_x + loss_s) / 2, "loss_x": loss_x, "loss_s": loss_s}
    metrics["mask_ratio"] = mask_ratio(conf_w, u.ignore_mask, conf_thresh)
    return {name: value.detach() for name, value in metrics.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Train UniMatch V2 as the command line says."""
    with open_run("unimatch_v2", parse_args("unimatch_v2", argv)) as run:
        cfg = run.cfg
        model = distribute(run.build_model(), run.device)
        teacher, optimizer = run.build_teacher(model), run.build_optimizer(model)
        criterion = build_criterion(cfg)

        def train_step(batch, backward):
            return unimatch_v2_step(model, teacher, batch, criterion, cfg.conf_thresh, backward)

        fit(run, model, optimizer, run.train_loader(strong_views=2), run.val_loader(), train_step, teacher)


if __name__ == "__main__":
    run_main(main)
