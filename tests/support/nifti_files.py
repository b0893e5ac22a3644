"""Made thick NIfTI volumes of a body in air, in any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.support.dicom_files import anatomy

RAS = np.diag([-0.8, -0.8, 5.0, 1.0])


def body(count: int = 8, size: int = 32) -> NDArray[np.int16]:
    """(i, j, k) int16 HU: a disc of soft tissue in air."""
    return (anatomy(count, size).astype(np.int16) - 1024).transpose(2, 1, 0)


def nifti(
    path: Path,
    hu: NDArray[np.generic] | None = None,
    affine: NDArray[np.float64] = RAS,
    code: int = 1,
    unit: str = "mm",
) -> Path:
    """Write a file and return its path."""
    import nibabel

    image = nibabel.Nifti1Image(body() if hu is None else hu, affine)
    image.header.set_xyzt_units(unit)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nibabel.save(image, path)
    return path
