"""verify, gc, stats, diff, migrate and status at the command line: results, exit codes, and what a refusal says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from latentcache import InputError, LatentStore, StoreError
from latentcache.maintenance import pin
from tests.latentcache.maintenance.test_verify import age
from tests.latentcache.test_store import ENCODING, key, latent, series, stage

LUNG = replace(ENCODING, window_center=-600.0, window_width=1500.0)
COMMANDS = ("verify", "gc", "stats", "status", "migrate")


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    """Twelve thin series in two encodings, the last with one latent only in the first."""
    made = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    lung = made.register_encoding(LUNG)
    made.register_encoding(ENCODING)
    made.append_catalog([series(n) for n in range(12)])
    with made.writer() as writer:
        writer.commit([stage(made, n, latent(5, size=2, seed=n)) for n in range(12)])
        writer.commit([stage(made, n, latent(5, size=2, seed=n), encode_key=lung) for n in range(11)])
    return made


def run(*words: object) -> tuple[int, Any]:
    """Exit code and JSON of a command; raises what the command raises."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return int(done.return_value), json.loads(done.stdout)


def text(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)], standalone_mode=False)
    assert done.exception is None
    return done.stdout


def test_verify_passes_a_sound_store_and_fails_a_damaged_one(store: LatentStore) -> None:
    code, found = run("verify", store.url)
    assert (code, found["ok"], found["latents"], found["problems"]) == (0, True, 23, [])
    assert "no problems" in text("verify", store.url)
    row = store.records()[0]
    shard = Path(store.url) / row.path / "c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    code, found = run("verify", store.url, "--threads", "1")
    assert (code, found["ok"]) == (1, False)
    assert {p["subject"] for p in found["problems"]} == {f"{row.key} thin"}
    assert run("verify", store.url, "--snapshot", "0")[0] == 0  # that one names no latent


def test_gc_says_first_and_removes_then(store: LatentStore) -> None:
    orphan = stage(store, 20, latent(5, size=2))
    code, young = run("gc", store.url)
    assert (code, young["attempts"]) == (0, 0)
    pin(store.location, "run", 1)
    age(Path(store.url), 25)
    code, plan = run("gc", store.url, "--dry-run", "--expire-snapshots")
    assert (code, plan["dry_run"], plan["attempts"], plan["snapshots"]) == (0, True, 1, 2)
    assert (Path(store.url) / orphan.path).exists()
    code, done = run("gc", store.url, "--expire-snapshots")
    assert {**done, "dry_run": True} == plan
    assert not (Path(store.url) / orphan.path).exists()
    assert LatentStore.open(store.url, snapshot=1).series() == store.series()  # the pinned run's
    assert "removed 0 objects" in text("gc", store.url)


def test_stats_tells_moments_and_outliers_of_every_encoding(store: LatentStore) -> None:
    with store.writer() as writer:
        writer.commit([stage(store, 12, latent(5, size=2, seed=12) + np.float16(50))])
    code, found = run("stats", store.url, "--sample", "4")
    assert code == 0
    assert [(s["encode_key"], s["latents"], s["sampled"]) for s in found["statistics"]] == sorted(
        [(ENCODING.encode_key, 13, 4), (LUNG.encode_key, 11, 4)]
    )
    (mine,) = run("stats", store.url, "--encode-key", ENCODING.encode_key)[1]["statistics"]
    assert mine["outliers"][0]["key"] == key(12)
    arrays = [store.read(r).astype(np.float64) for r in store.records(ENCODING.encode_key)]
    np.testing.assert_allclose(mine["mean"], np.concatenate(arrays, axis=1).mean((1, 2, 3)), rtol=1e-9)
    assert f"outlier {key(12)}" in text("stats", store.url)
    with pytest.raises(StoreError, match=f"no encoding {'e' * 16}"):
        run("stats", store.url, "--encode-key", "e" * 16)


def test_diff_names_settings_and_what_only_one_has(store: LatentStore) -> None:
    code, found = run("diff", store.url, ENCODING.encode_key, LUNG.encode_key)
    assert code == 0
    assert found["settings"] == {"window_center": [40, -600.0], "window_width": [400, 1500.0]}
    assert (found["only_a"], found["only_b"], found["common"]) == ([[key(11), "thin"]], [], 11)
    assert all(c["identical_bytes"] and c["relative"] == 0 for c in found["compared"])
    assert len(run("diff", store.url, ENCODING.encode_key, LUNG.encode_key, "--sample", "3")[1]["compared"]) == 3
    assert "11 compared, 11 byte for byte the same" in text("diff", store.url, ENCODING.encode_key, LUNG.encode_key)
    with pytest.raises(InputError, match="twice"):
        run("diff", store.url, ENCODING.encode_key, ENCODING.encode_key)


def test_status_counts_and_names_pins_and_what_is_stale(store: LatentStore) -> None:
    pin(store.location, "run-1", 1)
    store.append_catalog([series(0, source_digest="another"), series(12)])
    code, found = run("status", store.url)
    assert code == 0
    assert (found["series"]["total"], found["pinned"]) == (13, {"1": ["run-1"]})
    assert found["encodings"][ENCODING.encode_key]["latents"] == {"thin": 12}
    assert found["encodings"][ENCODING.encode_key]["series_missing"] == 1
    assert found["encodings"][LUNG.encode_key]["series_missing"] == 2
    assert [e["stale"] for e in found["encodings"].values()] == [1, 1]
    said = text("status", store.url)
    assert "pinned: snapshot 1 by run-1" in said
    assert "1 stale" in said
    assert run("status", store.url, "--snapshot", "0")[1]["series"]["total"] == 0


def test_migrate_leaves_a_current_store_alone(store: LatentStore) -> None:
    assert run("migrate", store.url) == (0, {"from": 2, "to": 2, "fragments": 0})
    assert "already at format version 2" in text("migrate", store.url)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_without_a_store_is_refused(tmp_path: Path, command: str) -> None:
    with pytest.raises(StoreError) as caught:
        run(command, tmp_path / "nothing")
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("command", ["verify", "gc", "stats", "status"])
def test_a_newer_store_is_refused(store: LatentStore, command: str) -> None:
    header = Path(store.url) / "store.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format_version": 99}))
    with pytest.raises(StoreError, match="newer"):
        run(command, store.url)


def test_exit_codes_reach_the_shell(store: LatentStore) -> None:
    def shell(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "cli.main", *words], capture_output=True, text=True, check=False)

    missing = shell("gc", store.url + "-not")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: there is no store")
    assert "Traceback" not in missing.stderr
    assert shell("verify", store.url, "--threads", "0").returncode == 2
