"""S3 with failures on purpose: a store keeps its promises, and what cannot be helped is said plainly."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from latentcache import CorruptLatentError, LatentStore, StoreError
from latentcache.maintenance import collect, verify
from latentcache.storage import open_location, s3 as location_s3
from tests.support.killed_writer import ENCODING, latent, stage
from tests.support.s3_server import S3Server, serve

KEYS = [f"{n:016x}" for n in range(3)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def url(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield f"s3://bucket/{tmp_path.name}"
    server.fault = lambda number, method, path: ""
    server.correct_ranges = True


def life(url: str) -> LatentStore:
    """Create, stage, commit, read windows, collect, verify."""
    store = LatentStore.create(url, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    with store.writer() as writer:
        writer.commit([stage(store, KEYS[0])])
        writer.commit([stage(store, k) for k in KEYS[1:]])
    stage(store, KEYS[0])
    again = pickle.loads(pickle.dumps(LatentStore.open(url)))
    assert sorted(r.key for r in again.records()) == KEYS
    for row in again.records():
        np.testing.assert_array_equal(again.read(row, slice(1, 4)), latent(row.key)[:, 1:4])
    assert collect(again, grace_s=-3600).attempts == 1
    return again


def test_an_encoding_is_read_once_and_not_with_every_latent(server: S3Server, url: str) -> None:
    read: list[str] = []

    def note(number: int, method: str, path: str) -> str:
        read.extend([path] if method == "GET" and "/encodings/" in path else [])
        return ""

    store = LatentStore.create(url, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    server.fault = note
    with store.writer() as writer:
        for key in KEYS:
            writer.commit([stage(store, key)])
    assert len(read) == 2  # by the worker that stages, and by the driver that commits


def test_a_server_with_conditional_puts_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, conditional=True) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        place = open_location("s3://bucket/store")
        assert getattr(place, "conditional", False)
        server.fault = lambda number, method, path: "" if number % 9 else "drop-answer"
        stop = threading.Event()
        killer = threading.Thread(target=lambda: [server.restart() for _ in range(3) if not stop.wait(0.3)])
        killer.start()
        store = life("s3://bucket/store")
        killer.join()
        assert server.restarts == 3
        assert verify(store).problems == []
        place.put_once("taken", [b"first"])
        with pytest.raises(FileExistsError):
            place.put_once("taken", [b"second"])
        assert place.read("taken") == b"first"


def test_every_fourth_request_fails(server: S3Server, url: str) -> None:
    faults = ("500", "drop", "drop-answer", "cut", "slow")
    server.seen.clear()
    server.fault = lambda number, method, path: faults[number // 4 % len(faults)] if number % 4 == 3 else ""
    store = life(url)
    result = verify(store)
    assert result.problems == []
    assert (result.latents, result.orphans) == (3, 0)
    assert all(server.seen[fault] > 1 for fault in faults)


def test_a_server_that_answers_ranges_wrongly_is_read_whole(server: S3Server, url: str) -> None:
    server.correct_ranges = False
    store = LatentStore.create(url, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    row = stage(store, KEYS[0])
    np.testing.assert_array_equal(store.read(row, slice(1, 4)), latent(row.key)[:, 1:4])


def test_a_server_that_stays_broken_is_named(server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = location_s3.S3Store.from_url
    monkeypatch.setattr(
        location_s3.S3Store, "from_url", lambda u, **options: real(u, **options | {"retry_config": {"max_retries": 1}})
    )
    monkeypatch.setattr(location_s3, "READ_ATTEMPTS", 2)
    store = LatentStore.create(url, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    row = stage(store, KEYS[0])
    server.fault = lambda number, method, path: "500"
    with pytest.raises(StoreError, match="failed on"):
        store.read(row)
    with pytest.raises(StoreError, match="failed on"):
        stage(store, KEYS[1])
    server.fault = lambda number, method, path: ""
    np.testing.assert_array_equal(store.read(row), latent(row.key))


def test_a_server_whose_disk_is_full_loses_nothing(server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes are refused with 507 from each one of a commit on: what was committed stays, and a retry completes."""
    real = location_s3.S3Store.from_url
    monkeypatch.setattr(
        location_s3.S3Store, "from_url", lambda u, **options: real(u, **options | {"retry_config": {"max_retries": 1}})
    )
    store = LatentStore.create(url, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    with store.writer() as writer:
        (first,) = writer.commit([stage(store, KEYS[0])])
        staged = stage(store, KEYS[1])
        for after in range(3):  # the manifest's fragment, then the timings', then the snapshot
            puts: list[str] = []

            def full(number: int, method: str, path: str, puts: list[str] = puts, after: int = after) -> str:
                puts.extend([path] if method == "PUT" else [])
                return "507" if method == "PUT" and len(puts) > after else ""

            server.fault = full
            with pytest.raises(StoreError, match="failed on"):
                writer.commit([staged], [{"key": KEYS[1], "s": 1}])
            server.fault = lambda number, method, path: ""
            assert LatentStore.open(url).records() == [first]
            assert verify(LatentStore.open(url)).problems == []
        assert writer.commit([staged], [{"key": KEYS[1], "s": 1}]) == [staged]
    assert LatentStore.open(url).records() == [first, staged]


def test_wrong_credentials_are_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-key")
    with pytest.raises(StoreError, match="refused access"):
        open_location(url).read("store.json")


def test_a_flipped_bit_behind_the_server_is_found(server: S3Server, url: str) -> None:
    store = LatentStore.create(url, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    row = stage(store, KEYS[0])
    shard = server.root / url.rsplit("/", 1)[1] / row.path / "c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[9] ^= 16
    shard.write_bytes(data)
    with pytest.raises(CorruptLatentError, match=row.key):
        store.read(row)


def test_a_name_is_put_once_even_where_the_server_ignores_conditions(url: str) -> None:
    location = open_location(url)
    location.put_once("a/b", [b"1", np.arange(3, dtype=np.uint8)])
    with pytest.raises(FileExistsError):
        location.put_once("a/b", [b"2"])
    assert location.read("a/b") == b"1\x00\x01\x02"
    location.delete("a/b")
    location.delete("a/b")
    assert list(location.list("a")) == []
    with pytest.raises(FileNotFoundError):
        location.size("a/b")
