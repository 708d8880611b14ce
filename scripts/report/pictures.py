"""The same validation images as each run predicts them, as pictures that fit into a page."""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.files import IGNORE_INDEX, limit_image_pixels
from dataset.lists import Sample, read_list
from dataset.source import DataSource
from dataset.transform import normalize, to_tensor
from scripts.report.runs import RunRecord
from util.config import Config, resolve_path
from util.errors import USER_ERRORS, error_line
from util.evaluate import center_crop, predict
from util.lists import data_source, spread
from util.run_files import CONFIG_FILE
from util.trained import chosen_palette, open_trained
from util.visualize import colorize

SIDE = 240  # pixels of a picture's longer side at most


@dataclass
class Row:
    """One image: its name, input and truth, and each run's prediction, all data URIs."""

    name: str
    image: str
    truth: str
    predictions: dict[Path, str] = field(default_factory=dict)


@dataclass
class Gallery:
    """Rows of pictures, why a run has none, and the name and colour of each class that occurs."""

    rows: list[Row]
    missing: dict[Path, str]
    legend: list[tuple[str, tuple[int, int, int]]]


def make_gallery(runs: Sequence[RunRecord], count: int, colors: str) -> Gallery:
    """`count` images of the first run's validation list, evenly spaced, predicted by each run's best checkpoint.

    Input and truth are shown as the first run reads them; each run predicts what it reads itself.
    """
    cfg = runs[0].cfg
    palette = chosen_palette(cfg, colors)
    gallery, seen = Gallery([], {}, []), set()
    try:
        limit_image_pixels(cfg.max_image_pixels)
        source, samples = data_source(cfg), spread(read_list(resolve_path(cfg.val_id_path)), count)
        pairs = [_load(source, sample, cfg) for sample in samples]
    except USER_ERRORS as error:
        gallery.missing = {run.path: error_line(error) for run in runs}
        return gallery
    for sample, (image, label) in zip(samples, pairs, strict=True):
        seen |= set(np.unique(label.numpy()))
        truth = _uri(colorize(label.numpy(), palette), "PNG")
        gallery.rows.append(Row(sample.image, _uri(_picture(image[list(cfg.rgb_channels)]), "JPEG"), truth))
    for run in runs:
        try:
            predictions = _predict(run, samples, cfg)
        except USER_ERRORS as error:
            gallery.missing[run.path] = error_line(error)
            continue
        for row, classes in zip(gallery.rows, predictions, strict=True):
            seen |= set(np.unique(classes))
            row.predictions[run.path] = _uri(colorize(classes, palette), "PNG")
    gallery.legend = [(cfg.classes[index], palette[index]) for index in sorted(seen - {IGNORE_INDEX})]
    return gallery


def _load(source: DataSource, sample: Sample, shown: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """An 8-bit image (C, H, W) and its label (H, W); of them the part that an evaluation by `shown` sees."""
    image, label = map(to_tensor, source.load(sample))
    if shown.eval_mode == "center_crop":
        return center_crop(image, shown.crop_size), center_crop(label, shown.crop_size)
    return image, label


def _predict(run: RunRecord, samples: Sequence[Sample], shown: Config) -> list[np.ndarray]:
    """Classes uint8 (H, W) of these images, read as this run's config says. Raises one of USER_ERRORS."""
    if run.checkpoint is None:
        raise USER_ERRORS[0]("no checkpoint")
    config = str(run.path / CONFIG_FILE)
    args = argparse.Namespace(checkpoint=str(run.checkpoint), config=config, overrides=[], weights=None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_trained(args).on(device, args)
    model = trained.ready(trained.build(), device)
    cfg = trained.cfg
    limit_image_pixels(cfg.max_image_pixels)
    source = data_source(cfg)
    with torch.inference_mode():
        images = (_load(source, sample, shown)[0][None].to(device) for sample in samples)
        seen = (normalize(image, cfg.normalization) for image in images)
        return [predict(model, image, cfg.eval_mode, cfg.crop_size)[0].byte().cpu().numpy() for image in seen]


def _picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _uri(picture: Image.Image, kind: str) -> str:
    """The picture, made small, as a data URI. Colours of classes stay as they are."""
    scale = min(1.0, SIDE / max(picture.size))
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.NEAREST if picture.mode == "P" else Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
