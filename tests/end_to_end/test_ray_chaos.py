"""A Ray cluster whose workers, node and driver are killed still puts every series into the manifest once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_series_once_whatever_dies(repo_root: Path) -> None:
    script = repo_root / "infra" / "bench" / "ray_chaos.py"
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["rows"], found["lost"], found["twice"]) == (found["series"], 0, 0)
    assert found["drivers"] == 2
    # Something was really killed: some series were begun more than once.
    assert found["attempts"] > found["series"]
