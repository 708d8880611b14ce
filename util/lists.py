"""The lists of a run: which images it learns from and is evaluated on, and what identifies them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from dataset.cache import ImageCache
from dataset.check import check_samples
from dataset.errors import DataError
from dataset.files import gives_upper_bits, upper_bits_notes
from dataset.lists import (
    IMAGE_SUFFIXES,
    Progress,
    find_unlabeled,
    is_hidden,
    is_image,
    list_digest,
    no_progress,
    read_list,
    shared_images,
)
from dataset.sampler import EpochSampler
from dataset.samples import Sample, Samples
from dataset.source import DataSource
from util.config import Config, resolve_path
from util.distributed.launch import Processes
from util.errors import ConfigError
from util.outputs import is_own


class Lists(NamedTuple):
    """Labelled, unlabelled (None: the method uses none) and validation images."""

    labeled: Samples
    unlabeled: Samples | None
    val: Samples


def find_lists(
    method: str,
    cfg: Config,
    labeled_path: str,
    unlabeled_path: str | None,
    progress: Progress = no_progress,
    notes: list[str] | None = None,
) -> Lists:
    """Read the lists that the command line and the config name. Raises ConfigError or DataError.

    `progress` as for `read_list`; `notes` gets what the log should say.
    """
    data_root = resolve_path(cfg.data_root)
    inside = None if cfg.allow_outside_root else data_root
    labeled = read_list(resolve_path(labeled_path), inside=inside, progress=progress)
    val = read_list(resolve_path(cfg.val_id_path), inside=inside, progress=progress)
    if method == "supervised":
        return Lists(labeled, None, val)
    unlabeled = list_unlabeled(cfg, unlabeled_path, labeled, progress, notes)
    if unlabeled is None:
        raise ConfigError("no unlabelled images: give --unlabeled-id-path, or unlabeled_id_path in the config")
    return Lists(labeled, unlabeled, val)


def list_unlabeled(
    cfg: Config,
    given: str | None,
    labeled: Sequence[Sample],
    progress: Progress = no_progress,
    notes: list[str] | None = None,
) -> Samples | None:
    """The unlabelled images, from `given` on the command line or else the config; None if neither names any.

    `notes` gets what is left out of a folder. Raises DataError.
    """
    source = given or cfg.unlabeled_id_path
    if source is None:
        return None
    listed = resolve_path(source)  # a folder is meant under data_root, whatever lies in the current one
    source = listed if listed.is_file() else source
    where, left_out = (resolve_path(cfg.data_root), labeled, cfg.allow_outside_root), []
    found = find_unlabeled(source, *where, progress, cfg.image_suffixes, is_own, left_out)
    if notes is not None:
        notes += describe_left_out(source, left_out, cfg.image_suffixes)
    return found


def describe_left_out(
    folder: str | Path, left_out: Sequence[str], suffixes: Set[str] = IMAGE_SUFFIXES
) -> Iterator[str]:
    """A note for each kind of what `images_in` passed over in this folder."""
    kinds: dict[str, list[str]] = {}
    for path in left_out:
        if is_hidden(path):
            kind = "hidden folders and files"
        elif path.endswith("/"):
            kind = "links that lead back"
        else:
            kind = "predictions by this project" if is_image(path.rpartition("/")[2], suffixes) else "other files"
        kinds.setdefault(kind, []).append(path)
    for kind, paths in sorted(kinds.items()):
        yield f"note: {kind} in {folder} were left out: {len(paths)}, such as {min(paths)}"


def data_source(cfg: Config, cache: ImageCache | None = None) -> DataSource:
    """Where the config's images and labels come from, and how they are read."""
    return DataSource(resolve_path(cfg.data_root), cfg.label_map, cache, cfg.color_values, cfg.bands)


def check_listed(cfg: Config, lists: Iterable[Sequence[Sample]], progress: Progress = no_progress) -> list[str]:
    """Check every file of the lists, read as the config says; with `check_data: false` one image of each is opened.

    Returns notes for the user. Raises DataError.
    """
    source, deep = data_source(cfg), []
    for samples in lists:
        if cfg.check_data:
            deep.append(check_samples(samples, source, cfg.nclass, progress=progress))
        elif samples and cfg.bands is None:
            with contextlib.suppress(DataError), source.open_image(samples[0].image) as image:
                deep.append(source.root / samples[0].image if gives_upper_bits(image) else None)
    return upper_bits_notes(deep)


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` of the samples, evenly spaced."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def identify(method: str, lists: Lists) -> dict[str, str]:
    """What shapes training besides the config: the method and the lists' contents. A checkpoint carries it."""
    named = {
        "labelled list": lists.labeled,
        "unlabelled list": lists.unlabeled or [],
        "validation list": lists.val,
    }
    return {"method": method, **{name: f"{len(x)} images, {list_digest(x)}" for name, x in named.items()}}


def describe_doubts(lists: Lists, data_root: Path) -> Iterator[str]:
    """A warning for each thing about the lists that is rarely meant."""
    named = {"labelled": lists.labeled, "unlabelled": lists.unlabeled or [], "validation": lists.val}
    for name in ("labelled", "unlabelled"):
        if shared := shared_images(lists.val, named[name], data_root):
            yield (
                f"warning: {len(shared)} of {len(lists.val)} validation images are also among the {name} ones, such as "
                f"{shared[0]}: mIoU will say little about new images"
            )
    for name, samples in named.items():
        hidden, first = 0, ""
        for image, _ in samples:
            if is_hidden(image):
                hidden, first = hidden + 1, first or image
        if hidden:
            yield (
                f"warning: {hidden} of {len(samples)} {name} images are hidden or in a hidden folder, such as "
                f"{first}: copies that a program keeps for itself are rarely meant"
            )


def epoch_sampler(cfg: Config, lists: Lists, processes: Processes, steps: int | None = None) -> EpochSampler:
    """The order of this process's samples; `steps` of an epoch, where they do not follow from the lists."""
    unlabeled = None if lists.unlabeled is None else len(lists.unlabeled)
    return EpochSampler(
        len(lists.labeled),
        unlabeled,
        cfg.batch_size,
        cfg.seed,
        processes.rank,
        processes.count,
        partner=cfg.cutmix_partner,
        repeat_labeled_to=cfg.supervised_epoch,
        accumulate=cfg.accumulate,
        steps=steps,
    )
