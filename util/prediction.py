"""Predicting one picture after the other: what is computed, and what is written of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dataset.bands import Bands, bands_size
from dataset.files import IGNORE_INDEX
from dataset.raster import ROWS
from dataset.transform import IMAGENET, Normalization, normalize, to_tensor
from dataset.windows import Rows, open_rows, read_header
from util.evaluate import class_scores
from util.outputs import read_mark, replacing, writing
from util.streams import GeoTiffStream, NpzStream, PngStream
from util.tiles import predict_bands
from util.visualize import full_palette

# What can be written of a picture, and the suffix of its file. The index goes into the output folder itself, each
# other kind into its own folder there.
KINDS = {"index": ".png", "overlay": ".png", "confidence": ".png", "probabilities": ".npz"}
PREVIEW = 1024  # pixels of a preview's longer side at most


@dataclass(frozen=True)
class Options:
    """What a prediction depends on besides model and image. Sizes are in pixels."""

    mode: str
    crop_size: int
    palette: tuple[tuple[int, int, int], ...]
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    tile: int = 1024
    overlap: int = 256
    tile_above: int = 2048 * 2048
    min_confidence: float = 0.0
    upright: bool = False
    kinds: tuple[str, ...] = ("index",)
    geotiff: bool = False
    bands: Bands | None = None
    normalization: Normalization = IMAGENET


class Preview(NamedTuple):
    """A picture and its classes, uint8 (H, W, 3) and (H, W), of every n-th pixel if it is large."""

    image: np.ndarray
    index: np.ndarray


class Predictor:
    """Predicts and writes pictures with one model. `model_id` says which model, for the marks of the files."""

    def __init__(self, model: nn.Module, device: torch.device, options: Options, model_id: Mapping[str, Any]) -> None:
        self.model, self.device, self.options = model, device, options
        self._made_by = json.dumps([model_id, asdict(options) | {"kinds": None}], sort_keys=True)
        self._palette = full_palette(options.palette)
        self.tiled: list[Path] = []
        self.whole: dict[Path, str] = {}  # large pictures that had to be decoded whole, and why
        self.upper_bits: list[Path] = []  # of 16 bits per channel, of which the upper 8 were used

    def fingerprint(self, path: Path) -> str:
        """Of all that a prediction of this picture depends on; of the picture itself, its size and time of change.

        After a space, which picture it is: see `source_id`.
        """
        status = path.stat()
        text = f"{self._made_by} {status.st_size} {status.st_mtime_ns}"
        return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {source_id(path)}"

    def is_done(self, path: Path, targets: Mapping[str, Path]) -> bool:
        """Whether all that is to be written of this picture is there, made by this model with these options."""
        fingerprint = self.fingerprint(path)
        return all(read_mark(target) == fingerprint for target in targets.values())

    def write(self, path: Path, targets: Mapping[str, Path]) -> Preview:
        """Predict the picture at `path`, and write each kind to its target. Raises DataError and ConfigError."""
        options = self.options
        width, height, *upper_bits = bands_size(path, options.bands) if options.bands else read_header(path)
        small = width * height <= options.tile_above
        with open_rows(path, options.upright, small, options.bands) as rows, contextlib.ExitStack() as stack:
            if not small:
                self.tiled.append(path)
                if rows.whole:
                    self.whole[path] = rows.whole
            tile = max(width, height) if small else options.tile
            step = -(-max(width, height) // PREVIEW)
            previews, top, streams = [], 0, None
            for band in predict_bands(rows, tile, 0 if small else options.overlap, self.kinds_of):
                if streams is None:  # only now: nothing is left behind of a picture that cannot be read at all
                    streams = self._open(stack, targets, rows, path)
                previews.append(self._put(band, streams, -top % step, step))
                top += len(band.pop("index"))
                band.clear()  # not to be kept beside the next one
            for stream in streams.values():
                stream.close()
        if any(upper_bits):
            self.upper_bits.append(path)
        return Preview(*map(np.concatenate, zip(*previews, strict=True)))

    def _put(
        self, band: Mapping[str, np.ndarray], streams: Mapping[str, Any], first: int, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write a band, few rows at a time; returns every n-th pixel of image and index, `first` being the first row.

        They are copies, as a view of each band would keep the whole picture in memory.
        """
        image, index = band["image"], band["index"]
        if self.options.bands:
            image = image[..., list(self.options.bands.rgb)]
        for start in range(0, len(index), ROWS):
            part = slice(start, start + ROWS)
            for kind, stream in streams.items():
                picture = overlay(image[part], index[part], self._palette) if kind == "overlay" else band[kind][part]
                stream.write(picture)
        return image[first::step, ::step].copy(), index[first::step, ::step].copy()

    def _open(self, stack: contextlib.ExitStack, targets: Mapping[str, Path], rows: Rows, path: Path) -> dict[str, Any]:
        fingerprint, streams = self.fingerprint(path), {}
        for kind, target in targets.items():
            if target.suffix == ".tif":
                place = stack.enter_context(replacing(target))
                streams[kind] = GeoTiffStream(place, path, self._palette, fingerprint)
                continue
            file = stack.enter_context(writing(target))
            if kind == "probabilities":
                shape = (rows.height, rows.width, len(self.options.palette))
                streams[kind] = NpzStream(file, "probabilities", shape, np.float16, fingerprint)
            else:
                mode = {"index": "P", "overlay": "RGB", "confidence": "L"}[kind]
                palette = self._palette.tobytes() if kind == "index" else None
                streams[kind] = PngStream(file, (rows.width, rows.height), mode, fingerprint, palette)
        return streams

    @torch.inference_mode()
    def kinds_of(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """What is predicted for an image or tile (H, W, C), by the kind of output."""
        options, by = self.options, self.options.normalization
        image = normalize(to_tensor(pixels)[None].to(self.device), by)
        scores = class_scores(self.model, image, options.mode, options.crop_size, options.scales, options.flip)
        index = scores.classes()
        found = {}
        if options.min_confidence > 0 or {"confidence", "probabilities"} & set(options.kinds):
            probabilities = scores.probabilities()
            confidence = probabilities.amax(dim=1)
            index = index.masked_fill(confidence < options.min_confidence, IGNORE_INDEX)
            if "confidence" in options.kinds:
                found["confidence"] = (255 * confidence[0]).round().byte().cpu().numpy()
            if "probabilities" in options.kinds:
                found["probabilities"] = probabilities[0].permute(1, 2, 0).half().cpu().numpy()
        return found | {"index": index[0].byte().cpu().numpy()}


def overlay(image: np.ndarray, index: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The image with its classes' colours over it, half and half; ignored pixels stay as they are. uint8 (H, W, 3)."""
    mixed = ((image.astype(np.uint16) + palette[index] + 1) // 2).astype(np.uint8)
    return np.where((index == IGNORE_INDEX)[..., None], image, mixed)


def source_id(path: Path) -> str:
    """Which file a picture is of, by whatever links it is reached: two are never predicted into one file."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]


def targets_of(place: Path, output: Path, kinds: Sequence[str], keep_suffix: bool, geotiff: bool) -> dict[str, Path]:
    """Where each kind of output of the picture at `place`, relative to its input, goes."""
    name = place if not keep_suffix else place.with_name(place.name + ".x")
    targets = {}
    for kind in kinds:
        suffix = ".tif" if kind == "index" and geotiff else KINDS[kind]
        targets[kind] = (output if kind == "index" else output / kind) / name.with_suffix(suffix)
    return targets
