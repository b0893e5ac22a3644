"""The loop with a real PACS: Orthanc routes studies in, results go back to it, and everybody is killed at random."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.serve import DestinationConfig, read_status
from pipeline.serve.config import RuleConfig
from pipeline.serve.delivery import destination_of
from tests.pipeline.writing.pacs.test_send import ORTHANC, WEB_PLUGIN, Orthanc
from tests.pipeline.writing.test_ct_image import validator_errors
from tests.support.hospital import Scan
from tests.support.serve_site import a_study, config, done_with, free_port, running, wait_for

pytestmark = pytest.mark.skipif(
    ORTHANC is None or not WEB_PLUGIN.exists(), reason="needs the Debian packages orthanc and orthanc-dicomweb"
)
ROUTE = """
function OnStableStudy(studyId, tags, metadata)
    RestApiPost('/modalities/ctpipe/store', '{"Resources": ["' .. studyId .. '"], "Asynchronous": true}')
end
"""
SITE = Path(__file__).parents[1] / "support" / "serve_site.py"


def pacs(folder: Path, ctpipe_port: int, ports: tuple[int, int] | None = None, route: bool = True) -> Orthanc:
    folder.mkdir(exist_ok=True)
    (folder / "route.lua").write_text(ROUTE)
    extra: dict[str, Any] = {
        "DicomModalities": {"ctpipe": ["CTPIPE", "127.0.0.1", ctpipe_port]},
        "StableAge": 1,
        "LuaScripts": [str(folder / "route.lua")] if route else [],
        "DicomScuTimeout": 5,
        "OverwriteInstances": False,
        "SynchronousCMove": True,
    }
    return Orthanc(folder, ports, extra)


def post(server: Orthanc, path: str, data: bytes, seconds: float = 30) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http}{path}", data, method="POST")
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return json.loads(answer.read())


def upload(server: Orthanc, scan: Scan) -> str:
    """Put a study into the PACS and return Orthanc's name for it."""
    parents = {post(server, "/instances", data)["ParentStudy"] for data in scan.files()}
    (study,) = parents
    return str(study)


def results_of(server: Orthanc, study: str) -> list[dict[str, Any]]:
    """The series of a study that ctpipe made."""
    series = server.get(f"/studies/{study}/series")
    return [one for one in series if one["MainDicomTags"].get("SeriesDescription", "").startswith("ctpipe ")]


@pytest.mark.parametrize("back", ["c-store", "stow-rs"])
def test_orthanc_routes_studies_in_and_gets_results_back(tmp_path: Path, back: str) -> None:
    port = free_port()
    server = pacs(tmp_path / "pacs", port)
    try:
        section = (
            DestinationConfig(c_store=f"ORTHANC@127.0.0.1:{server.dicom}")
            if back == "c-store"
            else DestinationConfig(stow_rs=f"http://127.0.0.1:{server.http}/dicom-web")
        )
        rules = (RuleConfig("thick", ("pacs",), calling_ae=("ORTHANC",), restore_identity=True),)
        settings = config(tmp_path / "state", rules=rules)
        assert settings.listen is not None
        settings = replace(
            settings,
            listen=replace(settings.listen, port=port),
            peers=(replace(settings.peers[0], ae_title="ORTHANC"),),
        )
        with running(settings, destination_of("pacs", section)) as service:
            studies = [upload(server, a_study(number)) for number in (1, 2, 3)]
            wait_for(done_with(service, count=3), 60)
            # The PACS routes a study on again when our result made it stable anew: nothing may come of that.
            wait_for(lambda: service.queue.summary()["counters"].get("instances_ours", 0) >= 60, 60)
            wait_for(done_with(service, count=3), 60)
            assert len(service.queue.results()) == 3
        for study in studies:
            (series,) = results_of(server, study)
            assert len(series["Instances"]) == 20
            one = tmp_path / "one.dcm"
            one.write_bytes(server.get(f"/instances/{series['Instances'][0]}/file"))
            assert validator_errors(one) == []
    finally:
        server.stop()


class Victim:
    """A process that is killed at random and started again, so many times."""

    def __init__(self, start: Any, longest_s: float, seed: int, enough: int) -> None:
        self.start, self.longest_s, self.chance, self.enough = start, longest_s, random.Random(seed), enough
        self.kills, self.process = 0, start()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._hunt)
        self.thread.start()

    def _hunt(self) -> None:
        while self.kills < self.enough and not self.stopping.wait(self.chance.uniform(0.2, self.longest_s)):
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.kills += 1
            time.sleep(self.chance.uniform(0, 0.3))
            self.process = self.start()

    def spare(self) -> None:
        self.stopping.set()
        self.thread.join()

    def stop(self) -> None:
        self.spare()
        self.process.kill()
        self.process.wait()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def killed_service(
    state: Path, port: int, pacs_port: int, *, pause: float, longest_s: float, kills: int
) -> Iterator[Victim]:
    words = [sys.executable, str(SITE), str(state), str(port), str(pacs_port), str(pause)]

    def start() -> subprocess.Popen[bytes]:
        with (state.parent / "log").open("ab") as errors:
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
        until = time.monotonic() + 60
        while not answers(port):
            assert process.poll() is None, (state.parent / "log").read_text()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.1)
        return process

    victim = Victim(start, longest_s, 1, kills)
    try:
        yield victim
    finally:
        victim.stop()


def route_until_taken(server: Any, study: str) -> int:
    """Send a study as a router does that tries again until all of it was acknowledged; return the tries."""
    body = json.dumps({"Resources": [study], "Synchronous": True, "Timeout": 5}).encode()
    for attempt in range(1, 500):
        try:
            post(server(), "/modalities/ctpipe/store", body)
        except (OSError, urllib.error.HTTPError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            time.sleep(0.1)
        else:
            return attempt
    raise AssertionError("never taken")


def loop_with_kills(tmp_path: Path, studies: int, *, longest_s: float, kills: int, kill_pacs: bool) -> dict[str, Any]:
    port, folder = free_port(), tmp_path / "pacs"
    first = pacs(folder, port, route=False)
    ports = (first.http, first.dicom)
    names = [upload(first, a_study(number)) for number in range(1, studies + 1)]
    held = {"pacs": first}

    def start_pacs() -> Any:
        if held["pacs"].process.poll() is not None:
            held["pacs"] = pacs(folder, port, ports, route=False)
        return held["pacs"].process

    state = tmp_path / "state"
    began = time.monotonic()
    other = Victim(start_pacs, 2 * longest_s, 2, kills // 3) if kill_pacs else None
    try:
        with killed_service(state, port, ports[1], pause=0.2, longest_s=longest_s, kills=kills) as service:
            tries = sum(route_until_taken(lambda: held["pacs"], name) for name in names)
            until = time.monotonic() + 120 + 20 * studies  # a bound against hanging
            while time.monotonic() < until:
                summary = read_status(state)
                if summary["studies"]["done"] == studies:
                    break
                time.sleep(0.5)
            service.spare()
            if other is not None:
                other.spare()
            summary = read_status(state)
            assert summary["studies"]["done"] == studies, summary
            killed = service.kills
        made = {name: results_of(held["pacs"], name) for name in names}
        wrong = {name: len(series) for name, series in made.items() if len(series) != 1}
        assert wrong == {}, "each study has exactly one result"
        assert {len(series[0]["Instances"]) for series in made.values()} == {20}
        one = tmp_path / "one.dcm"
        one.write_bytes(held["pacs"].get(f"/instances/{made[names[0]][0]['Instances'][0]}/file"))
        assert validator_errors(one) == []
        assert "1.2.826" not in (tmp_path / "log").read_text()
        return {"kills": killed, "pacs_kills": other.kills if other else 0, "tries": tries,
                "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
    finally:
        if other is not None:
            other.spare()
        held["pacs"].process.kill()
        held["pacs"].process.wait()


def test_a_service_that_is_killed_at_random_makes_one_result_of_each_study(tmp_path: Path) -> None:
    done = loop_with_kills(tmp_path, 3, longest_s=3.0, kills=4, kill_pacs=False)
    assert done["kills"] >= 1


@pytest.mark.slow
def test_a_hundred_studies_with_service_and_pacs_killed_at_random(tmp_path: Path) -> None:
    done = loop_with_kills(tmp_path, 100, longest_s=8.0, kills=30, kill_pacs=True)
    print(done)
    assert done["kills"] >= 10
    assert done["pacs_kills"] >= 3
