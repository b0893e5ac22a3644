"""Synthetic chest CT with known truth: a thick and a thin series of one made-up patient, from one continuous anatomy.

Both series see the same noise-free anatomy, rendered on a grid that is finer than either along z, through their own
slice-sensitivity profile (the dose-weighted response along z, IEC 61223-3-5), and carry noise of their own.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import erf

from latentcache import InputError
from latentcache.storage import written_aside
from pipeline.phantom.anatomy import Anatomy, Clot, Nodule, make_body
from pipeline.phantom.dicom import patient_zip
from pipeline.phantom.rasterise import Array, Canvas, Grid, Texture, slice_noise
from pipeline.phantom.trees import Segment
from pipeline.volume import Geometry, Volume


def make_anatomy(rng: np.random.Generator, category: str, low_z: float, high_z: float) -> Anatomy:
    """The chest of one patient between two heights (mm). ``category`` "APE" adds filling defects."""
    from pipeline.phantom.organs import add_abdomen, add_bones, add_nodules
    from pipeline.phantom.vessels import add_heart_and_vessels

    anatomy = Anatomy(make_body(rng))
    add_abdomen(anatomy, rng)
    add_nodules(anatomy, rng, low_z, high_z)
    add_heart_and_vessels(anatomy, rng, category, low_z, high_z)
    add_bones(anatomy, rng, low_z, high_z)
    return anatomy


Category = Literal["APE", "non-APE"]
CATEGORIES: tuple[str, ...] = get_args(Category)
FINE_MM = 0.5
BLOCK = 64


@dataclass(frozen=True)
class PhantomSettings:
    """Settings of a patient's scan. Lengths in mm, noise in HU (standard deviation in the soft-tissue kernel).

    Attributes:
        field_of_view_mm: In-plane width; the pixel is this over the matrix size.
        thin_fwhm_mm, thick_fwhm_mm: Width of the slice-sensitivity profiles.
        margin_mm: The thin series covers this much more than the thick one at each end, drawn from this range.
        noise_peak_lp_mm: Spatial frequency at which the noise is strongest: the kernel's sharpness.
    """

    field_of_view_mm: float = 320.0
    thin_spacing_mm: float = 1.0
    thick_spacing_mm: float = 5.0
    thin_fwhm_mm: float = 1.1
    thick_fwhm_mm: float = 5.0
    thin_sigma_hu: float = 9.0
    thick_sigma_hu: float = 4.5
    noise_peak_lp_mm: float = 0.3
    margin_mm: tuple[float, float] = (3.0, 9.0)
    in_plane_fwhm_mm: float = 1.1


@dataclass(frozen=True)
class PhantomPatient:
    """A made-up patient: what the scanner would give, and the truth behind it.

    Attributes:
        thin, thick: int16 HU with noise.
        thin_truth, thick_truth: float32 (z, y, x) HU without noise, on the grids of ``thin`` and ``thick``.
        vessels: Every segment of the vascular and airway trees with its diameters, mm, patient LPS coordinates.
        nodules, clots: Known lesions with volumes; clots only for category APE.
    """

    seed: int
    category: str
    thin: Volume
    thick: Volume
    thin_truth: Array
    thick_truth: Array
    vessels: tuple[Segment, ...]
    nodules: tuple[Nodule, ...]
    clots: tuple[Clot, ...]
    settings: PhantomSettings


def make_patient(
    seed: int,
    size: int = 128,
    n_thin: int = 120,
    category: str = "APE",
    settings: PhantomSettings | None = None,
) -> PhantomPatient:
    """One patient, the same for the same arguments: ``n_thin`` slices of ``size`` x ``size`` and its thick series.

    Raises:
        InputError: Fewer than 16 pixels, or too few thin slices to hold two thick ones.
    """
    settings = settings or PhantomSettings()
    if size < 16:
        raise InputError(f"size {size}", expected="16 pixels or more", remedy="Give a larger --size.")
    if category not in CATEGORIES:
        raise InputError(f"category {category!r}", expected="APE or non-APE", remedy="Choose one of the two.")
    rng = np.random.default_rng([seed, 20])
    thin_z, thick_z = _positions(rng, n_thin, settings)
    low, high = thin_z[0] - 2.0, thin_z[-1] + 2.0
    low, high = min(low, thick_z[0] - 6.0), max(high, thick_z[-1] + 6.0)
    anatomy = make_anatomy(rng, category, low, high)
    thin_truth, thick_truth = _render(anatomy, rng, size, (low, high), (thin_z, thick_z), settings)
    pixel = settings.field_of_view_mm / size
    thin = _scan(rng, thin_truth, settings.thin_sigma_hu, pixel, settings)
    thick = _scan(rng, thick_truth, settings.thick_sigma_hu, pixel, settings)
    return PhantomPatient(
        seed=seed,
        category=category,
        thin=Volume(thin, _geometry(thin_z, size, pixel, settings.thin_spacing_mm)),
        thick=Volume(thick, _geometry(thick_z, size, pixel, settings.thick_spacing_mm)),
        thin_truth=thin_truth,
        thick_truth=thick_truth,
        vessels=tuple(anatomy.segments),
        nodules=tuple(anatomy.nodules),
        clots=tuple(anatomy.clots),
        settings=settings,
    )


def _positions(
    rng: np.random.Generator, n_thin: int, settings: PhantomSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slice centres of both series, mm, on a 0.1 mm raster so that DICOM's decimal strings are exact."""
    length = n_thin * settings.thin_spacing_mm
    largest = (length - 2 * settings.thick_spacing_mm) / 2
    if largest < 0:
        raise InputError(
            f"{n_thin} thin slices of {settings.thin_spacing_mm} mm",
            expected=f"a length of {2 * settings.thick_spacing_mm} mm or more, two thick slices",
            remedy="Give more --thin-slices.",
        )
    # A short scan is centred on the hila and the heart, a long one on the middle of the chest.
    center = 126.0 + rng.uniform(-9, 9) + 24.0 * np.clip((length - 120) / 180, 0, 1)
    first = np.round(center - length / 2, 1)
    margins = np.minimum(rng.uniform(*settings.margin_mm, size=2), largest)
    count = max(2, int((length - margins.sum()) // settings.thick_spacing_mm))
    start = first - settings.thin_spacing_mm / 2 + margins[0] + settings.thick_spacing_mm / 2
    thin = first + settings.thin_spacing_mm * np.arange(n_thin)
    return np.round(thin, 3), np.round(np.round(start, 1) + settings.thick_spacing_mm * np.arange(count), 3)


def slice_profile(offset_mm: NDArray[Any], fwhm_mm: float, spacing_mm: float) -> NDArray[np.float64]:
    """Slice-sensitivity profile at distances from the slice centre: a box of ``fwhm_mm`` with Gaussian shoulders.

    The shoulders have a FWHM of a third of the spacing, at most 1.2 mm: what a narrow detector row leaves of a box.
    """
    sigma = min(1.2, spacing_mm / 3) / 2.3548 * np.sqrt(2)
    offset = np.asarray(offset_mm, dtype=np.float64)
    return np.asarray(0.5 * (erf((offset + fwhm_mm / 2) / sigma) - erf((offset - fwhm_mm / 2) / sigma)))


def _render(
    anatomy: Anatomy,
    rng: np.random.Generator,
    size: int,
    extent: tuple[float, float],
    positions: tuple[NDArray[np.float64], NDArray[np.float64]],
    settings: PhantomSettings,
) -> tuple[Array, Array]:
    """Noise-free thin and thick HU. The fine grid passes in blocks, so that memory stays that of the results."""
    fov = settings.field_of_view_mm
    pixel = fov / size
    axis = ((np.arange(size) - (size - 1) / 2) * pixel).astype(np.float32)
    z = np.arange(extent[0], extent[1] + FINE_MM, FINE_MM)
    half = fov / 2
    low, high = (-half, -half, extent[0]), (half, half, extent[1] + FINE_MM)
    fine = Texture.random(rng, low, high, max(3.2, 1.3 * pixel))
    coarse = Texture.random(rng, low, high, 11.0)
    weights = []
    for centers, fwhm, spacing in (
        (positions[0], settings.thin_fwhm_mm, settings.thin_spacing_mm),
        (positions[1], settings.thick_fwhm_mm, settings.thick_spacing_mm),
    ):
        w = slice_profile(z[None, :] - centers[:, None], fwhm, spacing)
        weights.append((w / w.sum(axis=1, keepdims=True)).astype(np.float32))
    out = [np.zeros((len(w), size * size), dtype=np.float32) for w in weights]
    for start in range(0, len(z), BLOCK):
        block = slice(start, start + BLOCK)
        grid = Grid(axis, axis, z[block].astype(np.float32))
        canvas = Canvas(grid, np.empty((len(grid.z), size, size), np.float32), fine.sample(grid), coarse.sample(grid))
        anatomy.paint(canvas)
        flat = canvas.hu.reshape(len(grid.z), -1)
        for target, w in zip(out, weights, strict=True):
            rows = np.flatnonzero(w[:, block].any(axis=1))
            if len(rows):
                target[rows[0] : rows[-1] + 1] += w[rows[0] : rows[-1] + 1, block] @ flat
    volumes = [o.reshape(-1, size, size) for o in out]
    # A reconstruction is band-limited to its matrix: a point is never narrower than about 1.6 pixels. Part of it, a
    # box of one pixel (0.68 pixels as a Gaussian's FWHM), is in the edges already.
    fwhm = max(settings.in_plane_fwhm_mm / pixel, 1.57)
    sigma = (fwhm**2 - 0.68**2) ** 0.5 / 2.3548
    volumes = [gaussian_filter1d(gaussian_filter1d(v, sigma, axis=1), sigma, axis=2) for v in volumes]
    return volumes[0], volumes[1]


def _scan(
    rng: np.random.Generator, truth: Array, sigma: float, pixel: float, settings: PhantomSettings
) -> NDArray[np.int16]:
    """Adds noise, strongest in the middle of the body, and quantises to what 12 bits with intercept -1024 can hold."""
    n, size, _ = truth.shape
    noise = slice_noise(rng, n, size, pixel, sigma, settings.noise_peak_lp_mm)
    axis = (np.arange(size) - (size - 1) / 2) / (size / 2)
    noise *= (1.15 - 0.45 * np.clip(axis[:, None] ** 2 + axis[None, :] ** 2, 0, 1)).astype(np.float32)
    noise += truth
    return np.clip(np.rint(noise), -1024, 3071).astype(np.int16)


def _geometry(z: NDArray[np.float64], size: int, pixel: float, spacing: float) -> Geometry:
    """Head-first supine axial slices centred on the origin."""
    corner = -(size - 1) / 2 * pixel
    affine = (
        (0.0, 0.0, pixel, corner),
        (0.0, pixel, 0.0, corner),
        (spacing, 0.0, 0.0, float(z[0])),
        (0.0, 0.0, 0.0, 1.0),
    )
    return Geometry((len(z), size, size), affine, tuple(float(v) for v in z), spacing)


def write_dataset(
    out: Path,
    *,
    patients: int = 4,
    size: int = 128,
    n_thin: int = 120,
    seed: int = 0,
    settings: PhantomSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write ``OUT/APE/patient_001.zip``, ``OUT/non-APE/patient_002.zip``, ...: categories in turn, a zip a patient.

    Patient ``n`` is ``make_patient(1000 * seed + n, ...)``, so its truth can be made again at any time; how is in
    the zip's comment. A zip that is there already and was made the same way is left as it is.

    Returns:
        The zips, in order.

    Raises:
        InputError: A zip of that name exists and is something else; nothing is ever overwritten.
    """
    settings = settings or PhantomSettings()
    paths = []
    for number in range(1, patients + 1):
        category = CATEGORIES[(number - 1) % len(CATEGORIES)]
        path = Path(out) / category / f"patient_{number:03d}.zip"
        own_seed = 1000 * seed + number
        recipe = {"seed": own_seed, "size": size, "n_thin": n_thin, "category": category, "settings": asdict(settings)}
        comment = json.dumps({"ctpipe-phantom": recipe}, sort_keys=True)
        if not _made_already(path, comment):
            patient = make_patient(own_seed, size, n_thin, category, settings)
            label = f"S{seed}_{category}_{number:03d}"
            with written_aside(path) as draft:
                draft.write_bytes(patient_zip(patient.thick, patient.thin, label, comment))
        paths.append(path)
        if progress:
            progress(1)
    return paths


def _made_already(path: Path, comment: str) -> bool:
    """Whether a phantom made the same way is there; anything else of that name is refused."""
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            same = archive.comment.decode(errors="replace") == comment
    except zipfile.BadZipFile:
        same = False
    if not same:
        raise InputError(
            f"{path.parent.name}/{path.name} exists and was not made by this command with these settings",
            expected="an empty output folder, or one that this command began",
            remedy="Choose another output folder.",
        )
    return True
