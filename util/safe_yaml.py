"""Reading YAML from strangers: plain values only, limited in size and depth, no key twice."""

from __future__ import annotations

from typing import Any

import yaml

from util.errors import ConfigError, one_line, quoted


class RefusedYAML(yaml.MarkedYAMLError):
    """YAML that a config does without."""


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


# A config of a few kB is long. Beyond these it is no config, or one that is meant to keep the reader busy.
MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_TEXT = 100_000, 10, 1000


def parse_yaml(text: str, source: str) -> Any:
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(f"{source}: longer than {MAX_YAML_BYTES} characters, which no config is")
    try:
        return _PlainLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{source}: not valid YAML: {place}{one_line(error.problem or error.context)}") from None
    except Exception as error:  # PyYAML builds values with whatever they raise: 2020-13-45 is a date, so a ValueError
        raise ConfigError(f"{source}: not valid YAML: {one_line(error)}") from None
