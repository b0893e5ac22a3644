"""Sending: retries, refusals, a PACS that dies half-way, and a real Orthanc where one is installed."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.volume import Geometry
from pipeline.writing.ct_image import WrittenSeries
from pipeline.writing.pacs import CStore, StowRs, send_folder, series_files
from pipeline.writing.pacs.send import PacsUnavailable, left_list
from tests.pipeline.writing.test_ct_image import geometry, pixels, write


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write(tmp_path / "series", pixels(), geometry())
    return tmp_path / "series"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Script:
    """A PACS that does what its script says, one entry a call: how many files it takes before it breaks off."""

    name = "script"

    def __init__(self, *takes: int, refuse: Sequence[str] = (), error: Exception | None = None) -> None:
        self.takes, self.refuse, self.error = list(takes), set(refuse), error
        self.calls: list[list[str]] = []

    def deliver(self, paths: Sequence[Path], done: Callable[[Path], None], refused: Callable[..., None]) -> None:
        self.calls.append([p.name for p in paths])
        take = self.takes.pop(0) if self.takes else len(paths)
        for path in list(paths)[:take]:
            if path.name in self.refuse:
                refused(path, "status 0x0110")
            else:
                done(path)
        if take < len(paths):
            raise self.error or PacsUnavailable("broke off")


def test_a_pacs_that_breaks_off_is_tried_again_from_there(series: Path) -> None:
    pacs = Script(3, 2)
    summary = send_folder(series, pacs, backoff_s=0)
    assert (summary.sent, summary.left, summary.reason) == (7, [], "")
    assert [len(c) for c in pacs.calls] == [7, 4, 2]
    assert not left_list(series).exists()


def test_what_is_left_is_listed_and_the_next_send_takes_up_there(series: Path) -> None:
    first = send_folder(series, Script(2, 0, 0, 0), attempts=3, backoff_s=0)
    assert first.sent == 2
    assert first.left == [f"{i:05d}.dcm" for i in range(3, 8)]
    assert json.loads(left_list(series).read_text())["left"] == first.left
    pacs = Script()
    second = send_folder(series, pacs, backoff_s=0)
    assert pacs.calls == [first.left]
    assert (second.sent, second.already, second.left) == (5, 2, [])
    assert not left_list(series).exists()


def test_another_destination_gets_everything(series: Path) -> None:
    send_folder(series, Script(2, 0), attempts=1, backoff_s=0)
    pacs = Script()
    pacs.name = "elsewhere"
    assert send_folder(series, pacs, backoff_s=0).sent == 7


def test_refused_files_stay_on_the_list_and_the_others_arrive(series: Path) -> None:
    summary = send_folder(series, Script(refuse=["00004.dcm"]), backoff_s=0)
    assert (summary.sent, summary.left) == (6, ["00004.dcm"])
    assert "status 0x0110" in summary.reason


def test_what_no_retry_can_mend_is_not_retried(series: Path) -> None:
    pacs = Script(0, error=InputError("unknown title", expected="a known one", remedy="Register it."))
    summary = send_folder(series, pacs, backoff_s=0)
    assert len(pacs.calls) == 1
    assert "unknown title" in summary.reason
    assert len(summary.left) == 7


def test_nobody_listens(series: Path) -> None:
    port = free_port()
    for destination in (CStore("127.0.0.1", port, "NOBODY"), StowRs(f"http://127.0.0.1:{port}/dicom-web")):
        summary = send_folder(series, destination, attempts=2, backoff_s=0)
        assert len(summary.left) == 7
        assert summary.reason.startswith("no ")


def test_a_storage_provider_that_refuses_one_and_dies_on_another(series: Path) -> None:
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import CTImageStorage

    port, got = free_port(), []
    doomed = [True]

    def on_store(event: evt.Event) -> int:
        number = int(event.dataset.InstanceNumber)
        if number == 3:
            return 0xC000
        if number == 5 and doomed:
            doomed.clear()
            event.assoc.abort()
        got.append(event.dataset.SOPInstanceUID)
        return 0x0000

    entity = AE(ae_title="PROVIDER")
    entity.add_supported_context(CTImageStorage, ["1.2.840.10008.1.2.1"])
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, on_store)])
    try:
        summary = send_folder(series, CStore("127.0.0.1", port, "PROVIDER", timeout_s=60), backoff_s=0)
    finally:
        server.shutdown()
    assert summary.left == ["00003.dcm"]
    assert "0xc000" in summary.reason
    assert len(set(got)) == 6


def test_no_connection_stays_open_where_the_pacs_died(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pynetdicom shuts a socket down before it closes it, and leaves it open where the first fails."""
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import CTImageStorage

    def die(event: evt.Event) -> int:
        peer = event.assoc.dul.socket.socket
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as a dead host's
        peer.close()
        return 0

    used: list[socket.socket] = []

    def watched(self: CStore, first: Path) -> Any:
        association = associate(self, first)
        used.append(association.dul.socket.socket)
        return association

    associate = CStore._associate
    monkeypatch.setattr(CStore, "_associate", watched)
    port = free_port()
    entity = AE(ae_title="PROVIDER")
    entity.add_supported_context(CTImageStorage, ["1.2.840.10008.1.2.1"])
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, die)])
    try:
        summary = send_folder(series, CStore("127.0.0.1", port, "PROVIDER", timeout_s=60), attempts=2, backoff_s=0)
    finally:
        server.shutdown()
    assert len(summary.left) == 7
    assert len(used) == 2
    assert [one.fileno() for one in used] == [-1, -1]


def test_a_pacs_without_a_free_association_is_tried_again(series: Path) -> None:
    """A transient rejection (PS3.8 9.3.4) is no question of titles."""
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import CTImageStorage

    port, rejected = free_port(), []
    entity = AE(ae_title="PROVIDER")
    entity._maximum_associations = 0
    entity.add_supported_context(CTImageStorage, ["1.2.840.10008.1.2.1"])

    def make_room(event: evt.Event) -> None:
        rejected.append(1)
        entity.maximum_associations = 10

    handlers = [(evt.EVT_C_STORE, lambda event: 0), (evt.EVT_REJECTED, make_room)]
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    try:
        summary = send_folder(series, CStore("127.0.0.1", port, "PROVIDER", timeout_s=60), backoff_s=0.5)
    finally:
        server.shutdown()
    assert rejected
    assert (summary.sent, summary.left) == (7, [])


def test_no_image_waits_for_the_acknowledgement_of_its_command(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command and dataset go out as two packets: under Nagle's algorithm each image would wait 40 ms."""
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import CTImageStorage

    used: list[socket.socket] = []

    def watched(self: CStore, first: Path) -> Any:
        association = associate(self, first)
        used.append(association.dul.socket.socket)
        return association

    associate = CStore._associate
    monkeypatch.setattr(CStore, "_associate", watched)
    port, undelayed = free_port(), []
    entity = AE(ae_title="PROVIDER")
    entity.add_supported_context(CTImageStorage, ["1.2.840.10008.1.2.1"])
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda event: 0)])

    def look(count: int) -> None:
        undelayed.append(used[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    try:
        send_folder(series, CStore("127.0.0.1", port, "PROVIDER", timeout_s=60), backoff_s=0, progress=look)
    finally:
        server.shutdown()
    assert undelayed == [1] * 7


@pytest.mark.parametrize(("title", "address"), [("", "h"), ("A" * 17, "h"), ("A\\B", "h")])
def test_impossible_titles_are_refused(title: str, address: str) -> None:
    with pytest.raises(InputError, match="application entity title"):
        CStore(address, 104, title)


@pytest.mark.parametrize("url", ["ftp://pacs/x", "pacs/dicom-web", "https://user:word@pacs/dicom-web"])
def test_impossible_addresses_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(InputError) as caught:
        StowRs(url)
    assert "word" not in caught.value.found


def test_a_folder_without_dicom_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.dcm files"):
        series_files(tmp_path)


ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
WEB_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


class Orthanc:
    """A real PACS; one made again in the same folder on the same ports is the same one, restarted."""

    def __init__(self, folder: Path, ports: tuple[int, int] | None = None, extra: dict[str, Any] | None = None) -> None:
        self.http, self.dicom = ports or (free_port(), free_port())
        settings = {
            "Name": "test",
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": self.http,
            "DicomPort": self.dicom,
            "DicomAet": "ORTHANC",
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "Plugins": [str(WEB_PLUGIN)],
            **(extra or {}),
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        assert ORTHANC is not None
        self.process = subprocess.Popen(
            [ORTHANC, str(folder / "orthanc.json")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(1200):
            try:
                self.get("/system")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("Orthanc does not answer")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=120)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}") as answer:
            raw = answer.read()
        return raw if path.endswith("/file") else json.loads(raw)

    def pixels(self, series_uid: str) -> np.ndarray[Any, Any]:
        slices = {}
        for instance in self.get("/instances?expand"):
            if instance["MainDicomTags"].get("SOPInstanceUID") and series_uid == self.series_of(instance):
                ds = pydicom.dcmread(pydicom.filebase.DicomBytesIO(self.get(f"/instances/{instance['ID']}/file")))
                hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
                slices[int(ds.InstanceNumber)] = hu
        return np.stack([slices[n] for n in sorted(slices)])

    def series_of(self, instance: dict[str, Any]) -> str:
        return str(self.get(f"/series/{instance['ParentSeries']}")["MainDicomTags"]["SeriesInstanceUID"])


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if ORTHANC is None or not WEB_PLUGIN.exists():
        pytest.skip("needs the Debian packages orthanc and orthanc-dicomweb")
    server = Orthanc(tmp_path_factory.mktemp("orthanc"))
    yield server
    server.stop()


@pytest.mark.parametrize("way", ["c-store", "stow-rs"])
@pytest.mark.parametrize("syntax", ["explicit", "jpegls"])
def test_orthanc_takes_the_series_and_gives_the_same_pixels_back(
    orthanc: Orthanc, tmp_path: Path, way: str, syntax: str
) -> None:
    hu = np.roll(pixels(), 1 if way == "c-store" else 2, axis=1)
    written = write(tmp_path / "series", hu, geometry(), transfer_syntax=syntax)
    if way == "c-store":
        summary = send_folder(tmp_path / "series", CStore("127.0.0.1", orthanc.dicom, "ORTHANC"))
    else:
        summary = send_folder(tmp_path / "series", StowRs(f"http://127.0.0.1:{orthanc.http}/dicom-web"))
    assert (summary.sent, summary.left, summary.reason) == (7, [], "")
    np.testing.assert_array_equal(orthanc.pixels(written.series_uid), hu)


FULL_DEPTH = 300


def full_size(out: Path, syntax: str) -> tuple[WrittenSeries, NDArray[np.int16]]:
    """300 slices of 512 x 512 with noise of 12 HU on a few tissues: 150 MiB uncompressed."""
    rng = np.random.default_rng(0)
    levels = rng.choice([-1000, -850, -100, 40, 300], size=(FULL_DEPTH, 8, 8)).repeat(64, 1).repeat(64, 2)
    noise = rng.normal(0, 12, (4, 512, 512))
    hu = np.stack([np.rint(level + np.roll(noise[i % 4], i)) for i, level in enumerate(levels)]).astype(np.int16)
    affine = ((0.0, 0.0, 0.7, -179.2), (0.0, 0.7, 0.0, -179.2), (1.0, 0.0, 0.0, 694.21), (0.0, 0.0, 0.0, 1.0))
    at = Geometry(hu.shape, affine, tuple(694.21 + np.arange(float(FULL_DEPTH))), 5.0)
    return write(out, hu, at, transfer_syntax=syntax), hu


@pytest.mark.slow
@pytest.mark.parametrize(("way", "syntax"), [("c-store", "explicit"), ("stow-rs", "jpegls")])
def test_orthanc_takes_a_series_of_full_size(orthanc: Orthanc, tmp_path: Path, way: str, syntax: str) -> None:
    written, hu = full_size(tmp_path / "series", syntax)
    stow = StowRs(f"http://127.0.0.1:{orthanc.http}/dicom-web")
    destination = CStore("127.0.0.1", orthanc.dicom, "ORTHANC") if way == "c-store" else stow
    summary = send_folder(tmp_path / "series", destination)
    assert (summary.sent, summary.left, summary.reason) == (FULL_DEPTH, [], "")
    np.testing.assert_array_equal(orthanc.pixels(written.series_uid), hu)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["c-store", "stow-rs"])
def test_a_pacs_that_dies_half_way_gets_the_rest_when_it_is_back(tmp_path: Path, way: str) -> None:
    if ORTHANC is None or not WEB_PLUGIN.exists():
        pytest.skip("needs the Debian packages orthanc and orthanc-dicomweb")
    written, hu = full_size(tmp_path / "series", "explicit")
    (tmp_path / "pacs").mkdir()
    server = Orthanc(tmp_path / "pacs")
    ports = server.http, server.dicom
    stow = StowRs(f"http://127.0.0.1:{server.http}/dicom-web")
    destination = CStore("127.0.0.1", server.dicom, "ORTHANC", timeout_s=10) if way == "c-store" else stow
    taken = 0

    def count(number: int) -> None:
        nonlocal taken
        taken += number
        if taken >= 40:
            server.process.kill()

    try:
        first = send_folder(tmp_path / "series", destination, attempts=2, backoff_s=0.1, progress=count)
        assert 40 <= first.sent < FULL_DEPTH
        assert first.reason
        assert json.loads(left_list(tmp_path / "series").read_text())["left"] == first.left
        server.process.wait(timeout=120)
        server = Orthanc(tmp_path / "pacs", ports)
        second = send_folder(tmp_path / "series", destination)
        assert (second.already, second.sent, second.left) == (first.sent, FULL_DEPTH - first.sent, [])
        assert not left_list(tmp_path / "series").exists()
        np.testing.assert_array_equal(server.pixels(written.series_uid), hu)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("silent", "reason"), [(True, "did not answer within 1 s"), (False, "broke off without an answer")]
)
def test_it_is_said_whether_the_pacs_was_silent_or_broke_off(series: Path, silent: bool, reason: str) -> None:
    from pynetdicom import AE, evt

    over = threading.Event()

    def store(event: Any) -> int:
        if silent:
            over.wait(60)
        else:
            event.assoc.abort()
        return 0

    entity = AE(ae_title="PACS")
    entity.add_supported_context("1.2.840.10008.5.1.4.1.1.2", ["1.2.840.10008.1.2.1"])
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        port = server.server_address[1]
        done = send_folder(series, CStore("127.0.0.1", port, "PACS", timeout_s=1.0 if silent else 30.0), attempts=1)
    finally:
        over.set()
        server.shutdown()
    assert reason in done.reason
    assert len(done.left) == 7
