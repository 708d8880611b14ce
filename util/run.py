"""The start of a run: everything that can be wrong is found before a process group or a GPU starts."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from dataset.cache import ImageCache, open_cache
from dataset.files import limit_image_pixels
from dataset.handover import check_handover
from dataset.loader import LoaderOptions, default_workers, train_loader, val_loader
from dataset.semi import TrainDataset
from model import build_model, check_pretrained
from util.backends import describe_backends, set_backends
from util.checkpoint import set_aside, tidy, writing
from util.config import (
    Config,
    batchnorm_group,
    check_batch,
    for_method,
    has_teacher,
    load_config,
    resolve_path,
    to_dict,
)
from util.distributed.group import process_group
from util.distributed.launch import (
    Processes,
    choose_device,
    find_processes,
    launcher_keeps_store,
    local_process_count,
)
from util.errors import ConfigError
from util.init_from import check_start, load_start
from util.lists import Lists, check_listed, data_source, describe_doubts, epoch_sampler, find_lists, identify
from util.lock import check_lock, locked, release
from util.log import RunLog
from util.loggers import check_loggers
from util.outputs import identity
from util.precision import check_precision, describe_precision, set_precision
from util.resume import Found, find_checkpoint
from util.run_files import CONFIG_FILE, LOG_FILE, RESULTS, foreign_files
from util.run_info import hyperparameters, is_started_again, launch, write_info
from util.schedule import build_optimizer
from util.screen import show_progress
from util.signals import outside_training
from util.teacher import Teacher


@dataclass(frozen=True)
class Run:
    """A checked run: its values, lists and places.

    `lr` is the backbone's rate, scaled if the config says so, and `steps` those of an epoch.
    """

    method: str
    cfg: Config
    lr: float
    lists: Lists
    save_path: Path
    checkpoint: Path | None
    steps: int
    processes: Processes
    device: torch.device
    log: RunLog
    cache: ImageCache | None

    @property
    def identity(self) -> dict[str, str]:
        """What shapes training besides the config; a checkpoint carries it."""
        return identify(self.method, self.lists)

    @property
    def images_per_step(self) -> int:
        """Labelled and unlabelled images of one step, over all processes."""
        cfg = self.cfg
        return cfg.step_images * self.processes.count * (1 if self.lists.unlabeled is None else 2)

    def build_model(self) -> nn.Module:
        """The model, with the weights that the config starts from unless a checkpoint is going to replace them."""
        fresh, start = self.checkpoint is None, self.cfg.init_from
        model = build_model(self.cfg, pretrained=fresh and not start)
        if fresh and start:
            load_start(model, start)
        return set_precision(model.to(self.device), self.cfg)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser that the config names, for the model as `build_model` gave it or inside DDP."""
        cfg = self.cfg
        kind = cfg.optimizer_kind
        return build_optimizer(model, self.lr, cfg.lr_multi, kind, cfg.weight_decay, cfg.betas)

    def build_teacher(self, model: nn.Module) -> Teacher | None:
        """The student's EMA teacher, if the method and the config want one."""
        return Teacher(model, self.cfg.teacher_decay) if has_teacher(self.cfg, self.method) else None

    def train_loader(self, strong_views: int = 2) -> DataLoader:
        """Batches for this process; `strong_views` per unlabelled view (1 or 2)."""
        cfg = self.cfg
        dataset = TrainDataset(
            self.lists.labeled,
            self.lists.unlabeled,
            data_source(self.cfg, self.cache),
            cfg.crop_size,
            cfg.seed,
            strong_views,
            cfg.photometry,
        )
        sampler = epoch_sampler(cfg, self.lists, self.processes, self.steps)
        return train_loader(dataset, sampler, loader_options(cfg, self.device), cfg.on_bad_image == "skip")

    def val_loader(self) -> DataLoader:
        """This process's share of the validation images."""
        return val_loader(
            self.lists.val,
            data_source(self.cfg, self.cache),
            loader_options(self.cfg, self.device),
            self.processes.rank,
            self.processes.count,
        )


def loader_options(cfg: Config, device: torch.device) -> LoaderOptions:
    """How a process loads: as the config says, else with its share of this machine's cores, and pinned for a GPU."""
    workers = default_workers(local_process_count()) if cfg.workers is None else cfg.workers
    pin_memory = device.type == "cuda" if cfg.pin_memory is None else cfg.pin_memory
    return LoaderOptions(workers, cfg.prefetch, cfg.persistent_workers, pin_memory)


@contextlib.contextmanager
def open_run(method: str, args: argparse.Namespace) -> Iterator[Run]:
    """Check everything, join the other processes, open the log, seed torch.

    Raises ConfigError, DataError, SavePathError or CheckpointError, each one line for the user.
    """
    cfg, notes = for_method(load_config(args.config, args.overrides), method), []
    limit_image_pixels(cfg.max_image_pixels)
    processes = find_processes(args.port)
    if getattr(args, "double_batch", False):
        cfg, note = _double_batch(cfg, args.overrides, processes.count)
        notes.append(note)
    with contextlib.ExitStack() as stack:
        stack.enter_context(outside_training(processes.rank, not launcher_keeps_store()))
        device = choose_device(cfg.device, processes)
        check_precision(cfg, device, processes.count)
        set_backends(cfg, device)
        check_handover(loader_options(cfg, device).workers)
        save_path = Path(args.save_path)
        lr = (
            cfg.lr * cfg.batch_size * cfg.accumulate * processes.count / cfg.reference_batch if cfg.scale_lr else cfg.lr
        )
        log = RunLog(save_path, active=False)
        cache = None

        def prepare() -> tuple[Lists, Found] | None:
            nonlocal log, cache
            prepared = None
            if processes.is_main:  # it reads and checks for all
                prepared = _read_and_check(method, cfg, args, processes, stack, notes)
            first_step = prepared[1].first_step if prepared else 0
            cache = stack.enter_context(_open_cache(cfg, save_path))
            told = hyperparameters(method, cfg, processes.count, lr)
            log = stack.enter_context(RunLog(save_path, processes.is_main, first_step, cfg.logger, told))
            return prepared

        def ended_by_others(line: str) -> None:  # without leaving this `with`
            log.stopped(line)
            release(save_path)

        lists, found = stack.enter_context(process_group(processes, device, cfg.dist_timeout, ended_by_others, prepare))
        if processes.is_main:
            own_config = identity(save_path / CONFIG_FILE)  # may be the one that was given: then it stays as it is
            if own_config is None or own_config != identity(resolve_path(args.config)):
                with writing(save_path / CONFIG_FILE) as temporary:
                    temporary.write_text(yaml.safe_dump(to_dict(cfg), sort_keys=False), encoding="utf-8")
            paths = {"labeled_id_path": args.labeled_id_path, "unlabeled_id_path": args.unlabeled_id_path}
            values = {"method": method, **paths, "processes": processes.count, "launch": launch()}
            write_info(save_path, values, device)
        checkpoint = found.path and save_path / found.path.name
        run = Run(method, cfg, lr, lists, save_path, checkpoint, found.steps, processes, device, log, cache)
        for line in [*_describe(run), *notes]:
            log.info(line)
        torch.manual_seed(cfg.seed)
        yield run


def _double_batch(cfg: Config, overrides: Sequence[str], processes: int) -> tuple[Config, str]:
    """The published supervised baseline's batch: twice the recipe's, at the same learning rate. With a note."""
    total = cfg.step_images * processes
    if any(text.partition("=")[0].strip() == "batch_size" for text in overrides):
        return cfg, "batch size: as --set says, not doubled"
    if total >= 2 * cfg.reference_batch:
        note = f"batch size: not doubled, {total} images a step are already twice the recipe's {cfg.reference_batch}"
        return replace(cfg, reference_batch=2 * cfg.reference_batch), note
    cfg = replace(cfg, batch_size=2 * cfg.batch_size, reference_batch=2 * cfg.reference_batch)
    return cfg, "batch size: doubled, as the published supervised baseline does; the learning rate is left alone"


def _read_and_check(
    method: str, cfg: Config, args: argparse.Namespace, processes: Processes, stack: contextlib.ExitStack, notes: list
) -> tuple[Lists, Found]:
    """Read the lists, lock the save path until `stack` ends, find the checkpoint, check everything, move things aside.

    `notes` gets lines for the log. Raises ConfigError, DataError, SavePathError, CheckpointError or WeightsError.
    """
    lists = find_lists(method, cfg, args.labeled_id_path, args.unlabeled_id_path, show_progress, notes)
    unlabeled = None if lists.unlabeled is None else len(lists.unlabeled)
    check_batch(cfg, method, processes.count, len(lists.labeled), unlabeled)
    check_loggers(cfg.logger)
    save_path = Path(args.save_path)
    _check_writable(save_path)
    notes += stack.enter_context(locked(save_path))
    anew = args.resume == "never"
    if anew and is_started_again(save_path):
        anew = False
        notes.append("note: started again by its launcher: --resume never was done then, so the run continues")
    steps = len(epoch_sampler(cfg, lists, processes)) // cfg.step_images
    found = Found(None, steps)
    if not anew:
        found = find_checkpoint(save_path, cfg, identify(method, lists), processes.count, steps)
        notes += found.notes
    _check_inputs(cfg, args, save_path, fresh=found.path is None)
    notes += _check_start(cfg, found)
    notes += _check_data(cfg, lists)
    check_lock(save_path)  # the check may have taken hours
    if anew and (aside := set_aside(save_path, resolve_path(args.config))):
        notes.append(f"earlier results were moved to {aside}")
    tidy(save_path, found.damaged)
    return lists, found


def _check_inputs(cfg: Config, args: argparse.Namespace, save_path: Path, fresh: bool) -> None:
    """Raise ConfigError if the run would replace, or move aside, what it reads, or replace what no run wrote."""
    written = {identity(path): path for name in RESULTS if name != CONFIG_FILE for path in save_path.glob(name)}
    given = {"--labeled-id-path": args.labeled_id_path, "--unlabeled-id-path": args.unlabeled_id_path}
    given |= {"--config": args.config, "val_id_path": cfg.val_id_path, "unlabeled_id_path": cfg.unlabeled_id_path}
    if fresh:  # else the weights are not read
        given |= {"init_from": cfg.init_from, "pretrained": cfg.pretrained if isinstance(cfg.pretrained, str) else None}
    for key, path in given.items():
        if path and (found := written.get(identity(resolve_path(path)) or ())):
            raise ConfigError(f"{key} {path}: is {found}, which this run would replace: choose another --save-path")
    for path in foreign_files(save_path) if fresh and args.resume == "auto" else ():
        if identity(path) != identity(resolve_path(args.config)):  # which stays as it is
            raise ConfigError(
                f"--save-path {save_path}: {path.name} exists there, and no run wrote it: choose another, or have it "
                "moved aside by --resume never"
            )


def _check_start(cfg: Config, found: Found) -> list[str]:
    """Check the weights that a fresh run starts from. Raises WeightsError; returns lines for the log."""
    if found.path is not None:
        unread = f"init_from: {cfg.init_from} is not read, since the run continues from {found.path}"
        return [unread] if cfg.init_from else []
    if cfg.init_from:
        return [check_start(cfg)]
    check_pretrained(cfg)
    return []


def _check_data(cfg: Config, lists: Lists) -> list[str]:
    """Check every listed file, if the config says so. Raises DataError; returns notes and warnings for the log."""
    listed = (lists.labeled, lists.unlabeled or [], lists.val)
    notes = check_listed(cfg, listed, show_progress)
    return [*notes, *(describe_doubts(lists, resolve_path(cfg.data_root)) if cfg.check_data else ())]


def _open_cache(cfg: Config, save_path: Path) -> contextlib.AbstractContextManager[ImageCache | None]:
    folder = os.path.expanduser(cfg.cache_dir or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/unimatch")
    if cfg.cache == "disk" and folder.startswith("~"):
        raise ConfigError(f"cache: disk: there is no home folder for {folder}: set cache_dir to a folder of yours")
    return open_cache(cfg.cache, cfg.cache_gb, folder, str(save_path.resolve()))


def _check_writable(save_path: Path) -> None:
    if str(save_path).encode("utf-8", "replace").decode() != str(save_path):  # TensorBoard cannot write there
        raise ConfigError(f"--save-path {save_path}: the name is no UTF-8 text; choose another")
    try:
        save_path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_path):
            pass
        for name in (LOG_FILE, CONFIG_FILE):  # of an earlier run, which may have been another user's
            if (save_path / name).exists():
                open(save_path / name, "a").close()
    except OSError as error:
        raise ConfigError(
            f"--save-path {error.filename or save_path}: cannot be written to: {error.strerror}"
        ) from None


def _describe(run: Run) -> list[str]:
    cfg, count = run.cfg, run.processes.count
    per_step = cfg.step_images * count
    parts = f"{cfg.batch_size} x {count}" + (f" x {cfg.accumulate} accumulated" if cfg.accumulate > 1 else "")
    unlabeled = "" if run.lists.unlabeled is None else f" + {per_step} unlabelled"
    linear = cfg.lr * per_step / cfg.reference_batch
    if cfg.scale_lr:
        rule = f"scaled by the linear rule from {cfg.lr:g}"
    else:
        rule = (
            f"the linear rule would give {linear:g}: scale_lr: true applies it" if linear != cfg.lr else "as the recipe"
        )
    teacher = f", EMA teacher (decay {cfg.teacher_decay:g})" if has_teacher(cfg, run.method) else ""
    group, few = batchnorm_group(cfg, run.method, count), []
    if group is not None and group <= 2:
        few = [
            f"warning: BatchNorm normalises over {group} images only (batch_size {cfg.batch_size} x {count}): its "
            "statistics will be noisy; raise batch_size or the processes"
        ]
    images = f"{len(run.lists.labeled)} labelled, {len(run.lists.val)} validation"
    images += f", {len(run.lists.unlabeled)} unlabelled" if run.lists.unlabeled is not None else ""
    return [
        f"{run.method} on {cfg.dataset} ({images} images, {cfg.nclass} classes), saved in {run.save_path}",
        f"{cfg.model} on {cfg.backbone}{teacher}, crop {cfg.crop_size}, seed {cfg.seed}, torch {torch.__version__}, "
        f"{count} process{'es' * (count > 1)} on {run.device.type}",
        ", ".join([describe_precision(cfg, run.device), *describe_backends(cfg, run.device)]),
        f"batch: {per_step} labelled{unlabeled} images a step ({parts}); the recipe's reference is "
        f"{cfg.reference_batch} labelled; lr {run.lr:g} ({rule}), head x {cfg.lr_multi:g}",
        *few,
    ]
