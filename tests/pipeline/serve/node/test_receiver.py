"""The DICOM node against hostile and clumsy peers, full disks, TLS and storage commitment."""

from __future__ import annotations

import errno
import io
import os
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from pipeline.serve import LimitsConfig, ListenConfig, PeerConfig, Service
from pipeline.serve.config import TlsConfig
from pipeline.serve.node.guarded_server import SPARE_CONNECTIONS
from pipeline.serve.node.receiver import COMMITMENT_INSTANCE, STORAGE_COMMITMENT
from tests.support.hospital import Scan
from tests.support.serve_site import (
    CT,
    EXPLICIT,
    a_study,
    association,
    config,
    done_with,
    free_port,
    hang_up,
    running,
    send,
    wait_for,
)

LIMITS = LimitsConfig(
    pdu_bytes=1 << 16, pdu_timeout_s=1.0, object_mib=1, object_timeout_s=3.0, idle_timeout_s=5.0, associations=3,
    min_free_gib=0.0,
)  # fmt: skip
MIB = 1 << 20


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(config(tmp_path, limits=LIMITS)) as started:
        yield started
        assert started.state()["dead"] == []


def counter(service: Service, name: str) -> float:
    return float(service.queue.summary()["counters"].get(name, 0))


def echo(port: int) -> int:
    link = association(port)
    assert link.is_established
    status = int(link.send_c_echo().Status)
    link.release()
    return status


def port_of(service: Service) -> int:
    assert service.receiver is not None
    return service.receiver.port


def send_bytes(port: int, objects: list[tuple[str, bytes]]) -> list[int]:
    """Send raw bytes as datasets under announced SOPInstanceUIDs, and return the status of each."""
    from pynetdicom.dimse_primitives import C_STORE

    link, statuses = association(port), []
    link._reactor_checkpoint.clear()  # as pynetdicom's own senders do: answers are read here
    for number, (uid, data) in enumerate(objects):
        request = C_STORE()
        request.MessageID, request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = number + 1, CT, uid
        request.Priority, request.DataSet = 2, io.BytesIO(data)
        (context,) = [one for one in link.accepted_contexts if one.abstract_syntax == CT]
        link.dimse.send_msg(request, context.context_id)
        statuses.append(int(link.dimse.get_msg(block=True)[1].Status))
    link._reactor_checkpoint.set()
    link.release()
    return statuses


def test_echo(service: Service) -> None:
    assert echo(port_of(service)) == 0


@pytest.mark.parametrize(("calling", "called"), [("STRANGER", "CTPIPE"), ("CT1", "SOMEONE")])
def test_unknown_titles_are_rejected(service: Service, calling: str, called: str) -> None:
    link = association(port_of(service), calling, called)
    assert link.is_rejected
    assert link.acceptor.primitive.result_source == 1
    wait_for(lambda: counter(service, "associations_rejected") == 1)


def test_a_known_title_from_elsewhere_is_not_authorised(tmp_path: Path) -> None:
    peers = (PeerConfig("CT1", "203.0.113.9"), PeerConfig("CT2"))
    with running(config(tmp_path, peers=peers)) as service:
        assert send(port_of(service), a_study(1).files()[:1]) == [0x0124]
        assert send(port_of(service), a_study(1).files()[:1], "CT2") == [0]
    with running(config(tmp_path / "closed", peers=peers[:1])) as service:
        assert not association(port_of(service)).is_established
        assert counter(service, "connections_refused_unknown_host") == 1


def test_other_classes_and_syntaxes_are_not_accepted(service: Service) -> None:
    mr, mpeg = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.1.2.4.102"
    link = association(port_of(service), contexts={mr: [EXPLICIT], CT: [mpeg], "1.2.840.10008.1.1": [EXPLICIT]})
    assert [context.abstract_syntax for context in link.accepted_contexts] == ["1.2.840.10008.1.1"]
    link.release()
    wait_for(lambda: counter(service, "contexts_refused") == 2)


def test_a_dataset_that_is_not_what_was_announced_is_refused(service: Service) -> None:
    def nameless(ds: Dataset) -> None:
        ds.StudyInstanceUID = ""

    assert send(port_of(service), Scan("1.2.9", edit=nameless).files()[:1]) == [0xC000]
    from pynetdicom.dsutils import encode

    ds = pydicom.dcmread(io.BytesIO(a_study(1).files()[0]))
    announced = str(ds.SOPInstanceUID)
    ds.SOPInstanceUID = "1.2.3.4"
    assert send_bytes(port_of(service), [(announced, encode(ds, False, True))]) == [0xA900]
    assert service.queue.states() == {}


def test_bytes_in_another_syntax_than_negotiated_are_read_as_they_are_or_refused(service: Service) -> None:
    """Bytes of an implicit dataset under a context that was negotiated explicit."""
    from pynetdicom.dsutils import encode

    datasets = [pydicom.dcmread(io.BytesIO(data)) for data in a_study(1).files()]
    implicit = [(str(ds.SOPInstanceUID), encode(ds, True, True)) for ds in datasets]
    noise = [(str(ds.SOPInstanceUID), b"\x08\x00\xff" + os.urandom(501)) for ds in datasets]
    assert send_bytes(port_of(service), noise) == [0xC000] * 4
    assert service.queue.states() == {}
    assert send_bytes(port_of(service), implicit) == [0] * 4
    wait_for(done_with(service))  # the reader sees that the label is wrong
    assert service.queue.results()[0]["n_slices"] == 20


def raw(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=120)


def ended(peer: socket.socket) -> bool:
    """Whether the other side hangs up."""
    try:
        while peer.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def peak_rss_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def test_a_pdu_of_four_gigabytes_ends_the_connection_before_it_is_read(service: Service) -> None:
    before = peak_rss_mib()
    with raw(port_of(service)) as peer:
        peer.sendall(struct.pack(">BBL", 1, 0, 0xFFFFFFF0) + bytes(1 << 16))
        assert ended(peer)
    assert peak_rss_mib() - before < 50
    assert counter(service, "violations_pdu_too_long") == 1
    assert echo(port_of(service)) == 0


def test_a_sender_of_a_byte_now_and_then_is_cut_off(service: Service) -> None:
    with raw(port_of(service)) as peer:
        peer.sendall(struct.pack(">BBL", 1, 0, 200))
        try:
            for _ in range(1200):
                peer.sendall(b"x")
                time.sleep(0.1)
        except OSError:
            pass
        else:
            raise AssertionError("it was not cut off")
    assert counter(service, "violations_pdu_too_slow") == 1
    assert echo(port_of(service)) == 0


def test_an_object_beyond_the_limit_ends_the_association_and_is_not_kept(service: Service) -> None:
    big = a_study(1, edit=lambda ds: setattr(ds, "PixelData", bytes(3 * MIB))).files()[0]
    small = a_study(2).files()[0]
    link = association(port_of(service))
    answer = link.send_c_store(pydicom.dcmread(io.BytesIO(big)))
    assert "Status" not in answer
    hang_up(link)
    wait_for(lambda: counter(service, "violations_object_too_large") == 1)
    assert send(port_of(service), [small]) == [0]
    assert list(service.folders.spool.rglob("*.part")) == []
    assert len(service.queue.states()) == 1


def test_many_small_objects_over_one_association_are_not_one_large_one(service: Service) -> None:
    def padded(ds: Dataset) -> None:
        ds.add_new(0x00281111, "OW", bytes(300_000))

    assert send(port_of(service), a_study(1, n=8, edit=padded).files()) == [0] * 8


def test_silent_connections_do_not_pile_up(service: Service) -> None:
    """Hundreds of connections that say nothing: a bounded number is held, and for a bounded time."""
    threads_before, files_before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    peers = [raw(port_of(service)) for _ in range(300)]
    wait_for(lambda: counter(service, "connections_refused_too_many") >= 200)
    assert threading.active_count() - threads_before <= 4 * (LIMITS.associations + SPARE_CONNECTIONS)
    for peer in peers:
        peer.close()
    wait_for(lambda: service.receiver is not None and service.receiver.associations == 0)
    assert echo(port_of(service)) == 0
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= files_before + 5)


def test_too_many_associations_are_rejected_and_a_place_is_free_again(service: Service) -> None:
    links = [association(port_of(service)) for _ in range(LIMITS.associations)]
    assert all(link.is_established for link in links)
    extra = association(port_of(service))
    assert extra.is_rejected
    for link in links:
        link.release()
    wait_for(lambda: service.receiver is not None and service.receiver.associations == 0)
    assert echo(port_of(service)) == 0


def test_a_host_that_connects_too_often_is_refused_for_a_while(tmp_path: Path) -> None:
    limits = replace(LIMITS, connections_per_minute=5)
    with running(config(tmp_path, limits=limits)) as service:
        for _ in range(5):
            raw(port_of(service)).close()
        with raw(port_of(service)) as peer:
            assert ended(peer)
        assert counter(service, "connections_refused_rate") == 1


def test_garbage_instead_of_dicom(service: Service) -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(2000), struct.pack(">BBL", 4, 0, 4) + b"abcd"):
        with raw(port_of(service)) as peer:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            assert ended(peer)
    wait_for(lambda: service.receiver is not None and service.receiver.associations == 0)
    assert echo(port_of(service)) == 0


def test_a_full_disk_is_answered_with_out_of_resources_and_passes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = a_study(1).files()
    assert send(port_of(service), files[:1]) == [0]

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.serve.state.folders.os.fsync", full)
    assert send(port_of(service), files[1:3]) == [0xA700, 0xA700]
    monkeypatch.undo()
    assert list(service.folders.spool.rglob("*.part")) == []
    assert counter(service, "instances_full") == 2
    assert send(port_of(service), files) == [0] * 4
    wait_for(done_with(service))
    assert service.queue.results()[0]["n_slices"] == 20


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    state = tmp_path / "small"
    state.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", state], check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        padding = {"edit": lambda ds: ds.add_new(0x00281111, "OW", bytes(200_000))}
        files = a_study(1, n=12, **padding).files()
        with running(config(state, limits=replace(LIMITS, associations=8))) as service:
            statuses = send(port_of(service), files)
            accepted = [data for data, status in zip(files, statuses, strict=True) if status == 0]
            assert set(statuses) == {0, 0xA700}
            assert len(list(service.folders.spool.rglob("*.dcm"))) == len(accepted)
            assert list(service.folders.spool.rglob("*.part")) == []
            assert service.queue.study_size(next(iter(service.queue.states())))[0] == len(accepted)
            assert service.state()["dead"] == []
    finally:
        subprocess.run(["umount", "-l", state], check=True)


def test_the_disk_guard_refuses_before_the_disk_is_full(tmp_path: Path) -> None:
    with running(config(tmp_path, limits=replace(LIMITS, min_free_gib=1e9))) as service:
        assert send(port_of(service), a_study(1).files()) == [0xA700] * 4
        assert echo(port_of(service)) == 0
    with running(config(tmp_path, limits=replace(LIMITS, instances_per_study=2))) as service:
        assert send(port_of(service), a_study(1).files()) == [0, 0, 0xA700, 0xA700]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    for name in ("node", "stranger"):
        subprocess.run(
            [*words, *names, "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"],
            check=True,
            capture_output=True,
        )
    return folder


def test_tls_with_certificates_on_both_sides(tmp_path: Path, certificates: Path) -> None:
    pem, key = certificates / "node.pem", certificates / "node.key"
    listen = ListenConfig(host="127.0.0.1", port=free_port(), tls=TlsConfig(pem, key, ca=pem))
    with running(config(tmp_path, listen=listen, limits=LIMITS)) as service:
        client = ssl.create_default_context(cafile=str(pem))
        client.load_cert_chain(pem, key)
        files = a_study(1).files()
        assert send(port_of(service), files, tls_args=(client, "127.0.0.1")) == [0] * 4
        wait_for(done_with(service))
        nobody = ssl.create_default_context(cafile=str(pem))
        nobody.load_cert_chain(certificates / "stranger.pem", certificates / "stranger.key")
        assert not association(port_of(service), tls_args=(nobody, "127.0.0.1")).is_established
        assert not association(port_of(service)).is_established
        with raw(port_of(service)) as stalled:  # a handshake that never comes must not keep others out
            assert send(port_of(service), files, tls_args=(client, "127.0.0.1")) == [0] * 4
            assert ended(stalled)


def test_results_are_sent_over_tls(tmp_path: Path, certificates: Path) -> None:
    from pynetdicom import AE, evt

    from pipeline.serve import DestinationConfig
    from pipeline.serve.delivery import destination_of

    pem, key = certificates / "node.pem", certificates / "node.key"
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(pem, key)
    got: list[str] = []

    def keep(event: Any) -> int:
        got.append(str(event.request.AffectedSOPInstanceUID))
        return 0

    entity = AE(ae_title="PACS")
    entity.add_supported_context(CT, [EXPLICIT])
    port = free_port()
    server = entity.start_server(
        ("127.0.0.1", port), block=False, ssl_context=server_side, evt_handlers=[(evt.EVT_C_STORE, keep)]
    )
    try:
        section = DestinationConfig(c_store=f"PACS@127.0.0.1:{port}", tls=TlsConfig(pem, key, ca=pem), timeout_s=10)
        with running(config(tmp_path), destination_of("pacs", section)) as service:
            send(port_of(service), a_study(1).files())
            wait_for(done_with(service))
    finally:
        server.shutdown()
    assert len(set(got)) == 20


def test_storage_commitment_promises_what_is_here_and_nothing_else(tmp_path: Path) -> None:
    from pynetdicom import AE, evt

    reports: list[tuple[int, Dataset]] = []

    def on_report(event: Any) -> tuple[int, None]:
        reports.append((int(event.event_type), event.event_information))
        return 0, None

    scu_port = free_port()
    modality = AE(ae_title="CT1")
    modality.add_supported_context(STORAGE_COMMITMENT, scu_role=True, scp_role=True)
    server = modality.start_server(
        ("127.0.0.1", scu_port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, on_report)]
    )
    files = a_study(1).files()
    settings = config(tmp_path, peers=(PeerConfig("CT1", "127.0.0.1", scu_port),), storage_commitment=True)
    settings = replace(settings, timing=replace(settings.timing, keep_h=0.0))
    try:
        with running(settings) as service:
            send(port_of(service), files[:3])
            request = Dataset()
            request.TransactionUID = "1.2.3.99"
            items = []
            for data in files:
                item = Dataset()
                item.ReferencedSOPClassUID = CT
                item.ReferencedSOPInstanceUID = pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID
                items.append(item)
            request.ReferencedSOPSequence = DicomSequence(items)
            link = association(port_of(service), contexts={STORAGE_COMMITMENT: [EXPLICIT]})
            status, _ = link.send_n_action(request, 1, STORAGE_COMMITMENT, COMMITMENT_INSTANCE)
            assert status.Status == 0
            link.release()
            ((kind, report),) = wait_for(lambda: reports)
            assert kind == 2
            assert report.TransactionUID == "1.2.3.99"
            assert len(report.ReferencedSOPSequence) == 3
            (failed,) = report.FailedSOPSequence
            assert (failed.ReferencedSOPInstanceUID, failed.FailureReason) == (items[3].ReferencedSOPInstanceUID, 0x112)
            wait_for(done_with(service))
            service.tidy()
            assert len(list(service.folders.spool.rglob("*.dcm"))) == 3  # promised: never deleted
            assert counter(service, "commitments_reported") == 1
    finally:
        server.shutdown()
