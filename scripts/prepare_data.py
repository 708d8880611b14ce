"""Prepare Pascal VOC 2012, Cityscapes, COCO 2017 or ADE20K for training, from the official downloads.

    python -m scripts.prepare_data pascal --source downloads --root data/pascal
    python -m scripts.prepare_data coco --source DIR --root data/coco

A source is an archive, a folder that holds archives, or the folder that they were unpacked into. Images are copied,
labels become index PNGs where the lists in `splits/` expect them; dataset/prepare/downloads.py says how.

Every file appears whole or not at all, and one that exists is kept: started again, the command goes on where it was
interrupted. Files that no list names (most of COCO's) come first, so that a folder in which every listed file exists is
complete: such a folder, as the root or as a source, is only checked.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset import DataError
from dataset.atomic import remove_leftovers
from dataset.catalog import CATALOG, RGB
from dataset.check import check_samples
from dataset.handover import starting
from dataset.lists import Sample, is_hidden, read_list
from dataset.loader import default_workers
from dataset.prepare.archives import Member, find_sources, members, new_file
from dataset.prepare.downloads import RECIPES, CocoImage, Recipe, Rule, mark, read_instances, require
from dataset.source import DataSource
from util.cli import run_main
from util.config import resolve_path
from util.errors import ConfigError
from util.visualize import colorize

LABEL_BYTES = 16 * 1024  # of a label that is made: on average it takes less
BLOCK = 4096  # a file takes up whole blocks of the disk
JOBS_AHEAD = 8  # read but not yet converted, for each process
CONVERTERS = "converting processes"


class Planned(NamedTuple):
    """A file to make: the rule, the source's member that it is made from, and, out of an annotation file, the image."""

    rule: Rule
    source: Path
    member: str
    bytes: int
    image: CocoImage | None = None


class Job(NamedTuple):
    """What a process needs to make one file; without `convert`, `data` is its content."""

    target: Path
    data: Any
    convert: Callable[[Any], np.ndarray] | None
    palette: Sequence[RGB] | None
    origin: str  # for messages


def read_lists(folder: Path) -> list[Sample]:
    """The lines of all lists (.txt) in `folder` and the folders in it, each once, without hidden ones.

    Raises DataError.
    """
    lists = sorted(path for path in folder.rglob("*.txt") if not is_hidden(path.relative_to(folder).as_posix()))
    if not lists:
        raise DataError(f"--splits {folder}: no list (.txt) in it")
    return list(dict.fromkeys(sample for path in lists for sample in read_list(path, labels=False)))


def listed_files(samples: Iterable[Sample]) -> dict[str, None]:
    """The images and labels of `samples` as an ordered set."""
    return dict.fromkeys(name for sample in samples for name in sample if name)


def make_plan(
    recipe: Recipe, sources: Sequence[Path], root: Path, listed: Collection[str]
) -> tuple[dict[str, Planned], set[Rule]]:
    """{path under `root`: how to make it} of the files that are not there yet, and the rules that found anything.

    Reads the contents of every source to the end, so that a damaged one is noticed before anything is written.
    Raises DataError.
    """
    plan: dict[str, Planned] = {}
    found = set()
    rank = {rule: index for index, rule in enumerate(recipe.rules)}
    for source in tqdm(sources, "looking through", unit="source", disable=None):
        for member in members(source):
            for rule in recipe.rules:
                match = re.search(rf"(?:^|/){rule.found}$", member.path)
                if not match:
                    continue
                found.add(rule)
                for target, planned in _made_from(source, member, rule, match):
                    wanted = recipe.whole or target in listed
                    better = target not in plan or rank[rule] < rank[plan[target].rule]
                    if wanted and better and not os.path.isfile(root / target):
                        plan[target] = planned
    return plan, found


def _made_from(source: Path, member: Member, rule: Rule, match: re.Match[str]) -> Iterator[tuple[str, Planned]]:
    """What `rule` makes from `member`: one file, or the labels of all images of an annotation file."""
    needed = max(member.size, LABEL_BYTES) if rule.convert else member.size
    if not rule.annotations:
        yield rule.target.format(**match.groupdict()), Planned(rule, source, member.path, needed)
        return
    data = member.read()
    try:
        images = read_instances(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _not_official(f"{source}: {member.path}", error) from None
    for image in images:
        stem = os.path.splitext(os.path.basename(image.file_name))[0]
        yield rule.target.format(id=stem), Planned(rule, source, member.path, LABEL_BYTES, image)


def _not_official(origin: str, error: Exception) -> DataError:
    return DataError(f"{origin}: not as in the official download ({type(error).__name__}: {error})")


def check_plan(
    plan: Mapping[str, Planned], found: Collection[Rule], recipe: Recipe, root: Path, listed: Iterable[str]
) -> None:
    """Raise DataError unless each listed file exists or is planned, modules can be imported and the disk has room."""
    missing = [name for name in listed if name not in plan and not os.path.isfile(root / name)]
    if missing:
        folders = {name.split("/")[0] for name in missing}
        downloads = dict.fromkeys(rule.download for rule in recipe.rules if rule.target.split("/")[0] in folders)
        absent = [download for download in downloads if download not in {rule.download for rule in found}]
        advice = (
            f"download {' and '.join(absent)}, to be given as --source"
            if absent
            else f"--source holds only a part of {' and '.join(downloads)}, download it again"
            if downloads
            else f"this data set has files such as {recipe.rules[0].target}"
        )
        raise DataError(f"{root / missing[0]}: not there, {len(missing)} listed files are missing; {advice}")
    for rule in {item.rule for item in plan.values()}:
        for better in recipe.rules[: recipe.rules.index(rule)]:
            # SBD has coarser masks of VOC's labelled images: they must not come in by oversight.
            if better.target == rule.target and better.download != rule.download and better not in found:
                raise DataError(f"{root}: labels of {better.download} are missing: give it as --source too")
        if rule.module:
            require(rule.module)
    needed = sum(-(-item.bytes // BLOCK) * BLOCK for item in plan.values())
    disk = root.absolute()
    while not disk.exists():
        disk = disk.parent
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise DataError(
            f"{root}: {needed / 1e9:.1f} GB are needed, but its disk has {free / 1e9:.1f} GB left; "
            "free some, or choose a --root elsewhere"
        )


def jobs(plan: Mapping[str, Planned], root: Path, palette: Sequence[RGB] | None) -> Iterator[Job]:
    """The jobs of a plan, in the order in which its sources give the data. Raises DataError."""
    for target, item in plan.items():
        if item.image:
            origin = f"{item.source}: {item.member}: image {item.image.id}"
            yield Job(root / target, item.image, item.rule.convert, palette, origin)
    for source in dict.fromkeys(item.source for item in plan.values()):
        targets = {item.member: name for name, item in plan.items() if item.source == source and not item.image}
        if not targets:
            continue
        for member in members(source):
            if target := targets.pop(member.path, None):
                rule = plan[target].rule
                yield Job(root / target, member.read(), rule.convert, palette, f"{source}: {member.path}")
                if not targets:
                    break
        if targets:
            raise DataError(f"{source}: {next(iter(targets))} has vanished from it; start again")


def run(job: Job) -> None:
    """Make one file. Raises DataError."""
    label = None
    if job.convert:
        try:
            label = job.convert(job.data)
        except DataError:
            raise
        except Exception as error:  # damaged data raises whatever its reader meets
            raise _not_official(job.origin, error) from None
    with new_file(job.target) as path:
        if label is None:
            path.write_bytes(job.data)
        else:
            image = colorize(label, job.palette) if job.palette else Image.fromarray(label)
            image.save(path, format="PNG", pnginfo=mark())


def run_all(jobs: Iterable[Job], pool: Executor | None, ahead: int) -> Iterator[None]:
    """Run jobs, conversions in `pool` with at most `ahead` of them waiting; yield after each one. Raises DataError."""
    pending: set[Future[None]] = set()
    try:
        for job in jobs:
            if pool is None or not job.convert:
                yield run(job)
                continue
            with starting(CONVERTERS):
                pending.add(pool.submit(run, job))
            if len(pending) >= ahead:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in pending)
    except BrokenProcessPool:
        raise DataError("a process was killed, perhaps as memory ran out: start again, with fewer --workers") from None


def make_files(
    plan: Mapping[str, Planned], root: Path, listed: Collection[str], palette: Sequence[RGB] | None, workers: int
) -> None:
    """Make the files of `plan` under `root`, the listed ones when all others are done. Raises DataError."""
    for folder in {(root / target).parent for target in plan}:
        remove_leftovers(folder)
    others = {name: item for name, item in plan.items() if name not in listed}
    last = {name: item for name, item in plan.items() if name in listed}
    with starting(CONVERTERS):
        pool = ProcessPoolExecutor(workers, initializer=_start_worker) if workers > 1 else None
    try:
        with tqdm(total=len(plan), desc="preparing", unit="file", disable=None) as bar:
            for part in (others, last):
                for _ in run_all(jobs(part, root, palette), pool, JOBS_AHEAD * workers):
                    bar.update()
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when that is gone, killed for instance: nobody else would say so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _is_complete(folder: Path, samples: Iterable[Sample]) -> bool:
    return all(os.path.isfile(folder / name) for name in listed_files(samples))


def _is_ready(folder: Path, samples: Sequence[Sample], recipe: Recipe) -> bool:
    """Whether `folder` has every listed file, as training needs it."""
    if not _is_complete(folder, samples):
        return False
    labels = (folder / sample.label for sample in samples if sample.label)
    return recipe.is_converted is None or recipe.is_converted(labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare and check as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.prepare_data", description=__doc__.split("\n", 1)[0])
    parser.add_argument("dataset", choices=RECIPES, metavar="DATASET", help=", ".join(RECIPES))
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="PATH",
        help="archive, annotation file or folder of the official downloads; may be repeated",
    )
    parser.add_argument("--root", metavar="DIR", help="where the data set goes (default: data/DATASET)")
    parser.add_argument("--splits", metavar="DIR", help="lists of the files to prepare (default: splits/DATASET)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core, at most 8)")
    args = parser.parse_args(argv)
    workers = default_workers(1) if args.workers is None else args.workers
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1 process is needed")

    recipe, nclass = RECIPES[args.dataset], len(CATALOG[args.dataset].classes)
    root = resolve_path(args.root or f"data/{args.dataset}")
    splits = resolve_path(args.splits or f"splits/{args.dataset}")
    samples = read_lists(splits)
    listed = listed_files(samples)
    given = [resolve_path(source) for source in args.source]

    ready = next((folder for folder in (root, *given) if _is_ready(folder, samples, recipe)), None)
    if not ready and _is_complete(root, samples):
        raise DataError(
            f"--root {root}: holds the labels of the official download, and class indices would replace them: choose "
            "another --root and give this folder as --source"
        )
    plan: dict[str, Planned] = {}
    if not ready:
        sources = [file for path in given for file in find_sources(path, recipe.archives)]
        plan, found = make_plan(recipe, list(dict.fromkeys(sources)), root, listed)
        check_plan(plan, found, recipe, root, listed)
        make_files(plan, root, listed, recipe.palette, workers)
    folder = ready or root
    print(f"{folder}: checking {len(samples)} list entries", flush=True)
    try:
        check_samples(samples, DataSource(folder), nclass)
    except DataError as error:
        raise DataError(f"{error}; to make a file again, delete it and start again with --source") from None
    wrote = f"{len(plan)} files written" if plan else "prepared already, nothing written"
    print(f"{folder}: {wrote}; all {len(listed)} files that {splits} lists are there and in order")
    if folder != root:
        print(f"nothing was copied to {root}: set data_root: {folder} in the config")


if __name__ == "__main__":
    run_main(main)
