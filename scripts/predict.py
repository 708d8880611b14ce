"""Predict classes for images: an index PNG each, coloured by the palette, its pixel values being class indices.

    python -m scripts.predict photos/ --checkpoint exp/.../best.pth --out predictions/

An INPUT is an image, a folder (searched in depth), a glob, or a list file as for training (its paths are relative to
data_root). Inputs are only read: an output that would replace a file which this tool did not write is refused. What is
done already is left as it is, so a run that was stopped is continued by the same command. Exit status: 0, also where
some images could not be read (they are named), and 2 where nothing could be done.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset import DataError
from dataset.files import limit_image_pixels, map_label, read_label, upper_bits_notes
from dataset.inputs import Found, Picture, find_pictures
from util.cli import run_main
from util.config import Config, resolve_path
from util.distributed.launch import choose_device, process_alone
from util.errors import ConfigError, error_line
from util.outputs import PICTURE_SUFFIXES, check_suffix, check_targets, is_own, save_picture
from util.plots import contact_sheet, require_matplotlib
from util.prediction import KINDS, Options, Predictor, Preview, overlay, source_id, targets_of
from util.trained import (
    add_colors_argument,
    add_model_arguments,
    add_view_arguments,
    check_view_arguments,
    chosen_palette,
    open_trained,
)
from util.visualize import colorize, full_palette, panel


def main(argv: Sequence[str] | None = None) -> None:
    """Predict as the command line says."""
    args = _parse(argv)
    _check(args)
    trained = open_trained(args)
    device = choose_device(trained.cfg.device, process_alone("predict"))
    trained = trained.on(device, args)
    cfg = trained.cfg
    limit_image_pixels(cfg.max_image_pixels)
    sources = [*args.inputs, *([args.images] if args.images else [])]
    found = find_pictures(
        [source if Path(source).exists() else resolve_path(source) for source in sources],
        resolve_path(cfg.data_root),
        cfg.allow_outside_root,
        is_own,
        cfg.image_suffixes,
    )
    pictures = found.pictures
    targets = _targets(pictures, args)
    read_only = [("input", resolve_path(source)) for source in sources if resolve_path(source).is_file()]
    for picture in pictures:
        read_only += [("image", picture.path), *([("label", picture.label)] if picture.label else [])]
    written = [target for kinds in targets for target in kinds.values()]
    marks = check_targets([*written, *_pages(args)], trained.files(args) + read_only)
    _check_sources(pictures, targets, args, marks)
    model = trained.ready(trained.build(), device)
    options = _options(args, cfg, getattr(model, "size_multiple", 1))
    predictor = Predictor(model, device, options, trained.identity())
    for note in (*trained.notes, *_left_out(found)):
        print(note)

    previews: list[tuple[Picture, Preview]] = []
    shown = max(args.panel_rows if args.panel else 0, args.sheet_images if args.contact_sheet else 0)
    done, unreadable = 0, []
    for picture, kinds in zip(tqdm(pictures, "predict", unit="image", disable=None), targets, strict=True):
        try:
            if len(previews) >= shown and predictor.is_done(picture.path, kinds):
                done += 1
                continue
            preview = predictor.write(picture.path, kinds)
        except (DataError, FileNotFoundError) as error:
            unreadable.append(picture.path)
            tqdm.write(f"warning: {error_line(error)}", file=sys.stderr)
            continue
        if len(previews) < shown:
            previews.append((picture, preview))
    if len(unreadable) == len(pictures):
        raise DataError(f"none of the {len(unreadable)} images can be read")
    if args.panel:
        save_picture(_panel(previews[: args.panel_rows], cfg, options), Path(args.panel))
    if args.contact_sheet:
        save_picture(_sheet(previews[: args.sheet_images], cfg, options), Path(args.contact_sheet))
    for line in _summary(args, predictor, len(pictures) - len(unreadable) - done, done, unreadable):
        print(line)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts.predict", description=__doc__.split("\n", 1)[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="an image, a folder of images, a glob, or a list file")
    add("--images", metavar="INPUT", help="another way to name an input")
    add("--out", "--output", required=True, metavar="DIR", help="folder for the predictions")
    add("--save", nargs="+", choices=KINDS, default=["index"], metavar="KIND", help="what is written of an image: "
        "index (the default; into DIR itself), overlay, confidence (grey, 255 is certain), probabilities (.npz, "
        "float16, H x W x classes), each into DIR/KIND")  # fmt: skip
    add("--min-confidence", type=float, default=0.0, metavar="T", help="255, ignored, where the confidence is below T: "
        "DIR is then a folder of pseudo-labels")  # fmt: skip
    add_view_arguments(parser)
    add_colors_argument(parser)
    add("--tile", type=int, default=1024, metavar="S", help="side of the tiles that large images are predicted in, "
        "read window by window where their format allows (default: 1024)")  # fmt: skip
    add("--overlap", type=int, metavar="N", help="pixels that neighbouring tiles share, at most half a tile (default: "
        "256, or half a tile if that is less)")  # fmt: skip
    add("--tile-above", type=int, default=2048 * 2048, metavar="PIXELS", help="images of more pixels are large "
        "(default: 4194304, that is 2048 x 2048)")  # fmt: skip
    add("--upright", action="store_true", help="turn images as their EXIF orientation says, as viewers do")
    add("--geotiff", action="store_true", help="write the index as GeoTIFF, placed on the earth as its input is")
    add("--keep-suffix", action="store_true", help="a.jpg becomes a.jpg.png: for images that differ by suffix only")
    add("--panel", metavar="F", help="also write one picture: input | truth, if listed | prediction")
    add("--panel-rows", type=int, default=6, metavar="N", help="images in the panel (default: 6)")
    add("--contact-sheet", nargs="?", const="", metavar="F", help="also write one page of inputs and overlays with a "
        "legend (without F: DIR/contact-sheet.png)")  # fmt: skip
    add("--sheet-images", type=int, default=24, metavar="N", help="images on the contact sheet (default: 24)")
    args = parser.parse_args(argv)
    if args.contact_sheet == "":
        args.contact_sheet = str(Path(args.out, "contact-sheet.png"))
    if args.overlap is None:
        args.overlap = min(256, args.tile // 2)
    if not args.inputs and not args.images:
        parser.error("name at least one INPUT: an image, a folder, a glob or a list file")
    return args


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    check_view_arguments(args)
    for option, value in (("--panel-rows", args.panel_rows), ("--sheet-images", args.sheet_images)):
        if value < 1:
            raise ConfigError(f"{option} {value}: must be at least 1")
    if args.tile < 32:
        raise ConfigError(f"--tile {args.tile}: must be at least 32")
    if not 0 <= args.overlap <= args.tile // 2:
        raise ConfigError(f"--overlap {args.overlap}: must be from 0 to half of --tile: {args.tile // 2}")
    if not 0 <= args.min_confidence <= 1:
        raise ConfigError(f"--min-confidence {args.min_confidence}: must be from 0 to 1")
    for option, path in (("--panel", args.panel), ("--contact-sheet", args.contact_sheet)):
        if path:
            check_suffix(option, path, PICTURE_SUFFIXES)
    if args.contact_sheet:
        require_matplotlib("--contact-sheet")
    if args.geotiff and importlib.util.find_spec("rasterio") is None:
        raise ConfigError("--geotiff needs rasterio: pip install -r requirements-tools.txt")
    if args.geotiff and args.upright:
        raise ConfigError("--geotiff and --upright: a turned image has no place on the earth; leave one of them out")


def _options(args: argparse.Namespace, cfg: Config, multiple: int) -> Options:
    palette = chosen_palette(cfg, args.colors)
    return Options(
        cfg.eval_mode,
        cfg.crop_size,
        palette,
        tuple(args.scales),
        args.flip,
        max(1, args.tile // multiple) * multiple,
        args.overlap,
        args.tile_above,
        args.min_confidence,
        args.upright,
        tuple(kind for kind in KINDS if kind in args.save),
        args.geotiff,
        cfg.bands,
        cfg.normalization,
    )


def _targets(pictures: Sequence[Picture], args: argparse.Namespace) -> list[dict[str, Path]]:
    """The files of each picture. Raises DataError where two pictures would be written into one."""
    owners: dict[Path, Path] = {}
    targets = []
    for picture in pictures:
        targets.append(targets_of(picture.place, Path(args.out), args.save, args.keep_suffix, args.geotiff))
        for target in targets[-1].values():
            if target in owners:
                raise DataError(
                    f"{owners[target]} and {picture.path} would both be predicted into {target}: predict them "
                    "separately, or use --keep-suffix where their suffixes differ"
                )
            owners[target] = picture.path
    return targets


def _check_sources(
    pictures: Sequence[Picture],
    targets: Sequence[dict[str, Path]],
    args: argparse.Namespace,
    marks: Mapping[Path, str],
) -> None:
    """Raise ConfigError where two things would be written into one file, be it by this call and an earlier one.

    `marks`: those of the files that are there.
    """
    taken = {os.path.realpath(target) for kinds in targets for target in kinds.values()}
    for page in _pages(args):
        if os.path.realpath(page) in taken or " " in marks.get(Path(page), ""):  # a prediction's mark has two parts
            raise ConfigError(f"{page}: is to be a page, and also a prediction or the other page: choose another name")
        taken.add(os.path.realpath(page))
    for picture, kinds in zip(pictures, targets, strict=True):
        own = source_id(picture.path)
        for target in kinds.values():
            mark = marks.get(target)
            if mark == "" or (mark and mark.partition(" ")[2] not in ("", own)):
                raise ConfigError(
                    f"{target}: was not made from {picture.path}, but from another file: choose another --out, or use "
                    "--keep-suffix where the names differ by suffix only"
                )


def _pages(args: argparse.Namespace) -> list[str]:
    return [path for path in (args.panel, args.contact_sheet) if path]


def _panel(previews: Sequence[tuple[Picture, Preview]], cfg: Config, options: Options) -> Image.Image:
    listed = any(picture.label for picture, _ in previews)
    rows = []
    for picture, preview in previews:
        image = Image.fromarray(preview.image)
        truth = [_truth(picture.label, image.size, cfg, options)] if listed else []
        rows.append([image, *truth, colorize(preview.index, options.palette)])
    return panel(rows)


def _truth(label: Path | None, size: tuple[int, int], cfg: Config, options: Options) -> Image.Image:
    """The label in the palette's colours; white where the list has none, or none that can be read."""
    try:
        truth = read_label(label, cfg.color_values) if label is not None else None
    except DataError as error:
        tqdm.write(f"warning: {error_line(error)}", file=sys.stderr)
        truth = None
    if truth is None:
        return Image.new("RGB", size, "white")
    truth = map_label(truth, cfg.label_map).resize(size, Image.Resampling.NEAREST)
    return colorize(np.asarray(truth), options.palette)


def _sheet(previews: Sequence[tuple[Picture, Preview]], cfg: Config, options: Options) -> Image.Image:
    palette = full_palette(options.palette)
    present = np.unique(np.concatenate([np.unique(preview.index) for _, preview in previews]))
    cells = [
        (picture.place.as_posix(), (preview.image, overlay(preview.image, preview.index, palette)))
        for picture, preview in previews
    ]
    classes = [int(index) for index in present if index < cfg.nclass]
    return contact_sheet(cells, ("input", "prediction"), cfg.classes, palette, classes)


def _summary(
    args: argparse.Namespace, predictor: Predictor, predicted: int, done: int, unreadable: list[Path]
) -> list[str]:
    pages = "".join(f", some of them shown in {path}" for path in _pages(args))
    lines = [f"{predicted} predictions in {args.out}{pages}"]
    if done:
        lines.append(f"{done} were there already, made from the same images by the same model and options")
    if predictor.tiled:
        options = predictor.options
        lines.append(
            f"{len(predictor.tiled)} large images were predicted in tiles of {options.tile} pixels that share "
            f"{options.overlap}: {_few(predictor.tiled)}"
        )
    lines += upper_bits_notes(predictor.upper_bits)
    for path, why in list(predictor.whole.items())[:5]:
        lines.append(f"note: {path} was held in memory whole: {why}")
    if unreadable:
        lines.append(f"{len(unreadable)} unreadable images were skipped: {_few(unreadable)}")
    return lines


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


if __name__ == "__main__":
    run_main(main)
