"""Configuration: one frozen dataclass and, in this file, every rule of its validation.

A YAML file is a recipe; `--set key=value` changes a key of it. What is wrong is said in one line that names the file
(or the `--set`), the key, the value and the way out.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dataset.catalog import CATALOG, voc_palette
from model import BACKBONES
from util.convert import Criterion, _convert, convert_label_map, one_line, plain_values, quoted, suggest, without_kwargs
from util.errors import ConfigError
from util.safe_yaml import MAX_YAML_BYTES, MAX_YAML_TEXT, parse_yaml

PROJECT_ROOT = Path(__file__).resolve().parents[1]
EvalMode = Literal["original", "sliding_window", "center_crop"]
EVAL_MODES = typing.get_args(EvalMode)


def _key(
    doc: str,
    default: Any = MISSING,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field with its documentation and, for numbers, its range; without a default the key is required."""
    return field(default=default, metadata={"doc": doc, "minimum": minimum, "above": above, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on besides its lists and its save path. Fields are the keys of the YAML files."""

    # data
    dataset: str = _key("name of the data set; pascal, cityscapes and coco bring their classes, palette and eval_mode")
    data_root: str = _key("folder that the paths in the list files are relative to")
    val_id_path: str = _key("list of the validation images and labels")
    crop_size: int = _key(
        "side of the square training crop, and of the sliding evaluation window, in pixels", minimum=16, maximum=8192
    )
    classes: tuple[str, ...] | None = _key("class names; label value i is the i-th name", None)
    nclass: int | None = _key(
        "number of classes; implied by the data set or by `classes`", None, minimum=2, maximum=255
    )
    palette: tuple[tuple[int, int, int], ...] | None = _key("one [red, green, blue] per class, 0 to 255", None)
    label_map: dict[int, int] | None = _key(
        "class (or 255, ignored) of values in the label files, such as {0: 0, 255: 1}; other values stay", None
    )
    unlabeled_id_path: str | None = _key(
        "list of unlabelled images, or a folder of images under data_root; labelled images are left out of it", None
    )
    eval_mode: EvalMode = _key("how a validation image is seen", "original")
    cutmix_partner: Literal["same_image", "other_image"] = _key(
        "what CutMix pastes: another view of the same image (as published) or of another image", "same_image"
    )
    # training
    epochs: int = _key("passes over the unlabelled images (supervised: over the labelled)", minimum=1)
    batch_size: int = _key("labelled images per process, and as many unlabelled ones", minimum=1)
    lr: float = _key("learning rate of the backbone", above=0)
    lr_multi: float = _key("the other parameters learn at lr * lr_multi", 1.0, above=0)
    reference_batch: int = _key("labelled images per step, over all processes, that lr is meant for", 8, minimum=1)
    scale_lr: bool = _key("scale lr by (labelled images per step) / reference_batch", False)
    criterion: Criterion = _key("CELoss, or {name: OHEM, thresh: 0.7, min_kept: 200000}", Criterion())
    conf_thresh: float = _key("confidence from which a pseudo-label counts", 0.95, minimum=0, maximum=1)
    seed: int = _key(
        "seeds every draw: weights, order, geometry, colour, CutMix, dropout", 0, minimum=0, maximum=2**32 - 1
    )
    # model
    backbone: str = _key(f"one of {', '.join(BACKBONES)}")
    pretrained: bool | str = _key(
        "true: pretrained/BACKBONE.pth; false: from scratch; or the path of a weights file", True
    )
    replace_stride_with_dilation: tuple[bool, bool, bool] = _key(
        "for the last three stages; [false, false, true] is output stride 16, [false, true, true] is 8",
        (False, False, True),
    )
    dilations: tuple[int, int, int] = _key("of the three atrous ASPP branches", (6, 12, 18), minimum=1)
    # running
    device: Literal["auto", "cpu", "cuda"] = _key("auto: GPUs where there are any", "auto")
    workers: int | None = _key(
        "loading processes per training process; default: a share of the cores, 8 at most", None, minimum=0, maximum=256
    )
    prefetch: int = _key("batches that each loading process has ready", 2, minimum=1, maximum=64)
    persistent_workers: bool = _key("keep the loading processes from one epoch to the next", True)
    pin_memory: bool | None = _key("load batches into pinned memory, whence GPUs copy faster; default: for GPUs", None)
    photometry: Literal["worker", "device"] = _key(
        "where the strong views' colours and blur are made; on the device they differ by some levels", "worker"
    )
    cache: Literal["none", "ram", "disk"] = _key("keep decoded images and labels in shared memory or on a disk", "none")
    cache_gb: float = _key("size of the cache in GB (1e9 bytes); once it is full it stays as it is", 16.0, above=0)
    cache_dir: str | None = _key("folder for cache: disk, best on a local disk; default: ~/.cache/unimatch", None)
    channels_last: bool | None = _key(
        "channels innermost in memory, for which CPU and 16-bit kernels are made; default: on CPUs", None
    )
    amp: Literal["none", "bf16", "fp16"] = _key("16-bit autocast of the forward passes; fp16 needs a GPU", "none")
    compile: bool = _key("torch.compile the model; its first steps take minutes, and it needs a C++ compiler", False)
    checkpoint_activations: Literal["none", "backbone", "all"] = _key(
        "what is computed again in the backward pass instead of kept in memory; gradients are the same", "none"
    )
    check_data: bool = _key("check images and labels before training starts", True)
    max_image_pixels: int = _key(
        "images and labels of more pixels are refused before they are decoded", 100_000_000, minimum=1
    )
    allow_outside_root: bool = _key("let list entries and the unlabelled folder lie outside data_root", False)
    on_bad_image: Literal["stop", "skip"] = _key(
        "an image or label that cannot be read in mid-training stops the run, or its sample is replaced by another",
        "stop",
    )
    bad_image_limit: int = _key("different faults of that kind before the run stops after all", 10, minimum=1)
    on_nonfinite: Literal["stop", "skip"] = _key(
        "a step with a loss or gradient that is not finite stops the run, or is undone", "stop"
    )
    nonfinite_limit: int = _key("undone steps before the run stops after all", 10, minimum=1)
    log_interval: int = _key("iterations between two lines of the log", 50, minimum=1)
    eval_interval: int = _key("epochs between two evaluations", 1, minimum=1)
    checkpoint_minutes: float = _key(
        "minutes between two checkpoints within an epoch; 0: only after epochs", 15.0, minimum=0
    )
    keep_last: int = _key("checkpoints of the last epochs to keep, as epoch-0001.pth and so on", 0, minimum=0)
    dist_timeout: float = _key(
        "seconds after which a process that does not answer has failed", 600.0, minimum=1, maximum=86_400
    )

    def __post_init__(self) -> None:
        """Fill in what the data set implies, so that `nclass`, `classes` and `palette` are always there."""
        known = CATALOG.get(self.dataset)
        classes = self.classes
        if classes is None and known is not None:
            classes = known.classes
        if classes is None and self.nclass is not None:
            classes = tuple(f"class {i}" for i in range(self.nclass))
        if classes is None:
            near = suggest(self.dataset, CATALOG)
            raise ConfigError(
                f"dataset {quoted(self.dataset)} is none of {', '.join(CATALOG)}{near}: list its `classes`"
            )
        palette = self.palette
        if palette is None:
            count = min(len(classes), 256)  # too many classes are refused later, with the key's name
            palette = known.palette if known and len(known.palette) == count else voc_palette(count)
        for name, value in (("classes", classes), ("palette", palette), ("nclass", self.nclass or len(classes))):
            object.__setattr__(self, name, value)


# Keys that change where, how fast or how finely rounded a run computes, not what: a run may resume with others.
NOT_SHAPING = (
    *("data_root", "classes", "palette", "device", "log_interval", "eval_interval"),
    *("workers", "prefetch", "persistent_workers", "pin_memory", "cache", "cache_gb", "cache_dir"),
    *("channels_last", "amp", "compile", "checkpoint_activations"),
    *("check_data", "max_image_pixels", "allow_outside_root"),
    *("checkpoint_minutes", "keep_last", "dist_timeout"),
    # These change what happens at a fault only: a run that one has stopped may go on with the other answer to it.
    *("on_bad_image", "bad_image_limit", "on_nonfinite", "nonfinite_limit"),
)


def load_config(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Read a YAML recipe, apply `overrides` (strings `key=value`, or a mapping) and validate.

    Raises ConfigError, whose one line names the file or override, the key and the way out.
    """
    return config_from(_read_yaml(resolve_path(path), str(path)), str(path), overrides)


def config_from(values: Mapping[str, Any], path: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """The config of these values, such as a checkpoint's; `path` says in errors where they are from.

    Raises ConfigError as `load_config` does.
    """
    values = dict(values)
    where = dict.fromkeys(values, path)
    for key, value, source in _parse_overrides(overrides):
        _assign(values, key, value, source)
        where[key.split(".")[0]] = source
    known = {f.name: f for f in fields(Config)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{where[key]}: unknown key {quoted(str(key))}{suggest(key, known)}")
    for key, spec in known.items():
        if key not in values and spec.default is MISSING:
            raise ConfigError(f"{path}: key '{key}' is missing ({spec.metadata['doc']})")
    hints = typing.get_type_hints(Config)
    converted = {}
    for key, value in values.items():
        try:
            converted[key] = _convert(value, hints[key], known[key].metadata)
        except ConfigError as error:
            raise ConfigError(f"{where[key]}: {key}: {error}") from None
    if "eval_mode" not in converted and converted["dataset"] in CATALOG:
        converted["eval_mode"] = CATALOG[converted["dataset"]].eval_mode
    try:
        cfg = Config(**converted)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    _check_rules(cfg, converted, lambda key: where.get(key, path))
    return cfg


def parse_label_map(text: str, source: str) -> dict[int, int] | None:
    """A `label_map` given as YAML text; raises ConfigError, which begins with `source`."""
    value = parse_yaml(text, source)
    try:
        return convert_label_map(value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def to_dict(cfg: Config) -> dict[str, Any]:
    """The config as plain lists, numbers and strings; `load_config` of its YAML gives the same config again."""
    plain = {key: value for key, value in asdict(cfg).items() if value is not None}
    if cfg.criterion.name != "OHEM":
        plain["criterion"] = cfg.criterion.name
    return plain_values(plain)


def differing_keys(saved: Mapping[str, Any], cfg: Config) -> list[str]:
    """`key: saved value -> value now` for each key that shapes training and differs from a checkpoint's config."""
    now = to_dict(cfg)
    keys = [key for key in sorted({*saved, *now}, key=str) if key not in NOT_SHAPING and saved.get(key) != now.get(key)]
    return [f"{str(key)[:60]}: {str(saved.get(key))[:200]} -> {now.get(key)}" for key in keys]


def resolve_path(path: str | Path) -> Path:
    """A relative path is meant from the current folder or, where nothing is there, from the project's root."""
    path = Path(os.path.expanduser(path))
    # os.path.exists, unlike Path.exists, is False for an impossible name; reading it then says what is wrong with it.
    return path if os.path.exists(path) or not os.path.exists(PROJECT_ROOT / path) else PROJECT_ROOT / path


def check_batch(cfg: Config, method: str, processes: int, labeled: int, unlabeled: int | None) -> None:
    """Refuse a batch that the data or BatchNorm cannot give. `unlabeled` is None for the supervised baseline."""
    per_step = cfg.batch_size * processes
    for kind, count in (("labelled", labeled), ("unlabelled", unlabeled)):
        if count is not None and count < per_step:
            raise ConfigError(
                f"{count} {kind} image{'s' * (count != 1)} cannot fill one batch of {per_step} "
                f"(batch_size {cfg.batch_size} x {processes} processes): lower batch_size or use fewer processes"
            )
    # The smallest BatchNorm group is that of one training forward: [x; w] and [s1; s2] have two images per sample,
    # FixMatch's [s] and the supervised [x] have one.
    group = per_step * (2 if method == "unimatch" else 1)
    if group < 2:
        raise ConfigError(
            f"batch_size {cfg.batch_size} on {processes} process gives {method} a BatchNorm group of {group} image: "
            "its variance needs 2 (the image-pooling branch has one value per image); raise batch_size or the processes"
        )


def _read_yaml(path: Path, shown: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such config file (the recipes are in configs/)") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown}: cannot be read: {one_line(error)}") from None
    values = parse_yaml(text, shown)
    if not isinstance(values, dict):
        raise ConfigError(f"{shown}: expected lines of `key: value`, found {quoted(values)}")
    return values


def _parse_overrides(overrides: Iterable[str] | Mapping[str, Any]) -> Iterable[tuple[str, Any, str]]:
    if isinstance(overrides, Mapping):
        yield from ((key, value, f"--set {key}={value}") for key, value in overrides.items())
        return
    for text in overrides:
        source = f"--set {text}" if len(text) <= MAX_YAML_TEXT else f"--set {text[:57]}..."
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{source}: expected key=value, such as --set epochs=20")
        yield key.strip(), parse_yaml(value, source), source


def _assign(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set `key`, or `key.inner` of a nested one (only the criterion has an inside)."""
    outer, dot, inner = key.partition(".")
    if not dot:
        values[outer] = value
        return
    if outer != "criterion":
        raise ConfigError(f"{source}: '{outer}' has no inner keys (only criterion.name, .thresh and .min_kept exist)")
    nested = values.get(outer) or {}
    if isinstance(nested, str):
        nested = {"name": nested}
    if not isinstance(nested, dict):
        raise ConfigError(f"{source}: '{outer}' is {quoted(nested)} in the config file, which has no inner keys")
    nested = without_kwargs(nested)  # an override means the same number wherever it stands
    if inner == "name" and value != "OHEM":
        nested = {}
    values[outer] = {**nested, inner.removeprefix("kwargs."): value}


def _check_rules(cfg: Config, given: Mapping[str, Any], where: typing.Callable[[str], str]) -> None:
    """Rules over names and over several keys."""

    def fail(key: str, message: str) -> None:
        raise ConfigError(f"{where(key)}: {key}: {message}")

    if not re.fullmatch(r"[\w.-]+", cfg.dataset):
        fail("dataset", f"{quoted(cfg.dataset)} may have letters, digits, '_', '-' and '.' only: it names a folder")
    if cfg.backbone not in BACKBONES:
        fail(
            "backbone",
            f"unknown backbone {quoted(cfg.backbone)}{suggest(cfg.backbone, BACKBONES)}; "
            f"there are {', '.join(BACKBONES)}",
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
    for value, index in (cfg.label_map or {}).items():
        if cfg.nclass <= index != 255:
            fail("label_map", f"{value}: {index}: classes are 0..{cfg.nclass - 1}, and 255 for ignored pixels")
    if len(cfg.palette) != cfg.nclass:
        fail("palette", f"{len(cfg.palette)} colours for {cfg.nclass} classes")
    if any(not 0 <= value <= 255 for colour in cfg.palette for value in colour):
        fail("palette", "colours are [red, green, blue] with values from 0 to 255")
