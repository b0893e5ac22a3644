from __future__ import annotations

import hashlib
import os
import random
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from latentcache import InputError
from pipeline.archive import UNLABELLED, FoundArchive, stream_archives
from pipeline.archive.discover import category_of, discover

DICOM = b"\0" * 128 + b"DICM"


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(root: Path, found: list[FoundArchive]) -> dict[str, str]:
    return {str(Path(f.url).relative_to(root)): f.category for f in found}


def test_zips_are_found_at_any_depth_and_labelled_by_their_topmost_known_folder(tmp_path: Path) -> None:
    for name in ("APE/a.zip", "non-ape/site/b.ZIP", "other/APE/c.zip", "Doe^Jane/d.zip", "e.zip"):
        put(tmp_path / name)
    assert names(tmp_path, discover(str(tmp_path))) == {
        "APE/a.zip": "APE",
        "non-ape/site/b.ZIP": "non-APE",
        "other/APE/c.zip": "APE",
        "Doe^Jane/d.zip": UNLABELLED,
        "e.zip": UNLABELLED,
    }


def test_the_datasets_own_name_labels_what_nothing_below_it_does(tmp_path: Path) -> None:
    put(tmp_path / "APE" / "x" / "a.zip")
    put(tmp_path / "APE" / "non-APE" / "b.zip")
    assert names(tmp_path / "APE", discover(str(tmp_path / "APE"))) == {"x/a.zip": "APE", "non-APE/b.zip": "non-APE"}


def test_loose_files_count_as_one_folder_a_patient(tmp_path: Path) -> None:
    for name in ("APE/p1/1/I1", "APE/p1/2/I1", "APE/p2/I1", "p3/x/y/I1"):
        put(tmp_path / name)
    assert names(tmp_path, discover(str(tmp_path))) == {"APE/p1": "APE", "APE/p2": "APE", "p3": UNLABELLED}


def test_lists_and_notes_beside_archives_are_nobodys_study(tmp_path: Path) -> None:
    for name in ("splits.csv", "APE/README.txt", "APE/a.zip", ".hidden/x", "__MACOSX/._a", "APE/.DS_Store"):
        put(tmp_path / name)
    assert names(tmp_path, discover(str(tmp_path))) == {"APE/a.zip": "APE"}


def test_a_folder_of_dicom_is_one_archive_with_all_below_it(tmp_path: Path) -> None:
    put(tmp_path / "I1", DICOM)
    put(tmp_path / "sub" / "I2", DICOM)
    assert names(tmp_path, discover(str(tmp_path))) == {".": UNLABELLED}


def test_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    put(tmp_path / "p" / "I1")
    (before,) = discover(str(tmp_path))
    put(tmp_path / "p" / "I2")
    (after,) = discover(str(tmp_path))
    assert before.etag != after.etag


def test_a_single_zip_and_excluded_folders(tmp_path: Path) -> None:
    path = put(tmp_path / "APE" / "a.zip")
    put(tmp_path / "store" / "b.zip")
    assert [f.category for f in discover(str(path))] == ["APE"]
    assert names(tmp_path, discover(str(tmp_path), exclude=[tmp_path / "store"])) == {"APE/a.zip": "APE"}


def test_a_missing_dataset_is_an_error_without_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        discover(str(tmp_path / "Doe^Jane"))
    assert "Doe" not in str(error.value)


def test_the_users_labels_replace_the_default() -> None:
    assert category_of(["APE"], ["Stroke", "Control"]) == UNLABELLED
    assert category_of(["x", "stroke"], ["Stroke", "Control"]) == "Stroke"


def test_an_archives_place_does_not_show_in_its_repr(tmp_path: Path) -> None:
    put(tmp_path / "Doe^Jane.zip")
    assert "Doe" not in repr(discover(str(tmp_path)))


def refusals(found: list[FoundArchive]) -> dict[str, str]:
    return {Path(f.url).name: f.refusal for f in found if f.refusal}


@pytest.fixture
def not_root() -> Iterator[Path]:
    """A folder of a user whom permissions bind, which they do not the superuser."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            folder = Path(name, "data")
            folder.mkdir()
            yield folder
        finally:
            os.seteuid(was)


def test_what_cannot_be_used_is_found_with_its_reason_and_nothing_waits(tmp_path: Path) -> None:
    put(tmp_path / "APE" / "a.zip")
    (tmp_path / "APE" / "dangling.zip").symlink_to("/nonexistent")
    (tmp_path / "APE" / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "APE" / "pipe.zip")
    os.mkfifo(tmp_path / "APE" / "pipe")
    (tmp_path / "patients").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "patients")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "APE" / "socket"))
    for name in ("b.7z", "c.rar", "d.tar.gz", "e.TGZ", "f.z01", "g.zip.001", "h.dcm.gz", "i.iso"):
        put(tmp_path / "non-APE" / name)
    found = discover(str(tmp_path))
    reasons = refusals(found)
    assert names(tmp_path, [f for f in found if not f.refusal]) == {"APE/a.zip": "APE"}
    assert reasons["dangling.zip"] == "a link to nothing"
    assert "back to itself" in reasons["circle"]
    assert reasons["pipe.zip"] == reasons["pipe"] == "a named pipe, not a file"
    assert reasons["socket"] == "a socket, not a file"
    assert "link to a folder" in reasons["elsewhere"]
    for name in ("b.7z", "c.rar", "d.tar.gz", "e.TGZ", "f.z01", "g.zip.001", "h.dcm.gz", "i.iso"):
        assert "not read" in reasons[name]
        assert name.partition(".")[0] + "." not in reasons[name]
    assert {f.category for f in found if f.refusal and "not read" in f.refusal} == {"non-APE"}


def test_a_folder_that_may_not_be_listed_is_found_with_its_reason(not_root: Path) -> None:
    for name in ("APE/p1/I1", "APE/p2/I1", "p3/1/I1", "p3/2/I1"):
        put(not_root / name)
    for closed in ("APE/p1", "p3/2"):
        (not_root / closed).chmod(0)
    found = discover(str(not_root))
    assert refusals(found) == {"p1": "a folder that may not be listed: its permissions forbid it"}
    assert {Path(f.url).name for f in found} == {"p1", "p2", "p3"}
    before = next(f.etag for f in found if f.url.endswith("p3"))
    (not_root / "p3/2").chmod(0o777)
    assert next(f.etag for f in discover(str(not_root)) if f.url.endswith("p3")) != before
    not_root.chmod(0)
    with pytest.raises(InputError, match="may not be listed"):
        stream_archives(str(not_root))


def test_a_category_that_may_not_be_listed_is_found_with_its_reason(not_root: Path) -> None:
    put(not_root / "APE" / "a.zip")
    put(not_root / "non-APE" / "b.zip")
    (not_root / "APE").chmod(0)
    assert {Path(f.url).name: bool(f.refusal) for f in discover(str(not_root))} == {"APE": True, "b.zip": False}


def test_within_a_folder_that_is_one_archive_its_reader_reports_what_cannot_be_used(tmp_path: Path) -> None:
    put(tmp_path / "p" / "I1")
    (before,) = discover(str(tmp_path))
    (tmp_path / "p" / "I2").symlink_to("/nonexistent")
    (after,) = discover(str(tmp_path))
    assert (after.refusal, after.size) == ("", before.size)
    assert after.etag != before.etag


def test_a_file_that_vanishes_while_it_is_listed_stops_nothing(tmp_path: Path) -> None:
    put(tmp_path / "p" / "I1")
    put(tmp_path / "p" / "I2")
    real = os.scandir

    def vanishing(folder: str) -> object:
        entries = list(real(folder))
        (tmp_path / "p" / "I2").unlink(missing_ok=True)
        listing = mock.MagicMock()
        listing.__enter__.return_value = entries
        return listing

    with mock.patch.object(os, "scandir", vanishing):
        (found,) = discover(str(tmp_path))
    assert (found.url, found.size) == (str(tmp_path / "p"), 1)


def test_a_name_that_is_not_utf_8_is_found_and_opened(tmp_path: Path) -> None:
    from pipeline.archive import open_archive
    from pipeline.archive.source import FolderSource

    where = os.fsencode(tmp_path) + b"/M\xfcller"
    os.mkdir(where)
    with open(where + b"/\xe9", "wb") as file:
        file.write(DICOM)
    (found,) = discover(str(tmp_path))
    found.url.encode()
    source = open_archive(found.url)
    assert isinstance(source, FolderSource)
    assert source.url == found.url
    (member,) = source.members()
    assert member.name.encode() == b"\\xe9"
    assert source.read(member.index) == DICOM


def test_the_hash_of_a_folder_is_that_of_its_sorted_paths(tmp_path: Path) -> None:
    """Stores that were made before know folders by it."""
    for name in ("p/a/x", "p/a-b", "p/a.b/x", "p/b", "p/a/y/z", "p/aa"):
        put(tmp_path / name, name.encode())
    digest = hashlib.sha256()
    for file in sorted(f for f in (tmp_path / "p").rglob("*") if f.is_file()):
        info = file.stat()
        digest.update(f"{file.relative_to(tmp_path / 'p').as_posix()}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
    (found,) = discover(str(tmp_path))
    assert found.etag == digest.hexdigest()


def test_every_entry_is_looked_at_once_however_many_patients_there_are(tmp_path: Path) -> None:
    """Linear in files: the number of file system calls and of steps in Python, not the time they take."""
    for patient in range(40):
        for file in range(3):
            put(tmp_path / "APE" / f"p{patient}" / "1" / f"I{file}")

    def steps(root: Path) -> tuple[int, int]:
        listed: Counter[str] = Counter()
        calls = 0
        real = os.scandir

        def counting(folder: str) -> object:
            listed[folder] += 1
            return real(folder)

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        with mock.patch.object(os, "scandir", counting):
            sys.setprofile(profile)
            try:
                count = len(discover(str(root)))
            finally:
                sys.setprofile(None)
        assert max(listed[folder] for folder in listed if folder != str(root)) == 1
        return count, calls

    count, calls = steps(tmp_path)
    for patient in range(40, 80):
        for file in range(3):
            put(tmp_path / "APE" / f"p{patient}" / "1" / f"I{file}")
    twice, more = steps(tmp_path)
    assert (count, twice) == (40, 80)
    assert more < 2.1 * calls


def test_archives_come_out_while_the_rest_is_still_to_be_listed(tmp_path: Path) -> None:
    for patient in range(20):
        put(tmp_path / f"p{patient:02}" / "I1")
    listed: list[str] = []
    real = os.scandir

    def noting(folder: str) -> object:
        listed.append(folder)
        return real(folder)

    with mock.patch.object(os, "scandir", noting):
        stream = stream_archives(str(tmp_path))
        first = next(stream)
    assert first.url.endswith("p00")
    assert not any(folder.endswith("p05") for folder in listed)


def test_a_streamed_listing_holds_the_same_archives_in_one_order(tmp_path: Path) -> None:
    rng = random.Random(3)
    for number in range(60):
        top = rng.choice(["APE", "non-APE", "x", "a-b", "a"])
        put(
            tmp_path
            / top
            / f"p{number % 9}"
            / rng.choice(["1", "2/deep"])
            / rng.choice([f"I{number}", f"{number}.zip"])
        )
    once, again = list(stream_archives(str(tmp_path))), list(stream_archives(str(tmp_path)))
    assert once == again
    assert sorted(once, key=lambda f: f.url) == discover(str(tmp_path))
    assert len({f.url for f in once}) == len(once)


def test_file_urls_of_dataset_and_store_are_read_alike(tmp_path: Path) -> None:
    from latentcache.storage import LocalLocation, open_location

    put(tmp_path / "Doe Jane #1?" / "a.zip")
    url = (tmp_path / "Doe Jane #1?").as_uri()
    assert "%20" in url
    (found,) = discover(url)
    assert found.url == str(tmp_path / "Doe Jane #1?" / "a.zip")
    location = open_location(url)
    assert isinstance(location, LocalLocation)
    assert location.root == tmp_path / "Doe Jane #1?"
