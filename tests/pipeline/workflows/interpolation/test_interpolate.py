"""A thick-only study to a thin series, with a codec that is a plain average in place of the VAE."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from diffusion.data import align_depth
from latentcache import InputError
from pipeline.archive import open_archive
from pipeline.decode import ComposeSettings, WriteSettings
from pipeline.identity import Keys
from pipeline.phantom import write_dataset
from pipeline.reading import read_series, scan
from pipeline.volume import Volume, Window
from pipeline.workflows import InterpolateSettings, choose_thick, condition_latent
from pipeline.workflows.interpolation.interpolate import interpolate, onto_spacing
from pipeline.workflows.interpolation.thick_study import pointer_of
from pipeline.writing import read_provenance
from tests.support.average_codec import AverageCodec

KEYS = Keys(b"0123456789abcdef")
WINDOW = Window(40, 400)


@dataclass(frozen=True)
class Study:
    scanned: Any
    thick: Volume


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    (zipped,) = write_dataset(tmp_path_factory.mktemp("archive"), patients=1, size=32, n_thin=46, seed=5)
    scanned = choose_thick(scan(open_archive(zipped)).series, spacing_mm=1.0)
    return Study(scanned, read_series(pointer_of(scanned, "k"), threads=1))


def same(condition: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """A model that has learnt nothing: the condition is its answer."""
    return [condition]


def settings(out: Path, **options: Any) -> InterpolateSettings:
    writing = {k: options.pop(k) for k in ("uncertainty", "uncertainty_map", "transfer_syntax") if k in options}
    return InterpolateSettings(WriteSettings(out, WINDOW, **writing), **options)


def test_the_whole_thick_extent_is_covered(study: Study, tmp_path: Path) -> None:
    steps: list[str] = []
    done = interpolate(
        study.thick, study.scanned, KEYS, AverageCodec(), same, settings(tmp_path), progress=steps.append
    )
    files = sorted((tmp_path / done.key).iterdir())
    assert len(files) == 5 * len(study.thick.hu) == done.n_slices
    first, last = (pydicom.dcmread(files[i]) for i in (0, -1))
    low, high = study.thick.geometry.extent_mm
    assert float(first.SliceLocation) - 0.5 == pytest.approx(low)
    assert float(last.SliceLocation) + 0.5 == pytest.approx(high)
    assert done.key == KEYS.series(study.scanned.series_uid, study.scanned.discriminator)
    assert steps == ["encode", "generate", "decode and write"]
    assert len(first.SourceImageSequence) == len(study.thick.hu)
    raw = files[0].read_bytes()
    for secret in (study.scanned.study_uid, study.scanned.series_uid, study.scanned.frame_uid):
        assert secret.encode() not in raw


@pytest.mark.parametrize(("spacing", "per_thick"), [(2.5, 2), (0.5, 10)])
def test_another_spacing_is_resampled_and_said(study: Study, tmp_path: Path, spacing: float, per_thick: int) -> None:
    wanted = settings(tmp_path, spacing_mm=spacing)
    done = interpolate(study.thick, study.scanned, KEYS, AverageCodec(), same, wanted)
    assert done.n_slices == per_thick * len(study.thick.hu)
    ds = pydicom.dcmread(tmp_path / done.key / "00001.dcm")
    assert float(ds.SpacingBetweenSlices) == pytest.approx(spacing)
    assert read_provenance(ds)["notes"] == ["resampled along z from the model's 1 mm"]
    assert "resampled along z" in ds.DerivationDescription


def test_a_coarser_spacing_averages(study: Study) -> None:
    have = study.thick.geometry.thin_grid(1.0)
    want = study.thick.geometry.thin_grid(2.5)
    ramp = np.broadcast_to(np.asarray(have.z_mm, np.float32)[:, None, None], have.shape_zyx)
    np.testing.assert_allclose(onto_spacing(ramp, have, want)[1:-1, 0, 0], want.z_mm[1:-1], atol=0.06)
    comb = np.zeros(have.shape_zyx, np.float32)
    comb[::2] = 10
    assert np.ptp(onto_spacing(comb, have, want)[2:-2]) < 5


def test_latent_alignment_is_the_one_of_training(study: Study) -> None:
    codec = AverageCodec()
    target = study.thick.geometry.thin_grid(1.0)
    got = condition_latent(study.thick, target, WINDOW, codec, "latent")
    thick = codec.encode(WINDOW.to_unit(study.thick.hu))
    z = study.thick.geometry.z_mm
    positions_thick = z[0] + 7.5 + 20.0 * np.arange(thick.shape[1])
    positions_thin = target.z_mm[0] + 1.5 + 4.0 * np.arange(got.shape[1])
    import torch

    expected = align_depth(torch.from_numpy(thick), positions_thick, positions_thin).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_samples_give_an_uncertainty_series(study: Study, tmp_path: Path) -> None:
    def two(condition: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return [condition - 0.05, condition + 0.05]

    wanted = settings(tmp_path, uncertainty=True)
    done = interpolate(study.thick, study.scanned, KEYS, AverageCodec(), two, wanted)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [done.key, f"{done.key}-uncertainty"]
    assert done.figures["uncertainty_mean_hu"] > 0
    as_map = settings(tmp_path / "map", uncertainty=True, uncertainty_map=True)
    interpolate(study.thick, study.scanned, KEYS, AverageCodec(), two, as_map)
    (path,) = (tmp_path / "map" / f"{done.key}-uncertainty").iterdir()
    spread = pydicom.dcmread(path)
    assert spread.SOPClassUID.name == "Parametric Map Storage"
    assert spread.pixel_array.mean() == pytest.approx(done.figures["uncertainty_mean_hu"], abs=0.01)


def test_restored_identity(study: Study, tmp_path: Path) -> None:
    wanted = settings(tmp_path, restore_identity=True)
    done = interpolate(study.thick, study.scanned, KEYS, AverageCodec(), same, wanted)
    ds = pydicom.dcmread(tmp_path / done.key / "00001.dcm")
    assert study.scanned.study_uid == ds.StudyInstanceUID
    assert [i.ReferencedSOPInstanceUID for i in ds.SourceImageSequence] == list(study.thick.header.sop_instance_uids)


def test_what_cannot_be_interpolated_is_said(study: Study) -> None:
    short = replace(study.scanned, geometry=study.thick.geometry.with_z([0.0, 5.0]))
    lost = replace(study.scanned, geometry=None, status="quarantined", reason="no positions")
    scout = replace(study.scanned, role_hint="other", reason="a localizer")
    with pytest.raises(InputError) as caught:
        choose_thick([short, lost, scout], spacing_mm=1.0)
    for reason in ("2 slices", "no positions", "a localizer"):
        assert reason in str(caught.value)
    with pytest.raises(InputError, match="as fine already"):
        choose_thick([study.scanned], spacing_mm=5.0)
    with pytest.raises(InputError, match="in this input"):
        choose_thick([], spacing_mm=1.0)


def test_a_taken_folder_is_refused_before_the_model_runs(study: Study, tmp_path: Path) -> None:
    key = KEYS.series(study.scanned.series_uid, study.scanned.discriminator)
    (tmp_path / key).mkdir()

    def never(condition: Any) -> Any:
        raise AssertionError("generated although the folder is taken")

    with pytest.raises(InputError, match="exists"):
        interpolate(study.thick, study.scanned, KEYS, AverageCodec(), never, settings(tmp_path))


def test_a_certificate_that_fails_or_is_missing_is_logged(
    study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that shifts everything by 40 HU, never made consistent: the log names the series and the tissue."""
    wide = Window.parse("maisi")
    wanted = InterpolateSettings(
        WriteSettings(tmp_path, wide), ComposeSettings(detail="absolute", consistency=False, profile=None)
    )
    with caplog.at_level(logging.WARNING, logger="ctpipe.interpolate"):
        done = interpolate(
            study.thick, study.scanned, KEYS, AverageCodec(), lambda z: [z + np.float32(80 / wide.width)], wanted
        )
    judged = done.figures["certificate"]
    assert judged["failing"] or judged["missing"]
    assert judged["shift_hu"] == {} or min(judged["shift_hu"].values()) > 1
    assert f"series {done.key}: {judged['said']}" in caplog.text
