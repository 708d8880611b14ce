"""A model as one file that needs none of this code: torch.export's .pt2, or ONNX, with classes and input described."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dataset.errors import one_line
from dataset.files import IGNORE_INDEX
from util.errors import ConfigError
from util.outputs import MARK
from util.trained import Trained

SUFFIXES = (".pt2", ".onnx")
METADATA = "metadata.json"  # the name of the metadata in either file
TOLERANCE = 1e-4
MAX_ONNX_BYTES = 2**31 - 2**20  # of a protobuf file; what is more would lie in a second file beside it


def require_packages(option: str) -> None:
    """Raise ConfigError unless PyTorch and the packages that write and check ONNX files are there and new enough."""
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        raise ConfigError(f"{option} needs PyTorch 2.5 or newer, this is {torch.__version__}: use the suffix .pt2")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{option} needs {', '.join(missing)}: pip install -r requirements-tools.txt")


def describe(trained: Trained, model: nn.Module) -> dict[str, Any]:
    """The metadata, as JSON can hold it: classes and colours, and how an image becomes the model's input."""
    cfg, multiple = trained.cfg, model.size_multiple
    return {
        "tool": MARK,
        "classes": list(cfg.classes),
        "palette": [list(colour) for colour in cfg.palette],
        "ignore_index": IGNORE_INDEX,
        "input": "image: float32, batch x channels x height x width, (value / value_range - mean) / std per channel, "
        "a value being 0 to 255, stored ones scaled from stored_range and rounded",
        "channels": cfg.channels,
        "rgb_channels": list(cfg.rgb_channels),
        "stored_range": list(cfg.value_range or (0, 255)),
        "value_range": 255,
        "mean": list(cfg.normalization.mean),
        "std": list(cfg.normalization.std),
        "size_multiple": multiple,
        "min_size": min_size(multiple),
        "output": "logits: float32, batch x classes x height x width; the class is the argmax",
        "model": cfg.model,
        "backbone": cfg.backbone,
        "dataset": cfg.dataset,
        "eval_mode": cfg.eval_mode,
        "crop_size": cfg.crop_size,
        "weights": trained.weights,
        "checkpoint_sha256": trained.sha256(),
    }


def min_size(multiple: int) -> int:
    """The least height and width of an exported model's images, in pixels."""
    return 32 if multiple == 1 else 3 * multiple  # the deepest features must not be a single one


def trace(model: nn.Module, channels: int = 3) -> ExportedProgram:
    """The model as a graph: float32 images (B, channels, H, W) of any size that it can see -> logits (B, C, H, W)."""
    multiple = model.size_multiple
    least = min_size(multiple) // multiple
    image = torch.zeros(2, channels, multiple * (least + 2), multiple * (least + 3))
    model.backbone.exporting = True
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(model, (image,), dynamic_shapes=_free(multiple))
    finally:
        model.backbone.exporting = False


def _free(multiple: int) -> dict[str, dict[int, Any]]:
    """The dimensions of the input that may be of any size."""
    least = min_size(multiple) // multiple
    if multiple == 1:
        height, width = Dim("height", min=least), Dim("width", min=least)
    else:
        height, width = multiple * Dim("rows", min=least), multiple * Dim("columns", min=least)
    return {"x": {0: Dim("batch"), 2: height, 3: width}}


def save(program: ExportedProgram, metadata: dict[str, Any], suffix: str, file: Path) -> None:
    """Write the program to `file` in the format that `suffix` names. Raises ConfigError for one too large for ONNX."""
    text = json.dumps(metadata, ensure_ascii=False)
    if suffix == ".pt2":
        with open(file, "wb") as opened, _quiet():
            torch.export.save(program, opened, extra_files={METADATA: text})
        return
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > MAX_ONNX_BYTES:
        raise ConfigError(f"--out: an ONNX file holds 2 GB, the model has {size / 1e9:.1f}: use the suffix .pt2")
    with _quiet():
        onnx = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=_free(metadata["size_multiple"]),  # for their names
        )
    onnx.model.producer_name = MARK
    onnx.model.metadata_props[METADATA] = text
    onnx.save(file, external_data=False)


def load(suffix: str, file: Path) -> Callable[[Tensor], Tensor]:
    """A written model as a function from images to logits."""
    if suffix == ".pt2":
        return torch.export.load(io.BytesIO(file.read_bytes())).module()
    import onnxruntime

    network = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(network.run(None, {"image": image.numpy()})[0])


def check(
    model: nn.Module, exported: Callable[[Tensor], Tensor], crop_size: int, channels: int = 3
) -> list[tuple[Sequence[int], float, float]]:
    """How far the logits of `exported` are from those of `model` on noise at most, for each of three shapes.

    Absolutely, and as a share of the largest logit. Raises ConfigError where it is more than TOLERANCE. Float32 holds
    seven digits, so large logits may be rounded by more: then a module (.pt2) is compared in float64, and ONNX, which
    has float32 only, within TOLERANCE times the largest logit.
    """
    multiple, results = model.size_multiple, []
    small = min_size(multiple)
    middle = small + (2 * multiple if multiple > 1 else 33)
    large = max(crop_size, middle + multiple)
    shapes = ((1, large, large), (2, small, middle), (3, middle, small))
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in shapes:
        image = torch.randn(batch, channels, height, width, generator=generator)
        try:
            difference, largest = _compare(model, exported, image)
            judged, limit = difference, TOLERANCE * max(1.0, largest)
            if difference > TOLERANCE and isinstance(exported, nn.Module):
                judged, limit = _compare(model.double(), exported.double(), image.double())[0], TOLERANCE
                model.float(), exported.float()
        except Exception as error:
            raise ConfigError(f"the exported model fails on {height} x {width} pixels: {one_line(error)}") from None
        if not judged <= limit:
            raise ConfigError(
                f"the exported model's logits differ by {judged:.2g} on {height} x {width} pixels, more than "
                f"{limit:.2g}: nothing is written"
            )
        results.append((image.shape, difference, difference / largest if largest else 0.0))
    return results


@torch.inference_mode()
def _compare(
    model: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], image: Tensor
) -> tuple[float, float]:
    """The largest difference of their logits, and the model's largest logit."""
    expected, found = model(image), exported(image)
    return float((expected - found).abs().max()), float(expected.abs().max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say to their developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
