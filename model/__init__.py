"""DeepLabV3+ for semantic segmentation: ResNet and Xception-65 backbones, ImageNet weights, published checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from model.backbone import BACKBONES, create_backbone
from model.semseg.deeplabv3plus import DeepLabV3Plus
from model.weights import (
    WeightsError,
    load_checkpoint_state,
    load_pretrained,
    read_checkpoint,
    read_pretrained,
)

__all__ = [
    "BACKBONES",
    "DeepLabV3Plus",
    "WeightsError",
    "build_model",
    "check_pretrained",
    "load_checkpoint_state",
    "read_checkpoint",
]


def build_model(cfg: Any, pretrained: bool = True) -> DeepLabV3Plus:
    """DeepLabV3+ as the config says, its backbone loaded with ImageNet weights.

    Reads `cfg.backbone`, `cfg.nclass`, `cfg.dilations`, `cfg.replace_stride_with_dilation`,
    `cfg.checkpoint_activations` (if there is one) and `cfg.pretrained`:
    True stands for `pretrained/BACKBONE.pth`, a text for the path of a weights file, False for no weights.
    `pretrained=False` loads none whatever the config says, as suits a model whose checkpoint is loaded next.

    Raises WeightsError (one line: file, what was expected, where to get it), and ValueError for an unknown backbone
    or an output stride that the backbone does not have.
    """
    model = DeepLabV3Plus(
        create_backbone(cfg.backbone, cfg.replace_stride_with_dilation),
        nclass=cfg.nclass,
        dilations=cfg.dilations,
        checkpoint_activations=getattr(cfg, "checkpoint_activations", "none"),
    )
    if pretrained and cfg.pretrained:
        load_pretrained(model.backbone, cfg.backbone, _weights_file(cfg))
    return model


def check_pretrained(cfg: Any) -> None:
    """Raise the WeightsError that `build_model(cfg)` would raise, without memory for a model."""
    if cfg.pretrained:
        with torch.device("meta"):
            backbone = create_backbone(cfg.backbone, cfg.replace_stride_with_dilation)
        read_pretrained(backbone, cfg.backbone, _weights_file(cfg))


def _weights_file(cfg: Any) -> str | None:
    return None if cfg.pretrained is True else cfg.pretrained
