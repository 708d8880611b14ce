"""Predict classes for images: an index PNG each, coloured by the palette, its pixel values being class indices.

    python -m scripts.predict photos/ --checkpoint exp/.../best.pth --out predictions/

An INPUT is an image, a folder (searched in depth), a glob, or a list file as for training (its paths are relative to
data_root). What the images are is only read: an output that would replace another file is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import DataError
from dataset.files import limit_image_pixels, map_label, read_image, read_label
from dataset.inputs import Found, Picture, find_pictures
from dataset.transform import normalize
from util.cli import run_main
from util.config import Config, resolve_path
from util.distributed.launch import choose_device, find_processes
from util.errors import ConfigError, error_line
from util.evaluate import predict
from util.outputs import PICTURE_SUFFIXES, check_suffix, check_targets, is_own, save_picture
from util.precision import check_precision
from util.trained import add_model_arguments, open_trained
from util.visualize import colorize, panel


def main(argv: Sequence[str] | None = None) -> None:
    """Predict as the command line says."""
    args = _parse(argv)
    if args.panel:
        check_suffix("--panel", args.panel, PICTURE_SUFFIXES)
    trained = open_trained(args)
    cfg = trained.cfg
    limit_image_pixels(cfg.max_image_pixels)
    device = choose_device(cfg.device, find_processes())
    check_precision(cfg, device)
    sources = [*args.inputs, *([args.images] if args.images else [])]
    found = find_pictures(
        [source if Path(source).exists() else resolve_path(source) for source in sources],
        resolve_path(cfg.data_root),
        cfg.allow_outside_root,
        is_own,
    )
    output = Path(args.out)
    targets = _targets(found.pictures, output, args.keep_suffix)
    read_only = [("list or input", resolve_path(source)) for source in sources if resolve_path(source).is_file()]
    for picture in found.pictures:
        read_only += [("image", picture.path), *([("label", picture.label)] if picture.label else [])]
    check_targets([*targets, *([args.panel] if args.panel else [])], trained.files(args) + read_only)
    model = trained.ready(trained.build(), device)
    for note in (*trained.notes, *_left_out(found)):
        print(note)

    rows, unreadable = [], []
    listed = any(picture.label for picture in found.pictures)
    for picture, target in zip(tqdm(found.pictures, unit="image", disable=None), targets, strict=True):
        try:
            image = read_image(picture.path)
            truth = [_truth(picture.label, image.size, cfg)] if args.panel and listed else []
        except DataError as error:
            unreadable.append(picture.path)
            tqdm.write(f"warning: {error_line(error)}", file=sys.stderr)
            continue
        with torch.inference_mode():
            classes = predict(model, normalize(image)[None].to(device), cfg.eval_mode, cfg.crop_size)
        prediction = colorize(classes[0].cpu().numpy(), cfg.palette)
        save_picture(prediction, target)
        if args.panel and len(rows) < args.panel_rows:
            rows.append([image, *truth, prediction])
    if len(unreadable) == len(found.pictures):
        raise DataError(f"none of the {len(unreadable)} images can be read")
    if args.panel:
        save_picture(panel(rows), Path(args.panel))
    print(
        f"{len(found.pictures) - len(unreadable)} predictions in {output}"
        + (f", {len(rows)} of them shown in {args.panel}" if args.panel else "")
    )
    if unreadable:
        print(f"{len(unreadable)} unreadable images were skipped: {_few(unreadable)}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts.predict", description=__doc__.split("\n", 1)[0])
    add_model_arguments(parser)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="an image, a folder of images, a glob, or a list")
    parser.add_argument("--images", metavar="INPUT", help="another way to name an input")
    parser.add_argument("--out", "--output", required=True, metavar="DIR", help="folder for the predictions")
    parser.add_argument(
        "--keep-suffix", action="store_true", help="a.jpg becomes a.jpg.png: for images of one name and other suffixes"
    )
    parser.add_argument("--panel", metavar="F", help="also write one picture: input | truth, if listed | prediction")
    parser.add_argument("--panel-rows", type=int, default=6, metavar="N", help="images in the panel (default: 6)")
    args = parser.parse_args(argv)
    if not args.inputs and not args.images:
        parser.error("name at least one INPUT: an image, a folder, a glob or a list file")
    if args.panel_rows < 1:
        raise ConfigError(f"--panel-rows {args.panel_rows}: must be at least 1")
    return args


def _targets(pictures: Sequence[Picture], output: Path, keep_suffix: bool) -> list[Path]:
    """The index PNG of each picture. Raises DataError where two would be written into one."""
    targets: dict[Path, Path] = {}
    for picture in pictures:
        place = picture.place
        target = output / (place.with_name(place.name + ".png") if keep_suffix else place.with_suffix(".png"))
        if target in targets:
            raise DataError(
                f"{targets[target]} and {picture.path} would both be predicted into {target}: predict them separately, "
                "or use --keep-suffix where their suffixes differ"
            )
        targets[target] = picture.path
    return list(targets)


def _left_out(found: Found) -> list[str]:
    lines = []
    if found.left_out:
        lines.append(f"{len(found.left_out)} files that are no images are left out: {_few(found.left_out)}")
    if found.predictions:
        count = len(found.predictions)
        lines.append(f"{count} predictions of earlier runs are left out of the inputs: {_few(found.predictions)}")
    return lines


def _few(paths: Sequence[Path]) -> str:
    shown = ", ".join(map(str, paths[:5]))
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown


def _truth(label: Path | None, size: tuple[int, int], cfg: Config) -> Image.Image:
    """The label in the palette's colours; white where the list has none."""
    if label is None:
        return Image.new("RGB", size, "white")
    return colorize(np.asarray(map_label(read_label(label), cfg.label_map)), cfg.palette)


if __name__ == "__main__":
    run_main(main)
