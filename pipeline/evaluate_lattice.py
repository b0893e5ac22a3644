"""What may be compared at all: one lattice for thick, thin and latent. All else is said of the case, not scored."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from latentcache.errors import InputError
from latentcache.records import COMPRESSION, LatentRecord
from pipeline.field_of_view import grid_difference, onto_field
from pipeline.geometry import Geometry
from pipeline.volume import Volume

SPACING_TOLERANCE = 1e-3
"""Relative; DICOM's decimal strings round by less."""


def on_one_grid(thick: Volume, thin: Geometry) -> tuple[Volume, tuple[str, ...]]:
    """The thick series on the thin one's in-plane grid, and a note where it had to be resampled for that.

    Raises:
        InputError: The thin series' field of view reaches beyond what the thick one measured.
    """
    difference = grid_difference(thick.geometry, thin)
    if not difference:
        return thick, ()
    return onto_field(thick, thin), (f"the thick series was resampled in-plane onto the thin one's grid: {difference}",)


def check_record(record: LatentRecord, thin: Geometry) -> None:
    """Refuse a stored latent that covers other slices than the thin series'.

    Raises:
        InputError: Another number of voxels, another spacing, or other positions.
    """
    depth, height, width = record.valid_zyx
    if (depth, height, width) != thin.shape_zyx:
        raise InputError(
            f"a {record.role} latent of {depth}x{height}x{width} voxels",
            expected="the thin series' " + "x".join(map(str, thin.shape_zyx)),
            remedy="Encode the store again: ctpipe encode STORE.",
        )
    dz = thin.spacing_mm_zyx[0]
    first = thin.z_mm[0] + (COMPRESSION - 1) / 2 * dz
    # A latent slice is four slices deep: a tenth of a slice is far below what anyone can see, and far above rounding.
    off = max(abs(record.z0_mm - first), abs(record.dz_mm / COMPRESSION - dz) * depth)
    if off > 0.1 * dz:
        raise InputError(
            f"a {record.role} latent of slices {record.dz_mm / COMPRESSION:.3f} mm apart from {record.z0_mm:.2f} mm",
            expected=f"the thin series' {dz:.3f} mm from {first:.2f} mm",
            remedy="Encode the store again: ctpipe encode STORE.",
        )


def check_latent(latent: NDArray[Any], thin: Geometry) -> None:
    """Refuse a generated latent (4, d, h, w) that cannot be that of the thin series.

    Raises:
        InputError: Another depth, or less in-plane than the series has.
    """
    depth, height, width = (-(-n // COMPRESSION) for n in thin.shape_zyx)
    if latent.ndim != 4 or latent.shape[1] != depth or latent.shape[2] < height or latent.shape[3] < width:
        raise InputError(
            f"a generated latent of shape {tuple(latent.shape)}",
            expected=f"(4, {depth}, {height} or more, {width} or more)",
            remedy="Sample it again: remove the generated store of this run.",
        )
