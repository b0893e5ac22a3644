from __future__ import annotations

from unittest import mock

import numpy as np
import pyarrow as pa
from hypothesis import given, strategies as st

from latentcache.tables import key_codes as codes, positions
from latentcache.tables.key_codes import mixed, packed, surely_distinct

hexes = st.text("0123456789abcdef", min_size=16, max_size=16)
texts = st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), max_size=20)


def column(values: list[str], cut: int) -> pa.ChunkedArray:
    cut = min(cut, len(values))
    return pa.chunked_array([values[:cut], values[cut:]], pa.string())


@given(st.lists(hexes, max_size=30) | st.lists(texts, max_size=30), st.integers(0, 30))
def test_equal_texts_and_only_they_have_equal_words(values: list[str], cut: int) -> None:
    words = packed(column(values, cut))
    assert len(words) == len(values)
    for i, one in enumerate(values):
        for j, other in enumerate(values):
            assert np.array_equal(words[i], words[j]) == (one == other)


@given(st.lists(hexes | st.sampled_from(["a" * 16, "b"]), max_size=20), st.data())
def test_positions_are_those_of_a_search(held: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(hexes | st.sampled_from(held or [""]), max_size=20))
    expected = [held.index(key) if key in held else -1 for key in wanted]
    assert positions(column(wanted, 3), column(held, 5)).tolist() == expected


def test_positions_survive_hashes_that_meet() -> None:
    held, wanted = [f"{v:016x}" for v in range(50)], [f"{v:016x}" for v in range(25, 75)]
    with mock.patch.object(codes, "mixed", side_effect=lambda words: np.zeros(len(words), np.uint64)):
        found = positions(column(wanted, 10), column(held, 10))
        assert not surely_distinct(pa.table({"key": held}), ("key",))
    assert found.tolist() == [*range(25, 50), *[-1] * 25]


def test_rows_are_distinct_in_all_columns_together() -> None:
    table = pa.table({"key": ["a" * 16, "a" * 16, "b" * 16], "role": ["thin", "thick", "thin"]})
    assert surely_distinct(table, ("key", "role"))
    assert not surely_distinct(table, ("key",))
    assert not surely_distinct(table, ("role",))
    swapped = pa.table({"one": ["a" * 16, "b" * 16], "other": ["b" * 16, "a" * 16]})
    assert surely_distinct(swapped, ("one", "other"))


def test_a_slice_of_a_column_is_read_where_it_lies() -> None:
    keys = pa.array(["odd", *(f"{v:016x}" for v in range(9))]).slice(1)
    assert np.array_equal(packed(pa.chunked_array([keys])), packed(pa.chunked_array([[*keys.to_pylist()]])))
    assert len(set(mixed(packed(pa.chunked_array([keys]))).tolist())) == 9
