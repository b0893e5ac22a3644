from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from latentcache.storage import LocalLocation
from latentcache.tables import SCHEMAS, Snapshot, read_table, write_fragment
from latentcache.tables.snapshots import arrow_memory_pool


def test_the_programs_own_choice_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARROW_DEFAULT_MEMORY_POOL", raising=False)
    before = pa.default_memory_pool().backend_name
    with arrow_memory_pool():
        assert pa.default_memory_pool().backend_name in ("jemalloc", before)
    assert pa.default_memory_pool().backend_name == before
    with pytest.raises(ValueError, match="broken"), arrow_memory_pool():
        raise ValueError("broken")
    assert pa.default_memory_pool().backend_name == before


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")
    before = pa.default_memory_pool().backend_name
    with arrow_memory_pool():
        assert pa.default_memory_pool().backend_name == before


def test_a_fragments_bytes_are_arrows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's would be let go of by a thread of Arrow's, perhaps after the interpreter has gone: an abort."""
    location = LocalLocation(tmp_path)
    row: dict[str, object] = {
        f.name: [] if pa.types.is_list(f.type) else "" if f.type == pa.string() else 0 for f in SCHEMAS["pairs"]
    }
    fragment = write_fragment(location, "pairs", pa.Table.from_pylist([row], schema=SCHEMAS["pairs"]))
    given: list[pa.Buffer] = []
    wrapped = pa.BufferReader

    def reader(buffer: pa.Buffer) -> pa.BufferReader:
        given.append(buffer)
        return wrapped(buffer)

    monkeypatch.setattr(pa, "BufferReader", reader)
    fragments = {**Snapshot(0).fragments, "pairs": (fragment,)}
    assert read_table(location, Snapshot(1, fragments), "pairs").num_rows == 1
    assert isinstance(given[0], pa.Buffer)
    assert given[0].size == fragment.size
    assert given[0].is_mutable, "allocated by Arrow: what wraps bytes is not"
