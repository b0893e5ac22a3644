"""Export and import: the same store comes back, whatever the codec, the kill or the damage on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from latentcache import CorruptLatentError, InputError, LatentStore, PairRecord, SeriesRecord, StoreError
from latentcache.exchange import CODECS, export_zarr, import_zarr
from latentcache.maintenance import verify
from tests.latentcache.test_store import ENCODING, key, latent, series, stage

DEPTHS = (5, 3, 40)
pytestmark = pytest.mark.filterwarnings("ignore:.*Zarr (format|version) 3 specification")


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    made = LatentStore.create(tmp_path / "store", secret_fingerprint="f", split_seed=3)
    made.register_encoding(ENCODING)
    pair = PairRecord(
        pair_key=key(50),
        study_key=key(1000),
        patient_key=key(2000),
        category="APE",
        thick_key=key(1),
        thin_key=key(0),
        overlap_mm=(0.0, 27.0),
        split="train",
        evidence='{"score": 1.0}',
    )
    made.append_catalog([series(0), series(1), series(2, "val")], [pair])
    with made.writer() as writer:
        rows = [stage(made, n, latent(d, seed=n)) for n, d in enumerate(DEPTHS)]
        writer.commit([*rows, stage(made, 50, latent(5, seed=9), role="thick_on_thin")])
    return made


def facts(store: LatentStore) -> tuple[object, ...]:
    latents = [replace(r, path="") for r in sorted(store.records(), key=lambda r: (r.key, r.role))]
    return latents, store.series(), store.pairs(), store.encode_keys(), store.secret_fingerprint, store.split_seed


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_comes_back_byte_for_byte(store: LatentStore, tmp_path: Path, codec: str) -> None:
    if codec == "pcodec":
        pytest.importorskip("pcodec")
    out = tmp_path / "out.zarr"
    seen: list[tuple[int, int]] = []
    done = export_zarr(store, out, codec=codec, on_latent=lambda n, total: seen.append((n, total)))
    assert (done.latents, done.series, done.pairs, seen[-1]) == (4, 3, 1, (4, 4))
    imported = import_zarr(out, tmp_path / "back")
    assert asdict(imported) == {"latents": 4, "kept": 0, "series": 3, "pairs": 1}
    back = LatentStore.open(tmp_path / "back")
    assert facts(back) == facts(store)
    assert verify(back).problems == []
    assert asdict(import_zarr(out, tmp_path / "back")) == {"latents": 0, "kept": 4, "series": 0, "pairs": 0}


def test_an_export_is_plain_zarr_with_positions_and_affine(store: LatentStore, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    export_zarr(store, out)
    root = zarr.open_group(out, mode="r", use_consolidated=True)
    assert root.metadata.consolidated_metadata is not None
    array = root[f"latents/{ENCODING.encode_key}/thin/{key(2)}"]
    np.testing.assert_array_equal(array[:, 30:], latent(40, seed=2)[:, 30:])
    row = store.find(key(2), "thin")
    assert row is not None
    assert (array.attrs["z0_mm"], array.attrs["dz_mm"], array.attrs["valid_zyx"]) == (1.5, 4.0, list(row.valid_zyx))
    assert array.attrs["affine_lps"] == list(series(2).affine_lps)
    assert root[f"latents/{ENCODING.encode_key}/thick_on_thin/{key(50)}"].attrs["affine_lps"]
    assert json.loads(root.attrs["encodings"][ENCODING.encode_key])["window_width"] == 400


def test_only_columns_of_the_tables_leave(store: LatentStore, tmp_path: Path) -> None:
    """Rows hold no patient data (their own tests say so); nothing else may be written beside them."""
    (Path(store.url) / "private").mkdir()
    (Path(store.url) / "private" / "identities.json").write_text("DOE^JANE 19700101")
    out = tmp_path / "out.zarr"
    export_zarr(store, out, codec="none")
    root = zarr.open_group(out, mode="r")
    assert set(root[f"series/{key(0)}"].attrs) == {f.name for f in fields(SeriesRecord)}
    assert set(root[f"pairs/{key(50)}"].attrs) == {f.name for f in fields(PairRecord)}
    for path in out.rglob("*"):
        assert re.fullmatch(r"zarr\.json|c|\d+|series|pairs|latents|thin|thick_on_thin|[0-9a-f]{16}", path.name)
        assert path.is_dir() or b"DOE" not in path.read_bytes()


def test_one_encoding_alone(store: LatentStore, tmp_path: Path) -> None:
    other = replace(ENCODING, window_width=2000)
    store.register_encoding(other)
    with store.writer() as writer:
        writer.commit([stage(store, 0, latent(6), encode_key=other.encode_key)])
    assert export_zarr(store, tmp_path / "one.zarr", encode_key=other.encode_key).latents == 1
    import_zarr(tmp_path / "one.zarr", tmp_path / "back")
    assert LatentStore.open(tmp_path / "back").encode_keys() == [other.encode_key]
    with pytest.raises(StoreError, match="no encoding"):
        export_zarr(store, tmp_path / "none.zarr", encode_key="a" * 16)


def test_what_is_taken_or_damaged_leaves_no_export(store: LatentStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--codec lzma"):
        export_zarr(store, tmp_path / "x.zarr", codec="lzma")
    row = store.find(key(1), "thin")
    assert row is not None
    shard = next((Path(store.url) / row.path).glob("c.*"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(CorruptLatentError, match=key(1)):
        export_zarr(store, tmp_path / "x.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    (tmp_path / "x.zarr").mkdir()
    with pytest.raises(InputError, match="exists"):
        export_zarr(store, tmp_path / "x.zarr")


@pytest.mark.parametrize("damage", ["flip", "swap", "lose", "position"])
def test_damage_on_the_way_is_found_before_it_is_committed(store: LatentStore, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out.zarr"
    export_zarr(store, out, codec="none")
    thin = out / "latents" / ENCODING.encode_key / "thin"
    chunk = next(p for p in (thin / key(0)).rglob("*") if p.is_file() and p.name != "zarr.json")
    if damage == "flip":
        data = bytearray(chunk.read_bytes())
        data[10] ^= 1
        chunk.write_bytes(data)
    elif damage == "swap":  # valid by every checksum of Zarr's own
        export_zarr(_other(tmp_path, latent(5, seed=1)), tmp_path / "other.zarr", codec="none")
        shutil.copy(tmp_path / "other.zarr" / chunk.relative_to(out), chunk)
    elif damage == "lose":  # Zarr reads zeros
        chunk.unlink()
    else:
        text = (out / "zarr.json").read_text()
        (out / "zarr.json").write_text(text.replace('"z0_mm": 1.5', '"z0_mm": null'))
    with pytest.raises(
        InputError, match="without its position" if damage == "position" else f"{key(0)} thin: (values|cannot)"
    ):
        import_zarr(out, tmp_path / "back")
    assert LatentStore.open(tmp_path / "back").records() == []


def _other(tmp_path: Path, array: np.ndarray) -> LatentStore:
    made = LatentStore.create(tmp_path / "other", secret_fingerprint="f", split_seed=3)
    made.register_encoding(ENCODING)
    with made.writer() as writer:
        writer.commit([stage(made, 0, array)])
    return made


def test_only_a_matching_store_takes_an_export(store: LatentStore, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    export_zarr(store, out)
    LatentStore.create(tmp_path / "foreign", secret_fingerprint="g", split_seed=3)
    with pytest.raises(StoreError, match="secret fingerprint g"):
        import_zarr(out, tmp_path / "foreign")
    changed = LatentStore.create(tmp_path / "changed", secret_fingerprint="f", split_seed=3)
    changed.append_catalog([series(0, source_digest="another")])
    with pytest.raises(StoreError, match=f"{key(0)} differs .* source_digest"):
        import_zarr(out, tmp_path / "changed")
    moved = LatentStore.create(tmp_path / "moved", secret_fingerprint="f", split_seed=3)
    moved.append_catalog([series(77, "test", patient_key=key(2002))])
    with pytest.raises(StoreError, match=f"{key(2002)} is in split test here and val"):
        import_zarr(out, tmp_path / "moved")
    part = LatentStore.create(tmp_path / "part", secret_fingerprint="f", split_seed=3)
    part.append_catalog([series(0), series(99)])
    assert asdict(import_zarr(out, tmp_path / "part")) == {"latents": 4, "kept": 0, "series": 2, "pairs": 1}
    assert len(part.records()) == 0  # a reader does not move
    part.refresh()
    assert len(part.series()) == 4


def test_what_is_no_export_is_refused(store: LatentStore, tmp_path: Path) -> None:
    for text in (None, "{", "[]", '{"zarr_format": 3, "node_type": "group", "attributes": {}}'):
        source = tmp_path / f"source-{hash(text)}"
        source.mkdir()
        if text is not None:
            (source / "zarr.json").write_text(text)
        with pytest.raises(InputError, match="ctpipe export"):
            import_zarr(source, tmp_path / "back")
    out = tmp_path / "out.zarr"
    export_zarr(store, out)
    whole = (out / "zarr.json").read_text()
    for name, other in (('"ctpipe_export": 1', '"ctpipe_export": 2'), ('"series_key"', '"patient_name"')):
        assert name in whole
        (out / "zarr.json").write_text(whole.replace(name, other))
        with pytest.raises(InputError, match="ctpipe export"):
            import_zarr(out, tmp_path / "back2")
    assert not LatentStore.exists(tmp_path / "back")


def test_without_pcodec_the_error_names_the_extra(
    store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pcodec")
    export_zarr(store, tmp_path / "cold.zarr", codec="pcodec")
    monkeypatch.setitem(sys.modules, "pcodec", None)
    with pytest.raises(InputError, match=r"ctpipe\[pcodec\]"):
        import_zarr(tmp_path / "cold.zarr", tmp_path / "back")
    with pytest.raises(InputError, match=r"ctpipe\[pcodec\]"):
        export_zarr(store, tmp_path / "x.zarr", codec="pcodec")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(InputError, match=r"ctpipe\[zarr\]"):
        export_zarr(store, tmp_path / "x.zarr")


WRITER = """
import sys
import latentcache.exchange.hierarchy_reader as module
module.AT_ONCE = 1
print("ready", flush=True)
module.import_zarr(__import__("pathlib").Path(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_import_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    made = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    made.register_encoding(ENCODING)
    made.append_catalog([series(n) for n in range(40)])
    with made.writer() as writer:
        writer.commit([stage(made, n, latent(3, seed=n)) for n in range(40)])
    out, back = tmp_path / "out.zarr", tmp_path / "back"
    export_zarr(made, out)
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    counts = []
    for after in (0, 1, 6):  # latents that stand when the kill falls
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(out), str(back)], env=environment)
        deadline = time.monotonic() + 300
        while process.poll() is None and _rows(back) <= after + (counts[-1] if counts else 0):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(_rows(back))
        assert verify(LatentStore.open(back)).problems == []
    assert counts == sorted(counts)
    assert counts[0] > 0
    done = import_zarr(out, back)
    assert done.latents + done.kept == 40
    assert facts(LatentStore.open(back)) == facts(made)


def _rows(place: Path) -> int:
    return len(LatentStore.open(place).records()) if LatentStore.exists(place) else 0
