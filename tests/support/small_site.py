"""Small archives and what is made of them: made once for all tests of all workers; each module takes a copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cli.main import app

MODEL = ("width=8", "multipliers=[1,2]", "attention_levels=[1]", "groups=4", "heads=2", "time_embedding=16")
BRIEF = ("validation.pairs=1", "losses.probes=1")
"""Of a training: one held-out pair, and one probe of the decoder. More of them are in no test's interest."""
SMALL = tuple(word for key in (*(f"model.{one}" for one in MODEL), *BRIEF, "images_every=0") for word in ("--set", key))

Phantoms = Callable[[int, int, int], Path]


@dataclass(frozen=True)
class Site:
    """An archive that only is read, and a store and a run that are the module's own."""

    archive: Path
    store: Path
    run: Path

    def copy(self, folder: Path) -> Site:
        copied = Site(self.archive, folder / "store", folder / "run")
        shutil.copytree(self.store, copied.store)
        if self.run.exists():
            shutil.copytree(self.run, copied.run)
        return copied


def _ctpipe(*words: Any) -> None:
    assert (app([*map(str, words), "--json"], standalone_mode=False) or 0) == 0


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first worker that asks for it makes; the others wait, and find it made."""
    from filelock import FileLock  # torch brings it: where there is none (`.ci/versions`), no test asks for a site

    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Phantoms:
    """Archives by patients, in-plane size and thin slices."""

    def phantoms_of(patients: int, size: int, thin_slices: int) -> Path:
        words = ("--patients", patients, "--size", size, "--thin-slices", thin_slices, "--seed", 9)
        name = f"phantoms-{patients}-{size}-{thin_slices}"
        made = _once(tmp_path_factory, name, lambda folder: _ctpipe("phantom", folder / "archive", *words))
        return made / "archive"

    return phantoms_of


@pytest.fixture(scope="session")
def ingested_site(phantoms: Phantoms, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Four patients in a store, not encoded. Take a copy."""
    archive = phantoms(4, 32, 36)
    made = _once(
        tmp_path_factory, "ingested", lambda folder: _ctpipe("ingest", archive, folder / "store", "--workers", 1)
    )
    return Site(archive, made / "store", made / "run")


@pytest.fixture(scope="session")
def trained_site(ingested_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The same, encoded, with a run of one step. Take a copy."""

    def make(folder: Path) -> None:
        site = ingested_site.copy(folder)
        _ctpipe("encode", site.store, "--vae", "tiny", "--engine", "inline", "--threads", 1)
        _ctpipe("train", site.store, site.run, "--preset", "tiny", "--max-steps", 1, *SMALL)

    made = _once(tmp_path_factory, "trained", make)
    return Site(ingested_site.archive, made / "store", made / "run")
