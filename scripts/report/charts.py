"""Charts as SVG, each for light and for dark pages, in colours that people with any colour vision can tell apart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from scripts.report.runs import Curve, mean_and_spread
from util.plots import new_figure, plain

THEMES = {
    "light": {"text": "#1b1b1b", "faint": "#c9c9c9", "page": "#ffffff"},
    "dark": {"text": "#e8e8e8", "faint": "#4a4a4a", "page": "#16181c"},
}
# Of Okabe and Ito; on dark pages lighter ones take the place of blue and vermilion.
COLOURS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#3f9bcf", "#1b1b1b"),
    "dark": ("#56b4e9", "#e69f00", "#2ec79a", "#e3a6c8", "#f0e442", "#7f9cff", "#e8e8e8"),
}
LINES = ("-", "--", "-.", ":")  # from the eighth group on
POINTS = 200  # of a curve at most: means of neighbours
WIDTH, HEIGHT = 4.6, 3.0  # inches


@dataclass(frozen=True)
class Series:
    """A group's curves, one for each run."""

    name: str
    curves: tuple[Curve, ...]


def curve_chart(series: Sequence[Series], title: str, theme: str, mark_best: bool = False) -> str:
    """Curves over training steps: a thin line for each run, a thick one for the mean of several.

    With `mark_best`, the best point of each run is a circle, and the last one a square.
    """
    colours = THEMES[theme]
    figure, axis = _axes(WIDTH, HEIGHT, theme)
    for index, group in enumerate(series):
        style = {"color": colour_of(index, theme), "linestyle": LINES[index // 7 % len(LINES)]}
        curves = [curve if mark_best else thinned(curve) for curve in group.curves if curve]
        several = len(curves) > 1
        for curve in curves:
            points = list(curve), list(curve.values())
            axis.plot(*points, **style, linewidth=0.8 if several else 1.8, alpha=0.55 if several else 1)
            if len(curve) == 1:
                axis.plot(*points, **style, marker="o", markersize=4)
            if mark_best:
                best = max(curve, key=lambda step: curve[step])
                for step, marker in ((best, "o"), (max(curve), "s")):
                    axis.plot(step, curve[step], marker=marker, markersize=4.5, color=style["color"])
        steps = sorted(set.intersection(*map(set, curves))) if several else []
        if len(steps) > 1:
            means = [mean_and_spread(curve[step] for curve in curves)[0] for step in steps]
            axis.plot(steps, means, **style, linewidth=2.4)
        if curves:
            axis.plot([], [], **style, linewidth=2.2, label=plain(group.name, 60))
    axis.set_xlabel("training steps")
    axis.grid(color=colours["faint"], linewidth=0.5)
    return _svg(figure, axis, title, len(series), theme)


def class_chart(
    classes: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], title: str, theme: str, first: int = 0
) -> str:
    """A row for each class with a dot for each of the series, NaN where there is none. `first`: see `colour_of`."""
    height = 0.8 + 0.21 * len(classes) + 0.2 * len(series)
    figure, axis = _axes(WIDTH, height, theme)
    rows = range(len(classes))
    markers = "osD^vPX"
    for index, (name, values) in enumerate(series, first):
        style = {"color": colour_of(index, theme), "marker": markers[index % 7], "markersize": 5, "linestyle": "none"}
        axis.plot(values, rows, **style, label=plain(name, 60))
    axis.set_yticks(rows, [plain(name, 22) for name in classes], fontsize=9)
    axis.set_ylim(len(classes) - 0.4, -0.6)
    axis.grid(color=THEMES[theme]["faint"], linewidth=0.5)
    axis.axvline(0, color=THEMES[theme]["text"], linewidth=0.8)
    return _svg(figure, axis, title, len(series), theme)


def colour_of(index: int, theme: str) -> str:
    """The colour of the series with this number."""
    return COLOURS[theme][index % len(COLOURS[theme])]


def _axes(width: float, height: float, theme: str) -> tuple[Any, Any]:
    figure = new_figure(width, height)
    figure.set_facecolor("none")
    axis = figure.subplots()
    axis.set_facecolor("none")
    axis.spines[["top", "right"]].set_visible(False)
    text = THEMES[theme]["text"]
    for spine in axis.spines.values():
        spine.set_color(text)
    axis.tick_params(colors=text, labelsize=10)
    axis.xaxis.label.set_color(text)
    return figure, axis


def _svg(figure: Any, axis: Any, title: str, series: int, theme: str) -> str:
    """The figure with its title and legend as the text of an SVG file, the same for the same figure."""
    import matplotlib

    text = THEMES[theme]["text"]
    axis.set_title(plain(title, 60), fontsize=11, loc="left", color=text)
    columns = 1 if series > 3 or max(len(t.get_label()) for t in axis.lines) > 24 else series
    labels = axis.get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=10, labelcolor=text)
    if columns == 1 and series > 1:
        figure.set_figheight(figure.get_figheight() + 0.19 * (series - 1))
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "unimatch", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def thinned(curve: Curve) -> Curve:
    """At most POINTS points, each the mean of as many neighbours, at the step of the last of them. NaN is left out."""
    points = [(step, value) for step, value in sorted(curve.items()) if not math.isnan(value)]
    if len(points) <= POINTS:
        return dict(points)
    edges = [round(index * len(points) / POINTS) for index in range(POINTS + 1)]
    parts = [points[start:end] for start, end in pairwise(edges)]
    return {part[-1][0]: sum(value for _, value in part) / len(part) for part in parts}
