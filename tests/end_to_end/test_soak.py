"""Small studies through ingest, encode, interpolate and send while everything fails now and then: each exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.soak import SECRET, soak


@pytest.mark.slow
def test_every_study_comes_through_exactly_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits into the time is begun, and all that was begun is finished: no figure depends on the machine."""
    monkeypatch.setenv("CTPIPE_SECRET", SECRET)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "")
    found = soak(tmp_path, 30, seconds=120.0, kill_every=(1, 40))
    assert found.problems == []
    assert found.done >= 10
    assert found.kills
    assert found.figures
