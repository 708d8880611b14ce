"""The page: one HTML file without any link to the outside, for light and dark, wide and narrow screens."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape

from scripts.report.charts import Series, class_chart, curve_chart
from scripts.report.pictures import Gallery
from scripts.report.published import published_miou
from scripts.report.runs import MIOU, Group, RunRecord, mean_and_spread
from util.outputs import MARK

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --faint: #62666d; --page: #fff; --box: #f4f5f7; --line: #d8dade; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --faint: #a2a7b0; --page: #16181c; --box: #20242a; --line: #3a3f47; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1240px; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h1, h2, h3, p, td, th, figcaption { overflow-wrap: anywhere; }
.note { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 8rem; }
tr.run td { color: var(--faint); } tr.run td:first-child { padding-left: 1.2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.charts img { width: 100%; max-width: 40rem; height: auto; display: block; }
pre { background: var(--box); padding: .7rem; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .3rem 0 1rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; margin: .4rem 0 1.4rem; }
figure { margin: 0; width: 9.5rem; } figure img { width: 100%; height: auto; display: block; image-rendering: auto; }
figcaption { font-size: .8rem; line-height: 1.3; margin-top: .2rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; padding: 0; list-style: none; }
.legend span { display: inline-block; width: .9rem; height: .9rem; margin-right: .35rem; border: 1px solid var(--line);
  vertical-align: -.12rem; }
summary { cursor: pointer; margin: .6rem 0; }
"""
TITLES = {
    "train/loss_all": "Loss",
    "train/loss_x": "Loss on labelled images (loss_x)",
    "train/loss_s": "Loss of the strong views (loss_s)",
    "train/loss_w_fp": "Loss of the feature-perturbed view (loss_fp)",
    "train/mask_ratio": "Mask ratio: share of confident pixels",
    "pseudo/confident_right": "Confident pseudo-labels right, on labelled images",
}
NOT_DRAWN = ("train/lr", "train/lr_head")


def page(sections: Iterable[tuple[Sequence[Group], Gallery]], made: str) -> str:
    """The whole page; a section for each data set. `made` says when and of what."""
    body = [f"<h1>Training runs</h1><p class=note>{escape(made)}</p>"]
    for groups, gallery in sections:
        cfg = groups[0].first.cfg
        body.append(f"<h2>{escape(cfg.dataset)}: {cfg.nclass} classes, {escape(_lists(groups))}</h2>")
        body += [_summary(groups), _published(groups), _settings(groups), _curves(groups), _classes(groups)]
        body += [_pictures(groups, gallery), _commands(groups)]
    head = f'<meta charset=utf-8><meta name=generator content="{MARK}">'
    head += '<meta name=viewport content="width=device-width, initial-scale=1"><title>Training runs</title>'
    head += f"\n<style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>{''.join(body)}</body></html>\n"


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls by itself where it is too wide; `rows` are a CSS class and plain texts."""
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = [
        f"<tr{f' class={kind}' if kind else ''}>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>"
        for kind, row in rows
    ]
    return f"<div class=scroll><table><tr>{cells}</tr>{''.join(lines)}</table></div>"


def figure(value: float, places: int = 1, unit: str = "") -> str:
    """A number as the page shows it; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{places}f}{unit}"


def spread(values: Iterable[float], places: int = 1) -> str:
    """Mean ± standard deviation."""
    mean, deviation = mean_and_spread(values)
    return figure(mean, places) + ("" if math.isnan(deviation) else f" ± {deviation:.{places}f}")


def _lists(groups: Sequence[Group]) -> str:
    found = [item for group in groups for item in group.first.lists.items() if " images," in item[1]]
    counts = {name.removesuffix(" list"): text.split()[0] for name, text in found if not text.startswith("0 ")}
    counts = [f"{count} {name}" for name, count in counts.items()]
    return ", ".join(counts) + " images" if counts else "lists unknown"


def _summary(groups: Sequence[Group]) -> str:
    head = ["method", "seeds", "best mIoU", "last mIoU", "published", "images/s", "memory, GB", "epochs"]
    rows = []
    for group in groups:
        runs = group.runs
        published = published_miou(group.first.cfg, group.first.split).get(group.first.method, math.nan)
        seeds = ", ".join(str(run.seed) for run in runs)
        values = [spread(run.best for run in runs), spread(run.last for run in runs), figure(published, 2)]
        values += [spread(run.speed for run in runs), spread((run.memory for run in runs), 2)]
        rows.append(("", [group.name, seeds, *values, f"{min(run.epoch for run in runs)}/{group.first.cfg.epochs}"]))
        for run in runs if len(runs) > 1 else ():
            own = [figure(run.best), figure(run.last), "", figure(run.speed), figure(run.memory, 2)]
            rows.append(("run", [str(run.path), str(run.seed), *own, f"{run.epoch}/{run.cfg.epochs}"]))
    notes = [f"{run.path}: {note}" for group in groups for run in group.runs for note in run.notes]
    text = (
        "mIoU in percent. Best: the epoch with the highest mIoU, chosen on the validation images themselves. ± is the "
    )
    text += "standard deviation over seeds (n - 1)."
    lines = "".join(f"<p class=note>Note: {escape(note)}</p>" for note in notes)
    return f"{table(head, rows)}<p class=note>{text}</p>{lines}"


def _published(groups: Sequence[Group]) -> str:
    shown = {}
    for group in groups:
        run = group.first
        if figures := published_miou(run.cfg, run.split):
            values = ", ".join(f"{method} {value:g}" for method, value in figures.items())
            where = f"{run.cfg.backbone}, crop {run.cfg.crop_size}, split {run.split}"
            shown[where] = f"<p class=note>Published, not measured here ({escape(where)}): {escape(values)}.</p>"
    if shown:
        return "".join(shown.values())
    return "<p class=note>No published figures match data set, split, backbone and crop of these runs.</p>"


def _settings(groups: Sequence[Group]) -> str:
    keys = list(dict.fromkeys(key for group in groups for key in group.differing if key != "method"))
    if not keys:
        return ""
    rows = [("", [key, *(group.differing.get(key, "default")[:60] for group in groups)]) for key in keys]
    return f"<details><summary>Settings that differ</summary>{table(['', *(g.name for g in groups)], rows)}</details>"


def _both_themes(alt: str, draw) -> str:
    """A chart as `draw(theme)` gives it, of which the page shows the one that suits it."""
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(draw(theme).encode()).decode()}" for theme in ("light", "dark")
    )
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img src="{light}" alt="{escape(alt)}"></picture>'


def _curves(groups: Sequence[Group]) -> str:
    def series(name: str) -> list[Series]:
        return [Series(group.name, tuple(run.curves.get(name, {}) for run in group.runs)) for group in groups]

    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.curves)
    drawn = [name for name in TITLES if name in names]
    drawn += [name for name in names if name.startswith("train/") and name not in (*drawn, *NOT_DRAWN)]
    charts = []
    if MIOU in names:
        title = "mIoU, %: circle best, square last"
        charts.append(_both_themes(title, lambda theme: curve_chart(series(MIOU), title, theme, mark_best=True)))
    for name in drawn:
        title = TITLES.get(name, name)
        charts.append(
            _both_themes(title, lambda theme, name=name, title=title: curve_chart(series(name), title, theme))
        )
    if not charts:
        return "<h3>Curves</h3><p class=note>No run has curves.</p>"
    several = any(len(group.runs) > 1 for group in groups)
    text = "Thin lines are single runs, thick ones means over seeds." if several else ""
    return f"<h3>Curves</h3><p class=note>{text}</p><div class=charts>{''.join(charts)}</div>"


def _classes(groups: Sequence[Group]) -> str:
    """IoU of each class, and the difference to the first group."""
    classes = groups[0].first.cfg.classes
    if not any(MIOU in run.curves for group in groups for run in group.runs):
        return ""

    def means(group: Group, best: bool) -> list[float]:
        return [mean_and_spread(run.class_iou(name, best) for run in group.runs)[0] for name in classes]

    last = [means(group, best=False) for group in groups]
    base = last[0]
    differences = [[value - own for value, own in zip(values, base, strict=True)] for values in last]
    shown = [(group.name, values) for group, values in zip(groups, last, strict=True)]
    charts = [("IoU at the last evaluation, %", shown, 0)]
    if len(groups) > 1:
        others = [(f"{group.name} - {groups[0].name}", d) for group, d in zip(groups[1:], differences[1:], strict=True)]
        charts.append((f"Difference to {groups[0].name}, points", others, 1))
    drawn = "".join(
        _both_themes(chart[0], lambda theme, chart=chart: class_chart(classes, chart[1], chart[0], theme, chart[2]))
        for chart in charts
    )
    head = ["class"]
    for index, group in enumerate(groups):
        head += [f"{group.name}, last", f"{group.name}, best"] + ([f"difference to {groups[0].name}"] if index else [])
    best = [means(group, best=True) for group in groups]
    rows = []
    for number, name in enumerate(classes):
        row = [name]
        for index in range(len(groups)):
            change = differences[index][number]
            row += [spread(run.class_iou(name, False) for run in groups[index].runs), figure(best[index][number])]
            row += [] if not index else ["-" if math.isnan(change) else f"{change:+.1f}"]
        rows.append(("", row))
    text = "Means over seeds. A dash: the class is in neither labels nor predictions."
    details = f"<details><summary>The same as a table</summary>{table(head, rows)}</details>"
    return f"<h3>Classes</h3><p class=note>{text}</p><div class=charts>{drawn}</div>{details}"


def _pictures(groups: Sequence[Group], gallery: Gallery) -> str:
    names = {run.path: _run_name(group, run) for group in groups for run in group.runs}
    parts = ["<h3>Validation images</h3>"]
    if not gallery.rows and not gallery.missing:
        return "<h3>Validation images</h3><p class=note>None were asked for.</p>"
    reasons = {}
    for path, reason in gallery.missing.items():
        reasons.setdefault(reason, []).append(names[path])
    for reason, whose in reasons.items():
        parts.append(f"<p class=note>Without pictures: {escape(', '.join(whose))} ({escape(reason)}).</p>")
    colours = "".join(
        f'<li><span style="background:rgb{colour}"></span>{escape(name)}</li>' for name, colour in gallery.legend
    )
    parts.append(f"<ul class=legend>{colours}</ul>" if colours else "")
    for row in gallery.rows:
        cells = [("input", row.image), ("truth", row.truth)]
        cells += [(names[path], uri) for path, uri in row.predictions.items()]
        shown = "".join(
            f'<figure><img src="{uri}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
            for name, uri in cells
        )
        parts.append(f"<p class=note>{escape(row.name)}</p><div class=pictures>{shown}</div>")
    return "".join(parts)


def _run_name(group: Group, run: RunRecord) -> str:
    return f"{group.name}, seed {run.seed}" if len(group.runs) > 1 else group.name


def _commands(groups: Sequence[Group]) -> str:
    parts = ["<h3>Commands</h3><p class=note>Each repeats a run, with its config, in another save path.</p>"]
    for group in groups:
        for run in group.runs:
            told = [str(run.info[key]) for key in ("machine",) if key in run.info]
            told += [f"torch {run.info['torch']}"] if "torch" in run.info else []
            where = f" ({', '.join(told)})" if told else ""
            parts.append(f"<p class=note>{escape(_run_name(group, run) + where)}</p><pre>{escape(run.command)}</pre>")
    return "".join(parts)
