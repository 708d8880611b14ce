"""Compare training runs on one page: scores over seeds, curves, classes, pictures, and the commands that repeat them.

    python -m scripts.report exp/toy/unimatch/r18/8 exp/toy/fixmatch/r18/8 --out report.html

A folder is a run's save path or holds several, such as seed0, seed1 and so on. The page is one file that needs nothing
else. Runs are only read. Needs matplotlib (requirements-tools.txt).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from scripts.report.page import page
from scripts.report.pictures import Gallery, make_gallery
from scripts.report.runs import RunRecord, find_runs, group_runs
from util.cli import run_main
from util.errors import ConfigError
from util.outputs import check_suffix, check_targets, writing
from util.plots import require_matplotlib
from util.trained import add_colors_argument


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page that the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts.report", description=__doc__.split("\n", 1)[0])
    parser.add_argument("folders", nargs="+", metavar="EXP_DIR", help="a run's save path, or a folder of such")
    parser.add_argument("--out", required=True, metavar="F", help="the page, F.html; an earlier report is replaced")
    parser.add_argument(
        "--images", type=int, default=4, metavar="N", help="validation images that each run predicts (default: 4)"
    )
    add_colors_argument(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.images <= 100:
        raise ConfigError(f"--images {args.images}: must be from 0 to 100")
    check_suffix("--out", args.out, (".html",))
    require_matplotlib("scripts.report")
    runs = find_runs(args.folders)
    _check_out(Path(args.out), runs)

    sections = []
    for same_data in _by_data(runs):
        gallery = make_gallery(same_data, args.images, args.colors) if args.images else None
        sections.append((group_runs(same_data), gallery or Gallery([], {}, [])))
    made = f"{len(runs)} run{'s' * (len(runs) > 1)}, {datetime.now():%Y-%m-%d %H:%M}"
    text = page(sections, made)
    with writing(Path(args.out)) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    print(f"{args.out}: {made}, {len(text) // 1000} kB")


def _check_out(out: Path, runs: Sequence[RunRecord]) -> None:
    """Refuse to write into a run's folder, or over a file that is no earlier report."""
    for run in runs:
        if out.resolve().is_relative_to(run.path.resolve()):
            raise ConfigError(f"--out {out}: is inside the run {run.path}, which is only read: choose another place")
    check_targets([out], [])


def _by_data(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs by what their scores are measured on."""
    found: dict[object, list[RunRecord]] = {}
    for run in runs:
        cfg = run.cfg
        truth = (str(cfg.label_map), str(cfg.color_values))
        key = (cfg.dataset, cfg.classes, run.lists.get("validation list", cfg.val_id_path), truth)
        found.setdefault(key, []).append(run)
    return list(found.values())


if __name__ == "__main__":
    run_main(main)
