"""Draw the pictures of the documents: the method, the views of an image, predictions, and learning curves.

    sh scripts/quickstart.sh
    python -m scripts.make_figures --out docs --checkpoint exp/toy/unimatch/quickstart/best.pth

`method.png` needs nothing. `views.png` and `toy.png` show the data of a checkpoint, `curves.png` the runs of several
seeds in METHOD/seedN of the folder `--runs`. Needs matplotlib (requirements-tools.txt).
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataset.files import read_image, read_label
from dataset.lists import find_unlabeled, read_list
from dataset.transform import (
    apply_geometry,
    apply_photometry,
    draw_cutmix_box,
    draw_geometry,
    draw_photometry,
    normalize,
)
from util.cli import run_main
from util.config import Config, resolve_path
from util.errors import ConfigError
from util.outputs import check_targets, save_picture
from util.semi import pseudo_label
from util.trained import add_model_arguments, open_trained
from util.visualize import colorize

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666666"
MAX_BYTES = 200_000
METHODS = {"unimatch": ("UniMatch", ORANGE), "fixmatch": ("FixMatch", BLUE), "supervised": ("supervised", GREY)}


def pyplot() -> Any:
    """matplotlib, set up for files, on white, which reads well on light and dark pages. Raises ConfigError."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("matplotlib is missing: pip install -r requirements-tools.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.facecolor": "white", "savefig.facecolor": "white", "font.size": 10})
    return plt


def method_figure(plt: Any) -> Any:
    """What goes into a UniMatch step, and what each loss compares."""
    figure, axes = plt.subplots(figsize=(9.6, 4.6))
    axes.set(xlim=(0, 104), ylim=(-4, 45))
    axes.axis("off")
    y = {"x": 38, "fp": 28.5, "w": 19.5, "s1": 10.5, "s2": 2}  # the rows' lower edges; boxes are 5 high

    def box(x: float, row: str, text: str, colour: str, width: float = 16) -> None:
        style = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour, "linewidth": 1.6}
        axes.add_patch(plt.matplotlib.patches.FancyBboxPatch((x, y[row]), width, 5, **style))
        axes.text(x + width / 2, y[row] + 2.5, text, ha="center", va="center", fontsize=9)

    def arrow(colour: str, *points: tuple[float, float], style: str = "-") -> None:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, linestyle=style, zorder=0)
        head = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", points[-1], points[-2], arrowprops={**head, "linestyle": style})

    def across(x: float, row: str, end: float, colour: str) -> None:
        arrow(colour, (x, y[row] + 2.5), (end, y[row] + 2.5))

    box(0.5, "x", "labelled image", GREEN)
    box(0.5, "w", "unlabelled image", BLUE)
    views = {"x": ("x", GREEN), "w": ("w: weak view", BLUE)}
    views |= {"s1": ("s1: strong view\n+ CutMix", ORANGE), "s2": ("s2: strong view\n+ CutMix", ORANGE)}
    for row, (text, colour) in views.items():
        box(24, row, text, colour)
        across(40.4, row, 46.1, colour)
    across(16.9, "x", 23.6, GREEN)
    across(16.9, "w", 23.6, BLUE)
    for row in ("s1", "s2"):  # both start from the weak view
        arrow(ORANGE, (23.6, y["w"] + 1), (21, y["w"] + 1), (21, y[row] + 2.5), (23.6, y[row] + 2.5))
    style = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "black", "linewidth": 1.6}
    axes.add_patch(plt.matplotlib.patches.FancyBboxPatch((46.5, 1), 7, 43, **style))
    axes.text(50, 22.5, "one model", rotation=90, ha="center", va="center", fontsize=10.5)

    predictions = {"x": ("prediction", GREEN), "fp": ("fp: w with half of\nits features dropped", ORANGE)}
    predictions |= {"w": ("pseudo-label\nand confidence", BLUE)}
    predictions |= {"s1": ("prediction", ORANGE), "s2": ("prediction", ORANGE)}
    for row, (text, colour) in predictions.items():
        box(60, row, text, colour, width=17)
        across(53.9, row, 59.6, colour)
    losses = {"x": "loss_x", "fp": "loss_fp", "s1": "loss_s1", "s2": "loss_s2"}
    for row, text in losses.items():
        colour = GREEN if row == "x" else ORANGE
        box(84, row, text, colour, width=10)
        across(77.4, row, 83.6, colour)
    arrow(GREEN, (99, y["x"] + 2.5), (94.4, y["x"] + 2.5), style="--")
    axes.text(99.6, y["x"] + 2.5, "label", color=GREEN, fontsize=9, va="center")
    for row in ("fp", "s1", "s2"):
        arrow(BLUE, (77.4, 22), (99, 22), (99, y[row] + 2.5), (94.4, y[row] + 2.5), style="--")
    axes.text(78.2, 22.6, "target where confident", color=BLUE, fontsize=9)
    formula = "loss = (loss_x + 0.25 loss_s1 + 0.25 loss_s2 + 0.5 loss_fp) / 2"
    axes.text(50, -3, formula, ha="center", family="monospace", fontsize=10)
    return figure


def views_figure(plt: Any, cfg: Config, model: torch.nn.Module, rows: int = 3) -> Any:
    """Unlabelled images as FixMatch and UniMatch see them, with a trained model's pseudo-labels."""
    root = resolve_path(cfg.data_root)
    samples = find_unlabeled(cfg.unlabeled_id_path, root, [], cfg.allow_outside_root)
    rows = min(rows, len(samples))
    titles = ["weak view w", "strong view s1", "s1 with CutMix", "pseudo-label of w", "confidence of w"]
    figure, grid = plt.subplots(
        rows, len(titles), figsize=(9.6, 1.72 * rows + 0.3), layout="constrained", squeeze=False
    )
    for row, (axes, sample) in enumerate(zip(grid, samples[:: len(samples) // rows], strict=False)):
        image, rng = read_image(root / sample.image), np.random.default_rng(row)
        views = []
        for _ in range(2):  # the image's own view, and its CutMix partner: another view of the same image
            geometry = draw_geometry(*image.size, cfg.crop_size, rng)
            weak = apply_geometry(image, geometry, cfg.crop_size, 0, Image.Resampling.BILINEAR)
            views.append((weak, apply_photometry(weak, draw_photometry(rng))))
        box = None
        while box is None:
            box = draw_cutmix_box(cfg.crop_size, rng)
        (weak, strong), (_, partner) = views
        mixed, corners = strong.copy(), (box.x, box.y, box.x + box.width, box.y + box.height)
        mixed.paste(partner.crop(corners), corners[:2])
        with torch.no_grad():
            label, conf = pseudo_label(model(normalize(weak).unsqueeze(0)))
        pictures = [weak, strong, mixed, colorize(label[0].byte().numpy(), cfg.palette).convert("RGB")]
        for ax, title, picture in zip(axes, titles, [*pictures, None], strict=True):
            ax.set(xticks=[], yticks=[])
            if picture is not None:
                ax.imshow(np.asarray(picture))
            if row == 0:
                ax.set_title(title)
        edge = {"fill": False, "edgecolor": "white", "linewidth": 1.5, "linestyle": "--"}
        axes[2].add_patch(plt.Rectangle((box.x, box.y), box.width, box.height, **edge))
        shown = axes[4].imshow(conf[0].numpy(), cmap="viridis", vmin=1 / cfg.nclass, vmax=1)
        if conf.min() < cfg.conf_thresh < conf.max():
            axes[4].contour(conf[0].numpy(), [cfg.conf_thresh], colors="white", linewidths=1)
    figure.colorbar(shown, ax=grid[:, -1], label=f"white line: conf_thresh = {cfg.conf_thresh:g}")
    return figure


def predictions_figure(plt: Any, cfg: Config, model: torch.nn.Module, rows: int = 3) -> Any:
    """Validation images, their labels and predictions under headings, two images a row."""
    root = resolve_path(cfg.data_root)
    samples = read_list(resolve_path(cfg.val_id_path))[: 2 * rows]
    widths = {"width_ratios": [1, 1, 1, 0.1, 1, 1, 1]}
    rows = math.ceil(len(samples) / 2)
    shape = {"figsize": (9.6, 1.55 * rows + 0.6), "gridspec_kw": widths, "squeeze": False}
    figure, grid = plt.subplots(rows, 7, layout="constrained", **shape)
    for ax in grid.flat:
        ax.axis("off")
        ax.set_anchor("N")
    for index, sample in enumerate(samples):
        image, label = read_image(root / sample.image), np.asarray(read_label(root / sample.label, cfg.color_values))
        with torch.no_grad():
            predicted = model(normalize(image).unsqueeze(0))[0].argmax(0).byte().numpy()
        pictures = [image, colorize(label, cfg.palette), colorize(predicted, cfg.palette)]
        axes = grid[index // 2, 4 * (index % 2) : 4 * (index % 2) + 3]
        for ax, title, picture in zip(axes, ("image", "label", "prediction"), pictures, strict=True):
            ax.imshow(np.asarray(picture.convert("RGB")))
            if index < 2:
                ax.set_title(title)
    handles = [plt.matplotlib.patches.Patch(color=np.array(rgb) / 255) for rgb in cfg.palette]
    figure.legend(handles, cfg.classes, loc="outside lower center", ncols=min(len(handles), 8), frameon=False)
    return figure


def curves_figure(plt: Any, runs: Path) -> Any:
    """mIoU over training steps: a thin line for each seed, a thick one for their mean."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for method, (name, colour) in METHODS.items():
        curves = [read_curve(path) for path in sorted((runs / method).glob("seed*"))]
        curves = [curve for curve in curves if curve]
        if not curves:
            raise ConfigError(f"--runs {runs}: no curves in {runs / method}/seed*")
        for curve in curves:
            axes.plot(curve.keys(), curve.values(), color=colour, linewidth=0.7, alpha=0.45)
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
        label = f"{name}: {means[-1]:.1f}, mean of {len(curves)} seeds"
        axes.plot(steps, means, color=colour, linewidth=2.4, marker="o", markersize=4, label=label)
    axes.set(xlabel="training steps", ylabel="mIoU on the validation images, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def read_curve(path: Path) -> dict[int, float]:
    """Steps done -> mIoU, from the TensorBoard files of a run; {} if there are none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(path.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(path))
    events.Reload()
    return {event.step + 1: event.value for event in events.Scalars("eval/mIoU")}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the command line's arguments allow."""
    parser = argparse.ArgumentParser(prog="scripts.make_figures", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the pictures; earlier ones are replaced"
    )
    parser.add_argument("--checkpoint", metavar="F", help="draws views.png and toy.png with this model and its data")
    parser.add_argument("--runs", metavar="DIR", help="draws curves.png of the runs in DIR/METHOD/seedN")
    args = parser.parse_args(argv)

    plt, out = pyplot(), Path(args.out)
    drawn = [
        "method.png",
        *(["views.png", "toy.png"] if args.checkpoint else []),
        *(["curves.png"] if args.runs else []),
    ]
    check_targets([out / name for name in drawn], [])
    figures = {"method.png": method_figure(plt)}
    if args.checkpoint:
        model_parser = argparse.ArgumentParser()
        add_model_arguments(model_parser)
        model_args, device = model_parser.parse_args(["--checkpoint", args.checkpoint]), torch.device("cpu")
        trained = open_trained(model_args).on(device, model_args)
        model = trained.ready(trained.build(), device)
        figures["views.png"] = views_figure(plt, trained.cfg, model)
        figures["toy.png"] = predictions_figure(plt, trained.cfg, model)
    if args.runs:
        figures["curves.png"] = curves_figure(plt, Path(args.runs))
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110, bbox_inches="tight", pad_inches=0.08)
        image = Image.open(picture).convert("RGB")
        if picture.tell() > MAX_BYTES:  # 256 colours are a third of the size
            image = image.quantize(256, dither=Image.Dither.NONE)
        save_picture(image, out / name, optimize=True)
        print(f"{out / name}: {(out / name).stat().st_size // 1000} kB")


if __name__ == "__main__":
    run_main(main)
