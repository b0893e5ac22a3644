from __future__ import annotations

from pathlib import Path

import pytest

from latentcache import InputError
from pipeline.identity import Keys
from pipeline.ingest import read_overrides
from pipeline.ingest.overrides import Overrides

KEYS = Keys(b"0123456789abcdef")
KEY = "0123456789abcdef"


def read(tmp_path: Path, option: str, text: str) -> Overrides:
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8-sig")
    given = {"pairs": None, "splits": None, "exclude": None, option: path}
    return read_overrides(KEYS, given["pairs"], given["splits"], given["exclude"])


def test_keys_and_identifiers_are_both_understood(tmp_path: Path) -> None:
    found = read(tmp_path, "pairs", f"Thick, Thin \n1.2.3,{KEY}\n")
    assert found.pairs == ((KEYS.series("1.2.3"), KEY),)


def test_an_issuer_may_stand_beside_a_patient_id(tmp_path: Path) -> None:
    found = read(tmp_path, "splits", "patient,issuer,split\n7,north,TEST\n8,,validation\n")
    assert found.splits == {KEYS.patient("7", "north"): "test", KEYS.patient("8"): "val"}


def test_everything_can_be_left_out(tmp_path: Path) -> None:
    found = read(tmp_path, "exclude", "archive,patient,study,series\na.zip,,,\n,7,,\n,,1.2,\n,,,1.2.3\n")
    assert found.archives == {"a.zip"}
    assert found.excluded == {KEYS.patient("7"), KEYS.study("1.2"), KEYS.series("1.2.3")}


@pytest.mark.parametrize("name", ["a.zip", "a", "APE/a.zip", "/data/APE/a.zip"])
def test_an_archive_is_named_by_path_or_name(name: str) -> None:
    assert Overrides(archives=frozenset([name])).excludes_archive("/data/APE/a.zip", "/data")
    assert not Overrides(archives=frozenset([name])).excludes_archive("/data/APE/b.zip", "/data")


@pytest.mark.parametrize(
    ("option", "text", "found"),
    [
        ("splits", "patient,split\nDoe,train\nDoe,test\n", "line 3 of --splits contradicts"),
        ("splits", "patient,split\nDoe,holdout\n", "line 2 of --splits has an unknown split"),
        ("splits", "patient\nDoe\n", "line 2 of --splits lacks split"),
        ("pairs", "thick,thin\nDoe,\n", "line 2 of --pairs lacks thin"),
        ("exclude", "name\nDoe\n", "line 2 of --exclude lacks every column"),
    ],
)
def test_errors_name_the_line_and_nobody(tmp_path: Path, option: str, text: str, found: str) -> None:
    with pytest.raises(InputError, match=found) as error:
        read(tmp_path, option, text)
    assert "Doe" not in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FileNotFoundError"):
        read_overrides(KEYS, tmp_path / "none.csv", None, None)
