"""What a shipped model was not trained for is refused, or flagged by name with what to do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from latentcache import InputError
from pipeline.refiner import load_pretrained
from pipeline.volume import Geometry, SourceHeader, Volume
from pipeline.workflows.interpolation.suitability import check_suitable, kernel_class
from tests.support.dicom_files import anatomy

CARD = load_pretrained().card


def thick(spacing: float = 5.0, thickness: float = 5.0, pixel: float = 0.8, kernel: str = "Br38f") -> Volume:
    affine = ((0.0, 0.0, pixel, 0.0), (0.0, pixel, 0.0, 0.0), (spacing, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    at = Geometry((8, 32, 32), affine, tuple(spacing * np.arange(8)), thickness)
    return Volume((anatomy().astype(np.int16) - 1024), at, SourceHeader({"ConvolutionKernel": kernel}))


def said(volume: Volume, spacing_mm: float = 1.0, **options: bool) -> str:
    return "; ".join(check_suitable(volume, CARD, volume.geometry.thin_grid(spacing_mm), **options))


def test_an_ordinary_series_raises_no_doubt() -> None:
    assert said(thick()) == ""


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        (thick(10.0, 10.0), ("slice thickness 10 mm", "slice spacing 10 mm", "plain interpolation")),
        (thick(pixel=4.0), ("pixel size 4 mm",)),
        (thick(kernel="Br69f"), ("kernel Br69f", "soft reconstruction")),
        (thick(thickness=0.0), ("no slice thickness", "--fwhm-mm")),
        (replace(thick(), flags=("gantry-tilt",)), ("tilted",)),
        (replace(thick(8.0), flags=("gaps-between-slices",)), ("gaps",)),
        (replace(thick(), hu=np.where(thick().hu < -500, 40, thick().hu).astype(np.int16)), ("cropped",)),
    ],
)
def test_what_lies_outside_is_named_with_what_to_do(volume: Volume, words: tuple[str, ...]) -> None:
    if "cropped" in words:
        volume.hu[:, 16, 16] = -1000  # one airway: values that may be HU
    text = said(volume)
    for word in words:
        assert word in text


def test_a_wanted_spacing_outside_the_card_is_named() -> None:
    assert "wanted slice spacing 0.3 mm" in said(thick(), 0.3)


@pytest.mark.parametrize(("low", "high"), [(0, 1800), (-150, 300)])
def test_values_without_air_are_refused(low: int, high: int) -> None:
    """MR, PET and cone-beam CT count from 0; a field cut from inside the body has no air either."""
    volume = thick()
    hu = np.random.default_rng(0).integers(low, high, volume.hu.shape).astype(np.int16)
    with pytest.raises(InputError, match="none of them air"):
        said(replace(volume, hu=hu))


def test_nifti_says_that_it_states_no_thickness() -> None:
    assert "NIfTI states no slice thickness" in said(thick(), stated=False)


def test_kernels() -> None:
    for sharp in ("B70f", "Br64", "Hr68h\\3", "LUNG", "BONEPLUS", "FC51", "FC81", "YC", "B_SHARP_C"):
        assert kernel_class(sharp) == "sharp", sharp
    for soft in ("B30f", "Br38f\\3", "STANDARD", "SOFT", "FC08", "FC18", "B", "H30s", "I31f\\2", "UB"):
        assert kernel_class(soft) == "soft", soft
    assert kernel_class("") == ""
