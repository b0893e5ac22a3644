"""Answer storage commitment requests: an N-EVENT-REPORT on an association of our own (DICOM PS3.4 J.3.3)."""

from __future__ import annotations

import json
import logging
import ssl
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from pipeline.engines import note
from pipeline.identity import Keys
from pipeline.serve.config import PeerConfig, ServeConfig
from pipeline.serve.node.receiver import COMMITMENT_INSTANCE, STORAGE_COMMITMENT
from pipeline.serve.state import Queue
from pipeline.writing import IMPLEMENTATION_UID, implementation_version
from pipeline.writing.pacs import hold_reactor

log = logging.getLogger("ctpipe.serve")


ALL_COMMITTED, SOME_FAILED = 1, 2
NO_SUCH_INSTANCE = 0x0112
GIVE_UP_AFTER = 50


class Commitment:
    """Sends the reports that are due. An instance that is promised is never deleted by the service."""

    def __init__(self, config: ServeConfig, queue: Queue, keys: Keys, tls: ssl.SSLContext | None = None) -> None:
        self._config, self._queue, self._keys, self._tls = config, queue, keys, tls

    def peer(self, title: str) -> PeerConfig | None:
        """Return the peer of an AE title that reports can be brought to."""
        found = [peer for peer in self._config.peers if peer.ae_title == title and peer.host and peer.port]
        return found[0] if found else None

    def step(self) -> int:
        """Answer what is due; return how many reports were taken."""
        sent = 0
        for row in self._queue.due_commitments():
            peer = self.peer(row["calling_ae"])
            done = peer is not None and self._report(peer, row["transaction_uid"], json.loads(row["items"]))
            if done or row["attempts"] + 1 >= GIVE_UP_AFTER:
                self._queue.commitment_answered(row["id"], None)
                self._queue.count("commitments_reported" if done else "commitments_given_up")
            else:
                timing = self._config.timing
                pause = min(timing.retry_most_s, timing.retry_s * 2.0 ** min(row["attempts"], 20))
                self._queue.commitment_answered(row["id"], pause)
            sent += done
        return sent

    def _report(self, peer: PeerConfig, transaction: str, items: list[tuple[str, str]]) -> bool:
        from pynetdicom import AE
        from pynetdicom.presentation import build_role

        report = self._judged(transaction, items)
        entity = AE(ae_title=self._config.listen.ae_title if self._config.listen else "CTPIPE")
        entity.implementation_class_uid = IMPLEMENTATION_UID
        entity.implementation_version_name = implementation_version()
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = self._config.limits.pdu_timeout_s
        entity.connection_timeout = self._config.limits.pdu_timeout_s
        entity.add_requested_context(STORAGE_COMMITMENT)
        # The provider of the service proposes the roles the other way round (PS3.7 D.3.3.4).
        roles = [build_role(STORAGE_COMMITMENT, scu_role=False, scp_role=True)]
        options: dict[str, Any] = {"tls_args": (self._tls, peer.host)} if self._tls is not None else {}
        association = entity.associate(peer.host, peer.port, ae_title=peer.ae_title, ext_neg=roles, **options)
        if not association.is_established:
            note(log, "commitment_not_delivered", logging.WARNING)
            return False
        hold_reactor(association)
        try:
            kind = SOME_FAILED if "FailedSOPSequence" in report else ALL_COMMITTED
            status, _ = association.send_n_event_report(report, kind, STORAGE_COMMITMENT, COMMITMENT_INSTANCE)
            return "Status" in status and int(status.Status) == 0
        except (RuntimeError, ValueError) as error:
            note(log, "commitment_not_delivered", logging.WARNING, error=type(error).__name__)
            return False
        finally:
            association.release()

    def _judged(self, transaction: str, items: list[tuple[str, str]]) -> Dataset:
        """Return the report: what is here is promised, what is not has failed."""
        keys = {uid: self._keys.text(uid) for _, uid in items}
        here = self._queue.promise(list(keys.values()))
        report = Dataset()
        report.TransactionUID = transaction
        kept, failed = [], []
        for sop_class, uid in items:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
            if keys[uid] in here:
                kept.append(item)
            else:
                item.FailureReason = NO_SUCH_INSTANCE
                failed.append(item)
        if kept:
            report.ReferencedSOPSequence = DicomSequence(kept)
        if failed:
            report.FailedSOPSequence = DicomSequence(failed)
        return report
