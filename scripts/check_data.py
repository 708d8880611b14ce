"""Check everything that a run would open, and count the classes: all faults are listed, not only the first.

    python -m scripts.check_data --config configs/leaves.yaml --labeled-id-path splits/leaves/labeled.txt --output check

Every image and label is decoded whole. Exit status: 0 if training can start, 1 if it could not (with --strict: also if
there are warnings), 2 if nothing could be checked, for instance if a list is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.files import IGNORE_INDEX, limit_image_pixels
from dataset.lists import Sample, read_list
from dataset.loader import default_workers
from dataset.prepare.audit import Inspection, inspect_lists
from dataset.prepare.findings import ERROR, LEVELS, WARNING, Findings
from dataset.prepare.statistics import channel_statistics
from util.cli import add_common_arguments, run_main
from util.config import Config, load_config, resolve_path
from util.errors import ConfigError
from util.lists import data_source, list_unlabeled
from util.outputs import MARK, check_targets, replacing, save_picture
from util.plots import has_matplotlib, share_chart
from util.screen import show_progress
from util.visualize import percent

REPORT, CHART = "report.txt", "classes.png"


def format_findings(findings: Findings, shown: int | None = None) -> Iterator[str]:
    """The lines of the findings by level and kind, at most `shown` of a kind; a blank line before each kind."""
    kinds = [(level, kind) for level in LEVELS for kind in findings.kinds(level)]
    if not kinds:
        yield from ("", "nothing to report")
    for level, kind in kinds:
        count = findings.count(level, kind)
        yield from ("", f"{level}: {kind}" + (f" ({count})" if count > 1 else ""))
        yield from (f"  {text}" for text in islice(findings.messages(level, kind), shown))
        if shown is not None and count > shown:
            yield f"  ... and {count - shown} more"


def class_table(inspection: Inspection, classes: Sequence[str]) -> str:
    """A row per class: its share of the pixels that are not ignored, and the number of images that have it."""
    labels = [*(f"{index:>3} {name}" for index, name in enumerate(classes)), "ignored (of all)"]
    width = max(map(len, labels))
    rows = [f"{text:<{width}}" for text in ("share of pixels", *labels)]
    for name, shares in class_shares(inspection, len(classes)).items():
        pixels, images = inspection.pixels[name], inspection.images[name]
        shares = [*shares, pixels[IGNORE_INDEX] / pixels.sum()]
        counts = [*images[: len(classes)], images[IGNORE_INDEX]]
        rows[0] += f"  {name:>10} {'images':>8}"
        for number, (share, count) in enumerate(zip(shares, counts, strict=True), 1):
            rows[number] += f"  {percent(share):>10} {count:>8}"
    return "\n".join(rows)


def class_shares(inspection: Inspection, nclass: int) -> dict[str, np.ndarray]:
    """Each class's share of the class pixels of every list that has labels: float64 (nclass,), 0 to 1."""
    counts = {name: pixels[:nclass] for name, pixels in inspection.pixels.items()}
    return {name: pixels / max(1, pixels.sum()) for name, pixels in counts.items()}


def write_output(folder: Path, report: Iterable[str], chart: Image.Image | None) -> None:
    """Write the report's lines and the chart; each replaces an earlier one as a whole. Raises ConfigError."""
    with (
        replacing(folder / REPORT) as temporary,
        # A folder may hold file names that are not UTF-8.
        open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(f"{line}\n" for line in chain([f"{MARK} (scripts.check_data)", ""], report))
    if chart is not None:
        save_picture(chart, folder / CHART)


def main(argv: Sequence[str] | None = None) -> None:
    """Check as the command line says; faults in the data end it with status 1."""
    parser = argparse.ArgumentParser(prog="scripts.check_data", description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser)
    parser.add_argument("--labeled-id-path", metavar="F", help="list of labelled images (default: none are checked)")
    parser.add_argument("--unlabeled-id-path", metavar="F", help="list of unlabelled images, or a folder of images "
                        "under data_root (default: the config's unlabeled_id_path, if any)")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help=f"folder for {REPORT}, with all findings, and {CHART}, a bar "
                        "chart of the classes; earlier ones are replaced")  # fmt: skip
    parser.add_argument("--show", type=int, default=5, metavar="N", help="findings of a kind on screen (default: 5)")
    parser.add_argument("--strict", action="store_true", help="let warnings count as faults in the exit status")
    parser.add_argument("--channel-statistics", action="store_true", help="print mean and std of each channel over the "
                        "training images, as lines for the config")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: a share of the cores, 8 at most)")
    args = parser.parse_args(argv)
    for option, value, minimum in (("--show", args.show, 0), ("--workers", args.workers, 1)):
        if value is not None and value < minimum:
            raise ConfigError(f"{option} {value}: must be at least {minimum}")

    cfg = load_config(args.config, args.overrides)
    limit_image_pixels(cfg.max_image_pixels)
    data_root = resolve_path(cfg.data_root)
    inside = None if cfg.allow_outside_root else data_root
    read = partial(read_list, inside=inside, progress=show_progress)
    labeled = read(resolve_path(args.labeled_id_path)) if args.labeled_id_path else []
    val = read(resolve_path(cfg.val_id_path))
    notes: list[str] = []
    unlabeled = list_unlabeled(cfg, args.unlabeled_id_path, labeled, show_progress, notes) or []
    output = Path(args.output) if args.output else None
    if output:
        given = (args.config, args.labeled_id_path, args.unlabeled_id_path, cfg.unlabeled_id_path, cfg.val_id_path)
        images = (data_root / name for sample in chain(labeled, unlabeled, val) for name in sample if name)
        files = chain((resolve_path(path) for path in given if path), images)
        check_targets([output / REPORT, output / CHART], (("input", path) for path in files))
        _make_folder(output)
    findings = Findings(args.show, output)
    inspection = inspect_lists(
        labeled,
        unlabeled,
        val,
        data_source(cfg),
        cfg.classes,
        cfg.crop_size,
        default_workers(1) if args.workers is None else args.workers,
        show_progress,
        findings,
    )
    title = (
        f"{cfg.dataset}: {len(labeled)} labelled, {len(unlabeled)} unlabelled and {len(val)} validation images in "
        f"{data_root}, {cfg.nclass} classes"
    )
    title = "\n".join([title, *notes])
    table = class_table(inspection, cfg.classes)
    verdict = _verdict(findings, args.strict)
    text = "\n".join([title, *format_findings(findings, args.show), "", table, "", verdict])
    print(text.encode("utf-8", "backslashreplace").decode())
    if args.channel_statistics:
        print(_statistics_lines(cfg, data_root, labeled, unlabeled))
    if output:
        shares = class_shares(inspection, cfg.nclass)
        drawn = bool(shares) and has_matplotlib()
        report = chain([title], format_findings(findings), ["", table, "", verdict])
        write_output(output, report, share_chart(cfg.classes, shares) if drawn else None)
        print(f"all findings are in {output / REPORT}" + (f", the classes in {output / CHART}" if drawn else ""))
        if shares and not drawn:
            print(f"{output / CHART} is not drawn: it needs matplotlib: pip install -r requirements-tools.txt")
    if findings.kinds(ERROR) or (args.strict and findings.kinds(WARNING)):
        raise SystemExit(1)


def _statistics_lines(cfg: Config, data_root: Path, *lists: Sequence[Sample]) -> str:
    """`mean` and `std` as lines for the config."""
    paths = (data_root / sample.image for sample in chain(*lists))
    paths = show_progress("channel statistics", "images", paths, sum(map(len, lists)))
    found = channel_statistics(paths, cfg.channels, cfg.bands)
    if found is None:
        return "\nno channel statistics: there is no readable training image"
    return "\n" + "\n".join(
        f"{name}: [{', '.join(f'{value:.4f}' for value in values)}]" for name, values in found._asdict().items()
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be made: {error.strerror or error}") from None


def _verdict(findings: Findings, strict: bool) -> str:
    counts = {level: sum(findings.count(level, kind) for kind in findings.kinds(level)) for level in LEVELS}
    counted = ", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items())
    if counts[ERROR]:
        return f"{counted}: training would stop at the first error"
    return f"{counted}: " + ("refused by --strict" if strict and counts[WARNING] else "nothing that stops training")


if __name__ == "__main__":
    run_main(main)
