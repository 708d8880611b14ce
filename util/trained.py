"""A trained model as the tools use it: the checkpoint's own config, compared with the one given, and its weights."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import build_model, choose_network, load_checkpoint_state, read_checkpoint
from util.backends import set_backends
from util.cli import add_common_arguments
from util.config import Config, config_from, load_config, resolve_path
from util.errors import ConfigError
from util.palette import colorblind_palette
from util.precision import check_precision, evaluation_copy, set_precision

# With other values of these keys than in training, the same weights give other logits, if they fit at all.
MODEL_KEYS = (
    "model",
    "backbone",
    "nclass",
    "channels",
    "rgb_channels",
    "value_range",
    "dilations",
    "replace_stride_with_dilation",
    "mean",
    "std",
)
# Other keys that a tool's result depends on. A line says where their value is not the one of training.
RESULT_KEYS = ("eval_mode", "crop_size", "label_map", "label_colors")
# Of the machine that trained. A checkpoint's config is used without them.
MACHINE_KEYS = ("device", "workers", "prefetch", "persistent_workers", "pin_memory", "compile", "cuda_graphs")
MACHINE_KEYS += ("cache", "cache_gb", "cache_dir")


@dataclass(frozen=True)
class Trained:
    """A checkpoint that was read, and the config to use it with; `notes` are lines for the user."""

    path: Path
    cfg: Config
    checkpoint: Any
    weights: str
    notes: tuple[str, ...]

    def on(self, device: torch.device, args: argparse.Namespace) -> Trained:
        """The same for `device`: float32 where it cannot compute in fp16, unless `--set` asks for that.

        Raises ConfigError where the device or this machine cannot compute as the config says.
        """
        # An evaluation compiles nothing and records no CUDA graph.
        cfg, notes = replace(self.cfg, compile=False, cuda_graphs=False), self.notes
        if cfg.amp == "fp16" and device.type != "cuda" and "amp" not in _asked(args):
            cfg = replace(cfg, amp="none")
            notes += ("note: amp: fp16 needs a GPU: computed in float32 (amp: none) here",)
        check_precision(cfg, device)
        return replace(self, cfg=cfg, notes=notes)

    def build(self) -> nn.Module:
        """The network with the checkpoint's weights, on the CPU. Raises WeightsError if they are of another one."""
        model = build_model(self.cfg, pretrained=False)
        load_checkpoint_state(model, self.checkpoint, self.path, "teacher" if self.weights == "teacher" else "student")
        return model

    def ready(self, model: nn.Module, device: torch.device) -> nn.Module:
        """That network on `device` in eval mode, not to be trained on, and PyTorch set to compute as in training."""
        set_backends(self.cfg, device, training=False)
        return evaluation_copy(set_precision(model.to(device), self.cfg))

    def sha256(self) -> str:
        """Of the checkpoint file, in hexadecimal digits."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """What distinguishes this model and how it computes from others, as plain values."""
        rounding = {key: getattr(self.cfg, key) for key in ("amp", "channels_last")}
        if self.cfg.tf32 is not None:
            rounding["tf32"] = self.cfg.tf32
        shape = {key: getattr(self.cfg, key) for key in MODEL_KEYS if hasattr(self.cfg, key)}
        return {"checkpoint": self.sha256(), "weights": self.weights, **rounding, **shape}

    def files(self, args: argparse.Namespace) -> list[tuple[str, Path]]:
        """What was read to get here, as `(kind, path)`, none of which a tool may write over."""
        files = [("checkpoint", self.path)]
        if args.config is not None:
            files.append(("config", resolve_path(args.config)))
        listed = (("validation list", self.cfg.val_id_path), ("unlabelled list", self.cfg.unlabeled_id_path))
        return files + [(kind, resolve_path(path)) for kind, path in listed if path]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the tools that use a trained model."""
    add_common_arguments(parser, config_required=False)
    parser.add_argument(
        "--checkpoint", required=True, metavar="F", help="best.pth, latest.pth or a published checkpoint"
    )
    parser.add_argument(
        "--weights",
        choices=("teacher", "student"),
        help="of a checkpoint that has both: the averaged network (default) or the trained one",
    )


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of test-time augmentation."""
    parser.add_argument(
        "--scales",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="S",
        help="see each image at these scales, such as 0.5 1.0 1.5, and average the probabilities",
    )
    parser.add_argument("--flip", action="store_true", help="see each image mirrored too")


def add_colors_argument(parser: argparse.ArgumentParser) -> None:
    """Argument of the tools that draw classes; see `chosen_palette`."""
    parser.add_argument(
        "--colors",
        choices=("dataset", "colorblind"),
        default="dataset",
        help="the data set's palette, or colours that people with any colour vision can tell apart",
    )


def chosen_palette(cfg: Config, colors: str) -> Sequence[tuple[int, int, int]]:
    """The colour of each class, as `--colors` says."""
    return cfg.palette if colors == "dataset" else colorblind_palette(cfg.nclass)


def check_view_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for scales that are none."""
    for scale in args.scales:
        if not 0.05 <= scale <= 8:
            raise ConfigError(f"--scales {scale:g}: must be from 0.05 to 8")
    if len(set(args.scales)) < len(args.scales):
        raise ConfigError(f"--scales {' '.join(f'{scale:g}' for scale in args.scales)}: one is there twice")


def open_trained(args: argparse.Namespace) -> Trained:
    """Read the checkpoint and the config: that of the command line, or else the checkpoint's own.

    Raises ConfigError for a config whose model is not the checkpoint's, WeightsError for an unreadable file.
    """
    path = resolve_path(args.checkpoint)
    checkpoint = read_checkpoint(path)
    saved = checkpoint.get("config") if isinstance(checkpoint, Mapping) else None
    saved = saved if isinstance(saved, Mapping) else None
    own, notes = None, []
    if saved is not None:
        portable = {key: value for key, value in saved.items() if key not in MACHINE_KEYS}
        try:
            own = config_from(portable, f"{args.checkpoint} (its config)")
        except ConfigError as error:
            if args.config is None:
                raise ConfigError(f"{error}; or give another with --config F") from None
            notes.append(f"warning: {error}: not compared with {args.config}")
    if args.config is not None:
        cfg = load_config(args.config, args.overrides)
    elif saved is None:
        raise ConfigError(
            f"{args.checkpoint}: carries no config, as published checkpoints do: give one with --config F"
        )
    else:
        cfg = config_from(portable, f"{args.checkpoint} (its config)", args.overrides)
    if own is not None:
        notes += _compare(own, cfg, args)
    cfg.normalization  # noqa: B018  raises where channels have no mean
    weights = _choose_weights(checkpoint, args)
    if weights == "teacher" and args.weights is None:
        notes.append("note: of the two networks in the checkpoint, the teacher is used (--weights student: the other)")
    return Trained(path, cfg, checkpoint, weights, tuple(notes))


def _compare(own: Config, cfg: Config, args: argparse.Namespace) -> list[str]:
    """Notes on what differs from the checkpoint's config.

    A difference that changes the model is refused in a config file, where it is a mistake, and warned of where `--set`
    asks for it.
    """
    asked, notes = _asked(args), []
    for key in MODEL_KEYS:
        before, now = getattr(own, key, None), getattr(cfg, key, None)
        if before == now:
            continue
        line = f"{key} is {_shown(now)}, the model of {args.checkpoint} was trained with {_shown(before)}"
        if key not in asked:
            raise ConfigError(f"{args.config}: {line}: set it so, or leave --config out and the checkpoint's is used")
        notes.append(f"warning: --set: {line}")
    if own.nclass == cfg.nclass and own.classes != cfg.classes:
        index = next(i for i in range(own.nclass) if own.classes[i] != cfg.classes[i])
        line = (
            f"classes differ from those of {args.checkpoint}: class {index} is {cfg.classes[index]!r} here and was "
            f"{own.classes[index]!r} in training"
        )
        if sorted(own.classes) == sorted(cfg.classes) and "classes" not in asked:
            raise ConfigError(f"{args.config}: {line}; the names are the same in another order: put them back")
        notes.append(f"warning: {line}")
    for key in RESULT_KEYS:
        before, now = getattr(own, key), getattr(cfg, key)
        if before != now:
            notes.append(f"note: {key} is {_shown(now)}, in training it was {_shown(before)}")
    return notes


def _asked(args: argparse.Namespace) -> set[str]:
    """The keys that `--set` names."""
    return {text.partition("=")[0].strip().split(".")[0] for text in args.overrides}


def _choose_weights(checkpoint: Any, args: argparse.Namespace) -> str:
    """Which network is used: the `model`, where there is one without a teacher, else the `teacher` or `student`."""
    wanted = args.weights or "teacher"
    found = choose_network(checkpoint, wanted)
    if args.weights and found != args.weights:
        raise ConfigError(f"{args.checkpoint}: has no weights of a {args.weights}: leave --weights out")
    return found if choose_network(checkpoint, "teacher") == "teacher" else "model"


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
