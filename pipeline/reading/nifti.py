"""A NIfTI file (``.nii``, ``.nii.gz``) as a volume in HU, with its affine and its layout.

NIfTI says neither what was measured nor how thick slices are: a volume without air is refused, since its values are
hardly HU, and the slice thickness is left open (0), which everywhere means that of the spacing.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.volume import Geometry, NiftiLayout, Volume

MAX_VOXELS = 1 << 31
RIGHT_ANGLE = 1e-3
"""Largest cosine between rows and columns."""
MIN_TILT_DEG = 0.1


@dataclass(frozen=True)
class NiftiSeries:
    """A volume from a NIfTI file; ``digest`` is the SHA-256 of the file's bytes, from which its keys derive."""

    volume: Volume
    layout: NiftiLayout
    digest: str


def read_nifti(path: str | Path) -> NiftiSeries:
    """Read a file.

    Raises:
        InputError: nibabel is not installed, the file is damaged, it states no affine or no lengths in mm, it is no
            single volume, its rows and columns are oblique to each other, its values are not finite, or it changed
            while it was read.
    """
    path = Path(path)
    before = _stamp(path)
    image = _opened(path)
    affine = np.asarray(image.affine, np.float64)
    array = _voxels(image)
    suffix = ".nii.gz" if path.name.lower().endswith(".gz") else ".nii"
    layout = NiftiLayout.of(affine, suffix)
    values = layout.to_zyx(array)
    if not np.isfinite(values).all():
        raise _refused("values that are NaN or infinite", "finite HU", "Fill them with air, -1024, or write it anew.")
    geometry, flags = grid_of(layout.affine_lps(affine, values.shape), values.shape)
    volume, digest = Volume(_as_hu(values), geometry, flags=flags), _digest(path)
    if _stamp(path) != before:
        raise _refused("bytes that changed while it was read", "a file at rest", "Run the command again.")
    return NiftiSeries(volume, layout, digest)


def grid_of(affine: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[Geometry, tuple[str, ...]]:
    """Geometry of a (z, y, x) array with this affine to LPS, and its flags."""
    slice_step, column_step, row_step = affine[:3, 0], affine[:3, 1], affine[:3, 2]
    normal = np.cross(row_step, column_step)
    area = np.linalg.norm(row_step) * np.linalg.norm(column_step)
    if abs(row_step @ column_step) > RIGHT_ANGLE * area or abs(normal @ slice_step) < 1e-9:
        raise _refused(
            "rows and columns that are not at right angles", "a grid as scanners make it", "Resample it first."
        )
    normal /= np.linalg.norm(normal)
    along = float(normal @ slice_step)
    tilt = math.degrees(math.acos(min(1.0, abs(along) / float(np.linalg.norm(slice_step)))))
    z = float(affine[:3, 3] @ normal) + along * np.arange(shape[0])
    rows = tuple(tuple(float(v) for v in row) for row in affine)
    depth, height, width = shape
    geometry = Geometry((depth, height, width), rows, tuple(float(v) for v in z), 0.0)
    return geometry, ("gantry-tilt",) if tilt > MIN_TILT_DEG else ()


def _opened(path: Path) -> Any:
    try:
        import nibabel
    except ImportError:
        raise InputError(
            "nibabel is not installed", expected="it, to read NIfTI", remedy="Install ctpipe[nifti]."
        ) from None
    try:
        image = nibabel.load(path)
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise _refused(
            f"a file that is not read ({type(error).__name__})", "NIfTI-1 or NIfTI-2", "Write it anew."
        ) from None
    if not isinstance(image, nibabel.Nifti1Pair):
        raise _refused("another format under this name", "NIfTI-1 or NIfTI-2", "Convert it.")
    header = image.header
    if not (int(header["sform_code"]) or int(header["qform_code"])):
        raise _refused("no affine (sform_code and qform_code are 0)", "positions in mm", "Write it with its affine.")
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise _refused("an affine that is singular or not finite", "positions in mm", "Write it with its affine.")
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise _refused(f"lengths in {unit}", "mm", "Write it in mm.")
    return image


def _voxels(image: Any) -> NDArray[Any]:
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise _refused(f"an array of {'x'.join(map(str, image.shape))}", "one volume", "Write one volume a file.")
    if image.get_data_dtype().kind not in "iuf":
        raise _refused(f"values of type {image.get_data_dtype()}", "HU as numbers", "Write grey values.")
    try:
        return np.asarray(np.asanyarray(image.dataobj).reshape(shape))
    except (OSError, EOFError, ValueError) as error:
        raise _refused(f"voxels that are not read ({type(error).__name__})", "a whole file", "Copy it again.") from None


def _as_hu(values: NDArray[Any]) -> NDArray[Any]:
    """int16 where nothing is lost, else float32; contiguous."""
    whole = values.dtype.kind in "iu" or bool((values == np.rint(values)).all())
    if whole and values.min() >= -32768 and values.max() <= 32767:
        return np.ascontiguousarray(values, dtype=np.int16)
    return np.ascontiguousarray(values, dtype=np.float32)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None where there is no file, which reading reports."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refused(found: str, expected: str, remedy: str) -> InputError:
    return InputError(f"a NIfTI file with {found}", expected=expected, remedy=remedy)
