"""The service: a receiver, a watched folder, a worker and a sender per destination, around one queue."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

from pipeline.engines import note
from pipeline.identity import PrivateStore
from pipeline.serve.config import ServeConfig, check_config
from pipeline.serve.contract import Interpolate
from pipeline.serve.delivery import Deliverer, destinations
from pipeline.serve.monitoring import Monitoring
from pipeline.serve.node import Commitment, Intake, Receiver, client_tls
from pipeline.serve.state import Folders, Queue, remove_path
from pipeline.serve.watch import Watch
from pipeline.serve.worker import Worker
from pipeline.writing.pacs import Destination

log = logging.getLogger("ctpipe.serve")


LOOK_EVERY_S = 0.5
TIDY_EVERY_S = 300.0
FLUSH_EVERY_S = 2.0
LATE_AFTER_QUIETS = 20
Step = Callable[[], object]


class Service:
    """Runs from :meth:`start` to :meth:`stop`; a kill in between loses nothing that was acknowledged."""

    def __init__(
        self,
        config: ServeConfig,
        interpolate: Interpolate,
        *,
        send_to: dict[str, Destination] | None = None,
    ) -> None:
        """Open the state folder and take up what was left.

        Args:
            interpolate: Makes the thin series of one thick one.
            send_to: Destinations by name, instead of those that the configuration describes.

        Raises:
            InputError: The configuration does not hold together, or another service runs on the state folder.
        """
        check_config(config)
        self.config = config
        self.folders = Folders(config.state)
        self.folders.make()
        self._lock_file = self.folders.lock()
        self.queue = Queue(self.folders.queue)
        self.queue.restart()
        left = self.folders.sweep(self.queue.known_files(), self.queue.known_results())
        if left:
            note(log, "swept", files=left)
        keys = PrivateStore.open(str(config.state), create=True).keys
        self.intake = Intake(self.folders, self.queue, keys, config.limits)
        self.worker = Worker(config, self.folders, self.queue, interpolate)
        given = destinations(config.destinations) if send_to is None else send_to
        self._deliverers = [Deliverer(name, to, self.queue, self.folders, config.timing) for name, to in given.items()]
        tls = client_tls(config.listen.tls) if config.listen and config.listen.tls else None
        self._commitment = Commitment(config, self.queue, keys, tls)
        object_bytes = config.limits.object_mib << 20
        self._watch = (
            Watch(config.watch, self.intake, self.queue, keys, object_bytes=object_bytes) if config.watch else None
        )
        self.receiver: Receiver | None = None
        self.monitoring: Monitoring | None = None
        self._stopping = threading.Event()
        self._threads: dict[str, threading.Thread] = {}

    def start(self) -> None:
        """Begin to listen and to work."""
        config = self.config
        if config.listen is not None:
            self.receiver = Receiver(
                config, self.intake, self.queue, lambda title: self._commitment.peer(title) is not None
            )
        steps: dict[str, tuple[Step, float]] = {
            "worker": (self._work, LOOK_EVERY_S),
            "upkeep": (self.tidy, TIDY_EVERY_S),
            "counters": (self.queue.flush_counters, FLUSH_EVERY_S),
        }
        for deliverer in self._deliverers:
            steps[f"delivery to {deliverer.name}"] = (deliverer.step, LOOK_EVERY_S)
        if self._watch is not None and config.watch is not None:
            watch = self._watch
            steps["watch"] = (lambda: watch.step(self._stopping.is_set) and None, config.watch.every_s)
        if config.storage_commitment:
            steps["commitment"] = (lambda: self._commitment.step() and None, LOOK_EVERY_S)
        for name, (step, pause) in steps.items():
            self._threads[name] = threading.Thread(target=self._repeat, args=(name, step, pause), daemon=True)
            self._threads[name].start()
        if config.monitoring is not None:
            self.monitoring = Monitoring(config.monitoring, self.state)
        note(log, "serving", port=self.receiver.port if self.receiver else 0, rules=len(config.rules))

    def stop(self) -> None:
        """Stop listening, let work and deliveries in hand end, and close."""
        self._stopping.set()
        if self.receiver is not None:
            self.receiver.close()
        for thread in self._threads.values():
            thread.join()
        if self.monitoring is not None:
            self.monitoring.close()
        self.queue.close()
        self._lock_file.close()
        note(log, "stopped")

    def state(self) -> dict[str, Any]:
        """Return figures and problems, for health, metrics and status."""
        state = self.queue.summary()
        dead = [name for name, thread in self._threads.items() if not thread.is_alive()]
        problems = [f"{name} has stopped" for name in dead]
        if not self.intake.has_room():
            problems.append("no room on the disk")
        late = self.config.timing.unfinished_quiet_s + LATE_AFTER_QUIETS * max(self.config.timing.quiet_s, 60.0)
        if state["oldest_waiting_s"] > late:
            problems.append("a study has waited for long")
        if any(by_state.get("refused") for by_state in state["deliveries"].values()):
            problems.append("a destination refuses results")
        return state | {
            "oldest_waiting_seconds": state["oldest_waiting_s"],
            "disk_free_bytes": self.folders.free_bytes(),
            "associations": self.receiver.associations if self.receiver else 0,
            "problems": problems,
            "dead": dead,
        }

    def tidy(self) -> None:
        """Delete images and results whose time is over; what is recorded of them stays, so that nothing comes twice."""
        before = self.queue.clock() - self.config.timing.keep_h * 3600
        for study_key in self.queue.expired(before):
            gone = self.queue.forget_files(study_key, before)
            if gone is None:
                continue
            for sop_key in gone:
                self.intake.delete(study_key, sop_key)
            remove_path(self.folders.results / study_key)

    def _work(self) -> object:
        """Work on one study, unless the disk is too full to write its result."""
        if not self.intake.has_room():
            return None
        return self.worker.step()

    def _repeat(self, name: str, step: Step, pause: float) -> None:
        """Repeat a step until the service stops, at once while there is something to do.

        A full disk or a locked file passes: such an error is logged and the step tried again.
        """
        while not self._stopping.is_set():
            try:
                more = step()
            except (OSError, sqlite3.Error) as error:
                note(log, "step_failed", logging.ERROR, step=name.replace(" ", "_"), error=type(error).__name__)
                more = None
                self._stopping.wait(5.0)
            if not more:
                self._stopping.wait(pause)
