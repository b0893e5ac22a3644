"""A small hospital for tests of the service: senders, destinations, and an interpolation that is quick but genuine."""

from __future__ import annotations

import io
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from pipeline.archive import open_archive
from pipeline.decode import WriteSettings
from pipeline.identity import PrivateStore
from pipeline.reading import read_series, scan
from pipeline.serve import (
    DestinationConfig,
    InterpolateRequest,
    InterpolateResult,
    ListenConfig,
    PeerConfig,
    Service,
    TimingConfig,
)
from pipeline.serve.config import RuleConfig, ServeConfig
from pipeline.volume import Window
from pipeline.workflows import InterpolateSettings, choose_thick
from pipeline.workflows.interpolation.interpolate import interpolate
from pipeline.workflows.interpolation.thick_study import pointer_of
from pipeline.writing.pacs import hold_reactor
from tests.support.average_codec import AverageCodec
from tests.support.hospital import Scan, thick

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quick(request: InterpolateRequest) -> InterpolateResult:
    """The project's own interpolation and writer, with a codec that averages and a model that has learnt nothing."""
    source = open_archive(request.source)
    chosen: Any = choose_thick(scan(source).series, spacing_mm=request.spacing_mm)
    volume = read_series(pointer_of(chosen, "served"), threads=1)
    request.out.mkdir()
    settings = InterpolateSettings(
        WriteSettings(request.out, Window(40, 400), transfer_syntax=request.transfer_syntax),
        spacing_mm=request.spacing_mm,
        restore_identity=request.restore_identity,
        reader_threads=1,
    )
    keys = PrivateStore.open(str(request.private)).keys
    done = interpolate(volume, chosen, keys, AverageCodec(), lambda condition: [condition], settings)
    return InterpolateResult(done.folders, done.series_uid, done.n_slices, done.figures)


def a_study(number: int, n: int = 4, **changes: Any) -> Scan:
    """A thick series of one patient, all UIDs from ``number``."""
    ids = {"study": f"1.2.826.{number}", "patient": f"PATIENT{number}", "frame": f"1.2.826.{number}.9", "seed": number}
    return thick(f"1.2.826.{number}.5", **{"n": n, **ids, **changes})


def config(state: Path, **changes: Any) -> ServeConfig:
    """A configuration that waits for hardly anything; destinations are given to the service as objects."""
    timing = TimingConfig(quiet_s=0.3, unfinished_quiet_s=30, retry_s=0.05, retry_most_s=0.4)
    made = ServeConfig(
        state=state,
        rules=(RuleConfig("thick", ("pacs",)),),
        destinations={"pacs": DestinationConfig(c_store="PACS@127.0.0.1:1")},
        listen=ListenConfig(host="127.0.0.1", port=free_port()),
        peers=(PeerConfig("CT1"),),
        timing=timing,
    )
    return replace(made, **changes)


class Shelf:
    """A destination that keeps what it is given: how often each instance came, and to which series it belongs."""

    name = "shelf"

    def __init__(self) -> None:
        self.got: Counter[str] = Counter()
        self.series: dict[str, set[str]] = {}
        self.datasets: list[pydicom.Dataset] = []
        self.fails = 0

    def deliver(self, paths: Sequence[Path], done: Callable[[Path], None], refused: Callable[..., None]) -> None:
        from pipeline.writing.pacs.send import PacsUnavailable

        for path in paths:
            if self.fails:
                self.fails -= 1
                raise PacsUnavailable("broke off")
            ds = pydicom.dcmread(path)
            self.got[str(ds.SOPInstanceUID)] += 1
            self.series.setdefault(str(ds.SeriesInstanceUID), set()).add(str(ds.StudyInstanceUID))
            self.datasets.append(ds)
            done(path)


@contextmanager
def running(
    settings: ServeConfig, shelf: Any = None, interpolation: Callable[..., InterpolateResult] = quick
) -> Iterator[Service]:
    """A service in this process."""
    service = Service(settings, interpolation, send_to={"pacs": shelf or Shelf()})
    service.start()
    try:
        yield service
    finally:
        service.stop()


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Return the condition's value once it is true; fail after a time that no working machine needs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def association(port: int, calling: str = "CT1", called: str = "CTPIPE", patience_s: float = 20, **options: Any) -> Any:
    from pynetdicom import AE

    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = patience_s
    for sop_class, syntaxes in options.pop("contexts", {CT: [EXPLICIT], "1.2.840.10008.1.1": [EXPLICIT]}).items():
        entity.add_requested_context(sop_class, syntaxes)
    link = entity.associate("127.0.0.1", port, ae_title=called, **options)
    if not link.is_established:
        hang_up(link)  # pynetdicom leaves it open where the other side was first
    else:
        hold_reactor(link)
        link.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def hang_up(link: Any) -> None:
    """Close the connection of an association that the other side ended."""
    if link.dul.socket is not None and link.dul.socket.socket is not None:
        link.dul.socket.socket.close()


def send(port: int, files: Sequence[bytes], calling: str = "CT1", **options: Any) -> list[int | None]:
    """Send files over one association, and return the status of each; None where no answer came."""
    link = association(port, calling, **options)
    assert link.is_established
    statuses: list[int | None] = []
    try:
        for data in files:
            answer = link.send_c_store(pydicom.dcmread(io.BytesIO(data)))
            statuses.append(int(answer.Status) if "Status" in answer else None)
    finally:
        link.release()
    return statuses


def done_with(service: Service, *states: str, count: int = 1) -> Callable[[], bool]:
    """Whether so many studies are in one of these states."""
    wanted = states or ("done",)
    return lambda: sum(state in wanted for state in service.queue.states().values()) >= count


def main() -> None:
    """A service in a process of its own, to be killed: STATE PORT PACS_PORT [seconds per study]."""
    state, port, pacs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    settings = config(
        state,
        listen=ListenConfig(host="127.0.0.1", port=port),
        peers=(PeerConfig("*"),),
        rules=(RuleConfig("thick", ("pacs",), restore_identity=True),),
        destinations={"pacs": DestinationConfig(c_store=f"PACS@127.0.0.1:{pacs}", timeout_s=5.0)},
        timing=TimingConfig(
            quiet_s=0.8, unfinished_quiet_s=20.0, retry_s=0.2, retry_most_s=1.0, attempts=1000, refusals=1000
        ),
    )

    def slow(request: InterpolateRequest) -> InterpolateResult:
        time.sleep(float(np.random.default_rng().uniform(0, 2 * pause)))
        return quick(request)

    service = Service(settings, slow)
    service.start()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
