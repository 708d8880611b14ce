"""PyTorch's process-wide switches: deterministic algorithms, TF32, and cuDNN's choice of kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from util.config_schema import Config


def set_backends(cfg: Config, device: torch.device, training: bool = True) -> None:
    """Set the switches as the config says; call it before anything runs on a GPU.

    In training cuDNN tries its kernels for each new shape and keeps the fastest, as in the release. That pays, since
    crops have one shape. With `deterministic` it does not try any: another kernel would add up in another order.
    """
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to give the same sums
    # An operation without a deterministic kernel warns by name instead of ending the run.
    torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    if cfg.deterministic and device.type == "cuda":
        # With warn_only the fused kernels of attention add up gradients in any order; only the math kernel does not.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.deterministic = cfg.deterministic
    torch.backends.cudnn.benchmark = training and not cfg.deterministic
    if cfg.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32


@contextlib.contextmanager
def without_benchmark() -> Iterator[None]:
    """cuDNN takes its default kernels: validation images come in many sizes, and trying kernels for each takes long."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def describe_backends(cfg: Config, device: torch.device) -> list[str]:
    """What is on, for the log; TF32 and cuDNN are a GPU's."""
    parts = ["deterministic algorithms"] if cfg.deterministic else []
    if device.type == "cuda":
        if cfg.deterministic and cfg.model == "dpt":
            parts.append("attention by its math kernel")
        convolutions, matmuls = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        parts.append(f"TF32 convolutions {_on(convolutions)}, matmuls {_on(matmuls)}")
        parts.append(f"cudnn.benchmark {_on(torch.backends.cudnn.benchmark)} while training")
    return parts


def _on(value: bool) -> str:
    return "on" if value else "off"
