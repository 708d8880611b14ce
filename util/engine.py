"""The training loop that the three methods share: epochs, the schedule, metrics, evaluation and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset.semi import to_device
from model import load_checkpoint_state
from util.checkpoint import BEST, LATEST, copy_checkpoint, load_optimizer, save_checkpoint
from util.cli import TrainingStopped
from util.config import to_dict
from util.distributed import all_reduce_sum, process_count, unwrap
from util.evaluate import Result, evaluate
from util.guard import SKIPPED, Guard
from util.log import peak_memory_gb
from util.metrics import iou_table
from util.precision import build_scaler, evaluation_copy
from util.run import Run
from util.schedule import set_poly_lr

# A step gets a batch on the device and the function that back-propagates a part of the loss; it returns its metrics.
TrainStep = Callable[[Any, Callable[[torch.Tensor], None]], dict[str, torch.Tensor]]

STEP_STREAM = 100  # tells the seeds of steps from the streams of dataset.semi
KEPT = "checkpoints of earlier epochs are kept (too high an lr, or data with extreme values, are the usual causes)"
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

    Evaluate and save after each epoch, or after each `eval_interval`-th and the last one.
    """
    cfg, log = run.cfg, run.log
    scaler = build_scaler(cfg, run.device)
    done = _resume(run, model, optimizer, scaler, len(loader))
    clock = _Clock(len(loader), cfg.epochs, done["epoch"])
    guard = Guard(run, model, optimizer, loader, check_gradients=not scaler.is_enabled())
    for epoch in range(done["epoch"], cfg.epochs):
        train_one_epoch(run, epoch, optimizer, scaler, loader, train_step, clock, guard)
        _check_finite(model, epoch)
        if (epoch + 1) % cfg.eval_interval and epoch + 1 < cfg.epochs:
            continue
        started = time.perf_counter()
        result = evaluate(
            evaluation_copy(unwrap(model)), val_loader, cfg.eval_mode, cfg.crop_size, cfg.nclass, run.device
        )
        improved = result.miou > done["previous_best"]
        done.update(epoch=epoch + 1, iteration=(epoch + 1) * len(loader), last_miou=result.miou)
        if improved:
            done.update(previous_best=result.miou, best_epoch=epoch + 1)
        _report(run, done, result, time.perf_counter() - started)
        if run.processes.is_main:
            state = {"model": unwrap(model).state_dict(), "optimizer": optimizer.state_dict(), **done}
            if scaler.is_enabled():
                state["scaler"] = scaler.state_dict()
            # Best before latest: a run killed between the two repeats the epoch and writes the same again.
            path = run.save_path / (BEST if improved else LATEST)
            save_checkpoint({**state, "config": to_dict(cfg), "run": run.identity}, path)
            if improved:
                copy_checkpoint(path, run.save_path / LATEST)
    log.info(
        f"finished: mIoU {done['last_miou']:.2f} at the last epoch, best {done['previous_best']:.2f} at epoch "
        f"{done['best_epoch']} ({run.save_path / BEST})"
    )


def train_one_epoch(
    run: Run,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: DataLoader,
    train_step: TrainStep,
    clock: _Clock,
    guard: Guard,
) -> None:
    """One pass of the loader. Metrics stay on the device and are read every `log_interval` iterations."""
    cfg, log = run.cfg, run.log
    total = cfg.epochs * len(loader)
    images = cfg.batch_size * run.processes.count * (1 if run.unlabeled is None else 2)
    metrics = StepMetrics()

    def backward(part: torch.Tensor) -> None:
        scaler.scale(part).backward()

    loader.sampler.set_epoch(epoch)
    with log.bar(len(loader), f"epoch {epoch + 1}/{cfg.epochs}") as bar:
        for index, batch in enumerate(clock.waits(loader)):
            iteration = epoch * len(loader) + index
            set_poly_lr(optimizer, iteration, total)
            # Channel dropout draws from torch's generator: seeded anew, it depends on the step alone.
            torch.manual_seed(step_seed(cfg.seed, epoch, index, run.processes.rank))
            optimizer.zero_grad(set_to_none=True)
            guard.keep()
            step_metrics = train_step(to_device(batch, run.device), backward)
            scaler.step(optimizer)
            scaler.update()
            metrics.append(iteration, guard.undo(step_metrics))
            bar.update()
            if (index + 1) % cfg.log_interval == 0 or index + 1 == len(loader):
                means = metrics.read()
                guard.report(means, iteration + 1)
                speed = clock.lap(iteration + 1, images)
                values = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
                bar.set_postfix_str(f"{values}  {speed}")
                log.progress(
                    f"epoch {epoch + 1}/{cfg.epochs}  iteration {index + 1}/{len(loader)}  {values}  "
                    f"lr {optimizer.param_groups[0]['lr']:.3g}  {speed}"
                )
                log.scalars({f"train/{CURVES.get(name, name)}": value for name, value in means.items()}, iteration)
                log.scalars({"train/lr": optimizer.param_groups[0]["lr"]}, iteration)


class StepMetrics:
    """0-dim metrics of each step, kept on the device; reading them is the only time the host waits for it."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._first, self._names = 0, ()

    def append(self, iteration: int, metrics: dict[str, torch.Tensor]) -> None:
        """Keep the metrics of step `iteration`; steps come one after the other."""
        if not self._rows:
            self._first, self._names = iteration, tuple(metrics)
        self._rows.append(torch.stack([value.float() for value in metrics.values()]))

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reading and over all processes.

        Steps that the guard has undone are left out; `skipped` is their number. If there were no others, it is alone.
        Raises TrainingStopped, on every process alike, if a value of any other step was not finite.
        """
        rows = all_reduce_sum(torch.stack(self._rows)) / process_count()
        self._rows = []
        values = rows.cpu()
        undone = values[:, self._names.index(SKIPPED)] == 1 if SKIPPED in self._names else torch.zeros(len(values)) == 1
        finite = values.isfinite() | undone[:, None]
        if not finite.all():
            step = int((~finite.all(dim=1)).nonzero()[0])
            terms = ", ".join(
                f"{name} {values[step, i]:.4g}" for i, name in enumerate(self._names) if not finite[step, i]
            )
            raise TrainingStopped(f"the loss is not finite at iteration {self._first + step + 1}: {terms}; {KEPT}")
        means = {}
        if not undone.all():
            means = dict(zip(self._names, values[~undone].double().mean(dim=0).tolist(), strict=True))
        return means | {SKIPPED: float(undone.sum())} if SKIPPED in self._names else means


def step_seed(seed: int, epoch: int, index: int, rank: int) -> int:
    """The seed of torch's generators for one step of one process."""
    return int(np.random.SeedSequence([seed, STEP_STREAM, epoch, index, rank]).generate_state(1, np.uint64)[0])


class _Clock:
    """Speed, share of time spent waiting for data, and what is left."""

    def __init__(self, steps: int, epochs: int, first_epoch: int) -> None:
        self._total, self._first = steps * epochs, steps * first_epoch
        self._start = self._lap_start = time.perf_counter()
        self._lap_iteration, self._waited = self._first, 0.0

    def waits(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, with the time that each was waited for."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def lap(self, iteration: int, images: int) -> str:
        """`iteration` steps are done, each of `images` images: speed since the last lap, and the time to the end."""
        now = time.perf_counter()
        seconds = max(now - self._lap_start, 1e-9)
        speed = (iteration - self._lap_iteration) * images / seconds
        left = (now - self._start) / (iteration - self._first) * (self._total - iteration)
        text = f"{speed:.1f} images/s  data {100 * self._waited / seconds:.0f}%  ETA {timedelta(seconds=round(left))}"
        self._lap_start, self._lap_iteration, self._waited = now, iteration, 0.0
        return text


def _resume(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps: int
) -> dict[str, Any]:
    """Load the run's checkpoint, if there is one, and say where training stands."""
    state = run.checkpoint
    done = {"epoch": 0, "iteration": 0, "previous_best": -math.inf, "best_epoch": 0, "last_miou": math.nan}
    if state is None:
        return done
    load_checkpoint_state(unwrap(model), state, run.save_path / LATEST)
    load_optimizer(optimizer, state["optimizer"], run.save_path / LATEST)
    if "scaler" in state:
        scaler.load_state_dict(state["scaler"])
    done = {key: state.get(key, value) for key, value in done.items()}
    run.log.info(
        f"continuing from {run.save_path / LATEST}: {done['epoch']} of {run.cfg.epochs} epochs are done, "
        f"best mIoU {done['previous_best']:.2f}"
    )
    if done["iteration"] != done["epoch"] * steps:
        run.log.info(
            f"note: an epoch had {done['iteration'] // done['epoch']} iterations and has {steps} now, since the "
            "number of processes changed; the schedule goes on from the same epoch"
        )
    return done


def _check_finite(model: nn.Module, epoch: int) -> None:
    """Raise TrainingStopped if an epoch's last update, which no loss has seen yet, broke the weights."""
    broken = [name for name, tensor in unwrap(model).state_dict().items() if not tensor.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise TrainingStopped(
            f"weights are not finite after the last iteration of epoch {epoch + 1}: {broken[0]}{more}; {KEPT}"
        )


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
    log.flush()
