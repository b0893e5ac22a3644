"""The contract of every engine: a stage of three functions, its outcomes, and the options that choose where it runs."""

from __future__ import annotations

import itertools
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Generic, Literal, TypeVar

from latentcache import CtpipeError, InputError
from pipeline.engines.job_log import key_of, note

log = logging.getLogger("ctpipe.engine")


T = TypeVar("T")
P = TypeVar("P")
S = TypeVar("S")
R = TypeVar("R")


EngineName = Literal["dask", "ray", "inline"]


@dataclass(frozen=True)
class EngineOptions:
    """Options that say where work runs.

    Attributes:
        name: ``dask`` (embedded threads, or a cluster when ``scheduler`` is given), ``ray``, or ``inline`` (one thread,
            nothing imported: for tests and debugging).
        devices: One entry a state: torch device names. Two GPUs are ``("cuda:0", "cuda:1")``. On a cluster only their
            number and kind count; each worker sees the devices of its node.
        gpus_per_worker: Share of a GPU that one Ray actor reserves.
        prefetch: Items prepared ahead of each device; bounds memory.
        attempts: Tries an item gets before it is excluded. Errors meant for users are not tried again.
        losses: Workers of a cluster that may die on one item before it is excluded. More than ``attempts``, because a
            node that is taken away is not the item's fault.
        scheduler: Address of a dask scheduler, e.g. ``tcp://host:8786``.
        ray_address: Address of a Ray cluster, ``auto``, or None to start Ray on this machine.
        start_timeout_s: Seconds that Ray may take until any worker is ready (autoscaled nodes take minutes).
        timeout_s: Seconds an item may take on Ray before its worker is killed and it is excluded; None for no limit.
            Threads and dask workers cannot be interrupted.
    """

    name: EngineName = "dask"
    devices: tuple[str, ...] = ("cpu",)
    gpus_per_worker: float = 1.0
    prefetch: int = 1
    attempts: int = 2
    losses: int = 3
    scheduler: str | None = None
    ray_address: str | None = None
    start_timeout_s: float = 900.0
    timeout_s: float | None = None

    @property
    def wants_gpu(self) -> bool:
        return any(device.startswith("cuda") for device in self.devices)

    def __post_init__(self) -> None:
        if self.name not in ("dask", "ray", "inline"):
            raise InputError(f"engine {self.name!r}", expected="dask, ray or inline", remedy="Use --engine dask.")


@dataclass(frozen=True)
class Outcome(Generic[T, R]):
    """Outcome of one item: a value, or the reason why there is none."""

    item: T
    value: R | None = None
    error: str | None = None
    error_kind: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: int = 1

    @property
    def ok(self) -> bool:
        return self.error is None


@dataclass(frozen=True)
class Stage(Generic[T, P, S, R]):
    """The three functions of a stage. All must be picklable for the cluster engines."""

    prepare: Callable[[T], P]
    setup: Callable[[str], S]
    run: Callable[[S, P], R]


def attempt(item: T, attempts: int, action: Callable[[dict[str, float]], R]) -> Outcome[T, R]:
    """Run ``action`` up to ``attempts`` times and log what it took. Errors meant for users end it at once."""
    outcome = _attempt(item, attempts, action)
    if log.isEnabledFor(logging.INFO):
        for stage, seconds in outcome.seconds.items():
            note(
                log,
                "stage",
                series_key=key_of(item),
                stage=stage,
                seconds=round(seconds, 6),
                outcome=outcome.error_kind or "ok",
                attempts=outcome.attempts,
            )
    return outcome


def _attempt(item: T, attempts: int, action: Callable[[dict[str, float]], R]) -> Outcome[T, R]:
    for number in itertools.count(1):
        seconds: dict[str, float] = {}
        try:
            return Outcome(item, action(seconds), seconds=seconds, attempts=number)
        except CtpipeError as error:
            return Outcome(item, error=str(error), error_kind=type(error).__name__, seconds=seconds, attempts=number)
        except MemoryError:
            reason = "out of memory; give fewer --workers or a smaller --memory-gib"
            return Outcome(item, error=reason, error_kind="MemoryError", seconds=seconds, attempts=number)
        except Exception as error:
            if number >= attempts:
                log.error(
                    "item set aside after %d attempts: %s",
                    number,
                    type(error).__name__,
                    exc_info=log.isEnabledFor(logging.DEBUG),
                )
                reason = f"{type(error).__name__} (unexpected; `ctpipe --debug` shows the traceback)"
                return Outcome(item, error=reason, error_kind=type(error).__name__, seconds=seconds, attempts=number)
    raise AssertionError("unreachable")


def timed(seconds: dict[str, float], name: str, action: Callable[[], R]) -> R:
    """Run ``action`` and note its wall time under ``name``."""
    start = time.perf_counter()
    try:
        return action()
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def chain(
    item: T, stage: Stage[T, P, S, R], on_device: Callable[[Callable[[S], R]], R]
) -> Callable[[dict[str, float]], R]:
    """prepare, then run on a device that ``on_device`` lends; times both, waiting not counted."""

    def action(seconds: dict[str, float]) -> R:
        prepared = timed(seconds, "prepare", lambda: stage.prepare(item))
        return on_device(lambda state: timed(seconds, "run", lambda: stage.run(state, prepared)))

    return action


def node_facts() -> dict[str, str]:
    """Return the versions that must be equal on every node."""
    return {"ctpipe": version("ctpipe"), "python": ".".join(platform.python_version_tuple()[:2])}


def check_nodes(facts: dict[str, dict[str, str]]) -> None:
    """Raises InputError when a node runs another ctpipe or Python than the driver; ``facts`` by node address."""
    mine = node_facts()
    for node, theirs in facts.items():
        if theirs != mine:
            raise InputError(
                f"node {node} runs ctpipe {theirs['ctpipe']} on Python {theirs['python']}",
                expected=f"ctpipe {mine['ctpipe']} on Python {mine['python']} as on the driver",
                remedy="Start every node from the same image.",
            )
