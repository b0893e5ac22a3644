"""What counts as decoded before: a folder that decode wrote, whole, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.engines import mark
from pipeline.writing import is_written_series
from tests.support.hospital import thin


def series(folder: Path, uid: str = "2.25.77", names: tuple[str, ...] = ("00001.dcm", "00002.dcm")) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(thin(uid).file(i))
    return folder


def test_a_series_that_decode_wrote_counts(tmp_path: Path) -> None:
    assert is_written_series(series(tmp_path / "a"))


@pytest.mark.parametrize("names", [("00002.dcm",), ("00001.dcm", "notes.txt"), ("00001.dcm", "00003.dcm"), ("x.dcm",)])
def test_a_folder_of_other_files_does_not(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert not is_written_series(series(tmp_path / "a", names=names))


def test_nor_does_an_empty_one_a_file_a_link_a_foreign_series_or_no_dicom(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(series(tmp_path / "elsewhere"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    series(tmp_path / "foreign", uid="1.2.840.1")
    (series(tmp_path / "text", names=("00001.dcm",)) / "00001.dcm").write_text("not DICOM")
    for name in ("empty", "file", "link", "dangling", "foreign", "text"):
        assert not is_written_series(tmp_path / name), name


def test_marks_of_killed_commands_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    with mark(tmp_path) as living:
        dead = tmp_path / living.name.replace(f".{os.getpid()}.", ".4194999.")
        elsewhere = tmp_path / ".at-work-another-host.4194999.0123"
        dead.touch()
        elsewhere.touch()
        with mark(tmp_path) as second:
            assert not dead.exists()
            assert living.exists()
            assert second.exists()
            assert elsewhere.exists()
    assert not living.exists()
