"""The house rules that a machine can check: direction of imports, forbidden calls, lint."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["fixmatch.py", "supervised.py", "unimatch.py"]
PACKAGES = ["dataset", "model", "scripts", "tests", "util"]
OURS = {*PACKAGES, *(Path(name).stem for name in METHODS)}
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
)


def _tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def _imports(name: str) -> Iterator[str]:
    """Dotted names of all modules that a file imports, `import`s inside functions included, relative ones resolved."""
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from scripts import x` imports the module scripts.x.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """The dotted name (as far as it has one) and the node of each call."""
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _ours(name: str) -> set[str]:
    return {module.split(".")[0] for module in _imports(name)} & OURS


def test_the_files_of_the_project_are_found():
    assert {"unimatch.py", "model/semseg/deeplabv3plus.py", "dataset/semi.py", "util/train/loop.py"} <= set(FILES)
    assert "util.semi.pseudo_label" in set(_imports("unimatch.py"))


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("model/", "dataset/"))])
def test_model_and_dataset_import_nothing_of_ours_outside_themselves(name):
    assert _ours(name) <= {name.split("/")[0]}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("util/")])
def test_util_imports_neither_scripts_nor_methods_nor_tests(name):
    assert _ours(name) <= {"dataset", "model", "util"}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("scripts/") or name in METHODS])
def test_scripts_never_import_each_other(name):
    own = {"scripts"} if name.startswith("scripts/benchmark/") else set()
    assert _ours(name) <= {"dataset", "model", "util"} | own
    assert {module for module in _imports(name) if module.startswith("scripts.")} <= {
        module for module in _imports(name) if module.startswith("scripts.benchmark.")
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_method_knows_no_rank_and_reads_nothing_back(name):
    words = set()
    for node in ast.walk(_tree(name)):
        words |= {getattr(node, key) for key in ("id", "attr", "arg") if isinstance(getattr(node, key, None), str)}
    assert not {word for word in words if "rank" in word.lower()}
    assert not words & {"item", "tolist", "numpy", "cpu", "synchronize"}


@pytest.mark.parametrize("name", FILES)
def test_forbidden_calls_do_not_occur(name):
    for called, node in _calls(name):
        where = f"{name}:{node.lineno}"
        assert not called.endswith(".cuda"), f"{where}: `.cuda()` fixes the device; use `.to(device)`"
        if called in ("torch.load", "load") and called in ("torch.load", *_loads(name)):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("weights_only") == "True", f"{where}: torch.load without weights_only=True runs code"
        if called.startswith("yaml."):
            assert called in ("yaml.safe_load", "yaml.safe_dump"), f"{where}: {called} is not the safe one"
    bases = {
        ast.unparse(base) for node in ast.walk(_tree(name)) if isinstance(node, ast.ClassDef) for base in node.bases
    }
    assert {base for base in bases if base.startswith("yaml.")} <= {"yaml.SafeLoader", "yaml.MarkedYAMLError"}
    assert not {module for module in _imports(name) if module.startswith("yaml.")}, "call yaml's functions by full name"


def _loads(name: str) -> list[str]:
    """`load`, if the file imports torch's by that name."""
    return ["load"] if "torch.load" in set(_imports(name)) else []


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_finds_nothing_to_change(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--quiet", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
