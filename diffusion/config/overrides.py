"""Dotted keys and YAML onto nested frozen dataclasses. A key that does not exist is an error, never a silence."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from latentcache import InputError
from latentcache.storage import parse_yaml

C = TypeVar("C")


def known_keys(kind: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a config class, sections opened."""
    hints = typing.get_type_hints(kind)
    keys: list[str] = []
    for entry in fields(kind):
        hint = hints[entry.name]
        keys += known_keys(hint, f"{prefix}{entry.name}.") if is_dataclass(hint) else [f"{prefix}{entry.name}"]
    return keys


SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "batch": "batch_size",
    "grad": "clip",
    "gradient": "clip",
    "amp": "precision",
    "optimizer": "optimiser",
    "channels": "width",
    "lambda": "weight",
    "vgg": "vgg19",
    "ssim": "ms_ssim",
    "scheduler": "schedule",
    "workers": "readers",
    "ema": "ema_std",
    "depth": "window",
}
"""Other names for the words of our keys."""


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key that most likely was meant: by the words that its last part means, then by letters."""
    meant = _words(key.rsplit(".", 1)[-1], SYNONYMS)

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        tails = (key.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1])
        letters = 3 * whole + difflib.SequenceMatcher(None, *tails).ratio()
        offered = _words(tails[1], {})
        # Letters alone find misspellings; `lr` has too few to be found by, so what it stands for weighs more.
        known_word = bool(meant & offered) and meant != _words(tails[0], {})
        return letters + (4 * len(meant & offered) / len(meant | offered) if known_word else 0)

    return max(known, key=likeness)


def _words(name: str, synonyms: Mapping[str, str]) -> set[str]:
    """The words of a key's last part, each replaced by what it means."""
    return {ours for word in name.lower().replace("-", "_").split("_") for ours in synonyms.get(word, word).split("_")}


def apply(config: C, values: Mapping[str, Any], where: str, prefix: str = "", known: Sequence[str] | None = None) -> C:
    """A copy of a config with the values of a nested mapping put in.

    Args:
        values: Sections as mappings, e.g. ``{"data": {"window": 16}}``.
        where: What the values came from, for the message.
        known: Keys among which the nearest to an unknown one is looked for; by default those of ``config``.

    Raises:
        InputError: An unknown key, or a value of the wrong kind.
    """
    kind: Any = type(config)
    hints = typing.get_type_hints(kind)
    known = known or [f"{prefix}{k}" for k in known_keys(kind)]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            while isinstance(value, Mapping) and value:
                inner, value = next(iter(value.items()))
                key = f"{key}.{inner}"
            raise unknown(key, known, where)
        if is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{key} = {value!r} in {where}",
                    expected=f"a section with keys such as {key}.{fields(hints[name])[0].name}",
                    remedy=f"Name the key within it, for example {known_keys(hints[name], key + '.')[0]}.",
                )
            changes[name] = apply(getattr(config, name), value, where, f"{key}.", known)
        else:
            changes[name] = convert(value, hints[name], key, where)
    return typing.cast(C, replace(typing.cast(Any, config), **changes))


def unknown(key: str, known: Sequence[str], where: str) -> InputError:
    """The error for a key that does not exist."""
    return InputError(
        f"unknown key {key} in {where}",
        expected="a key of the training configuration",
        remedy=f"The nearest known key is {nearest(key, known)}.",
    )


def convert(value: Any, hint: Any, key: str, where: str) -> Any:
    """A value as YAML gives it, as the type that the field declares."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return convert(value, next(a for a in arguments if a is not type(None)), key, where)
    if origin is Literal:
        if any(type(value) is type(known) and value == known for known in arguments):  # 1 is not true
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(convert(v, k, key, where) for v, k in zip(value, kinds, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif hint is Any or (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    elif hint in (int, float) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 as text; a whole float such as 1e3 is a fine integer.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number == number and (hint is float or number == int(number)):
            return hint(number)
    raise InputError(f"{key} = {value!r} in {where}", expected=describe(hint), remedy="See the preset for an example.")


def describe(hint: Any) -> str:
    """A type as a person would name it."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(a) for a in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint) or str(hint).replace("typing.", "")


def parse_overrides(pairs: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """``["data.window=16", "max_seconds=60"]`` as a nested mapping; values are YAML.

    The section may be left out where only one of the ``known`` keys ends so.
    """
    nested: dict[str, Any] = {}
    for text in pairs:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InputError(f"--set {text}", expected="KEY=VALUE", remedy="For example --set data.window=16.")
        full = [k for k in known if k.rsplit(".", 1)[-1] == key.strip()]
        *sections, name = (full[0] if len(full) == 1 else key.strip()).split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise unknown(key, known, "--set")
        place[name] = parse_yaml(value, f"the value of --set {key.strip()}")
    return nested
