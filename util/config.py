"""Loading a configuration: a YAML recipe, then `--set key=value`, checked and turned into a frozen Config.

A mistake is one line that names the file (or the `--set`), the key, the value and the way out. The keys are in
util/config_schema.py, the rules in util/config_rules.py.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from dataset.catalog import CATALOG
from dataset.errors import one_line
from model.weights import PROJECT_ROOT, resolve_path
from util.config_rules import batchnorm_group, check_batch, check_rules, for_method, has_teacher
from util.config_schema import EVAL_MODES, NOT_SHAPING, Config, Criterion
from util.config_values import convert, convert_label_map, plain_values, without_kwargs
from util.errors import ConfigError, quoted, suggest
from util.safe_yaml import MAX_YAML_BYTES, MAX_YAML_TEXT, parse_yaml

__all__ = [
    "EVAL_MODES",
    "NOT_SHAPING",
    "PROJECT_ROOT",
    "Config",
    "Criterion",
    "batchnorm_group",
    "check_batch",
    "config_from",
    "differing_keys",
    "for_method",
    "has_teacher",
    "load_config",
    "parse_label_colors",
    "parse_label_map",
    "resolve_path",
    "to_dict",
]


def load_config(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Read a YAML recipe, apply `overrides` (strings `key=value`, or a mapping) and validate.

    Raises ConfigError, whose one line names the file or override, the key and the way out.
    """
    return config_from(_read_yaml(resolve_path(path), str(path)), str(path), overrides)


def config_from(values: Mapping[str, Any], path: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """The config of these values, such as a checkpoint's; `path` says in errors where they are from.

    Raises ConfigError as `load_config` does.
    """
    values = dict(values)
    where = dict.fromkeys(values, path)
    for key, value, source in _parse_overrides(overrides):
        _assign(values, key, value, source)
        where[key.split(".")[0]] = source
    known = {f.name: f for f in fields(Config)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{where[key]}: unknown key {quoted(str(key))}{suggest(key, known)}")
    for key, spec in known.items():
        if key not in values and spec.default is MISSING:
            raise ConfigError(f"{path}: key '{key}' is missing ({spec.metadata['doc']})")
    hints = typing.get_type_hints(Config)
    converted = {}
    for key, value in values.items():
        try:
            converted[key] = convert(value, hints[key], known[key].metadata)
        except ConfigError as error:
            raise ConfigError(f"{where[key]}: {key}: {error}") from None
    if "eval_mode" not in converted and converted["dataset"] in CATALOG:
        converted["eval_mode"] = CATALOG[converted["dataset"]].eval_mode
    try:
        cfg = Config(**converted)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    check_rules(cfg, converted, lambda key: where.get(key, path))
    return cfg


def parse_label_map(text: str, source: str) -> dict[int, int] | None:
    """A `label_map` given as YAML text; raises ConfigError, which begins with `source`."""
    value = parse_yaml(text, source)
    try:
        return convert_label_map(value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def parse_label_colors(text: str, source: str) -> dict[tuple[int, int, int], int]:
    """Label values of `label_colors`, given as YAML text; raises ConfigError, which begins with `source`."""
    try:
        colours = convert(parse_yaml(text, source), tuple[tuple[int, int, int], ...], {"minimum": 0, "maximum": 255})
    except ConfigError as error:
        raise ConfigError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from None
    if len(set(colours)) != len(colours) or len(colours) > 256:
        raise ConfigError(f"{source}: expected at most 256 colours, each once")
    return {colour: value for value, colour in enumerate(colours)}


def to_dict(cfg: Config) -> dict[str, Any]:
    """The config as plain lists, numbers and strings; `load_config` of its YAML gives the same config again."""
    plain = {key: value for key, value in asdict(cfg).items() if value is not None}
    if cfg.criterion.name != "OHEM":
        plain["criterion"] = cfg.criterion.name
    return plain_values(plain)


def differing_keys(saved: Mapping[str, Any], cfg: Config) -> list[str]:
    """`key: saved value -> value now` for each key that shapes training and differs from a checkpoint's config."""
    now = to_dict(cfg)
    # A checkpoint that is older than a key was trained with its default.
    defaults = {spec.name: spec.default for spec in fields(cfg) if spec.default is not MISSING}
    saved = {**plain_values(defaults), **saved}
    keys = [key for key in sorted({*saved, *now}, key=str) if key not in NOT_SHAPING and saved.get(key) != now.get(key)]
    return [f"{str(key)[:60]}: {str(saved.get(key))[:200]} -> {now.get(key)}" for key in keys]


def _read_yaml(path: Path, shown: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such config file (the recipes are in configs/)") from None
    except UnicodeError:
        raise ConfigError(f"{shown}: cannot be read: no UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown}: cannot be read: {one_line(error)}") from None
    if "\0" in text[:2]:  # without a mark at its beginning
        raise ConfigError(f"{shown}: cannot be read: UTF-16 text; save it as UTF-8")
    values = parse_yaml(text, shown)
    if not isinstance(values, dict):
        raise ConfigError(f"{shown}: expected lines of `key: value`, found {quoted(values)}")
    return values


def _parse_overrides(overrides: Iterable[str] | Mapping[str, Any]) -> Iterable[tuple[str, Any, str]]:
    if isinstance(overrides, Mapping):
        yield from ((key, value, f"--set {key}={value}") for key, value in overrides.items())
        return
    for text in overrides:
        source = f"--set {text}" if len(text) <= MAX_YAML_TEXT else f"--set {text[:57]}..."
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{source}: expected key=value, such as --set epochs=20")
        yield key.strip(), parse_yaml(value, source, key.strip()), source


def _assign(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set `key`, or `key.inner` of a nested one (only the criterion has an inside)."""
    outer, dot, inner = key.partition(".")
    if not dot:
        values[outer] = value
        return
    if outer != "criterion":
        raise ConfigError(f"{source}: '{outer}' has no inner keys (only criterion.name, .thresh and .min_kept exist)")
    nested = values.get(outer) or {}
    if isinstance(nested, str):
        nested = {"name": nested}
    if not isinstance(nested, dict):
        raise ConfigError(f"{source}: '{outer}' is {quoted(nested)} in the config file, which has no inner keys")
    try:
        nested = without_kwargs(nested)  # an override means the same number wherever it stands
    except ConfigError as error:
        raise ConfigError(f"{source}: in the config file, criterion: {error}") from None
    if inner == "name" and value != "OHEM":
        nested = {}
    values[outer] = {**nested, inner.removeprefix("kwargs."): value}
