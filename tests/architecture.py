"""Rules of the architecture: each a function from a project's folder to its violations, in words."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

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
    "scripts/chaos/": ("dataset", "model", "util", "scripts/chaos"),
    "scripts/report/": ("dataset", "model", "util", "scripts/report"),
    "tests/": ("dataset", "model", "util", "scripts", "tests", ""),
}
# The same within packages: what a folder's files must not import although the table above would allow it.
MAY_NOT_IMPORT = {
    "dataset/": ("dataset/prepare",),  # it never runs in training
    "util/": ("util/train", "dataset/prepare"),
    "util/distributed/": ("util/train", "dataset/prepare"),
    "util/train/": ("dataset/prepare",),
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
    """Files of more than MAX_LINES lines without a reason, and reasons for files that are gone or short."""
    lines = {name: len((root / name).read_text(encoding="utf-8").splitlines()) for name in python_files(root)}
    too_long = [f"{name}: {n} lines" for name, n in lines.items() if n > MAX_LINES and name not in reasons]
    stale = [f"{name}: needs no reason" for name in reasons if lines.get(name, MAX_LINES + 1) <= MAX_LINES]
    return too_long + stale + [f"{name}: no such file" for name in reasons if name not in lines]


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
    """Files without a test file of their name, or of the name in `tested_by`; and entries of it that are not needed.

    An entry is not needed if there is no such file, or a test file of a name that no other file has.
    """
    files = python_files(root)
    tests = {name.removeprefix("tests/test_").removesuffix(".py") for name in files if name.startswith("tests/test_")}
    stems = {name: PurePosixPath(name).stem for name in files if not name.startswith("tests/")}
    own = [name for name in stems if not name.endswith("__init__.py")]
    alone = {stem for stem, count in Counter(stems.values()).items() if count == 1}
    wrong = [name for name in own if not {stems[name], tested_by.get(name)} & tests]
    wrong += [f"{name}: has a test file of its name" for name in tested_by if stems.get(name) in tests & alone]
    return wrong + [f"{name}: no such file" for name in tested_by if name not in own]
