"""Segmentation networks: DeepLabV3+ on ResNet or Xception-65, DPT on DINOv2; pretrained weights and checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.backbone import BACKBONES, DINOV2_BACKBONES, create_backbone
from model.input_channels import inflate_input
from model.semseg.complementary import complementary_dropout
from model.semseg.deeplabv3plus import DeepLabV3Plus
from model.semseg.dpt import DPT, HEAD_WIDTHS
from model.state_dict import WeightsError, choose_network, find_state_dict, read_checkpoint
from model.weights import load_checkpoint_state, load_pretrained, read_pretrained

# The backbones that each model can have, and what an image's sides must be multiples of.
MODELS = {"deeplabv3plus": tuple(BACKBONES), "dpt": tuple(DINOV2_BACKBONES)}
SIZE_MULTIPLES = {"deeplabv3plus": DeepLabV3Plus.size_multiple, "dpt": DPT.size_multiple}

__all__ = [
    "BACKBONES",
    "DINOV2_BACKBONES",
    "DPT",
    "MODELS",
    "SIZE_MULTIPLES",
    "DeepLabV3Plus",
    "WeightsError",
    "build_model",
    "check_pretrained",
    "choose_network",
    "complementary_dropout",
    "find_state_dict",
    "load_checkpoint_state",
    "read_checkpoint",
]


def build_model(cfg: Any, pretrained: bool = True) -> nn.Module:
    """The network as the config says, its backbone loaded with pretrained weights.

    Reads `cfg.backbone`, `cfg.nclass`, `cfg.replace_stride_with_dilation` and `cfg.dilations` (DeepLabV3+), and
    `cfg.pretrained`: True stands for `pretrained/BACKBONE.pth`, a text for the path of a weights file, False for none.
    Where there are such keys, also `cfg.model` ("deeplabv3plus" by default, or "dpt"), `cfg.checkpoint_activations`,
    `cfg.lock_backbone`: whether the backbone's parameters need no gradient, and `cfg.channels` with `cfg.rgb_channels`:
    the first convolution is inflated from that of three channels, whose weights are loaded first.
    `pretrained=False` loads no weights whatever the config says, as suits a model whose checkpoint is loaded next.

    Raises WeightsError (one line: file, what was expected, where to get it), and ValueError for an unknown model, a
    backbone that the model cannot have, or an output stride that the backbone does not have.
    """
    backbone = _create_backbone(cfg)
    again = getattr(cfg, "checkpoint_activations", "none")
    if _name(cfg) == "dpt":
        model = DPT(backbone, cfg.nclass, *HEAD_WIDTHS[cfg.backbone], checkpoint_activations=again)
    else:
        model = DeepLabV3Plus(backbone, cfg.nclass, cfg.dilations, checkpoint_activations=again)
    if pretrained and cfg.pretrained:
        load_pretrained(model.backbone, cfg.backbone, _weights_file(cfg))
    channels, rgb = getattr(cfg, "channels", 3), tuple(getattr(cfg, "rgb_channels", (0, 1, 2)))
    if (channels, rgb) != (3, (0, 1, 2)):
        inflate_input(model.backbone, channels, rgb)
    if getattr(cfg, "lock_backbone", False):
        model.backbone.requires_grad_(False)
    return model


def check_pretrained(cfg: Any) -> None:
    """Raise the WeightsError that `build_model(cfg)` would raise, without memory for a model."""
    if cfg.pretrained:
        with torch.device("meta"):
            backbone = _create_backbone(cfg)
        read_pretrained(backbone, cfg.backbone, _weights_file(cfg))


def _name(cfg: Any) -> str:
    return getattr(cfg, "model", "deeplabv3plus")


def _create_backbone(cfg: Any) -> nn.Module:
    if _name(cfg) not in MODELS:
        raise ValueError(f"model: unknown name '{_name(cfg)}', choose one of {', '.join(MODELS)}")
    other = next(name for name in MODELS if name != _name(cfg))
    if cfg.backbone in MODELS[other]:
        raise ValueError(
            f"backbone: {cfg.backbone} is for model {other}; {_name(cfg)} has {', '.join(MODELS[_name(cfg)])}"
        )
    return create_backbone(cfg.backbone, getattr(cfg, "replace_stride_with_dilation", (False, False, True)))


def _weights_file(cfg: Any) -> str | None:
    return None if cfg.pretrained is True else cfg.pretrained
