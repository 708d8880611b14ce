"""Loading weights: pretrained backbones and checkpoints of whole models, with errors a user can act on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.backbone import BACKBONES, DINOV2_BACKBONES, create_backbone
from model.backbone.dinov2 import PATCH
from model.state_dict import (
    Network,
    WeightsError,
    choose_network,
    differences,
    find_state_dict,
    part_of,
    read_checkpoint,
)

PROJECT_ROOT = Path(__file__).resolve().parents[1]
# What each backbone's published weights are called, by the paper's authors, by torchvision or by Meta.
PUBLISHED = {
    "resnet50": "ImageNet weights of resnet50",
    "resnet101": "ImageNet weights of resnet101",
    "xception": "ImageNet weights of xception",
    "resnet50_tv": "ImageNet weights of resnet50_tv",
    "resnet101_tv": "ImageNet weights of resnet101_tv",
    "dinov2_small": "DINOv2's dinov2_vits14_pretrain.pth",
    "dinov2_base": "DINOv2's dinov2_vitb14_pretrain.pth",
    "dinov2_large": "DINOv2's dinov2_vitl14_pretrain.pth",
    "dinov2_giant": "DINOv2's dinov2_vitg14_pretrain.pth",
}
# Whose shape says how many classes a model has: DeepLabV3+'s and DPT's last bias.
CLASSIFIERS = ("classifier.bias", "head.scratch.output_conv.2.bias")


def load_pretrained(backbone: nn.Module, name: str, path: str | Path | None = None) -> None:
    """Load pretrained weights into `backbone`, in place; arguments and errors are those of `read_pretrained`."""
    backbone.load_state_dict(read_pretrained(backbone, name, path), strict=False)  # the reading is stricter


def read_pretrained(backbone: nn.Module, name: str, path: str | Path | None = None) -> dict[str, Tensor]:
    """Pretrained weights that fit `backbone`, which is of kind `name`; nothing is loaded into it.

    `path`: a weights file, which `resolve_path` finds; None stands for `pretrained/NAME.pth` of the project. A state
    dict is expected, bare or under `state_dict` or `model`. Its classifier (`fc.*`) is left out, and for Xception every
    name with `itr`, `tmp` or `track` in it. Anything else missing or unexpected is a WeightsError.
    """
    path = PROJECT_ROOT / "pretrained" / f"{name}.pth" if path is None else resolve_path(path)
    try:
        return pretrained_state(backbone, name, read_checkpoint(path), path)
    except WeightsError as error:
        stem = f" with {_stem(name)}" if name.startswith("resnet") else ""
        expected = PUBLISHED.get(name, f"ImageNet weights of {name}")
        where = "see pretrained/README.md for where to get them" if name in PUBLISHED else "none are published"
        raise WeightsError(f"{error}; expected {expected}{stem}: {where}, or set `pretrained: false`") from None


def pretrained_state(backbone: nn.Module, name: str, checkpoint: Any, source: str | Path) -> dict[str, Tensor]:
    """What `read_pretrained` gives and raises for a file of this content; `source` names it in errors."""
    state = find_state_dict(checkpoint, source)
    ignored = ("itr", "tmp", "track") if name == "xception" else ()
    state = {k: v for k, v in state.items() if not k.startswith("fc.") and not any(part in k for part in ignored)}
    if fault := differences(backbone.state_dict(), state):
        raise WeightsError(f"{source}: {_wrong_weights(name, state) or fault}")
    return state


def _wrong_weights(name: str, state: Mapping[str, Tensor]) -> str | None:
    """What kind of weights these are, which do not fit the backbone `name`; None if it cannot be told."""
    found, stem = _identify(state), state.get("conv1.weight")
    if found and found != name:
        fault = f"weights of {found}"
        if "resnet" in found and "resnet" in name and _stem(found) != _stem(name):
            fault += f", a ResNet with another stem, {_stem(found)}: set `backbone: {found}` to use them"
        return fault
    if name in ("resnet18", "resnet50", "resnet101") and stem is not None and stem.shape[-1:] == (7,):
        return f"a ResNet with another stem, {_stem('resnet50_tv')} as torchvision's"
    if name in DINOV2_BACKBONES:
        if part_of(state, "backbone."):
            return "a checkpoint of a whole segmentation model"
        if vit := _foreign_vit(state):
            return f"weights of {vit}"
        if "blocks.0.ls1.gamma" in state and "mask_token" not in state:
            return f"weights in timm's form: convert them with `python -m scripts.convert_backbone {name} --from FILE`"
    return None


def load_checkpoint_state(
    model: nn.Module, checkpoint: Any, source: str | Path, prefer: Network = "student"
) -> Network:
    """Load a segmentation checkpoint into `model` in place, published ones too; gives the network that was taken.

    A state dict is expected, bare or under `model`; of a checkpoint that has a teacher as well, `prefer` says which of
    both is taken. What DDP, torch.compile or Lightning put before the names is dropped. Every name and shape must
    agree, else the model stays as it is and a WeightsError says, after `source` (the file), what differs.
    """
    state, own = find_state_dict(checkpoint, source, prefer), model.state_dict()
    if fault := differences(own, state):
        backbone, own_backbone = part_of(state, "backbone."), part_of(own, "backbone.")
        found, expected = _identify(backbone) or _foreign_vit(backbone), _identify(own_backbone)
        classes, own_classes = _class_count(state), _class_count(own)
        if found and expected and found != expected:
            raise WeightsError(f"{source}: its backbone is {found}, the config's is {expected}")
        if classes and own_classes and classes != own_classes:
            raise WeightsError(f"{source}: its classifier has {classes} classes, the config has {own_classes}")
        raise WeightsError(f"{source}: not a checkpoint of this model: {fault}")
    model.load_state_dict(state, strict=False)  # differences() is stricter
    return choose_network(checkpoint, prefer)


def resolve_path(path: str | Path) -> Path:
    """A relative path is meant from the current folder or, where nothing is there, from the project's root."""
    path = Path(os.path.expanduser(path))  # Path.expanduser fails where there is no home folder
    # os.path.exists, unlike Path.exists, is False for an impossible name; reading it then says what is wrong with it.
    return path if os.path.exists(path) or not os.path.exists(PROJECT_ROOT / path) else PROJECT_ROOT / path


def _stem(name: str) -> str:
    """The stem of a ResNet, and a weight's name that shows it."""
    if name.endswith("_tv"):
        return "one 7x7 convolution (conv1.weight)"
    return "a deep stem of three 3x3 convolutions (conv1.0.weight)"


def _class_count(state: Mapping[str, Tensor]) -> int | None:
    return next((state[name].numel() for name in CLASSIFIERS if name in state), None)


def _identify(state: Mapping[str, Tensor]) -> str | None:
    """The backbone whose names and shapes these are, if any."""
    names = DINOV2_BACKBONES if "patch_embed.proj.weight" in state else BACKBONES
    with torch.device("meta"):  # shapes without memory
        return next((name for name in names if not differences(create_backbone(name).state_dict(), state)), None)


def _foreign_vit(state: Mapping[str, Tensor]) -> str | None:
    """What kind of network this is, of those that may be taken for DINOv2 without registers; None for no such."""
    last_parts = {name.rpartition(".")[2] for name in state}
    embeds = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    patch = next((state[name].shape[-1] for name in embeds if name in state and state[name].ndim == 4), None)
    if "storage_tokens" in last_parts or any(name.startswith("rope_embed.") for name in state):
        return "DINOv3, not DINOv2"
    if last_parts & {"register_tokens", "reg_token"}:
        has_positions = last_parts & {"pos_embed", "position_embeddings"}
        return "DINOv2 with register tokens" if has_positions else "DINOv3, not DINOv2"
    if any(name.startswith("downsample_layers.") for name in state):
        return "a ConvNeXt, as DINOv3 has"
    if patch is not None and patch != PATCH:
        return f"a vision transformer with patches of {patch} x {patch} pixels, not {PATCH} x {PATCH}"
    if "embeddings.cls_token" in state:
        return "a vision transformer under Hugging Face's names, not Meta's"
    return None
