"""How a model computes: 16-bit autocast, memory format, compilation. All off is the default and the published way."""

from __future__ import annotations

import copy
import getpass
import os
import shutil
import tempfile

import torch
from torch import nn

from dataset.handover import check_temporary_folder
from model import DeepLabV3Plus
from util.config_schema import Config
from util.errors import ConfigError

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(cfg: Config, device: torch.device, processes: int = 1) -> None:
    """Raise ConfigError where `device`, this machine or so many `processes` cannot compute as the config says."""
    if cfg.amp == "fp16" and device.type != "cuda":
        raise ConfigError(f"amp: fp16 needs a GPU, and this run is on {device.type}: use bf16 or none")
    if cfg.cuda_graphs and device.type != "cuda":
        raise ConfigError(f"cuda_graphs: true needs a GPU, and this run is on {device.type}: leave it out")
    if cfg.cuda_graphs and processes > 1:
        raise ConfigError(
            f"cuda_graphs: true is for one process, and this run has {processes}, which wait for one another within a "
            "step: leave it out"
        )
    if cfg.compile:
        check_temporary_folder()
    if cfg.compile and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise ConfigError(
            "compile: true needs a C++ compiler, and neither $CXX nor g++ nor clang++ is found: install one, or use "
            "--set compile=false"
        )


def set_precision(model: DeepLabV3Plus, cfg: Config) -> DeepLabV3Plus:
    """The same model, set to compute as the config says where it is; names and values in its state dict stay."""
    model.autocast_dtype = AMP_DTYPES[cfg.amp]
    if _channels_last(cfg, next(model.parameters()).device):
        model.to(memory_format=torch.channels_last)  # convolutions pass their weights' format on
    if cfg.compile:
        _have_compiler_cache()
        model.compile()
    return model


def _have_compiler_cache() -> None:
    """The compiler names its cache after the user: where the account has no name, here after its number."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")


def build_scaler(cfg: Config, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that gradients in float16 do not vanish; passes everything through with another `amp`."""
    return torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")


def _channels_last(cfg: Config, device: torch.device) -> bool:
    return device.type == "cpu" if cfg.channels_last is None else cfg.channels_last


def describe_precision(cfg: Config, device: torch.device) -> str:
    """One line for the log."""
    parts = [
        "float32" if cfg.amp == "none" else f"{cfg.amp} autocast (logits, softmax and losses in float32)",
        "channels_last" if _channels_last(cfg, device) else "contiguous",
        "compiled" if cfg.compile else "eager",
        *(["one CUDA graph a step"] if cfg.cuda_graphs else []),
        f"activations computed again: {cfg.checkpoint_activations}",
    ]
    return f"computing: {', '.join(parts)}"


def evaluation_copy(model: DeepLabV3Plus) -> DeepLabV3Plus:
    """A copy of `model` in eval mode, made faster: each BatchNorm folded into the convolution before it.

    That convolution is the module registered before the BatchNorm, as in all models here. With autocast the copy holds
    the weights of convolutions and linear layers in 16 bits, instead of rounding them for each image. Outputs are the
    same but for rounding; the copy cannot be trained on, and is not compiled, as it sees images of every size.
    """
    model = copy.deepcopy(model).eval()
    previous, folded = None, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(previous, nn.Conv2d):
            fused = nn.utils.fusion.fuse_conv_bn_eval(previous, module)
            previous.weight, previous.bias = fused.weight, fused.bias
            folded[name] = nn.Identity()
        if not list(module.children()):
            previous = module
    for name, identity in folded.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, identity)  # set_submodule is not in torch 2.4
    if model.autocast_dtype is not None:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                module.to(model.autocast_dtype)
    return model
