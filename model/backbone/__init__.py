"""Backbones: convolutional ones for DeepLabV3+ and DINOv2's for DPT.

A convolutional one's `forward(x)` gives two feature maps, c1 at stride 4 and c4 at the output stride, their widths
being `c1_channels` and `c4_channels`; DINOv2's gives the tokens after four blocks, `width` channels each. With
`checkpoint_activations` set, a block keeps its input only and is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from model.backbone.dinov2 import dinov2_base, dinov2_giant, dinov2_large, dinov2_small
from model.backbone.resnet import resnet10, resnet18, resnet50, resnet101
from model.backbone.xception import xception65


def _torchvision_resnet(name: str) -> Callable[[tuple[bool, ...]], nn.Module]:
    """One of model/backbone/resnet_tv.py. torchvision is imported when it is built: its import takes seconds."""

    def build(replace_stride_with_dilation: tuple[bool, ...]) -> nn.Module:
        from model.backbone import resnet_tv

        return getattr(resnet_tv, name)(replace_stride_with_dilation)

    return build


BACKBONES = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "xception": xception65,
    "resnet50_tv": _torchvision_resnet("resnet50_tv"),
    "resnet101_tv": _torchvision_resnet("resnet101_tv"),
    "resnet10": resnet10,
}
DINOV2_BACKBONES = {
    "dinov2_small": dinov2_small,
    "dinov2_base": dinov2_base,
    "dinov2_large": dinov2_large,
    "dinov2_giant": dinov2_giant,
}


def create_backbone(name: str, replace_stride_with_dilation: Sequence[bool] = (False, False, True)) -> nn.Module:
    """The backbone of that name, freshly initialised; DINOv2's have no stride to replace.

    Raises ValueError for an unknown name or an output stride that the backbone does not have.
    """
    if name in DINOV2_BACKBONES:
        return DINOV2_BACKBONES[name]()
    if name not in BACKBONES:
        names = ", ".join([*BACKBONES, *DINOV2_BACKBONES])
        raise ValueError(f"backbone: unknown name '{name}', choose one of {names}")
    if len(replace_stride_with_dilation) != 3:
        raise ValueError(f"replace_stride_with_dilation: three booleans needed, got {replace_stride_with_dilation}")
    return BACKBONES[name](tuple(bool(dilate) for dilate in replace_stride_with_dilation))
