"""The DICOM node: C-STORE and C-ECHO as a provider, storage commitment requests (PS3.4 annexes A, B and J)."""

from __future__ import annotations

import logging
import ssl
import threading
import warnings
from collections.abc import Callable
from typing import Any

from latentcache import InputError
from pipeline.engines import note
from pipeline.reading.codecs import READABLE
from pipeline.serve.config import ANYONE, ListenConfig, PeerConfig, ServeConfig, TlsConfig
from pipeline.serve.intake import Intake
from pipeline.serve.queue import Queue
from pipeline.writing import IMPLEMENTATION_UID, implementation_version

log = logging.getLogger("ctpipe.serve")


ACCEPTED_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}
VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
SUCCESS, NOT_AUTHORISED, PROCESSING_FAILURE, NO_SUCH_ARGUMENT = 0x0000, 0x0124, 0x0110, 0x0114
MAX_COMMITMENT_ITEMS = 50_000


class Receiver:
    """Listens while it is open, and notes when a sender has finished with a study."""

    def __init__(self, config: ServeConfig, intake: Intake, queue: Queue, reachable: Callable[[str], bool]) -> None:
        """``reachable``: whether a commitment report can be brought to an AE title.

        Raises InputError where the port is taken or a certificate cannot be used.
        """
        assert config.listen is not None
        self._config, self._intake, self._queue, self._reachable = config, intake, queue, reachable
        self._under_way: dict[Any, str] = {}
        """The study that each association is sending."""
        self._lock = threading.Lock()
        self._server = self._start(config.listen)
        self.port = int(self._server.server_address[1])

    def _start(self, listen: ListenConfig) -> Any:
        from pipeline.serve.guarded_server import GuardedServer  # first: it names the extra that is missing

        from pynetdicom import AE, _config, evt  # isort: skip

        _config.LOG_HANDLER_LEVEL = "none"
        for name in ("pynetdicom", "pydicom"):  # their messages quote titles and values
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        limits = self._config.limits
        entity = AE(ae_title=listen.ae_title)
        entity.implementation_class_uid = IMPLEMENTATION_UID
        entity.implementation_version_name = implementation_version()
        entity.maximum_pdu_size = limits.pdu_bytes
        entity.maximum_associations = limits.associations
        entity.acse_timeout = limits.pdu_timeout_s
        entity.dimse_timeout = entity.network_timeout = limits.idle_timeout_s
        entity.require_called_aet = True
        titles = {peer.ae_title for peer in self._config.peers}
        if ANYONE not in titles:
            entity.require_calling_aet = sorted(titles)
        entity.add_supported_context(VERIFICATION)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transfer syntaxes newer than pynetdicom's dictionary
            for sop_class in ACCEPTED_CLASSES:
                entity.add_supported_context(sop_class, list(READABLE))
        if self._config.storage_commitment:
            entity.add_supported_context(STORAGE_COMMITMENT)
        handlers = [
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_N_ACTION, self._on_action),
            (evt.EVT_REJECTED, self._on_rejected),
            (evt.EVT_ACCEPTED, self._on_accepted),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, self._on_aborted),
            (evt.EVT_CONN_CLOSE, self._on_aborted),
        ]
        try:
            server = entity.make_server(
                (listen.host, listen.port),
                ae_title=listen.ae_title,
                ssl_context=server_tls(listen.tls) if listen.tls else None,
                evt_handlers=handlers,
                server_class=GuardedServer,
                limits=limits,
                count=self._queue.count,
                hosts=_hosts(self._config.peers),
            )
        except OSError as error:
            raise InputError(
                f"port {listen.port} cannot be listened on ({error.strerror})",
                expected="a free port, above 1023 unless the service may use lower ones",
                remedy="Stop what listens there, or change listen.port.",
            ) from None
        entity._servers.append(server)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
        thread.start()
        return server

    @property
    def associations(self) -> int:
        return len(self._server.active_associations)

    def close(self) -> None:
        """Stop listening; associations that are open are aborted, and their senders will try again."""
        for association in self._server.active_associations:
            association.abort()
        self._server.shutdown()

    # -- events -------------------------------------------------------------------------------------------------

    def _on_echo(self, event: Any) -> int:
        self._complete(event)
        return SUCCESS

    def _on_store(self, event: Any) -> int:
        self._complete(event)
        title = str(event.assoc.requestor.ae_title).strip()
        if not self._authorised(event, title):
            self._queue.count("instances_unauthorised")
            return NOT_AUTHORISED
        taken = self._intake.take(event.encoded_dataset(), title, str(event.request.AffectedSOPInstanceUID))
        if taken.study_key:
            with self._lock:
                before = self._under_way.get(event.assoc)
                self._under_way[event.assoc] = taken.study_key
            if before is not None and before != taken.study_key:
                self._queue.sender_finished([before])  # it went on to another study
        return taken.verdict.status

    def _on_action(self, event: Any) -> tuple[int, None]:
        """Take a request for storage commitment; the report follows on an association of our own (PS3.4 J.3.2)."""
        self._complete(event)
        title = str(event.assoc.requestor.ae_title).strip()
        if not self._config.storage_commitment or not self._authorised(event, title):
            return NOT_AUTHORISED, None
        if not self._reachable(title):
            note(log, "commitment_refused", logging.WARNING)
            return PROCESSING_FAILURE, None
        try:
            request = event.action_information
            transaction = str(request.TransactionUID)
            items = [
                (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
                for item in request.ReferencedSOPSequence
            ]
        except (AttributeError, ValueError, TypeError):
            return NO_SUCH_ARGUMENT, None
        if not items or len(items) > MAX_COMMITMENT_ITEMS:
            return NO_SUCH_ARGUMENT, None
        self._queue.add_commitment(transaction, title, items)
        return SUCCESS, None

    def _on_accepted(self, event: Any) -> None:
        self._complete(event)
        if event.assoc.rejected_contexts:
            self._queue.count("contexts_refused", len(event.assoc.rejected_contexts))

    def _on_rejected(self, event: Any) -> None:
        self._queue.count("associations_rejected")
        note(log, "association_rejected", logging.WARNING)

    def _on_released(self, event: Any) -> None:
        with self._lock:
            study_key = self._under_way.pop(event.assoc, None)
        if study_key is not None:
            self._queue.sender_finished([study_key])

    def _on_aborted(self, event: Any) -> None:
        """Note that a sender broke off; its study stays unfinished, and waits the longer for the rest."""
        with self._lock:
            study_key = self._under_way.pop(event.assoc, None)
        if study_key is not None:
            self._queue.count("senders_broke_off")
            note(log, "sender_broke_off", logging.WARNING, study_key=study_key)

    def _complete(self, event: Any) -> None:
        peer = event.assoc.dul.socket
        if peer is not None:
            peer.message_complete()

    def _authorised(self, event: Any, title: str) -> bool:
        """Return whether an AE title is known and comes from where it should."""
        host = str(event.assoc.requestor.address)
        return any(peer.ae_title in (title, ANYONE) and peer.host in ("", host) for peer in self._config.peers)


def server_tls(tls: TlsConfig) -> ssl.SSLContext:
    """Return the context of a TLS server (PS3.15 B.9: TLS 1.2 or later, BCP 195)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    _load(context, tls)
    return context


def client_tls(tls: TlsConfig) -> ssl.SSLContext:
    """Return the context of a TLS client that shows our certificate."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, tls)
    return context


def _load(context: ssl.SSLContext, tls: TlsConfig) -> None:
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
    except OSError as error:  # ssl.SSLError is one
        raise InputError(
            f"a certificate or key that cannot be used ({type(error).__name__})",
            expected="PEM files that belong together",
            remedy="Check the paths below tls and their permissions.",
        ) from None


def _hosts(peers: tuple[PeerConfig, ...]) -> frozenset[str]:
    """Return the addresses that may connect; empty, for any, where some peer names none."""
    return frozenset(peer.host for peer in peers) if all(peer.host for peer in peers) else frozenset()
