"""Predict classes for images: an index PNG each, coloured by the palette, its pixel values being class indices.

    python -m scripts.predict --config configs/pascal.yaml --checkpoint exp/.../best.pth --images PATH --output DIR

`--images` is an image, a folder of images, or a list file as for training (its paths are relative to data_root).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import DataError
from dataset.files import limit_image_pixels, map_label, read_image, read_label
from dataset.lists import IMAGE_SUFFIXES, images_in, is_inside, read_list
from dataset.transform import normalize
from model import build_model, load_checkpoint_state, read_checkpoint
from util.cli import add_common_arguments, run_main
from util.config import Config, load_config, resolve_path
from util.distributed.launch import choose_device, find_processes
from util.errors import ConfigError
from util.evaluate import predict
from util.precision import check_precision, evaluation_copy, set_precision
from util.visualize import colorize, panel


def find_images(source: Path, cfg: Config) -> Iterator[tuple[Path, Path, Path | None]]:
    """(path, path of the prediction relative to the output folder, label's path or None) of each image to predict."""
    if source.is_dir():
        for name in images_in(source, source):
            yield source / name, Path(name).with_suffix(".png"), None
    elif source.suffix.lower() in IMAGE_SUFFIXES:
        yield source, Path(source.stem + ".png"), None
    else:
        root = resolve_path(cfg.data_root)
        for image, label in read_list(source, labels=False, inside=None if cfg.allow_outside_root else root):
            # Predictions stay in the output folder wherever the image is.
            target = os.path.relpath(root / image, root) if is_inside(image, root) else Path(image).name
            yield root / image, Path(target).with_suffix(".png"), root / label if label else None


def main(argv: Sequence[str] | None = None) -> None:
    """Predict as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.predict", description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser)
    parser.add_argument(
        "--checkpoint", required=True, metavar="F", help="best.pth, latest.pth or a published checkpoint"
    )
    parser.add_argument("--images", required=True, metavar="PATH", help="an image, a folder of images, or a list file")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the predictions")
    parser.add_argument("--panel", metavar="F", help="also write one picture: input | truth, if listed | prediction")
    parser.add_argument("--panel-rows", type=int, default=6, metavar="N", help="images in the panel (default: 6)")
    args = parser.parse_args(argv)

    cfg = load_config(args.config, args.overrides)
    limit_image_pixels(cfg.max_image_pixels)
    device = choose_device(cfg.device, find_processes())
    check_precision(cfg, device)
    images = list(find_images(resolve_path(args.images), cfg))
    targets = [target for _, target, _ in images]
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise DataError(f"{args.images}: two images would both be predicted into {twice}; predict them separately")
    model = build_model(cfg, pretrained=False)
    load_checkpoint_state(model, read_checkpoint(resolve_path(args.checkpoint)), args.checkpoint)
    model = evaluation_copy(set_precision(model.to(device), cfg))

    output, rows = Path(args.output), []
    try:
        for path, target, label in tqdm(images, unit="image", disable=None):
            image = read_image(path)
            with torch.inference_mode():
                classes = predict(model, normalize(image)[None].to(device), cfg.eval_mode, cfg.crop_size)
            prediction = colorize(classes[0].cpu().numpy(), cfg.palette)
            (output / target).parent.mkdir(parents=True, exist_ok=True)
            prediction.save(output / target)
            if args.panel and len(rows) < args.panel_rows:
                truth = [_truth(label, image.size, cfg)] if any(label for *_, label in images) else []
                rows.append([image, *truth, prediction])
        if args.panel:
            Path(args.panel).parent.mkdir(parents=True, exist_ok=True)
            panel(rows).save(args.panel)
    except OSError as error:
        raise ConfigError(f"{error.filename or args.output}: cannot be written: {error.strerror or error}") from None
    print(
        f"{len(images)} predictions in {output}"
        + (f", {len(rows)} of them shown in {args.panel}" if args.panel else "")
    )


def _truth(label: Path | None, size: tuple[int, int], cfg: Config) -> Image.Image:
    """The label in the palette's colours; white where the list has none."""
    if label is None:
        return Image.new("RGB", size, "white")
    return colorize(np.asarray(map_label(read_label(label), cfg.label_map)), cfg.palette)


if __name__ == "__main__":
    run_main(main)
