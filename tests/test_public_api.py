"""``import ctpipe``: every public name resolves, is typed, and the ten lines of the README do what they say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ctpipe
from pipeline.phantom import write_dataset

TEN_LINES = """
from ctpipe import open_archive, read_series, scan

with open_archive(STUDY) as source:
    thick = read_series(scan(source).series[0].pointer)
print(thick.hu.shape, thick.geometry.spacing_mm_zyx)
"""
"""The reader's half of the README's example; interpolation has its own end-to-end test."""

JOBS = {
    "interpolate_study", "evaluate_run", "train_refiner", "train_regression", "write_report", "sample_store",
    "ingest", "encode_store", "decode_store", "train", "load_config", "build_objective",
}  # fmt: skip

NAMES = {
    "Autoencoder", "LatentGrid", "enforce_data_consistency", "residual_rms", "slice_operator", "SliceProfile", "psnr",
    "ssim", "ssim_3d", "ms_ssim", "noise_power_spectrum", "modulation_transfer", "write_ct_series", "write_enhanced_ct",
}  # fmt: skip


@pytest.mark.parametrize("name", ctpipe.__all__)
def test_every_public_name_resolves_to_something_documented(name: str) -> None:
    found = getattr(ctpipe, name)
    assert callable(found), "classes and functions, not modules"
    assert (found.__doc__ or "").strip(), f"{name} has no docstring"


def test_the_promised_jobs_are_public() -> None:
    assert set(ctpipe.__all__) >= JOBS | NAMES


def test_the_types_name_what_is_there() -> None:
    """The block for type checkers imports exactly the names of HOMES, each from its home."""
    tree = ast.parse(Path(ctpipe.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        (node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == {(home, name) for home, names in ctpipe.HOMES.items() for name in names}


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="interpolate_study"):
        ctpipe.interpolate  # noqa: B018


def test_ten_lines_read_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study,) = write_dataset(tmp_path, patients=1, size=32, n_thin=46)
    exec(TEN_LINES, {"STUDY": str(study)})
    assert "32, 32)" in capsys.readouterr().out
