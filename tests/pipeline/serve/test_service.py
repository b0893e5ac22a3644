"""The service as a whole: studies in, one result each out, whatever senders, disks and destinations do."""

from __future__ import annotations

import io
import json
import logging
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from latentcache import InputError, StoreError
from pipeline.serve import Service, TimingConfig
from pipeline.serve.config import MonitoringConfig, RuleConfig, WatchConfig
from pipeline.writing import read_provenance
from tests.support.hospital import write_zip
from tests.support.serve_site import (
    Shelf,
    a_study,
    association,
    config,
    done_with,
    free_port,
    quick,
    running,
    send,
    wait_for,
)


def one_result_each(shelf: Shelf, studies: int) -> None:
    assert len(shelf.series) == studies
    assert set(shelf.got.values()) == {1}


def test_a_study_comes_in_and_one_result_goes_out(tmp_path: Path) -> None:
    shelf = Shelf()
    with running(config(tmp_path), shelf) as service:
        assert service.receiver is not None
        assert send(service.receiver.port, a_study(1).files()) == [0, 0, 0, 0]
        wait_for(done_with(service))
        (row,) = service.queue.results()
    assert (row["n_slices"], row["state"], row["revision"]) == (20, "delivered", 1)
    one_result_each(shelf, 1)
    assert len(shelf.got) == 20
    assert read_provenance(shelf.datasets[0])["kind"] == "generated"
    assert b"PATIENT1" not in b"".join(path.read_bytes() for path in (tmp_path / "private" / "results").rglob("*.dcm"))
    for path in (tmp_path / "private").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or "results" in path.parts, path


def test_a_study_that_arrives_twice_gets_one_result(tmp_path: Path) -> None:
    shelf = Shelf()
    with running(config(tmp_path), shelf) as service:
        assert service.receiver is not None
        for _ in range(2):
            assert send(service.receiver.port, a_study(1).files()) == [0] * 4
            wait_for(done_with(service))
        time.sleep(1.0)
        assert service.queue.summary()["counters"]["instances_repeated"] == 4
        assert len(service.queue.results()) == 1
    one_result_each(shelf, 1)


def test_the_same_uid_with_other_content_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    with running(config(tmp_path)) as service:
        assert service.receiver is not None
        send(service.receiver.port, a_study(1).files())
        assert send(service.receiver.port, a_study(1, seed=99).files()) == [0x0111] * 4
        wait_for(done_with(service))
        assert len(service.queue.results()) == 1


def test_a_study_that_grows_after_it_was_processed_gets_a_new_revision_and_then_is_held(tmp_path: Path) -> None:
    shelf, files = Shelf(), a_study(1, n=6).files()
    timing = TimingConfig(quiet_s=0.3, retry_s=0.05, revisions=2)
    with running(config(tmp_path, timing=timing), shelf) as service:
        assert service.receiver is not None
        send(service.receiver.port, files[:4])
        wait_for(done_with(service))
        send(service.receiver.port, files[4:5])
        wait_for(lambda: len(service.queue.results()) == 2 and done_with(service)())
        send(service.receiver.port, files[5:])
        wait_for(done_with(service, "held"))
        assert [row["n_slices"] for row in service.queue.results()] == [20, 25]
        assert "a person decides" in service.queue.summary()["quarantined"][0]["reason"]
    assert len(shelf.series) == 2


def test_images_of_another_series_do_not_make_a_second_result(tmp_path: Path) -> None:
    shelf = Shelf()
    scout = a_study(1, n=1)
    with running(config(tmp_path), shelf) as service:
        assert service.receiver is not None
        send(service.receiver.port, a_study(1).files())
        wait_for(done_with(service))
        send(service.receiver.port, replace(scout, uid="1.2.826.1.9").files())
        time.sleep(0.5)
        wait_for(done_with(service))
        assert len(service.queue.results()) == 1
    one_result_each(shelf, 1)


def test_a_half_sent_study_waits_for_its_sender(tmp_path: Path) -> None:
    shelf, files = Shelf(), a_study(1).files()
    with running(config(tmp_path, timing=TimingConfig(quiet_s=0.2, unfinished_quiet_s=600)), shelf) as service:
        assert service.receiver is not None
        link = association(service.receiver.port)
        for data in files[:2]:
            link.send_c_store(pydicom.dcmread(io.BytesIO(data)))
        link.abort()
        time.sleep(1.5)
        assert list(service.queue.states().values()) == ["receiving"]
        send(service.receiver.port, files)
        wait_for(done_with(service))
        (row,) = service.queue.results()
        assert row["n_slices"] == 20
    one_result_each(shelf, 1)


def test_a_study_is_not_begun_while_its_association_is_open(tmp_path: Path) -> None:
    files = a_study(1).files()
    with running(config(tmp_path)) as service:
        assert service.receiver is not None
        link = association(service.receiver.port)
        for data in files[:3]:
            link.send_c_store(pydicom.dcmread(io.BytesIO(data)))
        time.sleep(1.2)
        assert service.queue.results() == []
        link.send_c_store(pydicom.dcmread(io.BytesIO(files[3])))
        link.release()
        wait_for(done_with(service))
        assert service.queue.results()[0]["n_slices"] == 20


def test_a_poison_study_is_quarantined_with_its_reason_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def poisoned(request: Any) -> Any:
        if request.source.parent.name.startswith(poison):
            raise InputError("a kernel that no model knows", expected="another", remedy="None.")
        if request.source.parent.name.startswith(broken):
            raise RuntimeError("DOE^JANE")
        return quick(request)

    shelf = Shelf()
    with caplog.at_level(logging.INFO, "ctpipe"), running(config(tmp_path), shelf, poisoned) as service:
        assert service.receiver is not None
        keys = service.intake._keys
        poison, broken = keys.study("1.2.826.1"), keys.study("1.2.826.2")
        for number in (1, 2, 3):
            send(service.receiver.port, a_study(number).files())
        wait_for(done_with(service, "quarantined", count=2))
        wait_for(done_with(service))
        reasons = {row["study_key"]: row["reason"] for row in service.queue.summary()["quarantined"]}
        assert reasons == {poison: "a kernel that no model knows", broken: "RuntimeError in each of 3 attempts"}
        assert service.queue.requeue(poison) == 1
        wait_for(done_with(service, "quarantined", count=2))
    one_result_each(shelf, 1)
    spoken = caplog.text + json.dumps([getattr(record, "ctpipe_fields", {}) for record in caplog.records])
    assert poison in spoken
    for secret in ("DOE", "PATIENT", "1.2.826"):
        assert secret not in spoken


def test_truncated_pixels_and_missing_slices_are_quarantined_by_key(tmp_path: Path) -> None:
    def cut(ds: Dataset) -> None:
        if ds.InstanceNumber == 2:
            ds.PixelData = ds.PixelData[:100]

    gap = a_study(2, n=6).files()
    with running(config(tmp_path)) as service:
        assert service.receiver is not None
        send(service.receiver.port, a_study(1, edit=cut).files())
        send(service.receiver.port, gap[:2] + gap[3:])
        wait_for(lambda: not {"receiving", "working"} & set(service.queue.states().values()))
        states = set(service.queue.states().values())
        assert states <= {"quarantined", "skipped"}
        assert "quarantined" in states
        assert service.queue.results() == []


def test_what_no_rule_selects_is_skipped(tmp_path: Path) -> None:
    rules = (RuleConfig("chest", ("pacs",), body_part=("CHEST",)),)
    with running(config(tmp_path, rules=rules)) as service:
        assert service.receiver is not None
        send(service.receiver.port, a_study(1).files())
        wait_for(done_with(service, "skipped"))
        send(service.receiver.port, a_study(2, edit=lambda ds: setattr(ds, "BodyPartExamined", "CHEST")).files())
        wait_for(done_with(service))
        assert len(service.queue.results()) == 1


def test_our_own_results_do_not_come_round_again(tmp_path: Path) -> None:
    shelf = Shelf()
    rules = (RuleConfig("thick", ("pacs",), restore_identity=True),)
    with running(config(tmp_path, rules=rules), shelf) as service:
        assert service.receiver is not None
        send(service.receiver.port, a_study(1).files())
        wait_for(done_with(service))
        assert shelf.datasets[0].PatientID == "PATIENT1"
        assert shelf.datasets[0].StudyInstanceUID == "1.2.826.1"
        back = [path.read_bytes() for path in sorted((tmp_path / "private" / "results").rglob("*.dcm"))]
        assert send(service.receiver.port, back) == [0] * 20
        time.sleep(1.0)
        assert service.queue.summary()["counters"]["instances_ours"] == 20
        assert len(service.queue.results()) == 1
    one_result_each(shelf, 1)


def test_a_destination_that_fails_gets_everything_in_the_end(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.fails = 5
    with running(config(tmp_path), shelf) as service:
        assert service.receiver is not None
        send(service.receiver.port, a_study(1).files())
        wait_for(done_with(service))
        assert service.queue.results()[0]["attempts"] == 6
    one_result_each(shelf, 1)


def test_a_watched_folder_is_read_once_for_every_change(tmp_path: Path) -> None:
    incoming, shelf = tmp_path / "in", Shelf()
    write_zip(incoming / "one.zip", [a_study(1)])
    (incoming / "two").mkdir()
    for i, data in enumerate(a_study(2).files()):
        (incoming / "two" / f"I{i}").write_bytes(data)
    (incoming / "broken.zip").write_bytes(b"PK no zip at all")
    settings = config(
        tmp_path / "state", listen=None, peers=(), watch=WatchConfig(incoming, every_s=0.1, settled_s=0.2)
    )
    with running(settings, shelf) as service:
        wait_for(done_with(service, count=2))
        time.sleep(0.6)
        assert service.queue.summary()["counters"]["watched_read"] == 2
        assert service.queue.summary()["counters"]["watched_unreadable"] == 1
    one_result_each(shelf, 2)


def test_old_files_are_deleted_and_the_same_study_makes_nothing_new(tmp_path: Path) -> None:
    shelf, files = Shelf(), a_study(1, n=5).files()
    with running(config(tmp_path, timing=TimingConfig(quiet_s=0.2, keep_h=0.0, retry_s=0.05)), shelf) as service:
        assert service.receiver is not None
        send(service.receiver.port, files[:4])
        wait_for(done_with(service))
        service.tidy()
        assert not list((tmp_path / "private").rglob("*.dcm"))
        assert send(service.receiver.port, files[:4]) == [0] * 4
        time.sleep(0.6)
        service.tidy()
        assert len(service.queue.results()) == 1
        send(service.receiver.port, files[4:])
        wait_for(done_with(service, "held"))
        assert "send the whole study again" in service.queue.summary()["quarantined"][0]["reason"]
        assert send(service.receiver.port, files) == [0] * 5
        wait_for(done_with(service))
        assert [row["n_slices"] for row in service.queue.results()] == [20, 25]


def test_health_and_metrics_tell_figures_and_problems(tmp_path: Path) -> None:
    with running(config(tmp_path, monitoring=MonitoringConfig(free_port()))) as service:
        assert service.receiver is not None
        assert service.monitoring is not None
        send(service.receiver.port, a_study(1).files())
        wait_for(done_with(service))
        base = f"http://127.0.0.1:{service.monitoring.port}"
        assert json.loads(urllib.request.urlopen(f"{base}/health").read())["healthy"] is True
        text = urllib.request.urlopen(f"{base}/metrics").read().decode()
        assert 'ctpipe_serve_studies{state="done"} 1' in text
        assert 'ctpipe_serve_deliveries{destination="pacs",state="delivered"} 1' in text
        assert "ctpipe_serve_instances_received_total 4" in text
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{base}/private")
        assert caught.value.code == 404
        caught.value.close()
        service.intake._limits = replace(service.config.limits, min_free_gib=1e9)
        service.intake._disk_at = -1e9
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{base}/ready")
        assert caught.value.code == 503
        assert "no room on the disk" in json.loads(caught.value.read())["problems"]
        caught.value.close()


def test_a_destination_that_fails_in_unforeseen_ways_stops_nothing(tmp_path: Path) -> None:
    class Broken(Shelf):
        def deliver(self, paths: Any, done: Any, refused: Any) -> None:
            if self.fails:
                self.fails -= 1
                raise RuntimeError("DOE^JANE")
            super().deliver(paths, done, refused)

    shelf = Broken()
    shelf.fails = 2
    with running(config(tmp_path), shelf) as service:
        assert service.receiver is not None
        send(service.receiver.port, a_study(1).files())
        wait_for(lambda: service.queue.summary()["undelivered"])
        assert "DOE" not in json.dumps(service.queue.summary())
        wait_for(done_with(service))
        assert service.state()["dead"] == []
    one_result_each(shelf, 1)


def test_one_service_per_state_folder(tmp_path: Path) -> None:
    with running(config(tmp_path)), pytest.raises(StoreError, match="another service"):
        Service(config(tmp_path), quick, send_to={})
