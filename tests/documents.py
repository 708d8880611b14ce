"""Rules for the documents: each a function from a project's folder to what its documents name that does not exist."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from unittest import mock

from util.config import Config

KEYS = frozenset(field.name for field in fields(Config))
# Names in examples that stand for the reader's own, and weights, which git ignores.
EXAMPLES = re.compile(r"\.pth$|leaves|my_data|my_method|my_model|photos|downloads|/\.\.\.|[A-Z*<{]")
OURS = ("configs", "dataset", "docs", "model", "pretrained", "scripts", "splits", "tests", "util")
COMMAND = re.compile(r"(\w+=(\S+|\"[^\"]+\") )*(python|torchrun|srun|sbatch|sh) .")
OTHERS = ("tensorboard ", "sbatch ", "pip ")  # programs whose flags are not ours
TOP_LEVEL = r"\w+\.(py|toml)|requirements[\w-]*\.txt"
SHELL_VARIABLES = re.compile(r"^(\w+)=(.*)$")


def documents(root: Path) -> dict[str, str]:
    """Path -> text: the README, the pages behind it, and the headers of the recipes with their commands as blocks."""
    pages = [root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("[a-z]*/README.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    for recipe in sorted(root.glob("configs/**/*.yaml")):
        lines = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        inset = "\n".join(line[4:] for line in lines if line.startswith("#   "))
        block = "\n".join(line for line in inset.replace("\\\n", " ").splitlines() if COMMAND.match(line))
        texts[recipe] = "\n".join([*lines, "```sh", block, "```", ""])
    return {path.relative_to(root).as_posix(): text for path, text in texts.items()}


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """The contents of the inline code spans."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in the sh blocks, and of each command in a code span."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
    for span in spans(text):
        if COMMAND.match(span):
            yield shlex.split(span)


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(root: Path) -> list[str]:
    """Links and pictures whose file or heading is missing, and pages that the README does not link to."""
    texts, wrong, linked = documents(root), [], set()
    for page, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?://", target):
                continue
            name, _, anchor = target.partition("#")
            file = ((root / page).parent / name).resolve() if name else root / page
            if page == "README.md":
                linked.add(file.relative_to(root).as_posix())
            if not file.exists():
                wrong.append(f"{page}: {target}: no such file")
            elif anchor and anchor not in headings(file.read_text(encoding="utf-8")):
                wrong.append(f"{page}: {target}: no such heading")
    pages = [page for page in texts if page.endswith(".md") and page != "README.md"]
    return wrong + [f"{page}: not linked from README.md" for page in pages if page not in linked]


def missing_paths(root: Path) -> list[str]:
    """Paths of the project in code spans and sh blocks that do not exist."""
    wrong = []
    for page, text in documents(root).items():
        words = {word for span in [*spans(text), *blocks(text, "sh")] for word in re.split(r"[\s,;()'\"=|]+", span)}
        for path in sorted(word.rstrip(".:") for word in words):
            is_ours = ("/" in path and path.split("/")[0] in OURS) or re.fullmatch(TOP_LEVEL, path)
            places = (root, (root / page).parent)
            if is_ours and not EXAMPLES.search(path) and not any((place / path).exists() for place in places):
                wrong.append(f"{page}: {path}: no such file")
    return wrong


@cache
def parser_of(root: Path, name: str) -> argparse.ArgumentParser:
    """The parser that a program builds before it parses; `name` is a module such as scripts.predict or unimatch."""

    class Built(Exception):
        pass

    def stop(parser: argparse.ArgumentParser, *_args: object, **_kwargs: object) -> None:
        raise Built(parser)

    is_package = (root / name.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{name}.__main__" if is_package else name)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            module.main([])
        except Built as built:
            return built.args[0]
    raise AssertionError(f"{name}: main parses no arguments")


def program_of(root: Path, words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a command that runs one of our Python programs."""
    for index, word in enumerate(words):
        if word == "-m" and index + 1 < len(words) and words[index + 1].startswith("scripts."):
            return words[index + 1], words[index + 2 :]
        if re.fullmatch(r"\w+\.py", word) and (root / word).exists():
            return word.removesuffix(".py"), words[index + 1 :]
    return None


def fault_of(root: Path, words: list[str], settings: Iterable[str] = KEYS) -> str | None:
    """Why a command would be refused, as far as its words tell."""
    before_program = itertools.takewhile(lambda match: match, map(SHELL_VARIABLES.match, words))
    if words[-1] != "..." and (script := next((w for w in words if w.endswith(".sh")), None)):
        return _fault_of_launch(root, script, dict(match.groups() for match in before_program), words)
    program = program_of(root, words)
    if program is None:
        return None
    name, arguments = program
    if not any((root / f"{name.replace('.', '/')}{end}").exists() for end in (".py", "/__main__.py")):
        return f"no module {name}"
    parser = parser_of(root, name)
    optional = "..." in words or any(re.search(r"[\[\]<>]", word) for word in arguments)
    flags = [word.strip("[]").split("=")[0] for word in arguments if word.lstrip("[").startswith("--")]
    unknown = [flag for flag in flags if flag not in parser._option_string_actions]
    if unknown:
        return f"{name} has no {unknown[0]}"
    if not optional and len(arguments) > 1:
        try:
            with mock.patch.object(argparse.ArgumentParser, "error", _refuse):
                parser.parse_args(arguments)
        except ValueError as error:
            return f"{name}: {error}"
    return _fault_of_settings(arguments, settings)


def _refuse(_parser: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(message)


def _fault_of_settings(arguments: list[str], settings: Iterable[str]) -> str | None:
    if "--set" in arguments:
        for word in arguments[arguments.index("--set") + 1 :]:
            if word.startswith("--") and word != "--set":
                break
            key = word.partition("=")[0]
            if "=" in word and key not in settings:
                return f"no key {key}"
    return None


def _fault_of_launch(root: Path, script: str, variables: Mapping[str, str], words: list[str]) -> str | None:
    if not (root / script).exists():
        return f"no script {script}"
    text = (root / script).read_text(encoding="utf-8") + (root / "scripts/common.sh").read_text(encoding="utf-8")
    for name, value in variables.items():
        if not re.search(rf"\$\{{?{name}\b", text):
            return f"{script} knows no variable {name}"
        if name == "method" and not EXAMPLES.search(value) and not (root / f"{value}.py").exists():
            return f"no method {value}"
    dataset = variables.get("dataset", "pascal")
    split = variables.get("split", "")
    if split and dataset != "toy" and not EXAMPLES.search(dataset + split):
        if "config" not in variables and not (root / "configs" / f"{dataset}.yaml").exists():
            return f"no recipe of {dataset}"
        if not (root / "splits" / dataset / split).is_dir():
            return f"no split {split} of {dataset}"
    return _fault_of_settings(words, KEYS)


def refused_commands(root: Path) -> list[str]:
    """Commands whose script, module, flag, argument, variable or key does not exist."""
    found = ((page, words, fault_of(root, words)) for page, text in documents(root).items() for words in commands(text))
    return [f"{page}: {' '.join(words)}: {fault}" for page, words, fault in found if fault]


def unknown_keys(root: Path) -> list[str]:
    """Keys in yaml blocks and in code spans such as `epochs: 3` that the configuration does not have."""
    wrong = []
    for page, text in documents(root).items():
        lines = [line for block in blocks(text, "yaml") for line in block.splitlines()]
        found = (re.match(r"([a-z][a-z_0-9]*): \S", line) for line in [*lines, *spans(text)])
        keys = [match[1] for match in found if match and match[1] not in ("error", "warning", "note", "skipped")]
        wrong += [f"{page}: {key}: no such key" for key in keys if key not in KEYS]
    return wrong


def unknown_names(root: Path) -> list[str]:
    """Flags and names_with_underscores in code spans that occur nowhere in the project's files."""
    places = [*(root.glob(f"{place}/**/*.*") for place in OURS if place != "splits"), root.glob("*.*")]
    files = {path for place in places for path in place if path.suffix in (".py", ".sh", ".yaml", ".toml", ".txt")}
    known = {word for path in files for word in re.findall(r"[\w-]+", path.read_text(encoding="utf-8"))}
    wrong = []
    for page, text in documents(root).items():
        for span in spans(text):
            names = re.findall(r"(?<![\w/.-])(?:--[a-z][\w-]+|[a-z]+(?:_[a-z0-9]+)+)(?![\w/.-])", span)
            wrong += [
                f"{page}: {name}: occurs nowhere in the code"
                for name in names
                if name not in known and not EXAMPLES.search(name) and not span.startswith(OTHERS)
            ]
    return wrong
