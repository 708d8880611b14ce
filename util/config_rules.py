"""Rules of the configuration over names, over several keys, and over the data that a run has."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace

from dataset.catalog import CATALOG
from model import MODELS, SIZE_MULTIPLES
from util.config_schema import Config
from util.errors import ConfigError, quoted, suggest


def check_rules(cfg: Config, given: Collection[str], where: Callable[[str], str]) -> None:
    """Check names and what one key means for another. Raises ConfigError.

    `given`: the keys that the user wrote. `where(key)`: the file or the `--set` that a message blames.
    """

    def fail(key: str, message: str) -> None:
        raise ConfigError(f"{where(key)}: {key}: {message}")

    if not re.fullmatch(r"[\w.-]+", cfg.dataset):
        fail("dataset", f"{quoted(cfg.dataset)} may have letters, digits, '_', '-' and '.' only: it names a folder")
    backbones = MODELS[cfg.model]
    if other := next((name for name, names in MODELS.items() if name != cfg.model and cfg.backbone in names), None):
        fail("backbone", f"{cfg.backbone} is for model: {other}; model: {cfg.model} has {', '.join(backbones)}")
    if cfg.backbone not in backbones:
        fail(
            "backbone",
            f"unknown backbone {quoted(cfg.backbone)}{suggest(cfg.backbone, backbones)}; "
            f"there are {', '.join(backbones)}",
        )
    multiple = SIZE_MULTIPLES[cfg.model]
    if cfg.crop_size % multiple:
        below, limits = cfg.crop_size // multiple * multiple, Config.__dataclass_fields__["crop_size"].metadata
        near = [size for size in (below, below + multiple) if limits["minimum"] <= size <= limits["maximum"]]
        fail(
            "crop_size",
            f"{cfg.crop_size} is no multiple of {multiple}, which model: {cfg.model} needs; "
            f"near {'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}",
        )
    if cfg.backbone == "xception" and cfg.replace_stride_with_dilation != (False, False, True):
        fail("replace_stride_with_dilation", "xception has output stride 16 only: [false, false, true]")
    if cfg.replace_stride_with_dilation[0]:
        fail(
            "replace_stride_with_dilation",
            "the first must be false: low-level features need layer2's stride "
            "(16: [false, false, true], 8: [false, true, true])",
        )
    if cfg.compile and cfg.checkpoint_activations != "none":
        fail("compile", "the compiler chooses by itself what to compute again: set checkpoint_activations: none")
    if twice := next((name for name in cfg.logger if cfg.logger.count(name) > 1), None):
        fail("logger", f"{twice} is listed twice")
    if cfg.cuda_graphs and cfg.accumulate > 1:
        fail("cuda_graphs", f"a graph is of one batch, and accumulate is {cfg.accumulate}: set one of them only")
    if len(set(cfg.classes)) != len(cfg.classes):
        twice = next(name for name in cfg.classes if cfg.classes.count(name) > 1)
        fail("classes", f"'{twice}' is listed twice")
    if not 2 <= len(cfg.classes) <= 255:
        fail("classes", f"{len(cfg.classes)} classes; 2 to 255 fit an 8-bit label whose 255 is ignored")
    if cfg.nclass != len(cfg.classes):
        origin = "`classes` lists" if "classes" in given else f"the data set {cfg.dataset} has"
        fail(
            "nclass",
            f"{cfg.nclass}, but {origin} {len(cfg.classes)} classes; leave nclass out, or list other `classes`",
        )
    if len(set(cfg.rgb_channels)) < 3 or max(cfg.rgb_channels) >= cfg.channels:
        fail(
            "rgb_channels",
            f"{list(cfg.rgb_channels)}: three different channels from 0 to {cfg.channels - 1} are needed",
        )
    for key in ("mean", "std"):
        if (values := getattr(cfg, key)) is not None and len(values) != cfg.channels:
            fail(key, f"{len(values)} values for channels: {cfg.channels}")
    if cfg.channels == 3 and (cfg.mean is None) != (cfg.std is None):
        fail("mean" if cfg.mean else "std", "mean and std go together: set both, or neither")
    if cfg.value_range is not None and cfg.value_range[0] >= cfg.value_range[1]:
        fail("value_range", f"{list(cfg.value_range)}: the first must be less than the second")
    if cfg.bands and cfg.photometry == "device":
        fail("photometry", "device is for 8-bit images of three channels: use worker")
    for value, index in (cfg.label_map or {}).items():
        if cfg.nclass <= index != 255:
            fail("label_map", f"{value}: {index}: classes are 0..{cfg.nclass - 1}, and 255 for ignored pixels")
    colours = cfg.palette if cfg.label_colors == "palette" else cfg.label_colors or ()
    if len(set(colours)) != len(colours):
        twice = next(colour for colour in colours if colours.count(colour) > 1)
        fail("label_colors", f"the colour {list(twice)} is listed twice")
    if len(colours) > 256 or any(not 0 <= value <= 255 for colour in colours for value in colour):
        fail("label_colors", "at most 256 colours, [red, green, blue] with values from 0 to 255")
    if extra := [i for i in range(len(colours)) if cfg.nclass <= (cfg.label_map or {}).get(i, i) != 255]:
        fail(
            "label_colors",
            f"colour {extra[0]}, {list(colours[extra[0]])}, is of no class: classes are 0..{cfg.nclass - 1}; "
            f"label_map: {{{extra[0]}: 255}} ignores it",
        )
    if len(cfg.palette) != cfg.nclass:
        fail("palette", f"{len(cfg.palette)} colours for {cfg.nclass} classes")
    if any(not 0 <= value <= 255 for colour in cfg.palette for value in colour):
        fail("palette", "colours are [red, green, blue] with values from 0 to 255")


def has_teacher(cfg: Config, method: str) -> bool:
    """Whether an EMA teacher gives the pseudo-labels."""
    as_published = method == "unimatch_v2" or (method == "fixmatch" and cfg.model == "dpt")
    return as_published if cfg.teacher is None else cfg.teacher == "ema"


def for_method(cfg: Config, method: str) -> Config:
    """The config with what `method` decides: CutMix's partner, and the least images in a supervised epoch.

    Raises ConfigError where a key does not go with the method.
    """
    cfg.normalization  # noqa: B018  raises where channels have no mean
    teacher = has_teacher(cfg, method)
    if teacher and method in ("unimatch", "supervised"):
        raise ConfigError(f"teacher: {method} has none: leave it out (unimatch_v2 and fixmatch have one)")
    if method == "unimatch_v2" and not teacher:
        raise ConfigError("teacher: unimatch_v2 learns from one: leave it out, or set it to ema")
    if not teacher and cfg.evaluate in ("teacher", "both"):
        raise ConfigError(f"evaluate: {cfg.evaluate}: this run has no teacher: leave it out")
    if cfg.cuda_graphs and method == "unimatch_v2":
        raise ConfigError("cuda_graphs: unimatch_v2 draws its complementary dropout on the CPU: leave it out")
    partner = cfg.cutmix_partner or ("reversed_batch" if teacher else "same_image")
    if teacher != (partner == "reversed_batch"):
        needed = "with a teacher CutMix pastes from the reversed batch" if teacher else "it goes with a teacher only"
        raise ConfigError(f"cutmix_partner: {partner}: {needed}: leave it out")
    least = cfg.supervised_epoch
    if least is None and cfg.model == "dpt" and cfg.dataset in CATALOG:
        least = CATALOG[cfg.dataset].supervised_epoch
    return replace(cfg, cutmix_partner=partner, supervised_epoch=least if method == "supervised" else None)


def check_batch(cfg: Config, method: str, processes: int, labeled: int, unlabeled: int | None) -> None:
    """Refuse a batch that the data or BatchNorm cannot give. `unlabeled` is None for the supervised baseline."""
    per_step = cfg.step_images * processes
    parts = f"batch_size {cfg.batch_size} x {processes} processes"
    parts += f" x {cfg.accumulate} accumulated" if cfg.accumulate > 1 else ""
    for kind, count in (("labelled", labeled), ("unlabelled", unlabeled)):
        if count is not None and count < per_step:
            raise ConfigError(
                f"{count} {kind} image{'s' * (count != 1)} cannot fill one batch of {per_step} "
                f"({parts}): lower batch_size or use fewer processes"
            )
    group = batchnorm_group(cfg, method, processes)
    if group is not None and group < 2:
        raise ConfigError(
            f"batch_size {cfg.batch_size} on {processes} process gives {method} a BatchNorm group of {group} image: "
            "its variance needs 2 (the image-pooling branch has one value per image); raise batch_size or the processes"
        )


def batchnorm_group(cfg: Config, method: str, processes: int) -> int | None:
    """Images in the smallest BatchNorm group, that of one training forward; None where the model has no BatchNorm.

    UniMatch's [x; w] and [s1; s2] have two images per sample, as has [x; s] of FixMatch with a teacher; FixMatch's [s],
    UniMatch V2's and the supervised [x] have one.
    """
    two = method == "unimatch" or (method == "fixmatch" and has_teacher(cfg, method))
    return None if cfg.model == "dpt" else cfg.batch_size * processes * (2 if two else 1)
