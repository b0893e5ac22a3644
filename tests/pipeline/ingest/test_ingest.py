from __future__ import annotations

import errno
import importlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from latentcache import LatentStore, PairRecord, SeriesRecord, StoreError
from pipeline.archive import FoundArchive, source as archive
from pipeline.identity import PrivateStore
from pipeline.ingest import (
    IngestOptions,
    check_secret,
    ingest,
    open_stores,
    plan as ingest_plan,
    read_overrides,
    scan as ingest_scan,
)
from pipeline.ingest.summary import IngestSummary
from tests.support.hospital import study, thick, thin, write_zip

ingest_module = importlib.import_module("pipeline.ingest.ingest")


class Bench:
    """A dataset and a store side by side."""

    def __init__(self, root: Path) -> None:
        self.data, self.url = root / "data", str(root / "store")
        self.data.mkdir()
        self.store, self.private = open_stores(self.url)

    def run(self, **options: object) -> IngestSummary:
        return ingest(str(self.data), self.store, self.private, IngestOptions(**options))  # type: ignore[arg-type]

    def series(self) -> dict[str, SeriesRecord]:
        return {row.series_key: row for row in self.store.series()}

    def of_uid(self, uid: str) -> SeriesRecord:
        return self.series()[self.private.keys.series(uid)]

    def good_pairs(self) -> list[PairRecord]:
        return [pair for pair in self.store.pairs() if pair.status == "ok"]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    return Bench(tmp_path)


def never_open(*args: object) -> None:
    raise AssertionError("an archive was opened")


def scan_or_die(found: FoundArchive, *rest: object) -> ingest_scan.ArchiveScan:
    """A reader that takes its whole process down on one archive, as a faulty codec does."""
    if found.url.endswith("1.zip"):
        os._exit(9)
    return ingest_scan.scan_archive(found, *rest)  # type: ignore[arg-type]


def test_a_study_becomes_two_series_and_a_pair(bench: Bench) -> None:
    write_zip(bench.data / "APE" / "patient_001.zip", study("PAT1", 3))
    summary = bench.run()
    assert (summary.pairs, summary.series, summary.categories) == (1, {"thick": 1, "thin": 1}, {"APE": 1})
    assert not summary.quarantined
    (pair,) = bench.good_pairs()
    assert bench.series()[pair.thick_key].n_slices == 4
    assert bench.series()[pair.thin_key].spacing_mm_zyx == (1.0, 1.0, 1.0)
    assert pair.overlap_mm == (-0.5, 19.5)
    assert pair.split == bench.series()[pair.thick_key].split == "train"
    assert bench.private.pointer(pair.thick_key).members[0] == (str(bench.data / "APE/patient_001.zip"), 0, 0)


def test_bad_archives_are_named_by_key_and_stop_nothing(bench: Bench) -> None:
    write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    (bench.data / "APE" / "b.zip").write_bytes(b"PK\x03\x04 this is no zip")
    write_zip(bench.data / "APE" / "c.zip", [])
    write_zip(bench.data / "APE" / "d.zip", [], extra=[("notes/readme.txt", b"hello " * 100)])
    write_zip(bench.data / "non-APE" / "e.zip", [thick("1.7.5", study="1.7", patient="PAT7")])
    summary = bench.run()
    assert summary.quarantined
    assert summary.pairs == 1
    reasons = {item.key: (item.kind, item.reason) for item in summary.set_aside}
    keys = bench.private.keys
    archive = {name: keys.archive(str(bench.data / "APE" / f"{name}.zip")) for name in "bcd"}
    assert "truncated or no zip" in reasons.pop(archive["b"])[1]
    assert reasons.pop(archive["c"]) == ("archive", "it is empty")
    assert reasons.pop(archive["d"]) == ("archive", "it holds no DICOM file")
    assert reasons.pop(keys.patient("PAT7")) == ("patient", "not paired: no thin series in the study")
    assert not reasons
    rows = bench.series()
    assert all(rows[key].status == "quarantined" and rows[key].reason for key in archive.values())
    again = bench.run()
    assert {item.key for item in again.set_aside} == {item.key for item in summary.set_aside}
    assert again.archives == {"unchanged": 5}


def test_a_damaged_member_at_the_end_of_a_series_is_told(bench: Bench) -> None:
    """The slices that are left look whole: only the member's own fault says that one is missing."""
    whole = thick()
    files = [(f"1/{i}", whole.file(i)[: 400 if i == 3 else None]) for i in range(4)]
    path = write_zip(bench.data / "APE" / "a.zip", [thin()], extra=files)
    (item,) = bench.run().set_aside
    assert (item.kind, item.key) == ("archive", bench.private.keys.archive(str(path)))
    assert item.reason.startswith("1 of its files cannot be read: ")
    write_zip(path, [thin(), whole])
    assert not bench.run().quarantined


def test_nothing_is_opened_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    bench.run()
    before = bench.store.snapshot
    monkeypatch.setattr(ingest_scan, "open_archive", never_open)
    assert bench.run().archives == {"unchanged": 1}
    assert bench.store.snapshot == before


def test_a_touched_archive_is_told_by_its_directory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    bench.run()
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(ingest_scan, "scan", never_open)
    assert bench.run().archives == {"unchanged": 1}
    monkeypatch.setattr(ingest_scan, "open_archive", never_open)
    assert bench.run().archives == {"unchanged": 1}


def test_a_changed_archive_is_read_again_and_lost_series_are_ended(bench: Bench) -> None:
    path = write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    bench.run()
    write_zip(path, study("PAT1", 3)[:1])
    summary = bench.run()
    assert summary.archives == {"changed": 1}
    assert bench.of_uid("1.2.3.1").status == "quarantined"
    assert not bench.good_pairs()
    assert [item.kind for item in summary.set_aside] == ["patient"]
    write_zip(path, study("PAT1", 3))
    assert bench.run().pairs == 1


def test_a_repaired_archive_is_no_longer_reported(bench: Bench) -> None:
    path = bench.data / "APE" / "a.zip"
    path.parent.mkdir()
    path.write_bytes(b"half a download")
    assert bench.run().quarantined
    write_zip(path, study("PAT1", 3))
    assert not bench.run().quarantined


def test_a_study_over_two_zips_is_paired(bench: Bench) -> None:
    one, two = study("PAT1", 3)
    write_zip(bench.data / "APE" / "a.zip", [one])
    write_zip(bench.data / "APE" / "b.zip", [two])
    assert bench.run().pairs == 1


@pytest.mark.parametrize("batch", [1, 8])
def test_a_series_over_two_zips_is_assembled(bench: Bench, batch: int) -> None:
    whole = thin(n=20)
    for name, wanted in (("a", range(0, 20, 2)), ("b", range(1, 20, 2))):
        extra = [(f"x/{i}", whole.file(i)) for i in wanted]
        write_zip(bench.data / "APE" / f"{name}.zip", [thick()] if name == "a" else [], extra)
    summary = bench.run(batch=batch)
    row = bench.of_uid("1.2.3.1")
    assert (row.status, row.n_slices, row.spacing_mm_zyx[0]) == ("ok", 20, 1.0)
    assert summary.pairs == 1
    members = bench.private.pointer(row.series_key).members
    assert [Path(url).name for url, _, _ in members] == ["a.zip", "b.zip"] * 10


def test_several_studies_in_one_zip(bench: Bench) -> None:
    write_zip(bench.data / "APE" / "a.zip", [*study("PAT1", 3), *study("PAT2", 4)])
    summary = bench.run()
    assert (summary.patients, summary.studies, summary.pairs) == (2, 2, 2)


def test_a_plain_folder_is_an_archive_too(bench: Bench) -> None:
    for number, scan in enumerate(study("PAT1", 3)):
        for i, data in enumerate(scan.files()):
            file = bench.data / "APE" / "patient_001" / str(number) / f"{i}.dcm"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    (bench.data / "notes").mkdir()
    (bench.data / "notes" / "todo.txt").write_text("nothing for ctpipe")
    summary = bench.run()
    assert summary.pairs == 1
    assert summary.archives == {"new": 1, "ignored": 1}
    assert not summary.quarantined
    assert bench.run().archives == {"unchanged": 2}


def test_what_cannot_be_used_is_listed_by_key_and_stops_nothing(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    (bench.data / "APE" / "Doe^Jane.zip").symlink_to("/nonexistent")
    os.mkfifo(bench.data / "APE" / "Roe^Pipe.zip")
    (bench.data / "APE" / "Poe^Old.7z").write_bytes(b"7z")
    for i, data in enumerate(thick("1.2.9.5", study="1.2.9", patient="PAT9", frame="1.9.9").files()):
        file = bench.data / "APE" / "Loe^Loose" / f"{i}.dcm"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    (bench.data / "APE" / "Loe^Loose" / "Loe^Lost.dcm").symlink_to("/nonexistent")
    os.mkfifo(bench.data / "APE" / "Loe^Loose" / "Loe^Pipe")
    summary = bench.run()
    keys = bench.private.keys
    reasons = {item.key: item.reason for item in summary.set_aside if item.kind == "archive"}
    assert reasons.pop(keys.archive(str(bench.data / "APE/Doe^Jane.zip"))) == "a link to nothing"
    assert reasons.pop(keys.archive(str(bench.data / "APE/Roe^Pipe.zip"))) == "a named pipe, not a file"
    assert "not read (7z)" in reasons.pop(keys.archive(str(bench.data / "APE/Poe^Old.7z")))
    loose = reasons.pop(keys.archive(str(bench.data / "APE/Loe^Loose")))
    assert loose.startswith("2 of its files cannot be read")
    assert not reasons
    assert (summary.pairs, summary.archives) == (1, {"new": 2, "unusable": 3})
    assert summary.series["thick"] == 2
    private = bench.private.table("quarantine").to_pylist()
    assert {"Loe^Lost.dcm", "Loe^Pipe"} <= {row["member"] for row in private}
    assert any(row["url"].endswith("Doe^Jane.zip") and row["reason"] == "a link to nothing" for row in private)
    said = "".join(capfd.readouterr()) + summary.text() + repr(bench.store.series())
    assert not any(name in said for name in ("Doe", "Roe", "Poe", "Loe"))
    again = bench.run()
    assert again.archives == {"unchanged": 5}
    assert again.set_aside == summary.set_aside


def test_archives_within_archives_are_listed_by_key(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    """By name where a zip holds them, by content where the name does not tell; documents and a Mac's notes are not."""
    inner = write_zip(bench.data.parent / "inner.zip", study("PAT2", 4)).read_bytes()
    tar = bytes(257) + b"ustar" + bytes(250)
    within = {
        "Doe^Jane/old.zip": inner,
        "old.tar.gz": b"\x1f\x8b\x08",
        "old.7z": b"7z",
        "image.dcm.gz": b"x",
        "Doe^Jane/EXPORT": inner,
        "Doe^Jane/BACKUP.dcm": tar,
    }
    harmless = {"letter.docx": inner, "__MACOSX/._old.zip": b"x", "._old.zip": b"x", "notes.txt": b"PK", "empty": b""}
    archive = write_zip(bench.data / "a.zip", study("PAT1", 3), extra=[*within.items(), *harmless.items()])
    only = write_zip(bench.data / "b.zip", [], extra=[("Roe^Rob.zip", inner)])
    summary = bench.run()
    keys = bench.private.keys
    reasons = {item.key: item.reason for item in summary.set_aside}
    assert "6 of its files cannot be read, 2 of them: an archive within the archive (zip)" in reasons.pop(
        keys.archive(str(archive))
    )
    assert "an archive within the archive (zip)" in reasons.pop(keys.archive(str(only)))
    assert not reasons
    assert summary.pairs == 1
    private = bench.private.table("quarantine").to_pylist()
    assert {row["member"] for row in private if row["member"]} == {*within, "Roe^Rob.zip"}
    assert not any(name in "".join(capfd.readouterr()) + summary.text() for name in ("Doe", "Roe"))
    assert bench.run().set_aside == summary.set_aside


def test_an_archive_among_loose_files_is_listed_once(bench: Bench) -> None:
    inner = write_zip(bench.data.parent / "inner.zip", []).read_bytes()
    folder = bench.data / "APE" / "Loe^Loose"
    folder.mkdir(parents=True)
    for i, data in enumerate(thick("1.2.9.5").files()):
        (folder / f"{i}.dcm").write_bytes(data)
    (folder / "OLD").write_bytes(b"PK\x03\x04" + inner)
    (folder / "old.rar").write_bytes(b"Rar!")
    reasons = sorted(item.reason for item in bench.run().set_aside if item.kind == "archive")
    assert len(reasons) == 2
    assert (
        reasons[0] == "1 of its files cannot be read: an archive within the archive (zip), which is not looked "
        "into: unpack it beside the others"
    )
    assert "not read (rar)" in reasons[1]


def test_an_entry_that_can_be_used_again_or_has_gone_is_no_longer_reported(bench: Bench) -> None:
    target = bench.data.parent / "target.zip"
    (bench.data / "a.zip").symlink_to(target)
    (bench.data / "b.7z").write_bytes(b"7z")
    other = bench.data.parent / "other"
    other.mkdir()
    (other / "c.rar").write_bytes(b"Rar!")
    ingest(str(other), bench.store, bench.private)
    assert len(bench.run().set_aside) == 3
    write_zip(target, study("PAT1", 3))
    (bench.data / "b.7z").unlink()
    summary = bench.run()
    assert (summary.pairs, summary.archives) == (1, {"changed": 1})
    (left,) = summary.set_aside
    assert left.key == bench.private.keys.archive(str(other / "c.rar"))
    (other / "c.rar").unlink()
    assert not ingest(str(other), bench.store, bench.private).set_aside


def test_an_archive_behind_a_link_that_leads_nowhere_for_a_while_is_kept(bench: Bench) -> None:
    target = write_zip(bench.data.parent / "disk" / "a.zip", study("PAT1", 3))
    (bench.data / "a.zip").symlink_to(target)
    assert bench.run().pairs == 1
    target.rename(target.with_suffix(".away"))
    summary = bench.run()
    assert (summary.pairs, [item.reason for item in summary.set_aside]) == (1, ["a link to nothing"])
    target.with_suffix(".away").rename(target)
    assert (bench.run().pairs, bench.run().quarantined) == (1, False)


def test_a_file_that_does_not_open_is_asked_for_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, data in enumerate(thick().files()):
        file = bench.data / "p" / f"{i}.dcm"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    real = archive.open_regular

    def denied(path: Path) -> int:
        if str(path).endswith("3.dcm"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(archive, "open_regular", denied)
        assert any("cannot be opened" in item.reason for item in bench.run().set_aside)
    assert bench.of_uid("1.2.3.5").n_slices == 3
    assert bench.run().archives == {"changed": 1}
    assert bench.of_uid("1.2.3.5").n_slices == 4
    assert bench.run().archives == {"unchanged": 1}


def test_the_first_archives_are_read_while_the_tree_is_still_being_listed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_plan, "FIRST_PORTION", 2)
    for i in range(12):
        write_zip(bench.data / f"p{i:02}" / "a.zip", study(f"P{i}", 10 + i))
    order: list[str] = []
    scandir, scan = os.scandir, ingest_module.scan_archive

    def listing(folder: str) -> object:
        order.append(f"list {Path(folder).name}")
        return scandir(folder)

    def scanning(found: FoundArchive, *rest: object) -> ingest_scan.ArchiveScan:
        order.append(f"scan {Path(found.url).parent.name}")
        return scan(found, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "scandir", listing)
    monkeypatch.setattr(ingest_module, "scan_archive", scanning)
    assert bench.run(batch=2).pairs == 12
    assert order.index("scan p00") < order.index("list p05")


def test_batches_and_a_kill_between_them_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTPIPE_SECRET", "one secret for both stores")
    benches = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        benches.append(Bench(tmp_path / name))
    whole, killed = benches
    for i in range(8):
        write_zip(whole.data / "APE" / f"{i}.zip", study(f"P{i}", 10 + i))
    shutil.copytree(whole.data, killed.data, dirs_exist_ok=True)
    whole.run(batch=3)

    def die(self: PrivateStore, rows: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrivateStore, "add_archives", die)
        with pytest.raises(KeyboardInterrupt):
            killed.run(batch=3)
    killed.run(batch=3)
    assert killed.series() == whole.series()
    assert {p.pair_key: p for p in killed.store.pairs()} == {p.pair_key: p for p in whole.store.pairs()}


def test_a_reader_that_fails_unforeseen_costs_one_archive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    write_zip(bench.data / "APE" / "Doe^Jane.zip", study("PAT2", 4))
    genuine = ingest_scan.scan

    def scan(source: ingest_scan.JoinedSource) -> object:
        if "Doe" in source.url:
            raise ZeroDivisionError("Doe^Jane")
        return genuine(source)

    monkeypatch.setattr(ingest_scan, "scan", scan)
    summary = bench.run()
    (item,) = summary.set_aside
    assert item.reason.startswith("an unforeseen ZeroDivisionError")
    assert "Doe" not in summary.text()
    assert "Doe^Jane" in bench.private.table("quarantine")["detail"].to_pylist()[0]
    assert summary.pairs == 1


def test_worker_processes_give_the_same(bench: Bench) -> None:
    for i in range(3):
        write_zip(bench.data / "APE" / f"{i}.zip", study(f"P{i}", 10 + i))
    assert bench.run(workers=2).pairs == 3


def test_a_worker_that_dies_costs_one_archive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        write_zip(bench.data / "APE" / f"{i}.zip", study(f"P{i}", 10 + i))
    monkeypatch.setattr(importlib.import_module("pipeline.ingest.ingest"), "scan_archive", scan_or_die)
    summary = bench.run(workers=2)
    assert summary.pairs == 2
    (item,) = summary.set_aside
    assert item.key == bench.private.keys.archive(str(bench.data / "APE" / "1.zip"))
    assert "crashed" in item.reason


def test_pixels_are_decoded_on_request(bench: Bench) -> None:
    def cut(ds: object) -> None:
        if ds.InstanceNumber == 3:  # type: ignore[attr-defined]
            ds.PixelData = ds.PixelData[:100]  # type: ignore[attr-defined]

    write_zip(bench.data / "APE" / "a.zip", [thick(edit=cut), thin()])
    summary = bench.run(verify_pixels=True)
    assert [item.kind for item in summary.set_aside] == ["series", "patient"]
    assert bench.of_uid("1.2.3.5").status == "quarantined"


def test_patients_without_an_id_fall_back_to_the_study(bench: Bench) -> None:
    write_zip(bench.data / "APE" / "a.zip", [*study("ANON", 3), *study("ANON", 4)])
    bench.run()
    rows = list(bench.series().values())
    assert len({row.patient_key for row in rows}) == 2
    assert all("no-patient-id" in row.flags for row in rows)


def test_archives_without_study_uids_are_not_taken_for_one_study(bench: Bench) -> None:
    def wipe(ds: object) -> None:
        ds.StudyInstanceUID = ""  # type: ignore[attr-defined]

    for name, number in (("a", 3), ("b", 4)):
        scans = [replace(scan, edit=wipe) for scan in study("ANON", number)]
        write_zip(bench.data / "APE" / f"{name}.zip", scans)
    assert bench.run().pairs == 2
    rows = list(bench.series().values())
    assert len({row.study_key for row in rows}) == len({row.patient_key for row in rows}) == 2


def test_a_shared_id_is_noticed_by_its_birth_dates(bench: Bench) -> None:
    def born(date: str) -> object:
        return lambda ds: setattr(ds, "PatientBirthDate", date)

    first = [replace(scan, edit=born("19500101")) for scan in study("77", 3)]  # type: ignore[arg-type]
    second = [replace(scan, edit=born("19600101")) for scan in study("77", 4)]  # type: ignore[arg-type]
    write_zip(bench.data / "APE" / "a.zip", first)
    bench.run()
    write_zip(bench.data / "APE" / "b.zip", second)
    bench.run()
    assert bench.of_uid("1.2.3.1").patient_key == bench.private.keys.patient("77")
    assert bench.of_uid("1.2.4.1").patient_key == bench.private.keys.patient_of_study("1.2.4")
    assert "shared-patient-id" in bench.of_uid("1.2.4.1").flags


def test_splits_stand_when_patients_are_added(bench: Bench) -> None:
    for i in range(6):
        write_zip(bench.data / "APE" / f"{i}.zip", study(f"P{i}", 10 + i))
    bench.run()
    before = {row.patient_key: row.split for row in bench.series().values()}
    assert sorted(set(before.values())) == ["test", "train", "val"]
    for i in range(6, 12):
        write_zip(bench.data / "non-APE" / f"{i}.zip", study(f"P{i}", 10 + i))
    summary = bench.run()
    after = {row.patient_key: row.split for row in bench.series().values()}
    assert {key: after[key] for key in before} == before
    assert sum(summary.paired_splits.values()) == 12


def test_moving_an_archive_to_another_category_relabels_without_reading(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    bench.run()
    monkeypatch.setattr(ingest_scan, "open_archive", never_open)
    summary = bench.run(categories=("other",))
    assert summary.categories == {"unlabelled": 1}
    assert bench.good_pairs()[0].category == "unlabelled"


def csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_users_splits_come_first_and_move_patients(bench: Bench, tmp_path: Path) -> None:
    for i in range(4):
        write_zip(bench.data / "APE" / f"{i}.zip", study(f"P{i}", 10 + i))
    everyone = "\n".join(f"P{i},test" for i in range(3))
    splits = csv(tmp_path / "s.csv", f"patient,split\n{everyone}\n")
    overrides = read_overrides(bench.private.keys, None, splits, None)
    assert bench.run(overrides=overrides).paired_splits["test"] == 3
    moved = csv(tmp_path / "m.csv", f"Patient , Split\n{bench.private.keys.patient('P0')},train\n")
    bench.run(overrides=read_overrides(bench.private.keys, None, moved, None))
    assert bench.of_uid("1.2.10.1").split == "train"
    assert {p.split for p in bench.good_pairs() if p.patient_key == bench.private.keys.patient("P0")} == {"train"}


@pytest.mark.parametrize("line", ["archive\n0.zip", "archive\nAPE/0", "patient\nP0", "study\n1.2.10"])
@pytest.mark.parametrize("late", [False, True])
def test_what_the_user_leaves_out_is_left_out(bench: Bench, tmp_path: Path, line: str, late: bool) -> None:
    for i in range(2):
        write_zip(bench.data / "APE" / f"{i}.zip", study(f"P{i}", 10 + i))
    if late:
        bench.run()
    column, value = line.split("\n")
    exclude = csv(tmp_path / "x.csv", f"{column}\n{'0' if value == 'APE/0' else value}\n")
    summary = bench.run(overrides=read_overrides(bench.private.keys, None, None, exclude))
    assert summary.pairs == 1
    assert not summary.quarantined
    assert {row.patient_key for row in bench.series().values() if row.status == "ok"} == {
        bench.private.keys.patient("P1")
    }


def test_the_users_pairs_replace_and_stay(bench: Bench, tmp_path: Path) -> None:
    sharp = thin("1.2.3.2", kernel="B70f")
    path = write_zip(bench.data / "APE" / "a.zip", [thick(), thin(), sharp])
    bench.run()
    assert bench.good_pairs()[0].thin_key == bench.private.keys.series("1.2.3.1")
    pairs = csv(tmp_path / "p.csv", "thick,thin\n1.2.3.5,1.2.3.2\n")
    bench.run(overrides=read_overrides(bench.private.keys, pairs, None, None))
    for _ in range(2):
        (pair,) = bench.good_pairs()
        assert pair.thin_key == bench.private.keys.series("1.2.3.2")
        assert '"chosen_by": "user"' in pair.evidence
        write_zip(path, [thick(), thin(), sharp], extra=[("added.txt", b"x")])
        bench.run()


def test_an_unknown_series_in_the_users_pairs_is_reported(bench: Bench, tmp_path: Path) -> None:
    write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    pairs = csv(tmp_path / "p.csv", "thick,thin\n1.2.3.5,9.9.9\n")
    summary = bench.run(overrides=read_overrides(bench.private.keys, pairs, None, None))
    assert [item.key for item in summary.set_aside] == [bench.private.keys.series("9.9.9")]


def test_a_pair_that_the_pixels_refused_is_told_and_stays_refused(bench: Bench) -> None:
    path = write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    bench.run()
    (pair,) = bench.good_pairs()
    bench.store.append_catalog([], [replace(pair, status="quarantined", reason="it does not average to the thick one")])
    write_zip(path, study("PAT1", 3), extra=[("added.txt", b"x")])
    (item,) = bench.run().set_aside
    assert (item.kind, item.reason) == ("patient", "it does not average to the thick one")
    assert not bench.good_pairs()


def test_a_dry_run_writes_nothing(bench: Bench) -> None:
    write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    assert bench.run(dry_run=True).archives["new"] == 1
    assert not bench.series()
    assert ingest(str(bench.data), None, None, IngestOptions(dry_run=True)).archives["new"] == 1


def test_another_secret_is_refused(bench: Bench, tmp_path: Path) -> None:
    other = PrivateStore.open(bench.url, str(tmp_path / "elsewhere"), create=True)
    with pytest.raises(StoreError, match="not the one"):
        check_secret(bench.store, other)


def test_the_store_may_lie_inside_the_dataset(tmp_path: Path) -> None:
    write_zip(tmp_path / "APE" / "a.zip", study("PAT1", 3))
    inside = tmp_path / "store"
    for _ in range(2):
        store, private = open_stores(str(inside))
        summary = ingest(str(tmp_path), store, private, IngestOptions(exclude_folders=(inside,)))
        assert sum(summary.archives.values()) == 1
    assert isinstance(store, LatentStore)


@pytest.mark.real
def test_the_real_pair(bench: Bench, real_data: Path) -> None:
    summary = ingest(str(real_data / "ape-layout"), bench.store, bench.private, IngestOptions())
    (pair,) = bench.good_pairs()
    rows = bench.series()
    assert (rows[pair.thick_key].n_slices, rows[pair.thin_key].n_slices) == (28, 140)
    assert rows[pair.thick_key].category == "non-APE"
    assert not summary.quarantined
