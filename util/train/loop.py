"""The training loop that all methods share: epochs, schedule, logging, evaluation and checkpoints."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset.packing import to_device
from model import load_checkpoint_state, read_checkpoint
from util.checkpoint import BEST, save_epoch
from util.distributed.collectives import gather
from util.distributed.ddp import unwrap
from util.errors import CheckpointError
from util.evaluate import Result, evaluate
from util.log import peak_memory_gb
from util.metrics import iou_table
from util.precision import evaluation_copy
from util.run import Run
from util.schedule import set_poly_lr
from util.signals import StopSignals
from util.train.clock import Clock
from util.train.optimizer_step import TrainStep, Update
from util.train.saving import Midway, check_finite, checkpoint_state
from util.train.step_metrics import StepMetrics

STEP_STREAM = 100  # tells the seeds of steps from the streams of dataset.semi
# The release's names of these curves, so that old and new ones lie over each other in TensorBoard.
CURVES = {"loss": "loss_all", "loss_fp": "loss_w_fp"}


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    val_loader: DataLoader,
    train_step: TrainStep,
) -> None:
    """Train to the last epoch, from the run's checkpoint if it has one.

    Evaluate after each `eval_interval`-th epoch and the last one; save after each epoch, and within it by `Midway`.
    """
    cfg, log = run.cfg, run.log
    metrics = StepMetrics()
    update = Update(run, model, optimizer, loader, train_step)
    done, position = _resume(run, model, update, metrics, len(loader))
    clock = Clock(len(loader), cfg.epochs, done["epoch"], position)
    with StopSignals() as signals:
        midway = Midway(run, model, update, metrics, done, len(loader), signals)
        for epoch in range(done["epoch"], cfg.epochs):
            train_one_epoch(run, epoch, position, update, loader, metrics, clock, midway)
            position = 0
            check_finite(model, f"the last iteration of epoch {epoch + 1}")
            result = None
            if (epoch + 1) % cfg.eval_interval == 0 or epoch + 1 == cfg.epochs:
                started = time.perf_counter()
                images = signals.cut(val_loader)
                result = evaluate(
                    evaluation_copy(unwrap(model)), images, cfg.eval_mode, cfg.crop_size, cfg.nclass, run.device
                )
                midway.stop_if_asked()  # then the result is of some of the images
            done.update(epoch=epoch + 1, iteration=(epoch + 1) * len(loader))
            improved = result is not None and result.miou > done["previous_best"]
            if result is not None:
                done.update(last_miou=result.miou)
                if improved:
                    done.update(previous_best=result.miou, best_epoch=epoch + 1)
                _report(run, done, result, time.perf_counter() - started)
            if run.processes.is_main:
                save_epoch(checkpoint_state(run, model, update, done), run.save_path, improved, cfg.keep_last)
            midway.restart_clock()
    log.info(
        f"finished: mIoU {done['last_miou']:.2f} at the last epoch, best {done['previous_best']:.2f} at epoch "
        f"{done['best_epoch']} ({run.save_path / BEST})"
    )


def train_one_epoch(
    run: Run,
    epoch: int,
    position: int,
    update: Update,
    loader: DataLoader,
    metrics: StepMetrics,
    clock: Clock,
    midway: Midway,
) -> None:
    """The loader's batches from `position` on. Metrics stay on the device and are read every `log_interval` steps."""
    cfg, log = run.cfg, run.log
    total, rates = cfg.epochs * len(loader), update.optimizer.param_groups
    images = cfg.batch_size * run.processes.count * (1 if run.unlabeled is None else 2)

    def tell(index: int) -> None:
        """Read and log the metrics if that is due after the epoch's step `index`."""
        if (index + 1) % cfg.log_interval and index + 1 < len(loader):
            return
        iteration = epoch * len(loader) + index
        means = metrics.read()
        update.report(means, iteration + 1)
        speed = clock.lap(iteration + 1, images)
        values = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        bar.set_postfix_str(f"{values}  {speed}")
        log.progress(
            f"epoch {epoch + 1}/{cfg.epochs}  iteration {index + 1}/{len(loader)}  {values}  "
            f"lr {rates[0]['lr']:.3g}  {speed}"
        )
        log.scalars({f"train/{CURVES.get(name, name)}": value for name, value in means.items()}, iteration)
        log.scalars({"train/lr": rates[0]["lr"]}, iteration)

    with log.bar(len(loader), f"epoch {epoch + 1}/{cfg.epochs}") as bar:
        if position:  # it was saved before its metrics were read
            bar.update(position)
            set_poly_lr(update.optimizer, epoch * len(loader) + position - 1, total)
            tell(position - 1)
        if position == len(loader):
            return
        loader.sampler.set_epoch(epoch, position * cfg.batch_size)
        for index, batch in enumerate(clock.waits(loader), position):
            iteration = epoch * len(loader) + index
            set_poly_lr(update.optimizer, iteration, total)
            # Channel dropout draws from torch's generator: seeded anew, it depends on the step alone.
            torch.manual_seed(step_seed(cfg.seed, epoch, index, run.processes.rank))
            metrics.append(iteration, update.step(to_device(batch, run.device)))
            bar.update()
            midway.after_step(index + 1)
            tell(index)


def step_seed(seed: int, epoch: int, index: int, rank: int) -> int:
    """The seed of torch's generators for one step of one process."""
    return int(np.random.SeedSequence([seed, STEP_STREAM, epoch, index, rank]).generate_state(1, np.uint64)[0])


def _resume(run: Run, model: nn.Module, update: Update, metrics: StepMetrics, steps: int) -> tuple[dict[str, Any], int]:
    """Load the run's checkpoint, if there is one: where training stands, and the steps done of the epoch after."""
    done = {"epoch": 0, "iteration": 0, "previous_best": -math.inf, "best_epoch": 0, "last_miou": math.nan}
    state = read_checkpoint(run.checkpoint) if run.checkpoint else None
    places = gather(torch.tensor(state["iteration"] if state else 0, device=run.device))
    if len(places.unique()) > 1:
        raise CheckpointError(
            f"{run.save_path}: the processes see different checkpoints there (after {places.tolist()} iterations): "
            "it must be one folder on all machines"
        )
    if state is None:
        return done, 0
    load_checkpoint_state(unwrap(model), state, run.checkpoint)
    update.load_state(state, run.checkpoint)
    done = {key: state.get(key, value) for key, value in done.items()}
    position = state.get("position", 0)
    if "metrics" in state:
        metrics.load_state(state["metrics"], run.processes.rank, run.device)
    within = f" and {position} of {steps} iterations of the next" if position else ""
    best = f"best mIoU {done['previous_best']:.2f}" if done["best_epoch"] else "none was evaluated"
    run.log.info(
        f"continuing from {run.checkpoint}: {done['epoch']} of {run.cfg.epochs} epochs are done{within}, {best}"
    )
    if done["iteration"] - position != done["epoch"] * steps:
        run.log.info(
            f"note: an epoch had {done['iteration'] // done['epoch']} iterations and has {steps} now, since the "
            "number of processes changed; the schedule goes on from the same epoch"
        )
    return done, position


def _report(run: Run, done: dict[str, Any], result: Result, seconds: float) -> None:
    cfg, log, epoch = run.cfg, run.log, done["epoch"]
    memory = peak_memory_gb(run.device)
    log.info(
        f"epoch {epoch}/{cfg.epochs}: IoU in percent ({cfg.eval_mode}, {len(run.val)} images, {seconds:.1f} s)\n"
        f"{iou_table(result.iou, cfg.classes)}\n"
        f"  best {done['previous_best']:.2f} at epoch {done['best_epoch']}; peak memory {memory:.2f} GB"
    )
    step = done["iteration"] - 1  # the epoch's last, counted from 0: a run that continues hides what comes after it
    log.scalars({"eval/mIoU": result.miou, "eval/memory_gb": memory}, step)
    per_class = zip(cfg.classes, result.iou.tolist(), strict=True)
    log.scalars({f"eval/{name}_IoU": value for name, value in per_class if not math.isnan(value)}, step)
