"""Convert weights of timm or torchvision into the file that training reads, pretrained/NAME.pth.

    python -m scripts.convert_backbone dinov2_small --from timm
    python -m scripts.convert_backbone resnet101 --from timm
    python -m scripts.convert_backbone resnet50_tv --from resnet50-0676ba61.pth

DINOv2 (timm's vit_{small,base,large,giant}_patch14_dinov2.lvd142m) is the same network: timm leaves out mask_token,
which is never used, and has other names for the giant's gated MLP. Features are equal.

ResNets (timm's resnet50s.gluon_in1k and resnet101s.gluon_in1k; torchvision's for resnet50_tv and resnet101_tv) are the
same networks under the same names: only the classifier is left out, and the features are equal.

Xception (timm's xception65.tf_in1k) is renamed, and two differences are folded into the weights, so that c1 is equal
for the same picture:

- timm's BatchNorm has eps 1e-3, ours 1e-5: its weight is scaled by sqrt((var + 1e-5) / (var + 1e-3)), which also
  suits fine-tuning, where the batch's variance is near the running one.
- timm's images have mean and std 0.5, ours ImageNet's: conv1's weight and bn1's running mean are changed accordingly.
  At the image's border the zero padding then stands for ImageNet's mean colour instead of mid-grey.

c4 differs from timm's, as no weights can express what remains; see `XCEPTION_DIFFERENCES`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset.transform import IMAGENET_MEAN, IMAGENET_STD
from model import DINOV2_BACKBONES, WeightsError, find_state_dict, read_checkpoint
from model.backbone import create_backbone
from model.weights import PROJECT_ROOT, pretrained_state, read_pretrained
from util.checkpoint import save_checkpoint
from util.cli import run_main
from util.config import resolve_path
from util.outputs import check_suffix, identity

TIMM_MODELS = {
    "resnet50": "resnet50s.gluon_in1k",
    "resnet101": "resnet101s.gluon_in1k",
    "xception": "xception65.tf_in1k",
    "resnet50_tv": "resnet50.tv_in1k",
    "resnet101_tv": "resnet101.tv_in1k",
    "dinov2_small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_base": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_large": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_giant": "vit_giant_patch14_dinov2.lvd142m",
}
XCEPTION_DIFFERENCES = (
    "in blocks 4 to 19, this network's identity shortcut carries the input after its ReLU; timm's, before it",
    "block 20 has stride 1 here (output stride 16); timm's has 2 (output stride 32) by default",
    "conv3, conv4 and conv5 have dilation 1 here; timm's have 2 at output stride 16",
)
TIMM_EPS, OWN_EPS = 1e-3, 1e-5
TIMM_MEAN = TIMM_STD = 0.5
INSTALL = "pip install -r requirements-convert.txt"


def read_source(source: str, name: str) -> dict[str, Tensor]:
    """The state dict of a `.pth` or `.safetensors` file, or, for the source "timm", what timm downloads.

    Raises WeightsError if it cannot be had, an optional package that is missing included.
    """
    if source == "timm":
        return _download(TIMM_MODELS[name])
    path = resolve_path(source)
    return _read_safetensors(path) if path.suffix == ".safetensors" else find_state_dict(read_checkpoint(path), path)


def convert(name: str, weights: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """State dict for the backbone `name`, and the names that were left out of `weights`.

    `weights` may have this project's names already, as the published files do; then nothing is changed.
    Raises WeightsError, after `source`, unless names and shapes are those of the backbone.
    """
    if name in DINOV2_BACKBONES:
        weights = dinov2_from_timm(weights)
    from_timm = name == "xception" and "stem.0.conv.weight" in weights
    names = {(xception_name(old) if from_timm else old): old for old in weights}
    with torch.device("meta"):
        backbone = create_backbone(name)
    try:
        state = pretrained_state(backbone, name, {new: weights[old] for new, old in names.items()}, source)
    except WeightsError as error:
        raise WeightsError(f"{error}; expected weights such as timm's {TIMM_MODELS[name]}") from None
    left_out = [old for new, old in names.items() if new not in state]
    return fold_xception(state) if from_timm else state, left_out


def dinov2_from_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of timm's DINOv2 under Meta's names; those that have Meta's names stay as they are."""
    cls_token = weights.get("cls_token")
    if "mask_token" in weights or cls_token is None or cls_token.ndim == 0:
        return dict(weights)
    width = cls_token.shape[-1]
    renamed = {}
    for name, tensor in weights.items():
        if width == 1536:  # the giant, whose MLP alone is gated; timm's puts the gate first, as Meta's does
            name = re.sub(r"^(blocks\.\d+\.mlp)\.fc1\.", r"\1.w12.", name)
            name = re.sub(r"^(blocks\.\d+\.mlp)\.fc2\.", r"\1.w3.", name)
        renamed[name] = tensor
    return renamed | {"mask_token": cls_token.new_zeros(1, width)}


def xception_name(name: str) -> str:
    """This project's name for a name in timm's Xception-65."""
    for pattern, replacement in (
        (r"head\.fc\.", "fc."),
        (r"stem\.([01])\.(conv|bn)\.", lambda m: f"{m[2]}{int(m[1]) + 1}."),
        (r"blocks\.20\.stack\.conv([123])\.", lambda m: f"conv{int(m[1]) + 2}."),
        (r"blocks\.(\d+)\.", lambda m: f"block{int(m[1]) + 1}."),
        (r"(block\d+)\.stack\.conv([123])\.", r"\1.sepconv\2."),
        (r"(block\d+)\.shortcut\.conv\.", r"\1.skip."),
        (r"(block\d+)\.shortcut\.bn\.", r"\1.skipbn."),
    ):
        name = re.sub("^" + pattern, replacement, name)
    for old, new in (("conv_dw", "depthwise"), ("bn_dw", "bn1"), ("conv_pw", "pointwise"), ("bn_pw", "bn2")):
        name = name.replace(f".{old}.", f".{new}.")
    return name


def fold_xception(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The renamed state dict with timm's eps and image normalisation folded into it (module docstring)."""
    folded = dict(state)
    for key, var in state.items():
        if key.endswith(".running_var"):
            key = key.removesuffix("running_var") + "weight"
            var = var.double()
            folded[key] = (state[key].double() * ((var + OWN_EPS) / (var + TIMM_EPS)).sqrt()).to(state[key].dtype)
    # timm's pixel is ours * scale + shift; zero padding apart, the shift adds a constant to each output channel.
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    weight, running_mean = state["conv1.weight"], state["bn1.running_mean"]
    added = (weight.double() * (mean - TIMM_MEAN) / TIMM_STD).sum((1, 2, 3))
    folded["conv1.weight"] = (weight.double() * std / TIMM_STD).to(weight.dtype)
    folded["bn1.running_mean"] = (running_mean.double() - added).to(running_mean.dtype)
    return folded


def _download(model: str) -> dict[str, Tensor]:
    try:
        import timm
    except ImportError as error:
        raise WeightsError(f"--from timm: timm cannot be imported ({error}): {INSTALL}") from None
    try:
        network: nn.Module = timm.create_model(model, pretrained=True)
    except Exception as error:  # of timm, its hub client, the network or the disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            f"--from timm: {model} cannot be downloaded ({reason}); get its file elsewhere and give --from FILE"
        ) from None
    return network.state_dict()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(f"{path}: safetensors cannot be imported ({error}): {INSTALL}") from None
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        return find_state_dict(load_file(path), path)
    except WeightsError:
        raise
    except Exception as error:  # a bad file raises whatever its parser meets
        raise WeightsError(f"{path}: not a safetensors file, or an incomplete one ({type(error).__name__})") from None


def shown(names: Sequence[str]) -> str:
    """All names, training counters summed up."""
    counters = [name for name in names if name.endswith("num_batches_tracked")]
    shown = [name for name in names if name not in set(counters)]
    return ", ".join(shown + ([f"{len(counters)} x num_batches_tracked"] if counters else [])) or "nothing"


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.convert_backbone", description=__doc__.split("\n", 1)[0])
    parser.add_argument("name", choices=TIMM_MODELS, metavar="NAME", help=f"one of {', '.join(TIMM_MODELS)}")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="FILE|timm", help=".pth or .safetensors file; timm downloads"
    )
    parser.add_argument("--output", metavar="F", help="default: pretrained/NAME.pth of the project")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    args = parser.parse_args(argv)

    default = PROJECT_ROOT / "pretrained" / f"{args.name}.pth"
    output = Path(os.path.expanduser(args.output)) if args.output else default
    check_suffix("--output", output, (".pth", ".pt"))
    if args.source != "timm" and (found := identity(resolve_path(args.source))) and found == identity(output):
        raise WeightsError(f"{output}: is the file {args.source} that is converted; --output writes elsewhere")
    if output.exists() and not args.force:
        raise WeightsError(f"{output}: exists already; --force overwrites it, --output writes elsewhere")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{output}: its folder cannot be made ({error.strerror})") from None
    source = f"timm's {TIMM_MODELS[args.name]}" if args.source == "timm" else args.source
    weights = read_source(args.source, args.name)
    state, left_out = convert(args.name, weights, source)
    # A clone: torch.save would write the whole storage that a tensor is a part of.
    save_checkpoint({key: tensor.clone() for key, tensor in state.items()}, output)
    with torch.device("meta"):
        backbone = create_backbone(args.name)
    read_pretrained(backbone, args.name, output.absolute())

    print(f"{output}: {len(state)} tensors from {source}")
    print(f"left out: {shown(left_out)}")
    print(f"SHA-256: {hashlib.sha256(output.read_bytes()).hexdigest()}")
    if "stem.0.conv.weight" in weights:
        print("c1 equals timm's but near the border (BatchNorm eps and normalisation are folded in). c4 differs:")
        print("\n".join(f"- {difference}" for difference in XCEPTION_DIFFERENCES))
        print("Training has to make up for that: how well it does was not measured.")


if __name__ == "__main__":
    run_main(main)
