"""YAML bombs and oddities end in an InputError, within bounds of work and memory that do not depend on the machine."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from diffusion.config import load_config
from latentcache import InputError
from latentcache.storage import YAML_BYTES, parse_yaml


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "a billion laughs": laughs(10),
    "merge keys that multiply": merges(10),
    "an alias of itself": "a: &a [*a]",
    "a mapping that holds itself": "a: &a {b: *a}",
    "nested 20,000 deep": "[" * 20_000 + "]" * 20_000,
    "nested flow mappings": "{a: " * 20_000 + "}" * 20_000,
    "a number of 5,000 digits": "a: " + "9" * 5_000,
    "a day that does not exist": "a: 2024-13-45",
    "a list for a key": "? [a, b]\n: 1",
    "an object": "a: !!python/object/apply:os.system ['true']",
    "a kind of its own": "a: !secret x",
    "two documents": "a: 1\n---\nb: 2",
    "a tab": "\ta: 1",
    "an unknown alias": "a: *b",
    "a control character": "a: \x00",
    "too long": "# x\n" * (YAML_BYTES // 4 + 1) + "a: 1",
    "too many values": "a: [" + "1, " * 11_000 + "1]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_anything_walks_through_it(name: str, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            parse_yaml(BOMBS[name], "the configuration file")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    file = tmp_path / "run.yaml"
    file.write_text(BOMBS[name])
    with pytest.raises(InputError) as error:
        load_config("tiny", file, [])
    assert "the configuration file" in str(error.value)


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [true]", "[", "2024-13-45", "&a [*a]", "[" * 9_000])
def test_a_value_of_set_is_bounded_too(value: str) -> None:
    with pytest.raises(InputError, match=r"the value of --set data\.window"):
        load_config("tiny", None, [f"data.window={value}"])


def test_honest_anchors_and_merge_keys_are_read() -> None:
    text = "base: &b {window: 16, crop: null}\ndata: {<<: *b, crop: 32}\nsame: [*b, *b]\n"
    assert parse_yaml(text, "it") == yaml.safe_load(text)
    assert parse_yaml("", "it") is None


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="ascii")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_what_yaml_writes_is_read_back(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value), "it") == value
