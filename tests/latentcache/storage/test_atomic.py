"""A file is whole or as it was, whatever happens while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentcache.storage import write_text, written_aside


def test_text_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_text(path, "é1")
    write_text(path, "é2")
    assert path.read_text(encoding="utf-8") == "é2"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_an_error_on_the_way_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with written_aside(path) as draft:
            draft.write_bytes(b"ne")
            assert path.read_bytes() == b"old", "nothing shows before the end"
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
