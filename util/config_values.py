"""Values as YAML gives them, turned into the types of the configuration's fields."""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from util.config_schema import Criterion
from util.errors import ConfigError, quoted, suggest

CRITERIA = ("CELoss", "OHEM")
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NUMBER = r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"


def without_kwargs(criterion: Mapping[str, Any]) -> dict[str, Any]:
    """The criterion's mapping with its numbers side by side; the published files nest them under `kwargs`.

    Raises ConfigError for one that is given in both ways.
    """
    kwargs = criterion.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        return dict(criterion)
    if twice := next((key for key in kwargs if key in criterion), None):
        raise ConfigError(f"{quoted(twice)} is given twice, in kwargs and beside it")
    return {key: value for key, value in criterion.items() if key != "kwargs"} | kwargs


def convert(value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """`value`, as YAML gives it, as the field's type; numbers are checked against the field's range."""
    if hint is Criterion:
        return convert_criterion(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{quoted(value)} is none of {', '.join(args)}{suggest(str(value), args)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [kind for kind in args if kind is not type(None)]
        if bool in kinds and isinstance(value, str):
            value = SWITCHES.get(value.lower(), value)
        exact = [kind for kind in kinds if typing.get_origin(kind) is None and isinstance(value, kind)]
        listed = [kind for kind in kinds if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple))]
        return convert(value, (exact or listed or kinds)[0], limits)
    if origin is tuple:
        return _convert_tuple(value, args, limits)
    if origin is dict:
        return convert_label_map(value)
    if hint is bool:
        if isinstance(value, str):
            value = SWITCHES.get(value.lower(), value)
        if not isinstance(value, bool):
            raise ConfigError(f"expected true or false, found {quoted(value)}")
        return value
    if hint is str:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"expected text, found {quoted(value)}")
        return value
    return convert_number(value, hint, limits)


def _convert_tuple(value: Any, args: tuple[Any, ...], limits: Mapping[str, Any]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"expected a list, found {quoted(value)}")
    if args[-1] is not Ellipsis and len(value) != len(args):
        raise ConfigError(f"expected {len(args)} values, found {quoted(value)}")
    if args[0] is str:  # class names such as 1, given as another type than text
        value = [item if isinstance(item, (str, list, dict)) else str(item) for item in value]
    return tuple(convert(item, args[0], limits) for item in value)


def convert_label_map(value: Any) -> dict[int, int] | None:
    """{label value: class}, sorted, all within 0..255; an empty one is none."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected {{label value: class}} such as {{0: 0, 255: 1}}, found {quoted(value)}")
    byte = {"minimum": 0, "maximum": 255}
    classes: dict[int, int] = {}
    for key, given in value.items():
        entry = f"{quoted(key)}: {quoted(given)}"
        if given is None:  # `{0:1}` is a key without a value to YAML
            raise ConfigError(f"{entry}: no class is given (write a space after the colon, as in {{0: 0, 255: 1}})")
        try:
            number, index = convert_number(key, int, byte), convert_number(given, int, byte)
        except ConfigError as error:
            raise ConfigError(f"{entry}: {error}") from None
        if number in classes:
            raise ConfigError(f"{entry}: the label value {number} is named twice")
        classes[number] = index
    return dict(sorted(classes.items())) or None


def convert_number(value: Any, hint: type, limits: Mapping[str, Any]) -> Any:
    kind = "a whole number" if hint is int else "a number"
    if isinstance(value, str):  # 1e-3, without a dot, is text to YAML
        if re.fullmatch(r"[-+]?0[0-9_]+.*", value):
            raise ConfigError(f"{quoted(value)} begins with 0, which YAML reads in base 8: leave the 0 out")
        if not re.fullmatch(NUMBER, value):
            raise ConfigError(f"expected {kind}, found {quoted(value)}")
        value = float(value)
    finite = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # False for NaN
    if isinstance(value, bool) or not finite:
        raise ConfigError(f"expected {kind}, found {quoted(value)}")
    if hint is int and value != int(value):
        raise ConfigError(f"expected {kind}, found {quoted(value)}")
    value = hint(value)
    above, minimum, maximum = (limits.get(key) for key in ("above", "minimum", "maximum"))
    if above is not None and value <= above:
        raise ConfigError(f"{value} must be greater than {above}")
    if minimum is not None and value < minimum:
        raise ConfigError(f"{value} must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{value} must be at most {maximum}")
    return value


def convert_criterion(value: Any) -> Criterion:
    """`CELoss`, `OHEM`, or a mapping with `name` and OHEM's numbers, flat or under `kwargs` as the release has them."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(f"expected CELoss or {{name: OHEM, thresh: 0.7, min_kept: 200000}}, found {quoted(value)}")
    options = without_kwargs(value)
    name = options.pop("name")
    if name not in CRITERIA:
        raise ConfigError(f"unknown criterion {quoted(name)}{suggest(name, CRITERIA)}; there are {', '.join(CRITERIA)}")
    if options.pop("ignore_index", 255) != 255:
        raise ConfigError("ignore_index is 255 throughout; label_map maps other values to it")
    allowed = ("thresh", "min_kept") if name == "OHEM" else ()
    for key in options:
        if key not in allowed:
            raise ConfigError(f"{name} has no {quoted(str(key))}{suggest(key, allowed)}")
    limits = {"thresh": (float, {"above": 0, "maximum": 1}), "min_kept": (int, {"minimum": 0})}
    numbers = {}
    for key, given in options.items():
        try:
            numbers[key] = convert_number(given, *limits[key])
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    return Criterion(name, **numbers)


def plain_values(value: Any) -> Any:
    """Tuples become lists, inside too: what YAML and a checkpoint can hold without any class of ours."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    return [plain_values(item) for item in value] if isinstance(value, (list, tuple)) else value
