"""The cost model: the slowest resource sets the pace, and a store's own timings predict what it would cost again."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.main import app
from latentcache.errors import InputError
from latentcache.schema import timings_table
from pipeline.plan_cost import VOXELS, Rates, cost, measured, override

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


def test_rates_come_from_a_stores_own_timings() -> None:
    voxels = VOXELS // 100
    rows = [
        {"key": "a", "stage": "encode", "outcome": "ok", "device": "cuda", "prepare": p, "vae": v, "latents": 2}
        for p, v in ((0.01, 0.08), (0.02, 0.06), (0.5, 9.0))
    ]
    rows.append({"key": "b", "stage": "encode", "outcome": "Timeout", "device": "cuda", "prepare": 99.0, "vae": 99.0})
    manifest = pa.table({"key": ["a"], "valid_zyx": [[3, 512, 512]]})
    found = measured(timings_table(rows), manifest, Rates())
    assert voxels == 3 * 512 * 512
    assert found.decode_core_s == pytest.approx(2.0)
    assert found.encode_gpu_s == pytest.approx(4.0)
    assert found.encode_core_s == Rates().encode_core_s
    with pytest.raises(InputError, match="without timings"):
        measured(timings_table([]), manifest, Rates())


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
    assert set(found["rates"]) == set(NAMES)
