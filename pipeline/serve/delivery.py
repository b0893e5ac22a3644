"""Bring results to their destinations, again and again until they are there."""

from __future__ import annotations

import logging
from typing import Any

from latentcache import InputError
from pipeline.engines import note
from pipeline.serve.config import DestinationConfig, TimingConfig
from pipeline.serve.state import Delivery, Folders, Queue
from pipeline.writing.pacs import Destination, SendSummary, send_folder

log = logging.getLogger("ctpipe.serve")


def destination_of(name: str, config: DestinationConfig) -> Destination:
    """Return the destination that a section describes.

    Raises:
        InputError: The address is none.
    """
    if config.stow_rs:
        from pipeline.writing.pacs import StowRs

        return StowRs(config.stow_rs, timeout_s=config.timeout_s)
    from pipeline.serve.node import client_tls
    from pipeline.writing.pacs import CStore

    title, _, address = config.c_store.rpartition("@")
    host, _, port = address.rpartition(":")
    if not (title and host and port.isdigit()):
        raise InputError(
            f"destinations.{name}.c_store", expected="AET@HOST:PORT", remedy="For example PACS@10.0.0.5:104."
        )
    tls = client_tls(config.tls) if config.tls else None
    return CStore(host, int(port), title, config.calling_ae, timeout_s=config.timeout_s, tls=tls)


class Deliverer:
    """Sends the results that are due at one destination, one after another."""

    def __init__(
        self, name: str, destination: Destination, queue: Queue, folders: Folders, timing: TimingConfig
    ) -> None:
        self.name = name
        self._destination, self._queue, self._folders, self._timing = destination, queue, folders, timing

    def step(self) -> bool:
        """Send one result; return whether there was one to send.

        Every file of a result keeps its UID, so that what arrives twice after a kill is the same object.
        """
        delivery = self._queue.next_delivery(self.name)
        if delivery is None:
            return False
        base = self._folders.result(delivery.study_key, delivery.revision)
        summary = SendSummary(self.name)
        try:
            for folder in delivery.folders:
                summary = send_folder(base / folder, self._destination, attempts=1)
                if summary.left:
                    break
        except Exception as error:  # noqa: BLE001 - one result must not stop the others; recorded and tried again
            reason = error.found if isinstance(error, InputError) else type(error).__name__
            summary = SendSummary(self.name, left=["?"], reason=reason)
        if summary.left:
            self._failed(delivery, summary)
        else:
            self._queue.delivered(delivery)
            note(log, "delivered", study_key=delivery.study_key, destination=self.name, attempts=delivery.attempt)
        return True

    def _failed(self, delivery: Delivery, summary: SendSummary) -> None:
        """Try again later; what the other side refuses, rather than fails to take, only so often."""
        refused = "refused" in summary.reason or "expected" in summary.reason
        give_up = refused and delivery.refusals + 1 >= self._timing.refusals
        pause = min(self._timing.retry_most_s, self._timing.retry_s * 2.0 ** min(delivery.attempt - 1, 20))
        self._queue.undelivered(delivery, pause, summary.reason[:200], refused=refused, give_up=give_up)
        note(
            log,
            "not_delivered",
            logging.ERROR if give_up else logging.WARNING,
            f"{delivery.study_key} not delivered to {self.name}: {summary.reason[:200]}",
            study_key=delivery.study_key,
            destination=self.name,
            attempts=delivery.attempt,
        )


def destinations(config: dict[str, DestinationConfig]) -> dict[str, Any]:
    """Return every destination by name."""
    return {name: destination_of(name, section) for name, section in config.items()}
