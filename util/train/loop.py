"""The training loop that all methods share: epochs, schedule, logging, evaluation and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.replacement import training_set
from util.backends import without_benchmark
from util.distributed.ddp import unwrap
from util.evaluate import Result, evaluate
from util.log import peak_memory_gb
from util.loggers import BEST_MIOU
from util.metrics import iou_table
from util.precision import evaluation_copy
from util.run import Run
from util.run_files import BEST
from util.schedule import set_poly_lr
from util.signals import StopSignals
from util.teacher import Teacher
from util.train.bad_images import BadImages
from util.train.clock import Clock
from util.train.feed import Feed
from util.train.monitor import Monitor
from util.train.optimizer_step import OptimizerStep, TrainStep
from util.train.progress import Progress
from util.train.saving import Saver, check_finite
from util.train.step_metrics import StepMetrics

STEP_STREAM = 100  # keeps the seeds of steps apart from the streams of dataset.sampler
# The release's names of these curves, so that old and new ones share a plot in TensorBoard.
CURVES = {"loss": "loss_all", "loss_fp": "loss_w_fp"}


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    val_loader: DataLoader,
    train_step: TrainStep,
    teacher: Teacher | None = None,
) -> None:
    """Train to the last epoch, from the run's checkpoint if it has one. The `teacher` is updated after each step.

    Evaluates after each `eval_interval`-th epoch and the last one. Saves after each epoch, and within it as Saver does.
    """
    cfg, log, signals = run.cfg, run.log, StopSignals()
    trainer = Trainer(run, OptimizerStep(run, model, optimizer, train_step, teacher), loader, signals)
    progress, saver = trainer.progress, trainer.saver
    monitor, started_at = Monitor(run, training_set(loader), val_loader.dataset), progress.epoch
    with signals:
        while progress.epoch < cfg.epochs:
            trainer.train_epoch()
            check_finite(model, f"the last iteration of epoch {progress.epoch + 1}")
            results, started = {}, time.perf_counter()
            if (progress.epoch + 1) % cfg.eval_interval == 0 or progress.epoch + 1 == cfg.epochs:
                for name, network in _evaluated(cfg.evaluate, model, teacher):
                    images = signals.cut(val_loader)
                    with without_benchmark():
                        results[name] = evaluate(
                            evaluation_copy(network),
                            images,
                            cfg.eval_mode,
                            cfg.crop_size,
                            cfg.nclass,
                            run.device,
                            by=cfg.normalization,
                        )
                    saver.stop_if_asked()  # a signal cut the evaluation short, so its result is not one
            first = next(iter(results.values()), None)  # best.pth follows it
            improved = progress.finish_epoch(first.miou if first is not None else None)
            if results:
                _log_evaluation(run, progress, results, time.perf_counter() - started)
                network = teacher.model if "teacher" in results else unwrap(model)
                with without_benchmark():
                    monitor.report(teacher.model if teacher else unwrap(model), network, progress.iteration - 1)
            saver.save_epoch(improved)
    if progress.epoch > started_at:
        log.finish()
    log.info(
        f"finished: mIoU {progress.last_miou:.2f} at the last epoch, best {progress.previous_best:.2f} at epoch "
        f"{progress.best_epoch} ({run.save_path / BEST})"
    )


class Trainer:
    """Takes the steps of an epoch. Owns the run's progress, its metrics and what reports beside them.

    Metrics stay on the device; every `log_interval` steps they are read and logged.
    """

    def __init__(self, run: Run, step: OptimizerStep, loader: DataLoader, signals: StopSignals) -> None:
        cfg = run.cfg
        self.progress = Progress(run.steps)
        self._run, self._step, self._loader, self._metrics = run, step, loader, StepMetrics()
        # A compiler compiles again for other shapes, and a CUDA graph has one only.
        self._feed = Feed(run.device, fixed_shapes=cfg.compile or cfg.cuda_graphs, by=cfg.normalization)
        self.saver = Saver(run, step, self._metrics, self.progress, signals)
        self.saver.resume()
        self._bad_images = BadImages(loader, cfg.bad_image_limit, run.log) if cfg.on_bad_image == "skip" else None
        self._total = cfg.epochs * self.progress.steps
        self._clock = Clock(self.progress.iteration, self._total)

    def train_epoch(self) -> None:
        """The loader's batches from `progress.position` on."""
        cfg, progress, optimizer = self._run.cfg, self.progress, self._step.optimizer
        with self._run.log.bar(progress.steps, f"epoch {progress.epoch + 1}/{cfg.epochs}") as bar:
            if progress.position:  # the checkpoint was written before its last step was logged
                bar.update(progress.position)
                set_poly_lr(optimizer, progress.iteration - 1, self._total)
                self._log_if_due(bar)
            if progress.position == progress.steps:
                return
            self._loader.sampler.set_epoch(progress.epoch, progress.position * cfg.step_images)
            waited = self._clock.time_waits(self._loader)
            while batches := list(islice(waited, cfg.accumulate)):
                iteration = progress.iteration
                set_poly_lr(optimizer, iteration, self._total)
                # Channel dropout draws from torch's generator. Seeded here, it depends on the step alone, and on all
                # processes alike: each draws for all samples of the step.
                torch.manual_seed(step_seed(cfg.seed, progress.epoch, progress.position))
                self._metrics.append(iteration, *self._step.run(self._feed(batch) for batch in batches))
                progress.position += 1
                bar.update()
                self.saver.after_step()
                self._log_if_due(bar)

    def _log_if_due(self, bar: tqdm) -> None:
        """Every `log_interval` steps and after the epoch's last: read the metrics and log them."""
        run, progress, position = self._run, self.progress, self.progress.position
        if position % run.cfg.log_interval and position < progress.steps:
            return
        means = self._metrics.read()
        self._step.report(progress.iteration)
        if self._bad_images:
            self._bad_images.report()
        speed = self._clock.lap(progress.iteration, run.images_per_step)
        rates = [group["lr"] for group in self._step.optimizer.param_groups]
        values = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        bar.set_postfix_str(f"{values}  {speed}")
        run.log.progress(
            f"epoch {progress.epoch + 1}/{run.cfg.epochs}  iteration {position}/{progress.steps}  {values}  "
            f"lr {rates[0]:.3g}  {speed}"
        )
        last = progress.iteration - 1  # curves count steps from 0
        curves = {f"train/{CURVES.get(name, name)}": value for name, value in means.items()}
        curves |= dict(zip(("train/lr", "train/lr_head"), rates, strict=False))
        curves |= {"machine/images_per_second": speed.speed, "machine/data_wait": speed.waiting}
        curves["machine/memory_gb"] = peak_memory_gb(run.device, reset=False)
        run.log.scalars(curves, last)


def step_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of torch's generators for one step, on every process."""
    return int(np.random.SeedSequence([seed, STEP_STREAM, epoch, index, 0]).generate_state(1, np.uint64)[0])


def _evaluated(whose: str | None, model: nn.Module, teacher: Teacher | None) -> Iterator[tuple[str, nn.Module]]:
    """The networks to evaluate, by name, in order: `whose` is teacher, student, both, or None for the default."""
    if teacher and whose != "student":
        yield "teacher", teacher.model
    if not teacher or whose in ("student", "both"):
        yield "student", unwrap(model)


def _log_evaluation(run: Run, progress: Progress, results: dict[str, Result], seconds: float) -> None:
    cfg, log = run.cfg, run.log
    memory = peak_memory_gb(run.device)
    last = progress.iteration - 1  # counted from 0, as the steps' curves: a resumed run hides what comes after it
    for number, (name, result) in enumerate(results.items()):
        whose = "" if list(results) == ["student"] else f"{name}'s "
        text = (
            f"epoch {progress.epoch}/{cfg.epochs}: {whose}IoU in percent "
            f"({cfg.eval_mode}, {len(run.lists.val)} images, {seconds:.1f} s)\n{iou_table(result.iou, cfg.classes)}"
        )
        if number == 0:
            text += f"\n  best {progress.previous_best:.2f} at epoch {progress.best_epoch}; peak memory {memory:.2f} GB"
        log.info(text)
        prefix = "eval" if number == 0 else f"eval_{name}"
        per_class = zip(cfg.classes, result.iou.tolist(), strict=True)
        curves = {f"{prefix}/{label}_IoU": value for label, value in per_class if not math.isnan(value)}
        log.scalars({f"{prefix}/mIoU": result.miou, **curves}, last)
    log.scalars({BEST_MIOU: progress.previous_best, "eval/memory_gb": memory}, last)
