"""Read YAML into nested frozen dataclasses; an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from latentcache import InputError
from latentcache.storage import YAML_BYTES, parse_yaml

C = TypeVar("C")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def read_yaml(path: Path, kind: type[C]) -> C:
    """Return the dataclass that a YAML file describes.

    Raises:
        InputError: The file cannot be read, is no YAML or more than its limits, or does not fit ``kind``.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(YAML_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"a configuration that cannot be read ({type(error).__name__})",
            expected="a YAML file",
            remedy="Check the path and its permissions.",
        ) from None
    return typing.cast(C, build(kind, parse_yaml(text, "the configuration file"), ""))


def build(kind: Any, value: Any, at: str) -> Any:
    """Return ``value`` as the dataclass ``kind``; ``at`` is its dotted key."""
    if not isinstance(value, Mapping):
        raise InputError(
            f"{at or 'the file'} is {_kind_of(value)}",
            expected=f"a section with keys such as {fields(kind)[0].name}",
            remedy="See the example in infra/docs/serve.md.",
        )
    hints = typing.get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind)}
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), 1, 0.0)[0]
            raise InputError(
                f"unknown key {_dotted(at, name)}",
                expected=f"one of {', '.join(known)}",
                remedy=f"The nearest known key is {_dotted(at, near)}.",
            )
    missing = [
        name
        for name, entry in known.items()
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise InputError(
            f"no {_dotted(at, missing[0])}", expected="a value for it", remedy="See the example in infra/docs/serve.md."
        )
    return kind(**{name: _convert(given, hints[name], _dotted(at, name)) for name, given in value.items()})


def _convert(value: Any, hint: Any, at: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), at)
    if is_dataclass(hint):
        return build(hint, value, at)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, arguments[0], f"{at}[{i}]") for i, item in enumerate(value))
    if origin is tuple and isinstance(value, (str, int, float)) and not is_dataclass(arguments[0]):
        return (_convert(value, arguments[0], at),)
    if origin is dict and isinstance(value, Mapping):
        return {str(name): _convert(item, arguments[1], _dotted(at, name)) for name, item in value.items()}
    if hint is Path and isinstance(value, str) and value:
        return Path(value)
    if (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and (hint is float or (hint is int and value == int(value))):
        return hint(value)
    raise InputError(f"{at} is {_kind_of(value)}", expected=_describe(hint), remedy="Correct it in the configuration.")


def _dotted(at: str, name: object) -> str:
    return f"{at}.{name}" if at else str(name)


def _kind_of(value: Any) -> str:
    """Name a value's kind and, where it is a number or a short word, the value; long texts may be credentials."""
    if value is None:
        return "empty"
    if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 40):
        return repr(value)
    names: dict[type, str] = {list: "a list", dict: "a section", str: "a long text"}
    return names.get(type(value), type(value).__name__)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin is tuple:
        return "a list"
    if origin is dict:
        return "a section"
    return _WORDS.get(hint, "a section")
