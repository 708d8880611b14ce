"""The architecture: direction of imports, no circles, few floors, short files, a first line each, no forbidden call.

The rules are in architecture.py; each is also tried on small fake projects that break it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import (
    MAX_FLOORS,
    MAX_LINES,
    circles,
    floors,
    forbidden_calls,
    high_folders,
    imports,
    imports_between_tests,
    long_files,
    methods_that_know_too_much,
    python_files,
    silent_files,
    untested_files,
    wrong_directions,
)

ROOT = Path(__file__).resolve().parents[1]

# Why a file may be longer than MAX_LINES.
ONE_A_LINE = "many short cases of one thing, each with the message that it gives"
LONG_FILES = {
    "tests/test_bad_input.py": ONE_A_LINE,
    "tests/test_check_data.py": ONE_A_LINE,
    "tests/test_checkpoint.py": ONE_A_LINE,
    "tests/test_config.py": ONE_A_LINE,
    "tests/test_distributed.py": "the functions that its processes run must be in one file with their tests",
    "tests/test_launch.py": ONE_A_LINE,
    "tests/test_prepare_data.py": "miniature downloads in three formats, and what must come out of each",
    "tests/test_resume.py": "runs that are expensive to make are shared by the tests of one file",
    "tests/test_semi_data.py": "one naive reference is compared in many ways",
    "tests/test_toy.py": ONE_A_LINE,
    "tests/test_transform.py": "draws and their application are tested on the same inputs",
}

# Files without a test file of their name, and which one tests them: what they do shows only in that of the other.
TESTED_BY = {
    "dataset/check.py": "check_data",
    "dataset/errors.py": "bad_input",
    "dataset/loader.py": "semi_data",
    "dataset/packing.py": "semi_data",
    "dataset/prepare/archives.py": "prepare_data",
    "dataset/prepare/audit.py": "check_data",
    "dataset/prepare/downloads.py": "prepare_data",
    "dataset/prepare/findings.py": "check_data",
    "dataset/prepare/jpeg.py": "check_data",
    "dataset/replacement.py": "bad_images",
    "dataset/raster.py": "windows",
    "dataset/resize.py": "transform",
    "dataset/source.py": "semi_data",
    "dataset/views.py": "semi_data",
    "fixmatch.py": "steps",
    "model/backbone/resnet.py": "deeplabv3plus",
    "model/backbone/resnet_tv.py": "convert_backbone",
    "model/backbone/xception.py": "deeplabv3plus",
    "model/semseg/complementary.py": "unimatch_v2",
    "model/state_dict.py": "weights",
    "scripts/benchmark/__main__.py": "benchmark",
    "scripts/benchmark/data.py": "benchmark",
    "scripts/benchmark/evaluation.py": "benchmark",
    "scripts/benchmark/gpu.py": "gpu_check",
    "scripts/benchmark/loss.py": "benchmark",
    "scripts/benchmark/memory.py": "benchmark",
    "scripts/benchmark/model.py": "benchmark",
    "scripts/benchmark/naive.py": "benchmark",
    "scripts/benchmark/naive_data.py": "semi_data",
    "scripts/benchmark/naive_v2.py": "unimatch_v2",
    "scripts/benchmark/rows.py": "benchmark",
    "scripts/benchmark/step.py": "benchmark",
    "scripts/benchmark/step_v2.py": "benchmark",
    "scripts/chaos/__main__.py": "chaos",
    "scripts/chaos/compare.py": "chaos",
    "scripts/chaos/double.py": "chaos",
    "scripts/chaos/faults.py": "chaos",
    "scripts/chaos/hosts.py": "two_hosts",
    "scripts/chaos/run.py": "chaos",
    "scripts/make_toy.py": "toy",
    **{
        f"scripts/report/{name}.py": "report"
        for name in ("__main__", "charts", "page", "pictures", "published", "runs")
    },
    "supervised.py": "steps",
    "unimatch.py": "steps",
    "util/cli.py": "bad_input",
    "util/config_rules.py": "config",
    "util/config_schema.py": "config",
    "util/config_values.py": "config",
    "util/distributed/batchnorm.py": "distributed",
    "util/distributed/collectives.py": "distributed",
    "util/distributed/ddp.py": "distributed",
    "util/distributed/group.py": "distributed",
    "util/distributed/watchdog.py": "distributed",
    "util/errors.py": "bad_input",
    "util/evaluation_report.py": "analysis",
    "util/log.py": "loop",
    "util/palette.py": "predict",
    "util/plots.py": "predict",
    "util/prediction.py": "predict",
    "util/run_files.py": "resume",
    "util/safe_yaml.py": "config",
    "util/streams.py": "tiles",
    "util/train/clock.py": "loop",
    "util/train/saving.py": "resume",
    "util/train/step_metrics.py": "loop",
    "util/visualize.py": "tools",
}


RULES: dict[str, Callable[[Path], list[str]]] = {
    "imports point downwards": wrong_directions,
    "tests do not import tests": imports_between_tests,
    "no file imports itself through others": circles,
    f"no file has more than {MAX_LINES} lines without a reason in LONG_FILES": lambda root: long_files(
        root, LONG_FILES
    ),
    f"no folder has more than {MAX_FLOORS} floors of files that import each other": high_folders,
    "every file has a test file of its name, or one named in TESTED_BY": lambda root: untested_files(root, TESTED_BY),
    "every file's first line says what it holds": silent_files,
    "the forbidden calls do not occur": forbidden_calls,
    "a method knows no rank and reads nothing back": methods_that_know_too_much,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps_the_rule(rule):
    assert RULES[rule](ROOT) == []


def test_the_files_of_the_project_are_found():
    assert {"unimatch.py", "model/semseg/deeplabv3plus.py", "util/train/loop.py"} <= set(python_files(ROOT))
    assert {"util/semi.py", "util/train/loop.py", "dataset/views.py"} <= set(imports(ROOT, "unimatch.py"))


@pytest.mark.slow
def test_no_script_waits_for_an_import_that_takes_seconds_and_that_it_may_not_need():
    names = [f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("*.py") if path.stem != "check_data"]
    slow = {"torchvision", "torch._dynamo", "matplotlib"}
    code = f"import sys, unimatch, unimatch_v2, {', '.join(names)}; print({slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_finds_nothing_to_change(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--quiet", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def project(root: Path, files: dict[str, str]) -> Path:
    """Write a fake project: the files' contents below a first line."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""What this file holds."""\n{text}\n', encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("files", "violations"),
    [
        ({"unimatch.py": "import util.a", "util/a.py": "from dataset import b", "dataset/b.py": ""}, []),
        ({"model/a.py": "import util.b", "util/b.py": ""}, ["model/a.py imports util/b.py"]),
        ({"util/a.py": "def f():\n    import unimatch", "unimatch.py": ""}, ["util/a.py imports unimatch.py"]),
        ({"util/a.py": "from util.train.b import c", "util/train/b.py": ""}, ["util/a.py imports util/train/b.py"]),
        ({"util/distributed/a.py": "from ..train import b", "util/train/b.py": ""},
         ["util/distributed/a.py imports util/train/b.py"]),
        ({"dataset/a.py": "import dataset.prepare.b", "dataset/prepare/b.py": "import dataset.prepare.c",
          "dataset/prepare/c.py": ""}, ["dataset/a.py imports dataset/prepare/b.py"]),
        ({"scripts/a.py": "from scripts import b", "scripts/b.py": ""}, ["scripts/a.py imports scripts/b.py"]),
        ({"fixmatch.py": "import unimatch", "unimatch.py": ""}, ["fixmatch.py imports unimatch.py"]),
        ({"scripts/benchmark/a.py": "import unimatch\nfrom scripts.benchmark.b import c", "unimatch.py": "",
          "scripts/benchmark/b.py": ""}, []),
    ],
)  # fmt: skip
def test_imports_in_a_wrong_direction_are_found(tmp_path, files, violations):
    assert wrong_directions(project(tmp_path, files)) == violations


def test_a_test_that_imports_another_is_found(tmp_path):
    files = {"tests/test_a.py": "from tests.test_b import c", "tests/test_b.py": "from tests.helpers import d"}
    root = project(tmp_path, {**files, "tests/helpers.py": ""})
    assert imports_between_tests(root) == ["tests/test_a.py imports tests/test_b.py"]


@pytest.mark.parametrize("last", ["import util.a", "from util import a", "def f():\n    from .a import g"])
def test_a_circle_is_found_and_shown(tmp_path, last):
    root = project(tmp_path, {"util/a.py": "import util.b", "util/b.py": "from util.c import d", "util/c.py": last})
    assert circles(root) == ["util/a.py -> util/b.py -> util/c.py -> util/a.py"]


def test_two_ways_to_one_file_are_no_circle(tmp_path):
    files = {"util/a.py": "import util.b, util.c", "util/b.py": "import util.d", "util/c.py": "import util.d"}
    assert circles(project(tmp_path, {**files, "util/d.py": ""})) == []


def test_floors_are_the_longest_chain_within_a_folder(tmp_path):
    files = {f"util/m{i}.py": f"import util.m{i + 1}, util.m{MAX_FLOORS}" for i in range(MAX_FLOORS)}
    root = project(tmp_path, {**files, f"util/m{MAX_FLOORS}.py": "import model.a", "model/a.py": ""})
    assert {folder: len(chain) for folder, chain in floors(root).items()} == {"util": MAX_FLOORS + 1, "model": 1}
    (violation,) = high_folders(root)
    assert violation.startswith(f"{MAX_FLOORS + 1} floors: util/m0.py -> util/m1.py -> ")


def test_long_files_and_reasons_without_a_file_are_found(tmp_path):
    root = project(tmp_path, {"util/a.py": "\n" * MAX_LINES, "util/b.py": "\n" * MAX_LINES, "util/c.py": ""})
    assert long_files(root, {"util/b.py": "why"}) == [f"util/a.py: {MAX_LINES + 2} lines"]
    reasons = dict.fromkeys(["util/a.py", "util/b.py", "util/c.py", "util/d.py"], "why")
    assert long_files(root, reasons) == ["util/c.py: needs no reason", "util/d.py: no such file"]


def test_files_whose_first_line_says_nothing_are_found(tmp_path):
    root = project(tmp_path, {"util/a.py": ""})
    texts = {
        "util/empty.py": "",
        "util/comment.py": "# About this file.\nx = 1\n",
        "util/late.py": 'x = 1\n"""About this very file."""\n',
        "util/short.py": '"""Helpers."""\n',
        "scripts/good.sh": "#!/bin/sh\n# Does something useful.\n",
        "scripts/bare.sh": "#!/bin/sh\nset -eu\n",
        "configs/good.yaml": "# The recipe of something.\n",
        "configs/bare.yaml": "epochs: 1\n",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    found = ["configs/bare.yaml", "scripts/bare.sh"]
    assert sorted(silent_files(root)) == [*found, *(f"util/{x}.py" for x in ("comment", "empty", "late", "short"))]


def test_files_without_a_test_are_found(tmp_path):
    names = ["util/a.py", "util/b.py", "util/c.py", "util/__init__.py", "tests/test_a.py", "tests/test_d.py"]
    root = project(tmp_path, dict.fromkeys(names, ""))
    assert untested_files(root, {"util/b.py": "d"}) == ["util/c.py"]
    assert untested_files(root, {"util/b.py": "e", "util/c.py": "d", "util/f.py": "d"}) == [
        "util/b.py",
        "util/f.py: no such file",
    ]
    entries = {"util/a.py": "d", "util/b.py": "d", "util/c.py": "d"}
    assert untested_files(root, entries) == ["util/a.py: has a test file of its name"]


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("x.cuda()", ".cuda() fixes the device"),
        ("import torch\ntorch.load('f')", "without weights_only=True"),
        ("import torch\ntorch.load('f', weights_only=False)", "without weights_only=True"),
        ("from torch import load\nload('f')", "without weights_only=True"),
        ("import yaml\nyaml.load('a', yaml.SafeLoader)", "yaml.load is not the safe one"),
        ("from yaml import load\nload('a')", "by their full name"),
        ("import yaml\nclass L(yaml.Loader): ...", "L derives from an unsafe loader"),
    ],
)
def test_forbidden_calls_are_found(tmp_path, text, violation):
    (found,) = forbidden_calls(project(tmp_path, {"util/a.py": text}))
    assert violation in found


def test_allowed_calls_are_not_found(tmp_path):
    text = "import torch, yaml\ntorch.load('f', weights_only=True)\nyaml.safe_load('a')\nx.to('cuda')\nload('f')"
    assert forbidden_calls(project(tmp_path, {"util/a.py": text})) == []


@pytest.mark.parametrize("text", ["if rank == 0: pass", "run.processes.rank", "loss.item()", "f(local_rank=1)"])
def test_a_method_that_knows_too_much_is_found(tmp_path, text):
    root = project(tmp_path, {"unimatch.py": text, "util/a.py": text})
    assert len(methods_that_know_too_much(root)) == 1
