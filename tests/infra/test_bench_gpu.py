"""The GPU benchmark in its CPU mode: every row runs to its end, one that fails or hangs costs no other."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

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
    print(f"{found['cpu_seconds']} s of CPU")
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
    monkeypatch.setattr(gpu, "LEAST_S", 1)
    rows = [gpu.Row(name, "", "", limit) for name, limit in (("hangs", 3), ("crashes", 60), ("ends", 60))]
    assert gpu.measure(rows, 300.0, False, tmp_path) is False
    kept = json.loads((tmp_path / "gpu-test-gpu-80gb.json").read_text())
    assert "ended after its 3 s" in kept["rows"]["hangs"]["why"]
    assert kept["before"] == 1
    assert "no such kernel" in kept["rows"]["crashes"]["why"]
    assert kept["rows"]["ends"]["ok"] is True


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # of this test, not the bench
def test_rows_of_the_cpu_mode_are_ended_by_their_own_limits(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(name: str, *, small: bool, say: Callable[..., None]) -> None:
        say(**{f"{name}_began": 1})
        if name == "hangs":
            time.sleep(1000)
        if name == "crashes":
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "run_row", row)
    monkeypatch.setattr(gpu, "forking", lambda: multiprocessing.get_context("fork"))
    # One after the other: what is forked here from a pool's thread would wait for that thread when it ends.
    monkeypatch.setattr(gpu, "ThreadPoolExecutor", lambda workers: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setitem(sys.modules, "gpu_loaded", cast(ModuleType, SimpleNamespace(CPU_SECONDS=0.0)))
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "write", lambda result, target: kept.append(json.loads(json.dumps(result["rows"]))))
    rows = [gpu.Row("hangs", "", "", 3, 0.01), gpu.Row("crashes", "", "", 2, 0.9), gpu.Row("ends", "", "", 1, 0.9)]
    assert gpu.measure(rows, 300.0, True, tmp_path) is False
    assert [len(rows) for rows in kept] == [1, 2, 3, 3], "the JSON is written after every row"
    assert "ended after its 3 s" in kept[-1]["hangs"]["why"]
    assert "no such kernel" in kept[-1]["crashes"]["why"]
    assert kept[-1]["ends"]["ok"] is True, kept[-1]["ends"]
    assert kept[-1]["ends"]["cpu_seconds"] >= 0


def test_the_peers_come_last_on_a_cpu_too_and_nothing_is_kept(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(gpu, "forking", lambda: None)
    monkeypatch.setattr(gpu, "ThreadPoolExecutor", lambda workers: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(gpu, "write", lambda result, target: pytest.fail("figures of a CPU"))

    def begin(row: Any, limit: float, context: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        begun.append((row.name, limit))
        return {}, {"ok": True, "seconds": 0}

    monkeypatch.setattr(gpu, "in_a_process", begin)
    assert gpu.measure(list(gpu.ROWS), 60.0, True, None)
    assert {name for name, _ in begun} == BARE | {"commands", "peers"}
    assert (begun[0][0], begun[-1][0]) == ("commands", "peers")
    assert all(limit <= 24 for name, limit in begun if name != "commands")


def test_the_peers_come_last_and_correctness_first(gpu: ModuleType) -> None:
    names = [row.name for row in gpu.ROWS]
    assert (names[0], names[-1]) == ("correctness", "peers")
    assert set(names) == BARE | {"commands", "peers"}
