from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given, strategies as st

from pipeline.identity import Keys, identities_conflict, is_placeholder_id

SECRET = b"0123456789abcdef0123456789abcdef"
TEXT = st.text(max_size=40)


def test_a_key_is_the_first_16_hex_of_an_hmac_sha256() -> None:
    message = b"\x00\x00\x00\x05study" + b"\x00\x00\x00\x031.2"
    expected = hmac.new(SECRET, message, hashlib.sha256).hexdigest()[:16]
    assert Keys(SECRET).study("1.2") == expected


@given(TEXT, TEXT, TEXT, TEXT)
def test_parts_cannot_be_confused_by_concatenation(a: str, b: str, c: str, d: str) -> None:
    keys = Keys(SECRET)
    same = (a, b) == (c, d)
    assert (keys.series(a, b) == keys.series(c, d)) == same


@given(TEXT)
def test_kinds_have_domains_of_their_own(text: str) -> None:
    keys = Keys(SECRET)
    values = [keys.study(text), keys.patient_of_study(text), keys.archive(text), keys.text(text), keys.series(text)]
    assert len(set(values)) == len(values)


def test_another_secret_gives_other_keys_and_another_fingerprint() -> None:
    one, other = Keys(SECRET), Keys(SECRET[::-1])
    assert one.study("1.2") != other.study("1.2")
    assert one.fingerprint != other.fingerprint
    assert SECRET.decode() not in repr(one)


def test_patient_key_includes_the_issuer_and_ignores_padding() -> None:
    keys = Keys(SECRET)
    assert keys.patient("7", "north") != keys.patient("7", "south")
    assert keys.patient("7 ", "north") == keys.patient("7", "north ")


def test_unknown_frame_and_acquisition_stay_unknown() -> None:
    keys = Keys(SECRET)
    assert keys.frame("") == "" == keys.acquisition("1.2", "")
    assert keys.acquisition("1.2", "1") != keys.acquisition("1.3", "1")


@pytest.mark.parametrize(
    "text", ["", "  ", "000", "XXXX", "ANONYMOUS", "Anon^", "REMOVED", "n/a", "No Patient ID", "-"]
)
def test_stock_ids_identify_nobody(text: str) -> None:
    assert is_placeholder_id(text)


@pytest.mark.parametrize("text", ["7", "11", "PLASTIC", "QMNx85rKkkg", "0001", "anon17"])
def test_real_ids_are_kept(text: str) -> None:
    assert not is_placeholder_id(text)


def test_identities_conflict_only_where_both_are_known_and_differ() -> None:
    born = {"PatientBirthDate": "19500101", "PatientSex": "F"}
    assert identities_conflict(born, {"PatientBirthDate": "19500102"})
    assert identities_conflict(born, {"PatientSex": "M"})
    assert not identities_conflict(born, {"PatientBirthDate": "", "PatientSex": "O"})
    assert not identities_conflict(born, {"PatientName": "Someone^Else"})
