"""C-STORE to a PACS through pynetdicom (DICOM PS3.4 B, PS3.8 7)."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentcache import InputError
from pipeline.writing import IMPLEMENTATION_UID, implementation_version
from pipeline.writing.pacs.checkpoint import hold_reactor
from pipeline.writing.pacs.send import PacsUnavailable

REJECTED_TRANSIENT = 2
"""A-ASSOCIATE-RJ result (DICOM PS3.8 9.3.4): worth another try."""


class CStore:
    """A storage SCP at ``host:port`` under an application entity title."""

    def __init__(
        self,
        host: str,
        port: int,
        called_aet: str,
        calling_aet: str = "CTPIPE",
        *,
        timeout_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``tls``: the context that connections are secured with; none are without it."""
        for title in (called_aet, calling_aet):
            if not 1 <= len(title) <= 16 or not title.isascii() or "\\" in title:
                raise InputError(
                    f"application entity title of {len(title)} characters",
                    expected="1 to 16 ASCII characters without a backslash",
                    remedy="Ask the PACS administrator for the title.",
                )
        self.host, self.port = host, port
        self.called_aet, self.calling_aet = called_aet, calling_aet
        self.timeout_s, self.tls = timeout_s, tls

    @property
    def name(self) -> str:
        return f"{self.called_aet}@{self.host}:{self.port}"

    def deliver(
        self, paths: Sequence[Path], done: Callable[[Path], None], refused: Callable[[Path, str], None]
    ) -> None:
        """Send files over one association; see :class:`pipeline.writing.pacs.send.Destination`."""
        from pydicom import dcmread

        association = self._associate(paths[0])
        # Kept, since pynetdicom shuts a socket down before it closes it: where the PACS died, the first fails.
        connection = association.dul.socket.socket if association.dul.socket is not None else None
        if connection is not None:  # else every image waits 40 ms for the acknowledgement of its command (Nagle)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for path in paths:
                image, asked = dcmread(path), time.monotonic()
                try:
                    status = association.send_c_store(image)
                except (RuntimeError, ValueError) as error:
                    if not association.is_established:
                        raise PacsUnavailable("the PACS ended the association") from error
                    raise InputError(
                        "the PACS accepts no such image in this transfer syntax",
                        expected="an accepted presentation context",
                        remedy="Write the series with --transfer-syntax explicit.",
                    ) from error
                if "Status" not in status:
                    raise PacsUnavailable(self._no_answer(time.monotonic() - asked))
                code = int(status.Status)
                if code == 0 or code >> 12 == 0xB:
                    done(path)
                elif code >> 8 == 0xA7:
                    raise PacsUnavailable(f"the PACS is out of resources (status {code:#06x})")
                else:
                    refused(path, f"status {code:#06x}")
        finally:
            if association.is_established:
                association.release()
            if connection is not None:
                connection.close()

    def _no_answer(self, waited_s: float) -> str:
        """Whose end it was: ours after waiting, or the other side's."""
        if waited_s >= self.timeout_s:
            return f"the PACS did not answer within {self.timeout_s:g} s"
        return f"the PACS broke off without an answer, after {waited_s:.1f} s"

    def _associate(self, first: Path) -> Any:
        try:
            from pynetdicom import AE
        except ImportError as error:
            raise InputError(
                "pynetdicom is not installed", expected="the extra `pacs`", remedy="pip install 'ctpipe[pacs]'"
            ) from error
        from pydicom import dcmread

        try:  # asked first, since pynetdicom leaks a socket where nobody listens
            socket.create_connection((self.host, self.port), timeout=self.timeout_s).close()
        except OSError as error:
            raise PacsUnavailable(f"no connection ({type(error).__name__})") from error
        meta = dcmread(first, stop_before_pixels=True).file_meta
        entity = AE(ae_title=self.calling_aet)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = self.timeout_s
        entity.connection_timeout = self.timeout_s
        entity.implementation_class_uid = IMPLEMENTATION_UID
        entity.implementation_version_name = implementation_version()
        entity.add_requested_context(meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID)
        secured: dict[str, Any] = {"tls_args": (self.tls, self.host)} if self.tls is not None else {}
        association = entity.associate(self.host, self.port, ae_title=self.called_aet, **secured)
        if association.is_established:
            hold_reactor(association)
            return association
        if association.is_rejected and association.acceptor.primitive.result == REJECTED_TRANSIENT:
            raise PacsUnavailable("the PACS has no association free")
        if association.is_rejected:
            raise InputError(
                f"{self.name} rejected the association",
                expected="an application entity that knows us",
                remedy=f"Register the title {self.calling_aet} at the PACS, and check the called title.",
            )
        if association.acceptor.primitive is not None and not association.accepted_contexts:
            raise InputError(
                f"{self.name} accepts no CT images in this transfer syntax",
                expected="CT Image Storage in the series' transfer syntax",
                remedy="Write the series with --transfer-syntax explicit.",
            )
        raise PacsUnavailable("no connection")
