"""Every benchmark runs in the environment that the Makefile makes: `--quick` ends well and prints its JSON object."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "infra" / "bench"
ON_RAY = {"engine", "plan", "ray_chaos"}
ON_GPU = {"unet_gpu", "vae_gpu"}
OF_AN_EARLIER_COMMIT, EARLIER = {"regression_before"}, "3d7d81d"
QUICK = sorted(p.stem for p in BENCH.glob("*.py") if '"--quick"' in p.read_text(encoding="utf-8"))


def test_the_benches_are_found() -> None:
    assert {"store", "vae", "train"} <= set(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_quick_ends_with_a_json_object(name: str, tmp_path: Path) -> None:
    """In a copy, so that results of one machine's quick run do not replace those that are kept."""
    if name in ON_RAY:
        pytest.importorskip("ray")
    if name in ON_GPU and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no GPU here")
    history = str(ROOT / ".git")
    if name in OF_AN_EARLIER_COMMIT:
        looked = subprocess.run(["git", "--git-dir", history, "cat-file", "-e", EARLIER], check=False)
        if looked.returncode:
            pytest.skip(f"no {EARLIER} in this clone")
    for entry in ROOT.iterdir():
        if entry.name != "infra" and not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "infra", tmp_path / "infra")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "infra" / "bench" / f"{name}.py"), "--quick"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "GIT_DIR": history},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)


def test_published_splits_leave_the_kernel_its_margin() -> None:
    """MONAI's class fails where a split of the coarsest rows is shorter than its margin of 3 (4 where it halves)."""
    code = "import vae; print([vae.published_splits(n) for n in (64, 128, 256, 512)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, check=True)
    splits = json.loads(done.stdout)
    assert splits[-1] == 16
    assert all(side // 4 // count >= 4 for side, count in zip((64, 128, 256, 512), splits, strict=True))
