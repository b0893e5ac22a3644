"""Debian's Chromium for tests of pages, without network; skips where there is none."""

from __future__ import annotations

import base64
import importlib.util
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser; Playwright allows one of these at a time."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def opened(browser: Browser, path: Path, width: int = 1280, height: int = 900) -> tuple[Page, list[str]]:
    """The page, and what its console complained of; a request that leaves the page counts as a complaint too."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(240_000)  # milliseconds; how busy a machine is must not decide
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    return page, complaints


def canvas(page: Page, name: str) -> np.ndarray:
    """What a canvas shows, (rows, columns, 3)."""
    url = page.evaluate(f"document.getElementById('{name}').toDataURL('image/png')")
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return np.asarray(image.convert("RGB"), dtype=float)


def grave_violations(page: Page) -> list[Any]:
    """What axe-core calls serious or critical; the script comes with the package axe-playwright-python."""
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None
    assert spec.origin is not None
    page.add_script_tag(path=str(Path(spec.origin).parent / "axe.min.js"))
    found = page.evaluate("axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html)]))")
    return [violation for violation in found if violation[0] in ("serious", "critical")]


def difference(shot: bytes, reference: Path) -> float:
    """Mean difference in grey levels (0 to 255) between a screenshot and a kept one.

    Loosely: both at 64x32, because fonts and their sizes differ between machines.
    """
    small = []
    for source in (io.BytesIO(shot), reference):
        with Image.open(source) as image:
            small.append(np.asarray(image.convert("L").resize((64, 32)), dtype=float))
    return float(np.abs(small[0] - small[1]).mean())
