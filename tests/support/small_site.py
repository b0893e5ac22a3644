"""Small archives and what is made of them: made once for all tests of a worker, of which each module takes a copy."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Phantoms:
    """Archives by patients, in-plane size and thin slices."""
    made: dict[tuple[int, int, int], Path] = {}

    def phantoms_of(patients: int, size: int, thin_slices: int) -> Path:
        wanted = (patients, size, thin_slices)
        if wanted not in made:
            made[wanted] = tmp_path_factory.mktemp("phantoms") / "archive"
            words = ("--patients", patients, "--size", size, "--thin-slices", thin_slices, "--seed", 9)
            _ctpipe("phantom", made[wanted], *words)
        return made[wanted]

    return phantoms_of


@pytest.fixture(scope="session")
def ingested_site(phantoms: Phantoms, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Four patients in a store, not encoded. Take a copy."""
    root = tmp_path_factory.mktemp("ingested-site")
    site = Site(phantoms(4, 32, 36), root / "store", root / "run")
    _ctpipe("ingest", site.archive, site.store, "--workers", 1)
    return site


@pytest.fixture(scope="session")
def trained_site(ingested_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The same, encoded, with a run of one step. Take a copy."""
    site = ingested_site.copy(tmp_path_factory.mktemp("trained-site"))
    _ctpipe("encode", site.store, "--vae", "tiny", "--engine", "inline", "--threads", 1)
    _ctpipe("train", site.store, site.run, "--preset", "tiny", "--max-steps", 1, *SMALL)
    return site
