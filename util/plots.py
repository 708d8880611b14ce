"""Charts and pages of pictures by matplotlib, which requirements-tools.txt brings; asked for before hours of work."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from util.errors import ConfigError
from util.visualize import percent

DPI = 100
BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"  # of Okabe and Ito, for all kinds of colour vision
GREY = "#6b6b6b"


def require_matplotlib(what: str) -> None:
    """Raise ConfigError if `what`, an option, cannot be had because matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"{what} needs matplotlib: pip install -r requirements-tools.txt") from None


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, without a window and without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_image(figure: Any) -> Image.Image:
    """The figure as a picture of mode RGB."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())


def plain(text: str, width: int = 40) -> str:
    """A name as matplotlib draws it: as it is, no formula, no line break, cut to `width` characters."""
    text = " ".join(text.encode("utf-8", "replace").decode().split()).replace("$", r"\$")
    return text if len(text) <= width else text[: width - 3] + "..."


def contact_sheet(
    cells: Sequence[tuple[str, Sequence[np.ndarray]]],
    titles: Sequence[str],
    classes: Sequence[str],
    palette: np.ndarray,
    present: Sequence[int],
    across: int = 2,
) -> Image.Image:
    """One page: for each cell its pictures side by side with its name, and a legend of the classes `present`.

    A cell is `(name, pictures)`, uint8 (H, W, 3) each, as many as there are `titles`, which head each column.
    """
    from matplotlib.patches import Patch

    across = min(across, len(cells))
    rows, columns = -(-len(cells) // across), across * len(titles)
    shapes = [pictures[0].shape for _, pictures in cells]
    # Height by width of each row's tallest picture: a wide picture leaves no gap below.
    ratios = [max(shape[0] / shape[1] for shape in shapes[row * across :][:across]) for row in range(rows)]
    ratios = [min(2.0, ratio) for ratio in ratios]
    width = max(6.0, 2.6 * columns)
    legend_rows = -(-len(present) // max(1, int(width / 1.9)))
    heights = [width / columns * ratio + 0.3 for ratio in ratios]
    figure = new_figure(width, sum(heights) + 0.4 + 0.22 * legend_rows)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
        axis.set_anchor("N")
    for number, (name, pictures) in enumerate(cells):
        row, column = divmod(number, across)
        for offset, picture in enumerate(pictures):
            axis = axes[row, column * len(titles) + offset]
            axis.imshow(picture, interpolation="antialiased")
            text = plain(name, 36) if offset == 0 else titles[offset]
            axis.set_title(text, fontsize=8, loc="left", color="black" if offset == 0 else GREY)
    handles = [
        Patch(
            facecolor=palette[index] / 255, edgecolor=GREY, linewidth=0.5, label=f"{index} {plain(classes[index], 20)}"
        )
        for index in present
    ]
    if handles:
        columns = min(len(handles), max(1, int(width / 1.9)))
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    return to_image(figure)


def confusion_chart(confusion: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """The confusion matrix (C, C), each row divided by its sum: of the pixels of a class, the share of each prediction.

    Names stay readable at any number of classes: the picture grows. Shares are written into the cells where there is
    room. Classes without a pixel in the labels have an empty row.
    """
    count = len(classes)
    sums = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, sums, out=np.full(confusion.shape, np.nan), where=sums > 0)
    cell = 0.42 if count <= 30 else 0.2
    names = [f"{plain(name, 24)}  {index}" for index, name in enumerate(classes)]
    margin = 0.085 * max(map(len, names)) + 0.6
    size = max(3.0, cell * count)
    figure = new_figure(size + margin + 1.2, size + margin + 0.4)
    axis = figure.subplots()
    picture = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks(range(count), names, rotation=90, fontsize=8)
    axis.set_yticks(range(count), names, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if count <= 30:
        for (row, column), share in np.ndenumerate(shares):
            if not np.isnan(share) and round(100 * share) >= 1:
                colour = "black" if share > 0.5 else "white"
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    else:  # lines that lead the eye to the names
        axis.set_xticks(np.arange(-0.5, count, 5), minor=True)
        axis.set_yticks(np.arange(-0.5, count, 5), minor=True)
        axis.grid(which="minor", color=GREY, linewidth=0.4)
        axis.tick_params(which="minor", length=0)
        axis.tick_params(labeltop=True, labelright=True)
    figure.colorbar(picture, ax=axis, shrink=min(1.0, 3 / size + 0.2), label="share of the true class's pixels")
    axis.set_title("Pixels of each class by prediction" + (", percent" if count <= 30 else ""), fontsize=10)
    return to_image(figure)


def calibration_chart(
    counts: np.ndarray, right: np.ndarray, confidence: np.ndarray, ece: float, thresh: float
) -> Image.Image:
    """Reliability diagram of confidences in equal bins from 0 to 1: how often predictions of a confidence are right.

    `counts`, `right` and `confidence` (bins,): pixels, correct ones, and the sum of the confidences in each bin.
    """
    bins = len(counts)
    left, width = np.arange(bins) / bins, 1 / bins
    filled = counts > 0
    accuracy = np.divide(right, counts, out=np.zeros(bins), where=filled)
    figure = new_figure(6.2, 6.4)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    top.bar(
        left[filled], accuracy[filled], width, align="edge", color=BLUE, edgecolor="white", label="share that is right"
    )
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfectly calibrated")
    means = np.divide(confidence, counts, out=np.zeros(bins), where=filled)
    top.plot(
        means[filled],
        accuracy[filled],
        color=ORANGE,
        marker="o",
        markersize=4,
        linewidth=1,
        label="at the mean confidence",
    )
    top.set_ylim(0, 1)
    top.set_xlim(0, 1)
    top.set_ylabel("share of pixels that is right")
    top.set_title(f"Calibration: expected calibration error {100 * ece:.2f} %", fontsize=10)
    bottom.bar(left, counts / max(1, counts.sum()), width, align="edge", color=BLUE, edgecolor="white")
    bottom.set_ylabel("share of pixels")
    bottom.set_xlabel("confidence")
    for axis in (top, bottom):
        axis.axvline(thresh, color=GREEN, linewidth=1.2, label=f"conf_thresh {thresh:g}")
        axis.spines[["top", "right"]].set_visible(False)
    top.legend(frameon=False, fontsize=8, loc="upper left")
    return to_image(figure)


def class_chart(classes: Sequence[str], series: dict[str, Sequence[float]], title: str) -> Image.Image:
    """Horizontal bars for each class, percent (NaN for an absent class), of several series."""
    count, height = len(classes), 0.2 * len(series) + 0.12
    figure = new_figure(8, 1.0 + height * count)
    axis = figure.subplots()
    for number, ((name, values), colour) in enumerate(zip(series.items(), (BLUE, ORANGE, GREEN), strict=False)):
        where = np.arange(count) * height + 0.2 * number
        axis.barh(where, np.nan_to_num(values), 0.18, color=colour, label=name)
        for y, value in zip(where, values, strict=True):
            text = "absent" if np.isnan(value) else f"{value:.1f}"
            axis.text(0 if np.isnan(value) else value, y, f" {text}", va="center", fontsize=7, color=GREY)
    axis.set_yticks(
        np.arange(count) * height + 0.1 * (len(series) - 1),
        [f"{plain(name, 24)}  {index}" for index, name in enumerate(classes)],
        fontsize=8,
    )
    axis.set_ylim(height * count - 0.1, -0.25)
    axis.set_xlim(0, 108)
    axis.set_xlabel("percent")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(textwrap.shorten(title, 90), fontsize=10)
    figure.legend(loc="outside upper right", ncols=len(series), frameon=False, fontsize=8)
    return to_image(figure)


def share_chart(classes: Sequence[str], shares: dict[str, Sequence[float]]) -> Image.Image:
    """Horizontal bars of `shares` (0 to 1, one for each class, keyed by series): logarithmic, from 0.001 % on."""
    count, height = len(classes), 0.2 * len(shares) + 0.12
    figure = new_figure(8, 1.0 + height * count)
    axis = figure.subplots()
    least = 1e-3  # percent
    for number, ((name, values), colour) in enumerate(zip(shares.items(), (BLUE, ORANGE, GREEN), strict=False)):
        where, percents = np.arange(count) * height + 0.2 * number, 100 * np.asarray(values, float)
        # From the left edge, which a logarithmic axis has no zero for.
        axis.barh(where, np.maximum(percents - least, 0), 0.18, left=least, color=colour, label=name)
        for y, value, share in zip(where, percents, values, strict=True):
            axis.text(max(value, least), y, f" {percent(share)}", va="center", fontsize=7, color=GREY)
    axis.set_xscale("log")
    axis.set_xlim(least, 400)  # room for the numbers
    ticks = [0.001, 0.01, 0.1, 1, 10, 100]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_yticks(
        np.arange(count) * height + 0.1 * (len(shares) - 1),
        [f"{plain(name, 24)}  {index}" for index, name in enumerate(classes)],
        fontsize=8,
    )
    axis.set_ylim(height * count - 0.1, -0.25)
    axis.set_xlabel("percent of the pixels that are not ignored")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#d7d7d7", linewidth=0.5)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=len(shares), frameon=False, fontsize=8)
    return to_image(figure)
