"""The cost model: the slowest resource sets the pace, and a store's own timings predict what it would cost again."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from typer.testing import CliRunner

from cli.main import app
from latentcache import InputError
from latentcache.tables import timings_table
from pipeline.engines import SOURCES, Rates, cost, measured, override
from pipeline.engines.cost_model import VOXELS

NAMES = [field.name for field in fields(Rates)]


def test_the_slowest_resource_binds_and_sets_the_time() -> None:
    rates = Rates(encode_gpu_s=2.0, latents_per_series=2.0)
    found = cost(1e6, 8, rates, cores=64)
    assert found.binds == "GPU (encoding)"
    assert found.hours == pytest.approx(1e6 * 4.0 / 8 / 3600)
    assert found.gpu_hours == pytest.approx(8 * found.hours)
    assert found.idle["GPU (encoding)"] == 0
    assert cost(1e6, 8, replace(rates, network_mb_s=10.0), cores=64).binds == "network"
    assert cost(1e6, 8, replace(rates, commit_s=9.0), cores=64).binds == "commit"
    assert cost(1e6, 8, replace(rates, storage_read_mb_s=8.0), cores=64).binds == "storage (reading the archive)"
    assert cost(1e6, 8, replace(rates, storage_write_mb_s=3.0), cores=64).binds == "storage (writing latents)"
    assert cost(1e6, 8, rates, cores=1).binds == "CPU (decoding)"
    assert cost(1e6, 0, rates, cores=4).binds == "CPU (decoding and encoding)"


def test_fewer_workers_than_cores_encode_while_the_others_read() -> None:
    rates = Rates(encode_core_s=9.0, latents_per_series=1.0, decode_core_s=1.0)
    assert cost(100, 0, rates, cores=2, workers=1).hours * 3600 == pytest.approx(900.0)
    assert cost(100, 0, rates, cores=2, workers=2).hours * 3600 == pytest.approx(500.0)
    assert cost(100, 0, rates, workers=2).hours == cost(100, 0, rates, cores=2).hours
    slow_reading = replace(rates, decode_core_s=30.0)
    assert cost(100, 0, slow_reading, cores=2, workers=1).binds == "CPU (decoding and encoding)"


def test_storage_is_bytes_a_latent_times_latents() -> None:
    found = cost(1000, 1, Rates(latent_mb=4 * 75 * 128 * 128 * 2 / 1e6, latents_per_series=1))
    assert found.store_tb == pytest.approx(1000 * 9_830_400 / 1e12)


@given(name=st.sampled_from(NAMES), factor=st.floats(1.01, 100.0), gpus=st.integers(0, 64))
def test_a_faster_resource_never_makes_a_job_slower(name: str, factor: float, gpus: int) -> None:
    rates = Rates()
    sizes = {"source_mb", "latent_mb", "latents_per_series", "gpus_per_node"}
    costly = name in sizes or name in {"decode_core_s", "encode_gpu_s", "encode_core_s", "commit_s"}
    better = replace(rates, **{name: getattr(rates, name) / factor if costly else getattr(rates, name) * factor})
    cores = None if gpus else 8
    assert cost(1e4, gpus, better, cores).hours <= cost(1e4, gpus, rates, cores).hours * (1 + 1e-12)


def item(device: str, voxels: float, prepare: float, run: float, outcome: str = "ok") -> dict[str, object]:
    sizes = {"voxels": voxels, "latents": 2, "latent_bytes": voxels / 8}
    return {
        "key": "a",
        "stage": "encode",
        "outcome": outcome,
        "device": device,
        "prepare": prepare,
        "run": run,
        **sizes,
    }


def test_rates_come_from_a_stores_own_timings() -> None:
    """Seconds a voxel by the median, so that the slow third one does not count; voxels by the mean, which it does."""
    items = [item("cuda", 1e6, 0.1, 0.8), item("cuda", 2e6, 0.2, 1.6), item("cuda", 3e6, 50.0, 900.0)]
    failed = item("cuda", 1e6, 99.0, 99.0, "Timeout")
    found, told = measured(timings_table([*items, failed]), Rates())
    assert found.decode_core_s == pytest.approx(1e-7 * 2e6)
    assert found.encode_gpu_s * found.latents_per_series == pytest.approx(8e-7 * 2e6)
    assert (found.latents_per_series, found.latent_mb) == (2.0, pytest.approx(2e6 / 8 / 2 / 1e6))
    assert found.encode_core_s == Rates().encode_core_s
    assert "encode_gpu_s" in told
    assert "encode_core_s" not in told


def test_a_store_predicts_more_of_its_own_kind() -> None:
    """The items of a job of which one worker took a minute take two workers a minute for twice as many."""
    items = [item("cpu", voxels, voxels * 1e-6, voxels * 5e-6) for voxels in (2e6, 3e6, 5e6)]
    found, _ = measured(timings_table(items), Rates())
    assert cost(3, 0, found, cores=1).hours * 3600 == pytest.approx(60.0)
    assert cost(6, 0, found, cores=2).hours * 3600 == pytest.approx(60.0)


def test_a_store_without_timings_is_refused() -> None:
    with pytest.raises(InputError, match="without timings"):
        measured(timings_table([item("cpu", 0, 1.0, 1.0)]), Rates())


def test_shipped_rates_say_where_they_come_from_and_are_what_was_measured(repo_root: Path) -> None:
    assert set(SOURCES) == set(NAMES)
    assert all(text.startswith(("measured: ", "assumed: ", "from the shape: ")) for text in SOURCES.values())
    results = repo_root / "infra" / "bench" / "results"
    ingest = json.loads((results / "ingest-x86_64-2cpu.json").read_text())
    decode = ingest["seconds"]["jpll/ctpipe, one thread"] / ingest["slices"] * 300
    assert Rates().decode_core_s == pytest.approx(decode, rel=0.25)
    engine = json.loads((results / "engine-cpu.json").read_text())
    assert Rates().commit_s == pytest.approx(1 / engine["million_per_s"], rel=0.5)
    (largest,) = [r for r in json.loads((results / "vae-cpu.json").read_text())["slope_rows"] if r["depth"] == 64]
    assert largest["threads"] == 1
    depth, rows, columns = map(int, largest["shape"].split("x"))
    encode = largest["seconds"] / (depth * rows * columns) * VOXELS
    assert Rates().encode_core_s == pytest.approx(encode, rel=0.25)
    gpu = json.loads((results / "gpu-h100-first.json").read_text())
    assert "H100" in gpu["device"]
    assert Rates().encode_gpu_s == pytest.approx(gpu["encode_s"], rel=0.01)
    assert SOURCES["encode_gpu_s"].startswith("measured: infra/bench/gpu.py")
    for page in ("README.md", "infra/docs/how-to/measure-on-a-gpu.md"):
        text = " ".join((repo_root / page).read_text().split())
        assert f"{gpu['encode_s']} s a thin series" in text, page
    for key in ("decode_s", "step_64_s", "step_64_batch2_s", "step_64_compiled_s", "step_128_s", "step_128_batch2_s"):
        assert f"{gpu[key]:g}" in text, key


@pytest.mark.parametrize("given_rates", [{"warp": "9"}, {"commit_s": "fast"}, {"commit_s": "0"}, {"commit_s": "nan"}])
def test_bad_rates_are_named(given_rates: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(given_rates))):
        override(Rates(), given_rates)


def test_bad_jobs_are_refused() -> None:
    for series, gpus, cores in ((0, 1, None), (1, 0, None), (float("nan"), 1, None)):
        with pytest.raises(InputError, match="at least one"):
            cost(series, gpus, Rates(), cores)


def test_the_command_prints_what_binds() -> None:
    done = CliRunner().invoke(app, ["plan", "--series", "1e6", "--gpus", "8", "--rate", "encode_gpu_s=1000"])
    assert done.exit_code == 0
    assert "GPU (encoding) binds" in done.stdout
    done = CliRunner().invoke(app, ["plan", "--series", "1e6", "--gpus", "8", "--json"])
    found = json.loads(done.stdout)
    assert found["hours"] > 0
    assert set(found["rates"]) == set(found["sources"]) == set(NAMES)
