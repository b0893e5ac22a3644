"""A gate for pynetdicom's reactor thread that is shut when it says so."""

from __future__ import annotations

import threading
from typing import Any


class Checkpoint:
    """Gate at which an association's reactor thread waits while another thread sends; replaces pynetdicom's event.

    The reactor and a sender take messages from one queue. Before it sends, pynetdicom shuts an event and reads a flag
    that says that the reactor waits; but the flag stays up for an instant after the reactor has passed. On a busy
    machine that is long enough: the reactor takes the answer to the request, and the sender waits for it until the
    peer breaks off. Here :meth:`clear` returns when the reactor is held.
    """

    def __init__(self, reactor: threading.Thread) -> None:
        self._reactor = reactor
        self._changed = threading.Condition()
        self._open, self._held = True, 0

    def set(self) -> None:
        """Open the gate."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Shut the gate; returns once the reactor waits at it, has ended, or is the one that calls."""
        with self._changed:
            self._open = False
            if threading.current_thread() is self._reactor:
                return
            while not self._held and not self._open and self._reactor.is_alive():
                self._changed.wait(0.05)

    def is_set(self) -> bool:
        """Whether the gate is open."""
        return self._open

    def wait(self, timeout: float | None = None) -> bool:
        """Pass when the gate is open; ``timeout`` in seconds."""
        with self._changed:
            self._held += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: self._open, timeout)
            finally:
                self._held -= 1


def hold_reactor(association: Any) -> None:
    """Let nothing but the sender take the answers of an established association, a pynetdicom ``Association``."""
    if hasattr(association, "_reactor_checkpoint"):
        association._reactor_checkpoint = Checkpoint(association)
