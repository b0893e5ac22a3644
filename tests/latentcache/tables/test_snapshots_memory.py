from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from latentcache.storage import LocalLocation
from latentcache.tables import SCHEMAS, Snapshot, read_table, write_fragment


@pytest.mark.parametrize("chosen", ["", "system"])
def test_a_process_uses_the_pool_that_the_user_chose_else_one_that_lets_go(chosen: str) -> None:
    """In processes of their own: whatever imported Arrow first has settled it here."""
    code = (
        "import latentcache, pyarrow as pa; latentcache.LatentStore; "
        "print(pa.default_memory_pool().backend_name, *pa.supported_memory_backends())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ARROW_DEFAULT_MEMORY_POOL"}
    if chosen:
        environment["ARROW_DEFAULT_MEMORY_POOL"] = chosen
    command = "from cli.main import app; app(['phantom', '--help'], standalone_mode=False); import pipeline.identity; "
    for before in ("", command):
        done = subprocess.run(
            [sys.executable, "-c", before + code], env=environment, capture_output=True, text=True, check=True
        )
        used, *supported = done.stdout.splitlines()[-1].split()
        assert used == (chosen or ("jemalloc" if sys.platform == "linux" else supported[0]))
        assert not done.stderr


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
