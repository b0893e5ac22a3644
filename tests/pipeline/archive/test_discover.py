from __future__ import annotations

from pathlib import Path

import pytest

from latentcache import InputError
from pipeline.archive import UNLABELLED, FoundArchive, discover
from pipeline.archive.discover import category_of

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
