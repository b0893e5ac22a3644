"""What arithmetic made a latent stands in its encode key and its row, and is never mixed in one run by oversight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cli.main import app
from diffusion.config import DataConfig
from diffusion.data import key_of, make_store
from diffusion.data.pairs import Tables
from diffusion.data.synthetic_store import ENCODING
from latentcache import Encoding, InputError, LatentMeta, LatentRecord, LatentStore, StoreError
from latentcache.maintenance import migrate, verify
from latentcache.storage import LocalLocation
from pipeline.encode import EncodeSettings, encode_store
from pipeline.encode.store import encoding_of, load_encoder, set_up
from pipeline.engines import EngineOptions
from tests.support.hospital import thick, thin, write_zip


def test_a_key_of_float32_on_a_cpu_is_what_it_was_before_the_arithmetic_stood_in_it() -> None:
    assert Encoding("0" * 64, {}, 40.0, 400.0).encode_key == "c4b8a26e8d00956b"
    assert "compute_dtype" not in ENCODING.to_json()


def test_dtype_and_kind_of_device_change_the_key_and_come_back() -> None:
    kinds = [
        replace(ENCODING, compute_dtype=dtype, device_kind=kind)
        for dtype in ("float32", "bfloat16")
        for kind in ("cpu", "cuda")
    ]
    assert len({encoding.encode_key for encoding in kinds}) == 4
    for encoding in kinds:
        assert Encoding.from_json(encoding.to_json()) == encoding


def test_the_driver_names_the_arithmetic_of_its_workers() -> None:
    vae = load_encoder("cpu", EncodeSettings())
    named = {
        (precision, device): encoding_of(vae, EncodeSettings(precision=precision), device)
        for precision in ("auto", "fp32", "bf16")
        for device in ("cpu", "cuda")
    }
    assert [(e.compute_dtype, e.device_kind) for e in named.values()] == [
        ("float32", "cpu"), ("bfloat16", "cuda"), ("float32", "cpu"), ("float32", "cuda"), ("bfloat16", "cpu"),
        ("bfloat16", "cuda"),
    ]  # fmt: skip
    assert named["auto", "cpu"].encode_key == named["fp32", "cpu"].encode_key


def test_no_gpu_where_one_is_asked_for_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device in this process"):
        load_encoder("cuda:0", EncodeSettings(vae="/no/such/weights"))


def test_a_worker_on_another_kind_of_device_is_refused_before_it_encodes(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "s", secret_fingerprint="f" * 16)
    settings = EncodeSettings()
    of_gpus = encoding_of(load_encoder("cpu", settings), settings, "cuda")
    store.register_encoding(of_gpus)
    with pytest.raises(InputError, match=r"\(float32 on cpu\).*nodes of one kind in the pool"):
        set_up("cpu", store_url=store.url, fingerprint="f" * 16, encode_key=of_gpus.encode_key, settings=settings)


def test_dtype_chooses_what_is_computed_and_every_row_says_it(tmp_path: Path) -> None:
    write_zip(tmp_path / "zips" / "p.zip", [thick(), thin()])
    app(["ingest", str(tmp_path / "zips"), str(tmp_path / "s"), "--json"], standalone_mode=False)
    keys = {}
    for precision in ("fp32", "bf16"):
        settings = EncodeSettings(precision=precision, roles=("thin",))
        keys[precision] = encode_store(str(tmp_path / "s"), settings, EngineOptions(name="inline")).encode_key
    store = LatentStore.open(tmp_path / "s")
    rows = {record.encode_key: record for record in store.records()}
    assert [(rows[k].compute_dtype, rows[k].device_kind) for k in keys.values()] == [
        ("float32", "cpu"), ("bfloat16", "cpu"),
    ]  # fmt: skip
    exact, half = (torch.from_numpy(store.read(rows[k])).double() for k in keys.values())
    assert 1e-4 < float((exact - half).norm() / exact.norm()) < 5e-2, "bf16 was really computed in"
    assert verify(store).ok


def test_latents_of_different_arithmetic_are_not_mixed_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pool of two kinds of nodes once filled a store: one key, one of the latents from a GPU."""
    real = LatentStore.stage

    def stage(self: LatentStore, array: Any, meta: LatentMeta) -> LatentRecord:
        record = real(self, array, meta)
        on_gpu = meta.key == key_of(3, 1)
        return replace(record, compute_dtype="bfloat16", device_kind="cuda") if on_gpu else record

    monkeypatch.setattr(LatentStore, "stage", stage)
    store = make_store(tmp_path / "s", side=8)
    assert store.find(key_of(3, 1), "thin").device_kind == "cuda"  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"1 in bfloat16 on cuda, 7 in float32 on cpu.*data\.mixed_numerics=true"):
        Tables.read(store, ENCODING.encode_key, DataConfig())
    tables = Tables.read(store, ENCODING.encode_key, DataConfig(mixed_numerics=True))
    assert len(tables.latents) == 8


def age_to_1(root: Path) -> None:
    """Make a store one of format version 1: no arithmetic in the manifest."""
    for path in (root / "snapshots").iterdir():
        body = json.loads(path.read_bytes())
        path.write_text(json.dumps(body | {"format_version": 1}))
    header = json.loads((root / "store.json").read_bytes())
    (root / "store.json").write_text(json.dumps(header | {"format_version": 1}))
    for path in (root / "manifest").glob("*.parquet"):
        table = pq.read_table(path).drop_columns(["compute_dtype", "device_kind"])
        pq.write_table(table.replace_schema_metadata({"ctpipe.format_version": "1"}), path)


def test_a_store_of_version_1_learns_from_its_timings_what_a_gpu_made(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", side=8)
    encode_key = ENCODING.encode_key
    timings = [
        {"key": key_of(7, 0), "encode_key": encode_key, "device": "cuda"},
        {"key": key_of(7, 1), "encode_key": encode_key, "device": "cpu"},
        {"key": key_of(7, 2), "encode_key": encode_key, "device": "cuda"},
        {"key": key_of(7, 2), "encode_key": encode_key, "device": "cpu"},
    ]
    with store.writer() as writer:
        writer.commit([], timings=timings)
    age_to_1(tmp_path / "s")
    with pytest.raises(StoreError, match="migrate"):
        LatentStore.open(tmp_path / "s")
    assert migrate(LocalLocation(tmp_path / "s"))[0] == 1
    after = LatentStore.open(tmp_path / "s")
    found = {(r.key, r.role): (r.compute_dtype, r.device_kind) for r in after.records()}
    for key, role in ((key_of(3, 0), "thin"), (key_of(4, 0), "thick"), (key_of(7, 0), "thick_on_thin")):
        assert found[key, role] == ("bfloat16", "cuda"), "a pair's task made the latents of its series too"
    assert found[key_of(3, 1), "thin"] == found[key_of(3, 3), "thin"] == ("float32", "cpu")
    assert found[key_of(3, 2), "thin"] == ("unknown", "unknown"), "both kinds have worked at it"
    assert after.encode_keys() == [encode_key]
    assert verify(after).ok
