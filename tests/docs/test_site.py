"""The built documentation in a browser: its front page on a phone and on a desk, without a network.

`make docs` builds what is looked at here; .ci/run does both, in this order.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browser import chromium, grave_violations, opened

SITE = Path(__file__).resolve().parents[2] / "build" / "site"
PAGES = ("index.html", "installation.html", "how-to/thin-one-study.html", "dicom-conformance.html", "model-card.html")


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit_and_can_be_read_by_all(width: int) -> None:
    if not (SITE / "index.html").exists():
        pytest.skip("the documentation is not built: run `make docs`")
    with chromium() as browser:
        for name in PAGES:
            page, complaints = opened(browser, SITE / name, width)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.locator("h1").count() == 1, name
            assert grave_violations(page) == [], name
            assert complaints == [], name
            page.close()
