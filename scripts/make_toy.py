"""Write the toy set, generated scenes for trying the methods on a CPU; a complete one is left alone.

    python -m scripts.make_toy --root data/toy --preview toy.png

The preview shows the labelled images and the first validation images, each beside its label.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.files import read_image, read_label
from dataset.lists import read_list
from dataset.prepare.toy import NUM_LABELED, NUM_UNLABELED, NUM_VAL, PALETTE, make_toy
from util.cli import run_main
from util.config import resolve_path
from util.errors import ConfigError
from util.outputs import PICTURE_SUFFIXES, check_suffix, check_targets, save_picture
from util.visualize import colorize, panel

PREVIEW_COLUMNS = 4  # pairs of image and label


def preview(root: Path) -> Image.Image:
    """The labelled images and as many validation images of the set at `root`, each beside its label, enlarged."""
    samples = [*read_list(root / "labeled.txt"), *read_list(root / "val.txt")[:NUM_LABELED]]
    cells = []
    for sample in samples:
        cells += [read_image(root / sample.image), colorize(np.asarray(read_label(root / sample.label)), PALETTE)]
    width = 2 * PREVIEW_COLUMNS
    sheet = panel([cells[start : start + width] for start in range(0, len(cells), width)])
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the set and the preview as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.make_toy", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--root", default="data/toy", metavar="DIR", help="folder of the set (default: data/toy)")
    parser.add_argument("--seed", type=int, default=0, help="another number gives other scenes (default: 0)")
    parser.add_argument("--force", action="store_true", help="make the set again even if it is complete")
    parser.add_argument("--preview", metavar="F", help="also write a picture of images and labels")
    args = parser.parse_args(argv)

    root = resolve_path(args.root)
    if args.preview:
        check_suffix("--preview", args.preview, PICTURE_SUFFIXES)
        if Path(args.preview).resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"--preview {args.preview}: lies in the set's own folder {root}: choose another place")
        check_targets([args.preview], [])
    make_toy(root, args.seed, args.force)
    print(f"{root}: {NUM_LABELED} labelled, {NUM_UNLABELED} unlabelled and {NUM_VAL} validation images")
    if args.preview:
        save_picture(preview(root), Path(args.preview))


if __name__ == "__main__":
    run_main(main)
