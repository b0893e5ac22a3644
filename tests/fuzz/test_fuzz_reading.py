"""Half an hour of fuzzing the readers, for `make test-all`; the pull request gate runs the same script for a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_reading.py")


@pytest.mark.slow
def test_half_an_hour_of_damaged_archives_ends_in_volumes_or_input_errors(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    record = tmp_path / "record.json"
    command = [sys.executable, str(SCRIPT), "--seconds", "1800", "--record", str(record)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    sums = json.loads(record.read_text())["all"]
    assert sums["findings"] == 0
    assert sums["executions"] > 10_000
