"""Evaluate a checkpoint, one of ours or a published one, on the config's validation list.

    python -m scripts.evaluate --checkpoint exp/.../best.pth [--config configs/pascal.yaml] [--out DIR]

Prints the IoU of every class and the mean. Without --config, the checkpoint's own is used; published checkpoints have
none. With --out, metrics.json, a table and pictures are written. Several processes share the images under torchrun or
srun.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dataset.files import limit_image_pixels
from dataset.lists import read_list
from dataset.samples import Samples
from dataset.semi import ValDataset
from util.analysis import Analysis, Numbered
from util.cli import run_main
from util.config import EVAL_MODES, resolve_path
from util.distributed.group import process_group
from util.distributed.launch import choose_device, find_processes
from util.errors import ConfigError
from util.evaluate import evaluate
from util.evaluation_report import FILES, Report, View
from util.lists import check_listed, data_source
from util.metrics import iou_table
from util.outputs import check_targets
from util.plots import require_matplotlib
from util.run import loader_options
from util.trained import (
    add_colors_argument,
    add_model_arguments,
    add_view_arguments,
    check_view_arguments,
    chosen_palette,
    open_trained,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.evaluate", description=__doc__.split("\n", 1)[0])
    add_model_arguments(parser)
    parser.add_argument("--mode", choices=EVAL_MODES, help="instead of the config's eval_mode")
    add_view_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help=f"folder for {', '.join(FILES)}; earlier ones are replaced")
    parser.add_argument(
        "--worst",
        type=int,
        default=8,
        metavar="N",
        help="images in worst.png (default: 8); with 0 an earlier worst.png is removed",
    )
    add_colors_argument(parser)
    parser.add_argument("--port", type=int, help="rendezvous port under srun")
    args = parser.parse_args(argv)
    check_view_arguments(args)
    if args.worst < 0:
        raise ConfigError(f"--worst {args.worst}: must be at least 0")
    if args.out:
        require_matplotlib("--out")

    trained = open_trained(args)
    processes = find_processes(args.port)
    device = choose_device(trained.cfg.device, processes)
    trained = trained.on(device, args)
    cfg = trained.cfg
    limit_image_pixels(cfg.max_image_pixels)
    data_root = resolve_path(cfg.data_root)

    def prepare() -> Samples | None:
        if not processes.is_main:  # it reads and checks for all
            return None
        samples = read_list(resolve_path(cfg.val_id_path), inside=None if cfg.allow_outside_root else data_root)
        notes = [*trained.notes, *check_listed(cfg, [samples])]
        print("".join(f"{note}\n" for note in notes), end="")
        if args.out:
            data = [(kind, data_root / path) for sample in samples for kind, path in sample._asdict().items() if path]
            check_targets([Path(args.out) / name for name in FILES], trained.files(args) + data)
        return samples

    model = trained.build()
    view = View(args.mode or cfg.eval_mode, cfg.crop_size, tuple(args.scales), args.flip)
    with process_group(processes, device, prepare=prepare) as samples:
        source = data_source(cfg)
        share = ValDataset(samples[processes.rank :: processes.count], source)
        dataset = Numbered(share, processes.rank, processes.count)
        loader = loader_options(cfg, device).build(dataset, batch_size=1)
        analysis = Analysis(cfg.nclass, len(samples), cfg.conf_thresh, device) if args.out else None
        model = trained.ready(model, device)
        result = evaluate(
            model,
            loader,
            view.mode,
            view.crop_size,
            cfg.nclass,
            device,
            view.scales,
            view.flip,
            analysis,
            cfg.normalization,
        )
        if analysis is not None:
            analysis.finish()
    if not processes.is_main:
        return
    print(f"{args.checkpoint}: IoU in percent ({view.mode}, {len(samples)} images)")
    print(iou_table(result.iou, cfg.classes))
    if analysis is not None:
        report = Report(trained, samples, view, result, analysis, chosen_palette(cfg, args.colors))
        worst = [
            (number, miou, report.show(model, source, number, device)) for number, miou in analysis.worst(args.worst)
        ]
        report.write(Path(args.out), worst)
        print("\n".join(report.summary()))
        print(f"metrics, table and pictures are in {args.out}")


if __name__ == "__main__":
    run_main(main)
