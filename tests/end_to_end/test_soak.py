"""Small studies through ingest, encode, interpolate and send while everything fails now and then: each exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.soak import SECRET, soak


@pytest.mark.slow
def test_every_study_comes_through_exactly_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are killed by what they have done: no figure depends on how busy the machine is."""
    monkeypatch.setenv("CTPIPE_SECRET", SECRET)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "")
    found = soak(tmp_path, 20, seconds=7200.0, kill_every=(1, 20))
    assert found.problems == []
    assert found.done == 20
    assert found.kills > 1
    assert found.figures
