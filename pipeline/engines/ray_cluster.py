"""The engine on Ray: CPU tasks prepare, actors that hold the state run, the driver keeps every queue short.

Ray's core API is used rather than Ray Data: an item needs a separate fate (a limit of attempts, a time-out, a dead
node) and Ray Data gives a fate to blocks and jobs. See infra/decisions/0002-engine.md.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from latentcache import CtpipeError, InputError, no_ray_cluster
from pipeline.engines.contract import EngineOptions, Outcome, Stage, attempt, node_facts, timed
from pipeline.engines.job_log import active, key_of, note, start
from pipeline.engines.ray_scheduling import Lane, Waiting, fill

log = logging.getLogger("ctpipe.engine")


def connect(options: EngineOptions) -> Any:
    """The module ``ray``, connected to the cluster at ``ray_address`` or to one started on this machine.

    Raises:
        InputError: Ray is not installed, no cluster answers, it does not start here, or it has too few GPUs.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed",
            expected="the extra `ray`",
            remedy="pip install 'ctpipe[ray]', or use --engine dask.",
        ) from error
    if not ray.is_initialized():
        _init(ray, options)
    found = float(ray.cluster_resources().get("GPU", 0))
    wanted = len(options.devices) * options.gpus_per_worker
    if options.wants_gpu and found < wanted:
        raise InputError(
            f"a Ray cluster with {found:g} GPUs",
            expected=f"at least {wanted:g}",
            remedy="Give fewer --gpus, or --gpus 0 to encode on CPUs, or wait until GPU nodes have joined.",
        )
    return ray


def dashboard_of(options: EngineOptions) -> Callable[[], str | None]:
    """Asks for the address of Ray's dashboard, where this process works on a cluster that has one; else None."""

    def ask() -> str | None:
        ray = sys.modules.get("ray")  # never imported for this alone
        if options.name != "ray" or ray is None or not ray.is_initialized():
            return None
        address = ray._private.worker.get_dashboard_url()
        return f"http://{address}" if address else None

    return ask


STARTS = 6
"""Attempts at a Ray of this machine's own. Each gets 30 s from Ray, whatever the load."""


def _init(ray: Any, options: EngineOptions) -> None:
    local = options.ray_address in (None, "local")
    settings: dict[str, Any] = {"num_cpus": max(2, len(options.devices) + 1)} if local else {}
    for left in reversed(range(STARTS)):
        try:
            ray.init(
                address="local" if local else options.ray_address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **settings,
            )
            return
        except ConnectionError as error:
            raise no_ray_cluster() from error
        except Exception as error:
            # Ray gives its own processes 30 s, which a busy machine may not keep; it raises a bare Exception then.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise InputError(
                    f"Ray did not start on this machine in {STARTS} attempts",
                    expected="its processes up within 30 s",
                    remedy="Make the machine less busy, or use --engine dask.",
                ) from error
            log.warning("Ray did not start within 30 s; trying again")


T = TypeVar("T")
P = TypeVar("P")
S = TypeVar("S")
R = TypeVar("R")


class Host:
    """Body of an actor: one state on one device. ``run`` takes the outcome of preparing."""

    def __init__(self, stage: Stage[Any, Any, Any, Any], device: str, attempts: int, json_lines: bool) -> None:
        if json_lines:
            start()
        self.stage, self.attempts = stage, attempts
        self.problem: CtpipeError | None = None
        try:
            self.state = stage.setup(device)
        except CtpipeError as error:  # told by ``facts``: Ray would hand it over as text
            self.problem = error

    def facts(self) -> tuple[str, dict[str, str], CtpipeError | None]:
        import ray

        return ray.util.get_node_ip_address(), node_facts(), self.problem

    def run(self, prepared: Outcome[Any, Any]) -> Outcome[Any, Any]:
        if prepared.error is not None:
            return prepared
        outcome = attempt(
            prepared.item, self.attempts, lambda s: timed(s, "run", lambda: self.stage.run(self.state, prepared.value))
        )
        outcome.seconds.update(prepared.seconds)
        return outcome


def _prepare(stage: Stage[Any, Any, Any, Any], item: Any, attempts: int, json_lines: bool = False) -> Outcome[Any, Any]:
    if json_lines:
        start()
    return attempt(item, attempts, lambda s: timed(s, "prepare", lambda: stage.prepare(item)))


class Cluster:
    """The lanes' way to Ray: the stage in the object store, how to make an actor, and how an item gets to one."""

    def __init__(self, ray: Any, stage: Stage[Any, Any, Any, Any], options: EngineOptions) -> None:
        self.ray, self.options = ray, options
        self._json_lines = active()
        self._stage = ray.put(stage)
        # The driver counts what dies: left to itself, Ray tries a task that ran out of memory again for ever.
        self._prepare = ray.remote(num_cpus=0.5, max_retries=0)(_prepare)
        gpus = options.gpus_per_worker if options.wants_gpu else 0
        # Actors are spread, so that the loss of a node costs as few of them as can be.
        self._host = ray.remote(num_cpus=0.5, num_gpus=gpus, scheduling_strategy="SPREAD")(Host)

    def actor(self) -> Any:
        device = "cuda" if self.options.wants_gpu else "cpu"
        return self._host.remote(self._stage, device, self.options.attempts, self._json_lines)

    def send(self, actor: Any, item: Any) -> Any:
        return actor.run.remote(self._prepare.remote(self._stage, item, self.options.attempts, self._json_lines))


def ray_stream(items: Iterable[T], stage: Stage[T, P, S, R], options: EngineOptions) -> Iterator[Outcome[T, R]]:
    """Run a stage on Ray. An item that outlives ``losses`` workers, or outlasts the time-out, is excluded.

    A worker that cannot start (it does not see the store, has no CUDA, runs another version) is named in a warning and
    the others do its work; when none is left, its reason is raised.

    Raises:
        InputError: Ray is not installed or not there, too few GPUs, or no worker can start.
    """
    ray = connect(options)
    cluster = Cluster(ray, stage, options)
    lanes: list[Lane[T]] = [Lane(cluster) for _ in options.devices]
    try:
        yield from drive(ray, lanes, Waiting(iter(items)), options)
    finally:
        for lane in lanes:
            ray.kill(lane.actor)


def drive(ray: Any, lanes: list[Lane[T]], waiting: Waiting[T], options: EngineOptions) -> Iterator[Outcome[T, Any]]:
    """Keep lanes filled and yield what lands, until nothing waits and nothing flies."""
    begun = False
    while True:
        fill(lanes, waiting, options.prefetch)
        begun = begun or any(lane.ready for lane in lanes)
        heads = {lane.queue[0].ref: lane for lane in lanes if lane.queue}
        starting = {lane.starting: lane for lane in lanes if lane.starting is not None}
        if not heads:
            if any(lane.ready for lane in lanes):
                return  # workers are ready and nothing is left for them
            if not starting:
                raise next(lane.refused for lane in lanes if lane.refused is not None)
            _check_patience(lanes, options, begun)
        done, _ = ray.wait([*heads, *starting], num_returns=1, timeout=1.0)
        for ref in done:
            if ref in starting:
                starting[ref].admit()
            elif (outcome := _land(ray, heads[ref], waiting, options)) is not None:
                yield outcome
        for lane in lanes:
            if (overdue := _overdue(lane, waiting, options)) is not None:
                yield overdue


def _land(ray: Any, lane: Lane[T], waiting: Waiting[T], options: EngineOptions) -> Outcome[T, Any] | None:
    """Take the head's outcome. If its worker died, the head is suspected, and its whole queue goes on alone."""
    head = lane.queue[0]
    try:
        outcome: Outcome[T, Any] = ray.get(head.ref)
    except ray.exceptions.RayError as error:
        head.lost += 1
        said = f"a worker was lost ({type(error).__name__}); its work is sent to another"
        note(log, "worker_lost", logging.WARNING, said, series_key=key_of(head.item), error=type(error).__name__)
        if isinstance(error, ray.exceptions.RayActorError):
            _, *others = lane.restart()
            for other in others:
                other.alone = True
                waiting.put(other)
        else:  # the task that prepared it died; the actor and the rest of its queue live
            lane.pop()
        if head.lost >= options.losses:
            reason = f"{head.lost} workers died on it ({type(error).__name__}), most likely out of memory"
            return Outcome(head.item, error=reason, error_kind="WorkerDied", attempts=head.lost)
        head.alone = True
        waiting.put(head)
        return None
    lane.pop()
    return outcome


def _overdue(lane: Lane[T], waiting: Waiting[T], options: EngineOptions) -> Outcome[T, Any] | None:
    if options.timeout_s is None or not lane.queue or time.monotonic() - lane.since < options.timeout_s:
        return None
    head, *others = lane.restart()
    for other in others:
        waiting.put(other)
    reason = f"took longer than {options.timeout_s:.0f} s"
    return Outcome(head.item, error=reason, error_kind="Timeout", attempts=head.lost + 1)


def _check_patience(lanes: list[Lane[Any]], options: EngineOptions, begun: bool) -> None:
    """Raises InputError when no worker has become ready for too long."""
    waited = time.monotonic() - max(lane.since for lane in lanes if lane.starting is not None)
    if waited > options.start_timeout_s:
        raise InputError(
            f"no Ray worker {'is left' if begun else 'could be placed'} after {waited:.0f} s of waiting",
            expected="a node with free CPUs" + (" and GPUs" if options.wants_gpu else ""),
            remedy="Look at `ray status`; add nodes, or give fewer --gpus. Run the same command again to resume.",
        )
