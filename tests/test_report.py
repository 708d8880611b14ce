"""scripts/report: what save paths tell, groups of seeds, published figures, and a safe, self-contained page."""

from __future__ import annotations

import html.parser
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from model import build_model
from scripts.report.__main__ import main
from scripts.report.charts import POINTS, Series, class_chart, curve_chart, thinned
from scripts.report.page import page
from scripts.report.pictures import Gallery, make_gallery
from scripts.report.published import TABLES, published_miou
from scripts.report.runs import RunRecord, find_runs, group_runs, mean_and_spread, published_splits, read_run
from tests.helpers import PROJECT_ROOT, make_dataset
from util.cli import run_main
from util.config import load_config, to_dict
from util.errors import ConfigError
from util.lists import find_lists, identify

pytest.importorskip("matplotlib")
CURVES = [(1, "train/loss_all", 2.0), (3, "train/loss_all", 1.0), (1, "eval/mIoU", 60.0), (3, "eval/mIoU", 50.0)]
CURVES += [(1, "eval/<b>leaf_IoU", 70.0), (3, "eval/<b>leaf_IoU", 40.0), (1, "machine/images_per_second", 8.0)]
CURVES += [(3, "machine/images_per_second", 12.0), (3, "machine/memory_gb", 1.5), (3, "eval/memory_gb", 2.5)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = make_dataset(tmp_path_factory.mktemp("data"), val=3)
    data.configure(classes=["background", "<b>leaf", "stem & co"], backbone="resnet10", epochs=2)
    return data


def make_save_path(data, path: Path, method: str = "unimatch", shift: float = 0.0, weights=None, **changes) -> Path:
    """What a run of two epochs leaves in its save path, without training."""
    path.mkdir(parents=True)
    cfg = load_config(data.config, changes)
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    rows = [f"{step},{name},{value + shift}" for step, name, value in CURVES]
    (path / "metrics.csv").write_text("\n".join(["step,name,value", *rows, ""]))
    lists = identify(method, find_lists(method, cfg, str(data.labeled), None))
    numbers = {"epoch": 2, "previous_best": 60.0 + shift, "last_miou": 50.0 + shift}
    torch.save({"model": weights or {}, **numbers, "config": to_dict(cfg), "run": lists}, path / "latest.pth")
    info = {"method": method, "labeled_id_path": "my list.txt", "unlabeled_id_path": None, "processes": 2}
    (path / "run.json").write_text(json.dumps(info))
    return path


@pytest.fixture
def seeds(data, tmp_path):
    """Two methods, the first with two seeds."""
    for seed in (0, 1):
        make_save_path(data, tmp_path / f"exp/unimatch/seed{seed}", shift=seed, seed=seed)
    make_save_path(data, tmp_path / "exp/supervised", "supervised", shift=-20)
    return tmp_path / "exp"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what a save path tells


def test_a_save_path_tells_scores_curves_speed_and_memory(data, tmp_path):
    run = read_run(make_save_path(data, tmp_path / "run"))
    assert (run.method, run.seed, run.epoch, run.best, run.last) == ("unimatch", 0, 2, 60, 50)
    assert run.curves["train/loss_all"] == {2: 2.0, 4: 1.0}, "steps are counted from 1"
    assert (run.class_iou("<b>leaf", best=True), run.class_iou("<b>leaf", best=False)) == (70, 40)
    assert math.isnan(run.class_iou("background", best=True))
    assert (run.speed, run.memory, run.notes) == (10, 2.5, ())
    assert run.command == (
        f"torchrun --nproc-per-node 2 unimatch.py --config {tmp_path}/run/config.yaml "
        f"--labeled-id-path 'my list.txt' --save-path {tmp_path}/run-again"
    )


def test_curves_come_from_tensorboard_where_there_is_no_csv_file(data, tmp_path):
    path = make_save_path(data, tmp_path / "run")
    expected = read_run(path).curves
    (path / "metrics.csv").unlink()
    with SummaryWriter(str(path)) as writer:
        for step, name, value in CURVES:
            writer.add_scalar(name, value, step)
    assert read_run(path).curves == expected


def test_an_unfinished_or_damaged_run_is_described_as_far_as_it_goes(data, tmp_path):
    path = make_save_path(data, tmp_path / "run", epochs=5)
    assert read_run(path).notes == ("2 of 5 epochs are done",)
    (path / "latest.pth").write_bytes(b"damaged")
    (path / "run.json").unlink()
    run = read_run(path)
    assert run.notes == ("latest.pth is damaged", "0 of 5 epochs are done")
    assert (run.best, run.last, run.method) == (60, 50, "METHOD"), "the curves are left"
    for name in ("latest.pth", "metrics.csv"):
        (path / name).unlink()
    run = read_run(path)
    assert math.isnan(run.best) and math.isnan(run.speed) and "no epoch is finished" in run.notes


def test_folders_of_runs_are_searched_and_each_run_counts_once(seeds, data):
    make_save_path(data, seeds / "unimatch/seed0/previous-1")
    make_save_path(data, seeds / "unimatch/previous-1")
    runs = find_runs([str(seeds), str(seeds / "unimatch/seed1")])
    assert [run.path.relative_to(seeds).as_posix() for run in runs] == [
        "supervised",
        "unimatch/seed0",
        "unimatch/seed1",
    ]


def test_the_config_of_another_tool_is_no_run(seeds):
    for place in ("supervised/wandb/run-1/files", "wandb/run-2/files", "unimatch/.hydra"):
        (seeds / place).mkdir(parents=True)
        (seeds / place / "config.yaml").write_text("wandb_version: 1\n")
    assert [run.path.name for run in find_runs([str(seeds)])] == ["supervised", "seed0", "seed1"]


def test_a_folder_may_be_called_as_earlier_results_are(seeds):
    folder = seeds.rename(seeds.with_name("previous-work"))
    assert len(find_runs([str(folder)])) == 3


def test_runs_that_differ_in_the_seed_alone_are_one_group(seeds, data):
    make_save_path(data, seeds / "slow", lr=0.5)
    groups = {group.name: group for group in group_runs(find_runs([str(seeds)]))}
    assert {name: [run.seed for run in group.runs] for name, group in groups.items()} == {
        "supervised": [0],
        "unimatch, lr 0.5": [0],
        "unimatch, lr 0.001": [0, 1],
    }


def test_runs_that_started_from_other_weights_are_not_one_group(data, tmp_path):
    for seed, start in enumerate(["a.pth", "b.pth"]):
        make_save_path(data, tmp_path / start, seed=seed, init_from=start)
    groups = group_runs(find_runs([str(tmp_path)]))
    assert [group.name for group in groups] == ["unimatch, init_from a.pth", "unimatch, init_from b.pth"]


def test_mean_and_spread_are_those_of_the_values_that_are_there():
    assert mean_and_spread([1, math.nan, 3]) == (2, pytest.approx(math.sqrt(2)))
    assert [math.isnan(value) for value in (*mean_and_spread([5]), *mean_and_spread([]))] == [False, True, True, True]


# --- published figures


def test_published_figures_are_those_of_the_recipes_headers():
    """Every figure stands in the header of a recipe of its data set, in a line of its method where there is one."""
    for (dataset, backbone, _), (_, methods) in TABLES.items():
        folder = "configs/v2" if backbone.startswith("dinov2") else "configs"
        lines = (PROJECT_ROOT / folder / f"{dataset}.yaml").read_text().splitlines()
        for method, values in methods.items():
            wanted = [f"{value:.2f}" if folder == "configs/v2" else f"{value:.1f}" for value in values]
            lines_with = [line for line in lines if re.search(r"\s+".join(map(re.escape, wanted)), line)]
            assert any(method in line.lower() for line in lines_with), (dataset, backbone, method)


def test_published_figures_need_the_same_data_split_backbone_and_crop():
    cfg = load_config(PROJECT_ROOT / "configs/pascal.yaml")
    assert published_miou(cfg, "732") == {"unimatch": 79.9, "supervised": 69.7}
    assert published_miou(cfg, None) == published_miou(cfg, "733") == {}
    for change in ("crop_size=513", "backbone=resnet50"):
        assert published_miou(load_config(PROJECT_ROOT / "configs/pascal.yaml", [change]), "732") == {}


def test_a_split_is_known_by_the_contents_of_its_list(tmp_path, data):
    digest = next(text for text, name in published_splits("pascal").items() if name == "183")
    cfg = load_config(PROJECT_ROOT / "configs/pascal.yaml")
    run = RunRecord(tmp_path, cfg, "unimatch", {"run": {"labelled list": digest}}, {}, {})
    assert run.split == "183" and "splits/pascal/183/labeled.txt" in run.command
    text = page([(group_runs([run]), Gallery([], {}, []))], "")
    assert "Published, not measured here (resnet101, crop 321, split 183): unimatch 77.2, supervised 55.3." in text


# --- charts


@pytest.mark.slow
def test_charts_are_the_same_for_the_same_curves():
    theme = "dark"
    series = [Series("a $x$", ({1: 1.0, 2: 3.0}, {1: 2.0, 2: 1.0})), Series("b", ({},)), Series("c", ({5: 1.0},))]
    drawn = [curve_chart(series, "title", theme, mark_best=True) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0].lstrip().startswith("<?xml")
    drawn = class_chart(["<i>", "$"], [("a", [1.0, math.nan])], "title", theme)
    assert "<i>" not in drawn and drawn.rstrip().endswith("</svg>")


def test_long_curves_are_thinned_to_means():
    curve = {step: float(step % 2) for step in range(1, 4001)}
    thin = thinned(curve | {7: math.nan})
    assert len(thin) == POINTS and max(thin) == 4000
    assert np.allclose(list(thin.values()), 0.5, atol=0.05)


# --- the page


class Seen(html.parser.HTMLParser):
    """Collects tags, links to anywhere, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_the_page_holds_everything_and_escapes_what_it_is_told(seeds, tmp_path, capsys):
    before = contents(seeds)
    main([str(seeds / "supervised"), str(seeds / "unimatch"), "--out", str(tmp_path / "report.html"), "--images", "0"])
    assert contents(seeds) == before
    text = (tmp_path / "report.html").read_text()
    seen = Seen(text)
    assert all(link.startswith("data:image/") for link in seen.links) and len(seen.links) >= 8
    assert not {"script", "b", "link"} & seen.tags and "http" not in re.sub(r"data:[^\"]*", "", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    for part in (
        "<b>leaf",
        "stem & co",
        "60.5 ± 0.7",
        "50.5 ± 0.7",
        "61.0",
        "40.0",
        "supervised",
        "0, 1",
        "10.5 ± 0.7",
    ):
        assert part in seen.text, part
    assert "+20.5" in seen.text, "difference of a class's mean to the first group"
    assert "No published figures match" in seen.text and "torchrun --nproc-per-node 2 unimatch.py" in seen.text
    assert "report.html: 3 runs, " in capsys.readouterr().out


@pytest.fixture
def no_charts(monkeypatch):
    """Drawing takes most of a page's time."""
    for name in ("curve_chart", "class_chart"):
        monkeypatch.setattr(f"scripts.report.page.{name}", lambda *_, **__: "<svg/>")


def test_pictures_show_every_run_and_say_who_has_none(data, tmp_path, no_charts):
    cfg = load_config(data.config)
    torch.manual_seed(0)
    make_save_path(data, tmp_path / "exp/with", weights=build_model(cfg, pretrained=False).state_dict())
    make_save_path(data, tmp_path / "exp/without", "fixmatch")
    main([str(tmp_path / "exp"), "--out", str(tmp_path / "r.html"), "--images", "2", "--colors", "colorblind"])
    seen = Seen((tmp_path / "r.html").read_text())
    assert sum(link.startswith("data:image/jpeg") for link in seen.links) == 2
    assert sum(link.startswith("data:image/png") for link in seen.links) == 4, "two truths, two predictions"
    assert "images/val0.jpg" in seen.text and "images/val1.jpg" in seen.text
    assert "Without pictures: fixmatch (" in seen.text


@pytest.mark.parametrize("bands", [{"channels": 4, "mean": 4 * [0.5], "std": 4 * [0.2]}, {"value_range": [0, 50]}])
def test_each_run_predicts_the_images_as_its_own_config_reads_them(tmp_path, bands):
    data, runs = make_dataset(tmp_path / "data"), []
    if "channels" in bands:
        for path in (data.root / "images").glob("val*.jpg"):
            Image.open(path).convert("RGBA").save(path.with_suffix(".png"))
        data.val.write_text(data.val.read_text().replace(".jpg", ".png"))
    for name, changes in (("rgb", {}), ("bands", bands)):
        cfg = load_config(data.config, changes)
        torch.manual_seed(0)
        model = build_model(cfg, pretrained=False).eval()
        with torch.no_grad():  # so that the predictions hold several classes
            model.classifier.weight *= 30
            model.classifier.bias -= model(torch.randn(2, cfg.channels, 32, 40)).mean((0, 2, 3))
        runs.append(read_run(make_save_path(data, tmp_path / name, weights=model.state_dict(), **changes)))
    both = make_gallery(runs, 2, "dataset")
    assert both.missing == {}
    for run in runs:
        alone = make_gallery([run], 2, "dataset")
        assert [row.predictions[run.path] for row in both.rows] == [row.predictions[run.path] for row in alone.rows]


def test_runs_on_labels_that_are_read_otherwise_are_not_compared(data, tmp_path, no_charts):
    for name, changes in (("plain", {}), ("mapped", {"label_map": {2: 1}})):
        make_save_path(data, tmp_path / "exp" / name, **changes)
    main([str(tmp_path / "exp"), "--out", str(tmp_path / "r.html"), "--images", "0"])
    assert (tmp_path / "r.html").read_text().count("<h2>tiny") == 2


def test_where_the_data_is_gone_the_page_says_so(data, tmp_path, no_charts):
    path = make_save_path(data, tmp_path / "run")
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "val_id_path": str(tmp_path / "gone.txt")}))
    for _ in range(2):  # an earlier report is replaced
        main([str(path), "--out", str(tmp_path / "r.html")])
    assert f"Without pictures: unimatch ({tmp_path}/gone.txt: no such list file)." in (tmp_path / "r.html").read_text()


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        run_main(lambda: main([str(word) for word in argv]))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


def test_what_cannot_be_done_is_one_line(seeds, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    out, inside = tmp_path / "r.html", seeds / "supervised/r.html"
    assert refused(capsys, tmp_path / "gone", "--out", out) == (
        f"error: {tmp_path}/gone: no such folder: give a run's save path"
    )
    assert "no run: no config.yaml" in refused(capsys, tmp_path / "empty", "--out", out)
    assert "no folder" in refused(capsys, seeds / "supervised/config.yaml", "--out", out)
    assert "is inside the run" in refused(capsys, seeds, "--out", inside)
    assert "must be one of .html" in refused(capsys, seeds, "--out", seeds / "supervised/latest.pth")
    assert "--images -1" in refused(capsys, seeds, "--out", out, "--images", "-1")
    out.write_text("<p>mine")
    assert "did not write it" in refused(capsys, seeds, "--out", out)
    assert out.read_text() == "<p>mine"
    (seeds / "supervised/config.yaml").write_text("dataset: [")
    assert str(seeds / "supervised/config.yaml") in refused(capsys, seeds, "--out", tmp_path / "s.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs matplotlib: pip install" in refused(capsys, seeds, "--out", tmp_path / "s.html")
    with pytest.raises(ConfigError):
        find_runs([str(tmp_path / "gone")])
