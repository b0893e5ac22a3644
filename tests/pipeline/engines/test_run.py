"""The engine's contract on the backends that need no service: inline and embedded dask."""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from latentcache import InputError
from latentcache.storage import LocalLocation
from pipeline.engines import EngineOptions, Outcome, Progress, Stage, read_progress, run_stage, stream

BACKENDS = ["inline", "dask"]


@dataclass
class Device:
    """A stand-in for a VAE on a device: refuses to be used by two threads at once."""

    name: str
    busy: threading.Lock = field(default_factory=threading.Lock)

    def square(self, value: int) -> tuple[str, int]:
        assert self.busy.acquire(blocking=False), "two items on one device at once"
        time.sleep(0.002)
        self.busy.release()
        return self.name, value * value


def prepare(item: int, *, alive: list[int], peak: list[int], lock: threading.Lock) -> int:
    with lock:
        alive[0] += 1
        peak[0] = max(peak[0], alive[0])
    if item == 13:
        raise InputError("item 13", expected="a lucky number", remedy="Skip it.")
    if item == 17:
        raise RuntimeError("secret detail of a patient")
    return item


def run(device: Device, value: int, *, alive: list[int], lock: threading.Lock) -> int:
    with lock:
        alive[0] -= 1
    return device.square(value)[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("devices", [("a",), ("a", "b")])
def test_every_item_has_one_outcome_and_a_failure_stops_nothing(backend: str, devices: tuple[str, ...]) -> None:
    alive, peak, lock = [0], [0], threading.Lock()
    stage = Stage(
        prepare=functools.partial(prepare, alive=alive, peak=peak, lock=lock),
        setup=Device,
        run=functools.partial(run, alive=alive, lock=lock),
    )
    outcomes = list(stream(range(200), stage, EngineOptions(name=backend, devices=devices)))
    assert sorted(o.item for o in outcomes) == list(range(200))
    assert {o.item: o.value for o in outcomes if o.ok} == {i: i * i for i in range(200) if i not in (13, 17)}
    failed = {o.item: o for o in outcomes if not o.ok}
    assert set(failed) == {13, 17}
    assert failed[13].attempts == 1
    assert "lucky number" in failed[13].error
    assert failed[17].attempts == 2
    assert "secret detail" not in failed[17].error
    assert failed[17].error_kind == "RuntimeError"


def test_prepared_items_in_memory_are_bounded() -> None:
    alive, peak, lock = [0], [0], threading.Lock()
    stage = Stage(
        prepare=functools.partial(prepare, alive=alive, peak=peak, lock=lock),
        setup=Device,
        run=functools.partial(run, alive=alive, lock=lock),
    )
    items = [i for i in range(120) if i not in (13, 17)]
    assert all(o.ok for o in stream(items, stage, EngineOptions(devices=("a",), prefetch=2)))
    assert peak[0] <= 3


def test_a_retry_can_succeed() -> None:
    tries: dict[int, int] = {}

    def flaky(item: int) -> int:
        tries[item] = tries.get(item, 0) + 1
        if tries[item] == 1:
            raise OSError("a dropped connection")
        return item

    stage = Stage(prepare=flaky, setup=Device, run=lambda device, value: device.square(value)[1])
    (outcome,) = stream([3], stage, EngineOptions(name="inline"))
    assert outcome.ok
    assert (outcome.value, outcome.attempts) == (9, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_series_that_memory_does_not_hold_is_set_aside_and_said(backend: str) -> None:
    def giant(item: int) -> int:
        if item == 2:
            raise MemoryError
        return item

    stage = Stage(prepare=giant, setup=Device, run=lambda device, value: device.square(value)[1])
    outcomes = {o.item: o for o in stream(range(5), stage, EngineOptions(name=backend))}
    assert {item for item, outcome in outcomes.items() if outcome.ok} == {0, 1, 3, 4}
    assert "out of memory" in str(outcomes[2].error)
    assert outcomes[2].attempts == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_cannot_be_made_stops_the_run_at_once(backend: str) -> None:
    def no_weights(device: str) -> Device:
        raise InputError("no weights", expected="weights", remedy="Give --vae.")

    stage = Stage(prepare=lambda i: i, setup=no_weights, run=lambda device, value: value)
    with pytest.raises(InputError, match="no weights"):
        list(stream([1, 2], stage, EngineOptions(name=backend)))


def test_closing_early_stops_the_work() -> None:
    started: list[int] = []

    def note(item: int) -> int:
        started.append(item)
        return item

    stage = Stage(prepare=note, setup=Device, run=lambda device, value: device.square(value)[1])
    outcomes = stream(range(1000), stage, EngineOptions(devices=("a",)))
    next(outcomes)
    outcomes.close()
    assert len(started) < 64


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(InputError, match="dask, ray or inline"):
        EngineOptions(name="spark")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Task:
    name: str
    value: int


def halve(task: Task) -> int:
    if task.value % 2:
        raise InputError(f"{task.value}", expected="an even number", remedy="Skip it.")
    return task.value // 2


def test_the_driver_counts_what_fails_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One log line per item, reasons by name, seconds by part, and no file of progress is left behind."""
    location = LocalLocation(tmp_path)
    seen: list[int | None] = []
    shown: list[dict[str, object] | None] = []

    def on_outcome(outcome: Outcome[Task, int]) -> dict[str, int]:
        seen.append(outcome.value)
        shown.append(read_progress(location))
        return {} if outcome.value is None else {"slices": outcome.value}

    tasks = [Task(f"{n:016x}", n) for n in (2, 3, 4)]
    stage: Stage[Task, int, str, int] = Stage(prepare=halve, setup=str, run=lambda state, half: half)
    with caplog.at_level("INFO", "ctpipe.decode"):
        totals = run_stage(
            tasks, stage, EngineOptions("inline"), name="decode",
            progress=Progress(location, "k", len(tasks), "decode"), on_outcome=on_outcome,
        )  # fmt: skip
    assert seen == [1, None, 2]
    assert list(totals.failed) == [tasks[1].name]
    assert "an even number" in totals.failed[tasks[1].name]
    assert {"prepare", "run"} <= set(totals.seconds)
    assert [found and found["attempted"] for found in shown] == [1, 2, 3]
    assert read_progress(location) is None
    lines = [r.message for r in caplog.records if r.name == "ctpipe.decode"]
    assert [line.split()[0] for line in lines] == ["decoded", "series", "decoded"]
    assert "slices=2" in lines[2]
