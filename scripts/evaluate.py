"""Evaluate a checkpoint, one of ours or a published one, on the config's validation list.

    python -m scripts.evaluate --checkpoint exp/.../best.pth [--config configs/pascal.yaml]

Prints the IoU of every class and the mean. Without --config, the checkpoint's own is used; published checkpoints have
none. Several processes share the images under torchrun or srun.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dataset.check import check_samples
from dataset.files import limit_image_pixels
from dataset.lists import read_list
from dataset.loader import val_loader
from dataset.source import DataSource
from util.cli import run_main
from util.config import EVAL_MODES, resolve_path
from util.distributed.group import process_group
from util.distributed.launch import choose_device, find_processes
from util.evaluate import evaluate
from util.metrics import iou_table
from util.precision import check_precision
from util.run import loader_options
from util.trained import add_model_arguments, open_trained


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.evaluate", description=__doc__.split("\n", 1)[0])
    add_model_arguments(parser)
    parser.add_argument("--mode", choices=EVAL_MODES, help="instead of the config's eval_mode")
    parser.add_argument("--port", type=int, help="rendezvous port under srun")
    args = parser.parse_args(argv)

    trained = open_trained(args)
    cfg = trained.cfg
    processes = find_processes(args.port)
    device = choose_device(cfg.device, processes)
    check_precision(cfg, device)
    limit_image_pixels(cfg.max_image_pixels)
    data_root = resolve_path(cfg.data_root)
    samples = read_list(resolve_path(cfg.val_id_path), inside=None if cfg.allow_outside_root else data_root)
    if processes.is_main and cfg.check_data:
        check_samples(samples, data_root, cfg.nclass, label_map=cfg.label_map)
    if processes.is_main:
        print("".join(f"{note}\n" for note in trained.notes), end="")
    model = trained.build()
    mode = args.mode or cfg.eval_mode
    with process_group(processes, device):
        source = DataSource(data_root, cfg.label_map)
        loader = val_loader(samples, source, loader_options(cfg, device), processes.rank, processes.count)
        result = evaluate(trained.ready(model, device), loader, mode, cfg.crop_size, cfg.nclass, device)
    if processes.is_main:
        print(f"{args.checkpoint}: IoU in percent ({mode}, {len(samples)} images)")
        print(iou_table(result.iou, cfg.classes))


if __name__ == "__main__":
    run_main(main)
