"""Notebooks and examples run from top to bottom on tiny phantoms, in folders of their own."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cli.main import app
from tests.docs.test_how_to import SMALL, STEPS
from tests.support.small_site import Phantoms

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "infra" / "notebooks"
EXAMPLES = ROOT / "infra" / "examples"

TRAIN = " ".join(SMALL["train"] + STEPS)
TINY = {
    "one_study": "SIZE, SLICES, STUDY, MODEL = 32, 36, '', None",
    "archive_to_model": f"PATIENTS, SIZE, SLICES, SECONDS, SETTINGS = 4, 32, 36, 60, {TRAIN!r}",
    "reading_a_report": "",
}
"""What replaces a notebook's parameters."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the notebooks run; `ctpipe` is on the path, as after an installation, and is this tree's."""
    where = tmp_path_factory.mktemp("notebooks")
    program = where / "bin" / "ctpipe"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli.main "$@"\n')
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MPLBACKEND", "agg")
        yield where


def execute(name: str, folder: Path) -> str:
    """Run a notebook with tiny parameters; what its cells printed."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"{parameters.source}\n{TINY[name]}"
    # No limits that a loaded machine could reach: a kernel alone takes more than nbclient's minute to start there.
    patient = {"timeout": None, "startup_timeout": 600}
    nbclient.NotebookClient(notebook, **patient, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.filterwarnings("default")
def test_one_study(folder: Path) -> None:
    printed = execute("one_study", folder)
    assert "RMS against the measured slices" in printed


@pytest.mark.filterwarnings("default")
def test_from_archive_to_model_and_reading_its_report(folder: Path) -> None:
    assert "thin" in execute("archive_to_model", folder) or (folder / "report.html").is_file()
    assert (folder / "report.html").is_file()
    printed = execute("reading_a_report", folder)
    assert "cubic_consistent" in printed
    assert "model" in printed


def test_notebooks_are_kept_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    kept = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert {path.stem for path in kept} == set(TINY)
    for path in kept:
        cells = nbformat.read(path, as_version=4).cells
        assert not [cell for cell in cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def archive(phantoms: Phantoms) -> Path:
    return phantoms(4, 32, 36)


def test_thin_out_a_folder_names_what_it_cannot_use_and_goes_on(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    (studies / "broken.zip").write_bytes(b"no zip")
    (studies / "good.zip").write_bytes(next(archive.rglob("*.zip")).read_bytes())
    main = example("thin_out_a_folder").main
    assert main(studies, tmp_path / "out") == 1
    first = capsys.readouterr().out
    assert "broken.zip: " in first
    assert "good.zip: " in first
    assert "RMS" in first
    assert main(studies, tmp_path / "out") == 1
    assert "good.zip: there already" in capsys.readouterr().out


def test_latents_in_torch(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "store")
    for words in (["ingest", str(archive), store, "--workers", "1"], ["encode", store, "--threads", "1"]):
        assert app([*words, "--json"], standalone_mode=False) in (0, None)
    capsys.readouterr()
    example("latents_in_torch").main(store)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("(1, 4, ") for line in lines)
