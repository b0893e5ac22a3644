"""Answers of a PACS reach the sender, however late pynetdicom's reactor thread notices that it is held."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE, association, dimse, evt

from pipeline.writing.pacs import CStore, send_folder
from pipeline.writing.pacs.checkpoint import Checkpoint
from tests.pipeline.writing.pacs.test_send import free_port, series  # noqa: F401 - a fixture

LATE_S = 0.1
"""What a busy machine keeps the reactor's thread from running after it has passed; the sender's, twice that."""


class LateEvent(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        passed = super().wait(timeout)
        time.sleep(LATE_S)
        return passed


def test_no_answer_is_lost_to_a_reactor_that_passes_late(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin, wait, take = association.Association.__init__, Checkpoint.wait, dimse.DIMSEServiceProvider.get_msg

    def late_event(self: association.Association, *args: object, **kwargs: object) -> None:
        begin(self, *args, **kwargs)
        self._reactor_checkpoint = LateEvent()
        self._reactor_checkpoint.set()

    def late_gate(self: Checkpoint, timeout: float | None = None) -> bool:
        passed = wait(self, timeout)
        time.sleep(LATE_S)
        return passed

    def late_sender(self: dimse.DIMSEServiceProvider, block: bool = False) -> Any:
        if block:
            time.sleep(2 * LATE_S)
        return take(self, block)

    entity = AE("PACS")
    entity.add_supported_context("1.2.840.10008.5.1.4.1.1.2", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.80"])
    port = free_port()
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda event: 0)])
    monkeypatch.setattr(association.Association, "__init__", late_event)
    monkeypatch.setattr(Checkpoint, "wait", late_gate)
    monkeypatch.setattr(dimse.DIMSEServiceProvider, "get_msg", late_sender)
    try:
        summary = send_folder(series, CStore("127.0.0.1", port, "PACS", timeout_s=5), attempts=1)
    finally:
        server.shutdown()
    assert (summary.sent, summary.left, summary.reason) == (7, [], "")


def test_shutting_the_gate_waits_until_the_reactor_is_held() -> None:
    steps: list[str] = []

    def passing() -> None:
        gate.wait()
        time.sleep(0.2)
        steps.append("passed")
        gate.wait()
        steps.append("let go")

    thread = threading.Thread(target=passing)
    gate = Checkpoint(thread)
    thread.start()
    gate.clear()
    steps.append("held")
    gate.set()
    thread.join()
    gate.clear()  # a reactor that has ended holds nobody up
    assert steps == ["passed", "held", "let go"]


def test_the_reactor_itself_never_waits_for_itself() -> None:
    gate = Checkpoint(threading.current_thread())
    gate.clear()
    assert not gate.is_set()
    gate.set()
    assert gate.wait(0)
