"""A DICOM server that a hostile peer cannot exhaust: what pynetdicom leaves unbounded, bounded below it.

pynetdicom reads whatever length a PDU header claims (up to 4 GiB), gathers a message without limit, shakes hands for
TLS in the thread that accepts connections, and starts two threads for every connection. PDU form: DICOM PS3.8 9.3.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from latentcache import missing_extra
from pipeline.engines import note
from pipeline.serve.config import LimitsConfig

try:
    from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer
except ModuleNotFoundError as error:
    raise missing_extra("pynetdicom", "pacs", "ctpipe serve") from error

log = logging.getLogger("ctpipe.serve")


HEADER_BYTES = 6
SPARE_CONNECTIONS = 16
"""Beyond the associations: connections that wait to be rejected in DICOM's own words."""
HOSTS_REMEMBERED = 4096
_CHUNK = 1 << 16


class PeerViolation(OSError):  # noqa: N818 - an OSError, since that is what pynetdicom ends a connection for
    """The peer broke a limit; the connection ends."""


class GuardedSocket(AssociationSocket):  # type: ignore[misc]
    """Reads PDUs up to a length and a time; counts the bytes of the message that is under way."""

    def __init__(self, assoc: Any, client: socket.socket, limits: LimitsConfig, count: Callable[[str], None]) -> None:
        self._limits, self._count = limits, count
        self._message_bytes, self._message_from = 0, 0.0
        super().__init__(assoc, client_socket=client)

    def message_complete(self) -> None:
        """Count anew: whatever comes next belongs to another message."""
        self._message_bytes = 0

    def recv(self, nr_bytes: int) -> bytearray:
        """Return ``nr_bytes`` from the peer, fewer where it hangs up. Raises PeerViolation past a limit."""
        now = time.monotonic()
        if self._message_bytes == 0:
            self._message_from = now
        self._message_bytes += nr_bytes
        if nr_bytes > max(HEADER_BYTES, self._limits.pdu_bytes):
            self._violated("pdu_too_long")
        if self._message_bytes > (self._limits.object_mib << 20) + self._limits.pdu_bytes:
            self._violated("object_too_large")
        if now - self._message_from > self._limits.object_timeout_s:
            self._violated("object_too_slow")
        peer, until = self.socket, now + self._limits.pdu_timeout_s
        received = bytearray()
        while peer is not None and len(received) < nr_bytes:
            left = until - time.monotonic()
            if left <= 0:
                self._violated("pdu_too_slow")
            peer.settimeout(left)
            try:
                part = peer.recv(min(_CHUNK, nr_bytes - len(received)))
            except TimeoutError:
                self._violated("pdu_too_slow")
            if not part:
                break
            received += part
        if peer is not None:
            peer.settimeout(self._limits.idle_timeout_s)
        return received

    def _violated(self, what: str) -> None:
        self._count(f"violations_{what}")
        note(log, "peer_violation", logging.WARNING, what=what)
        self._shutdown_socket()
        raise PeerViolation(what)

    def _shutdown_socket(self) -> None:
        """Close for good even where the shutdown fails because the peer is gone already."""
        if self.socket is not None:
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                log.debug("a connection was gone already (%s)", type(error).__name__)
            self.socket.close()


class _Handler(RequestHandler):  # type: ignore[misc]
    """Gives every association a guarded socket."""

    server: GuardedServer

    def _create_association(self) -> Any:
        association = super()._create_association()
        association.dul.event_queue.get_nowait()  # the new socket announces the connection again
        association.dul.socket = GuardedSocket(association, self.request, self.server.limits, self.server.count)
        return association


class GuardedServer(ThreadedAssociationServer):  # type: ignore[misc]
    """Refuses connections beyond a number and a rate per host before anything is spent on them."""

    daemon_threads = True
    request_queue_size = 64
    limits: LimitsConfig
    count: Callable[[str], None]
    hosts: frozenset[str]

    def __init__(
        self,
        *args: Any,
        limits: LimitsConfig,
        count: Callable[[str], None],
        hosts: frozenset[str] = frozenset(),
        **options: Any,
    ) -> None:
        """``hosts``: addresses that may connect; empty for any."""
        self.limits, self.count, self.hosts = limits, count, hosts
        self._pending, self._gate = 0, threading.Lock()
        self._recent: OrderedDict[str, deque[float]] = OrderedDict()
        super().__init__(*args, request_handler=_Handler, **options)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether a connection may go on; otherwise it is closed at once."""
        host = str(client_address[0])
        reason = ""
        with self._gate:
            if self.hosts and host not in self.hosts:
                reason = "unknown_host"
            elif not self._within_rate(host):
                reason = "rate"
            elif self._pending + len(self.active_associations) >= self.limits.associations + SPARE_CONNECTIONS:
                reason = "too_many"
            else:
                self._pending += 1
        if reason:
            self.count(f"connections_refused_{reason}")
        return not reason

    def _within_rate(self, host: str) -> bool:
        now = time.monotonic()
        times = self._recent.setdefault(host, deque())
        self._recent.move_to_end(host)
        while len(self._recent) > HOSTS_REMEMBERED:
            self._recent.popitem(last=False)
        while times and now - times[0] > 60.0:
            times.popleft()
        if len(times) >= self.limits.connections_per_minute:
            return False
        times.append(now)
        return True

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the TLS handshake comes later, in the connection's own thread."""
        assert self.socket is not None
        client, address = self.socket.accept()
        client.settimeout(self.limits.pdu_timeout_s)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client, address

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Shake hands where TLS is on, and start the association."""
        try:
            if self.ssl_context is not None:
                request = self.ssl_context.wrap_socket(request, server_side=True)
            self.finish_request(request, client_address)
        except (OSError, ssl.SSLError) as error:
            self.count("connections_refused_tls" if isinstance(error, ssl.SSLError) else "connections_lost")
            note(log, "connection_failed", logging.WARNING, error=type(error).__name__)
            request.close()
        finally:
            with self._gate:
                self._pending -= 1

    def process_request(self, request: Any, client_address: Any) -> None:
        """Go on in a thread of the connection's own."""
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        thread.start()

    def service_actions(self) -> None:
        """Skip pynetdicom's garbage collection on every sixtieth look: it stops all threads."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count instead of printing a traceback, which would name the peer's address and values."""
        self.count("connections_failed")
