"""Evaluate a checkpoint, one of ours or a published one, on the config's validation list.

    python -m scripts.evaluate --config configs/pascal.yaml --checkpoint exp/.../best.pth

Prints the IoU of every class and the mean. Several processes share the images under torchrun or srun.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dataset.check import check_samples
from dataset.files import limit_image_pixels
from dataset.lists import read_list
from dataset.loader import val_loader
from model import build_model, load_checkpoint_state, read_checkpoint
from util.cli import add_common_arguments, run_main
from util.config import EVAL_MODES, load_config, resolve_path
from util.distributed.group import process_group
from util.distributed.launch import choose_device, find_processes
from util.evaluate import evaluate
from util.metrics import iou_table
from util.precision import check_precision, evaluation_copy, set_precision
from util.run import loader_options


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    parser = argparse.ArgumentParser(prog="scripts.evaluate", description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser)
    parser.add_argument(
        "--checkpoint", required=True, metavar="F", help="best.pth, latest.pth or a published checkpoint"
    )
    parser.add_argument("--mode", choices=EVAL_MODES, help="instead of the config's eval_mode")
    parser.add_argument("--port", type=int, help="rendezvous port under srun")
    args = parser.parse_args(argv)

    cfg = load_config(args.config, args.overrides)
    processes = find_processes(args.port)
    device = choose_device(cfg.device, processes)
    check_precision(cfg, device)
    limit_image_pixels(cfg.max_image_pixels)
    data_root = resolve_path(cfg.data_root)
    samples = read_list(resolve_path(cfg.val_id_path), inside=None if cfg.allow_outside_root else data_root)
    if processes.is_main and cfg.check_data:
        check_samples(samples, data_root, cfg.nclass, label_map=cfg.label_map)
    model = build_model(cfg, pretrained=False)
    load_checkpoint_state(model, read_checkpoint(resolve_path(args.checkpoint)), args.checkpoint)
    mode = args.mode or cfg.eval_mode
    with process_group(processes, device):
        loader = val_loader(
            samples,
            data_root,
            loader_options(cfg, device),
            processes.rank,
            processes.count,
            cfg.label_map,
        )
        model = evaluation_copy(set_precision(model.to(device), cfg))
        result = evaluate(model, loader, mode, cfg.crop_size, cfg.nclass, device)
    if processes.is_main:
        print(f"{args.checkpoint}: IoU in percent ({mode}, {len(samples)} images)")
        print(iou_table(result.iou, cfg.classes))


if __name__ == "__main__":
    run_main(main)
