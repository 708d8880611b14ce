"""The architecture: direction of imports, no circles, few floors, short files, a first line each, no forbidden call.

Each rule is a function from a project's folder to its violations, tried on small fake projects as well as on this one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dataset", "model", "scripts", "tests", "util")
MAX_LINES, MAX_FLOORS, MIN_WORDS = 350, 6, 3

# Which of our packages and method files a file may import from, by the longest prefix that fits its path. Method files
# are "" here. What is not allowed would point upwards: from what is used to what uses it.
MAY_IMPORT = {
    "": ("dataset", "model", "util"),
    "model/": ("model",),
    "dataset/": ("dataset",),
    "util/": ("dataset", "model", "util"),
    "scripts/": ("dataset", "model", "util"),
    "scripts/benchmark/": ("dataset", "model", "util", "scripts/benchmark", ""),
    "tests/": ("dataset", "model", "util", "scripts", "tests", ""),
}
# The same within packages: what a folder's files must not import although the table above would allow it.
MAY_NOT_IMPORT = {
    "dataset/": ("dataset/prepare",),  # it never runs in training
    "util/": ("util/train", "dataset/prepare"),
    "util/distributed/": ("util/train", "dataset/prepare"),
    "util/train/": ("dataset/prepare",),
}

# Why a file may be longer than MAX_LINES.
ONE_A_LINE = "many short cases of one thing, each with the message that it gives"
LONG_FILES = {
    "scripts/benchmark/__main__.py": "a list of measurements, each a function of its own",
    "scripts/chaos.py": "a list of faults, each a function of its own",
    "tests/test_bad_input.py": ONE_A_LINE,
    "tests/test_check_data.py": ONE_A_LINE,
    "tests/test_checkpoint.py": ONE_A_LINE,
    "tests/test_config.py": ONE_A_LINE,
    "tests/test_distributed.py": "the functions that its processes run must be in one file with their tests",
    "tests/test_files.py": ONE_A_LINE,
    "tests/test_launch.py": ONE_A_LINE,
    "tests/test_model.py": "one module is tested, against one set of figures",
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
    "dataset/lists.py": "files",
    "dataset/loader.py": "semi_data",
    "dataset/packing.py": "semi_data",
    "dataset/prepare/archives.py": "prepare_data",
    "dataset/prepare/audit.py": "check_data",
    "dataset/prepare/downloads.py": "prepare_data",
    "dataset/resize.py": "transform",
    "fixmatch.py": "steps",
    "model/backbone/resnet.py": "model",
    "model/backbone/resnet_tv.py": "convert_backbone",
    "model/backbone/xception.py": "model",
    "model/semseg/deeplabv3plus.py": "model",
    "model/weights.py": "pretrained",
    "scripts/benchmark/__main__.py": "benchmark",
    "scripts/benchmark/naive.py": "benchmark",
    "scripts/benchmark/naive_data.py": "semi_data",
    "scripts/make_toy.py": "toy",
    "scripts/predict.py": "tools",
    "supervised.py": "steps",
    "unimatch.py": "steps",
    "util/cli.py": "bad_input",
    "util/convert.py": "config",
    "util/distributed/batchnorm.py": "distributed",
    "util/distributed/collectives.py": "distributed",
    "util/distributed/ddp.py": "distributed",
    "util/distributed/group.py": "distributed",
    "util/distributed/watchdog.py": "distributed",
    "util/errors.py": "bad_input",
    "util/log.py": "loop",
    "util/run.py": "bad_input",
    "util/safe_yaml.py": "config",
    "util/signals.py": "resume",
    "util/train/clock.py": "loop",
    "util/train/guard.py": "nonfinite",
    "util/train/saving.py": "resume",
    "util/train/step_metrics.py": "loop",
    "util/visualize.py": "tools",
}


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def python_files(root: Path) -> tuple[str, ...]:
    """Our Python files as posix paths relative to `root`: the methods at the top, and everything in the packages."""
    packages = [file for package in PACKAGES for file in (root / package).rglob("*.py")]
    return tuple(sorted(path.relative_to(root).as_posix() for path in [*root.glob("*.py"), *packages]))


def imported_names(root: Path, name: str) -> Iterator[str]:
    """Dotted names of what a file imports, also inside functions and for type checkers, relative imports resolved."""
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree_of(root / name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from scripts import x` may import the module scripts.x.
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def imports(root: Path, name: str) -> tuple[str, ...]:
    """The files of ours that a file imports: for each dotted name the longest part of it that is a file."""
    found = set()
    for dotted in imported_names(root, name):
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            stem = "/".join(parts[:length])
            file = next((f for f in (f"{stem}.py", f"{stem}/__init__.py") if f in python_files(root)), None)
            if file:
                found.add(file)
                break
    return tuple(sorted(found - {name}))


def wrong_directions(root: Path) -> list[str]:
    """Imports that the two tables above do not allow."""

    def rule(table: dict[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
        return table[max((prefix for prefix in table if name.startswith(prefix)), key=len, default="")]

    def within(file: str, places: tuple[str, ...]) -> bool:
        return any(file.startswith(f"{place}/") if place else "/" not in file for place in places)

    forbidden = {"": (), **MAY_NOT_IMPORT}
    return [
        f"{name} imports {file}"
        for name in python_files(root)
        for file in imports(root, name)
        if not within(file, rule(MAY_IMPORT, name))
        or (within(file, rule(forbidden, name)) and not within(name, rule(forbidden, name)))
    ]


def imports_between_tests(root: Path) -> list[str]:
    """What several tests share belongs into helpers.py, faults.py or reference/."""
    return [
        f"{name} imports {file}"
        for name in python_files(root)
        for file in imports(root, name)
        if file.startswith("tests/test_")
    ]


def circles(root: Path) -> list[str]:
    """Each file that imports itself through others, with the way round."""
    found, done = [], set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for file in imports(root, name):
                visit(file, [*way, name])
            done.add(name)

    for name in python_files(root):
        visit(name, [])
    return found


def floors(root: Path) -> dict[str, list[str]]:
    """For each folder the longest chain of its own files of which each imports the next."""
    if circles(root):
        return {}

    @cache
    def chain(name: str) -> tuple[str, ...]:
        folder = name.rpartition("/")[0]
        below = (chain(file) for file in imports(root, name) if file.rpartition("/")[0] == folder)
        return (name, *max(below, key=len, default=()))

    longest: dict[str, list[str]] = {}
    for name in python_files(root):
        folder = name.rpartition("/")[0]
        longest[folder] = max(longest.get(folder, []), list(chain(name)), key=len)
    return longest


def high_folders(root: Path) -> list[str]:
    """Folders with more than MAX_FLOORS floors."""
    return [f"{len(chain)} floors: {' -> '.join(chain)}" for chain in floors(root).values() if len(chain) > MAX_FLOORS]


def long_files(root: Path, reasons: dict[str, str]) -> list[str]:
    """Files of more than MAX_LINES lines without a reason, and reasons for files that are gone."""
    lines = {name: len((root / name).read_text(encoding="utf-8").splitlines()) for name in python_files(root)}
    too_long = [f"{name}: {n} lines" for name, n in lines.items() if n > MAX_LINES and name not in reasons]
    return too_long + [f"{name}: no such file" for name in reasons if name not in lines]


def silent_files(root: Path) -> list[str]:
    """Python files, shell scripts and recipes whose first line does not say in words what they hold."""
    wrong = []
    for name in python_files(root):
        first = (ast.get_docstring(tree_of(root / name)) or "").split("\n")[0]
        starts = (root / name).read_text(encoding="utf-8").startswith('"""')
        if not starts or len(first.split()) < MIN_WORDS:
            wrong.append(name)
    for path in [*root.glob("scripts/*.sh"), *root.glob("configs/*.yaml"), *root.glob("requirements*.txt")]:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")]
        if not lines or not lines[0].startswith("# ") or len(lines[0].split()) <= MIN_WORDS:
            wrong.append(path.relative_to(root).as_posix())
    return wrong


def forbidden_calls(root: Path) -> list[str]:
    """Calls that fix the device, run code from a file, or read YAML that can."""
    wrong = []
    for name in python_files(root):
        names = set(imported_names(root, name))
        if any(dotted.startswith("yaml.") for dotted in names):
            wrong.append(f"{name}: call yaml's functions by their full name")
        for node in ast.walk(tree_of(root / name)):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases}
                unsafe = {base for base in bases if base.startswith("yaml.")}
                if unsafe - {"yaml.SafeLoader", "yaml.MarkedYAMLError"}:
                    wrong.append(f"{name}:{node.lineno}: {node.name} derives from an unsafe loader")
            if not isinstance(node, ast.Call):
                continue
            called, where = ast.unparse(node.func), f"{name}:{node.lineno}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called.endswith(".cuda"):
                wrong.append(f"{where}: .cuda() fixes the device; use .to(device)")
            loads = called == "torch.load" or (called == "load" and "torch.load" in names)
            if loads and keywords.get("weights_only") != "True":
                wrong.append(f"{where}: torch.load without weights_only=True runs code")
            if called.startswith("yaml.") and called not in ("yaml.safe_load", "yaml.safe_dump"):
                wrong.append(f"{where}: {called} is not the safe one")
    return wrong


def methods_that_know_too_much(root: Path) -> list[str]:
    """Words in a method file that belong into util/: ranks, and calls that make the host wait for the device."""
    wrong = []
    for name in (file for file in python_files(root) if "/" not in file):
        words = {
            word
            for node in ast.walk(tree_of(root / name))
            for word in (getattr(node, key, None) for key in ("id", "attr", "arg"))
            if isinstance(word, str)
        }
        waits = words & {"item", "tolist", "numpy", "cpu", "synchronize"}
        wrong += [f"{name}: {word}" for word in sorted(waits | {word for word in words if "rank" in word.lower()})]
    return wrong


def untested_files(root: Path, tested_by: dict[str, str]) -> list[str]:
    """Files without a test file of their name, or of the name in `tested_by`; and entries of it that name no file."""
    files = python_files(root)
    tests = {name.removeprefix("tests/test_").removesuffix(".py") for name in files if name.startswith("tests/test_")}
    own = [name for name in files if not name.startswith("tests/") and not name.endswith("__init__.py")]
    wrong = [name for name in own if not {name.rpartition("/")[2].removesuffix(".py"), tested_by.get(name)} & tests]
    return wrong + [f"{name}: no such file" for name in tested_by if name not in own]


RULES: dict[str, Callable[[Path], list[str]]] = {
    "imports point downwards": wrong_directions,
    "tests do not import tests": imports_between_tests,
    f"no file has more than {MAX_LINES} lines without a reason in LONG_FILES": lambda root: long_files(
        root, LONG_FILES
    ),
    "every file's first line says what it holds": silent_files,
    "the forbidden calls do not occur": forbidden_calls,
    "a method knows no rank and reads nothing back": methods_that_know_too_much,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps_the_rule(rule):
    assert RULES[rule](ROOT) == []


def test_the_files_of_the_project_are_found():
    assert {"unimatch.py", "model/semseg/deeplabv3plus.py", "util/train/loop.py"} <= set(python_files(ROOT))
    assert {"util/semi.py", "util/train/loop.py", "dataset/semi.py"} <= set(imports(ROOT, "unimatch.py"))


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
    root = project(tmp_path, {"util/a.py": "#\n" * MAX_LINES, "util/b.py": "#\n" * MAX_LINES, "util/c.py": "#"})
    assert long_files(root, {"util/b.py": "why"}) == [f"util/a.py: {MAX_LINES + 1} lines"]
    assert long_files(root, {"util/a.py": "why", "util/b.py": "why", "util/d.py": "why"}) == ["util/d.py: no such file"]


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
