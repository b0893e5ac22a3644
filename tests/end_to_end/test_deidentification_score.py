"""Thousands of planted identifiers through the commands, in process: none leaves PRIVATE, and every action is right.

infra/bench/deidentification.py does the same with more patients, training, and a process for every command.
"""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from tests.support.deidentification_score import InProcess, Score, score_all, search, worked
from tests.support.planted_identifiers import PlantedArchive, Planter, found_in, make_archive, rows_in_files, table


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlantedArchive, Path, Score]:
    root = tmp_path_factory.mktemp("planted")
    made, work = make_archive(root / "archive" / "data", patients=2), root / "work"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTPIPE_SECRET", "5a" * 32)
        said = worked(made, work, InProcess(), train=False)
        return made, work, score_all(made, work, said)


def test_every_action_is_right_and_nothing_leaks(scored: tuple[PlantedArchive, Path, Score]) -> None:
    made, _, score = scored
    assert score.leaks == []
    assert score.wrong == []
    assert len(made.planter.planted) > 5_000
    assert set(score.channels) >= {"DICOM", "NIfTI", "report", "catalog or manifest", "export", "JSON"}
    assert set(score.actions) >= {"profile's code written", "pixels hidden", "pixels kept", "patient consistent"}


def test_the_search_finds_every_planted_value_of_the_archive_itself(
    scored: tuple[PlantedArchive, Path, Score], tmp_path: Path
) -> None:
    """The control: in the source's own headers, names and comments, everything that can be searched for is found."""
    made, *_ = scored
    text = " ".join(str(path) for path in made.root.rglob("*"))
    text += " ".join(path.read_bytes().decode("latin-1") for path in made.root.rglob("*") if path.is_file())
    hits = {hit for hit in found_in(text) if hit in made.planter.planted}
    loose = {hit for hit, one in made.planter.planted.items() if one.where.startswith("P2 ")}
    assert len(loose) > 1_000
    assert loose <= hits, [made.planter.planted[hit].where for hit in loose - hits][:5]


def test_a_leak_is_named_with_where_it_was_planted(scored: tuple[PlantedArchive, Path, Score], tmp_path: Path) -> None:
    made, *_ = scored
    hit = next(hit for hit, one in made.planter.planted.items() if "PatientBirthDate" in one.where)
    (tmp_path / "progress.json").write_text(f'{{"seen": "{hit[1]}"}}')
    score = Score()
    search(made, tmp_path, {}, score)
    (leak,) = score.leaks
    assert "PatientBirthDate is in JSON progress.json" in leak
    assert score.share < 1


@pytest.mark.parametrize("vr", ["DA", "DT", "TM", "UI", "IS", "DS", "PN", "LT", "UN", "UR", "SQ", "SH"])
def test_values_are_found_as_they_stand_in_a_file(vr: str, tmp_path: Path) -> None:
    planter, ds = Planter(), Dataset()
    block = ds.private_block(0x0029, "MADE", create=True)
    block.add_new(0x01, vr, planter.value(vr, "somewhere"))
    ds.save_as(tmp_path / "x", implicit_vr=False, little_endian=True)
    raw = (tmp_path / "x").read_bytes().decode("latin-1")
    assert set(planter.planted) <= set(found_in(raw))


def test_the_table_is_whole() -> None:
    assert len(table()) == 621
    assert {action for _, action in rows_in_files().values()} >= {"X", "Z", "D", "U", "X/Z/D"}
    assert table()["00100010"] == ("PatientName", "Z")


def test_one_patient_has_one_pseudonym_whichever_command_made_it(scored: tuple[PlantedArchive, Path, Score]) -> None:
    """The issuer of the patient's id counts in every command: it did not in `interpolate`."""
    _, work, _ = scored
    decoded = {str(pydicom.dcmread(path).PatientID) for path in work.glob("out/decoded/*/00001.dcm")}
    thin = {str(pydicom.dcmread(path).PatientID) for path in work.glob("out/thin*/*/00001.dcm")}
    assert len(decoded) == 2
    assert len(thin) == 1
    assert thin <= decoded
