"""Exit codes and messages of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def ctpipe(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cli.main", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [("ingest",), ("encode", "STORE", "--no-such-option"), ("no-such-command",)])
def test_a_usage_error_exits_2_without_a_traceback(words: tuple[str, ...]) -> None:
    done = ctpipe(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


def test_a_users_error_exits_1_with_its_remedy(tmp_path: Path) -> None:
    done = ctpipe("status", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "there is no store" in done.stderr
