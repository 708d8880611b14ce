"""What watching a run costs: curves, statistics of pseudo-labels and pictures, as a share of an epoch's time."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dataset.lists import Sample
from dataset.loader import LoaderOptions, val_loader
from dataset.semi import TrainDataset, ValDataset
from dataset.source import DataSource
from scripts.benchmark.inputs import Inputs
from scripts.benchmark.rows import Row
from scripts.benchmark.step import prepare_step
from util.config import load_config
from util.evaluate import evaluate
from util.lists import Lists
from util.log import RunLog
from util.precision import evaluation_copy
from util.train.monitor import Monitor

STEPS, IMAGES = 1311, 1449  # of an epoch of Pascal's split 92, and of its evaluation
LOG_INTERVAL, CURVES = 50, 10


def measure_monitor(inputs: Inputs) -> Iterator[Row]:
    """An epoch of Pascal's split 92 with its evaluation, unwatched and watched, made up of single measurements."""
    device, kind = torch.device("cpu"), inputs.kinds[0]
    model, step = prepare_step("float32", inputs.backbone, inputs.crop)
    settings = {"dataset": "synthetic", "nclass": 19, "backbone": inputs.backbone, "crop_size": inputs.crop}
    settings |= {"cutmix_partner": "same_image", "logger": ["tensorboard", "csv"]}
    cfg = load_config("configs/pascal.yaml", settings)
    samples, source = list(kind.samples), DataSource(inputs.root)
    bare = [Sample(sample.image, None) for sample in samples]
    loader = list(val_loader(samples[:4], source, LoaderOptions()))
    copy = evaluation_copy(model)

    def evaluate_some() -> None:
        evaluate(copy, loader, "original", inputs.crop, 19, device)

    unwatched, watched = [], []
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder), True, 0, cfg.logger) as log:
        run: Any = SimpleNamespace(cfg=cfg, lists=Lists(samples, bare, samples), device=device, log=log)
        train = TrainDataset(samples, bare, source, inputs.crop, cfg.seed)
        monitor = Monitor(run, train, ValDataset(samples, source))
        curves = {f"train/{number}": float(number) for number in range(CURVES)}
        for measured in range(-1, inputs.rounds):
            seconds = STEPS * _seconds(step)
            seconds += IMAGES / len(loader) * _seconds(evaluate_some)
            more = STEPS / LOG_INTERVAL * _seconds(lambda measured=measured: log.scalars(curves, measured + 1))
            more += _seconds(lambda measured=measured: monitor.report(model, model, measured + 1))
            if measured >= 0:
                unwatched.append(seconds)
                watched.append(seconds + more)
    share = 100 * (statistics.median(watched) / statistics.median(unwatched) - 1)
    name = f"an epoch of {STEPS} steps and its evaluation, {inputs.backbone}, watched"
    yield Row(name, unwatched, watched, "s", f"watching takes {share:.2f}% of it")


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
