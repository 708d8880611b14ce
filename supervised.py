"""The supervised baseline: labelled images only.

    loss = loss_x

With the published recipe it sees 16 labelled images a step, twice as many as the semi-supervised methods:

    method=supervised sh scripts/train.sh 4      # doubles batch_size, as the published baseline does
    python supervised.py --config configs/toy.yaml --labeled-id-path data/toy/labeled.txt --save-path exp/toy-supervised
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from util.cli import parse_args, run_main
from util.distributed.ddp import distribute
from util.losses import build_criterion
from util.run import open_run
from util.train.loop import fit


def supervised_step(
    model: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    criterion: nn.Module,
    backward: Callable[[torch.Tensor], None],
) -> dict[str, torch.Tensor]:
    """One step's forward and backward pass of `batch` = (image (B, 3, H, W), label (B, H, W) int64).

    `backward` gets the loss. Returns 0-dim detached metrics.
    """
    image_x, label_x = batch
    model.train()
    loss_x = criterion(model(image_x), label_x)
    backward(loss_x)
    return {"loss": loss_x.detach(), "loss_x": loss_x.detach()}


def main(argv: Sequence[str] | None = None) -> None:
    """Train the supervised baseline as the command line says."""
    with open_run("supervised", parse_args("supervised", argv)) as run:
        cfg = run.cfg
        model = distribute(run.build_model(), run.device)
        criterion = build_criterion(cfg)
        optimizer = run.build_optimizer(model)

        def train_step(batch, backward):
            return supervised_step(model, batch, criterion, backward)

        fit(run, model, optimizer, run.train_loader(), run.val_loader(), train_step)


if __name__ == "__main__":
    run_main(main)
