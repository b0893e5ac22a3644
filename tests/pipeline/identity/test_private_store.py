from __future__ import annotations

import stat
import time
from pathlib import Path

import pyarrow.compute as pc
import pytest

from latentcache import InputError, StoreError
from pipeline.identity import ArchiveRow, PrivateStore, QuarantineRow, SeriesRow, private_store as private_module
from pipeline.volume import SeriesPointer


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrivateStore:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    return PrivateStore.open(str(tmp_path / "store"), create=True)


def series(key: str, source: str = "/data/a.zip", patient: str = "p" * 16, n: int = 3) -> SeriesRow:
    pointer = SeriesPointer(key, tuple((source, i, 0) for i in range(n)))
    return SeriesRow(pointer, "s" * 16, patient, "1.2.3", "1.2", "ID7", "north", {"PatientName": "Doe^Jane"})


def archive(url: str, size: int = 1) -> ArchiveRow:
    return ArchiveRow(url.rjust(16, "k"), url, size, 5, "", "d", "ok", "", "APE", ("a", "b"))


def test_everything_is_for_the_owner_alone(private: PrivateStore, tmp_path: Path) -> None:
    private.add_sources([series("a" * 16)])
    private.log_whois("a" * 16, True)
    root = tmp_path / "store" / "private"
    for path in [root, *root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_folder_that_was_too_wide_is_narrowed(private: PrivateStore, tmp_path: Path) -> None:
    root = tmp_path / "store" / "private"
    root.chmod(0o755)
    PrivateStore.open(str(tmp_path / "store"))
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_the_secret_is_made_once_and_kept(private: PrivateStore, tmp_path: Path) -> None:
    again = PrivateStore.open(str(tmp_path / "store"), create=True)
    assert again.secret == private.secret
    assert len(private.secret) == 64
    assert again.fingerprint == private.fingerprint


def test_the_secret_of_the_environment_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTPIPE_SECRET", "s3cret" * 6)
    store = PrivateStore.open(str(tmp_path / "store"), create=True)
    assert store.secret == b"s3cret" * 6
    assert not (tmp_path / "store" / "private" / "secret").exists()


def test_another_secret_in_the_environment_is_refused(
    private: PrivateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTPIPE_SECRET", "another secret of some length")
    with pytest.raises(StoreError, match="differs"):
        PrivateStore.open(str(tmp_path / "store"))


def test_a_short_secret_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTPIPE_SECRET", "short")
    with pytest.raises(StoreError, match="5 bytes"):
        PrivateStore.open(str(tmp_path / "store"), create=True)


def test_there_is_nothing_to_open_before_the_first_ingest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no private part"):
        PrivateStore.open(str(tmp_path / "store"))


def test_a_store_on_an_object_store_needs_a_place_for_its_private_part() -> None:
    with pytest.raises(InputError, match="--private"):
        PrivateStore.open("s3://bucket/store", create=True)


def test_pointers_come_back_whole_and_the_last_row_counts(private: PrivateStore) -> None:
    split_over_two = SeriesPointer(
        "a" * 16, (("/d/x.zip", 3, 0), ("/d/y.zip", 0, 0), ("/d/x.zip", 1, 7)), False, "u", "seal"
    )
    private.add_sources([series("a" * 16), series("b" * 16)])
    private.add_sources([SeriesRow(split_over_two, "s", "p", "u", "v", "i", "", {})])
    assert private.pointer("a" * 16) == split_over_two
    assert private.pointers(["b" * 16])["b" * 16].members == tuple(("/data/a.zip", i, 0) for i in range(3))
    with pytest.raises(InputError, match="c" * 16):
        private.pointer("c" * 16)


def test_identity_is_kept(private: PrivateStore) -> None:
    private.add_sources([series("a" * 16)])
    assert private.identity("a" * 16) == {"PatientName": "Doe^Jane"}
    assert private.identity("b" * 16) == {}


def test_archives_are_told_by_their_last_row(private: PrivateStore) -> None:
    private.add_archives([archive("/d/x.zip", 1), archive("/d/y.zip", 2)])
    private.add_archives([ArchiveRow("/d/x.zip".rjust(16, "k"), "/d/x.zip", 9, 5, "", "d", "ok")])
    rows = private.table("archives", ["url", "size"]).sort_by("url").to_pylist()
    assert rows == [{"url": "/d/x.zip", "size": 9}, {"url": "/d/y.zip", "size": 2}]


def test_compaction_changes_nothing_but_the_number_of_files(
    private: PrivateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_module, "COMPACT_ROWS", 10)
    for i in range(25):
        private.add_sources([series(f"{i % 8:016x}", source=f"/d/{i}.zip")])
    before = private.table("series").sort_by("series_key")
    private.compact()
    assert private.table("series").sort_by("series_key").equals(before)
    assert len(list((tmp_path / "store" / "private" / "series").iterdir())) == 3


def test_rewriting_removes_older_versions_too(private: PrivateStore, tmp_path: Path) -> None:
    private.add_sources([series("a" * 16, patient="x" * 16), series("b" * 16)])
    private.add_sources([series("a" * 16, patient="x" * 16)])
    assert private.rewrite_without("series", pc.field("patient_key") == "x" * 16) == 2
    assert private.table("series")["series_key"].to_pylist() == ["b" * 16]
    assert len(list((tmp_path / "store" / "private" / "series").iterdir())) == 1


def test_whois_is_logged_in_order(private: PrivateStore) -> None:
    private.log_whois("a" * 16, True)
    private.log_whois("b" * 16, False)
    assert [(q["key"][0], q["found"]) for q in private.whois_log()] == [("a", True), ("b", False)]


def test_quarantine_details_are_kept_once(private: PrivateStore) -> None:
    row = QuarantineRow("member", "a" * 16, "cut short", url="/d/x.zip", member="Doe^Jane/1.dcm")
    private.quarantine([row])
    private.quarantine([row])
    assert private.table("quarantine", ["member"]).to_pylist() == [{"member": "Doe^Jane/1.dcm"}]


def test_a_clock_that_is_behind_does_not_make_rows_old(
    private: PrivateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes last is right, also beside fragments that are merged, and also of a year to come."""
    now = time.time_ns()
    for patient, offset in (("1", 0), ("2", -86_400), ("3", 10**9), ("4", -(10**9)), ("5", 0)):
        monkeypatch.setattr(time, "time_ns", lambda offset=offset: now + offset * 10**9)
        writer = PrivateStore.open(str(tmp_path / "store"))
        writer.add_sources([series("a" * 16, patient=patient * 16)])
        assert private.table("series", ["patient_key"])["patient_key"].to_pylist() == [patient * 16]
        if patient == "3":
            private.compact()
    names = sorted((tmp_path / "store" / "private" / "series").iterdir())
    assert len({name.name[:20] for name in names}) == len(names) == 3


def test_a_reader_is_not_disturbed_by_a_merge(private: PrivateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fragments vanish between the listing and the reading: at the first table, and at pointers found long before."""
    keys = [f"{n:016x}" for n in range(4)]
    for key in keys:
        private.add_sources([series(key, source=f"/d/{key}.zip")])
    reader = PrivateStore(private._at, private.secret)
    reader.pointer(keys[0])  # its place in a fragment is known from now on
    private.compact()
    assert {key: one.members[0][0] for key, one in reader.pointers(keys).items()} == {k: f"/d/{k}.zip" for k in keys}
    private.add_sources([series("f" * 16)])
    listed = PrivateStore._names

    def then_merged(self: PrivateStore, folder: str) -> list[str]:
        names = listed(self, folder)
        if self is reader:
            private.compact()
        return names

    monkeypatch.setattr(PrivateStore, "_names", then_merged)
    assert sorted(reader.table("series", ["series_key"])["series_key"].to_pylist()) == [*keys, "f" * 16]
    assert reader.identity(keys[1]) == {"PatientName": "Doe^Jane"}
