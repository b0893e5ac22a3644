"""The round-trip figures: right for an error that is known, and drawn from genuine files through the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from latentcache import InputError, SeriesRecord
from pipeline.evaluation import check, plot, sample_series, summarise, table
from pipeline.evaluation.vae_reconstruction import score, unclipped_classes
from pipeline.volume import Window


class Shifted:
    """A VAE that adds a constant to [-1, 1]: every figure is known."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def encode(self, unit: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(unit)[None]

    def decode(self, latent: torch.Tensor, valid_zyx: tuple[int, int, int]) -> torch.Tensor:
        assert tuple(latent.shape[1:]) == valid_zyx
        return latent[0] + self.shift


def body() -> np.ndarray:
    """Air, lung, fat, soft tissue, contrast and bone in slabs."""
    values = [-1000, -800, -100, 40, 300, 700]
    return np.repeat(np.array(values, dtype=np.int16), 8)[None, :, None].repeat(12, 0).repeat(48, 2)


def record(key: str, patient: str, status: str = "ok") -> SeriesRecord:
    return SeriesRecord(
        series_key=key, study_key=key, patient_key=patient, category="APE", role="thin", status=status, reason="",  # type: ignore[arg-type]
        n_slices=1, shape_zyx=(1, 1, 1), spacing_mm_zyx=(1, 1, 1), thickness_mm=1, affine_lps=(), z_mm=(0,),
        frame_key="", acquisition_key="", kernel="", modality="CT", transfer_syntax="",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "tissues"), [
    ("soft-tissue", {"fat", "soft_tissue"}),
    ("maisi", {"lung", "fat", "soft_tissue", "contrast", "bone"}),
    ("lung", {"lung", "fat", "soft_tissue"}),
])  # fmt: skip
def test_a_known_shift_gives_known_figures(name: str, tissues: set[str]) -> None:
    found = score(Shifted(0.05), body(), name)
    width = Window.parse(name).width
    assert found.psnr_db == pytest.approx(-20 * np.log10(0.025), abs=0.05)  # 0.05 of 2 is 1/40 of the window
    assert found.mae_hu == pytest.approx(width / 40, rel=0.02)
    assert set(found.bias_hu) == tissues
    assert all(bias == pytest.approx(width / 40, rel=0.05) for bias in found.bias_hu.values())


def test_classes_that_a_window_clips_are_left_out() -> None:
    assert unclipped_classes(Window.parse("soft-tissue")) == {"fat", "soft_tissue"}
    assert "bone" in unclipped_classes(Window.parse("maisi"))


def test_sample_spreads_over_patients_and_repeats() -> None:
    rows = [record(f"{p}{i}", p) for p in "abc" for i in range(5)] + [record("bad", "z", "quarantined")]
    chosen = sample_series(rows, 3)
    assert {r.patient_key for r in chosen} == {"a", "b", "c"}
    assert chosen == sample_series(reversed(rows), 3)
    with pytest.raises(InputError, match="no usable series"):
        sample_series([record("bad", "z", "quarantined")], 3)


def test_table_and_plot(tmp_path: Path) -> None:
    scores = check(Shifted(0.02), [record("a", "a")], lambda _: body(), ["soft-tissue", "maisi"])
    text = table(summarise(scores))
    assert "40.0 dB" in text
    assert "-160 to 240 HU" in text
    plot(scores, tmp_path / "ceiling.png")
    assert (tmp_path / "ceiling.png").read_bytes()[:4] == b"\x89PNG"


def test_command_on_genuine_files(tmp_path: Path) -> None:
    from cli.main import app
    from pipeline.phantom import write_dataset

    write_dataset(tmp_path / "data", patients=1, size=32, n_thin=24)
    runner = CliRunner()
    done = runner.invoke(app, ["ingest", str(tmp_path / "data"), str(tmp_path / "store"), "--json"])
    assert done.exit_code == 0, done.output
    done = runner.invoke(
        app, ["vae-check", str(tmp_path / "store"), "--windows", "soft-tissue,lung", "--sample", "1", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [row["window"] for row in result["windows"]] == ["soft-tissue", "lung"]
    assert all(5 < row["psnr_db"] < 60 for row in result["windows"])
