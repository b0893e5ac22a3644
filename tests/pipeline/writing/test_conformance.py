"""The conformance statement against the code: what it lists is what is accepted, answered and written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.reading.codecs import READABLE
from pipeline.serve import LimitsConfig
from pipeline.serve.node.intake import Verdict
from pipeline.serve.node.receiver import ACCEPTED_CLASSES, NOT_AUTHORISED
from pipeline.writing import IMPLEMENTATION_UID, PRIVATE_CREATOR


@pytest.fixture(scope="module")
def statement(repo_root: Path) -> str:
    return (repo_root / "infra" / "docs" / "dicom-conformance.md").read_text()


def test_every_accepted_class_and_syntax_is_listed(statement: str) -> None:
    assert [name for name in ACCEPTED_CLASSES.values() if name not in statement] == []
    assert [uid for uid in READABLE if f"| {uid} |" not in statement] == []


def test_every_status_is_listed(statement: str) -> None:
    codes = {f"| {verdict.status:04X} |" for verdict in Verdict} | {f"| {NOT_AUTHORISED:04X} |"}
    assert [code for code in codes if code not in statement] == []


def test_identifiers_and_limits_are_those_of_the_code(statement: str) -> None:
    limits = LimitsConfig()
    for text in (IMPLEMENTATION_UID, PRIVATE_CREATOR, str(limits.pdu_bytes), f"default {limits.associations};"):
        assert text in statement
