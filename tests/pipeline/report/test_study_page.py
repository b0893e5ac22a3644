"""The page beside a study: offline, readable on a phone and a desk, and it says what not to trust."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.report import StudyPage, write_study_page
from pipeline.volume import Geometry, Volume
from tests.support.browser import chromium, grave_violations, opened
from tests.support.dicom_files import anatomy

FIGURES = {
    "rms_before_hu": 9.0,
    "rms_after_hu": 4.0,
    "noise_hu": 4.2,
    "profile": "box 5 mm",
    "refiner_sha256": "ab" * 32,
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    affine = ((0.0, 0.0, 0.8, 0.0), (0.0, 0.8, 0.0, 0.0), (5.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    at = Geometry((8, 48, 48), affine, tuple(5.0 * np.arange(8)), 5.0)
    thick = Volume(anatomy(8, 48).astype(np.int16) - 1024, at)
    target = at.thin_grid(1.0)
    thin = np.repeat(thick.hu, 5, axis=0)
    study = StudyPage(thick, thin, target, "default", {}, FIGURES, ("kernel <B70f>: sharp",))
    path = tmp_path / "page.html"
    write_study_page(path, study)
    return path


def test_it_says_what_was_done_and_what_to_doubt(page: Path) -> None:
    text = page.read_text()
    assert "8 slices every 5 mm became 40 every 1 mm" in text
    assert "Kernel &lt;B70f&gt;: sharp" in text
    for wanted in ("Synthetic images", "no medical device", "4.0 HU RMS", "box 5 mm", "What to trust", "What not"):
        assert wanted in text
    assert "{{" not in text
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize("width", [390, 1400])
def test_it_works_in_a_browser(page: Path, width: int) -> None:
    with chromium() as browser:
        shown, complaints = opened(browser, page, width)
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        slider = shown.locator("input[type=range]").first
        slider.fill("0")
        assert shown.locator("figure").first.evaluate("f => f.style.getPropertyValue('--cut')") == "0%"
        shown.get_by_label("lung").check()
        visible = shown.locator(".pair:visible")
        assert {pair.get_attribute("data-window") for pair in visible.all()} == {"1"}
        assert grave_violations(shown) == []
        assert complaints == []
