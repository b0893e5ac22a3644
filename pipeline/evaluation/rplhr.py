"""The protocol of RPLHR-CT (Yu et al., MICCAI 2022): 5 mm to 1 mm on real pairs stored as NIfTI.

As its published evaluation does it: ``SPLIT/5mm/NAME.nii.gz`` and ``SPLIT/1mm/NAME.nii.gz`` hold
v = (HU + 1024) / 3072; thick slice k is on thin slice 5k; predictions are clamped to [0, 1]; five thin slices are
dropped at each end; PSNR has the data range 1 (3072 HU) over the whole volume; SSIM is 2-D a slice, 11x11 with sigma
1.5, zeros beyond the border, mean over slices; figures are means over cases. One thing differs on purpose: a prediction
that equals the truth is reported as identical, not averaged as 40 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import CtpipeError, InputError
from pipeline.evaluation.case import CaseScores
from pipeline.evaluation.methods import SPACING_TOLERANCE
from pipeline.evaluation.results import finished_case, keep_case
from pipeline.forward_model import BASELINES, SliceProfile, apply, weights
from pipeline.metrics import intensity as metrics, ssim
from pipeline.volume import Geometry, Volume

RATIO = 5
DROPPED = 5
HU_SPAN, HU_ZERO = 3072.0, -1024.0


Generate = Callable[[Volume, Geometry], NDArray[Any]]
"""A model: the thick series and the thin grid to HU (z, y, x)."""


@dataclass(frozen=True)
class RplhrCase:
    """A pair of files. ``truth`` may be missing, which is that case's failure."""

    key: str
    thick: Path
    truth: Path


def find_cases(folder: Path, split: str) -> list[RplhrCase]:
    """The cases of a split, by name.

    Raises:
        InputError: The folder has not RPLHR-CT's form.
    """
    thick = sorted([*(folder / split / "5mm").glob("*.nii.gz"), *(folder / split / "5mm").glob("*.nii")])
    if not thick:
        raise InputError(
            f"no volumes in {split}/5mm of the data set",
            expected="RPLHR-CT's folders: train, val and test, each with 1mm and 5mm of NIfTI files",
            remedy="Unpack the download and give the folder that holds them.",
        )
    return [RplhrCase(f"case-{i:04d}", p, folder / split / "1mm" / p.name) for i, p in enumerate(thick, start=1)]


def read_nifti(path: Path) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """Values (z, y, x) of a NIfTI volume, scaled as its header says, and the pixel spacing (y, x) in mm.

    Raises:
        InputError: No such file, no NIfTI, not three axes, or nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError:
        raise InputError(
            "no NIfTI reader", expected="the package nibabel", remedy="Install it: pip install 'ctpipe[nifti]'."
        ) from None
    try:
        image: Any = nibabel.load(path)
        values = np.asarray(image.dataobj, dtype=np.float32)
        zooms = image.header.get_zooms()
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise InputError(
            f"a volume that cannot be read ({type(error).__name__})",
            expected="a whole NIfTI file",
            remedy="Download it again.",
        ) from error
    if values.ndim != 3:
        raise InputError(f"a volume of {values.ndim} axes", expected="three", remedy="Split the series in time.")
    return np.ascontiguousarray(values.transpose(2, 1, 0)), (float(zooms[1]), float(zooms[0]))


def lattices(n_thick: int, n_thin: int, rows: int, columns: int, pixel_mm: tuple[float, float]) -> list[Geometry]:
    """Thick and thin grid in mm: thick k at 5k, thin i at i.

    Raises:
        InputError: The thin series does not end on the last thick position.
    """
    if n_thin != RATIO * (n_thick - 1) + 1:
        raise InputError(
            f"{n_thick} thick and {n_thin} thin slices",
            expected=f"{RATIO * (n_thick - 1) + 1} thin slices: thick slice k lies on thin slice {RATIO}k",
            remedy="Use the pair as published, uncropped.",
        )
    out = []
    for count, step in ((n_thick, float(RATIO)), (n_thin, 1.0)):
        affine = (
            (0.0, 0.0, pixel_mm[1], 0.0),
            (0.0, pixel_mm[0], 0.0, 0.0),
            (step, 0.0, 0.0, 0.0),
            (0.0, 0.0, 0.0, 1.0),
        )
        out.append(Geometry((count, rows, columns), affine, tuple(step * i for i in range(count)), step))
    return out


def to_hu(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """HU = 3072 v - 1024."""
    return values * np.float32(HU_SPAN) + np.float32(HU_ZERO)


def from_hu(hu: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values from HU, clamped to [0, 1]."""
    v = (hu.astype(np.float32) - np.float32(HU_ZERO)) / np.float32(HU_SPAN)
    return np.clip(v, 0.0, 1.0, out=v)


def protocol_scores(prediction: NDArray[Any], truth: NDArray[np.float32]) -> dict[str, Any]:
    """PSNR and SSIM as published, of stored values (z, y, x) in [0, 1], and MAE in HU.

    Raises:
        InputError: Unequal shapes, too few slices, NaN.
    """
    metrics.check(prediction, truth)
    if len(truth) < 2 * DROPPED + 1:
        raise InputError(
            f"{len(truth)} thin slices", expected=f"more than {2 * DROPPED}", remedy="Leave this case out."
        )
    p, t = np.clip(prediction, 0.0, 1.0)[DROPPED:-DROPPED], truth[DROPPED:-DROPPED]
    mse = metrics.mean_squared_error(p, t)
    return {
        "psnr_db": float(-10 * np.log10(mse)) if mse > 0 else None,
        "identical": mse == 0,
        "ssim": ssim(p, t, data_range=1.0, border="zero"),
        "mae_hu": HU_SPAN * metrics.mean_absolute_error(p, t),
    }


def evaluate_case(case: RplhrCase, networks: Mapping[str, Generate] | None = None) -> CaseScores:
    """Every baseline and every network given by name on a case; what cannot be scored is reported."""
    scores: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    try:
        stored, pixel = read_nifti(case.thick)
        truth, thin_pixel = read_nifti(case.truth)
        thick, thin = lattices(len(stored), len(truth), truth.shape[1], truth.shape[2], pixel)
        if stored.shape[1:] != truth.shape[1:]:
            raise InputError(
                f"slices of {stored.shape[1:]} and {truth.shape[1:]}", expected="equal", remedy="Use a published pair."
            )
        if not np.allclose(pixel, thin_pixel, rtol=SPACING_TOLERANCE, atol=0):
            said = [" x ".join(f"{v:.4f}" for v in p) for p in (pixel, thin_pixel)]
            raise InputError(f"pixels of {said[0]} and {said[1]} mm", expected="equal", remedy="Use a published pair.")
    except InputError as error:
        return CaseScores(case.key, "RPLHR-CT", 0, {}, {"case": str(error)}, {}, case.key)
    hu = to_hu(stored)
    profile = SliceProfile("box", float(RATIO))

    def outputs() -> Iterator[tuple[str, Callable[[], NDArray[Any]]]]:
        for method in BASELINES:
            matrix = weights(method, np.array(thick.z_mm), np.array(thin.z_mm), profile)
            yield method, lambda m=matrix: apply(m, hu)  # type: ignore[misc]
        for name, generate in (networks or {}).items():
            yield name, lambda g=generate: g(Volume(hu, thick), thin)  # type: ignore[misc]

    for name, make in outputs():
        try:
            scores[name] = protocol_scores(from_hu(make()), truth)
        except CtpipeError as error:
            failures[name] = str(error)
    return CaseScores(case.key, "RPLHR-CT", len(truth) - 2 * DROPPED, scores, failures, {}, case.key)


def evaluate_dataset(
    folder: Path,
    split: str,
    out: Path,
    identity: str,
    networks: Mapping[str, Generate] | None = None,
    limit: int | None = None,
) -> Iterator[tuple[CaseScores, int]]:
    """Cases in order with their total number; a case that ``out`` holds under the same identity is not done again."""
    cases = find_cases(folder, split)[:limit]
    (out / "cases").mkdir(parents=True, exist_ok=True)
    for case in cases:
        path = out / "cases" / f"{case.key}.json"
        done = finished_case(path, identity)
        if done is None:
            done = evaluate_case(case, networks)
            keep_case(path, identity, done)
        yield done, len(cases)
