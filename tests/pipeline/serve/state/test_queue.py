"""The queue: one result per study through every order of events, kills, a damaged file, a full disk."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from latentcache import StoreError
from pipeline.serve import Queue
from pipeline.serve.state.queue import Claim, Made

KEY, OTHER = "a" * 16, "b" * 16


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> Queue:
    return Queue(tmp_path / "queue.sqlite", clock=clock)


def made(digest: str = "d1") -> Made:
    return Made(digest, ("folder",), "2.25.1", 20, "thick", 1.5)


def add(queue: Queue, *sops: str, study: str = KEY) -> None:
    for sop in sops:
        queue.add_instance(sop, study, f"digest of {sop}", 10, "CT1")


def claimed(queue: Queue) -> Claim:
    claim = queue.claim(10, 100)
    assert claim is not None
    return claim


def test_a_study_is_claimed_once_and_only_when_it_is_quiet(queue: Queue, clock: Clock) -> None:
    add(queue, "1", "2")
    queue.sender_finished([KEY])
    clock.now += 9
    assert queue.claim(10, 100) is None
    add(queue, "3")
    queue.sender_finished([KEY])
    clock.now += 9
    assert queue.claim(10, 100) is None
    clock.now += 1
    assert queue.claim(10, 100) == Claim(KEY, 1, 1)
    assert queue.claim(10, 100) is None


def test_a_study_whose_sender_did_not_finish_waits_longer(queue: Queue, clock: Clock) -> None:
    add(queue, "1")
    clock.now += 99
    assert queue.claim(10, 100) is None
    clock.now += 1
    assert queue.claim(10, 100) is not None


def test_silence_while_the_service_was_away_says_nothing(queue: Queue, clock: Clock) -> None:
    add(queue, "1")
    queue.sender_finished([KEY])
    clock.now += 1000
    queue.restart()
    assert queue.claim(10, 100) is None
    clock.now += 10
    assert queue.claim(10, 100) is not None


def test_work_that_a_kill_ended_is_done_again_and_counted(queue: Queue, clock: Clock) -> None:
    add(queue, "1")
    queue.sender_finished([KEY])
    clock.now += 10
    assert [claimed(queue).attempt, queue.restart(), claimed(queue).attempt] == [1, None, 2]


def test_what_comes_while_a_study_is_worked_on_is_not_lost(queue: Queue, clock: Clock) -> None:
    add(queue, "1")
    queue.sender_finished([KEY])
    clock.now += 10
    claim = claimed(queue)
    add(queue, "2")
    queue.made(claim, made(), ["pacs"])
    assert queue.states() == {KEY: "receiving"}
    clock.now += 100
    again = claimed(queue)
    assert (again.revision, queue.last_digest(KEY)) == (2, "d1")
    queue.made(again, made("d2"), ["pacs"])
    first = queue.next_delivery("pacs")
    assert first is not None
    assert first.revision == 2, "the first result was never sent and is superseded"
    queue.delivered(first)
    assert queue.next_delivery("pacs") is None
    assert queue.states() == {KEY: "done"}


def test_a_result_whose_delivery_began_is_not_superseded(queue: Queue, clock: Clock) -> None:
    add(queue, "1")
    clock.now += 100
    queue.made(claimed(queue), made(), ["pacs"])
    sending = queue.next_delivery("pacs")
    assert sending is not None
    add(queue, "2")
    clock.now += 100
    queue.made(claimed(queue), made("d2"), ["pacs"])
    queue.undelivered(sending, 5, "broke off", refused=False, give_up=False)
    second = queue.next_delivery("pacs")
    assert second is not None
    assert second.revision == 2
    clock.now += 5
    third = queue.next_delivery("pacs")
    assert third is not None
    assert (third.revision, third.attempt) == (1, 2)


def test_every_destination_gets_a_result_and_a_refusal_is_left_to_a_person(queue: Queue, clock: Clock) -> None:
    add(queue, "1")
    clock.now += 100
    queue.made(claimed(queue), made(), ["pacs", "archive"])
    to_pacs, to_archive = queue.next_delivery("pacs"), queue.next_delivery("archive")
    assert to_pacs is not None
    assert to_archive is not None
    queue.delivered(to_pacs)
    assert queue.states() == {KEY: "sending"}
    queue.undelivered(to_archive, 0, "status 0xc000", refused=True, give_up=True)
    assert queue.next_delivery("archive") is None
    assert queue.summary()["undelivered"][0]["reason"] == "status 0xc000"
    assert queue.requeue() == 1
    again = queue.next_delivery("archive")
    assert again is not None
    queue.delivered(again)
    assert queue.states() == {KEY: "done"}


def test_a_kill_during_a_delivery_sends_it_again(queue: Queue, clock: Clock) -> None:
    add(queue, "1")
    clock.now += 100
    queue.made(claimed(queue), made(), ["pacs"])
    assert queue.next_delivery("pacs") is not None
    assert queue.next_delivery("pacs") is None
    queue.restart()
    again = queue.next_delivery("pacs")
    assert again is not None
    assert again.attempt == 2


def test_a_result_cannot_be_recorded_twice(queue: Queue, clock: Clock) -> None:
    add(queue, "1")
    clock.now += 100
    claim = claimed(queue)
    queue.made(claim, made(), ["pacs"])
    with pytest.raises(sqlite3.IntegrityError):
        queue.made(claim, made(), ["pacs"])
    assert len(queue.results()) == 1


@pytest.mark.parametrize("state", ["skipped", "held", "quarantined"])
def test_new_images_open_a_study_again(queue: Queue, clock: Clock, state: str) -> None:
    add(queue, "1")
    clock.now += 100
    queue.end(claimed(queue), state, "a reason")
    assert queue.states() == {KEY: state}
    add(queue, "2")
    assert queue.states() == {KEY: "receiving"}


def test_a_damaged_and_a_newer_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        Queue(tmp_path / "bad.sqlite")
    Queue(tmp_path / "new.sqlite").close()
    with sqlite3.connect(tmp_path / "new.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="version 99"):
        Queue(tmp_path / "new.sqlite")


EVENTS = st.lists(
    st.sampled_from(["image", "finished", "wait", "claim", "made", "fail", "send", "delivered", "broke", "restart"]),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_no_order_of_events_loses_a_study_or_makes_two_results_of_the_same_images(events: list[str]) -> None:
    """Whatever happens: every image is in the latest result in the end, and no two results are of the same images."""
    clock, number, held = Clock(), 0, None
    sending = None
    queue = Queue(Path(":memory:"), clock=clock)

    def finish(claim: Claim) -> None:
        digest = ",".join(row["sop_key"] for row in queue.instances(KEY))
        if digest == queue.last_digest(KEY):
            queue.unchanged(claim, "thick")
        else:
            queue.made(claim, Made(digest, ("f",), "2.25.1", 1, "thick", 0.0), ["pacs"])

    for event in [*events, "restart", *["wait", "claim", "made"] * 3, *["wait", "send", "delivered"] * 70]:
        if event == "image":
            number += 1
            add(queue, f"{number:04d}")
        elif event == "finished":
            queue.sender_finished([KEY])
        elif event == "wait":
            clock.now += 100
        elif event == "claim" and held is None:
            held = queue.claim(10, 100)
        elif event == "made" and held is not None:
            finish(held)
            held = None
        elif event == "fail" and held is not None:
            queue.try_again(held, 10, "RuntimeError")
            held = None
        elif event == "send" and sending is None:
            sending = queue.next_delivery("pacs")
        elif event == "delivered" and sending is not None:
            queue.delivered(sending)
            sending = None
        elif event == "broke" and sending is not None:
            queue.undelivered(sending, 1, "broke off", refused=False, give_up=False)
            sending = None
        elif event == "restart":
            held = sending = None
            queue.restart()
    if number:
        results = queue.results()
        assert queue.states() == {KEY: "done"}
        assert queue.last_digest(KEY).split(",")[-1] == f"{number:04d}"
        assert {row["state"] for row in results} <= {"delivered", "superseded"}
        assert results[-1]["state"] == "delivered"
    queue.close()


WRITER = """
import sys
from pathlib import Path
from pipeline.serve.state.queue import Queue, Made
queue = Queue(Path(sys.argv[1]))
queue.restart()
n = queue.summary()["counters"].get("instances_received", 0)
while True:
    n += 1
    key = f"{int(n):016x}"
    queue.add_instance(key, key, "d", 1, "CT1")
    queue.sender_finished([key])
    print("stored", key, flush=True)
    claim = queue.claim(0, 0)
    if claim:
        queue.made(claim, Made("d", ("f",), "2.25.1", 1, "r", 0.0), ["pacs"])
        print("made", claim.study_key, flush=True)
    delivery = queue.next_delivery("pacs")
    if delivery:
        queue.delivered(delivery)
        print("delivered", delivery.study_key, flush=True)
"""


def test_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    chance, spoken = random.Random(0), set()
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / "queue.sqlite"], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            spoken.add(writer.stdout.readline().strip())
            time.sleep(chance.uniform(0, 0.2))
            os.kill(writer.pid, signal.SIGKILL)
            spoken |= {line.strip() for line in writer.stdout if line.endswith("\n")}
    queue = Queue(tmp_path / "queue.sqlite")
    results = queue.results()
    by_event: dict[str, set[str]] = {}
    for line in spoken:
        event, key = line.split()
        by_event.setdefault(event, set()).add(key)
    assert len(by_event["stored"]) >= 8
    assert by_event["stored"] <= set(queue.states())
    assert by_event["made"] <= {row["study_key"] for row in results}
    assert by_event["delivered"] <= {row["study_key"] for row in results if row["state"] == "delivered"}
    assert len({row["study_key"] for row in results}) == len(results)
    queue.close()


def test_counting_needs_no_disk_and_is_written_when_there_is_one(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused connection is counted in the thread that accepts them all: an error there would end the service."""

    def full() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(queue, "_change", full)
    queue.count("connections_refused_rate")
    queue.flush_counters()
    monkeypatch.undo()
    queue.count("connections_refused_rate")
    assert queue.summary()["counters"] == {"connections_refused_rate": 2}
    beside = Queue(tmp_path / "queue.sqlite", read_only=True)
    assert beside.summary()["counters"] == {"connections_refused_rate": 2}
    beside.close()
