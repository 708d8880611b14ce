"""Reading YAML from strangers: plain values only, limited in size and depth, no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

from dataset.errors import one_line
from util.errors import ConfigError, quoted


class RefusedYAML(yaml.MarkedYAMLError):
    """YAML that a config does without."""


# What is no text without quotes by YAML 1.2. YAML 1.1, which PyYAML reads, takes `no` for false, 010 for 8,
# 1:30 for 90 and 2020-01-01 for a date: here these stay what was written.
_NOT_TEXT = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
)
NAMES = ("classes",)  # keys whose values are lists of names: 007, 1.50 and null are names too


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain values only, without what can hide a mistake or do harm.

    Refused are keys given twice (the last one would win, silently), aliases (`*name`; nested ones grow without end),
    deep nesting and long texts (among which are numbers that take Python forever to write).
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise RefusedYAML(None, None, "aliases (*name) are not accepted: repeat the value", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_YAML_TEXT:
            problem = f"a text of {len(event.value)} characters, at most {MAX_YAML_TEXT} are accepted"
            raise RefusedYAML(None, None, problem, event.start_mark)
        if self._depth == MAX_YAML_DEPTH:
            problem = f"nested more than {MAX_YAML_DEPTH} levels deep"
            raise RefusedYAML(None, None, problem, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) < len(node.value):
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise RefusedYAML(None, None, f"key {quoted(key)} is given twice", key_node.start_mark)
                seen.add(key)
        return mapping


_PlainLoader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in _NOT_TEXT:
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})\\Z"), _first)

# A config of a few kB is long. Beyond these it is no config, or one that is meant to keep the reader busy.
MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_TEXT = 100_000, 10, 1000


def parse_yaml(text: str, source: str, key: str = "") -> Any:
    """The value of `text`, that of a `key` or a mapping of keys. Raises ConfigError, which begins with `source`."""
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(f"{source}: longer than {MAX_YAML_BYTES} characters, which no config is")
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if name.value in NAMES:
                _keep_text(value)
        if key in NAMES:
            _keep_text(node)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{source}: not valid YAML: {place}{one_line(error.problem or error.context)}") from None
    except Exception as error:  # PyYAML builds values of a given type (!!int) with whatever they raise
        raise ConfigError(f"{source}: not valid YAML: {one_line(error)}") from None


def _keep_text(node: yaml.Node | None) -> None:
    """Have the items of a list read as the texts that were written."""
    for item in node.value if isinstance(node, yaml.SequenceNode) else ():
        if isinstance(item, yaml.ScalarNode):
            item.tag = "tag:yaml.org,2002:str"
