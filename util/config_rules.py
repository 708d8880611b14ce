"""Rules of the configuration over names, over several keys, and over the data that a run has."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from model import BACKBONES
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
