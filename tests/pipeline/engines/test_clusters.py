"""The engine's contract on a dask cluster and on Ray, with workers that die, hang and cannot start."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentcache import InputError
from pipeline.engines import EngineOptions, Outcome, Stage, job_log as log_lines, ray_cluster, stream
from pipeline.engines.contract import check_nodes, node_facts

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def prepare(item: int) -> int:
    if item == 5:
        raise InputError("item 5", expected="another", remedy="Skip it.")
    return item


def run(state: str, item: int, *, folder: str = "") -> int:
    if item == 7:
        os._exit(9)
    if item == 3 and folder:
        mark = Path(folder) / "tried"
        if not mark.exists():
            mark.touch()
            os._exit(9)
    if item == 11:
        (Path(folder) / "hangs").touch()
        time.sleep(600)
    assert state == "state of cpu"
    return item * item


def setup(device: str) -> str:
    return f"state of {device}"


def setup_without_store(device: str) -> str:
    raise InputError("no store at this path", expected="a store that workers see", remedy="Use a shared path.")


@pytest.fixture(scope="module")
def dask_scheduler() -> Iterator[str]:
    import cloudpickle
    from distributed import LocalCluster

    # Workers cannot import a test module: its functions travel by value.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs=50) as cluster:
            yield cluster.scheduler_address


@pytest.fixture(scope="module")
def ray_session(ray_session: None) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_dask_cluster_gives_every_item_one_outcome(dask_scheduler: str) -> None:
    stage = Stage(prepare=prepare, setup=setup, run=run)
    items = [i for i in range(40) if i not in (7, 11)]
    outcomes = list(stream(items, stage, EngineOptions(scheduler=dask_scheduler)))
    assert sorted(o.item for o in outcomes) == items
    assert {o.item for o in outcomes if not o.ok} == {5}
    assert all(o.value == o.item**2 for o in outcomes if o.ok)
    assert all({"prepare", "run"} <= set(o.seconds) for o in outcomes if o.ok)


def test_ray_outlives_a_dead_worker_and_a_poison_pill(ray_session: None, tmp_path: Path) -> None:
    stage = Stage(prepare=prepare, setup=setup, run=functools.partial(run, folder=str(tmp_path)))
    options = EngineOptions(name="ray", devices=("cpu", "cpu"), losses=2)
    items = [i for i in range(20) if i != 11]
    outcomes = {o.item: o for o in stream(items, stage, options)}
    assert sorted(outcomes) == items
    assert {i: o.error_kind for i, o in outcomes.items() if not o.ok} == {5: "InputError", 7: "WorkerDied"}
    assert outcomes[3].value == 9
    assert "2 workers died" in str(outcomes[7].error)


@pytest.mark.parametrize("slow", [0, 5, 6])
def test_a_ray_that_a_busy_machine_does_not_start_in_time_is_started_again(slow: int) -> None:
    starts: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        starts.append(settings)
        if len(starts) <= slow:
            raise Exception("The current node timed out during startup.")

    ray = SimpleNamespace(init=init, shutdown=lambda: None)
    if slow < ray_cluster.STARTS:
        ray_cluster._init(ray, EngineOptions(name="ray"))
        assert len(starts) == slow + 1
    else:
        with pytest.raises(InputError, match="in 6 attempts"):
            ray_cluster._init(ray, EngineOptions(name="ray"))


def test_ray_sets_a_hanging_item_aside(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's clock is past the limit while the item hangs and is its lane's head, and right otherwise: the test
    waits for nothing, and a slow machine sets no other item aside."""
    outcomes: dict[int, Outcome[int, int]] = {}

    def clock() -> float:
        hangs = 1 in outcomes and 11 not in outcomes and (tmp_path / "hangs").exists()
        return time.monotonic() + (10_000.0 if hangs else 0.0)

    monkeypatch.setattr(ray_cluster, "time", SimpleNamespace(monotonic=clock))
    stage = Stage(prepare=prepare, setup=setup, run=functools.partial(run, folder=str(tmp_path)))
    for outcome in stream([1, 11, 2], stage, EngineOptions(name="ray", timeout_s=5_000.0)):
        outcomes[outcome.item] = outcome
    assert sorted(outcomes) == [1, 2, 11]
    assert (outcomes[11].error_kind, outcomes[2].value) == ("Timeout", 4)


@dataclass(frozen=True)
class Keyed:
    name: str


def as_it_is(item: Keyed) -> Keyed:
    return item


def name_of(state: str, item: Keyed) -> str:
    return item.name


def worker_lines() -> list[dict[str, Any]]:
    """What Ray's workers of this session have logged as JSON."""
    import ray

    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    text = "".join(path.read_text() for path in logs.glob("worker-*.err"))
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]


def test_rays_workers_log_json_when_the_driver_does(ray_session: None) -> None:
    root, ours = logging.getLogger(), logging.getLogger(log_lines.OURS)
    handlers, level = root.handlers[:], ours.level
    items = [Keyed(f"{n:016x}") for n in range(4)]
    try:
        log_lines.start()
        list(stream(items, Stage(as_it_is, setup, name_of), EngineOptions(name="ray")))
    finally:
        root.handlers[:] = handlers
        ours.setLevel(level)
    wanted = {(item.name, stage) for item in items for stage in ("prepare", "run")}
    until = time.monotonic() + 300
    while not wanted <= {(line["series_key"], line["stage"]) for line in worker_lines() if line["event"] == "stage"}:
        assert time.monotonic() < until, worker_lines()
        time.sleep(0.2)
    assert all({"level", "node", "seconds", "outcome"} <= line.keys() for line in worker_lines())


def test_ray_says_why_a_worker_cannot_start(ray_session: None) -> None:
    stage = Stage(prepare=prepare, setup=setup_without_store, run=run)
    with pytest.raises(InputError, match=r"no store at this path|could not start"):
        list(stream([1], stage, EngineOptions(name="ray")))


def test_ray_without_gpus_says_so_before_any_work(ray_session: None) -> None:
    stage = Stage(prepare=prepare, setup=setup, run=run)
    with pytest.raises(InputError, match=r"0 GPUs; expected at least 2"):
        list(stream([1], stage, EngineOptions(name="ray", devices=("cuda:0", "cuda:1"))))


def test_nodes_of_another_version_are_named() -> None:
    with pytest.raises(InputError, match=r"node n2 runs ctpipe 9\.9"):
        check_nodes({"n1": node_facts(), "n2": {**node_facts(), "ctpipe": "9.9"}})


def test_a_scheduler_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("Timed out trying to connect")

    monkeypatch.setattr(distributed, "Client", unreachable)
    with pytest.raises(InputError, match="dask scheduler does not answer"):
        list(stream([1], Stage(prepare, setup, run), EngineOptions(scheduler="tcp://127.0.0.1:1")))
