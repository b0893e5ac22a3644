"""Certificates by scanner: a displaced series is never averaged away."""

from __future__ import annotations

from typing import Any

from pipeline.report.certificates import certificate_section, judged_cases


def figures(lung: float | None, fat: float = 0.1) -> dict[str, Any]:
    shift = {"fat": fat} if lung is None else {"lung": lung, "fat": fat}
    failing = [name for name, value in shift.items() if abs(value) > 1]
    said = "certificate FAILS: lung" if failing else "certificate not computed: too little lung in the field"
    return {"shift_hu": shift, "missing": [] if lung is not None else ["lung"], "failing": failing, "said": said}


def document(*cases: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    return {"by_case": [{"key": k, "consistency": {"scanner": s, "certificate": f} if f else {}} for k, s, f in cases]}


def test_a_failing_series_is_named_though_its_scanners_mean_passes() -> None:
    judged = judged_cases(document(("aa", "ACME One", figures(-3.0)), ("bb", "ACME One", figures(2.8, 0.3))))
    text = certificate_section(judged)
    assert "-0.10 (-3.00)" in text, "the mean over series hides what the largest shift shows"
    assert "aa (ACME One): certificate FAILS: lung" in text
    assert "bb (ACME One): certificate FAILS: lung" in text
    assert "<td>2</td><td>0</td>" in text, "two failing, none that was not judged"


def test_scanners_stand_apart_and_what_was_not_judged_is_counted_and_named() -> None:
    cases = (("aa", "ACME One", figures(0.2)), ("bb", "Other", figures(None)), ("cc", "", {}))
    text = certificate_section(judged_cases(document(*cases)))
    assert text.count("<th scope=row>") == 3
    assert "not judged" in text
    assert "bb (Other): certificate not computed: too little lung in the field" in text
    assert "cc (not stated): no certificate, because nothing was generated" in text
    assert "aa (" not in text


def test_an_evaluation_without_certificates_has_no_section() -> None:
    assert certificate_section(judged_cases(document(("aa", "", {})))) == ""
    assert certificate_section([]) == ""
