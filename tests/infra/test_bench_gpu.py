"""The GPU benchmark in its CPU mode: every row runs to its end, one that fails or hangs costs no other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "infra" / "bench"
BARE = {"correctness", "vae", "unet_64", "unet_128", "vae_before", "unet_64_before", "epoch", "compiled", "profile"}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", BENCH / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--cpu", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    loaded: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return loaded


@pytest.mark.slow
def test_every_row_runs_at_a_small_size() -> None:
    """With time enough for a busy machine; on two idle cores it takes under a minute."""
    found = run("--seconds", "1500")
    assert all(row["ok"] for row in found["rows"].values()), found["rows"]
    assert found["end_to_end_ok"] is True
    expected = {"encode_s", "decode_s", "encode_fraction", "decode_fraction", "step_64_s", "mfu_64", "mfu_64_of_989",
                "step_128_s", "mfu_128", "compile_s", "epoch_s", "encode_before_s", "step_64_before_s",
                "cached_vs_inloop", "profile_encode", "monai_32_encode_s"}  # fmt: skip
    assert expected <= found.keys()
    assert [
        name for name in found if name.startswith("check_") and not name.endswith("_s") and found[name] != "ok"
    ] == []


def test_the_rows_of_a_step_say_what_others_rely_on() -> None:
    found = run("--rows", "unet_64,unet_128", "--seconds", "600")
    assert found["rows"].keys() == {"unet_64", "unet_128"}
    assert found["step_64_s"] > 0
    assert found["mfu_64"] > 0
    assert found["mfu_64_of_989"] == pytest.approx(found["step_64_tflops"] / 989, rel=1e-2)
    assert found["step_128_epoch_s"] == pytest.approx(267 * found["step_128_s"], rel=0.01)


def test_a_row_that_hangs_or_crashes_costs_no_other(gpu: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "gpu.py").write_text(
        "import sys, time\n"
        "print('GPU-ROW {\"before\": 1}', flush=True)\n"
        "name = sys.argv[2]\n"
        "if name == 'hangs': time.sleep(1000)\n"
        "if name == 'crashes': raise RuntimeError('no such kernel')\n"
    )
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "machine", lambda small: {"device": "Test GPU 80GB"})
    rows = [gpu.Row(name, "", "", limit) for name, limit in (("hangs", 12), ("crashes", 60), ("ends", 60))]
    assert gpu.measure(rows, 300.0, False, tmp_path) is False
    kept = json.loads((tmp_path / "gpu-test-gpu-80gb.json").read_text())
    assert "ended after its 12 s" in kept["rows"]["hangs"]["why"]
    assert kept["before"] == 1
    assert "no such kernel" in kept["rows"]["crashes"]["why"]
    assert kept["rows"]["ends"]["ok"] is True


def test_the_peers_come_last_and_correctness_first(gpu: ModuleType) -> None:
    names = [row.name for row in gpu.ROWS]
    assert (names[0], names[-1]) == ("correctness", "peers")
    assert set(names) == BARE | {"commands", "peers"}
