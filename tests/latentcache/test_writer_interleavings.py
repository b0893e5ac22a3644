"""Drivers that meet at the worst moments, driven one request at a time through an object store in memory.

A driver is stopped at a chosen request, another does its whole work, and the first goes on. Whatever happens: what was
reported as committed is in the last snapshot, and what was lost was reported as failed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest

from latentcache import LatentStore, Lease, StoreError
from latentcache.lease import LEASE
from latentcache.maintenance import collect, forget_patient, pin, pinned_snapshots, verify
from latentcache.maintenance.erase import rewrite
from latentcache.storage import Entry
from latentcache.tables import Kind, snapshot_numbers, snapshot_path
from tests.support.bucket import Bucket
from tests.support.killed_writer import ENCODING, stage

KEYS = [f"{n:016x}" for n in range(4)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def store_in(bucket: Bucket) -> LatentStore:
    store = LatentStore.create(bucket, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    return store


def committed(bucket: Bucket) -> set[str]:
    return {row.key for row in LatentStore.open(bucket).records()}


def once(bucket: Bucket, moment: str, path: str, action: Callable[[], None]) -> None:
    """Do something at the first such moment, with the hook out of the way."""

    def hook(now: str, where: str) -> None:
        if now == moment and where.startswith(path):
            bucket.at = lambda *_: None
            action()

    bucket.at = hook


def take_over_and_commit(bucket: Bucket, key: str, done: list[str]) -> None:
    """Another driver finds the lease dead, takes it and commits."""
    bucket.delete(LEASE)
    other = LatentStore.open(bucket)
    with other.writer() as writer:
        done += [row.key for row in writer.commit([stage(other, key)])]


MOMENTS = [
    ("look", "latents.zarr/"),
    ("look", "manifest/"),
    ("stored", "manifest/"),
    ("read", LEASE),
    ("look", "snapshots/"),
    ("looked", "snapshots/"),
    ("stored", "snapshots/"),
]


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize(("moment", "path"), MOMENTS)
def test_a_driver_that_was_stopped_and_goes_on(moment: str, path: str, conditional: bool) -> None:
    """Between any two requests of a commit another driver takes over, commits and ends."""
    bucket = Bucket(conditional)
    store = store_in(bucket)
    done: list[str] = []
    failed: list[str] = []
    with store.writer() as writer:
        done += [row.key for row in writer.commit([stage(store, KEYS[0])])]
        once(bucket, moment, path, lambda: take_over_and_commit(bucket, KEYS[1], done))
        try:
            done += [row.key for row in writer.commit([stage(store, KEYS[2])])]
        except StoreError:
            failed.append(KEYS[2])
    replaced = not conditional and (moment, path) == ("looked", "snapshots/")
    assert KEYS[1] in done
    if not replaced:  # see the next test for what happens then
        assert set(done) <= committed(bucket)
        assert verify(LatentStore.open(bucket)).problems == []
    assert KEYS[2] in failed or KEYS[2] in done


def test_a_snapshot_replaced_a_moment_too_late_is_put_back() -> None:
    """Without conditional puts: the driver that lost the lease fails, and the other's commit stands again."""
    bucket = Bucket(conditional=False)
    store = store_in(bucket)
    other = LatentStore.open(bucket)
    with store.writer() as writer:

        def stopped() -> None:
            bucket.delete(LEASE)
            second = other.writer()
            second.__enter__()
            second.commit([stage(other, KEYS[1])])
            held.append(second)

        held: list[object] = []
        once(bucket, "looked", "snapshots/", stopped)
        with pytest.raises(StoreError, match="lease was taken over"):
            writer.commit([stage(store, KEYS[0])])
        assert committed(bucket) == {KEYS[0]}  # for a moment
        (second,) = held
        second.commit([stage(other, KEYS[2])])  # type: ignore[attr-defined]
        assert committed(bucket) == {KEYS[1], KEYS[2]}
        assert {r.key for r in LatentStore.open(bucket, snapshot=1).records()} == {KEYS[1]}
        second.__exit__(None, None, None)  # type: ignore[attr-defined]
    assert verify(LatentStore.open(bucket)).problems == []


def test_the_last_commit_is_put_back_when_its_driver_ends() -> None:
    bucket = Bucket(conditional=False)
    store = store_in(bucket)
    with store.writer() as writer:
        writer.commit([stage(store, KEYS[0])])
        path = "snapshots/00000001.json"
        good = bucket.read(path)
        bucket.put(path, good.replace(b'"rows": 1', b'"rows": 2'))
    assert bucket.read(path) == good


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("path", ["manifest/", "snapshots/", "latents.zarr/"])
def test_a_lost_answer_is_a_failure_that_a_second_run_completes(path: str, conditional: bool) -> None:
    """The store took the object, and the driver was told that it failed."""
    bucket = Bucket(conditional)
    store = store_in(bucket)

    def lost() -> None:
        raise StoreError("no answer", expected="one", remedy="Run again.")

    once(bucket, "stored", path, lost)
    with pytest.raises(StoreError, match="no answer"), store.writer() as writer:
        writer.commit([stage(store, KEYS[0])])
    again = LatentStore.open(bucket)
    with again.writer() as writer:
        writer.commit([stage(again, KEYS[0])])
    assert committed(bucket) == {KEYS[0]}
    assert verify(LatentStore.open(bucket)).problems == []
    collect(LatentStore.open(bucket), grace_s=-60)
    assert verify(LatentStore.open(bucket)).problems == []


def test_a_renewal_that_was_stopped_does_not_take_the_lease_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It read its own token, slept through the takeover, and must ask again before it writes."""
    bucket = Bucket()
    zombie, heir = Lease(bucket, seconds=60.0), Lease(bucket, seconds=60.0)
    zombie._write()
    uptime = [0.0]
    monkeypatch.setattr("latentcache.lease._uptime", lambda: uptime[0])
    rounds = iter([False, True])
    monkeypatch.setattr(zombie._stop, "wait", lambda seconds: next(rounds))
    real = zombie.held

    def held() -> bool:
        found = real()
        if uptime[0] == 0.0:  # stopped just after the answer
            uptime[0] = 200.0
            heir._write()
        return found

    monkeypatch.setattr(zombie, "held", held)
    zombie._renew()
    assert heir.held()
    assert not real()


def age(bucket: Bucket) -> None:
    """Two days pass."""
    bucket.objects_held = {p: (data, when - 2 * 86_400) for p, (data, when) in bucket.objects_held.items()}


def collect_meanwhile(bucket: Bucket) -> None:
    bucket.delete(LEASE)
    age(bucket)
    collect(LatentStore.open(bucket))


@pytest.mark.parametrize(("moment", "path"), [("read", LEASE), ("look", "snapshots/"), ("looked", "snapshots/")])
def test_a_driver_that_slept_while_gc_took_its_fragment_commits_nothing(moment: str, path: str) -> None:
    """What the model found: nothing but the snapshot's put was left to do, and its number was still free."""
    bucket = Bucket()
    store = store_in(bucket)
    with store.writer() as writer:
        writer.commit([stage(store, KEYS[0])])
        staged = stage(store, KEYS[1])
        once(bucket, moment, path, lambda: collect_meanwhile(bucket))
        with pytest.raises(StoreError):
            writer.commit([staged])
    assert committed(bucket) == {KEYS[0]}
    assert verify(LatentStore.open(bucket)).problems == []
    assert collect(LatentStore.open(bucket), grace_s=-60).attempts == 0


@pytest.mark.parametrize("moment", ["put", "replaced", "look", "looked", "stored", "delete", "deleted"])
def test_a_snapshot_that_is_pinned_while_gc_drops_it(moment: str) -> None:
    """At every request of gc in turn: either the run is told that it came too late, or its snapshot stays."""
    at = 0
    while (told := pinned_during_gc(moment, at)) is not None:
        at += 1
    assert at > 0
    assert told is None


def pinned_during_gc(moment: str, at: int) -> bool | None:
    """Pin snapshot 1 at the given request of a gc that expires it; whether that went well, None where gc had ended."""
    bucket = Bucket()
    store = store_in(bucket)
    for key in KEYS[:3]:
        with store.writer() as writer:
            writer.commit([stage(store, key)])
    age(bucket)
    seen: list[str] = []
    told: list[bool] = []

    def hook(now: str, where: str) -> None:
        if now != moment:
            return
        seen.append(where)
        if len(seen) == at + 1:
            bucket.at = lambda *_: None
            try:
                pin(bucket, "run", 1)
                told.append(True)
            except StoreError:
                told.append(False)

    bucket.at = hook
    collect(LatentStore.open(bucket), expire_snapshots=True)
    bucket.at = lambda *_: None
    if not told:
        return None
    assert (snapshot_path(1) in bucket.objects_held) >= told[0]
    if told[0]:
        assert [r.key for r in LatentStore.open(bucket, snapshot=1).records()] == KEYS[:1]
    assert pinned_snapshots(bucket) == ({1: ["run"]} if told[0] else {})
    assert not list(bucket.list("expiring"))
    assert verify(LatentStore.open(bucket)).problems == []
    return told[0]


def expire(bucket: Bucket) -> None:
    bucket.delete(LEASE)
    age(bucket)
    collect(LatentStore.open(bucket), expire_snapshots=True)


def forget_somebody(bucket: Bucket) -> None:
    bucket.delete(LEASE)
    forget_patient(LatentStore.open(bucket), "f" * 16)


@pytest.mark.parametrize("drop", [expire, forget_somebody])
def test_a_driver_that_slept_until_its_snapshots_number_was_dropped_commits_nothing(
    drop: Callable[[Bucket], None],
) -> None:
    """What the model found: its number had been committed by another, then dropped, and so was free again."""
    bucket = Bucket()
    store = store_in(bucket)
    done: list[str] = []

    def meanwhile() -> None:
        for key in KEYS[1:3]:
            take_over_and_commit(bucket, key, done)
        drop(bucket)

    with store.writer() as writer:
        staged = stage(store, KEYS[0])
        once(bucket, "look", "snapshots/", meanwhile)
        with pytest.raises(StoreError, match="committed by another driver"):
            writer.commit([staged])
    assert committed(bucket) == set(done) == set(KEYS[1:3])
    assert 1 not in snapshot_numbers(bucket)
    with pytest.raises(StoreError, match="snapshot 1 does not exist"):
        LatentStore.open(bucket, snapshot=1)
    with pytest.raises(StoreError, match="does not exist"):
        pin(bucket, "run", 1)
    assert verify(LatentStore.open(bucket)).problems == []


def test_a_listing_that_lacks_the_newest_snapshot_does_not_make_its_files_garbage() -> None:
    """A network file system may show a folder as it was a moment ago."""
    bucket = Bucket()
    store = store_in(bucket)
    for key in KEYS[:2]:
        with store.writer() as writer:
            writer.commit([stage(store, key)])
    age(bucket)
    opened = LatentStore.open(bucket)
    real, listings = bucket.list, list[str]()

    def lagging(prefix: str) -> Iterator[Entry]:
        listings.extend([prefix] * (prefix == "snapshots"))
        for entry in real(prefix):
            if len(listings) != 2 or not entry.path.endswith("2.json"):  # gc's own, after the writer's
                yield entry

    bucket.list = lagging  # type: ignore[method-assign]
    with contextlib.suppress(StoreError):
        collect(opened)
    bucket.list = real  # type: ignore[method-assign]
    assert len(listings) > 2
    assert committed(bucket) == set(KEYS[:2])
    assert verify(LatentStore.open(bucket)).problems == []


def add(bucket: Bucket, key: str) -> list[str]:
    store = LatentStore.open(bucket)
    with store.writer() as writer:
        return [row.key for row in writer.commit([stage(store, key)])]


def all_rows(kind: Kind, table: pa.Table) -> pa.Array:
    return pa.array([True] * len(table), pa.bool_())


def merge(bucket: Bucket, key: str) -> list[str]:
    with LatentStore.open(bucket).writer() as writer:
        writer.replace(lambda base: rewrite(bucket, base, all_rows))
    return []


def tidy(bucket: Bucket, key: str) -> list[str]:
    collect(LatentStore.open(bucket), expire_snapshots=True)
    return []


def pin_last(bucket: Bucket, key: str) -> list[str]:
    pin(bucket, f"run-{key}", LatentStore.open(bucket).snapshot)
    return []


ACTIONS: dict[str, Callable[[Bucket, str], list[str]]] = {"add": add, "merge": merge, "gc": tidy, "pin": pin_last}


def attempt(bucket: Bucket, action: str, key: str, done: list[str]) -> None:
    with contextlib.suppress(StoreError):
        done += ACTIONS[action](bucket, key)


def requests_of(bucket: Bucket, first: str) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    bucket.at = lambda moment, path: seen.append((moment, path))
    attempt(bucket, first, KEYS[2], [])
    return seen


def old_store() -> Bucket:
    """A store of two commits, two days old."""
    bucket = Bucket()
    store_in(bucket)
    for key in KEYS[:2]:
        add(bucket, key)
    age(bucket)
    return bucket


def stop_at(bucket: Bucket, at: int, others: list[str], done: list[str]) -> None:
    """At the given request let others do their work, each when the one before has been dead for two days."""
    seen: list[str] = []

    def hook(moment: str, path: str) -> None:
        seen.append(moment)
        if len(seen) == at + 1:
            bucket.at = lambda *_: None
            for action in others:
                bucket.delete(LEASE)
                attempt(bucket, action, KEYS[3], done)
                age(bucket)

    bucket.at = hook


@pytest.mark.parametrize(
    "second", [*ACTIONS, *(pytest.param(f"{one} gc", marks=pytest.mark.slow) for one in ("add", "merge", "pin"))]
)
@pytest.mark.parametrize("first", ACTIONS)
def test_every_request_of_one_with_the_whole_of_others_in_between(first: str, second: str) -> None:
    """At each request in turn the first stops, is taken for dead, others do all their work, and it goes on."""
    moments = requests_of(old_store(), first)
    assert len(moments) > 3
    for at in range(len(moments)):
        bucket, done = old_store(), list(KEYS[:2])
        stop_at(bucket, at, second.split(), done)
        attempt(bucket, first, KEYS[2], done)
        bucket.at = lambda *_: None
        where = f"{first} stopped at {moments[at]} while others did {second}"
        assert set(done) <= committed(bucket), where
        found = verify(LatentStore.open(bucket))
        assert found.problems == [], where
        for number in pinned_snapshots(bucket):
            assert LatentStore.open(bucket, snapshot=number).records(), where
        bucket.delete(LEASE)
        assert attempt_again(bucket) == {KEYS[2], *done}, where


def attempt_again(bucket: Bucket) -> set[str]:
    """What is there once the first has run again, undisturbed, as a user would who was told of a failure."""
    add(bucket, KEYS[2])
    return committed(bucket)
