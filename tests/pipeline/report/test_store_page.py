"""The report of a store in a real browser: offline, readable on a phone, nothing that axe calls serious."""

from __future__ import annotations

from pathlib import Path

from diffusion.data import make_store
from latentcache import LatentStore
from pipeline.report import write_store_report
from tests.support.browser import chromium, grave_violations, opened


def test_the_stores_page_works_on_a_desk_and_on_a_phone(tmp_path: Path) -> None:
    make_store(tmp_path / "s", splits=("train", "val", "test"), depths=(8,), side=16)
    path = tmp_path / "store.html"
    write_store_report(path, LatentStore.open(tmp_path / "s"), None)
    with chromium() as browser:
        for width in (1280, 390):
            page, complaints = opened(browser, path, width)
            assert "usable thick/thin pairs" in page.locator(".lead").inner_text()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("svg[role=img]").count() >= 1, "histograms with a name for those who cannot see them"
            beyond = page.evaluate(
                "[...document.querySelectorAll('.chart')].filter(c => c.scrollWidth > c.clientWidth)"
            )
            assert beyond == [], "half of a histogram would mislead"
            assert grave_violations(page) == []
            assert complaints == []


def test_a_run_that_was_evaluated_on_the_store_shows_its_certificates_by_scanner(tmp_path: Path) -> None:
    make_store(tmp_path / "s", splits=("train",), depths=(8,), side=16)
    judged = {"shift_hu": {"lung": 2.5}, "missing": [], "failing": ["lung"], "said": "certificate FAILS: lung +2.5 HU"}
    case = {"key": "aa01", "consistency": {"scanner": "ACME One", "certificate": judged}}
    store = LatentStore.open(tmp_path / "s")
    write_store_report(tmp_path / "judged.html", store, None, evaluated=[{"by_case": [case]}])
    text = (tmp_path / "judged.html").read_text(encoding="utf-8")
    assert "aa01 (ACME One): certificate FAILS: lung +2.5 HU" in text
    write_store_report(tmp_path / "plain.html", store, None)
    assert "no generated series is judged here" in (tmp_path / "plain.html").read_text(encoding="utf-8")
