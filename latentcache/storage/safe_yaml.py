"""YAML from a user's file or command line, bounded: no objects, no bombs, one kind of error for all that is wrong."""

from __future__ import annotations

from typing import Any

import yaml

from latentcache.errors import InputError

YAML_BYTES = 256 << 10
"""A configuration has about 100 keys; this many bytes take a second to parse."""
MOST_VALUES = 10_000
"""Keys and values, those behind an alias counted wherever it is used."""
DEEPEST = 32
"""Levels of lists and mappings. The parser's work grows with the square of them."""


class _BoundedLoader(yaml.SafeLoader):
    """Stops while it reads, at the value that exceeds a limit."""

    depth = values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.values += 1
        if self.depth > DEEPEST or self.values > MOST_VALUES:
            raise yaml.YAMLError("a limit is exceeded")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_yaml(text: str, what: str) -> Any:
    """Return the value that a YAML text means.

    Aliases are references for the parser, so that ten lines can stand for a billion values (a "billion laughs" bomb).
    They are counted before anything walks through them.

    Args:
        text: Of the file or option.
        what: What to call it in an error, such as ``the configuration file``.

    Raises:
        InputError: No YAML, objects of Python, an alias inside of what it means, or more than the limits.
    """
    if len(text.encode(errors="replace")) > YAML_BYTES:
        raise _refused(f"{what} of more than {YAML_BYTES >> 10} KiB", "a short file of keys and values")
    loader = None
    try:
        loader = _BoundedLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise _refused(f"{what} that stands for more than {MOST_VALUES} values", "a short file of keys and values")
        return loader.construct_document(node)
    except InputError:  # a ValueError too, and said already
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        # A date of the 45th, a number of 5,000 digits or a list for a key come as errors of Python's own.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise _refused(
            f"{what} is no plain YAML ({type(error).__name__}{where})",
            f"texts, numbers, lists and mappings, {DEEPEST} levels and {MOST_VALUES} values at most",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Nodes below and with one, aliases followed. Each node is visited once, whatever its number of aliases."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise yaml.YAMLError("an alias inside of what it stands for")
        return count
    known[id(node)] = None
    count = 1
    if isinstance(node, yaml.MappingNode):
        count += sum(_values(key, known) + _values(value, known) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_values(value, known) for value in node.value)
    known[id(node)] = count
    return count


def _refused(found: str, expected: str) -> InputError:
    return InputError(found, expected=expected, remedy="Check its indentation, its quotes, and where it came from.")
