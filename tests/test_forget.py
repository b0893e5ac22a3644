"""A forgotten patient leaves no row and no byte, in no version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_store import ENCODING, key, series, stage

from latentcache.errors import StoreError
from latentcache.forget import forget_patient, remove_keys
from latentcache.records import PairRecord
from latentcache.store import LatentStore
from latentcache.verify import verify

GONE = key(2001)


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    """Patient 2001 with series 1 and 5 and a pair of them, patient 2002 with series 2; a generated latent of each."""
    store = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    store.register_encoding(ENCODING)
    pair = PairRecord(key(9), key(1), GONE, "APE", key(5), key(1), (0.0, 9.0), "train", "{}")
    store.append_catalog([series(1), series(2), series(5, patient_key=GONE, role="thick")], [pair])
    child = store.generated(key(77), create=True)
    child.register_encoding(ENCODING)
    with child.writer() as writer:
        writer.commit([stage(child, 1), stage(child, 2)])
    with store.writer() as writer:
        writer.commit([stage(store, 1), stage(store, 2)], [{"key": key(1), "s": 1.0}, {"key": key(2), "s": 1.0}])
        writer.commit([stage(store, 9, role="thick_on_thin")])
    stage(store, 5)  # an attempt in flight
    return store


def traces(root: str | Path) -> list[Path]:
    needles = [k.encode() for k in (key(1), key(5), key(9), GONE)]
    named = [p for p in Path(root).rglob("*") if any(n.decode() in str(p) for n in needles)]
    # Parquet is compressed: the rows are looked up through the store, the rest of the files by their bytes.
    return named + [p for p in Path(root).rglob("*.json") if any(n in p.read_bytes() for n in needles)]


def test_nothing_is_left(store: LatentStore) -> None:
    assert traces(store.url)
    done = forget_patient(store, GONE)
    assert (done.series, done.pairs, done.latents, done.generated_latents) == (2, 1, 2, 1)
    assert traces(store.url) == []
    for opened in (LatentStore.open(store.url), LatentStore.open(store.url).generated(key(77))):
        assert [r.key for r in opened.records()] == [key(2)]
        opened.read(opened.records()[0])
        assert len(list(opened.location.list("snapshots"))) == 1
        named = {f.path for fs in opened.current_snapshot.fragments.values() for f in fs}
        kinds = ("catalog", "pairs", "manifest", "timings")
        assert {e.path for kind in kinds for e in opened.location.list(kind)} == named
        assert verify(opened).problems == []
    again = LatentStore.open(store.url)
    assert [s.series_key for s in again.series()] == [key(2)]
    assert again.pairs() == []
    assert again.table("timings").column("key").to_pylist() == [key(2)]


def test_repeating_it_is_harmless(store: LatentStore) -> None:
    forget_patient(store, GONE)
    assert forget_patient(store, GONE).latents == 0
    assert forget_patient(store, key(4242)).objects == 0
    assert len(LatentStore.open(store.url).records()) == 1


def test_an_interrupted_removal_is_completed(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(BaseException):
        pass

    deleted = 0
    real = type(store.location).delete

    def limited(location: object, path: str) -> None:
        nonlocal deleted
        deleted += not path.startswith("lease")
        if deleted > 3 and not path.startswith("lease"):
            raise Stop
        real(location, path)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store.location), "delete", limited)
    with pytest.raises(Stop):
        forget_patient(store, GONE)
    monkeypatch.undo()
    forget_patient(LatentStore.open(store.url), GONE)
    assert traces(store.url) == []


def test_a_series_of_a_pair_takes_the_pair_along(store: LatentStore) -> None:
    remove_keys(store, {key(5)})
    assert LatentStore.open(store.url).pairs() == []
    assert len(LatentStore.open(store.url).series()) == 2


def test_it_waits_for_no_driver(store: LatentStore) -> None:
    with LatentStore.open(store.url).writer(), pytest.raises(StoreError, match="another ctpipe command"):
        forget_patient(store, GONE)
    assert len(LatentStore.open(store.url).records()) == 3
    assert replace(series(1), reason="") in store.series()
