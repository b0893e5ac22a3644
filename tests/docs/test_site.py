"""The built documentation in a browser: on a phone and on a desk, with nothing fetched from elsewhere.

`make docs` builds what is looked at here; .ci/run does both, in this order.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.browser import chromium, grave_violations

SITE = Path(__file__).resolve().parents[2] / "build" / "site"
PAGES = ("index.html", "installation.html", "how-to/thin-one-study.html", "dicom-conformance.html", "model-card.html")


class Silent(SimpleHTTPRequestHandler):
    """Files, without a line for each on stderr."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    if not (SITE / "index.html").exists():
        pytest.skip("the documentation is not built: run `make docs`")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit_and_can_be_read_by_all(address: str, width: int) -> None:
    with chromium() as browser:
        for name in PAGES:
            asked: list[str] = []
            failed: list[str] = []
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.set_default_timeout(240_000)  # milliseconds; how busy a machine is must not decide
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("requestfailed", lambda request, failed=failed: failed.append(request.url))
            page.on("pageerror", lambda error, failed=failed: failed.append(str(error)))
            page.goto(address + name)
            page.wait_for_load_state("load")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.locator("h1").count() == 1, name
            assert grave_violations(page) == [], name
            assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == [], name
            assert failed == [], name
            page.close()
