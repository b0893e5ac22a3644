"""A page's template, filled and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latentcache.storage import write_text


def write_page(path: Path, page: str, fields: Mapping[str, str]) -> None:
    """Fill the template's ``{{NAME}}`` fields and write the file, whole or not at all."""
    for name, value in fields.items():
        page = page.replace("{{" + name + "}}", value)
    write_text(path, page)
