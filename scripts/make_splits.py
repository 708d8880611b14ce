"""Make the lists for your own data: a folder of images and a folder of labels in, train.txt, labeled.txt, val.txt out.

    python -m scripts.make_splits --images data/leaves/images --labels data/leaves/labels --output splits/leaves

A label is a PNG with its image's name, in the same sub-folder (images/a/1.jpg, labels/a/1.png). Images without one are
unlabelled. The labelled and the validation images are drawn so that each has every class, as far as there are images.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from dataset import DataError
from dataset.atomic import replacing
from dataset.check import mask_hint
from dataset.files import IGNORE_INDEX, LabelColors, map_label, read_label
from dataset.lists import Sample, images_in
from util.cli import run_main
from util.config import parse_label_colors, parse_label_map, resolve_path
from util.errors import ConfigError
from util.lists import describe_left_out
from util.outputs import is_own

LISTS = ("train.txt", "labeled.txt", "val.txt")


def find_samples(
    images: Path, labels: Path, root: Path, left_out: list[str] | None = None
) -> tuple[list[Sample], list[str]]:
    """Images with their labels, None without one, as paths relative to `root`, and labels without an image; sorted.

    `left_out` gets what is passed over in the folder of images, as `images_in` says it.
    Where one folder lies in the other, its files count for it alone; if both are the same, PNGs are the labels.
    """
    for option, folder in (("--images", images), ("--labels", labels)):
        if not folder.is_dir():
            raise DataError(f"{option} {folder}: no such folder")
    image_of = _by_stem(images, labels, root, "image", left_out)
    label_of = _by_stem(labels, images, root, "label")
    samples = [Sample(image, label_of.get(stem)) for stem, image in image_of.items()]
    if not any(sample.label for sample in samples):
        raise DataError(
            f"{labels}: no label has the name of an image: {next(iter(image_of.values()))} is an image, "
            f"{next(iter(label_of.values()))} a label; a.jpg needs a.png, in the same sub-folder"
        )
    return sorted(samples), [label for stem, label in label_of.items() if stem not in image_of]


def _by_stem(folder: Path, other: Path, root: Path, kind: str, left_out: list[str] | None = None) -> dict[str, str]:
    """{path in `folder` without suffix: path relative to `root`} of its images or labels."""
    found: dict[str, str] = {}

    def is_prediction(path: Path) -> bool:  # labels may be predictions, as pseudo-labels are
        return kind == "image" and not path.is_relative_to(other) and is_own(path)

    for name in images_in(folder, folder, left_out, is_prediction=is_prediction):
        is_label = name.lower().endswith(".png")
        if (kind == "label" and not is_label) or (folder == other and kind == "image" and is_label):
            continue
        if folder != other and other.is_relative_to(folder) and (folder / name).is_relative_to(other):
            continue
        stem, path = os.path.splitext(name)[0], (folder / name).relative_to(root).as_posix()
        if stem in found:
            raise DataError(f"{root}: {found[stem]} and {path} have one name; which {kind} is meant? rename one")
        found[stem] = path
    if not found:
        raise DataError(f"{folder}: no {kind} in this folder" + (" (labels are .png files)" if kind == "label" else ""))
    return found


def count_pixels(
    labels: Sequence[Path], label_map: Mapping[int, int] | None, threads: int = 8, colors: LabelColors | None = None
) -> np.ndarray:
    """Pixels of each value 0..255, after `label_map`, in each label: int64 (labels, 256)."""

    def count(path: Path) -> np.ndarray:
        return np.bincount(np.asarray(map_label(read_label(path, colors), label_map)).ravel(), minlength=256)

    with ThreadPoolExecutor(threads) as pool:  # Pillow's decoders release the interpreter lock
        return np.stack(list(tqdm(pool.map(count, labels), "labels", len(labels), unit="label", disable=None)))


def draw(present: np.ndarray, num_labeled: int, num_val: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (sorted) of the labelled and of the validation images; `present` is bool (images, classes).

    Both first get images until each has every class that is left, rarest class first, then others at random. An
    image that other images can stand in for is preferred to the last one of a class.
    """
    pool = np.random.default_rng(seed).permutation(len(present))
    chosen = []
    for size in (num_labeled, num_val):
        part = _cover(present, pool, size)
        pool = pool[~np.isin(pool, part)]
        chosen.append(part)
    labeled, val = chosen
    val = [*val, *pool[: num_val - len(val)]]
    pool = pool[~np.isin(pool, val)]
    labeled = [*labeled, *pool[: num_labeled - len(labeled)]]
    return np.sort(labeled), np.sort(val)


def _cover(present: np.ndarray, pool: np.ndarray, size: int) -> list[int]:
    """At most `size` images of `pool` that have each of its classes, found greedily."""
    chosen: list[int] = []
    frequency = present[pool].sum(0)
    missing = frequency > 0
    left = frequency.copy()
    while missing.any() and len(chosen) < size:
        rarest = np.flatnonzero(missing)[frequency[missing].argmin()]
        candidates = pool[present[pool, rarest] & ~np.isin(pool, chosen)]
        lasts = (present[candidates] & ~missing & (left == 1)).sum(1)  # of classes already here, so taken in vain
        gains = (present[candidates] & missing).sum(1)
        best = candidates[np.lexsort((-gains, lasts))[0]]
        chosen.append(int(best))
        missing &= ~present[best]
        left -= present[best]
    return chosen


def parse_share(text: str, option: str, total: int) -> int:
    """How many of `total` images `text` means: a whole number, or a share such as 1/8 or 0.125 (at least one image)."""
    try:
        if not re.fullmatch(r"-?(\d+/\d+|\d*\.?\d+)", text):
            raise ValueError(text)
        count = int(text) if text.lstrip("-").isdigit() else None
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{option} {text}: expected a share such as 1/8 or 0.125, or a number of images") from None
    if count is None and not 0 < share <= 1:
        raise ConfigError(f"{option} {text}: a share lies above 0 and is at most 1")
    if count is not None and count < 1:
        raise ConfigError(f"{option} {text}: at least 1 image is needed")
    return max(1, round(share * total)) if count is None else count


def list_line(image: str, label: str | None = None) -> str:
    """A line that `read_list` reads as these names; with a tab where a name has white space."""
    names = [image] if label is None else [image, label]
    for name in names:
        encodable = name.encode("utf-8", "replace").decode() == name
        if "\t" in name or name != name.strip() or len(name.splitlines()) > 1 or not encodable:
            raise DataError(f"{name!r}: a list cannot hold this name (tab, line break or odd character); rename it")
    if image.startswith(("#", "\ufeff")):  # else a comment, or a mark at the file's beginning
        names[0] = f"./{image}"
    if not any(character.isspace() for name in names for character in name):
        return " ".join(names)
    return "\t".join(names) if label else f"{names[0]}\t"


def write_lists(folder: Path, lists: Mapping[str, Sequence[str]]) -> None:
    """Write {file name: lines}; no file appears unless all could be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:
            for name, lines in lists.items():
                temporary = files.enter_context(replacing(folder / name))
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None


def count_table(pixels: np.ndarray, labeled: np.ndarray, val: np.ndarray) -> str:
    """A row per class that occurs: its share of the pixels, and how many images have it."""
    present, total = pixels > 0, pixels.sum()
    rows = [f"{'class':>5} {'pixels':>8} {'images':>7} {'labelled':>9} {'validation':>11}"]
    for index in np.flatnonzero(present.any(0)):
        column = present[:, index]
        share = f"{100 * pixels[:, index].sum() / total:.2f} %"
        rows.append(f"{index:>5} {share:>8} {column.sum():>7} {column[labeled].sum():>9} {column[val].sum():>11}")
    return "\n".join(rows)


def config_snippet(
    name: str,
    root: str,
    output: Path,
    classes: int,
    label_map: Mapping[int, int] | None,
    colors: LabelColors | None = None,
) -> str:
    """The keys of a config that these lists determine, as YAML."""
    named = {"classes": [f"class {i}" for i in range(classes)]} if classes <= 40 else {"nclass": classes}
    keys = {"dataset": re.sub(r"[^\w.-]", "_", name) or "my_data", "data_root": root, **named}
    if label_map:
        keys["label_map"] = dict(label_map)
    if colors:
        keys["label_colors"] = [list(colour) for colour in colors]
    keys |= {"val_id_path": str(output / "val.txt"), "unlabeled_id_path": str(output / "train.txt")}
    return yaml.safe_dump(keys, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the lists as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.make_splits", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of images, searched in depth")
    parser.add_argument("--labels", required=True, metavar="DIR", help="folder of labels: PNGs with the images' names")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the lists, such as splits/leaves")
    parser.add_argument("--data-root", metavar="DIR", help="what the lists' paths are relative to (default: the folder "
                        "that holds images and labels)")  # fmt: skip
    parser.add_argument("--val", default="0.1", metavar="N", help="validation images: share or number (default: 0.1)")
    parser.add_argument("--labeled", default="1/8", metavar="N", help="labelled ones among the other images that have "
                        "a label: share or number; 1/1 is all (default: 1/8)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="another number draws other images (default: 0)")
    parser.add_argument("--label-map", metavar="MAP", help="as the config's label_map: '{0: 0, 255: 1}'")
    parser.add_argument(
        "--label-colors", metavar="COLOURS", help="as the config's label_colors: '[[0, 0, 0], [9, 9, 9]]'"
    )
    parser.add_argument("--force", action="store_true", help="replace existing lists")
    args = parser.parse_args(argv)

    label_map = parse_label_map(args.label_map, f"--label-map {args.label_map}") if args.label_map else None
    colors = parse_label_colors(args.label_colors, f"--label-colors {args.label_colors}") if args.label_colors else None
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: must be at least 0")
    output = Path(args.output)
    existing = [name for name in LISTS if os.path.exists(output / name)]
    if existing and not args.force:
        raise DataError(f"{output / existing[0]}: exists already; --force replaces it, or choose another --output")
    images, labels = (Path(os.path.abspath(resolve_path(path))) for path in (args.images, args.labels))
    root = Path(os.path.abspath(resolve_path(args.data_root))) if args.data_root else _common_folder(images, labels)
    for option, folder in (("--images", images), ("--labels", labels)):
        if not folder.is_relative_to(root):
            raise ConfigError(f"--data-root {root}: does not hold {option} {folder}")

    left_out: list[str] = []
    samples, orphans = find_samples(images, labels, root, left_out)
    pairs = [sample for sample in samples if sample.label]
    num_val = parse_share(args.val, "--val", len(pairs))
    num_labeled = parse_share(args.labeled, "--labeled", max(0, len(pairs) - num_val))
    if num_val + num_labeled > len(pairs):
        raise DataError(
            f"{labels}: {len(pairs)} images have a label, but --val {args.val} and --labeled {args.labeled} "
            f"ask for {num_val} + {num_labeled}; lower them"
        )
    pixels = count_pixels([root / sample.label for sample in pairs], label_map, colors=colors)
    ignored = bool(pixels[:, IGNORE_INDEX].any())
    pixels[:, IGNORE_INDEX] = 0
    found = np.flatnonzero(pixels.any(0))
    if not found.any():  # no class, or class 0 alone
        hint = f"; {mask_hint()} (here: --label-map '{{0: 0, 255: 1}}')" if ignored and not label_map else ""
        raise DataError(f"{labels}: no class but 0 occurs in the {len(pairs)} labels{hint}")
    labeled, val = draw(pixels > 0, num_labeled, num_val, args.seed)

    in_val = {pairs[i].image for i in val}
    train = [sample.image for sample in samples if sample.image not in in_val]
    lines = (
        [list_line(image) for image in train],
        [list_line(*pairs[i]) for i in labeled],
        [list_line(*pairs[i]) for i in val],
    )
    write_lists(output, dict(zip(LISTS, lines, strict=True)))

    print(f"{output}: {len(labeled)} labelled, {len(train) - len(labeled)} unlabelled and {len(val)} validation images")
    for line in describe_left_out(images, left_out):
        print(line)
    if orphans:
        print(f"note: {len(orphans)} labels have no image and were left out, such as {orphans[0]}")
    print(count_table(pixels, labeled, val))
    for kind, indices in (("labelled", labeled), ("validation", val)):
        if absent := [str(c) for c in found if not pixels[indices, c].any()]:
            print(f"note: no {kind} image has class {', '.join(absent)}: too few images")
    classes = int(found[-1]) + 1
    if gaps := classes - len(found):
        print(f"note: {gaps} of the values 0..{classes - 1} never occur; --label-map can give consecutive classes")
    shown = os.path.relpath(root) if root.is_relative_to(Path.cwd()) else str(root)
    print("\nfor the config (name the classes; configs/custom.yaml explains the other keys):\n")
    print(config_snippet(root.name, shown, output, max(2, classes), label_map, colors))
    print(f"and on the command line: --labeled-id-path {output / 'labeled.txt'}")


def _common_folder(images: Path, labels: Path) -> Path:
    try:
        return Path(os.path.commonpath([images, labels]))
    except ValueError:  # two drives
        raise ConfigError(f"--images {images}, --labels {labels}: no folder holds both") from None


if __name__ == "__main__":
    run_main(main)
